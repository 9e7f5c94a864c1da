"""`timm-miil quickstart` from end to end: one short run, repeated; the full one is slow."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import timm_miil
from timm_miil.cli.main import main
from timm_miil.data import read_coco
from timm_miil.train import evaluate

CHECKOUT = Path(timm_miil.__file__).parents[1]


def quickstart(folder, *words):
    return subprocess.run(
        [sys.executable, '-m', 'timm_miil.cli.main', 'quickstart', *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(CHECKOUT), 'HF_HUB_OFFLINE': '1'})


def printed_map(output):
    return float(re.search(r'^test mAP (\d+\.\d+) ', output, re.MULTILINE)[1])


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    """One epoch with its output, in a folder whose name needs quotes."""
    folder = tmp_path_factory.mktemp('quick start')
    done = quickstart(folder, '--epochs', '1', '--num-classes', '12', '--seed', '5', '--out', 'my out')
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_prints_what_it_did(short_run):
    _, done = short_run
    want = [
        r'my out/scenes: 3000 pictures to train on, 400 to validate, 800 to test; 12 labels',
        r'epoch 1/1: loss \d+\.\d{3}, val mAP \d+\.\d\d',
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
    assert len({line.split(',')[0] for line in Path('labels.csv').read_text().splitlines()}) == 801  # and the header


def test_again_it_uses_the_pictures_and_gives_the_same(short_run):
    folder, done = short_run
    picture, weights = (folder / 'my out' / name for name in ('scenes/train/000000.png', 'model/model.safetensors'))
    made, before = picture.stat().st_mtime_ns, weights.read_bytes()
    again = quickstart(folder, '--epochs', '1', '--num-classes', '12', '--seed', '5', '--out', 'my out')
    assert [line for line in again.stdout.splitlines() if not line.startswith('done')] == [
        line for line in done.stdout.splitlines() if not line.startswith('done')]
    assert picture.stat().st_mtime_ns == made and weights.read_bytes() == before


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
    done = quickstart(tmp_path, '--seed', seed)
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
