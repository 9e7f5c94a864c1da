"""Reader of NUS-WIDE: pictures of Flickr with 81 concepts, in the layout of its authors or in one CSV file.

Chua et al., "NUS-WIDE: a real-world web image database from National University of Singapore", CIVR 2009. Many of its
pictures are no longer to be had: `drop_missing` leaves them out. The authors of ASL (arXiv:2009.14119) publish the
pictures that they used as `nus_wid_data.csv` with columns of file, labels as ['clouds', 'sky'] and split.
"""
from collections.abc import Sequence
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
        drop_unlabelled: Whether pictures that show none of the concepts are left out.

    Returns:
        Pictures in the order of the list.

    Raises:
        FileNotFoundError: If files are missing; the first few pictures are named.
        ValueError: If a file is wrong, a concept is not among `labels`, or no picture is left.
    """
    concepts_file = next((data_dir / name for name in CONCEPT_FILES if (data_dir / name).is_file()), None)
    if (data_dir / CSV_FILE).is_file() and lists != 'authors':
        of_file = read_labels(concepts_file) if concepts_file else None
        records = csv_labels.read_split(
            data_dir, split, labels=labels or of_file, ignore_unknown_labels=ignore_unknown_labels, file=CSV_FILE,
            image_dir=image_dir, form='list', header=True, drop_missing=drop_missing)
    else:
        if not concepts_file:
            raise FileNotFoundError(f'{data_dir} has no {" or ".join(CONCEPT_FILES)}, with the names of the concepts.')
        records = _read_lists(data_dir, split, concepts_file, labels, ignore_unknown_labels, image_dir, drop_missing)
    if drop_unlabelled:
        rows, _, values = records.labels.entries()
        records = records.select(np.unique(rows[values == 1]))
        if not len(records):
            raise ValueError(f'{data_dir}: no picture of split {split} shows a label; leave out drop_unlabelled.')
    return records


def _read_lists(
        data_dir: Path, split: str, concepts_file: Path, labels: Sequence[str] | None, ignore_unknown: bool,
        image_dir: str, drop_missing: bool,
) -> MultiLabelRecords:
    list_file = _find(data_dir, LIST_DIRS, _list_name(split))
    if not list_file:
        raise FileNotFoundError(f'{data_dir} has no {_list_name(split)} in {" or ".join(LIST_DIRS)}.')
    pictures = Pictures(list_file)
    for number, line in enumerate(read_lines(list_file), start=1):
        pictures.add(line.replace('\\', '/'), number)  # the lists were written under Windows

    columns = LabelColumns(labels, ignore_unknown=ignore_unknown)
    concepts = read_labels(concepts_file)
    column_of = [columns.find(concept, f'line {number}') for number, concept in enumerate(concepts, start=1)]
    label_names, _ = columns.finish(concepts_file, sort=False)
    present = [
        _read_present(data_dir, f'Labels_{concept}_{PART_OF_SPLIT[split]}.txt', list_file, len(pictures.names))
        for concept, column in zip(concepts, column_of) if column >= 0]
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


def _list_name(split: str) -> str:
    return f'{PART_OF_SPLIT.get(split, split)}Imagelist.txt'


def _find(data_dir: Path, folders: Sequence[str], name: str) -> Path | None:
    return next((path for folder in folders if (path := data_dir / folder / name).is_file()), None)
