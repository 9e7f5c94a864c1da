"""Whether prepared pictures of ImageNet-21K-P are still those of the manifest."""
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from timm_miil._checks import check_not_negative, shown
from timm_miil._cores import count_cores
from timm_miil.data._in21k_synset import SPLITS
from timm_miil.data._processes import run_jobs

__all__ = ['MANIFEST_FILE', 'check_in21k']

MANIFEST_FILE = 'manifest.jsonl'


def check_in21k(
        out: str | os.PathLike[str],
        *,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Read every picture that `prepare_in21k` has made, and compare it with the manifest.

    Args:
        out: What `prepare_in21k` was given.
        workers: Processes; None for one a core, 0 for this one.
        on_progress: Called with how many class folders are done, and how many there are in all.

    Returns:
        What is wrong, a file or folder each, as in 'train/n01440764/1.jpg is missing'; nothing if all is well.

    Raises:
        FileNotFoundError: If there is no manifest.
        OSError: If something cannot be read.
        RuntimeError: If a process is killed.
        TypeError: If workers is no int.
        ValueError: If workers is below 0, or the manifest is none.
    """
    workers = count_cores() if workers is None else workers
    check_not_negative(workers=workers)
    out = Path(out)
    if not (out / MANIFEST_FILE).is_file():
        raise FileNotFoundError(f'{out} has no {MANIFEST_FILE}; prepare_in21k writes it at its end.')
    unlisted = {
        f'{split}/{name}' for split in SPLITS if (out / split).is_dir() for name in _listed(out / split)}
    total, problems = len(unlisted), []

    def jobs() -> Iterator[_FolderJob]:
        for folder, files in _folders(out / MANIFEST_FILE):
            unlisted.discard(folder)
            yield _FolderJob(out, folder, files)

    for number, (_, found) in enumerate(run_jobs(jobs(), workers), 1):
        problems += found
        if on_progress is not None:
            on_progress(number, max(total, number))
    return sorted([*problems, *(f'{name} is not in the manifest' for name in unlisted)])


def _folders(manifest: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each class folder, and the SHA-256 of each of its files."""
    with open(manifest, encoding='utf-8') as lines:
        entries = (_entry(manifest, number, line) for number, line in enumerate(lines, 1))
        for folder, files in itertools.groupby(entries, key=lambda entry: entry[0]):
            yield folder, {name: sha256 for _, name, sha256 in files}


def _entry(manifest: Path, number: int, line: str) -> tuple[str, str, str]:
    try:
        entry = json.loads(line)
        split, synset, name = entry['file'].split('/')
        if split in SPLITS and not {synset, name} & {'', '.', '..'}:
            return f'{split}/{synset}', name, str(entry['sha256'])
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f'{manifest}:{number} must have a file and its sha256, got {shown(line)}.')


def _listed(folder: Path) -> set[str]:
    """What is there; names with a dot in front are those of the system's own files, which no reader takes."""
    return {name for name in os.listdir(folder) if not name.startswith('.')}


@dataclass(frozen=True)
class _FolderJob:
    out: Path
    folder: str
    files: Mapping[str, str]

    def __call__(self) -> list[str]:
        path = self.out / self.folder
        there = _listed(path) if path.is_dir() else set()
        problems = [f'{self.folder}/{name} is missing' for name in self.files.keys() - there]
        problems += [f'{self.folder}/{name} is not in the manifest' for name in there - self.files.keys()]
        for name in self.files.keys() & there:
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != self.files[name]:
                problems.append(f'{self.folder}/{name} has other bytes')
        return problems
