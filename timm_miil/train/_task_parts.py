"""What a task of a recipe is made of."""
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_miil.tasks import Teacher
from timm_miil.train.recipe import Recipe

__all__ = ['Prepared', 'TaskParts']


@dataclass(frozen=True)
class Prepared:
    """What trainings before the main one leave to it.

    Args:
        prior: Estimated frequency of each label, shape (C,), for the loss that takes it.
        weights: State dict that the network starts from; None for what the recipe says.
        teacher: The network that takes the place of the recipe's teacher; its outputs are the labels, in their order.
        given: Anything else, by name, for the task that asks for it.
    """
    prior: Tensor | None = None
    weights: Mapping[str, Tensor] | None = None
    teacher: nn.Module | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class TaskParts:
    """What a task is made of.

    Args:
        recipe: All settings.
        model: The network, on its device.
        device: That device.
        criterion: The loss.
        teacher: Who is learnt from besides; None for nobody.
        label_names: Names of the classes.
        num_train: Training pictures; None for a stream, whose pictures have no places.
        class_counts: Training pictures that show each label, shape (C,); None where a stream does not tell.
        is_soft: Whether targets may be mixed, or the loss takes distributions.
        given: What stages before left to it, see `Prepared`.
    """
    recipe: Recipe
    model: nn.Module
    device: torch.device
    criterion: nn.Module
    teacher: Teacher | None = None
    label_names: Sequence[str] = ()
    num_train: int | None = None
    class_counts: Tensor | None = None
    is_soft: bool = False
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
