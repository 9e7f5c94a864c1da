"""Calibration: a temperature per class, how far probabilities are from frequencies, and the curve that shows it.

Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599 (temperature scaling, section 4.2; expected
calibration error, Eq. 3; recalled). Deviations: classes are independent, so each is a binary problem with a temperature
of its own, pulled towards that of all classes where its data say little; and the confidence is the probability of the
label, not that of the predicted class.
"""
import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from timm_miil._checks import check_choice, check_positive, check_range
from timm_miil.metrics._classes import check_labelled, check_labelled_probs, column_parts, pooled

__all__ = [
    'Average', 'Binning', 'ReliabilityCurve', 'calibration_error', 'fit_temperatures', 'reliability_curve']

Average = Literal['micro', 'macro', 'none']
Binning = Literal['width', 'mass']

AVERAGES: tuple[Average, ...] = ('micro', 'macro', 'none')
BINNINGS: tuple[Binning, ...] = ('width', 'mass')
TEMPERATURE_MIN, TEMPERATURE_MAX = 0.05, 20.0
# Newton's steps need about 8, halving alone 40 for twelve digits.
MAX_STEPS = 60
TOLERANCE = 1e-12


@torch.no_grad()
def fit_temperatures(logits: Tensor, targets: Tensor, *, shrinkage: float = 100.0) -> Tensor:
    """Fit a temperature T for each class, so that sigmoid(logits / T) are probabilities.

    In a = 1 / T the negative log-likelihood of a class is convex. With the temperature 1 / a_0 that all classes share
    and the mean curvature h of their likelihood there, each class minimises

        sum_n softplus(-(2 y_n - 1) a x_n) + shrinkage * h * (a - a_0)^2 / 2

    so that `shrinkage` labels of all classes pull at each class's own labels. A class of few telling labels stays near
    a_0, and one whose logits part its labels without error has a minimum.

    Args:
        logits: Raw scores x, shape (N, C), floating of at least 16 bits; computed in float64. Not those of
            training data.
        targets: 1 for present, 0 for absent, -1 for unannotated (left out), shape (N, C); bool, uint8, signed
            integers or floating of at least 16 bits.
        shrinkage: Labels of all classes that weigh as much as those of one class, at least 0. 0 fits each class by
            itself.

    Returns:
        Temperatures in [0.05, 20], shape (C,), float64. A class without positives or without negatives gets the shared
        one; if there are no positives or no negatives at all, that is 1.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or shrinkage is not a number.
        ValueError: If shapes differ or are not (N, C), values are out of range, or shrinkage is negative.

    Example:
        >>> x = torch.linspace(-4, 4, 101, dtype=torch.float64)[:, None]
        >>> y = (torch.arange(101)[:, None] * 0.618 % 1 < (x / 2).sigmoid()).int()      # as with a temperature of 2
        >>> fit_temperatures(x, y)
        tensor([2.1268], dtype=torch.float64)
    """
    check_range(shrinkage=shrinkage, low=0.0, high=math.inf)
    check_labelled(targets, logits=logits)
    x, y = pooled(logits), pooled(targets)
    if not _has_both(y):
        return torch.ones(logits.shape[1:], dtype=torch.float64, device=logits.device)
    shared = _solve(x, y, x.new_ones(1, dtype=torch.float64), x.new_zeros(1, dtype=torch.float64))
    strength = shrinkage * _derivatives(*_known(x, y), shared)[1] / (y != -1).sum()
    inverse = shared.repeat(logits.shape[1])
    for part in column_parts(logits):
        x, y = logits[:, part], targets[:, part]
        has_both = _has_both(y)
        inverse[part][has_both] = _solve(x[:, has_both], y[:, has_both], shared, strength)
    return 1.0 / inverse


