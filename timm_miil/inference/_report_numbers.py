"""What a report shows, as numbers: curves over thresholds, precision over recall, confused labels, wrong pictures."""
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_miil.inference._measure import Measures, measure, probs_in_parts
from timm_miil.inference.load import Activation

__all__ = [
    'Confusions', 'Pair', 'Study', 'ThresholdCurve', 'WrongLabel', 'WrongPicture', 'confusions', 'precision_recall',
    'study', 'worst_pictures',
]

THRESHOLD_STEPS = 200
CURVE_POINTS = 200
# Pairs of labels are counted among so many absent ones, those with the most confidence in vain.
CONFUSED_LABELS = 400
# Pictures that pull what is seen of a pair of labels towards nothing: few pictures may be chance.
PAIR_SHRINKAGE = 10.0
MIN_PAIR_PICTURES = 2
LABELS_OF_A_PICTURE = 4
PROB_MIN = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """Precision, recall and F1 where one threshold serves all classes.

    Attributes:
        thresholds: From 0 to 1, shape (T,).
        overall: Precision, recall and F1 over the labels of all classes, shape (3, T).
        mean_f1: Mean of the F1 of all classes, shape (T,).
    """

    thresholds: Tensor
    overall: Tensor
    mean_f1: Tensor

    @property
    def best(self) -> float:
        """The threshold of the highest overall F1."""
        return float(self.thresholds[self.overall[2].argmax()])


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """All that one pass over the scores gives.

    Attributes:
        measures: See `Measures`.
        curve: Decisions over thresholds.
        false_confidence: Sum of the confidences of each label where it is absent, shape (C,).
        loss: The greatest loss of a wrong label of each picture, shape (N,); 0 of a picture without one.
    """

    measures: Measures
    curve: ThresholdCurve
    false_confidence: Tensor
    loss: Tensor


def study(
        logits: Tensor, targets: Tensor, *, activation: Activation, thresholds: Sequence[float],
        temperatures: Sequence[float] | None) -> Study:
    """Measure scores for a report; arguments are those of `measure`."""
    num_classes, steps = logits.shape[1], THRESHOLD_STEPS + 1
    counts = torch.zeros(2, num_classes * steps, dtype=torch.int64)     # all known labels, and the present ones
    false_confidence = torch.zeros(num_classes, dtype=torch.float64)
    loss = torch.zeros(len(logits), dtype=torch.float64)
    offsets, limits = torch.arange(num_classes) * steps, torch.tensor(thresholds, dtype=torch.float64)

    def see(rows: slice, probs: Tensor, labels: Tensor) -> None:
        # A label of bin k is predicted at each threshold up to k / THRESHOLD_STEPS.
        bins = (probs * THRESHOLD_STEPS).long() + offsets
        for row, mask in zip(counts, (labels != -1, labels == 1)):
            row += bins[mask].bincount(minlength=row.numel())
        false_confidence.add_((probs * (labels == 0)).sum(dim=0))
        loss[rows] = _losses_of_wrong(probs, labels, activation, limits).amax(dim=1)

    measures = measure(
        logits, targets, activation=activation, thresholds=thresholds, temperatures=temperatures, on_part=see)
    predicted, true_positives = counts.view(2, num_classes, steps).flip(-1).cumsum(-1).flip(-1)
    return Study(measures, _threshold_curve(predicted, true_positives), false_confidence, loss)


def _losses_of_wrong(probs: Tensor, targets: Tensor, activation: Activation, limits: Tensor) -> Tensor:
    """-log of the probability of the truth of labels that are decided wrongly, shape (B, C); 0 of all others.

    Of classes that exclude one another the most confident is decided for: where that is absent, it and the present ones
    are wrong.
    """
    if activation == 'sigmoid':
        is_wrong = (probs >= limits) != (targets == 1)
    else:
        is_taken = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.argmax(dim=1, keepdim=True), True)
        is_missed = (is_taken & (targets == 0)).any(dim=1, keepdim=True)
        is_wrong = is_missed & (is_taken | (targets == 1))
    truth = torch.where(targets == 1, probs, 1.0 - probs).clamp(min=PROB_MIN)
    return torch.where(is_wrong & (targets != -1), -truth.log(), 0.0)


def _threshold_curve(predicted: Tensor, true_positives: Tensor) -> ThresholdCurve:
    """Of counts (C, T) of labels at or above each threshold."""
    support = true_positives[:, :1]
    f1 = 2.0 * true_positives / (predicted + support).clamp(min=1).double()
    sums = predicted.sum(dim=0), true_positives.sum(dim=0), support.sum()
    precision = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1).double(), math.nan)
    recall = sums[1] / sums[2].clamp(min=1).double()
    overall = torch.stack([precision, recall, 2.0 * sums[1] / (sums[0] + sums[2]).clamp(min=1)])
    thresholds = torch.arange(predicted.shape[1], dtype=torch.float64) / THRESHOLD_STEPS
    return ThresholdCurve(thresholds, overall, f1.mean(dim=0))


