"""A run that is stopped, by whatever means, ends as if it had not been: to the bit."""
import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_miil._errors import CheckpointError, TrainingInterrupted
from timm_miil.train import load_recipe, read_splits, train
from timm_miil.train.checkpoint import list_checkpoints, newest_checkpoint, save_checkpoint

CHILD = Path(__file__).with_name('resume_child.py')
# Dropout and averaged weights, checkpoints in the middle of an epoch: 12 steps in all.
CHANGES = {'epochs': '3', 'ema_decay': '0.6', 'checkpoint_steps': '3', 'model.args.drop_rate': '0.2'}
NUM_EVENTS = 60  # about as many files of its output are opened, renamed and removed


def in_forks(jobs):
    """What came of trainings, each in a process of its own; see resume_child.py."""
    done = subprocess.run(
        [sys.executable, CHILD], input=json.dumps(jobs), capture_output=True, text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job(scenes, output, kill=None, changes=None, resume='auto'):
    return {
        'scenes': str(scenes), 'output': str(output), 'changes': changes or CHANGES, 'kill': kill or {},
        'resume': resume}


def outcome(found):
    return {key: found.get(key) for key in ('digest', 'epochs', 'test', 'best', 'logits', 'error')}


def kill_jobs(scenes, folder, kills):
    """An undisturbed run, and for each series of kills one that is resumed after each of them."""
    jobs = [job(scenes, folder / 'undisturbed')]
    for number, series in enumerate(kills):
        jobs += [job(scenes, folder / str(number), kill) for kill in series] + [job(scenes, folder / str(number))]
    return jobs


def check_kills(scenes, folder, kills):
    jobs = kill_jobs(scenes, folder, kills)
    found = in_forks(jobs)
    assert len(found[0]['steps']) == 12 and found[0].get('error') is None
    for asked, got in zip(jobs, found):
        if not asked['kill']:
            assert outcome(got) == outcome(found[0]), (kills, got)
        elif 'signal' in asked['kill'] and got['status'] == 0:
            assert got['error'].startswith('TrainingInterrupted: SIG'), got
    return found


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tiny_scenes, tmp_path):
    draw = random.Random()  # another moment each time
    found = check_kills(tiny_scenes, tmp_path, [
        [{'event': draw.randrange(1, NUM_EVENTS)}, {'event': draw.randrange(1, 30)}],
        [{'event': draw.randrange(1, NUM_EVENTS)}, {'after': draw.uniform(0.1, 2.0)}],
        [{'signal': 'SIGTERM', 'step': 5}, {'signal': 'SIGINT', 'step': 3}]])
    assert any(run['status'] == -9 for run in found), 'no process was killed'
    interrupted = found[-3]
    assert interrupted['status'] == 0 and len(interrupted['steps']) == 6  # it ends the step that it is in
    assert interrupted['error'] == (
        f'TrainingInterrupted: SIGTERM: stopped after step 2 of 4 of epoch 2, and saved all in '
        f"{tmp_path / '2' / 'checkpoints'}. Go on with resume='auto' (--resume auto).")


@pytest.mark.slow
def test_a_run_killed_at_very_many_moments(tiny_scenes, tmp_path):
    draw = random.Random()
    kills = [[{'event': number}] for number in range(1, NUM_EVENTS)]
    kills += [[{'after': draw.uniform(0.1, 2.0)} for _ in range(3)] for _ in range(20)]
    kills += [[{'signal': 'SIGTERM', 'step': step}] for step in range(1, 13)]
    check_kills(tiny_scenes, tmp_path, kills)


