"""From a recipe and its pictures to the parts of a training run."""
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, create_classification_loss
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from timm_miil._checks import cut, nearest
from timm_miil.data import ImageStream, LabelledImages, MultiLabelDataset
from timm_miil.data.transforms import create_paper_transform
from timm_miil.losses import (
    ASL_PRESETS, AsymmetricLossSingleLabel, SemanticHierarchy, SemanticSoftmaxLoss, create_loss)
from timm_miil.tasks import (
    MultiLabelDistillationTask, MultiLabelTask, SemanticPretrainTask, SingleLabelTask,
    SupervisedDistillationTask, Teacher)
from timm_miil.train._loaders import EpochLoader, Share, StreamLoader, StreamPictures, TrainLoader, WorkerLoader
from timm_miil.train._self_supervised import ARGS_OF_LOSS, build_self_supervised
from timm_miil.train._task_parts import TaskParts
from timm_miil.train._zero_shot import build_zero_shot_task, label_args, refuse_plain_network, set_words
from timm_miil.train.methods import build_method_task
from timm_miil.train.recipe import LossSettings, Recipe
from timm_miil.train.splits import with_labels
from timm_miil.train.teaching import HIERARCHY_ARGS

__all__ = [
    'EpochLoader', 'Schedule', 'build_eval_loader', 'build_loss', 'build_mixup', 'build_model', 'build_optimizer',
    'build_scheduler', 'build_task', 'build_train_loader', 'check_unknown', 'with_labels',
]

MULTI_LABEL_LOSSES = frozenset({
    'adaptive_asymmetric', 'asymmetric', 'bce', 'class_aware_selective', 'decoupled_softmax', 'focal', 'mann_whitney',
    'mlcd', 'multi_focal_modifier', 'pu_multilabel', 'soft_topk'})
# Losses of one label a picture that take distributions, as Mixup makes them.
SOFT_LOSSES = frozenset({'bce', 'cross_entropy'})
SINGLE_LABEL_LOSSES = SOFT_LOSSES | {'asymmetric_single_label'}
SEMANTIC_LOSSES = frozenset({'semantic_softmax'})
LOSSES_OF_TASK = MappingProxyType({
    'self_supervised': frozenset(ARGS_OF_LOSS), 'semantic': SEMANTIC_LOSSES, 'single_label': SINGLE_LABEL_LOSSES,
    'verification': frozenset({'cross_entropy'}), 'zero_shot': MULTI_LABEL_LOSSES | {'semantic_diversity'}})
# Where nothing is mixed these get indices: they smooth those, and no distributions.
INDEX_LOSSES = (AsymmetricLossSingleLabel, BinaryCrossEntropy, LabelSmoothingCrossEntropy)
# What the network's own configuration becomes where pictures are resized to its input whatever their shape is.
SQUISH = MappingProxyType({'crop_pct': 1.0, 'crop_mode': 'squash', 'interpolation': 'bilinear'})
# No other size or crop for tests than the one that was trained and validated.
AS_TRAINED = MappingProxyType({'test_input_size': None, 'test_crop_pct': None})


class Schedule(Protocol):
    """The course of the learning rate."""

    def step_update(self, num_updates: int) -> None:
        """Set what the step after `num_updates` steps needs."""

    def state_dict(self) -> dict[str, Any]:
        """What it knows."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what it knew."""


