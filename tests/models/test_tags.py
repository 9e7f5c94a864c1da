"""The catalogue's weights in timm's registry: all of them are found by name, and nothing of timm's is another."""
import copy
import dataclasses
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg, is_model_pretrained, list_pretrained, model_entrypoint

import timm_miil.models
from timm_miil import catalog
from timm_miil.models._pretrained_file import PublishedCfg, PublishedFile
from timm_miil.models._tags import register_tags

OURS = {
    name: facts for family in catalog.families() for name, facts in catalog.pretrained_cfgs(family).items()
    if facts.get('url') and timm.is_model(name)}
STOCK = [name for name in OURS if not model_entrypoint(name).__module__.startswith('timm_miil.')]
NAME = 'resnet50.miil_in21k'
URL = OURS[NAME]['url']

REGISTRY = '''
import json, sys, warnings
warnings.simplefilter('error')
sys.addaudithook(lambda event, args: sys.exit(event) if event.startswith('socket.') and started else None)
started = False
import timm
from timm.models._registry import _model_has_pretrained, _model_pretrained_cfgs, _model_with_tags

def registry():
    cfgs = {name: repr(cfg) for name, cfg in _model_pretrained_cfgs.items()}
    return {'cfgs': cfgs, 'pretrained': sorted(_model_has_pretrained), 'tags': {**_model_with_tags},
            'listed': timm.list_models(pretrained=True), 'bare': timm.list_models()}

before = json.loads(json.dumps(registry()))
started = True
import timm_miil
after = registry()
text = json.dumps(after)

import importlib, timm_miil.models
importlib.reload(timm_miil.models)
print(json.dumps([before, after, json.dumps(registry()) == text]))
'''


