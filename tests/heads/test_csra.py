"""Class-specific residual attention: the paper's equations in plain loops, properties and errors."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.heads import CSRA

TEMPERATURES = {  # of the authors' code; 99 is their sign for the maximum
    1: [1], 2: [1, 99], 4: [1, 2, 4, 99], 6: [1, 2, 3, 4, 5, 99], 8: [1, 2, 3, 4, 5, 6, 7, 99]}


def build(num_heads=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    return CSRA(**{'in_features': 6, 'num_classes': 3, 'num_heads': num_heads, 'dtype': torch.float64, **kwargs})


def loops(head, tokens):
    """Eq. 2 to 7, one image, class and head after the other."""
    logits = torch.zeros(len(tokens), head.num_classes, dtype=torch.float64)
    maps = torch.zeros(len(tokens), head.num_classes, tokens.shape[1], dtype=torch.float64)
    for b, image in enumerate(tokens):
        for c in range(head.num_classes):
            for h, temperature in enumerate(TEMPERATURES[head.num_heads]):
                m = head.fc.weight[c, h].detach()
                scores = [float(x @ m) / math.sqrt(float(m @ m)) for x in image]
                if temperature == 99:
                    weights = [float(score == max(scores)) for score in scores]
                else:
                    total = sum(math.exp(temperature * score) for score in scores)
                    weights = [math.exp(temperature * score) / total for score in scores]
                mean = sum(scores) / len(scores)
                logits[b, c] += mean + head.residual_weight * sum(w * s for w, s in zip(weights, scores))
                maps[b, c] += torch.tensor(weights, dtype=torch.float64) / head.num_heads
    return logits, maps


@pytest.mark.parametrize('num_heads', TEMPERATURES)
def test_values_are_those_of_plain_loops(num_heads):
    head = build(num_heads, residual_weight=0.3)
    features = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    logits, maps = loops(head, features.flatten(2).transpose(1, 2))
    torch.testing.assert_close(head(features), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.attention_maps(features), maps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('num_heads', [1, 4])
def test_gradients(num_heads):
    head = build(num_heads)
    features = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(head, {'fc.weight': weight}, (x,)), (features, head.fc.weight))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 6, 8]), st.integers(1, 9), st.floats(0.1, 100), st.integers(0, 2**31))
def test_neither_the_order_of_positions_nor_the_length_of_weights_matters(num_heads, positions, scale, seed):
    head = build(num_heads, seed=seed)
    tokens = torch.randn(2, positions, 6, dtype=torch.float64)
    logits = head(tokens)
    torch.testing.assert_close(head(tokens[:, torch.randperm(positions)]), logits, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        head.fc.weight *= scale
    torch.testing.assert_close(head(tokens), logits, rtol=1e-9, atol=1e-9)


def test_without_attention_it_is_the_mean_and_with_equal_positions_the_score():
    head = build(1, residual_weight=0.0)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), head(tokens.mean(1, keepdim=True)))
    head = build(8, residual_weight=0.5)
    equal = tokens[:, :1].expand(-1, 5, -1)
    scores = head.fc(equal)[..., 0].sum(2)
    torch.testing.assert_close(head(equal), 1.5 * scores)


def test_maps_of_chosen_classes_are_rows_of_all_and_sum_to_one_in_half_precision():
    head = build(4)
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.equal(head.attention_maps(tokens, [2, 0]), head.attention_maps(tokens)[:, [2, 0]])
    half = head.half().attention_maps(tokens.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(-1), torch.ones(2, 3), rtol=1e-6, atol=1e-6)


def test_dropout_is_on_the_features_in_training_only_and_never_in_maps():
    head = build(1, drop_rate=0.5)
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    assert not torch.equal(head(tokens), head(tokens))
    assert torch.equal(head.attention_maps(tokens), head.attention_maps(tokens))
    assert torch.equal(head.eval()(tokens), build(1)(tokens))


def test_fresh_weights_after_to_empty_and_for_other_classes():
    head = build(4, device='meta').to_empty(device='cpu')
    head.reset_parameters()
    assert head.temperature.flatten().tolist() == [1, 2, 4]
    assert head.fc.weight.abs().max() <= 6 ** -0.5 and head.fc.weight.std() > 0.1
    head.reset_classes(9)
    assert head(torch.randn(2, 5, 6, dtype=torch.float64)).shape == (2, 9)
    assert head.fc.weight.shape == (9, 4, 6) and head.num_classes == 9


@pytest.mark.parametrize('setting, message', [
    (dict(num_heads=3), 'num_heads must be one of 1, 2, 4, 6, 8, got 3'),
    (dict(residual_weight=-0.1), r'residual_weight must be in \[0, inf\), got -0.1'),
    (dict(drop_rate=1.0), r'drop_rate must be in \[0, 1\), got 1.0'),
])
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        build(**setting)
