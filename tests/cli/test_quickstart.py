"""`timm-miil quickstart` from end to end: one short run, repeated; the full one is slow."""
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_miil.cli.main import main
from timm_miil.data import SceneConfig, read_coco
from timm_miil.train import evaluate, load_recipe


def printed_map(output):
    return float(re.search(r'^test mAP (\d+\.\d+) ', output, re.MULTILINE)[1])


def without_times(output):
    return re.sub(r', \d+ pictures/s|^done in \d+ s', '', output, flags=re.MULTILINE)


def test_it_prints_what_it_did(short_run):
    _, done = short_run
    want = [
        r'my out/scenes: 320 pictures to train on, 40 to validate, 80 to test; 30 labels',
        r'epoch 1/1: loss \d+\.\d{3}, val mAP \d+\.\d\d, \d+ pictures/s',
        r'test mAP \d+\.\d\d with the weights of epoch 1',
        r'my out/model: README\.md, config\.json, model\.safetensors',
        r'my out/scenes/test/000000\.png shows digit .*; the model says .*',
        r'my out/tagged\.png: a test picture and its labels',
        r'done in \d+ s; now try',
        r"  timm-miil predict 'my out/scenes/test' --model 'my out/model'",
        r"  timm-miil predict 'my out/scenes/test' --model 'my out/model' --format csv --output labels\.csv",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(want)
    for line, pattern in zip(lines, want):
        assert re.fullmatch(pattern, line), line
    assert done.stderr == ''  # bars are for terminals


def test_it_leaves_pictures_model_and_tagged_picture(short_run):
    folder, _ = short_run
    assert sorted(path.name for path in (folder / 'my out').iterdir()) == ['model', 'scenes', 'tagged.png']
    with Image.open(folder / 'my out' / 'tagged.png') as image:
        image.load()
        assert image.format == 'PNG' and image.width >= 320 and image.height > image.width


def test_the_saved_model_scores_what_was_printed(short_run):
    folder, done = short_run
    model = timm.create_model(f'local-dir:{folder / "my out" / "model"}', pretrained=True).eval()
    scenes = folder / 'my out' / 'scenes'
    records = read_coco(scenes / 'annotations' / 'instances_test.json', scenes / 'test')
    assert tuple(model.pretrained_cfg['label_names']) == records.label_names
    assert evaluate(model, records)['map'] == pytest.approx(printed_map(done.stdout), abs=0.006)


def test_the_commands_it_names_run(short_run, monkeypatch, capsys):
    folder, done = short_run
    monkeypatch.chdir(folder)
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == 'timm-miil' and main(command[1:]) == 0
    assert len({line.split(',')[0] for line in Path('labels.csv').read_text().splitlines()}) == 81  # and the header


def test_again_it_uses_the_pictures_and_gives_the_same(short_run, monkeypatch, capsys):
    folder, done = short_run
    monkeypatch.chdir(folder)
    few = {name: len(list((folder / 'my out' / 'scenes' / name[4:]).iterdir()))
           for name in ('num_train', 'num_val', 'num_test')}
    monkeypatch.setattr('timm_miil.cli.quickstart.SceneConfig', partial(SceneConfig, **few))
    picture, weights = (folder / 'my out' / name for name in ('scenes/train/000000.png', 'model/model.safetensors'))
    made, before = picture.stat().st_mtime_ns, weights.read_bytes()
    assert main(['quickstart', '--epochs', '1', '--out', 'my out']) == 0
    again = capsys.readouterr().out
    assert without_times(again) == without_times(done.stdout)
    assert picture.stat().st_mtime_ns == made and weights.read_bytes() == before


@pytest.mark.parametrize(('words', 'config', 'changes'), [
    ([], SceneConfig(seed=0), {}),
    (['--seed', '5', '--num-classes', '12', '--epochs', '3'], SceneConfig(seed=5, num_classes=12),
     {'seed': '5', 'epochs': '3'}),
])
def test_the_numbers_given_decide_pictures_and_training(short_run, tmp_path, monkeypatch, words, config, changes):
    made, scenes = [], short_run[0] / 'my out' / 'scenes'

    def stop(recipe, splits, **options):
        made.extend((recipe, len(splits.train), options['device']))
        raise RuntimeError('stop')

    monkeypatch.setattr(
        'timm_miil.cli._training.make_scenes', lambda directory, config, **_: made.append(config) or scenes)
    monkeypatch.setattr('timm_miil.cli._training.train', stop)
    assert main(['quickstart', '--out', str(tmp_path / 'out'), *words]) == 2
    assert made == [config, load_recipe('scenes_asl').override(changes), 320, torch.device('cpu')]


@pytest.mark.parametrize(('words', 'message'), [
    (['--num-classes', '5'], 'num_classes must be in [10, 100], got 5'),
    (['--epochs', '0'], 'override: epochs must be at least 1, got 0'),
    (['--seed', '-1'], 'override: seed must be in [0, 4.29497e+09), got -1'),
])
def test_wrong_numbers_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(['quickstart', *words]) == 2
    assert capsys.readouterr().err.startswith(f'timm-miil quickstart: {message}')
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_learn_it_names_the_pip_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert main(['quickstart']) == 2
    assert capsys.readouterr().err == (
        'timm-miil quickstart: sklearn.datasets is needed here and is not installed; '
        'run: pip install "timm-miil[train]".\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize('seed', ['0', '1', '2'])
def test_the_default_reaches_its_mark(tmp_path, seed):
    done = subprocess.run(
        [sys.executable, '-m', 'timm_miil.cli.main', 'quickstart', '--seed', seed, '--out', tmp_path / 'out'],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed_map(done.stdout) >= 90


@pytest.mark.parametrize('words, message', [
    (['--device', 'abacus'], "--device must be 'auto', 'cpu' or an accelerator here, got 'abacus'"),
    ([], 'model is no model folder: it holds notes.txt; choose another folder'),
])
def test_what_would_fail_at_the_end_fails_at_once(words, message, tmp_path, capsys):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'notes.txt').write_text('mine')
    assert main(['quickstart', '--out', str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['model']
