"""The plain head to compare with: the mean over positions (global average pooling), then a linear layer."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_not_negative, check_positive, check_range
from timm_miil.heads.ml_decoder import flatten_features

__all__ = ['GAPHead']


class GAPHead(nn.Module):
    """Global average pooling, dropout and a linear layer.

    Args:
        in_features: Channels of the features.
        num_classes: Number of classes K.
        num_prefix_tokens: First tokens to leave out of the mean, such as a class token; maps have none.
        drop_rate: Dropout on the pooled features, in [0, 1).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> import torch
        >>> head = GAPHead(in_features=64, num_classes=80)
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 80])
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_prefix_tokens: int = 0,
            drop_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes)
        check_not_negative(num_prefix_tokens=num_prefix_tokens)
        check_range(drop_rate=drop_rate, low=0.0, high=1.0)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_prefix_tokens = num_prefix_tokens
        self.drop_rate = drop_rate
        self.fc = nn.Linear(in_features, num_classes, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after `to_empty`."""
        self.fc.reset_parameters()

    def extra_repr(self) -> str:
        return f'num_prefix_tokens={self.num_prefix_tokens}, drop_rate={self.drop_rate}'

    def forward(self, features: Tensor) -> Tensor:
        """Classify unpooled features.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K).

        Raises:
            ValueError: If the shape is neither of these, or there are prefix tokens only.
        """
        tokens = flatten_features(features, self.in_features)
        if features.ndim == 3 and self.num_prefix_tokens > 0:
            if tokens.shape[1] <= self.num_prefix_tokens:
                raise ValueError(
                    f'features must have more than the {self.num_prefix_tokens} prefix tokens, got tokens '
                    f'{tokens.shape}.')
            tokens = tokens[:, self.num_prefix_tokens:]
        return self.fc(F.dropout(tokens.mean(1), self.drop_rate, self.training))
