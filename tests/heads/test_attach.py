"""A head on any timm backbone: what is found by looking, what is taken out, and clear errors."""
import math
import re
from functools import partial

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn

from timm_miil.heads import BackboneWithHead, MLDecoder, ZeroShotMLDecoder, attach_head
from timm_miil.heads._grid import find_grid
from timm_miil.heads._groups import prefixed

SMALL_HEAD = partial(MLDecoder, embed_dim=16, feedforward_dim=16)
KINDS = {
    'resnet10t': ('NCHW', 512, 64),
    'tresnet_m': ('NCHW', 2048, 64),
    'convnext_atto': ('NCHW', 320, 64),
    'mobilenetv3_small_050': ('NCHW', 288, 64),
    'efficientformerv2_s0': ('NCHW', 176, 224),
    'swin_tiny_patch4_window7_224': ('NHWC', 768, 224),
    'mambaout_femto': ('NHWC', 288, 64),
    'vit_tiny_patch16_224': ('NLC', 192, 224),
    'deit3_small_patch16_224': ('NLC', 384, 224),
    'mixer_s32_224': ('NLC', 512, 224),
    'vit_pe_core_tiny_patch16_384': ('NLC', 192, 384),  # attention pooling
}


@pytest.mark.parametrize('name, layout, channels, px', [(name, *facts) for name, facts in KINDS.items()])
@pytest.mark.parametrize('training', [pytest.param(False, marks=pytest.mark.slow), True])
def test_each_kind_of_backbone_carries_the_head(name, layout, channels, px, training):
    model = attach_head(timm.create_model(name, device='meta').train(training), 20, SMALL_HEAD)
    assert (model.layout, model.num_features) == (layout, channels)
    assert model.training == training
    logits = model(torch.empty(2, 3, px, px, device='meta'))
    assert logits.shape == (2, 20)
    grads = torch.autograd.grad(logits.sum(), list(model.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)


def test_channels_come_from_the_features_not_from_what_is_claimed():
    backbone = timm.create_model('resnet10t')
    backbone.num_features = 7
    assert attach_head(backbone, 20, SMALL_HEAD).num_features == 512


def test_weights_of_the_backbone_stay_and_the_dead_ones_go():
    backbone = timm.create_model('mobilenetv3_small_050')
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    model = attach_head(backbone, 20, SMALL_HEAD)
    after = backbone.state_dict()
    assert model.backbone is backbone
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert {key.partition('.')[0] for key in before.keys() - after.keys()} == {'conv_head', 'classifier'}


def test_nothing_is_run_on_the_weights_themselves():
    backbone = timm.create_model('levit_128s').train()  # caches tensors in evaluation mode
    statistics = backbone.stem.conv1.bn.running_mean.clone()
    attach_head(backbone, 20, SMALL_HEAD)
    assert torch.equal(backbone.stem.conv1.bn.running_mean, statistics)
    assert all(tensor.device.type == 'cpu' for tensor in backbone.state_dict().values())
    assert backbone.eval().forward_features(torch.rand(1, 3, 224, 224)).device.type == 'cpu'


@pytest.mark.parametrize('name, prefix', [('vit_tiny_patch16_224', 1), ('deit_tiny_distilled_patch16_224', 2)])
def test_head_reads_prefix_tokens_and_the_pool_does_not(name, prefix):
    model = attach_head(timm.create_model(name), 20, SMALL_HEAD).eval()
    tokens = torch.rand(1, 196 + prefix, 192)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, prefix:].mean(1))
    other = tokens.clone()
    other[:, 0] += 1
    assert not torch.allclose(model.forward_head(tokens), model.forward_head(other))


def test_nhwc_maps_are_read_as_their_transposed_nchw():
    model = attach_head(timm.create_model('mambaout_femto'), 20, SMALL_HEAD).eval()
    features = torch.rand(2, 3, 4, 288)
    torch.testing.assert_close(model.forward_head(features), model.head(features.permute(0, 3, 1, 2)))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)))


@given(
    st.integers(32, 700), st.integers(32, 700), st.integers(4, 32), st.sampled_from([math.floor, math.ceil]))
@settings(max_examples=40, deadline=None)
def test_the_grid_of_any_stride_is_found(height, width, stride, rounded):
    grid = rounded(height / stride), rounded(width / stride)
    assert find_grid(grid[0] * grid[1], (height, width)) == grid


def test_no_grid_is_made_up():
    assert find_grid(197, (224, 224)) is None  # 14 * 14 and a prefix token
    assert find_grid(2, (224, 224)) is None
    assert find_grid(0, (224, 224)) is None


