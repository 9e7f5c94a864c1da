"""Labels of many pictures in little memory: of each picture only what differs from the rest is stored.

A million pictures with 9600 labels are 9.6 GB as a table and some tens of MB here, because a picture has few labels
that are present, or, where most are unknown, few that are known.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from timm_miil._checks import check_labels, check_ndim, shown

__all__ = ['Indices', 'SparseTargets']

Indices = Sequence[int] | Tensor | npt.NDArray[np.integer]
"""Whole numbers, such as rows to select: a list, a tensor or an array."""

LABELS = (1, 0, -1)


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Labels (N, C) that are 1 for present, 0 for absent or -1 for unknown, by rows.

    Make them by `from_dense` or `from_entries`, which check and sort. The arrays are never written to, so that
    processes share them after a fork.

    Args:
        starts: Where each row's entries begin and the last one's end, shape (N + 1,), int64.
        columns: The column of each entry, ascending within a row, int32.
        values: The label of each entry, never `fill`, int8.
        num_classes: C.
        fill: The label, 0 or -1, of all that is not listed.
    """
    starts: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.int8]
    num_classes: int
    fill: int

    @classmethod
    def from_dense(cls, targets: Tensor, *, fill: int | None = None) -> 'SparseTargets':
        """Store a table.

        Args:
            targets: 1 for present, 0 for absent, -1 for unknown, shape (N, C), any dtype.
            fill: The label, 0 or -1, that is not listed; None for the one that there is more of.

        Raises:
            ValueError: If targets have another number of dimensions or other values, or fill is none of these.
        """
        _check_fill(fill or 0)
        check_ndim(2, targets=targets)
        targets = targets.detach().cpu()
        if targets.dtype in (torch.bool, torch.uint8):
            targets = targets.to(torch.int16)  # these have no sign
        check_labels(targets=targets)
        dense = targets.to(torch.int8).numpy()
        if fill is None:
            fill = -1 if np.count_nonzero(dense == -1) > np.count_nonzero(dense == 0) else 0
        rows, columns = np.nonzero(dense != fill)
        return cls(
            _starts(rows, len(dense)), columns.astype(np.int32), dense[rows, columns], dense.shape[1], fill)

    @classmethod
    def from_entries(
            cls, rows: Indices, columns: Indices, values: Indices | int, *, shape: tuple[int, int], fill: int = 0,
    ) -> 'SparseTargets':
        """Store what is listed; an entry may be there several times if it says the same.

        Args:
            rows: The row of each entry, in [0, N), in any order.
            columns: The column of each entry, in [0, C).
            values: The label of each entry, 1, 0 or -1; or one for all.
            shape: (N, C).
            fill: The label, 0 or -1, of all that is not listed.

        Raises:
            IndexError: If a row or column is out of range.
            ValueError: If lengths differ, a value or fill is none of the above, or entries contradict each other.
        """
        num_rows, num_classes = shape
        _check_fill(fill)
        row, column = _integers('rows', rows), _integers('columns', columns)
        value = np.broadcast_to(_integers('values', [values]), row.shape) if isinstance(values, int) else _integers(
            'values', values)
        if not len(row) == len(column) == len(value):
            raise ValueError(
                f'rows, columns and values must be equally many, got {len(row)}, {len(column)} and {len(value)}.')
        _check_in_range('rows', row, num_rows)
        _check_in_range('columns', column, num_classes)
        if len(wrong := value[~np.isin(value, LABELS)]):
            raise ValueError(f'values must be 1, 0 or -1, got {wrong[0]}.')

        places = row.astype(np.int64) * num_classes + column
        order = np.argsort(places, kind='stable')
        places, value = places[order], value[order].astype(np.int8)
        again = places[1:] == places[:-1]
        if len(clash := np.flatnonzero(again & (value[1:] != value[:-1]))):
            where, first = divmod(int(places[clash[0]]), num_classes), clash[0]
            raise ValueError(
                f'entries must agree, got both {value[first]} and {value[first + 1]} for row {where[0]}, '
                f'column {where[1]}.')
        kept = value != fill
        kept[1:] &= ~again
        places = places[kept]
        return cls(
            _starts(places // max(num_classes, 1), num_rows), (places % max(num_classes, 1)).astype(np.int32),
            value[kept], num_classes, fill)

    @classmethod
    def concatenate(cls, parts: Sequence['SparseTargets']) -> 'SparseTargets':
        """Store the rows of one after those of the other.

        Raises:
            ValueError: If there are none, or they differ in `num_classes` or `fill`.
        """
        kinds = {(part.num_classes, part.fill) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f'parts must have one number of classes and one fill, got {sorted(kinds)}.')
        num_classes, fill = kinds.pop()
        counts = np.concatenate([np.diff(part.starts) for part in parts])
        return cls(
            np.concatenate([[0], np.cumsum(counts)]), np.concatenate([part.columns for part in parts]),
            np.concatenate([part.values for part in parts]), num_classes, fill)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C)."""
        return len(self), self.num_classes

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Tensor:
        """The labels of one picture, shape (C,), int8.

        Raises:
            IndexError: If there is no such row; negative ones count from the end.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'row must be in [{-len(self)}, {len(self)}), got {index}.')
        index %= len(self)
        entries = slice(self.starts[index], self.starts[index + 1])
        dense = np.full(self.num_classes, self.fill, dtype=np.int8)
        dense[self.columns[entries]] = self.values[entries]
        return torch.from_numpy(dense)

    def rows(self, indices: Indices) -> Tensor:
        """The labels of K pictures, shape (K, C), int8.

        Raises:
            IndexError: If a row is not in [0, N).
        """
        return self.select_rows(indices).dense()

    def dense(self) -> Tensor:
        """The whole table, shape (N, C), int8."""
        dense = np.full(self.shape, self.fill, dtype=np.int8)
        rows, columns, values = self.entries()
        dense[rows, columns] = values
        return torch.from_numpy(dense)

    def entries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Row, column and label of all that is not `fill`, by rows."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts)), self.columns, self.values

    def select_rows(self, indices: Indices) -> 'SparseTargets':
        """The labels of some pictures, in the order given, the same one several times if asked for.

        Raises:
            IndexError: If a row is not in [0, N).
        """
        index = _integers('rows', indices)
        _check_in_range('rows', index, len(self))
        counts = self.starts[index + 1] - self.starts[index]
        starts = np.concatenate([[0], np.cumsum(counts)])
        entries = np.arange(starts[-1]) + np.repeat(self.starts[index] - starts[:-1], counts)
        return SparseTargets(starts, self.columns[entries], self.values[entries], self.num_classes, self.fill)

    def select_columns(self, indices: Indices) -> 'SparseTargets':
        """Some labels of all pictures, in the order given.

        Raises:
            IndexError: If a column is not in [0, C).
            ValueError: If a column is given twice.
        """
        index = _integers('columns', indices)
        _check_in_range('columns', index, self.num_classes)
        if len(np.unique(index)) < len(index):
            raise ValueError(f'columns must be distinct, got {shown(index.tolist())}.')
        place = np.full(self.num_classes, -1, dtype=np.int64)
        place[index] = np.arange(len(index))
        rows, old, values = self.entries()
        columns = place[old]
        kept = columns >= 0
        return SparseTargets.from_entries(
            rows[kept], columns[kept], values[kept], shape=(len(self), len(index)), fill=self.fill)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """In how many pictures each label is present, absent and unknown, each of shape (C,), int64."""
        counts = np.stack([
            np.bincount(self.columns[self.values == label], minlength=self.num_classes) for label in LABELS])
        counts[LABELS.index(self.fill)] = len(self) - counts.sum(0)
        present, absent, unknown = torch.from_numpy(counts.astype(np.int64))
        return present, absent, unknown


def _starts(rows: npt.NDArray[np.integer], num_rows: int) -> npt.NDArray[np.int64]:
    """Where the entries of each row begin, given the row of each."""
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(np.int64)


def _check_fill(fill: int) -> None:
    if fill not in (0, -1):
        raise ValueError(f'fill must be 0 or -1, got {shown(fill)}.')


def _integers(name: str, numbers: Indices) -> npt.NDArray[np.integer]:
    array = numbers.cpu().numpy() if isinstance(numbers, Tensor) else np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in 'iu'):
        raise ValueError(f'{name} must be a list of whole numbers, got {array.dtype} of shape {array.shape}.')
    return array if array.size else array.astype(np.int64)


def _check_in_range(name: str, numbers: npt.NDArray[np.integer], end: int) -> None:
    if numbers.size and not (0 <= (low := int(numbers.min())) and (high := int(numbers.max())) < end):
        raise IndexError(f'{name} must be in [0, {end}), got {low if low < 0 else high}.')
