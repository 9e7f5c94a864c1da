"""Scores and labels of many classes: what a fit asks of them, and how they are taken in parts."""
from collections.abc import Iterator

from torch import Tensor

from timm_miil._checks import check_floating, check_labels, check_ndim, check_same_shape, check_values
from timm_miil.metrics._batch import check_tensors

__all__ = ['check_labelled', 'check_labelled_probs', 'class_major', 'column_parts', 'pooled']

# Scores worked on at once; it bounds the extra memory of sorting them to some hundred megabytes.
PART_SCORES = 2 ** 22
# What describes all classes as one is a number or two: beyond this many scores, evenly spaced rows give it as well.
POOLED_SCORES = 2 ** 24


def check_labelled(targets: Tensor, **scores: Tensor) -> None:
    """Raise unless scores are floating (N, C) and finite, and targets are 1, 0 or -1 of that shape."""
    check_tensors(**scores, targets=targets)
    check_floating(**scores)
    check_ndim(2, **scores)
    check_same_shape(**scores, targets=targets)
    for name, tensor in scores.items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} must be finite, got {int((~tensor.isfinite()).sum())} values that are not.')
    check_labels(targets=targets, hint='1 is present, 0 absent and -1 unannotated; round soft targets first')


def check_labelled_probs(probs: Tensor, targets: Tensor) -> None:
    """Raise unless probs are floating (N, C) in [0, 1], and targets are 1, 0 or -1 of that shape."""
    check_labelled(targets, probs=probs)
    check_values(probs=probs, low=0.0, high=1.0, hint='call .sigmoid() if these are logits')


def column_parts(tensor: Tensor) -> Iterator[slice]:
    """Slices of the classes of (N, C), few enough to be worked on at once; none of an empty tensor."""
    rows, columns = tensor.shape
    width = max(1, PART_SCORES // max(1, rows))
    return (slice(start, start + width) for start in range(0, columns if rows else 0, width))


def class_major(tensor: Tensor) -> Tensor:
    """The same (N, C), each class's values side by side in memory: sorting them takes a fifth to a half of the time."""
    return tensor.t().contiguous().t()


def pooled(tensor: Tensor) -> Tensor:
    """All classes of (N, C) as one, shape (M, 1); of a large tensor only every so many rows."""
    return tensor[::max(1, -(-tensor.numel() // POOLED_SCORES))].reshape(-1, 1)
