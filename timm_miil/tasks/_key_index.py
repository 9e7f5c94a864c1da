"""Where the record of a key is."""
import numpy as np

__all__ = ['KeyIndex']

_Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


class KeyIndex:
    """Places of keys: (part, row), found by the first 64 bits of a key; 16 bytes a key.

    Sorted runs of keys, each of which is merged with the one before when that is no longer than twice as long: the
    runs are few, and a key is moved a few times.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[_Ints, _Ints]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def add(self, keys: _Ints, part: int, first_row: int = 0) -> None:
        """The keys are those of rows first_row, first_row + 1... of a part."""
        places = (part << 32) + first_row + np.arange(len(keys), dtype=np.int64)
        self._runs.append(_sorted(keys, places))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            last, before = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(*(np.concatenate(pair) for pair in zip(before, last))))

    def find(self, keys: _Ints) -> tuple[_Ints, _Ints]:
        """Part and row of each key; -1 for the part of one that is not there."""
        places = np.full(len(keys), -1, dtype=np.int64)
        for known, where in self._runs:
            if len(known):
                found = np.minimum(np.searchsorted(known, keys), len(known) - 1)
                places = np.where(known[found] == keys, where[found], places)
        return places >> 32, places & 0xFFFFFFFF

    def drop(self, part: int) -> None:
        """Forget a part."""
        kept = [(places >> 32) != part for _, places in self._runs]
        self._runs = [(keys[keep], places[keep]) for (keys, places), keep in zip(self._runs, kept)]


def _sorted(keys: _Ints, places: _Ints) -> tuple[_Ints, _Ints]:
    order = keys.argsort(kind='stable')  # of sorted runs, it is one pass
    return keys[order], places[order]
