"""What training without labels asks of a recipe, and its tasks."""
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from timm.task import ClassificationTask
from torch import nn

from timm_miil.tasks.rotation import RotationHead, RotationTask
from timm_miil.tasks.self_supervised import SimSiam, SimSiamTask

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['ARGS_OF_LOSS', 'build_self_supervised', 'check_self_supervised']

ARGS_OF_LOSS: Mapping[str, frozenset[str]] = MappingProxyType({
    'rotation': frozenset(), 'simsiam': frozenset({'pred_dim', 'proj_dim'})})


def check_self_supervised(recipe: 'Recipe') -> None:
    """Raise ValueError if a recipe of the task 'self_supervised' has what needs labels, or another loss."""
    task, loss = "task 'self_supervised'", recipe.loss
    if loss.name not in ARGS_OF_LOSS or loss.args.keys() - ARGS_OF_LOSS[loss.name]:
        raise ValueError(
            f"loss must be 'rotation', or 'simsiam' with args pred_dim and proj_dim, for {task}, got {loss.name!r} "
            f'with {dict(loss.args)}.')
    for name in ('partial', 'teacher', 'unseen_labels'):
        if getattr(recipe, name):
            raise ValueError(f'{name} must be left out of {task}, which looks at no label.')
    for name in ('aug_repeats', 'mixup'):
        if recipe.augment.args.get(name):
            raise ValueError(f'augment.args.{name} must be left out of {task}, which makes views of its own.')


def build_self_supervised(recipe: 'Recipe', model: Any, device: torch.device) -> ClassificationTask:
    """The task of a recipe without labels.

    Args:
        recipe: All settings.
        model: The network, which gives embeddings, on its device.
        device: That device.
    """
    network: nn.Module = model
    if recipe.loss.name == 'rotation':
        return RotationTask(RotationHead(network, model.head_hidden_size), device=device)
    return SimSiamTask(SimSiam(network, model.head_hidden_size, **recipe.loss.args), device=device)
