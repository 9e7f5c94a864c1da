"""What stops a run is one error that says what to do, whoever meets it: a loss, a worker, a step, a stream."""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import timm_miil.train._output as output_module
import timm_miil.train._scoring as scoring_module
import timm_miil.train.checkpoint as checkpoint_module
from timm_miil._errors import ImageError, TrainingError, TrainingInterrupted
from timm_miil.data import ImageStream, MultiLabelRecords, SparseTargets
from timm_miil.train import Splits, list_recipes, load_recipe, read_splits, train

DIVERGING = {
    'epochs': '1', 'batch_size': '32', 'optimizer.name': 'sgd', 'optimizer.lr': '1e38', 'schedule.name': 'constant',
    'schedule.warmup_epochs': '0'}


@pytest.fixture
def pictures(tiny_scenes):
    splits = read_splits(tiny_scenes)
    return Splits(splits.train.select(range(32)), splits.val.select(range(8)))


class Stream(ImageStream):
    def __init__(self, source):
        super().__init__(source.label_names, len(source))
        self.source = source

    def label_counts(self):
        return self.source.label_counts()

    def iterate(self, *, seed, epoch, process, num_processes):
        for row in range(process, len(self.source), num_processes):
            yield self.source.load_image(row), self.source.labels.row(row), self.source.image_name(row)


def with_targets(images, targets):
    images.labels = SparseTargets.from_dense(targets)
    return images


def test_unknown_labels_that_the_loss_refuses_are_told_before_training(tiny_recipe, pictures):
    targets = pictures.train.targets
    targets[3, 5] = targets[4, 0] = -1
    splits = Splits(with_targets(pictures.train, targets), pictures.val)
    steps = []
    with pytest.raises(ValueError, match=(
            r'^2 labels of the training pictures are unknown \(-1\), which AsymmetricLoss refuses; set '
            r'loss.args.ignore_unknown = true to leave them out, or take')):
        train(tiny_recipe, splits, on_step=steps.append)
    assert not steps
    with pytest.raises(ValueError, match='^2 labels of the training pictures are unknown'):
        train(tiny_recipe, Splits(Stream(splits.train), pictures.val), on_step=steps.append)
    assert not steps
    train(tiny_recipe.override({'loss.args.ignore_unknown': 'true', 'epochs': '1'}), splits, on_step=steps.append)
    assert steps


@pytest.mark.parametrize('name', ['asl_voc', 'finetune'])
def test_recipes_whose_pictures_may_have_unknown_labels_leave_them_out(name):
    assert name in list_recipes() and load_recipe(name).loss.args['ignore_unknown'] is True


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_picture_is_one_line_whoever_read_it(tiny_recipe, pictures, tmp_path, workers, split):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no picture')
    images = getattr(pictures, split)
    load = images.load_image
    images.load_image = lambda row: load(row) if row != 5 else type(images).load_image(_Bad(images, bad), 0)
    with pytest.raises(ImageError) as caught:
        train(tiny_recipe.override({'epochs': '1', 'workers': str(workers)}), pictures)
    assert str(caught.value) == f"cannot read '{bad}': it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture."


class _Bad:
    def __init__(self, images, path):
        self.image_paths = [path]


@pytest.mark.parametrize('settings', [{}, {'checkpoint_steps': '1'}])
def test_a_step_that_spoils_the_weights_is_told_as_such_and_not_saved(tiny_recipe, pictures, tmp_path, settings):
    recipe = tiny_recipe.override({**DIVERGING, **settings})
    with pytest.raises(TrainingError, match=(
            r'^weights became infinite or nan in epoch 1, step 1 of 1, at learning rate 1e\+38; lower optimizer.lr .*; '
            r'the pictures of the step are in ')):
        train(recipe, pictures, output=tmp_path / 'run')
    facts = json.loads((tmp_path / 'run' / 'nonfinite.json').read_text())
    assert len(facts['names']) == 32 and facts['what'] == 'weights became infinite or nan'
    assert not list((tmp_path / 'run' / 'checkpoints').glob('*.pt'))


@pytest.mark.parametrize('shown', [0, 2])
def test_a_stream_of_pictures_with_other_than_one_label_is_refused(tiny_recipe, pictures, shown):
    targets = torch.eye(20, dtype=torch.int8)[torch.arange(32) % 20]
    targets[7, :2] = int(shown == 2)
    targets[7, 7] = 0
    recipe = tiny_recipe.override({
        'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}', 'epochs': '1'})
    good = torch.eye(20, dtype=torch.int8)[torch.arange(8)]
    splits = Splits(Stream(with_targets(pictures.train, targets)), Stream(with_targets(pictures.val, good)))
    with pytest.raises(ValueError, match=(
            f"^task 'single_label' needs exactly one present label a picture, got {shown} in train, picture '.*'; take "
            f"task 'multi_label'")):
        train(recipe, splits)


