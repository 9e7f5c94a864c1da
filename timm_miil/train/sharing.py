"""Student-aware distillation (SH-KD) in stages: a student alone, a teacher with its last layer, a student of that.

Ben-Baruch et al., "It's All in the Head: Representation Knowledge Distillation through Classifier Sharing",
arXiv:2201.06945. The last stage is the recipe's own training.
"""
import dataclasses

from torch import nn

from timm_miil._errors import RecipeError
from timm_miil.tasks import freeze_head
from timm_miil.train._sharing_settings import SharingSettings
from timm_miil.train._stages import Stages
from timm_miil.train._state import seeded_run
from timm_miil.train._task_parts import Prepared
from timm_miil.train.build import build_model
from timm_miil.train.recipe import ModelSettings, Recipe

__all__ = ['aware_teacher_recipe', 'lone_student_recipe', 'prepare_teacher']


def prepare_teacher(recipe: Recipe, stages: Stages) -> Prepared:
    """Train the student-aware teacher of a recipe, if it asks for one.

    Args:
        recipe: The main recipe, with a table `sharing`.
        stages: Where it is trained: in the folders 'student' and 'teacher'.

    Returns:
        The teacher; nothing for another scheme than 'shkd'.

    Raises:
        TypeError: If a network has no linear classifier on its embedding.
        ValueError: If the two networks' embeddings differ in width and there is no adapter, before anything is
            trained; else as `train`.
    """
    if recipe.sharing is None or recipe.sharing.scheme != 'shkd':
        return Prepared()
    student, teacher = lone_student_recipe(recipe), aware_teacher_recipe(recipe)
    labels = stages.splits.label_names
    with seeded_run(recipe.seed, stages.host.device):
        first, second = (build_model(own, labels, pretrained=False) for own in (student, teacher))
        freeze_head(second, _classifier(first), adapter=recipe.sharing.adapter)
    head = _classifier(stages.train(student, 'student'))
    return Prepared(teacher=stages.train(teacher, 'teacher', prepared=Prepared(given={'head': head})))


def lone_student_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the first stage: the main one without a teacher."""
    return dataclasses.replace(recipe, teacher=None, sharing=None, paper=None)


def aware_teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the second stage: the main one for the network of its teacher, whose last layer is frozen.

    Raises:
        RecipeError: If the recipe has no table `teacher`.
    """
    if recipe.teacher is None:
        raise RecipeError('the recipe has no table teacher, which names the network to train.')
    adapter = recipe.sharing is not None and recipe.sharing.adapter
    model = ModelSettings(recipe.teacher.name, args=recipe.teacher.args, pretrained=recipe.teacher.pretrained)
    return dataclasses.replace(
        recipe, model=model, teacher=None, sharing=SharingSettings('frozen_head', adapter=adapter), paper=None)


def _classifier(network: nn.Module) -> nn.Linear:
    classifier: nn.Linear = network.get_classifier()                                        # type: ignore[operator]
    return classifier
