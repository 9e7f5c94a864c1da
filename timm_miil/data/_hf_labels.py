"""Which columns of a Hugging Face data set say what a picture shows, and what their values mean."""
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_miil._checks import nearest, shown
from timm_miil.data._labels import LabelColumns, with_unknown
from timm_miil.data.targets import SparseTargets

__all__ = ['LabelFinder', 'find_image_column', 'find_labels', 'read_targets']

ROWS_AT_ONCE = 10_000
Integers = npt.NDArray[np.int64]
Listed = Mapping[str, int] | None
KINDS = (
    'ClassLabel, a list of ClassLabel, a list of strings, a struct with a number a label, or (with labels) a number or '
    'numbers')


@dataclass(frozen=True)
class LabelFinder:
    """Reads the labels of one row.

    Args:
        columns: Of the data set, that it needs.
        names: All labels there can be, in order; None if the rows have any names.
        find: From those columns of a row to 1, 0 or -1 by name, all others being absent; None if nothing is known.
            Raises ValueError for a value that means nothing.
    """
    columns: tuple[str, ...]
    names: tuple[str, ...] | None
    find: Callable[[Sequence[Any]], Listed]

    def find_in(self, row: Sequence[Any], where: str) -> Listed:
        """What `find` finds.

        Raises:
            ValueError: If a value means nothing.
        """
        try:
            return self.find(row)
        except ValueError as error:
            raise ValueError(f'{where}: {error}.') from error

    def unmentioned(self, label_names: Sequence[str]) -> list[int]:
        """Places of labels that are not in the data set's own list: nobody was asked about them."""
        own = None if self.names is None else frozenset(self.names)
        return [place for place, name in enumerate(label_names) if own is not None and name not in own]


def read_targets(
        dataset: Any, finder: LabelFinder, columns: LabelColumns, where: str,
) -> tuple[SparseTargets, tuple[str, ...]]:
    """The labels of all rows, and their names.

    Args:
        dataset: With the finder's columns and no others.
        finder: Reads a row.
        columns: Where names go.
        where: What the data set is called in errors.

    Raises:
        ValueError: If a row has a value that means nothing, or a name is not among those wanted.
    """
    rows, found, values = array('q'), array('q'), array('b')
    blank: list[int] = []
    number = 0
    for batch in dataset.iter(ROWS_AT_ONCE):
        for row in zip(*(batch[name] for name in finder.columns)):
            listed = finder.find_in(row, f'{where}, row {number}')
            if listed is None:
                blank.append(number)
            for label, value in (listed or {}).items():
                column = columns.known.get(label)
                rows.append(number)
                found.append(columns.find(label, f'row {number}') if column is None else column)
                values.append(value)
            number += 1
    label_names, place = columns.finish(where, sort=finder.names is None)
    entries = np.stack([np.asarray(rows), np.asarray(found), np.asarray(values)])
    entries = entries[:, (entries[1] >= 0) & (entries[2] != 0)]
    entries[1] = place[entries[1]]
    targets = _with_blank_rows(entries, np.array(blank, dtype=np.int64), (number, len(label_names)))
    return with_unknown(targets, finder.unmentioned(label_names)), label_names


