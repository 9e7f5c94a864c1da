"""The rules of the house, checked over the source and in a fresh interpreter.

Every rule is a function of a folder that holds a `timm_miil`, and returns what breaks it as `path:line: words`. Each
is run twice: over this checkout, where it finds nothing, and over a planted violation, which it must find.
"""
import ast
import configparser
import fnmatch
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from timm_miil._extras import EXTRA_OF_IMPORT

CHECKOUT = Path(__file__).resolve().parent.parent

TOP_LEVEL = {
    '.ci', '.gitignore', 'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'README.md', '_timm_miil_boot.py', 'benchmarks',
    'hub_cards', 'pyproject.toml', 'setup.cfg', 'tests', 'timm_miil',
}
FLOORS = [
    {'catalog'},
    {'losses', 'metrics', 'heads'},
    {'tasks', 'models', 'data'},
    {'train', 'hub', 'inference', 'nas'},
    {'cli'},
]
# Room -> the rooms it may import, besides itself and the files below.
MAY_IMPORT = {
    'catalog': set(),
    'losses': set(),
    'metrics': set(),
    'heads': set(),
    'models': {'heads', 'catalog'},
    'data': {'catalog'},
    'tasks': {'losses', 'metrics'},
    'nas': {'models', 'catalog'},
    'hub': {'catalog'},
    'inference': {'heads', 'metrics', 'data', 'catalog'},
    'train': {'tasks', 'losses', 'heads', 'data', 'catalog'},
    'cli': set().union(*FLOORS),
}
# What timm brings along is there; every other package is optional and goes through `_extras.require`.
CORE = {'torch', 'timm', 'huggingface_hub', 'safetensors', 'torchvision', 'numpy', 'PIL', 'tqdm'}
THIRD_PARTY = {room: CORE for room in MAY_IMPORT} | {
    'catalog': set(),
    'losses': {'torch'},
    'metrics': {'torch'},
    'heads': {'torch'},
}
# The files beside the rooms, and the third-party packages each may import. They import no room.
FILES = {
    '_atomic': set(),
    '_checks': {'torch'},
    '_errors': set(),
    '_extras': set(),
    '_timm': {'timm'},
    '_version': set(),
}
NOT_FOR = {'_timm': {'catalog'}}
MAX_LINES = 400
MAX_MODULES_AT_IMPORT = 60  # beyond those of `import timm`, which are 2700
MUTATORS = {
    'add', 'append', 'clear', 'discard', 'extend', 'insert', 'pop', 'popitem', 'remove', 'setdefault', 'update'}


# ---- reading the source


@dataclass(frozen=True)
class Module:
    root: Path
    file: Path

    @cached_property
    def text(self) -> str:
        return self.file.read_text(encoding='utf-8')

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        return self.file.relative_to(self.root).with_suffix('').parts

    @property
    def package(self) -> str:
        return '.'.join(self.parts[:-1])

    @property
    def room(self) -> str:
        """The second word of its name; '' for timm_miil/__init__.py."""
        return self.parts[1].replace('__init__', '')

    @property
    def is_public(self) -> bool:
        return not any(part.startswith('_') and part != '__init__' for part in self.parts)

    def at(self, line: int, words: str) -> str:
        return f'{self.file.relative_to(self.root)}:{line}: {words}'

    def imports(self) -> Iterator[tuple[int, str, str]]:
        """(line, module, name) wherever they stand; the name is '' for `import module`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name, '') for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split('.')[:len(self.parts) - node.level] if node.level else []
                base = '.'.join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, base, alias.name) for alias in node.names)
            elif isinstance(node, ast.Call) and last_word(node.func) in ('import_module', '__import__') and node.args:
                start = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                if isinstance(start, ast.Constant):
                    yield node.lineno, str(start.value).rstrip('.'), ''


def modules(root: Path) -> list[Module]:
    return [Module(root, file) for file in sorted((root / 'timm_miil').rglob('*.py'))]


def last_word(node: ast.expr) -> str:
    """The function's name in `name(...)` and `some.where.name(...)`."""
    return getattr(node, 'id', getattr(node, 'attr', ''))


