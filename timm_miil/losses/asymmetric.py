"""Asymmetric loss (ASL) for multi-label classification.

Ridnik et al., "Asymmetric Loss For Multi-Label Classification", arXiv:2009.14119.

Deviations from the published code, none of which changes its value or gradient where that is defined:
half precision is computed in float32 (eps would round to 0), the gradient through the focusing weight is 0
where the weight's base is 0 (a power in (0, 1) would give NaN), and 1 - sigmoid(x) is taken as sigmoid(-x).
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil._checks import check_choice, check_range, check_same_shape
from timm_miil.losses._reduce import REDUCTIONS, reduce

__all__ = ['AsymmetricLoss', 'asymmetric_loss']

_EPS_MIN = torch.finfo(torch.float32).tiny


def asymmetric_loss(
        logits: Tensor,
        targets: Tensor,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        eps: float = 1e-8,
        detach_focal: bool = True,
        reduction: str = 'sum',
) -> Tensor:
    """Binary cross-entropy that decays easy negatives faster than easy positives.

    With p = sigmoid(x) and p_m = max(p - m, 0), an element costs -(1 - p)^gamma+ log(p) when present and
    -p_m^gamma- log(1 - p_m) when absent. A soft target y mixes both logarithms by y and shares one weight,
    whose base and power are mixed by y as well.

    Args:
        logits: Raw scores x, shape (B, C); any floating dtype, computed in float32 or wider.
        targets: 1 for present, 0 for absent or a number between, shape (B, C); any dtype. The unannotated
            mark -1 is refused for targets in host memory; elsewhere the caller vouches for the values.
        gamma_neg: Focusing power on negatives (the paper's gamma-), at least 0.
        gamma_pos: Focusing power on positives (gamma+), at least 0; 0 means no focusing.
        clip: Probability shift (the paper's m) that silences easy negatives, in [0, 1).
        eps: Probabilities below it are clamped and get no gradient, in (0, 1).
        detach_focal: Take the focusing weight as a constant in the backward pass, as the authors train.
        reduction: 'sum' (the authors'), 'mean' over B * C, 'batchmean' (sum / B) or 'none'.

    Returns:
        A scalar, or shape (B, C) when reduction is 'none'; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes differ, a setting is out of range, or targets in host memory are not in
            [0, 1].

    Example:
        >>> asymmetric_loss(torch.tensor([[2.0, -3.0]]), torch.tensor([[1.0, 0.0]]), gamma_neg=0.0, clip=0.0)
        tensor(0.1755)
    """
    _check_settings(gamma_neg, gamma_pos, clip, eps, reduction)
    check_same_shape(logits=logits, targets=targets)
    _check_target_values(targets)

    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = targets.to(x.dtype)
    log_eps = math.log(eps)
    # log(max(p, eps)) as max(log p, log eps): exact for large |x|, and the clamp still stops the gradient.
    log_pos = F.logsigmoid(x).clamp(min=log_eps)
    if clip:
        # sigmoid(-x), not 1 - sigmoid(x): the latter has lost four digits by x = 10 in float32.
        log_neg = (x.neg().sigmoid() + clip).clamp(min=eps, max=1.0).log()
    else:
        log_neg = F.logsigmoid(-x).clamp(min=log_eps)
    loss = -(y * log_pos + (1 - y) * log_neg)
    if gamma_neg or gamma_pos:
        loss = loss * _focal_weight(x.detach() if detach_focal else x, y, gamma_neg, gamma_pos, clip)
    return reduce(loss, reduction)


class AsymmetricLoss(nn.Module):
    """Asymmetric loss with fixed settings; see `asymmetric_loss` for the mathematics and the arguments."""

    def __init__(
            self,
            *,
            gamma_neg: float = 4.0,
            gamma_pos: float = 0.0,
            clip: float = 0.05,
            eps: float = 1e-8,
            detach_focal: bool = True,
            reduction: str = 'sum',
    ) -> None:
        super().__init__()
        _check_settings(gamma_neg, gamma_pos, clip, eps, reduction)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.eps = eps
        self.detach_focal = detach_focal
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits (B, C) against targets (B, C)."""
        return asymmetric_loss(
            logits, targets, gamma_neg=self.gamma_neg, gamma_pos=self.gamma_pos, clip=self.clip, eps=self.eps,
            detach_focal=self.detach_focal, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f'gamma_neg={self.gamma_neg}, gamma_pos={self.gamma_pos}, clip={self.clip}, eps={self.eps}, '
            f'detach_focal={self.detach_focal}, reduction={self.reduction!r}')


def _focal_weight(x: Tensor, y: Tensor, gamma_neg: float, gamma_pos: float, clip: float) -> Tensor:
    """(1 - p_t)^gamma with p_t = p y + (1 - p_m)(1 - y) and gamma = gamma+ y + gamma- (1 - y)."""
    prob_shifted = (x.sigmoid() - clip).clamp(min=0.0) if clip else x.sigmoid()     # p_m
    base = y * x.neg().sigmoid() + (1 - y) * prob_shifted
    power = gamma_pos * y + gamma_neg * (1 - y)
    # The slope of base^power at 0 is infinite for a power below 1, and times 0 it would be NaN. The log term
    # is 0 there too, so any constant serves.
    return torch.where(base > torch.finfo(x.dtype).tiny, base, 1.0) ** power


def _check_settings(gamma_neg: float, gamma_pos: float, clip: float, eps: float, reduction: str) -> None:
    check_range(gamma_neg=gamma_neg, gamma_pos=gamma_pos, low=0.0, high=math.inf)
    check_range(clip=clip, low=0.0, high=1.0)
    check_range(eps=eps, low=_EPS_MIN, high=1.0)
    check_choice(reduction=reduction, choices=REDUCTIONS)


def _check_target_values(targets: Tensor) -> None:
    # Reading values makes an accelerator wait and breaks a compiled graph; in host memory it is cheap.
    if not targets.is_cpu or torch.compiler.is_compiling() or not targets.numel():
        return
    low, high = (float(value) for value in targets.detach().aminmax())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f'targets must be in [0, 1], got values from {low:g} to {high:g}; this loss has no unannotated '
            f'labels (-1): set them to 0, or leave these pictures out.')
