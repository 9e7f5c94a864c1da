"""Recipes: every setting of a training run, read strictly from TOML."""
import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

from timm.optim import list_optimizers

from timm_miil._checks import check_choice, check_positive, check_range, nearest
from timm_miil._errors import RecipeError

__all__ = [
    'AugmentSettings', 'LossSettings', 'ModelSettings', 'OptimizerSettings', 'Recipe', 'ScheduleSettings',
    'list_recipes', 'load_recipe',
]

SCHEDULES = ('cosine', 'constant')
TASKS = ('multi_label', 'zero_shot')
DECIDED = frozenset({'labels', 'num_classes', 'pretrained'})   # by training

check_from_zero = partial(check_range, low=0.0, high=math.inf)
check_unit = partial(check_range, low=0.0, high=1.0, closed=True)


@dataclass(frozen=True)
class ModelSettings:
    """The network: a registered name and what `timm.create_model` gets besides.

    Args:
        name: Architecture, such as 'mldecoder_scenes'; trained from its initialisation.
        args: Keyword arguments of `timm.create_model`; number and names of the classes come from the data.
    """
    name: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        reserved = DECIDED & self.args.keys()
        if reserved:
            raise ValueError(f'args must not hold {", ".join(sorted(reserved))}: training decides it.')


@dataclass(frozen=True)
class LossSettings:
    """The asymmetric loss, see `timm_miil.losses.asymmetric_loss`.

    Args:
        gamma_neg: Focusing power on negatives, at least 0.
        gamma_pos: Focusing power on positives, at least 0.
        clip: Probability shift of negatives, in [0, 1).
    """
    gamma_neg: float
    gamma_pos: float
    clip: float

    def __post_init__(self) -> None:
        check_from_zero(gamma_neg=self.gamma_neg, gamma_pos=self.gamma_pos)
        check_range(clip=self.clip, low=0.0, high=1.0)


@dataclass(frozen=True)
class OptimizerSettings:
    """timm's optimizer.

    Args:
        name: One of `timm.optim.list_optimizers()`.
        lr: Highest learning rate, above 0.
        weight_decay: Decay of weights with two or more dimensions, at least 0.
    """
    name: str
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        known = cast(list[str], list_optimizers())
        if self.name not in known:
            raise ValueError(f'name must be an optimizer of timm, got {self.name!r}; {nearest(self.name, known)}')
        check_range(lr=self.lr, low=math.ulp(0.0), high=math.inf)
        check_from_zero(weight_decay=self.weight_decay)


@dataclass(frozen=True)
class ScheduleSettings:
    """timm's learning rate schedule, advanced at every step.

    Args:
        name: 'cosine' or 'constant'.
        warmup_epochs: Epochs of linear increase from 0, at least 0 and not necessarily whole.
        min_lr: Learning rate at the end of 'cosine', at least 0.
    """
    name: str
    warmup_epochs: float
    min_lr: float

    def __post_init__(self) -> None:
        check_choice(name=self.name, choices=SCHEDULES)
        check_from_zero(warmup_epochs=self.warmup_epochs, min_lr=self.min_lr)


@dataclass(frozen=True)
class AugmentSettings:
    """timm's random crop, resized to the input, and flips; colours are left alone.

    Args:
        scale: Least and greatest part of the picture's area that is kept, in (0, 1].
        ratio: Least and greatest aspect ratio of the crop, above 0.
        hflip: Probability of a mirrored picture, in [0, 1].
    """
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float

    def __post_init__(self) -> None:
        for name, (low, high) in {'scale': self.scale, 'ratio': self.ratio}.items():
            if not 0 < low <= high < math.inf:
                raise ValueError(f'{name} must be two rising numbers above 0, got {low!r} and {high!r}.')
        check_unit(scale=self.scale[1], hflip=self.hflip)


@dataclass(frozen=True)
class Recipe:
    """How to train a model.

    Args:
        summary: One sentence for people.
        epochs: Passes over the training pictures.
        batch_size: Pictures of one step.
        seed: Decides initialisation, order of the pictures and augmentation; in [0, 2**32).
        ema_decay: Decay per step of the averaged weights that are kept instead of the raw ones, in [0, 1);
            0 keeps the raw ones.
        channels_last: Keep feature maps with the channels innermost, which most processors convolve faster.
        workers: Processes that read pictures; 0 reads them in the training process. No result depends on it.
        model: The network.
        loss: The loss.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        augment: What happens to training pictures.
        task: 'multi_label', or 'zero_shot' for a network whose classes are queries made of the labels' names.
        unseen_labels: Labels to hold out, see `hold_out`; none by default.

    Raises:
        RecipeError: If a value is out of range.
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

    def __post_init__(self) -> None:
        check_choice(task=self.task, choices=TASKS)
        check_positive(epochs=self.epochs, batch_size=self.batch_size)
        check_range(seed=self.seed, low=0, high=2 ** 32)
        check_range(ema_decay=self.ema_decay, low=0.0, high=1.0)
        check_from_zero(workers=self.workers)

    def override(self, changes: Mapping[str, str]) -> 'Recipe':
        """A recipe with some settings changed.

        Args:
            changes: Values by key, as text in TOML's notation (quotes may be left out); keys inside a table are
                dotted: {'epochs': '3', 'optimizer.lr': '1e-3', 'model.args.embed_dim': '64'}.

        Raises:
            RecipeError: If a key is unknown, or a value of the wrong type or out of range.
        """
        table = _as_table(self)
        for key, text in changes.items():
            target = table
            *path, last = key.split('.')
            for part in path:
                target = target.setdefault(part, {})
                if not isinstance(target, dict):
                    raise RecipeError(f'{key}: {part} is no table.')
            target[last] = _parse(text)
        return _read(Recipe, table, source='override')


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
        source, text = str(recipe), Path(recipe).read_text(encoding='utf-8')
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f'{source} is not TOML: {error}.') from error
    return _read(Recipe, table, source)


def _folder() -> Any:
    return resources.files('timm_miil.train') / 'recipes'


def _as_table(settings: Any) -> dict[str, Any]:
    """dataclasses.asdict for settings whose mappings need not be dicts."""
    return {
        field.name: _as_table(value) if dataclasses.is_dataclass(value) else
        dict(value) if isinstance(value, Mapping) else value
        for field in dataclasses.fields(settings) for value in [getattr(settings, field.name)]}


def _parse(text: str) -> object:
    try:
        return tomllib.loads(f'value = {text}')['value']
    except tomllib.TOMLDecodeError:
        return text  # a bare word


_Settings = typing.TypeVar('_Settings')


def _read(kind: type[_Settings], table: Mapping[str, Any], source: str, prefix: str = '') -> _Settings:
    """Build settings from a table; anything unknown, missing or ill-typed is an error that names it."""
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in fields:
            raise RecipeError(f'{source}: unknown key {prefix + key!r}; {nearest(key, fields)}')
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], source, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f'{source}: {prefix + name!r} is missing.')
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f'{source}: {prefix}{error}') from error


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _read(cast(Any, hint), value, source, f'{key}.')
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, list | tuple) and kinds[-1] is ...:
            return tuple(_convert(kinds[0], item, source, key) for item in value)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_convert(kind, item, source, key) for kind, item in zip(kinds, value))
        wanted = 'a list of texts' if kinds[-1] is ... else f'a list of {len(kinds)} numbers'
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif typing.get_origin(hint) is Mapping and isinstance(value, dict):
        return dict(value)
    else:
        wanted = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}.get(hint, 'a table')
    raise RecipeError(f'{source}: {key!r} must be {wanted}, got {value!r}.')
