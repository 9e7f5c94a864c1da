"""Features that are no single map: those of several branches, and patches of which some are padding."""
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from timm_miil.heads import MLDecoder, attach_head
from timm_miil.heads._features import join_branches
from timm_miil.heads.ml_decoder import flatten_features

SMALL_HEAD = partial(MLDecoder, embed_dim=16, num_heads=2, feedforward_dim=16)
BRANCHES = {  # layout, widths, lengths with prefix tokens, prefix tokens, at 224 or 240 pixels
    'crossvit_9_240': ('NLC', (128, 256), (401, 197), 1),
    'coat_tiny': ('NLC', (152, 152, 152), (785, 197, 50), 1),
    'efficientvim_m1': ('NCL', (128, 192, 320, 320), (49, 25, 9, 16), 0),
}


def naflex(**kwargs):
    return timm.create_model('naflexvit_base_patch16_gap', embed_dim=32, depth=2, num_heads=2, **kwargs)


def gemma(**kwargs):
    return timm.create_model(
        'gemma4_vit_167m', embed_dim=32, depth=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=32,
        **kwargs)


def patches_of(image, px=16):
    """What NaFlex takes of an image (3, H, W): flat patches (N, px * px * 3) row by row, and where they lie (N, 2)."""
    rows, columns = image.shape[1] // px, image.shape[2] // px
    cells = [(y, x) for y in range(rows) for x in range(columns)]
    flat = [image[:, y * px:(y + 1) * px, x * px:(x + 1) * px].permute(1, 2, 0).flatten() for y, x in cells]
    return torch.stack(flat), torch.tensor(cells)


def batch_of(images, length):
    """A batch of images of any size, padded with noise to `length` patches."""
    batch = {
        'patches': torch.randn(len(images), length, 16 * 16 * 3),
        'patch_coord': torch.zeros(len(images), length, 2, dtype=torch.int64),
        'patch_valid': torch.zeros(len(images), length, dtype=torch.bool),
        'seq_len': length,  # the loader's
    }
    for index, image in enumerate(images):
        flat, coord = patches_of(image)
        batch['patches'][index, :len(flat)] = flat
        batch['patch_coord'][index, :len(flat)] = coord
        batch['patch_valid'][index, :len(flat)] = True
    return batch


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_linear_layer_over_joined_branches_is_one_for_each(shapes):
    branches = [torch.randn(2, length, width, dtype=torch.float64) for length, width in shapes]
    widths = [width for _, width in shapes]
    weight, bias = torch.randn(3, sum(widths), dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    each = [F.linear(x, part, bias) for x, part in zip(branches, weight.split(widths, dim=1))]
    torch.testing.assert_close(F.linear(join_branches(branches), weight, bias), torch.cat(each, dim=1))


@pytest.mark.parametrize('name', BRANCHES)
def test_the_head_reads_all_branches(name):
    layout, widths, lengths, prefix = BRANCHES[name]
    model = attach_head(timm.create_model(name, device='meta'), 20, SMALL_HEAD)
    assert (model.layout, model.num_features, model.num_prefix_tokens) == (layout, sum(widths), prefix)
    size = timm.models.get_model_input_config(model.backbone)['input_size']
    features = model.forward_features(torch.empty(2, *size, device='meta'))
    assert model.head_input(features).shape == (2, sum(lengths), sum(widths))
    logits = model(torch.empty(2, *size, device='meta'))
    assert logits.shape == (2, 20)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None for grad in torch.autograd.grad(logits.sum(), trained, allow_unused=True))
    with pytest.raises(ValueError, match='features must be a tensor, got a list: those of several branches'):
        model.token_grid(features, size[1:])


@pytest.mark.parametrize('name', [
    *BRANCHES, *(pytest.param(name, marks=pytest.mark.slow)  # two seconds each
                 for name in ('gemma4_vit_167m_enc', 'deepseek_vit_412m_enc'))])
def test_the_generic_entry_point_takes_branches_and_bare_encoders(name):
    model = timm.create_model('mldecoder', backbone=name, num_classes=20, device='meta')
    size = timm.models.get_model_input_config(model.backbone)['input_size']
    assert model(torch.empty(2, *size, device='meta')).shape == (2, 20)


def test_branches_survive_a_saved_folder(tmp_path):
    torch.manual_seed(0)
    small = dict(embed_dim=16, num_heads=2, feedforward_dim=16)
    model = timm.create_model('mldecoder', backbone='efficientvim_m1', num_classes=4, **small).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize('name', ['crossvit_9_240', 'efficientvim_m1'])
def test_branches_are_pooled_as_timm_pools_them(name):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 240, 240)
    backbone = timm.create_model(name, num_classes=0, global_pool='avg').eval()
    with torch.no_grad():
        want = backbone(images)
        model = attach_head(backbone, 0, SMALL_HEAD)
        torch.testing.assert_close(model(images), want)
        model.reset_classifier(3)
        torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), want)
        model.reset_classifier(0, '')
        assert model(images).shape == (2, *model.head_input(model.forward_features(images)).shape[1:])


