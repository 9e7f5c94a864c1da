"""Reader of NUS-WIDE: pictures of Flickr with 81 concepts, in the layout of its authors or in one CSV file.

Chua et al., "NUS-WIDE: a real-world web image database from National University of Singapore", CIVR 2009. Many of its
pictures are no longer to be had: `drop_missing` leaves them out. The authors of ASL (arXiv:2009.14119) publish the
pictures that they used as `nus_wid_data.csv` with columns of file, labels as ['clouds', 'sky'] and split.

With `tags`, what the pictures' owners wrote: of the 1000 commonest tags those that are no concept, 925, are labels
before the 81 concepts. Zero-shot papers learn the tags, and test on the concepts and on all 1006; see arXiv:2105.05926.
"""
from collections.abc import Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from timm_miil._checks import shown
from timm_miil.data import csv_labels
from timm_miil.data._entries import Pictures
from timm_miil.data._files import find_folder, read_lines
from timm_miil.data._labels import LabelColumns, with_unknown
from timm_miil.data.records import MultiLabelRecords, files_of
from timm_miil.data.targets import SparseTargets
from timm_miil.data.zero_shot import read_labels

__all__ = ['list_splits', 'read_split']

Lists = Literal['auto', 'authors', 'csv']

CSV_FILE = 'nus_wid_data.csv'
PART_OF_SPLIT = MappingProxyType({'train': 'Train', 'test': 'Test'})
# The archives unpack into folders of folders; all usual results are known.
LIST_DIRS = ('.', 'ImageList', 'Imagelist', 'ImageList/ImageList', 'ImageList/Imagelist')
LABEL_DIRS = ('.', 'Groundtruth/TrainTestLabels', 'TrainTestLabels', 'Groundtruth')
CONCEPT_FILES = ('Concepts81.txt', 'ConceptsList/Concepts81.txt', 'Groundtruth/Concepts81.txt')
TAGS_FILE = 'TagList1k.txt'
TAG_DIRS = ('.', 'NUS_WID_Tags', 'Tags', 'tags')
IMAGE_DIRS = ('Flickr', 'flickr', 'images', 'Images')


def list_splits(data_dir: Path, *, lists: Lists = 'auto') -> tuple[str, ...]:
    """'train' and 'test' of the authors' lists, or the words in the CSV file.

    Args:
        data_dir: As of `read_split`.
        lists: As of `read_split`.

    Raises:
        ValueError: If there are lists of both kinds and none is chosen, or the CSV file is wrong.
    """
    of_authors = tuple(split for split in PART_OF_SPLIT if _find(data_dir, LIST_DIRS, _list_name(split)))
    has_csv = (data_dir / CSV_FILE).is_file()
    if lists == 'auto' and of_authors and has_csv:
        raise ValueError(f"{data_dir} has both {CSV_FILE} and the authors' lists; give lists='csv' or lists='authors'.")
    if has_csv and lists != 'authors':
        return csv_labels.list_splits(data_dir, file=CSV_FILE, header=True)
    return () if lists == 'csv' else of_authors


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        lists: Lists = 'auto',
        image_dir: str = '',
        drop_missing: bool = False,
        drop_unlabelled: bool = False,
        tags: bool = False,
) -> MultiLabelRecords:
    """Read one of the two splits of the authors, or one of the CSV file.

    Args:
        data_dir: Folder with `ImageList/TrainImagelist.txt`, `Groundtruth/TrainTestLabels/Labels_<concept>_Train.txt`
            and `Concepts81.txt`; or with `nus_wid_data.csv`.
        split: 'train' or 'test' of the authors; 'train' or 'val' of the CSV file.
        labels: The columns; None for those of `Concepts81.txt`. The CSV file needs no such file.
        ignore_unknown_labels: Whether concepts that are not among `labels` are passed over.
        lists: 'authors' or 'csv'; 'auto' for what is there.
        image_dir: Folder of the pictures; '' for 'Flickr' or 'images', or for the CSV file the data set's.
        drop_missing: Whether pictures without a file are left out, with a warning, and are no error.
        drop_unlabelled: Whether pictures that show none of the labels are left out.
        tags: Whether tags are labels too, from `TagList1k.txt` and `Train_Tags1k.dat` of the archive NUS_WID_Tags. They
            are of the authors' lists alone.

    Returns:
        Pictures in the order of the list.

    Raises:
        FileNotFoundError: If files are missing; the first few pictures are named.
        ValueError: If a file is wrong, a concept is not among `labels`, or no picture is left.
    """
    concepts_file = next((data_dir / name for name in CONCEPT_FILES if (data_dir / name).is_file()), None)
    if (data_dir / CSV_FILE).is_file() and lists != 'authors':
        if tags:
            raise ValueError(f"tags must be false for {CSV_FILE}, which has none; give lists='authors'.")
        of_file = read_labels(concepts_file) if concepts_file else None
        records = csv_labels.read_split(
            data_dir, split, labels=labels or of_file, ignore_unknown_labels=ignore_unknown_labels, file=CSV_FILE,
            image_dir=image_dir, form='list', header=True, drop_missing=drop_missing)
    else:
        if not concepts_file:
            raise FileNotFoundError(f'{data_dir} has no {" or ".join(CONCEPT_FILES)}, with the names of the concepts.')
        records = _read_lists(
            data_dir, split, concepts_file, labels, ignore_unknown_labels, image_dir, drop_missing, tags)
    if drop_unlabelled:
        rows, _, values = records.labels.entries()
        records = records.select(np.unique(rows[values == 1]))
        if not len(records):
            raise ValueError(f'{data_dir}: no picture of split {split} shows a label; leave out drop_unlabelled.')
    return records


