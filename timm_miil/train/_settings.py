"""The tables of a recipe: each checks itself when it is made."""
import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.data import Mixup, create_transform
from timm.models import is_model, list_models
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from timm_miil import catalog
from timm_miil._checks import check_choice, check_not_negative, check_positive, check_range, nearest, shown
from timm_miil.losses import list_losses

__all__ = [
    'AugmentSettings', 'DataSettings', 'LossSettings', 'ModelSettings', 'OptimizerSettings', 'PaperSettings',
    'PartialSettings', 'PriorSettings', 'ScheduleSettings', 'check_from_zero', 'check_undecided',
]

DROPPING_SCHEMES = ('positives_only', 'random_per_sample')
PARTIAL_SCHEMES = ('fixed_per_class', 'labelled_per_class', *DROPPING_SCHEMES)
PRIOR_EPOCHS = ('last_epoch', 'all_epochs')
AUGMENTS = ('crop', 'paper', 'timm')
# Besides the losses of this package; `LossSettings` says what each is.
PLAIN_LOSSES = ('bce', 'cross_entropy', 'focal', 'rotation', 'simsiam')
SCHEDULES = ('constant', 'cosine', 'multistep', 'onecycle', 'poly', 'step', 'tanh')

# What training decides, or another setting of the recipe.
DECIDED_MODEL = frozenset({'labels', 'num_classes', 'pretrained'})
DECIDED_OPTIMIZER = frozenset({'layer_decay', 'lr', 'opt', 'weight_decay'})
DECIDED_TIMM_SCHEDULE = frozenset({
    'min_lr', 'num_epochs', 'optimizer', 'patience_epochs', 'plateau_mode', 'sched', 'step_on_epochs',
    'updates_per_epoch', 'warmup_epochs'})
DECIDED_ONECYCLE = frozenset({'epochs', 'last_epoch', 'max_lr', 'optimizer', 'steps_per_epoch', 'total_steps'})
DECIDED_TRANSFORM = frozenset({
    'crop_border_pixels', 'crop_mode', 'crop_pct', 'hflip', 'input_size', 'is_training', 'mean',
    'naflex', 'normalize', 'ratio', 'scale', 'separate', 'std', 'tf_preprocessing', 'use_prefetcher'})
DECIDED_MIXUP = frozenset({'multi_label', 'num_classes'})

# What makes timm's schedules longer than their epochs.
LENGTHENING = frozenset({'cooldown_epochs', 'cycle_limit', 'cycle_mul', 'warmup_prefix'})
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')
# A side of a picture beyond which memory ends.
MOST_PIXELS = 4096
# They need derivatives of the gradient, which training does not make.
SECOND_ORDER = frozenset({'adahessian'})

check_from_zero = partial(check_range, low=0.0, high=math.inf)
check_unit = partial(check_range, low=0.0, high=1.0, closed=True)


@dataclass(frozen=True)
class DataSettings:
    """Which pictures of the data set serve what, and how they are read; see `timm_miil.data.open_split`.

    Args:
        format: One of `timm_miil.data.list_formats()`, or 'auto' to recognise it.
        train: Split to learn from.
        val: Split to choose the best epoch by. Where there is no 'val', `val_fraction` serves.
        test: Split to test the best epoch on; '' takes 'test' where there is one.
        labels: Path of a text file or name of a label set of the catalogue, to which labels are matched by name; ''
            takes the data's own.
        val_fraction: Part of the training pictures, drawn by the recipe's seed, that validates where there is no such
            split; in (0, 1).
        max_val: Validate on so many pictures at most, drawn by the recipe's seed; 0 takes all. The exact mAP of all of
            ImageNet-21K's would not fit in memory.
        tree: File of the tree over the labels, of `timm_miil.data.read_class_tree`, for what asks for one: the task
            'semantic', and `ancestors`. '' takes the data folder's 'tree.json'.
        ancestors: Let each picture also show the ancestors of what it shows, as ImageNet-21K becomes multi-label.
        args: More keyword arguments of `open_split`.
    """
    format: str = 'auto'
    train: str = 'train'
    val: str = 'val'
    test: str = ''
    labels: str = ''
    val_fraction: float = 0.1
    max_val: int = 0
    tree: str = ''
    ancestors: bool = False
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train or not self.val:
            raise ValueError(f'train and val must name splits, got {self.train!r} and {self.val!r}.')
        if not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction must be between 0 and 1, got {self.val_fraction}.')
        check_not_negative(max_val=self.max_val)


