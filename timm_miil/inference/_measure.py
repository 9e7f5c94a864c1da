"""What is measured of the scores of labelled pictures, a few rows at a time: ranking, decisions and calibration."""
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from timm_miil.inference.load import Activation
from timm_miil.metrics import (
    F1, AveragePrecision, MultilabelF1, ReliabilityCurve, multilabel_average_precision, reliability_curve)

__all__ = ['NUM_BINS', 'Measures', 'ReliabilitySum', 'expected_error', 'measure', 'probs_in_parts', 'ranked']

# Scores worked on at once: 32 MiB of float64.
PART_SCORES = 2 ** 22
TARGET_ROWS = 1024
NUM_BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """What was measured of N pictures and C classes.

    Attributes:
        average_precision: Of each class, with its positives and negatives.
        f1: Precision and recall of each class at its threshold.
        reliability: Confidence and frequency of all labels together.
        top1: Share of pictures whose most confident label is present; None for independent classes, NaN without a
            picture that shows something.
        top5: Likewise of the five most confident; None also for 5 classes or fewer.
    """

    average_precision: AveragePrecision
    f1: F1
    reliability: ReliabilityCurve
    top1: float | None
    top5: float | None

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of all labels together, a fraction; NaN without known labels."""
        return expected_error(self.reliability)


class ReliabilitySum:
    """A reliability curve of all labels together, gathered from parts of them."""

    def __init__(self) -> None:
        self._count = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._confidence, self._frequency = torch.zeros(2, NUM_BINS, dtype=torch.float64)

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Add probabilities (B, C) and their targets."""
        curve = reliability_curve(probs, targets, num_bins=NUM_BINS)
        self._count += curve.count
        self._confidence += (curve.confidence * curve.count).nan_to_num(0.0)
        self._frequency += (curve.frequency * curve.count).nan_to_num(0.0)

    def compute(self) -> ReliabilityCurve:
        """The curve of all that was added; a bin without labels is NaN."""
        return ReliabilityCurve(self._confidence / self._count, self._frequency / self._count, self._count)


def expected_error(curve: ReliabilityCurve) -> float:
    """The mean of |confidence - frequency| over the bins, weighted by their labels; NaN without labels."""
    gap = (curve.confidence - curve.frequency).abs().nan_to_num(0.0)
    return float((gap * curve.count).sum() / curve.count.sum())


def probs_in_parts(
        logits: Tensor,
        targets: Tensor,
        *,
        activation: Activation,
        temperatures: Sequence[float] | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The probabilities of logits (N, C), as many rows at a time as memory bears.

    Yields:
        The rows, their probabilities (B, C) in float64, and their targets (B, C).
    """
    scale = None if temperatures is None else torch.tensor(temperatures, dtype=torch.float64)
    num_rows = max(1, PART_SCORES // max(1, logits.shape[1]))
    for start in range(0, len(logits), num_rows):
        rows = slice(start, min(start + num_rows, len(logits)))
        part = logits[rows].double()
        if scale is not None:
            part /= scale
        yield rows, part.sigmoid() if activation == 'sigmoid' else part.softmax(dim=1), targets[rows]


def measure(
        logits: Tensor,
        targets: Tensor,
        *,
        activation: Activation,
        thresholds: Sequence[float],
        temperatures: Sequence[float] | None = None,
        on_part: Callable[[slice, Tensor, Tensor], None] | None = None,
) -> Measures:
    """Measure scores.

    Args:
        logits: Raw scores, finite, shape (N, C), in host memory.
        targets: 1 for present, 0 for absent, -1 for unknown (left out), shape (N, C).
        activation: Whether classes are independent ('sigmoid') or exclude one another ('softmax').
        thresholds: Least confidence of a label that counts as predicted; one a class.
        temperatures: What the logits of each class are divided by before the sigmoid; None for 1.
        on_part: Called with what `probs_in_parts` gives, for what else is to be made of it.

    Returns:
        All measures, in host memory.
    """
    f1, reliability = MultilabelF1(logits.shape[1], list(thresholds)), ReliabilitySum()
    for rows, probs, labels in probs_in_parts(logits, targets, activation=activation, temperatures=temperatures):
        f1.update(probs, labels)
        reliability.update(probs, labels)
        if on_part is not None:
            on_part(rows, probs, labels)
    is_exclusive = activation == 'softmax'
    return Measures(
        average_precision=_measure_ranking(logits, targets, activation),
        f1=f1.compute(),
        reliability=reliability.compute(),
        top1=_top_accuracy(logits, targets, 1) if is_exclusive else None,
        top5=_top_accuracy(logits, targets, 5) if is_exclusive and logits.shape[1] > 5 else None,
    )


def ranked(logits: Tensor, activation: Activation) -> Tensor:
    """Scores (N, C) in the order of probabilities, even where these round to 1: logits, or log-odds of the softmax."""
    if activation == 'sigmoid':
        return logits
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_probs = logits.log_softmax(dim=1)
    return (log_probs - (-log_probs.exp()).log1p()).scatter(1, top, logits.gather(1, top) - others)


def _measure_ranking(logits: Tensor, targets: Tensor, activation: Activation) -> AveragePrecision:
    support, num_negatives = torch.zeros(2, logits.shape[1], dtype=torch.int64)
    for start in range(0, len(targets), TARGET_ROWS):
        part = targets[start:start + TARGET_ROWS]
        support += (part == 1).sum(dim=0)
        num_negatives += (part == 0).sum(dim=0)
    return AveragePrecision(
        multilabel_average_precision(ranked(logits, activation), targets), support, num_negatives)


def _top_accuracy(logits: Tensor, targets: Tensor, k: int) -> float:
    """Share of pictures with a present label that have one among the k best scored of their known labels."""
    best = torch.where(targets == -1, -math.inf, logits).topk(k, dim=1).indices
    is_hit = (targets.gather(1, best) == 1).any(dim=1)
    return float(is_hit[(targets == 1).any(dim=1)].double().mean())
