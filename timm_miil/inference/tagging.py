"""Tagging a million pictures: in parts, by any number of processes, killed and started again at will.

A run's folder has its list of pictures, its settings (`run.json`), a file of results for each finished part, and
`summary.json` once all are there. A part's file appears whole or not at all, and holds nothing but what its pictures
and the settings say; so each picture is tagged exactly once, whatever is killed when, and the results are the same.
"""
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_miil._atomic import whole_file
from timm_miil._checks import check_choice, check_not_negative, check_paths, check_positive, shown
from timm_miil._extras import require
from timm_miil._locks import locked
from timm_miil.inference._input_batches import InputBatch, input_batches, readers_watched
from timm_miil.inference._input_list import FILE, InputList, hash_sources, write_list
from timm_miil.inference._result_files import FORMATS, count_rows, part_path, write_part
from timm_miil.inference.load import input_like
from timm_miil.inference.predict import BATCH_SIZE, NOT_FINITE, NUM_WORKERS, Prediction, Tagger

__all__ = ['PART_SIZE', 'RESULT_FORMATS', 'Share', 'TaggingSummary', 'find_share', 'tag_to_folder']

PART_SIZE = 4096
RESULT_FORMATS = tuple(FORMATS)
RUN_FILE = 'run.json'
SUMMARY_FILE = 'summary.json'
LOCK_FILE = '.lock'    # of the first process; the others have '.lock-1', ...
LOCK_SECONDS = 10.0    # workers of a killed process outlive it by 5, and may hold its lock


@dataclasses.dataclass(frozen=True)
class Share:
    """This process among those that share a run.

    Attributes:
        index: Its number, from 0.
        count: How many there are.
        device: Where it runs; None leaves that to the model.
    """
    index: int = 0
    count: int = 1
    device: torch.device | None = None


@dataclasses.dataclass(frozen=True)
class TaggingSummary:
    """What became of a run, as `summary.json` says it.

    Attributes:
        pictures: How many were asked for.
        tagged: Of these, how many were read and have tags, or none above the thresholds.
        errors: How many could not be read; their rows say why.
        parts: Files of results.
    """
    pictures: int
    tagged: int
    errors: int
    parts: int


def find_share(*, cpu: bool = False) -> Share:
    """Join the processes that torchrun or accelerate launch has started; alone if nothing has.

    Args:
        cpu: Whether to run on the CPU where there is an accelerator.

    Raises:
        ImportError: If there are several processes and Accelerate is not installed.
    """
    if int(os.environ.get('WORLD_SIZE', '1')) < 2:
        return Share()
    # Told so, Accelerate joins processes that were launched where there is no accelerator. While the first lists a
    # million pictures the others wait, longer than the ten minutes that are usual.
    state = require('accelerate').PartialState(
        cpu=cpu or not torch.accelerator.is_available(), timeout=datetime.timedelta(days=1))
    return Share(state.process_index, state.num_processes, state.device)


