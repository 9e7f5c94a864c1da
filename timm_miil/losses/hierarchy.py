"""A tree over the classes, and the tables that semantic softmax and its metric read.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972; levels and factors are checked against the
published code, the paper's own words are recalled.

Deviations: a depth without two classes is left out, where the original read depths and positions as one and failed;
and the deepest level can be asked for.
"""
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_range
from timm_miil._class_tree import (
    ROOT, checked_parents, parents_of_class_tree, parents_of_is_a, read_tree, top_down)
from timm_miil._errors import CheckpointError

__all__ = ['SemanticHierarchy']

MAX_FACTOR = 20.0
TWO_PARENTS = ('error', 'nearest')


class SemanticHierarchy(nn.Module):
    """A tree over the classes: called with class indices (B,), it gives their semantic targets (B, J).

    The depth of a class is its number of ancestors. A *level* holds the classes of one depth, and there is one, from
    the top, for each depth of two or more classes; the deepest is left out unless `include_deepest`, as the published
    weights were trained, so that its classes only teach their ancestors. A class's semantic target at a level is the
    rank, among the classes of that level, of its ancestor there (itself at its own depth), and -1 if it lies above.

    It is a module for its tables to move with the loss that holds it; they are not part of a state dict.

    Args:
        parents: Class index of each class's parent, K in all; None or -1 for a root. There may be many roots.
        class_names: One name a class, or None.
        descriptions: One text a class, or None.
        include_deepest: Whether the deepest classes are a level too.
        max_factor: Cap of the factors, at least 1.

    Attributes:
        num_classes: K.
        parents: As given, with -1 for roots.
        class_names: As given.
        descriptions: As given.
        include_deepest: As given.
        max_factor: As given.
        depths: Depth of each class; a root has 0.
        depth_factors: F_d of each depth d from 0: K / (number of classes at d or deeper), at most max_factor.
        levels: Depth of each level, J in all, increasing.
        level_sizes: Number of classes of each level.
        level_factors: F_d of each level.
        level_targets: Semantic target of each class at each level, shape (K, J), int64.
        level_order: Class indices level by level, increasing in each, then those of no level; shape (K,), int64.
        level_rank: Place of each class in `level_order`, its inverse; shape (K,), int64.
        is_level_ordered: Whether level_order is 0, 1, 2..., so that each level is a slice of the logits and the loss
            need not bring them into order; see `level_ordered`.

    Raises:
        TypeError: If a parent is no int, or max_factor no number.
        ValueError: If there is no class, a parent is not there, parents form a cycle, no level is left, or there is
            another number of names or descriptions than of classes.

    Example:
        >>> hierarchy = SemanticHierarchy([None, None, 0, 0, 1, 3])
        >>> hierarchy
        SemanticHierarchy(num_classes=6, levels=(0, 1), level_sizes=(2, 3), include_deepest=False)
        >>> hierarchy(torch.tensor([5, 1]))
        tensor([[ 0,  1],
                [ 1, -1]])
    """

    level_targets: Tensor
    level_order: Tensor
    level_rank: Tensor

    def __init__(
            self,
            parents: Sequence[int | None],
            *,
            class_names: Sequence[str] | None = None,
            descriptions: Sequence[str] | None = None,
            include_deepest: bool = False,
            max_factor: float = MAX_FACTOR,
    ) -> None:
        super().__init__()
        check_range(max_factor=max_factor, low=1.0, high=math.inf, closed=True)
        self.parents = checked_parents(parents)
        self.num_classes = len(self.parents)
        self.class_names = _one_each('class_names', class_names, self.num_classes)
        self.descriptions = _one_each('descriptions', descriptions, self.num_classes)
        self.include_deepest = include_deepest
        self.max_factor = max_factor

        order_down = top_down(
            {index: [] if parent == ROOT else [parent] for index, parent in enumerate(self.parents)})
        depths = [0] * self.num_classes
        for index in order_down:
            depths[index] = depths[self.parents[index]] + 1 if self.parents[index] != ROOT else 0
        self.depths = tuple(depths)
        by_depth: list[list[int]] = [[] for _ in range(max(depths) + 1)]
        for index, depth in enumerate(depths):
            by_depth[depth].append(index)
        sizes = [len(indices) for indices in by_depth]
        at_or_below = [sum(sizes[depth:]) for depth in range(len(sizes))]
        self.depth_factors = tuple(min(self.num_classes / count, max_factor) for count in at_or_below)

        candidates = range(len(sizes) if include_deepest else len(sizes) - 1)
        self.levels = tuple(depth for depth in candidates if sizes[depth] > 1)
        if not self.levels:
            raise ValueError(
                f'a hierarchy needs a level of two or more classes, got depths of {sizes} classes, the deepest '
                f'{"included" if include_deepest else "left out: include_deepest=True makes it a level"}.')
        self.level_sizes = tuple(sizes[depth] for depth in self.levels)
        self.level_factors = tuple(self.depth_factors[depth] for depth in self.levels)

        order = [index for depth in self.levels for index in by_depth[depth]]
        order += [index for index, depth in enumerate(depths) if depth not in self.levels]
        level_order = torch.tensor(order)
        self.is_level_ordered = order == list(range(self.num_classes))
        self.register_buffer('level_order', level_order, persistent=False)
        self.register_buffer('level_rank', level_order.argsort(), persistent=False)
        self.register_buffer('level_targets', torch.tensor(self._semantic_targets(order_down, by_depth)), False)

    @classmethod
    def from_parents(
            cls,
            parents: Sequence[int | None],
            *,
            class_names: Sequence[str] | None = None,
            descriptions: Sequence[str] | None = None,
            include_deepest: bool = False,
            max_factor: float = MAX_FACTOR,
    ) -> 'SemanticHierarchy':
        """The hierarchy of a list of parents; the constructor under the name of its siblings."""
        return cls(
            parents, class_names=class_names, descriptions=descriptions, include_deepest=include_deepest,
            max_factor=max_factor)

    @classmethod
    def from_class_tree(
            cls,
            class_tree: Sequence[Sequence[int]],
            *,
            class_names: Sequence[str] | None = None,
            descriptions: Sequence[str] | None = None,
            include_deepest: bool = False,
            max_factor: float = MAX_FACTOR,
    ) -> 'SemanticHierarchy':
        """The hierarchy of a list of ancestors for each class.

        Args:
            class_tree: For each class its own index, that of its parent, and so on up to a root.
            class_names: As in the constructor.
            descriptions: As in the constructor.
            include_deepest: As in the constructor.
            max_factor: As in the constructor.

        Raises:
            TypeError: If an entry is no int.
            ValueError: As the constructor, or if a list does not begin with its own class, goes in a circle, or gives a
                class another parent than an earlier list.

        Example:
            >>> SemanticHierarchy.from_class_tree([[0], [1], [2, 0], [3, 0], [4, 2, 0]]).parents
            (-1, -1, 0, 0, 2)
        """
        return cls(
            parents_of_class_tree(class_tree), class_names=class_names, descriptions=descriptions,
            include_deepest=include_deepest, max_factor=max_factor)

    @classmethod
    def from_tree_file(
            cls, path: str | os.PathLike[str], *, include_deepest: bool = False, max_factor: float = MAX_FACTOR,
    ) -> 'SemanticHierarchy':
        """The hierarchy of a published tree file, with its class names and descriptions.

        Args:
            path: A file of `torch.save`, read with `weights_only=True`, or a `.json` file. Either holds a dict with
                'class_tree_list', as in `from_class_tree`, and if known 'class_list' (a name a class) and
                'class_description' (name -> text).
            include_deepest: As in the constructor.
            max_factor: As in the constructor.

        Raises:
            CheckpointError: If the file is no such tree.
            FileNotFoundError: If there is no file.
            TypeError: If max_factor is no number.
            ValueError: If max_factor is below 1.
        """
        check_range(max_factor=max_factor, low=1.0, high=math.inf, closed=True)
        tree = read_tree(Path(path))
        names, texts = tree.get('class_list'), tree.get('class_description')
        try:
            if isinstance(texts, dict):
                names = list(texts) if names is None else names
                texts = [texts[name] for name in names]
            return cls.from_class_tree(
                tree['class_tree_list'], class_names=names, descriptions=texts, include_deepest=include_deepest,
                max_factor=max_factor)
        except KeyError as error:
            raise CheckpointError(f'{path} has no class_description of the class {error}.') from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f'{path} holds no class tree: {error}') from error

    @classmethod
    def from_is_a(
            cls,
            pairs: Iterable[tuple[str, str | None]],
            class_names: Sequence[str],
            *,
            two_parents: Literal['error', 'nearest'] = 'error',
            descriptions: Sequence[str] | None = None,
            include_deepest: bool = False,
            max_factor: float = MAX_FACTOR,
    ) -> 'SemanticHierarchy':
        """The hierarchy of WordNet's is_a relation, whose synsets need not all be classes.

        The parent of a class is the nearest class above it: the way up passes through synsets that are no classes and
        ends at the first class. A class without one is a root. Synsets that lead to no class are ignored.

        Args:
            pairs: (child, parent) synsets, such as ('n02084071', 'n02083346'). ImageNet's own file has the parent
                first. A class that no pair names can be given as (name, None).
            class_names: The synsets that are classes, in the order of the logits; K in all.
            two_parents: What to do when several ways up end at different classes, as WordNet is no tree: 'error', or
                'nearest' for the fewest steps and, of these, the one whose pairs come first.
            descriptions: As in the constructor.
            include_deepest: As in the constructor.
            max_factor: As in the constructor.

        Raises:
            TypeError: If max_factor is no number.
            ValueError: As the constructor, or if a name is there twice or in no pair, a class has two parents, pairs
                form a cycle, or two_parents is unknown.

        Example:
            >>> pairs = [('dog', 'canine'), ('wolf', 'canine'), ('canine', 'animal'), ('oak', 'plant')]
            >>> SemanticHierarchy.from_is_a(pairs, ['animal', 'plant', 'dog', 'wolf'], include_deepest=True).parents
            (-1, -1, 0, 0)
        """
        check_choice(two_parents=two_parents, choices=TWO_PARENTS)
        return cls(
            parents_of_is_a(pairs, class_names, two_parents), class_names=class_names, descriptions=descriptions,
            include_deepest=include_deepest, max_factor=max_factor)

    def level_ordered(self) -> 'SemanticHierarchy':
        """The same tree with its classes renamed so that each level is a slice: new class i is old level_order[i].

        Bringing logits into level order and gradients back takes a large part of the loss. Fold the order into the
        classifier once, and its logits come in that order:

            order, rank = hierarchy.level_order, hierarchy.level_rank
            classifier.weight.data, classifier.bias.data = classifier.weight.data[order], classifier.bias.data[order]
            criterion = SemanticSoftmaxLoss(hierarchy.level_ordered())
            loss = criterion(classifier(features), rank[targets])

        Returns:
            A new hierarchy; names and descriptions move with their classes, factors and level sizes stay.
        """
        order, rank = self.level_order.tolist(), self.level_rank.tolist()
        parents = (self.parents[index] for index in order)
        return SemanticHierarchy(
            [None if parent == ROOT else rank[parent] for parent in parents],
            class_names=self.class_names and [self.class_names[index] for index in order],
            descriptions=self.descriptions and [self.descriptions[index] for index in order],
            include_deepest=self.include_deepest, max_factor=self.max_factor).to(self.level_order.device)

    def forward(self, targets: Tensor) -> Tensor:
        """Semantic targets (B, J) of the class indices (B,); -1 at a level that the class does not reach."""
        return self.level_targets.index_select(0, targets.long())

    def split_levels(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, K), in level order, as a view of (B, level_sizes[j]) for each level."""
        unused = self.num_classes - sum(self.level_sizes)
        return logits.split((*self.level_sizes, unused), dim=1)[:-1]

    def extra_repr(self) -> str:
        """The shape of the tree, for `print(module)`."""
        return (
            f'num_classes={self.num_classes}, levels={self.levels}, level_sizes={self.level_sizes}, '
            f'include_deepest={self.include_deepest}')

    def _semantic_targets(self, order_down: list[int], by_depth: list[list[int]]) -> list[list[int]]:
        rank = {index: place for indices in by_depth for place, index in enumerate(indices)}
        position = {depth: place for place, depth in enumerate(self.levels)}
        rows = [[-1] * len(self.levels) for _ in self.parents]
        for index in order_down:
            if self.parents[index] != ROOT:
                rows[index] = rows[self.parents[index]].copy()
            if self.depths[index] in position:
                rows[index][position[self.depths[index]]] = rank[index]
        return rows


def _one_each(name: str, values: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    if len(values) != num_classes:
        raise ValueError(f'{name} must be one for each of {num_classes} classes, got {len(values)}.')
    return tuple(values)
