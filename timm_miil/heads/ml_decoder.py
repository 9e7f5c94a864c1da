"""ML-Decoder: a classification head that cross-attends from class queries to image features.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933; original code in
Alibaba-MIIL/ML_Decoder. Deviations: the group size is a true ceiling (the original rounds K/G + 0.999 down, which
is wrong when K mod G is small against G); the queries are a buffer, as they are never trained; keys are spelled
out (`convert_original_state_dict` reads the original's).
"""
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_multiple, check_positive, check_range, nearest
from timm_miil._errors import CheckpointError

__all__ = [
    'CrossAttention', 'GroupLinear', 'MLDecoder', 'QueryDecoder', 'convert_original_state_dict', 'flatten_features',
]

NUM_GROUPS = 100
EMBED_DIM = 768
NUM_HEADS = 8
FEEDFORWARD_DIM = 2048
DROP_RATE = 0.1


def flatten_features(features: Tensor, in_features: int) -> Tensor:
    """Bring a feature map to tokens, row by row.

    Args:
        features: Map (B, D, H, W) or tokens (B, N, D).
        in_features: Expected D.

    Returns:
        Tokens (B, N, D); a view of the input.

    Raises:
        ValueError: If the rank is neither 3 nor 4, D differs from in_features, or there is no position.
    """
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    elif features.ndim != 3:
        raise ValueError(
            f'features must be a map (B, D, H, W) or tokens (B, N, D), got {features.ndim} dimensions '
            f'{features.shape}; pass unpooled features, such as model.forward_features(x).')
    if features.shape[2] != in_features:
        raise ValueError(
            f'features must have {in_features} channels, got {features.shape[2]} (tokens {features.shape}); build '
            f'the head with in_features={features.shape[2]}, and permute maps that are not (B, D, H, W).')
    if features.shape[1] == 0:
        raise ValueError(f'features must have at least one position, got tokens {features.shape}.')
    return features