def tag_to_folder(
        tagger: Tagger,
        paths: Iterable[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        model: str = '',
        format: str = 'json',
        part_size: int = PART_SIZE,
        batch_size: int = BATCH_SIZE,
        num_workers: int = NUM_WORKERS,
        share: Share = Share(),
        on_part: Callable[[int, int], None] | None = None,
) -> TaggingSummary | None:
    """Tag pictures in files, folders and tar files, such as webdataset shards, and write the results to a folder.

    Started again with the same settings it makes the parts that are missing, with any number of processes. Each
    process takes its share of these, and reads pictures in processes of its own. A picture in a tar file is called
    `file.tar/member.jpg`. What cannot be read is a row with its error. In float32 the tags are those of `tagger(...)`
    with the same batch size, up to the rounding where a batch there has other pictures.

    Args:
        tagger: What tags.
        paths: Files, tar files, and folders, which are searched for both.
        folder: Where results go; of several machines, one that all of them see. It is made if needed.
        model: What the settings call the model.
        format: 'json' for `part-000000.jsonl`, objects with path, tags and error; 'parquet' for `part-000000.parquet`,
            columns path, labels, confidences, indices and error.
        part_size: Pictures of a part.
        batch_size: Pictures in one pass through the model; it and num_workers may change from start to start.
        num_workers: Processes that read pictures; 0 for none but this one.
        share: This process among several, see `find_share`.
        on_part: Called with finished and all parts of this process, after each.

    Returns:
        What became of the run; None if other processes still work on it.

    Raises:
        BlockingIOError: If another run works in the folder.
        FileNotFoundError: If one of `paths` does not exist, or there are no pictures.
        ImportError: If pyarrow is needed and not installed.
        OSError: If results cannot be written.
        PredictionError: If the model gives no scores, or a process that reads is ended from outside.
        TypeError: If a number is not an int, or `paths` a single path.
        ValueError: If a setting is out of range, or the folder has a run of other settings or pictures.
    """
    check_paths(paths=paths)
    check_choice(format=format, choices=FORMATS)
    check_positive(part_size=part_size, batch_size=batch_size)
    check_not_negative(num_workers=num_workers)
    if format == 'parquet':
        require('pyarrow')
    folder, paths = Path(folder), list(paths)
    settings = _settings(tagger, model, format, part_size)
    with contextlib.ExitStack() as stack:
        begin = functools.partial(_begin, stack, paths, folder, settings, part_size, format)
        inputs, missing = begin() if share.count == 1 else _agree(stack, share, folder, begin)
        mine = missing[share.index::share.count]
        batches = input_batches(
            folder, inputs, mine, part_size, transform=tagger.transform, batch_size=batch_size, workers=num_workers,
            pin=input_like(tagger.model).device.type == 'cuda')
        rows: list[Prediction] = []
        done = 0
        stack.enter_context(readers_watched(num_workers))
        for batch, scores in _score(tagger, batches):
            rows += _predictions(tagger, batch, scores)
            if batch.is_last:
                write_part(part_path(folder, batch.part, format), rows, format)
                rows, done = [], done + 1
                if on_part is not None:
                    on_part(done, len(mine))
        return _finish(folder, inputs, part_size, format)


def _settings(tagger: Tagger, model: str, format: str, part_size: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in sorted([*tagger.model.named_parameters(), *tagger.model.named_buffers()]):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        'model': model, 'weights': digest.hexdigest(), 'transform': str(tagger.transform),
        'labels': list(tagger.label_names), 'activation': tagger.activation, 'thresholds': list(tagger.thresholds),
        'temperatures': None if tagger.temperatures is None else list(tagger.temperatures), 'topk': tagger.topk,
        'format': format, 'part_size': part_size}


def _agree(
        stack: contextlib.ExitStack, share: Share, folder: Path, begin: Callable[[], tuple[InputList, list[int]]],
) -> tuple[InputList, list[int]]:
    """What the first process has found at the start, in every process; or its error. Nothing is exchanged later."""
    found: list[Any] = [None, None]
    if share.index == 0:
        try:
            found[0] = begin()
        except Exception as error:  # the others must not wait for what does not come
            found[1] = error
    require('accelerate.utils').broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    if share.index:
        stack.enter_context(_lock(folder, f'{LOCK_FILE}-{share.index}'))
    require('accelerate.utils').wait_for_everyone()  # or the first might end, and another run begin, before that
    return found[0]


def _lock(folder: Path, name: str) -> contextlib.AbstractContextManager[None]:
    words = f'another run works in {folder}; wait for its end, or choose another folder.'
    return locked(folder / name, seconds=LOCK_SECONDS, words=words)


def _begin(
        stack: contextlib.ExitStack, paths: list[str | os.PathLike[str]], folder: Path, settings: dict[str, Any],
        part_size: int, format: str,
) -> tuple[InputList, list[int]]:
    """Find the list and the parts to make; the run is this one's as long as the stack is open."""
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_lock(folder, LOCK_FILE))
    for other in sorted(folder.glob(f'{LOCK_FILE}-*')):  # of a run whose first process has ended, and not all others
        with _lock(folder, other.name):
            pass
    run = folder / RUN_FILE
    if run.exists():
        inputs = _resume(run, settings, paths)
    else:
        if any(folder.glob('part-*')):
            raise ValueError(f'{folder} has parts of a run without its {RUN_FILE}; choose another folder.')
        inputs = write_list(paths, folder, part_size)
        if not inputs.pictures:
            raise FileNotFoundError('no pictures found; folders are searched for pictures and .tar files.')
        _write_json(run, {'settings': settings, 'inputs': inputs._asdict()})
    for name in ('part', FILE, RUN_FILE, SUMMARY_FILE):
        for left in folder.glob(f'.{name}-*'):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
    there = {path.name for path in folder.glob('part-*')}
    return inputs, [
        part for part in range(len(inputs.offsets)) if part_path(folder, part, format).name not in there]


