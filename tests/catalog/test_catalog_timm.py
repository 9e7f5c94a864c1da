"""What timm makes of the catalogue: valid configurations, the authors' preprocessing, no name of timm's taken."""
import dataclasses

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint

from timm_miil import catalog
from timm_miil.catalog._timm_cfg import HUB_NAMESPACE_VARIABLE, timm_cfg
from timm_miil.models._pretrained_file import PublishedCfg

FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}
CFGS = {name: cfg for family in catalog.families() for name, cfg in catalog.pretrained_cfgs(family).items()}


def in_timm(architecture: str) -> bool:
    return timm.is_model(architecture) and model_entrypoint(architecture).__module__.startswith('timm.')


@pytest.mark.parametrize('name', CFGS)
def test_a_configuration_of_timm_takes_every_fact(name):
    cfg, entry = CFGS[name], catalog.weight(name)
    assert cfg.keys() <= FIELDS
    made = PretrainedCfg(**cfg)
    for fact in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'num_classes', 'url'):
        assert getattr(made, fact) == getattr(entry, fact)
    assert made.origin_url == (entry.source_repo and f'https://github.com/{entry.source_repo}')
    assert made.paper_ids == f'arXiv:{catalog.paper(entry.paper).arxiv}'
    assert made.label_names == (catalog.label_set(entry.labels).labels if entry.labels else None)
    assert made.hf_hub_id is None


def test_the_five_ml_decoder_tags_for_timm():
    cfgs = catalog.pretrained_cfgs('mldecoder')
    cfg = cfgs['mldecoder_tresnet_l.miil_coco_448']
    assert cfg == {
        'url': 'https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ML_Decoder/tresnet_l_COCO__448_90_0.pth',
        'input_size': (3, 448, 448), 'fixed_input_size': False, 'pool_size': (14, 14), 'num_classes': 80,
        'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'squash', 'mean': (0.0,) * 3, 'std': (1.0,) * 3,
        'label_names': catalog.label_set('coco_80').labels, 'first_conv': 'backbone.body.conv1.conv',
        'classifier': 'head.group_fc', 'license': 'mit', 'origin_url': 'https://github.com/Alibaba-MIIL/ML_Decoder',
        'paper_name': 'ML-Decoder: Scalable and Versatile Classification Head', 'paper_ids': 'arXiv:2111.12933'}
    assert {name: made['pool_size'] for name, made in cfgs.items() if 'tresnet' in name} == {
        'mldecoder_tresnet_m.miil_coco_224': (7, 7), 'mldecoder_tresnet_l.miil_coco_448': (14, 14),
        'mldecoder_tresnet_xl.miil_coco_640': (20, 20), 'mldecoder_tresnet_m.miil_openimages_224': (7, 7),
        'mldecoder_tresnet_l.miil_stanford_cars_384': (12, 12)}
    assert 'label_names' not in cfgs['mldecoder_tresnet_m.miil_openimages_224']


def test_the_last_feature_map_of_an_odd_size_is_rounded_up():
    cfg = CFGS['miil_tresnet_v2_l_slope1e6.miil_stanford_cars_368']
    network = timm.create_model('tresnet_v2_l', device='meta')
    features = network.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
    assert cfg['pool_size'] == features.shape[-2:] == (12, 12)


def test_without_a_tag_timm_takes_the_coco_weights():
    defaults = generate_default_cfgs(catalog.pretrained_cfgs('mldecoder'))
    assert {name: defaults[name].tags[0] for name in defaults if 'tresnet' in name} == {
        'mldecoder_tresnet_m': 'miil_coco_224', 'mldecoder_tresnet_l': 'miil_coco_448',
        'mldecoder_tresnet_xl': 'miil_coco_640'}


def test_each_call_gives_dictionaries_of_its_own():
    catalog.pretrained_cfgs('mldecoder')['mldecoder_tresnet_m.miil_coco_224'].clear()
    assert catalog.pretrained_cfgs('mldecoder')['mldecoder_tresnet_m.miil_coco_224']['num_classes'] == 80


