"""Millions of paths in one block of memory, where a tuple of Python's objects would take ten times as much."""
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from timm_miil.data.targets import Indices

__all__ = ['PackedPaths']


class PackedPaths(Sequence[Path]):
    """Paths below one folder, read-only; workers share them after a fork.

    Args:
        names: Relative to the folder, or whole paths if there is none.
        root: The folder.
    """

    def __init__(self, names: Iterable[str | os.PathLike[str]], root: str | os.PathLike[str] = '') -> None:
        self.root = Path(root)
        # The system's encoding: file names need not be valid text.
        ends, block = array('q', [0]), bytearray()
        for name in names:
            block += os.fsencode(name)
            ends.append(len(block))
        self._ends, self._block = np.array(ends, dtype=np.int64), bytes(block)

    def name(self, index: int) -> str:
        """The path relative to the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(f'index must be in [{-len(self)}, {len(self)}), got {index}.')
        index %= len(self)
        return os.fsdecode(self._block[self._ends[index]:self._ends[index + 1]])

    def raw(self) -> Iterator[bytes]:
        """The whole paths as the system has them, without an object for each."""
        root, ends = os.fsencode(self.root / '_')[:-1], self._ends.tolist()
        return (root + self._block[start:end] for start, end in zip(ends, ends[1:]))

    def select(self, indices: Indices) -> 'PackedPaths':
        """Some of the paths, in the order given.

        Raises:
            IndexError: If an index is not in [0, N).
        """
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f'indices must be in [0, {len(self)}), got {index.min()} to {index.max()}.')
        other = PackedPaths((), self.root)
        starts, ends = self._ends[index], self._ends[index + 1]
        other._ends = np.concatenate([[0], np.cumsum(ends - starts)])
        other._block = b''.join(self._block[start:end] for start, end in zip(starts.tolist(), ends.tolist()))
        return other

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Path]:
        return (self.root / self.name(index) for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> 'PackedPaths': ...

    def __getitem__(self, index: int | slice) -> 'Path | PackedPaths':
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self.root / self.name(index)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and len(self) == len(other):
            return all(mine == theirs for mine, theirs in zip(self, other))
        return NotImplemented if not isinstance(other, Sequence) else False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f'PackedPaths({len(self)} paths below {str(self.root)!r})'
