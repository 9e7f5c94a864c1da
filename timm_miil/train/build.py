"""From a recipe and a data set to the parts of a training run."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from timm_miil._checks import nearest
from timm_miil.data import MultiLabelDataset, MultiLabelRecords, mix_seed, read_coco
from timm_miil.losses import create_loss
from timm_miil.tasks import MultiLabelTask, ZeroShotTask
from timm_miil.train.recipe import Recipe

__all__ = [
    'EpochLoader', 'Splits', 'build_eval_loader', 'build_model', 'build_optimizer', 'build_scheduler', 'build_task',
    'build_train_loader', 'hold_out', 'read_splits', 'with_labels',
]

Batches = DataLoader[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Splits:
    """Pictures to learn from, to choose the best epoch by, and to test once."""
    train: MultiLabelRecords
    val: MultiLabelRecords
    test: MultiLabelRecords

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels to learn, equal in `train` and `val`; after `hold_out` those of `test` are more."""
        return self.train.label_names


def read_splits(data_dir: str | Path) -> Splits:
    """Read a data set laid out like COCO 2017: `<split>/` and `annotations/instances_<split>.json`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is wrong, or the labels of the splits differ.
    """
    data_dir = Path(data_dir)
    splits = {
        split: read_coco(data_dir / 'annotations' / f'instances_{split}.json', data_dir / split)
        for split in ('train', 'val', 'test')}
    for split, records in splits.items():
        if records.label_names != splits['train'].label_names:
            raise ValueError(
                f'{data_dir}: the labels of {split} and train must be equal, in the same order; got '
                f'{len(records.label_names)} and {len(splits["train"].label_names)} labels.')
    return Splits(**splits)


def hold_out(splits: Splits, unseen_labels: Sequence[str]) -> Splits:
    """Splits for zero-shot recognition: nothing is learnt from a picture that shows an unseen label.

    Args:
        splits: Pictures of all labels.
        unseen_labels: Labels to hold out.

    Returns:
        Training and validation without the pictures that show an unseen label, and without the columns of those labels.
        The test keeps all pictures and all labels.

    Raises:
        ValueError: If a label is unknown or given twice, or no label, training or validation picture is left.
    """
    for label in unseen_labels:
        if label not in splits.label_names or unseen_labels.count(label) > 1:
            raise ValueError(
                f'unseen_labels must be distinct labels of the data, got {label!r}; '
                f'{nearest(label, splits.label_names)}')
    kept = {}
    for split, records in {'train': splits.train, 'val': splits.val}.items():
        shows = with_labels(records, unseen_labels).targets.any(1).tolist()
        rows = [row for row, is_shown in enumerate(shows) if not is_shown]
        kept[split] = with_labels(
            MultiLabelRecords(
                tuple(records.image_paths[row] for row in rows), records.targets[rows], records.label_names),
            [label for label in records.label_names if label not in unseen_labels])
        if 0 in kept[split].targets.shape:
            raise ValueError(
                f'unseen_labels must leave pictures and labels, got {len(unseen_labels)} of {len(records.label_names)} '
                f'labels, which leave {len(rows)} pictures in {split}; hold out fewer labels.')
    return Splits(**kept, test=splits.test)


def with_labels(records: MultiLabelRecords, labels: Sequence[str]) -> MultiLabelRecords:
    """All pictures, with the columns of these labels of theirs."""
    columns = [records.label_names.index(label) for label in labels]
    return MultiLabelRecords(records.image_paths, records.targets[:, columns], tuple(labels))


def build_model(recipe: Recipe, label_names: Sequence[str]) -> nn.Module:
    """The network with fresh weights, drawn from torch's global generator; a zero-shot one is told the names."""
    classes = {'labels': list(label_names)} if recipe.task == 'zero_shot' else {'num_classes': len(label_names)}
    model: nn.Module = create_model(recipe.model.name, pretrained=False, **classes, **recipe.model.args)
    return model


def build_task(recipe: Recipe, model: nn.Module, device: torch.device) -> MultiLabelTask:
    """The model with its loss; with averaged weights if the recipe asks for them."""
    criterion = create_loss(recipe.loss.name, **recipe.loss.args)
    task_class = ZeroShotTask if recipe.task == 'zero_shot' else MultiLabelTask
    task = task_class(model, criterion, device=device)
    if recipe.ema_decay:
        task.setup_ema(decay=recipe.ema_decay, use_warmup=True)
    return task


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """timm's optimizer; biases, norms and what the model excludes are not decayed."""
    settings = recipe.optimizer
    return create_optimizer_v2(model, opt=settings.name, lr=settings.lr, weight_decay=settings.weight_decay)


def build_scheduler(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, to be advanced by `step_update` after every step."""
    settings = recipe.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=settings.name, num_epochs=recipe.epochs, warmup_lr=0.0, min_lr=settings.min_lr,
        warmup_epochs=cast(int, settings.warmup_epochs),  # timm multiplies it by the steps: parts of epochs work
        step_on_epochs=False, updates_per_epoch=steps_per_epoch)
    return scheduler


class EpochLoader(DataLoader[tuple[Tensor, Tensor]]):
    """Shuffled full batches whose order and augmentation depend on seed and epoch alone.

    Args:
        dataset: Pictures with a random transform.
        batch_size: Pictures of a batch.
        seed: The dataset's seed.
        workers: Processes that read pictures.
    """

    def __init__(self, dataset: MultiLabelDataset, batch_size: int, *, seed: int, workers: int) -> None:
        self._pictures, self._order = dataset, _EpochShuffle(len(dataset), seed)
        super().__init__(dataset, batch_size, sampler=self._order, num_workers=workers, drop_last=True)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, before iterating over it."""
        self._pictures.set_epoch(epoch)
        self._order.epoch = epoch


def build_train_loader(recipe: Recipe, records: MultiLabelRecords, model: nn.Module) -> EpochLoader:
    """Shuffled, augmented batches.

    Raises:
        ValueError: If there are fewer pictures than one batch takes.
    """
    if len(records) < recipe.batch_size:
        raise ValueError(
            f'batch_size must be at most the number of training pictures, got {recipe.batch_size} for '
            f'{len(records)} pictures.')
    config: dict[str, Any] = resolve_model_data_config(model)
    transform = create_transform(
        input_size=config['input_size'], is_training=True, scale=recipe.augment.scale, ratio=recipe.augment.ratio,
        hflip=recipe.augment.hflip, color_jitter=0.0, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'])
    dataset = MultiLabelDataset(records, transform, seed=recipe.seed)
    return EpochLoader(dataset, recipe.batch_size, seed=recipe.seed, workers=recipe.workers)


def build_eval_loader(records: MultiLabelRecords, model: nn.Module, *, batch_size: int, workers: int = 0) -> Batches:
    """Batches in the records' order, preprocessed as the model's configuration says."""
    dataset = MultiLabelDataset(records, create_transform(**resolve_model_data_config(model)))
    return DataLoader(dataset, batch_size, num_workers=workers)


class _EpochShuffle(Sampler[int]):
    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()
