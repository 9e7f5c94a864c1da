"""Decision thresholds per class: the best cut of a sample, and one that holds on the next sample.

The best cut of a rare class fits its few positives. Averaging the cuts of cross-validation folds follows Fan and Lin,
"A Study on Threshold Selection for Multi-label Classification" (2007; recalled), and falling back on something common
where positives are few follows SCutFBR of Yang, "A Study of Thresholding Strategies for Text Categorization" (2001;
recalled). Deviation: a class does not fall back all or nothing. Its cut is pulled towards the shared one by the number
of its positives, and how strongly is the one choice that held-out data make, for all classes together.
"""
import dataclasses
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from timm_miil._checks import check_choice, check_positive
from timm_miil.metrics._classes import check_labelled_probs, class_major, column_parts, pooled

__all__ = ['Objective', 'Thresholds', 'best_thresholds', 'find_thresholds']

Objective = Literal['f1', 'precision', 'recall']

OBJECTIVES: tuple[Objective, ...] = ('f1', 'precision', 'recall')
# Positives of a class at which its own cut and the shared one weigh the same. Of equal ones the first serves.
SHRINKAGES = (math.inf, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.0)
# On held-out folds, what a hundredth of precision below its target costs, in hundredths of recall; and vice versa.
SHORTFALL_COST = 4.0
# Log-odds are finite between these probabilities; beyond them a probability counts as the nearer one.
PROB_MIN = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds of C classes, and how they did on held-out folds.

    Attributes:
        values: A class is present where its probability is at least this, shape (C,), float64 in [1e-12, 1]. A class
            whose probabilities are all 0 so is never predicted; 1e-12 is its own cut, where `best_thresholds` says 0.
        shared: The one threshold of all classes that the values are pulled towards.
        shrinkage: Positives at which a class's own cut and the shared one weigh the same; `inf` gave every class the
            shared threshold.
        is_shared: Where a value is the shared threshold, shape (C,), bool: everywhere for an infinite shrinkage, else
            for the classes with too few positives.
        support: Known positives of each class, shape (C,), int64.
        precision: Of each class over all held-out folds, shape (C,), float64; 0 where nothing was predicted.
        recall: Likewise; 0 where there is no positive.
    """

    values: Tensor
    shared: float
    shrinkage: float
    is_shared: Tensor
    support: Tensor
    precision: Tensor
    recall: Tensor

    @property
    def f1(self) -> Tensor:
        """F1 of each class over all held-out folds, shape (C,), float64; 0 where nothing was found."""
        total = self.precision + self.recall
        return 2.0 * self.precision * self.recall / torch.where(total > 0, total, 1.0)


@torch.no_grad()
def find_thresholds(
        probs: Tensor,
        targets: Tensor,
        *,
        objective: Objective = 'f1',
        target: float | None = None,
        num_folds: int = 5,
        min_positives: int = 2,
        seed: int = 0,
) -> Thresholds:
    """Find a threshold for each class that holds beyond the sample it is found on.

    1. Each class's labels are split at random into folds with equal shares of its positives.
    2. Without each fold in turn, `best_thresholds` gives each class its own cut, and all classes, taken as one, a
       shared cut.
    3. A class with n positives gets (n own + k shared) / (n + k), in log-odds. The shrinkage k is one of
       `SHRINKAGES`, for all classes the same: the one whose cuts do best on the held-out folds, by the mean over
       classes of F1; with a target, of the other quantity less 4 times the shortfall from the target. Infinite k is
       among them, so that where own cuts do not pay, there are none.
    4. The result takes the mean over the folds, in log-odds, of own and shared cuts.

    Memory beyond the inputs is about 110 bytes for each of at most 2^24 scores while it works, and the work is many
    sorts: 3,000 pictures of 9,605 classes take 1.4 GB, about 50 bytes a score, and a minute on a CPU core together with
    `fit_temperatures`. Equal inputs and seed give equal results on one kind of device; the caller's random number
    generators are not used.

    Args:
        probs: Probabilities in [0, 1], shape (N, C), floating of at least 16 bits. Not those that the model was
            trained on.
        targets: 1 for present, 0 for absent, -1 for unannotated (left out), shape (N, C); bool, uint8, signed
            integers or floating of at least 16 bits.
        objective: 'f1'; 'precision' for the most recall at a precision of at least `target`; 'recall' for the highest
            threshold at a recall of at least `target`. A class that reaches the target nowhere comes as near to it as
            it can. On new data about half of the classes end below the target, rare ones further: `precision` and
            `recall` of the result say where to ask for more.
        target: Least precision or recall, in (0, 1]; None with 'f1'.
        num_folds: Folds, at least 2.
        min_positives: Classes with fewer known positives take the shared threshold; at least 1.
        seed: Decides the folds; in [-2^63, 2^64).

    Returns:
        The thresholds, with their precision and recall on the held-out folds. Those are slightly optimistic: the
        shrinkage was chosen by them.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or a number or the seed is of the wrong kind.
        ValueError: If shapes differ or are not (N, C), values, settings or the seed are out of range, or no target
            is 1.

    Example:
        >>> targets = torch.tensor([[1, 0, 1, 0, 1, 0]]).T
        >>> found = find_thresholds(torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.2]]).T, targets, num_folds=3)
        >>> found.values.shape, bool(0.3 < found.values[0] <= 0.7), found.f1
        (torch.Size([1]), True, tensor([1.], dtype=torch.float64))
    """
    goal = _Goal(objective, target)
    _check_seed(seed)
    check_positive(num_folds=num_folds, min_positives=min_positives)
    if num_folds == 1:
        raise ValueError('num_folds must be at least 2, got 1; best_thresholds takes the sample whole.')
    check_labelled_probs(probs, targets)
    support = (targets == 1).sum(dim=0)
    if not support.sum():
        raise ValueError(f'targets hold no positive among {targets.numel()} labels; a threshold needs some.')

    folds = _assign_folds(targets, num_folds, seed)
    shared = _shared_cuts(probs, targets, folds, goal, num_folds)
    own = torch.empty(num_folds, probs.shape[1], dtype=torch.float64, device=probs.device)
    counts = own.new_empty(len(SHRINKAGES), 3, probs.shape[1])
    for part in column_parts(probs):
        args = class_major(probs[:, part]), class_major(targets[:, part]), class_major(folds[:, part])
        own[:, part] = _own_cuts(*args, shared, goal)
        counts[..., part] = _held_out_counts(*args, own[:, part], shared, min_positives)

    chosen = int(goal.worth_held_out(*counts.unbind(1)).mean(dim=1).argmax())
    weight = _own_weight(support, SHRINKAGES[chosen], min_positives)
    true_positives, predicted, positives = counts[chosen]
    return Thresholds(
        values=(shared.mean() + weight * (own - shared).mean(dim=0)).sigmoid(),
        shared=float(shared.mean().sigmoid()),
        shrinkage=SHRINKAGES[chosen],
        is_shared=weight == 0,
        support=support,
        precision=true_positives / predicted.clamp(min=1),
        recall=true_positives / positives.clamp(min=1),
    )


@torch.no_grad()
def best_thresholds(
        probs: Tensor, targets: Tensor, *, objective: Objective = 'f1', target: float | None = None) -> Tensor:
    """Each class's best threshold for this very sample, exactly: all cuts between distinct probabilities are tried.

    A threshold lies half way between the probabilities it parts, that below all of them half way to 0. Of equally
    good ones it is the highest. For thresholds to be used on other data see `find_thresholds`.

    Args:
        probs: Probabilities in [0, 1], shape (N, C), floating of at least 16 bits.
        targets: 1 for present, 0 for absent, -1 for unannotated (left out), shape (N, C); bool, uint8, signed
            integers or floating of at least 16 bits.
        objective: See `find_thresholds`.
        target: See `find_thresholds`.

    Returns:
        Shape (C,), float64; NaN for a class without known positives.

    Raises:
        TypeError: If an input is no tensor or of another dtype, or target is not a number.
        ValueError: If shapes differ or are not (N, C), or values or settings are out of range.

    Example:
        >>> probs = torch.tensor([[0.9, 0.5], [0.25, 0.3], [0.75, 0.125]])
        >>> best_thresholds(probs, torch.tensor([[1, 0], [0, 0], [1, 1]]))
        tensor([0.5000, 0.0625], dtype=torch.float64)
    """
    goal = _Goal(objective, target)
    check_labelled_probs(probs, targets)
    found = torch.full(probs.shape[1:], math.nan, dtype=torch.float64, device=probs.device)
    for part in column_parts(probs):
        labels = class_major(targets[:, part])
        found[part] = _best_cuts(class_major(probs[:, part]), labels, [labels != -1], goal)[0]
    return found


@dataclasses.dataclass(frozen=True)
class _Goal:
    """What a threshold is chosen for."""

    objective: Objective
    target: float | None

    def __post_init__(self) -> None:
        check_choice(objective=self.objective, choices=OBJECTIVES)
        if self.objective == 'f1':
            if self.target is not None:
                raise ValueError(f"target must be None with objective 'f1', got {self.target!r}.")
        elif self.target is None:
            raise ValueError(f'objective {self.objective!r} needs a target in (0, 1], got None.')
        else:
            _check_kind('target', self.target, numbers.Real, 'a number')
            if not 0.0 < self.target <= 1.0:
                raise ValueError(f'target must be in (0, 1], got {self.target!r:.100}.')

    def worth(self, true_positives: Tensor, predicted: Tensor, positives: Tensor) -> Tensor:
        """How good cuts of a sample are: F1; or how near to the target, and of those that reach it which is best."""
        if self.target is None:
            return 2.0 * true_positives / (predicted + positives).clamp(min=1).double()
        aimed, other = self._aimed_and_other(true_positives, predicted, positives)
        if self.objective == 'recall':
            return aimed.clamp(max=self.target)  # so that of all cuts which reach the target the highest serves
        return torch.where(aimed >= self.target, 1.0 + other, aimed)

    def worth_held_out(self, true_positives: Tensor, predicted: Tensor, positives: Tensor) -> Tensor:
        """How well cuts did on held-out folds: F1; or the other quantity less the cost of the shortfall."""
        if self.target is None:
            return self.worth(true_positives, predicted, positives)
        aimed, other = self._aimed_and_other(true_positives, predicted, positives)
        return other - SHORTFALL_COST * (self.target - aimed).clamp(min=0.0)

    def _aimed_and_other(
            self, true_positives: Tensor, predicted: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        precision = true_positives / predicted.clamp(min=1).double()
        recall = true_positives / positives.clamp(min=1).double()
        return (precision, recall) if self.objective == 'precision' else (recall, precision)


def _check_seed(seed: int) -> None:
    _check_kind('seed', seed, numbers.Integral, 'an int')
    if not -2 ** 63 <= seed < 2 ** 64:
        raise ValueError(f'seed must be in [-2^63, 2^64), got {seed!r:.100}.')


def _check_kind(name: str, value: object, kind: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f'{name} must be {words}, got {type(value).__name__} {value!r:.100}.')


def _best_cuts(probs: Tensor, targets: Tensor, samples: Iterable[Tensor], goal: _Goal) -> Tensor:
    """Best thresholds (K, C) of K samples, each given as the mask (N, C) of its labels; NaN without positives."""
    probs = probs.double()
    ranked, order = probs.sort(dim=0, descending=True)
    is_pos = (targets == 1).gather(0, order)
    is_cut = torch.ones_like(is_pos)
    is_cut[:-1] = ranked[:-1] > ranked[1:]
    found = []
    for sample in samples:
        inside = sample.gather(0, order)
        true_positives, predicted = (inside & is_pos).cumsum(dim=0), inside.cumsum(dim=0)
        worth = goal.worth(true_positives, predicted, true_positives[-1:])
        at = torch.where(is_cut & (predicted > 0), worth, -1.0).argmax(dim=0, keepdim=True)  # the first of equals
        least = ranked.gather(0, at)
        above = torch.where(inside & (ranked >= least), ranked, 1.0).amin(dim=0)
        below = torch.where(inside & (ranked < least), ranked, 0.0).amax(dim=0)
        cut = below + (above - below) / 2
        cut = torch.where(cut > below, cut, above)  # neighbouring floats
        found.append(torch.where(true_positives[-1] > 0, cut, math.nan))
    return torch.stack(found)


def _assign_folds(targets: Tensor, num_folds: int, seed: int) -> Tensor:
    """Each label's fold, shape (N, C); each class's positives and negatives are spread evenly. Unannotated: -1."""
    generator = torch.Generator().manual_seed(int(seed))
    folds = torch.empty_like(targets, dtype=torch.int8 if num_folds < 128 else torch.int64)
    for part in column_parts(targets):
        labels = targets[:, part]
        # Ranks run through the positives first, then through the negatives, each in random order.
        key = torch.rand(labels.shape, generator=generator, dtype=torch.float64).to(labels.device) - labels.double()
        rank = class_major(key).argsort(dim=0, stable=True).argsort(dim=0)
        folds[:, part] = torch.where(labels == -1, -1, rank % num_folds)
    return folds


def _shared_cuts(probs: Tensor, targets: Tensor, folds: Tensor, goal: _Goal, num_folds: int) -> Tensor:
    """Log-odds of the best cut of all classes as one, without each fold, shape (K, 1)."""
    cuts = _log_odds(_best_cuts(pooled(probs), pooled(targets), _without_each(pooled(folds), num_folds), goal))
    # Without the only positive there is no cut: the mean of the others, or 0.5.
    return torch.where(cuts.isnan(), cuts.nanmean().nan_to_num(0.0), cuts)


def _own_cuts(probs: Tensor, targets: Tensor, folds: Tensor, shared: Tensor, goal: _Goal) -> Tensor:
    """Log-odds of each class's best cut without each fold, shape (K, C); the shared one where it has no positive."""
    cuts = _log_odds(_best_cuts(probs, targets, _without_each(folds, len(shared)), goal))
    return torch.where(cuts.isnan(), shared, cuts)


