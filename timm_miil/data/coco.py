"""Reader of COCO-style instance annotations: JSON with images, annotations and categories.

The format is that of Microsoft COCO, arXiv:1405.0312. A picture's labels are the categories of its annotations, those
of crowds too, as in the code of the authors of ASL (arXiv:2009.14119). Labels follow the order of the categories in
the file. Pictures without annotations are kept, with no label present; the authors leave them out, as
`drop_unlabelled` does.
"""
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from timm_miil._checks import shown
from timm_miil.data._files import clean_name, few, find_folder
from timm_miil.data._json import read_columns
from timm_miil.data._labels import LabelColumns, with_unknown
from timm_miil.data.records import MultiLabelRecords, files_of
from timm_miil.data.targets import SparseTargets

__all__ = ['list_splits', 'read_coco', 'read_split']

PREFIX = 'instances_'
TABLES: Mapping[str, Mapping[str, type]] = MappingProxyType({
    'images': {'id': int, 'file_name': str},
    'annotations': {'image_id': int, 'category_id': int},
    'categories': {'id': int, 'name': str},
})
"""What is read of a file, in the order of the columns."""


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
    # The outlines of COCO's objects are most of its 450 MB, and never all in memory.
    tables = read_columns(annotations_file, TABLES)
    image_ids, file_names = tables['images'].values()
    category_ids, category_names = tables['categories'].values()

    def refuse(what: str, found: Sequence[object]) -> None:
        if found:
            raise ValueError(f'{annotations_file}: {what}: {few(map(shown, found), len(found))}.')

    names = list(map(clean_name, file_names))
    refuse('file names that leave the picture folder', [
        file_name for file_name, name in zip(file_names, names) if not name])
    refuse('image ids that occur twice', _repeated(image_ids))
    refuse('file names that occur twice', _repeated(names))
    refuse('category ids that occur twice', _repeated(category_ids))
    refuse('category names that occur twice', _repeated(category_names))

    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    annotated = tables['annotations']
    refuse('annotations of unknown images', _unknown(annotated['image_id'], row_of))
    refuse('annotations of unknown categories', _unknown(annotated['category_id'], set(category_ids)))
    column_of = {
        number: columns.find(name, f'category {number}') for number, name in zip(category_ids, category_names)}
    label_names, _ = columns.finish(annotations_file, sort=False)

    rows = np.fromiter(map(row_of.__getitem__, annotated['image_id']), np.int64)
    entries = np.fromiter(map(column_of.__getitem__, annotated['category_id']), np.int64)
    targets = SparseTargets.from_entries(
        rows[entries >= 0], entries[entries >= 0], 1, shape=(len(names), len(label_names)))
    targets = with_unknown(targets, set(range(len(label_names))) - set(column_of.values()))
    records = files_of(image_dir, names, targets, label_names, annotations_file)
    return records.select(np.unique(rows)) if drop_unlabelled else records


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _unknown(values: Iterable[Any], known: Collection[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value not in known))