def test_stopped_between_an_epochs_last_step_and_its_end(tiny_scenes, tmp_path, tiny_recipe, monkeypatch):
    recipe, output = tiny_recipe.override({'ema_decay': '0.6'}), tmp_path / 'run'
    undisturbed = train(recipe, tiny_scenes)
    import timm_miil.train._scoring as module
    real = module.score_batches

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), 15)
        yield from real(*args, **kwargs)

    monkeypatch.setattr(module, 'score_batches', interrupt)
    with pytest.raises(TrainingInterrupted, match='SIGTERM: stopped after step 4 of 4 of epoch 1, and saved'):
        train(recipe, tiny_scenes, output=output)
    monkeypatch.setattr(module, 'score_batches', real)
    seen = []
    resumed = train(recipe, tiny_scenes, output=output, resume='auto', on_step=seen.append)
    assert len(seen) == 4
    assert resumed.epochs == undisturbed.epochs and resumed.test_metrics == undisturbed.test_metrics
    assert same_weights(resumed.model, undisturbed.model)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('changes', [
    {'optimizer.name': 'muon', 'ema_decay': '0.5'},
    pytest.param(
        {'schedule.name': 'onecycle', 'schedule.warmup_epochs': '0', 'optimizer.name': 'adam'}, marks=pytest.mark.slow),
    {'grad_accum_steps': '2', 'clip_grad': '0.5', 'precision': 'bf16', 'optimizer.name': 'sgd', 'workers': '1'},
    {'loss.name': 'adaptive_asymmetric', 'loss.args': '{rate = 0.5}', 'stop_epoch': '1'},
], ids=['muon', 'onecycle', 'parts', 'adaptive'])
def test_every_part_of_a_run_is_in_its_checkpoint(tiny_scenes, tiny_recipe, tmp_path, changes):
    recipe = tiny_recipe.override({**changes, 'checkpoint_steps': '1', 'keep_checkpoints': '99'})
    whole = train(recipe, tiny_scenes, output=tmp_path / 'whole')
    *_, early, first = list_checkpoints(tmp_path / 'whole' / 'checkpoints')
    for number, checkpoint in enumerate((first, early)):
        folder = shutil.copytree(tmp_path / 'whole', tmp_path / str(number))
        resumed = train(
            recipe, tiny_scenes, output=folder, resume=folder / 'checkpoints' / checkpoint.name)
        assert resumed.epochs == whole.epochs and same_weights(resumed.model, whole.model)
        assert torch.equal(resumed.val_logits, whole.val_logits)


@pytest.fixture(scope='module')
def finished(tiny_scenes, tmp_path_factory):
    recipe = load_recipe(Path(__file__).with_name('tiny.toml')).override({'checkpoint_steps': '2'})
    folder = tmp_path_factory.mktemp('finished') / 'run'
    return recipe, folder, train(recipe, tiny_scenes, output=folder)


def test_what_a_run_leaves(finished, tiny_scenes):
    recipe, folder, result = finished
    assert {path.name for path in folder.iterdir()} == {
        '.lock', 'checkpoints', 'recipe.toml', 'results.csv', 'summary.json'}
    assert load_recipe(folder / 'recipe.toml') == recipe
    assert json.loads((folder / 'summary.json').read_text()) == json.loads(result.to_json())
    with open(folder / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['val_map']) for row in rows] == [record.val_map for record in result.epochs]
    assert [float(row['train_loss']) for row in rows] == [record.train_loss for record in result.epochs]
    names = sorted(path.name for path in (folder / 'checkpoints').iterdir())
    assert [name.rpartition('-')[0] for name in names] == [
        'best-epoch-000001', 'best-epoch-000002', 'step-000000006', 'step-000000008']
    splits = read_splits(tiny_scenes)
    assert torch.equal(result.val_targets, splits.val.targets) and result.is_main_process
    assert result.val_logits.shape == (24, 20) and result.val_logits.dtype == torch.float32


def test_writing_changes_nothing(finished, tiny_scenes):
    recipe, _, result = finished
    again = train(recipe, tiny_scenes)
    assert again.epochs == result.epochs and same_weights(again.model, result.model)
    assert torch.equal(again.val_logits, result.val_logits)


def test_a_finished_run_is_measured_again(finished, tiny_scenes, tmp_path):
    recipe, folder, result = finished
    steps = []
    again = train(recipe, tiny_scenes, output=folder, resume='auto', on_step=steps.append)
    assert steps == [] and again.epochs == result.epochs and again.best_epoch == result.best_epoch
    assert torch.equal(again.val_logits, result.val_logits) and again.test_metrics == result.test_metrics
    assert same_weights(again.model, result.model)


