"""What trackers are told, and where that lies."""
import sys

import pytest

import timm_miil.train._run as run_module
from timm_miil._errors import TrainingError
from timm_miil.train import Splits, read_splits, train

PIP = r'run: pip install "timm-miil\[log\]"'


@pytest.fixture(scope='module')
def pictures(tiny_scenes):
    splits = read_splits(tiny_scenes)
    return Splits(splits.train.select(range(32)), splits.val.select(range(8)))


def scalars(folder):
    """Value by step, by tag, of all event files in a folder."""
    event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = {}
    for file in sorted(folder.rglob('events.out.tfevents.*')):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()['scalars']:
            for event in events.Scalars(tag):
                assert found.setdefault(tag, {}).setdefault(event.step, event.value) == event.value
    return found


def assert_epochs(found, result, steps_per_epoch):
    for record in result.epochs:
        row = record.as_row()
        assert {'train_loss', 'val_map', 'val_loss', 'val_micro_f1', 'lr', 'epoch'} <= row.keys() <= found.keys()
        for tag, value in row.items():
            assert found[tag][record.epoch * steps_per_epoch] == pytest.approx(value, rel=1e-6), tag


def test_tensorboard_is_told_each_epoch_and_some_steps(tiny_recipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, 'LOG_EVERY_STEPS', 3)
    recipe, steps = tiny_recipe.override({'batch_size': '8'}), []
    result = train(recipe, pictures, output=tmp_path / 'run', log=['tensorboard'], on_step=steps.append)
    found = scalars(tmp_path / 'run')
    assert_epochs(found, result, steps_per_epoch=4)
    assert set(found['train_loss']) == {4, 8} and set(found['train_loss_step']) == {3, 6}
    for number, loss in found['train_loss_step'].items():
        assert loss == pytest.approx(steps[number - 1].loss, rel=1e-6)
        assert found['lr'][number] == pytest.approx(steps[number - 1].lr, rel=1e-6)


def test_tensorboard_is_told_the_recipe(tiny_recipe, pictures, tmp_path):
    train(tiny_recipe.override({'epochs': '1'}), pictures, output=tmp_path / 'run', log=['tensorboard'])
    [file] = (tmp_path / 'run').rglob('hparams.yml')
    lines = file.read_text().splitlines()
    assert "epochs: '1'" in lines and "seed: '3'" in lines and 'task: multi_label' in lines


def test_trackio_is_told_each_epoch_and_sends_it_nowhere(tiny_recipe, pictures, tmp_path, monkeypatch):
    trackio = pytest.importorskip('trackio')
    calls, told, finished = [], {}, []

    class Run:
        log = staticmethod(lambda values, step: told.setdefault(step, {}).update(values))
        finish = staticmethod(lambda: finished.append(True))

    def init(**settings):
        calls.append(settings)
        return Run

    monkeypatch.setattr(trackio, 'init', init)
    monkeypatch.setattr(trackio, 'config', {})
    result = train(tiny_recipe, pictures, output=tmp_path / 'run', log=['trackio'])
    assert calls == [{'project': 'timm-miil'}], 'a space or a server is for the user to name'
    assert told == {2 * record.epoch: record.as_row() for record in result.epochs} and finished == [True]
    assert trackio.config['epochs'] == '2' and trackio.config['task'] == 'multi_label'


def test_a_tracker_is_finished_whatever_ends_the_run(tiny_recipe, pictures, tmp_path, monkeypatch):
    tracking, finished = pytest.importorskip('accelerate.tracking'), []
    monkeypatch.setattr(tracking.TensorBoardTracker, 'finish', lambda self: finished.append(self.name))
    recipe = tiny_recipe.override({'optimizer.lr': '1e30', 'schedule.name': 'constant', 'schedule.warmup_epochs': '0'})
    with pytest.raises(TrainingError):
        train(recipe, pictures, output=tmp_path / 'run', log=['tensorboard'])
    assert finished == ['tensorboard']


def test_the_temporary_network_has_curves_of_its_own(tiny_recipe, pictures, tmp_path):
    recipe = tiny_recipe.override({
        'epochs': '1', 'loss.name': 'class_aware_selective', 'loss.args': '{}',
        'prior': '{epochs = 2, loss = {name = "bce"}}'})
    result = train(recipe, pictures, output=tmp_path / 'run', log=['tensorboard'])
    found = scalars(tmp_path / 'run')
    assert_epochs(found, result, steps_per_epoch=2)
    assert set(found['prior/train_loss']) == {2, 4} and set(found['train_loss']) == {2}


def test_logging_changes_no_result_and_goes_on_with_the_run(tiny_recipe, pictures, tmp_path):
    whole = train(tiny_recipe, pictures)
    train(tiny_recipe.override({'stop_epoch': '1'}), pictures, output=tmp_path / 'run', log=['tensorboard'])
    result = train(tiny_recipe, pictures, output=tmp_path / 'run', resume='auto', log=['tensorboard'])
    assert result.epochs == whole.epochs
    assert_epochs(scalars(tmp_path / 'run'), result, steps_per_epoch=2)


def test_nothing_is_logged_that_was_not_asked_for(tiny_recipe, pictures, tmp_path):
    train(tiny_recipe.override({'epochs': '1'}), pictures, output=tmp_path / 'run')
    assert not list((tmp_path / 'run').rglob('events.*'))


@pytest.mark.parametrize('name', ['tensorboard', 'trackio'])
def test_a_tracker_that_is_not_installed_is_named_with_its_pip_line(
        tiny_recipe, pictures, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f'^{name} is needed here and is not installed; {PIP}'):
        train(tiny_recipe, pictures, output=tmp_path / 'run', log=[name])
    assert not (tmp_path / 'run').exists()


def test_other_trackers_and_a_missing_folder_are_refused(tiny_recipe, pictures, tmp_path):
    with pytest.raises(ValueError, match="log must be one of 'tensorboard', 'trackio', got 'paper'"):
        train(tiny_recipe, pictures, output=tmp_path / 'run', log=['paper'])
    with pytest.raises(ValueError, match='output must be given to resume a run or to log it, got None'):
        train(tiny_recipe, pictures, log=['tensorboard'])
