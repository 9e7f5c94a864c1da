"""`pretrained=True`: published checkpoints from a real server, from files, whole or with one clear error."""
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_miil
from timm_miil import catalog
from timm_miil._errors import CheckpointError

NAME = 'mldecoder_tresnet_m.miil_coco_224'
SMALL = 'mldecoder_scenes.miil_scenes'   # where the network does not matter
QUERIES, GROUP_FC = 'head.query_embed', 'head.group_fc.weight'


@pytest.fixture(scope='module')
def published(tmp_path_factory, mldecoder_m_weights):
    """The file as the authors publish it: a dictionary with the tensors under 'model'."""
    path = tmp_path_factory.mktemp('published') / 'tresnet_m_COCO_224_84_2.pth'
    names = dict(enumerate(catalog.label_set('coco_80').labels))
    torch.save({'model': mldecoder_m_weights, 'num_classes': 80, 'idx_to_class': names}, path)
    return path


def from_url(server, path, cache_dir, **kwargs):
    (server.folder / path.name).write_bytes(path.read_bytes())
    overlay = dict(url=server.url(path.name), hf_hub_id=None)
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **kwargs)


def kept(cache_dir):
    return [path for path in cache_dir.rglob('*') if path.is_file() and path.suffix != '.lock']


def test_downloaded_weights_give_the_original_logits(server, published, mldecoder_m, tmp_path):
    model = from_url(server, published, tmp_path / 'cache').eval()
    images = mldecoder_m.images()
    with torch.inference_mode():
        features = model.forward_features(images)
        mldecoder_m.check_logits(model.forward_head(features))
        pooled, want = model.forward_head(features, pre_logits=True), mldecoder_m.expected['pooled']
    assert (pooled - want).norm() / want.norm() < 1e-5
    from_url(server, published, tmp_path / 'cache')
    assert server.requests == [f'/{published.name}']  # the second came from the cache


@pytest.mark.parametrize('layout', [
    'model', 'legacy', *(pytest.param(layout, marks=pytest.mark.slow)
                         for layout in ('state_dict', 'bare', 'module.', 'no counters'))])
def test_every_published_layout_loads_from_a_file(layout, mldecoder_m_weights, tmp_path):
    tensors = dict(mldecoder_m_weights)
    if layout == 'module.':
        tensors = {f'module.{key}': tensor for key, tensor in tensors.items()}
    if layout == 'no counters':
        tensors = {key: tensor for key, tensor in tensors.items() if 'num_batches_tracked' not in key}
    checkpoint = {layout: tensors} if layout in ('model', 'state_dict') else tensors
    torch.save(checkpoint, tmp_path / 'x.pth', _use_new_zipfile_serialization=layout != 'legacy')
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')))
    assert torch.equal(model.head.embed.weight, mldecoder_m_weights['head.decoder.embed_standart.weight'])
    norm = mldecoder_m_weights['body.layer2.0.conv1.0.1.weight']
    assert (norm < 0).any()
    assert torch.equal(model.backbone.body.layer2[0].conv1.bn.weight, norm.abs() + 1e-5)


def test_converted_safetensors_and_on_the_fly_are_bit_equal(published, tmp_path):
    first = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(published)))
    save_file(first.state_dict(), tmp_path / 'model.safetensors')
    again = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in first.state_dict().items())


@pytest.mark.parametrize('num_classes, groups', [
    pytest.param(80, 80, marks=pytest.mark.slow), (25, 25), pytest.param(230, 100, marks=pytest.mark.slow), (0, None)])
def test_other_classes_keep_body_and_decoder(published, mldecoder_m_weights, num_classes, groups):
    torch.manual_seed(0)
    model = timm.create_model(
        NAME, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=dict(file=str(published)))
    assert torch.equal(model.backbone.body.conv1.conv.weight, mldecoder_m_weights['body.conv1.0.weight'])
    output = model.eval()(torch.rand(1, 3, 64, 64))
    if num_classes == 0:
        assert output.shape == (1, 2048)
        return
    assert output.shape == (1, num_classes)
    assert torch.equal(model.head.embed.weight, mldecoder_m_weights['head.decoder.embed_standart.weight'])
    assert torch.equal(
        model.head.decoder.linear2.weight, mldecoder_m_weights['head.decoder.layers.0.linear2.weight'])
    assert model.head.query_embed.shape == (groups, 768)
    assert torch.equal(
        model.head.query_embed, mldecoder_m_weights['head.decoder.query_embed.weight']) == (num_classes == 80)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_other_input_channels_adapt_the_space_to_depth_stem(published, mldecoder_m_weights, in_chans):
    model = timm.create_model(
        NAME, pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=dict(file=str(published)))
    stem = mldecoder_m_weights['body.conv1.0.weight'].reshape(64, 16, 3, 3, 3)
    if in_chans == 1:
        want = stem.sum(2)
    else:  # timm's rule for more channels: repeat the colours, scaled by 3 / in_chans
        want = (torch.cat([stem, stem[:, :, :1]], 2) * 3 / 4).flatten(1, 2)
    torch.testing.assert_close(model.backbone.body.conv1.conv.weight.data, want)
    assert model.eval()(torch.rand(1, in_chans, 64, 64)).shape == (1, 80)


