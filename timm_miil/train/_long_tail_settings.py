"""The tables of a recipe for labels that are long-tailed and partly missing."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm_miil._checks import check_range

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['BalancedSettings', 'PositiveUnlabeledSettings']


@dataclass(frozen=True)
class BalancedSettings:
    """Correction, modification and balance of long-tailed, partial labels (COMIC), arXiv:2304.10539.

    The modification is the loss 'multi_focal_modifier', whose `exponent` is the balanced classifier's; see
    `timm_miil.tasks.ComicTask` for what each setting does.

    Args:
        warmup_epochs: Epochs before unknown labels are corrected, at least 0 and not necessarily whole; the authors
            wait for one.
        correct_threshold: Probability above which an unknown label may become present, in [0, 1].
        correct_loss_weight: Weight of the loss of corrected labels beside that of the labels as they are given, at
            least 0; the authors' is 0.2.
        unknown_is_absent: Take unknown labels that are not corrected as absent; otherwise the loss ignores them.
        balance: Train classifiers of the head and of the tail beside the network's own, which learns from both.
        head_exponent: Power of the class weight for the head's classifier, at least 0.
        tail_exponent: Power of the class weight for the tail's classifier, at least 0.
        distill_loss_weight: Weight of what the balanced classifier learns from the other two, at least 0.
    """
    warmup_epochs: float = 1.0
    correct_threshold: float = 0.7
    correct_loss_weight: float = 0.2
    unknown_is_absent: bool = True
    balance: bool = True
    head_exponent: float = 0.0
    tail_exponent: float = 1.0
    distill_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        check_range(
            low=0.0, high=float('inf'), warmup_epochs=self.warmup_epochs, head_exponent=self.head_exponent,
            tail_exponent=self.tail_exponent, correct_loss_weight=self.correct_loss_weight,
            distill_loss_weight=self.distill_loss_weight)
        check_range(low=0.0, high=1.0, closed=True, correct_threshold=self.correct_threshold)

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        _check_alone(recipe, 'balanced', 'multi_focal_modifier')


@dataclass(frozen=True)
class PositiveUnlabeledSettings:
    """Training on positive and unlabelled labels (PU-MLC), arXiv:2306.16016; see `PositiveUnlabeledTask`.

    Args:
        consistency_weight: Weight of the consistency on mixed pictures, at least 0; 0 mixes nothing.
        mixup_alpha: Parameter of the distribution of the shares in which pictures are mixed, in [0.001, 1000).
    """
    consistency_weight: float = 1.0
    mixup_alpha: float = 0.3

    def __post_init__(self) -> None:
        check_range(low=0.0, high=float('inf'), consistency_weight=self.consistency_weight)
        check_range(low=1e-3, high=1e3, mixup_alpha=self.mixup_alpha)

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        _check_alone(recipe, 'positive_unlabeled', 'pu_multilabel')
        if recipe.loss.args.get('reduction', 'sum') != 'mean':
            raise ValueError(
                "loss.args.reduction must be 'mean' with positive_unlabeled: this loss is one of a batch, and what is "
                'summed here is taken as a sum over pictures.')


def _check_alone(recipe: 'Recipe', table: str, loss: str) -> None:
    if recipe.task != 'multi_label':
        raise ValueError(f"{table} is for task 'multi_label', got {recipe.task!r}; leave it out.")
    if recipe.loss.name != loss:
        raise ValueError(f'{table} is for the loss {loss!r}, got {recipe.loss.name!r}; set loss.name, or leave it out.')
    if recipe.teacher is not None:
        raise ValueError(f'{table} and teacher must not both be given; leave one out.')
