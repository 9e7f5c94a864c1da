"""Which classes of a picture become its tags."""
import itertools

from torch import Tensor

__all__ = ['select_classes']


def select_classes(confidence: Tensor, thresholds: Tensor, topk: int | None) -> list[list[tuple[float, int]]]:
    """Of each picture the confidences that reach their thresholds, with their classes; the greatest first.

    Only these are sorted: of thousands of classes a picture shows a few.

    Args:
        confidence: Shape (B, C), none below 0; a NaN reaches no threshold.
        thresholds: Shape (C,), of the same dtype.
        topk: How many are kept at most, of equal ones those of lower class; None for all.
    """
    kept = confidence >= thresholds
    if topk is not None and topk < len(thresholds):
        reached = confidence.where(kept, -1.0)
        kept &= reached >= reached.topk(topk).values[:, -1:]  # also all that equal the last of them
    rows, classes = kept.nonzero(as_tuple=True)  # by class; the sorts are stable, so equal ones stay so
    order = confidence[rows, classes].argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows, classes = rows[order], classes[order]
    found = zip(confidence[rows, classes].tolist(), classes.tolist())
    return [list(itertools.islice(found, count))[:topk] for count in kept.sum(dim=1).tolist()]
