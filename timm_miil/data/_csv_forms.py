"""The three forms of a CSV file of pictures and labels: wide, list and long; `csv_labels` explains them."""
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from timm_miil._checks import shown
from timm_miil.data._entries import Entries, Pictures
from timm_miil.data._labels import LabelColumns, check_distinct
from timm_miil.data._table import Table
from timm_miil.data.targets import SparseTargets

__all__ = ['Form', 'Layout', 'find_layout', 'read_list', 'read_long', 'read_wide']

Form = Literal['auto', 'wide', 'list', 'long']
Labelled = tuple[SparseTargets, tuple[str, ...]]

# Names of columns in lower case without '_', '-' and spaces.
LABEL_COLUMNS = frozenset({'label', 'labelname', 'class', 'classname', 'category', 'categoryname', 'tag'})
LIST_COLUMNS = frozenset({'labels', 'labelnames', 'classes', 'classnames', 'categories', 'tags'})
CONFIDENCE_COLUMNS = frozenset({'confidence', 'value', 'present', 'target'})
SEPARATORS = (';', '|')
VALUES = MappingProxyType({'1': 1, '0': 0, '-1': -1, '1.0': 1, '0.0': 0, '-1.0': -1})
BLOCK_ROWS = 1024

_BYTES = MappingProxyType({text: value % 256 for text, value in (VALUES | {'': -1}).items()})
# Possessive, so that no text takes long to refuse.
_ITEM = r"""(?:'[^']*+'|"[^"]*+"|[^\s,'"\[\]][^,'"\[\]]*+)"""
_BRACKETS = re.compile(rf'\[\s*+(?:{_ITEM}\s*+(?:,\s*+{_ITEM}\s*+)*+)?\]')

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where a table has what.

    Args:
        table: The table.
        form: Its form.
        image: Number of the column of pictures.
        label: Of labels; -1 in the wide form.
        confidence: Of confidences; -1 if there are none.
        split: Of names of splits; -1 if all rows are of one.
        wanted: The split that is read.
        is_guess: Whether the form follows from the header alone.
    """
    table: Table
    form: Form
    image: int
    label: int
    confidence: int
    split: int
    wanted: str
    is_guess: bool

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The split's rows, with their lines."""
        rows = self.table.rows()
        return rows if self.split < 0 else (
            (line, row) for line, row in rows if row[self.split].strip() == self.wanted)


def find_layout(
        table: Table, form: Form, *, image_column: str, label_column: str, confidence_column: str, split_column: int,
        split: str,
) -> Layout:
    """Tell the form of a table, and which column has what; `csv_labels.read_split` says how.

    Raises:
        ValueError: If it cannot be told, or a named column is not there.
    """
    line, first = next(table.rows(), (0, []))
    if not line:
        raise ValueError(f'{table.path} has no rows below its header.')
    image = table.named_column(image_column, 'image_column') if image_column else 0
    lists, label = table.column(LIST_COLUMNS), table.column(LABEL_COLUMNS)
    if label_column:
        lists, label = -1, table.named_column(label_column, 'label_column')
    is_guess = form == 'auto'
    if form == 'auto':
        if lists >= 0 or label >= 0 and first[label].strip().startswith('['):
            form = 'list'
        elif label >= 0:
            form = 'long'
        elif table.header is not None:
            form = 'wide'
        elif len(first) <= 3:
            form = 'list' if len(first) == 2 else 'long'
        else:
            raise ValueError(
                f'{table.path} has {len(first)} columns and no header to name them; write one, such as '
                f'image,<label>,<label> of the wide form.')
    if form == 'wide':
        if table.header is None:
            raise ValueError(f'{table.path} has no header with the labels of the wide form; write one.')
        return Layout(table, form, image, -1, -1, split_column, split, is_guess)
    label = max(label, lists)
    if label < 0:
        label = 1 if image == 0 else 0
    if confidence_column:
        confidence = table.named_column(confidence_column, 'confidence_column')
    else:
        confidence = 2 if table.header is None and len(first) == 3 else table.column(CONFIDENCE_COLUMNS)
    return Layout(table, form, image, label, confidence, split_column, split, is_guess)


def read_wide(layout: Layout, pictures: Pictures, columns: LabelColumns) -> Labelled:
    """A row a picture, a column a label.

    A label that is asked for and has no column is unknown in all pictures.

    Raises:
        ValueError: If a row or the header is wrong.
    """
    path = layout.table.path
    fields = [
        number for number in range(len(layout.table.header or ())) if number not in (layout.image, layout.split)]
    names = [(layout.table.header or ())[number] for number in fields]
    if not names:
        raise ValueError(f'{path} has no columns of labels.')
    try:
        check_distinct(names)
    except ValueError as error:
        raise ValueError(f'{path}, line 1: {error}') from None
    found = np.array([columns.find(name, f'column {number + 1}') for name, number in zip(names, fields)], dtype=int)
    label_names, _ = columns.finish(path, sort=False)
    start, end = fields[0], fields[-1] + 1
    is_whole = end - start == len(fields)

    parts: list[SparseTargets] = []
    block = bytearray()

    def store() -> None:
        values = np.frombuffer(bytes(block), dtype=np.int8).reshape(-1, len(fields))
        table = np.full((len(values), len(label_names)), -1, dtype=np.int8)
        table[:, found[found >= 0]] = values[:, found >= 0]
        # Nearly all labels may be unknown, or nearly all known: the first pictures decide which are listed.
        parts.append(SparseTargets.from_dense(torch.from_numpy(table), fill=parts[0].fill if parts else None))
        block.clear()

    for line, row in layout.rows():
        pictures.add(row[layout.image], line)
        values = row[start:end] if is_whole else [row[number] for number in fields]
        try:
            block += bytes(map(_BYTES.__getitem__, values))
        except KeyError:
            plain = [value.strip() for value in values]
            wrong = [(name, value) for name, value in zip(names, plain) if value not in _BYTES]
            if wrong:
                name, value = wrong[0]
                raise ValueError(
                    f'{path}, line {line}: a label must be 1, 0, -1 or empty, got {shown(value)} in column '
                    f'{shown(name)}; leave out columns that are no labels.') from None
            block += bytes(map(_BYTES.__getitem__, plain))
        if len(block) == BLOCK_ROWS * len(fields):
            store()
    if block:
        store()
    _check_any(pictures, layout)
    return SparseTargets.concatenate(parts), label_names


