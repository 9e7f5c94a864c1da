"""Folders that appear whole or not at all."""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['whole_folder']


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
