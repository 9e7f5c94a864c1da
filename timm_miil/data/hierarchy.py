"""The tree over the classes of a data set, such as WordNet's over those of ImageNet-21K-P.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972, sections 2.3 and 3.2: a label says that its
ancestors are present too, though the picture is not labelled with them. `with_ancestors` writes them down, for
training with several labels; `timm_miil.losses.SemanticHierarchy` reads the same tree file, for semantic softmax.
"""
import copy
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from timm_miil._atomic import write_file
from timm_miil._checks import check_choice, check_text, nearest, shown
from timm_miil._class_tree import ROOT, checked_parents, parents_of_class_tree, parents_of_is_a, read_tree, top_down
from timm_miil._errors import CheckpointError
from timm_miil.data._labels import check_distinct
from timm_miil.data.records import ImageStream, LabelledImages, UnreadPicture, UnreadStream
from timm_miil.data.targets import SparseTargets

__all__ = ['TREE_FILE', 'ClassTree', 'read_class_tree', 'with_ancestors', 'write_class_tree']

TREE_FILE = 'tree.json'
"""What a data set's folder calls its tree."""

TWO_PARENTS = ('error', 'nearest')
FEW = 3                   # names in a message
ENTRIES_AT_ONCE = 2 ** 20  # labels whose ancestors are looked up together

Images = TypeVar('Images', bound=LabelledImages)


@dataclass(frozen=True)
class ClassTree:
    """Classes, and of each the class that it is a kind of.

    Args:
        class_names: C names, each once.
        parents: Index of each class's parent, in [0, C), and -1 for a root; there may be many roots.
        descriptions: One text a class, or None.

    Raises:
        TypeError: If a name or a description is no string, or a parent no int.
        ValueError: If there is no class, a name is there twice, numbers do not agree, a parent is not there, or
            parents form a cycle.

    Example:
        >>> tree = ClassTree(('animal', 'dog', 'poodle'), (-1, 0, 1))
        >>> tree.ancestors(2)
        (1, 0)
    """
    class_names: tuple[str, ...]
    parents: tuple[int, ...]
    descriptions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ('class_names', 'descriptions'):
            if (values := getattr(self, name)) is not None:
                if isinstance(values, str):
                    raise TypeError(f'{name} must be a list of strings, got the string {shown(values)}.')
                object.__setattr__(self, name, tuple(values))
                for value in getattr(self, name):
                    check_text(**{name: value})
        object.__setattr__(self, 'parents', checked_parents(self.parents))
        check_distinct(self.class_names)
        for name in ('class_names', 'descriptions'):
            if (values := getattr(self, name)) is not None and len(values) != len(self.parents):
                raise ValueError(f'{name} must be one for each of {len(self.parents)} parents, got {len(values)}.')
        top_down({index: [] if parent == ROOT else [parent] for index, parent in enumerate(self.parents)})

    @classmethod
    def from_is_a(
            cls,
            pairs: Iterable[tuple[str, str | None]],
            class_names: Sequence[str],
            *,
            descriptions: Sequence[str] | None = None,
            two_parents: Literal['error', 'nearest'] = 'nearest',
    ) -> 'ClassTree':
        """The tree of WordNet's is_a relation, whose synsets need not all be classes.

        The parent of a class is the nearest class above it: the way up passes through synsets that are no classes and
        ends at the first class. A class without one is a root. Synsets that lead to no class are ignored.

        Args:
            pairs: (child, parent) synsets, such as ('n02084071', 'n02083346'). ImageNet's own file has the parent
                first. A class that no pair names can be given as (name, None).
            class_names: The synsets that are classes, in the order of the logits.
            descriptions: One text a class, or None.
            two_parents: What to do when several ways up end at different classes, as WordNet is no tree: 'error', or
                'nearest' for the fewest steps and, of these, the one whose pairs come first.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor, or if a class is in no pair or has two parents, pairs form a cycle, or
                two_parents is unknown.

        Example:
            >>> pairs = [('poodle', 'dog'), ('dog', 'canine'), ('canine', 'animal')]
            >>> ClassTree.from_is_a(pairs, ['animal', 'poodle']).parents
            (-1, 0)
        """
        check_choice(two_parents=two_parents, choices=TWO_PARENTS)
        parents = checked_parents(parents_of_is_a(pairs, class_names, two_parents))
        return cls(tuple(class_names), parents, None if descriptions is None else tuple(descriptions))

    def __len__(self) -> int:
        return len(self.parents)

    def ancestors(self, index: int) -> tuple[int, ...]:
        """Indices of the parent of a class, its parent, and so on up to a root.

        Raises:
            IndexError: If there is no such class.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'class must be in [0, {len(self)}), got {index}.')
        found: list[int] = []
        while (index := self.parents[index]) != ROOT:
            found.append(index)
        return tuple(found)

    def ordered_as(self, names: Sequence[str]) -> 'ClassTree':
        """The same tree over these classes, in this order.

        Args:
            names: Of classes of the tree. Those left out disappear: where one was a parent, the nearest of its
                ancestors that stays is the parent, and where none stays, the class is a root.

        Raises:
            ValueError: If a name is not of the tree or is there twice, or there is none; the first few are named.

        Example:
            >>> tree = ClassTree(('animal', 'dog', 'poodle'), (-1, 0, 1))
            >>> tree.ordered_as(['poodle', 'animal']).parents
            (1, -1)
        """
        check_distinct(names)
        old = {name: index for index, name in enumerate(self.class_names)}
        if unknown := [name for name in names if name not in old]:
            more = f' and {len(unknown) - FEW} more' if len(unknown) > FEW else ''
            raise ValueError(
                f'names must be classes of the tree, got {", ".join(map(shown, unknown[:FEW]))}{more}; '
                f'{nearest(str(unknown[0]), old)}')
        place = {old[name]: index for index, name in enumerate(names)}
        parents = [
            next((place[index] for index in self.ancestors(old[name]) if index in place), ROOT) for name in names]
        texts = self.descriptions and tuple(self.descriptions[old[name]] for name in names)
        return ClassTree(tuple(names), tuple(parents), texts)


def read_class_tree(path: str | os.PathLike[str]) -> ClassTree:
    """Read a tree file, the published one or that of `write_class_tree`.

    Args:
        path: A `.json` file, or one of `torch.save`, read with `weights_only=True`. Either holds a dict with
            'class_tree_list', for each class its own index, that of its parent, and so on up to a root; 'class_list',
            a name a class; and if known 'class_description' (name -> text), whose keys stand in for a missing
            'class_list'.

    Raises:
        CheckpointError: If the file is no such tree, or has no names.
        FileNotFoundError: If there is no file.
    """
    tree = read_tree(Path(path))
    names, texts = tree.get('class_list'), tree.get('class_description')
    if names is None and isinstance(texts, dict):
        names = list(texts)
    if names is None:
        raise CheckpointError(f"{path} has no class names; it needs 'class_list', a list of one name a class.")
    try:
        if isinstance(texts, dict):
            texts = [texts[name] for name in names]
        return ClassTree(names, parents_of_class_tree(tree['class_tree_list']), texts)  # type: ignore[arg-type]
    except KeyError as error:
        raise CheckpointError(f'{path} has no class_description of the class {error}.') from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{path} holds no class tree: {error}') from error


def write_class_tree(tree: ClassTree, path: str | os.PathLike[str]) -> None:
    """Write a tree file, as `read_class_tree` and `timm_miil.losses.SemanticHierarchy.from_tree_file` read it.

    Args:
        tree: The tree.
        path: JSON if it ends in `.json`, otherwise a file of `torch.save`. It appears whole or not at all.

    Raises:
        OSError: If it cannot be written; a file of that name is then as it was.
    """
    content: dict[str, object] = {
        'class_list': list(tree.class_names),
        'class_tree_list': [[index, *tree.ancestors(index)] for index in range(len(tree))],
    }
    if tree.descriptions is not None:
        content['class_description'] = dict(zip(tree.class_names, tree.descriptions))
    if Path(path).suffix == '.json':
        write_file(path, json.dumps(content, ensure_ascii=False) + '\n')
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(path, buffer.getvalue())


@overload
def with_ancestors(source: Images, tree: ClassTree) -> Images: ...


@overload
def with_ancestors(source: ImageStream, tree: ClassTree) -> ImageStream: ...


def with_ancestors(source: LabelledImages | ImageStream, tree: ClassTree) -> LabelledImages | ImageStream:
    """The same pictures, where every label that is present brings its ancestors.

    This is the form with several labels of a data set with one, such as ImageNet-21K-P. What a source says of an
    ancestor, absent or unknown, gives way; other labels stay. The columns stay too: an ancestor without a column is
    passed over, so read the source with `labels=tree.class_names` to have them all.

    Args:
        source: Pictures with labels that are classes of the tree. A stream is changed as it is read; of the others the
            labels are made at once, in the memory of what is present and never as a table of all.
        tree: May have more classes.

    Returns:
        A new source; the one given is as it was.

    Raises:
        TypeError: If source is neither.
        ValueError: If a label is no class of the tree.
    """
    if isinstance(source, ImageStream):
        return _StreamWithAncestors(source, _AncestorTable.of(tree.ordered_as(source.label_names)))
    if not isinstance(source, LabelledImages):
        raise TypeError(f'source must be LabelledImages or an ImageStream, got {type(source).__name__}.')
    table = _AncestorTable.of(tree.ordered_as(source.label_names))
    labels = source.labels
    if not len(labels):
        return source
    # Cut where rows begin, so that each part is whole pictures.
    cuts = np.searchsorted(labels.starts, np.arange(0, labels.starts[-1], ENTRIES_AT_ONCE))
    bounds = np.unique([0, *cuts.tolist(), len(labels)])
    parts = [
        table.extended(labels.select_rows(np.arange(first, last)))
        for first, last in itertools.pairwise(bounds.tolist())]
    other = copy.copy(source)
    other.labels = SparseTargets.concatenate(parts)
    return other


@dataclass(frozen=True, eq=False)
class _AncestorTable:
    """Ancestors of all classes in one array.

    Args:
        starts: Where those of each class begin and the last one's end, shape (C + 1,).
        ancestors: Class indices.
    """
    starts: npt.NDArray[np.int64]
    ancestors: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tree: ClassTree) -> '_AncestorTable':
        lists = [tree.ancestors(index) for index in range(len(tree))]
        starts = np.concatenate([[0], np.cumsum([len(ancestors) for ancestors in lists])])
        return cls(starts.astype(np.int64), np.array(list(itertools.chain(*lists)), dtype=np.int64))

    def of_classes(
            self, classes: npt.NDArray[np.integer],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ancestors of these classes, one after the other, and how many each has."""
        counts = self.starts[classes + 1] - self.starts[classes]
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(self.starts[classes] - (ends - counts), counts)
        return self.ancestors[places], counts

    def extended(self, labels: SparseTargets) -> SparseTargets:
        rows, columns, values = labels.entries()
        is_present = values == 1
        ancestors, counts = self.of_classes(columns[is_present])
        num_rows, num_classes = labels.shape
        present = np.sort(np.concatenate([
            rows[is_present] * num_classes + columns[is_present],
            np.repeat(rows[is_present], counts) * num_classes + ancestors]))
        # np.unique hashes, which takes ten times as long.
        present = present[np.diff(present, prepend=-1) > 0]
        others = rows[~is_present] * num_classes + columns[~is_present]
        stays = ~np.isin(others, present, assume_unique=True)
        others, kept = others[stays], values[~is_present][stays]
        places = np.concatenate([present, others])
        return SparseTargets.from_entries(
            places // num_classes, places % num_classes, np.concatenate([np.ones_like(present), kept]),
            shape=(num_rows, num_classes), fill=labels.fill)


class _StreamWithAncestors(UnreadStream):
    """A stream whose targets are extended as they come."""

    def __init__(self, stream: ImageStream, table: _AncestorTable) -> None:
        super().__init__(stream.label_names, stream.num_images)
        self.stream, self.table = stream, table

    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        pictures = self.stream.iterate_unread(
            seed=seed, epoch=epoch, process=process, num_processes=num_processes)
        return ((read, self._extended(targets), name) for read, targets, name in pictures)

    def _extended(self, targets: Tensor) -> Tensor:
        present = (targets == 1).nonzero().flatten().numpy()
        ancestors, _ = self.table.of_classes(present)
        extended = targets.clone()
        extended[torch.from_numpy(ancestors)] = 1
        return extended
