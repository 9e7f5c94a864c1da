"""The index of a split's shards: which files there are, whole or broken, and what they show together."""
import dataclasses
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from timm_miil._atomic import write_file
from timm_miil._checks import cut, shown
from timm_miil.data._files import few, find_missing

__all__ = [
    'LabelCounts', 'Shard', 'ShardIndex', 'check_split_name', 'find_indices', 'hash_file', 'index_path',
    'read_record',
]

SUFFIX = '.shards.json'
FORMAT = 1
PLAIN_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.@+=-]*')


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        file: Its name in the folder of the index.
        images: Pictures in it.
        bytes: Its size.
        sha256: Of its bytes, in hexadecimal digits.
    """
    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LabelCounts:
    """One label, and in how many pictures it is present, absent and unknown."""
    name: str
    present: int
    absent: int
    unknown: int


@dataclass(frozen=True)
class ShardIndex:
    """What `<split>.shards.json` says.

    Args:
        split: Name of the split.
        source: Hash of what the shards were made from, which tells whether they are up to date; '' if unknown.
        labels: C labels, in the order of the targets.
        shards: In the order of the pictures.
    """
    split: str
    source: str
    labels: tuple[LabelCounts, ...]
    shards: tuple[Shard, ...]

    @functools.cached_property  # a stream asks for it at every picture, of up to 11,221 labels
    def label_names(self) -> tuple[str, ...]:
        """C names."""
        return tuple(label.name for label in self.labels)

    @property
    def num_images(self) -> int:
        """Pictures in all shards."""
        return sum(shard.images for shard in self.shards)

    def write(self, directory: Path) -> Path:
        """Write the index into the shards' folder."""
        content = {'format': FORMAT, 'images': self.num_images, **dataclasses.asdict(self)}
        path = index_path(directory, self.split)
        write_file(path, json.dumps(content, indent=1) + '\n')
        return path

    @classmethod
    def read(cls, directory: Path, split: str) -> 'ShardIndex':
        """Read and check the index; the shards are not looked at.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no such index.
        """
        path = index_path(directory, split)
        if not path.exists():
            raise FileNotFoundError(
                f'{directory} has no shards of split {shown(split)}: {path.name} is missing; write_shards makes them, '
                f'and index_shards makes it for tar files of another program.')
        content = _load(path)
        _check(isinstance(content, dict) and content.get('format') == FORMAT, path, f"'format' {FORMAT}")
        fields = {name: content.get(name) for name in ('split', 'source', 'labels', 'shards')}
        _check(fields['split'] == split, path, f"'split' {shown(split)}")
        _check(isinstance(fields['source'], str), path, "'source', a string")
        index = cls(
            split, content['source'], _rows(LabelCounts, fields['labels'], path, 'labels'),
            _rows(Shard, fields['shards'], path, 'shards'))
        names = [shard.file for shard in index.shards]
        _check(all(map(PLAIN_NAME.fullmatch, names)), path, 'shards whose names are plain, without folders')
        _check(len(set(names)) == len(names), path, 'shards with names of their own')
        _check(len(set(index.label_names)) == len(index.labels) > 0, path, 'labels with names of their own')
        _check(content.get('images') == index.num_images > 0, path, "'images', the sum of those of the shards")
        return index

    def check_files(self, directory: Path) -> None:
        """Raise unless all shards are there with the sizes they were written with.

        Raises:
            FileNotFoundError: If shards are missing; the first few are named.
            ValueError: If shards have another size.
        """
        names = [shard.file for shard in self.shards]
        path, again = index_path(directory, self.split), 'bring them back or write them again'
        if missing := find_missing(directory, names):
            listed = few((names[number] for number in missing), len(missing))
            raise FileNotFoundError(f'{len(missing)} of {len(names)} shards of {path} are missing: {listed}; {again}.')
        sizes = [os.stat(directory / name).st_size for name in names]
        if broken := [
                f'{shard.file} ({size} bytes instead of {shard.bytes})'
                for shard, size in zip(self.shards, sizes) if size != shard.bytes]:
            raise ValueError(
                f'{len(broken)} of {len(names)} shards of {path} are broken: {few(broken, len(broken))}; {again}.')


def index_path(directory: Path, split: str) -> Path:
    """Where the index of a split lies."""
    return directory / f'{split}{SUFFIX}'


def read_record(path: Path) -> Shard:
    """One shard as a JSON file of its own describes it.

    Raises:
        ValueError: If it does not.
    """
    return _rows(Shard, [_load(path)], path, 'shards')[0]


def find_indices(directory: Path) -> tuple[str, ...]:
    """The splits that have an index, sorted."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in directory.glob(f'[!.]*{SUFFIX}')))


def check_split_name(split: str) -> None:
    """Raise ValueError unless files can be called by the split."""
    if not PLAIN_NAME.fullmatch(split):
        raise ValueError(f'split must be a plain word of letters, digits and _ - . @ + =, got {shown(split)}.')


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a JSON file: {cut(str(error))}.') from error


Row = TypeVar('Row', LabelCounts, Shard)


def _rows(kind: type[Row], rows: Any, path: Path, table: str) -> tuple[Row, ...]:
    """The rows of a table, every field of its type and no number below 0."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    _check(isinstance(rows, list), path, f'a list {table!r}')
    for number, row in enumerate(rows):
        good = isinstance(row, dict) and row.keys() == types.keys() and all(
            type(row[name]) is kind and (kind is str or row[name] >= 0) for name, kind in types.items())
        _check(good, path, f'{table}[{number}] with exactly {", ".join(types)}')
    return tuple(kind(**row) for row in rows)


def _check(good: bool, path: Path, words: str) -> None:
    if not good:
        raise ValueError(f'{path} must have {words}; it is no index of shards, or a damaged one.')
