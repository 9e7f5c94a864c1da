"""The rules of the house, checked over the source.

Every rule is a function of a folder that holds a `timm_miil`, and returns what breaks it as `path:line: words`. Each
is run twice: here over this checkout, where it finds nothing, and in test_house_planted.py over a planted violation,
which it must find. What importing the package does is in test_house_imports.py.
"""
import ast
import fnmatch
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

TOP_LEVEL = {
    '.ci', '.gitignore', 'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'README.md', '_timm_miil_boot.py', 'benchmarks',
    'hub_cards', 'pyproject.toml', 'setup.cfg', 'tests', 'timm_miil',
}
FLOORS = [
    {'catalog'},
    {'losses', 'metrics', 'heads'},
    {'tasks', 'models', 'data'},
    {'train', 'hub', 'inference', 'nas', 'bench'},
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
    'hub': {'catalog', 'models'},
    'inference': {'heads', 'metrics', 'data', 'catalog', 'models'},
    'bench': {'losses', 'heads', 'models', 'catalog'},
    'train': {'tasks', 'losses', 'heads', 'metrics', 'data', 'catalog'},
    'cli': set().union(*FLOORS),
}
# What timm brings along is there; every other package is optional and goes through `_extras.require`.
CORE = {'torch', 'timm', 'huggingface_hub', 'safetensors', 'torchvision', 'numpy', 'PIL', 'tqdm'}
THIRD_PARTY = {room: CORE for room in MAY_IMPORT} | {
    'catalog': set(),
    'losses': {'torch', 'triton'},  # triton: kernels only, where torch brings it
    'metrics': {'torch'},
    'heads': {'torch'},
}
# The files beside the rooms, and the third-party packages each may import. They import no room.
FILES = {
    '_atomic': set(),
    '_cores': set(),
    '_checks': {'torch'},
    '_class_tree': {'torch'},
    '_errors': set(),
    '_extras': set(),
    '_locks': {'huggingface_hub'},
    '_tf32': {'torch'},
    '_timm': {'timm'},
    '_version': set(),
    '_web': set(),
}
NOT_FOR = dict.fromkeys(('_class_tree', '_locks', '_tf32', '_timm', '_web'), {'catalog'})
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


def plant(root: Path, path: str, source: str) -> Path:
    """Write a file into the `timm_miil` of a folder."""
    file = root / 'timm_miil' / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(source).lstrip('\n'))
    return root


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
