"""The words that choose a split of a data set and how a model runs over it, for every verb that has them."""
import argparse
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from tqdm import tqdm

from timm_miil._checks import shown
from timm_miil._cores import count_cores
from timm_miil.cli._device import parse_device
from timm_miil.cli._text import printable
from timm_miil.data import (
    TREE_FILE, ImageStream, LabelledImages, list_formats, open_split, read_class_tree, with_ancestors)
from timm_miil.inference import BATCH_SIZE

__all__ = [
    'RunOptions', 'add_data_arguments', 'add_source_arguments', 'few', 'format_options', 'open_data', 'running']

AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
MAX_WORKERS = 4
NAMED_AT_MOST = 10


class RunOptions(TypedDict):
    """How a model runs over pictures, as `validate` and `tune_folder` take it."""

    batch_size: int
    workers: int
    device: torch.device
    amp_dtype: torch.dtype | None
    strict: bool
    on_batch: Any


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `open_data` and `running` read."""
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='folder of the data set')
    add_source_arguments(
        parser, split='val', labels='; also the names of the classes of a model that does not know them')
    parser.add_argument(
        '--ancestors', action='store_true',
        help='let each picture also show the ancestors of what it shows, as ImageNet-21K becomes multi-label')
    parser.add_argument(
        '--tree', type=Path, metavar='FILE',
        help=f"tree over the labels, for --ancestors and for semantic accuracy (default: the data's {TREE_FILE})")
    parser.add_argument(
        '--common', action='store_true', help='pass over labels that only the model or only the data have')
    parser.add_argument('-b', '--batch-size', type=int, default=BATCH_SIZE, help='default: %(default)s')
    parser.add_argument(
        '-j', '--workers', type=int, default=min(MAX_WORKERS, count_cores()),
        help='processes that read pictures; 0 for none of their own (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='compute in mixed precision')
    parser.add_argument(
        '--amp-dtype', choices=AMP_DTYPES, default='bfloat16', help='half precision of --amp (default: %(default)s)')
    parser.add_argument(
        '--strict', action='store_true', help='stop at a picture that cannot be used; others are named and left out')


def add_source_arguments(parser: argparse.ArgumentParser, *, split: str, labels: str = '') -> None:
    """Declare how the data of a folder are read.

    Args:
        parser: Of a verb.
        split: The default.
        labels: What the labels are for besides.
    """
    parser.add_argument(
        '--format', choices=('auto', *list_formats()), default='auto', help='of the data set (default: %(default)s)')
    parser.add_argument('--split', default=split, help='default: %(default)s')
    parser.add_argument(
        '--labels', metavar='FILE_OR_SET',
        help='the labels to take, by name: a text file, one a line, or a label set of the catalogue such as coco_80'
             f"{labels} (default: the data's own)")
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='OPTION=VALUE', help='options of the format')


def open_data(ns: argparse.Namespace) -> LabelledImages | ImageStream:
    """The pictures that the words choose.

    Raises:
        CheckpointError: If the tree's file is none.
        OSError: If there is no such folder, split or file.
        TypeError: If an option is of the wrong kind.
        ValueError: If a word is wrong, or the data are.
    """
    source = open_split(ns.data_dir, ns.split, format=ns.format, labels=ns.labels, **format_options(ns))
    if not getattr(ns, 'ancestors', False):
        return source
    return with_ancestors(source, read_class_tree(ns.tree or ns.data_dir / TREE_FILE).ordered_as(source.label_names))


def format_options(ns: argparse.Namespace) -> dict[str, Any]:
    """What `--set` says to the format's reader.

    Raises:
        ValueError: If a word is wrong.
    """
    options: dict[str, Any] = {}
    for word in ns.set:
        name, sign, value = word.partition('=')
        if not sign or not name.isidentifier():
            raise ValueError(f'--set must be OPTION=VALUE, got {shown(word)}.')
        options[name] = _value(value)
    for name in ('data_dir', 'split', 'format', 'labels'):
        if name in options:
            raise ValueError(f'--set is for options of the format; for {name} there is --{name.replace("_", "-")}.')
    return options


@contextmanager
def running(ns: argparse.Namespace, source: LabelledImages | ImageStream) -> Iterator[RunOptions]:
    """How the words say to run, with a progress bar while the block runs."""
    total = source.num_images if isinstance(source, ImageStream) else len(source)
    device = parse_device(ns.device)
    with tqdm(total=total, disable=None, unit='pictures', leave=False) as bar:
        yield RunOptions(
            batch_size=ns.batch_size, workers=ns.workers, device=device,
            amp_dtype=AMP_DTYPES[ns.amp_dtype] if ns.amp else None, strict=ns.strict, on_batch=bar.update)


def few(names: Sequence[str], between: str) -> str:
    """The first names, and how many more there are, safe to show on a terminal."""
    more = [f'and {len(names) - NAMED_AT_MOST} more'] if len(names) > NAMED_AT_MOST else []
    return between.join([*map(printable, names[:NAMED_AT_MOST]), *more])


def _value(text: str) -> object:
    """A value in TOML's notation; what is none is a bare word."""
    try:
        table = tomllib.loads(f'value = {text}')
    except tomllib.TOMLDecodeError:
        return text
    return table['value'] if len(table) == 1 else text
