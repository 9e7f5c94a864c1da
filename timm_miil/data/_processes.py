"""Jobs in processes of their own, which end with the one that started them."""
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

__all__ = ['run_jobs']

Result = TypeVar('Result')


def run_jobs(jobs: Iterable[Callable[[], Result]], workers: int) -> Iterator[tuple[int, Result]]:
    """Run jobs, some at a time, and give the number and the result of each when it is finished.

    The first error ends it: what has begun is finished, what has not is not begun.

    Args:
        jobs: Functions that can be pickled; taken as they are needed.
        workers: Processes; below 2 the jobs run here.

    Raises:
        RuntimeError: If a process is killed.
    """
    if workers < 2:
        yield from ((number, job()) for number, job in enumerate(jobs))
        return
    running: dict[Future[Result], int] = {}
    with ProcessPoolExecutor(workers, initializer=_prepare_process) as pool:
        try:
            for number, job in enumerate(jobs):
                running[pool.submit(job)] = number
                if len(running) >= 2 * workers:  # enough to keep all busy, and not all jobs at once
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f'one of {workers} processes was ended from outside, as happens when memory runs out; run again, with '
                f'fewer workers.') from error
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _prepare_process() -> None:
    # Ctrl-C is for the process that was started; this one finishes its job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)
