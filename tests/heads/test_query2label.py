"""Query2Label: the paper's layers built of torch's own attention, one image and class after the other."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.heads import Query2Label
from timm_miil.heads.query2label import sine_positions

D, K = 8, 3


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    head = Query2Label(**{
        'in_features': D, 'num_classes': K, 'num_heads': 2, 'feedforward_dim': 12, 'dtype': torch.float64, **kwargs})
    with torch.no_grad():
        for parameter in head.parameters():  # biases and norms are no bystanders
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return head.eval()


def positions(height, width, dim):
    """DETR's encodings, number by number."""
    table = torch.zeros(height * width, dim, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for i in range(dim // 2):
                rate = 10000 ** (2 * (i // 2) / (dim // 2))
                wave = math.cos if i % 2 else math.sin
                table[y * width + x, i] = wave((y + 1) / height * 2 * math.pi / rate)
                table[y * width + x, dim // 2 + i] = wave((x + 1) / width * 2 * math.pi / rate)
    return table


def attend(ours, query, key, value):
    theirs = torch.nn.MultiheadAttention(query.shape[-1], ours.num_heads, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return theirs(query, key, value, average_attn_weights=True)


def reference(head, image, place):
    """Logits and last attention of one image (N, D): Sec. 3.2, Eq. 2 to 5."""
    memory = head.embed(image)
    for layer in head.encoder:
        memory = layer.norm1(memory + attend(layer.attn, memory + place, memory + place, memory)[0])
        memory = layer.norm2(memory + layer.mlp.linear2(layer.mlp.linear1(memory).clamp(min=0)))
    x = torch.zeros_like(head.query_embed)
    for layer in head.decoder:
        if layer.self_attn is not None:
            x = layer.norm1(x + attend(layer.self_attn, x + head.query_embed, x + head.query_embed, x)[0])
        found, weights = attend(layer.cross_attn, x + head.query_embed, memory + place, memory)
        x = layer.norm2(x + found)
        x = layer.norm3(x + layer.mlp.linear2(layer.mlp.linear1(x).clamp(min=0)))
    x = head.norm(x)
    return torch.stack([x[c] @ head.fc.weight[c] + head.fc.bias[c] for c in range(head.num_classes)]), weights


@pytest.mark.parametrize('config', [
    {}, {'embed_dim': 12}, {'num_encoder_layers': 0, 'num_decoder_layers': 1}, {'self_attention': False},
    {'num_encoder_layers': 2, 'num_decoder_layers': 3}])
@pytest.mark.parametrize('kind', ['map', 'tokens'])
def test_values_are_those_of_the_plain_form(config, kind):
    head = build(**config)
    features = torch.randn(2, D, 3, 4, dtype=torch.float64)
    tokens = features.flatten(2).transpose(1, 2)
    place = positions(3, 4, head.embed_dim) if kind == 'map' else 0.0
    maps = head.attention_maps(features if kind == 'map' else tokens)
    for b, logits in enumerate(head(features if kind == 'map' else tokens)):
        want, weights = reference(head, tokens[b], place)
        torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(maps[b], weights, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_positions_are_those_of_the_formula(height, width, quarter):
    got = sine_positions(height, width, 4 * quarter, torch.device('cpu'), torch.float64)
    torch.testing.assert_close(got, positions(height, width, 4 * quarter), rtol=1e-12, atol=1e-12)
    half = sine_positions(height, width, 4 * quarter, torch.device('cpu'), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), got, rtol=1e-2, atol=4e-3)  # rounded once, at the end


def test_gradients():
    head = build(in_features=4, feedforward_dim=5)
    features = torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in head.named_parameters() if parameter.numel() <= 12]
    assert {'query_embed', 'fc.weight', 'fc.bias', 'norm.weight'} <= set(names)
    parameters = [head.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(head, dict(zip(names, values)), (x,)), (features, *parameters))
    head(features).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.shape != (12, 4))


def test_classes_see_each_other_only_by_self_attention():
    features = torch.randn(1, D, 2, 2, dtype=torch.float64)
    for self_attention in (True, False):
        head = build(self_attention=self_attention)
        before = head(features)
        with torch.no_grad():
            head.query_embed[0] += 1
        changed = (head(features) - before).abs()[0] > 1e-9
        assert changed.tolist() == [True, self_attention, self_attention]


def test_the_authors_sizes_are_the_default_on_their_backbone():
    head = Query2Label(2048, 80, device='meta')
    assert isinstance(head.embed, torch.nn.Identity)
    assert len(head.encoder) == 1 and len(head.decoder) == 2
    assert head.decoder[1].mlp.linear1.weight.shape == (8192, 2048)
    assert head.decoder[1].cross_attn.num_heads == 4 and head.drop_rate == 0.1
    assert head.decoder[0].self_attn is None and head.decoder[1].self_attn is not None


def test_dropout_is_in_training_only_and_never_in_maps():
    head = build(drop_rate=0.5).train()
    tokens = torch.randn(2, 5, D, dtype=torch.float64)
    assert not torch.equal(head(tokens), head(tokens))
    assert torch.equal(head.attention_maps(tokens), head.attention_maps(tokens))
    assert torch.equal(head.eval()(tokens), build(drop_rate=0.0).train()(tokens))


def test_maps_of_chosen_classes_are_rows_of_all_and_sum_to_one_in_half_precision():
    head = build()
    tokens = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(head.attention_maps(tokens, [2, 0]), head.attention_maps(tokens)[:, [2, 0]])
    half = head.half().attention_maps(tokens.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(-1), torch.ones(2, K), rtol=1e-6, atol=1e-6)


def test_other_classes_keep_the_transformer():
    head = build(embed_dim=12)
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    head.reset_classes(7)
    after = head.state_dict()
    assert {key for key in after if after[key].shape != before[key].shape} == {'query_embed', 'fc.weight', 'fc.bias'}
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith(('encoder', 'decoder', 'embed')))
    assert head(torch.randn(2, 5, D, dtype=torch.float64)).shape == (2, 7)


def test_fresh_weights_after_to_empty():
    head = Query2Label(64, 80, embed_dim=32, device='meta').to_empty(device='cpu')
    torch.nn.init.constant_(head.query_embed, 5.0)
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, 5.0)
    head.reset_parameters()
    assert all((parameter != 5).all() for parameter in head.parameters())
    assert 0.9 < head.query_embed.std() < 1.1
    assert F.softplus(head(torch.randn(2, 64, 3, 3))).isfinite().all()


@pytest.mark.parametrize('setting, error, message', [
    (dict(embed_dim=10), ValueError, 'embed_dim must be a multiple of 4, got 10; the nearest are 8 or 12'),
    (dict(embed_dim=12, num_heads=8), ValueError, 'embed_dim must be a multiple of 8, got 12'),
    (dict(num_encoder_layers=-1), ValueError, 'num_encoder_layers must be at least 0, got -1'),
    (dict(num_decoder_layers=0), ValueError, 'num_decoder_layers must be at least 1, got 0'),
    (dict(feedforward_dim=0), ValueError, 'feedforward_dim must be at least 1, got 0'),
    (dict(drop_rate=1.0), ValueError, r'drop_rate must be in \[0, 1\), got 1.0'),
    (dict(num_heads=2.0), TypeError, 'num_heads must be an int, got float 2.0'),
])
def test_wrong_settings(setting, error, message):
    with pytest.raises(error, match=message):
        build(**setting)


@pytest.mark.parametrize('in_features, near', [(386, 384), (2042, 2040), (3, 4)])
def test_a_width_that_is_the_backbones_is_told_by_its_name(in_features, near):
    with pytest.raises(ValueError, match=rf'^in_features={in_features} is no width .*dict\(embed_dim={near}\)'):
        Query2Label(in_features, 5)
    assert Query2Label(in_features, 5, embed_dim=near, device='meta').embed_dim == near