def test_features_only_takes_the_published_body(published, mldecoder_m_weights):
    model = timm.create_model(
        NAME, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(published)))
    [stem] = [tensor for key, tensor in model.state_dict().items() if key.endswith('body.conv1.conv.weight')]
    assert torch.equal(stem, mldecoder_m_weights['body.conv1.0.weight'])


def broken(server, kind):
    body = catalog_file(SMALL).read_bytes()
    path = f'/{kind}.pth'
    server.answers[path] = {
        'truncated': (200, len(body), body[:len(body) // 2]),
        'cut': (200, len(body) // 2, body[:len(body) // 2]),
        'page': (200, 40, b'<html><body>Not here any more</body></htm'),
        'empty': (200, 0, b''),
        'gone': (404, 0, b''),
    }[kind]
    return server.url(path[1:])


def catalog_file(name):
    return Path(timm_miil.__file__).parent / catalog.weight(name).file


@pytest.mark.parametrize('kind, words', [
    ('truncated', 'is not a checkpoint that can be read: .* bytes, .*; it was removed from the cache, try again'),
    ('cut', 'is not a checkpoint that can be read: .* bytes, .*; it was removed from the cache, try again'),
    ('page', 'is not a checkpoint that can be read: .*; it was removed from the cache, try again'),
    ('empty', 'is not a checkpoint that can be read: .*; it was removed from the cache, try again'),
    ('gone', 'could not be read: HTTP Error 404: Not Found; check the network'),
])
def test_broken_downloads_give_one_error_and_leave_no_file(server, tmp_path, kind, words):
    url = broken(server, kind)
    overlay = dict(url=url, file=None, hf_hub_id=None)
    with pytest.raises(CheckpointError, match=words) as caught:
        timm.create_model(SMALL, pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay=overlay)
    assert url in str(caught.value)
    assert not list((tmp_path / 'cache').iterdir())


def test_a_server_that_is_not_there_is_named(tmp_path):
    url = 'http://127.0.0.1:9/tresnet.pth'
    words = r'127.0.0.1:9/tresnet.pth could not be read: .*file=.*pretrained=False'
    with pytest.raises(CheckpointError, match=words):
        timm.create_model(SMALL, pretrained=True, cache_dir=tmp_path, pretrained_cfg_overlay=dict(url=url, file=None))


def test_a_foreign_checkpoint_is_refused_and_not_kept(server, tmp_path):
    torch.save(timm.create_model('resnet10t').state_dict(), server.folder / 'resnet.pth')
    with pytest.raises(CheckpointError, match=f'{NAME}: http://.*/resnet.pth: the file is not of mldecoder_tresnet_m'):
        timm.create_model(
            NAME, pretrained=True, cache_dir=tmp_path / 'cache',
            pretrained_cfg_overlay=dict(url=server.url('resnet.pth'), hf_hub_id=None))
    assert kept(tmp_path / 'cache') == []


def test_a_good_file_in_the_cache_survives_a_wrong_request(server, published, tmp_path):
    from_url(server, published, tmp_path / 'cache')
    words = r'does not fit MLDecoderClassifier; 17 of another shape: head.query_embed is .80, 768. instead of .7, 384.'
    with pytest.raises(CheckpointError, match=words):
        from_url(server, published, tmp_path / 'cache', embed_dim=384, num_groups=7)
    assert [path.suffix for path in kept(tmp_path / 'cache')] == ['.safetensors']
    assert len(server.requests) == 1


@pytest.mark.parametrize('change, words', [
    pytest.param(
        lambda tensors: tensors.pop('body.layer3.5.conv3.0.weight'),
        '1 missing: backbone.body.layer3.5.conv3.conv.weight', marks=pytest.mark.slow),
    (lambda tensors: tensors.pop('head.decoder.duplicate_pooling_bias'), '1 missing: head.group_fc.bias'),
    pytest.param(
        lambda tensors: tensors.update({'head.fc.weight': torch.zeros(2)}),
        "'head.fc.weight' is not a key of an original", marks=pytest.mark.slow),
    pytest.param(
        lambda tensors: tensors.update({'head.decoder.duplicate_pooling_bias': torch.zeros(81)}),
        r'1 of another shape: head.group_fc.bias is \(81,\) instead of \(80,\)', marks=pytest.mark.slow),
    (lambda tensors: tensors.clear(), 'found nothing'),
    (lambda tensors: tensors.update(epoch=3), "must map names to tensors.*found 'body.conv1.0.weight'"),
])
def test_partial_or_strange_checkpoints_never_load(mldecoder_m_weights, tmp_path, change, words):
    tensors = dict(mldecoder_m_weights)
    change(tensors)
    torch.save({'model': tensors}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=words):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')))
    assert (tmp_path / 'x.pth').exists()  # the user's own file is never removed


class Shout:
    def __reduce__(self):
        return print, ('code from a checkpoint ran',)


def test_pickled_code_never_runs(server, tmp_path, capfd):
    torch.save({'model': {'a': Shout()}}, server.folder / 'evil.pth')
    with pytest.raises(CheckpointError, match='is not a checkpoint that can be read: .*(builtins.print|weights_only)'):
        timm.create_model(
            SMALL, pretrained=True, cache_dir=tmp_path / 'cache',
            pretrained_cfg_overlay=dict(url=server.url('evil.pth'), file=None, hf_hub_id=None))
    assert 'ran' not in capfd.readouterr().out


def test_a_broken_local_file_is_named_and_kept(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(b'PK\x03\x04 not much')
    words = 'x.pth is not a checkpoint that can be read: 13 bytes, .*; get it again'
    with pytest.raises(CheckpointError, match=words):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert path.exists()
    with pytest.raises(CheckpointError, match=r'nope.pth could not be read: .*check the path'):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'nope.pth')))


def test_without_published_weights_timm_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for mldecoder_resnet50'):
        timm.create_model('mldecoder_resnet50', pretrained=True)


def test_foreign_layout_on_another_backbone_is_explained(published):
    with pytest.raises(CheckpointError, match='known for TResNet only, not for ResNet'):
        timm.create_model('mldecoder_resnet50', pretrained=True, pretrained_cfg_overlay=dict(file=str(published)))


@pytest.mark.parametrize('name', [
    name if name in (NAME, SMALL) else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(catalog.pretrained_cfgs('mldecoder'))])
def test_each_catalogued_tag_has_its_sizes_and_the_authors_preprocessing(name):
    entry = catalog.weight(name)
    model = timm.create_model(name, device='meta')
    assert model.num_classes == entry.num_classes
    if entry.head == 'ml_decoder':
        assert model.head.num_groups == min(entry.num_groups or 100, entry.num_classes)
        assert model.head.group_fc.weight.shape[2] == math.ceil(entry.num_classes / model.head.num_groups)
    assert model(torch.empty(1, *entry.input_size, device='meta')).shape == (1, entry.num_classes)
    if entry.file is not None:
        return  # our own small model, not the authors' preprocessing
    data = timm.data.resolve_model_data_config(model)
    assert (data['mean'], data['std'], data['crop_mode']) == ((0, 0, 0), (1, 1, 1), 'squash')
    picture = Image.radial_gradient('L').resize((200, 90)).convert('RGB')
    got = timm.data.create_transform(**data)(picture)
    want = picture.resize(entry.input_size[:0:-1], Image.Resampling.BILINEAR)
    assert torch.equal(got, torch.tensor(list(want.tobytes())).reshape(*want.size[::-1], 3).permute(2, 0, 1) / 255)


def test_a_saved_tag_reloads_with_its_groups_and_labels(tmp_path):
    model = timm.create_model('mldecoder_tresnet_m.miil_openimages_224', num_classes=450).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_config=dict(label_names=['a'] * 450))
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['num_groups'] == 200
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images), again(images))