@pytest.mark.parametrize('name, size, grid', [
    ('resnet10t', (64, 96), (2, 3)),
    ('mambaout_femto', (64, 96), (2, 3)),
    ('deit_tiny_distilled_patch16_224', (224, 224), (14, 14)),
    ('mixer_s32_224', (224, 224), (7, 7)),
    ('twins_pcpvt_small', (224, 288), (7, 9)),       # no patch_embed
    ('levit_128s', (224, 224), (4, 4)),              # 14 halved twice
])
def test_tokens_lie_on_a_grid(name, size, grid):
    model = attach_head(timm.create_model(name, device='meta'), 5, SMALL_HEAD)
    features = model.forward_features(torch.empty(2, 3, *size, device='meta'))
    assert model.token_grid(features, size) == grid


def test_grid_of_any_picture_and_of_patches_that_are_not_square():
    backbone = timm.create_model('vit_tiny_patch16_224', dynamic_img_size=True, dynamic_img_pad=True, device='meta')
    model = attach_head(backbone, 5, SMALL_HEAD)
    features = model.forward_features(torch.empty(1, 3, 100, 330, device='meta'))
    assert model.token_grid(features, (100, 330)) == (7, 21)
    with pytest.raises(ValueError, match=r'image_size .* got \(224, 224\), which no grid of 147 positions covers'):
        model.token_grid(features, (224, 224))
    with pytest.raises(ValueError, match='height must be at least 1, got 0'):
        model.token_grid(features, (0, 224))
    with pytest.raises(TypeError, match='width must be an int, got float 330.0'):
        model.token_grid(features, (100, 330.0))
    backbone = timm.create_model('vit_tiny_patch16_224', patch_size=(32, 16), device='meta')
    model = attach_head(backbone, 5, SMALL_HEAD)
    assert model.token_grid(torch.empty(1, 99, 192, device='meta'), (224, 224)) == (7, 14)


def test_head_follows_the_backbones_dtype():
    model = attach_head(timm.create_model('resnet10t', dtype=torch.bfloat16), 20, SMALL_HEAD)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_any_head_will_do():
    class Pooled(nn.Linear):
        def __init__(self, in_features, num_classes, device, dtype):
            super().__init__(in_features, num_classes, device=device, dtype=dtype)

        def forward(self, x):
            return super().forward(x.mean((2, 3)))

    model = attach_head(timm.create_model('resnet10t'), 20, Pooled)
    model.reset_classifier(5)  # a head without reset_classes is built anew
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_reset_classifier_keeps_the_decoder():
    model = attach_head(timm.create_model('resnet10t'), 20, SMALL_HEAD)
    embed = model.head.embed.weight.clone()
    model.reset_classifier(7)
    assert torch.equal(model.head.embed.weight, embed)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', '', got 'max'"):
        model.reset_classifier(7, 'max')
    with pytest.raises(ValueError, match='num_classes must be at least 0, got -1'):
        model.reset_classifier(-1)
    with pytest.raises(TypeError, match='num_classes must be an int, got NoneType None'):
        model.reset_classifier(None)
    assert model.head.num_classes == 7


@pytest.mark.parametrize('pattern, name, found', [
    (r'^blocks\.(\d+)', 'backbone.blocks.3.weight', ('3',)),
    (r'^a|^b', 'backbone.b', ()),
    (r'^stem[^x]', 'backbone.stemy', ()),
    (r'blocks\.(\d+)', 'backbone.blocks.3.weight', ('3',)),
])
def test_group_patterns_move_below_the_prefix(pattern, name, found):
    match = re.match(prefixed(pattern), name)
    assert match is not None and match.groups() == found
    assert re.match(prefixed(pattern), name.removeprefix('backbone.')) is None
    nested = [(pattern, None), (pattern, (99,))]
    assert prefixed(nested) == [(prefixed(pattern), None), (prefixed(pattern), (99,))]


def test_what_is_no_timm_model_is_refused():
    with pytest.raises(TypeError, match='backbone must be a timm image model, got Linear without forward_features'):
        attach_head(nn.Linear(2, 2), 20)
    with pytest.raises(TypeError, match='got FeatureListNet without .* without features_only'):
        attach_head(timm.create_model('resnet10t', features_only=True, device='meta'), 20)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', '', got 'token'"):
        BackboneWithHead(timm.create_model('resnet10t', device='meta'), 20, SMALL_HEAD, global_pool='token')


