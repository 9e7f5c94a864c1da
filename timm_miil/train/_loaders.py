"""Batches of pictures whose order and augmentation depend on the seed alone: not on workers, processes or pauses.

A step of the optimizer takes `batch_size` pictures, the same ones however it is shared out: each of several processes
gets a contiguous share of them, and computes it in one or more parts. A stream cannot promise that, because only its
shards know their pictures; what it promises is said at `StreamLoader`.
"""
import itertools
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from timm_miil._cores import count_cores
from timm_miil.data import ImageStream, MultiLabelDataset
from timm_miil.data.records import UnreadPicture
from timm_miil.data.seeding import kept_generators, mix_seed, seed_generators

__all__ = ['Batch', 'EpochLoader', 'Share', 'StreamLoader', 'StreamPictures', 'TrainLoader', 'WorkerLoader']

Transform = Callable[[Image.Image], Tensor]

GRACE_SECONDS = 30  # in which a training process that is asked to stop ends its step
REPEAT_STRIDE = 1 << 24  # more epochs than anyone trains: a repeated picture draws as in an epoch of its own


@dataclass(frozen=True)
class Share:
    """Which part of all batches a process takes, and in how many pieces it computes a step.

    Args:
        index: Number of the process, from 0.
        count: How many processes there are.
        parts: Pieces of a step.
    """
    index: int = 0
    count: int = 1
    parts: int = 1


class Batch(NamedTuple):
    """Pictures of one part of a step.

    Args:
        images: Shape (b, 3, H, W).
        targets: 1 present, 0 absent, -1 unknown, float32, shape (b, C).
        names: Says what the pictures are called, for people.
        indices: Places of the pictures in the training set, int64, shape (b,); None for a stream, which has none.
    """
    images: Tensor
    targets: Tensor
    names: Callable[[], list[str]]
    indices: Tensor | None = None


class TrainLoader(Protocol):
    """What the training loop needs of its pictures."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The parts of an epoch's steps one after the other, from step `start` on.

        The call, and not the iteration, draws one number of torch's global generator.
        """


class WorkerLoader(DataLoader[Any]):
    """torch's loader, with workers that stay; a pass draws one number of torch's global generator, whatever they are.

    Args:
        dataset: As of torch's.
        workers: Processes that read pictures; of those that read in any order no more are made than there are
            processors, which changes no result.
        device: Where batches go to; memory is pinned for one that copies from there faster.
        **settings: As of torch's.
    """

    def __init__(self, dataset: Dataset[Any], *, workers: int, device: torch.device | None, **settings: Any) -> None:
        if not isinstance(dataset, IterableDataset):
            workers = min(workers, count_cores())
        super().__init__(
            dataset, num_workers=workers, persistent_workers=workers > 0, generator=torch.Generator(),
            pin_memory=device is not None and device.type == 'cuda', worker_init_fn=_outlive_signals, **settings)

    def __iter__(self) -> Any:
        self.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        return _with_plain_errors(super().__iter__())


class EpochLoader:
    """Shuffled full steps of pictures that can be read in any order.

    Args:
        dataset: Pictures with a random transform.
        batch_size: Pictures of a step, over all processes and parts; it must divide among them.
        seed: Decides the order.
        workers: Processes that read pictures.
        share: This process's part.
        repeats: How often a picture is in an epoch, one after the other; the epoch is as long as without.
        device: Where batches go to.

    Raises:
        ValueError: If there are fewer pictures than one step takes.
    """

    def __init__(
            self,
            dataset: MultiLabelDataset,
            batch_size: int,
            *,
            seed: int,
            workers: int,
            share: Share = Share(),
            repeats: int = 1,
            device: torch.device | None = None,
    ) -> None:
        _check_enough(len(dataset), batch_size)
        self.dataset, self.share = dataset, share
        self._order = _Order(len(dataset), batch_size, seed, share, repeats)
        self._loader = WorkerLoader(
            _KeyedPictures(dataset), workers=workers, device=device, batch_sampler=self._order)

    def __len__(self) -> int:
        return self._order.num_steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `TrainLoader`."""
        self._order.epoch, self._order.start = epoch, start
        return map(self._batch, iter(self._order), iter(self._loader))

    def _batch(self, keys: list[tuple[int, int]], tensors: Sequence[Tensor]) -> Batch:
        images, targets = tensors
        indices = torch.tensor([row for _, row in keys])
        return Batch(images, targets, lambda: [self.dataset.source.image_name(row) for _, row in keys], indices)


class StreamLoader:
    """Shuffled full steps of a stream, as many an epoch as its number of pictures gives.

    Each worker of each process reads its own share of the stream. Where a share ends before the epoch does it begins
    anew, and what it has more than the epoch takes is left: some pictures are seen twice and as many are not, others
    in each epoch. What a picture draws depends on seed, epoch and name.

    Args:
        stream: The pictures.
        transform: What happens to them.
        batch_size: Pictures of a step, over all processes and parts; it must divide among them.
        seed: Decides order and augmentation.
        workers: Processes that read pictures.
        share: This process's part.
        device: Where batches go to.

    Raises:
        ValueError: If there are fewer pictures than one step takes; while it is iterated, if a worker has none.
    """

    def __init__(
            self,
            stream: ImageStream,
            transform: Transform,
            batch_size: int,
            *,
            seed: int,
            workers: int,
            share: Share = Share(),
            device: torch.device | None = None,
    ) -> None:
        _check_enough(stream.num_images, batch_size)
        self.num_steps, self.share = stream.num_images // batch_size, share
        part = batch_size // (share.count * share.parts)
        self._pictures = StreamPictures(stream, transform, share=share, seed=seed, part=part)
        self._loader = WorkerLoader(self._pictures, workers=workers, device=device, batch_size=part)

    def __len__(self) -> int:
        return self.num_steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `TrainLoader`."""
        parts = self.share.parts
        self._pictures.position[:] = torch.tensor([epoch, start * parts, self.num_steps * parts])
        return map(self._batch, iter(self._loader))

    @staticmethod
    def _batch(items: Sequence[Any]) -> Batch:
        images, targets, names = items
        return Batch(images, targets, lambda: list(names))


