"""Groups of cases measured in turns: a row each, whatever happens."""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from timm_miil._checks import check_positive, cut
from timm_miil.bench.cases import Case
from timm_miil.bench.contestants import (
    Optimize, UnsupportedCase, build_model, build_run, compiled_or_failed, free_memory, is_out_of_memory)
from timm_miil.bench.environment import environment
from timm_miil.bench.journal import Journal
from timm_miil.bench.roofline import (
    DTYPES, TRAINING_FACTOR, Ceilings, Cost, count_cost, measure_ceilings, roofline_seconds)
from timm_miil.bench.timing import Clock, Run, clock_of, compare, device_work

__all__ = ['COLUMNS', 'BenchResult', 'find_largest_batch', 'measure_group', 'measure_groups', 'search_batch']

COLUMNS = (
    'phase', 'model', 'variant', 'precision', 'layout', 'mode', 'image_size', 'batch_size', 'status', 'note',
    'images_per_second', 'median_ms', 'q1_ms', 'q3_ms', 'repeats', 'baseline', 'ratio', 'ratio_q1', 'ratio_q3',
    'peak_mib', 'gflops_per_image', 'mib_per_image', 'roofline_ms', 'of_roofline',
    'copy_gb_s', 'product_tflops')
REPEATS = 5, 50  # least and most
MIB = 2 ** 20
Row = dict[str, object]


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Attributes:
        rows: One a case: `COLUMNS`, then those of `environment`.
        left_out: Cases that there was no time for.
    """

    rows: list[Row]
    left_out: list[Case]


def measure_groups(
        groups: Sequence[Sequence[Case]],
        device: torch.device,
        *,
        journal: Journal | None = None,
        optimize: Optimize | None = None,
        minutes: float | None = None,
        seconds: float = 5.0,
        ceilings: Ceilings | None = None,
        on_row: Callable[[Row], None] | None = None,
) -> BenchResult:
    """Measure groups one after the other.

    Args:
        groups: Of `plan_groups`.
        device: Where.
        journal: Gets what this run measures. A group that an earlier one has measured, against the same baseline and
            without a failure or a lack of memory, is not measured again.
        optimize: Makes the 'optimized' variant; None makes such cases rows that say so.
        minutes: No group is begun after this time; None for no limit.
        seconds: What a group's rounds shall take together; there are 5 to 50 of them.
        ceilings: The device's limits; None measures them.
        on_row: Called with each row once its group is done.

    Example:
        >>> from timm_miil.bench import plan_groups
        >>> groups = plan_groups(['resnet50'], layouts=('nchw', 'nhwc'), batch_sizes=(1, 64))
        >>> result = measure_groups(groups, torch.device('cpu'), minutes=10)    # doctest: +SKIP
        >>> result.rows[1]['ratio']                                             # doctest: +SKIP
        0.8928
    """
    start, stamp = time.monotonic(), environment(device)
    rows: list[Row] = []
    left_out: list[Case] = []
    for group in groups:
        done = _find_group(journal, group, stamp) if journal else []
        if not done:
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                left_out += group
                continue
            if ceilings is None:
                precisions = 'fp32', 'bf16', *(('tf32',) if device.type == 'cuda' else ())
                ceilings = measure_ceilings(device, precisions=precisions, seconds=min(seconds, 1.0))
            done = [row | stamp for row in measure_group(
                group, device, ceilings=ceilings, optimize=optimize, seconds=seconds)]
            if journal:
                journal.add(done)
        for row in done if on_row else ():
            on_row(row)  # type: ignore[misc]
        rows += done
    return BenchResult(rows, left_out)


def _find_group(journal: Journal, group: Sequence[Case], stamp: Row) -> list[Row]:
    """The rows of a group, or none if one must be measured: their ratios are of the same rounds."""
    found = {case: journal.find(case.columns, stamp) for case in group}
    rows = {case: row for case, row in found.items() if row and row['status'] in ('ok', 'unsupported')}
    measured = [case for case, row in rows.items() if row['status'] == 'ok']
    is_whole = len(rows) == len(group) and all(
        rows[case]['baseline'] in (_baseline(measured[0], case), case.form) for case in measured)  # or by itself
    return list(rows.values()) if is_whole else []


def measure_group(
        cases: Sequence[Case],
        device: torch.device,
        *,
        ceilings: Ceilings,
        optimize: Optimize | None = None,
        seconds: float = 5.0,
) -> list[Row]:
    """Measure cases in turns, such as the forms of one network; all are in memory together.

    One that does not fit beside the others takes turns with the first alone, or is measured by itself.

    Args:
        cases: The first of those that run is the baseline. All have one batch size.
        device: Where.
        ceilings: The device's limits.
        optimize: Makes the 'optimized' variant.
        seconds: What the rounds shall take together.

    Returns:
        One row a case. Its status is 'ok', 'out_of_memory', 'unsupported' or 'failed'; `note` says why, or how long
        the first run took where that compiles.
    """
    with compiled_or_failed(device):
        rows = _measure_together(cases, device, optimize, seconds)
        for case in cases:
            for fewer in ([case],) if case == cases[0] else ([cases[0], case], [case]):
                if rows[case]['status'] == 'out_of_memory' and len(fewer) < len(cases):
                    rows[case] = _measure_together(fewer, device, optimize, seconds)[case]
    _compare_with_roofline(rows, ceilings)
    return list(rows.values())


def _measure_together(
        cases: Sequence[Case], device: torch.device, optimize: Optimize | None, seconds: float) -> dict[Case, Row]:
    rows: dict[Case, Row] = {
        case: dict.fromkeys(COLUMNS, '') | case.columns | {'status': 'ok'} for case in cases}
    runs: dict[Case, Run] = {}
    clock = _clock(device, cases[0].batch_size)
    taken = 0.0  # by a round
    for case in cases:
        try:
            before = torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
            start = time.perf_counter()
            runs[case] = _first_run(case, device, optimize)
            if case.mode == 'compile':
                rows[case]['note'] = f'first run {time.perf_counter() - start:.1f} s'
            start = time.perf_counter()
            clock(runs[case])
            taken += time.perf_counter() - start
            if device.type == 'cuda':  # the first training step had no momentum yet
                rows[case]['peak_mib'] = round((torch.cuda.max_memory_allocated(device) - before) / MIB, 1)
        except Exception as error:  # a network, a compiler, a driver may raise anything: a row says what
            runs.pop(case, None)
            rows[case] |= _failure(error)
        free_memory(device)
    if runs:
        repeats = min(max(int(seconds / max(taken, 1e-9)), REPEATS[0]), REPEATS[1])
        try:
            measured = compare({repr(case): run for case, run in runs.items()}, repeats=repeats, clock=clock)
            for case, row in zip(runs, measured, strict=True):
                rows[case] |= _figures(row, case, next(iter(runs)))
        except Exception as error:  # as above
            for case in runs:
                rows[case] |= _failure(error)
        runs.clear()
        torch.compiler.reset()
        free_memory(device)
    return rows


def _first_run(case: Case, device: torch.device, optimize: Optimize | None) -> Run:
    run = build_run(case, device, optimize=optimize)
    run()
    _wait(device)
    return run


def _failure(error: Exception) -> Row:
    kind = 'unsupported' if isinstance(error, UnsupportedCase) else 'failed'
    return {
        'status': 'out_of_memory' if is_out_of_memory(error) else kind,
        'note': cut(f'{type(error).__name__}: {error}' if kind == 'failed' else str(error), 200)}


def _clock(device: torch.device, batch_size: int) -> Clock:
    """A single image is timed from an idle device, a batch as queued work."""
    return clock_of(device) if device.type == 'cpu' or batch_size == 1 else device_work


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _figures(measured: Row, case: Case, first: Case) -> Row:
    names = 'median_ms', 'q1_ms', 'q3_ms', 'repeats', 'ratio', 'ratio_q1', 'ratio_q3'
    speed = 1e3 * case.batch_size / float(str(measured['median_ms']))
    return {name: measured[name] for name in names} | {
        'images_per_second': float(f'{speed:.4g}'),
        'baseline': _baseline(first, case)}


def _baseline(first: Case, case: Case) -> str:
    return first.form if first.model == case.model else f'{first.model} {first.form}'


def _compare_with_roofline(rows: dict[Case, Row], ceilings: Ceilings) -> None:
    costs: dict[tuple[object, ...], Cost | str] = {}
    for case, row in rows.items():
        if row['status'] != 'ok':
            continue
        network = case.model, case.model_args, case.image_size
        if network not in costs:
            try:
                costs[network] = count_cost(build_model(case), torch.randn(1, 3, case.image_size, case.image_size))
            except Exception as error:  # as above
                costs[network] = cut(f'not counted: {error}', 200)
        cost = costs[network]
        if isinstance(cost, str):
            row['note'] = row['note'] or cost
        else:
            row |= _roofline(cost, case, ceilings, float(str(row['median_ms'])))


def _roofline(cost: Cost, case: Case, ceilings: Ceilings, median_ms: float) -> Row:
    passes = TRAINING_FACTOR if case.phase == 'training' else 1
    least_ms = 1e3 * roofline_seconds(cost, case, ceilings)
    image_bytes = 2 * cost.outputs * DTYPES[case.precision].itemsize * passes
    return {
        'gflops_per_image': float(f'{cost.flops * passes / 1e9:.4g}'),
        'mib_per_image': float(f'{image_bytes / MIB:.4g}'),
        'roofline_ms': float(f'{least_ms:.4g}'), 'of_roofline': float(f'{least_ms / median_ms:.3g}'),
        'copy_gb_s': float(f'{ceilings.copy_gb_s:.4g}'),
        'product_tflops': float(f'{ceilings.product_tflops(case.precision):.4g}')}


def find_largest_batch(fits: Callable[[int], bool], *, limit: int) -> int:
    """The largest batch size that fits: doubled until one does not, then by bisection.

    Args:
        fits: Whether a batch size fits; a size below one that fits must fit too.
        limit: Sizes above it are not tried.

    Returns:
        0 where not even one image fits.

    Raises:
        ValueError: If the limit is below 1.

    Example:
        >>> find_largest_batch(lambda size: size <= 100, limit=4096)
        100
    """
    check_positive(limit=limit)
    good, bad = 0, limit + 1
    size = 1
    while size < bad:
        if fits(size):
            good, size = size, min(2 * size, limit) if size < limit else bad
        else:
            bad = size
    while bad - good > 1:
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def search_batch(case: Case, device: torch.device, *, limit: int, optimize: Optimize | None = None) -> Row:
    """The row of the largest batch of a case that memory holds.

    Args:
        case: Its batch size is not used.
        device: Where. On a CPU give a limit that its memory holds: systems differ in what they do beyond.
        limit: Sizes above it are not tried.
        optimize: Makes the 'optimized' variant.

    Returns:
        `note` says what the next size lacks, if it is not memory.

    Raises:
        ValueError: If the limit is below 1.
    """
    failures: dict[int, Row] = {}

    def fits(size: int) -> bool:
        try:
            _first_run(replace(case, batch_size=size), device, optimize)()  # and once more, with momentum
            _wait(device)
        except Exception as error:  # as above
            failures[size] = _failure(error)
        finally:
            torch.compiler.reset()
            free_memory(device)
        return size not in failures

    row: Row = dict.fromkeys(COLUMNS, '') | case.columns
    with compiled_or_failed(device):
        size = find_largest_batch(fits, limit=limit)
    if not size:
        return row | {'batch_size': 1} | failures[1]
    failure = failures.get(size + 1, {})
    note = f'largest batch of those up to {limit}'
    if failure and failure['status'] != 'out_of_memory':
        note = f"{size + 1}: {failure['note']}"
    return row | {'status': 'ok', 'batch_size': size, 'note': note}
