"""Measuring a model that embeds pictures: how well the cosine of two embeddings tells one identity from two."""
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from timm_miil.data import ImageStream, LabelledImages
from timm_miil.inference._scoring import collect_scores
from timm_miil.inference.load import load_model
from timm_miil.inference.predict import BATCH_SIZE, Tagger
from timm_miil.inference.validate import check_run
from timm_miil.metrics import TarAtFar, pairwise_tar_at_far

__all__ = ['FARS', 'PairValidation', 'validate_pairs']

FARS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclasses.dataclass(frozen=True, eq=False)
class PairValidation:
    """A model measured on all pairs of N pictures.

    Attributes:
        embeddings: Shape (N, D), float32, in host memory.
        identities: The label that each picture shows, by its number, shape (N,), int64.
        label_names: Names of the identities.
        rates: True accept rates at false accept rates.
        broken: Why pictures could not be used, one line each; they are left out.
        images_per_second: Speed of everything: reading, preprocessing and the model.
        model_images_per_second: Speed of the model alone.
    """

    embeddings: Tensor
    identities: Tensor
    label_names: tuple[str, ...]
    rates: TarAtFar
    broken: tuple[str, ...]
    images_per_second: float
    model_images_per_second: float

    def to_json(self, facts: Mapping[str, str | float] = MappingProxyType({})) -> str:
        """The numbers as one JSON object; null where there is none.

        Args:
            facts: What else to note, ahead of them, such as the name of the model.
        """
        rates = [
            {'far': far, 'tar': tar if math.isfinite(tar) else None,
             'threshold': threshold if math.isfinite(threshold) else None}
            for far, tar, threshold in zip(self.rates.fars, self.rates.tars, self.rates.thresholds)]
        return json.dumps({
            **facts, 'rates': rates, 'pairs_of_one': self.rates.num_same, 'pairs_of_two': self.rates.num_different,
            'images': len(self.identities), 'identities': len(self.identities.unique()),
            'broken_images': self.broken, 'images_per_second': self.images_per_second,
            'model_images_per_second': self.model_images_per_second}, indent=2) + '\n'


def validate_pairs(
        model: str | nn.Module,
        source: LabelledImages | ImageStream,
        *,
        fars: Sequence[float] = FARS,
        batch_size: int = BATCH_SIZE,
        workers: int = 0,
        device: torch.device | None = None,
        amp_dtype: torch.dtype | None = None,
        strict: bool = False,
        on_batch: Callable[[int], None] | None = None,
) -> PairValidation:
    """Measure a model that embeds pictures on all pairs of them, see `timm_miil.metrics.pairwise_tar_at_far`.

    Args:
        model: A name as `load_model` takes it, or a timm model for RGB pictures whose outputs are the embedding; its
            preprocessing is used.
        source: The pictures, each of exactly one label: its identity.
        fars: False accept rates in (0, 1).
        batch_size: Pictures in one pass.
        workers: Processes that read pictures; 0 reads them in this one.
        device: Where to run; None leaves the model where it is.
        amp_dtype: Half precision that the model may compute in; None for its own.
        strict: Whether the first picture that cannot be used is an error; otherwise it is left out.
        on_batch: Called with the pictures done since the last call.

    Raises:
        ImageError: If a picture cannot be used, with `strict`.
        PredictionError: If there is no such model, or no picture can be used.
        TypeError: If an argument is of another kind.
        ValueError: If a picture shows no label or several, or a number is out of range.
    """
    check_run(batch_size, workers, amp_dtype)
    module = load_model(model)[0] if isinstance(model, str) else model
    was_training = module.training
    try:
        # The numbers of an embedding stand in the place of classes.
        numbers = [str(place) for place in range(getattr(module, 'num_classes', 0))]
        tagger = Tagger(module, label_names=numbers, device=device)
        scores = collect_scores(
            tagger, source, source.label_names, range(len(numbers)), batch_size=batch_size, workers=workers,
            amp_dtype=amp_dtype, strict=strict, on_batch=on_batch)
    finally:
        module.train(was_training)
    shown = (scores.targets == 1).sum(1)
    if bool((shown != 1).any()):
        raise ValueError(
            f'each picture must show exactly one label, its identity, got {int((shown != 1).sum())} pictures of '
            f'{len(shown)} that show none or several.')
    identities = scores.targets.argmax(1)
    rates = pairwise_tar_at_far(scores.logits, identities, fars)
    return PairValidation(
        scores.logits, identities, tuple(source.label_names), rates, scores.broken, scores.images_per_second,
        scores.model_images_per_second)
