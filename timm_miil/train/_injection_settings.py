"""The table of a recipe that injects labels into a self-supervised network."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['InjectionSettings']


@dataclass(frozen=True)
class InjectionSettings:
    """Controlled label injection, arXiv:2204.09134."""

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
