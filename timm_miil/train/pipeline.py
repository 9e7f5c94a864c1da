"""The temporary network that tells how common labels are where few of them are known.

Ben-Baruch et al., arXiv:2110.10955: train it with the unknown labels ignored, average its confidences on the training
pictures as it learns, and let the main training leave unknown labels of common classes out.
"""
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from timm_miil._errors import RecipeError
from timm_miil.losses import LabelPriorEstimator, save_label_prior
from timm_miil.train._host import Host
from timm_miil.train._output import RunFolder
from timm_miil.train._run import Reports, Run
from timm_miil.train._state import fingerprint, seeded_run
from timm_miil.train.recipe import Recipe
from timm_miil.train.results import StepRecord
from timm_miil.train.splits import Splits

__all__ = ['estimate_prior', 'prior_recipe']


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


def estimate_prior(
        recipe: Recipe, splits: Splits, host: Host, *, output: str | Path | None, resume: str | Path | None,
        on_step: Callable[[StepRecord], None] | None = None,
) -> Tensor:
    """Train the temporary network of a recipe for its estimate.

    Args:
        recipe: The main recipe, with a table `prior`.
        splits: The pictures, as they are learnt from.
        host: The place where it runs.
        output: The main run's folder, in which 'prior.csv' and the folder 'prior' are made; None writes nothing.
        resume: Whether the main run is resumed; this one then goes on from its own newest checkpoint.
        on_step: Called after each of its steps, in the main process.

    Returns:
        Estimated frequency of each label, shape (C,), float64 in host memory.

    Raises:
        As `train`.
    """
    own = prior_recipe(recipe)
    known, path = fingerprint(own, splits, host.share.count), None if output is None else Path(output)
    folder = None if path is None else RunFolder(path / 'prior', keep=own.keep_checkpoints)
    state = None if folder is None else host.on_main(
        lambda: folder.begin(own, None if resume is None else 'auto', known))
    with seeded_run(own.seed, host.device):
        observer = LabelPriorEstimator(len(splits.label_names)).to(host.device)
        is_last_only = recipe.prior is not None and recipe.prior.average == 'last_epoch'
        run = Run(
            own, splits, host, folder=folder, state=state, fingerprint=known, observer=observer, forgets=is_last_only,
            reports=Reports(on_step))
        run.fit()
    sums = host.total(torch.cat([observer.total, observer.num_samples.unsqueeze(0)]))
    prior = (sums[:-1] / sums[-1]).cpu()
    if path is not None:
        host.on_main(lambda: save_label_prior(prior, splits.label_names, path / 'prior.csv'))
    return prior
