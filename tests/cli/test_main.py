"""The command finds its verbs, and ends every way with the right status."""
import argparse
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import timm_miil
from timm_miil.cli.main import VERBS, main

ENVIRONMENT = os.environ | {
    'PYTHONPATH': str(Path(timm_miil.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': ''}


@pytest.mark.parametrize('verb', VERBS)
def test_a_verb_has_its_three_parts(verb, capsys):
    module = importlib.import_module(f'timm_miil.cli.{verb}')
    assert module.HELP and module.HELP == module.HELP.strip() and '\n' not in module.HELP
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert main([verb, '--help']) == 0
    shown = ' '.join(capsys.readouterr().out.split())
    assert shown.startswith(f'usage: timm-miil {verb} ') and module.HELP in shown and '--debug' in shown
    for action in parser._actions:
        assert action.help or action.dest in ('format', 'paths'), f'{action.dest} says nothing'


@pytest.mark.parametrize('argv', [[], ['--help'], ['-h']])
def test_help_names_every_verb(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith('usage: timm-miil ')
    for verb in VERBS:
        help_line = importlib.import_module(f'timm_miil.cli.{verb}').HELP
        assert f'\n  {verb:<12}{help_line}\n' in out


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm-miil {timm_miil.__version__}\n'


@pytest.mark.parametrize('argv, line', [
    (['prdict'], "timm-miil: unknown command 'prdict'; did you mean 'predict'? Known: bench, cards, convert, data, "
                 'explain, in21k, info, links, list, predict, push, quickstart, shards, train, transfer, tune, '
                 'validate, verify. (see timm-miil --help)'),
    (['--frobnicate'], 'timm-miil: unrecognized arguments: --frobnicate (see timm-miil --help)'),
    (['list', '--frobnicate'], 'timm-miil list: unrecognized arguments: --frobnicate (see timm-miil list --help)'),
])
def test_wrong_words_are_one_line_and_two(argv, line, capsys):
    assert main(argv) == 2
    assert capsys.readouterr() == ('', f'{line}\n')


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-c', code], env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120)


def test_a_verb_is_imported_when_it_is_used():
    done = python(
        'import sys\n'
        'from timm_miil.cli.main import main\n'
        'loaded = lambda: sorted(name for name in sys.modules if name.startswith("timm_miil.cli."))\n'
        'print(loaded())\n'
        'main(["list", "mldecoder"])\n'
        'print(loaded())\n')
    first, *_, last = done.stdout.splitlines()
    assert first == "['timm_miil.cli._text', 'timm_miil.cli.main']", done.stderr
    assert last == "['timm_miil.cli._text', 'timm_miil.cli.list', 'timm_miil.cli.main']"


@pytest.mark.slow
def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, '-m', 'timm_miil.cli.main', 'list', 'no-such-*'], env=ENVIRONMENT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == "timm-miil list: no architecture matches 'no-such-*'; a pattern is like '*tresnet*'.\n"


def test_a_reader_that_went_away_ends_it_quietly():
    with subprocess.Popen(
            [sys.executable, '-m', 'timm_miil.cli.main', 'list', 'mldecoder'], env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 141


def test_warnings_are_as_before_afterwards(monkeypatch):
    before, during = list(warnings.filters), []
    monkeypatch.setattr('timm_miil.cli.list.run', lambda ns: during.extend(warnings.filters) or 0)
    assert main(['list']) == 0
    assert warnings.filters == before != during