def _held_out_counts(
        probs: Tensor, targets: Tensor, folds: Tensor, own: Tensor, shared: Tensor, min_positives: int) -> Tensor:
    """True positives, predictions and positives over all held-out folds for each shrinkage, shape (S, 3, C)."""
    counts = own.new_zeros(len(SHRINKAGES), 3, probs.shape[1])
    is_pos, enough = targets == 1, (targets == 1).sum(dim=0) >= min_positives
    for fold in range(len(shared)):
        held = folds == fold
        positives = is_pos & held
        weights = torch.stack([
            _own_weight((is_pos & ~held).sum(dim=0), shrinkage, 1) * enough for shrinkage in SHRINKAGES])
        cuts = (shared[fold] + weights * (own[fold] - shared[fold])).sigmoid()
        for row, cut in zip(counts, cuts):
            predicted = (probs >= cut) & held
            row += torch.stack([(predicted & is_pos).sum(dim=0), predicted.sum(dim=0), positives.sum(dim=0)])
    return counts


def _own_weight(support: Tensor, shrinkage: float, min_positives: int) -> Tensor:
    """Share of a class's own cut: n / (n + k), 0 below `min_positives`."""
    weight = support.double() / (support + shrinkage).clamp(min=1.0)
    return torch.where(support >= min_positives, weight, 0.0)


def _log_odds(probs: Tensor) -> Tensor:
    return probs.clamp(PROB_MIN, 1.0 - PROB_MIN).logit()


def _without_each(folds: Tensor, num_folds: int) -> Iterator[Tensor]:
    return ((folds != fold) & (folds >= 0) for fold in range(num_folds))
