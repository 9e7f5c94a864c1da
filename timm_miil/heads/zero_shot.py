"""Zero-shot ML-Decoder: the queries are embeddings of label names, so the label set is free at run time.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933, sections on zero-shot
learning; original code in Alibaba-MIIL/ML_Decoder. Deviations: the embeddings are a (K, E) buffer that follows the
module, where the original keeps a plain (E, K) attribute that does not; the query augmentations, which the paper
reports and its code lacks, are off unless asked for, and their scales are ours.
"""
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_not_negative, check_positive, check_range
from timm_miil.heads._prepared import Evaluation, Memo, any_altered, is_plain
from timm_miil.heads._queries import TextQueries
from timm_miil.heads.ml_decoder import (
    DROP_RATE, EMBED_DIM, FEEDFORWARD_DIM, NUM_HEADS, CrossAttention, QueryDecoder, check_classes, flatten_features)
from timm_miil.heads.text import TEXT_DIM

__all__ = ['SharedLinear', 'ZeroShotMLDecoder']

CHUNK_LABELS = 1024


class ZeroShotMLDecoder(TextQueries):
    """ML-Decoder whose queries are projected text embeddings and whose last layer is shared by all labels.

    The label set may be changed at any time, such as between training and validation. It is no part of the
    checkpoint; it follows the module to its device and through copies, so that the copy that `ModelEmaV3` makes has
    the set of that moment and is given later ones by its own `set_queries`. Each process of a distributed run sets the
    same labels itself: DDP compares no sizes, and broadcasts at most the set that it was built with.

    Args:
        in_features: Channels of the features.
        embed_dim: Decoder width D, a multiple of num_heads.
        text_dim: Length E of a label's embedding.
        num_heads: Attention heads.
        feedforward_dim: Width of the decoder's hidden layer.
        drop_rate: Dropout inside the decoder, in [0, 1).
        num_random_queries: In training, so many random queries R are added behind the labels' in each step; the
            target of their logits is 0. They are normal, with the root mean square of the label embeddings.
        query_noise: In training, normal noise is added to the embeddings in each step; its standard deviation, in
            units of the root mean square of a label's own embedding. 0 for none.
        chunk_size: Labels decoded at a time, so that hooks on the decoder see a call a chunk. It bounds the memory for
            a large label set, at about 40 kB a label and image with the default widths; where gradients are recorded,
            what they need of all labels is kept.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int, or a rate not a number.
        ValueError: If a size is below 1, num_random_queries or query_noise below 0, embed_dim is not a multiple of
            num_heads, or drop_rate out of range.

    Example:
        >>> import torch
        >>> head = ZeroShotMLDecoder(in_features=64, embed_dim=32, text_dim=50)
        >>> head.set_queries(torch.randn(6, 50))
        >>> head(torch.randn(2, 49, 64)).shape
        torch.Size([2, 6])
    """

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
            chunk_size: int = CHUNK_LABELS,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(text_dim, device)
        check_positive(in_features=in_features, chunk_size=chunk_size)
        check_range(query_noise=query_noise, low=0.0, high=math.inf)
        check_not_negative(num_random_queries=num_random_queries)
        self.in_features = in_features
        self.num_random_queries = num_random_queries
        self.query_noise = query_noise
        self.chunk_size = chunk_size
        self._memo: Memo[tuple[Tensor, Tensor]] = Memo()
        self.decoder = QueryDecoder(embed_dim, num_heads, feedforward_dim, drop_rate, device=device, dtype=dtype)
        self.embed = nn.Linear(in_features, embed_dim, device=device, dtype=dtype)
        self.word_embed = nn.Linear(text_dim, embed_dim, device=device, dtype=dtype)
        self.group_fc = SharedLinear(embed_dim, device=device, dtype=dtype)

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set, see `TextQueries.set_queries`."""
        super().set_queries(embeddings)
        self._memo.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._memo.clear()
        return super()._apply(fn, recurse)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after `to_empty`; the label set stays."""
        self._memo.clear()
        for module in (self.embed, self.word_embed, self.decoder, self.group_fc):
            module.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """Score every label of the current set.

        Args:
            features: Map (B, in_features, H, W) or tokens (B, N, in_features), the head's dtype.

        Returns:
            Logits (B, K), one a label. In training (B, K + R): those of the R random queries come last.

        Raises:
            RuntimeError: If no queries were set.
            ValueError: If the shape of the features is wrong.
        """
        self._check_queries()
        memory = self._memory(features)
        if not torch.jit.is_scripting():            # type: ignore[attr-defined]
            known = self._known_queries(features)
            if known is not None:
                return self._score(known, self.decoder.attn.project_memory(memory))
        embeddings = self._augmented() if self.training else self.text_embeddings
        num_labels, size = embeddings.shape[0], self.chunk_size
        shared = self._shared_memory(memory) if num_labels > size else None
        logits = self._decode(embeddings[:size], memory, shared)
        if num_labels > size:
            # Filled in place: small results that stay among large ones that go would keep the C heap from reuse.
            first, logits = logits, logits.new_empty(memory.shape[0], num_labels)
            logits[:, :size] = first
            for start in range(size, num_labels, size):
                chunk = embeddings[start:start + size]
                logits[:, start:start + size] = self._decode(chunk, memory, shared)
        return logits

    def attention_maps(self, features: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Where the query of each label looks, averaged over attention heads, as in evaluation: no dropout.

        Args:
            features: As in `forward`.
            classes: Indices of labels of the current set, in any order; None for all.

        Returns:
            Attention (B, len(classes), N) over the N positions, prefix tokens included, as they come in; each row
            sums to 1. float32 or wider.

        Raises:
            RuntimeError: If no queries were set.
            TypeError: If an index is not an int.
            ValueError: If an index is out of range, or the shape of the features is wrong.
        """
        self._check_queries()
        memory = self._memory(features)
        embeddings = self.text_embeddings[list(check_classes(classes, self.num_classes))]
        return torch.cat([
            self.decoder.attention_weights(self._project(chunk), memory).mean(1)
            for chunk in embeddings.split(self.chunk_size)], dim=1)

    def _prepare(self, embeddings: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Queries of embeddings (G, E) as the decoder sees them, and their projection for its attention."""
        query = self.decoder.prepare(self._project(embeddings), batch)
        return query, self.decoder.attn.project_query(query)

    def _score(self, queries: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of prepared queries and of projected memory."""
        query, projected = queries
        return self.group_fc(self.decoder.finish(query, self.decoder.attn.attend(projected, memory[0], memory[1])))

    def _decode(self, embeddings: Tensor, memory: Tensor, shared: tuple[Tensor, Tensor] | None) -> Tensor:
        if shared is not None:
            return self._score(self._prepare(embeddings, memory.shape[0]), shared)
        return self.group_fc(self.decoder(self._project(embeddings), memory))

    def _shared_memory(self, memory: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values for all chunks; None where the decoder's own call makes them."""
        if torch.jit.is_scripting():                # type: ignore[attr-defined]
            return self.decoder.attn.project_memory(memory)
        else:  # TorchScript does not compile what stands here
            return self.decoder.attn.project_memory(memory) if self._has_own_decoder() else None

    @torch.jit.unused
    def _has_own_decoder(self) -> bool:
        """Whether decoder and attention do what their classes say, so that their steps may be taken one by one."""
        decoder = self.decoder
        return type(decoder) is QueryDecoder and type(decoder.attn) is CrossAttention and (
            torch.compiler.is_compiling() or not any_altered(decoder, decoder.attn))

    def _known_queries(self, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """What evaluation computed once from weights and labels, where that holds (see `Memo`) and is one chunk."""
        decoder, word_embed = self.decoder, self.word_embed
        if (not is_plain(features) or self.num_classes > self.chunk_size or not self._has_own_decoder()
                or self.training or decoder.training or type(word_embed) is not nn.Linear
                or type(decoder.norm1) is not nn.LayerNorm or any_altered(word_embed, decoder.norm1)):
            self._memo.clear()
            return None
        attn, norm = decoder.attn, decoder.norm1
        sources = [self.text_embeddings, attn.in_proj_weight, attn.in_proj_bias, *word_embed.parameters()]
        return self._memo.get(
            [*sources, *norm.parameters()], lambda: self._prepare(self.text_embeddings, 1),
            Evaluation.settings(decoder))

    @torch.jit.ignore
    def forget(self) -> None:
        """Drop what evaluation computed once from the weights, see `MLDecoder.forget`."""
        self._memo.clear()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode."""
        self._memo.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._memo.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _check_queries(self) -> None:
        if self.num_classes == 0:
            raise RuntimeError('the zero-shot head has no label set yet; call set_queries((K, E) tensor) first.')

    def _memory(self, features: Tensor) -> Tensor:
        return F.relu(self.embed(flatten_features(features, self.in_features)))

    def _project(self, embeddings: Tensor) -> Tensor:
        return F.relu(self.word_embed(embeddings.to(self.group_fc.weight.dtype)))

    def _augmented(self) -> Tensor:
        """The embeddings of this training step: noisy, and with random ones behind them."""
        given = embeddings = self.text_embeddings
        if self.query_noise > 0:
            rms = given.square().mean(1, keepdim=True).sqrt()
            embeddings = given + self.query_noise * rms * torch.randn_like(given)
        if self.num_random_queries > 0:
            random = torch.randn(self.num_random_queries, self.text_dim, device=given.device, dtype=given.dtype)
            embeddings = torch.cat([embeddings, given.square().mean().sqrt() * random])
        return embeddings


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
