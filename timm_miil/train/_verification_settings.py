"""The table of a recipe that learns embeddings of identities."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['VerificationSettings']


@dataclass(frozen=True)
class VerificationSettings:
    """Embeddings of identities, learnt by a margin softmax."""

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
