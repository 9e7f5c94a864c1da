"""Networks with an ML-Decoder head: the published TResNets, and any timm backbone.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933; original code in
Alibaba-MIIL/ML_Decoder. The backbones are timm's, unchanged; the published TResNet-L and -XL are of the v2 layout.
No deviations in the networks; keys are `backbone.<timm's key>` and `head.<MLDecoder's key>`.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import (
    PretrainedCfg, TResNet, adapt_input_conv, build_model_with_cfg, create_model, generate_default_cfgs,
    get_pretrained_cfg, is_model, list_models, register_model, resolve_pretrained_cfg)
from torch import Tensor

from timm_miil import catalog
from timm_miil._checks import nearest
from timm_miil._errors import CheckpointError
from timm_miil._timm import update_model_args
from timm_miil.heads import BackboneWithHead, MLDecoder, convert_original_state_dict
from timm_miil.models._loading import check_fit, explain_checkpoint_errors, unwrap
from timm_miil.models.miil_tresnet import convert_original_tresnet

__all__ = ['MLDecoderClassifier']

CLASSIFIER = 'head.group_fc'
QUERIES = 'head.query_embed'
FEATURE_LEVELS = 4
BACKBONES = {
    'mldecoder': 'resnet50',  # unless another is given
    'mldecoder_tresnet_m': 'tresnet_m',
    'mldecoder_tresnet_l': 'tresnet_v2_l',
    'mldecoder_tresnet_xl': 'miil_tresnet_v2_xl',
    'mldecoder_resnet50': 'resnet50',
    'mldecoder_convnext_tiny': 'convnext_tiny',
    'mldecoder_mobilenetv3_large_100': 'mobilenetv3_large_100',
    'mldecoder_swin_tiny_patch4_window7_224': 'swin_tiny_patch4_window7_224',
    'mldecoder_vit_base_patch16_224': 'vit_base_patch16_224',
}
SHARED_FACTS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct',
    'test_crop_pct', 'crop_mode', 'mean', 'std', 'num_classes', 'pool_size', 'test_pool_size')


class MLDecoderClassifier(BackboneWithHead):
    """A timm backbone whose classifier is an ML-Decoder.

    Args:
        backbone: Name of a registered model, optionally with a tag.
        num_classes: Number of classes; 0 for pooled features without a head.
        in_chans: Channels of the pictures.
        num_groups: Queries of the head, see `MLDecoder`.
        embed_dim: Width of the decoder, see `MLDecoder`.
        num_heads: Attention heads of the decoder.
        feedforward_dim: Width of the decoder's hidden layer.
        decoder_drop_rate: Dropout inside the decoder, in [0, 1).
        drop_rate: Dropout before the last layer, in [0, 1).
        global_pool: 'avg' or '', for features without a head.
        pretrained_backbone: Start from timm's weights of the backbone; not needed with `pretrained=True`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        backbone_args: Passed to the timm backbone, whatever their names; for those that are also ours, such as
            `global_pool`.
        **backbone_kwargs: Passed to the timm backbone, such as `drop_path_rate` or `img_size`.

    Raises:
        TypeError: If a size of the head is not an int.
        ValueError: If the backbone is unknown or its features cannot carry a head, or a setting is out of range.
    """

    def __init__(
            self,
            backbone: str,
            num_classes: int = 1000,
            in_chans: int = 3,
            num_groups: int = 100,
            embed_dim: int = 768,
            num_heads: int = 8,
            feedforward_dim: int = 2048,
            decoder_drop_rate: float = 0.1,
            drop_rate: float = 0.0,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            backbone_args: Mapping[str, Any] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **backbone_kwargs: Any,
    ) -> None:
        _check_backbone(backbone)
        network = create_model(  # drops arguments that are None
            backbone, pretrained=pretrained_backbone, num_classes=0, in_chans=in_chans, device=device, dtype=dtype,
            **backbone_kwargs, **(backbone_args or {}))
        head = partial(
            MLDecoder, num_groups=num_groups, embed_dim=embed_dim, num_heads=num_heads,
            feedforward_dim=feedforward_dim, drop_rate=decoder_drop_rate, fc_drop_rate=drop_rate)
        super().__init__(network, num_classes, head, global_pool)


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any], model: MLDecoderClassifier, adopt_groups: bool = False) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names and shapes; timm loads the result.

    Understands our own layout and, for TResNet backbones, the original repository's. A file of as many classes as
    the model loads whole. A model that was asked for other classes than its configuration's keeps its own fresh
    weights where the head depends on the classes.

    Args:
        state_dict: What was read from the file, wrappers included.
        model: The network to load into.
        adopt_groups: Give the model's head as many queries as the file has, for files that alone can tell.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    state_dict, source = unwrap(state_dict), model.pretrained_cfg
    if not any(key.startswith('backbone.') for key in state_dict):
        state_dict = _convert_original(state_dict, model)
    if adopt_groups and QUERIES in state_dict and isinstance(model.head, MLDecoder):
        model.head.max_groups = len(state_dict[QUERIES])
        model.head.reset_classes(model.num_classes)
    in_file = len(state_dict.get(f'{CLASSIFIER}.bias', ()))
    if in_file == model.num_classes:
        source['num_classes'] = in_file  # the file decides: timm drops the classifier when this differs
    elif model.num_classes != source['num_classes']:
        state_dict = _with_fresh_classes(state_dict, model)
    stems: set[str] = set()
    if model.in_chans != source['input_size'][0]:
        names = source['first_conv']
        stems = {f'{name}.weight' for name in ([names] if isinstance(names, str) else names or [])}
        if isinstance(model.backbone, TResNet) and model.in_chans > 1:
            state_dict |= {stem: _adapt_space_to_depth(state_dict[stem], model) for stem in stems & state_dict.keys()}
    check_fit(state_dict, model, free=frozenset(stems))
    return state_dict


def _convert_original(state_dict: Mapping[str, Tensor], model: MLDecoderClassifier) -> dict[str, Tensor]:
    if not isinstance(model.backbone, TResNet):
        raise CheckpointError(
            f'the checkpoint has no key that starts with "backbone.", and original checkpoints are known for TResNet '
            f'only, not for {type(model.backbone).__name__}; its first key is {next(iter(state_dict))!r}.')
    head = {key: tensor for key, tensor in state_dict.items() if key.startswith('head.')}
    body = {key: tensor for key, tensor in state_dict.items() if key not in head}
    converted = convert_original_tresnet(body, model.backbone)
    return {f'backbone.{key}': tensor for key, tensor in converted.items()} | convert_original_state_dict(head, 'head.')


def _with_fresh_classes(state_dict: Mapping[str, Tensor], model: MLDecoderClassifier) -> dict[str, Tensor]:
    """The checkpoint, with the model's own tensors where the head depends on the number of classes."""
    own = model.state_dict()
    if model.num_classes == 0:
        return {key: tensor for key, tensor in state_dict.items() if not key.startswith('head.')}
    fresh = {key: own[key] for key in own if key.startswith(CLASSIFIER)}
    if len(state_dict.get(QUERIES, ())) != len(own[QUERIES]):  # another number of groups
        fresh[QUERIES] = own[QUERIES]
    return {**state_dict, **fresh}


