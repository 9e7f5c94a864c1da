"""What the networks of a timm backbone and one of our heads share: construction by name, checkpoints, registration."""
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from timm.models import (
    PretrainedCfg, TResNet, adapt_input_conv, build_model_with_cfg, create_model, get_pretrained_cfg, is_model,
    list_models, resolve_pretrained_cfg)
from torch import Tensor, nn

from timm_miil._checks import nearest
from timm_miil.heads import BackboneWithHead
from timm_miil.models._loading import check_fit, explain_checkpoint_errors
from timm_miil.models._pretrained_file import keep_in
from timm_miil.models.inplace_norm import convert_to_inplace_norm

__all__ = ['HeadedClassifier', 'backbone_facts', 'create_headed', 'fit_checkpoint', 'with_backbone_facts']

QUERIES = 'head.query_embed'
FEATURE_LEVELS = 4
SHARED_FACTS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct',
    'test_crop_pct', 'crop_mode', 'mean', 'std', 'num_classes', 'pool_size', 'test_pool_size')

HeadedT = TypeVar('HeadedT', bound='HeadedClassifier')


class HeadedClassifier(BackboneWithHead):
    """A timm backbone, by name, and a head.

    Args:
        backbone: Name of a registered model, optionally with a tag.
        num_classes: Number of classes; 0 for pooled features without a head.
        head: Builds the head: called with in_features, num_classes, device and dtype.
        in_chans: Channels of the pictures.
        global_pool: 'avg' or '', for features without a head.
        pretrained_backbone: Start from timm's weights of the backbone.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        backbone_args: Passed to the timm backbone, whatever their names.
        inplace_norm: Whether the backbone's norms save memory in training, see `convert_to_inplace_norm`.
        **backbone_kwargs: Passed to the timm backbone.

    Raises:
        ValueError: If the backbone is unknown, its features cannot carry a head, or no norm of it could save memory.
    """

    classifier_key = 'head.fc'

    def __init__(
            self,
            backbone: str,
            num_classes: int,
            head: Callable[..., nn.Module],
            in_chans: int = 3,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            backbone_args: Mapping[str, Any] | None = None,
            inplace_norm: bool = False,
            **backbone_kwargs: Any,
    ) -> None:
        _check_backbone(backbone)
        network = create_model(  # drops arguments that are None
            backbone, pretrained=pretrained_backbone, num_classes=0, in_chans=in_chans, device=device, dtype=dtype,
            **backbone_kwargs, **(backbone_args or {}))
        if inplace_norm:
            convert_to_inplace_norm(network)
        super().__init__(network, num_classes, head, global_pool)


def fit_checkpoint(state_dict: Mapping[str, Tensor], model: HeadedClassifier) -> dict[str, Tensor]:
    """Bring a checkpoint of our keys to the model's shapes; timm loads the result.

    A file of as many classes as the model loads whole. A model that was asked for other classes than its
    configuration's keeps its own fresh weights where the head depends on the classes.

    Args:
        state_dict: Tensors under `backbone.` and `head.`.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    source, key = model.pretrained_cfg, model.classifier_key
    in_file = len(state_dict.get(f'{key}.bias', state_dict.get(f'{key}.weight', ())))
    if in_file == model.num_classes:
        source['num_classes'] = in_file  # the file decides: timm drops the classifier when this differs
    elif model.num_classes != source['num_classes']:
        state_dict = _with_fresh_classes(state_dict, model)
    return fit_stems(state_dict, model)


def fit_stems(state_dict: Mapping[str, Tensor], model: HeadedClassifier) -> dict[str, Tensor]:
    """Check that all tensors are there and fit, but for the input channels: timm adapts those, if told here how.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    adapted, source, stems = dict(state_dict), model.pretrained_cfg, set[str]()
    if model.in_chans != source['input_size'][0]:
        names = source['first_conv']
        stems = {f'{name}.weight' for name in ([names] if isinstance(names, str) else names or [])}
        if isinstance(model.backbone, TResNet) and model.in_chans > 1:
            adapted |= {stem: _adapt_space_to_depth(adapted[stem], model) for stem in stems & adapted.keys()}
    check_fit(adapted, model, free=frozenset(stems))
    return adapted


def _with_fresh_classes(state_dict: Mapping[str, Tensor], model: HeadedClassifier) -> dict[str, Tensor]:
    """The checkpoint, with the model's own tensors where the head depends on the number of classes."""
    own = model.state_dict()
    if model.num_classes == 0:
        return {key: tensor for key, tensor in state_dict.items() if not key.startswith('head.')}
    fresh = {key: own[key] for key in own if key.startswith(f'{model.classifier_key}.')}
    if QUERIES in own and len(state_dict.get(QUERIES, ())) != len(own[QUERIES]):  # another number of queries
        fresh[QUERIES] = own[QUERIES]
    return {**state_dict, **fresh}


def _adapt_space_to_depth(weight: Tensor, model: HeadedClassifier) -> Tensor:
    """timm's rule for other input channels, applied to each of the block positions (position major, colour minor)."""
    source_chans: int = model.pretrained_cfg['input_size'][0]
    blocks = weight.unflatten(1, (-1, source_chans)).flatten(0, 1)
    return adapt_input_conv(model.in_chans, blocks, source_chans).unflatten(0, (weight.shape[0], -1)).flatten(1, 2)


def _check_backbone(name: str) -> None:
    if not is_model(name):
        bare = name.rpartition('/')[2].rpartition(':')[2]
        hint = f'write {bare!r}.' if is_model(bare) else nearest(name, list_models())
        raise ValueError(f'backbone must be the name of a registered timm model, got {name!r}; {hint}')


def backbone_facts(backbone: str, classifier_key: str) -> dict[str, Any]:
    """timm's preprocessing of a backbone, and the names that our prefix moves.

    Raises:
        ValueError: If there is no such backbone.
    """
    _check_backbone(backbone)
    cfg = get_pretrained_cfg(backbone) or PretrainedCfg()
    convs = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else cfg.first_conv or ()
    return {
        **{field: getattr(cfg, field) for field in SHARED_FACTS},
        'first_conv': tuple(f'backbone.{conv}' for conv in convs) or None,
        'classifier': classifier_key,
    }


def with_backbone_facts(kwargs: Mapping[str, Any], backbone: str, classifier_key: str) -> dict[str, Any]:
    """Arguments of an entry point that takes any backbone, with a configuration made from that backbone's.

    The configuration of a saved model is complete and stays as it is.

    Raises:
        ValueError: If there is no such backbone.
    """
    if isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        return dict(kwargs)
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    return {**kwargs, 'pretrained_cfg_overlay': {**backbone_facts(backbone, classifier_key), **overlay}}


def create_headed(
        model_class: Callable[..., HeadedT],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[[Mapping[str, Any], HeadedT], dict[str, Tensor]],
        **kwargs: Any,
) -> HeadedT:
    """Build a registered network, by timm's builder and with our errors for its file.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs = keep_in(cfg, kwargs)
    if pretrained:
        kwargs['pretrained_backbone'] = False
    with explain_checkpoint_errors(cfg.to_dict() if pretrained else {}, kwargs.get('cache_dir')):
        return build_model_with_cfg(
            model_class, variant, pretrained, pretrained_filter_fn=filter_fn,
            feature_cfg=dict(out_indices=FEATURE_LEVELS, feature_cls='getter'), **kwargs)
