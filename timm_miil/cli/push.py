"""`timm-miil push`: put models on the Hugging Face Hub."""
import argparse
import sys
from collections import Counter
from pathlib import Path

from timm_miil import catalog
from timm_miil._checks import nearest
from timm_miil._errors import CatalogError
from timm_miil.cli._text import columns, printable
from timm_miil.hub.publish import Outcome, publish, publish_all
from timm_miil.hub.push import Push, push_folder

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'put a model folder, or weights of the catalogue, on the Hugging Face Hub'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        'model', nargs='?', metavar='NAME.TAG|MODEL_FOLDER',
        help='weights of the catalogue, which are converted first, or a folder as `timm-miil train` writes it')
    parser.add_argument('--repo', metavar='OWNER/NAME', help='made if it is not there')
    parser.add_argument('--all', action='store_true', help='push all of the catalogue that may be, in place of a model')
    parser.add_argument('--org', metavar='OWNER', help='with --all: whose repositories, each named as the weights')
    parser.add_argument('--only', metavar='PATTERN', help="with --all: names that match, such as '*coco*'")
    parser.add_argument(
        '--journal', type=Path, metavar='FILE',
        help='with --all: where it stands what was done, for a later run to go on; default: in the Hub\'s home folder')
    parser.add_argument(
        '--sources', type=Path, metavar='DIR',
        help='with --all: folder with original files that are here already, each named as its weights')
    parser.add_argument('--source', metavar='FILE|URL', help='of weights of the catalogue: what to convert')
    parser.add_argument('--private', action='store_true', help='a repository that is made is private')
    parser.add_argument('--create-pr', action='store_true', help='propose the change in a pull request')
    parser.add_argument('--revision', metavar='BRANCH', help='default: main')
    parser.add_argument('--dry-run', action='store_true', help='say what would be done, and change nothing')
    parser.add_argument('--force', action='store_true', help='replace files that somebody else has edited on the Hub')
    parser.add_argument('--no-verify', action='store_true', help='do not download what arrived to check it')


def run(ns: argparse.Namespace) -> int:
    """Push; the token is that of `hf auth login` or HF_TOKEN. 1 if something of --all failed."""
    _check_words(ns)
    if ns.all:
        return _run_all(ns)
    if Path(ns.model).is_dir() and ns.source is None:
        done = push_folder(
            ns.model, ns.repo, private=ns.private, create_pr=ns.create_pr, revision=ns.revision, dry_run=ns.dry_run,
            force=ns.force, verify=not ns.no_verify)
    elif ns.model in catalog.weights():
        done = publish(
            ns.model, ns.repo, source=ns.source, private=ns.private, create_pr=ns.create_pr, revision=ns.revision,
            dry_run=ns.dry_run, force=ns.force, verify=not ns.no_verify, progress=sys.stderr.isatty())
    else:
        raise CatalogError(
            f'{ns.model!r} is no folder and no weights of the catalogue; {nearest(ns.model, catalog.weights())} '
            f'Give the path of a folder that is there, or a name of `timm-miil list --weights`.')
    _print_push(ns, done)
    return 0


def _check_words(ns: argparse.Namespace) -> None:
    """Raise ValueError unless the words go together."""
    ways = {True: ('org', ('model', 'repo', 'source', 'create_pr', 'revision')),
            False: ('repo', ('org', 'only', 'journal', 'sources'))}
    needed, strange = ways[ns.all]
    if (not ns.all and ns.model is None) or getattr(ns, needed) is None:
        raise ValueError('give NAME.TAG or a model folder with --repo OWNER/NAME, or --all with --org OWNER.')
    if wrong := [name for name in strange if getattr(ns, name)]:
        word = 'a model' if wrong[0] == 'model' else f'--{wrong[0].replace("_", "-")}'
        raise ValueError(f'{word} does not go with {"--all" if ns.all else "one model"}; leave it out.')


def _run_all(ns: argparse.Namespace) -> int:
    names = None
    if ns.only is not None and not (names := [entry.name for entry in catalog.find(ns.only)]):
        raise CatalogError(f"no weights match {ns.only!r}; a pattern is like '*tresnet*'.")
    outcomes = publish_all(
        ns.org, names=names, journal=ns.journal, sources=ns.sources, private=ns.private, dry_run=ns.dry_run,
        force=ns.force, verify=not ns.no_verify, progress=sys.stderr.isatty(), told=_tell)
    print(columns([('weights', 'repository', 'what', 'words'), *(
        (each.name, each.repo_id, each.state, printable(each.words)) for each in outcomes)]), end='')
    counts = Counter(each.state for each in outcomes)
    print(', '.join(f'{count} {state}' for state, count in sorted(counts.items())))
    return 1 if counts['failed'] or counts['not tried'] else 0


def _tell(outcome: Outcome) -> None:
    """A line at once, as the table comes after hours."""
    print(f'{outcome.name}: {outcome.state}', file=sys.stderr, flush=True)


def _print_push(ns: argparse.Namespace, done: Push) -> None:
    for note in done.notes:
        print(f'note: {printable(note)}', file=sys.stderr)
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
        print(f"now timm.create_model('hf-hub:{ns.repo}{at}', pretrained=True) loads it; a network of ours needs "
              f'import timm_miil first')
