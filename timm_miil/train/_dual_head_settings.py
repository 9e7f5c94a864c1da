"""The tables of a recipe that trains a second head beside the network."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm_miil._checks import check_choice, check_not_negative, check_range
from timm_miil.tasks import NUM_TRANSFORMS

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['DualHeadSettings', 'LabelAugmentationSettings']

MODES = ('binary', 'softmax')


@dataclass(frozen=True)
class DualHeadSettings:
    """Two heads, one for the labels and one for the teacher, arXiv:2411.08937 (DHKD) and arXiv:2505.07675 (DHO).

    The teacher, its temperature and its weight are those of the table `teacher`; both papers have temperature 2 and
    weight 1, DHKD on ImageNet 0.1. Pictures without a label are taught by the teacher alone; where there are such, what
    is learnt depends a little on the number of processes and of `grad_accum_steps`, see `timm_miil.tasks.DualHeadTask`.

    Args:
        mode: Distance of the second head from the teacher: 'binary' (DHKD) or 'softmax' (DHO).
        hidden: Width of the second head's hidden layer; 0 for a linear head.
        normalize: Scale what the second head sees to length 1.
        scale: Factor of the second head's logits, above 0.
        same_head: Let the network's own head learn both terms, which is what DHKD is compared with.
    """
    mode: str = 'binary'
    hidden: int = 0
    normalize: bool = False
    scale: float = 1.0
    same_head: bool = False

    def __post_init__(self) -> None:
        check_choice(mode=self.mode, choices=MODES)
        check_not_negative(hidden=self.hidden)
        check_range(scale=self.scale, low=math.ulp(0.0), high=math.inf)
        if self.same_head and (self.hidden or self.normalize or self.scale != 1):
            raise ValueError('hidden, normalize and scale are of a second head; leave them out with same_head.')

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        _check_cross_entropy('dual_head', recipe)
        if recipe.teacher is None:
            raise ValueError('dual_head needs the table teacher, got none; name one by teacher.name.')
        if recipe.teacher.task_loss_weight != 1:
            raise ValueError(
                f'teacher.task_loss_weight must be 1 with dual_head, got {recipe.teacher.task_loss_weight}; weigh the '
                f'teacher by teacher.distill_loss_weight.')
        if recipe.augment.args.get('mixup'):
            raise ValueError('augment.args.mixup must be left out with dual_head, whose labels are not mixed.')


@dataclass(frozen=True)
class LabelAugmentationSettings:
    """Classes times transforms (SLA), arXiv:1910.05872; see `timm_miil.tasks.LabelAugmentation`.

    Args:
        transforms: 'rotation', for square pictures, or 'colour_permutation'.
        self_distillation: Whether the network's own head learns from the joint one (SLA+SD) rather than being a part of
            it (SLA).
        joint_loss_weight: Weight of the joint loss, above 0; the paper takes the number of transforms for large data.
        temperature: Of self-distillation, in [0.001, 1000].
    """
    transforms: str = 'rotation'
    self_distillation: bool = False
    joint_loss_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choice(transforms=self.transforms, choices=NUM_TRANSFORMS)
        check_range(joint_loss_weight=self.joint_loss_weight, low=math.ulp(0.0), high=math.inf)
        check_range(temperature=self.temperature, low=1e-3, high=1e3, closed=True)
        if self.temperature != 1 and not self.self_distillation:
            raise ValueError(
                f'temperature is of self_distillation, got {self.temperature} without it; leave it out, or set '
                f'self_distillation = true.')

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        _check_cross_entropy('label_augmentation', recipe)
        if recipe.teacher is not None:
            raise ValueError('teacher must be left out with label_augmentation, which has no term for one.')


def _check_cross_entropy(name: str, recipe: 'Recipe') -> None:
    if recipe.task != 'single_label':
        raise ValueError(f"{name} is for task 'single_label', got {recipe.task!r}.")
    if recipe.loss.name != 'cross_entropy' or recipe.loss.args:
        raise ValueError(
            f"loss must be the plain 'cross_entropy' with {name}, got {recipe.loss.name!r} with args "
            f'{dict(recipe.loss.args)}.')
