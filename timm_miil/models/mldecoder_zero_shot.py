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
from torch import Tensor

from timm_miil import catalog
from timm_miil._checks import check_choice, shown
from timm_miil._timm import update_model_args
from timm_miil.heads import ZeroShotMLDecoder
from timm_miil.heads.attach import POOLS
from timm_miil.heads.text import embed_characters, note_equal
from timm_miil.models._headed import HeadedClassifier, backbone_facts, create_headed, fit_stems, with_backbone_facts
from timm_miil.models._loading import unwrap

__all__ = ['ZeroShotClassifier']

CLASSIFIER = 'head.group_fc'
BACKBONE = 'resnet50'  # unless another is given
SCENES_BACKBONE = 'resnet10t'


class ZeroShotClassifier(HeadedClassifier):
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
        **backbone_kwargs: Passed to the timm backbone, such as `drop_path_rate` or `img_size`.

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
        if labels is not None:
            _check_kind(labels)
        elif num_classes:
            raise ValueError(
                f'num_classes={num_classes} names no labels; pass labels=[...], or leave num_classes out and call '
                f'set_labels(names) or set_queries(embeddings).')
        if labels and num_classes and num_classes != len(labels):
            raise ValueError(f'num_classes={num_classes} contradicts the {len(labels)} labels; leave num_classes out.')
        head = partial(
            _build_head, text_dim=text_dim, embed_dim=embed_dim, num_heads=num_heads, feedforward_dim=feedforward_dim,
            drop_rate=decoder_drop_rate, num_random_queries=num_random_queries, query_noise=query_noise)
        has_head = num_classes != 0 or labels is not None and not labels  # see _note_labels
        super().__init__(
            backbone, int(has_head), head, in_chans=in_chans, global_pool=global_pool,
            pretrained_backbone=pretrained_backbone, device=device, dtype=dtype, backbone_args=backbone_args,
            **backbone_kwargs)
        self.has_head, self.num_classes = has_head, 0
        self.text_dim = text_dim
        self.labels: tuple[str, ...] | None = None
        if labels and has_head:
            self.set_labels(labels)

    @torch.jit.ignore
    def set_labels(self, labels: Sequence[str]) -> None:
        """Choose the label set by name; the names are embedded by their characters, see `embed_characters`.

        Of names that are embedded alike, such as 'cat' and 'Cat', a warning is logged.

        Args:
            labels: Names, in the order of the logits.

        Raises:
            TypeError: If labels is no list of names.
            ValueError: If it is empty, or a name occurs twice or cannot be embedded.
        """
        _check_kind(labels)
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(
                f'labels must be one or more different names, got {len(set(labels))} different names among '
                f'{len(labels)}.')
        embeddings = embed_characters(labels, self.text_dim)
        note_equal(labels, embeddings)
        self.set_queries(embeddings)
        self.labels = tuple(labels)
        self._note_labels()

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set by embeddings of any source; it has no names then.

        Args:
            embeddings: One row a label, shape (K, text_dim), any floating dtype and device.

        Raises:
            TypeError: If embeddings is not a tensor of a floating dtype.
            ValueError: If the shape is another, or a value is not finite.
        """
        head: Any = self.head if self.has_head else self._new_head(1).train(self.training)
        head.set_queries(embeddings)
        self.head, self.has_head = head, True
        self.num_classes, self.labels = len(embeddings), None
        self._note_labels()

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Remove the head, or change the pooling, in place.

        Args:
            num_classes: 0 removes the head; the number of labels keeps it.
            global_pool: New pooling, 'avg' or ''; None keeps it.

        Raises:
            ValueError: If num_classes is another number, or global_pool is unknown.
        """
        if num_classes not in (0, self.num_classes):
            raise ValueError(
                f'a zero-shot head takes labels, not a number of classes, got num_classes={num_classes}; call '
                f'set_labels(names) or set_queries(embeddings).')
        if num_classes == 0:
            super().reset_classifier(0, global_pool)
            self.has_head, self.labels = False, None
            self._note_labels()
        elif global_pool is not None:
            check_choice(global_pool=global_pool, choices=POOLS)
            self.global_pool = global_pool

    def forward_head(self, x: Tensor | list[Tensor] | dict[str, Tensor], pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of unpooled features.

        Args:
            x: What `forward_features` gave.
            pre_logits: Give the pooled features (B, num_features) instead, as a model without a head does.

        Raises:
            RuntimeError: If there is a head and no label set yet.
        """
        if pre_logits or not self.has_head:
            return self._pool(x)
        return self._classify(x)

    def _note_labels(self) -> None:
        """Keep timm's records of the model in step with the label set."""
        # Empty labels stand for a head whose label set comes later, in a saved folder too.
        update_model_args(self, labels=list(self.labels or ()) if self.has_head else None)
        cfg: dict[str, Any] = getattr(self, 'pretrained_cfg', {})  # not there before timm's builder is done
        cfg.update(num_classes=self.num_classes, label_names=self.labels, label_descriptions=None)


def _check_kind(labels: Sequence[str]) -> None:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f'labels must be a list of names, got {type(labels).__name__} {shown(labels)}.')


def _build_head(num_classes: int, **settings: Any) -> ZeroShotMLDecoder:
    """The head, which takes no number of classes."""
    return ZeroShotMLDecoder(**settings)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: ZeroShotClassifier) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names; no weight depends on the labels.

    Args:
        state_dict: What was read from the file, wrappers included.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    state_dict = unwrap(state_dict)
    model.pretrained_cfg['num_classes'] = model.num_classes  # timm drops the classifier when this differs
    if not model.has_head:
        state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith('head.')}
    return fit_stems(state_dict, model)


def _create_zero_shot(
        variant: str,
        pretrained: bool,
        *,
        labels: Sequence[str] | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
) -> ZeroShotClassifier:
    saved = kwargs.get('pretrained_model_args') or {}  # timm puts the arguments of a saved folder under the caller's
    if saved.get('num_classes'):
        if num_classes == 0:
            labels = None
        elif num_classes == saved['num_classes'] and labels != saved.get('labels'):
            num_classes = None  # it belongs to the saved labels
    model = create_headed(
        ZeroShotClassifier, variant, pretrained, checkpoint_filter_fn, labels=labels, num_classes=num_classes, **kwargs)
    if isinstance(model, ZeroShotClassifier):  # timm wraps it for features_only
        model._note_labels()
    return model


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
    return _create_zero_shot('mldecoder_zero_shot', pretrained, backbone=backbone, **kwargs)


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
    return _create_zero_shot(
        'mldecoder_zero_shot_scenes', pretrained, backbone=SCENES_BACKBONE, labels=labels, **{**args, **kwargs})
