"""Pictures with several labels each: what every reader returns, and the data set that feeds a network."""
import abc
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from timm_miil._checks import check_not_negative, check_positive, nearest, shown
from timm_miil.data._files import keep_present, refuse_missing
from timm_miil.data._labels import check_distinct
from timm_miil.data._packed import PackedPaths
from timm_miil.data.images import load_image
from timm_miil.data.seeding import kept_generators, mix_seed, seed_generators
from timm_miil.data.targets import Indices, SparseTargets

__all__ = [
    'ImageStream', 'LabelledImages', 'MultiLabelDataset', 'MultiLabelRecords', 'UnreadPicture', 'UnreadStream',
    'check_share', 'files_of']

UnreadPicture = tuple[Callable[[], Image.Image], Tensor, str]
"""What reads a picture as RGB, upright; its targets; its name."""


class LabelledImages(abc.ABC):
    """Pictures that can be read one by one, in any order, and what they show.

    Args:
        labels: 1 for present, 0 for absent, -1 for unknown, of N pictures and C labels.
        label_names: C names, in the order of the columns.

    Raises:
        ValueError: If there is not one name a column, or a name is there twice.
    """

    def __init__(self, labels: SparseTargets, label_names: Sequence[str]) -> None:
        self.labels, self.label_names = labels, tuple(label_names)
        if labels.shape[1] != len(self.label_names):
            raise ValueError(
                f'label_names must have one name a column, got {len(self.label_names)} names for '
                f'{labels.shape[1]} columns.')
        check_distinct(self.label_names)

    @property
    def targets(self) -> Tensor:
        """The labels as a table made anew at each call, shape (N, C), int8; `labels.row(i)` is one row of it."""
        return self.labels.dense()

    def __len__(self) -> int:
        return len(self.labels)

    def label_counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """How many pictures show each label, how many do not, and of how many this is unknown, each (C,), int64."""
        return self.labels.counts()

    @abc.abstractmethod
    def load_image(self, index: int) -> Image.Image:
        """Read one picture as RGB, upright.

        Raises:
            ImageError: If it cannot be read.
        """

    @abc.abstractmethod
    def image_name(self, index: int) -> str:
        """Path or id of one picture, for people."""

    @abc.abstractmethod
    def select(self, rows: Indices) -> Self:
        """Some of the pictures, in the order given.

        Raises:
            IndexError: If a row is not in [0, N).
        """

    def with_labels(self, names: Sequence[str]) -> Self:
        """All pictures, with these labels only, in this order.

        Raises:
            ValueError: If a name is unknown or given twice.
        """
        check_distinct(names)
        column_of = {name: column for column, name in enumerate(self.label_names)}
        for name in names:
            if name not in column_of:
                raise ValueError(f'unknown label {shown(name)}; {nearest(name, self.label_names)}')
        other = copy.copy(self)
        other.labels = self.labels.select_columns([column_of[name] for name in names])
        other.label_names = tuple(names)
        return other


class MultiLabelRecords(LabelledImages):
    """Picture files and what they show.

    Args:
        image_paths: N files.
        targets: 1 for present, 0 for absent, -1 for unknown, shape (N, C): a tensor, uint8 or int8, or `SparseTargets`.
        label_names: C names, in the order of the columns.

    Raises:
        TypeError: If targets are of another kind or dtype.
        ValueError: If the sizes do not agree, a value is another or a name is there twice.
    """

    def __init__(
            self,
            image_paths: Sequence[str | os.PathLike[str]],
            targets: Tensor | SparseTargets,
            label_names: Sequence[str],
    ) -> None:
        if isinstance(targets, Tensor):
            if targets.dtype not in (torch.uint8, torch.int8):
                raise TypeError(f'targets must be uint8 or int8, got {targets.dtype}.')
        elif not isinstance(targets, SparseTargets):
            raise TypeError(f'targets must be a tensor or SparseTargets, got {type(targets).__name__}.')
        expected = (len(image_paths), len(label_names))
        if tuple(targets.shape) != expected:
            raise ValueError(
                f'targets must have shape {expected} for {expected[0]} pictures and {expected[1]} labels, '
                f'got {tuple(targets.shape)}.')
        super().__init__(
            targets if isinstance(targets, SparseTargets) else SparseTargets.from_dense(targets), label_names)
        self.image_paths = image_paths if isinstance(image_paths, PackedPaths) else PackedPaths(image_paths)

    def load_image(self, index: int) -> Image.Image:
        return load_image(self.image_paths[index])

    def image_name(self, index: int) -> str:
        return str(self.image_paths[index])

    def select(self, rows: Indices) -> 'MultiLabelRecords':
        labels = self.labels.select_rows(rows)
        return MultiLabelRecords(self.image_paths.select(rows), labels, self.label_names)


