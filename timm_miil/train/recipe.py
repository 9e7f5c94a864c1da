"""Recipes: every setting of a training run, read strictly from TOML."""
import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from timm_miil._checks import check_choice, check_multiple, check_positive, check_range, nearest
from timm_miil._errors import RecipeError
from timm_miil.data import IdentityConfig, SceneConfig, TreeSceneConfig
from timm_miil.train._dual_head_settings import DualHeadSettings, LabelAugmentationSettings
from timm_miil.train._injection_settings import InjectionSettings
from timm_miil.train._long_tail_settings import BalancedSettings, PositiveUnlabeledSettings
from timm_miil.train._self_supervised import check_self_supervised
from timm_miil.train._settings import (
    AugmentSettings, DataSettings, LossSettings, ModelSettings, OptimizerSettings, PaperSettings, PartialSettings,
    PriorSettings, ScheduleSettings, check_from_zero)
from timm_miil.train._sharing_settings import SharingSettings
from timm_miil.train._teacher_settings import TeacherSettings
from timm_miil.train._toml import as_table, is_text, parse_value, read_settings, write_toml
from timm_miil.train._verification_settings import VerificationSettings
from timm_miil.train._zero_shot_settings import ZeroShotSettings

__all__ = [
    'AugmentSettings', 'BalancedSettings', 'DataSettings', 'DualHeadSettings', 'InjectionSettings',
    'LabelAugmentationSettings', 'LossSettings', 'ModelSettings', 'OptimizerSettings', 'PaperSettings',
    'PartialSettings', 'PositiveUnlabeledSettings', 'PriorSettings', 'Recipe', 'ScheduleSettings', 'SharingSettings',
    'TeacherSettings', 'VerificationSettings', 'ZeroShotSettings', 'list_recipes', 'load_recipe',
]

TASKS = ('multi_label', 'self_supervised', 'semantic', 'single_label', 'verification', 'zero_shot')
PRECISIONS = ('fp32', 'bf16', 'fp16')
METHODS = ('sharing', 'dual_head', 'label_augmentation', 'balanced', 'positive_unlabeled', 'injection', 'verification')
MADE_PICTURES = ('scenes', 'tree_scenes', 'identities')