def test_more_epochs_of_the_same_schedule(tiny_scenes, tiny_recipe, tmp_path):
    recipe = tiny_recipe.override({'epochs': '3'})
    whole = train(recipe, tiny_scenes)
    part = train(recipe.override({'stop_epoch': '1'}), tiny_scenes, output=tmp_path / 'run')
    assert part.epochs == whole.epochs[:1]
    rest = train(recipe, tiny_scenes, output=tmp_path / 'run', resume='auto')
    assert rest.epochs == whole.epochs and same_weights(rest.model, whole.model)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, tiny_scenes, tmp_path, caplog):
    recipe, folder, result = finished
    folder = shutil.copytree(folder, tmp_path / 'run')
    newest = list_checkpoints(folder / 'checkpoints')[0]
    os.truncate(newest, 1000)
    steps = []
    again = train(recipe, tiny_scenes, output=folder, resume='auto', on_step=steps.append)
    assert [step.step for step in steps] == [3, 4] and again.epochs == result.epochs
    assert same_weights(again.model, result.model) and f'{newest.name} is damaged' in caplog.text
    assert (folder / 'checkpoints' / f'{newest.name}.aside').exists()


def test_where_all_are_damaged_the_fresh_run_keeps_its_own(finished, tiny_scenes, tmp_path, caplog):
    recipe, folder, result = finished
    folder = shutil.copytree(folder, tmp_path / 'run') / 'checkpoints'
    old = sorted(path.name for path in folder.iterdir())
    for path in list_checkpoints(folder):
        os.truncate(path, 1000)
    changed, steps = recipe.override({'stop_epoch': '1', 'checkpoint_steps': '0'}), []
    train(changed, tiny_scenes, output=folder.parent, resume='auto', on_step=steps.append)
    assert len(steps) == 4 and 'There is none before it.' in caplog.text
    assert sorted(path.name for path in folder.glob('*.aside')) == [f'{name}.aside' for name in old]
    assert [path.name[:14] for path in list_checkpoints(folder)] == ['step-000000004']
    again = train(recipe, tiny_scenes, output=folder.parent, resume='auto')
    assert again.epochs == result.epochs and same_weights(again.model, result.model)


def test_a_run_that_goes_on_from_elsewhere_keeps_its_own(finished, tiny_scenes, tmp_path):
    recipe, folder, result = finished
    folder = shutil.copytree(folder, tmp_path / 'run')
    old = sorted(path.name for path in (folder / 'checkpoints').iterdir())
    train(recipe.override({'stop_epoch': '1', 'keep_checkpoints': '9'}), tiny_scenes, output=tmp_path / 'other')
    early = list_checkpoints(tmp_path / 'other' / 'checkpoints')[-1]
    steps = []
    again = train(recipe, tiny_scenes, output=folder, resume=early, on_step=steps.append)
    assert len(steps) == 6 and again.epochs == result.epochs and same_weights(again.model, result.model)
    assert sorted(path.name for path in (folder / 'checkpoints').glob('*.aside')) == [f'{name}.aside' for name in old]


@pytest.mark.parametrize('how', ['damaged', 'missing'])
def test_best_weights_that_a_run_will_need_are_looked_at_before_it(finished, tiny_scenes, tmp_path, how):
    recipe, folder, _ = finished
    folder = shutil.copytree(folder, tmp_path / 'run')
    checkpoint, state = newest_checkpoint(folder / 'checkpoints')
    weights = folder / 'checkpoints' / state['best_weights']
    os.truncate(weights, 100) if how == 'damaged' else weights.unlink()
    before = sorted(folder.rglob('*'))
    with pytest.raises(CheckpointError, match=f'{checkpoint} cannot be gone on with: {weights.name} is {how}, which'):
        train(recipe, tiny_scenes, output=folder, resume=checkpoint)
    assert sorted(folder.rglob('*')) == before


def test_a_run_is_not_overwritten_by_chance(finished, tiny_scenes):
    recipe, folder, _ = finished
    message = rf"output '{folder}' has a run in it \(results.csv\); go on with it by resume='auto'"
    with pytest.raises(ValueError, match=message):
        train(recipe, tiny_scenes, output=folder)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'optimizer.lr': '0.02', 'augment.hflip': '0.5'}, 'optimizer.lr was 0.01 and is 0.02; augment.hflip was 0.0 and'),
    ({'epochs': '4'}, 'epochs was 2 and is 4'),
    ({'model.args.embed_dim': '32'}, 'model.args was .*"embed_dim": 16.* and is .*"embed_dim": 32'),
    ({'loss.args.clip': '0.1'}, 'loss.args was .*"clip": 0.05.* and is .*"clip": 0.1'),
    ({'unseen_labels': '["red 2"]'}, r'unseen_labels was \[\] and is \["red 2"\]; pictures of train was 72 with 20'),
])
def test_another_recipe_is_refused_by_its_keys(finished, tiny_scenes, changes, words):
    recipe, folder, _ = finished
    with pytest.raises(ValueError, match=f'is of another run: {words}.*Resume it with its own recipe'):
        train(recipe.override(changes), tiny_scenes, output=folder, resume='auto')


