"""TAR at FAR: every threshold tried in float64, ties, all pairs against a table of them, and the refusals."""
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from timm_miil.metrics import pairwise_tar_at_far, rate_of_percent, tar_at_far


def tried(scores, is_same, far):
    """The most pairs of one identity that any threshold accepts while it keeps the rate, and the threshold, by force.

    Scores are accepted strictly above one of the scores of two identities; a rate is a fraction of whole numbers.
    """
    same = [score for score, own in zip(scores, is_same) if own]
    different = [score for score, own in zip(scores, is_same) if not own]
    kept = [limit for limit in different
            if Fraction(sum(score > limit for score in different), len(different)) <= Fraction(str(far))]
    limit = min(kept)
    return sum(score > limit for score in same) / len(same), limit


@given(st.data())
def test_no_threshold_accepts_more(data):
    """Few values, so that most pairs are tied with others."""
    pairs = data.draw(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
    pairs += [(0, True), (0, False)]
    scores, is_same = zip(*pairs)
    num_different = is_same.count(False)
    far = data.draw(st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.58, 0.9, 1 / 3]))
    found = tar_at_far(torch.tensor(scores, dtype=torch.float64) / 7, torch.tensor(is_same), [far])
    assert (found.num_same, found.num_different) == (len(pairs) - num_different, num_different)
    if Fraction(str(far)) * num_different < 1:
        assert math.isnan(found.tars[0]) and math.isnan(found.thresholds[0])
    else:
        tar, limit = tried(scores, is_same, far)
        assert (found.tars[0], found.thresholds[0]) == (tar, limit / 7)


def test_any_finer_threshold_breaks_the_rate():
    generator = torch.Generator().manual_seed(0)
    scores, is_same = torch.randn(500, generator=generator).double(), torch.rand(500, generator=generator) < 0.3
    found = tar_at_far(scores, is_same, (0.01, 0.1))
    for far, tar, threshold in zip(found.fars, found.tars, found.thresholds):
        different = scores[~is_same]
        assert (different > threshold).double().mean() <= far < (different >= threshold).double().mean()
        assert tar == (scores[is_same] > threshold).double().mean()


def test_a_rate_is_the_number_that_is_written():
    """0.29 * 100 is 28.999999999999996 in binary."""
    scores = torch.arange(101.0)
    is_same = torch.zeros(101, dtype=torch.bool)
    is_same[0] = True
    assert tar_at_far(scores, is_same, [0.29]).thresholds == (71.0,)


@pytest.mark.parametrize(('percent', 'rate'), [(0.7, 0.007), (0.57, 0.0057), (10, 0.1), (1e-5, 1e-7)])
def test_percents_are_the_numbers_that_are_written(percent, rate):
    assert rate_of_percent(percent) == rate


def test_scores_of_two_identities_alone_have_no_rate_of_acceptance():
    found = tar_at_far(torch.arange(4.0), torch.zeros(4, dtype=torch.bool), [0.5])
    assert found.thresholds == (1.0,) and math.isnan(found.tars[0]) and found.num_same == 0


def drawn(num=90, seed=1, dim=6):
    generator = torch.Generator().manual_seed(seed)
    identities = torch.randint(12, (num,), generator=generator)
    centres = torch.randn(12, dim, generator=generator)
    return centres[identities] + torch.randn(num, dim, generator=generator), identities


def table(embeddings, identities, dtype=torch.float32):
    """Scores of all pairs at once."""
    rows = F.normalize(embeddings.to(dtype), dim=1)
    is_pair = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return (rows @ rows.T)[is_pair], (identities[:, None] == identities)[is_pair]


@pytest.mark.parametrize('block_scores', [1, 1000, 1 << 22])
def test_all_pairs_are_those_of_the_table(block_scores):
    embeddings, identities = drawn()
    fars = (0.001, 0.01, 0.1, 0.5, 1e-6)
    found = pairwise_tar_at_far(embeddings, identities, fars, block_scores=block_scores)
    scores, is_same = table(embeddings, identities, torch.float64)
    wanted = tar_at_far(scores, is_same, fars)
    assert found.tars[:4] == wanted.tars[:4] and all(0 < tar < 1 for tar in found.tars[:4])
    assert math.isnan(found.tars[4]) and math.isnan(found.thresholds[4])
    assert (found.num_same, found.num_different) == (wanted.num_same, wanted.num_different)
    assert found.thresholds[:4] == pytest.approx(wanted.thresholds[:4], abs=1e-6)


