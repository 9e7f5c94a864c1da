"""What a network says of the pictures of all processes, and how good that is."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_miil.data import ImageStream, LabelledImages
from timm_miil.losses import SemanticHierarchy
from timm_miil.train._host import Host
from timm_miil.train._interrupt import StopRequest
from timm_miil.train._loaders import Share, WorkerLoader
from timm_miil.train._tally import Tally
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import measure, score_batches
from timm_miil.train.recipe import Recipe

__all__ = ['Scored', 'Scorer']

# Of a table of pictures and classes in the main process. ImageNet's 50,000 pictures stay below; ImageNet-21K's
# validation would be 25 GB.
MOST_SCORES = 1 << 27


@dataclass(frozen=True)
class Scored:
    """What came of the pictures of all processes: on the main one logits and targets, or, on all, their counts.

    Args:
        logits: Float32 in host memory, shape (N, C), or embeddings (N, D).
        targets: Int8 in host memory, shape (N, C).
        totals: Of `Tally`; None where there are logits.
    """
    logits: Tensor | None = None
    targets: Tensor | None = None
    totals: Tensor | None = None


class Scorer:
    """Scores pictures in all processes, unless a signal comes.

    Args:
        recipe: All settings.
        host: The place where it runs.
        stop: Hears the signals.
        model: The network, for the size of its input.
        hierarchy: The tree over the labels, for the task that has one.
    """

    def __init__(
            self, recipe: Recipe, host: Host, stop: StopRequest, model: nn.Module,
            hierarchy: SemanticHierarchy | None = None,
    ) -> None:
        self.recipe, self.host, self.stop, self.model, self.hierarchy = recipe, host, stop, model, hierarchy

    def loader(self, source: LabelledImages | ImageStream) -> WorkerLoader:
        """This process's share of the pictures."""
        share = Share(self.host.share.index, self.host.share.count)
        batch_size = max(self.recipe.batch_size // (share.count * self.recipe.grad_accum_steps), 1)
        return build_eval_loader(
            source, self.model, batch_size=batch_size, workers=self.recipe.workers, share=share,
            device=self.host.device)

    def score(self, model: nn.Module, loader: Any) -> Scored:
        """Logits and targets of all processes' pictures, or their counts where a table of them would be too large.

        Raises:
            Stopped: In all processes, after a signal to any.
        """
        batches = self.stop.watch(self._batches(model, loader), self.host)
        source = loader.dataset.source
        num_classes = len(source.label_names)
        num_images = source.num_images if isinstance(source, ImageStream) else len(source)
        settings = self.recipe.verification
        if settings is None and self.recipe.is_exclusive and num_images * num_classes > MOST_SCORES:
            tally = Tally(self.hierarchy)
            for scores, labels in batches:
                tally.update(scores, labels)
            dtype = torch.float32 if self.host.device.type == 'mps' else torch.float64
            return Scored(totals=self.host.total(tally.totals().to(self.host.device, dtype)).cpu())
        num_outputs = self._num_outputs(num_classes)
        logits, targets = [torch.empty(0, num_outputs)], [torch.empty(0, num_classes, dtype=torch.int8)]
        for scores, labels in batches:
            logits.append(scores.cpu())
            targets.append(labels)
        return Scored(self.host.gather(torch.cat(logits)), self.host.gather(torch.cat(targets)))

    def figures(self, scored: Scored) -> dict[str, float]:
        """What `measure` finds, in all processes.

        Raises:
            ValueError: If there are no pictures.
        """
        return self.host.on_main(lambda: self._measure(scored))

    def _measure(self, scored: Scored) -> dict[str, float]:
        logits, targets, totals = scored.logits, scored.targets, scored.totals
        if totals is not None and totals[0]:
            return Tally.figures(totals)
        if logits is None or targets is None or not len(logits):
            raise ValueError(
                'there are no pictures to measure the network on; give the split pictures, or another split.')
        settings = {} if self.recipe.verification is None else {'verification': self.recipe.verification}
        return measure(logits, targets, self.recipe.task, hierarchy=self.hierarchy, **settings)

    def _num_outputs(self, num_classes: int) -> int:
        if self.recipe.verification is not None:
            return self.recipe.verification.embed_dim
        width: int = cast(Any, self.model).head_hidden_size if self.recipe.embeds else num_classes
        return width

    def _batches(self, model: nn.Module, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and targets of this process's own pictures."""
        if not self.host.is_sharded:
            yield from score_batches(model, loader, autocast=self.host.autocast, embeds=self.recipe.embeds)
            return
        batches, seen = _EvenBatches(loader, self.host, self.model), 0
        for scores, labels in score_batches(model, batches, autocast=self.host.autocast, embeds=self.recipe.embeds):
            own, seen = batches.num_rows - seen, batches.num_rows
            yield scores[:own], labels[:own]


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