@dataclass(frozen=True)
class Recipe:
    """How to train a model.

    Args:
        summary: One sentence for people.
        epochs: Passes over the training pictures, for which the schedule is made; see `num_epochs`.
        batch_size: Pictures of one step of the optimizer, over all processes and `grad_accum_steps`; what a recipe
            gives does not depend on the number of processes.
        seed: Decides initialisation, order of the pictures and augmentation; in [0, 2**32).
        ema_decay: Decay per step of the averaged weights that are kept instead of the raw ones, in [0, 1);
            0 keeps the raw ones.
        channels_last: Keep feature maps with the channels innermost, which most processors convolve faster.
        workers: Processes that read pictures, for each training process; 0 reads them in the training process. No
            result depends on it, but the order of a stream does.
        model: The network.
        loss: The loss.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        augment: What happens to training pictures.
        task: 'multi_label'; 'single_label' for exactly one label a picture; 'semantic' for the same, learnt level by
            level of a tree over the labels (semantic softmax, arXiv:2104.10972); or 'zero_shot' for a network whose
            classes are queries made of the labels' names; or 'verification' for embeddings of identities, one a
            picture, which asks for the table of that name.
        unseen_labels: Labels to hold out, see `hold_out`; none by default.
        stop_epoch: Stop after so many epochs; 0 runs all.
        grad_accum_steps: Parts in which a process computes a step, to fit into memory.
        precision: 'fp32', or 'bf16' or 'fp16' for the network's arithmetic; losses are computed in float32.
        torchcompile: Compile the network.
        sync_bn: Batch norms see the batch of all processes.
        fsdp: Share parameters, gradients and the optimizer's state out over the processes.
        clip_grad: Greatest norm of the gradient, at least 0; 0 does not clip.
        ema_warmup: Average faster at the beginning.
        checkpoint_steps: Save every so many steps too; 0 saves at the end of each epoch only.
        keep_checkpoints: Checkpoints that are kept, at least 1.
        data: Which pictures serve what.
        partial: Labels to forget before training; None keeps all.
        prior: The temporary network of the partial-label paper; None for none.
        teacher: The trained network that is learnt from beside the labels; None for none.
        sharing: A classifier that teacher and student share; None for none. Of this and the next six there is one at
            most.
        dual_head: A second head for the teacher.
        label_augmentation: A second head for classes times transforms.
        balanced: What long-tailed partial labels need.
        positive_unlabeled: What labels of which only some that are present are known need.
        injection: A self-supervised start that labels are injected into.
        verification: Embeddings of identities.
        zero_shot: Where the task 'zero_shot' has its words from; None for the characters of the names.
        scenes: The pictures to make where no data set is given; None for a recipe that needs one.
        tree_scenes: The same, of one label each, with a tree over the labels.
        identities: The same, faces for the task 'verification'. Of these three there is one at most.
        paper: What a paper reports of it.

    Raises:
        RecipeError: If a value is out of range, or settings contradict each other.
    """
    summary: str
    epochs: int
    batch_size: int
    seed: int
    ema_decay: float
    channels_last: bool
    workers: int
    model: ModelSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    augment: AugmentSettings
    task: str = 'multi_label'
    unseen_labels: tuple[str, ...] = ()
    stop_epoch: int = 0
    grad_accum_steps: int = 1
    precision: str = 'fp32'
    torchcompile: bool = False
    sync_bn: bool = False
    fsdp: bool = False
    clip_grad: float = 0.0
    ema_warmup: bool = True
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    partial: PartialSettings | None = None
    prior: PriorSettings | None = None
    teacher: TeacherSettings | None = None
    sharing: SharingSettings | None = None
    dual_head: DualHeadSettings | None = None
    label_augmentation: LabelAugmentationSettings | None = None
    balanced: BalancedSettings | None = None
    positive_unlabeled: PositiveUnlabeledSettings | None = None
    injection: InjectionSettings | None = None
    verification: VerificationSettings | None = None
    zero_shot: ZeroShotSettings | None = None
    scenes: SceneConfig | None = None
    tree_scenes: TreeSceneConfig | None = None
    identities: IdentityConfig | None = None
    paper: PaperSettings | None = None

    def __post_init__(self) -> None:
        check_choice(task=self.task, choices=TASKS)
        check_choice(precision=self.precision, choices=PRECISIONS)
        check_positive(
            epochs=self.epochs, batch_size=self.batch_size, grad_accum_steps=self.grad_accum_steps,
            keep_checkpoints=self.keep_checkpoints)
        check_range(seed=self.seed, low=0, high=2 ** 32)
        check_range(ema_decay=self.ema_decay, low=0.0, high=1.0)
        check_from_zero(workers=self.workers, clip_grad=self.clip_grad, checkpoint_steps=self.checkpoint_steps)
        check_range(stop_epoch=self.stop_epoch, low=0, high=self.schedule.num_epochs(self.epochs), closed=True)
        check_multiple(of=self.grad_accum_steps, batch_size=self.batch_size)
        if self.prior is not None and self.loss.name != 'class_aware_selective':
            raise ValueError(
                f"prior is for the loss 'class_aware_selective', got {self.loss.name!r}; leave the prior out.")
        if self.teacher is not None and self.task == 'zero_shot':
            raise ValueError("teacher must be left out of task 'zero_shot', whose classes no teacher has.")
        if self.teacher is not None and self.task == 'semantic' and self.teacher.temperature != 1:
            raise ValueError(
                f"teacher.temperature must be 1 with task 'semantic', whose distance has none, got "
                f'{self.teacher.temperature}.')
        methods = [name for name in METHODS if getattr(self, name) is not None]
        if len(methods) > 1:
            raise ValueError(
                f'one of {", ".join(METHODS)} may be given, got {" and ".join(methods)}; leave the others out.')
        for name in methods:
            getattr(self, name).check(self)
        if self.zero_shot is not None:
            self.zero_shot.check(self)
        if self.partial is not None and self.partial.scheme == 'labelled_per_class' and self.dual_head is None:
            raise ValueError(
                "partial.scheme 'labelled_per_class' needs the table dual_head, by which a teacher teaches pictures "
                'without a label; add it, or take another scheme.')
        made = [name for name in MADE_PICTURES if getattr(self, name) is not None]
        if len(made) > 1:
            raise ValueError(f'{" and ".join(made)} must not be given together; set all but one to none.')
        if self.task == 'verification' and self.verification is None:
            raise ValueError("task 'verification' needs the table verification, got none; give verification.embed_dim.")
        if self.task == 'self_supervised':
            check_self_supervised(self)
        if self.data.ancestors and self.is_exclusive:
            raise ValueError(
                f"data.ancestors gives pictures several labels, which task {self.task!r} does not take; set task = "
                f"'multi_label'.")

    @property
    def is_exclusive(self) -> bool:
        """Whether each picture has exactly one label."""
        return self.task in ('semantic', 'single_label', 'verification')

    @property
    def embeds(self) -> bool:
        """Whether the network gives embeddings, and no score for each label."""
        return self.task in ('self_supervised', 'verification')

    @property
    def num_epochs(self) -> int:
        """Epochs of the run: `stop_epoch`, or `epochs` and what a schedule of cycles or cooldown adds to them."""
        return self.stop_epoch or self.schedule.num_epochs(self.epochs)

    @property
    def made_pictures(self) -> SceneConfig | TreeSceneConfig | IdentityConfig | None:
        """The pictures to make where no data set is given."""
        return self.scenes or self.tree_scenes or self.identities

    def override(self, changes: Mapping[str, str]) -> 'Recipe':
        """A recipe with some settings changed.

        Args:
            changes: Values by key, as text in TOML's notation (quotes may be left out); keys inside a table are
                dotted: {'epochs': '3', 'optimizer.lr': '1e-3', 'model.args.embed_dim': '64'}. The word none leaves a
                table out: {'partial': 'none'}.

        Raises:
            RecipeError: If a key is unknown, or a value of the wrong type or out of range.
        """
        table = as_table(self)
        for key, text in changes.items():
            target = table
            *path, last = key.split('.')
            for part in path:
                target = target.setdefault(part, {})
                if not isinstance(target, dict):
                    raise RecipeError(f'{key}: {part} is no table.')
            value = parse_value(text)
            target[last] = text if is_text(Recipe, key) and not isinstance(value, str) else value
        new = read_settings(Recipe, table, source='override')
        if 'summary' in changes or new._called() == self._called():
            return new
        return dataclasses.replace(new, summary=f'{new._called()}.')

    def _called(self) -> str:
        """What is trained, in words."""
        backbone = self.model.args.get('backbone')
        teacher = '' if self.teacher is None else f' and the teacher {self.teacher.name}'
        model = f'{self.model.name} on {backbone}' if backbone else self.model.name
        return f'{model}, trained with the loss {self.loss.name}{teacher}'

    def to_toml(self) -> str:
        """All settings as a file that `load_recipe` reads back: an equal recipe."""
        return write_toml(as_table(self))


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(Path(file.name).stem for file in _folder().iterdir() if file.name.endswith('.toml'))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: Name of one of `list_recipes()`, or path of a TOML file.

    Raises:
        FileNotFoundError: If there is no such file.
        RecipeError: If there is no such name, or the file has an unknown or missing key or a wrong value.
    """
    if isinstance(recipe, str) and not recipe.endswith('.toml'):
        if recipe not in list_recipes():
            raise RecipeError(f'unknown recipe {recipe!r}; {nearest(recipe, list_recipes())}')
        source, text = recipe, _folder().joinpath(f'{recipe}.toml').read_text(encoding='utf-8')
    else:
        if not Path(recipe).is_file():
            raise FileNotFoundError(f'there is no recipe file {str(recipe)!r}.')
        source, text = str(recipe), Path(recipe).read_text(encoding='utf-8')
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f'{source} is not TOML: {error}.') from error
    return read_settings(Recipe, table, source)


def _folder() -> Any:
    return resources.files('timm_miil.train') / 'recipes'
