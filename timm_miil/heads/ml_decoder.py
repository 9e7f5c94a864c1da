"""ML-Decoder: a classification head that cross-attends from class queries to image features.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933; original code in
Alibaba-MIIL/ML_Decoder. Deviations: the group size is a true ceiling (the original rounds K/G + 0.999 down, which
is wrong when K mod G is small against G); the queries are a buffer, as they are never trained; keys are spelled
out (`convert_original_state_dict` reads the original's).
"""
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_positive, check_range, nearest, shown
from timm_miil._errors import CheckpointError
from timm_miil.heads._decoder import (
    DROP_RATE, EMBED_DIM, FEEDFORWARD_DIM, NUM_HEADS, CrossAttention, QueryDecoder)
from timm_miil.heads._prepared import Evaluation, Memo, is_plain

__all__ = [
    'DROP_RATE', 'EMBED_DIM', 'FEEDFORWARD_DIM', 'NUM_HEADS', 'CrossAttention', 'GroupLinear', 'MLDecoder',
    'QueryDecoder', 'check_classes', 'convert_original_state_dict', 'flatten_features', 'view_tokens',
]

NUM_GROUPS = 100


def flatten_features(features: Tensor, in_features: int) -> Tensor:
    """Bring a feature map to tokens, row by row.

    Args:
        features: Map (B, D, H, W) or tokens (B, N, D).
        in_features: Expected D.

    Returns:
        Tokens (B, N, D), contiguous; tokens and maps in channels_last are not copied.

    Raises:
        ValueError: If the rank is neither 3 nor 4, D differs from in_features, or there is no position.
    """
    # Products in half precision of a transposed view fall off every fast path.
    return view_tokens(features, in_features).contiguous()


def view_tokens(features: Tensor, in_features: int) -> Tensor:
    """As `flatten_features`, yet always a view."""
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


class GroupLinear(nn.Module):
    """A linear layer per group: class c reads group c // F, slot c % F, with F = ceil(K / G).

    Weight (G, D, F) and bias (K). Slots past the last class exist in the weight, and are never read.
    """

    def __init__(self, num_groups: int, embed_dim: int, num_classes: int, **placement: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.group_size = group_size = -(-num_classes // num_groups)
        self.weight = nn.Parameter(torch.empty(num_groups, embed_dim, group_size, **placement))
        self.bias = nn.Parameter(torch.empty(num_classes, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)  # fans of the whole 3-D tensor, as the original: D * F and G * F
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map decoded queries (B, G, D) to logits (B, K)."""
        logits = torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
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
        shared_query_dropout: Whether all images of a batch draw one dropout mask of the queries, which makes training
            faster; the original draws a mask an image.
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
            shared_query_dropout: bool = False,
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
        self._memo: Memo[Evaluation] = Memo()
        self.decoder = QueryDecoder(
            embed_dim, num_heads, feedforward_dim, drop_rate, shared_query_dropout, device=device, dtype=dtype)
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
        self._memo.clear()
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
        self._memo.clear()
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
        if not torch.jit.is_scripting():            # type: ignore[attr-defined]
            evaluation = self._evaluation(features)
            if evaluation is not None:
                return evaluation(view_tokens(features, self.in_features))
        x = self.decoder(self.query_embed, self._memory(features))
        return self.group_fc(F.dropout(x, self.fc_drop_rate, self.training))

    def _memory(self, features: Tensor) -> Tensor:
        return F.relu(self.embed(flatten_features(features, self.in_features)))

    def attention_maps(self, features: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Where the query of each class looks, averaged over attention heads, as in evaluation: no dropout.

        Classes of one group share their query, and so their map.

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
            >>> head = MLDecoder(in_features=64, num_classes=230, embed_dim=32).eval()
            >>> head.attention_maps(torch.randn(2, 64, 7, 7), classes=[3, 229]).shape
            torch.Size([2, 2, 49])
        """
        groups = [index // self.group_fc.group_size for index in check_classes(classes, self.num_classes)]
        used = sorted(set(groups))
        weights = self.decoder.attention_weights(self.query_embed[used], self._memory(features)).mean(1)
        place = {group: i for i, group in enumerate(used)}
        return weights[:, [place[group] for group in groups]]

    @torch.jit.ignore
    def forget(self) -> None:
        """Drop what evaluation computed once from the weights; the next batch computes it anew.

        Training, moving, loading and whatever torch's version counters see do so by themselves. It is for what is
        written past those, as by `parameter.data[3] = row`, between two evaluations: on an accelerator that is not
        seen, in host memory only where a sample of the weights changes, as it does when all of them do.
        Fused optimizers write so too; nothing is remembered while a weight has a gradient, so their steps are safe.
        """
        self._memo.clear()

    def _evaluation(self, features: Tensor) -> Evaluation | None:
        """What evaluation computed once, where that holds: see `Memo`."""
        if not is_plain(features) or not self._has_own_parts() or not Evaluation.fits(self):
            self._memo.clear()
            return None
        return self._memo.get(
            Evaluation.sources(self), functools.partial(Evaluation.of, self), Evaluation.settings(self.decoder))

    def _has_own_parts(self) -> bool:
        return (
            type(self.group_fc) is GroupLinear and type(self.decoder) is QueryDecoder
            and type(self.decoder.attn) is CrossAttention)

    def train(self, mode: bool = True) -> 'MLDecoder':
        """Set training or evaluation mode."""
        self._memo.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'MLDecoder':
        self._memo.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._memo.clear()
        super()._load_from_state_dict(*args, **kwargs)


def check_classes(classes: Sequence[int] | None, num_classes: int) -> Sequence[int]:
    """The class indices, all of them for None.

    Raises:
        TypeError: If an index is not an int.
        ValueError: If an index is not in [0, num_classes).
    """
    if classes is None:
        return range(num_classes)
    for index in classes:
        if not _is_index(index):
            raise TypeError(
                f'classes must be indices, got {shown(index)} of type {type(index).__name__}; give ints, of a tensor '
                f'its tolist().')
        if not 0 <= index < num_classes:
            raise ValueError(f'classes must be in [0, {num_classes}), got {shown(index)}.')
    return classes


def _is_index(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


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
