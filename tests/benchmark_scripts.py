"""Scripts of `benchmarks/` as modules; the folder is no package."""
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ['BENCHMARKS', 'load_script']

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'


def load_script(name: str) -> ModuleType:
    """A script, which may import others beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(f'benchmarks_{name}', BENCHMARKS / f'{name}.py')
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module
