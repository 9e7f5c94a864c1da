"""From a recipe to a task that shares a classifier with its teacher."""
from typing import Any

from timm.task import ClassificationTask

from timm_miil.tasks import ClassifierSharingTask, SingleLabelTask, freeze_head
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `sharing`; None where there is none.

    Raises:
        TypeError: If the network has no linear classifier on its embedding.
        ValueError: If teacher and student do not fit, or a stream has no places for pictures.
    """
    settings, recipe = parts.recipe.sharing, parts.recipe
    if settings is None:
        return None
    if settings.scheme == 'frozen_head':
        model: Any = parts.model
        freeze_head(model, parts.given.get('head', model.get_classifier()), adapter=settings.adapter)
        return SingleLabelTask(model, parts.criterion, soft_targets=parts.is_soft, device=parts.device)
    if parts.teacher is None or recipe.teacher is None:
        return None
    if settings.contrast_loss_weight and parts.num_train is None:
        raise ValueError('sharing.contrast_loss_weight must be 0 for a stream, whose pictures have no places.')
    return ClassifierSharingTask(
        parts.model, parts.teacher, parts.criterion, task_loss_weight=recipe.teacher.task_loss_weight,
        distill_loss_weight=recipe.teacher.distill_loss_weight, head_loss_weight=settings.head_loss_weight,
        # The published sum over the batch, in however many parts that is computed.
        embedding_loss_weight=settings.embedding_loss_weight * recipe.batch_size, embedding_reduction='mean',
        contrast_loss_weight=settings.contrast_loss_weight, temperature=recipe.teacher.temperature,
        adapter=settings.adapts_student, init_head=settings.init_head, num_train=parts.num_train,
        num_negatives=settings.num_negatives, soft_targets=parts.is_soft, device=parts.device)
