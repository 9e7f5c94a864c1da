"""`timm-miil verify`: check a model repository on the Hugging Face Hub."""
import argparse
from pathlib import Path

from timm_miil.cli._text import columns, printable
from timm_miil.hub.verify import verify_repo

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'check a model repository on the Hugging Face Hub'

WORDS = {True: 'ok', False: 'WRONG', None: '-'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('repo', metavar='OWNER/NAME', help='the repository to download and check')
    parser.add_argument('--revision', metavar='REVISION', help='branch, tag or commit; default: main')
    parser.add_argument(
        '--journal', type=Path, metavar='FILE', help='of `timm-miil push --all`, whose hashes the files must have')


def run(ns: argparse.Namespace) -> int:
    """Print one line a check; 1 if one failed. The token is that of `hf auth login` or HF_TOKEN."""
    found = verify_repo(ns.repo, revision=ns.revision, journal=ns.journal)
    print(columns([(check.name, WORDS[check.passed], printable(check.words)) for check in found.checks]), end='')
    wrong = sum(check.passed is False for check in found.checks)
    print(f'{ns.repo} at {found.commit}: ' + (f'{wrong} of {len(found.checks)} checks failed' if wrong else 'all well'))
    return 1 if wrong else 0