@dataclass(frozen=True)
class PartialSettings:
    """Labels of the training pictures that are forgotten before training, as the partial-label paper simulates it.

    Args:
        scheme: 'fixed_per_class' (FPC), 'labelled_per_class', 'positives_only' or 'random_per_sample' (RPS), see
            `timm_miil.data`.
        num_per_class: For FPC, how many present and as many absent labels of a class are kept, for
            'labelled_per_class', how many pictures of a class keep their label; at least 1.
        drop_prob: For RPS, the probability that a label is forgotten, in [0, 1]; for 'positives_only' that a present
            one is, where all absent ones are.
    """
    scheme: str
    num_per_class: int = 0
    drop_prob: float = 0.0

    def __post_init__(self) -> None:
        check_choice(scheme=self.scheme, choices=PARTIAL_SCHEMES)
        if self.scheme not in DROPPING_SCHEMES:
            check_positive(num_per_class=self.num_per_class)
        check_not_negative(num_per_class=self.num_per_class)
        check_unit(drop_prob=self.drop_prob)
        if self.num_per_class if self.scheme in DROPPING_SCHEMES else self.drop_prob:
            raise ValueError(
                f'scheme must be given its own number only, got {self.scheme!r} with num_per_class '
                f'{self.num_per_class} and drop_prob {self.drop_prob}.')


@dataclass(frozen=True)
class LossSettings:
    """The loss.

    Args:
        name: One of `timm_miil.losses.list_losses()` or
            'bce' (several labels: `AsymmetricLoss(**ASL_PRESETS['bce'])`; one label: `timm.loss.BinaryCrossEntropy`),
            'focal' (several labels: `AsymmetricLoss(**ASL_PRESETS['focal'])`),
            'cross_entropy' (one label: timm's, with its label smoothing or soft targets),
            'rotation' (task 'self_supervised': `timm_miil.tasks.RotationTask`),
            'simsiam' (task 'self_supervised': `timm_miil.tasks.SimSiamTask`, with `proj_dim` and `pred_dim`).
            The task 'semantic' has 'semantic_softmax' alone.
        args: Keyword arguments of its constructor, over those of a preset. What follows from the data (a prior, counts,
            names) comes from training.
    """
    name: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = (*list_losses(), *PLAIN_LOSSES)
        if self.name not in known:
            raise ValueError(f'name must be a loss, got {self.name!r}; {nearest(self.name, known)}')


@dataclass(frozen=True)
class PriorSettings:
    """A temporary network of the same kind, trained first, whose confidences say how common each label is.

    Args:
        epochs: Its epochs.
        loss: Its loss; the paper's ignores unannotated labels.
        average: Its confidences on the training pictures, as it learns, over the 'last_epoch' or 'all_epochs'.
    """
    epochs: int
    loss: LossSettings
    average: str = 'last_epoch'

    def __post_init__(self) -> None:
        check_positive(epochs=self.epochs)
        check_choice(average=self.average, choices=PRIOR_EPOCHS)


@dataclass(frozen=True)
class ModelSettings:
    """The network: a registered name and what `timm.create_model` gets besides.

    Args:
        name: Architecture, such as 'mldecoder_scenes'.
        args: Keyword arguments of `timm.create_model`; number and names of the classes come from the data.
        pretrained: Start from the weights that the name has; the classifier starts anew where the classes are others.
    """
    name: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False

    def __post_init__(self) -> None:
        if ':' not in self.name and not is_model(self.name):  # with one it says where the model lies
            raise ValueError(
                f'name must be a model of timm, got {shown(self.name)}; {nearest(self.name, list_models())}')
        check_undecided(self.args, DECIDED_MODEL)


