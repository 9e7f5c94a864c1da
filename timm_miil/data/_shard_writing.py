"""Writing shards: each in one process, whole or not at all, and not again if it is there."""
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image

from timm_miil._atomic import write_file
from timm_miil._checks import shown
from timm_miil._errors import ImageError
from timm_miil.data._processes import run_jobs
from timm_miil.data._shard_index import LabelCounts, Shard, ShardIndex, hash_file, index_path, read_record
from timm_miil.data._shard_tar import MAX_PICTURE_BYTES, Labels, add_member, pack_labels
from timm_miil.data.images import decode_image
from timm_miil.data.records import LabelledImages, MultiLabelRecords
from timm_miil.data.seeding import mix_seed

__all__ = ['HasBytes', 'ShardPlan', 'write_planned']

FORMAT = 1  # of what a shard has inside; another one makes shards of before out of date
SUFFIX_OF_FORMAT = (
    ('JPEG', '.jpg'), ('PNG', '.png'), ('WEBP', '.webp'), ('GIF', '.gif'), ('BMP', '.bmp'), ('TIFF', '.tif'),
    ('MPO', '.jpg'))  # what Pillow calls a JPEG that holds several pictures
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')


@runtime_checkable
class HasBytes(Protocol):
    """A source that has its pictures as files' contents, though not as files."""

    def load_bytes(self, index: int) -> bytes:
        """All of one picture's file."""


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """Which pictures go into which shard.

    Args:
        source: The pictures.
        split: What the shards are called.
        images_per_shard: In each but the last.
        seed: Decides the order of the pictures; None for that of the source.
        check_images: Whether each picture is decoded to see that it can be.
    """
    source: LabelledImages
    split: str
    images_per_shard: int
    seed: int | None
    check_images: bool

    @property
    def num_shards(self) -> int:
        """How many there will be."""
        return -(-len(self.source) // self.images_per_shard)

    def name(self, number: int) -> str:
        """File name of a shard."""
        return f'{self.split}-{number:06d}.tar'

    def parts(self) -> Iterator[LabelledImages]:
        """The pictures of each shard."""
        rows = torch.arange(len(self.source))
        if self.seed is not None:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix_seed(self.seed)))
        return (self.source.select(part) for part in rows.split(self.images_per_shard))

    def fingerprint(self) -> str:
        """Hash of all that decides what is written: settings, labels, and name, size and time of each file."""
        settings = (FORMAT, self.images_per_shard, self.seed, len(self.source), self.source.label_names)
        digest = hashlib.sha256(json.dumps(settings).encode())
        labels = self.source.labels
        for array in (labels.starts, labels.columns, labels.values):
            digest.update(array.tobytes())
        digest.update(str(labels.fill).encode())
        for index in range(len(self.source)):
            digest.update(json.dumps(_identity(self.source, index)).encode())
        return digest.hexdigest()


def write_planned(
        plan: ShardPlan, directory: Path, *, workers: int, on_progress: Callable[[int, int], None] | None,
) -> ShardIndex:
    """Write the shards that are not there yet, then the index; `timm_miil.data.shards.write_shards` says how.

    Shards are gathered in a folder of their own and moved when all are whole, so that no reader meets half a split.
    """
    fingerprint = plan.fingerprint()
    partial = directory / f'.{plan.split}.partial'
    known = _find_known(plan, directory, partial, fingerprint)
    jobs = (
        _Job(
            part, number * plan.images_per_shard, plan.check_images, directory / plan.name(number),
            partial / plan.name(number), known.get(number))
        for number, part in enumerate(plan.parts()))
    shards: dict[int, Shard] = {}
    done = 0
    for number, shard in run_jobs(jobs, workers):
        shards[number] = shard
        done += shard.images
        if on_progress is not None:
            on_progress(done, len(plan.source))

    for shard in shards.values():
        if (partial / shard.file).exists():
            os.replace(partial / shard.file, directory / shard.file)
    counts = zip(*(count.tolist() for count in plan.source.labels.counts()))
    index = ShardIndex(
        plan.split, fingerprint,
        tuple(LabelCounts(name, *count) for name, count in zip(plan.source.label_names, counts)),
        tuple(shards[number] for number in range(plan.num_shards)))
    index.write(directory)
    shutil.rmtree(partial)
    return index


