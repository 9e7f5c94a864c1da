"""The command `timm-miil`: one verb a module of this package.

A verb's module has `HELP: str`, `add_arguments(parser) -> None` and `run(ns) -> int`; it is imported when its verb
is used. Errors that a user can cause end in one line on stderr; `--debug` shows where they come from.
"""
import argparse
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from timm_miil._checks import nearest
from timm_miil._version import __version__
from timm_miil.cli._text import printable

__all__ = ['VERBS', 'main']

VERBS = (
    'predict', 'explain', 'train', 'validate', 'tune', 'transfer', 'data', 'shards', 'in21k', 'convert', 'push',
    'verify', 'links', 'cards', 'quickstart', 'bench', 'list', 'info')

USAGE_ERROR = 2
INTERRUPTED = 128 + 2     # as a shell reports SIGINT
BROKEN_PIPE = 128 + 13    # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; None takes those of the process.

    Returns:
        Exit status: 0 all well, 1 the verb ran and some of its items failed, 2 wrong use or nothing could be done,
        130 interrupted, 141 the reader of the output went away.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a file name may hold what the terminal cannot show
    try:
        if words and not words[0].startswith('-'):
            return _run_verb(words[0], words[1:])
        parser = _TopParser(prog='timm-miil', description='Multi-label recognition for timm.')
        parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
        parser.parse_args(words or ['--help'])
    except SystemExit as stop:  # argparse has printed help, version or what is wrong
        return int(stop.code or 0)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f'{self.prog}: {message} (see {self.prog} --help)\n')


class _TopParser(_Parser):
    def format_help(self) -> str:
        verbs = ''.join(f'  {verb:<12}{_verb_module(verb).HELP}\n' for verb in VERBS)
        return f'{super().format_help()}\ncommands:\n{verbs}\ntimm-miil COMMAND --help explains each.\n'


def _run_verb(verb: str, words: Sequence[str]) -> int:
    if verb not in VERBS:
        _Parser(prog='timm-miil').error(f'unknown command {verb!r}; {nearest(verb, VERBS)}')
    module = _verb_module(verb)
    parser = _Parser(prog=f'timm-miil {verb}', description=module.HELP)
    module.add_arguments(parser)
    parser.add_argument('--debug', action='store_true', help='show where an error comes from')
    ns = parser.parse_args(words)
    try:
        with warnings.catch_warnings():
            if not ns.debug:  # Pillow's remarks on odd files; what cannot be read is an error, and reported
                warnings.filterwarnings('ignore', module='PIL')
            status: int = module.run(ns)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:  # timm asserts
        if ns.debug:
            traceback.print_exc()
        words = printable(' '.join(str(error).split())) or type(error).__name__  # with what is in anyone's files
        parser.exit(USAGE_ERROR, f'{parser.prog}: {words}\n')


def _verb_module(verb: str) -> ModuleType:
    return importlib.import_module(f'timm_miil.cli.{verb}')


if __name__ == '__main__':
    sys.exit(main())
