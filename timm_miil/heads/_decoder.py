"""The decoder layer of ML-Decoder: queries attend to the memory of an image, then a feed-forward network.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933. What several heads share.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_multiple, check_positive, check_range
from timm_miil.heads._prepared import is_plain

__all__ = ['DROP_RATE', 'EMBED_DIM', 'FEEDFORWARD_DIM', 'NUM_HEADS', 'CrossAttention', 'QueryDecoder']

EMBED_DIM = 768
NUM_HEADS = 8
FEEDFORWARD_DIM = 2048
DROP_RATE = 0.1


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
        key, value = self.project_memory(memory)
        return self.attend(self.project_query(query), key, value)

    def project_query(self, query: Tensor) -> Tensor:
        """Query (B or 1, G, D) as `attend` takes it, (B or 1, heads, G, D / heads)."""
        dim = query.shape[2]
        return self._split(F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim]))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory (B, N, D), each (B, heads, N, D / heads)."""
        dim = memory.shape[2]
        key, value = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (B, G, D) of projected queries over projected memory."""
        drop_rate = self.drop_rate if self.training else 0.0
        if drop_rate > 0 and draws_noise_itself(value):  # where torch has no fused attention with dropout
            x = dropout(_attend(query, key), drop_rate, True).to(value.dtype) @ value
        else:
            query = query.expand(key.shape[0], -1, -1, -1)
            x = F.scaled_dot_product_attention(query, key, value, dropout_p=drop_rate)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, memory: Tensor) -> Tensor:
        """How query (B or 1, G, D) attends to memory (B, N, D), no dropout; (B, heads, G, N), float32 or wider."""
        dim = memory.shape[2]
        query = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        # The bias of the keys adds the same to every score of a query, which the softmax does not see.
        key = F.linear(memory, self.in_proj_weight[dim:2 * dim])
        return _attend(self._split(query), self._split(key))

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, heads, L, D / heads), a view."""
        return x.unflatten(-1, (self.num_heads, x.shape[2] // self.num_heads)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


class QueryDecoder(nn.Module):
    """The one decoder layer of ML-Decoder: post-norm cross-attention and feed-forward, no self-attention.

    Args:
        embed_dim: Width D, a multiple of num_heads.
        num_heads: Attention heads.
        feedforward_dim: Width of the hidden layer.
        drop_rate: Dropout on queries, attention weights, hidden layer and both residual branches, in [0, 1).
        shared_query_dropout: Whether all images of a batch draw one dropout mask of the queries, so that the work
            on the queries is done once a batch. The original draws a mask an image.
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
            shared_query_dropout: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads, feedforward_dim=feedforward_dim)
        check_multiple(of=num_heads, embed_dim=embed_dim)
        check_range(drop_rate=drop_rate, low=0.0, high=1.0)
        self.drop_rate = drop_rate
        self.shared_query_dropout = shared_query_dropout
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
        query = self.prepare(query, memory.shape[0])
        return self.finish(query, self.attn(query, memory))

    def prepare(self, query: Tensor, batch: int) -> Tensor:
        """Queries (G, D) as the attention sees them: (1, G, D), in training with a mask an image (B, G, D)."""
        query = query.unsqueeze(0)
        if self.training and not self.shared_query_dropout:
            query = query.expand(batch, -1, -1)  # each image draws its own dropout mask
        return self.norm1(query + self._drop(query))

    def finish(self, query: Tensor, attended: Tensor) -> Tensor:
        """What comes behind the attention: prepared queries and attended memory (B, G, D) to decoded queries."""
        query = self.norm2(query + self._drop(attended))
        hidden = self._drop(F.relu(self.linear1(query)))
        return self.norm3(query + self._drop(self.linear2(hidden)))

    def attention_weights(self, query: Tensor, memory: Tensor) -> Tensor:
        """How much each query looks at each position, as in evaluation: no dropout.

        Args:
            query: Shape (G, D).
            memory: Shape (B, N, D).

        Returns:
            Shape (B, heads, G, N), float32 or wider; each row sums to 1.
        """
        return self.attn.weights(self.norm1(2 * query).unsqueeze(0), memory)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.drop_rate, self.training)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """`F.dropout`; in eager mode on the processor it takes half the time."""
    if not training or rate == 0 or not draws_noise_itself(x):
        return F.dropout(x, rate, training)
    # bernoulli_ takes twice as long as drawing uniform numbers and comparing them. In half precision they would tie.
    noise = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)).uniform_()
    return x * noise.ge_(rate).mul_(1 / (1 - rate)).to(x.dtype)


def draws_noise_itself(x: Tensor) -> bool:
    """Whether `dropout` does not leave x to torch, which has a fused kernel elsewhere and a compiler its own."""
    if torch.jit.is_scripting():                    # type: ignore[attr-defined]
        return False
    else:  # TorchScript does not compile what stands here
        return x.is_cpu and is_plain(x)
