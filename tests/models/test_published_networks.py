"""The networks that timm lacks: their blocks, and their files by `pretrained=True`, in the layout of their authors."""
import csv
import warnings
from random import Random

import original_layouts
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.levit import Levit, LevitDistilled
from torch import nn

from timm_miil import catalog
from timm_miil._errors import CatalogError, CheckpointError
from timm_miil.models import load_model
from timm_miil.models._tags import AUTHORS_NAMES, register_authors_names
from timm_miil.models.miil_levit import read_levit_sizes
from timm_miil.models.published import Network, convert_published, identify

SIZES = dict(embed_dim=[24, 40, 72], key_dim=8, depth=[1, 3, 2], num_heads=[2, 5, 6], attn_ratio=[2.5, 1.0, 3.0],
             mlp_ratio=[1.5, 2.0, 1.0])


def published_blocks(arch, fixtures_dir):
    with open(fixtures_dir / 'arch' / 'nas_blocks.csv', encoding='utf-8') as file:
        return [row for row in csv.DictReader(file) if row['arch'] == arch]


@pytest.mark.parametrize('letter', 'abcdef')
def test_binas_is_of_the_published_blocks(letter, fixtures_dir):
    model = timm.create_model(f'miil_binas_{letter}', device='meta')
    rows = published_blocks(f'binas_{letter}', fixtures_dir)
    assert sum(map(len, model.blocks)) == len(rows) > 10
    for row in rows:
        block = model.blocks[int(row['stage'])][int(row['block'])]
        if row['type'] == 'conv_bn_act':
            assert block.conv.out_channels == int(row['out_channels'])
            continue
        depthwise = block.conv_dw
        project = block.conv_pw if row['type'] == 'depthwise_separable' else block.conv_pwl
        assert depthwise.kernel_size[0] == int(row['kernel']) and depthwise.stride[0] == int(row['stride'])
        assert project.out_channels == int(row['out_channels'])
        entry = block.conv_pw if row['type'] == 'inverted_residual' else depthwise
        assert depthwise.out_channels == entry.in_channels * int(row['expand'])
        assert isinstance(block.bn1.act, nn.ReLU if row['act'] == 'relu' else nn.Hardswish)
        assert (float(row['se_ratio']) > 0) == hasattr(block.se, 'conv_reduce')


@pytest.mark.parametrize('name, parameters', [
    ('miil_binas_a', 5_165_144), ('miil_binas_e', 7_681_672), ('miil_ofa_595m', 9_135_928),
    ('miil_sdl_tresnet_m', 33_640_832), ('miil_resnet8x4', 1_233_540), ('miil_resnet32x4', 7_433_860)])
def test_numbers_of_parameters(name, parameters):
    model = timm.create_model(name, device='meta', num_classes=1000) if 'resnet' not in name else timm.create_model(
        name, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_two_layer_head_has_nothing_between_its_layers():
    model = timm.create_model('miil_tresnet_l_bottleneck', num_classes=9605, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == 59_729_317
    model = timm.create_model('miil_tresnet_m_bottleneck', num_classes=5).eval()
    features = torch.randn(2, 2048, 3, 3)
    pooled = features.mean((2, 3))
    embed, last = model.head.embed, model.head.fc
    embedded = pooled @ embed.weight.T + embed.bias
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), embedded)
    torch.testing.assert_close(model.forward_head(features), embedded @ last.weight.T + last.bias)
    assert (embedded < 0).any()


def test_the_smallest_tresnet_is_tresnet_m_with_five_blocks_less():
    small, medium = (
        timm.create_model(name, device='meta').state_dict() for name in ('miil_tresnet_s', 'tresnet_m'))
    gone = [f'body.layer3.{block}.' for block in range(6, 11)]
    kept = {key: tensor.shape for key, tensor in medium.items() if not key.startswith(tuple(gone))}
    assert {key: tensor.shape for key, tensor in small.items()} == kept
    assert len(kept) < len(medium)


