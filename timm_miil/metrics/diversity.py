"""How diverse is what a network has learnt: its filters, and its embeddings of pictures.

Nayman et al., "Diverse Imagenet Models Transfer Better", arXiv:2204.09134, find that networks transfer by the accuracy
on what they were trained on and by diversity together. The paper's own formula was not at hand: these are measures of
ours, of known kinds, whose sources stand at each. All compute in float64 in host memory.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_floating, check_indices, check_ndim, check_positive, check_range, check_same_length
from timm_miil.metrics._batch import check_tensors

__all__ = [
    'cka_redundancy', 'effective_rank', 'filter_diversity', 'layer_filter_diversity', 'mean_log_odds', 'nc1',
    'output_std', 'participation_ratio',
]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CHUNK_ROWS = 1 << 10
CONSTANT = 1e-12  # deviation of unit rows from their mean that is but rounding


def filter_diversity(model: nn.Module) -> float:
    """Mean of `layer_filter_diversity` over the layers of a network.

    Args:
        model: Any network; it is only read.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If no layer has two filters, or a weight is not finite.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> _ = nn.init.eye_(layer.weight)
        >>> filter_diversity(layer)
        1.0
    """
    values = layer_filter_diversity(model).values()
    if not values:
        raise ValueError(
            f'model must have a convolution or a linear layer of two filters or more besides its classifier, got '
            f'{type(model).__name__}.')
    return sum(values) / len(values)


def layer_filter_diversity(model: nn.Module) -> dict[str, float]:
    """How different the filters of each layer are: 1 - mean over pairs of |cosine|.

    Orthogonal filters give 1, multiples of one filter 0. Neither order, sign nor length of the filters counts. A layer
    with more filters than each has numbers cannot reach 1.

    Args:
        model: Any network. Its convolutions and linear layers are measured, each filter flattened, but for the
            classifier that `get_classifier()` tells, whose rows are classes. Filters that are all zero are left out,
            and then layers with fewer than two.

    Returns:
        In [0, 1] by the layer's name, in the order of the network.

    Raises:
        ValueError: If a weight is not finite.
    """
    classifier = getattr(model, 'get_classifier', lambda: None)()
    left_out = set(classifier.modules()) if isinstance(classifier, nn.Module) else set()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and layer not in left_out:
            filters = layer.weight.detach().to('cpu', torch.float64).flatten(1)
            if not bool(filters.isfinite().all()):
                raise ValueError(f'the weights of layer {name!r} must be finite.')
            filters = filters[filters.any(1)]
            if len(filters) > 1:
                found[name] = _mean_distance(filters)
    return found


def effective_rank(features: Tensor) -> float:
    """In how many directions embeddings spread: exp of the entropy of their singular values, which sum to 1.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, of rows that are scaled
    to length 1 and not centred.

    Args:
        features: Embeddings of M pictures, shape (M, D), floating.

    Returns:
        In [1, min(M, D)]; a rotation of the embeddings changes nothing.

    Raises:
        TypeError: If features are no floating tensor.
        ValueError: If they are not (M, D), not finite, or all zero.

    Example:
        >>> round(effective_rank(torch.eye(4)), 6)
        4.0
    """
    share = _spectrum(features)
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


def participation_ratio(features: Tensor) -> float:
    """In how many directions embeddings spread: (sum of variances)^2 / sum of squared variances along them.

    The variances are the squared singular values of the rows, scaled to length 1 and not centred.

    Args:
        features: As of `effective_rank`.

    Returns:
        In [1, min(M, D)].

    Raises:
        TypeError: As `effective_rank`.
        ValueError: As `effective_rank`.
    """
    variance = _spectrum(features).square()
    return float(variance.sum().square() / variance.square().sum())


def cka_redundancy(features: Tensor) -> float:
    """How much the first half of the channels tells of the second: linear CKA of the two.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, Eq. 5, of rows that
    are scaled to length 1.

    Args:
        features: Embeddings of M pictures, shape (M, D) with D of at least 2, floating; of an odd D the second half has
            one channel more.

    Returns:
        In [0, 1]: 0 for halves that are not correlated, 1 for halves that are rotations of each other. NaN where a half
        is the same for all pictures.

    Raises:
        TypeError: As `effective_rank`.
        ValueError: As `effective_rank`, or if D is 1.
    """
    rows = _unit_rows(features)
    if rows.shape[1] < 2:
        raise ValueError(f'features must have two channels or more, to be halved, got shape {tuple(rows.shape)}.')
    rows = rows - rows.mean(0)
    half = rows.shape[1] // 2
    first, second = rows[:, :half], rows[:, half:]
    own = [float((part.T @ part).norm()) for part in (first, second)]
    if min(own) <= CONSTANT ** 2 * len(rows):
        return math.nan
    return float((first.T @ second).square().sum()) / (own[0] * own[1])


def output_std(features: Tensor) -> float:
    """Whether outputs collapse to one: the standard deviation of channels, of rows that are scaled to length 1.

    Chen and He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566, Fig. 2, times the root of D.

    Args:
        features: As of `effective_rank`.

    Returns:
        The mean over the channels, in [0, 1]: 0 where all rows have one direction, 1 where directions are even.

    Raises:
        TypeError: As `effective_rank`.
        ValueError: As `effective_rank`.
    """
    rows = _unit_rows(features)
    return float(rows.std(0, correction=0).mean()) * math.sqrt(rows.shape[1])


def nc1(features: Tensor, labels: Tensor) -> float:
    """Within-class against between-class variation: tr(S_W S_B^+) / K, which falls as classes collapse to points.

    Papyan et al., "Prevalence of neural collapse during the terminal phase of deep learning training",
    arXiv:2008.08186: S_W is the mean over pictures of (h - m_c)(h - m_c)^T, S_B the mean over the K classes of
    (m_c - m)(m_c - m)^T, m_c a class's mean, m the mean of those, ^+ the pseudo-inverse.

    Args:
        features: Embeddings, shape (M, D), floating; they are not scaled, as a scale changes nothing.
        labels: Class of each, shape (M,), of an integer dtype; K counts the classes that occur.

    Returns:
        At least 0.

    Raises:
        TypeError: If features are no floating tensor, or labels no class indices.
        ValueError: If shapes do not fit, a feature is not finite, a label is below 0, or there are fewer than two
            classes, or all have one mean.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]])
        >>> round(nc1(features, torch.tensor([0, 0, 1, 1])), 6)     # it varies within classes where they do not differ
        0.0
    """
    rows = _rows(features)
    check_tensors(labels=labels)
    check_ndim(1, labels=labels)
    check_same_length(features=features, labels=labels)
    check_indices(labels=labels, num_classes=1 << 62, read=True)
    classes, label = labels.detach().cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f'labels must have two classes or more, got {len(classes)}.')
    rows = rows - rows.mean(0)  # a common offset would cost digits
    means = torch.zeros(len(classes), rows.shape[1], dtype=rows.dtype).index_add_(0, label, rows)
    means /= label.bincount().unsqueeze(1)
    within, between = rows - means[label], means - means.mean(0)
    if not bool(between.any()):
        raise ValueError('features must have class means that differ, got one mean for all classes.')
    # With S_B = B^T B / K its pseudo-inverse is K B^+ (B^+)^T: the K cancels.
    return float((within @ torch.linalg.pinv(between)).square().sum(1).mean())


def mean_log_odds(accuracies: Sequence[float], *, num_pictures: Sequence[int] | None = None) -> float:
    """Mean of log(p / (1 - p)): the usual figure of a network's transfer to several data sets.

    Kornblith et al., "Do Better ImageNet Models Transfer Better?", arXiv:1805.08974, section 3. An equal factor fewer
    errors counts equally, from 50 to 75 % as from 98 to 99 %, nearly.

    Args:
        accuracies: Fractions in (0, 1), one a data set.
        num_pictures: On how many pictures each was measured. Fractions in [0, 1] are then moved to half a picture from
            0 and 1, beyond which so many pictures cannot tell.

    Raises:
        TypeError: If an accuracy is no number, or a count no int.
        ValueError: If there is none, one is out of range, or the counts are of another number or below 1.

    Example:
        >>> round(mean_log_odds([0.5, 0.9]), 4)
        1.0986
        >>> round(mean_log_odds([1.0], num_pictures=[500]), 2)       # as 999 of 1000
        6.91
    """
    if not len(accuracies):
        raise ValueError('accuracies must have one fraction or more, got none.')
    if num_pictures is not None and len(num_pictures) != len(accuracies):
        raise ValueError(
            f'num_pictures must have one count an accuracy, got {len(num_pictures)} for {len(accuracies)}.')
    total = 0.0
    for index, fraction in enumerate(accuracies):
        name: dict[str, Any] = {f'accuracies[{index}]': fraction}
        if num_pictures is None:
            check_range(low=math.ulp(0.0), high=1.0, **name)
        else:
            check_range(low=0.0, high=1.0, closed=True, **name)
            check_positive(**{f'num_pictures[{index}]': num_pictures[index]})
            half = 0.5 / num_pictures[index]
            fraction = min(max(fraction, half), 1.0 - half)
        total += math.log(fraction) - math.log1p(-fraction)
    return total / len(accuracies)


def _mean_distance(filters: Tensor) -> float:
    """1 - mean |cosine| of two of the filters (N, d)."""
    filters = filters / filters.abs().amax(1, keepdim=True)  # squares of tiny numbers would vanish
    unit = F.normalize(filters, dim=1)
    total = sum(float((chunk @ unit.T).abs().sum()) for chunk in unit.split(CHUNK_ROWS))
    count = len(unit)
    mean = (total - count) / (count * (count - 1))
    return min(max(1.0 - mean, 0.0), 1.0)  # but for rounding it is in there


def _spectrum(features: Tensor) -> Tensor:
    return torch.linalg.svdvals(_unit_rows(features))


def _unit_rows(features: Tensor) -> Tensor:
    rows = _rows(features)
    largest = rows.abs().amax(1, keepdim=True)
    if not bool(largest.any()):
        raise ValueError('features must not all be zero.')
    return F.normalize(rows / largest.where(largest > 0, 1.0), dim=1)


def _rows(features: Tensor) -> Tensor:
    check_tensors(features=features)
    check_floating(features=features)
    check_ndim(2, features=features)
    if not features.numel():
        raise ValueError(f'features must have a row and a column or more, got shape {tuple(features.shape)}.')
    rows = features.detach().to('cpu', torch.float64)
    if not bool(rows.isfinite().all()):
        raise ValueError('features must be finite, got NaN or infinity; look for where the model diverged.')
    return rows
