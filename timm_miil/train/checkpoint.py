"""Checkpoints: files that are there whole or not at all, and that are known to be whole before they are used.

A file takes its name when all of it is on the disk, and the name carries the digest of its contents, so that one that
was damaged later is told from a good one. It is read by `torch.load(path, weights_only=True)`.
"""
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from torch import Tensor

from timm_miil._checks import cut
from timm_miil._errors import CheckpointError, TrainingError

__all__ = [
    'check_best_weights', 'forget_later', 'list_checkpoints', 'load_checkpoint', 'load_weights', 'newest_checkpoint',
    'remove_unfinished', 'rotate', 'save_checkpoint', 'save_weights',
]

STEM = re.compile(r'(?:step|best-epoch)-(\d+)-([0-9a-f]{16})')
TEMPORARY = '.unfinished-'
ASIDE = '.aside'

_logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write what a run needs to go on.

    Args:
        folder: Where to; it is made if need be.
        step: Steps of the optimizer done so far, by which checkpoints are ordered.
        state: Tensors, numbers and text in dicts, lists and tuples.

    Returns:
        The file, 'step-<step>-<digest>.pt'.

    Raises:
        TrainingError: If it cannot be written; the files that were there are as they were.
    """
    return _write(folder, f'step-{step:09d}', '.pt', lambda file: torch.save(dict(state), cast(IO[bytes], file)))


def save_weights(folder: Path, epoch: int, weights: Mapping[str, Tensor]) -> Path:
    """Write a network's weights for other programs to read.

    Args:
        folder: Where to; it is made if need be.
        epoch: The epoch that they are of.
        weights: A state dict.

    Returns:
        The file, 'best-epoch-<epoch>-<digest>.safetensors'.

    Raises:
        TrainingError: If it cannot be written; the files that were there are as they were.
    """
    # The format has neither views nor two names for one tensor.
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, tensor in weights.items()}
    return _write(
        folder, f'best-epoch-{epoch:06d}', '.safetensors', lambda file: file.write(safetensors.torch.save(tensors)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`.

    Raises:
        CheckpointError: If it is damaged or no checkpoint.
        OSError: If it cannot be read.
    """
    _check_digest(path)
    try:
        state: dict[str, Any] = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip, pickle and torch have an error each for what they cannot read
        raise CheckpointError(f'{path} is not a checkpoint: {cut(str(error))}') from error
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of `save_weights`.

    Raises:
        CheckpointError: If it is damaged.
        OSError: If it cannot be read.
    """
    _check_digest(path)
    return safetensors.torch.load_file(path)


def check_best_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the weights of the best epoch that a checkpoint names are beside it and whole."""
    name = state.get('best_weights')
    if not name:
        return
    try:
        _check_digest(path.with_name(name))
    except (CheckpointError, FileNotFoundError) as error:
        what = 'is missing' if isinstance(error, FileNotFoundError) else 'is damaged'
        raise CheckpointError(
            f'{path} cannot be gone on with: {name} {what}, which has the weights of its best epoch; put a whole copy '
            f'beside it, or resume one before it.') from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Files of `save_checkpoint`, that of the most steps first; they may be damaged."""
    return _list(folder, 'step-*.pt')


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of the most steps that can be used, and its state; None if there is none.

    One that is damaged, or whose weights of the best epoch are, is passed over with a warning.

    Raises:
        OSError: If one cannot be read now, which may pass: nothing is given up for that.
    """
    there = list_checkpoints(folder)
    for path in there:
        try:
            state = load_checkpoint(path)
            check_best_weights(path, state)
        except (CheckpointError, FileNotFoundError) as error:
            _logger.warning('%s There is %s before it.', error, 'none' if path == there[-1] else 'another')
        except OSError as error:
            raise OSError(
                f'{path} cannot be read ({error.strerror or error}); try again, or move it away to go on without it.'
            ) from error
        else:
            return path, state
    return None


def forget_later(folder: Path, path: Path | None, best_weights: str) -> None:
    """Put aside what is newer than the checkpoint that a run goes on from, and remove what was never finished.

    What was put aside before is removed when something else is.

    Args:
        folder: Where the files are.
        path: The checkpoint; None puts all aside.
        best_weights: Name of the file of weights that it names; '' for none.
    """
    named = folder / best_weights if best_weights else None
    later = [
        other for base, pattern in ((path, 'step-*.pt'), (named, 'best-epoch-*.safetensors'))
        for other in _list(folder, pattern) if base is None or _order(other) > _order(base)]
    if later:
        for old in folder.glob(f'*{ASIDE}'):
            if STEM.match(old.name):
                old.unlink()
    for other in later:
        other.rename(other.with_name(other.name + ASIDE))
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process was writing when it was killed."""
    for leftover in folder.glob(f'{TEMPORARY}*'):
        leftover.unlink(missing_ok=True)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and weights that none of them names.

    Args:
        folder: Where they are.
        keep: How many to keep, at least 1.
    """
    kept = list_checkpoints(folder)
    for path in kept[keep:]:
        path.unlink()
    # Checkpoints name ever later epochs, each after the weights were written: of k checkpoints the weights are among
    # the k latest, and one more may have been written by a process that was killed before its checkpoint.
    for path in _list(folder, 'best-epoch-*.safetensors')[keep + 1:]:
        path.unlink()


def _list(folder: Path, pattern: str) -> list[Path]:
    return sorted((path for path in folder.glob(pattern) if STEM.fullmatch(path.stem)), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """By number; of one number there are two where a run was stopped between an epoch's last step and its end."""
    match = STEM.fullmatch(path.stem)
    return int(match[1]) if match else -1, path.stat().st_mtime_ns


def _check_digest(path: Path) -> None:
    match = STEM.fullmatch(path.stem)
    if match is None:
        raise CheckpointError(
            f'{path.name!r} is not what a checkpoint is called, step-<steps>-<digest>.pt; give a file of '
            f'<output>/checkpoints under the name that it had there.')
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if not found.startswith(match[2]):
        raise CheckpointError(f'{path} is damaged: its contents are not those that were written.')


def _write(folder: Path, stem: str, suffix: str, fill: Callable[['_DigestWriter'], object]) -> Path:
    unfinished = folder / f'{TEMPORARY}{os.getpid()}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, 'wb') as file:
                writer = _DigestWriter(file)
                try:
                    fill(writer)
                except Exception as error:
                    # torch.save says of a full disk that a position is unexpected.
                    raise writer.error or error from error
                file.flush()
                os.fsync(file.fileno())
            target = folder / f'{stem}-{writer.digest.hexdigest()[:16]}{suffix}'
            os.replace(unfinished, target)
            _sync_folder(folder)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(
            f'{folder}: cannot write a checkpoint ({error.strerror or error}); those written before are as they were. '
            f'Make room or choose another disk, then resume.') from error
    return target


def _sync_folder(folder: Path) -> None:
    """Let the disk know the names in a folder, not just the contents of its files."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class _DigestWriter:
    """A file to write to that knows what was written, and what error the system gave."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()