def test_equal_pictures_are_tied_and_counted_by_the_bit():
    """Embeddings of a few values: their cosines are exact, negative ones and -0 among them."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.eye(4)[torch.randint(4, (60,), generator=generator)]
    embeddings *= torch.randint(-1, 2, (60, 1), generator=generator)       # zeros too
    identities = torch.randint(5, (60,), generator=generator)
    fars = (0.01, 0.05, 0.2, 0.9, 0.99)
    found, wanted = pairwise_tar_at_far(embeddings, identities, fars), tar_at_far(*table(embeddings, identities), fars)
    assert found == wanted and {-1.0, 0.0, 1.0} == set(found.thresholds)


def test_lengths_of_embeddings_do_not_count_and_inputs_are_left_alone():
    embeddings, identities = drawn()
    before = embeddings.clone()
    lengths = 2.0 ** torch.arange(len(embeddings)).remainder(7)[:, None]
    scaled = embeddings * lengths
    assert pairwise_tar_at_far(scaled, identities, [0.1]) == pairwise_tar_at_far(embeddings, identities, [0.1])
    assert torch.equal(embeddings, before)


def test_half_precision_and_gradients_are_read_as_they_are():
    embeddings, identities = drawn()
    half = embeddings.half().requires_grad_()
    assert pairwise_tar_at_far(half, identities, [0.1]) == pairwise_tar_at_far(half.detach().float(), identities, [0.1])


@pytest.mark.parametrize('num', [0, 1])
def test_no_pairs_have_no_rate(num):
    found = pairwise_tar_at_far(torch.ones(num, 3), torch.zeros(num, dtype=torch.int64), [0.1])
    assert math.isnan(found.tars[0]) and (found.num_same, found.num_different) == (0, 0)


@pytest.mark.parametrize('change, error, words', [
    ({'scores': [1.0]}, TypeError, 'scores must be a tensor, got list'),
    ({'scores': torch.arange(3)}, TypeError, 'scores must be floating-point, got torch.int64'),
    ({'scores': torch.zeros(3, 1)}, ValueError, r'scores must have 1 dimensions, got shape \(3, 1\)'),
    ({'scores': torch.zeros(2)}, ValueError, r'first dimensions must be equal, got scores \(2,\), is_same \(3,\)'),
    ({'is_same': torch.ones(3)}, TypeError, 'is_same must be bool, got torch.float32; compare'),
    ({'scores': torch.tensor([0.0, math.nan, 1.0])}, ValueError, 'scores must not be NaN, got 1 NaN of 3'),
    ({'fars': [0.1, 0.0]}, ValueError, r'fars\[1\] must be in \(0, 1\), got 0.0'),
    ({'fars': [1.0]}, ValueError, r'fars\[0\] must be in \(0, 1\), got 1.0'),
    ({'fars': ['0.1']}, TypeError, r"fars\[0\] must be a number, got str '0.1'"),
])
def test_what_cannot_be_measured_is_refused(change, error, words):
    given = {'scores': torch.arange(3.0), 'is_same': torch.tensor([True, False, False]), 'fars': [0.5], **change}
    with pytest.raises(error, match=words):
        tar_at_far(**given)


@pytest.mark.parametrize('change, error, words', [
    ({'embeddings': torch.ones(3)}, ValueError, r'embeddings must have 2 dimensions, got shape \(3,\)'),
    ({'embeddings': torch.ones(3, 2, dtype=torch.int64)}, TypeError, 'embeddings must be floating-point'),
    ({'embeddings': torch.ones(2, 2)}, ValueError, 'first dimensions must be equal'),
    ({'embeddings': torch.tensor([[1.0], [math.inf], [0.0]])}, ValueError, 'embeddings must be finite in float32'),
    ({'embeddings': torch.full((3, 1), 1e300, dtype=torch.float64)}, ValueError, 'embeddings must be finite'),
    ({'identities': torch.ones(3)}, TypeError, 'identities must be class indices of an integer dtype'),
    ({'identities': torch.tensor([0, -1, 1])}, ValueError, r'identities must be in \[0'),
    ({'block_scores': 0}, ValueError, 'block_scores must be at least 1, got 0'),
    ({'fars': [2]}, ValueError, r'fars\[0\] must be in \(0, 1\), got 2'),
])
def test_what_has_no_pairs_to_score_is_refused(change, error, words):
    given = {'embeddings': torch.ones(3, 2), 'identities': torch.tensor([0, 0, 1]), 'fars': [0.5], **change}
    with pytest.raises(error, match=words):
        pairwise_tar_at_far(**given)
