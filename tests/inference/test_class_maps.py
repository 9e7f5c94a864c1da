"""Class maps against torch's own attention and Grad-CAM written out, on every layout; the model stays as it was."""
import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_miil._errors import PredictionError
from timm_miil.heads import CSRA, GAPHead, MLDecoder, attach_head
from timm_miil.inference import METHODS, class_maps

SIZES = {'embed_dim': 32, 'num_heads': 4, 'feedforward_dim': 48}


def small(name: str, head=None, num_classes: int = 6, **kwargs) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
        if head is not None:
            model = attach_head(model, num_classes, head)
        for parameter in model.get_classifier().parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter)  # timm's heads begin near 0
    return model.eval()


def ml_decoder(in_features, num_classes, **kwargs):
    return MLDecoder(in_features, num_classes, **SIZES, **kwargs)


def two_queries(in_features, num_classes, **kwargs):
    return MLDecoder(in_features, num_classes, num_groups=2, **SIZES, **kwargs)


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """From the least value to 0, as the package does, and to a sum of 1."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-30)


# -- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, size, grid', [
    ('test_resnet', (96, 64), (3, 2)), ('test_mambaout', (64, 128), (2, 4)), ('test_vit', (160, 160), (10, 10))])
def test_attention_is_that_of_torchs_layer(name, size, grid):
    model, images = small(name, ml_decoder), pictures(2, *size)
    head, attn = model.head, model.head.decoder.attn
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    layer.load_state_dict(attn.state_dict())
    with torch.no_grad():
        features = model.forward_features(images)
        if name == 'test_resnet':
            tokens = features.permute(0, 2, 3, 1).reshape(2, -1, features.shape[1])
        else:
            tokens = features.reshape(2, -1, features.shape[-1])
        memory = F.relu(head.embed(tokens))
        query = head.decoder.norm1(2 * head.query_embed).expand(2, -1, -1)
        _, want = layer(query, memory, memory, need_weights=True)
    want = want[:, :, model.num_prefix_tokens:]
    got = class_maps(model, images, [4, 0, 4])
    assert got.shape == (2, 3, *grid) and got.dtype == torch.float32
    want = (want / want.sum(2, keepdim=True))[:, [4, 0, 4]].unflatten(2, grid)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got[0], got[1], atol=1e-4) and not torch.allclose(got[:, 0], got[:, 1], atol=1e-4)


def test_classes_of_one_query_share_attention_but_not_layer_cam():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small('test_resnet', two_queries), pictures(1, 96, 96)
    attention, cam = class_maps(model, images, range(6)), class_maps(model, images, range(6), method='layer_cam')
    assert torch.equal(attention[:, 0], attention[:, 2]) and not torch.equal(attention[:, 2], attention[:, 3])
    assert not torch.allclose(cam[:, 0], cam[:, 2])


def test_a_head_of_another_kind_that_attends():
    model = small('test_resnet', CSRA)
    images = pictures(2, 96, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        want = model.head.attention_maps(features, [1]).unflatten(2, (3, 2))
    torch.testing.assert_close(class_maps(model, images, [1]), want)


def test_a_label_set_given_by_name():
    model = timm.create_model('mldecoder_zero_shot', backbone='test_resnet', labels=['red 7', 'digit 7'], **SIZES)
    maps = class_maps(model, pictures(1, 96, 64), [0, 1])
    assert maps.shape == (1, 2, 3, 2) and not torch.equal(maps[0, 0], maps[0, 1])


# -- class activation maps -------------------------------------------------------------------------------------


def evidence(features: torch.Tensor, gradient: torch.Tensor, method: str) -> torch.Tensor:
    """Grad-CAM, arXiv:1610.02391, Eq. 1 and 2; LayerCAM, Eq. 4 and 5. Maps (B, h, w) of (B, D, h, w)."""
    maps = torch.zeros(len(features), *features.shape[2:])
    for picture, grad, found in zip(features, gradient, maps):
        for channel in range(len(picture)):
            weight = grad[channel].mean() if method == 'grad_cam' else grad[channel].clamp(min=0)
            found += weight * picture[channel]
    return maps.clamp(min=0)


@pytest.mark.parametrize('method', ['grad_cam', 'layer_cam'])
@pytest.mark.parametrize('name, head', [
    ('test_resnet', None), ('test_mambaout', None), ('test_vit_relpos', None), ('test_resnet', GAPHead),
    ('test_vit', GAPHead), ('test_resnet', ml_decoder)])
def test_grad_cam_is_what_the_papers_say(name, head, method):
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images, classes = small(name, head), pictures(2, 160, 160), [5, 0, 2]
    features = model.forward_features(images).detach().requires_grad_()
    logits = model.forward_head(features)
    want = []
    for index in classes:
        [gradient] = torch.autograd.grad(logits[:, index].sum(), features, retain_graph=True)
        both = [features.detach(), gradient]
        if features.ndim == 3:
            both = [x[:, -100:].transpose(1, 2).unflatten(2, (10, 10)) for x in both]
        elif name == 'test_mambaout':
            both = [x.permute(0, 3, 1, 2) for x in both]
        want.append(scaled(evidence(*both, method)))
    got = class_maps(model, images, classes, method=method)
    torch.testing.assert_close(got, torch.stack(want, dim=1), rtol=1e-3, atol=1e-5)
    assert (got.sum((2, 3)) > 0.99).any()


def test_where_only_the_class_token_is_read_the_level_before_counts():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small('test_vit'), pictures(2, 160, 160)
    kept = []
    handle = model.blocks[-2].register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images)
    handle.remove()
    [gradient] = torch.autograd.grad(logits[:, 3].sum(), kept)
    both = [x.detach()[:, 1:].transpose(1, 2).unflatten(2, (10, 10)) for x in (kept[0], gradient)]
    got = class_maps(model, images, [3], method='layer_cam')
    torch.testing.assert_close(got[:, 0], scaled(evidence(*both, 'layer_cam')), rtol=1e-3, atol=1e-5)
    assert (got.sum((2, 3)) > 0.99).all() and not model.blocks[-2]._forward_hooks


def test_more_classes_than_one_pass_takes():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small('test_resnet', num_classes=40), pictures(2, 96, 96)
    every = class_maps(model, images, range(40))
    assert every.shape == (2, 40, 3, 3)
    torch.testing.assert_close(every[:, [39, 3]], class_maps(model, images, [39, 3]))


# -- what holds for all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
def test_maps_are_shares(method):
    if method != 'attention':
        pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    maps = class_maps(small('test_resnet', ml_decoder), pictures(3, 64, 96), range(6), method=method)
    assert maps.shape == (3, 6, 2, 3) and (maps >= 0).all()
    totals = maps.sum((2, 3))
    assert ((totals - 1).abs() < 1e-5).any() and ((totals == 0) | ((totals - 1).abs() < 1e-5)).all()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('around', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_model_stays_as_it_was(method, around):
    if method != 'attention':
        pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model = small('test_resnet', ml_decoder).train()
    model.backbone.layer1.eval()
    frozen, parameter = next(model.named_parameters())
    parameter.requires_grad_(False)
    images = pictures(2, 96, 96)
    model(images).sum().backward()
    before, grads = copy.deepcopy(model), [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    with around():
        maps = class_maps(model, images, [1], method=method)
    assert not maps.requires_grad and torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert sum(grad is not None for grad in grads) > 20
    for (name, now), then, grad in zip(model.named_parameters(), before.parameters(), grads):
        assert torch.equal(now, then) and now.requires_grad == (name != frozen)
        assert now.grad is None if grad is None else torch.equal(now.grad, grad)
    assert all(map(torch.equal, model.buffers(), before.buffers()))
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(class_maps(model.eval(), images, [1], method=method), maps)


@pytest.mark.parametrize('method', METHODS)
def test_half_precision(method):
    if method != 'attention':
        pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small('test_resnet', ml_decoder if method == 'attention' else None), pictures(1, 96, 96)
    want = class_maps(model, images, [2, 3], method=method)
    got = class_maps(model.to(torch.bfloat16), images, [2, 3], method=method)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.2, atol=0.02)


def test_a_model_of_other_channels_has_maps():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model = small('test_resnet', in_chans=1)
    assert class_maps(model, pictures(2, 64, 64)[:, :1], [3]).shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match=r'^images must have the 1 channels of the model, got shape \(2, 3, 64, 64\)'):
        class_maps(model, pictures(2, 64, 64), [3])


@pytest.mark.parametrize('head, method', [(ml_decoder, 'attention'), (None, 'grad_cam'), (None, 'layer_cam')])
def test_a_compiled_model_has_the_maps_of_its_own(head, method):
    if method != 'attention':
        pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small('test_resnet', head), pictures(1, 64, 64)
    want = class_maps(model, images, [3, 1], method=method)
    assert torch.equal(class_maps(torch.compile(model, backend='eager'), images, [3, 1], method=method), want)


def test_no_classes_give_no_maps():
    assert class_maps(small('test_resnet', ml_decoder), pictures(1, 96, 96), []).shape == (1, 0, 3, 3)


@pytest.mark.parametrize('change, error, words', [
    ({'method': 'cam'}, ValueError, "^method must be one of 'attention', 'grad_cam', 'layer_cam', got 'cam'"),
    ({'method': 'attention'}, ValueError, "^method 'attention' is for heads that attend, such as MLDecoder; ResNet"),
    ({'model': nn.Linear(2, 2)}, TypeError, r'^model must be a timm model, got Linear without forward_features\(\)'),
    ({'images': torch.zeros(3, 8, 8)}, ValueError, r'^images must have 4 dimensions, got shape \(3, 8, 8\)'),
    ({'images': torch.zeros(1, 1, 8, 8)}, ValueError, '^images must have the 3 channels of the model, got shape'),
    ({'classes': [6]}, ValueError, r'^classes must be in \[0, 6\), got 6'),
    ({'classes': ['cat']}, TypeError, "^classes must be ints, got str 'cat'"),
])
def test_wrong_use_is_told(change, error, words):
    given = {'model': small('test_resnet'), 'images': pictures(1, 64, 64), 'classes': [0], 'method': None} | change
    with pytest.raises(error, match=words):
        class_maps(given.pop('model'), given.pop('images'), given.pop('classes'), **given)


class Pooled(nn.Module):
    """A network whose features have no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 2
        self.fc = nn.Linear(3, 2)

    def forward_features(self, x):
        return x.mean((2, 3))