@pytest.mark.parametrize('entry', catalog.weights().values(), ids=lambda entry: entry.name)
def test_names_are_timms_exactly_where_timm_has_the_weights(entry):
    registered = in_timm(entry.architecture) and timm.models.is_model_pretrained(entry.name)
    timm_has_it = registered and not isinstance(timm.get_pretrained_cfg(entry.name), PublishedCfg)  # that one is ours
    assert entry.timm_tag == (entry.name if timm_has_it else None)
    assert not (timm_has_it and entry.name in CFGS)
    if entry.timm.body is not None:
        assert in_timm(entry.timm.body)


def test_every_checkpoint_of_the_lab_that_timm_hosts_is_in_the_catalogue_and_points_there():
    hosted = {
        name for name in timm.list_pretrained('*miil*')
        if in_timm(name.partition('.')[0]) and name not in CFGS}
    assert len(hosted) == 27
    assert {entry.name: entry.hf_hub_id for entry in catalog.weights().values() if entry.hf_hub_id} == {
        name: f'timm/{name}' for name in hosted | {'edgenext_small.usi_in1k'}}
    for name in hosted:
        cfg, entry = timm.get_pretrained_cfg(name), catalog.weight(name)
        assert (cfg.num_classes, cfg.mean, cfg.std) == (entry.num_classes, entry.mean, entry.std)
        assert cfg.interpolation == entry.interpolation and cfg.input_size == entry.input_size
        assert cfg.hf_hub_id in (entry.hf_hub_id, 'timm/')


# What the tensors of a file may contradict: the head's kind, its groups, the layout.
UNSURE = {
    'tresnet_l.miil_openimages_448', 'mldecoder_tresnet_l.miil_stanford_cars_384',
    'tresnet_v2_l.miil_csl_openimages_224'}
# Networks of which only the reference's numbers are known.
NOT_BUILT = {'stam_8', 'stam_16', 'stam_32', 'stam_64', 'peta_album'}


@pytest.mark.slow
def test_numbers_of_parameters_are_those_of_the_networks():
    for entry in catalog.weights().values():
        if entry.architecture in NOT_BUILT:
            assert entry.num_params is not None and not timm.is_model(entry.architecture)
            continue
        if entry.num_classes is None or entry.name in UNSURE or not timm.is_model(entry.architecture):
            assert entry.num_params is None, entry.name
            continue
        if entry.name == 'miil_levit_768.miil_usi_in1k':        # its sizes stand in its file
            assert entry.num_params is None
            continue
        groups = {'num_groups': entry.num_groups} if entry.num_groups else {}
        network = timm.create_model(entry.architecture, num_classes=entry.num_classes, device='meta', **groups)
        assert entry.num_params == sum(parameter.numel() for parameter in network.parameters()), entry.name


def test_what_timm_could_not_describe_is_left_out():
    ours = [entry for entry in catalog.weights().values() if entry.timm_tag is None]
    supernets = {entry.name for entry in catalog.find('miil_mobilenasnet.*')}
    unclear = {entry.name for entry in ours if entry.num_classes is None or entry.mean is None}
    assert len(supernets) == 2
    assert len(unclear) == 10 + 1               # USI on ImageNet-21K, LeViT-768 on ImageNet-1k
    assert {entry.name for entry in ours} - CFGS.keys() == supernets | unclear


@pytest.mark.parametrize('architecture', sorted({
    entry.architecture for entry in catalog.weights().values() if in_timm(entry.architecture)} - {'edgenext_small'}))