def _read_lists(
        data_dir: Path, split: str, concepts_file: Path, labels: Sequence[str] | None, ignore_unknown: bool,
        image_dir: str, drop_missing: bool, tags: bool,
) -> MultiLabelRecords:
    list_file = _find(data_dir, LIST_DIRS, _list_name(split))
    if not list_file:
        raise FileNotFoundError(f'{data_dir} has no {_list_name(split)} in {" or ".join(LIST_DIRS)}.')
    pictures = Pictures(list_file)
    for number, line in enumerate(read_lines(list_file), start=1):
        pictures.add(line.replace('\\', '/'), number)  # the lists were written under Windows

    columns = LabelColumns(labels, ignore_unknown=ignore_unknown)
    concepts, part, count = read_labels(concepts_file), PART_OF_SPLIT[split], len(pictures.names)
    of_tags = _read_tags(data_dir, part, set(concepts), list_file, count) if tags else {}
    column_of = [columns.find(label, f'line {number}') for number, label in enumerate([*of_tags, *concepts], start=1)]
    label_names, _ = columns.finish(concepts_file, sort=False)
    present = [rows for rows, column in zip(of_tags.values(), column_of) if column >= 0] + [
        _read_present(data_dir, f'Labels_{concept}_{part}.txt', list_file, count)
        for concept, column in zip(concepts, column_of[len(of_tags):]) if column >= 0]
    kept = [column for column in column_of if column >= 0]
    targets = SparseTargets.from_entries(
        np.concatenate([np.empty(0, int), *present]), np.repeat(kept, [len(rows) for rows in present]), 1,
        shape=(len(pictures.names), len(label_names)))
    targets = with_unknown(targets, set(range(len(label_names))) - set(kept))
    folder = find_folder(data_dir, image_dir, split, IMAGE_DIRS)
    return files_of(folder, pictures.names, targets, label_names, list_file, drop_missing=drop_missing)


def _read_present(data_dir: Path, name: str, list_file: Path, count: int) -> npt.NDArray[np.intp]:
    """The rows of the pictures that show a concept."""
    path = _find(data_dir, LABEL_DIRS, name)
    if not path:
        raise FileNotFoundError(f'{data_dir} has no {name} in {" or ".join(LABEL_DIRS)}.')
    words = np.array(path.read_bytes().split())
    if len(words) != count:
        raise ValueError(f'{path} must have one line a picture of {list_file}, {count} in all, got {len(words)}.')
    wrong = np.flatnonzero((words != b'0') & (words != b'1'))
    if len(wrong):
        raise ValueError(f'{path}, line {wrong[0] + 1}: a label must be 0 or 1, got {shown(bytes(words[wrong[0]]))}.')
    return np.flatnonzero(words == b'1')


def _read_tags(
        data_dir: Path, part: str, concepts: Set[str], list_file: Path, count: int,
) -> dict[str, npt.NDArray[np.intp]]:
    """By tag that is no concept, the rows of the pictures that have it."""
    names_file, path = (_find(data_dir, TAG_DIRS, name) for name in (TAGS_FILE, f'{part}_Tags1k.dat'))
    if not names_file or not path:
        raise FileNotFoundError(f'{data_dir} has no {TAGS_FILE} or {part}_Tags1k.dat in {" or ".join(TAG_DIRS)}.')
    names = read_labels(names_file)
    rows: list[int] = []
    columns: list[int] = []
    with open(path, 'rb') as file:  # a gigabyte of zeros
        number = 0
        for number, line in enumerate(file, start=1):
            words = np.array(line.split())
            if len(words) != len(names) or number > count:
                raise ValueError(
                    f'{path} must have {count} lines, one a picture of {list_file}, of {len(names)} numbers, one a tag '
                    f'of {names_file}, got {len(words)} in line {number}.')
            shown_tags = np.flatnonzero(words == b'1')
            if len(shown_tags) + np.count_nonzero(words == b'0') != len(words):
                raise ValueError(f'{path}, line {number}: a tag must be 0 or 1 in each picture.')
            rows += [number - 1] * len(shown_tags)
            columns += shown_tags.tolist()
    if number != count:
        raise ValueError(f'{path} must have one line a picture of {list_file}, {count} in all, got {number}.')
    order, of_row = np.array(columns, np.intp), np.array(rows, np.intp)
    by_column = np.split(
        of_row[np.argsort(order, kind='stable')], np.cumsum(np.bincount(order, minlength=len(names)))[:-1])
    return {name: rows_of for name, rows_of in zip(names, by_column) if name not in concepts}


def _list_name(split: str) -> str:
    return f'{PART_OF_SPLIT.get(split, split)}Imagelist.txt'


def _find(data_dir: Path, folders: Sequence[str], name: str) -> Path | None:
    return next((path for folder in folders if (path := data_dir / folder / name).is_file()), None)