def test_a_model_without_positions_is_told():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    with pytest.raises(PredictionError, match=r'^Pooled gives no single map of features, got \(1, 3\)'):
        class_maps(Pooled(), pictures(1, 8, 8), [0], method='grad_cam')


def test_values_that_are_not_finite_are_told():
    model = small('test_resnet', ml_decoder)
    with torch.no_grad():
        model.head.embed.bias.fill_(float('nan'))
    with pytest.raises(PredictionError, match='^the model gives maps that are not finite'):
        class_maps(model, pictures(1, 64, 64), [0])


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(ImportError, match=r'^pytorch_grad_cam is needed here .* pip install "timm-miil\[explain\]"'):
        class_maps(small('test_resnet'), pictures(1, 64, 64), [0])


@pytest.mark.parametrize('name', ['cait_xxs24_224', 'xcit_nano_12_p16_224', 'tnt_s_legacy_patch16_224'])
def test_where_the_class_token_joins_late_or_pixels_come_along(name):
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model, images = small(name, img_size=64, **({'depth': 2} if name[0] != 'x' else {})), pictures(2, 64, 64)
    for parameter in model.parameters():  # the scales of residual branches begin near 0
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
    name = model.feature_info[-1]['module'] if name[0] != 't' else 'blocks.0'
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images)
    handle.remove()
    tokens = kept[0][-1] if isinstance(kept[0], tuple) else kept[0]
    [gradient] = torch.autograd.grad(logits[:, 3].sum(), tokens)
    both = [x.detach()[:, -16:].transpose(1, 2).unflatten(2, (4, 4)) for x in (tokens, gradient)]
    got = class_maps(model, images, [3], method='layer_cam')
    torch.testing.assert_close(got[:, 0], scaled(evidence(*both, 'layer_cam')), rtol=1e-3, atol=1e-5)
    assert (got.sum((2, 3)) > 0.99).all()


def test_logits_of_no_positions_are_told():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model = small('test_resnet')
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(PredictionError, match=r'^ResNet gives logits that depend on none .* take attach_head\(model'):
        class_maps(model, pictures(1, 64, 64), [0])


def test_a_grid_that_the_tokens_do_not_lie_on_is_told():
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    model = small('coat_lite_tiny')  # it says nothing of its class token
    with pytest.raises(PredictionError, match=r'CoaT gives 50 tokens, which are not its grid of 7 x 7; .* attach_head'):
        class_maps(model, pictures(1, 224, 224), [0])


def test_one_token_is_no_map():
    model = attach_head(timm.create_model('pit_ti_224'), 6, ml_decoder)
    with pytest.raises(PredictionError, match=r'got the one token \(1, 1, 256\): PoolingVisionTransformer may'):
        class_maps(model, pictures(1, 224, 224), [0])