def test_facts_for_timm_are_those_that_timm_has(architecture):
    [facts] = {entry.timm for entry in catalog.weights().values() if entry.architecture == architecture}
    own = timm.get_pretrained_cfg(architecture)
    # timm's LeViT has a second classifier for distillation; the published ones have not.
    classifier = own.classifier[0] if architecture == 'levit_384' else own.classifier
    assert (facts.first_conv, facts.classifier) == ((own.first_conv,), (classifier,))
    assert facts.fixed_input_size == own.fixed_input_size
    stride = facts.pool_stride
    assert own.pool_size == (stride and tuple(-(-size // stride) for size in own.input_size[1:]))


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize('size', [(500, 333), (97, 640), (448, 448)])
@pytest.mark.parametrize('name', [name for name in CFGS if name.startswith('mldecoder_tresnet')])
def test_ml_decoder_pictures_are_squished_and_divided_by_255(name, size):
    transform = create_transform(**resolve_data_config(pretrained_cfg=CFGS[name]))
    _, height, width = catalog.weight(name).input_size
    squished = picture(*size).resize((width, height), Image.Resampling.BILINEAR)
    want = torch.from_numpy(np.array(squished)).permute(2, 0, 1).float() / 255
    assert torch.equal(transform(picture(*size)), want)


def test_stam_frames_are_resized_to_256_and_cropped():
    transform = create_transform(**resolve_data_config(pretrained_cfg=CFGS['stam_16.miil_k400']))
    frame = picture(512, 256)
    want = torch.from_numpy(np.array(frame.crop((144, 16, 368, 240)))).permute(2, 0, 1).float() / 255
    assert torch.equal(transform(frame), want)


def test_timms_own_network_takes_a_configuration_as_it_stands():
    model = timm.create_model(
        'tresnet_m', pretrained_cfg=catalog.pretrained_cfgs('asl')['tresnet_m.miil_coco_224'], device='meta')
    assert model.num_classes == 80
    assert model.pretrained_cfg['label_names'][0] == 'person'
    assert model.get_submodule(model.pretrained_cfg['first_conv']).weight.shape[1] == 48
    assert model.get_submodule(model.pretrained_cfg['classifier']).out_features == 80


def cfg_of(**facts) -> dict[str, object]:
    entry = dataclasses.replace(catalog.weight('mldecoder_tresnet_m.miil_coco_224'), **facts)
    return timm_cfg(entry, root=catalog._ROOT, paper=catalog.paper(entry.paper), label_set=None)


def test_a_packaged_file_becomes_an_absolute_path():
    cfg = cfg_of(url=None, file='models/weights/some.safetensors')
    assert cfg['file'] == str(catalog._ROOT / 'models' / 'weights' / 'some.safetensors')
    assert 'url' not in cfg


def test_the_namespace_on_the_hub_can_be_replaced(monkeypatch):
    monkeypatch.delenv(HUB_NAMESPACE_VARIABLE, raising=False)
    assert cfg_of(hf_hub_id='lab/net.tag')['hf_hub_id'] == 'lab/net.tag'
    monkeypatch.setenv(HUB_NAMESPACE_VARIABLE, '')
    assert cfg_of(hf_hub_id='lab/net.tag')['hf_hub_id'] == 'lab/net.tag'
    monkeypatch.setenv(HUB_NAMESPACE_VARIABLE, 'me-2')
    assert cfg_of(hf_hub_id='lab/net.tag')['hf_hub_id'] == 'me-2/net.tag'
    assert cfg_of()['hf_hub_id'] == 'me-2/mldecoder_tresnet_m.miil_coco_224'
    assert cfg_of(timm_tag='net.tag', hf_hub_id='timm/net.tag')['hf_hub_id'] == 'timm/net.tag'
    assert 'hf_hub_id' not in cfg_of(url=None, file='models/weights/some.safetensors')


@pytest.mark.parametrize('namespace', ['a/b', 'https://x', ' me'])
def test_a_bad_namespace_is_named(monkeypatch, namespace):
    monkeypatch.setenv(HUB_NAMESPACE_VARIABLE, namespace)
    with pytest.raises(ValueError, match=f'{HUB_NAMESPACE_VARIABLE} must name a user .*, got {namespace!r}'):
        cfg_of(hf_hub_id='lab/net')
