"""`timm-miil predict --labels` on real files, by the real command."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_miil
from timm_miil.cli.main import main
from timm_miil.heads import embed_characters

LABELS = ['red 7', 'digit 7', 'größe', 'hot dog']
ENVIRONMENT = os.environ | {
    'PYTHONPATH': str(Path(timm_miil.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1',
    'HF_HUB_OFFLINE': '1'}


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = timm.create_model(
        'mldecoder_zero_shot', backbone='test_resnet', labels=['red 7', 'blue 3'], embed_dim=8, text_dim=16,
        feedforward_dim=8, num_heads=2)
    nn.init.normal_(model.head.group_fc.weight)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config=dict(
        problem_type='multi_label_classification', thresholds=[0.0, 1.0]))
    return folder


@pytest.fixture(scope='module')
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('in') / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def labels(tmp_path) -> Path:
    (tmp_path / 'labels.txt').write_bytes('\r\n'.join(['', *LABELS, '']).encode('utf-8-sig'))
    return tmp_path / 'labels.txt'


def run(*words: object) -> int:
    return main(['predict', *map(str, words)])


def tags(out: str) -> dict[str, float]:
    return {tag['label']: tag['confidence'] for tag in json.loads(out)['tags']}


def test_the_command_tags_with_the_labels_of_a_file(picture, model_dir, labels):
    command = [sys.executable, '-m', 'timm_miil.cli.main', 'predict', picture, '--model', model_dir]
    done = subprocess.run(
        [*command, '--labels', labels, '--threshold', '0', '--format', 'json'], env=ENVIRONMENT, capture_output=True,
        text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tags(done.stdout).keys() == set(LABELS)
    assert done.stderr.startswith(
        "timm-miil predict: the model's own thresholds are for its own labels and not used.\n"
        'timm-miil predict: 1 labelled, 0 not read, ')


def test_seen_labels_have_their_confidence_among_unseen_ones(picture, model_dir, labels, capsys):
    assert run(picture, '--model', model_dir, '--threshold', 0, '--format', 'json') == 0
    own = tags(capsys.readouterr().out)
    assert run(picture, '--model', model_dir, '--labels', labels, '--threshold', 0, '--format', 'json') == 0
    found = tags(capsys.readouterr().out)
    assert own.keys() == {'red 7', 'blue 3'}
    assert found['red 7'] == pytest.approx(own['red 7'], abs=1e-5)


@pytest.mark.parametrize('name', ['w.npy', 'w.txt'])
def test_embeddings_of_a_file_are_used(name, picture, model_dir, labels, tmp_path, capsys):
    vectors = embed_characters([*LABELS, 'other'], 16)
    if name == 'w.npy':
        np.save(tmp_path / name, vectors[:4].flip(0).numpy())
        want = vectors[:4].flip(0)
    else:
        lines = [f'{label.replace(" ", "_")} {" ".join(map(str, row))}\n'
                 for label, row in zip([*LABELS, 'other'], (2 * vectors).tolist())]
        (tmp_path / name).write_text(''.join(reversed(lines)), encoding='utf-8')
        want = 2 * vectors[:4]
    command = [picture, '--model', model_dir, '--labels', labels, '--threshold', 0, '--format', 'json']
    assert run(*command, '--embeddings', tmp_path / name) == 0
    found = tags(capsys.readouterr().out)
    model = timm.create_model(f'local-dir:{model_dir}', pretrained=True).eval()
    model.set_queries(want)
    tagger = timm_miil.inference.Tagger(model, label_names=LABELS, threshold=0, activation='sigmoid')
    [prediction] = tagger([picture])
    assert found == pytest.approx({tag.label: tag.confidence for tag in prediction.tags}, abs=2e-6)
    assert run(*command) == 0
    assert tags(capsys.readouterr().out) != pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize('words, error', [
    (['--labels', 'lost.txt'], "No such file or directory: 'lost.txt'"),
    (['--labels', 'empty.txt'], 'empty.txt must have label names, one a line, and has none.'),
    (['--labels', 'twice.txt'], "twice.txt must have each label once, and 'cat' is on lines 1 and 3."),
    (['--labels', 'latin.txt'], 'latin.txt must be a text file in UTF-8, and its byte 3 is not; save it as UTF-8.'),
    (['--embeddings', 'w.txt'], 'embeddings are those of labels, got no labels; give their names too.'),
    (['--labels', 'cat.txt', '--embeddings', 'w.txt'],
     "w.txt lacks words of 1 of 1 labels: 'cat'; rename these labels, or take another file."),
    (['--labels', 'cat.txt', '--embeddings', 'w.npz'],
     'w.npz is no NumPy archive of numbers: File is not a zip file.'),
    (['--labels', 'cat.txt', '--embeddings', 'narrow.txt'],
     'embeddings must have shape (K, 16), got (1, 2); this head reads embeddings of length 16: take the encoder that '
     'it was trained with, or build it with text_dim=2 and train it.'),
])
def test_wrong_files_are_one_line_that_says_why(words, error, picture, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (('empty.txt', b'\n'), ('twice.txt', b'cat\n\ncat\n'), ('latin.txt', b'caf\xe9'),
                          ('cat.txt', b'cat\n'), ('w.txt', b'dog 1 2\n'), ('narrow.txt', b'cat 1 2\n'),
                          ('w.npz', b'PK\x03\x04\x14\0')):
        Path(name).write_bytes(content)
    assert run(picture, '--model', model_dir, *words) == 2
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert err.rstrip().endswith(error)


def test_a_model_of_fixed_classes_is_one_line_that_says_what_to_do(picture, labels, tmp_path, capsys):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'm', safe_serialization=True)
    assert run(picture, '--model', tmp_path / 'm', '--labels', labels) == 2
    assert capsys.readouterr().err == (
        'timm-miil predict: the model knows its own 3 classes and takes no other labels; leave them out, or choose a '
        'zero-shot model, such as mldecoder_zero_shot_scenes.\n')


def test_help_names_the_default_of_either_way(capsys):
    assert run('--help') == 0
    words = ' '.join(capsys.readouterr().out.split())
    assert '(default: mldecoder_scenes, with --labels mldecoder_zero_shot_scenes)' in words
    assert '--labels FILE' in words and '--embeddings FILE' in words
