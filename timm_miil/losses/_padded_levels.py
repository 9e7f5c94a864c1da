"""Semantic softmax on an accelerator without a compiler: all levels at once, filled up to the largest.

Launching is what small operations cost there. A level at a time takes hundreds of them, this about fifty.
"""
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_miil.losses._precision import widen

__all__ = ['fits', 'padded_grad', 'padded_losses']

# More than so many times the classes would be memory spent on filling.
LARGEST_SHARE = 4


def fits(sizes: Sequence[int]) -> bool:
    """Whether levels of these sizes, the last of classes in no level, are near enough to each other's size."""
    return len(sizes) > 1 and (len(sizes) - 1) * max(sizes[:-1]) <= LARGEST_SHARE * sum(sizes)


def padded_losses(
        scores: Tensor, targets: Tensor, sizes: tuple[int, ...], factors: tuple[float, ...], smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss of each row (B,), and log-sum-exp of its levels (B, J), of scores (B, K) in level order.

    Args:
        scores: Raw scores.
        targets: Place within each level, shape (B, J); -1 where a row does not reach it.
        sizes: Of the J levels, and the number of classes in none.
        factors: Of the J levels.
        smoothing: As in `semantic_softmax_loss`.
    """
    level = _padded(scores, sizes)
    is_class, factor, share = _constants(sizes, factors, smoothing, level.dtype, level.device)
    peak = level.amax(dim=2, keepdim=True)
    level = level - peak
    linear = (1 - smoothing) * level.gather(2, targets.clamp(min=0)[:, :, None]).squeeze(2)
    linear = linear + share * level.where(is_class, 0.0).sum(dim=2)
    log_sums = level.exp_().sum(dim=2).log()
    losses = torch.where(targets >= 0, factor * (log_sums - linear), 0.0)
    return losses.sum(dim=1), log_sums + peak.squeeze(2)


def padded_grad(
        scores: Tensor, targets: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sums: Tensor,
        sizes: tuple[int, ...], factors: tuple[float, ...], smoothing: float,
) -> Tensor:
    """Gradient of the scores, given those of both results of `padded_losses`."""
    prob = _padded(scores, sizes).sub_(log_sums[:, :, None]).exp_()
    _, factor, share = _constants(sizes, factors, smoothing, prob.dtype, prob.device)
    weight = torch.where(targets >= 0, factor * grad_loss[:, None], 0.0)
    grad = prob.mul_((weight + grad_log_sums)[:, :, None]).sub_((weight * share)[:, :, None])
    place = targets.clamp(min=0)[:, :, None]
    # Not scatter_add_, which torch.use_deterministic_algorithms refuses.
    grad.scatter_(2, place, grad.gather(2, place) - ((1 - smoothing) * weight)[:, :, None])
    grad = grad.to(scores.dtype)
    levels = [level[:, :size] for level, size in zip(grad.unbind(dim=1), sizes)]
    return torch.cat([*levels, grad.new_zeros(len(grad), sizes[-1])], dim=1)


def _padded(scores: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The levels one above the other, shape (B, J, W), in float32 or wider; -inf fills them up."""
    *levels, _ = scores.split(sizes, dim=1)
    filler = scores.new_full((), -math.inf).expand(len(scores), max(sizes[:-1]))
    pieces = [piece for level in levels for piece in (level, filler[:, level.shape[1]:])]
    return widen(torch.cat(pieces, dim=1).view(len(scores), len(levels), -1))


@functools.lru_cache(maxsize=16)
def _constants(
        sizes: tuple[int, ...], factors: tuple[float, ...], smoothing: float, dtype: torch.dtype, device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which places are classes (J, W), the factors and e / n (J,), there: a copy from host memory waits."""
    is_class = torch.tensor([[place < size for place in range(max(sizes[:-1]))] for size in sizes[:-1]], device=device)
    factor, share = (
        torch.tensor(values, dtype=dtype, device=device) for values in (factors, [smoothing / n for n in sizes[:-1]]))
    return is_class, factor, share
