"""What a release of ImageNet-21K has on disk: a folder or a tar file for each synset, and the pictures in it.

Tar files may come from anyone: nothing is unpacked. Only heads are read until a picture is asked for, and of a member's
name no more than the last part is used.
"""
import contextlib
import functools
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from timm_miil._checks import cut, shown
from timm_miil._errors import ImageError
from timm_miil.data._files import clean_name, few, is_folder
from timm_miil.data._shard_tar import MAX_PICTURE_BYTES, Heads, Span, read_span
from timm_miil.data.images import IMAGE_SUFFIXES

__all__ = ['Listing', 'Omission', 'SynsetSource', 'find_synsets', 'opened']

SYNSET = re.compile(r'n\d{8}')
MAX_NAME_BYTES = 255  # of a file, in every file system of today
END_BYTES = 2 * tarfile.BLOCKSIZE
LOST_AND_FOUND = 'lost+found'  # of a whole disk; only root may look into it
MODE_TO_READ = {'folder': os.R_OK | os.X_OK, 'tar': os.R_OK}

DUPLICATE, NOT_A_PICTURE, REFUSED, UNREADABLE = 'duplicate', 'not a picture', 'refused', 'unreadable'
"""Kinds of an omission."""


class Omission(NamedTuple):
    """A file that was left out.

    Args:
        file: Its name, behind its synset's folder or tar file.
        kind: 'unreadable', 'duplicate', 'not a picture' by its name, or 'refused' for a name or a form that no picture
            of a release has.
        reason: In words.
    """
    file: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SynsetSource:
    """Where the pictures of a synset are.

    Args:
        synset: Such as 'n01440764'.
        path: A folder or a tar file.
        kind: Which of them: 'folder' or 'tar'.
    """
    synset: str
    path: Path
    kind: str

    def extent(self) -> int:
        """Bytes of the tar file, or how many files there are in the folder."""
        if self.kind == 'tar':
            return self.path.stat().st_size
        with os.scandir(self.path) as entries:
            return sum(1 for _ in entries)


class Found(NamedTuple):
    """A picture file: its name in the source, as the report says it; what it is called here; what reads its bytes."""
    file: str
    output: str
    read: Callable[[], bytes]


@dataclass
class Listing:
    """What a synset has.

    Args:
        pictures: By the bytes of their names.
        omissions: What was left out.
        damage: '' or what is wrong with the tar file.
        extent: As `SynsetSource.extent`, of what was listed.
    """
    pictures: list[Found] = field(default_factory=list)
    omissions: list[Omission] = field(default_factory=list)
    damage: str = ''
    extent: int = 0


def find_synsets(source: Path, *, out: Path) -> tuple[dict[str, SynsetSource], list[str]]:
    """The synsets below a folder, or below a folder in it, and the names there that are none.

    Raises:
        FileNotFoundError: If there is none.
        NotADirectoryError: If source is a file.
        PermissionError: If some may not be read, which is better said now than after hours.
        ValueError: If a synset is there twice.
    """
    if source.is_file():
        raise NotADirectoryError(
            f'source must be a folder with a folder or a tar file for each synset, got the file {source}; unpack it.')
    found: dict[str, SynsetSource] = {}
    twice: list[str] = []
    others: list[str] = []
    for entry in _entries(source):
        below = [(entry, entry.name)]
        if is_folder(entry) and not SYNSET.fullmatch(entry.name) and entry.name != LOST_AND_FOUND and not (
                out.exists() and os.path.samefile(entry.path, out)):
            below = [(inner, f'{entry.name}/{inner.name}') for inner in _entries(Path(entry.path))]
        for one, name in below:
            synset, kind = _as_synset(one)
            if not synset:
                others.append(name)
            elif synset in found:
                twice.append(f'{found[synset].path.relative_to(source)} and {name}')
            else:
                found[synset] = SynsetSource(synset, Path(one.path), kind)
    if twice:
        raise ValueError(
            f'a synset must be there once, got {few(twice, len(twice))}; move away those that are not to be used.')
    if not found:
        raise FileNotFoundError(
            f'{source} has no synsets: folders like n01440764 or files like n01440764.tar, here or one folder below.')
    if shut := [str(one.path) for one in found.values() if not os.access(one.path, MODE_TO_READ[one.kind])]:
        raise PermissionError(
            f'{len(shut)} synsets may not be read: {few(shut, len(shut))}; change their permissions or move them away.')
    return dict(sorted(found.items())), others


def _entries(folder: Path) -> list['os.DirEntry[str]']:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)


