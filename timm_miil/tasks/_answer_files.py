"""A folder of records that several processes add to, within a number of bytes."""
import json
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from timm_miil._atomic import write_file
from timm_miil._checks import shown
from timm_miil._locks import locked
from timm_miil.tasks._key_index import KeyIndex

__all__ = ['AnswerFiles']

SETTINGS_FILE, LOCK_FILE = 'teacher.json', 'lock'
PART_BYTES = 1 << 25
HEADER_BYTES = 1 << 10  # a bound of a part's head, without the settings

_logger = logging.getLogger(__name__)


class AnswerFiles:
    """Records of equal size under keys of 128 bits.

    The folder has a file of settings and parts, each written once, whole, by one process. Records wait in memory until
    they fill a part. What other processes wrote is read when this one opens the folder or writes to it.

    Args:
        folder: The folder; it is made.
        settings: What all its records have in common.
        layout: Shape of each field of a record, and its dtype. The field 'keys' (2,) of int64 is added.
        max_bytes: Of all parts together.

    Raises:
        OSError: If the folder cannot be written to.
        ValueError: If it has other settings.
    """

    def __init__(
            self,
            folder: Path,
            settings: Mapping[str, object],
            layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
            max_bytes: int,
    ) -> None:
        self.folder, self.settings, self.max_bytes = folder, dict(settings), max_bytes
        self.layout = {'keys': ((2,), torch.int64), **layout}
        self.record_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.layout.values())
        self.head_bytes = HEADER_BYTES + 4 * len(json.dumps(self.settings))  # their quotes are quoted twice
        self.part_rows = max(min(PART_BYTES, max_bytes) // self.record_bytes, 1)
        self.is_full = False
        self.index = KeyIndex()
        self.process = os.getpid()
        self._parts: dict[int, dict[str, Tensor]] = {}
        self._checksums: dict[int, tuple[Path, int]] = {}  # of parts that nothing was read from
        self._seen: set[str] = set()
        self._next = self._rows = 0  # rows that wait, in the part of the last number
        self._waiting: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE, seconds=None):
            self._check_settings()
            for leftover in folder.glob('.part-*'):  # of a process that was killed
                leftover.unlink()
            self._check_room(self._read_new())

    def read(self, keys: Tensor) -> dict[str, Tensor] | None:
        """The records of the keys (B, 2); None unless all are there."""
        parts, rows = self.index.find(keys[:, 0].numpy())
        if (parts < 0).any():
            return None
        records = {name: torch.empty(len(keys), *shape, dtype=dtype) for name, (shape, dtype) in self.layout.items()}
        for part in np.unique(parts).tolist():
            if not self._is_sound(part):
                return None
            mine = torch.from_numpy((parts == part).nonzero()[0])
            theirs = torch.from_numpy(rows)[mine]
            for name, tensor in self._parts[part].items():
                records[name][mine] = tensor[theirs]
        return records if torch.equal(records['keys'], keys) else None

    def add(self, records: Mapping[str, Tensor]) -> None:
        """Keep records, each with its key, of which those that are known are left out."""
        keys = records['keys'][:, 0].numpy()
        is_new = np.zeros(len(keys), dtype=bool)
        is_new[np.unique(keys, return_index=True)[1]] = True
        is_new &= self.index.find(keys)[0] < 0
        left = torch.from_numpy(is_new.nonzero()[0])
        while len(left) and not self.is_full:
            if not self._waiting:
                self._waiting = {
                    name: torch.empty(self.part_rows, *shape, dtype=dtype)
                    for name, (shape, dtype) in self.layout.items()}
                self._parts[self._next] = self._waiting
                self._next += 1
            rows, left = left[:self.part_rows - self._rows], left[self.part_rows - self._rows:]
            for name, tensor in self._waiting.items():
                tensor[self._rows:self._rows + len(rows)] = records[name][rows]
            self.index.add(keys[rows.numpy()], self._next - 1, self._rows)
            self._rows += len(rows)
            if self._rows == self.part_rows:
                self.flush()

    def flush(self) -> None:
        """Write the records that wait, as far as there is room, and read what others wrote."""
        if os.getpid() != self.process:  # a copy of this one in a process that was forked
            return
        waiting = {name: tensor[:self._rows] for name, tensor in self._waiting.items()}
        if self._waiting:
            self.index.drop(self._next - 1)
            del self._parts[self._next - 1]
        self._waiting, self._rows = {}, 0
        with locked(self.folder / LOCK_FILE, seconds=None):
            used = self._read_new()
            if waiting:
                known = self.index.find(waiting['keys'][:, 0].numpy())[0] >= 0  # by another process, meanwhile
                fresh = torch.from_numpy((~known).nonzero()[0])
                fresh = fresh[:max(self.max_bytes - used - self.head_bytes, 0) // self.record_bytes]
                if len(fresh):
                    self._write({name: tensor[fresh] for name, tensor in waiting.items()})
                    used = self._read_new()
        self._check_room(used)

    def close(self) -> None:
        """Write the records that wait, if there are such; one who goes is not held up by a folder that is gone."""
        if self._rows:
            try:
                self.flush()
            except OSError as error:
                _logger.warning('the last answers could not be written to %s: %s', self.folder, error)

    def _check_room(self, used: int) -> None:
        if used + self.head_bytes + self.record_bytes > self.max_bytes and not self.is_full:
            self.is_full = True
            _logger.info(
                '%s is full, with %d answers in %d of %d bytes: no more are added.', self.folder, len(self.index), used,
                self.max_bytes)

    def _write(self, records: dict[str, Tensor]) -> None:
        facts = {'settings': json.dumps(self.settings), 'crc32': str(_checksum(records))}
        write_file(self.folder / f'part-{uuid.uuid4().hex}.safetensors', save(records, facts))

    def _read_new(self) -> int:
        """Take in the parts that are new in the folder; bytes of all."""
        used = 0
        for path in sorted(self.folder.glob('part-*.safetensors')):
            used += path.stat().st_size
            if path.name not in self._seen:
                self._seen.add(path.name)
                try:
                    self._open(path)
                except (KeyError, OSError, SafetensorError, ValueError) as error:
                    _logger.warning('%s is damaged and left out, it can be deleted: %s', path, error)
        return used

    def _open(self, path: Path) -> None:
        with safe_open(path, framework='pt') as file:  # the tensors are read from the disk when they are used
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in self.layout}
        if json.loads(facts['settings']) != self.settings:
            raise ValueError('it is of another teacher or setting.')
        for name, (shape, dtype) in self.layout.items():
            if (tensors[name].shape[1:], tensors[name].dtype) != (shape, dtype):
                raise ValueError(f'its {name} are {tensors[name].dtype} of shape {tuple(tensors[name].shape)}.')
        self._parts[self._next] = tensors
        self._checksums[self._next] = path, int(facts['crc32'])
        self.index.add(tensors['keys'][:, 0].numpy(), self._next)
        self._next += 1

    def _is_sound(self, part: int) -> bool:
        """Whether a part is as it was written, which is found out once; one that is not is forgotten."""
        path, checksum = self._checksums.pop(part, (None, 0))
        if path is None or _checksum(self._parts[part]) == checksum:
            return True
        _logger.warning('%s is damaged and left out, it can be deleted: its bytes are others.', path)
        self.index.drop(part)
        del self._parts[part]
        return False

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            write_file(path, json.dumps(self.settings, indent=1) + '\n')
            return
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
            differences = [
                f'{name} {shown(found.get(name))} there and {shown(value)} here'
                for name, value in self.settings.items() if found.get(name) != value]
        except (AttributeError, ValueError):  # no JSON, or no table
            differences = [f'{SETTINGS_FILE} cannot be read']
        if differences:
            raise ValueError(
                f'{self.folder} has answers of another teacher or of other settings: {"; ".join(differences)}; take '
                f'another folder, or delete this one.')


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum
