"""What a report shows as numbers, against the same counted in plain loops."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from timm_miil.inference import _measure
from timm_miil.inference._measure import measure
from timm_miil.inference._report_numbers import confusions, precision_recall, study, worst_pictures
from timm_miil.metrics import calibration_error, multilabel_average_precision, multilabel_f1

ACTIVATIONS = ['sigmoid', 'softmax']


def scores(seed: int, num: int = 60, classes: int = 5, unknown: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num, classes, generator=generator) < 0.3).to(torch.int8)
    logits = torch.randn(num, classes, generator=generator) * 2 + 2.0 * targets - 1
    targets[torch.rand(num, classes, generator=generator) < unknown] = -1
    return logits, targets


def probs_of(logits: Tensor, activation: str) -> Tensor:
    return logits.double().sigmoid() if activation == 'sigmoid' else logits.double().softmax(1)


@pytest.fixture(params=[1, 7, 2 ** 22])
def part_scores(request, monkeypatch):
    """However many rows are taken at a time."""
    monkeypatch.setattr(_measure, 'PART_SCORES', request.param * 5)


@pytest.mark.usefixtures('part_scores')
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_measures_are_those_of_all_scores_at_once(activation):
    logits, targets = scores(1)
    thresholds = [0.2, 0.4, 0.5, 0.6, 0.8]
    found = measure(logits, targets, activation=activation, thresholds=thresholds)
    probs = probs_of(logits, activation)
    ranking = found.average_precision
    torch.testing.assert_close(ranking.per_class, multilabel_average_precision(probs, targets), rtol=1e-6, atol=0)
    assert torch.equal(ranking.support, (targets == 1).sum(0))
    assert torch.equal(ranking.num_negatives, (targets == 0).sum(0))
    f1 = multilabel_f1(probs, targets, threshold=thresholds)
    assert torch.equal(found.f1.f1, f1.f1) and torch.equal(found.f1.predicted, f1.predicted)
    assert found.calibration_error == pytest.approx(float(calibration_error(probs, targets)), rel=1e-9)


def test_temperatures_divide_the_logits():
    logits, targets = scores(2)
    temperatures = [0.5, 1.0, 2.0, 3.0, 4.0]
    options = dict(activation='sigmoid', thresholds=[0.6] * 5)
    found = measure(logits, targets, temperatures=temperatures, **options)
    want = measure(logits.double() / torch.tensor(temperatures, dtype=torch.float64), targets, **options)
    assert torch.equal(found.f1.f1, want.f1.f1) and found.calibration_error == pytest.approx(want.calibration_error)
    assert found.calibration_error != measure(logits, targets, **options).calibration_error


def test_top_accuracy_counts_pictures_that_show_something():
    logits = torch.tensor([
        [3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 1], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 1]])
    targets = torch.tensor([
        [1, 0, 0, 0, 0, 0],         # right
        [1, 0, 0, 0, 0, 0],         # the last of six: wrong, and not among five
        [-1, 0, 0, 0, 0, 1],        # the best known label is there
        [0, 1, 0, 0, 0, 0],         # the second
        [0, 0, 0, 0, 0, 0]])        # shows nothing known: left out
    options = dict(thresholds=[0.5] * 6)
    found = measure(logits, targets, activation='softmax', **options)
    assert (found.top1, found.top5) == (0.5, 0.75)
    assert measure(logits[:, :5], targets[:, :5], activation='softmax', thresholds=[0.5] * 5).top5 is None
    assert measure(logits, targets, activation='sigmoid', **options).top1 is None
    assert math.isnan(measure(logits, targets.clamp(max=0), activation='softmax', **options).top1)


def test_exclusive_classes_are_ranked_by_probability_even_where_it_rounds_to_one():
    logits = torch.tensor([[60.0, 0.0], [50.0, 0.0], [40.0, 0.0]])      # softmax: 1, 1, 1
    targets = torch.tensor([[1, 0], [0, 1], [0, 1]])
    found = measure(logits, targets, activation='softmax', thresholds=[0.5] * 2)
    assert found.average_precision.per_class.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures('part_scores')
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_the_curve_over_thresholds_is_what_each_threshold_gives(activation):
    logits, targets = scores(3)
    curve = study(logits, targets, activation=activation, thresholds=[0.5] * 5, temperatures=None).curve
    probs = probs_of(logits, activation)
    assert curve.thresholds[[0, -1]].tolist() == [0.0, 1.0]
    for step in range(0, len(curve.thresholds), 13):
        want = multilabel_f1(probs, targets, threshold=float(curve.thresholds[step]))
        got = curve.overall[:, step].nan_to_num(0.0).tolist()
        assert got == pytest.approx([want.overall_precision, want.overall_recall, want.overall_f1])
        assert float(curve.mean_f1[step]) == pytest.approx(want.class_f1)
    assert curve.best == curve.thresholds[curve.overall[2].argmax()]


@given(st.integers(0, 10 ** 6), st.booleans())
def test_precision_over_recall_is_scikit_learns(seed, is_tied):
    logits, targets = scores(seed, num=30, classes=1)
    targets[0] = 1
    column = (logits[:, 0] * 2).round() if is_tied else logits[:, 0]
    known = targets[:, 0] != -1
    recall, precision = precision_recall(column, targets[:, 0])
    want_precision, want_recall, _ = precision_recall_curve(targets[known, 0].numpy(), column[known].numpy())
    best = {}
    for r, p in zip(want_recall.tolist(), want_precision.tolist()):
        if r > 0:
            best[round(r, 5)] = max(p, best.get(round(r, 5), 0.0))
    assert [round(r, 5) for r in recall.tolist()] == sorted(best)
    assert precision.tolist() == pytest.approx([best[r] for r in sorted(best)], rel=1e-5)


def test_a_long_curve_keeps_its_ends():
    targets = torch.ones(5000)
    targets[4000:4100] = 0
    recall, precision = precision_recall(-torch.arange(5000.0), targets)
    assert len(recall) == 200 and float(recall[-1]) == 1.0 and float(precision[0]) == 1.0
    assert float(precision[-1]) == pytest.approx(4900 / 5000)


@pytest.mark.usefixtures('part_scores')
def test_confused_labels_are_the_mean_over_pictures_with_the_one_and_without_the_other():
    logits, targets = scores(4, num=200)
    logits[(targets[:, 1] == 1) & (targets[:, 3] == 0), 3] += 5.0      # 3 is seen where 1 is
    found = study(logits, targets, activation='sigmoid', thresholds=[0.5] * 5, temperatures=None)
    result = confusions(logits, targets, found, activation='sigmoid', temperatures=None, num_pairs=6)
    probs = logits.double().sigmoid()
    assert result.columns.tolist() == [0, 1, 2, 3, 4]
    for row in range(5):
        for column in range(5):
            both = (targets[:, row] == 1) & (targets[:, column] == 0)
            if row == column:
                assert math.isnan(result.confidence[row, column])
            else:
                want = float(probs[both, column].mean())
                assert float(result.confidence[row, column]) == pytest.approx(want, rel=1e-4)
    first = result.pairs[0]
    assert (first.present, first.absent) == (1, 3)
    there, absent = targets[:, 1] == 1, targets[:, 3] == 0
    assert first.num_pictures == int((there & absent).sum())
    assert first.elsewhere == pytest.approx(float(probs[~there & absent, 3].mean()), rel=1e-4)


def test_of_many_labels_the_most_confident_in_vain_are_compared(monkeypatch):
    monkeypatch.setattr('timm_miil.inference._report_numbers.CONFUSED_LABELS', 2)
    logits, targets = torch.full((8, 4), -5.0), torch.zeros(8, 4, dtype=torch.int8)
    targets[:4, 0] = 1
    logits[:4, 1], logits[:4, 3] = 3.0, 1.0
    found = study(logits, targets, activation='sigmoid', thresholds=[0.5] * 4, temperatures=None)
    result = confusions(logits, targets, found, activation='sigmoid', temperatures=None, num_pairs=9)
    assert result.columns.tolist() == [1, 3]
    assert [(pair.present, pair.absent) for pair in result.pairs] == [(0, 1), (0, 3)]
    assert result.pairs[0].confidence == pytest.approx(torch.tensor(3.0).sigmoid().item(), rel=1e-5)


def test_one_picture_makes_no_pair():
    logits, targets = torch.zeros(4, 2), torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]])
    logits[0, 1] = 9.0
    found = study(logits, targets, activation='sigmoid', thresholds=[0.5] * 2, temperatures=None)
    assert confusions(logits, targets, found, activation='sigmoid', temperatures=None, num_pairs=3).pairs == ()


@pytest.mark.usefixtures('part_scores')
def test_the_worst_pictures_have_the_greatest_loss_of_a_wrong_label():
    logits, targets = scores(5)
    thresholds = [0.3, 0.5, 0.5, 0.5, 0.9]
    found = study(logits, targets, activation='sigmoid', thresholds=thresholds, temperatures=None)
    worst = worst_pictures(
        logits, targets, found, activation='sigmoid', thresholds=thresholds, temperatures=None, num_pictures=7)
    wanted = []
    for row, (probs, labels) in enumerate(zip(logits.double().sigmoid().tolist(), targets.tolist())):
        wrong = [
            (-math.log(prob if label == 1 else 1 - prob), column, label == 1)
            for column, (prob, label, threshold) in enumerate(zip(probs, labels, thresholds))
            if label != -1 and (prob >= threshold) != (label == 1)]
        if wrong:
            wanted.append((row, sorted(wrong, reverse=True)[:4]))
    wanted.sort(key=lambda item: item[1][0][0], reverse=True)
    assert [picture.row for picture in worst] == [row for row, _ in wanted[:7]]
    for picture, (_, wrong) in zip(worst, wanted):
        assert [(label.column, label.is_present) for label in picture.wrong] == [(c, there) for _, c, there in wrong]
        assert picture.loss == pytest.approx(wrong[0][0])


def test_of_exclusive_classes_the_missed_one_and_what_it_was_taken_for_are_wrong():
    logits = torch.tensor([[5.0, 0, 0], [0, 4, 0], [9, 0, 3]])
    targets = torch.tensor([[0, 1, 0], [0, 1, 0], [-1, 0, 1]])      # of the last, nobody knows whether it is wrong
    found = study(logits, targets, activation='softmax', thresholds=[0.5] * 3, temperatures=None)
    [picture] = worst_pictures(
        logits, targets, found, activation='softmax', thresholds=[0.5] * 3, temperatures=None, num_pictures=9)
    assert picture.row == 0
    assert [(label.column, label.is_present) for label in picture.wrong] == [(1, True), (0, False)]
