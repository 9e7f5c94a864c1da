"""Convolutions that see the whole picture (LgConv): a global branch beside each 3x3 convolution.

Yuan et al., "Positive Label Is All You Need for Multi-Label Classification", arXiv:2306.16016, checked against the
published code, github.com/TAKELAMAG/PU-MLC.

Deviation: the branch starts at exactly 0, so that a converted network is the network it was; the published code draws
the scale of its last norm with deviation 0.0001.
"""
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil._checks import check_positive

__all__ = ['LocalGlobalConv', 'convert_to_lgconv']

KERNEL = (3, 3)


class LocalGlobalConv(nn.Module):
    """A 3x3 convolution plus a branch that reads all positions.

    Of features x (B, C, H, W), h = relu(reduce(x)) beside its mean over the positions gives each of K heads a softmax
    over the positions and a gate in (0, 1) at each. A head's C / K channels of value(x), averaged by the softmax and
    times the gate, are added to x; a 1x1 convolution of the given one's stride and a batch norm follow.

    Args:
        conv: The convolution, which becomes a part of this.
        num_heads: Heads K, a divisor of the input's channels.
        reduction: Input channels over those of h, at least 1.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If conv is no plain 3x3 convolution that keeps the size but for its stride, or the heads do not
            divide its channels.

    Example:
        >>> conv = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(LocalGlobalConv(conv)(x), conv(x))
        True
    """

    def __init__(self, conv: nn.Conv2d, *, num_heads: int = 8, reduction: int = 4) -> None:
        super().__init__()
        check_positive(num_heads=num_heads, reduction=reduction)
        if not _fits(conv, num_heads):
            raise ValueError(
                f'conv must be a plain 3x3 convolution with padding as wide as its dilation and input channels that '
                f'are a multiple of {num_heads} heads, got {conv}.')
        width, hidden = conv.in_channels, max(conv.in_channels // reduction, 1)
        placement: dict[str, Any] = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
        self.num_heads = num_heads
        self.conv = conv
        self.reduce = nn.Conv2d(width, hidden, 1, **placement)
        self.attention = nn.Conv2d(2 * hidden, num_heads, 1, **placement)
        self.gate = nn.Conv2d(2 * hidden, num_heads, 1, **placement)
        self.value = nn.Conv2d(width, width, 1, **placement)
        self.proj = nn.Conv2d(width, conv.out_channels, 1, stride=cast(tuple[int, int], conv.stride), **placement)
        self.norm = nn.BatchNorm2d(conv.out_channels, **placement)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H', W'), as the convolution alone gives them, of features (B, C, H, W)."""
        hidden = F.relu(self.reduce(x))
        hidden = torch.cat([hidden, hidden.mean((2, 3), keepdim=True).expand_as(hidden)], dim=1)
        attention = self.attention(hidden).flatten(2).softmax(-1)                       # (B, K, H * W)
        value = self.value(x).flatten(2).unflatten(1, (self.num_heads, -1))             # (B, K, C / K, H * W)
        summary = value @ attention.unsqueeze(-1)                                       # (B, K, C / K, 1)
        context = summary.unsqueeze(-1) * self.gate(hidden).sigmoid().unsqueeze(2)      # (B, K, C / K, H, W)
        return self.conv(x) + self.norm(self.proj(x + context.flatten(1, 2)))


def convert_to_lgconv(model: nn.Module, *, num_heads: int = 8, reduction: int = 4) -> int:
    """Give the 3x3 convolutions of a network global branches, in place; what it computes stays the same at first.

    Left alone are convolutions whose channels the heads do not divide, such as the first one's, that change the size
    by more than their stride, or that are of another kind, such as timm's with padding by need.

    Args:
        model: Network whose parts are converted.
        num_heads: Heads of each branch.
        reduction: As of `LocalGlobalConv`.

    Returns:
        The number of converted convolutions.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there is nothing to convert.

    Example:
        >>> convert_to_lgconv(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)))
        1
    """
    check_positive(num_heads=num_heads, reduction=reduction)
    found = [
        (parent, name, child) for parent in model.modules() if not isinstance(parent, LocalGlobalConv)
        for name, child in parent.named_children() if _fits(child, num_heads)]
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no 3x3 convolution that could be converted; take a convolutional network with '
            f'widths that are multiples of {num_heads}.')
    for parent, name, conv in found:
        setattr(parent, name, LocalGlobalConv(conv, num_heads=num_heads, reduction=reduction))
    return len(found)


def _fits(module: nn.Module, num_heads: int) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d and module.kernel_size == KERNEL and module.padding == module.dilation
        and module.in_channels % num_heads == 0)
