"""Reader of data sets in the form of Hugging Face `datasets`: on this machine, on the Hub, whole or streamed.

The package loads them; pictures are decoded here, as from files. Labels are found by the types of the columns.
"""
import contextlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from timm_miil._checks import check_positive, cut, nearest, shown
from timm_miil._errors import ImageError
from timm_miil._extras import require
from timm_miil.data._hf_labels import LabelFinder, find_image_column, find_labels, read_targets
from timm_miil.data._labels import LabelColumns
from timm_miil.data.images import decode_image
from timm_miil.data.records import LabelledImages, UnreadPicture, UnreadStream, check_share
from timm_miil.data.seeding import mix_seed
from timm_miil.data.targets import Indices, SparseTargets

__all__ = ['HfImages', 'HfStream', 'list_splits', 'read_hf', 'read_split']

ROWS_AT_ONCE = 16   # of a stream, with their pictures
SAVED_SPLITS, SAVED_TABLE = 'dataset_dict.json', 'state.json'  # what `save_to_disk` leaves
USUAL_FOLDERS = ('', 'data', 'train', 'val', 'valid', 'validation', 'dev', 'test')
MAX_PARTS = 64      # of a table on this machine that is streamed
MARKS = ('*.parquet', 'metadata.csv', 'metadata.jsonl')

Item = TypeVar('Item')
Row = dict[str, Any]


def read_hf(
        path_or_name: str | os.PathLike[str],
        split: str,
        *,
        image_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        streaming: bool = False,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        num_images: int | None = None,
        config: str | None = None,
        loader: str | None = None,
        cache_dir: str | None = None,
        shuffle_buffer: int = 1000,
) -> 'HfImages | HfStream':
    """Open a split of a data set.

    A label column may be: ClassLabel or a list of it; a list of strings; strings; a struct with a number or bool a
    label; numbers or a list of them, which mean places in `labels`; or a list as long as `labels`, of 1, 0 and -1. A
    null, or -1 as the package has it for pictures without a label, leaves all unknown; an empty list leaves all absent.

    Args:
        path_or_name: Folder that `save_to_disk` has made, folder with parquet, JSON or picture files, or `owner/name`
            on the Hub.
        split: Its name there.
        image_column: Column of pictures; None for the only one.
        label_column: Column of labels, 'objects.category' for one inside another, or several columns with 1, 0, -1
            or null, a label each; None for the only one that explains itself, being a list of strings or ClassLabel.
        streaming: Whether to read in sequence, without a copy on this machine.
        labels: The columns to have, matched by name; one that the data's own types do not have is unknown in all
            pictures. None for the data's own names.
        ignore_unknown_labels: Whether names that are not among `labels` are passed over.
        num_images: Pictures of the split; needed for streaming where the data do not say it.
        config: Name of a part of the data set, which some have.
        loader: How to read a folder, such as 'imagefolder', 'json', 'parquet'; None to find it by the files.
        cache_dir: Where the package keeps its copy; None for its own place.
        shuffle_buffer: Pictures that a stream shuffles at a time, in each process.

    Returns:
        Pictures to read in any order, or a stream.

    Raises:
        ImportError: If the package is not installed.
        OSError: If the data set is not to be had.
        TypeError: If a number is no int.
        ValueError: If the split or a column is not there, of another type or not the only one, a row has a value that
            means nothing, or names do not match.
    """
    check_positive(shuffle_buffer=shuffle_buffer)
    datasets = require('datasets')
    where = f'{os.fspath(path_or_name)}, split {split}'
    dataset, known = _load(datasets, os.fspath(path_or_name), split, streaming, config, loader, cache_dir)
    if dataset.features is None:
        raise ValueError(f'{where} must have columns with types to be streamed; read it without streaming.')
    image = find_image_column(dataset.features, image_column, datasets)
    finder = find_labels(dataset.features, label_column, labels, datasets)
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    for name in finder.names or ():
        columns.find(name, 'one of the data set')
    if not streaming:
        targets, label_names = read_targets(dataset.select_columns(list(finder.columns)), finder, columns, where)
        return HfImages(dataset.select_columns([image]), targets, label_names, where)

    if finder.names is None and labels is None:
        raise ValueError(
            f'{where} has labels that are strings, and a stream cannot be searched for them; give labels, their names.')
    label_names, _ = columns.finish(where, sort=False)
    if (num_images := known if num_images is None else num_images) is None:
        raise ValueError(f'{where} does not say how many pictures it has; give num_images.')
    check_positive(num_images=num_images)
    dataset = dataset.select_columns([image, *(name for name in finder.columns if name != image)])
    return HfStream(dataset, image, finder, columns, label_names, num_images, where, shuffle_buffer)


