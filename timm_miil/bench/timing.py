"""Contestants take turns on one clock.

On a shared machine the load drifts, so every round runs each contestant once, in a shuffled order, and contestants
are compared within rounds: `ratio` is the median over rounds of a contestant's time by the first one's.
"""
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = [
    'Clock', 'Run', 'clock_of', 'clocks_of', 'compare', 'current', 'device_events', 'device_work', 'itself',
    'processor', 'quartiles', 'wall']

CYCLES_A_SECOND = 2e9  # of a GPU, at most

Run = Callable[[], object]
Clock = Callable[[Run], float]


def wall(run: Run) -> float:
    """Seconds on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def processor(run: Run) -> float:
    """Seconds of processor time of this process, for work of milliseconds that a shared machine interrupts."""
    start = time.process_time()
    run()
    return time.process_time() - start


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """While it is entered, a CUDA device is the one whose events and streams torch makes; of a CPU, nothing."""
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()


def device_events(run: Run, *, waits: bool = True) -> float:
    """Seconds from an idle CUDA device to the end of its work: small work waits for the host to launch it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if waits:
        torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """What times work there: the processor's time of one thread, the wall's of more, or the device's own events."""
    if device.type == 'cpu':
        return processor if torch.get_num_threads() == 1 else wall
    return device_events


def device_work(run: Run) -> float:
    """Seconds of the CUDA device's own work: it is kept busy until the host has queued the run.

    As in training, where the host is ahead. A run that waits for the device, or launches more than its queue holds,
    about a thousand kernels, is timed with the host's part of that.
    """
    start = time.perf_counter()
    run()
    torch.cuda._sleep(int(2 * (time.perf_counter() - start) * CYCLES_A_SECOND))
    return device_events(run, waits=False)


def clocks_of(device: torch.device) -> dict[str, Clock]:
    """Name -> clock, for small work there: on an accelerator from idle, and the device's part alone."""
    return {'processor': processor} if device.type == 'cpu' else {'from idle': device_events, 'queued': device_work}


def itself(run: Callable[[], float]) -> float:
    """The seconds that the contestant returns: it has a clock of its own, as a child process may."""
    return run()


def compare(
        contestants: Mapping[str, Run],
        *,
        repeats: int,
        warmup: int = 1,
        clock: Clock = wall,
        **case: object,
) -> list[dict[str, object]]:
    """Time contestants in turns.

    Args:
        contestants: Name -> what to run; the first is the one that ratios refer to.
        repeats: Measured rounds, at least 2.
        warmup: Rounds before them that are not measured.
        clock: Gives the seconds of one run.
        **case: What the contestants have in common, such as `batch_size=64`; a column each.

    Returns:
        One row a contestant: the case, its name, repeats, median, first and third quartile in milliseconds, and the
        median and quartiles of its ratio to the first contestant within a round.
    """
    order = random.Random(0)
    rounds: list[dict[str, float]] = []
    for _ in range(warmup + repeats):
        turns = order.sample(list(contestants), len(contestants))
        rounds.append({name: clock(contestants[name]) for name in turns})
    first, rows = next(iter(contestants)), []
    for name in contestants:
        times = quartiles([1e3 * taken[name] for taken in rounds[warmup:]])
        ratios = quartiles([taken[name] / taken[first] for taken in rounds[warmup:]])
        rows.append({
            **case, 'contestant': name, 'repeats': repeats,
            'median_ms': times[1], 'q1_ms': times[0], 'q3_ms': times[2],
            'ratio': ratios[1], 'ratio_q1': ratios[0], 'ratio_q3': ratios[2],
        })
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile of at least two numbers, to four digits."""
    return [float(f'{value:.4g}') for value in statistics.quantiles(values, n=4, method='inclusive')]
