"""Checkpoints: whole or not there, known to be whole, rotated, and untouched by a disk that is full."""
import errno
import os
import resource
import shutil
import subprocess

import pytest
import safetensors.torch
import torch

from timm_miil._errors import CheckpointError, TrainingError
from timm_miil.train.checkpoint import (
    check_best_weights, forget_later, list_checkpoints, load_checkpoint, load_weights, newest_checkpoint,
    remove_unfinished, rotate, save_checkpoint, save_weights)

STATE = {'weights': {'a': torch.arange(4.0)}, 'records': [{'lr': 0.1}], 'random': [3, torch.ones(2), None], 'name': 'x'}


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_loaded_by_torch_alone(tmp_path):
    path = save_checkpoint(tmp_path / 'new', 12, STATE)
    assert path.parent.name == 'new' and path.name.startswith('step-000000012-') and path.suffix == '.pt'
    for state in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state['weights']['a'], torch.arange(4.0))
        assert state['records'] == STATE['records'] and state['random'][0] == 3 and state['random'][2] is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_weights_are_a_safetensors_file(tmp_path):
    weights = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    path = save_weights(tmp_path, 3, {'a': weights, 'same': weights})
    assert path.name.startswith('best-epoch-000003-')
    for found in (load_weights(path), safetensors.torch.load_file(path)):
        assert torch.equal(found['a'], weights) and torch.equal(found['same'], weights)


@pytest.mark.parametrize('how', ['a bit flips', 'the end is missing', 'it is empty'])
def test_a_damaged_file_is_refused_by_name(tmp_path, how):
    for path, load in ((save_checkpoint(tmp_path, 1, STATE), load_checkpoint),
                       (save_weights(tmp_path, 1, STATE['weights']), load_weights)):
        if how == 'a bit flips':
            damage(path)
        else:
            os.truncate(path, path.stat().st_size // 2 if how == 'the end is missing' else 0)
        with pytest.raises(CheckpointError, match=f'{path.name} is damaged: its contents are not those'):
            load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE)
    renamed = path.rename(tmp_path / 'mine.pt')
    with pytest.raises(CheckpointError, match="'mine.pt' is not what a checkpoint is called, step-<steps>-<digest>.pt"):
        load_checkpoint(renamed)
    weights = save_weights(tmp_path, 1, STATE['weights'])
    other = weights.rename(tmp_path / weights.name.replace('best-epoch-', 'step-').replace('safetensors', 'pt'))
    with pytest.raises(CheckpointError, match=f'{other.name} is not a checkpoint: '):
        load_checkpoint(other)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    path = save_checkpoint(tmp_path, 1, {'a': Evil()})
    with pytest.raises(CheckpointError, match='is not a checkpoint'):
        load_checkpoint(path)
    assert not (tmp_path / 'evil').exists()


def test_the_newest_that_is_whole_is_taken(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / 'none') is None
    paths = [save_checkpoint(tmp_path, step, {'step': step}) for step in (9, 10, 100)]
    assert list_checkpoints(tmp_path) == paths[::-1]
    assert newest_checkpoint(tmp_path) == (paths[2], {'step': 100})
    damage(paths[2])
    assert newest_checkpoint(tmp_path) == (paths[1], {'step': 10})
    assert f'{paths[2].name} is damaged' in caplog.text and 'There is another before it.' in caplog.text
    damage(paths[1])
    damage(paths[0])
    caplog.clear()
    assert newest_checkpoint(tmp_path) is None
    assert [f'There is {word} before it.' in message for word, message in zip(
        ('another', 'another', 'none'), caplog.messages, strict=True)] == [True] * 3


def test_one_whose_best_weights_are_damaged_is_passed_over(tmp_path, caplog):
    first = save_checkpoint(tmp_path, 1, {'best_weights': save_weights(tmp_path, 1, STATE['weights']).name})
    weights = save_weights(tmp_path, 2, STATE['weights'])
    save_checkpoint(tmp_path, 2, {'best_weights': weights.name})
    damage(weights)
    assert newest_checkpoint(tmp_path)[0] == first and f'{weights.name} is damaged' in caplog.text
    weights.unlink()
    assert newest_checkpoint(tmp_path)[0] == first


@pytest.mark.parametrize('how', ['damaged', 'missing'])
def test_the_best_weights_of_a_checkpoint_are_beside_it_and_whole(tmp_path, how):
    weights = save_weights(tmp_path, 1, STATE['weights'])
    path, state = tmp_path / 'step', {'best_weights': weights.name}
    check_best_weights(path, {'best_weights': ''})
    check_best_weights(path, state)
    damage(weights) if how == 'damaged' else weights.unlink()
    with pytest.raises(CheckpointError, match=f'{path} cannot be gone on with: {weights.name} is {how}, which has the'):
        check_best_weights(path, state)


