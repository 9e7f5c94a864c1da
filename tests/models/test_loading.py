"""`load_model`: what timm's own loading gives, mapped from the file instead of drawn at random and copied over."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_miil._errors import CheckpointError
from timm_miil.models import load_model

HEAD = dict(num_groups=3, embed_dim=16, num_heads=2, feedforward_dim=16)
FAMILIES = {
    'tresnet_m': {},                                                            # blur filters that no file holds
    'levit_128s': {},                                                           # indices of attention biases
    'swin_tiny_patch4_window7_224': dict(depths=(1, 1, 1, 1)),                  # masks and indices
    'eva02_tiny_patch14_224': dict(depth=2),                                    # rotary embeddings
    'test_vit': {},
    'test_convnext': {},
    'mobilenetv3_small_050': {},
    'miil_binas_a': {},
    'miil_resnet8x4': {},
    'mldecoder': dict(backbone='resnet10t', **HEAD),
    'mldecoder_swin_tiny_patch4_window7_224': dict(depths=(1, 1, 1, 1), **HEAD),
    'mldecoder_tresnet_m': HEAD,
}


def saved(folder, name, num_classes=5, safe=True, **kwargs):
    """A folder of a model whose every number is another than a fresh model's."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.rand(tensor.shape) * 0.1 + 0.95).add_(torch.rand(tensor.shape) * 0.001)
    labels = [f'label {i}' for i in range(num_classes)]
    timm.models.save_for_hf(model, folder, safe_serialization=safe, model_config=dict(label_names=labels))
    return folder


LARGE = ('tresnet_m', 'swin_tiny_patch4_window7_224', 'mldecoder_tresnet_m')  # seconds each


@pytest.fixture(
    scope='module', params=[pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in FAMILIES])
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp('saved'), request.param, **FAMILIES[request.param])


def is_mapped(model):
    """Whether every parameter is a part of a safetensors file, by the system's own table."""
    ranges = [
        range(*(int(end, 16) for end in line.split()[0].split('-')))
        for line in Path('/proc/self/maps').read_text().splitlines() if line.endswith('.safetensors')]
    return all(any(tensor.data_ptr() in found for found in ranges) for tensor in model.parameters())


def logits(model):
    size = timm.data.resolve_model_data_config(model)['input_size'][1]
    size = size if model.pretrained_cfg.get('fixed_input_size') else min(size, 64)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)
    with torch.inference_mode():
        return model.eval()(images)


