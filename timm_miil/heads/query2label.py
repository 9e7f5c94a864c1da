"""Query2Label: a transformer whose decoder queries are learned, one a class.

Liu et al., "Query2Label: A Simple Transformer Way to Multi-Label Classification", arXiv:2107.10834, Sec. 3.2; original
code in SlongLiu/query2labels. An encoder refines the features, then each decoder layer attends among the classes and
from each class to the features. As in the original code, the decoder starts from zeros, the class embeddings are
added to what asks and is asked among the classes, and the 2-D sine encodings of the positions to what is asked
among the features, never to the values. Deviations: tokens get no encodings, as their backbone has given them some;
the other layers' attention among the classes, which the original code leaves out unless told, is in, as in the paper.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_multiple, check_not_negative, check_positive, check_range
from timm_miil.heads.ml_decoder import check_classes, flatten_features

__all__ = [
    'Attention', 'ClassLinear', 'DecoderLayer', 'EncoderLayer', 'FeedForward', 'Query2Label', 'sine_positions',
]

FEEDFORWARD_RATIO = 4


def sine_positions(
        height: int,
        width: int,
        embed_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        temperature: float = 10000.0,
) -> Tensor:
    """2-D sine encodings, the first half of the channels for the row and the second for the column.

    Positions run to 2 pi over the map, whatever its size; sine and cosine alternate, with wavelengths that grow to
    `temperature` times (Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872).

    Args:
        height: Rows H.
        width: Columns W.
        embed_dim: Channels D, a multiple of 4.
        device: Where to make them.
        dtype: Their dtype; computed in float32 or wider.
        temperature: Ratio of the longest to the shortest wavelength, nearly.

    Returns:
        Shape (H * W, D), row by row.
    """
    quarter, wide = embed_dim // 4, torch.promote_types(dtype, torch.float32)
    rates = temperature ** (torch.arange(quarter, device=device, dtype=wide) / -quarter)
    rows = torch.arange(1, height + 1, device=device, dtype=wide) * (2 * math.pi / height)
    columns = torch.arange(1, width + 1, device=device, dtype=wide) * (2 * math.pi / width)
    by_row = rows[:, None, None] * rates[:, None]                           # (H, D/4, 1)
    by_column = columns[:, None, None] * rates[:, None]
    by_row = torch.cat([by_row.sin(), by_row.cos()], 2).flatten(1)          # (H, D/2), sine and cosine in turn
    by_column = torch.cat([by_column.sin(), by_column.cos()], 2).flatten(1)
    return torch.cat([
        by_row[:, None].expand(height, width, 2 * quarter),
        by_column[None].expand(height, width, 2 * quarter)], 2).flatten(0, 1).to(dtype)


class Attention(nn.Module):
    """Multi-head attention with the packed weights of `nn.MultiheadAttention`; dropout is the caller's."""

    def __init__(self, embed_dim: int, num_heads: int, **placement: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **placement))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **placement))
        self.out_proj = nn.Linear(embed_dim, embed_dim, **placement)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, drop_rate: float) -> Tensor:
        """Attend from query (B, M, D) to key and value (B, N, D); returns (B, M, D)."""
        x = F.scaled_dot_product_attention(
            self._project(query, 0), self._project(key, 1), self._project(value, 2), dropout_p=drop_rate)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """The attention (B, M, N), averaged over heads, float32 or wider."""
        query, key = self._project(query, 0), self._project(key, 1)
        scores = query @ key.transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (scores * query.shape[-1] ** -0.5).softmax(-1).mean(1)

    def _project(self, x: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2) of the heads: (B, heads, M, D / heads)."""
        dim = x.shape[-1]
        start, end = part * dim, (part + 1) * dim
        x = F.linear(x, self.in_proj_weight[start:end], self.in_proj_bias[start:end])
        return x.unflatten(-1, (self.num_heads, dim // self.num_heads)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between; dropout is the caller's."""

    def __init__(self, embed_dim: int, feedforward_dim: int, **placement: Any) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, feedforward_dim, **placement)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim, **placement)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.linear1, self.linear2):
            linear.reset_parameters()
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, drop_rate: float) -> Tensor:
        return self.linear2(_drop(F.relu(self.linear1(x)), drop_rate))


