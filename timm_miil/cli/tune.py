"""`timm-miil tune`: fit a model folder's thresholds and temperatures to labelled pictures."""
import argparse
import sys
from pathlib import Path

from timm_miil.cli._data import add_data_arguments, few, open_data, running
from timm_miil.cli._text import columns, printable
from timm_miil.inference import tune_folder
from timm_miil.metrics.thresholds import OBJECTIVES

__all__ = ['HELP', 'add_arguments', 'run']

HELP = "fit a model's thresholds and confidences to labelled pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('folder', type=Path, metavar='MODEL_FOLDER', help='its config.json is changed')
    add_data_arguments(parser)
    parser.add_argument(
        '--objective', choices=OBJECTIVES, default='f1',
        help='f1; precision for the most recall at a precision of --target; or recall likewise (default: %(default)s)')
    parser.add_argument('--target', type=float, help='least precision or recall, in (0, 1]')
    parser.add_argument('--seed', type=int, default=0, help='decides the folds (default: %(default)s)')
    parser.add_argument(
        '--output', type=Path, metavar='DIR', help='write a copy of the folder, and leave the folder as it is')


def run(ns: argparse.Namespace) -> int:
    """Tune the model folder; 1 if some pictures could not be used."""
    source = open_data(ns)
    with running(ns, source) as options:
        found = tune_folder(
            ns.folder, source, objective=ns.objective, target=ns.target, seed=ns.seed, output=ns.output,
            common=ns.common, **options)
    before = found.before
    print(f'{len(before.targets)} pictures of {printable(ns.data_dir)}, {printable(ns.split)}; '
          f'{len(before.label_names)} labels\n')
    rows = [
        (name, f'{100 * old:.2f}', f'{100 * new:.2f}') for name, (old, new) in found.compare().items()]
    print(columns([('', 'before', 'after, on held-out pictures'), *rows]), end='')
    print(f'\nthresholds and temperatures are in {printable(found.folder / "config.json")}')
    if before.only_model:
        _note(f'labels that the data lack get what all share: {few(before.only_model, ", ")}')
    if before.broken:
        _note(f'{len(before.broken)} pictures left out:\n  {few(before.broken, chr(10) + "  ")}')
    return 1 if before.broken else 0


def _note(text: str) -> None:
    print(f'timm-miil tune: {text}', file=sys.stderr)
