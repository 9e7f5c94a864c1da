"""One way to open a data set of any form: which form it is, which splits it has, and the pictures of one split."""
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast, get_args, get_origin

from timm_miil import catalog
from timm_miil._checks import nearest, shown
from timm_miil.data._files import few
from timm_miil.data._labels import check_distinct
from timm_miil.data.records import ImageStream, LabelledImages
from timm_miil.data.zero_shot import read_labels

__all__ = ['find_format', 'has_split', 'list_formats', 'list_splits', 'open_split', 'read_label_set']

FORMATS = MappingProxyType({
    'coco': 'timm_miil.data.coco',
    'folder': 'timm_miil.data.folder',
    'csv': 'timm_miil.data.csv_labels',
    'voc': 'timm_miil.data.voc',
    'nuswide': 'timm_miil.data.nuswide',
    'openimages': 'timm_miil.data.openimages',
    'hf': 'timm_miil.data.hf',
    'webdataset': 'timm_miil.data.shards',
})
"""The module of each format, imported when it is used. It has the two functions of `_Reader`."""

# A folder of folders with pictures: what other formats may have too, so it is asked last and only alone.
FALLBACK = 'folder'
# A data set of this format need not be on this machine.
REMOTE = 'hf'

# What a split is called elsewhere.
ALIASES = MappingProxyType({
    'train': ('training', 'train2017', 'train2014'),
    'val': ('valid', 'validation', 'dev', 'val2017', 'val2014'),
    'test': ('testing', 'test2017', 'test2015', 'test2014'),
})

_logger = logging.getLogger(__name__)


class _Reader(Protocol):
    """What a module of `FORMATS` has, as functions."""

    def list_splits(self, data_dir: Path) -> tuple[str, ...]:
        """The splits that are there under their own names; none if the folder is not of this format.

        It may have keywords that say where files lie; `read_split` then has the same.
        """

    def read_split(
            self,
            data_dir: Path,
            split: str,
            *,
            labels: Sequence[str] | None = None,
            ignore_unknown_labels: bool = False,
    ) -> LabelledImages | ImageStream:
        """The pictures of a split that `list_splits` named, after all checks.

        With `labels` these are its columns, in their order; without, the data's own. Further keywords are options of
        the format.
        """


def list_formats() -> tuple[str, ...]:
    """Names of the formats that `open_split` reads, sorted."""
    return tuple(sorted(FORMATS))


def find_format(data_dir: str | os.PathLike[str], **options: object) -> str:
    """Which format a data set has, by its files.

    Args:
        data_dir: The data set's folder.
        **options: As for `open_split`; some say where files lie.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder is of no format, or of several.
    """
    data_dir = _check_folder(data_dir)
    found = [name for name in FORMATS if name != FALLBACK and _list_splits(_reader(name), data_dir, options)]
    if not found and _reader(FALLBACK).list_splits(data_dir):
        found = [FALLBACK]
    if len(found) != 1:
        raise ValueError(
            f'{data_dir} looks like {" and ".join(found) or "no format"}; give format as one of '
            f'{", ".join(list_formats())}.')
    return found[0]


def list_splits(data_dir: str | os.PathLike[str], *, format: str = 'auto', **options: object) -> tuple[str, ...]:
    """The splits of a data set, by the names that its files have.

    Args:
        data_dir: The data set's folder.
        format: One of `list_formats()`, or 'auto'.
        **options: Of the format's reader, as for `open_split`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the format or an option is unknown, or the format not to be found.
    """
    data_dir = _check_folder(data_dir, format)
    return _list_splits(_find_reader(data_dir, format, options), data_dir, options)


def has_split(data_dir: str | os.PathLike[str], split: str, format: str = 'auto', **options: object) -> bool:
    """Whether a data set has a split, under this name or another usual one.

    Args:
        data_dir: The data set's folder.
        split: Such as 'train', which 'train2017' is too.
        format: One of `list_formats()`, or 'auto'.
        **options: Of the format's reader, as for `open_split`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the format or an option is unknown, the format not to be found, or several splits fit.
    """
    return _resolve(split, list_splits(data_dir, format=format, **options), Path(data_dir)) is not None


