"""A linear classifier on a frozen network's embeddings: the plainest measure of what a network has learnt."""
import math
from typing import Any

import torch
from torch import Tensor, nn

from timm_miil._checks import check_ndim, check_not_negative, check_positive, check_same_length, shown
from timm_miil._extras import require
from timm_miil.data import ImageStream, LabelledImages, mix_seed
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import METRIC_OF_TASK, measure

__all__ = ['embed_pictures', 'linear_probe', 'probe_metric']

MAX_ITERATIONS = 5000
SILENT = 1e-6  # deviation of a channel, as a part of the largest, below which it says nothing


def embed_pictures(
        model: nn.Module, source: LabelledImages | ImageStream, *, batch_size: int = 64, workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """What a network's classifier reads of pictures, preprocessed as the network's configuration says.

    Args:
        model: A timm model on its device; it runs in evaluation mode and is left as it was.
        source: Pictures and targets.
        batch_size: Pictures at a time.
        workers: Processes that read pictures.

    Returns:
        Embeddings (N, D), float64, and targets (N, C), int8, in host memory.

    Raises:
        OSError: If a picture cannot be read.
        TypeError: If the model does not give embeddings by timm's contract.
        ValueError: If there are no pictures.
    """
    network: Any = model
    kind, was_training = type(model).__name__, model.training
    if not hasattr(model, 'forward_features') or not hasattr(model, 'forward_head'):
        raise TypeError(f'model must have forward_features and forward_head, got {kind}; create it by timm.')
    device = next(model.parameters()).device
    loader = build_eval_loader(source, model, batch_size=batch_size, workers=workers, device=device)
    features, targets = [], []
    model.eval()
    try:
        for images, labels, *_ in loader:
            with torch.no_grad():
                found = network.forward_head(network.forward_features(images.to(device)), pre_logits=True)
            if found.ndim != 2:
                raise TypeError(
                    f'{kind} must give embeddings (B, D) by forward_head(..., pre_logits=True), got '
                    f'{tuple(found.shape)}; take a network with a pooled head.')
            features.append(found.cpu().double())
            targets.append(labels.to(torch.int8))
    finally:
        model.train(was_training)
    if not features:
        raise ValueError('source must have pictures, got none.')
    return torch.cat(features), torch.cat(targets)


def linear_probe(
        features: Tensor,
        targets: Tensor,
        test_features: Tensor,
        test_targets: Tensor,
        *,
        shots: int = 0,
        draws: int = 1,
        seed: int = 0,
        penalty: float = 1.0,
) -> float:
    """What scikit-learn's logistic regression on embeddings reaches: top-1 or, of several labels, mAP.

    Channels are scaled to mean 0 and deviation 1 over what is learnt from. Of several labels each has a classifier of
    its own, fitted to what is known of it.

    Args:
        features: Embeddings to learn from, shape (N, D), floating, in host memory.
        targets: 1 present, 0 absent, -1 unknown, shape (N, C).
        test_features: Embeddings to measure on, shape (M, D).
        test_targets: Likewise, shape (M, C).
        shots: Learn from so many pictures of each class only, for pictures of one label each; 0 takes all.
        draws: They are drawn so often, and the mean is returned.
        seed: Of the draws.
        penalty: Weight of half the squared norm of the classifier beside the sum of the pictures' losses, above 0.

    Returns:
        In percent; see `probe_metric` for what it is.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If shapes do not fit, a class has fewer pictures than `shots`, pictures of several labels have
            shots, or there are fewer than two classes to tell apart.
    """
    check_ndim(2, features=features, targets=targets, test_features=test_features, test_targets=test_targets)
    check_same_length(features=features, targets=targets)
    check_same_length(test_features=test_features, test_targets=test_targets)
    check_not_negative(shots=shots)
    check_positive(draws=draws)
    if not 0 < penalty < math.inf:
        raise ValueError(f'penalty must be above 0, got {shown(penalty)}.')
    if draws > 1 and not shots:
        raise ValueError(f'draws must be 1 where all pictures are learnt from, got {draws}; give shots.')
    metric = probe_metric(torch.cat([targets, test_targets]))
    if shots and metric != 'top1':
        raise ValueError('shots is for pictures of one label each; leave it out for pictures of several.')
    task, fit = ('single_label', _one_label) if metric == 'top1' else ('multi_label', _each_label)
    values = []
    for draw in range(draws):
        rows = _drawn(targets, shots, mix_seed(seed, draw)) if shots else torch.arange(len(targets))
        known = features[rows].double()
        mean, deviation = known.mean(0), known.std(0, correction=0)
        scale = deviation.where(deviation > SILENT * deviation.max(), math.inf)
        scores = fit((known - mean) / scale, targets[rows], (test_features.double() - mean) / scale, penalty)
        values.append(measure(scores, test_targets, task)[METRIC_OF_TASK[task]])
    return sum(values) / len(values)


def probe_metric(targets: Tensor) -> str:
    """What `linear_probe` measures: 'top1' if each row of the targets (N, C) is one known label, else 'map'."""
    is_single = bool(((targets == 1).sum(1) == 1).all() and (targets >= 0).all())
    return 'top1' if is_single else 'map'


def _drawn(targets: Tensor, shots: int, seed: int) -> Tensor:
    """So many rows of each class."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for label in range(targets.shape[1]):
        shown_in = (targets[:, label] == 1).nonzero().squeeze(1)
        if len(shown_in) < shots:
            raise ValueError(
                f'shots must be at most the training pictures of each class, got {shots} for class {label} with '
                f'{len(shown_in)}.')
        rows.append(shown_in[torch.randperm(len(shown_in), generator=generator)[:shots]])
    return torch.cat(rows)


def _one_label(features: Tensor, targets: Tensor, tested: Tensor, penalty: float) -> Tensor:
    """Scores of the tested pictures, shape (N, C); -inf for classes that nothing was learnt of."""
    label = targets.argmax(1)
    if len(label.unique()) < 2:
        raise ValueError('the training pictures must be of two classes or more, got one.')
    classifier = _logistic_regression(penalty).fit(features.numpy(), label.numpy())
    found = torch.from_numpy(classifier.decision_function(tested.numpy()))
    scores = torch.full((len(tested), targets.shape[1]), -math.inf, dtype=torch.float64)
    # Of two classes there is one score, of the second over the first.
    scores[:, torch.from_numpy(classifier.classes_)] = found if found.ndim == 2 else torch.stack([-found, found], 1)
    return scores


def _each_label(features: Tensor, targets: Tensor, tested: Tensor, penalty: float) -> Tensor:
    """Scores of the tested pictures, shape (N, C); 0 for labels that are not known to be both present and absent."""
    scores = torch.zeros(len(tested), targets.shape[1], dtype=torch.float64)
    fitted = 0
    for label in range(targets.shape[1]):
        rows = (targets[:, label] >= 0).nonzero().squeeze(1)
        own = targets[rows, label]
        if len(own.unique()) == 2:
            classifier = _logistic_regression(penalty).fit(features[rows].numpy(), own.numpy())
            scores[:, label] = torch.from_numpy(classifier.decision_function(tested.numpy()))
            fitted += 1
    if not fitted:
        raise ValueError('the training pictures must show a label in some and lack it in others, got no such label.')
    return scores


def _logistic_regression(penalty: float) -> Any:
    return require('sklearn.linear_model').LogisticRegression(C=1.0 / penalty, max_iter=MAX_ITERATIONS)
