"""Zero-shot ML-Decoder: the queries are embeddings of label names, so the label set is free at run time.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933, sections on zero-shot
learning; original code in Alibaba-MIIL/ML_Decoder. Deviations: the embeddings are a (K, E) buffer that follows the
module, where the original keeps a plain (E, K) attribute that does not; the query augmentations, which the paper
reports and its code lacks, are off unless asked for, and their scales are ours.
"""
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_positive
from timm_miil.heads.ml_decoder import (
    DROP_RATE, EMBED_DIM, FEEDFORWARD_DIM, NUM_HEADS, QueryDecoder, flatten_features)
from timm_miil.heads.text import TEXT_DIM

__all__ = ['SharedLinear', 'ZeroShotMLDecoder']


class ZeroShotMLDecoder(nn.Module):
    """ML-Decoder whose queries are projected text embeddings and whose last layer is shared by all labels.

    Args:
        in_features: Channels of the features.
        embed_dim: Decoder width D, a multiple of num_heads.
        text_dim: Length E of a label's embedding.
        num_heads: Attention heads.
        feedforward_dim: Width of the decoder's hidden layer.
        drop_rate: Dropout inside the decoder, in [0, 1).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is below 1, embed_dim is not a multiple of num_heads, or drop_rate out of range.

    Example:
        >>> import torch
        >>> head = ZeroShotMLDecoder(in_features=64, embed_dim=32, text_dim=50)
        >>> head.set_queries(torch.randn(6, 50))
        >>> head(torch.randn(2, 49, 64)).shape
        torch.Size([2, 6])
    """

    if TYPE_CHECKING:
        text_embeddings: Tensor

    def __init__(
            self,
            in_features: int,
            embed_dim: int = EMBED_DIM,
            text_dim: int = TEXT_DIM,
            num_heads: int = NUM_HEADS,
            feedforward_dim: int = FEEDFORWARD_DIM,
            drop_rate: float = DROP_RATE,
            num_random_queries: int = 0,
            query_noise: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, text_dim=text_dim)
        self.in_features = in_features
        self.text_dim = text_dim
        self.num_random_queries = num_random_queries
        self.query_noise = query_noise
        self.decoder = QueryDecoder(embed_dim, num_heads, feedforward_dim, drop_rate, device=device, dtype=dtype)
        self.embed = nn.Linear(in_features, embed_dim, device=device, dtype=dtype)
        self.word_embed = nn.Linear(text_dim, embed_dim, device=device, dtype=dtype)
        self.group_fc = SharedLinear(embed_dim, device=device, dtype=dtype)
        # Not in the checkpoint: the label set is the caller's.
        self.register_buffer('text_embeddings', torch.empty(0, text_dim, device=device, dtype=dtype), persistent=False)

    @property
    def num_classes(self) -> int:
        """Labels of the current set; 0 before `set_queries`."""
        return self.text_embeddings.shape[0]

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set, for training or for inference.

        Args:
            embeddings: One row a label, shape (K, E); copied to the head's device.

        Raises:
            ValueError: If the shape is not (K, E) with K at least 1.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.text_dim or not len(embeddings):
            hint = '; pass embeddings.T' if tuple(embeddings.shape[:1]) == (self.text_dim,) else ''
            raise ValueError(
                f'embeddings must have shape (K, {self.text_dim}), got {tuple(embeddings.shape)}{hint}.')
        self.text_embeddings = embeddings.detach().to(self.text_embeddings, copy=True)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after `to_empty`."""
        for module in (self.embed, self.word_embed, self.decoder, self.group_fc):
            module.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """Score every label of the current set.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K), one a label.

        Raises:
            RuntimeError: If no queries were set.
            ValueError: If the shape of the features is wrong.
        """
        if self.num_classes == 0:
            raise RuntimeError('the zero-shot head has no label set yet; call set_queries((K, E) tensor) first.')
        memory = F.relu(self.embed(flatten_features(features, self.in_features)))
        query = F.relu(self.word_embed(self.text_embeddings))
        return self.group_fc(self.decoder(query, memory))


class SharedLinear(nn.Module):
    """One score a query, by a weight (D, 1) and a bias (1) that all queries share."""

    def __init__(self, embed_dim: int, **placement: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, 1, **placement))
        self.bias = nn.Parameter(torch.empty(1, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map decoded queries (B, K, D) to logits (B, K)."""
        return (x @ self.weight).squeeze(-1) + self.bias