@pytest.mark.parametrize('name, size, prefix', [
    ('volo_d1_224', 224, 1), ('coat_lite_tiny', 224, 1),  # do not tell
    ('naflexvit_base_patch16_gap', 224, 4), ('pit_ti_distilled_224', 224, 0),  # class tokens only
])
def test_prefix_tokens_are_found(name, size, prefix):
    assert attach_head(timm.create_model(name, device='meta'), 2, SMALL_HEAD).num_prefix_tokens == prefix


@pytest.mark.parametrize('name, layout', [('resnet10t', 'NCHW'), ('mambaout_femto', 'NHWC'), ('mixer_s32_224', 'NLC')])
def test_features_are_not_copied_on_their_way_to_the_head(name, layout):
    model = attach_head(timm.create_model(name), 2, SMALL_HEAD)
    features = model.forward_features(torch.rand(1, 3, 224, 224))
    assert model.layout == layout
    read = model.head_input(features)
    assert read.shape[1 if read.ndim == 4 else 2] == model.num_features
    assert read.ndim == features.ndim  # a map stays one: Query2Label encodes where its positions lie
    if layout != 'NCHW':  # tokens of one row behind the other, and so of a map that has its channels last
        read = flatten_features(read, model.num_features)
        assert read.is_contiguous()
    assert read.data_ptr() == features.data_ptr()


@pytest.mark.parametrize('backbone', [naflex, gemma])  # gives the mask with its tokens, or not
@pytest.mark.parametrize('num_classes', [5, 0])
def test_padding_is_not_read(backbone, num_classes):
    torch.manual_seed(0)
    model = attach_head(backbone(), num_classes, SMALL_HEAD).eval()
    images = [torch.randn(3, *size) for size in ((48, 96), (48, 48), (96, 48), (96, 96), (48, 96))]
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        together = model(batch_of(images, length=40))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone[0], alone[4])
        features = model.forward_features(batch_of(images, length=40))
    with pytest.raises(ValueError, match='features must be a tensor, got a dict'):
        model.token_grid(features, (48, 96))


def test_padding_gets_no_gradient_and_every_weight_does():
    model = attach_head(naflex(), 5, SMALL_HEAD)
    batch = batch_of([torch.randn(3, 32, 48), torch.randn(3, 48, 48)], length=12)
    batch['patches'].requires_grad_()
    model(batch).square().sum().backward()
    assert not batch['patches'].grad[~batch['patch_valid']].any()
    assert batch['patches'].grad[batch['patch_valid']].any(1).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_patch_dropout_takes_the_mask_along():
    model = attach_head(naflex(patch_drop_rate=0.5), 5, SMALL_HEAD).train()
    batch = batch_of([torch.randn(3, 32, 48), torch.randn(3, 48, 48)], length=12)
    features = model.forward_features(batch)
    assert features['patches'].shape[1] - model.num_prefix_tokens == features['patch_valid'].shape[1] < 12
    assert model(batch).shape == (2, 5)


def test_patches_for_a_backbone_that_takes_images_are_refused():
    batch = batch_of([torch.randn(3, 48, 48)], length=9)
    model = attach_head(timm.create_model('resnet10t', device='meta'), 5, SMALL_HEAD)
    with pytest.raises(TypeError, match=r'x must be images \(B, 3, H, W\), got a dict; ResNet takes no patches'):
        model(batch)


def test_patches_without_a_mask_are_all_valid_and_without_the_rest_refused():
    torch.manual_seed(0)
    model = attach_head(naflex(), 5, SMALL_HEAD).eval()
    batch = batch_of([torch.randn(3, 48, 64), torch.randn(3, 48, 64)], length=12)
    del batch['seq_len']
    with torch.no_grad():
        want = model(batch)
        batch['patch_valid'] = batch['patch_valid'].long()  # as timm takes it
        torch.testing.assert_close(model(batch), want)
        del batch['patch_valid']
        torch.testing.assert_close(model(batch), want)
    with pytest.raises(ValueError, match="x must have 'patch_coord', got a dict of patches"):
        model({'patches': batch['patches']})
    with pytest.raises(ValueError, match="x must have 'patches' and 'patch_coord', got a dict of nothing"):
        model({})


def test_patches_that_are_merged_are_refused():
    model = attach_head(gemma(encoder_pool='soft'), 5, SMALL_HEAD).eval()
    batch = batch_of([torch.rand(3, 96, 96)], length=36)
    with pytest.raises(ValueError, match='one token each, got .* tokens from 36 patches; Gemma4VitClassifier merges'):
        model(batch)