class EncoderLayer(nn.Module):
    """Post-norm self-attention among positions, then a feed-forward network."""

    def __init__(self, embed_dim: int, num_heads: int, feedforward_dim: int, **placement: Any) -> None:
        super().__init__()
        self.attn = Attention(embed_dim, num_heads, **placement)
        self.norm1 = nn.LayerNorm(embed_dim, **placement)
        self.mlp = FeedForward(embed_dim, feedforward_dim, **placement)
        self.norm2 = nn.LayerNorm(embed_dim, **placement)

    def reset_parameters(self) -> None:
        for module in (self.attn, self.norm1, self.mlp, self.norm2):
            module.reset_parameters()

    def forward(self, memory: Tensor, positions: Tensor, drop_rate: float) -> Tensor:
        """Refine memory (B, N, D), whose positions are encoded as (N or 1, D)."""
        placed = memory + positions
        memory = self.norm1(memory + _drop(self.attn(placed, placed, memory, drop_rate), drop_rate))
        return self.norm2(memory + _drop(self.mlp(memory, drop_rate), drop_rate))


class DecoderLayer(nn.Module):
    """Post-norm attention among classes (unless left out), attention to the features, then a feed-forward network."""

    def __init__(
            self, embed_dim: int, num_heads: int, feedforward_dim: int, self_attention: bool, **placement: Any) -> None:
        super().__init__()
        if self_attention:
            self.self_attn: Attention | None = Attention(embed_dim, num_heads, **placement)
            self.norm1: nn.LayerNorm | None = nn.LayerNorm(embed_dim, **placement)
        else:
            self.self_attn = self.norm1 = None
        self.cross_attn = Attention(embed_dim, num_heads, **placement)
        self.norm2 = nn.LayerNorm(embed_dim, **placement)
        self.mlp = FeedForward(embed_dim, feedforward_dim, **placement)
        self.norm3 = nn.LayerNorm(embed_dim, **placement)

    def reset_parameters(self) -> None:
        for module in (self.self_attn, self.norm1, self.cross_attn, self.norm2, self.mlp, self.norm3):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, positions: Tensor, drop_rate: float) -> Tensor:
        """Decode x (B, K, D) of the classes embedded as query (K, D) against memory (B, N, D)."""
        x = self.attend_classes(x, query, drop_rate)
        attended = self.cross_attn(x + query, memory + positions, memory, drop_rate)
        x = self.norm2(x + _drop(attended, drop_rate))
        return self.norm3(x + _drop(self.mlp(x, drop_rate), drop_rate))

    def attend_classes(self, x: Tensor, query: Tensor, drop_rate: float) -> Tensor:
        """The part before the features are asked."""
        if self.self_attn is not None and self.norm1 is not None:
            asking = x + query
            x = self.norm1(x + _drop(self.self_attn(asking, asking, x, drop_rate), drop_rate))
        return x


