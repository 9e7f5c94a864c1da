"""A run's folder: what is in it, and what may be done with one that another run has left."""
import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from timm_miil._atomic import write_file
from timm_miil._checks import check_folder
from timm_miil._errors import CheckpointError
from timm_miil._locks import locked
from timm_miil.train._state import READERS, differences
from timm_miil.train.checkpoint import (
    check_best_weights, forget_later, list_checkpoints, load_checkpoint, load_weights, newest_checkpoint, rotate,
    save_checkpoint, save_weights)
from timm_miil.train.recipe import Recipe
from timm_miil.train.results import EpochRecord, TrainResult, epochs_as_csv

__all__ = ['RunFolder']

FORMAT = 1  # of the checkpoint's state
WAIT_SECONDS = 15.0  # for what is left of a run that was killed: its loader's workers

_logger = logging.getLogger(__name__)


class RunFolder:
    """Writes what a run leaves: recipe.toml, results.csv, summary.json and checkpoints/.

    Args:
        path: The folder; made when the run begins.
        keep: Checkpoints to keep.
    """

    def __init__(self, path: str | Path, *, keep: int) -> None:
        self.path, self.keep = Path(path), keep
        self.checkpoints = self.path / 'checkpoints'

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it.

        Raises:
            OSError: If it cannot be made, or another run is in it.
        """
        check_folder(output=self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(f'output {str(self.path)!r} cannot be made: {reason}.') from error
        words = f'output {str(self.path)!r} has another run that is going on in it; wait for its end, or take another.'
        with locked(self.path / '.lock', seconds=WAIT_SECONDS, words=words):
            yield

    def begin(
            self, recipe: Recipe, resume: str | Path | None, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
        """Make the folder, which is held, ready.

        Args:
            recipe: What is going to be run.
            resume: A checkpoint to go on from; 'auto' for the newest if there is one; None for a new run.
            fingerprint: What must be as it was.

        Returns:
            State of the checkpoint, None for a fresh start.

        Raises:
            CheckpointError: If the checkpoint cannot be used.
            FileNotFoundError: If there is no such checkpoint.
            OSError: If the folder cannot be written to.
            ValueError: If there is a run and `resume` is None, or the checkpoint is of another recipe or data.
        """
        found = self._find(resume)
        base, best_weights = None, ''
        if found is not None:
            path, state = found
            self._check(path, state, fingerprint)
            if path.parent.resolve() == self.checkpoints.resolve():
                base, best_weights = path, state['best_weights']
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # Of a run that starts anew, or from elsewhere, all: files of later steps would outlive its own.
        forget_later(self.checkpoints, base, best_weights)
        write_file(self.path / 'recipe.toml', recipe.to_toml())
        return found and found[1]

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove old ones.

        Raises:
            TrainingError: If it cannot be written; those before are as they were.
        """
        save_checkpoint(self.checkpoints, step, {'format': FORMAT, **state})
        rotate(self.checkpoints, self.keep)

    def save_best(self, epoch: int, weights: Mapping[str, Tensor]) -> str:
        """Write weights and give the name under which `load_best` finds them.

        Raises:
            TrainingError: If they cannot be written.
        """
        return save_weights(self.checkpoints, epoch, weights).name

    def load_best(self, name: str) -> dict[str, Tensor]:
        """Weights of `save_best`.

        Raises:
            CheckpointError: If the file is damaged.
            OSError: If it cannot be read.
        """
        return load_weights(self.checkpoints / name)

    def write_epochs(self, records: Sequence[EpochRecord]) -> None:
        """Write the table of all epochs so far."""
        write_file(self.path / 'results.csv', epochs_as_csv(tuple(records)))

    def write_summary(self, result: TrainResult) -> None:
        """Write the numbers at the end, and the epochs once more: a run may have died before it wrote the last."""
        self.write_epochs(result.epochs)
        write_file(self.path / 'summary.json', json.dumps(json.loads(result.to_json()), indent=1) + '\n')

    def write_step(self, images: Tensor, targets: Tensor, facts: Mapping[str, Any]) -> Path:
        """Write a step's pictures for someone to look at: 'nonfinite.safetensors' and, with words, 'nonfinite.json'."""
        path = self.path / 'nonfinite.safetensors'
        write_file(path, safetensors.torch.save({'images': images.contiguous(), 'targets': targets.contiguous()}))
        write_file(path.with_suffix('.json'), json.dumps(dict(facts), indent=1) + '\n')
        return path

    def _find(self, resume: str | Path | None) -> tuple[Path, dict[str, Any]] | None:
        if resume == 'auto':
            return newest_checkpoint(self.checkpoints)
        if resume is not None:
            path = Path(resume)
            state = load_checkpoint(path)
            if path.parent.resolve() != self.checkpoints.resolve() and state.get('best_weights'):
                raise ValueError(
                    f'resume must be a checkpoint of {self.checkpoints}, beside the weights of its best epoch, got '
                    f'{str(path)!r}; give the output folder that it is in.')
            check_best_weights(path, state)
            return path, state
        there = [name for name in ('results.csv', 'summary.json') if (self.path / name).exists()]
        there += [path.name for path in list_checkpoints(self.checkpoints)[:1]]
        if there:
            raise ValueError(
                f'output {str(self.path)!r} has a run in it ({there[0]}); go on with it by resume=\'auto\' '
                f'(--resume auto), or choose another folder.')
        return None

    @staticmethod
    def _check(path: Path, state: Mapping[str, Any], fingerprint: Mapping[str, str]) -> None:
        if state.get('format') != FORMAT:
            raise CheckpointError(
                f'{path} is a checkpoint of format {state.get("format")}, and this version reads {FORMAT}; resume it '
                f'with the version of timm-miil that wrote it.')
        found = differences(state['fingerprint'], fingerprint)
        if found:
            raise ValueError(
                f'{path} is of another run: {"; ".join(found)}. Resume it with its own recipe (recipe.toml beside '
                f'it) and data, or start anew in another folder.')
        before, now = state['fingerprint'].get(READERS), fingerprint.get(READERS)
        if state['step'] and before != now:
            _logger.warning(
                'the stream of training pictures was read in %s parts and is in %s: in the epoch that goes on some '
                'pictures are seen twice and others not.', before, now)