def build_model(recipe: Recipe, label_names: Sequence[str], *, pretrained: bool | None = None) -> nn.Module:
    """The network; what has no weights draws them from torch's global generator. A zero-shot one is told the names.

    Args:
        recipe: All settings.
        label_names: Names of the classes.
        pretrained: Whether to load weights; None does as the recipe says.

    Raises:
        OSError: If the weights to start from cannot be downloaded or read.
        ValueError: If they are in a file that is another network's.
    """
    classes: dict[str, Any] = {'num_classes': len(label_names)}
    if recipe.verification is not None:
        classes = {'num_classes': recipe.verification.embed_dim}
    elif recipe.task == 'self_supervised':
        classes = {'num_classes': 0}
    elif recipe.task == 'zero_shot':
        classes = label_args(recipe, label_names)
    args = dict(recipe.model.args)
    # The model carries it to evaluation and into the saved folder.
    overlay: dict[str, Any] = {**AS_TRAINED, **SQUISH} if recipe.augment.name == 'paper' else {}
    given: Mapping[str, Any] = args.get('pretrained_cfg_overlay', {})
    if {'input_size', 'crop_pct'} & given.keys():
        overlay |= AS_TRAINED
    overlay |= given
    if recipe.augment.image_size:
        overlay |= {**AS_TRAINED, 'input_size': (3, recipe.augment.image_size, recipe.augment.image_size)}
    if recipe.augment.crop_pct:
        overlay |= {'crop_pct': recipe.augment.crop_pct, 'test_crop_pct': None}
    if overlay:
        args['pretrained_cfg_overlay'] = overlay
    try:
        model: nn.Module = create_model(
            recipe.model.name, pretrained=recipe.model.pretrained if pretrained is None else pretrained, **classes,
            **args)
    except OSError as error:
        raise OSError(
            f'the weights that {recipe.model.name} starts from could not be had: {cut(str(error)).rstrip(".")}; check '
            f'the network, or start at random (model.pretrained = false, model.args.pretrained_backbone = false).'
        ) from error
    except TypeError as error:
        refuse_plain_network(recipe, error)
        raise
    except RuntimeError as error:  # torch names each tensor that does not fit
        if not args.get('checkpoint_path'):
            raise
        raise ValueError(
            f'model.args.checkpoint_path must be weights of {recipe.model.name} with {len(label_names)} classes, got '
            f'{args["checkpoint_path"]!r}: {cut(str(error)).rstrip(".")}; those of other classes are taken from a '
            f'model folder (model.name = "local-dir:FOLDER", model.pretrained = true).') from error
    if recipe.task == 'zero_shot' and not label_args(recipe, label_names):
        set_words(model, recipe, label_names)
    return model


def build_loss(
        settings: LossSettings, task: str, *, class_counts: Tensor | None = None, prior: Tensor | None = None,
        is_mixed: bool = False, hierarchy: SemanticHierarchy | None = None) -> nn.Module:
    """The loss of a recipe.

    Args:
        settings: Its name and arguments.
        task: The recipe's task.
        class_counts: Training pictures that show each label, shape (C,), for the loss that weighs by them.
        prior: Estimated frequency of each label, shape (C,), for the loss that selects by it.
        is_mixed: Whether pictures and targets are mixed by Mixup.
        hierarchy: The tree over the labels, for the task 'semantic'.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If the loss does not suit the task, or an argument is out of range.
    """
    name, args = settings.name, dict(settings.args)
    known = LOSSES_OF_TASK.get(task, MULTI_LABEL_LOSSES)
    if name not in known:
        raise ValueError(f'loss.name must be a loss of logits and targets for task {task!r}, got {name!r}; '
                         f'{nearest(name, known)}')
    if task == 'self_supervised':
        return nn.Identity()  # its tasks have their own
    if task == 'semantic':
        return create_loss(name, hierarchy=hierarchy, **{
            key: value for key, value in args.items() if key not in HIERARCHY_ARGS})
    if task in ('single_label', 'verification'):
        if is_mixed and name not in SOFT_LOSSES:
            raise ValueError(
                f'loss.name must be one of {", ".join(map(repr, sorted(SOFT_LOSSES)))} with augment.args.mixup, got '
                f'{name!r}, which takes no mixed targets.')
        if name == 'cross_entropy':
            return create_classification_loss('ce', soft_targets=is_mixed, **args)
        return BinaryCrossEntropy(**args) if name == 'bce' else create_loss(name, **args)
    if name in ('bce', 'focal'):
        return create_loss('asymmetric', **{**ASL_PRESETS[name], **args})
    if name == 'class_aware_selective' and prior is not None:
        args['prior'] = prior.float()
    if name == 'multi_focal_modifier' and class_counts is not None:
        args.setdefault('class_counts', class_counts.clamp(min=1))
    return create_loss(name, **args)


def check_unknown(criterion: nn.Module, source: LabelledImages | ImageStream) -> None:
    """Raise ValueError if labels of the training pictures are unknown and the loss refuses such."""
    counts = source.label_counts()
    if getattr(criterion, 'ignore_unknown', True) or counts is None:
        return  # such a stream tells its labels as it goes
    unknown = int(counts[2].sum())
    if unknown:
        raise ValueError(
            f'{unknown} labels of the training pictures are unknown (-1), which {type(criterion).__name__} refuses; '
            f'set loss.args.ignore_unknown = true to leave them out, or take the loss class_aware_selective.')