@pytest.mark.parametrize('groups', [
    pytest.param(100, marks=pytest.mark.slow), 50, pytest.param(196, marks=pytest.mark.slow)])
def test_a_file_that_alone_knows_its_groups_decides_them(groups, tmp_path):
    name = 'mldecoder_tresnet_l.miil_stanford_cars_384'
    assert catalog.weight(name).num_groups is None
    source = timm.create_model(name, num_groups=groups, device='meta')
    weights = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in source.state_dict().items()}
    weights['head.query_embed'] = torch.rand(source.head.query_embed.shape)
    torch.save(weights, tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.query_embed, weights['head.query_embed'])
    assert timm.models.get_model_args(model)['num_groups'] == groups
    with pytest.raises(CheckpointError, match='of another shape: head.query_embed'):
        timm.create_model(name, pretrained=True, num_groups=7, device='meta', pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('name, size', [
    ('mldecoder', dict(backbone='resnet10t', embed_dim=16, feedforward_dim=16)),   # no published weights
    pytest.param(NAME, {}, marks=pytest.mark.slow),                                # published for 80 classes
])
def test_a_file_of_the_wanted_classes_loads_whole(name, size, tmp_path):
    model = timm.create_model(name, num_classes=7, **size)
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    overlay = dict(file=str(tmp_path / 'mine.pth'))
    again = timm.create_model(name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **size)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert again.pretrained_cfg['num_classes'] == 7
    fresh = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **size)
    assert torch.equal(fresh.head.embed.weight, model.head.embed.weight)
    assert fresh.head.group_fc.bias.shape == (3,)


def test_a_truncated_folder_is_named(tmp_path):
    model = timm.create_model('mldecoder', backbone='resnet10t', num_classes=3, embed_dim=16)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='is not a checkpoint that can be read: 1000 bytes, SafetensorError'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert weights.exists()


@pytest.mark.parametrize('name', ['hf-hub:timm/resnet18.a1_in1k', 'timm/resnet18'])
def test_a_repository_for_a_backbone_is_answered_with_the_bare_name(name):
    with pytest.raises(ValueError, match=r"got '.*'; write 'resnet18(.a1_in1k)?'"):
        timm.create_model('mldecoder', backbone=name)
