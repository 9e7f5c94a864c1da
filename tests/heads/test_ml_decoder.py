"""ML-Decoder: golden fixtures, the equations in plain loops, properties and errors."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from timm_miil._errors import CheckpointError
from timm_miil.heads import MLDecoder, convert_original_state_dict
from timm_miil.heads.ml_decoder import ORIGINAL_KEYS

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'mldecoder'
MANIFEST = json.loads((FIXTURES / 'manifest.json').read_text())
CASES = MANIFEST['cases']
PLAIN = sorted(name for name, case in CASES.items() if not case['config']['zsl'])
DTYPES = {'float32': torch.float32, 'float64': torch.float64}


def section(tensors, start):
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def build(case, tensors, dtype):
    config = case['config']
    sizes = dict(in_features=config['initial_num_features'], embed_dim=config['decoder_embedding'], dtype=dtype)
    groups = {} if config['num_of_groups'] < 0 else {'num_groups': config['num_of_groups']}
    head = MLDecoder(num_classes=config['num_classes'], **groups, **sizes)
    head.load_state_dict(convert_original_state_dict(section(tensors, 'state.')))
    return head.eval()


def check_case(head, case, tensors, dtype_name):
    """Values and gradients of one run of the reference against ours."""
    dtype = DTYPES[dtype_name]
    close = dict(**case['tolerance'][dtype_name])
    expected = section(tensors, f'expected.{dtype_name}.')
    x = tensors['x'].to(dtype, copy=True).requires_grad_()
    logits = head(x)
    torch.testing.assert_close(logits, expected['logits'], **close)
    (logits * tensors['cotangent'].to(dtype)).sum().backward()
    gradients = section(expected, 'grad.')
    torch.testing.assert_close(x.grad, gradients.pop('x'), **close)
    assert bool(gradients) == (dtype_name == 'float64')  # the reference recorded them in float64 only
    parameters = dict(head.named_parameters())
    for key, gradient in convert_original_state_dict(gradients).items():
        torch.testing.assert_close(parameters[key].grad, gradient, **close, msg=lambda text, key=key: f'{key}: {text}')


def check_prepared(head, case, tensors, dtype_name):
    """The same run on what evaluation remembers of frozen weights; gradients of the features flow through it too."""
    head.zero_grad()
    head.requires_grad_(False)
    close, expected = case['tolerance'][dtype_name], section(tensors, f'expected.{dtype_name}.')
    x = tensors['x'].to(DTYPES[dtype_name], copy=True).requires_grad_()
    logits = head(x)
    assert head._memo._entry is not None
    torch.testing.assert_close(logits, expected['logits'], **close)
    (logits * tensors['cotangent'].to(logits.dtype)).sum().backward()
    torch.testing.assert_close(x.grad, expected['grad.x'], **close)


@pytest.mark.parametrize('dtype_name', DTYPES)
@pytest.mark.parametrize('name', PLAIN)
def test_fixture_values_and_gradients_are_reproduced(name, dtype_name):
    tensors = load_file(FIXTURES / CASES[name]['file'])
    head = build(CASES[name], tensors, DTYPES[dtype_name])
    check_case(head, CASES[name], tensors, dtype_name)
    check_prepared(head, CASES[name], tensors, dtype_name)


def reference_logits(head, features):
    """The specification in float64 loops: one image, one query, one attention head at a time."""
    weights = {key: tensor.double() for key, tensor in head.state_dict().items()}
    embed_dim = head.embed.out_features
    heads, width = head.decoder.attn.num_heads, embed_dim // head.decoder.attn.num_heads
    w_q, w_k, w_v = weights['decoder.attn.in_proj_weight'].chunk(3)
    b_q, b_k, b_v = weights['decoder.attn.in_proj_bias'].chunk(3)

    def norm(x, name):
        mean, var = x.mean(), x.var(correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * weights[f'decoder.{name}.weight'] + weights[f'decoder.{name}.bias']

    rows = []
    for image in features.double():
        tokens = image.reshape(image.shape[0], -1).T
        memory = (tokens @ weights['embed.weight'].T + weights['embed.bias']).clamp(min=0)
        row = []
        for group, query in enumerate(weights['query_embed']):
            t1 = norm(2 * query, 'norm1')
            parts = []
            for h in range(heads):
                cut = slice(h * width, (h + 1) * width)
                q = (w_q @ t1 + b_q)[cut]
                scores = torch.stack([q @ (w_k @ m + b_k)[cut] for m in memory]) / math.sqrt(width)
                values = torch.stack([(w_v @ m + b_v)[cut] for m in memory])
                parts.append(scores.softmax(0) @ values)
            attended = weights['decoder.attn.out_proj.weight'] @ torch.cat(parts)
            t2 = norm(t1 + attended + weights['decoder.attn.out_proj.bias'], 'norm2')
            hidden = (weights['decoder.linear1.weight'] @ t2 + weights['decoder.linear1.bias']).clamp(min=0)
            t3 = norm(t2 + weights['decoder.linear2.weight'] @ hidden + weights['decoder.linear2.bias'], 'norm3')
            row += [t3 @ slot for slot in weights['group_fc.weight'][group].T]
        rows.append(torch.stack(row)[:head.num_classes] + weights['group_fc.bias'])
    return torch.stack(rows)


@settings(max_examples=15, deadline=None)
@given(
    num_classes=st.integers(1, 30), num_groups=st.integers(1, 12), height=st.integers(1, 3), seed=st.integers(0, 99))
def test_logits_are_the_equations_for_any_number_of_classes_and_groups(num_classes, num_groups, height, seed):
    torch.manual_seed(seed)
    sizes = dict(embed_dim=8, num_heads=2, feedforward_dim=5)
    head = MLDecoder(6, num_classes, num_groups, **sizes, dtype=torch.float64).eval()
    torch.nn.init.normal_(head.group_fc.bias)
    torch.nn.init.normal_(head.decoder.norm1.weight)
    torch.nn.init.normal_(head.decoder.attn.in_proj_bias)
    features = torch.randn(2, 6, height, 2, dtype=torch.float64)
    torch.testing.assert_close(head(features), reference_logits(head, features), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('num_classes, num_groups, group_size, groups', [
    (2001, 2000, 2, 2000),   # the original's K/G + 0.999 gives 1 and fails
    (101, 100, 2, 100),
    (100, 100, 1, 100),
    (7, 50, 1, 7),
    (9605, 200, 49, 200),
])
def test_group_size_is_a_true_ceiling(num_classes, num_groups, group_size, groups):
    head = MLDecoder(4, num_classes, num_groups, embed_dim=8, feedforward_dim=8)
    assert head.group_fc.weight.shape == (groups, 8, group_size)
    assert head.num_groups == groups
    assert head(torch.randn(1, 3, 4)).shape == (1, num_classes)


def test_map_and_its_tokens_give_equal_logits():
    head = MLDecoder(6, 5, embed_dim=8).eval()
    features = torch.randn(2, 6, 3, 4)
    assert torch.equal(head(features), head(features.flatten(2).transpose(1, 2)))


def test_order_of_positions_does_not_matter():
    torch.manual_seed(0)
    head = MLDecoder(6, 5, embed_dim=8, dtype=torch.float64).eval()
    tokens = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(9)]))


def test_queries_are_saved_and_never_trained():
    head = MLDecoder(6, 5, embed_dim=8)
    assert 'query_embed' in head.state_dict()
    assert 'query_embed' not in dict(head.named_parameters())
    assert abs(MLDecoder(6, 100, embed_dim=768).query_embed.std() - 1) < 0.02


def test_every_parameter_gets_a_gradient():
    head = MLDecoder(6, 25, 6, embed_dim=8)
    head(torch.randn(2, 9, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_initial_spread_is_that_of_the_whole_group_weight():
    torch.manual_seed(0)
    head = MLDecoder(6, 9605, 200, embed_dim=64)
    assert head.group_fc.weight.std().item() == pytest.approx(math.sqrt(2 / (49 * (64 + 200))), rel=0.01)
    assert not head.group_fc.bias.any()


def test_training_draws_a_query_mask_per_image_and_evaluation_none():
    torch.manual_seed(0)
    head = MLDecoder(6, 5, embed_dim=8)
    same = torch.randn(1, 9, 6).expand(2, -1, -1)
    first, second = head(same)
    assert not torch.allclose(first, second)
    first, second = head.eval()(same)
    torch.testing.assert_close(first, second)


def test_without_dropout_training_equals_evaluation():
    head = MLDecoder(6, 25, 6, embed_dim=8, drop_rate=0.0, dtype=torch.float64)
    tokens = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), copy.deepcopy(head).eval()(tokens))


def test_gradcheck():
    head = MLDecoder(3, 5, 2, embed_dim=4, num_heads=2, feedforward_dim=3, dtype=torch.float64).eval()
    tokens = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, tokens)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    torch.manual_seed(0)
    head = MLDecoder(32, 25, 6, embed_dim=64).eval()
    tokens = torch.randn(2, 9, 32)
    got = copy.deepcopy(head).to(dtype)(tokens.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - head(tokens)).norm() / head(tokens).norm() < 0.03


@pytest.mark.filterwarnings('ignore:.torch.jit.script:FutureWarning', 'ignore:.torch.jit.script:DeprecationWarning')
def test_script_export_and_compile_agree_with_eager():
    head = MLDecoder(6, 25, 6, embed_dim=8).eval()
    tokens = torch.randn(2, 9, 6)
    want = head(tokens)
    torch.testing.assert_close(torch.jit.script(head)(tokens), want)
    dynamic = torch.export.export(head, (tokens,), dynamic_shapes=({0: torch.export.Dim('batch')},), strict=False)
    torch.testing.assert_close(dynamic.module()(tokens.repeat(3, 1, 1)), want.repeat(3, 1))
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend='aot_eager')(tokens), want)


def test_meta_device_and_reset_parameters():
    head = MLDecoder(6, 25, 6, embed_dim=8, device='meta')
    assert head(torch.empty(2, 9, 6, device='meta')).shape == (2, 25)
    head = head.to_empty(device='cpu')
    for tensor in head.state_dict().values():
        tensor.fill_(float('nan'))
    head.reset_parameters()
    assert head(torch.randn(2, 9, 6)).isfinite().all()


@pytest.mark.parametrize('num_classes, kept_queries', [(24, True), (200, True), (3, False)])
def test_reset_classes_keeps_what_does_not_depend_on_them(num_classes, kept_queries):
    head = MLDecoder(6, 25, 6, embed_dim=8, dtype=torch.float64)
    before = copy.deepcopy(head.state_dict())
    head.reset_classes(num_classes)
    assert head(torch.randn(2, 9, 6, dtype=torch.float64)).shape == (2, num_classes)
    changed = {key for key, tensor in head.state_dict().items()
               if tensor.shape != before[key].shape or not torch.equal(tensor, before[key])}
    assert changed - {'group_fc.bias'} == {'group_fc.weight'} | (set() if kept_queries else {'query_embed'})
    assert 'query_embed' in head.state_dict()


def test_conversion_knows_every_original_key_and_nothing_else():
    tensors = {old: torch.tensor(float(i)) for i, old in enumerate(ORIGINAL_KEYS)}
    converted = convert_original_state_dict({f'head.{key}': value for key, value in tensors.items()}, 'head.')
    assert {key.removeprefix('head.') for key in converted} == set(ORIGINAL_KEYS.values())
    assert [value.item() for value in converted.values()] == list(range(len(ORIGINAL_KEYS)))
    with pytest.raises(CheckpointError, match=r"'head.decoder.embed_standard.weight' is not a key of an original "
                                              r"ML-Decoder head.*did you mean 'decoder.embed_standart.weight'"):
        convert_original_state_dict({'head.decoder.embed_standard.weight': torch.zeros(1)}, 'head.')
    with pytest.raises(CheckpointError, match='prefix'):
        convert_original_state_dict({'decoder.duplicate_pooling': torch.zeros(1)}, 'head.')


@pytest.mark.parametrize('arguments, words', [
    (dict(in_features=0), 'in_features must be at least 1, got 0'),
    (dict(num_classes=0), 'num_classes must be at least 1, got 0'),
    (dict(num_groups=0), 'num_groups must be at least 1, got 0'),
    (dict(num_groups=-1), 'num_groups must be at least 1, got -1'),
    (dict(embed_dim=300), 'embed_dim must be a multiple of 8, got 300; the nearest are 296 or 304'),
    (dict(num_heads=0), 'num_heads must be at least 1, got 0'),
    (dict(feedforward_dim=0), 'feedforward_dim must be at least 1, got 0'),
    (dict(drop_rate=1.0), r'drop_rate must be in \[0, 1\), got 1.0'),
    (dict(fc_drop_rate=-0.1), r'fc_drop_rate must be in \[0, 1\), got -0.1'),
])
def test_wrong_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        MLDecoder(**{'in_features': 6, 'num_classes': 5, **arguments})


def test_sizes_that_are_not_whole_numbers_are_refused():
    with pytest.raises(TypeError, match='num_classes must be an int, got float 5.0'):
        MLDecoder(6, 5.0)
    with pytest.raises(TypeError, match="drop_rate must be a number, got str 'a'"):
        MLDecoder(6, 5, drop_rate='a')
    assert MLDecoder(6, np.int64(5), embed_dim=8).num_classes == 5


def test_attention_maps_are_the_weights_of_each_class_query():
    torch.manual_seed(0)
    head = MLDecoder(6, 101, 100, embed_dim=8, num_heads=2, dtype=torch.float64)  # groups of 2: 51 in use
    torch.nn.init.normal_(head.decoder.attn.in_proj_bias)
    features = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    classes = [100, 3, 2, 0, 3]
    attn = head.decoder.attn
    for maps in (head.attention_maps(features, classes), head.attention_maps(features)[:, classes]):  # in training too
        assert maps.shape == (2, 5, 6)
        for image, rows in zip(features, maps, strict=True):
            memory = head.embed(image.flatten(1).T).clamp(min=0)
            for index, row in zip(classes, rows, strict=True):
                query = head.decoder.norm1(2 * head.query_embed[index // 2])
                projected = torch.cat([query[None], memory]) @ attn.in_proj_weight.T + attn.in_proj_bias
                per_head = [
                    (projected[1:, 8 + 4 * h:12 + 4 * h] @ projected[0, 4 * h:4 * h + 4] / 2).softmax(0)
                    for h in range(2)]
                torch.testing.assert_close(row, sum(per_head) / 2)


@pytest.mark.parametrize('autocast', [False, True])
def test_attention_maps_are_wide_and_sum_to_one(autocast):
    head = MLDecoder(6, 25, 6, embed_dim=8, dtype=torch.float32 if autocast else torch.bfloat16)
    features = torch.randn(2, 9, 6, dtype=head.embed.weight.dtype)
    with torch.autocast('cpu', enabled=autocast):
        maps = head.attention_maps(features)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(2), torch.ones(2, 25))
    assert head.attention_maps(features, []).shape == (2, 0, 9)


@pytest.mark.parametrize('classes, error, words', [
    ([0, 5], ValueError, r'classes must be in \[0, 5\), got 5'),
    ([-1], ValueError, r'classes must be in \[0, 5\), got -1'),
    ([1.0], TypeError, 'classes must be indices, got 1.0 of type float'),
    ([True], TypeError, 'classes must be indices, got True of type bool'),
])
def test_maps_of_unknown_classes_are_refused(classes, error, words):
    with pytest.raises(error, match=words):
        MLDecoder(6, 5, embed_dim=8).attention_maps(torch.zeros(1, 9, 6), classes)


def test_shared_query_dropout_draws_one_query_mask_for_the_batch():
    torch.manual_seed(0)
    head = MLDecoder(6, 5, embed_dim=8, drop_rate=0.5, shared_query_dropout=True, dtype=torch.float64)
    seen = []
    head.decoder.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    head(torch.randn(3, 9, 6, dtype=torch.float64))
    head.decoder.shared_query_dropout = False
    head(torch.randn(3, 9, 6, dtype=torch.float64))
    assert [len(x) for x in seen] == [1, 3]


@pytest.mark.parametrize('shape, words', [
    ((2, 6), r'features must be a map \(B, D, H, W\) or tokens \(B, N, D\), got 2 dimensions'),
    ((2, 5, 3, 3), 'features must have 6 channels, got 5'),
    ((2, 9, 7), 'features must have 6 channels, got 7'),
    ((2, 0, 6), 'features must have at least one position'),
])
def test_wrong_features_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        MLDecoder(6, 5, embed_dim=8)(torch.zeros(shape))


def test_empty_batch_gives_empty_logits():
    assert MLDecoder(6, 5, embed_dim=8)(torch.zeros(0, 9, 6)).shape == (0, 5)
