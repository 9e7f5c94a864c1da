"""`timm-miil explain` on real files: a picture for each label, and what is said when that cannot be."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_miil
from timm_miil.cli.main import main

COMMAND = [sys.executable, '-m', 'timm_miil.cli.main', 'explain']
ENVIRONMENT = os.environ | {
    'PYTHONPATH': str(Path(timm_miil.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with two pictures in `in/` and `in/sub/`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(['in/a.png', 'in/sub/b.png']):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 36)).save(name)
    return tmp_path


@pytest.fixture(scope='module')
def conv_model(tmp_path_factory) -> Path:
    """A model folder without an attending head, two of whose labels make one file name."""
    folder = tmp_path_factory.mktemp('model')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=3)
        torch.nn.init.normal_(model.fc.weight)
    timm.models.save_for_hf(
        model, folder, safe_serialization=True,
        model_config=dict(label_names=['a/b', 'a b', '../c'], problem_type='multi_label_classification'))
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_a_picture_for_each_label_in_a_process_of_its_own(folder):
    done = subprocess.run(
        [*COMMAND, 'in', '--label', 'digit 7', 'red 7'], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, '')
    lines = [line.split('  ') for line in done.stdout.splitlines()]
    assert [line[-2:] for line in lines] == [
        ['in/a.png'], ['digit 7', 'explained/a_digit_7.png'], ['red 7', 'explained/a_red_7.png'],
        ['in/sub/b.png'], ['digit 7', 'explained/sub/b_digit_7.png'], ['red 7', 'explained/sub/b_red_7.png']]
    assert all(0 <= float(line[1]) <= 1 for line in lines if len(line) > 1)
    assert files_in(folder / 'explained') == [
        'a_digit_7.png', 'a_red_7.png', 'sub/b_digit_7.png', 'sub/b_red_7.png']


def test_the_labels_found_are_shown_unless_told(folder, capsys):
    assert main(['explain', 'in/a.png', '--threshold', '0', '--topk', '3', '--output', 'out']) == 0
    shown = capsys.readouterr().out.splitlines()[1:]
    assert main(['predict', 'in/a.png', '--threshold', '0', '--topk', '3']) == 0
    predicted = capsys.readouterr().out.splitlines()[1:]
    assert len(shown) == 3 and [line.rpartition('  ')[0] for line in shown] == predicted
    assert main(['explain', 'in/a.png', '--threshold', '1', '--output', 'none']) == 0
    assert capsys.readouterr().out == 'in/a.png\n  no label\n' and not Path('none').exists()


def test_a_zero_shot_model_shows_the_labels_of_a_file(folder, capsys):
    Path('labels.txt').write_text('purple 7\nred 7\n')
    assert main(['explain', 'in/a.png', '--labels', 'labels.txt', '--threshold', '0']) == 0
    lines = [line.split('  ') for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(line[2] for line in lines) == ['purple 7', 'red 7']
    assert main(['explain', 'in/a.png', '--labels', 'labels.txt', '--label', 'purple 7', '--output', 'one']) == 0
    assert files_in(Path('one')) == ['a_purple_7.png']
    np.save('rows.npy', np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32))
    assert main([
        'explain', 'in/a.png', '--labels', 'labels.txt', '--embeddings', 'rows.npy', '--label', 'purple 7',
        '--output', 'given']) == 0
    pictures = [np.asarray(Image.open(Path(name, 'a_purple_7.png'))) for name in ('one', 'given')]
    assert not np.array_equal(*pictures)


def test_nothing_is_replaced_and_labels_do_not_collide(folder, conv_model, capsys):
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    words = ['explain', 'in/a.png', '--model', str(conv_model), '--output', 'out', '--label', 'a/b', 'a b', '../c']
    assert main(words) == 0
    assert files_in(Path('out')) == ['a____c.png', 'a_a_b.png', 'a_a_b_2.png']
    before = {name: Path('out', name).read_bytes() for name in files_in(Path('out'))}
    assert main(words) == 0
    assert len(files_in(Path('out'))) == 6 and all(
        Path('out', name).read_bytes() == content for name, content in before.items())
    assert files_in(folder) == ['in/a.png', 'in/sub/b.png'] + [f'out/{name}' for name in files_in(Path('out'))]


def test_the_method_and_the_opacity_are_chosen(folder):
    pytest.importorskip('pytorch_grad_cam', reason='needs the extra explain')
    for name, options in {'a': [], 'b': ['--method', 'layer_cam'], 'c': ['--alpha', '0.1']}.items():
        assert main(['explain', 'in/a.png', '--label', 'digit 7', '--output', name, *options]) == 0
    first, *others = (Path(name, 'a_digit_7.png').read_bytes() for name in 'abc')
    assert all(other != first for other in others)


def test_a_broken_picture_does_not_stop_the_others(folder, capsys):
    Path('in/a.png').write_bytes(b'none')
    assert main(['explain', 'in', '--label', 'digit 7', '--output', 'out']) == 1
    said = capsys.readouterr()
    assert said.out.startswith('in/a.png\n  not read\nin/sub/b.png\n')
    assert files_in(Path('out')) == ['sub/b_digit_7.png']
    assert said.err.startswith("timm-miil explain: cannot read 'in/a.png': it is not a JPEG")


def test_the_output_folder_is_not_explained(folder):
    assert main(['explain', '.', '--label', 'digit 7', '--output', 'in']) == 2  # nothing else is there
    assert main(['explain', '.', '--label', 'digit 7']) == 0
    assert main(['explain', '.', '--label', 'digit 7']) == 0
    assert len(files_in(Path('explained'))) == 4


@pytest.mark.parametrize('words, said', [
    (['in', '--label', 'digit 77'], "the model has no label 'digit 77'; did you mean 'digit 7'"),
    (['in', '--label', 'digit 7', '--topk', '2'], '--label says which labels to show; leave out --topk and'),
    (['in', '--labels', 'none.txt'], 'none.txt must have label names, one a line, and has none'),
    (['in', '--embeddings', 'none.txt'], 'embeddings are those of labels, got no labels; give their names too'),
    (['in', '--alpha', '2'], 'alpha must be in [0, 1], got 2.0'),
    (['missing.png'], "no such file or folder: 'missing.png'"),
    (['empty'], 'no pictures found; folders are searched for .bmp'),
    (['in', '--model', 'mldecoder_scene'], "unknown model 'mldecoder_scene'; did you mean 'mldecoder_scenes'"),
    (['in', '--method', 'cam'], "argument --method: invalid choice: 'cam'"),
])
def test_wrong_use_ends_in_one_line(folder, capsys, words, said):
    Path('empty').mkdir()
    Path('none.txt').write_text('\n')
    assert main(['explain', *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'timm-miil explain: {said}') and error.count('\n') == 1 and not Path('explained').exists()


def test_a_model_that_does_not_attend_is_told_with_the_method(folder, conv_model, capsys):
    assert main(['explain', 'in', '--model', str(conv_model), '--method', 'attention']) == 2
    assert "method 'attention' is for heads that attend" in capsys.readouterr().err


def test_a_missing_package_is_told(folder, conv_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    assert main(['explain', 'in', '--model', str(conv_model), '--label', 'a b']) == 2
    assert 'pip install "timm-miil[explain]"' in capsys.readouterr().err
