"""Answers of a teacher, kept on disk."""
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ['TeacherCache']


class TeacherCache(Protocol):
    """What a `Teacher` asks before it computes."""

    num_classes: int

    def answer(self, images: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (B, C) of pictures (B, I, H, W); `ask` gives those that are not known."""
