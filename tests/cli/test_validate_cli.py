"""`timm-miil validate` on real files: every option, its output and files, and every way to use it wrongly."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from labelled_pictures import LABELS, NUM, save_data, save_model

from timm_miil.cli.main import main
from timm_miil.data import open_split
from timm_miil.inference import validate


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp('data'))


def run(*words: object, workers: int = 0) -> int:
    return main(['validate', *map(str, words), '--workers', str(workers)])


def test_what_is_printed_and_written_is_what_validate_finds(model_dir, data_dir, tmp_path, capsys):
    results = tmp_path / 'a.json'
    assert run(model_dir, '--data-dir', data_dir, '--results-file', results, '--threshold', '0.4') == 0
    out, err = capsys.readouterr()
    want = validate(str(model_dir), open_split(data_dir, 'val'), threshold=0.4)
    lines = out.splitlines()
    assert lines[0] == f'{model_dir} on {data_dir}, val' and lines[1] == f'{NUM} pictures, 3 labels' and err == ''
    assert lines[2] == f'mAP {100 * want.average_precision.mean:.2f}'
    assert f'OF1 {100 * want.f1.overall_f1:.2f}' in out and f'CF1 {100 * want.f1.class_f1:.2f}' in out
    assert f'calibration error {want.calibration_error:.4f}' in out
    table = [line.split('  ') for line in lines[lines.index('') + 1:]]
    order = sorted(want.class_results(), key=lambda row: row.average_precision)
    assert [row[0] for row in table] == ['label', *(result.label for result in order)]
    content = json.loads(results.read_text())
    assert (content['model'], content['data_dir'], content['split']) == (str(model_dir), str(data_dir), 'val')
    assert content['classes'] == json.loads(want.to_json())['classes']


def test_classes_as_csv(model_dir, data_dir, tmp_path):
    assert run(model_dir, '--data-dir', data_dir, '--results-file', tmp_path / 'a.csv', '-b', 5, workers=2) == 0
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['label'] for row in rows] == list(LABELS)


def test_the_report_is_of_the_pictures_that_were_measured(model_dir, data_dir, tmp_path, capsys):
    report = tmp_path / 'a.html'
    status = run(model_dir, '--data-dir', data_dir, '--split', 'odd', '--common', '--report', report)
    _, err = capsys.readouterr()
    assert status == 1
    assert "not measured, since the data lack them: cat\n" in err
    assert "not measured, since the model lacks them: dog\n" in err
    assert f"1 pictures left out:\n  cannot read '{data_dir / 'odd' / '03.png'}': it is not a JPEG" in err
    text = report.read_text()
    assert f'<h1>{model_dir.name} on {data_dir.name}</h1>' in text
    assert '<dt>pictures left out</dt><dd>1</dd>' in text and '<dd>1 of the model, 1 of the data</dd>' in text
    assert 'odd/03.png' not in text and 'odd/04.png' in text and 'bee &lt;b&gt;' in text


def test_labels_choose_columns_and_name_classes(model_dir, data_dir, tmp_path, capsys):
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join([*LABELS[::-1], 'dog']))
    assert run(model_dir, '--data-dir', data_dir, '--labels', names) == 2
    assert "the model lacks 1 of the 4 of the data ('dog')" in capsys.readouterr().err
    assert run(model_dir, '--data-dir', data_dir, '--labels', names, '--common') == 0
    nameless = save_model(tmp_path / 'nameless', label_names=None)
    assert run(nameless, '--data-dir', data_dir) == 2
    assert 'the model does not name its classes; give label_names, one a class (--labels).' in capsys.readouterr().err
    names.write_text('\n'.join(LABELS))
    assert run(nameless, '--data-dir', data_dir, '--labels', names) == 0


def test_a_zero_shot_model_is_asked_for_the_labels_of_the_data(data_dir, tmp_path, capsys):
    vectors = tmp_path / 'vectors.npy'
    np.save(vectors, np.eye(3, 300, dtype=np.float32))
    for words in ([], ['--embeddings', vectors]):
        assert run('mldecoder_zero_shot_scenes', '--data-dir', data_dir, *words) == 0
        assert 'bee <b>' in capsys.readouterr().out


def test_other_settings_reach_the_model(model_dir, data_dir, capsys):
    assert run(model_dir, '--data-dir', data_dir, '--activation', 'softmax', '--amp', '--device', 'cpu') == 0
    assert '\ntop-1 ' in capsys.readouterr().out


@pytest.mark.parametrize(('words', 'message'), [
    (['--results-file', 'a.txt'], r"--results-file must end in .csv or .json, got 'a.txt'."),
    (['--report', 'a.pdf'], r"--report must end in .html, got 'a.pdf'."),
    (['--results-file', 'no/such/a.csv'], r"there is no folder 'no/such' for 'a.csv'."),
    (['--set', 'foo'], r"--set must be OPTION=VALUE, got 'foo'."),
    (['--set', 'split=train'], r'--set is for options of the format; for split there is --split.'),
    (['--set', 'ignore_unknown_labels=maybe', 'foo=1'], r"unknown option 'foo' of format"),
    (['--split', 'odd'], r"the data lack 1 of the 3 of the model ('cat'); the model lacks 1 of the 3 of the data "),
    (['--split', 'odd', '--common', '--strict'], r"odd/03.png': it is not a JPEG, PNG, WebP, GIF, BMP or TIFF"),
    (['--split', 'foo'], "has no split 'foo'; it has "),
    (['--labels', 'coco_81'], "did you mean 'coco_80'?"),
    (['--threshold', '2'], r'threshold must be in [0, 1], got 2.0.'),
    (['--batch-size', '0'], r'batch_size must be at least 1, got 0.'),
    (['--device', 'foo'], r"--device must be 'auto', 'cpu' or an accelerator here, got 'foo'"),
    (['--fars', '1'], r'--fars are for a model of embeddings, got one of labels; leave them out.'),
    (['--embeddings', 'none.npy'], 'none.npy'),
])
def test_wrong_use_is_one_line(words, message, model_dir, data_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(model_dir, '--data-dir', data_dir, *words) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err and err.startswith('timm-miil validate: ') and err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_missing_things_are_one_line(model_dir, data_dir, capsys, tmp_path):
    assert run(model_dir, '--data-dir', tmp_path / 'none') == 2
    assert 'data_dir must be the folder of a data set, got' in capsys.readouterr().err
    assert run(tmp_path / 'none', '--data-dir', data_dir) == 2
    assert 'no such model folder' in capsys.readouterr().err
    assert run(model_dir) == 2
    assert 'the following arguments are required: --data-dir' in capsys.readouterr().err


def test_without_matplotlib_a_report_is_refused_before_the_run(model_dir, data_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert run(model_dir, '--data-dir', data_dir, '--report', tmp_path / 'a.html') == 2
    out, err = capsys.readouterr()
    assert out == '' and 'pip install "timm-miil[train]"' in err


def test_of_many_labels_the_worst_are_shown(monkeypatch, model_dir, data_dir, capsys):
    monkeypatch.setattr('timm_miil.cli.validate.MAX_TABLE', 2)
    monkeypatch.setattr('timm_miil.cli.validate.TABLE_WORST', 1)
    assert run(model_dir, '--data-dir', data_dir) == 0
    out, err = capsys.readouterr()
    assert len(out.rpartition('\n\n')[2].splitlines()) == 2
    assert err == 'timm-miil validate: of 3 labels the worst 1 are shown; --results-file has all.\n'
