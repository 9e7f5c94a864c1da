"""Label names of a data set become columns, always by name."""
import difflib
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from timm_miil._checks import shown
from timm_miil.data._files import few
from timm_miil.data.targets import SparseTargets

__all__ = ['LabelColumns', 'check_distinct', 'with_unknown']


def check_distinct(names: Sequence[str]) -> None:
    """Raise ValueError if a label name is there twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f'label names must be distinct, got {shown(twice[0])} twice.')


class LabelColumns:
    """The column of each label name that is met while data are read.

    With a label set its columns are the set's, and other names are gathered for one error. Without one every name
    gets a column of its own.

    Args:
        names: The label set, or None.
        ignore_unknown: Whether names that are not in the label set are passed over; None if whoever reads cannot ask
            for it, so that the error does not suggest it.
    """

    def __init__(self, names: Sequence[str] | None, *, ignore_unknown: bool | None = False) -> None:
        self._names, self._ignore_unknown = names, ignore_unknown
        self._met: list[str] = []
        self._unknown: dict[str, str] = {}
        self.known: dict[str, int] = {name: column for column, name in enumerate(names or ())}
        """Columns by name, -1 for a name to pass over; a reader of millions of rows looks here first."""

    def find(self, name: str, where: str) -> int:
        """The column of a name, or -1 if rows with it are to be passed over.

        Args:
            name: As the data has it.
            where: Place in the data, for the error: 'line 7'.
        """
        column = self.known.get(name)
        if column is None:
            column = len(self._met) if self._names is None else -1
            self.known[name] = column
            if column >= 0:
                self._met.append(name)
            elif not self._ignore_unknown:
                self._unknown[name] = where
        return column

    def finish(self, file: object, *, sort: bool = True) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        """The label names, and where each column given so far ends up.

        Args:
            file: What was read, for the error.
            sort: Whether names without a label set go by the alphabet; else in the order they were met.

        Raises:
            ValueError: If there are names that are not in the label set, or no names at all.
        """
        if self._unknown:
            known = self._names or ()
            listed = (f'{shown(name)} ({where}{_nearest(name, known)})' for name, where in self._unknown.items())
            advice = 'correct them or give labels that has them' if self._ignore_unknown is None else (
                'correct them, give labels that has them, or pass ignore_unknown_labels=True (to a command: '
                '--set ignore_unknown_labels=true)')
            raise ValueError(
                f'{file} has labels that are not among the {len(known)} given ones: '
                f'{few(listed, len(self._unknown))}; {advice}.')
        if self._names is not None:
            return tuple(self._names), np.arange(len(self._names))
        if not self._met:
            raise ValueError(f'{file} has no labels.')
        order = sorted(range(len(self._met)), key=self._met.__getitem__) if sort else range(len(self._met))
        place = np.empty(len(order), dtype=np.int64)
        place[list(order)] = np.arange(len(order))
        return tuple(self._met[column] for column in order), place


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {shown(close[0])}?' if close else ''


def with_unknown(labels: SparseTargets, columns: Collection[int]) -> SparseTargets:
    """The same labels, with all of some columns unknown: those that the annotators were not asked about."""
    others = np.setdiff1d(np.arange(labels.num_classes), list(columns))
    if labels.fill == -1 or not columns:
        return labels
    rows = np.arange(len(labels))
    if len(others) < len(columns):  # the shorter list: what is known
        known = labels.select_columns(others).dense().numpy()
        return SparseTargets.from_entries(
            rows.repeat(len(others)), np.tile(others, len(rows)), known.ravel(), shape=labels.shape, fill=-1)
    mine = labels.entries()
    return SparseTargets.from_entries(
        np.concatenate([mine[0], rows.repeat(len(columns))]),
        np.concatenate([mine[1], np.tile(np.array(list(columns)), len(rows))]),
        np.concatenate([mine[2], np.full(len(rows) * len(columns), -1)]), shape=labels.shape)