def dotted(node: ast.expr) -> list[str]:
    """['a', 'b', 'c'] for the expression a.b.c, [] for one that does not start with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    above = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*above, node.attr] if above else []


def is_private(word: str) -> bool:
    return word.startswith('_') and not word.startswith('__')


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those inside if, try, with and for included."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for field in 'body', 'orelse', 'finalbody', 'handlers':
                for inner in getattr(node, field, []):
                    yield from at_module_level(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


# ---- the rules


def layering(root: Path) -> list[str]:
    found = []
    for module in modules(root):
        room = module.room
        if room not in {'', *MAY_IMPORT, *FILES}:
            found.append(module.at(1, f'{room} is not in the table of rooms, MAY_IMPORT and FILES'))
            continue
        files = {file for file in FILES if room not in NOT_FOR.get(file, ())}
        allowed = files | ({room} | MAY_IMPORT[room] if room in MAY_IMPORT else set())
        allowed = {'models', '_version'} if room == '' else allowed
        for line, base, name in module.imports():
            ours, *words = f'{base}.{name}'.strip('.').split('.')
            if ours != 'timm_miil':
                continue
            target = words[0] if words and words[0] in {*MAY_IMPORT, *FILES} else 'the root package'
            if target not in allowed and room != 'cli':
                found.append(module.at(line, f'{room or "timm_miil"} imports {target}'))
            elif target != room and any(map(is_private, words[1:])):
                found.append(module.at(line, f'{room} imports a private name of {target}'))
    return found


def third_party(root: Path) -> list[str]:
    found = []
    for module in modules(root):
        allowed = THIRD_PARTY.get(module.room, FILES.get(module.room, set()))
        for line, base, _ in module.imports():
            package = base.partition('.')[0]
            if package not in {'timm_miil', *sys.stdlib_module_names, *allowed}:
                found.append(module.at(line, f'{module.room or "timm_miil"} imports {package}'))
    return found


def private_timm(root: Path) -> list[str]:
    found = []
    for module in modules(root):
        if module.room == '_timm':
            continue
        bound = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = getattr(node, 'module', None) or ''
                for alias in node.names:
                    words = f'{base}.{alias.name}'.strip('.').split('.')
                    if words[0] == 'timm' and not getattr(node, 'level', 0):
                        bound.add(alias.asname or (alias.name if base else 'timm'))
                        if any(map(is_private, words)):
                            found.append(module.at(node.lineno, f'{".".join(words)} is private to timm'))
        for node in ast.walk(module.tree):
            words = dotted(node) if isinstance(node, ast.Attribute) else []
            if words and words[0] in bound and is_private(words[-1]):
                found.append(module.at(node.lineno, f'{".".join(words)} is private to timm'))
    return found


def forbidden(root: Path) -> list[str]:
    """print, exit and their like; assert; bare except; star imports; global."""
    found = []
    for module in modules(root):
        in_cli, guarded = module.room == 'cli', set()
        for node in module.tree.body:
            if in_cli and isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                guarded = set(ast.walk(node))
        for node in ast.walk(module.tree):
            said = ''
            if isinstance(node, ast.Name) and node.id in {'print', 'exit', 'quit', 'breakpoint'}:
                said = '' if in_cli and node.id == 'print' else node.id
            elif isinstance(node, ast.Attribute) and dotted(node) in (['sys', 'exit'], ['os', '_exit']):
                said = '' if node in guarded and node.attr == 'exit' else '.'.join(dotted(node))
            elif isinstance(node, ast.ImportFrom):
                said = next((
                    f'from {node.module} import {alias.name}' for alias in node.names
                    if alias.name == '*' or (node.module, alias.name) in {('sys', 'exit'), ('os', '_exit')}), '')
            elif isinstance(node, ast.Raise) and node.exc and node not in guarded:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                said = 'raise SystemExit' if last_word(raised) == 'SystemExit' else ''
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                said = 'bare except'
            elif isinstance(node, ast.Assert | ast.Global):
                said = type(node).__name__.lower()
            if said:
                found.append(module.at(node.lineno, said))
    return found


def mutable_state(root: Path) -> list[str]:
    found = []
    literals = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
    makers = {'dict', 'list', 'set', 'bytearray', 'defaultdict', 'OrderedDict', 'Counter', 'deque'}
    for module in modules(root):
        constants = set()
        for node in at_module_level(module.tree.body):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                value, names = node.value, assigned(node)
                mutable = isinstance(value, literals) or (
                    isinstance(value, ast.Call) and last_word(value.func) in makers)
                constants |= {name for name in names if name.isupper()}
                found += [module.at(node.lineno, f'{name} is mutable state of the module') for name in names
                          if mutable and not name.isupper() and name not in {'__all__', 'default_cfgs'}]
        functions = (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for node in {inner for function in functions for inner in ast.walk(function)}:
            changed = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                changed = node.func.value
            if isinstance(changed, ast.Name) and changed.id in constants:
                found.append(module.at(node.lineno, f'{changed.id} is changed after import'))
    return found


def surface(root: Path) -> list[str]:
    found = []
    for module in modules(root):
        statements = module.tree.body[ast.get_docstring(module.tree) is not None:]
        if not module.is_public or not statements:  # a room may have nothing but its words
            continue
        listed, line, bound, public = None, 1, set(), set()
        is_package = module.parts[-1] == '__init__'
        for node in at_module_level(statements):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
                by_timm = any(last_word(decorator) == 'register_model' for decorator in node.decorator_list)
                if not by_timm and node.name != 'checkpoint_filter_fn':  # timm's own convention leaves these out
                    public.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.asname or alias.name.partition('.')[0]: alias.name for alias in node.names}
                bound |= names.keys()
                base = (getattr(node, 'module', None) or '').split('.')
                if is_package and '.'.join(base[:-1]) == module.package and not is_private(base[-1]):
                    public |= names.keys()
            elif '__all__' in assigned(node):
                line = node.lineno
                try:
                    listed = list(ast.literal_eval(node.value))
                except ValueError:
                    found.append(module.at(line, '__all__ is not a list of literals'))
            else:
                bound |= set(assigned(node))
                public |= set(assigned(node)) if is_package else set()
        if listed is None:
            found.append(module.at(line, 'no __all__'))
            continue
        missing = {name for name in public if not name.startswith('_')} - set(listed)
        found += [module.at(line, f'{name} is public and not in __all__') for name in sorted(missing)]
        found += [module.at(line, f'{name} is in __all__ and not defined') for name in listed if name not in bound]
        found += [module.at(line, f'{name} is in __all__ twice') for name in set(listed) if listed.count(name) > 1]
    return found


def size(root: Path) -> list[str]:
    lengths = ((module, module.text.count('\n')) for module in modules(root))
    return [module.at(n, f'{n} lines, at most {MAX_LINES}') for module, n in lengths if n > MAX_LINES]


def top_level(root: Path) -> list[str]:
    ignored = [pattern.strip('/') for pattern in (root / '.gitignore').read_text().split()]
    # An empty folder is not there: git does not keep it.
    there = {entry.name for entry in root.iterdir() if entry.is_file() or any(entry.iterdir())} - {'.git'}
    there = {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    return [f'{name}:1: not in the fixed top level' for name in sorted(there - TOP_LEVEL)] + [
        f'{name}:1: missing from the top level' for name in sorted(TOP_LEVEL - there)]


RULES = [layering, third_party, private_timm, forbidden, mutable_state, surface, size, top_level]


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    found = rule(CHECKOUT)
    assert not found, '\n' + '\n'.join(found)


def test_rooms_import_from_lower_floors_only():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    assert floor_of.keys() == MAY_IMPORT.keys() == THIRD_PARTY.keys()
    beside_or_above = [
        (room, other) for room, others in MAY_IMPORT.items() for other in others - {room}
        if floor_of[other] >= floor_of[room]]
    assert beside_or_above == []


# ---- each rule finds what is planted, where it is planted, and nothing in what is allowed


def plant(root: Path, path: str, source: str) -> Path:
    file = root / 'timm_miil' / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(source).lstrip('\n'))
    return root


PLANTED = [
    # layering: above, beside, inside a function, type checking, relative, through the root, by name
    (layering, 'losses/x.py', 'from timm_miil.models import mldecoder', '1: losses imports models'),
    (layering, 'losses/x.py', 'import timm_miil.heads.ml_decoder as m', '1: losses imports heads'),
    (layering, 'heads/x.py', 'def f():\n    from timm_miil import losses', '2: heads imports losses'),
    (layering, 'tasks/x.py', 'if TYPE_CHECKING:\n    import timm_miil.models', '2: tasks imports models'),
    (layering, 'catalog/x.py', 'from ..metrics import f', '1: catalog imports metrics'),
    (layering, 'data/a/b.py', 'from ... import tasks', '1: data imports tasks'),
    (layering, 'hub/__init__.py', 'from ..train import f', '1: hub imports train'),
    (layering, 'inference/x.py', 'import timm_miil', '1: inference imports the root package'),
    (layering, 'nas/x.py', "importlib.import_module('timm_miil.losses')", '1: nas imports losses'),
    (layering, 'train/x.py', "import_module(f'timm_miil.cli.{verb}')", '1: train imports cli'),
    (layering, 'models/x.py', 'from timm_miil import __version__', '1: models imports the root package'),
    (layering, 'catalog/x.py', 'from timm_miil._timm import f', '1: catalog imports _timm'),
    (layering, '_checks.py', 'from timm_miil.catalog import f', '1: _checks imports catalog'),
    (layering, '__init__.py', 'from timm_miil.losses import f', '1: timm_miil imports losses'),
    (layering, 'models/x.py', 'from timm_miil.heads._blocks import f', '1: models imports a private name of heads'),
    (layering, 'cli/x.py', 'from timm_miil.train import _loop', '1: cli imports a private name of train'),
    (layering, 'helpers/x.py', 'pass', '1: helpers is not in the table of rooms, MAY_IMPORT and FILES'),
    (layering, '_misc.py', 'pass', '1: _misc is not in the table of rooms, MAY_IMPORT and FILES'),
    (third_party, 'catalog/x.py', 'import torch', '1: catalog imports torch'),
    (third_party, 'losses/x.py', 'import timm.loss', '1: losses imports timm'),
    (third_party, 'metrics/x.py', 'def f():\n    import numpy as np', '2: metrics imports numpy'),
    (third_party, 'heads/x.py', 'from timm.layers import Mlp', '1: heads imports timm'),
    (third_party, 'data/x.py', 'from sklearn.datasets import load_digits', '1: data imports sklearn'),
    (third_party, '_errors.py', 'import torch', '1: _errors imports torch'),
    (third_party, '__init__.py', 'import torch', '1: timm_miil imports torch'),
    (private_timm, 'models/x.py', 'import timm.models._builder', '1: timm.models._builder is private to timm'),
    (private_timm, 'models/x.py', 'from timm.models._input import f', '1: timm.models._input.f is private to timm'),
    (private_timm, 'models/x.py', 'from timm.models import _x', '1: timm.models._x is private to timm'),
    (private_timm, 'models/x.py', 'import timm\ntimm.models._x.f()', '2: timm.models._x is private to timm'),
    (private_timm, 'hub/x.py', 'import timm.models as m\nm._x', '2: m._x is private to timm'),
    (private_timm, 'hub/x.py', 'from timm.models import hub\nhub._x', '2: hub._x is private to timm'),
    (forbidden, 'data/x.py', 'print(1)', '1: print'),
    (forbidden, 'data/x.py', 'log = print', '1: print'),
    (forbidden, 'cli/x.py', 'def f():\n    exit(1)', '2: exit'),
    (forbidden, 'cli/x.py', 'quit()', '1: quit'),
    (forbidden, 'cli/x.py', 'breakpoint()', '1: breakpoint'),
    (forbidden, 'cli/x.py', 'import sys\nsys.exit(1)', '2: sys.exit'),
    (forbidden, 'data/x.py', "if __name__ == '__main__':\n    sys.exit(1)", '2: sys.exit'),
    (forbidden, 'cli/x.py', "if __name__ == '__main__':\n    os._exit(1)", '2: os._exit'),
    (forbidden, 'cli/x.py', 'from sys import exit', '1: from sys import exit'),
    (forbidden, 'cli/x.py', 'from os import _exit as stop', '1: from os import _exit'),
    (forbidden, 'cli/x.py', 'raise SystemExit(1)', '1: raise SystemExit'),
    (forbidden, 'data/x.py', 'raise SystemExit', '1: raise SystemExit'),
    (forbidden, 'data/x.py', 'from math import *', '1: from math import *'),
    (forbidden, 'data/x.py', 'try:\n    pass\nexcept:\n    pass', '3: bare except'),
    (forbidden, 'data/x.py', 'def f(x):\n    assert x', '2: assert'),
    (forbidden, 'data/x.py', 'def f():\n    global x', '2: global'),
    (mutable_state, 'data/x.py', 'cache = {}', '1: cache is mutable state of the module'),
    (mutable_state, 'data/x.py', 'seen: list[int] = []', '1: seen is mutable state of the module'),
    (mutable_state, 'data/x.py', '_seen = {1, 2}', '1: _seen is mutable state of the module'),
    (mutable_state, 'data/x.py', 'by_name = {k: 1 for k in "ab"}', '1: by_name is mutable state of the module'),
    (mutable_state, 'data/x.py', 'if True:\n    n = collections.Counter()', '2: n is mutable state of the module'),
    (mutable_state, 'data/x.py', 'try:\n    f()\nexcept E:\n    a = []', '4: a is mutable state of the module'),
    (mutable_state, 'data/x.py', 'A = {}\ndef f():\n    A[1] = 2', '3: A is changed after import'),
    (mutable_state, 'data/x.py', 'A = {}\ndef f():\n    del A[1]', '3: A is changed after import'),
    (mutable_state, 'data/x.py', 'A = []\nclass C:\n    def f():\n        A.append(1)', '4: A is changed after import'),
    (surface, 'data/x.py', 'def f(): pass', '1: no __all__'),
    (surface, 'data/x.py', '__all__ = names()', '1: __all__ is not a list of literals'),
    (surface, 'data/x.py', "__all__ = ['f']\ndef f(): pass\nclass G: pass", '1: G is public and not in __all__'),
    (surface, 'data/x.py', "import os\n__all__ = ['f']", '2: f is in __all__ and not defined'),
    (surface, 'data/x.py', "__all__ = ['f', 'f']\ndef f(): pass", '1: f is in __all__ twice'),
    (surface, 'data/__init__.py', 'from timm_miil.data.x import f\n__all__ = []', '2: f is public and not in __all__'),
    (surface, 'data/__init__.py', 'SIZE = 3\n__all__ = []', '2: SIZE is public and not in __all__'),
    (size, 'data/x.py', '\n'.join(['pass'] * 402), '401: 401 lines, at most 400'),
]


@pytest.mark.parametrize('rule, path, source, words', PLANTED)
def test_a_planted_violation_is_found(tmp_path, rule, path, source, words):
    found = rule(plant(tmp_path, path, source))
    assert f'timm_miil/{path}:{words}' in found


def test_what_is_allowed_is_not_reported(tmp_path):
    plant(tmp_path, '__init__.py', '''
        from timm_miil import models
        from timm_miil._version import __version__
        __all__ = ['__version__', 'models']
    ''')
    plant(tmp_path, 'models/__init__.py', '''
        from timm_miil.models import one
        from timm_miil.models._parts import part
        from timm_miil.models.one import One
        __all__ = ['One', 'one']
        _SIZES = part()
    ''')
    plant(tmp_path, 'models/one.py', '''
        """print(1); assert sys.exit()"""
        import torch
        import timm
        from timm.models import register_model
        from timm_miil import catalog
        from timm_miil._timm import builder
        from timm_miil.heads import Head
        from . import _parts
        __all__ = ['One']
        TABLE = {1: 2}
        default_cfgs = dict(a=1)
        class One:
            def print(self):
                self._x = timm.__version__
                rows = TABLE.copy()
                rows[1] = rows.pop(1)
                self.exit()
        def checkpoint_filter_fn(): pass
        @register_model
        def one_small(): pass
        def _helper(): pass
    ''')
    plant(tmp_path, 'models/_parts.py', 'def part(): pass')
    plant(tmp_path, 'nas/__init__.py', '"""Nothing yet."""')
    plant(tmp_path, '_timm.py', 'from timm.models._builder import builder\n__all__ = ["builder"]')
    plant(tmp_path, 'cli/x.py', '''
        import sys
        import timm_miil
        from timm_miil.hub import push
        __all__ = ['run']
        def run():
            print(timm_miil.__version__)
        if __name__ == '__main__':
            sys.exit(run())
    ''')
    assert [row for rule in RULES if rule is not top_level for row in rule(tmp_path)] == []


def test_the_top_level_is_fixed(tmp_path):
    for name in TOP_LEVEL - {'hub_cards', '.gitignore'}:
        (tmp_path / name).touch()
    (tmp_path / '.gitignore').write_text('/build/\n*.egg-info/\n')
    for name in 'build', 'timm_miil.egg-info', 'scripts':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').touch()
    (tmp_path / 'hub_cards').mkdir()
    assert top_level(tmp_path) == [
        'scripts:1: not in the fixed top level', 'hub_cards:1: missing from the top level']


# ---- importing


PROBE = '''
import json, logging, os, random, sys, threading, warnings

offline, secrets = [], []
sys.addaudithook(lambda event, args: offline.append(event) if event in {
    'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.bind', 'urllib.Request'} else None)
import numpy, timm, torch

def state():
    return {
        'threads': threading.active_count(),
        'random seed': random.getstate(),
        'numpy seed': str(numpy.random.get_state()),
        'torch seed': torch.get_rng_state().tolist(),
        'grad mode': torch.is_grad_enabled(),
        'default dtype': str(torch.get_default_dtype()),
        'torch threads': torch.get_num_threads(),
        'warnings': [repr(row) for row in warnings.filters] + [repr(warnings.showwarning)],
        'root logger': [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable],
        'our logger': [repr(logging.getLogger('timm_miil').handlers), logging.getLogger('timm_miil').level],
        'timm logger': [repr(logging.getLogger('timm').handlers), logging.getLogger('timm').level],
        'environment': dict(os.environ),
    }

def lazy_init():
    found.append('CUDA is initialised')

def read(self, name, original=type(os.environ).__getitem__):
    if any(word in name.upper() for word in ('TOKEN', 'SECRET', 'PASSWORD', 'API_KEY')):
        secrets.append(name)
    return original(self, name)

found, modules, before = [], set(sys.modules), state()
torch.cuda._lazy_init = lazy_init
type(os.environ).__getitem__ = read
import timm_miil
type(os.environ).__getitem__ = read.__defaults__[0]

after, added = state(), set(sys.modules) - modules
found += ['the network is used: ' + event for event in sorted(set(offline))]
found += ['a secret is read: ' + name for name in secrets]
found += [key + ' changed' for key in before if before[key] != after[key]]
packages = {name.partition('.')[0] for name in added} - {'timm_miil', *sys.stdlib_module_names}
found += ['a package beyond timm is loaded: ' + name for name in sorted(packages)]
if len(added) > MAX_MODULES:
    found.append('too many modules are loaded')
print(json.dumps([timm_miil.__file__, found]))
'''


def import_effects(root: Path) -> list[str]:
    """What `import timm_miil` does besides registering models; run once timm is imported, so ours alone."""
    done = subprocess.run(
        [sys.executable, '-c', PROBE.replace('MAX_MODULES', str(MAX_MODULES_AT_IMPORT))], cwd=root, text=True,
        env=os.environ | {'PYTHONPATH': str(root), 'TIMM_MIIL_AUTOLOAD': '0'}, stdout=subprocess.PIPE, check=True)
    file, found = json.loads(done.stdout)
    return [f'{Path(file).relative_to(root)}:1: {words}' for words in found]


def test_import_is_cheap_offline_and_without_side_effects():
    assert import_effects(CHECKOUT) == []


def test_import_effects_are_found(tmp_path):
    plant(tmp_path, '__init__.py', '''
        import logging, os, random, socket, threading, time, urllib.request, warnings
        import numpy, torch, planted_package

        for call in (
                lambda: socket.create_connection(('127.0.0.1', 9)),
                lambda: urllib.request.urlopen('http://127.0.0.1:9'),
                lambda: torch.cuda.synchronize(),
        ):
            try:
                call()
            except Exception:
                pass
        os.environ.get('HF_TOKEN')
        os.environ['PLANTED'] = '1'
        threading.Thread(target=time.sleep, args=(1,)).start()
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        warnings.simplefilter('ignore')
        logging.basicConfig()
        logging.getLogger('timm').setLevel(50)
        logging.getLogger('timm_miil').addHandler(logging.StreamHandler())
    ''')
    (tmp_path / 'planted_package').mkdir()
    for number in range(MAX_MODULES_AT_IMPORT):
        (tmp_path / 'planted_package' / f'm{number}.py').touch()
    (tmp_path / 'planted_package' / '__init__.py').write_text(
        '\n'.join(f'from . import m{number}' for number in range(MAX_MODULES_AT_IMPORT)))
    assert import_effects(tmp_path) == [f'timm_miil/__init__.py:1: {words}' for words in [
        'CUDA is initialised',
        'the network is used: socket.connect',
        'the network is used: socket.getaddrinfo',
        'the network is used: urllib.Request',
        'a secret is read: HF_TOKEN',
        'threads changed',
        'random seed changed',
        'numpy seed changed',
        'torch seed changed',
        'grad mode changed',
        'default dtype changed',
        'torch threads changed',
        'warnings changed',
        'root logger changed',
        'our logger changed',
        'timm logger changed',
        'environment changed',
        'a package beyond timm is loaded: planted_package',
        'too many modules are loaded',
    ]]


def without_torch(root: Path) -> list[str]:
    """Third-party packages that floor 1 loads when it is imported by itself, without timm_miil/__init__.py."""
    names = ['timm_miil.catalog', *(f'timm_miil.{file}' for file in FILES if file != '_timm')]
    code = f'''
        import importlib, json, sys, types
        root = sys.modules['timm_miil'] = types.ModuleType('timm_miil')
        root.__path__ = [{str(root / 'timm_miil')!r}]
        before = set(sys.modules)
        for name in {names!r}:
            importlib.import_module(name)
        loaded = {{name.partition('.')[0] for name in set(sys.modules) - before}}
        print(json.dumps(sorted(loaded - set(sys.stdlib_module_names) - {{'timm_miil'}})))
    '''
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return [f'timm_miil:1: floor 1 loads {package}' for package in json.loads(done.stdout)]


def test_facts_and_the_words_of_errors_need_no_torch():
    assert without_torch(CHECKOUT) == []


def test_a_torch_in_floor_1_is_found(tmp_path):
    for file in FILES:
        plant(tmp_path, f'{file}.py', '')
    plant(tmp_path, 'catalog/__init__.py', 'import numpy')
    assert without_torch(tmp_path) == ['timm_miil:1: floor 1 loads numpy']


def test_every_public_name_is_there():
    for module in modules(CHECKOUT):
        if module.is_public:
            name = '.'.join(module.parts).removesuffix('.__init__')
            imported = importlib.import_module(name)
            absent = [public for public in getattr(imported, '__all__', ()) if not hasattr(imported, public)]
            assert (name, absent) == (name, [])


def test_optional_packages_are_the_ones_the_extras_install():
    settings = configparser.ConfigParser()
    settings.read(CHECKOUT / 'setup.cfg')
    installs = {
        (extra, re.match(r'[\w-]+', requirement)[0])
        for extra, requirements in settings['options.extras_require'].items() if extra not in ('test', 'dev')
        for requirement in requirements.split()}
    distribution = {'sklearn': 'scikit-learn'}
    assert {(extra, distribution.get(name, name)) for name, extra in EXTRA_OF_IMPORT.items()} == installs