def test_of_two_after_the_same_step_the_later_is_newer(tmp_path):
    old, new = (save_checkpoint(tmp_path, 4, {'is_measured': flag}) for flag in (False, True))
    for path, seconds in ((old, 100), (new, 200)):
        os.utime(path, (seconds, seconds))
    assert newest_checkpoint(tmp_path)[0] == new
    os.utime(old, (300, 300))
    assert newest_checkpoint(tmp_path)[0] == old


def test_rotation_keeps_the_newest_and_the_weights_they_name(tmp_path):
    checkpoints, weights = [], []
    for step in range(1, 7):
        weights += [save_weights(tmp_path, step, STATE['weights'])]
        checkpoints += [save_checkpoint(tmp_path, step, {'best_weights': weights[-1].name})]
        rotate(tmp_path, 2)
    (tmp_path / 'notes.txt').touch()
    rotate(tmp_path, 2)
    assert list_checkpoints(tmp_path) == checkpoints[:3:-1]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in (*checkpoints[4:], *weights[3:])} | {'notes.txt'}


def test_going_back_puts_what_is_newer_aside(tmp_path):
    weights = [save_weights(tmp_path, epoch, STATE['weights']) for epoch in (1, 2)]
    paths = [save_checkpoint(tmp_path, step, {'step': step}) for step in (1, 2, 3)]
    unfinished = tmp_path / '.unfinished-77'
    unfinished.touch()
    forget_later(tmp_path, paths[1], weights[0].name)
    assert list_checkpoints(tmp_path) == paths[1::-1] and not unfinished.exists()
    assert (tmp_path / f'{paths[2].name}.aside').exists() and (tmp_path / f'{weights[1].name}.aside').exists()
    forget_later(tmp_path, paths[0], '')
    assert list_checkpoints(tmp_path) == paths[:1] and not weights[0].exists()
    remove_unfinished(tmp_path / 'none')


def test_of_what_was_put_aside_the_newest_is_kept(tmp_path):
    paths = [save_checkpoint(tmp_path, step, {'step': step}) for step in (1, 2, 3, 4)]
    weights = save_weights(tmp_path, 4, STATE['weights'])
    own = tmp_path / 'my notes.aside'
    own.touch()

    def left():
        return {path.name for path in tmp_path.glob('*.aside')} - {own.name}

    forget_later(tmp_path, paths[2], '')
    first = {f'{paths[3].name}.aside', f'{weights.name}.aside'}
    assert left() == first
    forget_later(tmp_path, paths[2], '')
    assert left() == first, 'nothing was put aside'
    forget_later(tmp_path, paths[0], '')
    assert left() == {f'{path.name}.aside' for path in paths[1:3]} and own.exists()
    forget_later(tmp_path, None, '')
    assert left() == {f'{paths[0].name}.aside'} and list_checkpoints(tmp_path) == []


def error_of(folder, save):
    try:
        save(folder, 2, {'weights': torch.zeros(100_000)})
    except TrainingError as error:
        return f'{error.__cause__.errno} {error}'
    return 'no error'


@pytest.fixture
def no_long_files():
    """Files of this process end at 50,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('save', [save_checkpoint, save_weights])
def test_a_file_that_may_not_grow_is_one_error(tmp_path, save, no_long_files):
    kept = save_checkpoint(tmp_path, 1, {'step': 1})
    assert error_of(tmp_path, save) == (
        f'{errno.EFBIG} {tmp_path}: cannot write a checkpoint (File too large); those written before are as they were. '
        f'Make room or choose another disk, then resume.')
    assert list(tmp_path.iterdir()) == [kept] and newest_checkpoint(tmp_path) == (kept, {'step': 1})


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', str(folder)]
    if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('may not mount a disk')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.parametrize('save', [save_checkpoint, save_weights])
def test_a_full_disk_is_one_error(full_disk, save):
    kept = save_checkpoint(full_disk, 1, {'step': 1})
    assert error_of(full_disk, save) == (
        f'{errno.ENOSPC} {full_disk}: cannot write a checkpoint (No space left on device); those written before are as '
        f'they were. Make room or choose another disk, then resume.')
    assert list(full_disk.iterdir()) == [kept] and newest_checkpoint(full_disk) == (kept, {'step': 1})


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(TrainingError, match=r'cannot write a checkpoint \((Not a directory|File exists)\)'):
        save_checkpoint(tmp_path / 'file' / 'checkpoints', 1, STATE)