@pytest.fixture(scope='module')
def registries():
    """timm's registry before our import, after it, and whether a second import left it so; without a warning."""
    environment = os.environ | {'TIMM_MIIL_AUTOLOAD': '0', 'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', REGISTRY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return json.loads(done.stdout)


def test_what_timm_registers_stays_as_it_is(registries):
    before, after, _ = registries
    assert before['cfgs'].items() <= after['cfgs'].items()  # tags, and the default of every architecture
    assert set(before['pretrained']) <= set(after['pretrained'])
    for architecture, tags in before['tags'].items():
        assert after['tags'][architecture][:len(tags)] == tags
    assert set(before['listed']) <= set(after['listed'])


def test_only_names_of_the_catalogue_are_added_to_timms_architectures(registries):
    before, after, _ = registries
    added = {name for name in set(after['cfgs']) - set(before['cfgs']) if name.partition('.')[0] in before['bare']}
    assert added == set(STOCK)
    assert len(added) > 25
    assert added <= set(after['listed'])


def test_registering_again_changes_nothing(registries):
    assert registries[2]
    known = copy.deepcopy(timm.models._registry._model_pretrained_cfgs)
    register_tags()
    assert timm.models._registry._model_pretrained_cfgs == known


def test_a_tag_that_timm_comes_to_have_is_timms(monkeypatch):
    monkeypatch.setitem(
        timm.models._registry._model_pretrained_cfgs, NAME, dataclasses.replace(get_pretrained_cfg('resnet50')))
    register_tags()
    assert get_pretrained_cfg(NAME) == get_pretrained_cfg('resnet50')


@pytest.mark.parametrize('name', OURS)
def test_each_name_has_its_facts_and_a_file_that_finds_itself(name):
    assert is_model_pretrained(name)
    assert name in list_pretrained(name)
    cfg, entry = get_pretrained_cfg(name), catalog.weight(name)
    assert isinstance(cfg, PublishedCfg)
    assert (cfg.architecture, cfg.tag, cfg.url) == (entry.architecture, entry.tag, entry.url)
    assert (cfg.num_classes, cfg.input_size, cfg.mean) == (entry.num_classes, entry.input_size, entry.mean)
    assert repr(cfg.file) == f'PublishedFile({name!r}, url={entry.url!r}, hub_id={cfg.hf_hub_id!r})'


def test_the_default_tag_of_our_own_networks_finds_itself_too():
    cfg = get_pretrained_cfg('mldecoder_tresnet_l')
    assert cfg.file == get_pretrained_cfg('mldecoder_tresnet_l.miil_coco_448').file
    assert cfg.tag == 'miil_coco_448'


@pytest.mark.parametrize('name', STOCK)
def test_timms_network_has_the_classes_and_the_modules_that_the_facts_name(name):
    model = timm.create_model(name, device='meta')
    entry = catalog.weight(name)
    assert model.num_classes == entry.num_classes
    assert model.pretrained_cfg['tag'] == entry.tag
    assert model.get_submodule(model.pretrained_cfg['classifier']).weight.shape[0] == entry.num_classes
    assert model.get_submodule(model.pretrained_cfg['first_conv']).weight.ndim == 4


# ---- the file of a configuration


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.setattr(PublishedFile, '__fspath__', lambda self: pytest.fail('the file was opened'))
    return get_pretrained_cfg(NAME)


def test_copies_and_pickles_open_nothing_and_are_equal(cfg):
    for same in copy.deepcopy(cfg), copy.copy(cfg), pickle.loads(pickle.dumps(cfg)), dataclasses.replace(cfg):
        assert same == cfg and same.file == cfg.file and hash(same.file) == hash(cfg.file)
        assert type(same.file) is PublishedFile and same.has_weights
    assert cfg.to_dict()['file'] == cfg.file
    assert str(cfg.file) == f'{cfg.file}' == 'resnet50.miil_in21k.safetensors'
    assert cfg.file != PublishedFile(NAME, url='https://example.org/other.pth')


def test_a_network_without_its_weights_and_its_saved_folder_open_nothing(cfg, tmp_path):
    model = timm.create_model(NAME, num_classes=3)
    assert copy.deepcopy(model).pretrained_cfg == model.pretrained_cfg
    assert pickle.loads(pickle.dumps(model)).pretrained_cfg['file'] == cfg.file
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert 'file' not in json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']


@pytest.mark.parametrize('overlay, file', [
    ({}, PublishedFile(NAME, url=URL)),
    (dict(num_classes=5), PublishedFile(NAME, url=URL)),
    (dict(url='https://example.org/mirror.pth'), PublishedFile(NAME, url='https://example.org/mirror.pth')),
    (dict(hf_hub_id='someone/theirs'), None),
    (dict(hf_hub_id='someone/theirs', url=None), None),
    (dict(file='/mine.safetensors'), '/mine.safetensors'),
    (dict(url='file:///mine.pth'), None),
    (dict(url=('https://example.org/x', 'named.pth')), None),
    (dict(url=None), None),
])
def test_sources_that_somebody_names_win(cfg, overlay, file):
    assert timm.models.resolve_pretrained_cfg('resnet50', 'miil_in21k', overlay).file == file


@pytest.mark.parametrize('overlay, file', [
    ({}, PublishedFile(NAME, url=URL, hub_id='lab/resnet')),
    (dict(hf_hub_id=None), PublishedFile(NAME, url=URL)),                            # the original file
    (dict(url=None), PublishedFile(NAME, hub_id='lab/resnet')),                      # the repository alone
    (dict(url='https://example.org/x.pth'), PublishedFile(NAME, url='https://example.org/x.pth')),
    (dict(hf_hub_id='someone/theirs'), None),
    (dict(hf_hub_filename='other.safetensors'), None),
    (dict(url=None, hf_hub_id=None), None),
])
def test_sources_that_somebody_names_win_over_a_repository(cfg, overlay, file):
    known = dataclasses.replace(
        cfg, file=PublishedFile(NAME, url=URL, hub_id='lab/resnet'), hf_hub_id='lab/resnet')
    assert dataclasses.replace(known, **overlay).file == file


def test_a_namespace_of_ones_own_gives_every_name_a_repository():
    code = '''
import json, timm, timm_miil
cfgs = [timm.get_pretrained_cfg(name) for name in (
    'resnet50.miil_in21k', 'mldecoder_tresnet_l', 'mldecoder_scenes', 'resnet50.a1_in1k')]
print(json.dumps([[cfg.hf_hub_id, getattr(cfg.file, 'hub_id', None)] for cfg in cfgs]))
'''
    done = subprocess.run(
        [sys.executable, '-c', code], env=os.environ | {'TIMM_MIIL_HUB_NAMESPACE': 'lab'}, capture_output=True,
        text=True, cwd=Path(timm_miil.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ['lab/resnet50.miil_in21k'] * 2, ['lab/mldecoder_tresnet_l.miil_coco_448'] * 2, [None, None],
        ['timm/resnet50.a1_in1k', None]]


def test_a_reload_of_the_room_is_silent(recwarn):
    importlib.reload(timm_miil.models)
    assert not recwarn.list
