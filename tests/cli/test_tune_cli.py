"""`timm-miil tune` on a real folder and real pictures."""
import json
from pathlib import Path

import pytest
from labelled_pictures import save_data, save_model
from PIL import Image

from timm_miil.cli.main import main
from timm_miil.data import open_split
from timm_miil.inference import calibrate, validate


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / 'model')


def run(*words: object) -> int:
    return main(['tune', *map(str, words), '--workers', '0'])


def test_the_folder_is_tuned_and_the_gain_is_shown(folder, data_dir, capsys):
    before = validate(str(folder), open_split(data_dir, 'val'))
    assert run(folder, '--data-dir', data_dir) == 0
    out, err = capsys.readouterr()
    found = calibrate(before.logits, before.targets)
    config = json.loads((folder / 'config.json').read_text())
    assert (config['thresholds'], config['temperatures']) == (list(found.thresholds), list(found.temperatures))
    lines = [line.split() for line in out.splitlines()]
    assert ['mean', 'F1', f'{100 * before.f1.class_f1:.2f}', f'{100 * float(found.found.f1.mean()):.2f}'] in lines
    assert ['calibration', 'error', f'{100 * before.calibration_error:.2f}'] in [line[:3] for line in lines]
    assert out.startswith(f'12 pictures of {data_dir}, val; 3 labels\n') and err == ''
    assert out.endswith(f'thresholds and temperatures are in {folder / "config.json"}\n')
    after = validate(str(folder), open_split(data_dir, 'val'))
    assert after.thresholds == found.thresholds


def test_objective_and_output(folder, data_dir, tmp_path, capsys):
    before = (folder / 'config.json').read_bytes()
    words = ['--objective', 'recall', '--target', '0.9', '--seed', '3', '--output', tmp_path / 'copy']
    assert run(folder, '--data-dir', data_dir, *words) == 0
    source = open_split(data_dir, 'val')
    found = calibrate(validate(str(folder), source).logits, source.targets, objective='recall', target=0.9, seed=3)
    assert json.loads((tmp_path / 'copy' / 'config.json').read_text())['thresholds'] == list(found.thresholds)
    assert (folder / 'config.json').read_bytes() == before


def test_what_is_left_out_is_named(folder, data_dir, capsys):
    assert run(folder, '--data-dir', data_dir, '--split', 'odd', '--common') == 1
    err = capsys.readouterr().err
    assert 'timm-miil tune: labels that the data lack get what all share: cat\n' in err
    assert "timm-miil tune: 1 pictures left out:\n  cannot read" in err


@pytest.mark.parametrize(('words', 'message'), [
    (['--objective', 'precision'], "objective 'precision' needs a target in (0, 1], got None."),
    (['--objective', 'mAP'], "argument --objective: invalid choice: 'mAP'"),
    (['--split', 'odd'], "the labels of model and data differ"),
    (['--output', '.'], "output must be a new folder, got '.', which is there already."),
])
def test_wrong_use_is_one_line_and_changes_nothing(words, message, folder, data_dir, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = (folder / 'config.json').read_bytes()
    assert run(folder, '--data-dir', data_dir, *words) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err and err.count('\n') == 1
    assert (folder / 'config.json').read_bytes() == before


def test_what_is_no_folder_is_refused(data_dir, capsys, tmp_path):
    Image.new('RGB', (3, 3)).save(tmp_path / 'a.png')
    for name in ('mldecoder_scenes', tmp_path, tmp_path / 'a.png'):
        assert run(name, '--data-dir', data_dir) == 2
        assert 'a model folder on this machine is needed, with config.json and weights' in capsys.readouterr().err
