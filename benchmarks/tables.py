"""The tables of README.md and benchmarks/README.md that come from files of results.

`python benchmarks/tables.py --write` writes them between their marks; a test compares.
"""
import csv
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

__all__ = ['READMES', 'TABLES', 'updated']

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results'
READMES = HERE.parent / 'README.md', HERE / 'README.md'
MARK = re.compile(r'(<!-- table (\w+): [^>]*-->\n)(.*?)(<!-- end of table -->)', re.DOTALL)
Row = dict[str, str]


def rows_of(question: str) -> list[Row]:
    """A file of results."""
    with (RESULTS / f'{question}.csv').open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def as_markdown(header: Iterable[str], body: Iterable[Iterable[object]]) -> str:
    """A table."""
    names = list(header)
    lines = [f'| {" | ".join(map(str, cells))} |\n' for cells in (names, *body)]
    return ''.join([lines[0], '|---' * len(names) + '|\n', *lines[1:]])


def claims() -> str:
    """All claims of the papers that were tried on made pictures."""
    rows = rows_of('claims') + [row for row in rows_of('systems') if row['is_claim'] == 'True']
    return as_markdown(('claim', 'ours', 'the other', 'gap (standard error)', 'shows'), map(claim_cells, rows))


def claim_cells(row: Row) -> list[str]:
    """Claim, figures and whether it shows: not unless the gap is above two errors."""
    gap, error = float(row['gap']), float(row['standard_error'])
    shows = 'yes' if row['appears'] == 'True' else 'no, the reverse' if gap + 2 * error < 0 else 'no'
    metric = NAMES.get(row['metric'], row['metric'])
    where = ' (long tail)' if row.get('scenes') == 'long tail' else ''
    return [f'{row["claim"]}{where}, {metric}', row['ours'], row['other'], f'{gap:g} ({error:g})', shows]


NAMES = {
    'test_map': 'mAP', 'map': 'mAP', 'tail_map': 'mAP', 'unseen_map': 'mAP', 'top1': 'top-1', 'transfer': 'top-1',
    'prior_rank': 'rank correlation'}


def systems() -> str:
    """What was compared beside and besides the claims, with the spread over the seeds."""
    return as_markdown(
        ('claim', 'ours', 'the other', 'gap (standard error)', 'shows', 'least, greatest', 'is a claim of a paper'),
        ([*claim_cells(row), f'{row["least_gap"]}, {row["greatest_gap"]}', 'yes' if row['is_claim'] == 'True' else 'no']
         for row in rows_of('systems')))


def throughput() -> str:
    """Time of a network's forms on a CPU, by that of its plain one."""
    forms = ('plain', 'nhwc'), ('optimized', 'nchw'), ('optimized', 'nhwc')
    networks: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows_of('throughput-cpu'):
        if row['phase'] == 'inference' and is_usual(row, '1'):
            networks.setdefault((row['model'], row['image_size']), {})[row['variant'], row['layout']] = row
    return as_markdown(
        ('network', 'images/s', 'NHWC', 'optimized', 'optimized, NHWC', 'of roofline: plain', 'optimized, NHWC'),
        ([f'{model} at {size}', found['plain', 'nchw']['images_per_second'],
          *(f'{float(found[form]["ratio"]):.2f}' for form in forms),
          found['plain', 'nchw']['of_roofline'], found['optimized', 'nhwc']['of_roofline']]
         for (model, size), found in networks.items() if {('plain', 'nchw'), *forms} <= found.keys()))


def optimize() -> str:
    """Time of optimized networks by that of timm's, eager and compiled."""
    ways = 'timm compiled', 'ours', 'ours compiled'
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows_of('optimize-cpu') + rows_of('optimize-cpu-xeon'):
        key = tuple(row[column] for column in ('model', 'image_size', 'batch_size', 'precision', 'cpu'))
        cases.setdefault(key, {})[row['contestant']] = row
    return as_markdown(
        ('network, pixels, batch', 'precision', 'processor', "timm's eager, ms", *ways),
        ([', '.join(case[:3]), case[3], short(case[4]), found['timm']['median_ms'], *(
            f'{float(found[way]["ratio"]):.2f} ({float(found[way]["ratio_q1"]):.2f} to '
            f'{float(found[way]["ratio_q3"]):.2f})' if way in found else '' for way in ways)]
         for case, found in sorted(cases.items(), key=lambda item: item[0][0])))


def training_memory() -> str:
    """Bytes that a training step keeps, its time and its gradients, by those of the plain network."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows_of('training-memory-cpu'):
        key = tuple(row[column] for column in ('model', 'precision', 'layout'))
        cases.setdefault(key, {})[row['contestant']] = row
    return as_markdown(
        ('network', 'precision', 'layout', 'plain, MiB an image', 'in place', 'as made', 'checkpoints',
         'time in place', 'time of checkpoints', 'distance of gradients: plain', 'in place'),
        ([*case, found['plain']['kept_mib'],
          *(f'{float(found["in place"][column]):.3f}' for column in ('kept_ratio', 'kept_ratio_fresh')),
          f'{float(found["checkpoints"]["kept_ratio"]):.3f}',
          *(f'{float(found[way]["ratio"]):.2f} ({float(found[way]["ratio_q1"]):.2f} to '
            f'{float(found[way]["ratio_q3"]):.2f})' for way in ('in place', 'checkpoints')),
          *(found[way]['gradient_distance'] for way in ('plain', 'in place'))]
         for case, found in cases.items()))


def short(processor: str) -> str:
    """The name of a processor without what all have."""
    return re.sub(r'\(R\)| Processor.*| CPU.*', '', processor)


def tagging() -> str:
    """Processor time of tagging, of the network's process by that of the first row, and rates."""
    return as_markdown(
        ('network', '', 'its process', 'network alone / that', 'workers', 'images/s, a core each', 'on the wall'),
        ([row['network'], row['contestant'].replace('1 workers', '1 worker'), f'{float(row["own_ms"]):.3g} ms',
          '' if row['network'] == 'none' else
          f'{1 / float(row["own_ratio"]):.0%} ({1 / float(row["own_ratio_q3"]):.0%} to '
          f'{1 / float(row["own_ratio_q1"]):.0%})',
          f'{float(row["workers_ms"]):.3g} ms' if int(row['workers']) else '',
          f'{1e3 / max(float(row["own_ms"]), float(row["workers_ms"]) / max(int(row["workers"]), 1)):.3g}',
          row['images_per_second']] for row in rows_of('tagging-cpu')))


def training() -> str:
    """Images a second in training on a CPU, and the time in NHWC by that in NCHW."""
    networks: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows_of('throughput-cpu'):
        if row['phase'] == 'training' and is_usual(row, '4'):
            key = row['model'], row['image_size'], row['batch_size']
            networks.setdefault(key, {})[row['layout']] = row
    return as_markdown(
        ('network, pixels, batch', 'images/s', 'NHWC', 'of roofline', 'NHWC'),
        ([', '.join(key), found['nchw']['images_per_second'], f'{float(found["nhwc"]["ratio"]):.2f}',
          found['nchw']['of_roofline'], found['nhwc']['of_roofline']]
         for key, found in networks.items() if {'nchw', 'nhwc'} <= found.keys()))


def is_usual(row: Row, batch_size: str) -> bool:
    """Whether a row of throughput is of a form that its table has."""
    return (row['status'], row['precision'], row['mode'], row['batch_size']) == ('ok', 'fp32', 'eager', batch_size)


def losses(place: str, loss: str, *ways: str, timed: str = '') -> str:
    """Time of a loss in several ways by that of BCEWithLogits; a star where the commit is not that of most rows."""
    rows = [row for row in rows_of(f'losses-{place}') if row['loss'] == loss and row.get('timed', '') == timed]
    commits = [row['commit'] for row in rows]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        trained = '' if row['logits'] == 'N(-3, 2)' else ', trained'
        star = '' if row['commit'] == max(commits, key=commits.count) else ' *'
        name = f'{row["batch_size"]} x {row["num_classes"]}{trained}, {row["dtype"]}{star}'
        cases.setdefault(name, {})[row['contestant']] = row
    return by_contestant(cases, ways)


def head(place: str) -> str:
    """Time of the head in several ways by that of the loop, in evaluation and training."""
    forms = [(mode, dtype) for mode in ('eval', 'train') for dtype in ('float32', 'bfloat16')]
    cases: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows_of(f'head-{place}'):
        name = f'{row["features"].replace("x", " x ")}, {row["num_classes"]} / {row["num_groups"]}'
        if row['contestant'] != 'loop' and row.get('timed', 'from idle') == 'from idle':
            cases.setdefault(name + row['contestant'].removeprefix('ours'), {})[row['mode'], row['dtype']] = row
    return as_markdown(
        ('features, classes / groups', *(' '.join(form) for form in forms)),
        ([name, *(f'{ratio(found[form])} ({milliseconds(found[form])} ms)' if form in found else ''
                  for form in forms)] for name, found in cases.items()))


def head_share() -> str:
    """The head's part of a network's time, in percent."""
    cases: dict[tuple[str, str], list[str]] = {}
    for place in ('cpu', H100):
        for row in rows_of(f'head-share-{place}'):
            if row['contestant'] == 'head':
                cases.setdefault((row['model'], row['dtype']), []).append(f'{100 * float(row["ratio"]):.2g}')
    return as_markdown(('network', 'dtype', 'CPU', 'H100, from idle'), ([*key, *cells] for key, cells in cases.items()))


def milliseconds(row: Row) -> str:
    """To two or three digits."""
    value = float(row['median_ms'])
    return f'{value:.3g}' if value < 100 else f'{value:.0f}'


def pivot(
        question: str, case: Callable[[Row], str], cell: Callable[[Row], str], ways: Iterable[str] = (),
        keep: Callable[[Row], bool] = lambda row: True) -> str:
    """A row a case, a column a contestant."""
    cases: dict[str, dict[str, Row]] = {}
    for row in filter(keep, rows_of(question)):
        cases.setdefault(case(row), {})[row['contestant']] = row
    names = list(ways) or list(dict.fromkeys(name for found in cases.values() for name in found))
    return as_markdown(
        ('', *names), ([name, *(cell(found[way]) if way in found else '' for way in names)]
                       for name, found in cases.items()))


def with_quartiles(row: Row) -> str:
    """A ratio and its quartiles."""
    return f'{float(row["ratio"]):.3f} ({float(row["ratio_q1"]):.3f} to {float(row["ratio_q3"]):.3f})'


def three_digits(row: Row) -> str:
    """A ratio, and the milliseconds."""
    return f'{float(row["ratio"]):.3g} ({float(row["median_ms"]):.2g} ms)'


def semantic(place: str) -> str:
    """Time of the semantic softmax by that of the published loop."""
    return pivot(
        f'semantic-softmax-{place}',
        lambda row: ', '.join(filter(None, [row['dtype'], f'batch {row["batch_size"]}', row.get('timed')])),
        three_digits)


def distillation(place: str) -> str:
    """A training step with a teacher by that of the student alone; what compiles was measured by itself."""
    rows: dict[str, Row] = {}
    for row in rows_of(f'distillation-{place}'):
        rows.setdefault(row['contestant'], row)
    return as_markdown(
        ('', 'time', 'pictures/s', 'most memory, MiB'),
        ([name, with_quartiles(row), row['images_per_second'], row['peak_mib']]
         for name, row in rows.items()))


