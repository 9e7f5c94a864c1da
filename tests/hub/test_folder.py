"""Model folders: complete or absent, and read back to the bit by timm."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_miil
from timm_miil._errors import CheckpointError
from timm_miil.hub import CardFacts, render_card, save_model_folder
from timm_miil.hub.folder import tuned_settings

LABELS = ['a cat', 'a dog', 'a "bird"', 'Ünicorn', 'fish']


def build(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            'mldecoder', backbone='resnet10t', channels=(8, 8, 16, 16), stem_width=8, embed_dim=16, num_heads=2,
            feedforward_dim=32, num_classes=5, pretrained_cfg_overlay={
                'input_size': (3, 48, 48), 'mean': (0.1, 0.2, 0.3), 'std': (1.0, 1.0, 1.0), 'crop_pct': 1.0,
                'crop_mode': 'squash', 'interpolation': 'bilinear'})
    return model.eval()


@pytest.fixture(scope='module')
def card():
    return render_card(CardFacts(
        name='mldecoder.test', summary='A test.', source='local-dir:model', licence='apache-2.0',
        architecture='mldecoder', num_params=10, input_size=(3, 48, 48), dataset='None such', dataset_id='none',
        label_names=LABELS, metrics=[], training='Not trained.', papers=['mldecoder']))


def test_timm_gives_the_model_back_to_the_bit(tmp_path, card):
    model = build()
    folder = save_model_folder(model, tmp_path / 'model', label_names=LABELS, card=card)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 48, 48, generator=generator)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert list(again.pretrained_cfg['label_names']) == LABELS
    config = timm.data.resolve_model_data_config(again)
    assert (config['input_size'], config['crop_mode'], list(config['mean'])) == ((3, 48, 48), 'squash', [0.1, 0.2, 0.3])


def test_the_folder_holds_three_files_and_equal_models_give_equal_bytes(tmp_path, card):
    one, two = (
        save_model_folder(build(), tmp_path / name, label_names=LABELS, card=card) for name in ('one', 'two'))
    names = ['README.md', 'config.json', 'model.safetensors']
    assert sorted(path.name for path in one.iterdir()) == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert len({(one / name).stat().st_mode for name in names}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['one', 'two']


def test_config_says_what_readers_need(tmp_path, card):
    folder = save_model_folder(build(), tmp_path / 'model', label_names=LABELS, card=card)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert config['architecture'] == 'mldecoder' and config['num_classes'] == 5
    assert config['label_names'] == LABELS and config['label_descriptions'] == {name: name for name in LABELS}
    assert config['problem_type'] == 'multi_label_classification'
    assert config['model_args']['backbone'] == 'resnet10t' and config['model_args']['channels'] == [8, 8, 16, 16]
    assert not {'url', 'file', 'hf_hub_id', 'source'} & config['pretrained_cfg'].keys()


@pytest.mark.slow
def test_the_cards_usage_runs_as_written(tmp_path, card):
    save_model_folder(build(), tmp_path / 'model', label_names=LABELS, card=card)
    Image.new('RGB', (30, 40), 'red').save(tmp_path / 'picture.png')
    code = card.split('```python\n')[1].split('```')[0].replace('>= 0.5', '>= 0')
    environment = {**os.environ, 'PYTHONPATH': str(Path(timm_miil.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert [line.rpartition(': ')[0] for line in done.stdout.splitlines()] == LABELS


def test_a_model_folder_is_replaced_whole(tmp_path, card):
    folder = save_model_folder(build(0), tmp_path / 'model', label_names=LABELS, card=card)
    before = (folder / 'model.safetensors').read_bytes()
    save_model_folder(build(1), folder, label_names=LABELS, card=card)
    assert (folder / 'model.safetensors').read_bytes() != before


def test_what_was_tuned_is_known_for_the_same_weights_alone(tmp_path, card):
    folder, tuned = tmp_path / 'model', {'thresholds': [0.1, 0.2, 0.3, 0.4, 0.5], 'temperatures': [2.0] * 5}
    assert tuned_settings(folder, build()) == {}
    save_model_folder(build(), folder, label_names=LABELS, card=card)
    assert tuned_settings(folder, build()) == {}
    save_model_folder(build(), folder, label_names=LABELS, card=card, **tuned)
    assert tuned_settings(folder, build()) == tuned
    assert tuned_settings(folder, build(1)) == tuned_settings(folder, build().half()) == {}
    for name in ('model.safetensors', 'config.json'):
        os.truncate(folder / name, 100)
        assert tuned_settings(folder, build()) == {}


def test_other_folders_are_refused_and_untouched(tmp_path, card):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='is no model folder: it holds thesis.txt; choose another folder'):
        save_model_folder(build(), tmp_path, label_names=LABELS, card=card)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_a_model_that_does_not_come_back_leaves_nothing(tmp_path, card):
    model = build()
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises((CheckpointError, RuntimeError)):
        save_model_folder(model, tmp_path / 'model', label_names=LABELS, card=card)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_differ_after_reading_are_told(tmp_path, card, monkeypatch):
    monkeypatch.setattr('timm_miil.hub.folder.create_model', lambda *_, **__: build(1))
    with pytest.raises(CheckpointError, match=r'differs from the given one in \d+ tensors, such as .backbone'):
        save_model_folder(build(0), tmp_path / 'model', label_names=LABELS, card=card)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('names', [LABELS[:4], [*LABELS[:4], LABELS[0]]])
def test_label_names_must_fit(tmp_path, card, names):
    with pytest.raises(ValueError, match='label_names must have one name a class, each once, got 4 different names'):
        save_model_folder(build(), tmp_path / 'model', label_names=names, card=card)


def test_a_card_without_metadata_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match='the head of the card must name license'):
        save_model_folder(build(), tmp_path / 'model', label_names=LABELS, card='# Mine')
    assert list(tmp_path.iterdir()) == []


def test_the_callers_generator_is_left_alone(tmp_path, card):
    model, before = build(), torch.get_rng_state()
    save_model_folder(model, tmp_path / 'model', label_names=LABELS, card=card)
    assert torch.equal(torch.get_rng_state(), before)
