"""`.ci/run` runs what README.md writes, and says so when something is not written there."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
COMMANDS = [
    'pip install ".[train]"',
    'timm-miil quickstart',
    'pip install -e ".[dev]"',
    'python -m flake8',
    'python -m mypy',
    'python -m pytest -n auto --dist loadfile',
]


def list_commands(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / '.ci' / 'run', '--list'], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    (tmp_path / '.ci').mkdir()
    shutil.copy(CHECKOUT / '.ci' / 'run', tmp_path / '.ci' / 'run')
    return tmp_path


def readme(commands):
    return 'Not pip install "x".\n\npip install "prose"\n\n```bash\n' + '\n'.join(commands) + '\n```\n'


def test_the_commands_are_those_of_the_readme():
    assert list_commands(CHECKOUT).stdout.splitlines() == COMMANDS


def test_they_are_taken_literally_from_code_blocks(copy):
    commands = [f'{command} --flag  # {number}' for number, command in enumerate(COMMANDS)]
    (copy / 'README.md').write_text(readme(['', *reversed(commands), '# python -m pytest comes last']))
    assert list_commands(copy).stdout.splitlines() == commands


@pytest.mark.parametrize('command', COMMANDS)
def test_a_readme_without_a_command_is_an_error(copy, command):
    (copy / 'README.md').write_text(readme([other for other in COMMANDS if other != command]) + f'\n{command}\n')
    done = list_commands(copy)
    assert (done.returncode, done.stdout) == (1, '')
    [line] = done.stderr.splitlines()
    start = line.removeprefix('.ci/run: no code block of README.md has a line that starts with: ')
    assert command.startswith(start) and start != line


def test_a_failing_step_ends_the_run_and_leaves_nothing_behind(copy):
    steps = [
        'pip install "x" --help > help.txt',
        'timm-miil quickstart || test -z "$(cat)"',  # not installed; standard input is empty
        'pip install -e x --help > help.txt',
        'python -m flake8',  # not installed in a fresh environment
        'python -m mypy',
        'python -m pytest',
    ]
    (copy / 'README.md').write_text(readme(steps))
    subprocess.run('git init --quiet && git add .', shell=True, cwd=copy, check=True)
    temporary = copy / 'temporary'
    temporary.mkdir()
    # A timm-miil of this machine would run: the whole quickstart.
    folders = [folder for folder in os.environ['PATH'].split(os.pathsep) if not shutil.which('timm-miil', path=folder)]
    environment = {'TMPDIR': str(temporary), 'PATH': os.pathsep.join(folders), 'PYTHON': sys.executable}
    done = subprocess.run([copy / '.ci' / 'run'], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    assert [line.rpartition(' (after')[0] for line in done.stdout.splitlines() if line.startswith('== ')] == [
        f'== {step}' for step in steps[:4]]
    assert 'timm-miil: command not found' in done.stderr
    assert 'No module named flake8' in done.stderr.splitlines()[-1]
    assert list(temporary.iterdir()) == []
