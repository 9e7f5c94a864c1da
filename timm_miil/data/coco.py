"""Reader of COCO-style instance annotations: JSON with images, annotations and categories.

The format is that of Microsoft COCO, arXiv:1405.0312. A picture's labels are the categories of its annotations, those
of crowds too, as in the code of the authors of ASL (arXiv:2009.14119). Labels follow the order of the categories in
the file. Pictures without annotations are kept, with no label present; the authors leave them out, as
`drop_unlabelled` does.
"""
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_miil._checks import cut, shown
from timm_miil.data._files import clean_name, few, find_folder
from timm_miil.data._labels import LabelColumns, with_unknown
from timm_miil.data.records import MultiLabelRecords, files_of
from timm_miil.data.targets import SparseTargets

__all__ = ['list_splits', 'read_coco', 'read_split']

PREFIX = 'instances_'


def list_splits(data_dir: Path) -> tuple[str, ...]:
    """The splits that have a file `annotations/instances_<split>.json`."""
    return tuple(sorted(
        path.stem.removeprefix(PREFIX) for path in (data_dir / 'annotations').glob(f'{PREFIX}*.json')))


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        image_dir: str = '',
        drop_unlabelled: bool = False,
) -> MultiLabelRecords:
    """Read `annotations/instances_<split>.json`.

    Args:
        data_dir: The data set's folder.
        split: Such as 'train2017'.
        labels: The columns; None for the categories of the file.
        ignore_unknown_labels: Whether categories that are not among `labels` are passed over.
        image_dir: Folder of the pictures, with '{split}' for the split's name; '' for '{split}' or 'images/{split}'.
        drop_unlabelled: Whether pictures without annotations are left out.

    Returns:
        Pictures in the order of the file.

    Raises:
        FileNotFoundError: As of `read_coco`.
        ValueError: As of `read_coco`.
    """
    return read_coco(
        data_dir / 'annotations' / f'{PREFIX}{split}.json',
        find_folder(data_dir, image_dir, split, ('{split}', 'images/{split}')),
        labels=labels, ignore_unknown_labels=ignore_unknown_labels, drop_unlabelled=drop_unlabelled)


def read_coco(
        annotations_file: str | os.PathLike[str],
        image_dir: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        drop_unlabelled: bool = False,
) -> MultiLabelRecords:
    """Read pictures and their labels, checking everything before the first picture is opened.

    Args:
        annotations_file: JSON file with `images` (`id`, `file_name`), `annotations` (`image_id`, `category_id`) and
            `categories` (`id`, `name`); all else is ignored.
        image_dir: Folder that the file names are relative to.
        labels: The columns, matched to the categories by name; one that is no category is unknown in all pictures.
            None for the categories in the order of the file.
        ignore_unknown_labels: Whether categories that are not among `labels` are passed over.
        drop_unlabelled: Whether pictures without annotations are left out.

    Returns:
        Pictures in the order of the file.

    Raises:
        FileNotFoundError: If the JSON file or pictures are missing; the first few are named.
        ValueError: If the file is no such JSON, ids or names occur twice, an annotation refers to an unknown picture
            or category, a category is not among `labels`, or a file name leaves the folder.
    """
    annotations_file, image_dir = Path(annotations_file), Path(image_dir)
    images, annotations, categories = _load_tables(annotations_file)

    def refuse(what: str, found: Sequence[object]) -> None:
        if found:
            raise ValueError(f'{annotations_file}: {what}: {few(map(shown, found), len(found))}.')

    image_ids, names = [row['id'] for row in images], [clean_name(row['file_name']) for row in images]
    category_ids = [row['id'] for row in categories]
    category_names = [row['name'] for row in categories]
    refuse('file names that leave the picture folder', [
        row['file_name'] for row, name in zip(images, names) if not name])
    refuse('image ids that occur twice', _repeated(image_ids))
    refuse('file names that occur twice', _repeated(names))
    refuse('category ids that occur twice', _repeated(category_ids))
    refuse('category names that occur twice', _repeated(category_names))

    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    refuse('annotations of unknown images', _unknown((row['image_id'] for row in annotations), row_of))
    refuse('annotations of unknown categories', _unknown(
        (row['category_id'] for row in annotations), set(category_ids)))

    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    column_of = {row['id']: columns.find(row['name'], f'category {row["id"]}') for row in categories}
    label_names, _ = columns.finish(annotations_file, sort=False)
    entries = [(row_of[row['image_id']], column_of[row['category_id']]) for row in annotations]
    entries = [entry for entry in entries if entry[1] >= 0]
    targets = SparseTargets.from_entries(
        [row for row, _ in entries], [column for _, column in entries], 1, shape=(len(names), len(label_names)))
    targets = with_unknown(targets, set(range(len(label_names))) - set(column_of.values()))
    records = files_of(image_dir, names, targets, label_names, annotations_file)
    return records.select(sorted({row_of[row['image_id']] for row in annotations})) if drop_unlabelled else records


_COLUMNS: dict[str, dict[str, type]] = {
    'images': {'id': int, 'file_name': str},
    'annotations': {'image_id': int, 'category_id': int},
    'categories': {'id': int, 'name': str},
}
_KEPT = frozenset(_COLUMNS).union(*_COLUMNS.values())


def _load_tables(path: Path) -> list[list[dict[str, Any]]]:
    """The three tables, every row with the columns that are read, of the right type."""
    try:
        # The outlines of COCO's objects are most of its 450 MB: no more than one at a time is held.
        content = json.loads(
            path.read_text(encoding='utf-8'), object_hook=lambda row: {key: row[key] for key in _KEPT & row.keys()})
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a JSON file: {cut(str(error))}.') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold a JSON object with {", ".join(_COLUMNS)}, got {type(content).__name__}.')
    for table, columns in _COLUMNS.items():
        rows = content.get(table)
        if not isinstance(rows, list):
            there = ', '.join(name for name in _COLUMNS if name in content) or 'none'
            raise ValueError(f'{path} has no list {table!r}; of {", ".join(_COLUMNS)} it has {there}.')
        for number, row in enumerate(rows):
            for column, kind in columns.items():
                if not isinstance(row, dict) or type(row.get(column)) is not kind:
                    raise ValueError(f'{path}: {table}[{number}] must have {column!r} of type {kind.__name__}.')
    return [content[table] for table in _COLUMNS]


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _unknown(values: Iterable[Any], known: Collection[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value not in known))