def test_a_signal_while_a_resumed_run_measures_its_best_epoch(tiny_recipe, pictures, tmp_path, monkeypatch):
    want = train(tiny_recipe, pictures, output=tmp_path / 'run')
    real = scoring_module.score_batches

    def score_batches(*args, **kwargs):
        for batch in real(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(scoring_module, 'score_batches', score_batches)
    with pytest.raises(TrainingInterrupted, match='^SIGTERM: stopped after epoch 2, and saved all in '):
        train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto')
    monkeypatch.setattr(scoring_module, 'score_batches', real)
    result = train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto')
    assert torch.equal(result.val_logits, want.val_logits)


HOLD = """
import sys, time
from timm_miil.train._output import RunFolder
with RunFolder(sys.argv[1], keep=1).held():
    print('held', flush=True)
    time.sleep(300)
"""


def test_two_runs_in_one_folder_at_a_time(tiny_recipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, 'WAIT_SECONDS', 0.2)
    recipe = tiny_recipe.override({'epochs': '1'})
    other = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path / 'run'], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(BlockingIOError, match="^output '.*run' has another run that is going on in it; wait"):
            train(recipe, pictures, output=tmp_path / 'run')
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    train(recipe, pictures, output=tmp_path / 'run')
    train(recipe, pictures, output=tmp_path / 'run', resume='auto')  # and the folder is free again


def test_an_output_that_is_a_file_or_in_one(tiny_recipe, pictures, tmp_path):
    (tmp_path / 'file').write_text('mine')
    for output in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(NotADirectoryError, match=f"^output must be a folder, got '{output}', where .*file is "):
            train(tiny_recipe, pictures, output=output)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_stream_that_goes_on_with_other_workers_is_told_of(tiny_recipe, pictures, tmp_path, caplog):
    def stop(record):
        if record.step == 2:
            raise InterruptedError

    recipe = tiny_recipe.override({'epochs': '1', 'checkpoint_steps': '1'})
    streams = Splits(Stream(pictures.train), pictures.val)
    with pytest.raises(InterruptedError):
        train(recipe, streams, output=tmp_path / 'run', on_step=stop)
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    train(recipe, streams, output=tmp_path / 'run', resume='auto')
    train(recipe.override({'workers': '1'}), pictures, output=tmp_path / 'plain')
    assert 'stream' not in caplog.text
    train(recipe.override({'workers': '2'}), streams, output=tmp_path / 'other', resume='auto')
    assert 'was read in 1 parts and is in 2: in the epoch that goes on some pictures are seen twice' in caplog.text


def test_without_a_map_the_last_epoch_is_kept(tiny_recipe, pictures, tmp_path, caplog):
    targets = pictures.val.targets
    targets[targets == 0] = -1  # as where only present labels were annotated
    splits = Splits(pictures.train, with_targets(pictures.val.select(range(8)), targets))
    result = train(tiny_recipe, splits, output=tmp_path / 'run')
    assert result.best_epoch == 2 and math.isnan(result.val_map)
    assert 'there is no mAP, and the last epoch is kept' in caplog.text

    def refuse(word):
        raise AssertionError(f'{word} is no JSON')

    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text(), parse_constant=refuse)
    assert summary['val']['map'] is None and summary['best_epoch'] == 2


def test_a_checkpoint_that_cannot_be_read_now_stops_and_costs_nothing(tiny_recipe, pictures, tmp_path, monkeypatch):
    recipe = tiny_recipe.override({'stop_epoch': '1'})
    train(recipe, pictures, output=tmp_path / 'run')
    folder = tmp_path / 'run' / 'checkpoints'
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def load(path):
        raise OSError(errno.EIO, 'Input/output error')

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, 'load_checkpoint', load)
        with pytest.raises(OSError, match='step-.* cannot be read .Input/output error.; try again, or move it away'):
            train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto').epochs) == 2


def test_a_table_that_lacks_its_last_epoch_is_whole_again(tiny_recipe, pictures, tmp_path):
    train(tiny_recipe, pictures, output=tmp_path / 'run')
    table = tmp_path / 'run' / 'results.csv'
    whole = table.read_text()
    table.write_text(''.join(whole.splitlines(keepends=True)[:-1]))
    train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto')
    assert table.read_text() == whole


def test_pictures_that_were_replaced_are_other_pictures(tiny_recipe, tmp_path):
    names = [f'{number}.png' for number in range(24)]
    for name in names:
        Image.new('RGB', (32, 32), (len(name), 0, 0)).save(tmp_path / name)
    targets = torch.eye(20, dtype=torch.int8)[torch.arange(24) % 20]
    records = MultiLabelRecords([tmp_path / name for name in names], targets, [f'label {each}' for each in range(20)])
    splits = Splits(records, records)
    train(tiny_recipe.override({'stop_epoch': '1'}), splits, output=tmp_path / 'run')
    for name in names:
        Image.new('RGB', (32, 32), (0, 0, 99)).save(tmp_path / name)
    with pytest.raises(ValueError, match='is of another run: pictures of train was 24 with 20 labels .* and is 24 '):
        train(tiny_recipe, splits, output=tmp_path / 'run', resume='auto')


def test_forgetting_all_labels_is_refused(tiny_recipe, pictures):
    recipe = tiny_recipe.override({'partial': '{scheme = "random_per_sample", drop_prob = 1.0}'})
    with pytest.raises(ValueError, match='partial must leave labels that are known, got none of them'):
        train(recipe, pictures)