def _with_blank_rows(entries: Integers, blank: Integers, shape: tuple[int, int]) -> SparseTargets:
    """A table of (row, column, value) in which all else is absent, and in blank rows unknown."""
    fill = -1 if 2 * len(blank) > shape[0] else 0
    # Rows that are not as the fill has it are listed whole.
    whole = np.setdiff1d(np.arange(shape[0]), blank) if fill else blank
    rest = np.setdiff1d((whole[:, None] * shape[1] + np.arange(shape[1])).ravel(), entries[0] * shape[1] + entries[1])
    rows, columns, values = np.concatenate(
        [entries, [rest // shape[1], rest % shape[1], np.full(len(rest), -1 - fill)]], axis=1)
    return SparseTargets.from_entries(rows, columns, values, shape=shape, fill=fill)


def find_image_column(features: Mapping[str, Any], wanted: str | None, datasets: ModuleType) -> str:
    """The column of pictures.

    Raises:
        ValueError: If there is none, or there are several and none is wanted, or the wanted one is no such column.
    """
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if wanted is not None and wanted not in features:
        raise ValueError(f'image_column must be a column, got {shown(wanted)}; {nearest(wanted, features)}')
    if wanted is not None and wanted not in found:
        raise ValueError(f'image_column must hold pictures, got {shown(wanted)} of type {shown(features[wanted])}.')
    if wanted is None and len(found) != 1:
        raise ValueError(
            f'image_column must be given where there is not one column of pictures, got {_listed(found)} among '
            f'{_listed(features)}.')
    return found[0] if wanted is None else wanted


def find_labels(
        features: Mapping[str, Any], wanted: str | Sequence[str] | None, labels: Sequence[str] | None,
        datasets: ModuleType,
) -> LabelFinder:
    """The column or columns of labels, by the types of all columns if none is wanted.

    Args:
        features: Types by column.
        wanted: A column, one inside another written with a dot ('objects.category'), or columns that are a label each.
        labels: Names for numbers.
        datasets: The package.

    Raises:
        ValueError: If the wanted column is none or of another type; without one, if not exactly one may be meant.
    """
    if isinstance(wanted, str):
        return _finder(features, wanted, labels, datasets)
    if wanted is not None:
        return _one_column_a_label(features, wanted, datasets)
    found = [name for name, feature in features.items() if _is_self_explaining(feature, datasets)]
    if not found and labels is not None and set(labels) <= features.keys():
        return _one_column_a_label(features, labels, datasets)
    if len(found) != 1:
        raise ValueError(
            f'label_column must be given where there is not one column of labels (lists of ClassLabel or strings, or '
            f'ClassLabel), got {_listed(found)} among {_listed(features)}.')
    return _finder(features, found[0], labels, datasets)


def _listed(names: Iterable[str]) -> str:
    return ', '.join(map(shown, names)) or 'none'


def _unwrap(feature: Any) -> tuple[Any, bool, int]:
    """Type of the elements of a list, whether it is a list, and how long, -1 for any length."""
    if isinstance(feature, (list, tuple)):
        return feature[0], True, -1
    inner = getattr(feature, 'feature', None)
    return (feature, False, -1) if inner is None else (inner, True, getattr(feature, 'length', -1))


def _dtype(feature: Any) -> str:
    """'string', 'int64', ... of a plain value; '' of anything else."""
    return str(feature.dtype) if type(feature).__name__ == 'Value' else ''


def _is_string(feature: Any) -> bool:
    return _dtype(feature) in ('string', 'large_string')


def _is_number(feature: Any) -> bool:
    return _dtype(feature).startswith(('int', 'uint', 'bool', 'float'))


def _is_self_explaining(feature: Any, datasets: ModuleType) -> bool:
    inner, is_list, _ = _unwrap(feature)
    return isinstance(inner, datasets.ClassLabel) or is_list and _is_string(inner)


def _finder(
        features: Mapping[str, Any], column: str, labels: Sequence[str] | None, datasets: ModuleType,
) -> LabelFinder:
    """How one column, or one inside another, is read."""
    name, *inside = [column] if column in features else column.split('.')
    if name not in features:
        raise ValueError(f'label_column must be a column, got {shown(column)}; {nearest(column, features)}')
    feature, is_list, length = _unwrap(features[name])
    for part in inside:
        if not isinstance(feature, Mapping) or part not in feature:
            raise ValueError(f'label_column {shown(column)} has no {shown(part)}; {name} is {shown(features[name])}.')
        feature, is_inner, length = _unwrap(feature[part])
        is_list |= is_inner

    columns, refused = (name,), f'label_column must be {KINDS}; {shown(column)} is {shown(features[name])}'
    take = partial(_take, inside)
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        return LabelFinder(columns, names, partial(_by_number, take, is_list, names))
    if _is_string(feature):
        return LabelFinder(columns, None, partial(_by_name, take, is_list))
    if isinstance(feature, Mapping) and not is_list and all(map(_is_number, feature.values())):
        names = tuple(feature)
        return LabelFinder(columns, names, partial(_by_struct, take, names))
    if _is_number(feature):
        if labels is None:
            raise ValueError(f'{refused}; give labels, the names that its numbers mean.')
        names = tuple(labels)
        if is_list and length == len(names) > 0:
            return LabelFinder(columns, names, partial(_by_place, take, names))
        if not _dtype(feature).startswith(('bool', 'float')):
            return LabelFinder(columns, names, partial(_by_number, take, is_list, names))
    raise ValueError(f'{refused}.')


def _one_column_a_label(features: Mapping[str, Any], wanted: Sequence[str], datasets: ModuleType) -> LabelFinder:
    for name in wanted:
        if name not in features:
            raise ValueError(f'label_column must be columns, got {shown(name)}; {nearest(name, features)}')
        if not _is_number(features[name]) or isinstance(features[name], datasets.ClassLabel):
            raise ValueError(
                f'label_column must be columns of numbers where they are several, got {shown(name)}, which is '
                f'{shown(features[name])}.')
    return LabelFinder(tuple(wanted), tuple(wanted), partial(_by_columns, tuple(wanted)))


# ---- from the values of a row to labels by name


def _take(inside: Sequence[str], value: Any) -> Any:
    """The value at the end of a path; of a list of structs the list of their values there."""
    for part in inside:
        if value is None:
            return None
        value = [row[part] for row in value] if isinstance(value, list) else value[part]
    return value


def _by_number(take: Callable[[Any], Any], is_list: bool, names: Sequence[str], row: Sequence[Any]) -> Listed:
    value = take(row[0])
    if value is None or value == -1:  # -1: the package's own sign for no label
        return None
    found = {}
    for number in _flat(value) if is_list else (value,):
        if type(number) is not int or not 0 <= number < len(names):
            raise ValueError(f'labels must be numbers in [0, {len(names)}), got {shown(number)}')
        found[names[number]] = 1
    return found


def _by_name(take: Callable[[Any], Any], is_list: bool, row: Sequence[Any]) -> Listed:
    value = take(row[0])
    if value is None:
        return None
    found = {}
    for name in _flat(value) if is_list else (value,):
        if not isinstance(name, str) or not name:
            raise ValueError(f'labels must be names, got {shown(name)}')
        found[name] = 1
    return found


def _by_place(take: Callable[[Any], Any], names: Sequence[str], row: Sequence[Any]) -> Listed:
    value = take(row[0])
    return None if value is None else {name: _label(number, name) for name, number in zip(names, value, strict=True)}


def _by_struct(take: Callable[[Any], Any], names: Sequence[str], row: Sequence[Any]) -> Listed:
    value = take(row[0])
    return None if value is None else {name: _label(value[name], name) for name in names}


def _by_columns(names: Sequence[str], row: Sequence[Any]) -> Listed:
    return {name: _label(value, name) for name, value in zip(names, row)}


def _label(value: Any, name: str) -> int:
    if value is None:
        return -1
    if value not in (1, 0, -1):
        raise ValueError(f'label {shown(name)} must be 1, 0, -1 or null, got {shown(value)}')
    return int(value)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
