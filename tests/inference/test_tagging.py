"""A run over many pictures tags each exactly once, whatever is killed when and however many processes share it."""
import copy
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_miil
from timm_miil._errors import PredictionError
from timm_miil._locks import locked
from timm_miil.cli.main import main
from timm_miil.inference import Tagger, tag_to_folder
from timm_miil.inference._input_list import write_list

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk')
NUM_PICTURES = 40
WORDS = ['--threshold', '0', '--batch-size', '2', '--part-size', '4', '--device', 'cpu']
ENVIRONMENT = os.environ | {'PYTHONPATH': str(Path(timm_miil.__file__).parents[1]), 'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=len(LABELS))
    nn.init.normal_(model.fc.weight)
    timm.models.save_for_hf(
        model, folder, safe_serialization=True, model_config=dict(label_names=list(LABELS), activation='sigmoid'))
    return folder


@pytest.fixture(scope='module')
def tagger(model_dir) -> Tagger:
    return Tagger.from_name(str(model_dir), threshold=0)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f'{number:02}.png')
    (folder / '07.png').write_text('no picture')
    for number in range(20, 24):  # a whole part
        (folder / f'{number}.png').write_bytes(b'')
    return folder


@pytest.fixture(scope='module')
def undisturbed(pictures, tagger, tmp_path_factory) -> dict[str, bytes]:
    """The parts of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp('undisturbed')
    summary = run(tagger, [pictures], folder)
    assert (summary.pictures, summary.tagged, summary.errors, summary.parts) == (NUM_PICTURES, 35, 5, 10)
    return parts(folder)


def run(tagger: Tagger, paths, folder: Path, **settings):
    settings = dict(format='json', part_size=4, batch_size=2, num_workers=0) | settings
    return tag_to_folder(tagger, paths, folder, **settings)


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob('part-*'))}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for content in parts(folder).values() for line in content.splitlines()]


# -- what is written


def test_the_rows_are_those_of_the_tagger(pictures, tagger, undisturbed, tmp_path):
    names = [path for path in sorted(pictures.iterdir()) if int(path.stem) not in (7, 20, 21, 22, 23)][:16]
    run(tagger, names, tmp_path / 'out')
    want = [
        {'path': str(one.path), 'error': None, 'tags': [
            {'label': tag.label, 'confidence': round(tag.confidence, 6), 'index': tag.index} for tag in one.tags]}
        for one in tagger(names, batch_size=2)]
    assert rows(tmp_path / 'out') == want
    everything = [json.loads(line) for content in undisturbed.values() for line in content.splitlines()]
    assert [row['path'] for row in everything] == [str(path) for path in sorted(pictures.iterdir())]
    assert [(row['path'], row['error'], row['tags']) for row in everything if row['error']] == [
        (str(one.path), one.error, []) for one in tagger(sorted(pictures.iterdir())) if one.error]


def test_batch_size_and_workers_change_no_more_than_rounding(pictures, tagger, undisturbed, tmp_path):
    run(tagger, [pictures], tmp_path, batch_size=3, num_workers=2)
    want = [json.loads(line) for content in undisturbed.values() for line in content.splitlines()]
    got = rows(tmp_path)
    assert [row['path'] for row in got] == [row['path'] for row in want]
    for one, other in zip(got, want, strict=True):
        assert {tag['label']: tag['confidence'] for tag in one['tags']} == pytest.approx(
            {tag['label']: tag['confidence'] for tag in other['tags']}, abs=1e-5)


def test_parquet_says_the_same_to_datasets(pictures, tagger, undisturbed, tmp_path):
    parquet, datasets = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('datasets')
    out = tmp_path / 'out'
    summary = run(tagger, [pictures], out, format='parquet')  # the first part has no error, another one no tags
    assert (summary.errors, summary.parts) == (5, 10)
    want = [json.loads(line) for content in undisturbed.values() for line in content.splitlines()]
    got = datasets.load_dataset(
        'parquet', data_files=str(out / '*.parquet'), split='train', cache_dir=str(tmp_path / 'cache'))
    assert got.column_names == ['path', 'labels', 'confidences', 'indices', 'error']
    for one, row in zip(got, want, strict=True):
        assert (one['path'], one['error']) == (row['path'], row['error'])
        assert one['labels'] == [tag['label'] for tag in row['tags']]
        assert one['indices'] == [tag['index'] for tag in row['tags']]
        np.testing.assert_allclose(one['confidences'], [tag['confidence'] for tag in row['tags']], atol=1e-6)
    schema = parquet.read_schema(out / 'part-000000.parquet')
    assert str(schema.field('indices').type).startswith('list<') and 'int32' in str(schema.field('indices').type)


def test_pictures_in_tar_files_are_tagged_as_files_are(pictures, tagger, undisturbed, tmp_path):
    (tmp_path / 'in').mkdir()
    shard = tmp_path / 'in' / 'shard.tar'
    with tarfile.open(shard, 'w') as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, f'deep/{path.name}')
            tar.addfile(tarfile.TarInfo(f'deep/{path.stem}.json'), io.BytesIO())
    (tmp_path / 'in' / 'torn.tar').write_bytes(shard.read_bytes()[:9000])
    summary = run(tagger, [tmp_path / 'in'], tmp_path / 'out', num_workers=1)
    assert (summary.pictures, summary.errors) == (NUM_PICTURES + 1, 6)
    want = [json.loads(line) for content in undisturbed.values() for line in content.splitlines()]
    *got, torn = rows(tmp_path / 'out')
    assert [row['path'] for row in got] == [f'{shard}/deep/{Path(row["path"]).name}' for row in want]
    assert [row['tags'] for row in got] == [row['tags'] for row in want]
    assert (torn['path'], torn['error']) == (str(tmp_path / 'in' / 'torn.tar'), (
        f"cannot read '{tmp_path}/in/torn.tar': its member 'deep/01.png' claims 3172 bytes, and the whole shard has "
        '9000.'))
    shard.touch()
    with pytest.raises(ValueError, match='has a run of other pictures'):
        run(tagger, [tmp_path / 'in'], tmp_path / 'out')


# -- starting again


def test_what_is_missing_is_made_again_and_nothing_else(pictures, tagger, undisturbed, tmp_path):
    run(tagger, [pictures], tmp_path)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('part-*')}
    for name in ('part-000002.jsonl', 'part-000009.jsonl'):
        (tmp_path / name).unlink()
        del kept[name]
    left = [tmp_path / name for name in ('.part-000002.jsonl-abc', '.inputs.jsonl-abc', '.summary.json-abc')]
    for path in left:
        path.write_text('half')
    made = []
    assert run(tagger, [pictures], tmp_path, on_part=lambda *counts: made.append(counts)).pictures == NUM_PICTURES
    assert made == [(1, 2), (2, 2)]
    assert parts(tmp_path) == undisturbed and not any(path.exists() for path in left)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


HELD = '''
import sys, time
from timm_miil.cli.main import main
from timm_miil.inference import tagging

write_part = tagging.write_part

def held(path, *rest):
    if path.name == 'part-000003.jsonl':
        time.sleep(600)
    write_part(path, *rest)

tagging.write_part = held
sys.exit(main())
'''


def test_a_killed_run_goes_on_to_the_same_bytes(pictures, model_dir, undisturbed, tmp_path):
    words = [str(pictures), '--model', str(model_dir), *WORDS, '--output-dir', str(tmp_path / 'out')]
    (tmp_path / 'held.py').write_text(HELD)
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / 'held.py'), 'predict', *words, '--workers', '1'], env=ENVIRONMENT,
        stderr=subprocess.DEVNULL)
    while child.poll() is None and len(list((tmp_path / 'out').glob('part-*'))) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = parts(tmp_path / 'out')
    assert before.items() <= undisturbed.items() and len(before) == 3
    assert main(['predict', *words, '--workers', '0']) == 0
    assert parts(tmp_path / 'out') == undisturbed
    assert json.loads((tmp_path / 'out' / 'summary.json').read_text()) == {
        'pictures': NUM_PICTURES, 'tagged': 35, 'errors': 5, 'parts': 10}


LAUNCH = [
    sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
    '--main_process_port', '0', '--mixed_precision', 'no', '--dynamo_backend', 'no']
LOGGED = '''
import os, pathlib, sys, time
from timm_miil.cli.main import main
from timm_miil.inference import tagging

write_part, rank = tagging.write_part, os.environ['RANK']

def logged(path, *rest):
    while rank == '1' and not pathlib.Path(os.environ['GO']).exists():
        time.sleep(0.01)
    write_part(path, *rest)
    os.write(2, f'process {rank} made {path.name}{os.linesep}'.encode())

tagging.write_part = logged
sys.exit(main())
'''


def test_two_processes_share_what_another_number_has_left_and_keep_others_out_to_the_last_one(
        pictures, model_dir, tagger, undisturbed, tmp_path, monkeypatch):
    out, script, go = tmp_path / 'out', tmp_path / 'logged.py', tmp_path / 'go'
    run(tagger, [pictures], out, model=str(model_dir))
    for part in (1, 2, 3, 6, 8):
        (out / f'part-{part:06}.jsonl').unlink()
    (out / 'summary.json').unlink()
    script.write_text(LOGGED)
    child = subprocess.Popen(
        [*LAUNCH, str(script), 'predict', str(pictures), '--model', str(model_dir), *WORDS, '--workers', '0',
         '--output-dir', str(out)],
        env=ENVIRONMENT | {'GO': str(go)}, stderr=subprocess.PIPE, text=True)
    try:
        while child.poll() is None and not (out / 'part-000008.jsonl').exists():  # the last one of the first process
            time.sleep(0.01)
        with locked(out / '.lock', seconds=60):  # the first process has ended
            pass
        monkeypatch.setattr('timm_miil.inference.tagging.LOCK_SECONDS', 0.1)
        with pytest.raises(BlockingIOError, match='another run works in'):
            run(tagger, [pictures], out, model=str(model_dir))
    finally:
        go.touch()
        words = child.communicate(timeout=60)[1]
    assert child.returncode == 0, words[-3000:]
    made = sorted(re.findall(r'process (\d) made part-(\d+)\.jsonl', words))
    assert made == [('0', '000001'), ('0', '000003'), ('0', '000008'), ('1', '000002'), ('1', '000006')]
    assert '35 labelled, 5 not read, in 10 parts.' in words
    assert parts(out) == undisturbed and (out / 'summary.json').exists()


@pytest.mark.parametrize('change, words', [
    (dict(part_size=8), 'part_size was 4 and is 8'), (dict(format='parquet'), "format was 'json' and is 'parquet'"),
    (dict(model='other'), "model was '' and is 'other'")])
def test_other_settings_are_refused(change, words, pictures, tagger, tmp_path):
    run(tagger, [pictures / '00.png'], tmp_path)
    with pytest.raises(ValueError, match=f'has a run with other settings: {words}; give the same ones'):
        run(tagger, [pictures / '00.png'], tmp_path, **change)


def test_other_weights_and_other_pictures_are_refused(pictures, tagger, model_dir, tmp_path):
    run(tagger, [pictures / '00.png'], tmp_path)
    with pytest.raises(ValueError, match='has a run of other pictures'):
        run(tagger, [pictures / '01.png'], tmp_path)
    other = Tagger.from_name(str(model_dir), threshold=0)
    with torch.no_grad():
        other.model.fc.bias += 1
    with pytest.raises(ValueError, match='other settings: weights was'):
        run(other, [pictures / '00.png'], tmp_path)


def test_a_damaged_run_is_refused(pictures, tagger, tmp_path):
    run(tagger, [pictures / '00.png'], tmp_path)
    with open(tmp_path / 'part-000000.jsonl', 'ab') as file:
        file.write(b'{}\n')
    with pytest.raises(ValueError, match='part-000000.jsonl has 2 rows instead of 1; delete it and start again'):
        run(tagger, [pictures / '00.png'], tmp_path)
    with open(tmp_path / 'inputs.jsonl', 'ab') as file:
        file.write(b'\n')
    with pytest.raises(ValueError, match='has a damaged run'):
        run(tagger, [pictures / '00.png'], tmp_path)


def test_two_runs_do_not_share_a_folder(pictures, tagger, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_miil.inference.tagging.LOCK_SECONDS', 0.1)
    with locked(tmp_path / '.lock', seconds=1), pytest.raises(BlockingIOError, match='another run works in .*wait for'):
        run(tagger, [pictures], tmp_path)
    assert not parts(tmp_path)


def test_a_reading_process_that_is_ended_from_outside_is_told(pictures, tagger, undisturbed, tmp_path):
    deadly = copy.copy(tagger)
    deadly.transform = lambda image: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PredictionError, match='one of 1 processes that read pictures was ended .* fewer workers'):
        run(deadly, [pictures], tmp_path, num_workers=1)
    assert not parts(tmp_path)


def test_one_that_is_ended_while_the_network_works_is_told_alike(pictures, tagger, tmp_path):
    slow = copy.copy(tagger)

    def ended(inputs):
        [child] = multiprocessing.active_children()
        child.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)  # torch's own handler of signals raises here

    slow.scores = ended
    with pytest.raises(PredictionError, match='one of 1 processes that read pictures was ended .* fewer workers'):
        run(slow, [pictures], tmp_path, num_workers=1)


def test_parts_of_a_run_that_has_lost_its_settings_are_not_taken_over(pictures, tagger, tmp_path):
    run(tagger, [pictures], tmp_path)
    (tmp_path / 'run.json').unlink()
    with pytest.raises(ValueError, match='has parts of a run without its run.json; choose another folder'):
        run(tagger, [pictures], tmp_path)


def test_a_folder_without_pictures_is_an_error(tagger, tmp_path):
    (tmp_path / 'in').mkdir()
    with pytest.raises(FileNotFoundError, match='no pictures found'):
        run(tagger, [tmp_path / 'in'], tmp_path / 'out')


def test_the_list_does_not_enter_the_run_itself(pictures, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'mine.png')
    out = tmp_path / 'out'
    out.mkdir()
    Image.new('RGB', (8, 8)).save(out / 'theirs.png')
    assert write_list([tmp_path], out, 4).pictures == 1


@pytest.mark.parametrize('words, message', [
    (['--format', 'csv'], "--format must be json or parquet with --output-dir, got 'csv'."),
    (['--output', 'x.txt'], '--output-dir is a place of its own; leave out --output and --save-pictures.'),
    (['--part-size', '0'], 'part_size must be at least 1, got 0.')])
def test_wrong_use_is_one_line(words, message, pictures, model_dir, tmp_path, capsys):
    argv = ['predict', str(pictures), '--model', str(model_dir), '--device', 'cpu', '--output-dir', str(tmp_path / 'o')]
    assert main([*argv, *words]) == 2
    assert capsys.readouterr().err == f'timm-miil predict: {message}\n'
