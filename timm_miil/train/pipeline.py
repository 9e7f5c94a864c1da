"""The trainings that come before the main one.

The prior, Ben-Baruch et al., arXiv:2110.10955: a temporary network is trained with the unknown labels ignored, its
confidences on the training pictures are averaged as it learns, and the main training leaves unknown labels of common
classes out.
"""
import dataclasses

import torch
from torch import Tensor

from timm_miil._errors import RecipeError
from timm_miil.losses import LabelPriorEstimator, save_label_prior
from timm_miil.train._stages import Stages
from timm_miil.train._task_parts import Prepared
from timm_miil.train.injection import prepare_start
from timm_miil.train.recipe import Recipe
from timm_miil.train.sharing import prepare_teacher

__all__ = ['estimate_prior', 'prepare', 'prior_recipe']


def prior_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the temporary network: the main one with another loss, fewer epochs and no teacher.

    Raises:
        RecipeError: If the recipe has no table `prior`.
    """
    if recipe.prior is None:
        raise RecipeError('the recipe has no table prior, which says how to train a temporary network.')
    return dataclasses.replace(
        recipe, epochs=recipe.prior.epochs, stop_epoch=0, loss=recipe.prior.loss, prior=None, teacher=None,
        paper=None)


def estimate_prior(recipe: Recipe, stages: Stages) -> Tensor:
    """Train the temporary network of a recipe for its estimate.

    Args:
        recipe: The main recipe, with a table `prior`.
        stages: Where it is trained: in the folder 'prior', beside which 'prior.csv' is written.

    Returns:
        Estimated frequency of each label, shape (C,), float64 in host memory.

    Raises:
        As `train`.
    """
    own, host, label_names = prior_recipe(recipe), stages.host, stages.splits.label_names
    observer = LabelPriorEstimator(len(label_names)).to(host.device)
    is_last_only = recipe.prior is not None and recipe.prior.average == 'last_epoch'
    stages.observe(own, 'prior', observer, forgets=is_last_only)
    sums = host.total(torch.cat([observer.total, observer.num_samples.unsqueeze(0)]))
    prior = (sums[:-1] / sums[-1]).cpu()
    if stages.output is not None:
        path = stages.output / 'prior.csv'
        host.on_main(lambda: save_label_prior(prior, label_names, path))
    return prior


def prepare(recipe: Recipe, stages: Stages) -> Prepared:
    """Run the trainings that come before the main one.

    Args:
        recipe: The main recipe.
        stages: Where they are run.

    Returns:
        What they leave to the main training.

    Raises:
        As `train`.
    """
    if recipe.prior is not None:
        return Prepared(prior=estimate_prior(recipe, stages))
    if recipe.injection is not None:
        return prepare_start(recipe, stages)
    return prepare_teacher(recipe, stages)