def _resume(run: Path, settings: dict[str, Any], paths: list[str | os.PathLike[str]]) -> InputList:
    folder = run.parent
    try:
        content = json.loads(run.read_text(encoding='utf-8'))
        old, inputs = content['settings'], InputList(**content['inputs'])
        if os.stat(folder / FILE).st_size != inputs.bytes:
            raise ValueError(f'{FILE} has another size')
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{folder} has a damaged run ({error}); choose another folder.') from error
    for name, value in json.loads(json.dumps(settings)).items():
        if old.get(name) != value:
            raise ValueError(
                f'{folder} has a run with other settings: {name} was {shown(old.get(name))} and is {shown(value)}; '
                f'give the same ones, or choose another folder.')
    if hash_sources(paths, folder) != inputs.sources:
        raise ValueError(
            f'{folder} has a run of other pictures: files were added or removed, or a tar file changed; give the same '
            f'ones, or choose another folder.')
    return inputs


def _score(tagger: Tagger, batches: Iterable[InputBatch]) -> Iterator[tuple[InputBatch, Tensor | None]]:
    """Batches with their logits on the CPU, one batch behind on a device that works by itself."""
    waiting: tuple[InputBatch, Tensor | None, torch.Event | None] | None = None
    for batch in batches:
        scores = event = None
        if batch.images is not None:
            scores = tagger.scores(batch.images)
            if scores.device.type == 'cuda':
                scores = scores.to('cpu', non_blocking=True)  # behind its batch, and not behind the next one
                event = torch.accelerator.current_stream(scores.device).record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = batch, scores, event
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(
        batch: InputBatch, scores: Tensor | None, event: torch.Event | None) -> tuple[InputBatch, Tensor | None]:
    if event is not None:
        event.synchronize()
    return batch, scores


def _predictions(tagger: Tagger, batch: InputBatch, scores: Tensor | None) -> Iterator[Prediction]:
    found = [None] * len(batch.paths) if scores is None else tagger.tags_of(scores)
    for path, error, tags in zip(batch.paths, batch.errors, found):
        if error or tags is None:
            yield Prediction(Path(path), error=error or f'cannot tag {path!r}: {NOT_FINITE}')
        else:
            yield Prediction(Path(path), tags)


def _finish(folder: Path, inputs: InputList, part_size: int, format: str) -> TaggingSummary | None:
    """Write the summary if all parts are there: the last process does, and another that finds the same may, too."""
    parts = [part_path(folder, part, format) for part in range(len(inputs.offsets))]
    there = {path.name for path in folder.glob('part-*')}
    if any(path.name not in there for path in parts):
        return None
    errors = 0
    for number, path in enumerate(parts):
        rows, broken = count_rows(path, format)
        if rows != (expected := min(part_size, inputs.pictures - number * part_size)):
            raise ValueError(f'{path} has {rows} rows instead of {expected}; delete it and start again.')
        errors += broken
    summary = TaggingSummary(inputs.pictures, inputs.pictures - errors, errors, len(parts))
    _write_json(folder / SUMMARY_FILE, dataclasses.asdict(summary))
    return summary


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path, durable=True) as file:
        file.write(json.dumps(content).encode() + b'\n')
