"""Networks with an ML-Decoder head: the published TResNets, and any timm backbone.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933; original code in
Alibaba-MIIL/ML_Decoder. The backbones are timm's, unchanged; the published TResNet-L and -XL are of the v2 layout.
No deviations in the networks; keys are `backbone.<timm's key>` and `head.<MLDecoder's key>`.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import TResNet, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor

from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil._timm import update_model_args
from timm_miil.heads import MLDecoder, convert_original_state_dict
from timm_miil.models._headed import (
    HeadedClassifier, backbone_facts, create_headed, fit_checkpoint, with_backbone_facts)
from timm_miil.models._loading import unwrap
from timm_miil.models.miil_tresnet import convert_original_tresnet

__all__ = ['MLDecoderClassifier']

CLASSIFIER = 'head.group_fc'
QUERIES = 'head.query_embed'
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


class MLDecoderClassifier(HeadedClassifier):
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
        shared_query_dropout: One dropout mask of the queries for a batch, which trains faster, see `MLDecoder`.
        global_pool: 'avg' or '', for features without a head.
        pretrained_backbone: Start from timm's weights of the backbone; not needed with `pretrained=True`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        backbone_args: Passed to the timm backbone, whatever their names; for those that are also ours, such as
            `global_pool`.
        **backbone_kwargs: `inplace_norm=True` for norms that save memory in training, see `convert_to_inplace_norm`;
            the others are passed to the timm backbone, such as `drop_path_rate` or `img_size`.

    Raises:
        TypeError: If a size of the head is not an int.
        ValueError: If the backbone is unknown or its features cannot carry a head, or a setting is out of range.
    """

    classifier_key = CLASSIFIER
    settings_in_file = False  # whether the model takes more than tensors from its file, see `load_model`

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
            shared_query_dropout: bool = False,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            backbone_args: Mapping[str, Any] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **backbone_kwargs: Any,
    ) -> None:
        head = partial(
            MLDecoder, num_groups=num_groups, embed_dim=embed_dim, num_heads=num_heads,
            feedforward_dim=feedforward_dim, drop_rate=decoder_drop_rate, fc_drop_rate=drop_rate,
            shared_query_dropout=shared_query_dropout)
        super().__init__(
            backbone, num_classes, head, in_chans=in_chans, global_pool=global_pool,
            pretrained_backbone=pretrained_backbone, device=device, dtype=dtype, backbone_args=backbone_args,
            **backbone_kwargs)


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
    state_dict = unwrap(state_dict)
    if not any(key.startswith('backbone.') for key in state_dict):
        state_dict = _convert_original(state_dict, model)
    if adopt_groups and QUERIES in state_dict and isinstance(model.head, MLDecoder):
        model.head.max_groups = len(state_dict[QUERIES])
        model.head.reset_classes(model.num_classes)
    return fit_checkpoint(state_dict, model)


def _convert_original(state_dict: Mapping[str, Tensor], model: MLDecoderClassifier) -> dict[str, Tensor]:
    if not isinstance(model.backbone, TResNet):
        raise CheckpointError(
            f'the checkpoint has no key that starts with "backbone.", and original checkpoints are known for TResNet '
            f'only, not for {type(model.backbone).__name__}; its first key is {next(iter(state_dict))!r}.')
    head = {key: tensor for key, tensor in state_dict.items() if key.startswith('head.')}
    body = {key: tensor for key, tensor in state_dict.items() if key not in head}
    converted = convert_original_tresnet(body, model.backbone)
    return {f'backbone.{key}': tensor for key, tensor in converted.items()} | convert_original_state_dict(head, 'head.')


def _create_mldecoder(
        variant: str, pretrained: bool = False, *, backbone: str | None = None, **kwargs: Any) -> MLDecoderClassifier:
    backbone = backbone or BACKBONES[variant]
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    published = catalog.weights_of('mldecoder').get(f'{variant}.{cfg.tag}')
    adopt_groups = published is not None and published.num_groups is None and 'num_groups' not in kwargs
    if published is not None and published.num_groups and published.num_groups != published.num_classes:
        kwargs.setdefault('num_groups', published.num_groups)  # as many as classes is no choice, but the clipped 100
    model = create_headed(
        MLDecoderClassifier, variant, pretrained, partial(checkpoint_filter_fn, adopt_groups=adopt_groups),
        backbone=backbone, **kwargs)
    if isinstance(getattr(model, 'head', None), MLDecoder):
        update_model_args(model, num_groups=model.head.max_groups)
        model.settings_in_file = adopt_groups
    return model


_published = catalog.pretrained_cfgs('mldecoder')
default_cfgs = generate_default_cfgs({
    **{variant: backbone_facts(backbone, CLASSIFIER) for variant, backbone in BACKBONES.items()
       if not any(name.partition('.')[0] == variant for name in _published)},
    **_published,
})


@register_model
def mldecoder(pretrained: bool = False, backbone: str = BACKBONES['mldecoder'], **kwargs: Any) -> MLDecoderClassifier:
    """ML-Decoder on any timm model: `timm.create_model('mldecoder', backbone=...)`, arXiv:2111.12933."""
    kwargs = with_backbone_facts(kwargs, backbone, CLASSIFIER)
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
