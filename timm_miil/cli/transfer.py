"""`timm-miil transfer`: what networks reach on data that they were not trained on, and how diverse they are."""
import argparse
import dataclasses
import math
from pathlib import Path

from tqdm import tqdm

from timm_miil._atomic import write_file
from timm_miil._cores import count_cores
from timm_miil._extras import require
from timm_miil.cli._device import parse_device
from timm_miil.cli._text import columns, printable
from timm_miil.cli._training import METRIC_WORDS
from timm_miil.data import list_formats
from timm_miil.train import load_recipe, read_splits
from timm_miil.train.recipe import DataSettings
from timm_miil.train.transfer import TransferTable, transfer_table

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'compare networks by what they reach on other data, and by their diversity'

MAX_WORKERS = 4
SUFFIX = '.csv'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('models', nargs='+', metavar='MODEL', help='timm models, hf-hub:owner/repo, or model folders')
    parser.add_argument('--data', nargs='+', required=True, metavar='DIR', help='folders of data sets, see train')
    parser.add_argument('--format', choices=('auto', *list_formats()), default='auto', help='of them all')
    parser.add_argument(
        '--recipe', metavar='RECIPE', help='fine-tune by it; without one a linear classifier is fitted to what each '
                                           'network, unchanged, says of the pictures (pip extra `train`)')
    parser.add_argument('--shots', type=int, default=0, help='learn from so many pictures of each class only')
    parser.add_argument('--draws', type=int, default=1, help='so often, the mean counts (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the draws (default: %(default)s)')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table there too')
    parser.add_argument('-b', '--batch-size', type=int, default=64, help='default: %(default)s')
    parser.add_argument(
        '-j', '--workers', type=int, default=min(MAX_WORKERS, count_cores()),
        help='processes that read pictures (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')


def run(ns: argparse.Namespace) -> int:
    """Measure, and print the table."""
    if ns.csv and (ns.csv.suffix != SUFFIX or not ns.csv.absolute().parent.is_dir()):
        raise ValueError(f'--csv must be a file {SUFFIX} in a folder that exists, got {str(ns.csv)!r}.')
    if len(set(ns.data)) < len(ns.data):
        raise ValueError('--data must name each folder once.')
    require('accelerate' if ns.recipe else 'sklearn')
    recipe = load_recipe(ns.recipe) if ns.recipe else None
    settings = recipe.data if recipe else DataSettings()
    if ns.format != 'auto':
        settings = dataclasses.replace(settings, format=ns.format)
    data_sets = {folder: read_splits(folder, settings, seed=ns.seed) for folder in ns.data}
    with tqdm(total=len(ns.models) * len(data_sets), disable=None, unit='run', leave=False) as bar:
        table = transfer_table(
            ns.models, data_sets, recipe=recipe, shots=ns.shots, draws=ns.draws, seed=ns.seed,
            batch_size=ns.batch_size, workers=ns.workers, device=parse_device(ns.device),
            on_row=lambda row: bar.update())
    print(_words(table), end='')
    if ns.csv:
        write_file(ns.csv, table.to_csv())
        print(f'{printable(ns.csv)}: the same, with all digits')
    return 0


def _words(table: TransferTable) -> str:
    """A row for each network on each data set, then one for each network."""
    head = ('model', 'data', 'measure', 'percent', 'effective rank', 'participation ratio', 'redundancy', 'NC1')
    rows = [
        (row.model, row.data, METRIC_WORDS[row.metric], f'{row.value:.2f}', f'{row.effective_rank:.1f}',
         f'{row.participation_ratio:.1f}', _number(row.cka_redundancy), _number(row.nc1)) for row in table.rows]
    odds = table.mean_log_odds()
    ends = [('model', 'mean log-odds', 'filter diversity')] + [
        (model, f'{odds[model]:.3f}', f'{diversity:.3f}') for model, diversity in table.filter_diversity.items()]
    return f'{columns([head, *rows])}\n{columns(ends)}'


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.3f}'
