"""`timm-miil bench`: how fast networks are here."""
import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import timm
import torch

import timm_miil  # noqa: F401  registers our networks
from timm_miil import bench, inference
from timm_miil._checks import check_positive, check_range, cut, nearest
from timm_miil.cli._device import parse_device
from timm_miil.cli._text import printable

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'measure how fast networks are here, against their plain eager form and the limits of the machine'

MODELS = ('mldecoder_tresnet_l', 'tresnet_l', 'resnet50')
CPU_MODELS = ('mldecoder_resnet50', 'resnet50')
SHOWN = (
    'model', 'phase', 'variant', 'precision', 'layout', 'mode', 'image_size', 'batch_size', 'status',
    'images_per_second', 'median_ms', 'ratio', 'peak_mib', 'of_roofline', 'note')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('models', nargs='*', metavar='MODEL', help='timm names; default: some of ours and of timm')
    for name, choices in (
            ('phase', bench.PHASES), ('variant', bench.VARIANTS), ('precision', bench.PRECISIONS),
            ('layout', bench.LAYOUTS), ('mode', bench.MODES)):
        parser.add_argument(f'--{name}', nargs='+', choices=choices, help='default: a choice for the device')
    parser.add_argument('--batch-size', type=int, nargs='+', help='default: a choice for the device')
    parser.add_argument('--image-size', type=int, nargs='+', help='pixels (default: 224)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')
    parser.add_argument('--output', type=Path, metavar='FILE.csv', help='write the rows; started again, it goes on')
    parser.add_argument('--against', type=Path, metavar='FILE.csv', help='compare with an earlier --output')
    parser.add_argument(
        '--fail-above', type=float, metavar='RATIO',
        help='exit with 1 if a case of --against is slower by more than this, beyond the spread')
    parser.add_argument('--full', action='store_true', help='all forms of a network and no limit of time')
    parser.add_argument('--minutes', type=float, default=10, help='begin no group after these (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=5, help='of the rounds of a group (default: %(default)s)')
    parser.add_argument(
        '--profile', action='store_true', help='instead, list the operators that take most time in each case')
    parser.add_argument(
        '--largest-batch', type=int, metavar='LIMIT',
        help='instead, search the largest batch of each case that memory holds, up to this')


def run(ns: argparse.Namespace) -> int:
    """Measure; 1 if a case failed, or is slower than --fail-above allows."""
    _check_flags(ns)
    _check_models(ns.models)
    before = _read_earlier(ns.against) if ns.against else []  # before the minutes: a wrong file is told at once
    device = parse_device(ns.device)
    if device.type not in ('cpu', 'cuda'):
        raise ValueError(f'--device must be the CPU or a CUDA device, whose clocks are known, got {str(device)!r}.')
    groups = _plan(ns, device.type == 'cuda')
    if ns.profile:
        return _profile(ns, device, groups)
    if ns.largest_batch is not None:
        return _search(ns, device, groups)
    journal = bench.Journal(f'{ns.output}.jsonl') if ns.output else None
    print('\t'.join(SHOWN))
    result = bench.measure_groups(
        groups, device, journal=journal, optimize=inference.optimize_for_inference,
        minutes=None if ns.full else ns.minutes, seconds=ns.seconds, on_row=_show)
    if result.left_out:
        _note(f'no time was left for {len(result.left_out)} cases; --minutes gives more.')
    if ns.output:
        bench.write_table(ns.output, result.rows)
        if journal and not result.left_out:
            journal.path.unlink(missing_ok=True)
    status = _compare(ns, before, result.rows)
    return int(status or any(row['status'] == 'failed' for row in result.rows))


def _check_flags(ns: argparse.Namespace) -> None:
    if ns.fail_above is not None and ns.against is None:
        raise ValueError('--fail-above needs --against, the table to compare with.')
    if ns.profile and ns.largest_batch is not None:
        raise ValueError('--profile and --largest-batch are two questions; ask one at a time.')
    if ns.against and (ns.profile or ns.largest_batch is not None):
        raise ValueError('--against compares times, which --profile and --largest-batch do not measure.')
    if ns.largest_batch is not None:
        check_positive(**{'--largest-batch': ns.largest_batch})
    for flag, value in (('--minutes', ns.minutes), ('--seconds', ns.seconds), ('--fail-above', ns.fail_above)):
        if value is not None:
            check_range(low=math.ulp(0.0), high=math.inf, **{flag: value})
    folder = ns.output.parent if ns.output else Path()
    if ns.output and (ns.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
        raise ValueError(f'--output must be a file in a folder that can be written to, got {str(ns.output)!r}.')


def _check_models(names: list[str]) -> None:
    for name in names:
        if ':' not in name and not timm.is_model(name):  # 'hf-hub:...' and 'local-dir:...' are no registered names
            raise ValueError(f'unknown model {name!r}; {nearest(name, timm.list_models())}')


def _read_earlier(path: Path) -> list[dict[str, str]]:
    try:
        rows = bench.read_table(path)
        bench.compare_tables(rows, [])
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'--against must be a table that --output wrote, got {str(path)!r}: {reason}') from error
    return rows


def _plan(ns: argparse.Namespace, is_cuda: bool) -> list[list[bench.Case]]:
    precisions: tuple[str, ...] = ('amp_bf16', 'bf16') if is_cuda else ('fp32',)
    modes: tuple[str, ...] = ('eager', 'compile') if is_cuda else ('eager',)
    layouts: tuple[str, ...] = ('nhwc',) if is_cuda and not ns.full else bench.LAYOUTS  # and nchw is the baseline's
    if ns.full:
        precisions = ('amp_bf16', 'bf16', 'tf32', 'fp32') if is_cuda else ('fp32', 'amp_bf16', 'bf16')
        modes = bench.MODES if is_cuda else ('eager', 'compile')
    return bench.plan_groups(
        ns.models or (MODELS if is_cuda else CPU_MODELS),
        phases=ns.phase or (bench.PHASES if ns.full else ('inference',)), variants=ns.variant or bench.VARIANTS,
        precisions=ns.precision or precisions, layouts=ns.layout or layouts, modes=ns.mode or modes,
        image_sizes=ns.image_size or (), batch_sizes=ns.batch_size or ((1, 256) if is_cuda else (1,)))


def _profile(ns: argparse.Namespace, device: torch.device, groups: list[list[bench.Case]]) -> int:
    rows, status = [], 0
    for case in (case for group in groups for case in group):
        try:
            found = bench.profile_case(case, device, optimize=inference.optimize_for_inference)
        except Exception as error:  # a network, a compiler, a driver may raise anything; the others are still profiled
            is_failure = not isinstance(error, bench.UnsupportedCase)
            _note(f'{case.model} {case.form}: ' + cut(f'{type(error).__name__}: {error}' if is_failure else str(error)))
            status |= is_failure
            continue
        print(f'{printable(case.model)} {case.phase} {case.form} {case.image_size} px, batch {case.batch_size}')
        for row in found:
            print(f"  {row['self_ms']:10} ms  {row['share']:.1%}  {row['calls']}x  {printable(row['operator'])}")
        rows += found
    _save(ns.output, rows, device)
    return status


def _search(ns: argparse.Namespace, device: torch.device, groups: list[list[bench.Case]]) -> int:
    rows = []
    print('\t'.join(SHOWN))
    for case in (case for group in groups for case in group):
        row = bench.search_batch(case, device, limit=ns.largest_batch, optimize=inference.optimize_for_inference)
        _show(row)
        rows.append(row)
    _save(ns.output, rows, device)
    return int(any(row['status'] == 'failed' for row in rows))


def _save(path: Path | None, rows: Iterable[dict[str, object]], device: torch.device) -> None:
    if path:
        stamp = bench.environment(device)
        bench.write_table(path, [row | stamp for row in rows])


def _compare(ns: argparse.Namespace, before: list[dict[str, str]], rows: list[dict[str, object]]) -> int:
    if not ns.against:
        return 0
    changes = bench.compare_tables(before, rows)
    for change in changes:
        words = 'slower' if change.is_slower else ''
        print(f"{change.ratio:.3f}\t{printable(' '.join(change.case))}\t{words}")
    _note(f'{len(changes)} cases compared, {sum(change.is_slower for change in changes)} slower beyond the spread.')
    for name in ('cpu', 'gpu', 'threads', 'torch', 'timm'):
        earlier, now = ({str(row.get(name, '')) for row in table} for table in (before, rows))
        if earlier != now:
            _note(f'{name} was {", ".join(sorted(earlier))} and is {", ".join(sorted(now))}.')
    limit = ns.fail_above
    if limit is not None and not changes:
        raise ValueError('--fail-above has nothing to look at: no case was measured both now and in --against.')
    return int(limit is not None and any(change.is_slower and change.ratio > limit for change in changes))


def _show(row: dict[str, object]) -> None:
    print('\t'.join(printable(str(row[name])) for name in SHOWN), flush=True)


def _note(text: str) -> None:
    print(f'timm-miil bench: {printable(text)}', file=sys.stderr)
