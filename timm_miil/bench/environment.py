"""Where and when a figure was measured."""
import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch

__all__ = ['environment', 'place']

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def place(device: torch.device) -> str:
    """What a file of results is called after: 'cpu', or the accelerator's name as in 'nvidia-h100-80gb-hbm3'."""
    return 'cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device).lower().replace(' ', '-')


def environment(device: torch.device = torch.device('cpu'), checkout: Path = CHECKOUT) -> dict[str, object]:
    """Where and when something is measured.

    Args:
        device: Where; `gpu` and `driver` are '' where it is no CUDA device.
        checkout: Folder of the code; the commit is that of the repository that it is the root of.

    Returns:
        Processor, accelerator, driver, threads, versions, commit, command and day, a column each.
    """
    names = [
        line.partition(':')[2].strip() for line in _read('/proc/cpuinfo').splitlines() if line.startswith('model name')]
    is_cuda = device.type == 'cuda'
    return {
        'cpu': names[0] if names else platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'gpu': torch.cuda.get_device_name(device) if is_cuda else '',
        'driver': _driver() if is_cuda else '',
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'commit': _commit(checkout),
        'command': _command(checkout),
        'date': datetime.date.today().isoformat(),
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding='utf-8') if os.path.exists(path) else ''


def _driver() -> str:
    """The NVIDIA driver's version, '' where there is none."""
    line = next(iter(_read('/proc/driver/nvidia/version').splitlines()), '')
    return next((word for word in line.split() if word[:1].isdigit() and '.' in word), '')


def _command(checkout: Path) -> str:
    """The words that started this process; a script of the checkout by its path there, other programs by name."""
    program = Path(sys.argv[0]).absolute()
    is_ours = program.suffix == '.py' and program.is_relative_to(checkout)
    start = ['python', str(program.relative_to(checkout))] if is_ours else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def _commit(checkout: Path) -> str:
    """The commit the code is at; '-dirty' when tracked files differ from it, '' where there is no repository."""
    if not (checkout / '.git').exists():  # an installed package may lie inside another project's repository
        return ''
    try:
        done = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--exclude=*'], cwd=checkout, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return ''
    return done.stdout.strip()