@pytest.mark.parametrize('outputs, got', [
    (lambda x: x.mean((2, 3)), r'\(2, 3\)'),
    (lambda x: [x, x.flatten(2)], r'\(2, 3, 224, 224\), \(2, 3, 50176\)'),
    (lambda x: {'map': x}, 'dict'),
    (lambda x: [], 'an empty list'),
])
def test_what_is_neither_maps_nor_tokens_is_refused(outputs, got):
    class Odd(nn.Conv2d):
        def forward_features(self, x):
            return outputs(self(x))

    with pytest.raises(ValueError, match=rf'forward_features of Odd must give a map .*, got {got}; this backbone'):
        attach_head(Odd(3, 3, 1), 20)


def test_wrong_heads_and_classes_leave_the_model_as_it_was():
    backbone = timm.create_model('resnet10t', device='meta')
    with pytest.raises(ValueError, match='num_classes must be at least 0, got -1'):
        attach_head(backbone, -1)
    with pytest.raises(TypeError, match='num_classes must be an int, got float 2.0'):
        attach_head(backbone, 2.0)
    with pytest.raises(TypeError, match=r"head must be a class or function, got 'csra'; .*\.partial\(create_head"):
        attach_head(backbone, 20, 'csra')
    for head in (ZeroShotMLDecoder, partial(ZeroShotMLDecoder, text_dim=50)):
        with pytest.raises(TypeError, match=re.escape(
                "head must take in_features, num_classes, device and dtype; ZeroShotMLDecoder got an unexpected "
                "keyword argument 'num_classes': its labels are queries, so take "
                "timm.create_model('mldecoder_zero_shot', backbone=..., labels=[...])")):
            attach_head(backbone, 5, head)
    with pytest.raises(TypeError, match="; Linear missing a required argument: 'out_features': wrap it in a func"):
        attach_head(backbone, 5, nn.Linear)
    assert backbone.num_classes == backbone.fc.out_features == 1000


@pytest.mark.parametrize('name', ['resnet10t', 'mambaout_femto', 'vit_tiny_patch16_224', 'efficientvim_m1'])
def test_a_model_that_has_a_head_gets_another(name):
    once = attach_head(timm.create_model(name, device='meta'), 5, SMALL_HEAD)
    twice = attach_head(once, 7, SMALL_HEAD)
    for fact in ('layout', 'output_fmt', 'num_features', 'num_prefix_tokens'):
        assert getattr(twice, fact) == getattr(once, fact)
    assert twice(torch.empty(2, 3, 224, 224, device='meta')).shape == (2, 7)
    assert once.num_classes == 0


def test_a_backbone_that_fails_on_its_input_is_refused_with_the_reason():
    class Infrared(nn.Conv2d):
        def forward_features(self, x):
            return self(x)

    words = r'forward_features of Infrared must take images \(2, 3, 224, 224\), .* got: .*channel'
    with pytest.raises(ValueError, match=words):
        attach_head(Infrared(4, 3, 1), 20)


def test_unknown_backbones_are_refused_with_the_nearest_name():
    words = "backbone must be the name of a registered timm model, got 'resnet5O'; did you mean"
    with pytest.raises(ValueError, match=words):
        timm.create_model('mldecoder', backbone='resnet5O')
    with pytest.raises(ValueError, match='got .hf-hub:someone/model'):
        timm.create_model('mldecoder', backbone='hf-hub:someone/model')


@pytest.mark.parametrize('name', [
    'resnet10t', 'vit_tiny_patch16_224',                  # patterns
    'cait_xxs24_224', 'inception_v3',                     # a function
    'pit_ti_224', 'poolformer_s12', 'caformer_s18',       # none
])
def test_layer_decay_has_rising_scales_with_the_head_last(name):
    model = attach_head(timm.create_model(name, device='meta'), 5, SMALL_HEAD)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(parameter): group['lr_scale'] for group in groups for parameter in group['params']}
    assert len(scale) == len(list(model.parameters()))
    by_name = [(key, scale[id(parameter)]) for key, parameter in model.named_parameters()]
    assert {value for key, value in by_name if key.startswith('head.')} == {1.0}
    first = min(value for key, value in by_name)
    assert first < 0.1 and by_name[0][1] <= 4 * first


def test_creation_in_inference_mode():
    with torch.inference_mode():
        model = attach_head(timm.create_model('resnet10t'), 5, SMALL_HEAD).eval()
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)


def test_configuration_is_a_copy_that_names_what_is_there():
    backbone = timm.create_model('resnet10t')
    before = dict(backbone.pretrained_cfg)
    model = attach_head(backbone, 5, SMALL_HEAD)
    assert backbone.pretrained_cfg == before
    cfg = model.default_cfg
    assert (cfg['num_classes'], cfg['first_conv']) == (5, ('backbone.conv1.0',))
    assert cfg['architecture'] == 'attach_head(resnet10t)'
    assert cfg['mean'] == before['mean']
