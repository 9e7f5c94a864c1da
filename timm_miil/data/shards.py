"""Shards: many pictures and their labels in few tar files, read from end to end.

The files are those of webdataset: `<split>-000000.tar` with members `000000012.jpg` and `000000012.json`. Beside them
lies an index, `<split>.shards.json`, with label names, counts, and size and SHA-256 of each shard.

Python's `tarfile` reads them here, not the package `webdataset`, which can read them too. That package gives whole
shards to processes, so that these get unequal numbers of pictures, or none where there are fewer shards than
processes; it does not say how many pictures there are; and it takes any tar file as it comes. Training here needs every
picture exactly once in a pass, in an order that seed and epoch decide, and nothing from a file that claims to be a
shard and is not.
"""
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from torch import Tensor

from timm_miil._checks import check_not_negative, check_positive, shown
from timm_miil._cores import count_cores
from timm_miil.data._labels import LabelColumns
from timm_miil.data._shard_index import LabelCounts, Shard, ShardIndex, check_split_name, find_indices, index_path
from timm_miil.data._shard_tar import Labels, Sample, list_samples, parse_labels, read_span
from timm_miil.data._shard_writing import ShardPlan, write_planned
from timm_miil.data._shard_scan import scan_shards
from timm_miil.data.images import decode_image
from timm_miil._locks import locked
from timm_miil.data.records import LabelledImages, UnreadPicture, UnreadStream, check_share
from timm_miil.data.seeding import mix_seed

__all__ = [
    'LabelCounts', 'Shard', 'ShardIndex', 'ShardStream', 'index_shards', 'list_splits', 'read_shards', 'read_split',
    'write_shards',
]


LOCK_SECONDS = 5.0


