"""A model's scores of all pictures of a data set, of any size and whatever some of its files are."""
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.inference.images import MAX_ASPECT
from timm_miil.inference.load import input_like
from timm_miil.inference.predict import NOT_FINITE, Tagger

__all__ = ['Scores', 'collect_scores']

Transform = Callable[[Image.Image], Tensor]

# What readers raise in words for people. A loader would wrap it in those of its worker.
FAILURES = (OSError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of N pictures.

    Attributes:
        logits: Of the chosen classes, shape (N, C), float32, in host memory.
        targets: Of the chosen labels, shape (N, L), int8.
        rows: Which picture of the source each is, shape (N,), int64; None for a stream.
        broken: Why other pictures are missing, one line each.
        images_per_second: Pictures over the time of everything.
        model_images_per_second: Pictures over the time of the model alone, without the first batch, which also warms
            up, where there are more.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor | None
    broken: tuple[str, ...]
    images_per_second: float
    model_images_per_second: float


def collect_scores(
        tagger: Tagger,
        source: LabelledImages | ImageStream,
        names: Sequence[str],
        columns: Sequence[int],
        *,
        batch_size: int,
        workers: int,
        amp_dtype: torch.dtype | None,
        strict: bool,
        on_batch: Callable[[int], None] | None,
) -> Scores:
    """Run a model over pictures.

    Args:
        tagger: The model with its preprocessing.
        source: The pictures.
        names: Labels of the source to take, L of them.
        columns: Classes of the model to take, C of them: one for each label, unless it embeds.
        batch_size: Pictures in one pass.
        workers: Processes that read pictures; 0 reads them in this one.
        amp_dtype: Half precision that the model may compute in; None for its own.
        strict: Whether the first picture that cannot be used is an error.
        on_batch: Called with the pictures done since the last call.

    Raises:
        ImageError: If a picture cannot be used, with `strict`.
        PredictionError: If the model does not give one score a class, or no picture could be used.
        ValueError: If a stream gives another number of pictures than it says.
    """
    is_stream = isinstance(source, ImageStream)
    total = source.num_images if isinstance(source, ImageStream) else len(source)
    loader = _build_loader(source, names, tagger.transform, batch_size, workers)
    logits = torch.empty(total, len(columns))
    targets = torch.empty(total, len(names), dtype=torch.int8)
    rows = torch.empty(0 if is_stream else total, dtype=torch.int64)
    chosen = None if tuple(columns) == tuple(range(len(tagger.label_names))) else torch.tensor(columns)
    broken: list[str] = []
    count, timer = 0, _ModelTimer(tagger, amp_dtype)
    start = time.perf_counter()
    for batch in loader:
        if batch.failure is not None:
            raise batch.failure
        errors = list(batch.errors)
        if batch.pixels is not None:
            found = timer(batch.pixels)
            found = found if chosen is None else found[:, chosen]
            is_good = found.isfinite().all(dim=1)
            errors += [
                f'cannot use {name!r}: {NOT_FINITE}' for name, good in zip(batch.names, is_good.tolist()) if not good]
            stop = count + int(is_good.sum())
            if stop <= total:
                logits[count:stop], targets[count:stop] = found[is_good], batch.targets[is_good]
                if not is_stream:
                    rows[count:stop] = batch.rows[is_good]
            count = stop
        if errors and strict:
            raise ImageError(errors[0])
        broken += errors
        if on_batch is not None:
            on_batch(len(batch.names) + len(batch.errors))
    elapsed = time.perf_counter() - start
    if count + len(broken) != total:
        reason = f'; it may not go on after a broken picture: {broken[0]}' if broken else '.'
        raise ValueError(f'the data say that they hold {total} pictures and gave {count + len(broken)}{reason}')
    if not count:
        raise PredictionError(f'no picture could be used{f": {broken[0]}" if broken else "; the data hold none."}')
    return Scores(
        logits[:count], targets[:count], None if is_stream else rows[:count], tuple(broken), count / elapsed,
        timer.images_per_second)


class _Item(NamedTuple):
    """One picture: what the model takes, or why there is nothing."""

    pixels: Tensor | None
    targets: Tensor
    row: int
    name: str
    error: str = ''
    failure: Exception | None = None    # what no picture is to blame for


class _Batch(NamedTuple):
    """The pictures of a batch that can be used, and why the others cannot."""

    pixels: Tensor | None
    targets: Tensor
    rows: Tensor
    names: list[str]
    errors: list[str]
    failure: Exception | None


def _collate(items: list[_Item]) -> _Batch:
    good = [item for item in items if item.pixels is not None]
    pixels = [item.pixels for item in good if item.pixels is not None]
    targets = [item.targets for item in good]
    return _Batch(
        pixels=torch.stack(pixels) if pixels else None, targets=torch.stack(targets) if targets else torch.empty(0),
        rows=torch.tensor([item.row for item in good], dtype=torch.int64), names=[item.name for item in good],
        errors=[item.error for item in items if item.pixels is None],
        failure=next((item.failure for item in items if item.failure is not None), None))


class _Pictures(Dataset[_Item]):
    def __init__(self, source: LabelledImages, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Item:
        name, targets = self.source.image_name(index), self.source.labels.row(index)
        try:
            return _prepare(self.source.load_image(index), self.transform, targets, index, name)
        except ImageError as error:
            return _Item(None, targets, index, name, str(error))
        except FAILURES as error:
            return _Item(None, targets, index, name, failure=error)


class _Streamed(IterableDataset[_Item]):
    def __init__(self, source: ImageStream, columns: Tensor, transform: Transform) -> None:
        self.source, self.columns, self.transform = source, columns, transform

    def __iter__(self) -> Iterator[_Item]:
        worker = get_worker_info()
        process, num_processes = (0, 1) if worker is None else (worker.id, worker.num_workers)
        pictures = self.source.iterate(seed=None, epoch=0, process=process, num_processes=num_processes)
        nothing = torch.empty(0)
        while True:
            try:
                image, targets, name = next(pictures)
                item = _prepare(image, self.transform, targets[self.columns], -1, name)
            except StopIteration:
                return
            except ImageError as error:
                item = _Item(None, nothing, -1, '', str(error))
            except FAILURES as error:
                item = _Item(None, nothing, -1, '', failure=error)
            yield item


def _prepare(image: Image.Image, transform: Transform, targets: Tensor, row: int, name: str) -> _Item:
    """What the model takes of a picture, or why it takes nothing."""
    pixels, error = None, ''
    if max(image.size) > MAX_ASPECT * min(image.size):
        error = f'one side of {image.width} x {image.height} pixels is more than {MAX_ASPECT} times the other'
    else:
        try:
            pixels = transform(image)
        except ValueError as caught:    # a side would resize to nothing
            error = str(caught)
    return _Item(pixels, targets, row, name, error and f'cannot use {name!r}: {error}.')


def _build_loader(
        source: LabelledImages | ImageStream, names: Sequence[str], transform: Transform, batch_size: int,
        workers: int) -> Any:
    pictures: Dataset[_Item]
    if isinstance(source, ImageStream):
        column_of = {name: column for column, name in enumerate(source.label_names)}
        pictures = _Streamed(source, torch.tensor([column_of[name] for name in names]), transform)
    else:
        is_same = tuple(names) == source.label_names
        pictures = _Pictures(source if is_same else source.with_labels(names), transform)
    # A generator of its own: the loader draws from it, and the caller's are left as they are.
    return DataLoader(
        pictures, batch_size, num_workers=workers, collate_fn=_collate, generator=torch.Generator())


class _ModelTimer:
    """Calls the model and takes its time."""

    def __init__(self, tagger: Tagger, amp_dtype: torch.dtype | None) -> None:
        self.model, self.num_classes = tagger.model, len(tagger.label_names)
        self.like = input_like(self.model)
        self.amp_dtype = amp_dtype
        self.batches: list[tuple[int, float]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        """Scores (B, C) in float32 in host memory."""
        device = self.like.device
        with torch.inference_mode(), torch.autocast(
                device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            pixels = pixels.to(self.like)
            _wait_for(device)
            start = time.perf_counter()
            logits = self.model(pixels)
            _wait_for(device)
            self.batches.append((len(pixels), time.perf_counter() - start))
        expected = (len(pixels), self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise PredictionError(f'the model must give scores of shape {expected}, got {got}; it cannot be measured.')
        return logits.float().cpu()

    @property
    def images_per_second(self) -> float:
        timed = self.batches[1:] or self.batches
        seconds = sum(seconds for _, seconds in timed)
        return sum(num for num, _ in timed) / seconds if seconds else math.nan


def _wait_for(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