def _as_synset(entry: 'os.DirEntry[str]') -> tuple[str, str]:
    stem, suffix = os.path.splitext(entry.name)
    if SYNSET.fullmatch(entry.name) and is_folder(entry):
        return entry.name, 'folder'
    if SYNSET.fullmatch(stem) and suffix == '.tar' and _is_file(entry):
        return stem, 'tar'
    return '', ''


def _is_file(entry: 'os.DirEntry[str]') -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


@contextlib.contextmanager
def opened(source: SynsetSource) -> Iterator[Listing]:
    """The pictures of a synset, which can be read within the block.

    Raises:
        OSError: If the folder or the tar file cannot be opened.
    """
    if source.kind == 'folder':
        yield _sorted(_list_folder(source.path))
    else:
        with open(source.path, 'rb') as file:
            yield _sorted(_list_tar(file))


def _list_folder(folder: Path) -> Listing:
    with os.scandir(folder) as entries:
        there = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        listing = Listing(extent=len(there))
        for entry in there:
            if is_folder(entry):
                listing.omissions.append(Omission(
                    entry.name, NOT_A_PICTURE, 'it is a folder; pictures are looked for beside it, not in it'))
            else:
                _take(listing, entry.name, entry.name, functools.partial(_read_file, entry.path))
    return listing


def _read_file(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError('it is not a regular file')  # opening a pipe would wait for ever
        if status.st_size > MAX_PICTURE_BYTES:
            raise ImageError(f'it has {status.st_size} bytes, and {MAX_PICTURE_BYTES} at most are read')
        with open(path, 'rb') as file:
            return file.read()
    except ImageError:
        raise
    except OSError as error:
        raise ImageError((error.strerror or str(error)).lower()) from error


def _list_tar(file: IO[bytes]) -> Listing:
    """The members, up to where the tar file is damaged: a release that was copied badly is still of use."""
    total, end = os.fstat(file.fileno()).st_size, 0
    listing = Listing(extent=total)
    try:
        with tarfile.open(fileobj=Heads(file), mode='r:') as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                name, reason = clean_name(member.name), ''
                if not name:
                    reason = 'its name leaves the folder'
                elif not member.isreg() or member.issparse():
                    reason = 'it is a link, a device or a file with holes'
                elif member.size < 0 or member.offset_data + member.size > total:
                    reason = f'it claims {member.size} bytes, and the whole tar file has {total}'
                elif member.size > MAX_PICTURE_BYTES:
                    reason = f'it has {member.size} bytes, and {MAX_PICTURE_BYTES} at most are read'
                if reason:
                    listing.omissions.append(Omission(cut(member.name), REFUSED, reason))
                else:
                    span = Span(member.offset_data, member.size)
                    _take(listing, name, name.rpartition('/')[2], functools.partial(_read_span, file, span))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        listing.damage = f'it is not a whole tar file ({cut(str(error))})'
        return listing
    # tarfile takes any damage behind the first member for the end.
    file.seek(end)
    if file.read(END_BYTES) != bytes(END_BYTES):
        listing.damage = f'it is not a whole tar file (its end is missing after {len(listing.pictures)} pictures)'
    return listing


def _read_span(file: IO[bytes], span: Span) -> bytes:
    try:
        return read_span(file, span)
    except ValueError as error:
        raise ImageError(str(error)) from error


def _take(listing: Listing, file: str, name: str, read: Callable[[], bytes]) -> None:
    stem, suffix = os.path.splitext(name)
    if name.startswith('.') or suffix.lower() not in IMAGE_SUFFIXES:
        listing.omissions.append(Omission(file, NOT_A_PICTURE, 'its name is not that of a picture'))
    elif any(letter < ' ' or letter in '\x7f/\\:' for letter in name):
        listing.omissions.append(Omission(file, REFUSED, f'its name {shown(name)} has odd characters'))
    elif len(name.encode('utf-8', 'surrogateescape')) > MAX_NAME_BYTES:
        listing.omissions.append(Omission(cut(file), REFUSED, f'its name is longer than {MAX_NAME_BYTES} bytes'))
    else:
        listing.pictures.append(Found(file, f'{stem}.jpg', read))


def _sorted(listing: Listing) -> Listing:
    """In the order of names. Of several with one name the last stays, as when a tar file is unpacked."""
    by_output: dict[str, Found] = {}
    for picture in listing.pictures:
        if (before := by_output.get(picture.output)) is not None:
            listing.omissions.append(Omission(
                before.file, DUPLICATE, f'{picture.file} comes later and would be {picture.output} too'))
        by_output[picture.output] = picture
    listing.pictures = sorted(
        by_output.values(), key=lambda picture: os.fsencode(picture.file.rpartition('/')[2]))
    listing.omissions.sort()
    return listing