def build_task(
        recipe: Recipe, model: nn.Module, device: torch.device, *, criterion: nn.Module | None = None,
        teacher: Teacher | None = None, **facts: Any,
) -> ClassificationTask:
    """The model with its loss and its teacher; with averaged weights if the recipe asks for them.

    Args:
        recipe: All settings.
        model: The network, on its device.
        device: That device.
        criterion: The loss; None makes the recipe's by `build_loss`.
        teacher: Who it learns from besides, as `timm_miil.train.teaching.build_teacher` makes it; None for nobody.
        **facts: What else `TaskParts` holds, for the recipes whose tasks ask for it.

    Raises:
        ValueError: If the task asks for the places of pictures that have none.
    """
    criterion = criterion or build_loss(recipe.loss, recipe.task)
    is_soft = bool(_mixup_settings(recipe)) or not isinstance(criterion, INDEX_LOSSES)
    parts = TaskParts(recipe, model, device, criterion, teacher, is_soft=is_soft, **facts)
    task = build_method_task(parts) or _plain_task(parts)
    if getattr(task, 'needs_indices', False) and (parts.num_train is None or _mixup_settings(recipe)):
        raise ValueError(
            f'{type(task).__name__} must know which pictures of the training set it sees, got '
            f'{"a stream" if parts.num_train is None else "mixed ones"}; read pictures from files, without '
            f'augment.args.mixup.')
    task.trainable_module.to(device)
    if recipe.ema_decay:
        task.setup_ema(decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
    return task


def build_mixup(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What mixes pictures (B, 3, H, W) and float targets (B, C) of a batch, if the recipe asks for it.

    Raises:
        ValueError: If the recipe's pictures have several labels.
    """
    settings = _mixup_settings(recipe)
    if not settings:
        return None
    if recipe.task != 'single_label':
        raise ValueError(f"augment.args.mixup is for task 'single_label', got {recipe.task!r}.")
    mixup = Mixup(**settings, num_classes=num_classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = mixup(images, targets.argmax(1))
        return mixed

    return mix


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """timm's optimizer; biases, norms and what the model excludes are not decayed."""
    settings = recipe.optimizer
    return create_optimizer_v2(
        model, opt=settings.name, lr=settings.lr, weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay or None, **settings.args)


def build_scheduler(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> Schedule:
    """timm's schedule or torch's OneCycle, to be advanced by `step_update` after every step."""
    settings = recipe.schedule
    if settings.name == 'onecycle':
        return _OneCycle(optimizer, recipe.epochs * steps_per_epoch, settings.args)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=settings.name, num_epochs=recipe.epochs, min_lr=settings.min_lr,
        warmup_epochs=cast(int, settings.warmup_epochs),  # timm multiplies it by the steps: parts of epochs work
        step_on_epochs=False, updates_per_epoch=steps_per_epoch, **{'warmup_lr': 0.0, **settings.args})
    return cast(Schedule, scheduler)


def build_train_loader(
        recipe: Recipe,
        source: LabelledImages | ImageStream,
        model: nn.Module,
        *,
        share: Share = Share(),
        device: torch.device | None = None,
) -> TrainLoader:
    """Shuffled, augmented batches.

    Args:
        recipe: All settings.
        source: The pictures.
        model: The network, for the size and the scale of its input.
        share: This process's part of a step.
        device: Where the batches go to.

    Raises:
        ValueError: If there are fewer pictures than one batch takes, or a batch cannot be shared out.
    """
    pieces = share.count * share.parts
    if recipe.batch_size % pieces:
        raise ValueError(
            f'batch_size must be a multiple of processes times grad_accum_steps, got {recipe.batch_size} for '
            f'{share.count} and {share.parts}; the nearest are {recipe.batch_size // pieces * pieces or pieces} and '
            f'{(recipe.batch_size // pieces + 1) * pieces}.')
    takes_views = recipe.loss.name == 'simsiam'
    if (_mixup_settings(recipe) or takes_views) and recipe.batch_size // pieces % 2:
        what = "loss 'simsiam' takes" if takes_views else 'augment.args.mixup mixes'
        raise ValueError(
            f'{what} pairs: batch_size over processes and grad_accum_steps must be even, got '
            f'{recipe.batch_size} / {pieces} = {recipe.batch_size // pieces}.')
    transform = _train_transform(recipe, model)
    repeats = recipe.augment.args.get('aug_repeats', 0) if recipe.augment.name == 'timm' else 0
    if takes_views:
        repeats = 2
    if isinstance(source, ImageStream):
        if repeats > 1:
            raise ValueError(
                "a stream's pictures come once: leave augment.args.aug_repeats out, and take another loss than "
                "'simsiam'.")
        return StreamLoader(
            source, transform, recipe.batch_size, seed=recipe.seed, workers=recipe.workers, share=share, device=device)
    return EpochLoader(
        MultiLabelDataset(source, transform, seed=recipe.seed), recipe.batch_size, seed=recipe.seed,
        workers=recipe.workers, share=share, repeats=max(repeats, 1), device=device)


def build_eval_loader(
        source: LabelledImages | ImageStream,
        model: nn.Module,
        *,
        batch_size: int,
        workers: int = 0,
        share: Share = Share(),
        device: torch.device | None = None,
) -> WorkerLoader:
    """Pictures and targets in the source's order, preprocessed as the model's configuration says.

    A stream's come in the order of its shards, worker by worker.

    Args:
        source: The pictures.
        model: The network, for its configuration.
        batch_size: Pictures of a batch.
        workers: Processes that read pictures.
        share: Which part to read: of several, a contiguous one.
        device: Where the batches go to.
    """
    transform = create_transform(**resolve_model_data_config(model))
    if isinstance(source, ImageStream):
        pictures = StreamPictures(source, transform, share=share)
        return WorkerLoader(pictures, workers=workers, device=device, batch_size=batch_size)
    first, end = (len(source) * index // share.count for index in (share.index, share.index + 1))
    return WorkerLoader(
        MultiLabelDataset(source, transform), workers=workers, device=device, batch_size=batch_size,
        sampler=range(first, end))


def _train_transform(recipe: Recipe, model: nn.Module) -> Callable[[Image.Image], Tensor]:
    config: Mapping[str, Any] = resolve_model_data_config(model)
    augment = recipe.augment
    if augment.name == 'paper':
        return create_paper_transform(
            config['input_size'][1:], is_training=True, mean=config['mean'], std=config['std'], **augment.args)
    args = {key: value for key, value in augment.args.items() if key not in ('mixup', 'aug_repeats')}
    transform: Callable[[Image.Image], Tensor] = create_transform(
        input_size=config['input_size'], is_training=True, scale=augment.scale, ratio=augment.ratio,
        hflip=augment.hflip, mean=config['mean'], std=config['std'],
        **{'interpolation': config['interpolation'], 'color_jitter': 0.0, **args})
    return transform


def _plain_task(parts: TaskParts) -> ClassificationTask:
    """Labels alone, or labels and a teacher's logits."""
    recipe, model, criterion, teacher, device = parts.recipe, parts.model, parts.criterion, parts.teacher, parts.device
    if teacher is not None and recipe.teacher is not None:
        weights: dict[str, Any] = {
            'task_loss_weight': recipe.teacher.task_loss_weight,
            'distill_loss_weight': recipe.teacher.distill_loss_weight}
        if recipe.task == 'semantic':
            return SemanticPretrainTask(
                model, cast(SemanticSoftmaxLoss, criterion), teacher=teacher, device=device, **weights)
        weights['temperature'] = recipe.teacher.temperature
        if recipe.task == 'single_label':
            return SupervisedDistillationTask(
                model, teacher, criterion, soft_targets=parts.is_soft, device=device, **weights)
        return MultiLabelDistillationTask(model, teacher, criterion, device=device, **weights)
    if recipe.task == 'self_supervised':
        return build_self_supervised(recipe, model, device)
    if recipe.task == 'semantic':
        return SemanticPretrainTask(model, cast(SemanticSoftmaxLoss, criterion), device=device)
    if recipe.task == 'single_label':
        return SingleLabelTask(model, criterion, soft_targets=parts.is_soft, device=device)
    if recipe.task == 'zero_shot':
        return build_zero_shot_task(parts)
    return MultiLabelTask(model, criterion, device=device)


def _mixup_settings(recipe: Recipe) -> dict[str, Any]:
    return dict(recipe.augment.args.get('mixup', {})) if recipe.augment.name == 'timm' else {}


class _OneCycle:
    """torch's OneCycle, which turns momentum too, in the shape of timm's schedules."""

    def __init__(self, optimizer: Optimizer, total_steps: int, args: Mapping[str, Any]) -> None:
        rates = [group['lr'] * group.get('lr_scale', 1.0) for group in optimizer.param_groups]
        has_momentum = bool({'momentum', 'betas'} & optimizer.defaults.keys())
        self.total_steps = total_steps
        settings = {'cycle_momentum': has_momentum, 'pct_start': 0.3, **args}
        # A rise of exactly one step has no length, by which torch divides: such a run starts at the top.
        if settings['pct_start'] * total_steps == 1:
            settings['pct_start'] *= 1 - 1e-9
        self.scheduler = OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps, **settings)

    def step_update(self, num_updates: int) -> None:
        if num_updates < self.total_steps:  # after the last step there is nothing to set
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)