@dataclass(frozen=True)
class OptimizerSettings:
    """timm's optimizer.

    Args:
        name: One of `timm.optim.list_optimizers()` that needs first derivatives only.
        lr: Highest learning rate, above 0.
        weight_decay: Decay of weights with two or more dimensions, at least 0.
        layer_decay: Factor of the learning rate from each layer to the one below it, in [0, 1]; 0 for one rate.
        args: More keyword arguments of `timm.optim.create_optimizer_v2`.
    """
    name: str
    lr: float
    weight_decay: float
    layer_decay: float = 0.0
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(cast(list[str], list_optimizers())) - SECOND_ORDER
        if self.name not in known:
            raise ValueError(f'name must be an optimizer of timm, got {self.name!r}; {nearest(self.name, known)}')
        check_range(lr=self.lr, low=math.ulp(0.0), high=math.inf)
        check_from_zero(weight_decay=self.weight_decay)
        check_unit(layer_decay=self.layer_decay)
        check_undecided(self.args, DECIDED_OPTIMIZER)
        if self.args:
            try:  # what an optimizer takes, it says best itself
                create_optimizer_v2(
                    nn.Linear(1, 1), opt=self.name, lr=self.lr, weight_decay=self.weight_decay, **self.args)
            except (TypeError, ValueError) as error:
                raise ValueError(f'args must be those of {self.name}: {error}') from error


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate's course, advanced at every step.

    Args:
        name: timm's 'constant', 'cosine', 'multistep', 'poly', 'step' or 'tanh', or torch's 'onecycle'.
        warmup_epochs: Epochs of linear increase from 0, at least 0 and not necessarily whole. 'onecycle' has its own,
            `pct_start` of `args`.
        min_lr: Least learning rate, at least 0. 'onecycle' has its own, `final_div_factor` of `args`.
        args: More keyword arguments of `timm.scheduler.create_scheduler_v2` or `torch.optim.lr_scheduler.OneCycleLR`.
    """
    name: str
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(name=self.name, choices=SCHEDULES)
        check_from_zero(warmup_epochs=self.warmup_epochs, min_lr=self.min_lr)
        if self.name != 'onecycle':
            _check_keywords(self.args, create_scheduler_v2, DECIDED_TIMM_SCHEDULE)
            self._try()
            return
        if self.warmup_epochs or self.min_lr:
            raise ValueError(
                f'warmup_epochs and min_lr must be 0 with onecycle, got {self.warmup_epochs} and {self.min_lr}; set '
                f'args.pct_start and args.final_div_factor.')
        _check_keywords(self.args, OneCycleLR, DECIDED_ONECYCLE)
        self._try()

    def num_epochs(self, epochs: int) -> int:
        """Epochs of a run, as timm counts them: further cycles, `cooldown_epochs` and `warmup_prefix` add some."""
        if self.name == 'onecycle' or not LENGTHENING & self.args.keys():
            return epochs
        return math.ceil(create_scheduler_v2(
            SGD([nn.Parameter(torch.zeros(1))], lr=1.0), sched=self.name, num_epochs=epochs, min_lr=self.min_lr,
            warmup_epochs=cast(int, self.warmup_epochs), **self.args)[1])

    def _try(self) -> None:
        """Raise ValueError if the schedule does not run with its arguments: what it takes, it says best itself."""
        if not self.args:
            return
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        try:
            if self.name == 'onecycle':
                OneCycleLR(optimizer, max_lr=1.0, total_steps=100, **self.args)
                return
            scheduler, _ = create_scheduler_v2(
                optimizer, sched=self.name, num_epochs=3, step_on_epochs=False, updates_per_epoch=2,
                **{'warmup_epochs': 1, **self.args})
            for done in range(1, 7):
                cast(Any, scheduler).step_update(done)
        except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(f'args must be those of {self.name}, got {shown(dict(self.args))}: {error}') from error


@dataclass(frozen=True)
class AugmentSettings:
    """What happens to training pictures.

    Args:
        name: 'crop': timm's random crop, resized to the input, and flips; colours are left alone. 'timm': the same and
            what `args` says. 'paper': `timm_miil.data.create_paper_transform`, which neither crops nor flips.
        scale: Least and greatest part of the picture's area that a crop keeps, in (0, 1].
        ratio: Least and greatest aspect ratio of a crop, above 0.
        hflip: Probability of a mirrored picture, in [0, 1].
        image_size: Side of the pictures in pixels, for training and evaluation; 0 takes the model's own.
        crop_pct: Part of a picture's side that evaluation keeps, in (0, 1]; 0 takes the model's own.
        args: For 'paper', `cutout` and `randaugment`. For 'timm', keyword arguments of `timm.data.create_transform`, of
            which `interpolation` is the model's own unless it is given; `aug_repeats`, how often a picture is in an
            epoch, as timm's script has it; and, for one label a picture, a table `mixup` of keyword
            arguments of `timm.data.Mixup`.
    """
    name: str
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    image_size: int = 0
    crop_pct: float = 0.0
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(name=self.name, choices=AUGMENTS)
        for name, (low, high) in {'scale': self.scale, 'ratio': self.ratio}.items():
            if not 0 < low <= high < math.inf:
                raise ValueError(f'{name} must be two rising numbers above 0, got {low!r} and {high!r}.')
        check_unit(scale=self.scale[1], hflip=self.hflip, crop_pct=self.crop_pct)
        check_not_negative(image_size=self.image_size)
        check_range(image_size=self.image_size, low=0, high=MOST_PIXELS, closed=True)
        args = dict(self.args)
        if self.name == 'timm':
            mixup, repeats = args.pop('mixup', {}), args.pop('aug_repeats', 0)
            if not isinstance(mixup, Mapping):
                raise ValueError(f'args.mixup must be a table, got {shown(mixup)}.')
            _check_keywords(mixup, Mixup, DECIDED_MIXUP, 'args.mixup')
            check_not_negative(**{'args.aug_repeats': repeats})
            _check_keywords(args, create_transform, DECIDED_TRANSFORM)
            check_choice(**{'args.interpolation': args.get('interpolation', 'random')}, choices=INTERPOLATIONS)
            return
        known = ('cutout', 'randaugment') if self.name == 'paper' else ()
        for key in args:
            if key not in known:
                raise ValueError(
                    f'args of {self.name!r} must be {" and ".join(known) or "empty"}, got {key!r}; name = "timm" takes '
                    f'what timm.data.create_transform does.')


@dataclass(frozen=True)
class PaperSettings:
    """What a paper reports of training like this.

    Args:
        id: The paper's id in the catalogue.
        metric: What is measured: a key of `timm_miil.catalog.METRICS`.
        value: In percent.
        split: Data set and part of it.
        source: Where the number stands: a table, a README.
    """
    id: str
    metric: str
    value: float
    split: str
    source: str

    def __post_init__(self) -> None:
        known = catalog.papers()
        if self.id not in known:
            raise ValueError(f'id must be a paper of the catalogue, got {self.id!r}; {nearest(self.id, known)}')
        check_choice(metric=self.metric, choices=catalog.METRICS)
        check_range(value=self.value, low=0.0, high=100.0, closed=True)


def check_undecided(args: Mapping[str, Any], decided: frozenset[str]) -> None:
    """Raise ValueError if arguments hold what training decides."""
    reserved = decided & args.keys()
    if reserved:
        raise ValueError(
            f'args must not hold {", ".join(sorted(reserved))}: training decides it, or another setting of the recipe.')


def _check_keywords(args: Mapping[str, Any], function: Any, decided: frozenset[str], name: str = 'args') -> None:
    known = inspect.signature(function).parameters.keys() - decided
    for key in args:
        if key not in known:
            raise ValueError(f'{name} has the unknown key {key!r}; {nearest(key, known)}')
