"""Reader of Open Images' image-level labels that people verified, V6 and before.

Kuznetsova et al., "The Open Images Dataset V4", arXiv:1811.00982. Each picture has some labels that people found to
be present or absent; all others are unknown (-1), as in the paper on partial labels, arXiv:2110.10955.
"""
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from timm_miil._checks import shown
from timm_miil.data._entries import Entries, Pictures
from timm_miil.data._files import few, find_folder, read_lines
from timm_miil.data._labels import LabelColumns
from timm_miil.data._table import Table, open_table
from timm_miil.data.records import MultiLabelRecords, files_of
from timm_miil.data.targets import SparseTargets

__all__ = ['list_splits', 'read_split']

TABLE_DIRS = ('.', 'annotations', 'labels', 'metadata')
IMAGE_DIRS = ('{split}', 'images/{split}')
ALL_CLASSES = 'all'
CONFIDENCES = MappingProxyType({'1': 1, '0': 0, '1.0': 1, '0.0': 0})
_LABEL_FILE = re.compile(r'(?:oidv\d+-)?([a-z]+)-annotations-human-imagelabels(?:-boxable)?\.csv')
_DESCRIPTIONS = re.compile(r'(?:oidv\d+-)?class-descriptions(?:-boxable)?\.csv')
_TRAINABLE = re.compile(r'(?:oidv\d+-)?classes-trainable\.txt')

_logger = logging.getLogger(__name__)


def list_splits(data_dir: Path, *, label_file: str = '') -> tuple[str, ...]:
    """The splits that have a file `<split>-annotations-human-imagelabels.csv`.

    Args:
        data_dir: As of `read_split`.
        label_file: As of `read_split`.
    """
    if label_file:
        splits = ('train', 'validation', 'test') if '{split}' in label_file else ('train',)
        return tuple(split for split in splits if (data_dir / label_file.replace('{split}', split)).is_file())
    return tuple(sorted({match[1] for _, match in _find(data_dir, _LABEL_FILE)}))


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        label_file: str = '',
        descriptions: str = '',
        classes: str = '',
        image_dir: str = '',
        drop_missing: bool = False,
) -> MultiLabelRecords:
    """Read `<split>-annotations-human-imagelabels.csv`, also with `oidv6-` before or `-boxable` behind its name.

    Args:
        data_dir: Folder with that file, `class-descriptions.csv` and if need be `classes-trainable.txt`, or with
            `annotations`, `labels` or `metadata` that has them.
        split: 'train', 'validation' or 'test'.
        labels: The columns, by display name or by id ('/m/01yrx'); None for all classes that are read.
        ignore_unknown_labels: Whether classes that are not among `labels` are passed over.
        label_file: Another file of labels, relative to the folder, with '{split}' for the split's name.
        descriptions: Another file of ids and display names. Without any the ids are the names.
        classes: A file with the ids of the classes to read, one a line; '' for `classes-trainable.txt` if it is there,
            'all' for no choice. Rows of other classes are passed over, and pictures that have only such rows.
        image_dir: Folder of `<id>.jpg`, with '{split}' for the split's name; '' for '{split}' or 'images/{split}'.
        drop_missing: Whether pictures without a file are left out, with a warning, and are no error.

    Returns:
        Pictures in the order of the file. Rows that repeat others count once, and a label that people disagree on is
        unknown; a warning is logged of both.

    Raises:
        FileNotFoundError: If files are missing; the first few pictures are named.
        ValueError: If a file is wrong, with the line, several would do, or a class is not among the labels.
    """
    table_file = _choose(data_dir, label_file.replace('{split}', split), 'label_file', [
        path for path, match in _find(data_dir, _LABEL_FILE) if match[1] == split])
    if table_file is None:
        raise FileNotFoundError(f'{data_dir} has no {split}-annotations-human-imagelabels.csv.')
    is_boxable = '-boxable' in table_file.name
    described = _choose(data_dir, descriptions, 'descriptions', [
        path for path, _ in _find(data_dir, _DESCRIPTIONS) if ('-boxable' in path.name) == is_boxable])
    chosen = None if classes == ALL_CLASSES else _choose(
        data_dir, classes, 'classes', [path for path, _ in _find(data_dir, _TRAINABLE)])
    name_of = _read_descriptions(described) if described else {}
    ids = _read_classes(chosen, name_of) if chosen else None
    if labels is None and name_of:
        labels = [name for class_id, name in name_of.items() if ids is None or class_id in ids]

    pictures, entries = Pictures(table_file), Entries()
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    num_others = _read_rows(table_file, pictures, entries, columns, name_of, ids)
    label_names, place = columns.finish(table_file)
    if not len(entries):
        raise ValueError(f'{table_file} has no rows of the {len(label_names)} labels.')
    settled = entries.settle()
    if num_others:
        _logger.info('%s: %d rows are of classes that are not read.', table_file, num_others)
    if settled.num_repeated:
        _logger.warning(
            '%s: %d rows repeat the picture and class of a row before them; %d labels that they contradict are taken '
            'as unknown.', table_file, settled.num_repeated, settled.num_disputed)
    targets = SparseTargets.from_entries(
        settled.rows, place[settled.columns], settled.values, shape=(len(pictures.names), len(label_names)), fill=-1)
    folder = find_folder(data_dir, image_dir, split, IMAGE_DIRS)
    names = [f'{name}.jpg' for name in pictures.names]
    return files_of(folder, names, targets, label_names, table_file, drop_missing=drop_missing)


