"""From a recipe to a task of embeddings, and how embeddings are measured."""
from typing import Any

from timm.task import ClassificationTask
from torch import Tensor

from timm_miil.metrics import pairwise_tar_at_far, rate_of_percent
from timm_miil.tasks import MarginSoftmax, VerificationTask
from timm_miil.train._task_parts import TaskParts
from timm_miil.train._verification_settings import PERCENT, VerificationSettings

__all__ = ['build_task', 'measure_pairs']


def build_task(parts: TaskParts) -> ClassificationTask | None:
    """The task of a recipe with the table `verification`."""
    recipe, settings = parts.recipe, parts.recipe.verification or VerificationSettings()
    model = MarginSoftmax(
        parts.model, len(parts.label_names), settings.embed_dim, margin=settings.margin, scale=settings.scale)
    weights: dict[str, Any] = {} if recipe.teacher is None else {
        'task_loss_weight': recipe.teacher.task_loss_weight, 'distill_loss_weight': recipe.teacher.distill_loss_weight}
    return VerificationTask(model, parts.teacher, device=parts.device, **weights)


def measure_pairs(embeddings: Tensor, targets: Tensor, settings: VerificationSettings) -> dict[str, float]:
    """How well the cosines of embeddings tell identities.

    Args:
        embeddings: Shape (N, D).
        targets: 1 at each picture's identity, shape (N, K).
        settings: The rates.

    Returns:
        'tar', the true accept rate at `settings.far`, and 'tar_at_<rate>' at the others, in percent; NaN where there
        are too few pairs, see `timm_miil.metrics.pairwise_tar_at_far`.
    """
    rates = {'tar': settings.far, **{f'tar_at_{far:g}': far for far in settings.fars}}
    found = pairwise_tar_at_far(embeddings, targets.argmax(1), [rate_of_percent(far) for far in rates.values()])
    return {name: PERCENT * tar for name, tar in zip(rates, found.tars)}
