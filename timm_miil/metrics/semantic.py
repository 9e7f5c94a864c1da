"""Semantic accuracy: how often the best class of a level is the right one.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972; checked against the published code. It gives
percent, this module a fraction as the other metrics here do.
"""
from typing import Protocol, Self

import torch
from torch import Tensor

from timm_miil._checks import check_floating, check_indices, check_ndim, check_same_length
from timm_miil.metrics._batch import check_not_nan, check_tensors
from timm_miil.metrics._distributed import sum_over_ranks

__all__ = ['LevelTables', 'SemanticAccuracy', 'semantic_accuracy']


class LevelTables(Protocol):
    """What is needed of a class hierarchy; `timm_miil.losses.SemanticHierarchy` has it.

    Attributes:
        level_sizes: Number of classes of each of J levels.
        level_order: Class indices level by level, shape (K,), int64; those of no level at the end.
        level_targets: Place of each class, or of its ancestor, in the level, -1 where it has none; shape (K, J), int64.
    """

    level_sizes: tuple[int, ...]
    level_order: Tensor
    level_targets: Tensor


def semantic_accuracy(logits: Tensor, targets: Tensor, hierarchy: LevelTables) -> Tensor:
    """Fraction of right answers, of all levels that the samples reach.

    The answer at a level is the class of largest score among its classes (of equal ones, any), and right is the
    sample's class or its ancestor there. Samples of deep classes count more, as they reach more levels.

    Args:
        logits: Scores without NaN, shape (B, K), floating of at least 16 bits. They are read, on any device.
        targets: Class indices in [0, K), shape (B,), int16 to int64; values are read in host memory alone.
        hierarchy: The tree over the classes.

    Returns:
        A float64 scalar in [0, 1] on the device of the logits (timm's accuracy is in percent); NaN if no level is
        reached, as in an empty batch.

    Raises:
        TypeError: If an input is no tensor or of another dtype.
        ValueError: If shapes do not fit, a logit is NaN, or a target in host memory is out of range.

    Example:
        >>> from timm_miil.losses import SemanticHierarchy
        >>> hierarchy = SemanticHierarchy.from_class_tree([[0], [1], [2, 0], [3, 0], [4, 2, 0]])
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 0.0]])
        >>> semantic_accuracy(logits, torch.tensor([4]), hierarchy)     # class 0 is right, 3 for 2 is wrong
        tensor(0.5000, dtype=torch.float64)
    """
    correct, total = _counts(logits, targets, hierarchy.level_order, hierarchy.level_targets, hierarchy.level_sizes)
    return correct.sum().double() / total.sum()


class SemanticAccuracy:
    """Semantic accuracy over many batches; see `semantic_accuracy`.

    Args:
        hierarchy: The tree over the classes. Its tables are copied to the device of the logits when they are first
            seen there.

    Example:
        >>> from timm_miil.losses import SemanticHierarchy
        >>> metric = SemanticAccuracy(SemanticHierarchy.from_class_tree([[0], [1], [2, 0], [3, 0], [4, 2, 0]]))
        >>> metric.update(torch.tensor([[2.0, 1.0, 0.0, 1.0, 0.0]]), torch.tensor([4]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
        >>> metric.compute(per_level=True)
        tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(self, hierarchy: LevelTables) -> None:
        self.level_sizes = tuple(hierarchy.level_sizes)
        self.level_order = hierarchy.level_order
        self.level_targets = hierarchy.level_targets
        self.reset()

    def reset(self) -> None:
        """Forget every sample."""
        self._counts = torch.zeros(2, len(self.level_sizes), dtype=torch.int64)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of scores (B, K) and class indices (B,).

        Raises:
            TypeError: If an input is no tensor or of another dtype.
            ValueError: If shapes do not fit, a logit is NaN, or a target in host memory is out of range.
        """
        check_tensors(logits=logits)
        if logits.device != self.level_order.device:
            self.level_order, self.level_targets = (
                table.to(logits.device) for table in (self.level_order, self.level_targets))
        counts = torch.stack(_counts(logits, targets, self.level_order, self.level_targets, self.level_sizes))
        self._counts = self._counts.to(counts.device) + counts

    def merge(self, other: Self) -> None:
        """Add the samples of another instance, which stays as it is.

        Raises:
            ValueError: If its hierarchy differs.
        """
        if other.level_sizes != self.level_sizes:
            raise ValueError(f'level_sizes must be equal to merge, got {self.level_sizes} and {other.level_sizes}.')
        for name in 'level_order', 'level_targets':
            own, others = getattr(self, name), getattr(other, name)
            if not torch.equal(own, others.to(own.device)):
                raise ValueError(f'hierarchies must be equal to merge, and differ in {name}.')
        self._counts = self._counts + other._counts.to(self._counts.device)

    def counts(self) -> Tensor:
        """Right answers and all answers of each level, which add up: int64 in host memory, shape (2, J)."""
        return self._counts.cpu()

    def compute(
            self, *, per_level: bool = False, distributed: bool = False, device: torch.device | None = None,
    ) -> Tensor:
        """The fraction over all samples seen so far; updates may go on afterwards.

        Args:
            per_level: One value a level, instead of one over all answers.
            distributed: Over the samples of all ranks of torch.distributed, each of which must call this.
            device: Where the collective runs: an accelerator for NCCL, None for host memory (Gloo).

        Returns:
            Float64 in [0, 1] in host memory, a scalar or shape (J,); NaN where no sample reached a level.
        """
        counts = self._counts.cpu()
        counts = sum_over_ranks(counts, device) if distributed else counts
        correct, total = counts if per_level else counts.sum(dim=1)
        return correct.double() / total


def _counts(
        logits: Tensor, targets: Tensor, level_order: Tensor, level_targets: Tensor, level_sizes: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Right answers and answers of each level, shape (J,) each."""
    check_tensors(logits=logits, targets=targets)
    check_floating(logits=logits)
    check_ndim(2, logits=logits)
    check_ndim(1, targets=targets)
    check_same_length(logits=logits, targets=targets)
    if logits.shape[1] != len(level_order):
        raise ValueError(
            f'logits must have a column for each of the {len(level_order)} classes of the hierarchy, got shape '
            f'{tuple(logits.shape)}.')
    check_indices(targets=targets, num_classes=len(level_order), read=targets.is_cpu)
    check_not_nan(logits=logits)
    logits, expected = logits.detach(), level_targets.index_select(0, targets.long())
    classes = level_order[:sum(level_sizes)].split(level_sizes)
    answers = torch.stack([logits.index_select(1, indices).argmax(dim=1) for indices in classes], dim=1)
    return (answers == expected).sum(dim=0), (expected >= 0).sum(dim=0)
