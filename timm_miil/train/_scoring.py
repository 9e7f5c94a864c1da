"""The scores that a network gives the pictures of all processes."""
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_miil.data import ImageStream, LabelledImages
from timm_miil.train._host import Host
from timm_miil.train._interrupt import StopRequest
from timm_miil.train._loaders import Share, WorkerLoader
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import measure, score_batches
from timm_miil.train.recipe import Recipe

__all__ = ['Scorer', 'measured']


class Scorer:
    """Scores pictures in all processes, unless a signal comes.

    Args:
        recipe: All settings.
        host: The place where it runs.
        stop: Hears the signals.
        model: The network, for the size of its input.
    """

    def __init__(self, recipe: Recipe, host: Host, stop: StopRequest, model: nn.Module) -> None:
        self.recipe, self.host, self.stop, self.model = recipe, host, stop, model

    def loader(self, source: LabelledImages | ImageStream) -> WorkerLoader:
        """This process's share of the pictures."""
        share = Share(self.host.share.index, self.host.share.count)
        batch_size = max(self.recipe.batch_size // (share.count * self.recipe.grad_accum_steps), 1)
        return build_eval_loader(
            source, self.model, batch_size=batch_size, workers=self.recipe.workers, share=share,
            device=self.host.device)

    def score(self, model: nn.Module, loader: Any) -> tuple[Tensor | None, Tensor | None]:
        """Logits and targets of all processes' pictures, on the main one.

        Raises:
            Stopped: In all processes, after a signal to any.
        """
        num_classes = len(loader.dataset.source.label_names)
        logits, targets = [torch.empty(0, num_classes)], [torch.empty(0, num_classes, dtype=torch.int8)]
        batches = _EvenBatches(loader, self.host, self.model) if self.host.is_sharded else loader
        for scores, labels in self.stop.watch(score_batches(model, batches, autocast=self.host.autocast), self.host):
            logits.append(scores.cpu())
            targets.append(labels)
        own = slice(batches.num_rows if isinstance(batches, _EvenBatches) else None)
        return self.host.gather(torch.cat(logits)[own]), self.host.gather(torch.cat(targets)[own])


class _EvenBatches:
    """As many batches in each process: networks that lie in parts compute in all processes or in none.

    A process that has no pictures left gives black ones, behind its own.

    Attributes:
        num_rows: Pictures of its own so far.
    """

    def __init__(self, loader: Any, host: Host, model: nn.Module) -> None:
        self.loader, self.host, self.num_rows = loader, host, 0
        size = resolve_model_data_config(model)['input_size']
        self.filler = torch.zeros(1, *size), torch.zeros(1, len(loader.dataset.source.label_names))

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            batch = next(batches, None)
            has_own = torch.tensor([int(batch is not None)], device=self.host.device)
            if not int(self.host.total(has_own)):
                return
            self.num_rows += 0 if batch is None else len(batch[1])
            yield self.filler if batch is None else batch


def measured(logits: Tensor | None, targets: Tensor | None, task: str) -> dict[str, float]:
    """`measure`, on the main process.

    Raises:
        ValueError: If there are no pictures.
    """
    if logits is None or targets is None or not len(logits):
        raise ValueError('there are no pictures to measure the network on; give the split pictures, or another split.')
    return measure(logits, targets, task)