def _read_rows(
        path: Path, pictures: Pictures, entries: Entries, columns: LabelColumns, name_of: Mapping[str, str],
        ids: frozenset[str] | None,
) -> int:
    """Gather pictures and entries; the number of rows of classes that are not read."""
    table = open_table(path, delimiter=',', header=True)
    image, label, confidence = (_column(table, name) for name in ('ImageID', 'LabelName', 'Confidence'))
    row_of, known, num_others = pictures.row_of, columns.known, 0
    for line, row in table.rows():
        class_id = row[label]
        column = known.get(class_id)
        if column is None:
            if ids is not None and class_id not in ids:
                column = known[class_id] = -1
            else:
                column = known[class_id] = columns.find(name_of.get(class_id, class_id), f'line {line}')
        value = CONFIDENCES.get(row[confidence])
        if value is None:
            raise ValueError(
                f'{path}, line {line}: a confidence must be 0 or 1, got {shown(row[confidence])}; labels made by '
                f'machines have others, take the file of those that people verified.')
        if column < 0:
            num_others += 1
            continue
        picture = row_of.get(row[image])
        if picture is None:
            picture = pictures.find(row[image], line)
        entries.add(picture, column, value, line)
    return num_others


def _read_descriptions(path: Path) -> dict[str, str]:
    """Display name of each class id; of classes that share one, with the id behind it."""
    # Some have a header, which no class id looks like.
    rows = [(line, row) for line, row in open_table(path, delimiter=',', header=False).rows() if row[0] != 'LabelName']
    wrong = next(((line, row) for line, row in rows if len(row) != 2 or not all(map(str.strip, row))), None)
    if wrong:
        raise ValueError(f'{path}, line {wrong[0]}: a class id and a display name are expected, got {shown(wrong[1])}.')
    counts = Counter(row[1] for _, row in rows)
    names = {row[0]: row[1] if counts[row[1]] == 1 else f'{row[1]} ({row[0]})' for _, row in rows}
    if len(names) < len(rows):
        twice = next(class_id for class_id, count in Counter(row[0] for _, row in rows).items() if count > 1)
        raise ValueError(f'{path} must have each class once, got {shown(twice)} twice.')
    return names


def _read_classes(path: Path, name_of: Mapping[str, str]) -> frozenset[str]:
    """The ids in a list of classes."""
    lines = read_lines(path)
    unknown = [(line, class_id) for line, class_id in enumerate(lines, start=1) if class_id not in name_of]
    if name_of and unknown:
        listed = few((f'{shown(class_id)} (line {line})' for line, class_id in unknown), len(unknown))
        raise ValueError(f'{path} has ids that the descriptions of classes lack: {listed}.')
    return frozenset(lines)


def _column(table: Table, name: str) -> int:
    if name not in (table.header or ()):
        raise ValueError(f'{table.path}, line 1: a column {name} is expected, got {", ".join(table.header or ())}.')
    return (table.header or ()).index(name)


def _find(data_dir: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Files by name, in the folder and those below it that tables may lie in."""
    return [
        (data_dir / folder / name, match) for folder in TABLE_DIRS if (data_dir / folder).is_dir()
        for name in sorted(os.listdir(data_dir / folder)) if (match := pattern.fullmatch(name))]


def _choose(data_dir: Path, named: str, option: str, found: Sequence[Path]) -> Path | None:
    """The file that an option names, or else the only one found."""
    if named:
        if not (data_dir / named).is_file():
            raise FileNotFoundError(f'no file {str(data_dir / named)!r}, which option {option} names.')
        return data_dir / named
    if len(found) > 1:
        raise ValueError(
            f'{data_dir} has {" and ".join(str(path.relative_to(data_dir)) for path in found)}; give {option}.')
    return found[0] if found else None