def _adapt_space_to_depth(weight: Tensor, model: MLDecoderClassifier) -> Tensor:
    """timm's rule for other input channels, applied to each of the block positions (position major, colour minor)."""
    source_chans: int = model.pretrained_cfg['input_size'][0]
    blocks = weight.unflatten(1, (-1, source_chans)).flatten(0, 1)
    return adapt_input_conv(model.in_chans, blocks, source_chans).unflatten(0, (weight.shape[0], -1)).flatten(1, 2)


def _check_backbone(name: str) -> None:
    if not is_model(name):
        bare = name.rpartition('/')[2].rpartition(':')[2]
        hint = f'write {bare!r}.' if is_model(bare) else nearest(name, list_models())
        raise ValueError(f'backbone must be the name of a registered timm model, got {name!r}; {hint}')


def _backbone_facts(backbone: str) -> dict[str, Any]:
    """timm's preprocessing of a backbone, and the names that our prefix moves."""
    _check_backbone(backbone)
    cfg = get_pretrained_cfg(backbone) or PretrainedCfg()
    convs = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else cfg.first_conv or ()
    return {
        **{field: getattr(cfg, field) for field in SHARED_FACTS},
        'first_conv': tuple(f'backbone.{conv}' for conv in convs) or None,
        'classifier': CLASSIFIER,
    }


