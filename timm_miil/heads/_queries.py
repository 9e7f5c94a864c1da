"""Heads whose labels are embeddings: the label set, which is the caller's and no part of the checkpoint."""
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from timm_miil._checks import check_positive

__all__ = ['TextQueries']


class TextQueries(nn.Module):
    """A head with one embedding a label, exchanged by `set_queries`.

    The set follows the module to its device and through copies.

    Args:
        text_dim: Length E of a label's embedding.
        device: Device of the embeddings.

    Raises:
        TypeError: If text_dim is not an int.
        ValueError: If text_dim is below 1.
    """

    if TYPE_CHECKING:
        text_embeddings: Tensor

    def __init__(self, text_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_positive(text_dim=text_dim)
        self.text_dim = text_dim
        # Not in the checkpoint: the label set is the caller's.
        self.register_buffer('text_embeddings', torch.empty(0, text_dim, device=device), persistent=False)

    @property
    def num_classes(self) -> int:
        """Labels of the current set; 0 before `set_queries`."""
        return self.text_embeddings.shape[0]

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set, for training or for inference.

        Args:
            embeddings: One row a label, shape (K, text_dim), any floating dtype, from the encoder that the weights
                were trained with. Copied to the head's device, and kept in float32 or the head's dtype if that is
                wider: a head in half precision rounds them where they are used. They get no gradient.

        Raises:
            TypeError: If embeddings is not a tensor of a floating dtype.
            ValueError: If the shape is not (K, text_dim) with K at least 1, or a value is not finite.
        """
        self._check_embeddings(embeddings)
        like = next(self.parameters())
        with torch.inference_mode(False):  # a tensor of inference mode could not be trained with later
            self.text_embeddings = embeddings.detach().to(
                like.device, torch.promote_types(like.dtype, torch.float32), copy=True,
                memory_format=torch.contiguous_format)

    def _check_embeddings(self, embeddings: Tensor) -> None:
        if not isinstance(embeddings, Tensor):
            raise TypeError(
                f'embeddings must be a tensor, got {type(embeddings).__name__}; names become embeddings by '
                f'embed_characters, an array a tensor by torch.as_tensor.')
        if not embeddings.is_floating_point():
            raise TypeError(f'embeddings must be floating-point, got {embeddings.dtype}; call .float().')
        shape = tuple(embeddings.shape)
        if len(shape) != 2 or shape[1] != self.text_dim or shape[0] == 0:
            hint = ''
            if len(shape) == 2 and shape[0] == self.text_dim:
                hint = '; pass embeddings.T'
            elif len(shape) == 2 and shape[0] > 0:
                hint = (
                    f'; this head reads embeddings of length {self.text_dim}: take the encoder that it was trained '
                    f'with, or build it with text_dim={shape[1]} and train it')
            raise ValueError(f'embeddings must have shape (K, {self.text_dim}), got {shape}{hint}.')
        if not embeddings.is_meta and not (finite := embeddings.isfinite().all(1)).all():
            row = int(finite.long().argmin())
            raise ValueError(f'embeddings must be finite, and row {row} is not; look at what label {row} became.')

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the head. The embeddings go along, never below float32: the way to half precision and back is exact."""
        given = self.text_embeddings
        super()._apply(fn, recurse)
        moved = self.text_embeddings
        if given.is_meta and not moved.is_meta:  # by to_empty; there never were values
            self.text_embeddings = moved[:0]
        else:
            self.text_embeddings = given.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
        return self