def list_splits(
        data_dir: Path, *, config: str | None = None, loader: str | None = None,
) -> tuple[str, ...]:
    """The splits of a data set, under the names it has for them.

    A folder is of this format if `save_to_disk` has made it, if it has parquet files or metadata of pictures, at the
    top or in the usual folders, or if `loader` is given. What is no folder is looked for on the Hub.
    """
    if data_dir.is_dir() and loader is None:
        if (data_dir / SAVED_SPLITS).is_file():
            return tuple(_saved(data_dir / SAVED_SPLITS, 'splits'))
        if (data_dir / SAVED_TABLE).is_file():
            return (_saved(data_dir / SAVED_TABLE, '_split') or 'train',)
        if not any(any((data_dir / folder).glob(mark)) for folder in USUAL_FOLDERS for mark in MARKS):
            return ()
    datasets = require('datasets')
    source = {'path': str(data_dir)} if loader is None else {'path': loader, 'data_dir': str(data_dir)}
    with _reasons(str(data_dir)):
        return tuple(datasets.get_dataset_split_names(**source, config_name=config))


read_split = read_hf
"""What `timm_miil.data.open_split` calls."""


class HfImages(LabelledImages):
    """Pictures of a data set that is on this machine; made by `read_hf`.

    Args:
        dataset: A `datasets.Dataset` with one column, of pictures that are not decoded.
        labels: 1 for present, 0 for absent, -1 for unknown, of N pictures and C labels.
        label_names: C names.
        where: What the data set is called, for people.
        rows: Of the data set, one a picture; None for all in their order.
    """

    def __init__(
            self, dataset: Any, labels: SparseTargets, label_names: Sequence[str], where: str,
            rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(labels, label_names)
        self.dataset, self.where = dataset, where
        self.rows = np.arange(len(labels)) if rows is None else rows

    def load_image(self, index: int) -> Image.Image:
        cell, name = self._cell(index)
        return decode_image(_picture_bytes(cell, name), name)

    def load_bytes(self, index: int) -> bytes:
        """All of one picture's file.

        Raises:
            ImageError: If it cannot be read.
        """
        return _picture_bytes(*self._cell(index))

    def image_name(self, index: int) -> str:
        return self._cell(index)[1]

    def select(self, rows: Indices) -> 'HfImages':
        # Not the package's own `select`, which writes a file beside the data.
        chosen = self.rows[np.asarray(rows, dtype=np.int64)]
        return HfImages(self.dataset, self.labels.select_rows(rows), self.label_names, self.where, chosen)

    def _cell(self, index: int) -> tuple[Any, str]:
        """Picture as the data set has it, and its name."""
        row = int(self.rows[index])
        cell, = self.dataset[row].values()
        return cell, _name(cell, f'{self.where}, row {row}')


class HfStream(UnreadStream):
    """Pictures of a data set that is read in sequence; made by `read_hf`.

    The files of the data set, in an order that seed and epoch decide, are dealt out to the processes; where there are
    fewer files than processes, those that share a file take its rows by turns. Processes get unequal numbers of
    pictures where files or their numbers are unequal.

    Args:
        dataset: A `datasets.IterableDataset` whose pictures are not decoded.
        image: Its column of pictures.
        finder: Reads the labels.
        columns: Their columns by name.
        label_names: C names.
        num_images: Pictures of all.
        where: What the data set is called, for people.
        shuffle_buffer: Pictures that are shuffled at a time.
    """

    def __init__(
            self, dataset: Any, image: str, finder: LabelFinder, columns: LabelColumns, label_names: Sequence[str],
            num_images: int, where: str, shuffle_buffer: int,
    ) -> None:
        super().__init__(label_names, num_images)
        self.dataset, self.image, self.where, self.shuffle_buffer = dataset, image, where, shuffle_buffer
        self._finder, self._columns = finder, columns
        self._unknown = finder.unmentioned(label_names)

    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        check_share(epoch=epoch, process=process, num_processes=num_processes)
        rows = self._rows(seed, epoch, process, num_processes)
        if seed is not None:
            rows = _shuffled(rows, self.shuffle_buffer, mix_seed(seed, epoch, process))
        return itertools.starmap(self._load, rows)

    def _rows(self, seed: int | None, epoch: int, process: int, num_processes: int) -> Iterator[tuple[str, Row]]:
        """Place and values of each row of this process."""
        num_files = self.dataset.num_shards
        files = list(range(num_files))
        if seed is not None:
            random.Random(mix_seed(seed, epoch)).shuffle(files)
        mine, turn, turns = files[process::num_processes], 0, 1
        if num_files < num_processes:
            mine, turn = [files[process % num_files]], process // num_files
            turns = len(range(process % num_files, num_processes, num_files))
        for file in mine:
            number = 0
            # By batches: row by row the package would deal out its files once more to the workers of a DataLoader.
            for batch in self.dataset.shard(num_files, file).iter(ROWS_AT_ONCE):
                for values in zip(*batch.values()):
                    if number % turns == turn:
                        yield f'{self.where}, file {file}, row {number}', dict(zip(batch, values))
                    number += 1

    def _load(self, where: str, row: Row) -> UnreadPicture:
        targets = torch.zeros(len(self.label_names), dtype=torch.int8)
        listed = self._finder.find_in([row[name] for name in self._finder.columns], where)
        if listed is None:
            targets.fill_(-1)
        for label, value in (listed or {}).items():
            if (column := self._columns.find(label, where)) >= 0:
                targets[column] = value
            else:
                self._columns.finish(where)  # raises unless the label may be passed over
        targets[self._unknown] = -1
        name = _name(row[self.image], '')
        name = f'{where}, {name}' if name else where
        return lambda: decode_image(_picture_bytes(row[self.image], name), name), targets, name


# ---- opening


def _load(
        datasets: ModuleType, source: str, split: str, streaming: bool, config: str | None, loader: str | None,
        cache_dir: str | None,
) -> tuple[Any, int | None]:
    """The package's data set, and how many rows it has if that is known."""
    folder = Path(source)
    with _reasons(f'{source}, split {split}'):
        if loader is None and any((folder / name).is_file() for name in (SAVED_SPLITS, SAVED_TABLE)):
            saved = datasets.load_from_disk(source)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {list_splits(folder)[0]: saved}
            if split not in splits:
                raise ValueError(f'unknown split {shown(split)}; {nearest(split, splits)}')
            dataset = splits[split].with_format(None)
            count = len(dataset)
            return dataset.to_iterable_dataset(min(count, MAX_PARTS)) if streaming else dataset, count
        where = {'path': source} if loader is None else {'path': loader, 'data_dir': source}
        dataset = datasets.load_dataset(**where, name=config, split=split, streaming=streaming, cache_dir=cache_dir)
        known = (dataset.info.splits or {}).get(split)
        return dataset, getattr(known, 'num_examples', None)


@contextlib.contextmanager
def _reasons(where: str) -> Iterator[None]:
    """Whatever goes wrong inside the package is one error that says where."""
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as error:  # it has many of its own, and hides the first reason behind others
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ValueError(f'{where} cannot be opened: {cut(str(reason)).rstrip(".")}.') from error


def _saved(path: Path, key: str) -> Any:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return content[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} must be a JSON object with {key!r}, as save_to_disk writes it.') from error


# ---- pictures


def _name(cell: Any, otherwise: str) -> str:
    return (cell or {}).get('path') or otherwise


def _picture_bytes(cell: Any, name: str) -> bytes:
    """All of a picture's file, which is in the row, on this machine or elsewhere."""
    data, path = (cell or {}).get('bytes'), (cell or {}).get('path')
    if data is not None:
        return bytes(data)
    if not path:
        raise ImageError(f'cannot read {name!r}: its row has no picture.')
    try:
        if '://' not in path and not Path(path).is_file():
            raise FileNotFoundError('no such file')
        with require('datasets.utils.file_utils').xopen(path, 'rb') as file:
            return bytes(file.read())
    except Exception as error:  # of any file system there is
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ImageError(f'cannot read {name!r}: {cut(reason).rstrip(".")}.') from error


def _shuffled(rows: Iterator[Item], size: int, seed: int) -> Iterator[Item]:
    """The same rows, each from a random place in a buffer that is filled before the first one leaves it."""
    draws, buffer = random.Random(seed), list[Item]()
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            place = draws.randrange(size)
            yield buffer[place]
            buffer[place] = row
    draws.shuffle(buffer)
    yield from buffer