@dataclasses.dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Labels binned by their probability: a calibrated model has equal confidence and frequency.

    Attributes:
        confidence: Mean probability in each bin, shape (num_bins,), or (C, num_bins) per class; float64, NaN in an
            empty bin.
        frequency: Share of labels in the bin that are present; likewise.
        count: Labels in the bin; int64 of the same shape.
    """

    confidence: Tensor
    frequency: Tensor
    count: Tensor


@torch.no_grad()
def reliability_curve(
        probs: Tensor,
        targets: Tensor,
        *,
        num_bins: int = 15,
        binning: Binning = 'width',
        per_class: bool = False,
) -> ReliabilityCurve:
    """Compare probabilities with frequencies, bin by bin.

    Args:
        probs: Probabilities in [0, 1], shape (N, C), floating of at least 16 bits.
        targets: 1 for present, 0 for absent, -1 for unannotated (left out), shape (N, C); bool, uint8, signed
            integers or floating of at least 16 bits.
        num_bins: Bins, at least 1.
        binning: 'width' for bins of equal width, or 'mass' for bins of equal numbers of labels. With 'mass', equal
            probabilities share a bin.
        per_class: Whether each class has its curve, or all labels one.

    Returns:
        The bins from low to high probability.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or num_bins is not an int.
        ValueError: If shapes differ or are not (N, C), or values or settings are out of range.

    Example:
        >>> probs, targets = torch.tensor([[0.1, 0.3], [0.8, 0.9]]), torch.tensor([[0, 1], [1, 1]])
        >>> curve = reliability_curve(probs, targets, num_bins=2)
        >>> curve.confidence, curve.frequency, curve.count
        (tensor([0.2000, 0.8500], dtype=torch.float64), tensor([0.5000, 1.0000], dtype=torch.float64), tensor([2, 2]))
    """
    check_positive(num_bins=num_bins)
    check_choice(binning=binning, choices=BINNINGS)
    check_labelled_probs(probs, targets)
    if not per_class and binning == 'mass':
        probs, targets = probs.reshape(-1, 1), targets.reshape(-1, 1)
    sums = torch.zeros(3, probs.shape[1], num_bins, dtype=torch.float64, device=probs.device)
    for part in column_parts(probs):
        p, y = probs[:, part].double(), targets[:, part]
        is_known = y != -1
        bins = _bins_of_width(p, num_bins) if binning == 'width' else _bins_of_mass(p, is_known, num_bins)
        for total, values in zip(sums[:, part], (is_known.double(), p * is_known, (y == 1).double())):
            total.scatter_add_(1, bins.T, values.T)
    count, confidence, frequency = sums if per_class else sums.sum(dim=1)
    return ReliabilityCurve(confidence / count, frequency / count, count.long())


@torch.no_grad()
def calibration_error(
        probs: Tensor,
        targets: Tensor,
        *,
        num_bins: int = 15,
        binning: Binning = 'width',
        average: Average = 'micro',
) -> Tensor:
    """Expected calibration error: the mean of |confidence - frequency| over bins, weighted by their labels.

    Args:
        probs: Probabilities in [0, 1], shape (N, C), floating of at least 16 bits.
        targets: 1 for present, 0 for absent, -1 for unannotated (left out), shape (N, C); bool, uint8, signed
            integers or floating of at least 16 bits.
        num_bins: See `reliability_curve`.
        binning: See `reliability_curve`. 'mass' is the adaptive error, steadier where most probabilities are small.
        average: 'micro' bins all labels together, 'none' gives each class its error, 'macro' is the mean of those.

    Returns:
        Error in [0, 1], float64: a scalar, or shape (C,) with 'none'. NaN without known labels; 'macro' leaves such
        classes out.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or num_bins is not an int.
        ValueError: If shapes differ or are not (N, C), or values or settings are out of range.

    Example:
        >>> calibration_error(torch.tensor([[0.75], [0.75], [0.75]]), torch.tensor([[1], [1], [0]]))
        tensor(0.0833, dtype=torch.float64)
    """
    check_choice(average=average, choices=AVERAGES)
    curve = reliability_curve(probs, targets, num_bins=num_bins, binning=binning, per_class=average != 'micro')
    gap = (curve.confidence - curve.frequency).abs().nan_to_num(0.0)
    error = (gap * curve.count).sum(dim=-1) / curve.count.sum(dim=-1)
    return error.nanmean() if average == 'macro' else error


def _solve(x: Tensor, y: Tensor, start: Tensor, strength: Tensor) -> Tensor:
    """Each class's minimum in a, by Newton's method, or by halving where a step leaves the bracket or slows down."""
    x, is_pos = _known(x, y)
    low = torch.full(x.shape[1:], 1.0 / TEMPERATURE_MAX, dtype=torch.float64, device=x.device)
    high = torch.full_like(low, 1.0 / TEMPERATURE_MIN)
    a, last = start.expand_as(low), high - low
    found, columns = a.clone(), torch.arange(x.shape[1], device=x.device)
    for _ in range(MAX_STEPS):
        slope, curvature = _derivatives(x, is_pos, a)
        slope, curvature = slope + strength * (a - start), curvature + strength
        low, high = torch.where(slope < 0, a, low), torch.where(slope > 0, a, high)
        to = a - slope / curvature
        is_good = (to >= low) & (to <= high) & ((to - a).abs() <= last / 2)     # False where it is NaN
        to = torch.where(is_good, to, (low * high).sqrt())
        a, last = to, (to - a).abs()
        found[columns] = a
        is_open = last > TOLERANCE * a
        num_open = int(is_open.sum())
        if not num_open:
            break
        # A few classes take many steps. The others are left behind, when there are enough of them to pay the copy.
        if 2 * num_open <= len(columns):
            x, is_pos = x[:, is_open], is_pos[:, is_open]
            a, last, low, high, columns = (values[is_open] for values in (a, last, low, high, columns))
    return found


def _known(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, 0 where the label is unknown, and where it is present; both in float64."""
    return torch.where(y == -1, 0.0, x.double()), (y == 1).double()


def _derivatives(x: Tensor, is_pos: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of each class's negative log-likelihood in a = 1 / T."""
    p = (a * x).sigmoid()
    return (x * (p - is_pos)).sum(dim=0), (x.square() * p * (1.0 - p)).sum(dim=0)


def _has_both(y: Tensor) -> Tensor:
    return (y == 1).any(dim=0) & (y == 0).any(dim=0)


def _bins_of_width(p: Tensor, num_bins: int) -> Tensor:
    return (p * num_bins).long().clamp(max=num_bins - 1)


def _bins_of_mass(p: Tensor, is_known: Tensor, num_bins: int) -> Tensor:
    """Bin of each probability by its rank among the known ones of its class; equal ones have the least of ranks."""
    ranked, order = torch.where(is_known, p, math.inf).sort(dim=0)
    position = torch.arange(len(p), device=p.device)[:, None].expand_as(order)
    is_new = torch.ones_like(is_known)
    is_new[1:] = ranked[1:] > ranked[:-1]
    rank = torch.where(is_new, position, 0).cummax(dim=0).values
    bins = (rank * num_bins // is_known.sum(dim=0).clamp(min=1)).clamp(max=num_bins - 1)
    return torch.empty_like(order).scatter_(0, order, bins)
