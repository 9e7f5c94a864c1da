"""From a recipe to a task of classes times transforms."""
from timm.task import ClassificationTask

from timm_miil.tasks import LabelAugmentation, LabelAugmentationTask
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `label_augmentation`."""
    settings = parts.recipe.label_augmentation
    if settings is None:
        return None
    model = LabelAugmentation(
        parts.model, transforms=settings.transforms, self_distillation=settings.self_distillation)
    return LabelAugmentationTask(
        model, joint_loss_weight=settings.joint_loss_weight, temperature=settings.temperature, device=parts.device)
