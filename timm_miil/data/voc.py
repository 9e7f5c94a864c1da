"""Reader of the PASCAL VOC layout: lists in ImageSets/Main, boxes in Annotations, pictures in JPEGImages.

A picture's labels are the names of its objects. Objects marked difficult do not count as seen or unseen in VOC's
classification task (http://host.robots.ox.ac.uk/pascal/VOC), so a label that only such objects have is unknown here.
"""
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from xml.parsers import expat

from timm_miil import catalog
from timm_miil._checks import shown
from timm_miil.data._entries import Entries, Pictures
from timm_miil.data._files import find_missing, read_lines, refuse_missing
from timm_miil.data._labels import LabelColumns
from timm_miil.data.images import IMAGE_SUFFIXES
from timm_miil.data.records import MultiLabelRecords, files_of
from timm_miil.data.targets import SparseTargets

__all__ = ['list_splits', 'read_split']

CLASSES = 'voc_20'
LISTS = Path('ImageSets', 'Main')
OF_DIFFICULT = MappingProxyType({'unknown': -1, 'present': 1, 'absent': 0})


def list_splits(data_dir: Path, *, year: str = '') -> tuple[str, ...]:
    """The lists in ImageSets/Main, without those of single classes.

    Args:
        data_dir: As of `read_split`.
        year: As of `read_split`.

    Raises:
        ValueError: If there are several years and none is chosen.
    """
    root = _find_root(data_dir, year)
    names = {path.stem for path in (root / LISTS).glob('*.txt')} if root else set()
    # aeroplane_train.txt says of each picture of train.txt whether it shows one; the annotations say it too.
    return tuple(sorted(name for name in names if '_' not in name or name.rpartition('_')[2] not in names))


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        year: str = '',
        difficult: Literal['unknown', 'present', 'absent'] = 'unknown',
) -> MultiLabelRecords:
    """Read `ImageSets/Main/<split>.txt` and the annotation of each of its pictures.

    Args:
        data_dir: Folder that has `ImageSets`, or has it in `VOC<year>` or `VOCdevkit/VOC<year>`.
        split: Such as 'trainval'.
        labels: The columns; None for the 20 classes of VOC.
        ignore_unknown_labels: Whether objects that are not among the labels are passed over.
        year: Such as '2007'; needed if the folder has several.
        difficult: What a label is that only objects marked difficult have.

    Returns:
        Pictures in the order of the list.

    Raises:
        FileNotFoundError: If the list, annotations or pictures are missing; the first few are named.
        ValueError: If a file is wrong, or an object is not among the labels.
    """
    root = _find_root(data_dir, year) or data_dir
    list_file = root / LISTS / f'{split}.txt'
    pictures = Pictures(list_file)
    for number, line in enumerate(read_lines(list_file), start=1):
        if line:
            if len(line.split()) > 1:
                raise ValueError(f'{list_file}, line {number}: one picture a line is expected, got {shown(line)}.')
            pictures.add(line, number)
    if not pictures.names:
        raise ValueError(f'{list_file} has no pictures.')
    refuse_missing(root / 'Annotations', [f'{name}.xml' for name in pictures.names], list_file, 'annotations')

    columns = LabelColumns(labels if labels is not None else catalog.label_set(CLASSES).labels,
                           ignore_unknown=ignore_unknown_labels)
    entries = Entries()
    for row, name in enumerate(pictures.names):
        of_name: dict[str, int] = {}
        for label, is_difficult in _read_objects(root / 'Annotations' / f'{name}.xml'):
            if not is_difficult or label not in of_name:
                of_name[label] = OF_DIFFICULT[difficult] if is_difficult else 1
        for label, value in of_name.items():
            column = columns.find(label, f'{name}.xml')
            if column >= 0:
                entries.add(row, column, value, 0)
    label_names, _ = columns.finish(root / 'Annotations')
    targets = SparseTargets.from_entries(
        entries.rows, entries.columns, entries.values, shape=(len(pictures.names), len(label_names)))
    return files_of(
        root / 'JPEGImages', _with_suffixes(root / 'JPEGImages', pictures.names), targets, label_names, list_file)


def _find_root(data_dir: Path, year: str) -> Path | None:
    """The folder that has the lists, None if there is none."""
    parents = (data_dir, data_dir / 'VOCdevkit')
    roots = [data_dir, *(folder for parent in parents for folder in sorted(parent.glob(f'VOC{year or "*"}')))]
    found = [root for root in roots if (root / LISTS).is_dir()]
    if len(found) > 1:
        raise ValueError(f'{data_dir} has {", ".join(root.name for root in found)}; give year to choose one.')
    return found[0] if found else None


def _with_suffixes(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of pictures: VOC's are .jpg, others' may be of any kind."""
    files = [f'{name}.jpg' for name in names]
    missing = find_missing(folder, files)
    if missing and folder.is_dir():
        by_stem = {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
        for index in missing:
            files[index] = by_stem.get(names[index], files[index])
    return files


def _read_objects(path: Path) -> list[tuple[str, bool]]:
    """Name of each object, and whether it is marked difficult."""
    reader = _Annotation()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = reader.text, reader.doctype
    try:
        with open(path, 'rb') as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        raise ValueError(f'{path}, line {error.lineno}: {expat.ErrorString(error.code)}.') from None
    except (ValueError, LookupError) as error:  # of the handlers; of an encoding that is not known
        raise ValueError(f'{path}, line {parser.CurrentLineNumber}: {error}.') from None
    return reader.objects


class _Annotation:
    """What one annotation file says, gathered while it is parsed. It declares nothing: entities can be bombs."""

    def __init__(self) -> None:
        self.objects: list[tuple[str, bool]] = []
        self._path: list[str] = []
        self._fields: dict[str, str] = {}

    def doctype(self, *_: object) -> None:
        raise ValueError('a document type is not expected; remove the line')

    def start(self, name: str, _: dict[str, str]) -> None:
        self._path.append(name)
        if self._path[0] != 'annotation':
            raise ValueError(f"the outermost element must be 'annotation', got {shown(name)}")
        if self._path[1:] == ['object']:
            self._fields = {}

    def text(self, data: str) -> None:
        # Of the object itself: its parts have names too.
        if self._path[1:] in (['object', 'name'], ['object', 'difficult']):
            self._fields[self._path[2]] = self._fields.get(self._path[2], '') + data

    def end(self, _: str) -> None:
        if self._path[1:] == ['object']:
            name, difficult = (self._fields.get(key, '').strip() for key in ('name', 'difficult'))
            if not name:
                raise ValueError('an object has no name')
            if difficult not in ('', '0', '1'):
                raise ValueError(f'difficult must be 0 or 1, got {shown(difficult)}')
            self.objects.append((name, difficult == '1'))
        self._path.pop()