def test_every_slope_is_1e_6():
    slopes = {module.negative_slope for module in timm.create_model(
        'miil_tresnet_v2_l_slope1e6', device='meta').modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {1e-6}


@pytest.mark.parametrize('depth', [7, 2, 33])
def test_a_cifar_network_has_a_depth(depth):
    with pytest.raises(ValueError, match=f'depth must be 6n.*got {depth}'):
        timm.create_model('miil_resnet8x4', depth=depth)


# ---- the authors' own names


@pytest.mark.parametrize('name, ours, args', [
    ('ofa_flops_595m_s', 'miil_ofa_595m', {}), ('levit_768', 'miil_levit_768', SIZES)])
def test_the_authors_name_builds_the_network_and_names_ours(name, ours, args):
    assert AUTHORS_NAMES[name] == ours and catalog.named_by_authors(name) == (ours,)
    with pytest.warns(UserWarning, match=f'model name {name} to current {ours}'):
        model = timm.create_model(name, device='meta', **args)
    assert model.pretrained_cfg['architecture'] == ours
    assert name not in timm.list_models() and name not in timm.list_models(name)
    with pytest.raises(CatalogError, match=f"authors' name of {ours}, whose weights are {ours}.miil"):
        catalog.weight(name)


def test_the_authors_name_takes_the_tag_too():
    with pytest.warns(UserWarning, match='to current miil_ofa_595m'):
        model = timm.create_model('ofa_flops_595m_s.miil_in21k', device='meta')
    cfg = model.pretrained_cfg
    assert (cfg['architecture'], cfg['tag'], model.num_classes) == ('miil_ofa_595m', 'miil_in21k', 11221)


def test_an_authors_name_that_timm_has_stays_timms(monkeypatch):
    monkeypatch.setitem(AUTHORS_NAMES, 'resnet18', 'miil_ofa_595m')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        register_authors_names()
        register_authors_names()
        assert type(timm.create_model('resnet18', device='meta')).__name__ == 'ResNet'


def test_other_names_of_the_authors_are_told():
    with pytest.raises(ValueError, match="is called 'resnet8x4'; that is the authors' name of miil_resnet8x4"):
        load_model('resnet8x4')


# ---- LeViT of sizes that only its file tells


@pytest.fixture(scope='module')
def levit():
    """An invented LeViT with weights, as timm builds it."""
    torch.manual_seed(0)
    model = Levit(num_classes=11, **SIZES).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(('weight', 'bias', 'biases', 'running_mean')):
                tensor.normal_(std=0.3)
            elif key.endswith('running_var'):
                tensor.uniform_(0.5, 2)
    return model


@pytest.fixture(scope='module')
def levit_file(levit, tmp_path_factory):
    tables = {'blocks.0.m.attention_bias_idxs': torch.zeros(4, 4, dtype=torch.long),
              'blocks.2.attention_bias_idxs': torch.zeros(4, 4, dtype=torch.long)}
    path = tmp_path_factory.mktemp('levit') / 'levit_768.pth'
    torch.save({'state_dict': original_layouts.levit(levit.state_dict(), SIZES['depth']) | tables}, path)
    return path


@pytest.fixture(scope='module')
def picture():
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_sizes_of_a_levit_are_read_off_its_file(levit, levit_file, picture):
    tensors = torch.load(levit_file)['state_dict']
    assert read_levit_sizes(tensors) == SIZES
    network = identify(tensors, 'miil_levit_768')
    assert network == Network('miil_levit_768', SIZES, 11)
    model = network.build().eval()
    model.load_state_dict(convert_published(tensors, network))
    with torch.no_grad():
        assert torch.equal(model(picture), levit(picture))


def test_a_levit_file_builds_its_network_and_survives_a_folder(levit, levit_file, picture, tmp_path):
    model = timm.create_model(
        'miil_levit_768', pretrained=True, num_classes=11, pretrained_cfg_overlay=dict(file=str(levit_file))).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4).eval()
    with torch.no_grad():
        assert torch.equal(model(picture), levit(picture))
        assert torch.equal(again(picture), levit(picture))
        assert other(picture).shape == (1, 4)
    assert torch.equal(other.stem.conv1.linear.weight, levit.stem.conv1.linear.weight)