def precision_recall(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Recall and precision of one class at each cut between its scores, from the highest on.

    Args:
        scores: Of one class, shape (N,).
        targets: 1, 0 or -1 (left out), shape (N,).

    Returns:
        Two rows of at most CURVE_POINTS numbers, recall rising.
    """
    known = targets != -1
    ranked, order = scores[known].sort(descending=True)
    is_pos = targets[known][order] == 1
    true_positives, predicted = is_pos.cumsum(0), torch.arange(1, len(ranked) + 1)
    is_cut = torch.ones_like(is_pos)
    is_cut[:-1] = ranked[:-1] > ranked[1:]
    recall, precision = (true_positives / is_pos.sum())[is_cut], (true_positives / predicted)[is_cut]
    # One point a recall, the first and so the most precise: between them the curve only falls.
    is_new = recall.diff(prepend=recall.new_zeros(1)) > 0.0
    recall, precision = recall[is_new], precision[is_new]
    kept = torch.linspace(0, len(recall) - 1, min(len(recall), CURVE_POINTS)).round().long()
    return recall[kept], precision[kept]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An absent label that is scored high where another one is present.

    Attributes:
        present: Column of the label that is there.
        absent: Column of the one that is not.
        confidence: Mean confidence of the absent label in such pictures.
        elsewhere: The same over the other pictures that do not show it.
        num_pictures: Pictures that show the one and not the other.
    """

    present: int
    absent: int
    confidence: float
    elsewhere: float
    num_pictures: int


@dataclasses.dataclass(frozen=True, eq=False)
class Confusions:
    """Labels that are taken for one another.

    Attributes:
        pairs: The most striking first: highest above elsewhere, with enough pictures.
        confidence: Of absent labels (columns) where others (rows) are present, shape (C, K); NaN without such pictures.
        columns: Which label each of the K columns is, shape (K,).
    """

    pairs: tuple[Pair, ...]
    confidence: Tensor
    columns: Tensor


def confusions(
        logits: Tensor, targets: Tensor, found: Study, *, activation: Activation,
        temperatures: Sequence[float] | None, num_pairs: int) -> Confusions:
    """Find which absent labels are scored high where which are present."""
    num_classes = logits.shape[1]
    columns = found.false_confidence.topk(min(num_classes, CONFUSED_LABELS)).indices.sort().values
    total, count = torch.zeros(2, num_classes, len(columns))
    for _, probs, labels in probs_in_parts(logits, targets, activation=activation, temperatures=temperatures):
        is_absent = labels[:, columns] == 0
        shows = (labels == 1).T.float().to_sparse()
        count += torch.sparse.mm(shows, is_absent.float())
        total += torch.sparse.mm(shows, (probs[:, columns] * is_absent).float())
    all_total = found.false_confidence[columns].float()
    all_count = found.measures.average_precision.num_negatives[columns]
    mean = total / count
    elsewhere = ((all_total - total) / (all_count - count).clamp(min=1.0)).clamp(min=0.0)
    excess = ((mean - elsewhere) * count / (count + PAIR_SHRINKAGE)).nan_to_num(0.0)
    excess[count < MIN_PAIR_PICTURES] = 0.0
    values, order = excess.flatten().topk(min(num_pairs, excess.numel()))
    pairs = [
        Pair(row, int(columns[column]), float(mean[row, column]), float(elsewhere[row, column]),
             int(count[row, column]))
        for value, (row, column) in zip(values.tolist(), (divmod(place, len(columns)) for place in order.tolist()))
        if value > 0.0]
    return Confusions(tuple(pairs), mean, columns)


@dataclasses.dataclass(frozen=True)
class WrongLabel:
    """A label that is decided wrongly."""

    column: int
    is_present: bool
    confidence: float


@dataclasses.dataclass(frozen=True)
class WrongPicture:
    """A picture by its row, and its wrong labels, the worst first."""

    row: int
    loss: float
    wrong: tuple[WrongLabel, ...]


def worst_pictures(
        logits: Tensor, targets: Tensor, found: Study, *, activation: Activation, thresholds: Sequence[float],
        temperatures: Sequence[float] | None, num_pictures: int) -> list[WrongPicture]:
    """The pictures with the greatest loss of a wrong label, each once."""
    losses, rows = found.loss.topk(min(num_pictures, len(found.loss)))
    rows = rows[losses > 0.0]
    limits, worst = torch.tensor(thresholds, dtype=torch.float64), []
    for part, probs, labels in probs_in_parts(
            logits[rows], targets[rows], activation=activation, temperatures=temperatures):
        loss, order = _losses_of_wrong(probs, labels, activation, limits).sort(dim=1, descending=True, stable=True)
        for number, row in enumerate(rows[part].tolist()):
            columns = order[number][loss[number] > 0.0][:LABELS_OF_A_PICTURE].tolist()
            wrong = tuple(
                WrongLabel(column, bool(labels[number, column] == 1), float(probs[number, column]))
                for column in columns)
            worst.append(WrongPicture(row, float(found.loss[row]), wrong))
    return worst
