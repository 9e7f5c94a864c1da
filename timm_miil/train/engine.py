"""The training loop: the one file that knows devices, steps and epochs."""
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from timm_miil._errors import TrainingError
from timm_miil.data import MultiLabelRecords, seeded
from timm_miil.tasks import MultiLabelTask
from timm_miil.train.build import (
    Batches, EpochLoader, Splits, build_eval_loader, build_model, build_optimizer, build_scheduler, build_task,
    build_train_loader, hold_out, read_splits, with_labels)
from timm_miil.train.recipe import Recipe

__all__ = ['EpochRecord', 'TrainResult', 'evaluate', 'train']


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Args:
        epoch: Counted from 1.
        lr: Learning rate of its last step.
        train_loss: Mean loss of a training picture, of the raw weights.
        val_map: Mean average precision on the validation pictures, percent.
    """
    epoch: int
    lr: float
    train_loss: float
    val_map: float


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A finished run.

    Args:
        model: The network with the weights of the best epoch, in evaluation mode, on the run's device.
        label_names: Names of its classes; without those that were held out.
        epochs: All epochs in order.
        best_epoch: The first with the highest validation mAP, counted from 1.
        test_map: Its mean average precision on the test pictures, percent, over `label_names`.
        unseen_map: The same over the labels that were held out, of which it knew nothing but their names; None for a
            network that cannot say.
    """
    model: nn.Module
    label_names: tuple[str, ...]
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    test_map: float
    unseen_map: float | None = None

    @property
    def val_map(self) -> float:
        """Validation mAP of the best epoch, percent."""
        return self.epochs[self.best_epoch - 1].val_map

    def to_json(self) -> str:
        """The numbers, without the model."""
        return json.dumps({
            'best_epoch': self.best_epoch, 'val_map': self.val_map, 'test_map': self.test_map,
            'unseen_map': self.unseen_map, 'epochs': [dataclasses.asdict(record) for record in self.epochs]})


def train(
        recipe: Recipe,
        data_dir: str | Path,
        *,
        device: torch.device | str | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
) -> TrainResult:
    """Train on a data set of pictures and test the best epoch.

    The same recipe and data give the same weights, to the bit, on one machine's CPU with one number of threads. The
    caller's random number generators are left as they were. Nothing is written.

    Args:
        recipe: All settings.
        data_dir: Folder as read by `read_splits`.
        device: Where to run; None takes torch's default device.
        on_step: Called after each step with its number in the epoch (from 1), the steps of an epoch and the loss of
            a picture.
        on_epoch: Called after each epoch.

    Returns:
        The trained model with what was measured; mAP is timm's exact one, over all classes.

    Raises:
        FileNotFoundError: If a data file is missing.
        TrainingError: If the loss is not finite.
        ValueError: If a data file is wrong, the recipe's unseen labels do not fit the data (see `hold_out`), or there
            are fewer training pictures than one batch takes.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    splits = read_splits(data_dir)
    if recipe.unseen_labels:
        splits = hold_out(splits, recipe.unseen_labels)
    with seeded(recipe.seed):
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model = build_model(recipe, splits.label_names).to(device).to(memory_format=layout)
        loader = build_train_loader(recipe, splits.train, model)
        val_loader = build_eval_loader(splits.val, model, batch_size=recipe.batch_size, workers=recipe.workers)
        task = build_task(recipe, model, device)
        optimizer = build_optimizer(recipe, model)
        scheduler = build_scheduler(recipe, optimizer, len(loader))
        records: list[EpochRecord] = []
        best_map, best_weights = -math.inf, model.state_dict()
        for epoch in range(recipe.epochs):
            loss, lr = _train_epoch(task, loader, optimizer, scheduler, epoch, on_step)
            kept = task.trainable_module_ema.module if task.has_ema() else model
            record = EpochRecord(epoch + 1, lr, loss, _evaluate(kept, val_loader)['map'])
            records.append(record)
            if record.val_map > best_map:
                best_map, best_weights = record.val_map, copy.deepcopy(kept.state_dict())
            if on_epoch is not None:
                on_epoch(record)
        model.load_state_dict(best_weights)
        model.eval().to(memory_format=torch.contiguous_format)
        best_epoch = next(record.epoch for record in records if record.val_map == best_map)
        test_map, unseen_map = _test(recipe, model, splits)
    return TrainResult(model, splits.label_names, tuple(records), best_epoch, test_map, unseen_map)


def evaluate(
        model: nn.Module, records: MultiLabelRecords, *, batch_size: int = 64, workers: int = 0) -> dict[str, float]:
    """Measure a model on pictures, preprocessed as its configuration says.

    Args:
        model: Network with one logit a label; its mode is left as it was.
        records: Pictures and targets.
        batch_size: Pictures at a time.
        workers: Processes that read pictures.

    Returns:
        timm's figures: 'map' (exact mean average precision over all classes; one without positives counts 0),
        'micro_f1', 'macro_f1', 'sample_f1' at probability 0.5, all in percent, and 'loss' (cross-entropy).

    Raises:
        OSError: If a picture cannot be read.
        ValueError: If the model has another number of outputs than there are labels.
    """
    return _evaluate(model, build_eval_loader(records, model, batch_size=batch_size, workers=workers))


def _test(recipe: Recipe, model: Any, splits: Splits) -> tuple[float, float | None]:
    """mAP on the test pictures over the labels that were learnt and, of a zero-shot network, over the unseen ones."""
    def test_map(labels: Sequence[str]) -> float:
        records = with_labels(splits.test, labels)
        return evaluate(model, records, batch_size=recipe.batch_size, workers=recipe.workers)['map']

    seen_map = test_map(splits.label_names)
    if recipe.task != 'zero_shot' or not recipe.unseen_labels:
        return seen_map, None
    model.set_labels(recipe.unseen_labels)
    unseen_map = test_map(recipe.unseen_labels)
    model.set_labels(splits.label_names)
    return seen_map, unseen_map


@torch.no_grad()
def _evaluate(model: nn.Module, loader: Batches) -> dict[str, float]:
    device = next(model.parameters()).device
    evaluator = MultiLabelTask(model, device=device).create_evaluator()
    was_training = model.training
    model.eval()
    try:
        for images, targets in loader:
            evaluator.update(model(images.to(device)), targets.to(device))
    finally:
        model.train(was_training)
    return dict(evaluator.compute())


def _train_epoch(
        task: MultiLabelTask,
        loader: EpochLoader,
        optimizer: Optimizer,
        scheduler: Scheduler,
        epoch: int,
        on_step: Callable[[int, int, float], None] | None,
) -> tuple[float, float]:
    """One pass over the training pictures; mean loss of a picture, and the last step's learning rate."""
    task.train()
    loader.set_epoch(epoch)
    steps, total, lr = len(loader), 0.0, 0.0
    for step, (images, targets) in enumerate(loader, start=1):
        loss = task(images.to(task.device), targets.to(task.device))['loss']
        picture_loss = loss.item() / len(images)
        if not math.isfinite(picture_loss):
            raise TrainingError(
                f'the loss became {picture_loss} in epoch {epoch + 1}, step {step} of {steps}, at learning rate '
                f'{optimizer.param_groups[0]["lr"]:.3g}; lower optimizer.lr or lengthen schedule.warmup_epochs.')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr = optimizer.param_groups[0]['lr']
        done = epoch * steps + step
        scheduler.step_update(done)
        task.update_ema(step=done)
        total += picture_loss
        if on_step is not None:
            on_step(step, steps, picture_loss)
    return total / steps, lr
