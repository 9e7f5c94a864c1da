"""The table of a recipe that learns embeddings of identities."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from timm_miil._checks import check_positive, check_range

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['PERCENT', 'VerificationSettings', 'check_pairs']

MOST_NUMBERS = 1 << 16  # of an embedding
PERCENT = 100.0


@dataclass(frozen=True)
class VerificationSettings:
    """Embeddings of identities, learnt by a margin softmax (ArcFace, arXiv:1801.07698), and how pairs are measured.

    The network's num_classes is `embed_dim`. Each split has its own identities, which are best disjoint; where there is
    no val, a part of those of train serves. A teacher must be a network of embeddings too: their directions are learnt.

    Args:
        embed_dim: Length of an embedding, 1 to 65536.
        margin: Degrees, in [0, 90].
        scale: Of the cosines, in [0.001, 1000000).
        far: False accept rate in percent, in (0, 100), whose true accept rate 'tar' chooses the best epoch.
        fars: Further rates in percent that are reported, as 'tar_at_<rate>'.
    """
    embed_dim: int = 128
    margin: float = 28.6
    scale: float = 64.0
    far: float = 1.0
    fars: tuple[float, ...] = (0.01, 0.1, 10.0)

    def __post_init__(self) -> None:
        check_positive(embed_dim=self.embed_dim)
        check_range(embed_dim=self.embed_dim, low=1, high=MOST_NUMBERS, closed=True)
        check_range(margin=self.margin, low=0.0, high=90.0, closed=True)
        check_range(scale=self.scale, low=1e-3, high=1e6)
        for name, far in {'far': self.far, **{f'fars[{place}]': far for place, far in enumerate(self.fars)}}.items():
            check_range(low=math.ulp(0.0), high=PERCENT, closed=False, **{name: far})

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        if recipe.task != 'verification':
            raise ValueError(f"verification is for task 'verification', got {recipe.task!r}; leave the table out.")
        if recipe.loss.name != 'cross_entropy' or recipe.loss.args:
            raise ValueError(
                f"loss must be 'cross_entropy' without args for task 'verification', whose margin and scale are in the "
                f'table verification, got {recipe.loss.name!r} with {dict(recipe.loss.args)}.')
        if recipe.fsdp:
            raise ValueError("fsdp must be false for task 'verification', whose margin softmax lies in one piece.")
        if recipe.partial is not None:
            raise ValueError("partial must be left out of task 'verification', which needs every identity.")
        if recipe.teacher is not None and recipe.teacher.cache:
            raise ValueError("teacher.cache must be '' for task 'verification': it keeps logits, no embeddings.")
        if recipe.teacher is not None and not recipe.teacher.pretrained:
            raise ValueError("teacher.pretrained must be true for task 'verification', got false.")


def check_pairs(counts: Tensor, settings: VerificationSettings) -> None:
    """Raise ValueError if there are too few pairs to choose an epoch by.

    Args:
        counts: Pictures of each identity to validate, shape (K,).
        settings: The rate.
    """
    total = int(counts.sum())
    num_same = int((counts * (counts - 1) // 2).sum())
    num_different = total * (total - 1) // 2 - num_same
    if not num_same or num_different * settings.far < PERCENT:
        raise ValueError(
            f'val must have pairs of pictures of one identity, and at least {PERCENT / settings.far:.0f} of two for '
            f'verification.far = {settings.far:g}, got {num_same} and {num_different}; take more pictures, or a higher '
            f'rate.')
