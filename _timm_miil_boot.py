"""Start hook: makes `timm.create_model('mldecoder_tresnet_l')` work without `import timm_miil`.

timm discovers no plug-ins, so this module is an entry point in the group `torch.backends`, which torch loads
and calls when it is imported. That group is meant for device back ends; we use it as a start hook, and for
nothing else. `import timm_miil` stays the contract: it registers everything with or without this module.

`install` imports nothing of ours: it waits for `timm.models` to be imported, and only then is `timm_miil`
imported. A failure of ours becomes one RuntimeWarning; `import torch` and `import timm` go on.

Switch it off: `TIMM_MIIL_AUTOLOAD=0` (this hook) or `TORCH_DEVICE_BACKEND_AUTOLOAD=0` (all hooks of torch).

Risk: torch turns an entry point that cannot be found into a RuntimeError. `pip uninstall timm-miil` removes
the entry point with this file, but moving or deleting the checkout of an editable install leaves the entry
point behind, and `import torch` then fails. `pip uninstall timm-miil` repairs that, and until then
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` gets round it.

Only the standard library is imported here, and the file lies outside the package, so that `import torch`
alone never imports `timm_miil`.
"""
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ['install']

SWITCH = 'TIMM_MIIL_AUTOLOAD'
AWAITED = 'timm.models'
PACKAGE = 'timm_miil'


def install() -> None:
    """Register our models with timm: now if `timm.models` is imported, otherwise as soon as it is.

    Called by torch; never raises an Exception. Does nothing when the environment has `TIMM_MIIL_AUTOLOAD=0`.
    """
    try:
        if os.environ.get(SWITCH) == '0':
            return
        awaited = sys.modules.get(AWAITED)
        if awaited is not None and not getattr(awaited.__spec__, '_initializing', False):
            _register()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn(error)


class _Finder(MetaPathFinder):
    """Answers once, for `timm.models`: the other finders' spec, with a loader that registers us."""

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None,
            target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, 'find_spec') else None
            if spec is None:
                continue
            # A namespace package has no loader, and a loader of the old protocol nothing to wrap.
            if spec.loader is not None and hasattr(spec.loader, 'exec_module'):
                spec.loader = _Loader(spec.loader)
            return spec
        return None


class _Loader(Loader):
    """Runs timm's own loader, leaves no trace of itself on the module, then registers us."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)  # an error of timm's own is timm's to report
        _register()


def _register() -> None:
    # Already there: imported, or being imported by whoever imported timm; perhaps in another thread, which
    # would wait for our import lock while we wait for its.
    if PACKAGE in sys.modules:
        return
    try:
        importlib.import_module(PACKAGE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        _warn(error)


def _warn(error: BaseException) -> None:
    message = (
        f'timm-miil could not register its models with timm ({type(error).__name__}: {error}); '
        f'torch and timm are unharmed. `import {PACKAGE}` shows the whole error; '
        f'{SWITCH}=0 switches this start hook off.')
    try:
        warnings.warn(message, RuntimeWarning)
    except Exception:  # -W error: the warning must not end the import of timm
        logging.getLogger(PACKAGE).warning(message)