def load() -> str:
    """Loading a network with its weights, beside timm."""
    return as_markdown(
        ('', 'time', "of timm's", "on the wall, of timm's", 'peak memory', "of timm's"),
        ([row['contestant'], f'{float(row["median_ms"]):.0f} ms', with_quartiles(row), row['wall_ratio'],
          f'{float(row["peak_mb"]):.0f} MB', row['peak_ratio']] for row in rows_of('load-cpu')))


def by_contestant(cases: dict[str, dict[str, Row]], ways: Iterable[str]) -> str:
    """A row a case, a column a contestant, ours in bold."""
    names = [way for way in ways if any(way in found for found in cases.values())]
    return as_markdown(
        ('', *names),
        ([case, *((f'**{ratio(found[way])}**' if way.startswith('ours') else ratio(found[way])) if way in found else ''
                  for way in names)] for case, found in cases.items()))


def ratio(row: Row) -> str:
    """To two or three digits."""
    value = float(row['ratio'])
    return f'{value:.3f}' if value < 0.2 else f'{value:.2f}' if value < 10 else f'{value:.1f}'


H100 = 'nvidia-h100-80gb-hbm3'
ASL = 'timm', 'plain formula', 'ours', 'BCEWithLogits compiled', 'timm compiled', 'ours compiled', 'bytes alone'
CSL = 'sort formula', 'ours', 'ours compiled', 'bytes alone'
TABLES: dict[str, Callable[[], str]] = {
    'claims': claims, 'systems': systems, 'throughput': throughput, 'training': training, 'optimize': optimize,
    'training_memory': training_memory, 'tagging': tagging,
    'load': load, 'semantic_cpu': partial(semantic, 'cpu'), 'semantic_h100': partial(semantic, H100),
    'distillation_cpu': partial(distillation, 'cpu'), 'distillation_h100': partial(distillation, H100),
    'autoload': partial(
        pivot, 'autoload', lambda row: row['code'], lambda row: f'{with_quartiles(row)}, {row["median_ms"]} ms',
        ('not installed', 'installed', 'switched off'), lambda row: 'after' not in row['code']),
    'reading': partial(pivot, 'training-reading-cpu', lambda row: row['case'], with_quartiles, ('engine',)),
    'steps': partial(pivot, 'training-steps-cpu', lambda row: row['case'], with_quartiles, ('by hand', 'engine')),
    'loaders': partial(
        pivot, 'in21k-loader-cpu', lambda row: f'{row["workers"]} workers', lambda row: row['images_per_second'], (),
        lambda row: row['case'] == 'loaders'),
    'stages': partial(
        pivot, 'in21k-loader-cpu', lambda row: row['case'].removeprefix('stages of '),
        lambda row: row['stage_microseconds'], (), lambda row: row['case'].startswith('stages')),
    'head_cpu': partial(head, 'cpu'), 'head_h100': partial(head, H100), 'head_share': head_share,
    'asl_cpu': partial(losses, 'cpu', 'asl', *ASL), 'csl_cpu': partial(losses, 'cpu', 'csl', *CSL),
    'coupled_cpu': partial(losses, 'cpu', 'asl coupled', *ASL),
    'asl_queued': partial(losses, H100, 'asl', *ASL, timed='queued'),
    'coupled_queued': partial(losses, H100, 'asl coupled', *ASL, timed='queued'),
    'csl_queued': partial(losses, H100, 'csl', *CSL, timed='queued'),
    'asl_from_idle': partial(losses, H100, 'asl', *ASL, timed='from idle'),
    'csl_from_idle': partial(losses, H100, 'csl', *CSL, timed='from idle')}


def updated(text: str) -> str:
    """A README with its tables as the files of results say."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[4], text)


if __name__ == '__main__' and '--write' in sys.argv:
    for readme in READMES:
        readme.write_text(updated(readme.read_text(encoding='utf-8')), encoding='utf-8')
