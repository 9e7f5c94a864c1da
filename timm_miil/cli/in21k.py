"""`timm-miil in21k`: make ImageNet-21K-P of a release of ImageNet-21K, or check what was made."""
import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from timm_miil.cli._text import printable
from timm_miil.data.in21k import (
    MIN_IMAGES, RELEASES, REPORT_FILE, SIZE_PX, VAL_IMAGES, In21kReport, check_in21k, prepare_in21k)

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'make ImageNet-21K-P of the fall11 or winter21 release of ImageNet-21K, or check it'

MOST_SHOWN = 20  # on a terminal
SECONDS_A_LINE = 60.0  # of progress, where no terminal shows a bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        'action', choices=('prepare', 'check'),
        help='make it, or compare every picture that was made with the manifest')
    parser.add_argument(
        'source', type=Path, metavar='SOURCE',
        help='folder with a folder n01440764 or a tar file n01440764.tar for each synset; nothing in it is changed. Of '
             'check, the folder that was made')
    parser.add_argument(
        '--out', type=Path, metavar='DIR',
        help='where to write train/, val/, the tree, the manifest and the report; a run that was interrupted goes on '
             'where it was')
    parser.add_argument(
        '--release', choices=(*RELEASES, 'custom'), default='fall11',
        help='whose number of classes is checked; custom has any (default: %(default)s)')
    parser.add_argument(
        '--size', type=int, default=SIZE_PX, metavar='PX', help='side of the pictures (default: %(default)s)')
    parser.add_argument(
        '--resize', choices=('squish', 'short_edge'), default='squish',
        help='to a square, or the shorter side with the ratio kept, as with --size 256 (default: %(default)s)')
    parser.add_argument(
        '--min-images', type=int, default=MIN_IMAGES, metavar='N',
        help='a class has more picture files than this (default: %(default)s)')
    parser.add_argument(
        '--val-images', type=int, default=VAL_IMAGES, metavar='N',
        help='the first so many of each class are for validation (default: %(default)s)')
    tree = parser.add_mutually_exclusive_group()
    tree.add_argument('--tree', type=Path, metavar='FILE', help='the published tree over the classes, .pth or .json')
    tree.add_argument('--is-a', type=Path, metavar='FILE', help="or WordNet's wordnet.is_a.txt, to make it of")
    parser.add_argument('--words', type=Path, metavar='FILE', help='with --is-a: words.txt, for descriptions')
    parser.add_argument('--shards', action='store_true', help='write shards too, in DIR/shards, to read in sequence')
    parser.add_argument(
        '--images-per-shard', type=int, default=1000, metavar='N', help='with --shards (default: %(default)s)')
    parser.add_argument('-j', '--workers', type=int, help='processes; 0 for none of their own (default: one a core)')


def run(ns: argparse.Namespace) -> int:
    """Prepare pictures and say what was left out, 1 if tar files are damaged; or check them, 1 if some are wrong."""
    if ns.action == 'check':
        return _check(ns)
    if ns.out is None:
        raise ValueError('prepare needs --out, the folder to write into.')
    with contextlib.closing(_Bars()) as bars, _said_how_to_go_on():
        report = prepare_in21k(
            ns.source, ns.out, release=ns.release, size=ns.size, resize=ns.resize, min_images=ns.min_images,
            val_images=ns.val_images, tree=ns.tree, is_a=ns.is_a, words=ns.words, shards=ns.shards,
            images_per_shard=ns.images_per_shard, workers=ns.workers, on_progress=bars.show)
    print(_summary(report, ns.out), end='')
    return 1 if report.damaged else 0


def _check(ns: argparse.Namespace) -> int:
    if ns.out is not None:
        raise ValueError('check takes the folder that was made, and no --out.')
    with contextlib.closing(_Bars()) as bars:
        problems = check_in21k(
            ns.source, workers=ns.workers, on_progress=lambda done, total: bars.show('class folders', done, total))
    shown = problems[:MOST_SHOWN] if sys.stdout.isatty() else problems
    for problem in shown:
        print(printable(problem))
    if len(problems) > len(shown):
        print(f'and {len(problems) - len(shown)} more; into a file (> FILE) go all')
    said = f'{len(problems)} files or folders are wrong' if problems else 'all as it was made'
    print(f'{printable(ns.source)}: {said}')
    if problems:
        print('delete the files with other bytes, then prepare again: that makes their classes anew, and no others')
    return 1 if problems else 0


@contextlib.contextmanager
def _said_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print('interrupted; what is finished is kept, run it again to go on', file=sys.stderr)
        raise


class _Bars:
    """A bar for each part of the work, one after the other; a line each minute where there is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._part = ''
        self._begun = self._said = 0.0  # when the part began, and when a line was written last
        self._first, self._unit = 0, ''

    def show(self, part: str, done: int, total: int) -> None:
        """Move the bar; what is done at first was done by an earlier run, and says nothing of how long it takes."""
        if self._bar is None or part != self._part:
            self.close()
            self._unit = {'synsets': ' synsets', 'class folders': ' folders'}.get(part, ' pictures')
            # The mean of all so far: some synsets are no classes and done at once, so that the last ones say little.
            self._bar = tqdm(
                desc=part, unit=self._unit, total=total, initial=done, disable=None, leave=False, dynamic_ncols=True,
                smoothing=0)
            self._part, self._first = part, done
            self._begun = self._said = time.monotonic()
        self._bar.update(done - self._bar.n)
        if self._bar.disable and (now := time.monotonic()) - self._said >= SECONDS_A_LINE:
            self._said = now
            line = tqdm.format_meter(
                done, total, now - self._begun, prefix=part, unit=self._unit, initial=self._first, ncols=0)
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _summary(report: In21kReport, out: Path) -> str:
    lines = [
        f'{printable(out)}: {len(report.classes)} classes, {report.num_train} pictures in train, {report.num_val} in '
        f'val']
    if (published := RELEASES.get(report.release)) is not None:
        lines.append(
            f'published for {report.release}: {published.classes} classes, {published.train} in train, '
            f'{published.val} in val')
    lines.append(
        f'{len(report.dropped)} synsets with fewer pictures are no classes; '
        f'{"tree.json has the tree" if report.has_tree else "there is no tree: give --tree or --is-a"}')
    for kind, count in sorted(Counter(omission.kind for omission in report.omissions).items()):
        lines.append(f'left out, {kind}: {count} files')
    lines += [f'damaged: {synset}: {printable(reason)}' for synset, reason in report.damaged.items()]
    if report.passed_over:
        lines.append(f'{len(report.passed_over)} names in the source are no synsets')
    lines.append(f'{printable(out / REPORT_FILE)} names every one')
    return '\n'.join(lines) + '\n'
