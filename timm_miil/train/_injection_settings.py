"""The table of a recipe that injects labels into a self-supervised network."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm_miil._checks import check_choice, check_not_negative, check_positive, check_range
from timm_miil.tasks.label_injection import FROZEN

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['InjectionSettings']


@dataclass(frozen=True)
class InjectionSettings:
    """Controlled label injection, arXiv:2204.09134, of which the recipe's own training is the last of three stages.

    How much is injected is for the recipe to say: by its learning rate, layer decay and epochs.

    Args:
        start: Recipe of the task 'self_supervised', by name or file, that gives the weights to start from. It is
            trained first, in the folder 'start', with this recipe's network, data and seed. '' starts from the weights
            that `model` names.
        start_epochs: Its epochs; 0 takes its own.
        head_epochs: Epochs of the second stage, in the folder 'head': the classifier alone, on the frozen network.
        head_lr: Its learning rate, above 0.
        frozen: What does not change in the last stage, see `timm_miil.tasks.LabelInjectionTask`: 'statistics',
            'nothing', or 'backbone', by which nothing is injected at all.
    """
    start: str = ''
    start_epochs: int = 0
    head_epochs: int = 10
    head_lr: float = 1e-3
    frozen: str = 'statistics'

    def __post_init__(self) -> None:
        check_not_negative(start_epochs=self.start_epochs)
        check_positive(head_epochs=self.head_epochs)
        check_range(head_lr=self.head_lr, low=math.ulp(0.0), high=math.inf)
        check_choice(frozen=self.frozen, choices=FROZEN)
        if self.start_epochs and not self.start:
            raise ValueError(f'start_epochs must be 0 without a start, got {self.start_epochs}; name a recipe.')

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        if recipe.task != 'single_label':
            raise ValueError(f"injection is for task 'single_label', got {recipe.task!r}; leave the table out.")
        if recipe.teacher is not None:
            raise ValueError('injection is without a teacher; leave one of the two tables out.')
        model = recipe.model
        if not self.start and not (model.pretrained or model.args.get('checkpoint_path')):
            raise ValueError(
                'injection needs weights to start from, got random ones; set model.pretrained = true, name a model '
                'folder (model.name = "local-dir:FOLDER"), or give injection.start.')
