"""One process at a time in a block, whatever folder it works in."""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is there, and not in its __all__

__all__ = ['locked']


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, seconds: float | None, words: str = '') -> Iterator[None]:
    """Keep other processes out of the same block; it ends with the process, however that ends.

    Args:
        path: File that stands for the lock; it is made, and stays.
        seconds: To wait for another process; None waits for ever.
        words: Of the error.

    Raises:
        BlockingIOError: If another process is still in the block.
        OSError: If the file cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(Path(path), timeout=seconds))
        except TimeoutError as error:
            raise BlockingIOError(words) from error
        yield
