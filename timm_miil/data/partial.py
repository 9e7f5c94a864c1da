"""Simulated partial annotation: hides labels of a fully annotated set.

`fixed_per_class` and `random_per_sample` are those of Ben-Baruch et al., arXiv:2110.10955, as the code of
Alibaba-MIIL/PartialLabelingCSL does them (recalled from reading it); there they draw from an unseeded global generator,
here from a seed. With `positives_only` nobody writes down what is absent, and with `labelled_per_class` most pictures
have no label at all.
"""
import torch
from torch import Tensor

from timm_miil._checks import check_ndim, check_positive, check_range

__all__ = ['fixed_per_class', 'labelled_per_class', 'positives_only', 'random_per_sample']


def fixed_per_class(targets: Tensor, num_per_class: int, *, seed: int) -> Tensor:
    """Keep a fixed number of annotations a class (FPC).

    Of each class independently `num_per_class` present labels are kept, or all if there are fewer, and as many absent
    ones; the others become -1.

    Args:
        targets: 1 for present, 0 for absent, -1 for unannotated, shape (N, C), in host memory.
        num_per_class: Present labels to keep, at least 1.
        seed: Of the draw; the same seed and targets give the same annotations.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError: If the dtype cannot hold -1, or `num_per_class` is not an int.
        ValueError: If targets are not (N, C) or the number is below 1.
    """
    _check_targets(targets)
    check_positive(num_per_class=num_per_class)
    generator = torch.Generator().manual_seed(seed)
    partial = torch.full_like(targets, -1)
    for column in range(targets.shape[1]):  # a permutation of all labels at once would be several times their memory
        present = _shuffled(targets[:, column] == 1, generator)[:num_per_class]
        absent = _shuffled(targets[:, column] == 0, generator)[:len(present)]
        partial[present, column] = 1
        partial[absent, column] = 0
    return partial


def labelled_per_class(targets: Tensor, num_per_class: int, *, seed: int) -> Tensor:
    """Keep the labels of a fixed number of pictures a class; the other pictures lose all of theirs.

    The usual setting of semi-supervised learning; no one paper's.

    Args:
        targets: 1 for the one label of a picture and 0 for the others, shape (N, C), in host memory.
        num_per_class: Pictures of a class to keep labelled, or all if there are fewer, at least 1.
        seed: Of the draw; the same seed and targets keep the same pictures.

    Returns:
        A new tensor of the same shape and dtype, whose rows are as they were or -1.

    Raises:
        TypeError: If the dtype cannot hold -1, or `num_per_class` is not an int.
        ValueError: If targets are not (N, C) with one label a picture, or the number is below 1.
    """
    _check_targets(targets)
    check_positive(num_per_class=num_per_class)
    counts = (targets == 1).sum(1)
    if bool((counts != 1).any()):
        row = int((counts != 1).nonzero()[0, 0])
        raise ValueError(f'targets must have exactly one 1 a row, got {int(counts[row])} in row {row}.')
    generator = torch.Generator().manual_seed(seed)
    partial = torch.full_like(targets, -1)
    for column in range(targets.shape[1]):
        rows = _shuffled(targets[:, column] == 1, generator)[:num_per_class]
        partial[rows] = targets[rows]
    return partial


def random_per_sample(targets: Tensor, drop_prob: float, *, seed: int) -> Tensor:
    """Hide each label with the same probability, independently (RPS).

    Args:
        targets: 1 for present, 0 for absent, -1 for unannotated, shape (N, C), in host memory.
        drop_prob: Probability that a label becomes -1, in [0, 1].
        seed: Of the draw; the same seed and shape hide the same labels.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError: If the dtype cannot hold -1.
        ValueError: If targets are not (N, C) or the probability is out of range.
    """
    _check_targets(targets)
    check_range(drop_prob=drop_prob, low=0.0, high=1.0, closed=True)
    generator = torch.Generator().manual_seed(seed)
    return targets.masked_fill(torch.rand(targets.shape, generator=generator) < drop_prob, -1)


def positives_only(targets: Tensor, drop_prob: float, *, seed: int) -> Tensor:
    """Hide all absent labels, and each present one with the same probability, independently.

    Args:
        targets: 1 for present, 0 for absent, -1 for unannotated, shape (N, C), in host memory.
        drop_prob: Probability that a present label becomes -1, in [0, 1].
        seed: Of the draw; the same seed and shape hide the same labels.

    Returns:
        A new tensor of the same shape and dtype, of 1 and -1.

    Raises:
        TypeError: If the dtype cannot hold -1.
        ValueError: If targets are not (N, C) or the probability is out of range.
    """
    return random_per_sample(targets, drop_prob, seed=seed).masked_fill(targets != 1, -1)


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    where = mask.nonzero().squeeze(1)
    return where[torch.randperm(len(where), generator=generator)]


def _check_targets(targets: Tensor) -> None:
    check_ndim(2, targets=targets)
    if not targets.dtype.is_signed:
        raise TypeError(f'targets must have a signed dtype, to hold -1, got {targets.dtype}; call .to(torch.int8).')
