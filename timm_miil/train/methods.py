"""Which task a table of a recipe asks for, beyond those of labels and a teacher."""
from collections.abc import Callable, Mapping
from types import MappingProxyType

from timm.task import ClassificationTask

from timm_miil.train import _dual_head, _injection, _label_augmentation, _long_tail, _sharing, _verification
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_method_task']

BUILDERS: Mapping[str, Callable[[TaskParts], ClassificationTask | None]] = MappingProxyType({
    'sharing': _sharing.build_task, 'dual_head': _dual_head.build_task,
    'label_augmentation': _label_augmentation.build_task, 'balanced': _long_tail.build_task,
    'positive_unlabeled': _long_tail.build_pu_task, 'injection': _injection.build_task,
    'verification': _verification.build_task})


def build_method_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of the table that the recipe has, of which there is one at most; None where it has none."""
    for name, build in BUILDERS.items():
        if getattr(parts.recipe, name) is not None:
            return build(parts)
    return None
