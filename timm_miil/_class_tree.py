"""Trees over classes, read from their several written forms into one list of parents."""
import collections
import graphlib
import itertools
import json
import numbers
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from timm_miil._errors import CheckpointError

__all__ = ['ROOT', 'checked_parents', 'parents_of_class_tree', 'parents_of_is_a', 'read_tree', 'top_down']

ROOT = -1  # stands where a class has no parent

_Node = TypeVar('_Node', int, str)


def checked_parents(parents: Sequence[int | None]) -> tuple[int, ...]:
    """Parents with -1 for None, each of them there."""
    if not len(parents):
        raise ValueError('a hierarchy needs classes, got none.')
    checked = tuple(ROOT if parent is None else parent for parent in parents)
    for index, parent in enumerate(checked):
        _check_int(index, parent)
        if not ROOT <= parent < len(checked):
            raise ValueError(
                f'the parent of class {index} must be a class in [0, {len(checked)}), or None or -1 for a root, '
                f'got {parent}.')
    return tuple(map(int, checked))


def _check_int(index: int, parent: object) -> None:
    if isinstance(parent, bool) or not isinstance(parent, numbers.Integral):
        raise TypeError(f'the parent of class {index} must be an int, or None for a root, got {parent!r}.')


def top_down(parents_of: Mapping[_Node, Iterable[_Node]]) -> list[_Node]:
    """The nodes, each after its parents."""
    try:
        return list(graphlib.TopologicalSorter(parents_of).static_order())
    except graphlib.CycleError as error:
        circle = ' -> '.join(map(str, reversed(error.args[1])))
        raise ValueError(f'a tree has no cycle, got {circle} (each followed by its parent).') from None


def parents_of_class_tree(class_tree: Sequence[Sequence[int]]) -> list[int]:
    found: dict[int, int] = {}
    for index, ancestors in enumerate(class_tree):
        if not len(ancestors) or ancestors[0] != index:
            raise ValueError(
                f'class_tree[{index}] must begin with its own class {index}, then its parent, up to a root; got '
                f'{list(ancestors)}.')
        if len(set(ancestors)) < len(ancestors):
            raise ValueError(
                f'a tree has no cycle, got {" -> ".join(map(str, ancestors))} in class_tree[{index}].')
        for child, parent in itertools.pairwise([*ancestors, ROOT]):
            if found.setdefault(child, parent) != parent:
                first, second = ('none' if value == ROOT else value for value in (found[child], parent))
                raise ValueError(
                    f'a class has one parent, got {first} and {second} for class {child}; the second is in '
                    f'class_tree[{index}].')
    absent = [index for index in found if index not in range(len(class_tree))]
    if absent:
        raise ValueError(
            f'every ancestor must be a class with a list of its own, got {absent[0]} among {len(class_tree)} lists.')
    return [found[index] for index in range(len(class_tree))]


def parents_of_is_a(
        pairs: Iterable[tuple[str, str | None]],
        class_names: Sequence[str],
        two_parents: str,
) -> list[int | None]:
    above: dict[str, list[str]] = {}
    for child, parent in pairs:
        known = above.setdefault(child, [])
        if parent is not None:
            above.setdefault(parent, [])
            known.append(parent)
    top_down(above)                # no cycle, so that the way up ends
    index = {name: place for place, name in enumerate(class_names)}
    if len(index) < len(class_names):
        twice = next(name for name, count in collections.Counter(class_names).items() if count > 1)
        raise ValueError(f'class_names must differ, got {twice!r} twice.')
    parents: list[int | None] = []
    for name in class_names:
        if name not in above:
            raise ValueError(
                f'every class must be in a pair, got none with {name!r}; if it is a root, add ({name!r}, None).')
        found = _nearest_classes(name, above, index)
        if len(found) > 1 and two_parents == 'error':
            raise ValueError(
                f'a class has one parent, got {found[0]!r} and {found[1]!r} for {name!r}; '
                f"two_parents='nearest' takes the first.")
        parents.append(index[found[0]] if found else None)
    return parents


def _nearest_classes(name: str, above: Mapping[str, list[str]], classes: Container[str]) -> list[str]:
    """The classes where the ways up from `name` end, fewest steps first."""
    found: list[str] = []
    waiting, seen = collections.deque(above[name]), {name}
    while waiting:
        synset = waiting.popleft()
        if synset in seen:
            continue
        seen.add(synset)
        if synset in classes:
            found.append(synset)
        else:
            waiting.extend(above[synset])
    return found


def read_tree(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == '.json':
            tree = json.loads(path.read_text(encoding='utf-8'))
        else:
            tree = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its parsing of another file meets
        raise CheckpointError(
            f'{path} cannot be read as a tree of plain lists and strings ({type(error).__name__}); if you trust the '
            f'file, open it once by other means and save the dict as .json.') from error
    if not isinstance(tree, dict) or 'class_tree_list' not in tree:
        found = sorted(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{path} must hold a dict with 'class_tree_list', got {found}.")
    return tree
