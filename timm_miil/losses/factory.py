"""Losses by name, for recipes and command lines."""
import fnmatch
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from timm_miil._checks import check_text, nearest

__all__ = ['create_loss', 'list_losses']

_CLASS_OF_NAME: Mapping[str, str] = MappingProxyType({
    'adaptive_asymmetric': 'AdaptiveAsymmetricLoss',
    'asymmetric': 'AsymmetricLoss',
    'asymmetric_single_label': 'AsymmetricLossSingleLabel',
    'class_aware_selective': 'ClassAwareSelectiveLoss',
    'classifier_sharing': 'ClassifierSharingLoss',
    'complementary_nll': 'ComplementaryNLLLoss',
    'conditional_transport': 'ConditionalTransportLoss',
    'conr': 'ConRLoss',
    'contrastive_distillation': 'ContrastiveDistillationLoss',
    'decoupled_softmax': 'DecoupledSoftmaxLoss',
    'distillation': 'DistillationLoss',
    'dual_head_distillation': 'DualHeadDistillationLoss',
    'embedding_distillation': 'EmbeddingDistillationLoss',
    'mann_whitney': 'MannWhitneyLoss',
    'mlcd': 'MLCDLoss',
    'multi_focal_modifier': 'MultiFocalModifierLoss',
    'multilabel_distillation': 'MultiLabelDistillationLoss',
    'partial_ranking_distillation': 'PartialRankingDistillationLoss',
    'probability_distillation': 'ProbabilityDistillationLoss',
    'pu_multilabel': 'PUMultiLabelLoss',
    'semantic_distillation': 'SemanticDistillationLoss',
    'semantic_diversity': 'SemanticDiversityLoss',
    'semantic_softmax': 'SemanticSoftmaxLoss',
    'soft_topk': 'SoftTopKLoss',
    'soft_weighted_triplet': 'SoftWeightedTripletLoss',
    'supervised_distillation': 'SupervisedDistillationLoss',
    'teacher_head': 'TeacherHeadLoss',
    'triplet_alignment': 'TripletAlignmentLoss',
})
# What the papers call them.
_NAME_OF_SHORT: Mapping[str, str] = MappingProxyType({
    'asl': 'asymmetric', 'csl': 'class_aware_selective', 'sdl': 'semantic_diversity'})


def list_losses(pattern: str = '*') -> list[str]:
    """Names that `create_loss` takes.

    Args:
        pattern: Shell pattern, such as '*distillation'.

    Returns:
        The names that match, sorted.
    """
    return sorted(fnmatch.filter(_CLASS_OF_NAME, pattern))


def create_loss(name: str, **settings: object) -> nn.Module:
    """Make a loss of this package.

    Args:
        name: One of `list_losses`, a class name such as 'AsymmetricLoss', or the paper's 'asl', 'csl', 'sdl'; capital
            letters, '-' and '_' do not matter.
        **settings: Arguments of its constructor.

    Raises:
        TypeError: If name is no string, or the constructor does not know a setting or lacks one.
        ValueError: If there is no such loss, or a setting is out of range.

    Example:
        >>> create_loss('asymmetric', gamma_neg=2.0, reduction='mean').gamma_neg
        2.0
    """
    check_text(name=name)
    known = {_plain(word): class_name for key, class_name in _CLASS_OF_NAME.items() for word in (key, class_name)}
    known |= {short: _CLASS_OF_NAME[key] for short, key in _NAME_OF_SHORT.items()}
    class_name = known.get(_plain(name))
    if class_name is None:
        raise ValueError(f'unknown loss {name!r}; {nearest(name, _CLASS_OF_NAME)}')
    kind = getattr(importlib.import_module('timm_miil.losses'), class_name)
    known_settings = inspect.signature(kind).parameters
    for setting in settings:
        if setting not in known_settings:
            raise TypeError(f'{class_name} has no setting {setting!r}; {nearest(setting, known_settings)}')
    loss: nn.Module = kind(**settings)
    return loss


def _plain(name: str) -> str:
    return name.lower().replace('_', '').replace('-', '').removesuffix('loss')
