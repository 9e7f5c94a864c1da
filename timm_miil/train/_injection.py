"""From a recipe to what injects labels into a self-supervised network."""
from timm.task import ClassificationTask

from timm_miil.tasks import LabelInjectionTask
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `injection`."""
    settings = parts.recipe.injection
    return None if settings is None else LabelInjectionTask(
        parts.model, parts.criterion, frozen=settings.frozen, soft_targets=parts.is_soft, device=parts.device)
