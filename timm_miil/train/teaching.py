"""From a recipe to what a student learns from besides its labels: a teacher, and a tree over the labels."""
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import create_model
from torch import nn

from timm_miil._checks import cut, nearest, shown
from timm_miil.data import ClassTree
from timm_miil.losses import SemanticHierarchy
from timm_miil.tasks import Teacher, TeacherCache
from timm_miil.train._state import seeded_run
from timm_miil.train.recipe import Recipe, TeacherSettings

__all__ = ['build_hierarchy', 'build_teacher']

PRECISIONS = MappingProxyType({'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16})
HIERARCHY_ARGS = ('include_deepest', 'max_factor')
SYNSET = re.compile(r'n\d{8}')  # ImageNet's name of a class
FEW = 3  # names in a message
SAME_ORDER = (
    'the teacher %s does not tell the names of its %d classes: they are taken to be the labels of the data, in the '
    'same order.')

_logger = logging.getLogger(__name__)


def build_hierarchy(recipe: Recipe, tree: ClassTree | Path | None) -> SemanticHierarchy | None:
    """The levels of the tree over the labels, for the task that learns them; None for another task.

    Args:
        recipe: All settings.
        tree: Over the labels, in their order.

    Raises:
        ValueError: If there is no tree, or no level of two or more classes.
    """
    if recipe.task != 'semantic':
        return None
    if not isinstance(tree, ClassTree):
        raise ValueError(f"task 'semantic' needs a tree over the labels, got {shown(tree)}; see prepare_splits.")
    args = {name: recipe.loss.args[name] for name in HIERARCHY_ARGS if name in recipe.loss.args}
    return SemanticHierarchy(tree.parents, class_names=tree.class_names, **args)


def build_teacher(
        recipe: Recipe, label_names: Sequence[str], student: nn.Module, device: torch.device, *,
        network: nn.Module | None = None,
) -> Teacher | None:
    """The teacher, which sees what is made for the student; None where the recipe has none.

    What a teacher without weights draws does not touch the generators that the student draws from.

    Args:
        recipe: All settings.
        label_names: The student's classes. A teacher that knows the names of its own gives these, in this order; so
            does one of ImageNet where all are synsets, such as 'n01440764'. Another must have as many, in the same
            order, of which a warning tells.
        student: The network to train, for the scale of its pictures.
        device: Where the teacher runs.
        network: Takes the place of the one that the recipe names; its outputs are the student's classes, in order.

    Raises:
        OSError: If its weights cannot be downloaded or read, or the cache's folder not be written to.
        ValueError: If its weights are another network's, it lacks a class of the student, or the cache is of another
            teacher or keeps too few classes for the task.
    """
    settings = recipe.teacher
    if settings is None:
        return None
    if settings.cache and recipe.task == 'semantic' and settings.cache_topk < len(label_names):
        raise ValueError(
            f"teacher.cache_topk must be all {len(label_names)} labels with task 'semantic', as each level of the tree "
            f'has a softmax of its own, got {settings.cache_topk}; raise it, or set teacher.cache to \'\'.')
    config: dict[str, Any] = resolve_model_data_config(student)
    with seeded_run(recipe.seed, device):
        model = (network or _network(settings, len(label_names))).to(device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
    teacher = Teacher(
        model, mean=config['mean'], std=config['std'],
        columns=None if network is not None or recipe.verification is not None else _columns(
            settings, model, label_names),
        image_size=settings.image_size or None, precision=PRECISIONS[settings.precision],
        compiled=settings.torchcompile, shares_head=recipe.sharing is not None)
    if settings.cache:
        teacher.cache = TeacherCache(
            settings.cache, num_classes=len(label_names), topk=min(settings.cache_topk, len(label_names)),
            max_bytes=round(settings.cache_gb * 1e9), teacher=teacher.fingerprint(),
            tail='softmax' if recipe.is_exclusive else 'sigmoid')
    return teacher


def _network(settings: TeacherSettings, num_classes: int) -> nn.Module:
    # One that has weights has its classes.
    classes: dict[str, Any] = {} if settings.pretrained else {'num_classes': num_classes}
    try:
        model: nn.Module = create_model(settings.name, pretrained=settings.pretrained, **classes, **settings.args)
    except OSError as error:
        what = 'train it first, or check the folder' if settings.name.startswith('local-dir:') else (
            'check the network and the name')
        raise OSError(
            f'the weights of the teacher {settings.name} could not be had: {cut(str(error)).rstrip(".")}; {what}, or '
            f'name a file by teacher.args.checkpoint_path with teacher.pretrained = false.') from error
    except RuntimeError as error:  # torch names each tensor that does not fit
        raise ValueError(
            f'the weights of the teacher {settings.name} must be of this network with {num_classes} classes: '
            f'{cut(str(error)).rstrip(".")}; give its settings by teacher.args, or take another file.') from error
    if not settings.pretrained and not settings.args.get('checkpoint_path'):
        _logger.warning(
            'the weights of the teacher %s are random, so that it knows nothing: set teacher.pretrained = true, or '
            'name a file by teacher.args.checkpoint_path.', settings.name)
    return model


def _columns(settings: TeacherSettings, model: Any, label_names: Sequence[str]) -> list[int] | None:
    """Which outputs are the student's classes; None for all, in their order."""
    name = settings.name
    if not settings.pretrained:
        if settings.args.get('checkpoint_path'):  # a file that names no classes
            _logger.warning(SAME_ORDER, name, len(label_names))
        return None
    known = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    subset = infer_imagenet_subset({'num_classes': model.num_classes})
    if not known and subset and all(map(SYNSET.fullmatch, label_names)):
        known = ImageNetInfo(subset).label_names()
    if not known or len(known) != model.num_classes:
        if model.num_classes != len(label_names):
            raise ValueError(
                f'the teacher {name} must have the classes of the data: it has {model.num_classes}, whose names it '
                f'does not tell, and the data have {len(label_names)}; take another, or one trained on these labels.')
        _logger.warning(SAME_ORDER, name, len(label_names))
        return None
    place = {label: index for index, label in enumerate(known)}
    lacking = [label for label in label_names if label not in place]
    if lacking:
        more = f' and {len(lacking) - FEW} more' if len(lacking) > FEW else ''
        raise ValueError(
            f'the teacher {name} must have the labels of the data, and lacks '
            f'{", ".join(map(shown, lacking[:FEW]))}{more}; {nearest(lacking[0], known)}')
    return [place[label] for label in label_names]