def _create_mldecoder(
        variant: str, pretrained: bool = False, *, backbone: str | None = None, **kwargs: Any) -> MLDecoderClassifier:
    backbone = backbone or BACKBONES[variant]
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    published = catalog.weights_of('mldecoder').get(f'{variant}.{cfg.tag}')
    adopt_groups = published is not None and published.num_groups is None and 'num_groups' not in kwargs
    if published is not None and published.num_groups and published.num_groups != published.num_classes:
        kwargs.setdefault('num_groups', published.num_groups)  # as many as classes is no choice, but the clipped 100
    if pretrained:
        kwargs['pretrained_backbone'] = False
    with explain_checkpoint_errors(cfg.to_dict() if pretrained else {}, kwargs.get('cache_dir')):
        model = build_model_with_cfg(
            MLDecoderClassifier, variant, pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, adopt_groups=adopt_groups),
            feature_cfg=dict(out_indices=FEATURE_LEVELS, feature_cls='getter'),
            backbone=backbone, **kwargs)
    if isinstance(getattr(model, 'head', None), MLDecoder):
        update_model_args(model, num_groups=model.head.max_groups)
    return model


_published = catalog.pretrained_cfgs('mldecoder')
default_cfgs = generate_default_cfgs({
    **{variant: _backbone_facts(backbone) for variant, backbone in BACKBONES.items()
       if not any(name.partition('.')[0] == variant for name in _published)},
    **_published,
})


@register_model
def mldecoder(pretrained: bool = False, backbone: str = BACKBONES['mldecoder'], **kwargs: Any) -> MLDecoderClassifier:
    """ML-Decoder on any timm model: `timm.create_model('mldecoder', backbone=...)`, arXiv:2111.12933."""
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):  # those of a saved model are complete
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        kwargs['pretrained_cfg_overlay'] = {**_backbone_facts(backbone), **overlay}
    return _create_mldecoder('mldecoder', pretrained, backbone=backbone, **kwargs)


@register_model
def mldecoder_tresnet_m(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """TResNet-M with an ML-Decoder head, arXiv:2111.12933."""
    return _create_mldecoder('mldecoder_tresnet_m', pretrained, **kwargs)


@register_model
def mldecoder_tresnet_l(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """TResNet-L (v2: 3-4-23-3 bottlenecks) with an ML-Decoder head, arXiv:2111.12933."""
    return _create_mldecoder('mldecoder_tresnet_l', pretrained, **kwargs)


@register_model
def mldecoder_tresnet_xl(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """TResNet-XL (v2: 3-8-34-5 bottlenecks) with an ML-Decoder head, arXiv:2111.12933."""
    return _create_mldecoder('mldecoder_tresnet_xl', pretrained, **kwargs)


@register_model
def mldecoder_resnet50(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """ResNet-50 with an ML-Decoder head, arXiv:2111.12933."""
    return _create_mldecoder('mldecoder_resnet50', pretrained, **kwargs)


@register_model
def mldecoder_scenes(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """A narrow ResNet-10-T with a small ML-Decoder head, for `timm_miil.data.scenes`; its weights ship with us."""
    args = dict(
        channels=(16, 32, 64, 128), stem_width=8, output_stride=8, embed_dim=64, num_heads=4, feedforward_dim=256)
    return _create_mldecoder('mldecoder_scenes', pretrained, backbone='resnet10t', **{**args, **kwargs})


@register_model
def mldecoder_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """ConvNeXt-T with an ML-Decoder head."""
    return _create_mldecoder('mldecoder_convnext_tiny', pretrained, **kwargs)


@register_model
def mldecoder_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """MobileNetV3-Large with an ML-Decoder head on its last map, before timm's convolution behind the pool."""
    return _create_mldecoder('mldecoder_mobilenetv3_large_100', pretrained, **kwargs)


@register_model
def mldecoder_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """Swin-T with an ML-Decoder head."""
    return _create_mldecoder('mldecoder_swin_tiny_patch4_window7_224', pretrained, **kwargs)


@register_model
def mldecoder_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MLDecoderClassifier:
    """ViT-B/16 with an ML-Decoder head that reads class and patch tokens."""
    return _create_mldecoder('mldecoder_vit_base_patch16_224', pretrained, **kwargs)
