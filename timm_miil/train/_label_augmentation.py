"""From a recipe to a task of classes times transforms."""
from timm.task import ClassificationTask

from timm_miil.train._task_parts import TaskParts

__all__ = ['build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `label_augmentation`."""
    return None