def test_other_pictures_are_refused(finished, tiny_scenes, tmp_path):
    recipe, folder, _ = finished
    scenes = shutil.copytree(tiny_scenes, tmp_path / 'scenes')
    file = scenes / 'annotations' / 'instances_train.json'
    content = json.loads(file.read_text())
    content['annotations'].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='is of another run: pictures of train was 72 with 20 labels .* and is 72 wi'):
        train(recipe, scenes, output=folder, resume='auto')


def test_settings_that_change_no_result_may_change(finished, tiny_scenes):
    recipe, folder, result = finished
    changes = {'summary': 'Other words.', 'workers': '0', 'keep_checkpoints': '5', 'checkpoint_steps': '0'}
    again = train(recipe.override(changes), tiny_scenes, output=folder, resume='auto')
    assert again.epochs == result.epochs


def test_wrong_ways_to_resume(finished, tiny_scenes, tmp_path):
    recipe, folder, _ = finished
    with pytest.raises(ValueError, match='output must be given to resume a run or to log it, got None'):
        train(recipe, tiny_scenes, resume='auto')
    with pytest.raises(FileNotFoundError):
        train(recipe, tiny_scenes, output=tmp_path / 'run', resume=tmp_path / 'step-000000001-0123456789abcdef.pt')
    checkpoint, state = newest_checkpoint(folder / 'checkpoints')
    with pytest.raises(ValueError, match=f'resume must be a checkpoint of .*, beside .*, got {str(checkpoint)!r}'):
        train(recipe, tiny_scenes, output=tmp_path / 'run', resume=checkpoint)
    old = save_checkpoint(tmp_path / 'old' / 'checkpoints', 9, {**state, 'format': 0, 'best_weights': ''})
    with pytest.raises(CheckpointError, match=f'{old.name} is a checkpoint of format 0, and this version reads 1;'):
        train(recipe, tiny_scenes, output=tmp_path / 'old', resume=old)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tiny_scenes, tmp_path):
    output = tmp_path / 'run'
    changes = CHANGES | {'checkpoint_steps': '1'}
    first, again, whole = in_forks([
        job(tiny_scenes, output, {'signal': 'SIGTERM', 'step': 4}, changes),
        job(tiny_scenes, output, {'limit': 20_000}, changes),
        job(tiny_scenes, output, changes=changes)])
    assert first['error'].startswith('TrainingInterrupted')
    assert again['error'] == (
        f'TrainingError: {output / "checkpoints"}: cannot write a checkpoint (File too large); those written before '
        f'are as they were. Make room or choose another disk, then resume.')
    assert whole['steps'][0] == [2, 1] and whole.get('error') is None


def test_a_step_that_is_not_finite_is_kept_for_inspection(tiny_scenes, tiny_recipe, tmp_path):
    from safetensors.torch import load_file

    recipe = tiny_recipe.override(
        {'optimizer.lr': '1e30', 'schedule.name': 'constant', 'schedule.warmup_epochs': '0'})
    with pytest.raises(RuntimeError, match=r'; the pictures of the step are in .*nonfinite.safetensors\.'):
        train(recipe, tiny_scenes, output=tmp_path / 'run')
    facts = json.loads((tmp_path / 'run' / 'nonfinite.json').read_text())
    tensors = load_file(tmp_path / 'run' / 'nonfinite.safetensors')
    assert facts['what'] in ('the loss became nan', 'the loss became inf')
    assert facts['epoch'] == 1 and facts['lr'] == 1e30
    splits = read_splits(tiny_scenes)
    paths = [str(path) for path in splits.train.image_paths]
    rows = [paths.index(name) for name in facts['names']]
    assert tensors['images'].shape == (16, 3, 32, 32) and len(rows) == 16
    assert torch.equal(tensors['targets'], splits.train.targets[rows].float())
    assert facts['label_names'] == list(splits.label_names)