class CrossAttention(nn.Module):
    """Multi-head attention of queries over memory, with the packed weights of `nn.MultiheadAttention`."""

    def __init__(self, embed_dim: int, num_heads: int, drop_rate: float = 0.0, **placement: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_rate = drop_rate
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **placement))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **placement))
        self.out_proj = nn.Linear(embed_dim, embed_dim, **placement)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Attend from query (B or 1, G, D) to memory (B, N, D); returns (B, G, D)."""
        batch, _, dim = memory.shape
        query = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        key, value = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        head_dim = dim // self.num_heads
        query = query.expand(batch, -1, -1).unflatten(-1, (self.num_heads, head_dim)).transpose(1, 2)
        key = key.unflatten(-1, (self.num_heads, head_dim)).transpose(1, 2)
        value = value.unflatten(-1, (self.num_heads, head_dim)).transpose(1, 2)
        x = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.drop_rate if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QueryDecoder(nn.Module):
    """The one decoder layer of ML-Decoder: post-norm cross-attention and feed-forward, no self-attention.

    Args:
        embed_dim: Width D, a multiple of num_heads.
        num_heads: Attention heads.
        feedforward_dim: Width of the hidden layer.
        drop_rate: Dropout on queries, attention weights, hidden layer and both residual branches, in [0, 1).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: If embed_dim is not a multiple of num_heads, a width is below 1, or drop_rate out of range.
    """

    def __init__(
            self,
            embed_dim: int = EMBED_DIM,
            num_heads: int = NUM_HEADS,
            feedforward_dim: int = FEEDFORWARD_DIM,
            drop_rate: float = DROP_RATE,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads, feedforward_dim=feedforward_dim)
        check_multiple(of=num_heads, embed_dim=embed_dim)
        check_range(drop_rate=drop_rate, low=0.0, high=1.0)
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.attn = CrossAttention(embed_dim, num_heads, drop_rate, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim, device=device, dtype=dtype)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim, device=device, dtype=dtype)
        self.norm3 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        for module in (self.norm1, self.attn, self.norm2, self.linear1, self.linear2, self.norm3):
            module.reset_parameters()

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Decode queries (G, D) against memory (B, N, D) into (B, G, D)."""
        query = query.unsqueeze(0)
        if self.training:
            query = query.expand(memory.shape[0], -1, -1)  # each image draws its own dropout mask
        query = self.norm1(query + self._drop(query))
        query = self.norm2(query + self._drop(self.attn(query, memory)))
        hidden = self._drop(F.relu(self.linear1(query)))
        return self.norm3(query + self._drop(self.linear2(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_rate, self.training)


class GroupLinear(nn.Module):
    """A linear layer per group: class c reads group c // F, slot c % F, with F = ceil(K / G).

    Weight (G, D, F) and bias (K). Slots past the last class exist in the weight, and are never read.
    """

    def __init__(self, num_groups: int, embed_dim: int, num_classes: int, **placement: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        group_size = -(-num_classes // num_groups)
        self.weight = nn.Parameter(torch.empty(num_groups, embed_dim, group_size, **placement))
        self.bias = nn.Parameter(torch.empty(num_classes, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)  # fans of the whole 3-D tensor, as the original: D * F and G * F
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map decoded queries (B, G, D) to logits (B, K)."""
        logits = torch.einsum('bgd,gdf->bgf', x, self.weight)
        return logits.flatten(1)[:, :self.num_classes] + self.bias


class MLDecoder(nn.Module):
    """ML-Decoder head: logits from unpooled features through G class queries.

    Args:
        in_features: Channels of the features.
        num_classes: Number of classes K.
        num_groups: Queries G; each serves ceil(K / G) classes. Clipped to K.
        embed_dim: Decoder width D, a multiple of num_heads.
        num_heads: Attention heads.
        feedforward_dim: Width of the decoder's hidden layer.
        drop_rate: Dropout inside the decoder, in [0, 1).
        fc_drop_rate: Dropout on the decoded queries before the group layer, in [0, 1); none in the paper.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is below 1, embed_dim is not a multiple of num_heads, or a rate out of range.

    Example:
        >>> import torch
        >>> head = MLDecoder(in_features=64, num_classes=230, embed_dim=32)
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 230])
    """

    if TYPE_CHECKING:
        query_embed: Tensor

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_groups: int = NUM_GROUPS,
            embed_dim: int = EMBED_DIM,
            num_heads: int = NUM_HEADS,
            feedforward_dim: int = FEEDFORWARD_DIM,
            drop_rate: float = DROP_RATE,
            fc_drop_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes, num_groups=num_groups)
        check_range(fc_drop_rate=fc_drop_rate, low=0.0, high=1.0)
        self.in_features = in_features
        self.num_classes = num_classes
        self.max_groups = num_groups
        self.fc_drop_rate = fc_drop_rate
        self.decoder = QueryDecoder(embed_dim, num_heads, feedforward_dim, drop_rate, device=device, dtype=dtype)
        self.embed = nn.Linear(in_features, embed_dim, device=device, dtype=dtype)
        groups = min(num_groups, num_classes)
        # Random and frozen, yet two models with different queries are different models: saved, never trained.
        self.register_buffer('query_embed', torch.empty(groups, embed_dim, device=device, dtype=dtype))
        nn.init.normal_(self.query_embed)
        self.group_fc = GroupLinear(groups, embed_dim, num_classes, device=device, dtype=dtype)

    @property
    def num_groups(self) -> int:
        """Queries in use: num_groups as given, clipped to the number of classes."""
        return self.query_embed.shape[0]

    def reset_parameters(self) -> None:
        """Draw fresh weights and queries, as after `to_empty`."""
        nn.init.normal_(self.query_embed)
        for module in (self.embed, self.decoder, self.group_fc):
            module.reset_parameters()

    @torch.jit.ignore
    def reset_classes(self, num_classes: int) -> None:
        """Re-create what depends on the classes; the embedding and the decoder keep their weights.

        The queries are kept as well when their number stays the same.

        Raises:
            TypeError: If num_classes is not an int.
            ValueError: If num_classes is below 1.
        """
        check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        groups, embed_dim = min(self.max_groups, num_classes), self.embed.out_features
        if groups != self.num_groups:
            self.query_embed = torch.empty_like(self.query_embed[:1]).expand(groups, -1).clone().normal_()
        weight = self.group_fc.weight
        self.group_fc = GroupLinear(groups, embed_dim, num_classes, device=weight.device, dtype=weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Classify unpooled features.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K).

        Raises:
            ValueError: If the shape is neither of these.
        """
        memory = F.relu(self.embed(flatten_features(features, self.in_features)))
        x = self.decoder(self.query_embed, memory)
        return self.group_fc(F.dropout(x, self.fc_drop_rate, self.training))


# Keys of the original repository below the head's prefix (`head.` on TResNet, `fc.` on ResNet) -> ours.
_LAYER = 'decoder.layers.0.'
ORIGINAL_KEYS = {
    'decoder.embed_standart.weight': 'embed.weight',
    'decoder.embed_standart.bias': 'embed.bias',
    'decoder.query_embed.weight': 'query_embed',
    'decoder.duplicate_pooling': 'group_fc.weight',
    'decoder.duplicate_pooling_bias': 'group_fc.bias',
    'wordvec_proj.weight': 'word_embed.weight',  # the zero-shot head's
    'wordvec_proj.bias': 'word_embed.bias',
    f'{_LAYER}multihead_attn.in_proj_weight': 'decoder.attn.in_proj_weight',
    f'{_LAYER}multihead_attn.in_proj_bias': 'decoder.attn.in_proj_bias',
    f'{_LAYER}multihead_attn.out_proj.weight': 'decoder.attn.out_proj.weight',
    f'{_LAYER}multihead_attn.out_proj.bias': 'decoder.attn.out_proj.bias',
    **{f'{_LAYER}{name}.{kind}': f'decoder.{name}.{kind}'
       for name in ('linear1', 'linear2', 'norm1', 'norm2', 'norm3') for kind in ('weight', 'bias')},
}


def convert_original_state_dict(state_dict: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
    """Rename the original repository's head keys to ours; tensors are passed on, not copied.

    Args:
        state_dict: The head's tensors in the original layout, such as `decoder.embed_standart.weight`.
        prefix: What stands before each key, such as 'head.'; it is kept.

    Returns:
        The same tensors under the keys of `MLDecoder` or `ZeroShotMLDecoder`, in the same order.

    Raises:
        CheckpointError: If a key is not one of the original head's; nothing is skipped.
    """
    converted = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name not in ORIGINAL_KEYS:
            raise CheckpointError(
                f'{key!r} is not a key of an original ML-Decoder head with prefix {prefix!r}; '
                f'{nearest(name, ORIGINAL_KEYS)}')
        converted[prefix + ORIGINAL_KEYS[name]] = tensor
    return converted
