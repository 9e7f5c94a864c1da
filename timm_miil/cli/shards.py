"""`timm-miil shards`: write pictures and labels as shards, or index those of another program."""
import argparse
from pathlib import Path

from tqdm import tqdm

from timm_miil.cli._data import add_source_arguments, open_data
from timm_miil.cli._text import columns, printable
from timm_miil.data import ImageStream, read_label_set
from timm_miil.data.shards import ShardIndex, index_shards, write_shards

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'write a data set as shards, or index shards of another program'

MOST_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('data_dir', type=Path, metavar='DATA_DIR', help='folder of the data set')
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        '--out', type=Path, metavar='DIR', help='where to write; a run that was interrupted goes on where it was')
    target.add_argument(
        '--index', action='store_true', help='DATA_DIR has webdataset shards without an index: look through them once')
    add_source_arguments(parser, split='train')
    parser.add_argument(
        '--images-per-shard', type=int, metavar='N', default=1000, help='with --out (default: %(default)s)')
    parser.add_argument(
        '--seed', type=int, help='with --out: shuffle the pictures over the shards (default: in the order of the data)')
    parser.add_argument(
        '--no-check', action='store_true', help='with --out: do not decode each picture to see that it can be')
    parser.add_argument(
        '--pattern', default='', metavar='NAMES', help="with --index: the shards' names (default: <split>*.tar)")
    parser.add_argument('-j', '--workers', type=int, help='processes; 0 for none of their own (default: one a core)')


def run(ns: argparse.Namespace) -> int:
    """Write or index the shards of a split."""
    with tqdm(desc=ns.split, unit='shards' if ns.index else 'pictures', disable=None, leave=False) as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if ns.index:
            index = index_shards(
                ns.data_dir, split=ns.split, pattern=ns.pattern, labels=read_label_set(ns.labels, ns.data_dir),
                workers=ns.workers, on_progress=show)
        else:
            source = open_data(ns)
            if isinstance(source, ImageStream):
                raise ValueError(
                    f'{ns.data_dir} is read in sequence, as shards are; they are written of pictures that can be read '
                    f'one by one.')
            index = write_shards(
                source, ns.out, split=ns.split, images_per_shard=ns.images_per_shard, seed=ns.seed, workers=ns.workers,
                check_images=not ns.no_check, on_progress=show)
    print(_summary(index, ns.data_dir if ns.index else ns.out), end='')
    return 0


def _summary(index: ShardIndex, folder: Path) -> str:
    size = sum(shard.bytes for shard in index.shards)
    head = (
        f'{printable(folder)}, {printable(index.split)}: {index.num_images} pictures with {len(index.labels)} labels, '
        f'{len(index.shards)} shards of {size / 1e6:.1f} MB in all\n')
    rows = [(label.name, label.present, label.absent, label.unknown) for label in index.labels[:MOST_SHOWN]]
    more = len(index.labels) - len(rows)
    return head + columns([('label', 'present', 'absent', 'unknown'), *rows]) + (f'and {more} more\n' if more else '')