class ClassLinear(nn.Module):
    """One score a class, by its own weight (K, D) and bias (K): the paper's group-wise linear projection."""

    def __init__(self, num_classes: int, embed_dim: int, **placement: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim, **placement))
        self.bias = nn.Parameter(torch.empty(num_classes, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map decoded classes (B, K, D) to logits (B, K)."""
        return torch.einsum('bkd,kd->bk', x, self.weight) + self.bias


class Query2Label(nn.Module):
    """Query2Label head: logits from unpooled features through one learned query a class.

    Args:
        in_features: Channels of the features.
        num_classes: Number of classes K.
        embed_dim: Width D of the transformer, a multiple of num_heads and of 4; None for in_features without a
            projection, as in the original.
        num_heads: Attention heads.
        feedforward_dim: Width of the hidden layers; None for 4 * D.
        num_encoder_layers: Layers on the features; 0 for none.
        num_decoder_layers: Layers on the classes. The first has no attention among the classes, as it starts from
            zeros.
        self_attention: Whether the decoder layers after the first attend among the classes.
        drop_rate: Dropout of the transformer, in [0, 1).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, D is not such a multiple, or drop_rate is out of range.

    Example:
        >>> import torch
        >>> head = Query2Label(in_features=64, num_classes=80)
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 80])
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            embed_dim: int | None = None,
            num_heads: int = 4,
            feedforward_dim: int | None = None,
            num_encoder_layers: int = 1,
            num_decoder_layers: int = 2,
            self_attention: bool = True,
            drop_rate: float = 0.1,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features, num_classes=num_classes, num_heads=num_heads,
            num_decoder_layers=num_decoder_layers)
        check_not_negative(num_encoder_layers=num_encoder_layers)
        check_range(drop_rate=drop_rate, low=0.0, high=1.0)
        width = in_features if embed_dim is None else embed_dim
        hidden = FEEDFORWARD_RATIO * width if feedforward_dim is None else feedforward_dim
        check_positive(embed_dim=width, feedforward_dim=hidden)
        multiple = math.lcm(num_heads, 4)
        if embed_dim is None and width % multiple:
            near = max(multiple, width // multiple * multiple)
            raise ValueError(
                f'in_features={width} is no width that {num_heads} attention heads and the positions can share, a '
                f'multiple of {multiple}; pass embed_dim={near}, to a model head_args=dict(embed_dim={near}).')
        check_multiple(of=multiple, embed_dim=width)
        self.in_features = in_features
        self.num_classes = num_classes
        self.embed_dim = width
        self.drop_rate = drop_rate
        self.embed = (
            nn.Identity() if embed_dim is None else nn.Linear(in_features, embed_dim, device=device, dtype=dtype))
        self.encoder = nn.ModuleList(
            EncoderLayer(width, num_heads, hidden, device=device, dtype=dtype) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(width, num_heads, hidden, self_attention and i > 0, device=device, dtype=dtype)
            for i in range(num_decoder_layers))
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.query_embed = nn.Parameter(torch.empty(num_classes, width, device=device, dtype=dtype))
        nn.init.normal_(self.query_embed)
        self.fc = ClassLinear(num_classes, width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after `to_empty`."""
        nn.init.normal_(self.query_embed)
        for module in (self.embed, *self.encoder, *self.decoder, self.norm, self.fc):
            reset: Any = getattr(module, 'reset_parameters', None)  # Identity has none
            if reset is not None:
                reset()

    @torch.jit.ignore
    def reset_classes(self, num_classes: int) -> None:
        """Draw fresh queries and a fresh last layer; the transformer keeps its weights.

        Raises:
            TypeError: If num_classes is not an int.
            ValueError: If num_classes is below 1.
        """
        check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        query = self.query_embed
        self.query_embed = nn.Parameter(query.new_empty(num_classes, self.embed_dim))
        nn.init.normal_(self.query_embed)
        self.fc = ClassLinear(num_classes, self.embed_dim, device=query.device, dtype=query.dtype)

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, embed_dim={self.embed_dim}, drop_rate={self.drop_rate}'

    def forward(self, features: Tensor) -> Tensor:
        """Classify unpooled features.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K).

        Raises:
            ValueError: If the shape is neither of these.
        """
        drop_rate = self.drop_rate if self.training else 0.0
        memory, positions = self._encode(features, drop_rate)
        x = memory.new_zeros(memory.shape[0], self.num_classes, self.embed_dim)
        for layer in self.decoder:
            x = layer(x, self.query_embed, memory, positions, drop_rate)
        return self.fc(self.norm(x))

    def attention_maps(self, features: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Where each class looks in the last layer, averaged over attention heads, as in evaluation: no dropout.

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
            >>> head = Query2Label(in_features=64, num_classes=80)
            >>> head.attention_maps(torch.randn(2, 64, 7, 7), classes=[3]).shape
            torch.Size([2, 1, 49])
        """
        chosen = list(check_classes(classes, self.num_classes))
        memory, positions = self._encode(features, 0.0)
        x = memory.new_zeros(memory.shape[0], self.num_classes, self.embed_dim)
        layers: list[DecoderLayer] = [*self.decoder]
        for layer in layers[:-1]:
            x = layer(x, self.query_embed, memory, positions, 0.0)
        asking = layers[-1].attend_classes(x, self.query_embed, 0.0) + self.query_embed
        return layers[-1].cross_attn.weights(asking[:, chosen], memory + positions)

    def _encode(self, features: Tensor, drop_rate: float) -> tuple[Tensor, Tensor]:
        """The memory (B, N, D) and the encodings of its positions (N or 1, D)."""
        memory = self.embed(flatten_features(features, self.in_features))
        if features.ndim == 4:
            positions = sine_positions(
                features.shape[2], features.shape[3], self.embed_dim, memory.device, memory.dtype)
        else:
            positions = memory.new_zeros(1, 1)
        for layer in self.encoder:
            memory = layer(memory, positions, drop_rate)
        return memory, positions


def _drop(x: Tensor, drop_rate: float) -> Tensor:
    return F.dropout(x, drop_rate, drop_rate > 0)
