"""Class-specific residual attention (CSRA): where a class scores high counts more, beside the mean over positions.

Zhu and Wu, "Residual Attention: A Simple But Effective Method for Multi-Label Recognition", arXiv:2108.02456, Eq. 2 to
7; original code in Kevinz-code/CSRA. The weights of all heads are one tensor (K, H, D), so that one product gives all
scores. Deviations: none in the numbers.
"""
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_positive, check_range, shown
from timm_miil.heads.ml_decoder import check_classes, flatten_features

__all__ = ['CSRA', 'CosineScores']

# Number of heads -> the paper's softmax temperatures; infinite means the maximum over positions.
TEMPERATURES: Mapping[int, tuple[float, ...]] = MappingProxyType({
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
})


class CosineScores(nn.Module):
    """Score of each class by each head at each position: the product with a class weight of length 1, no bias.

    Weight (K, H, D), of any length.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_heads: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_heads, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[2] ** -0.5  # as of a convolution
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score tokens (B, N, D); returns (B, K, H, N)."""
        classes, heads = self.weight.shape[:2]
        weight = F.normalize(self.weight.flatten(0, 1), dim=1)
        return (weight @ tokens.transpose(1, 2)).unflatten(1, (classes, heads))


class CSRA(nn.Module):
    """Class-specific residual attention: mean score of a class plus its scores weighted by their own softmax.

    With scores s (over positions) of a head of temperature T, its logit is `mean(s) + residual_weight * sum(s *
    softmax(T * s))`; the heads' logits are added.

    Args:
        in_features: Channels of the features.
        num_classes: Number of classes K.
        num_heads: Heads, one of 1, 2, 4, 6, 8; each number has the paper's temperatures, and from 2 on the last head
            takes the maximum.
        residual_weight: Weight of the attention beside the mean (the paper's lambda); the authors take 0.1 with one
            head on VOC 2007 and 0.5 with six on COCO.
        drop_rate: Dropout on the features, in [0, 1); none in the paper.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size or a rate is out of range.

    Example:
        >>> import torch
        >>> head = CSRA(in_features=64, num_classes=80, num_heads=4)
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 80])
    """

    if TYPE_CHECKING:
        temperature: Tensor

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_heads: int = 1,
            residual_weight: float = 0.1,
            drop_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes, num_heads=num_heads)
        if num_heads not in TEMPERATURES:
            raise ValueError(f'num_heads must be one of {", ".join(map(str, TEMPERATURES))}, got {shown(num_heads)}.')
        check_range(residual_weight=residual_weight, low=0.0, high=math.inf)
        check_range(drop_rate=drop_rate, low=0.0, high=1.0)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.residual_weight = residual_weight
        self.drop_rate = drop_rate
        self.fc = CosineScores(in_features, num_classes, num_heads, device=device, dtype=dtype)
        soft = [[value] for value in TEMPERATURES[num_heads] if value < math.inf]
        self.has_max = len(soft) < num_heads
        self.register_buffer('temperature', torch.tensor(soft, device=device, dtype=dtype), persistent=False)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after `to_empty`."""
        soft = [[value] for value in TEMPERATURES[self.num_heads] if value < math.inf]
        self.temperature.copy_(torch.tensor(soft))
        self.fc.reset_parameters()

    @torch.jit.ignore
    def reset_classes(self, num_classes: int) -> None:
        """Draw fresh weights for another number of classes; there are no others.

        Raises:
            TypeError: If num_classes is not an int.
            ValueError: If num_classes is below 1.
        """
        check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        weight = self.fc.weight
        self.fc = CosineScores(
            self.in_features, num_classes, self.num_heads, device=weight.device, dtype=weight.dtype)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, residual_weight={self.residual_weight}, drop_rate={self.drop_rate}'

    def forward(self, features: Tensor) -> Tensor:
        """Classify unpooled features.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K).

        Raises:
            ValueError: If the shape is neither of these.
        """
        tokens = flatten_features(features, self.in_features)
        scores = self.fc(F.dropout(tokens, self.drop_rate, self.training))
        soft = scores[:, :, :len(self.temperature)]
        attended = (soft * (soft * self.temperature).softmax(-1)).sum((2, 3))
        if self.has_max:
            attended = attended + scores[:, :, -1].amax(-1)
        return scores.mean(-1).sum(-1) + self.residual_weight * attended

    def attention_maps(self, features: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Which positions a class attends to, averaged over heads; no dropout.

        A head that takes the maximum attends to one position.

        Args:
            features: As in `forward`.
            classes: Indices of classes, in any order; None for all.

        Returns:
            Attention (B, len(classes), N) over the N positions, prefix tokens included, as they come in; each row
            sums to 1. float32 or wider.

        Raises:
            TypeError: If an index is not an int.
            ValueError: If an index is out of range, or the shape of the features is wrong.

        Example:
            >>> head = CSRA(in_features=64, num_classes=80)
            >>> head.attention_maps(torch.randn(2, 64, 7, 7), classes=[3]).shape
            torch.Size([2, 1, 49])
        """
        chosen = list(check_classes(classes, self.num_classes))
        scores = self.fc(flatten_features(features, self.in_features))[:, chosen]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = (scores[:, :, :len(self.temperature)] * self.temperature).softmax(-1).sum(2)
        if self.has_max:
            weights = weights + F.one_hot(scores[:, :, -1].argmax(-1), scores.shape[-1])
        return weights / self.num_heads