def check_same(model, other):
    for kind in 'named_parameters', 'named_buffers':
        own, wanted = dict(getattr(model, kind)()), dict(getattr(other, kind)())
        assert own.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert (own[key].dtype, own[key].device, own[key].requires_grad) == (
                tensor.dtype, tensor.device, tensor.requires_grad), key
            assert torch.equal(own[key], tensor), key
    assert [module.training for module in model.modules()] == [module.training for module in other.modules()]
    assert model.pretrained_cfg == other.pretrained_cfg and model.default_cfg is model.pretrained_cfg
    assert timm.models.get_model_args(model) == timm.models.get_model_args(other)
    found = logits(model)
    assert found.isfinite().all()
    torch.testing.assert_close(found, logits(other), rtol=1e-2 if found.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_a_folder_gives_timms_model_mapped(folder):
    model = load_model(folder)
    assert is_mapped(model)
    check_same(model, timm.create_model(f'local-dir:{folder}', pretrained=True))
    assert model.pretrained_cfg['label_names'][4] == 'label 4'


def test_a_dtype_is_timms(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    check_same(model, timm.create_model(f'local-dir:{folder}', pretrained=True, dtype=torch.bfloat16))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('small'), 'mldecoder', backbone='resnet10t', **HEAD)


def test_each_spelling_of_a_folder_is_taken(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    wanted = logits(timm.create_model(f'local-dir:{small}', pretrained=True))
    for source in small, str(small), f'local-dir:{small}', small.name, f'./{small.name}':
        assert torch.equal(logits(load_model(source)), wanted)


@pytest.mark.parametrize('arguments', [dict(num_classes=7, num_groups=3), dict(in_chans=1)])
def test_what_does_not_fit_as_it_stands_is_adapted_by_timm(small, arguments):
    torch.manual_seed(0)
    model = load_model(small, **arguments)
    assert not is_mapped(model)
    torch.manual_seed(0)
    timms = timm.create_model(f'local-dir:{small}', pretrained=True, **arguments)
    assert all(torch.equal(tensor, timms.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_weights_that_are_no_safetensors_are_loaded_by_timm(tmp_path):
    folder = saved(tmp_path, 'test_resnet', safe=False)
    assert not (folder / 'model.safetensors').exists()
    model = load_model(folder)
    assert not is_mapped(model)
    check_same(model, timm.create_model(f'local-dir:{folder}', pretrained=True))


def test_labels_that_no_file_holds_are_there():
    model = load_model('mldecoder_zero_shot_scenes')
    check_same(model, timm.create_model('mldecoder_zero_shot_scenes', pretrained=True))


def test_settings_that_the_file_alone_has_are_there():
    model = load_model('mldecoder_scenes')
    check_same(model, timm.create_model('mldecoder_scenes', pretrained=True))


def test_a_published_file_is_converted_and_mapped(server, tmp_path):
    name = 'hardcorenas_a.miil_kd_in1k'
    tensors = timm.create_model(name).state_dict()
    torch.save(tensors, server.folder / 'x.pth')
    overlay = dict(url=server.url('x.pth'))
    for _ in range(2):
        model = load_model(name, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
        assert is_mapped(model)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    assert server.requests == ['/x.pth']
    assert len(list((tmp_path / 'cache' / 'timm_miil').glob('*.safetensors'))) == 1


def test_weights_of_a_backbone_are_not_fetched_for_a_folder_that_has_them(tmp_path):
    folder = saved(tmp_path, 'mldecoder', backbone='resnet10t', **HEAD)
    config = json.loads((folder / 'config.json').read_text())
    config['model_args']['pretrained_backbone'] = True
    (folder / 'config.json').write_text(json.dumps(config))
    assert is_mapped(load_model(folder))


def test_nothing_is_drawn_at_random(tmp_path):
    folder = saved(tmp_path, 'mobilenetv3_small_050')
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the file under the model


def test_training_changes_the_model_and_not_its_file(small):
    file = small / 'model.safetensors'
    before = file.read_bytes()
    model = load_model(small)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weight = model.backbone.conv1[0].weight.detach().clone()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.backbone.conv1[0].weight, weight)
    assert not torch.equal(model.backbone.bn1.running_mean, load_file(file)['backbone.bn1.running_mean'])
    assert file.read_bytes() == before


def test_a_file_that_is_replaced_leaves_the_model_alone(tmp_path):
    folder = saved(tmp_path / 'folder', 'test_resnet')
    model, wanted = load_model(folder), logits(load_model(folder, private_copy=True))
    zeros = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    save_file(zeros, tmp_path / 'new')
    os.replace(tmp_path / 'new', folder / 'model.safetensors')
    assert torch.equal(logits(model), wanted)


def test_a_private_copy_does_not_need_the_file(tmp_path):
    folder = saved(tmp_path, 'test_resnet')
    model, wanted = load_model(folder, private_copy=True), logits(timm.create_model(f'local-dir:{folder}', True))
    with (folder / 'model.safetensors').open('r+b') as file:  # over it, as timm's save does
        file.truncate(0)
    assert torch.equal(logits(model), wanted)


# ---- errors, and folders of anyone


@pytest.mark.parametrize('source, words', [
    ('no/such/folder', "no folder and no registered model is called 'no/such/folder'"),
    ('resnet5O', "is called 'resnet5O'; did you mean 'resnet50'"),
    ('resnet50.miil', "unknown weights 'resnet50.miil'; did you mean"),
    ('resnet50.miil_multi_label_in21k', '`timm-miil convert resnet50.miil_multi_label_in21k -o DIR` makes a folder'),
    ('peta_album.miil_ml_cufed', 'the catalogue has them, and this version has no network for them'),
    ('s3:bucket/x', "Unknown model source 's3'"),
])
def test_unknown_sources_are_named(source, words):
    with pytest.raises(ValueError, match=words):
        load_model(source)


def test_a_registered_name_without_weights_is_timms_error():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for mldecoder_resnet50'):
        load_model('mldecoder_resnet50')


def test_a_damaged_file_is_named(tmp_path):
    folder = saved(tmp_path, 'mldecoder', backbone='resnet10t', **HEAD)
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='is not a checkpoint that can be read: 1000 bytes, SafetensorError'):
        load_model(folder)


@pytest.mark.parametrize('change, error, words', [
    (dict(architecture=5), TypeError, 'architecture in config.json must be a string, got 5'),
    (dict(model_args={'checkpoint_path': '/etc/passwd'}), ValueError,
     "must be arguments of the network, got 'checkpoint_path', which says where weights lie"),
    (dict(model_args={'backbone_args': {'cache_dir': '/tmp'}}), ValueError, "got 'cache_dir', which says where"),
    (dict(pretrained_cfg={'input_size': [3, 0, 5]}), ValueError, r'input_size in config.json must be \[channels'),
    (dict(architecture='os.system'), RuntimeError, 'Unknown model'),
])
def test_a_configuration_that_asks_for_more_is_refused(tmp_path, small, change, error, words):
    config = json.loads((small / 'config.json').read_text()) | change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_bytes((small / 'model.safetensors').read_bytes())
    with pytest.raises(error, match=words):
        load_model(tmp_path)


def test_a_link_out_of_a_folder_is_refused(tmp_path, small):
    (tmp_path / 'config.json').write_bytes((small / 'config.json').read_bytes())
    (tmp_path / 'model.safetensors').symlink_to(small / 'model.safetensors')
    with pytest.raises(ValueError, match='model.safetensors is a link out of the folder'):
        load_model(tmp_path)


@pytest.mark.gpu
def test_a_device_gets_the_whole_model(small):
    model = load_model(small, device='cuda')
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {'cuda'}
    wanted = timm.create_model(f'local-dir:{small}', pretrained=True)
    assert all(torch.equal(tensor.cpu(), wanted.state_dict()[key]) for key, tensor in model.state_dict().items())
