"""Networks with a zero-shot ML-Decoder head: the labels are names, free at run time.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933, sections on zero-shot
learning. The backbones are timm's, unchanged; keys are `backbone.<timm's key>` and `head.<ZeroShotMLDecoder's key>`.
Deviation: names are embedded by their characters (`timm_miil.heads.embed_characters`), so that a saved model works
without a file of word vectors; embeddings of any other source go in by `set_queries`.
"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg

from timm_miil import catalog
from timm_miil.heads import ZeroShotMLDecoder
from timm_miil.models._headed import backbone_facts, with_backbone_facts
from timm_miil.models._label_set import LabelSetClassifier, create_label_set

__all__ = ['ZeroShotClassifier']

CLASSIFIER = 'head.group_fc'
BACKBONE = 'resnet50'  # unless another is given
SCENES_BACKBONE = 'resnet10t'


class ZeroShotClassifier(LabelSetClassifier):
    """A timm backbone whose classifier is a zero-shot ML-Decoder.

    `num_classes` is the number of labels of the current set, 0 when there is none. The label set is not among the
    weights: one weight file serves every label set. Labels given by name are an argument of the model, so that a saved
    folder has them; embeddings given by `set_queries` are set again by whoever loads it.

    Args:
        backbone: Name of a registered model, optionally with a tag.
        labels: Names of the labels, in the order of the logits; None or empty for a label set that comes later, by
            `set_labels` or `set_queries`.
        num_classes: None or the number of labels; 0 for pooled features without a head.
        in_chans: Channels of the pictures.
        text_dim: Length of a label's embedding.
        embed_dim: Width of the decoder, a multiple of num_heads.
        num_heads: Attention heads of the decoder.
        feedforward_dim: Width of the decoder's hidden layer.
        decoder_drop_rate: Dropout inside the decoder, in [0, 1).
        num_random_queries: Random queries added in training, see `ZeroShotMLDecoder`.
        query_noise: Noise on the queries in training, see `ZeroShotMLDecoder`.
        global_pool: 'avg' or '', for features without a head.
        pretrained_backbone: Start from timm's weights of the backbone; not needed with `pretrained=True`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        backbone_args: Passed to the timm backbone, whatever their names; for those that are also ours, such as
            `global_pool`.
        **backbone_kwargs: `inplace_norm=True` for norms that save memory in training, see `convert_to_inplace_norm`;
            the others are passed to the timm backbone, such as `drop_path_rate` or `img_size`.

    Raises:
        TypeError: If labels is no list of names, or a size of the head is not an int.
        ValueError: If the backbone is unknown or its features cannot carry a head, num_classes is not the number of
            labels, or a setting is out of range.
    """

    classifier_key = CLASSIFIER

    def __init__(
            self,
            backbone: str,
            labels: Sequence[str] | None = None,
            num_classes: int | None = None,
            in_chans: int = 3,
            text_dim: int = 300,
            embed_dim: int = 768,
            num_heads: int = 8,
            feedforward_dim: int = 2048,
            decoder_drop_rate: float = 0.1,
            num_random_queries: int = 0,
            query_noise: float = 0.0,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            backbone_args: Mapping[str, Any] | None = None,
            **backbone_kwargs: Any,
    ) -> None:
        head = partial(
            _build_head, text_dim=text_dim, embed_dim=embed_dim, num_heads=num_heads, feedforward_dim=feedforward_dim,
            drop_rate=decoder_drop_rate, num_random_queries=num_random_queries, query_noise=query_noise)
        super().__init__(
            backbone, head, labels, num_classes, text_dim, in_chans=in_chans, global_pool=global_pool,
            pretrained_backbone=pretrained_backbone, device=device, dtype=dtype, backbone_args=backbone_args,
            **backbone_kwargs)


def _build_head(num_classes: int, **settings: Any) -> ZeroShotMLDecoder:
    """The head, which takes no number of classes."""
    return ZeroShotMLDecoder(**settings)


def _default_cfgs() -> dict[str, Any]:
    scenes = {
        name: cfg for name, cfg in catalog.pretrained_cfgs('mldecoder').items()
        if name.partition('.')[0] == 'mldecoder_zero_shot_scenes'}
    unpublished = backbone_facts(SCENES_BACKBONE, CLASSIFIER) | dict(
        input_size=(3, 64, 64), pool_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, num_classes=0)
    return {
        'mldecoder_zero_shot': backbone_facts(BACKBONE, CLASSIFIER) | {'num_classes': 0},
        **(scenes or {'mldecoder_zero_shot_scenes': unpublished}),
    }


default_cfgs = generate_default_cfgs(_default_cfgs())


@register_model
def mldecoder_zero_shot(pretrained: bool = False, backbone: str = BACKBONE, **kwargs: Any) -> ZeroShotClassifier:
    """Zero-shot ML-Decoder on any timm model: `timm.create_model('mldecoder_zero_shot', backbone=..., labels=...)`."""
    kwargs = with_backbone_facts(kwargs, backbone, CLASSIFIER)
    return create_label_set(ZeroShotClassifier, 'mldecoder_zero_shot', pretrained, backbone=backbone, **kwargs)


@register_model
def mldecoder_zero_shot_scenes(
        pretrained: bool = False, labels: Sequence[str] | None = None, **kwargs: Any) -> ZeroShotClassifier:
    """The network of `mldecoder_scenes` with a zero-shot head; its labels are those it was trained on unless given."""
    args = dict(
        channels=(16, 32, 64, 128), stem_width=8, output_stride=8, embed_dim=64, num_heads=4, feedforward_dim=256)
    if labels is None:
        name = 'mldecoder_zero_shot_scenes'
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        labels = cfg.label_names
    return create_label_set(
        ZeroShotClassifier, 'mldecoder_zero_shot_scenes', pretrained, backbone=SCENES_BACKBONE, labels=labels,
        **{**args, **kwargs})
