"""The table of a recipe that shares a classifier between teacher and student."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['SharingSettings']


@dataclass(frozen=True)
class SharingSettings:
    """A classifier that teacher and student share, arXiv:2201.06945."""

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
