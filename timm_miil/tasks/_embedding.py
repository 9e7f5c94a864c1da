"""A network in two parts by timm's contract: what its last layer reads, and that layer.

The embedding is `forward_head(forward_features(x), pre_logits=True)`, the layer is `get_classifier()`.
"""
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from timm_miil._timm import get_model_input_config

__all__ = ['embed', 'embed_and_classify', 'split_head']

PROBE_BATCH = 2
# The same operations give the same numbers, but for the choice of algorithms on a GPU.
PROBE_TOLERANCE = 1e-2


def embed(model: Any, images: Tensor) -> Tensor:
    """What the last layer of a model that `split_head` took reads, shape (B, D)."""
    embedding: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return embedding


def embed_and_classify(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding (B, D) and the logits (B, C) of such a model, in one pass."""
    embedding = embed(model, images)
    return embedding, model.get_classifier()(embedding)


def split_head(model: nn.Module) -> nn.Linear:
    """The last layer of a model whose logits are exactly `split_head(model)(embed(model, images))`.

    That they are is checked by running the model on two made-up pictures of its input size, in evaluation mode; the
    model, its modes and all random numbers are left as they are.

    Args:
        model: A timm model with a linear classifier, without wrappers.

    Returns:
        The model's own layer, not a copy: a nn.Linear (D -> C).

    Raises:
        TypeError: If the model lacks timm's contract, or its logits are not one linear layer on its embedding (two
            classifiers, a convolution, an ML-Decoder).
    """
    kind = type(model).__name__
    for name in ('forward_features', 'forward_head', 'get_classifier'):
        if not callable(getattr(model, name, None)):
            raise TypeError(
                f'the model must be a timm image model with forward_features, forward_head and get_classifier, got '
                f'{kind} without {name}; create it with timm.create_model.')
    model_: Any = model
    if 'pre_logits' not in inspect.signature(model_.forward_head).parameters:
        raise TypeError(f'forward_head of {kind} must take pre_logits; take a model that gives its embedding.')
    classifier = model_.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise TypeError(
            f'the classifier of {kind} must be one nn.Linear on the embedding, got {_kind(classifier)}; take a model '
            f'with one linear classifier (not a distilled one of two, nor one of convolutions or queries).')
    _check_probe(model, classifier)
    return classifier


def _check_probe(model: nn.Module, classifier: nn.Linear) -> None:
    """Raise TypeError unless the classifier reads the embedding, and what it gives is the output."""
    like = next(model.parameters())
    images = _made_up((PROBE_BATCH, *get_model_input_config(model)['input_size'])).to(like)
    answer = _made_up((PROBE_BATCH, classifier.out_features)).to(like)
    read: list[Tensor] = []

    def exchange(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        # Not its own output: one that starts at zero would hide anything.
        read.append(inputs[0])
        return answer

    handle = classifier.register_forward_hook(exchange)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits, embedding = model(images), embed(model, images)
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    if len(read) != 1 or not _equal(embedding, read[0]) or not _equal(logits, answer):
        raise TypeError(
            f'the logits of {type(model).__name__} must be its get_classifier() on forward_head(..., '
            f'pre_logits=True), got others; take a model whose last layer is a linear one on the embedding.')


def _made_up(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).sin().reshape(shape)


def _equal(output: Any, expected: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.shape != expected.shape or output.ndim != 2:
        return False
    return bool((output - expected).abs().max() <= PROBE_TOLERANCE * expected.abs().max())


def _kind(classifier: object) -> str:
    if isinstance(classifier, (tuple, list)):
        return ' and '.join(map(_kind, classifier))
    return type(classifier).__name__
