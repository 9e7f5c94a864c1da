"""Whom to ask about which pictures: the best answer to the worst teacher, and draws that follow it."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.data import RobustQuerySampler, query_gains, robust_query_prob

GAINS = st.lists(st.floats(0.01, 1), min_size=2, max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def worst(prob, gains, num_errors):
    """What is expected where the teacher errs on the pictures that hurt most."""
    return (prob * gains).sort(dim=-1).values[..., :len(gains) - num_errors].sum(-1)


@given(GAINS, st.data())
@settings(max_examples=40, deadline=None)
def test_no_other_probabilities_expect_more_of_the_worst_teacher(values, data):
    gains = tensor(values)
    num_errors = data.draw(st.integers(0, len(values) - 1))
    prob = robust_query_prob(gains, num_errors)
    assert prob.sum().item() == pytest.approx(1) and (prob >= 0).all()
    best = worst(prob, gains, num_errors)
    product = (prob * gains)[prob > 0]
    torch.testing.assert_close(product, product[:1].expand_as(product))
    # Whatever is drawn, near and far, is no better; nor is any number of largest gains alike.
    generator = torch.Generator().manual_seed(len(values))
    far = torch.rand(500, len(values), generator=generator, dtype=torch.float64) ** 4
    near = prob * (1 + 0.1 * torch.randn(500, len(values), generator=generator, dtype=torch.float64)).clamp(min=0.01)
    order = gains.argsort(descending=True)
    alike = torch.zeros(len(values), len(values), dtype=torch.float64)
    for size in range(1, len(values) + 1):
        alike[size - 1, order[:size]] = 1 / gains[order[:size]]
    others = torch.cat([far, near, alike])
    others /= others.sum(1, keepdim=True)
    assert (worst(others, gains, num_errors) <= best + 1e-9).all()


def test_without_errors_only_the_largest_gain_is_asked_for():
    assert robust_query_prob(tensor([0.2, 0.7, 0.1, 0.7]), 0).tolist() == [0, 0.5, 0, 0.5]


def test_by_hand():
    # (h - 1) / sum of 1 / g: 0, 1 / 3, 2 / 7, so that two pictures share what the error would take from one.
    torch.testing.assert_close(robust_query_prob(tensor([0.25, 1.0, 0.5]), 1), tensor([0, 1 / 3, 2 / 3]))
    torch.testing.assert_close(robust_query_prob(tensor([0.25, 1.0, 0.5]), 2), tensor([4 / 7, 1 / 7, 2 / 7]))


@given(GAINS, st.floats(1e-100, 1e100))
@settings(max_examples=25, deadline=None)
def test_neither_scale_nor_order_matters(values, scale):
    gains = tensor(values)
    prob = robust_query_prob(gains, 1)
    torch.testing.assert_close(robust_query_prob(gains * scale, 1), prob)
    torch.testing.assert_close(robust_query_prob(gains.flip(0), 1).flip(0), prob)


def test_pictures_without_gain_and_with_hardly_any_are_not_asked_for():
    prob = robust_query_prob(tensor([0.0, 1.0, 1.0, 5e-324, 0.0]), 1)
    assert prob.tolist() == [0, 0.5, 0.5, 0, 0]
    torch.testing.assert_close(robust_query_prob(tensor([1.0, 5e-324]), 1), tensor([0.0, 1.0]))


def test_a_gain_is_one_minus_the_margin():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prob = logits.exp() / logits.exp().sum(1, keepdim=True)
    want = [1 - (row[-1] - row[-2]) for row in (sorted(row) for row in prob.tolist())]
    assert query_gains(logits).tolist() == pytest.approx(want)
    assert query_gains(torch.zeros(3, 4)).tolist() == [1, 1, 1]
    assert query_gains(torch.empty(0, 4)).shape == (0,)


def test_draws_are_distinct_and_follow_the_probabilities():
    gains = torch.rand(50, generator=torch.Generator().manual_seed(0))
    sampler = RobustQuerySampler(gains, 20, 8, generator=torch.Generator().manual_seed(1))
    draws = [list(sampler) for _ in range(2000)]
    assert len(sampler) == 8 and all(len(set(draw)) == 8 for draw in draws)
    first = torch.bincount(torch.tensor([draw[0] for draw in draws]), minlength=50) / 2000
    deviation = (sampler.prob * (1 - sampler.prob) / 2000).sqrt()
    assert (first[sampler.prob == 0] == 0).all()
    assert ((first - sampler.prob).abs() <= 4.5 * deviation + 1e-12).all()


def test_a_generator_says_which_and_the_global_one_serves_without():
    gains, state = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    draws = [list(RobustQuerySampler(gains, 20, 8, generator=torch.Generator().manual_seed(3))) for _ in range(2)]
    assert draws[0] == draws[1] and torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert list(RobustQuerySampler(gains, 20, 8)) == draws[0]


@pytest.mark.parametrize('gains, num_errors, error, message', [
    ([0.5, -0.1], 0, ValueError, r'gains must be in \[0, .*\], got values from -0.1 to 0.5; query_gains makes them'),
    ([0.5, float('nan')], 0, ValueError, r'gains must be in \[0'),
    ([0.5, float('inf')], 0, ValueError, r'gains must be in \[0'),
    ([0.5, 0.0], 1, ValueError, r'num_errors must be below .* above 0, got 1 for 1 of 2 pictures; lower it'),
    ([], 0, ValueError, r'got 0 for 0 of 0 pictures'),
    ([[0.5]], 0, ValueError, r'gains must have 1 dimension'),
    ([0.5], -1, ValueError, r'num_errors must be at least 0, got -1'),
    ([0.5], 0.5, TypeError, r'num_errors must be an int, got float 0.5'),
])
def test_wrong_gains_and_numbers_are_refused(gains, num_errors, error, message):
    with pytest.raises(error, match=message):
        robust_query_prob(torch.tensor(gains), num_errors)


def test_other_refusals():
    with pytest.raises(TypeError, match=r'gains must be floating-point, got torch.int64'):
        robust_query_prob(torch.tensor([1, 2]), 0)
    with pytest.raises(ValueError, match=r'logits must be of two or more classes, got shape \(3, 1\)'):
        query_gains(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r'num_queries must be at most .* got 3 for 2, with num_errors 0; raise'):
        RobustQuerySampler(torch.tensor([0.5, 0.5, 0.1]), 0, 3)
    with pytest.raises(ValueError, match=r'num_queries must be at least 1, got 0'):
        RobustQuerySampler(torch.tensor([0.5]), 0, 0)
