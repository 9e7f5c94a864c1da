"""Finding picture files and reading any of them as 8-bit RGB."""
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from PIL import Image

from timm_miil._checks import check_paths
from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import images
from timm_miil.data.images import IMAGE_SUFFIXES

__all__ = ['IMAGE_SUFFIXES', 'find_images', 'load_image']

# The folders from a root down to one folder, innermost first, as (device, inode) pairs.
_Chain = tuple[tuple[int, int], '_Chain'] | None


def find_images(
        paths: Iterable[str | os.PathLike[str]],
        *,
        exclude: Collection[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """List pictures: files as given, folders with everything below them.

    A folder gives its files with a suffix in `IMAGE_SUFFIXES` (in any case) by name, then its subfolders by
    name. Names that start with a dot are passed over; symbolic links are followed, but never back into a folder
    that is being listed. A file named in `paths` is taken whatever its suffix. A folder that cannot be listed
    comes out itself, so that reading it reports why.

    Args:
        paths: Files and folders, relative or absolute.
        exclude: Folders not to enter, such as one that is being written.

    Returns:
        An iterator that holds the names of one folder (and of the folders still to list) at a time.

    Raises:
        FileNotFoundError: Before anything is listed, if one of `paths` does not exist.
        TypeError: If `paths` is a single path.
    """
    check_paths(paths=paths)
    roots = [Path(path) for path in paths]
    for root in roots:
        try:
            root.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f'no such file or folder: {str(root)!r}.') from None
    excluded = {_identity(folder) for folder in exclude if os.path.isdir(folder)}
    return (path for root in roots for path in _walk(root, excluded))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as 8-bit RGB, upright; `timm_miil.data.load_image` says what becomes of odd ones.

    Args:
        path: The file.

    Returns:
        A picture of mode 'RGB' without metadata, detached from the file.

    Raises:
        PredictionError: If the file is missing, unreadable, empty, damaged, too large or no picture; the
            message is one line with path and reason.
    """
    try:
        return images.load_image(path)
    except ImageError as error:
        raise PredictionError(str(error)) from error


def _walk(root: Path, excluded: set[tuple[int, int]]) -> Iterator[Path]:
    # A stack, not recursion: folders nest deeper than Python's calls may.
    stack: list[tuple[Path, _Chain]] = [(root, None)]
    if not root.is_dir():
        stack.clear()
        yield root
    while stack:
        folder, parents = stack.pop()
        try:
            identity = _identity(folder)
            if identity in excluded or _is_in(identity, parents):
                continue
            files, folders = _list_folder(folder)
        except OSError:
            yield folder
            continue
        for name in files:
            yield folder / name
        stack.extend((folder / name, (identity, parents)) for name in reversed(folders))


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the pictures and of the folders in a folder."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            if _is_dir(entry):
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                files.append(entry.name)
    return sorted(files), sorted(folders)


def _is_dir(entry: 'os.DirEntry[str]') -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_in(identity: tuple[int, int], chain: _Chain) -> bool:
    while chain is not None:
        head, chain = chain
        if head == identity:
            return True
    return False
