"""The table of a recipe whose labels are words."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm_miil.data import read_label_set

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['ZeroShotSettings']


@dataclass(frozen=True)
class ZeroShotSettings:
    """Where a zero-shot network has its words from, and which labels it is not shown.

    Args:
        word_vectors: File of word vectors by name, see `timm_miil.data.read_word_vectors`; '' embeds the names by their
            characters. What is trained with a file needs it again to tell labels.
        unseen: Path of a text file or name of a label set of the catalogue: labels to hold out, in place of the
            recipe's `unseen_labels`.
        keep_pictures: Whether pictures that show an unseen label are learnt from too, without that label, as on
            NUS-WIDE; else they are left out.
    """
    word_vectors: str = ''
    unseen: str = ''
    keep_pictures: bool = False

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        if recipe.task != 'zero_shot':
            raise ValueError(f"zero_shot is for task 'zero_shot', got {recipe.task!r}; leave the table out.")
        if self.unseen and recipe.unseen_labels:
            raise ValueError(
                f'zero_shot.unseen and unseen_labels must not both be given, got {self.unseen!r} and '
                f'{len(recipe.unseen_labels)} labels; leave one out.')

    def unseen_labels(self) -> Sequence[str]:
        """The labels of `unseen`, none where it is ''.

        Raises:
            FileNotFoundError: If it is neither a label set of the catalogue nor a file.
            ValueError: If the file is no list of names, or a name is there twice.
        """
        return read_label_set(self.unseen, '.') or () if self.unseen else ()