@pytest.mark.parametrize('seed', range(8))
def test_any_levit_is_read_off_its_file(seed):
    random = Random(seed)
    stages, key_dim = random.choice([2, 3, 4]), random.choice([4, 8, 16, 32])
    sizes = dict(
        embed_dim=[random.choice([16, 20, 48, 51, 96]) + key_dim * random.randint(0, 3) for _ in range(stages)],
        key_dim=key_dim, depth=[random.randint(1, 4) for _ in range(stages)],
        num_heads=[random.randint(1, 6) for _ in range(stages)],
        attn_ratio=[random.choice([1, 1.3, 2, 2.5, 4]) for _ in range(stages)],
        mlp_ratio=[random.choice([1, 1.5, 2, 2.7, 4]) for _ in range(stages)])
    kind = random.choice([Levit, LevitDistilled])
    model = kind(num_classes=5, img_size=random.choice([128, 224, 256]), device='meta', **sizes)
    tensors = original_layouts.levit(model.state_dict(), sizes['depth'])
    network = identify(tensors)
    again = network.build(device='meta')
    assert type(again) is kind and network.num_classes == 5
    assert {name: network.model_args[name] for name in ('embed_dim', 'key_dim', 'depth', 'num_heads')} == {
        name: sizes[name] for name in ('embed_dim', 'key_dim', 'depth', 'num_heads')}
    for here, there in zip(again.modules(), model.modules(), strict=True):  # what no tensor has the shape of
        for name in ('stride', 'resolution', 'scale', 'key_dim', 'num_heads', 'key_attn_dim', 'val_attn_dim'):
            assert getattr(here, name, None) == getattr(there, name, None)
    converted = convert_published(tensors, network)
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()}


def test_another_image_size_and_a_second_head_are_read_off_the_file():
    model = LevitDistilled(num_classes=3, img_size=128, **SIZES)
    network = identify(original_layouts.levit(model.state_dict(), SIZES['depth']))
    assert network.model_args == SIZES | dict(img_size=[128, 128], distilled=True)
    assert type(network.build(device='meta')) is LevitDistilled


def test_a_levit_without_sizes_says_where_they_are():
    with pytest.raises(ValueError, match=r'pretrained_cfg_overlay=dict\(file=...\), or give embed_dim, key_dim, depth'):
        timm.create_model('miil_levit_768')
    with pytest.raises(ValueError, match=r'\(got key_dim\)'):
        timm.create_model('miil_levit_768', key_dim=8)
    with pytest.raises(CheckpointError, match='could not be read'):
        timm.create_model('miil_levit_768', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))


def change(tensors, key, shape):
    return tensors | {key: torch.empty(shape, device='meta')}


@pytest.mark.parametrize('key, shape, words', [
    ('blocks.0.m.qkv.c.weight', (101, 24), '2 heads, 101 rows'),
    ('blocks.0.m.qkv.c.weight', (0, 24), 'must be a matrix'),
    ('blocks.0.m.qkv.c.weight', (5,), 'must be a matrix'),
    ('blocks.4.m.qkv.c.weight', (40 + 2 * 5 * 9, 40), r'keys of \[8, 9, 8\] dimensions'),
    ('blocks.0.m.attention_biases', (2, 190), 'over 190 positions; expected the square'),
    ('blocks.0.m.attention_biases', (2, 1000000), 'over 1000000 positions.*side of at most 64'),
    ('blocks.0.x.weight', (1,), "first is 'blocks.0.x.weight'"),
    ('blocks.2.kv.c.weight', (7, 24), 'downsample.attn_downsample.kv.linear.weight is'),
])
def test_a_levit_that_timm_cannot_build_is_refused(levit, key, shape, words):
    tensors = change(original_layouts.levit(levit.state_dict(), SIZES['depth']), key, shape)
    with pytest.raises(CheckpointError, match=words):
        convert_published(tensors, identify(tensors))


