"""From a recipe to a task for labels that are long-tailed and partly missing."""
from typing import cast

from timm.task import ClassificationTask

from timm_miil.losses import MultiFocalModifierLoss, PUMultiLabelLoss
from timm_miil.tasks import ComicModel, ComicTask, PositiveUnlabeledTask
from timm_miil.train._task_parts import TaskParts

__all__ = ['build_pu_task', 'build_task']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `balanced`.

    Raises:
        TypeError: If the network's classifier cannot be copied, see `ComicModel`.
        ValueError: If the pictures are a stream.
    """
    recipe, settings = parts.recipe, parts.recipe.balanced
    if settings is None:
        return None
    if parts.num_train is None:
        raise ValueError(
            'balanced needs the number of training pictures and of those that show each label, which a stream does not '
            'tell; read the pictures from files.')
    steps_per_epoch = parts.num_train // recipe.batch_size
    model = ComicModel(
        parts.model, warmup_steps=round(settings.warmup_epochs * steps_per_epoch * recipe.grad_accum_steps),
        correct_threshold=settings.correct_threshold, balance=settings.balance)
    return ComicTask(
        model, cast(MultiFocalModifierLoss, parts.criterion), head_exponent=settings.head_exponent,
        tail_exponent=settings.tail_exponent, correct_loss_weight=settings.correct_loss_weight,
        distill_loss_weight=settings.distill_loss_weight, unknown_is_absent=settings.unknown_is_absent,
        device=parts.device)


def build_pu_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `positive_unlabeled`."""
    settings = parts.recipe.positive_unlabeled
    if settings is None:
        return None
    return PositiveUnlabeledTask(
        parts.model, cast(PUMultiLabelLoss, parts.criterion), consistency_weight=settings.consistency_weight,
        mixup_alpha=settings.mixup_alpha, device=parts.device)
