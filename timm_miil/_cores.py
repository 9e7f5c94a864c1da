"""How many processes can work at the same time."""
import os

__all__ = ['count_cores']


def count_cores() -> int:
    """Processor cores that this process may use, which on a shared machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
