"""Pictures and labels that a file lists line by line: the same may come again, and may be contradicted."""
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from timm_miil._checks import shown
from timm_miil.data._files import clean_name

__all__ = ['Entries', 'Pictures', 'Settled']


class Pictures:
    """Pictures in the order in which a file names them first.

    Args:
        file: For errors.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lines = file, array('q')
        self.names: list[str] = []
        self.row_of: dict[str, int] = {}
        """Rows by name as the file writes it; a reader of millions of lines looks here first."""

    def find(self, written: str, line: int) -> int:
        """The row of a picture, a new one if it was not met before.

        Raises:
            ValueError: If its name is no relative path, or leaves the folder.
        """
        name = clean_name(written.strip())
        if not name:
            raise ValueError(
                f'{self._file}, line {line}: a picture must be a path that is relative to its folder and stays in it, '
                f'got {shown(written)}.')
        row = self.row_of.setdefault(name, len(self.names))
        if row == len(self.names):
            self.names.append(name)
            self._lines.append(line)
        self.row_of[written] = row
        return row

    def add(self, written: str, line: int) -> None:
        """The next picture, which has this line for itself.

        Raises:
            ValueError: If its name is no relative path, leaves the folder, or was met before.
        """
        count = len(self.names)
        if (row := self.find(written, line)) < count:
            raise ValueError(
                f'{self._file}, line {line}: picture {shown(written)} is on line {self._lines[row]} already; each must '
                f'have one row in this form.')


class Entries:
    """Row, column, label and line of each entry, in 17 bytes."""

    def __init__(self) -> None:
        self.rows, self.columns, self.values, self.lines = array('i'), array('i'), array('b'), array('q')

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: int, column: int, value: int, line: int) -> None:
        self.rows.append(row)
        self.columns.append(column)
        self.values.append(value)
        self.lines.append(line)

    def settle(self) -> 'Settled':
        """Leave one entry of those for the same row and column."""
        rows, columns, values = (np.asarray(numbers) for numbers in (self.rows, self.columns, self.values))
        places = rows.astype(np.int64) * (int(columns.max(initial=0)) + 1) + columns
        order = np.argsort(places, kind='stable')
        again = np.zeros(len(order), dtype=bool)
        again[1:] = places[order][1:] == places[order][:-1]
        clash = np.flatnonzero(again[1:] & (values[order][1:] != values[order][:-1]))
        clashes = np.stack([order[clash], order[clash + 1]], axis=1)
        kept = order[~again]
        disputed = np.isin(places[kept], places[clashes[:, 0]])
        return Settled(
            rows[kept], columns[kept], np.where(disputed, -1, values[kept]).astype(np.int8), clashes,
            int(again.sum()), int(disputed.sum()))


@dataclass(frozen=True, eq=False)
class Settled:
    """One entry for each row and column that has any.

    Args:
        rows: Of each entry.
        columns: Of each entry.
        values: Of each entry; -1 where the file contradicts itself.
        clashes: Pairs of numbers of entries that contradict each other, shape (M, 2).
        num_repeated: Entries that are not the first for their place.
        num_disputed: Places where the file contradicts itself.
    """
    rows: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.int8]
    clashes: npt.NDArray[np.int64]
    num_repeated: int
    num_disputed: int
