"""Diversity of filters and embeddings: hand-made values, invariants, independent forms, and the refusals."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_miil.metrics import (
    cka_redundancy, effective_rank, filter_diversity, layer_filter_diversity, mean_log_odds, nc1, output_std,
    participation_ratio)

SPREADS = (effective_rank, participation_ratio)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed=9):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def layer_of(filters):
    layer = nn.Linear(filters.shape[1], len(filters), dtype=filters.dtype)
    with torch.no_grad():
        layer.weight.copy_(filters)
    return layer


# ---- filters


@pytest.mark.parametrize('scale', [1.0, 1e-30, 1e30])
def test_orthogonal_filters_are_diverse_and_equal_ones_not(scale):
    assert filter_diversity(layer_of(scale * rotation(6)[:4])) == pytest.approx(1.0, abs=1e-12)
    same = draw(1, 5).expand(4, 5) * torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    assert filter_diversity(layer_of(scale * same)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize('count', [2, 7, 1500])
def test_it_is_one_less_the_mean_cosine_of_pairs(count):
    filters = draw(count, 3)
    cosines = torch.cosine_similarity(filters.unsqueeze(1), filters, dim=2).abs()
    want = 1 - cosines.triu(1).sum().item() / (count * (count - 1) / 2)
    assert filter_diversity(layer_of(filters)) == pytest.approx(want, abs=1e-10)


@given(seed=st.integers(0, 1000), count=st.integers(2, 6), size=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_order_sign_and_length_of_filters_do_not_count(seed, count, size):
    filters = draw(count, size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factor = (torch.rand(count, 1, generator=generator, dtype=torch.float64) + 0.1) * (
        2 * torch.randint(2, (count, 1), generator=generator) - 1)
    found = filter_diversity(layer_of(filters))
    assert 0.0 <= found <= 1.0
    changed = (factor * filters)[torch.randperm(count, generator=generator)]
    assert filter_diversity(layer_of(changed)) == pytest.approx(found, abs=1e-9)


def test_layers_of_a_network_but_for_its_classifier():
    model = timm.create_model('test_resnet', num_classes=5)
    found = layer_filter_diversity(model)
    convs = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    assert set(found) == convs and all(0 < value < 1 for value in found.values())
    assert filter_diversity(model) == pytest.approx(sum(found.values()) / len(found))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nn.init.zeros_(model.get_classifier().weight)
    assert layer_filter_diversity(model) == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if 'fc' not in name)
    # A convolution's filter is what makes one channel of the output.
    filters = model.layer2[0].conv1.weight.detach().double().flatten(1)
    assert found['layer2.0.conv1'] == pytest.approx(filter_diversity(layer_of(filters)), abs=1e-12)


def test_filters_of_zeros_and_half_precision():
    filters = torch.eye(4)[:3]
    assert filter_diversity(layer_of(torch.cat([filters, torch.zeros(2, 4)]))) == 1.0
    assert filter_diversity(layer_of(draw(5, 8).bfloat16())) == pytest.approx(
        filter_diversity(layer_of(draw(5, 8).bfloat16().double())), abs=1e-12)
    alone = nn.Sequential(layer_of(filters), layer_of(torch.ones(1, 3)), layer_of(torch.zeros(3, 3)), nn.ReLU())
    assert layer_filter_diversity(alone) == {'0': 1.0}


def test_networks_without_filters():
    with pytest.raises(ValueError, match='two filters or more besides its classifier, got Sequential'):
        filter_diversity(nn.Sequential(nn.ReLU(), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="weights of layer '0' must be finite"):
        filter_diversity(nn.Sequential(layer_of(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))))


# ---- embeddings


@pytest.mark.parametrize('measure', SPREADS)
def test_equal_directions_count_one_each(measure):
    assert measure(rotation(5)[:3]) == pytest.approx(3.0)
    assert measure(rotation(5)[:3].repeat(4, 1)) == pytest.approx(3.0)
    assert measure(draw(1, 5).expand(8, 5)) == pytest.approx(1.0)


@pytest.mark.parametrize('measure', SPREADS)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), columns=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_spread_is_bounded_and_no_matter_of_rotation_or_length(measure, seed, rows, columns):
    features = draw(rows, columns, seed=seed)
    found = measure(features)
    assert 1 - 1e-9 <= found <= min(rows, columns) + 1e-9
    lengths = torch.logspace(-20, 20, rows, dtype=torch.float64).unsqueeze(1)
    assert measure(lengths * features @ rotation(columns)) == pytest.approx(found, rel=1e-6)


def test_spreads_from_their_formulas():
    rows = nn.functional.normalize(draw(30, 6), dim=1)
    variance = torch.linalg.eigvalsh(rows.T @ rows)
    share = variance.sqrt() / variance.sqrt().sum()
    assert effective_rank(7 * rows) == pytest.approx(math.exp(-(share * share.log()).sum().item()))
    assert participation_ratio(7 * rows) == pytest.approx((variance.sum() ** 2 / variance.square().sum()).item())


def test_redundancy_of_halves():
    half = draw(40, 3)
    both = torch.cat([half, half @ rotation(3)], dim=1)
    # Rotating a half changes no row's length.
    assert cka_redundancy(both) == pytest.approx(1.0)
    assert cka_redundancy(draw(20_000, 4)) < 0.01
    constant = torch.cat([torch.ones(6, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(3, 1)], dim=1)
    assert math.isnan(cka_redundancy(constant)) and math.isnan(cka_redundancy(draw(1, 4)))


def test_redundancy_from_its_kernels():
    features = nn.functional.normalize(draw(12, 5), dim=1)
    centring = torch.eye(12, dtype=torch.float64) - 1 / 12
    first, second = (centring @ (part @ part.T) @ centring for part in (features[:, :2], features[:, 2:]))
    want = (first * second).sum() / (first.norm() * second.norm())
    assert cka_redundancy(3 * features) == pytest.approx(want.item())


def test_outputs_that_collapse():
    assert output_std(torch.logspace(-9, 9, 8).unsqueeze(1) * torch.tensor([3.0, -1.0])) == pytest.approx(0, abs=1e-7)
    assert output_std(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(1.0)
    rows = nn.functional.normalize(draw(30, 6), dim=1)
    assert output_std(5 * rows) == pytest.approx((6 ** 0.5 * rows.var(0, correction=0).sqrt().mean()).item())
    assert 0.98 < output_std(draw(20_000, 4)) <= 1


def test_collapse_from_its_formula():
    features, labels = draw(40, 5), torch.arange(40) % 3
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    within = sum(torch.outer(row - means[label], row - means[label]) for row, label in zip(features, labels)) / 40
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 3
    want = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-9)).item() / 3
    assert nc1(features, labels) == pytest.approx(want)
    assert nc1(1e6 * (features + 100), 7 * labels + 2) == pytest.approx(want, rel=1e-6)
    closer = means[labels] + 0.1 * (features - means[labels])
    assert nc1(closer, labels) == pytest.approx(0.01 * want)
    assert nc1(means[labels], labels) == pytest.approx(0.0, abs=1e-20)


def test_collapse_where_classes_differ_in_number():
    # Means of classes count equally, pictures do too: m is not the mean of all pictures.
    features = torch.tensor([[0.0], [2.0], [9.0], [10.0], [11.0], [10.0]])
    assert nc1(features, torch.tensor([5, 5, 8, 8, 8, 8])) == pytest.approx((4 / 6) / 4.5 ** 2 / 2)


def test_bad_embeddings():
    for measure in (*SPREADS, cka_redundancy, output_std, lambda features: nc1(features, torch.tensor([0, 1]))):
        with pytest.raises(TypeError, match='features must be a tensor, got list'):
            measure([[1.0]])
        with pytest.raises(TypeError, match='features must be floating-point'):
            measure(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match='features must have 2 dimensions'):
            measure(torch.ones(2))
        with pytest.raises(ValueError, match='a row and a column or more'):
            measure(torch.ones(0, 3))
        with pytest.raises(ValueError, match='features must be finite'):
            measure(torch.tensor([[1.0, math.inf], [0.0, 1.0]]))
    for measure in (*SPREADS, cka_redundancy, output_std):
        with pytest.raises(ValueError, match='features must not all be zero'):
            measure(torch.zeros(2, 3))
    with pytest.raises(ValueError, match='two channels or more'):
        cka_redundancy(torch.ones(3, 1))
    with pytest.raises(ValueError, match='two classes or more, got 1'):
        nc1(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match='class means that differ'):
        nc1(torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='first dimensions must be equal'):
        nc1(torch.rand(3, 2), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match='labels must be class indices'):
        nc1(torch.rand(2, 2), torch.tensor([0.0, 1.0]))


def test_rows_of_zeros_count_for_nothing():
    assert effective_rank(torch.cat([torch.eye(3), torch.zeros(4, 3)])) == pytest.approx(3.0)


# ---- the aggregate


def test_mean_log_odds():
    assert mean_log_odds([0.5]) == 0.0
    assert mean_log_odds([0.9, 0.2]) == pytest.approx((math.log(9) - math.log(4)) / 2)
    assert mean_log_odds([0.8, 0.2]) == pytest.approx(0.0, abs=1e-12)
    assert mean_log_odds([1 - 1e-12, 0.5]) == pytest.approx(math.log(1e12) / 2, rel=1e-4)
    assert mean_log_odds([1.0, 0.0, 0.25], num_pictures=[50, 50, 8]) == pytest.approx(-math.log(3) / 3)
    assert mean_log_odds([1.0], num_pictures=[50]) == pytest.approx(math.log(99))


@pytest.mark.parametrize(('accuracies', 'counts', 'kind', 'words'), [
    ([], None, ValueError, 'one fraction or more, got none'),
    ([0.5, 1.0], None, ValueError, r'accuracies\[1\] must be in \(0, 1\)'),
    ([0.0], None, ValueError, r'accuracies\[0\] must be in \(0, 1\)'),
    ([math.nan], [5], ValueError, r'accuracies\[0\] must be in \[0, 1\], got nan'),
    ([80.0], [5], ValueError, 'got 80.0'),
    (['0.5'], None, TypeError, 'must be a number'),
    ([0.5], [5, 6], ValueError, 'one count an accuracy, got 2 for 1'),
    ([0.5], [0], ValueError, r'num_pictures\[0\] must be at least 1'),
])
def test_bad_accuracies(accuracies, counts, kind, words):
    with pytest.raises(kind, match=words):
        mean_log_odds(accuracies, num_pictures=counts)
