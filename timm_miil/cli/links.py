"""`timm-miil links`: whether the files that the catalogue points at are still there."""
import argparse
import dataclasses
import json

from timm_miil import catalog
from timm_miil._errors import CatalogError
from timm_miil.cli._text import columns
from timm_miil.hub.links import Link, links

__all__ = ['HELP', 'add_arguments', 'run', 'table']

HELP = 'check that the published weights are still where the catalogue says'

COLUMNS = ('weights', 'status', 'bytes', 'url')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('pattern', nargs='?', default='*', help="shell pattern of names, such as '*coco*'")
    parser.add_argument('--json', action='store_true', help='print a list of objects in place of the table')


def run(ns: argparse.Namespace) -> int:
    """Print one line an address; 1 if one is dead."""
    names = [entry.name for entry in catalog.find(ns.pattern)]
    if not names:
        raise CatalogError(f"no weights match {ns.pattern!r}; a pattern is like '*tresnet*'.")
    found = links(names)
    if ns.json:
        print(json.dumps([{**dataclasses.asdict(link), 'is_dead': link.is_dead} for link in found], indent=2))
    else:
        print(table(found), end='')
    return int(any(link.is_dead for link in found))


def table(found: tuple[Link, ...]) -> str:
    """The links as lines, and how many of them are dead."""
    rows = [(link.name, link.problem or 'ok', '-' if link.size is None else link.size, link.url) for link in found]
    dead = sum(link.is_dead for link in found)
    return columns([COLUMNS, *rows]) + f'{len(found)} addresses, {dead} dead\n'