class StreamPictures(IterableDataset[tuple[Tensor, Tensor, str]]):
    """This worker's pictures (3, H, W), targets (C,) as float32 and names.

    Args:
        stream: The pictures.
        transform: What happens to them.
        share: The process's part; its workers part it again.
        seed: Decides order and augmentation; None gives each picture once, in the stored order.
        part: Pictures of a batch, where there is a seed.
    """

    def __init__(
            self, stream: ImageStream, transform: Transform, *, share: Share, seed: int | None = None, part: int = 1,
    ) -> None:
        self.source, self.transform, self.share, self.seed, self.part = stream, transform, share, seed, part
        # Epoch, first batch and end of batches, in memory that workers share: they stay from epoch to epoch.
        self.position = torch.zeros(3, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        readers = self.share.count * workers
        if self.seed is None:
            for image, targets, name in self.source.iterate(
                    seed=None, epoch=0, process=self.share.index * workers + worker, num_processes=readers):
                yield self.transform(image), targets.float(), name
            return

        epoch, start, end = self.position.tolist()
        # A loader takes its batches from the workers by turns and begins with the first one: in the middle of an epoch
        # that one stands in for another.
        turn = (worker + start) % workers
        skipped = len(range(turn, start, workers)) * self.part
        taken = len(range(worker, end - start, workers)) * self.part
        pictures = self._endless(epoch, self.share.index * workers + turn, readers)
        for read, targets, name in itertools.islice(pictures, skipped, skipped + taken):
            image = read()
            with kept_generators() if info is None else nullcontext():  # a worker's are nobody else's
                seed_generators(mix_seed(self.seed, epoch, zlib.crc32(name.encode())))
                tensor = self.transform(image)
            yield tensor, targets.float(), name

    def _endless(self, epoch: int, process: int, processes: int) -> Iterator[UnreadPicture]:
        for round in itertools.count():
            found = 0
            for found, item in enumerate(self.source.iterate_unread(
                    seed=mix_seed(self.seed or 0, round), epoch=epoch, process=process, num_processes=processes), 1):
                yield item
            if not found:
                raise ValueError(
                    f'reader {process} of {processes} has no pictures of {self.source.num_images}; take fewer workers '
                    f'or processes, or write the stream in more shards.')


class _Order(Sampler[list[tuple[int, int]]]):
    """The keys, (epoch to draw as, row), of this process's parts of an epoch."""

    def __init__(self, length: int, batch_size: int, seed: int, share: Share, repeats: int) -> None:
        self.length, self.batch_size, self.seed, self.share, self.repeats = length, batch_size, seed, share, repeats
        self.num_steps = length // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.num_steps - self.start) * self.share.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        rows = torch.randperm(self.length, generator=generator)
        part = self.batch_size // (self.share.count * self.share.parts)
        for step in range(self.start, self.num_steps):
            first = step * self.batch_size + self.share.index * part * self.share.parts
            for begin in range(first, first + part * self.share.parts, part):
                places = torch.arange(begin, begin + part)
                epochs = self.epoch + places % self.repeats * REPEAT_STRIDE
                yield list(zip(epochs.tolist(), rows[places // self.repeats].tolist()))


class _KeyedPictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures by epoch and row: workers that stay are told the epoch with each picture."""

    def __init__(self, dataset: MultiLabelDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        epochs, rows = zip(*keys)
        return self.dataset.read(rows, epochs)


def _check_enough(num_images: int, batch_size: int) -> None:
    if num_images < batch_size:
        raise ValueError(
            f'batch_size must be at most the number of training pictures, got {batch_size} for {num_images} pictures.')


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; an error of a worker, which torch wraps into a page of text, is what it was there."""
    try:
        yield from batches
    except Exception as error:
        text = str(error)
        if not text.startswith(f'Caught {type(error).__name__} in DataLoader worker'):
            raise
        _, _, words = text.rstrip().splitlines()[-1].partition(': ')
        raise type(error)(words) from error


def _outlive_signals(worker: int) -> None:
    """The training process decides when to stop: a worker that died of the same signal would stop it by an error.

    Whoever ends an idle worker sends it the same signal, so that it must not outlive it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS) if hasattr(signal, 'alarm') else None)
