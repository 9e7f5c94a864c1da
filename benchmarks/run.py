"""The harness of every benchmark: contestants take turns, and a row says what was measured where.

On a shared machine the load drifts, so every round runs each contestant once, in a shuffled order, and contestants
are compared within rounds: `ratio` is the median over rounds of a contestant's time by the first one's.

A question is one file beside this one:

    rows = compare({'plain': plain, 'fused': fused}, repeats=50, batch_size=64)
    save('losses', rows)
"""
import csv
import datetime
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch

__all__ = [
    'RESULTS', 'Clock', 'Run', 'clock_of', 'clocks_of', 'compare', 'device_events', 'device_work', 'environment',
    'itself', 'place', 'processor', 'save', 'wall']

RESULTS = Path(__file__).resolve().parent / 'results'
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
    """What times small work there: the processor's time, or the device's own events."""
    return processor if device.type == 'cpu' else device_events


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


def place(device: torch.device) -> str:
    """What a file of results is called after: 'cpu', or the accelerator's name as in 'nvidia-h100-80gb-hbm3'."""
    return 'cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device).lower().replace(' ', '-')


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
        times = _quartiles([1e3 * taken[name] for taken in rounds[warmup:]])
        ratios = _quartiles([taken[name] / taken[first] for taken in rounds[warmup:]])
        rows.append({
            **case, 'contestant': name, 'repeats': repeats,
            'median_ms': times[1], 'q1_ms': times[0], 'q3_ms': times[2],
            'ratio': ratios[1], 'ratio_q1': ratios[0], 'ratio_q3': ratios[2],
        })
    return rows


def _quartiles(values: list[float]) -> list[float]:
    return [float(f'{value:.4g}') for value in statistics.quantiles(values, n=4, method='inclusive')]


def environment() -> dict[str, object]:
    """Where and when: processor, accelerator, threads, versions, commit, command, day."""
    names = [
        line.partition(':')[2].strip() for line in _read('/proc/cpuinfo').splitlines() if line.startswith('model name')]
    return {
        'cpu': names[0] if names else platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else '',
        'driver': _driver(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'commit': _commit(),
        'command': ' '.join(['python', os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]),
        'date': datetime.date.today().isoformat(),
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding='utf-8') if os.path.exists(path) else ''


def _driver() -> str:
    """The NVIDIA driver's version, '' where there is none."""
    line = next(iter(_read('/proc/driver/nvidia/version').splitlines()), '')
    return next((word for word in line.split() if word[:1].isdigit() and '.' in word), '')


def _commit() -> str:
    """The commit the code is at; '-dirty' when tracked files differ from it, '' outside a repository."""
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--exclude=*'], cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip()


def save(question: str, rows: list[dict[str, object]], folder: Path = RESULTS, *, quiet: bool = False) -> Path:
    """Write `results/<question>.csv`, each row with the environment, and print what was measured unless `quiet`."""
    stamp = environment()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path = folder / f'{question}.csv'
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, [*columns, *stamp], lineterminator='\n')
        writer.writeheader()
        writer.writerows(row | stamp for row in rows)
    for row in () if quiet else rows:
        print(*(f'{column}={value}' for column, value in row.items()))
    return path