def open_split(
        data_dir: str | os.PathLike[str],
        split: str,
        *,
        format: str = 'auto',
        labels: str | os.PathLike[str] | Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        **options: object,
) -> LabelledImages | ImageStream:
    """The pictures of one split and what they show; everything is checked before the first picture is opened.

    Args:
        data_dir: The data set's folder.
        split: 'train', 'val', 'test' or a name of the data's own; usual other names are found ('val2017').
        format: One of `list_formats()`, or 'auto'.
        labels: The labels to have, in order: names, a label set of the catalogue ('coco_80'), or a text file with one
            a line, which may lie in the data's folder; None for the data's own. They are matched by name. A label
            that the data never mention has a column all the same: absent, or unknown if the data list the labels
            that were annotated and this is not one of them.
        ignore_unknown_labels: Whether names in the data that are not among `labels` are passed over.
        **options: Of the format; its reader's `read_split` explains them.

    Raises:
        FileNotFoundError: If the folder, the split or files are missing; the first few are named.
        TypeError: If an option is of the wrong kind.
        ValueError: If the format or an option is unknown, a file is wrong, or names do not match.
    """
    data_dir = _check_folder(data_dir, format)
    names = read_label_set(labels, data_dir)
    reader = _find_reader(data_dir, format, options)
    splits = _list_splits(reader, data_dir, options)
    found = _resolve(split, splits, data_dir)
    if found is None:
        raise FileNotFoundError(
            f'{data_dir} has no split {shown(split)}; it has {", ".join(map(shown, splits)) or "none"}.')
    read = cast(Callable[..., LabelledImages | ImageStream], reader.read_split)
    source = read(data_dir, found, labels=names, ignore_unknown_labels=ignore_unknown_labels, **options)
    _log_never_present(source, f'{data_dir}, split {found}')
    return source


def read_label_set(
        labels: str | os.PathLike[str] | Sequence[str] | None, data_dir: str | os.PathLike[str],
) -> tuple[str, ...] | None:
    """The label names that `labels` of `open_split` means; None for None.

    Raises:
        FileNotFoundError: If it is neither a label set of the catalogue nor a file.
        ValueError: If the file is no list of names, or a name is there twice.
    """
    if labels is None:
        return None
    if isinstance(labels, (str, os.PathLike)):
        if labels in catalog.label_sets():
            return catalog.label_set(str(labels)).labels
        for path in (Path(labels), Path(data_dir) / labels):
            if path.is_file():
                return read_labels(path)
        raise FileNotFoundError(
            f'labels must be a label set of the catalogue, or a text file here or in {data_dir}, got '
            f'{shown(os.fspath(labels))}; {nearest(os.fspath(labels), catalog.label_sets())}')
    check_distinct(labels)
    return tuple(labels)


def _check_folder(data_dir: str | os.PathLike[str], format: str = 'auto') -> Path:
    data_dir = Path(data_dir)
    if format != REMOTE and not data_dir.is_dir():
        raise FileNotFoundError(
            f'data_dir must be the folder of a data set, got {str(data_dir)!r}, which is none; for one on the Hub give '
            f'format {REMOTE!r}.')
    return data_dir


def _reader(name: str) -> _Reader:
    if name not in FORMATS:
        raise ValueError(f'unknown format {shown(name)}; {nearest(name, FORMATS)}')
    return cast(_Reader, importlib.import_module(FORMATS[name]))


def _find_reader(data_dir: Path, format: str, options: Mapping[str, object]) -> _Reader:
    """The reader of a format, which takes these options."""
    format = find_format(data_dir, **options) if format == 'auto' else format
    reader = _reader(format)
    known = _keywords(reader.read_split)
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) if known else 'it has none.'
            raise ValueError(f'unknown option {shown(name)} of format {format}; {hint}')
        _check_kind(name, value, known[name])
    return reader


def _keywords(function: Callable[..., object]) -> dict[str, Any]:
    """The options that a function takes, with their annotations."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.annotation for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ('labels', 'ignore_unknown_labels')}


def _check_kind(name: str, value: object, kind: Any) -> None:
    """Raise TypeError or ValueError unless an option, which may come from a recipe, is as its annotation says."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f'{name} must be one of {", ".join(map(repr, get_args(kind)))}, got {shown(value)}.')
    elif type(value) not in (get_args(kind) or (kind,)):  # not isinstance: True is no number here
        names = [one.__name__ for one in get_args(kind) or (kind,)]
        raise TypeError(f'{name} must be {" or ".join(names)}, got {type(value).__name__} {shown(value)}.')


def _list_splits(reader: _Reader, data_dir: Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    taken = {name: options[name] for name in _keywords(reader.list_splits) if name in options}
    return reader.list_splits(data_dir, **taken)


def _resolve(split: str, splits: Sequence[str], data_dir: Path) -> str | None:
    """The data's own name of a split, None if it has no such split."""
    if split in splits:
        return split
    found = [name for name in ALIASES.get(split, ()) if name in splits]
    if len(found) > 1:
        raise ValueError(f'split {shown(split)} of {data_dir} may be {" or ".join(found)}; give the name of one.')
    return found[0] if found else None


def _log_never_present(source: LabelledImages | ImageStream, where: str) -> None:
    if (counts := source.label_counts()) is None:
        return
    never = [name for name, count in zip(source.label_names, counts[0].tolist()) if not count]
    if never:
        _logger.warning(
            '%s: %d of %d labels are never present: %s.', where, len(never), len(source.label_names),
            few(map(shown, never), len(never)))