# ---- files in the authors' layout, by pretrained=True

ARGS = {'miil_tresnet_m_bottleneck': {}, 'miil_sdl_tresnet_m': {}, 'miil_ofa_595m': {}, 'miil_resnet8x4': {},
        'miil_binas_a': {}}


@pytest.fixture(scope='module', params=[  # a TResNet of the first layout like the one before it
    pytest.param(name, marks=pytest.mark.slow) if name == 'miil_sdl_tresnet_m' else name for name in ARGS])
def original(request, tmp_path_factory):
    """(name, file of the original layout, the network's tensors) with six classes."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=6)
    tensors = model.state_dict()
    if 'tresnet' in request.param:
        made = original_layouts.tresnet(tensors)
        made = original_layouts.sdl(made) if 'sdl' in request.param else original_layouts.bottleneck(made)
    else:
        made = original_layouts.ofa(tensors) if 'ofa' in request.param else tensors
    path = tmp_path_factory.mktemp('original') / f'{request.param}.pth'
    torch.save({'model': made}, path)
    return request.param, path, tensors


def load(original, **kwargs):
    name, path, _ = original
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def assert_same(got, want, keys):
    for key in keys:
        near = dict(rtol=0, atol=2e-5) if key.endswith('bn.weight') else dict(rtol=0, atol=0)  # InPlaceABN's 1e-5
        torch.testing.assert_close(got[key], want[key], **near, msg=key)


def test_a_file_loads_whole_with_its_own_classes(original, tmp_path):
    name, path, tensors = original
    model = load(original, num_classes=6)
    assert_same(model.state_dict(), tensors, tensors)
    read = torch.load(path)
    converted = convert_published(read, identify(read, name))
    save_file(converted, tmp_path / 'model.safetensors')
    again = timm.create_model(name, pretrained=True, num_classes=6, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'model.safetensors')))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_other_classes_keep_a_fresh_classifier(original):
    name, _, tensors = original
    overlay = dict(file=str(original[1]), num_classes=6)
    for num_classes in (4, 0):
        model = timm.create_model(name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
        classifier = model.default_cfg['classifier']
        kept = [key for key in model.state_dict() if not key.startswith(f'{classifier}.')]
        assert_same(model.state_dict(), tensors, kept)
        assert model.num_classes == num_classes


def test_features_only_takes_the_body(original):
    _, _, tensors = original
    name, path, _ = original
    model = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(
        file=str(path), num_classes=6))
    stem = next(key for key, tensor in tensors.items() if tensor.ndim == 4)
    found = next(tensor for tensor in model.state_dict().values() if tensor.shape == tensors[stem].shape)
    assert torch.equal(found, tensors[stem])
    assert len(model(torch.rand(1, 3, 64, 64))) >= 4


def test_pictures_of_other_channels_start_from_the_file(original):
    _, _, tensors = original
    model = load(original, num_classes=6, in_chans=1)
    last = [key for key, tensor in tensors.items() if tensor.ndim == 4][-1]
    assert torch.equal(model.state_dict()[last], tensors[last])
    assert model.eval()(torch.rand(1, 1, 64, 64)).shape == (1, 6)


def test_a_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(original, tmp_path):
    name, path, tensors = original
    read = torch.load(path)['model']
    for broken in ({key: read[key] for key in list(read)[1:]}, read | {'extra.weight': torch.zeros(2)}):
        torch.save(broken, tmp_path / 'broken.pth')
        with pytest.raises(CheckpointError, match='1 (missing|unknown|keys)|not a key'):
            timm.create_model(name, pretrained=True, num_classes=6, pretrained_cfg_overlay=dict(
                file=str(tmp_path / 'broken.pth')))


def test_a_file_of_other_classes_than_were_asked_for_is_refused(original):
    name, path, _ = original
    with pytest.raises(CheckpointError, match='of another shape'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
