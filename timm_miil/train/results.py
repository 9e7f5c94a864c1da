"""What a training run tells: of each step, of each epoch, and at the end."""
import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from timm_miil.train.evaluate import METRIC_OF_TASK
from timm_miil.train.recipe import Recipe
from timm_miil.train.splits import Splits

__all__ = ['EpochRecord', 'StepRecord', 'TrainResult', 'epochs_as_csv']


@dataclass(frozen=True)
class StepRecord:
    """What one step of the optimizer gave.

    On an accelerator it is told when the step after it has begun, so that nothing waits for it.

    Args:
        epoch: Counted from 1.
        step: In the epoch, counted from 1. Where a run is resumed the first is not 1.
        steps: Steps of an epoch.
        loss: Mean loss of a picture, over all processes; of a label, where the loss is a mean.
        lr: Learning rate of the step.
        images: Pictures that all processes took for it.
        is_prior: Whether it is one of the temporary network that estimates a prior, before the main training.
    """
    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images: int
    is_prior: bool = False


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Args:
        epoch: Counted from 1.
        lr: Learning rate of its last step.
        train_loss: Mean loss of a training picture, of the raw weights.
        metrics: Figures on the validation pictures, see `measure`; empty where nothing is validated.
        seconds: Wall clock of its steps, without validation. Two records that differ in time only are equal.
        images_per_second: Training pictures of all processes in a second of that time.
    """
    epoch: int
    lr: float
    train_loss: float
    metrics: Mapping[str, float]
    seconds: float = dataclasses.field(default=0.0, compare=False)
    images_per_second: float = dataclasses.field(default=0.0, compare=False)

    @property
    def val_map(self) -> float | None:
        """Mean average precision on the validation pictures, percent; None for a task that has none."""
        return self.metrics.get('map')

    def as_row(self) -> dict[str, float]:
        """All numbers by name; those of the validation start with 'val_'."""
        row = dataclasses.asdict(self)
        metrics = row.pop('metrics')
        timing = {name: row.pop(name) for name in ('seconds', 'images_per_second')}
        return {**row, **{f'val_{name}': value for name, value in metrics.items()}, **timing}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A finished run.

    Args:
        model: The network with the weights of the best epoch, in evaluation mode, on the run's device.
        label_names: Names of its classes; without those that were held out.
        epochs: All epochs in order.
        best_epoch: The first with the highest validation mAP or, of a task of one label, top-1; counted from 1. The
            last one where there is no mAP, as no label has both present and absent pictures.
        test_metrics: Figures of its model on the test pictures over `label_names`, see `measure`; empty without such.
        unseen_metrics: The same over the labels that were held out, of which it knew nothing but their names; empty
            for a network that cannot say.
        recipe: The recipe.
        splits: The pictures, as they were learnt from.
        val_logits: What the model says of the validation pictures, float32 (N, C) in host memory, in their order (of
            a stream, in the order in which it was read); None on other processes than the main one, and where so many
            scores of one label a picture were counted instead.
        val_targets: What they show, int8 (N, C), likewise.
        is_main_process: Whether this process is the one to write and to print.
        generalised_metrics: Like `unseen_metrics`, over `label_names` and the labels that were held out together.
    """
    model: nn.Module
    label_names: tuple[str, ...]
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    test_metrics: Mapping[str, float]
    unseen_metrics: Mapping[str, float]
    recipe: Recipe
    splits: Splits
    val_logits: Tensor | None
    val_targets: Tensor | None
    is_main_process: bool = True
    generalised_metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def val_metrics(self) -> Mapping[str, float]:
        """Figures of the best epoch on the validation pictures."""
        return self.epochs[self.best_epoch - 1].metrics

    @property
    def metric(self) -> str:
        """What the best epoch is chosen by: a key of the figures."""
        return METRIC_OF_TASK[self.recipe.task]

    @property
    def val_map(self) -> float | None:
        """Validation mAP of the best epoch, percent; None for a task that has none."""
        return self.val_metrics.get('map')

    @property
    def test_map(self) -> float | None:
        """Test mAP, percent; None without test pictures or for a task that has none."""
        return self.test_metrics.get('map')

    @property
    def unseen_map(self) -> float | None:
        """Test mAP over the labels that were held out, percent; None for a network that cannot say."""
        return self.unseen_metrics.get('map')

    def to_json(self) -> str:
        """The numbers, without the model; what is nan is null."""
        figures = [
            self.val_metrics, self.test_metrics, self.unseen_metrics, self.generalised_metrics,
            *(each.as_row() for each in self.epochs)]
        val, test, unseen, generalised, *epochs = (
            {name: None if math.isnan(value) else value for name, value in row.items()} for row in figures)
        return json.dumps({
            'metric': self.metric, 'best_epoch': self.best_epoch, 'val': val, 'test': test, 'unseen': unseen,
            'generalised': generalised, 'epochs': epochs}, allow_nan=False)


def epochs_as_csv(records: tuple[EpochRecord, ...]) -> str:
    """A table with a row an epoch."""
    text = io.StringIO()
    rows = [record.as_row() for record in records]
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
