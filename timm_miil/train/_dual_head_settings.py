"""The tables of a recipe that trains a second head beside the network."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['DualHeadSettings', 'LabelAugmentationSettings']


@dataclass(frozen=True)
class DualHeadSettings:
    """Two heads, one for the labels and one for the teacher, arXiv:2411.08937 and arXiv:2505.07675."""

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""


@dataclass(frozen=True)
class LabelAugmentationSettings:
    """Classes times transforms (SLA), arXiv:1910.05872."""

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
