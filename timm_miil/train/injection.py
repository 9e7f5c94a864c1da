"""Controlled label injection in stages: a self-supervised start, a classifier on it, then labels for all of it.

Nayman et al., "Diverse Imagenet Models Transfer Better", arXiv:2204.09134. The last stage is the recipe's own training.
"""
import dataclasses

import torch
from torch import Tensor, nn
from torch.optim import SGD

from timm_miil._errors import RecipeError
from timm_miil.train._injection_settings import InjectionSettings
from timm_miil.train._stages import Stages
from timm_miil.train._state import seeded_run
from timm_miil.train._task_parts import Prepared
from timm_miil.train.build import build_model, build_scheduler
from timm_miil.train.recipe import Recipe, load_recipe

__all__ = ['head_recipe', 'injected_amount', 'prepare_start', 'start_recipe']


def prepare_start(recipe: Recipe, stages: Stages) -> Prepared:
    """Train what comes before the labels are injected.

    Args:
        recipe: The main recipe, with a table `injection`.
        stages: Where it is trained: in the folders 'start' and 'head'.

    Returns:
        The weights of the frozen network with its classifier.

    Raises:
        RecipeError: If the recipe that gives the start is none of the task 'self_supervised'.
        ValueError: If its weights do not fit, and else as `train`.
    """
    start = start_recipe(recipe)
    prepared = Prepared()
    if start is not None:
        prepared = Prepared(weights=_with_classifier(stages.train(start, 'start'), recipe, stages))
    return Prepared(weights=stages.train(head_recipe(recipe), 'head', prepared=prepared).state_dict())


def start_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of the first stage: the one that `injection.start` names, with the main one's network, pictures, seed
    and ways of computing; None where the weights are there already.

    Raises:
        FileNotFoundError: If there is no such file.
        RecipeError: If it is unknown, wrong, or not of the task 'self_supervised'.
    """
    settings = _settings(recipe)
    if not settings.start:
        return None
    own = load_recipe(settings.start)
    if own.task != 'self_supervised':
        raise RecipeError(f"injection.start must be a recipe of task 'self_supervised', got {settings.start!r} of task "
                          f'{own.task!r}; such are scenes_rotation and scenes_simsiam.')
    kept = ('model', 'data', 'seed', 'workers', 'precision', 'channels_last', 'torchcompile', 'sync_bn', 'fsdp',
            'keep_checkpoints', 'checkpoint_steps', 'grad_accum_steps')
    size = {name: getattr(recipe.augment, name) for name in ('image_size', 'crop_pct')}
    return dataclasses.replace(
        own, **{name: getattr(recipe, name) for name in kept}, augment=dataclasses.replace(own.augment, **size),
        epochs=settings.start_epochs or own.epochs, stop_epoch=0, scenes=None, tree_scenes=None)


def head_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the second stage: the main one with a frozen backbone, and epochs and learning rate of its own."""
    settings = _settings(recipe)
    return dataclasses.replace(
        recipe, epochs=settings.head_epochs, stop_epoch=0, ema_decay=0.0,
        optimizer=dataclasses.replace(recipe.optimizer, lr=settings.head_lr, layer_decay=0.0),
        injection=dataclasses.replace(settings, frozen='backbone'))


def injected_amount(recipe: Recipe, num_pictures: int) -> float:
    """How much is injected: the sum of the learning rates of all steps of the last stage, the integral of lr dt.

    With layer decay it is that of the last layer. It is 0 for a frozen backbone.

    Args:
        recipe: The main recipe, with a table `injection`.
        num_pictures: Pictures to learn from.

    Raises:
        RecipeError: If the recipe has no such table.
    """
    if _settings(recipe).frozen == 'backbone':
        return 0.0
    steps = num_pictures // recipe.batch_size
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.lr, momentum=0.9)  # onecycle wants a momentum
    schedule, total = build_scheduler(recipe, optimizer, steps), 0.0
    for done in range(1, recipe.num_epochs * steps + 1):
        total += optimizer.param_groups[0]['lr']
        optimizer.step()  # torch's schedules warn where none is made
        schedule.step_update(done)
    return total


def _settings(recipe: Recipe) -> InjectionSettings:
    if recipe.injection is None:
        raise RecipeError('the recipe has no table injection, which says how labels are injected.')
    return recipe.injection


def _with_classifier(network: nn.Module, recipe: Recipe, stages: Stages) -> dict[str, Tensor]:
    """The state dict of the recipe's network with these weights, and a new classifier."""
    with seeded_run(recipe.seed, stages.host.device):
        whole = build_model(recipe, stages.splits.label_names, pretrained=False)
    classifier = {id(parameter) for parameter in whole.get_classifier().parameters()}       # type: ignore[operator]
    own = {name for name, parameter in whole.named_parameters() if id(parameter) in classifier}
    weights = network.state_dict()
    lacking, surplus = whole.state_dict().keys() - weights.keys() - own, weights.keys() - whole.state_dict().keys()
    if lacking or surplus:
        raise ValueError(
            f'{recipe.model.name} must have the same layers with a classifier and without, got others such as '
            f'{min(lacking | surplus)!r}; take another network.')
    whole.load_state_dict(weights, strict=False)
    return whole.state_dict()
