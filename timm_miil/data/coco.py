"""Reader of COCO-style instance annotations: JSON with images, annotations and categories.

The format is that of Microsoft COCO, arXiv:1405.0312. A picture's labels are the categories of its annotations;
labels follow the order of the categories in the file. Pictures without annotations are kept, with no label present
(the authors of ASL leave them out).
"""
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from timm_miil.data._packed import PackedPaths
from timm_miil.data.records import MultiLabelRecords
from timm_miil.data.targets import SparseTargets

__all__ = ['read_coco']

NAMED_AT_MOST = 5


def read_coco(annotations_file: str | Path, image_dir: str | Path) -> MultiLabelRecords:
    """Read pictures and their labels, checking everything before the first picture is opened.

    Args:
        annotations_file: JSON file with `images` (`id`, `file_name`), `annotations` (`image_id`, `category_id`) and
            `categories` (`id`, `name`); all else is ignored.
        image_dir: Folder that the file names are relative to.

    Returns:
        Pictures in the order of the file.

    Raises:
        FileNotFoundError: If the JSON file or pictures are missing; the first few are named.
        ValueError: If the file is no such JSON, ids or names occur twice, an annotation refers to an unknown picture
            or category, or a file name leaves the folder.
    """
    annotations_file, image_dir = Path(annotations_file), Path(image_dir)
    images, annotations, categories = _load_tables(annotations_file)

    def refuse(what: str, found: Sequence[object]) -> None:
        if found:
            raise ValueError(f'{annotations_file}: {what}: {_few(found)}.')

    image_ids, names = [row['id'] for row in images], [row['file_name'] for row in images]
    category_ids = [row['id'] for row in categories]
    label_names = [row['name'] for row in categories]
    refuse('image ids that occur twice', _repeated(image_ids))
    refuse('file names that occur twice', _repeated(names))
    refuse('category ids that occur twice', _repeated(category_ids))
    refuse('category names that occur twice', _repeated(label_names))
    refuse('file names that leave the picture folder', [name for name in names if not _stays_inside(name)])

    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    column_of = {category_id: column for column, category_id in enumerate(category_ids)}
    refuse('annotations of unknown images', _unknown((row['image_id'] for row in annotations), row_of))
    refuse('annotations of unknown categories', _unknown((row['category_id'] for row in annotations), column_of))

    missing = [name for name in names if not (image_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'{len(missing)} of {len(names)} pictures of {annotations_file} are missing in {image_dir}: '
            f'{_few(missing)}.')

    labels = SparseTargets.from_entries(
        [row_of[row['image_id']] for row in annotations], [column_of[row['category_id']] for row in annotations], 1,
        shape=(len(names), len(categories)))
    return MultiLabelRecords(PackedPaths(names, image_dir), labels, label_names)


_COLUMNS: dict[str, dict[str, type]] = {
    'images': {'id': int, 'file_name': str},
    'annotations': {'image_id': int, 'category_id': int},
    'categories': {'id': int, 'name': str},
}


def _load_tables(path: Path) -> list[list[dict[str, Any]]]:
    """The three tables, every row with the columns that are read, of the right type."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not a JSON file: {error}.') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold a JSON object with {", ".join(_COLUMNS)}, got {type(content).__name__}.')
    for table, columns in _COLUMNS.items():
        rows = content.get(table)
        if not isinstance(rows, list):
            raise ValueError(f'{path} has no list {table!r}; it has {", ".join(sorted(content)) or "nothing"}.')
        for number, row in enumerate(rows):
            for column, kind in columns.items():
                if not isinstance(row, dict) or type(row.get(column)) is not kind:
                    raise ValueError(f'{path}: {table}[{number}] must have {column!r} of type {kind.__name__}.')
    return [content[table] for table in _COLUMNS]


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name.replace('\\', '/'))
    return bool(path.parts) and not path.is_absolute() and '..' not in path.parts and ':' not in path.parts[0]


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _unknown(values: Iterable[Any], known: dict[Any, int]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value not in known))


def _few(values: Sequence[object]) -> str:
    more = f' and {len(values) - NAMED_AT_MOST} more' if len(values) > NAMED_AT_MOST else ''
    return ', '.join(map(repr, values[:NAMED_AT_MOST])) + more
