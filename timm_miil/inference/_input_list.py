"""The pictures of a tagging run: a list that is made once and lies in the run's folder, one picture a line."""
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from timm_miil._atomic import whole_file
from timm_miil._errors import ImageError
from timm_miil.data import IMAGE_SUFFIXES, TarImage, find_images, list_tar_images

__all__ = ['InputList', 'Picture', 'hash_sources', 'read_part', 'write_list']

TAR_SUFFIX = '.tar'
FILE = 'inputs.jsonl'


class Picture(NamedTuple):
    """A file, or a member of a tar file.

    Attributes:
        path: The file; of a member, the tar file's path, '/' and the member's name.
        tar: The tar file; '' if it is none.
        member: The picture there.
        error: Why the whole tar file cannot be read; '' if it can.
    """
    path: str
    tar: str = ''
    member: TarImage | None = None
    error: str = ''


class InputList(NamedTuple):
    """What a run keeps of its list.

    Attributes:
        sources: Hash of the files, see `hash_sources`.
        pictures: How many there are.
        bytes: Size of the file.
        offsets: Where each part begins in it.
    """
    sources: str
    pictures: int
    bytes: int
    offsets: Sequence[int]


def hash_sources(paths: Iterable[str | os.PathLike[str]], folder: Path) -> str:
    """A hash of the names of all files, and of size and time of the tar files: equal for the same list."""
    digest = hashlib.sha256()
    for path in _find(paths, folder):
        digest.update(_identity(path))
    return digest.hexdigest()


def write_list(paths: Iterable[str | os.PathLike[str]], folder: Path, part_size: int) -> InputList:
    """Find the pictures and write the list.

    Args:
        paths: Files, tar files and folders, which are searched for both.
        folder: Of the run; it is not searched.
        part_size: Pictures of a part.
    """
    digest, offsets, total, place = hashlib.sha256(), [], 0, 0
    with whole_file(folder / FILE, durable=True) as file:
        for path in _find(paths, folder):
            digest.update(_identity(path))
            for picture in _pictures(path):
                if total % part_size == 0:
                    offsets.append(place)
                line = json.dumps(picture).encode() + b'\n'  # ASCII: any name that a file has comes back
                file.write(line)
                total, place = total + 1, place + len(line)
    return InputList(digest.hexdigest(), total, place, offsets)


def read_part(folder: Path, offset: int, part_size: int) -> list[Picture]:
    """The pictures of the part that begins at an offset."""
    with open(folder / FILE, 'rb') as file:
        file.seek(offset)
        rows = map(json.loads, itertools.islice(file, part_size))
        return [Picture(path, tar, member and TarImage(*member), error) for path, tar, member, error in rows]


def _find(paths: Iterable[str | os.PathLike[str]], folder: Path) -> Iterator[str]:
    return map(str, find_images(paths, exclude=[folder], suffixes=IMAGE_SUFFIXES | {TAR_SUFFIX}))


def _is_tar(path: str) -> bool:
    return path.lower().endswith(TAR_SUFFIX) and not os.path.isdir(path)


def _identity(path: str) -> bytes:
    words: list[object] = [path]
    if _is_tar(path) and os.path.exists(path):
        status = os.stat(path)
        words += [status.st_size, status.st_mtime_ns]
    return json.dumps(words).encode() + b'\n'


def _pictures(path: str) -> Iterator[Picture]:
    if not _is_tar(path):
        yield Picture(path)
        return
    try:
        members = list_tar_images(path)
    except ImageError as error:  # like a broken picture: a row that says why
        yield Picture(path, error=str(error))
        return
    yield from (Picture(f'{path}/{member.name}', path, member) for member in members)