def _find_known(plan: ShardPlan, directory: Path, partial: Path, fingerprint: str) -> dict[int, Shard]:
    """What earlier runs say they have written, by number; a folder to go on in.

    Raises:
        FileExistsError: If there is something else.
    """
    numbers = {plan.name(number): number for number in range(plan.num_shards)}
    records: list[Shard] = []
    if index_path(directory, plan.split).exists():
        index = ShardIndex.read(directory, plan.split)
        if index.source != fingerprint:
            raise FileExistsError(
                f'{directory} has shards of split {shown(plan.split)} of other pictures, labels or settings; delete '
                f'them or choose another folder.')
        records += index.shards
    started = partial / 'source.txt'
    if started.exists():
        if started.read_text(encoding='utf-8') != fingerprint:
            raise FileExistsError(
                f'{partial} has the beginnings of shards of other pictures, labels or settings; delete it or choose '
                f'another folder.')
        for leftover in partial.glob('*.tmp'):
            leftover.unlink()
        for record in sorted(partial.glob('*.json')):
            records.append(read_record(record))
    else:
        partial.mkdir(parents=True, exist_ok=True)
        write_file(started, fingerprint)
    known = {numbers[shard.file]: shard for shard in records if shard.file in numbers}
    for name, number in numbers.items():
        if number not in known and (directory / name).exists():
            raise FileExistsError(
                f'{directory / name} is there and not of these shards; delete it or choose another folder.')
    return known


@dataclass(frozen=True, eq=False)
class _Job:
    """One shard to write, called in a process that may be another.

    Args:
        part: Its pictures.
        first: Number of the first of them in the split.
        check_images: Whether each picture is decoded.
        final: Where it may be from an earlier run.
        partial: Where to write it, and where it may be from a run that was interrupted.
        known: What an earlier run says it has written.
    """
    part: LabelledImages
    first: int
    check_images: bool
    final: Path
    partial: Path
    known: Shard | None

    def __call__(self) -> Shard:
        """Write the shard, unless it is there as it was written."""
        try:
            if self.known is not None and any(
                    path.exists() and hash_file(path) == self.known.sha256 for path in (self.partial, self.final)):
                return self.known
            return self._write()
        except ImageError:
            raise
        except OSError as error:
            raise OSError(
                f'cannot write {self.partial}: {(error.strerror or str(error)).lower()}; what is finished is kept, run '
                f'it again to go on.') from error

    def _write(self) -> Shard:
        fresh = self.partial.with_name(f'{self.partial.name}.{os.getpid()}.tmp')
        try:
            with open(fresh, 'xb') as file:
                with tarfile.open(fileobj=file, mode='w', format=tarfile.USTAR_FORMAT) as tar:
                    for index in range(len(self.part)):
                        key = f'{self.first + index:09d}'
                        suffix, picture = self._read(index)
                        add_member(tar, key + suffix, picture)
                        add_member(tar, f'{key}.json', pack_labels(_labels_of(self.part, index)))
                file.flush()
                os.fsync(file.fileno())
            shard = Shard(self.final.name, len(self.part), fresh.stat().st_size, hash_file(fresh))
            os.replace(fresh, self.partial)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        write_file(f'{self.partial}.json', json.dumps(asdict(shard)))
        return shard

    def _read(self, index: int) -> tuple[str, bytes]:
        """Suffix and bytes of a picture's file."""
        name = self.part.image_name(index)
        if isinstance(self.part, MultiLabelRecords):
            try:
                data = self.part.image_paths[index].read_bytes()
            except OSError as error:
                raise _unreadable(name, error) from error
        elif isinstance(self.part, HasBytes):
            data = self.part.load_bytes(index)
        else:
            buffer = io.BytesIO()
            self.part.load_image(index).save(buffer, 'PNG')
            return '.png', buffer.getvalue()
        if len(data) > MAX_PICTURE_BYTES:
            raise ImageError(f'cannot read {name!r}: it has {len(data)} bytes, more than {MAX_PICTURE_BYTES}.')
        if self.check_images:
            decode_image(data, name)
        return _suffix(data, name), data


def _identity(source: LabelledImages, index: int) -> Sequence[object]:
    """What tells one picture from another, without reading it."""
    if not isinstance(source, MultiLabelRecords):
        return (source.image_name(index),)
    try:
        status = os.stat(source.image_paths[index])
    except OSError as error:
        raise _unreadable(source.image_name(index), error) from error
    return _name(source, index), status.st_size, status.st_mtime_ns


def _name(source: LabelledImages, index: int) -> str:
    """What a sample calls its picture: no path of this machine if it can be helped."""
    return source.image_paths.name(index) if isinstance(source, MultiLabelRecords) else source.image_name(index)


def _labels_of(source: LabelledImages, index: int) -> Labels:
    labels = source.labels
    entries = slice(labels.starts[index], labels.starts[index + 1])
    names = (source.label_names[column] for column in labels.columns[entries])
    return Labels(_name(source, index), dict(zip(names, labels.values[entries].tolist())), labels.fill)


def _suffix(data: bytes, name: str) -> str:
    """The suffix that fits a picture's content, whatever its file is called."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return dict(SUFFIX_OF_FORMAT)[image.format or '']
    except Exception:  # whatever Pillow meets; `decode_image` has the words for it
        decode_image(data, name)
        raise


def _unreadable(name: str, error: OSError) -> ImageError:
    return ImageError(f'cannot read {name!r}: {(error.strerror or str(error)).lower()}.')
