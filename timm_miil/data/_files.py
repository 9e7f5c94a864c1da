"""Files that a list names: whether their names stay inside the data folder, and whether they are there."""
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from timm_miil._checks import shown

__all__ = [
    'NAMED_AT_MOST', 'clean_name', 'few', 'find_folder', 'find_missing', 'is_folder', 'keep_present', 'read_lines',
    'refuse_missing',
]

NAMED_AT_MOST = 5
STAT_AT_MOST = 64  # of one folder's files; more are looked up in its listing, made once

_logger = logging.getLogger(__name__)


def few(words: Iterable[str], total: int) -> str:
    """The first of some words and how many more there are."""
    first = [word for word, _ in zip(words, range(NAMED_AT_MOST))]
    return ', '.join(first) + (f' and {total - len(first)} more' if total > len(first) else '')


def clean_name(name: str) -> str:
    """A relative path in its shortest form, or '' if it is none or leaves its folder."""
    odd = '..' in name or './' in name or '//' in name or '\\' in name or ':' in name or '\0' in name
    if not odd and name and name[0] not in '/.' and name[-1] != '/':
        return name
    # Backslashes and drives are refused on any system: a list that is safe here shall be safe there.
    parts = PurePosixPath(name.replace('\\', '/')).parts
    if not parts or parts[0].startswith('/') or '..' in parts or ':' in parts[0] or '\0' in name:
        return ''
    return PurePosixPath(name).as_posix()


def find_folder(data_dir: Path, image_dir: str, split: str, usual: Sequence[str]) -> Path:
    """The folder of a split's pictures.

    Args:
        data_dir: The data set's folder.
        image_dir: Below it, with '{split}' for the split's name; '' for the first there is of the usual ones.
        split: Its name.
        usual: Such as '{split}' and 'images/{split}'.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folders = [data_dir / name.replace('{split}', split) for name in ((image_dir,) if image_dir else usual)]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f'no folder with the pictures of split {split!r}, which is {" or ".join(map(str, folders))}; give image_dir, '
        f'a folder relative to {data_dir}.')


def is_folder(entry: 'os.DirEntry[str]') -> bool:
    """Whether an entry of a folder is a folder too, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_missing(folder: Path, names: Sequence[str]) -> list[int]:
    """Which of the files, relative to a folder, are not there. A million take seconds: each folder is listed once."""
    by_parent: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        by_parent[name.rpartition('/')[0]].append(index)
    missing = []
    for parent, indices in by_parent.items():
        listed = _list_files(folder / parent) if len(indices) > STAT_AT_MOST else frozenset()
        missing += [
            index for index in indices if names[index].rpartition('/')[2] not in listed
            # The system's own word counts: its names may ignore case, or the forms of accents.
            and not (folder / names[index]).is_file()]
    return sorted(missing)


def refuse_missing(folder: Path, names: Sequence[str], listed_in: object, what: str = 'pictures') -> None:
    """Raise FileNotFoundError, with the first few names, unless all files are there."""
    if missing := find_missing(folder, names):
        raise FileNotFoundError(_missing_words(folder, names, listed_in, missing, what) + '.')


def keep_present(folder: Path, names: Sequence[str], listed_in: object) -> list[int]:
    """Which of the files are there; a warning is logged of the others.

    Raises:
        FileNotFoundError: If none is.
    """
    missing = frozenset(find_missing(folder, names))
    if missing:
        words = _missing_words(folder, names, listed_in, sorted(missing), 'pictures')
        if len(missing) == len(names):
            raise FileNotFoundError(f'{words}.')
        _logger.warning('%s; they are left out.', words)
    return [index for index in range(len(names)) if index not in missing]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without spaces round them; empty ones at the end do not count.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not UTF-8.
    """
    try:
        return [line.strip() for line in path.read_text(encoding='utf-8-sig').rstrip().split('\n')]
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} must be a text file in UTF-8, and its byte {error.start} is not; save it as UTF-8.') from None


def _missing_words(
        folder: Path, names: Sequence[str], listed_in: object, missing: Sequence[int], what: str) -> str:
    listed = few((shown(names[index]) for index in missing), len(missing))
    return f'{len(missing)} of {len(names)} {what} of {listed_in} are missing in {folder}: {listed}'


def _list_files(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:  # then none of its files is there
        return frozenset()
