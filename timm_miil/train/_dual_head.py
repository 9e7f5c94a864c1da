"""From a recipe to a task with a second head."""
from timm.task import ClassificationTask

from timm_miil.tasks import DualHead, DualHeadTask
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `dual_head`; None where there is no teacher."""
    settings, teacher = parts.recipe.dual_head, parts.recipe.teacher
    if settings is None or teacher is None or parts.teacher is None:
        return None
    model = parts.model if settings.same_head else DualHead(
        parts.model, hidden=settings.hidden, normalize=settings.normalize, scale=settings.scale)
    return DualHeadTask(
        model, parts.teacher, mode=settings.mode, temperature=teacher.temperature,
        distill_loss_weight=teacher.distill_loss_weight, device=parts.device)
