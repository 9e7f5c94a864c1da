"""`timm-miil convert`: make a model folder of a published checkpoint."""
import argparse
import sys
from pathlib import Path

from timm_miil.cli._text import columns, printable
from timm_miil.hub import convert

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'make a model folder, for timm and the Hub, of a published checkpoint'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        'source', metavar='SOURCE', help='a file, a URL, or weights of the catalogue (see timm-miil list --weights)')
    parser.add_argument(
        '--as', dest='name', metavar='NAME.TAG', help='which weights of the catalogue it is; default: by name or file')
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='DIR', help='the model folder to write')
    parser.add_argument(
        '--repo', metavar='OWNER/NAME', help='the repository that the card shall name; default: weights by name')
    parser.add_argument(
        '--cache-dir', type=Path, metavar='DIR', help='where downloads are kept; default: in the Hub\'s home folder')


def run(ns: argparse.Namespace) -> int:
    """Convert, and tell what it was and what it is now."""
    done = convert(
        ns.source, ns.output, name=ns.name, repo_id=ns.repo, progress=sys.stderr.isatty(), cache_dir=ns.cache_dir)
    arguments = ', '.join(f'{key}={value!r}' for key, value in done.network.model_args.items())
    print(columns([
        ('weights', done.name),
        ('source', done.source),
        ('size', f'{done.source_size} bytes'),
        ('sha256', done.source_sha256),
        ('network', done.network.architecture + (f' ({arguments})' if arguments else '')),
        ('classes', done.network.num_classes),
        ('converted', done.folder / 'model.safetensors'),
        ('sha256', done.weights_sha256),
    ]), end='')
    for note in done.notes:
        print(f'note: {printable(note)}')
    print(f"now timm.create_model('local-dir:{printable(done.folder)}', pretrained=True) loads it, and `timm-miil push "
          f'{printable(done.folder)} --repo OWNER/NAME` puts it on the Hub')
    return 0
