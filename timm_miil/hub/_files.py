"""Files of a model folder as the Hub knows them: by size and hash."""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ['LocalFile', 'differing', 'is_same', 'read_file']

BLOCK = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file here: its SHA-256 is what the Hub has of large files, its git hash what it has of small ones."""
    path: Path
    size: int
    sha256: str
    git_oid: str


def read_file(path: Path) -> LocalFile:
    """Size and hashes of a file.

    Raises:
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % size)
    with open(path, 'rb') as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            git.update(block)
    return LocalFile(path, size, sha256.hexdigest(), git.hexdigest())


def is_same(file: LocalFile, remote: Any) -> bool:
    """Whether the Hub's facts of a file, None if it has none, are those of this one."""
    if remote is None:
        return False
    return bool(remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.git_oid)


def differing(files: Mapping[str, LocalFile], remote: Mapping[str, Any]) -> dict[str, LocalFile]:
    """The files that are not on the Hub as they are here."""
    return {name: file for name, file in files.items() if not is_same(file, remote.get(name))}
