"""Files and folders that appear whole or not at all."""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ['whole_file', 'whole_folder', 'write_file']


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that takes its name only when it is complete.

    Yields a fresh folder beside `target`; when the block ends well it becomes `target`, in place of a folder
    of that name, whose contents are deleted. When the block raises, `target` is as it was.

    Args:
        target: The folder to make; its parents are made as needed.

    Raises:
        OSError: If the folder cannot be made or put in place.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent))
    try:
        fresh = holder / 'fresh'
        fresh.mkdir()
        yield fresh
        old = holder / 'old'
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(fresh, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str], *, durable: bool = False) -> Iterator[BinaryIO]:
    """Write into a file that takes its name only when it is complete.

    Yields a fresh file beside `target`; when the block ends well it becomes `target`, in place of a file of that
    name. When the block raises, `target` is as it was.

    Args:
        target: The file to make, in a folder that is there.
        durable: Whether to wait until it is on the disk, so that a machine that fails has all of it or none.

    Raises:
        OSError: If it cannot be written or put in place.
    """
    target = Path(target).absolute()
    number, fresh = tempfile.mkstemp(prefix=f'.{target.name}-', dir=target.parent)
    try:
        with open(number, 'wb') as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # A temporary file is its owner's alone; this one shall be as readable as its neighbours.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(fresh, 0o666 & ~mask)
        os.replace(fresh, target)
    except BaseException:
        os.unlink(fresh)
        raise
    if durable and hasattr(os, 'O_DIRECTORY'):  # its name, too
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(target: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file that takes its name only when it is complete.

    Args:
        target: The file to make, in a folder that is there.
        content: Text goes in as UTF-8.

    Raises:
        OSError: If it cannot be written; a file of that name is then as it was.
    """
    with whole_file(target) as file:
        file.write(content.encode() if isinstance(content, str) else content)
