"""Verification: how many pairs of one identity are accepted where few pairs of two are (TAR at FAR).

As IJB-B and IJB-C report it (Whitelam et al., "IARPA Janus Benchmark-B Face Dataset", CVPR Workshops 2017), over all
pairs instead of a list of them.

A pair is accepted if its score is strictly above the threshold. At a false accept rate FAR of N pairs of two
identities at most k = floor(FAR * N) of them may be accepted, so the threshold is the (k + 1)-th largest of their
scores: of all thresholds that keep the rate, none accepts more pairs of one identity. Nothing is interpolated, pairs
that are tied with the threshold are rejected, and the product FAR * N is that of the decimal number as it is written.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from timm_miil._checks import check_floating, check_indices, check_ndim, check_positive, check_range, check_same_length
from timm_miil.metrics._batch import check_not_nan, check_tensors

__all__ = ['TarAtFar', 'pairwise_tar_at_far', 'rate_of_percent', 'tar_at_far']

_BLOCK_SCORES = 1 << 22
# A score's 32 bits are counted in two halves.
_HALF_BITS = 16
_HALF = 1 << _HALF_BITS


@dataclass(frozen=True)
class TarAtFar:
    """True accept rates at false accept rates.

    Attributes:
        fars: The false accept rates that were asked for, fractions.
        tars: Share of the pairs of one identity that are accepted at each; NaN where there is no such pair, or where
            not even one pair of two identities may be accepted (FAR * num_different < 1): take more pictures.
        thresholds: What the scores of accepted pairs exceed at each; NaN where the rate cannot be measured.
        num_same: Pairs of one identity.
        num_different: Pairs of two.
    """
    fars: tuple[float, ...]
    tars: tuple[float, ...]
    thresholds: tuple[float, ...]
    num_same: int
    num_different: int


def tar_at_far(scores: Tensor, is_same: Tensor, fars: Sequence[float]) -> TarAtFar:
    """True accept rates of scored pairs; see the head of this module for the threshold.

    Args:
        scores: The higher, the more alike; without NaN, shape (P,), floating of at least 16 bits.
        is_same: Whether each pair is of one identity, shape (P,), bool.
        fars: False accept rates in (0, 1).

    Raises:
        TypeError: If an input is no tensor or of another dtype, or a rate no number.
        ValueError: If shapes are not (P,), a score is NaN, or a rate is out of range.

    Example:
        >>> scores = torch.tensor([0.9, 0.6, 0.3, 0.8, 0.5, 0.2, 0.1])
        >>> is_same = torch.tensor([True, True, True, False, False, False, False])
        >>> tar_at_far(scores, is_same, [0.25]).thresholds     # one of four may be accepted, so 0.5 is not
        (0.5,)
        >>> round(tar_at_far(scores, is_same, [0.25]).tars[0], 4)
        0.6667
    """
    check_tensors(scores=scores, is_same=is_same)
    check_floating(scores=scores)
    check_ndim(1, scores=scores, is_same=is_same)
    check_same_length(scores=scores, is_same=is_same)
    if is_same.dtype != torch.bool:
        raise TypeError(f'is_same must be bool, got {is_same.dtype}; compare the identities of each pair by ==.')
    check_not_nan(scores=scores)
    _check_rates(fars)
    scores = scores.detach()
    same, different = scores[is_same], scores[~is_same].sort(descending=True).values
    places = [_num_accepted(far, len(different)) for far in fars]
    thresholds = [math.nan if place is None else float(different[place]) for place in places]
    tars = [_share(int((same > threshold).sum()), len(same), threshold) for threshold in thresholds]
    return TarAtFar(tuple(fars), tuple(tars), tuple(thresholds), len(same), len(different))


def rate_of_percent(percent: float) -> float:
    """The rate that is written as so many percent: 0.7 / 100 is another number than 0.007, and gives other thresholds.

    Example:
        >>> rate_of_percent(0.7), 0.7 / 100
        (0.007, 0.006999999999999999)
    """
    return float(Decimal(repr(float(percent))).scaleb(-2))


def pairwise_tar_at_far(
        embeddings: Tensor,
        identities: Tensor,
        fars: Sequence[float],
        *,
        block_scores: int = _BLOCK_SCORES,
) -> TarAtFar:
    """True accept rates of all pairs of pictures, scored by the cosine of their embeddings.

    As exact as `tar_at_far` of the float32 scores of all N (N - 1) / 2 pairs, without a table of them: the scores are
    made twice, block by block, and counted by their bits. Memory is that of a block and of 2 MiB a rate.

    Args:
        embeddings: One row a picture, of any length, shape (N, D), floating of at least 16 bits, without NaN; the
            scores are made in float32 on their device. A row of zeros is unlike all others: its scores are 0.
        identities: Number of each picture's identity, shape (N,), an integer dtype of at least 16 bits, at least 0.
        fars: False accept rates in (0, 1).
        block_scores: Scores that are made at once, at least 1.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or a number of another kind.
        ValueError: If shapes do not fit, an embedding is NaN or infinite, or a number is out of range.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.9]])
        >>> found = pairwise_tar_at_far(embeddings, torch.tensor([7, 7, 9, 9, 8]), [0.2])
        >>> found.tars, found.num_same, found.num_different
        ((1.0,), 2, 8)
    """
    check_tensors(embeddings=embeddings, identities=identities)
    check_floating(embeddings=embeddings)
    check_ndim(2, embeddings=embeddings)
    check_ndim(1, identities=identities)
    check_same_length(embeddings=embeddings, identities=identities)
    check_indices(identities=identities, num_classes=torch.iinfo(torch.int64).max, read=True)
    check_positive(block_scores=block_scores)
    _check_rates(fars)
    rows = embeddings.detach().float()
    if not bool(rows.isfinite().all()):
        raise ValueError('embeddings must be finite in float32, got NaN or infinite values; look for where the model '
                         'diverged.')
    rows, identities = functional.normalize(rows, dim=1), identities.to(rows.device)

    upper = torch.zeros(2, _HALF, dtype=torch.int64)                 # rows: of two identities, of one
    for keys, is_same in _blocks(rows, identities, block_scores):
        upper += _counts(keys >> _HALF_BITS, is_same)
    num_different, num_same = upper.sum(1).tolist()
    places = [_num_accepted(far, num_different) for far in fars]
    halves = [None if place is None else _find(upper[0], place) for place in places]
    lower = {half: torch.zeros(2, _HALF, dtype=torch.int64) for half in halves if half is not None}
    for keys, is_same in _blocks(rows, identities, block_scores if lower else 0):
        for own_half, counts in lower.items():
            is_there = keys >> _HALF_BITS == own_half
            counts += _counts(keys[is_there] & (_HALF - 1), is_same[is_there])

    tars, thresholds = [], []
    for place, half in zip(places, halves):
        threshold, accepted = math.nan, 0
        if place is not None and half is not None:
            above = upper[:, half + 1:].sum(1)
            low = _find(lower[half][0], place - int(above[0]))
            accepted = int(above[1] + lower[half][1, low + 1:].sum())
            threshold = _score((half << _HALF_BITS) + low)
        thresholds.append(threshold)
        tars.append(_share(accepted, num_same, threshold))
    return TarAtFar(tuple(fars), tuple(tars), tuple(thresholds), num_same, num_different)


def _check_rates(fars: Sequence[float]) -> None:
    for place, far in enumerate(fars):
        check_range(low=math.ulp(0.0), high=1.0, closed=False, **{f'fars[{place}]': far})


def _num_accepted(far: float, num_different: int) -> int | None:
    """How many pairs of two identities may be accepted; None where that is less than one."""
    return int(Fraction(repr(float(far))) * num_different) or None


def _share(accepted: int, num_same: int, threshold: float) -> float:
    return math.nan if math.isnan(threshold) or not num_same else accepted / num_same


def _blocks(rows: Tensor, identities: Tensor, block_scores: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys of the scores of all pairs, each pair once, and whether it is of one identity; nothing of no scores."""
    start = 0
    while block_scores and start < len(rows):
        stop = start + max(block_scores // (len(rows) - start), 1)
        scores = rows[start:stop] @ rows[start:].T
        is_pair = torch.ones_like(scores, dtype=torch.bool).triu(1)
        is_same = identities[start:stop, None] == identities[start:]
        yield _keys(scores[is_pair]), is_same[is_pair]
        start = stop


def _keys(scores: Tensor) -> Tensor:
    """Whole numbers in [0, 2^32) that are ordered as float32 scores are, int64."""
    bits = (scores + 0.0).view(torch.int32).long()                   # + 0.0 makes 0 of -0
    return torch.where(bits < 0, -bits - 1, bits + (1 << 31))


def _score(key: int) -> float:
    """The score of a key."""
    bits = key - (1 << 31) if key >= 1 << 31 else -key - 1
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _counts(values: Tensor, is_same: Tensor) -> Tensor:
    """How often each value below 2^16 occurs among pairs of two identities and of one, shape (2, 2^16)."""
    return torch.bincount(values + is_same * _HALF, minlength=2 * _HALF).view(2, _HALF).cpu()


def _find(counts: Tensor, place: int) -> int:
    """The value of the number at a place, counted from 0, of the numbers in descending order."""
    at_least = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int(torch.searchsorted(at_least, place, right=True))
