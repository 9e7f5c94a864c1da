"""Trainings that come before the main one, each in a folder of its own inside the main one's."""
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from timm_miil.losses import LabelPriorEstimator
from timm_miil.train._host import Host
from timm_miil.train._output import RunFolder
from timm_miil.train._run import Reports, Run
from timm_miil.train._state import fingerprint, seeded_run
from timm_miil.train._task_parts import Prepared
from timm_miil.train.recipe import Recipe
from timm_miil.train.results import StepRecord
from timm_miil.train.splits import Splits

__all__ = ['Stages']


@dataclasses.dataclass(frozen=True)
class Stages:
    """Where earlier trainings run.

    Args:
        splits: The main training's pictures.
        host: The place where all run.
        output: The main training's folder; None writes nothing.
        resumes: Whether the main training is resumed; each stage then goes on from its own newest checkpoint.
        on_step: Called after each of their steps, in the main process.
    """
    splits: Splits
    host: Host
    output: Path | None = None
    resumes: bool = False
    on_step: Callable[[StepRecord], None] | None = None

    def train(
            self, recipe: Recipe, name: str, *, splits: Splits | None = None, prepared: Prepared = Prepared(),
    ) -> nn.Module:
        """The best network of a training, in evaluation mode on the host's device.

        Args:
            recipe: All its settings.
            name: Its folder inside the main one's.
            splits: Its pictures; None takes the main training's.
            prepared: What stages before leave to it.

        Raises:
            As `train`.
        """
        with seeded_run(recipe.seed, self.host.device):
            run = self._run(recipe, name, splits or self.splits, prepared=prepared)
            run.fit()
            return run.best_model()

    def observe(self, recipe: Recipe, name: str, observer: LabelPriorEstimator, *, forgets: bool) -> None:
        """Train without validation and let an observer see the logits.

        Args:
            recipe: All settings of the training.
            name: Its folder inside the main one's.
            observer: Sees the logits of training pictures.
            forgets: Whether it forgets an epoch when the next one starts.

        Raises:
            As `train`.
        """
        with seeded_run(recipe.seed, self.host.device):
            self._run(recipe, name, self.splits, observer=observer, forgets=forgets).fit()

    def _run(self, recipe: Recipe, name: str, splits: Splits, **settings: Any) -> Run:
        known = fingerprint(recipe, splits, self.host.share.count)
        folder = None if self.output is None else RunFolder(self.output / name, keep=recipe.keep_checkpoints)
        state = None if folder is None else self.host.on_main(
            lambda: folder.begin(recipe, 'auto' if self.resumes else None, known))
        return Run(
            recipe, splits, self.host, folder=folder, state=state, fingerprint=known, reports=Reports(self.on_step),
            **settings)