def read_list(
        layout: Layout, pictures: Pictures, columns: LabelColumns, *, separator: str, unlisted: int) -> Labelled:
    """A row a picture, its labels in one field.

    Raises:
        ValueError: If a row is wrong, or it is not clear what divides labels.
    """
    path, entries = layout.table.path, Entries()
    for line, row in layout.rows():
        pictures.add(row[layout.image], line)
        text = row[layout.label].strip()
        if _BRACKETS.fullmatch(text):
            names = [item.strip('\'" ') for item in re.findall(_ITEM, text[1:-1])]
        else:
            if not separator:
                found = [char for char in SEPARATORS if char in text]
                if len(found) > 1:
                    raise ValueError(
                        f'{path}, line {line}: labels may be divided by {" or ".join(map(repr, found))}, got '
                        f'{shown(text)}; give separator.')
                separator = found[0] if found else ''
            names = [name.strip() for name in text.split(separator)] if separator else [text]
        for name in dict.fromkeys(names):
            if name and (column := columns.find(name, f'line {line}')) >= 0:
                entries.add(len(pictures.names) - 1, column, 1, line)
    _check_commas(path, columns)
    return _finish(layout, pictures, columns, entries, unlisted)


def read_long(layout: Layout, pictures: Pictures, columns: LabelColumns, *, unlisted: int | None) -> Labelled:
    """A row a label of a picture.

    Raises:
        ValueError: If a row is wrong, or contradicts another.
    """
    path, entries = layout.table.path, Entries()
    image, label, confidence = layout.image, layout.label, layout.confidence
    row_of, known = pictures.row_of, columns.known
    for line, row in layout.rows():
        picture = row_of.get(row[image])
        if picture is None:
            picture = pictures.find(row[image], line)
        column = known.get(row[label])
        if column is None:
            name = row[label].strip()
            if not name or layout.is_guess and any(char in name for char in SEPARATORS):
                raise ValueError(
                    f"{path}, line {line}: one label a row is expected, got {shown(row[label])}; give form='list' if a "
                    f"field may hold several, or form='long' if this is one.")
            column = known[row[label]] = columns.find(name, f'line {line}')
        value = VALUES.get(row[confidence].strip()) if confidence >= 0 else 1
        if value is None:
            raise ValueError(f'{path}, line {line}: a confidence must be 1, 0 or -1, got {shown(row[confidence])}.')
        if column >= 0:
            entries.add(picture, column, value, line)
    return _finish(layout, pictures, columns, entries, (-1 if confidence >= 0 else 0) if unlisted is None else unlisted)


def _check_commas(path: object, columns: LabelColumns) -> None:
    """Raise ValueError if a label with commas is made of other labels: it is several, rather."""
    for name in columns.known:
        parts = [part.strip() for part in name.split(',')]
        if len(parts) > 1 and all(part in columns.known for part in parts):
            raise ValueError(
                f'{path}: {shown(name)} is one label or {len(parts)}, all of which are there too; divide labels by '
                f"{' or '.join(map(repr, SEPARATORS))}, or give separator=',' (--set separator=,).")


def _finish(layout: Layout, pictures: Pictures, columns: LabelColumns, entries: Entries, fill: int) -> Labelled:
    path = layout.table.path
    _check_any(pictures, layout)
    label_names, place = columns.finish(path)
    settled = entries.settle()
    if len(settled.clashes):
        one, two = (int(entry) for entry in settled.clashes[0])
        raise ValueError(
            f'{path}, lines {entries.lines[one]} and {entries.lines[two]}: {shown(pictures.names[entries.rows[one]])} '
            f'has {shown(label_names[place[entries.columns[one]]])} as both {entries.values[one]} and '
            f'{entries.values[two]}; keep one of them. {len(settled.clashes)} in all.')
    if settled.num_repeated:
        _logger.warning('%s: %d rows repeat a row before them.', path, settled.num_repeated)
    return SparseTargets.from_entries(
        settled.rows, place[settled.columns], settled.values, shape=(len(pictures.names), len(label_names)), fill=fill,
    ), label_names


def _check_any(pictures: Pictures, layout: Layout) -> None:
    if not pictures.names:
        raise ValueError(f'{layout.table.path} has no rows of split {shown(layout.wanted)}.')
