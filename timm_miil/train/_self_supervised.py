"""What training without labels asks of a recipe."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['SIMSIAM_ARGS', 'check_self_supervised']

SIMSIAM_ARGS = ('pred_dim', 'proj_dim')


def check_self_supervised(recipe: 'Recipe') -> None:
    """Raise ValueError if a recipe of the task 'self_supervised' has what needs labels, or is no SimSiam."""
    task = "task 'self_supervised'"
    unknown = sorted(recipe.loss.args.keys() - set(SIMSIAM_ARGS))
    if recipe.loss.name != 'simsiam' or unknown:
        raise ValueError(
            f"loss must be 'simsiam' with args {' and '.join(SIMSIAM_ARGS)} for {task}, got {recipe.loss.name!r} with "
            f'{dict(recipe.loss.args)}.')
    for name in ('partial', 'teacher', 'unseen_labels'):
        if getattr(recipe, name):
            raise ValueError(f'{name} must be left out of {task}, which looks at no label.')
    for name in ('aug_repeats', 'mixup'):
        if recipe.augment.args.get(name):
            raise ValueError(f'augment.args.{name} must be left out of {task}, which takes two views of each picture.')