def write_shards(
        source: LabelledImages,
        directory: str | os.PathLike[str],
        *,
        split: str,
        images_per_shard: int = 1000,
        seed: int | None = None,
        workers: int | None = None,
        check_images: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Write pictures and labels as shards, in parallel.

    Files are taken over as they are, byte by byte; pictures that are no files become PNG. Shards are gathered in the
    hidden folder `.<split>.partial` and moved when all are whole. An interrupted run goes on where it was; with
    everything there nothing is written, and a shard that is missing or damaged is written again. Equal pictures, labels
    and settings give equal bytes.

    Args:
        source: The pictures.
        directory: Folder to write into, made if needed; it may have other splits.
        split: What the shards are called.
        images_per_shard: Pictures of each but the last.
        seed: Decides the order of the pictures; None for that of `source`. Reading shuffles a few shards at a time, so
            that pictures which are sorted by label should be shuffled here once.
        workers: Processes that write, each a shard at a time; None for one a core, 0 for this process.
        check_images: Whether each picture is decoded once to see that it can be.
        on_progress: Called with pictures written and pictures in all, after each shard.

    Returns:
        The index, as it was written.

    Raises:
        FileExistsError: If the folder has shards of this split of other pictures, labels or settings.
        ImageError: If a picture cannot be read.
        OSError: If the shards cannot be written, such as on a full disk, or another process writes them.
        RuntimeError: If a process is killed.
        TypeError: If a number is no int.
        ValueError: If a setting is out of range, or there are no pictures.
    """
    check_split_name(split)
    check_positive(images_per_shard=images_per_shard)
    workers = _count_workers(workers)
    if not len(source):
        raise ValueError(f'source must have pictures, got none for split {shown(split)}.')
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plan = ShardPlan(source, split, images_per_shard, seed, check_images)
    words = f'{directory} is being written to by another process; wait for its end, or choose another folder.'
    with locked(directory / f'.{split}.lock', seconds=LOCK_SECONDS, words=words):
        return write_planned(plan, directory, workers=workers, on_progress=on_progress)


def index_shards(
        directory: str | os.PathLike[str],
        *,
        split: str,
        pattern: str = '',
        labels: Sequence[str] | None = None,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Make the index of shards that another program has written, so that `read_shards` reads them.

    Each sample must have one picture and its labels: `.json` with an object that has a list of names, `labels` or
    `present` (others are absent, or all but those of a list `absent` are unknown); or `.cls` with the number of its one
    class. Other members are passed over.

    Args:
        directory: Folder of the shards.
        split: What to call them together.
        pattern: Names of the files, with '*' for any characters; '' for '<split>*.tar'.
        labels: All names that occur, in the order that numbers mean; None for those that occur, sorted.
        workers: Processes that read, each a shard at a time; None for one a core, 0 for this process.
        on_progress: Called with shards read and shards in all, after each.

    Returns:
        The index, as it was written.

    Raises:
        FileExistsError: If there is an index of this split.
        FileNotFoundError: If there are no such files.
        OSError: If a file cannot be read, or the index not be written.
        RuntimeError: If a process is killed.
        ValueError: If a shard is damaged or of another form, or a label is not among `labels`.
    """
    check_split_name(split)
    workers = _count_workers(workers)
    directory, pattern = Path(directory), pattern or f'{split}*.tar'
    if '/' in pattern or '\\' in pattern:
        raise ValueError(
            f'pattern must be of names in the folder, got {shown(pattern)}; give the folder of the files as directory.')
    if index_path(directory, split).exists():
        raise FileExistsError(f'{index_path(directory, split)} is there; delete it to have it made anew.')
    files = sorted(path for path in directory.glob(pattern) if path.is_file())
    if not files:
        raise FileNotFoundError(f'{directory} has no files {shown(pattern)}.')
    index = scan_shards(files, split, labels=labels, workers=workers, on_progress=on_progress)
    index.write(directory)
    return index


def read_shards(
        directory: str | os.PathLike[str],
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        shuffle_shards: int = 8,
) -> 'ShardStream':
    """Open the shards of a split; that all are there, with the sizes they were written with, is checked now.

    Args:
        directory: Folder of the shards and their index.
        split: Its name.
        labels: The columns, matched by name to the labels of the index; one that is not there is unknown in all
            pictures. None for the labels of the index.
        ignore_unknown_labels: Whether labels of the index that are not among `labels` are passed over.
        shuffle_shards: How many shards are shuffled together; each process has as many files open.

    Raises:
        FileNotFoundError: If the index or shards are missing; the first few are named.
        TypeError: If shuffle_shards is no int.
        ValueError: If the index or a shard is damaged, shuffle_shards is below 1, or labels do not match.
    """
    check_split_name(split)
    check_positive(shuffle_shards=shuffle_shards)
    directory = Path(directory)
    index = ShardIndex.read(directory, split)
    index.check_files(directory)
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    for name in index.label_names:
        columns.find(name, 'a label of the index')
    label_names, _ = columns.finish(index_path(directory, split), sort=False)
    column_of = {name: columns.known[name] for name in index.label_names}
    return ShardStream(directory, index, label_names, column_of, shuffle_shards)


def list_splits(data_dir: Path) -> tuple[str, ...]:
    """The splits that have an index, `<split>.shards.json`."""
    return find_indices(data_dir)


read_split = read_shards
"""What `timm_miil.data.open_split` calls."""


class ShardStream(UnreadStream):
    """Pictures of shards; made by `read_shards`.

    The shards, in an order that seed and epoch decide, are one long row of pictures, and each process has an equal part
    of it, give or take one. So parts begin and end within shards, and processes may be more than shards. A process
    shuffles its pictures among a few shards at a time, which it reads by heads first.

    Args:
        directory: Folder of the shards.
        index: What they are.
        label_names: C names, in the order of the targets.
        column_of: Column of each label of the index; -1 for one to pass over.
        shuffle_shards: How many shards are shuffled together.
    """

    def __init__(
            self, directory: Path, index: ShardIndex, label_names: Sequence[str], column_of: dict[str, int],
            shuffle_shards: int,
    ) -> None:
        super().__init__(label_names, index.num_images)
        self.directory, self.index, self.shuffle_shards = directory, index, shuffle_shards
        self._column_of = column_of
        self._unknown = [
            column for column in range(len(self.label_names)) if column not in set(column_of.values())]

    def label_counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the index says."""
        counts = torch.zeros(3, len(self.label_names), dtype=torch.int64)
        counts[2, self._unknown] = self.num_images
        for label in self.index.labels:
            if (column := self._column_of[label.name]) >= 0:
                counts[:, column] = torch.tensor([label.present, label.absent, label.unknown])
        present, absent, unknown = counts
        return present, absent, unknown

    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        check_share(epoch=epoch, process=process, num_processes=num_processes)
        return self._iterate(seed, epoch, process, num_processes)

    def _iterate(
            self, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        pieces = self._share(seed, epoch, process, num_processes)
        step = 1 if seed is None else self.shuffle_shards
        for start in range(0, len(pieces), step):
            with contextlib.ExitStack() as files:
                chosen: list[tuple[int, IO[bytes], Sample]] = []
                for shard, places in pieces[start:start + step]:
                    file = files.enter_context(open(self._path(shard), 'rb'))
                    samples = self._samples(shard, file)
                    chosen += [(shard, file, samples[place]) for place in places]
                for place in _order(len(chosen), seed, epoch, process, start):
                    yield self._load(*chosen[place])

    def _share(
            self, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> list[tuple[int, list[int]]]:
        """This process's shards, each with the places of the samples it has there."""
        first, last = (self.num_images * number // num_processes for number in (process, process + 1))
        pieces, start = [], 0
        for shard in _order(len(self.index.shards), seed, epoch):
            images = self.index.shards[shard].images
            low, high = max(first, start), min(last, start + images)
            if low < high:
                # Shuffled before it is cut: which samples of a shard go to which process changes with the epoch.
                pieces.append((shard, _order(images, seed, epoch, shard)[low - start:high - start]))
            start += images
        return pieces

    def _path(self, shard: int) -> Path:
        return self.directory / self.index.shards[shard].file

    def _samples(self, shard: int, file: IO[bytes]) -> list[Sample]:
        expected = self.index.shards[shard].images
        try:
            samples = list_samples(file)
            if len(samples) != expected:
                raise ValueError(f'it has {len(samples)} samples and the index says {expected}')
        except ValueError as error:
            raise ValueError(f'{self._path(shard)} is broken: {error}; write it again.') from error
        return samples

    def _load(self, shard: int, file: IO[bytes], sample: Sample) -> UnreadPicture:
        where = f'{self._path(shard)}, {sample.key}'
        try:
            labels = parse_labels(read_span(file, sample.labels), sample.labels_suffix, self.index.label_names)
            targets = self._targets(labels)
        except ValueError as error:
            raise ValueError(f'{where}: {error}.') from error

        def read() -> Image.Image:
            try:
                data = read_span(file, sample.picture)
            except ValueError as error:
                raise ValueError(f'{where}: {error}.') from error
            return decode_image(data, where)
        return read, targets, labels.name or where

    def _targets(self, labels: Labels) -> Tensor:
        targets = torch.full((len(self.label_names),), labels.fill, dtype=torch.int8)
        targets[self._unknown] = -1
        for name, value in labels.listed.items():
            column = self._column_of.get(name)
            if column is None:
                raise ValueError(f'its label {shown(name)} is not in the index')
            if column >= 0:
                targets[column] = value
        return targets


def _order(length: int, seed: int | None, *parts: int) -> list[int]:
    """The numbers below `length`, in an order that seed and parts decide; ascending without a seed."""
    if seed is None:
        return list(range(length))
    generator = torch.Generator().manual_seed(mix_seed(seed, *parts))
    return torch.randperm(length, generator=generator).tolist()


def _count_workers(workers: int | None) -> int:
    workers = count_cores() if workers is None else workers
    check_not_negative(workers=workers)
    return workers
