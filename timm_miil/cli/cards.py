"""`timm-miil cards`: the model cards of the catalogue, as files."""
import argparse
from pathlib import Path

from timm_miil.cli._text import printable
from timm_miil.hub.cards import check_cards, write_cards

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'write the model cards of the catalogue, or check them'

FOLDER = Path('hub_cards')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        'directory', nargs='?', type=Path, default=FOLDER, metavar='DIR', help='the folder (default: %(default)s)')
    parser.add_argument('--check', action='store_true', help='write nothing; list the files that differ')


def run(ns: argparse.Namespace) -> int:
    """Write or check the cards; 1 if a check finds that one differs."""
    found = check_cards(ns.directory) if ns.check else write_cards(ns.directory)
    for line in found:
        print(printable(ns.directory / line))
    if not found:
        print(f'{printable(ns.directory)}: all cards are what the catalogue says')
    return int(ns.check and bool(found))
