"""What several rooms of the tests share: the fixtures' folder, a quickstart, the package built and installed."""
import functools
import os
import shutil
import subprocess
import sys
import venv
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# pytest-xdist's processes, and what they start, share the processors; torch reads this when it is imported.
if count := int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '0')):
    os.environ.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 1) // count, 1)))

CHECKOUT = Path(__file__).resolve().parent.parent
OURS = ('timm_miil', '_timm_miil_boot', '__editable__')
NOT_SOURCE = shutil.ignore_patterns('.*', '__pycache__', 'build', 'dist', '*.egg-info', 'fixtures', 'results')


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, 'loadscopereorder'):  # pytest-xdist's: files of few tests, here the long ones, last
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not at the head: some runs of a single file do without it
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Times and thread counts of measurements are of one thread."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` without its minutes: graphs are captured, and run as they are."""
    import torch
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))


@pytest.fixture(scope='session')
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context (of no arguments) in which the program raises RuntimeError where it waits for the CUDA device."""
    import torch

    def set_mode(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Synchronization debug mode is a prototype', UserWarning)
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def raising() -> Iterator[None]:
        try:
            set_mode('error')  # inside: if that raises, the mode can be set all the same, and be that of later tests
            yield
        finally:
            set_mode('default')
    return raising


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which our wheel is installed."""
    root: Path

    @property
    def site_packages(self) -> Path:
        [found] = self.root.glob('lib/python*/site-packages')
        return found

    def run(self, *command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs outside the checkout, offline; `variables` join the process environment."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(('PYTHON', 'TIMM_MIIL_', 'TORCH_DEVICE_', 'COV_CORE_'))}
        offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(cwd / 'hf'), 'OMP_NUM_THREADS': '1'}
        return subprocess.run(
            [self.root / 'bin' / command[0], *command[1:]], cwd=cwd, env=kept | offline | variables,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)

    def pip(self, *words: str | Path) -> None:
        """Run the testing environment's pip on it, without the network."""
        done = subprocess.run(
            [sys.executable, '-m', 'pip', '--python', self.root, '--quiet', '--disable-pip-version-check', *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='session')
def fixtures_dir() -> Path:
    return CHECKOUT / 'tests' / 'fixtures'


# A quickstart of few pictures; that of all of them is slow, see test_quickstart.py.
FEW = dict(num_train=320, num_val=40, num_test=80)
QUICKSTART = f'''
import functools, sys
from timm_miil.cli import main, quickstart
quickstart.SceneConfig = functools.partial(quickstart.SceneConfig, **{FEW})
sys.exit(main.main(['quickstart', '--epochs', '1', '--out', 'my out']))
'''


@pytest.fixture(scope='session')
def short_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A quickstart of one epoch on few pictures: the folder it ran in, its name needs quotes."""
    folder = tmp_path_factory.mktemp('quick start')
    done = subprocess.run(
        [sys.executable, '-c', QUICKSTART], cwd=folder,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(CHECKOUT), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope='session')
def build_distribution():
    """A function (source folder, output folder, '--wheel' or '--sdist') -> the file made, offline."""
    def build(source: Path, dist: Path, kind: str) -> Path:
        done = subprocess.run(
            [sys.executable, '-m', 'build', '--no-isolation', kind, '--outdir', dist, source],
            stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        [made] = dist.iterdir()
        return made
    return build


@pytest.fixture(scope='session')
def source_tree(tmp_path_factory) -> Path:
    """A copy of the checkout to build from: setuptools leaves build/ and *.egg-info where it builds."""
    copy = tmp_path_factory.mktemp('source') / 'timm-miil'
    return Path(shutil.copytree(CHECKOUT, copy, ignore=NOT_SOURCE))


@pytest.fixture(scope='session')
def wheel(source_tree, build_distribution, tmp_path_factory) -> Path:
    return build_distribution(source_tree, tmp_path_factory.mktemp('wheel'), '--wheel')


@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory) -> Environment:
    """A virtual environment with our wheel, and everything else from the environment the tests run in.

    That one may hold timm-miil itself, so its packages are reached through a folder of links that leaves ours
    out: what is taken away from this environment is really gone.
    """
    root = tmp_path_factory.mktemp('installed')
    venv.create(root / 'venv', symlinks=True, with_pip=False)
    links = root / 'links'
    links.mkdir()
    for folder in map(Path, sys.path):
        for entry in folder.iterdir() if folder.name in ('site-packages', 'dist-packages') else ():
            if not entry.name.startswith(OURS) and not (links / entry.name).is_symlink():
                (links / entry.name).symlink_to(entry)
    environment = Environment(root / 'venv')
    (environment.site_packages / 'links.pth').write_text(f'{links}\n')
    environment.pip('install', '--no-deps', '--no-index', '--no-cache-dir', wheel)
    return environment