def files_of(
        folder: Path,
        names: Sequence[str],
        labels: SparseTargets,
        label_names: Sequence[str],
        listed_in: object,
        *,
        drop_missing: bool = False,
) -> MultiLabelRecords:
    """Pictures that a list names, once it is sure that they are there.

    Args:
        folder: What the names are relative to.
        names: Of the files.
        labels: What they show.
        label_names: Names of the columns.
        listed_in: The list, for errors.
        drop_missing: Whether pictures without a file are left out, with a warning in the log.

    Raises:
        FileNotFoundError: If files are missing; the first few are named. With `drop_missing`, if all are.
    """
    if drop_missing:
        rows = keep_present(folder, names, listed_in)
        names, labels = [names[row] for row in rows], labels.select_rows(rows)
    else:
        refuse_missing(folder, names, listed_in)
    return MultiLabelRecords(PackedPaths(names, folder), labels, label_names)


class ImageStream(abc.ABC):
    """Pictures and what they show, read in sequence: shards, or a data set that is not on this machine.

    Args:
        label_names: C names, in the order of the targets.
        num_images: Pictures in one pass over all processes.

    Raises:
        ValueError: If a name is there twice.
    """

    def __init__(self, label_names: Sequence[str], num_images: int) -> None:
        check_distinct(label_names)
        self.label_names, self.num_images = tuple(label_names), num_images

    def label_counts(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """As of `LabelledImages`; None if only reading all pictures would tell."""
        return None

    @abc.abstractmethod
    def iterate(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[tuple[Image.Image, Tensor, str]]:
        """This process's share of one pass; the shares of all are disjoint and together every picture once.

        Errors of data come as they are met, those of arguments at once.

        Args:
            seed: Decides with `epoch` how pictures are shuffled; None for the stored order.
            epoch: Which pass.
            process: Number of this one, from 0: every worker of every machine has its own.
            num_processes: How many there are.

        Returns:
            RGB picture, targets (C,) as int8 of 1, 0 and -1, and name of the picture.

        Raises:
            ImageError: If a picture cannot be read.
            OSError: If the data cannot be read.
            TypeError: If a number is no int.
            ValueError: If process is not in [0, num_processes), epoch is negative, or the data are damaged or mean
                nothing.
        """

    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        """As `iterate`, with a function in each picture's place that reads it, so that passing over one is cheap.

        The function is for the time until the next picture is asked for.
        """
        for image, targets, name in self.iterate(
                seed=seed, epoch=epoch, process=process, num_processes=num_processes):
            yield lambda image=image: image, targets, name  # type: ignore[misc]  # mypy does not know its default


class UnreadStream(ImageStream):
    """A stream that has each picture as a function that reads it."""

    def iterate(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[tuple[Image.Image, Tensor, str]]:
        """As of `ImageStream`."""
        pictures = self.iterate_unread(seed=seed, epoch=epoch, process=process, num_processes=num_processes)
        return ((read(), targets, name) for read, targets, name in pictures)

    @abc.abstractmethod
    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        """As of `ImageStream`."""


def check_share(*, epoch: int, process: int, num_processes: int) -> None:
    """Raise TypeError or ValueError unless there can be such a share of a stream."""
    check_positive(num_processes=num_processes)
    check_not_negative(epoch=epoch, process=process)
    if process >= num_processes:
        raise ValueError(f'process must be below num_processes, got {process} of {num_processes}.')


class MultiLabelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Reads and transforms one picture at a time.

    Args:
        source: Pictures and targets.
        transform: Turns an RGB picture into a tensor (3, H, W).
        seed: Makes a random transform repeatable: what it draws depends on seed, epoch and index alone, so neither
            the order of the pictures nor the number of worker processes matters. None leaves the transform to the
            global generators.
    """

    def __init__(
            self,
            source: LabelledImages,
            transform: Callable[[Image.Image], Tensor],
            *,
            seed: int | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the transform draw anew; call it before iterating over the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture (3, H, W) and targets (C,), float32, with -1 for unknown.

        Raises:
            ImageError: If the picture cannot be read.
        """
        return self.read([index], [self.epoch])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several at once, as torch's loaders ask for them: much of what seeding costs is paid once."""
        return self.read(indices, [self.epoch] * len(indices))

    def read(self, indices: Sequence[int], epochs: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Pictures and targets, each drawn as in an epoch of its own.

        Raises:
            ImageError: If a picture cannot be read.
        """
        with nullcontext() if self.seed is None else kept_generators():
            return [self._read(index, epoch) for index, epoch in zip(indices, epochs, strict=True)]

    def _read(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        picture = self.source.load_image(index)
        if self.seed is not None:
            seed_generators(mix_seed(self.seed, epoch, index))
        return self.transform(picture), self.source.labels.row(index).float()
