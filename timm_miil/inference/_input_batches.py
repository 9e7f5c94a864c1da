"""Batches of the pictures of many parts, read and preprocessed in worker processes."""
import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_miil import data
from timm_miil._errors import PredictionError
from timm_miil.inference._input_list import InputList, Picture, read_part
from timm_miil.inference.images import read_input

__all__ = ['InputBatch', 'input_batches', 'readers_watched']


class _Chunk(NamedTuple):
    """Pictures that go through the model together."""
    part: int
    is_last: bool
    pictures: Sequence[Picture]


class InputBatch(NamedTuple):
    """What was read of some pictures of a part.

    Attributes:
        part: Its number.
        is_last: Whether the part ends here.
        paths: Of the pictures.
        errors: Why a picture could not be read; '' for one that was.
        images: Shape (B, 3, H, W), zeros for a picture that was not read: a picture's place in its batch is always
            the same. None if none was read.
    """
    part: int
    is_last: bool
    paths: list[str]
    errors: list[str]
    images: Tensor | None


def input_batches(
        folder: Path, inputs: InputList, parts: Iterable[int], part_size: int, *,
        transform: Callable[[Image.Image], Tensor], batch_size: int, workers: int, pin: bool,
) -> Iterator[InputBatch]:
    """The batches of some parts, in order; no batch has pictures of two parts.

    So what a part holds depends on nothing else: not on which parts there were already, nor on who made them.

    Args:
        folder: Of the run, with its list.
        inputs: What is known of the list.
        parts: Numbers of the parts.
        part_size: Pictures of each but the last.
        transform: What happens to a picture.
        batch_size: Pictures of a batch; fewer at the end of a part.
        workers: Processes that read; 0 for this one.
        pin: Whether images come in pinned memory.
    """
    chunks = _chunks(folder, inputs, parts, part_size, batch_size)
    loader = DataLoader(
        _Inputs(transform), batch_sampler=([chunk] for chunk in chunks), num_workers=workers,
        collate_fn=_itself, pin_memory=pin, worker_init_fn=_outlive_interrupt, generator=torch.Generator())
    return iter(loader)


@contextlib.contextmanager
def readers_watched(workers: int) -> Iterator[None]:
    """Say what has happened when a worker is ended from outside, which torch tells at any moment of the work.

    Raises:
        PredictionError: If one is.
    """
    try:
        yield
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        raise PredictionError(
            f'one of {workers} processes that read pictures was ended from outside, as happens when memory or '
            f'/dev/shm is full; start again with fewer workers, what is finished stays.') from error


def _chunks(
        folder: Path, inputs: InputList, parts: Iterable[int], part_size: int, batch_size: int) -> Iterator[_Chunk]:
    for part in parts:
        pictures = read_part(folder, inputs.offsets[part], part_size)
        for start in range(0, len(pictures), batch_size):
            end = start + batch_size
            yield _Chunk(part, end >= len(pictures), pictures[start:end])


class _Inputs(Dataset[InputBatch]):
    """torch's loader asks for a list of items; here it is of one, a whole batch."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __getitems__(self, chunks: list[_Chunk]) -> InputBatch:
        [chunk] = chunks
        files: dict[str, IO[bytes]] = {}
        errors: list[str] = []
        images = None
        with contextlib.ExitStack() as stack:
            for place, picture in enumerate(chunk.pictures):
                read = self._read(picture, files, stack)
                errors.append(read if isinstance(read, str) else '')
                if isinstance(read, Tensor):
                    if images is None:
                        images = torch.zeros(len(chunk.pictures), *read.shape, dtype=read.dtype)
                    images[place] = read
        return InputBatch(chunk.part, chunk.is_last, [picture.path for picture in chunk.pictures], errors, images)

    def _read(self, picture: Picture, files: dict[str, IO[bytes]], stack: contextlib.ExitStack) -> Tensor | str:
        member = picture.member
        if picture.error or member is None:
            return picture.error or read_input(lambda: data.load_image(picture.path), self.transform, picture.path)
        if picture.tar not in files:
            try:
                files[picture.tar] = stack.enter_context(open(picture.tar, 'rb'))
            except OSError as error:
                return f'cannot read {picture.path!r}: {(error.strerror or str(error)).lower()}.'
        file = files[picture.tar]
        return read_input(lambda: data.load_tar_image(file, member, picture.path), self.transform, picture.path)


def _itself(batch: Any) -> Any:
    return batch


def _outlive_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
