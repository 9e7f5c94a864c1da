"""Two real processes, started by torchrun and by accelerate launch, train as one does: the same steps and figures.

Each launch takes some seconds before it trains, so that the runs of one share it.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed_child import RECIPE, run  # pytest puts this folder on the path

from timm_miil.losses import load_label_prior
from timm_miil.train import load_recipe, read_splits
from timm_miil.train.build import build_model

CHILD = Path(__file__).with_name('distributed_child.py')
TINY = Path(__file__).with_name('tiny.toml')
LAUNCHERS = {
    'torchrun': [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone'],
    'accelerate': [
        sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
        '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0'],
}
TEACHER = '{name = "test_resnet", pretrained = false, precision = "fp32", image_size = 32}'
JOBS = {
    'plain': {'changes': {}},
    'parts': {'changes': {'grad_accum_steps': '2', 'ema_decay': '0.5'}},
    'mean': {'changes': {
        'loss.name': 'bce', 'loss.args': '{reduction = "mean"}', 'clip_grad': '0.05', 'grad_accum_steps': '4',
        'optimizer.lr': '1.0'}},
    'fsdp': {'changes': {'fsdp': 'true', 'ema_decay': '0.5', 'optimizer.name': 'adamw', 'grad_accum_steps': '2'}},
    'interrupted': {'changes': {'epochs': '3'}, 'output': True, 'signal': 'step'},
    'interrupted_fsdp': {'changes': {'fsdp': 'true', 'checkpoint_steps': '1'}, 'output': True, 'signal': 'step'},
    'interrupted_late': {'changes': {}, 'output': True, 'signal': 'validation'},
    'infinite': {'changes': {'optimizer.lr': '1e30', 'schedule.name': 'constant', 'schedule.warmup_epochs': '0'},
                 'output': True},
    'stream': {'changes': {}, 'stream': True},
    'fsdp_uneven': {'changes': {'fsdp': 'true', 'batch_size': '8'}, 'few': 9, 'wide': True},
    'uneven': {'changes': {'batch_size': '8'}, 'few': 9},
    'odd': {'changes': {'batch_size': '15'}},
    # One step without momentum: what it changes is the gradient.
    'gradient': {'changes': {
        'epochs': '1', 'batch_size': '64', 'optimizer.name': 'sgd', 'optimizer.lr': '1.0',
        'optimizer.weight_decay': '0', 'schedule.name': 'constant', 'schedule.warmup_epochs': '0'}},
    'sync_bn': {'changes': {'sync_bn': 'true'}},
    'teacher': {'changes': {
        'teacher': TEACHER, 'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{smoothing = 0.1}',
        'grad_accum_steps': '2', 'ema_decay': '0.5'}, 'one_label': True, 'few': 9, 'most_scores': 0},
    'teacher_sum': {'changes': {'teacher': TEACHER}},
    'teacher_fsdp': {'changes': {
        'teacher': TEACHER, 'fsdp': 'true', 'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}',
        'batch_size': '8'}, 'one_label': True, 'few': 9, 'most_scores': 0},
    'prior': {'changes': {
        'partial': '{scheme = "random_per_sample", drop_prob = 0.5}', 'loss.name': 'class_aware_selective',
        'loss.args': '{mode = "selective", likelihood_topk = 1, prior_threshold = 0.5}',
        'prior': '{epochs = 2, loss = {name = "class_aware_selective", args = {mode = "ignore"}}}'}, 'output': True},
}
NEAR_TIES = 0.1    # percent of mAP: two of 31 pictures whose scores differ by rounding change places
SLOW = ('mean', 'teacher_sum', 'teacher_fsdp', 'fsdp_uneven', 'interrupted_fsdp', 'interrupted_late')
LAUNCHED = {'torchrun': list(JOBS), 'accelerate': ['plain', 'interrupted']}


@pytest.fixture(scope='module')
def launched(tiny_scenes, tmp_path_factory):
    """What each process of each launcher found, by launcher and job; asked for one, it runs all, or all slow ones."""
    def launch(launcher, is_slow):
        names = [name for name in LAUNCHED[launcher] if (name in SLOW) == is_slow]
        folder, found = tmp_path_factory.mktemp(launcher), {}
        (folder / 'jobs.json').write_text(json.dumps({name: JOBS[name] for name in names}))
        done = subprocess.run(
            [*LAUNCHERS[launcher], str(CHILD), str(tiny_scenes), str(folder / 'jobs.json'), str(folder)],
            capture_output=True, text=True, timeout=300,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1'})
        assert done.returncode == 0, done.stderr[-5000:]
        for name in names:
            found[launcher, name] = [
                torch.load(folder / f'{name}-{rank}.pt', weights_only=False) for rank in (0, 1)] + [folder / name]
        return found

    class Found(dict):
        def __missing__(self, key):
            self.update(launch(key[0], key[1] in SLOW))
            return self[key]
    return Found()


def alone(scenes, name, tmp_path, **others):
    changes = {key: value for key, value in JOBS[name]['changes'].items() if key != 'fsdp'}
    return run(scenes, {**JOBS[name], 'changes': changes, 'output': False, **others}, tmp_path)


def check_same(found, want, tolerance):
    for key in want['weights']:
        torch.testing.assert_close(found['weights'][key], want['weights'][key], rtol=tolerance, atol=tolerance)
    for got, expected in zip(found['epochs'], want['epochs'], strict=True):
        for key in expected.keys() - {'seconds', 'images_per_second'}:
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=NEAR_TIES * key.startswith('val_')), key
    assert found['test'] == pytest.approx(want['test'], rel=1e-4, abs=NEAR_TIES)


@pytest.mark.parametrize(('launcher', 'name'), [
    ('torchrun', 'plain'), ('torchrun', 'parts'), pytest.param('torchrun', 'mean', marks=pytest.mark.slow),
    pytest.param('accelerate', 'plain', marks=pytest.mark.slow)])
def test_two_processes_train_as_one(launched, tiny_scenes, tmp_path, launcher, name):
    main, other, _ = launched[launcher, name]
    want = alone(tiny_scenes, name, tmp_path)
    # Eight steps in float32: sums over 16 pictures are associated otherwise.
    check_same(main, want, tolerance=2e-5)
    assert all(torch.equal(main['weights'][key], other['weights'][key]) for key in main['weights'])
    torch.testing.assert_close(main['logits'], want['logits'], rtol=1e-4, atol=1e-5)
    assert torch.equal(main['targets'], want['targets']) and len(main['targets']) == 23
    assert main['called'] == [1, 2] and other['called'] == []
    assert (main['is_main'], other['is_main']) == (True, False)
    assert other['logits'] is None and other['test'] == main['test'] and other['epochs'][0]['val_map'] > 0


def test_two_processes_have_the_gradient_of_one(launched, tiny_scenes, tmp_path):
    main, other, _ = launched['torchrun', 'gradient']
    want = alone(tiny_scenes, 'gradient', tmp_path)
    start = build_model(load_recipe(TINY).override(RECIPE), read_splits(tiny_scenes).label_names).state_dict()
    assert any((want['weights'][key] - start[key]).abs().max() > 0.1 for key in start), 'it is a gradient of some size'
    for key, weight in want['weights'].items():
        torch.testing.assert_close(main['weights'][key], weight, rtol=0, atol=1e-5)
        assert torch.equal(main['weights'][key], other['weights'][key])


def test_two_processes_estimate_one_prior(launched, tiny_scenes, tmp_path):
    main, other, folder = launched['torchrun', 'prior']
    want = run(tiny_scenes, JOBS['prior'], tmp_path / 'alone')
    names = read_splits(tiny_scenes).label_names
    estimates = [load_label_prior(path / 'prior.csv', names) for path in (folder, tmp_path / 'alone')]
    # The temporary network has no budget: its losses and confidences are those of one process, to rounding.
    torch.testing.assert_close(*estimates, rtol=1e-4, atol=1e-6)
    assert estimates[0].std() > 1e-3 and main['called'] == [1, 2] and other['called'] == []
    assert all(torch.equal(main['weights'][key], other['weights'][key]) for key in want['weights'])


def test_shared_parameters_train_as_whole_ones(launched, tiny_scenes, tmp_path):
    main, other, _ = launched['torchrun', 'fsdp']
    want = alone(tiny_scenes, 'fsdp', tmp_path)
    torch.testing.assert_close(main['logits'], want['logits'], rtol=1e-3, atol=1e-4)
    assert main['test'] == pytest.approx(want['test'], rel=1e-3)
    assert main['weights'].keys() == want['weights'].keys()
    assert all(type(tensor) is torch.Tensor for tensor in main['weights'].values())
    assert all(torch.equal(main['weights'][key], other['weights'][key]) for key in main['weights'])


@pytest.mark.parametrize(('launcher', 'name'), [
    ('torchrun', 'interrupted'), pytest.param('torchrun', 'interrupted_fsdp', marks=pytest.mark.slow),
    pytest.param('torchrun', 'interrupted_late', marks=pytest.mark.slow),
    pytest.param('accelerate', 'interrupted', marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(launched, tiny_scenes, tmp_path, launcher, name):
    main, other, folder = launched[launcher, name]
    [words], [other_words] = main['interrupted'], other['interrupted']
    step = {'step': 2, 'validation': 4}[JOBS[name]['signal']]
    assert words.startswith(f'a signal to another process: stopped after step {step} of 4 of epoch 1, and saved all in')
    assert other_words.replace('SIGTERM', 'a signal to another process') == words
    check_same(main, alone(tiny_scenes, name, tmp_path), tolerance=2e-5)
    assert (folder / 'summary.json').exists() and (folder / 'results.csv').exists()


@pytest.mark.parametrize(('name', 'tolerance'), [
    ('teacher', 2e-5), pytest.param('teacher_sum', 2e-5, marks=pytest.mark.slow),
    pytest.param('teacher_fsdp', 1e-3, marks=pytest.mark.slow)])
def test_two_processes_learn_from_a_teacher_as_one(launched, tiny_scenes, tmp_path, name, tolerance):
    main, other, _ = launched['torchrun', name]
    want = alone(tiny_scenes, name, tmp_path)
    for key, weight in want['weights'].items():
        torch.testing.assert_close(main['weights'][key], weight, rtol=tolerance, atol=tolerance)
        assert torch.equal(main['weights'][key], other['weights'][key])
    assert main['epochs'][-1]['train_loss'] == pytest.approx(want['epochs'][-1]['train_loss'], rel=1e-4)
    if 'most_scores' in JOBS[name]:  # counted in each process
        assert main['test'] == other['test'] == pytest.approx(want['test'], rel=1e-4) and main['logits'] is None
        assert main['epochs'][0]['val_top5'] == other['epochs'][0]['val_top5'] == want['epochs'][0]['val_top5']
        kept = alone(tiny_scenes, name, tmp_path, most_scores=1 << 20)
        assert kept['test'] == pytest.approx(want['test'], rel=1e-6) and len(kept['logits']) == 9


@pytest.mark.parametrize('name', ['uneven', pytest.param('fsdp_uneven', marks=pytest.mark.slow)])
def test_processes_validate_different_numbers_of_batches(launched, tiny_scenes, tmp_path, name):
    main, _, _ = launched['torchrun', name]
    want = alone(tiny_scenes, name, tmp_path)
    assert main['logits'].shape == (9, 20)
    torch.testing.assert_close(main['logits'], want['logits'], rtol=1e-3, atol=1e-4)
    assert torch.equal(main['targets'], want['targets']) and main['test'] == pytest.approx(want['test'], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_all(launched):
    main, other, folder = launched['torchrun', 'infinite']
    assert main['error'] == other['error']
    assert main['error'].startswith('TrainingError: the loss became nan in epoch 1, step ')
    facts = json.loads((folder / 'nonfinite.json').read_text())
    assert len(set(facts['names'])) == 16 and all(Path(name).is_file() for name in facts['names'])


def test_a_stream_is_shared_out(launched):
    main, other, _ = launched['torchrun', 'stream']
    assert len(main['logits']) == 23 and other['logits'] is None
    assert torch.equal(main['weights']['head.weight'], other['weights']['head.weight'])
    targets = main['targets'].tolist()
    assert all(row in targets for row in main['targets'].tolist())
    assert main['test'] == other['test']


def test_what_two_processes_cannot_do_is_said_by_both(launched):
    for name, words in (
            ('odd', 'ValueError: batch_size must be a multiple of processes times grad_accum_steps, got 15 for 2 and 1;'
                    ' the nearest are 14 and 16.'),
            ('sync_bn', 'ValueError: sync_bn needs an accelerator for each process, got cpu; leave it out.')):
        assert [found['error'] for found in launched['torchrun', name][:2]] == [words, words]
