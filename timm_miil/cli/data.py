"""`timm-miil data`: check a data set and say what its labels look like."""
import argparse
from collections.abc import Sequence
from pathlib import Path

from timm_miil._atomic import write_file
from timm_miil.cli._data import add_source_arguments, format_options, open_data
from timm_miil.cli._text import printable
from timm_miil.data import ImageStream, LabelledImages, find_format, list_splits, open_split, source_statistics
from timm_miil.data.splits import ALIASES

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'check a data set and count its labels'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('data_dir', type=Path, metavar='DATA_DIR', help='folder of the data set')
    add_source_arguments(parser, split='train, and all others are checked too')
    parser.set_defaults(split=None)
    parser.add_argument(
        '--num-labels', type=int, default=50, metavar='N',
        help='rows of the table; of more labels the commonest and the rarest are shown (default: %(default)s)')
    parser.add_argument('--results-file', type=Path, metavar='FILE.csv', help='write the counts of all labels')


def run(ns: argparse.Namespace) -> int:
    """Open a split, which checks it, and print its statistics."""
    if ns.num_labels < 1:
        raise ValueError(f'--num-labels must be at least 1, got {ns.num_labels}.')
    if ns.results_file and ns.results_file.suffix != '.csv':
        raise ValueError(f'--results-file must end in .csv, got {str(ns.results_file)!r}.')
    if ns.results_file and not ns.results_file.absolute().parent.is_dir():
        raise FileNotFoundError(f'there is no folder {str(ns.results_file.parent)!r} for {ns.results_file.name!r}.')
    options = {name: value for name, value in format_options(ns).items() if name != 'ignore_unknown_labels'}
    form = find_format(ns.data_dir, **options) if ns.format == 'auto' else ns.format
    splits, is_all = list_splits(ns.data_dir, format=form, **options), ns.split is None
    ns.split = ns.split or 'train'
    source = open_data(ns)
    if is_all and ns.data_dir.is_dir():  # others would have to be downloaded
        _check_others(ns, source, splits)
    statistics = source_statistics(source)
    print(f'{printable(ns.data_dir)}: format {form}, splits {", ".join(map(printable, splits))}; this is '
          f'{printable(ns.split)}')
    for line in statistics.to_text(num_labels=ns.num_labels).splitlines():
        print(printable(line))
    if ns.results_file:
        write_file(ns.results_file, statistics.to_csv())
        print(f'\n{printable(ns.results_file)}: all {len(statistics.label_names)} labels')
    return 0


def _check_others(ns: argparse.Namespace, source: LabelledImages | ImageStream, splits: Sequence[str]) -> None:
    """Open the other splits as training would, by the labels of the first."""
    for split in splits:
        if split not in (ns.split, *ALIASES.get(ns.split, ())):
            open_split(ns.data_dir, split, format=ns.format, labels=source.label_names, **format_options(ns))
