"""What does the start hook cost? Fresh interpreters with and without our wheel, in turns.

    python benchmarks/autoload.py            # about 10 minutes on two cores

Processor time of the child (user and system), which other load on the machine disturbs less than the wall clock's.
Needs the extra `test` (for `build`) and an environment in which timm-miil is not installed.
"""
import functools
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.append(str(CHECKOUT))  # the harness is in the package, which is not installed

from run import save  # noqa: E402

from timm_miil.bench import compare, itself  # noqa: E402

# Seconds inside the child: of the hook once torch is there, and of our import once timm is there.
HOOK_ALONE = '''
import torch, time
start = time.perf_counter()
import _timm_miil_boot
_timm_miil_boot.install()
print(time.perf_counter() - start)
'''
PACKAGE_ALONE = '''
import timm, time
start = time.perf_counter()
import timm_miil
print(time.perf_counter() - start)
'''


def install(folder: Path) -> None:
    """Unpack our wheel into a folder, as pip would."""
    source = folder / 'source'
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns('.*', 'tests', 'build', '*.egg-info'))
    quiet = {'stdout': subprocess.DEVNULL, 'check': True}
    subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--wheel', '--outdir', folder / 'dist', source], **quiet)
    [wheel] = (folder / 'dist').iterdir()
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', folder / 'ours', wheel],
        **quiet)


def python(code: str, packages: Path, cwd: Path, **variables: str) -> float:
    """Run `code` in a fresh interpreter: the number it prints, otherwise the processor time it took; in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=cwd, env=os.environ | {'PYTHONPATH': str(packages)} | variables,
        stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout or taken)


def main() -> None:
    if any(found.name == 'timm-miil' for found in importlib.metadata.distributions(path=sys.path[:-1])):
        sys.exit('timm-miil is installed here, so "without" would be with it; run in an environment that lacks it.')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        install(folder)
        (folder / 'none').mkdir()
        start = functools.partial(python, cwd=folder)
        without = functools.partial(start, packages=folder / 'none')
        installed = functools.partial(start, packages=folder / 'ours')
        off = functools.partial(installed, TIMM_MIIL_AUTOLOAD='0')
        alone = functools.partial(installed, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
        rows = []
        for code, repeats in ('pass', 200), ('import torch', 30), ('import timm', 20):
            contestants = {'not installed': without, 'installed': installed, 'switched off': off}
            rows += compare(
                {name: functools.partial(run, code) for name, run in contestants.items()},
                repeats=repeats, clock=itself, code=code)
        for code, what in (HOOK_ALONE, 'the hook alone, after torch'), (PACKAGE_ALONE, 'import timm_miil, after timm'):
            rows += compare({'installed': functools.partial(alone, code)}, repeats=15, clock=itself, code=what)
    save('autoload', rows)


if __name__ == '__main__':
    main()
