"""`timm-miil push`: upload a model folder to the Hugging Face Hub."""
import argparse
from pathlib import Path

from timm_miil.cli._text import printable
from timm_miil.hub import push_folder

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'upload a model folder to the Hugging Face Hub'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('folder', type=Path, metavar='MODEL_FOLDER', help='as `timm-miil train` writes it')
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME', help='made if it is not there')
    parser.add_argument('--private', action='store_true', help='a repository that is made is private')
    parser.add_argument('--create-pr', action='store_true', help='propose the change in a pull request')
    parser.add_argument('--revision', metavar='BRANCH', help='default: main')
    parser.add_argument('--dry-run', action='store_true', help='say what would be done, and change nothing')
    parser.add_argument('--force', action='store_true', help='replace a card that somebody has edited on the Hub')
    parser.add_argument(
        '--no-verify', action='store_true', help='do not download what arrived to compare it with what was sent')


def run(ns: argparse.Namespace) -> int:
    """Push the folder; the token is that of `hf auth login` or HF_TOKEN."""
    done = push_folder(
        ns.folder, ns.repo, private=ns.private, create_pr=ns.create_pr, revision=ns.revision, dry_run=ns.dry_run,
        force=ns.force, verify=not ns.no_verify)
    files = ', '.join(map(printable, done.changed))
    if not done.changed:
        print(f'{ns.repo} is up to date: nothing was sent')
    elif ns.dry_run:
        print(f'would {"make the repository and " if done.is_new else ""}send {files} to {ns.repo}')
    else:
        print(f'{ns.repo}: sent {files}' + ('' if ns.no_verify else ', and it arrived whole'))
    if done.pull_request:
        print(f'pull request: {done.pull_request}')
    if not (ns.dry_run and done.is_new):
        print(done.url)
    if not ns.dry_run:
        at = f'@{done.commit}' if done.pull_request or ns.revision not in (None, 'main') else ''
        print(f"now timm.create_model('hf-hub:{ns.repo}{at}', pretrained=True) loads it; import timm_miil first")
    return 0
