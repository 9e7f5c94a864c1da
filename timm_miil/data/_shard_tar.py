"""The inside of a shard: a tar file with a picture and its labels for each sample, in webdataset's convention.

Members of one sample share their name up to the first dot: `000000012.jpg` and `000000012.json`. A tar file may come
from anyone: nothing is unpacked, only heads are read until a sample is asked for, and what no shard needs (links,
devices, names that leave the folder, sizes beyond the file) is refused.
"""
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

from timm_miil._checks import cut, shown
from timm_miil.data._files import clean_name
from timm_miil.data.images import IMAGE_SUFFIXES

__all__ = [
    'Heads', 'Labels', 'MAX_PICTURE_BYTES', 'Sample', 'Span', 'add_member', 'list_files', 'list_samples', 'pack_labels',
    'parse_labels', 'read_span']

LABEL_SUFFIXES = ('.json', '.cls')
# The head of a member with a long name or odd attributes; a shard's names are short.
MAX_HEAD_BYTES = 2 ** 16
MAX_PICTURE_BYTES = 2 ** 30
MAX_LABEL_BYTES = 2 ** 24
MAX_DIGITS = 9


class Span(NamedTuple):
    """Bytes of a member within the shard."""
    offset: int
    size: int


class Sample(NamedTuple):
    """One picture and its labels."""
    key: str
    picture: Span
    labels: Span
    labels_suffix: str


@dataclass(frozen=True)
class Labels:
    """What one picture shows.

    Args:
        name: Of the picture, for people; '' if it has none but its key.
        listed: 1, 0 or -1 for each label that is mentioned.
        fill: The label, 0 or -1, of all others.
    """
    name: str
    listed: Mapping[str, int]
    fill: int


# ---- reading


def list_samples(file: IO[bytes]) -> list[Sample]:
    """Where the samples of a shard lie, in their order; only the heads of its members are read.

    Raises:
        ValueError: If it is not a whole tar file, or has members that no shard has. The message goes behind the
            shard's name.
    """
    spans: dict[str, dict[str, Span]] = {}
    for name, span in list_files(file):
        folder, _, base = name.rpartition('/')
        stem, dot, suffix = base.partition('.')
        suffix = dot + suffix.lower()
        if not stem or suffix not in IMAGE_SUFFIXES and suffix not in LABEL_SUFFIXES:
            continue
        limit = MAX_LABEL_BYTES if suffix in LABEL_SUFFIXES else MAX_PICTURE_BYTES
        if span.size > limit:
            raise ValueError(f'its member {shown(name)} has {span.size} bytes, and {limit} at most are read')
        found = spans.setdefault(f'{folder}/{stem}' if folder else stem, {})
        if suffix in found:
            raise ValueError(f'its member {shown(name)} is there twice')
        found[suffix] = span
    return [_to_sample(key, found) for key, found in spans.items()]


def read_span(file: IO[bytes], span: Span) -> bytes:
    """The bytes of a member.

    Raises:
        ValueError: If the file has become shorter.
    """
    file.seek(span.offset)
    data = file.read(span.size)
    if len(data) < span.size:
        raise ValueError('it ends within a member')
    return data


def _to_sample(key: str, found: dict[str, Span]) -> Sample:
    pictures = [suffix for suffix in found if suffix in IMAGE_SUFFIXES]
    labels = [suffix for suffix in LABEL_SUFFIXES if suffix in found]
    if len(pictures) != 1 or not labels:
        raise ValueError(
            f'its sample {shown(key)} must have one picture and labels (.json or .cls), got {", ".join(sorted(found))}')
    return Sample(key, found[pictures[0]], found[labels[0]], labels[0])


def list_files(file: IO[bytes]) -> Iterator[tuple[str, Span]]:
    """Names and places of the files in a tar file, each checked; ValueError as of `list_samples`."""
    total = os.fstat(file.fileno()).st_size
    end = 0
    try:
        with tarfile.open(fileobj=Heads(file), mode='r:') as tar:
            for member in tar:
                name = clean_name(member.name)
                if not name and not member.isdir():
                    raise ValueError(f'its member {shown(member.name)} leaves the folder')
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise ValueError(f'its member {shown(member.name)} is neither file nor folder')
                if member.size < 0 or member.offset_data + member.size > total:
                    raise ValueError(
                        f'its member {shown(member.name)} claims {member.size} bytes, and the whole shard has {total}')
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isreg():
                    yield name, Span(member.offset_data, member.size)
    except (tarfile.TarError, UnicodeError, OverflowError, RecursionError) as error:
        raise ValueError(f'it is not a whole tar file ({cut(str(error))})') from error
    # tarfile takes any damage behind the first member for the end.
    file.seek(end)
    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise ValueError('it is not a whole tar file (its end is missing)')


class Heads(io.RawIOBase):
    """A file to read heads from: a size that a head claims is not allocated."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEAD_BYTES:
            raise ValueError(f'a head claims {size} bytes, and {MAX_HEAD_BYTES} at most are read')
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


# ---- labels


def pack_labels(labels: Labels) -> bytes:
    """A sample's labels as JSON: `present`, and of `unknown` and `absent` the one that is not all the rest."""
    content: dict[str, object] = {'name': labels.name, 'present': _with_value(labels, 1)}
    if labels.fill == -1:
        content['absent'] = _with_value(labels, 0)
    elif unknown := _with_value(labels, -1):
        content['unknown'] = unknown
    return json.dumps(content, separators=(',', ':')).encode()


def _with_value(labels: Labels, value: int) -> list[str]:
    return [name for name, label in labels.listed.items() if label == value]


def parse_labels(data: bytes, suffix: str, label_names: Sequence[str] | None) -> Labels:
    """What `pack_labels` has packed, or another program.

    Args:
        data: A JSON object with `present` and at most one of `unknown` and `absent`; or with `labels`, a list of those
            that are present; or a number in digits.
        suffix: '.json' or '.cls', for the number.
        label_names: What numbers mean; None if that is not known.

    Raises:
        ValueError: If it is something else. The message goes behind the sample's name.
    """
    if suffix == '.cls':
        number = data.strip()
        if not number.isdigit() or len(number) > MAX_DIGITS:
            raise ValueError(f'its class must be a number in digits, got {shown(data[:20])}')
        if label_names is None:
            raise ValueError('its label is the number of a class; give labels, the names in the order of the numbers')
        if int(number) >= len(label_names):
            raise ValueError(f'its class must be below {len(label_names)}, the number of labels, got {int(number)}')
        return Labels('', {label_names[int(number)]: 1}, 0)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'its labels are no JSON ({cut(str(error))})') from error
    if not isinstance(content, dict):
        raise ValueError(f'its labels must be a JSON object, got {shown(content)}')
    present = 'present' if 'present' in content else 'labels'
    if 'unknown' in content and 'absent' in content:
        raise ValueError("its labels must have one of 'unknown' and 'absent', all others being the other; got both")
    listed: dict[str, int] = {}
    for key, value in {present: 1, 'absent': 0, 'unknown': -1}.items():
        names = content.get(key, None if key == present else [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'its labels must have {key!r}, a list of names, got {shown(names)}')
        for name in names:
            if listed.setdefault(name, value) != value:
                raise ValueError(f'its label {shown(name)} is in two lists')
    name = content.get('name', '')
    return Labels(name if isinstance(name, str) else '', listed, -1 if 'absent' in content else 0)


# ---- writing


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file; equal ones give equal bytes, on any machine and at any time."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
