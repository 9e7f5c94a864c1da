"""Networks that map a picture to several vectors in word-vector space (SDL): the labels are free at run time.

Ben-Cohen et al., "Semantic Diversity Learning for Zero-Shot Multi-label Classification", arXiv:2105.05926. The
backbones are timm's, unchanged; keys are `backbone.<timm's key>` and `head.weight`. The published network, under the
keys of its own file, is `miil_sdl_tresnet_m`. Deviation: names are embedded by their characters
(`timm_miil.heads.embed_characters`) unless word vectors go in by `set_queries`, as the paper's do.
"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from timm_miil.heads import SemanticEmbeddingHead
from timm_miil.models._headed import backbone_facts, with_backbone_facts
from timm_miil.models._label_set import LabelSetClassifier, create_label_set

__all__ = ['SDLClassifier']

CLASSIFIER = 'head'
BACKBONE = 'resnet50'  # unless another is given
SCENES_BACKBONE = 'resnet10t'


class SDLClassifier(LabelSetClassifier):
    """A timm backbone whose classifier is a `SemanticEmbeddingHead` on its pooled features.

    Without a label set the output is the picture's vectors, (B, text_dim * num_rows).

    Args:
        backbone: Name of a registered model, optionally with a tag.
        labels: Names of the labels, in the order of the scores; None or empty for a label set that comes later, by
            `set_labels` or `set_queries`.
        num_classes: None or the number of labels; 0 for pooled features without a head.
        in_chans: Channels of the pictures.
        text_dim: Length of a label's embedding.
        num_rows: Vectors a picture.
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
            num_rows: int = 7,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            backbone_args: Mapping[str, Any] | None = None,
            **backbone_kwargs: Any,
    ) -> None:
        head = partial(_build_head, text_dim=text_dim, num_rows=num_rows)
        super().__init__(
            backbone, head, labels, num_classes, text_dim, in_chans=in_chans, global_pool=global_pool,
            pretrained_backbone=pretrained_backbone, device=device, dtype=dtype, backbone_args=backbone_args,
            **backbone_kwargs)

    @torch.jit.ignore
    def embed(self, x: Tensor) -> Tensor:
        """The vectors (B, text_dim * num_rows) of pictures, whatever the label set is; the loss takes them."""
        embedding: Tensor = self.head.embed(self._pooled(self.forward_features(x)))  # type: ignore[operator]
        return embedding

    def _classify(self, x: Tensor | list[Tensor] | dict[str, Tensor]) -> Tensor:
        return self.head(self._pooled(x))

    def _pooled(self, x: Tensor | list[Tensor] | dict[str, Tensor]) -> Tensor:
        """The mean over positions, whatever `global_pool` says of features without a head."""
        return self._mean(x) if isinstance(x, Tensor) else self._pool_parts(x)


def _build_head(num_classes: int, **settings: Any) -> SemanticEmbeddingHead:
    """The head, which takes no number of classes."""
    return SemanticEmbeddingHead(**settings)


default_cfgs = generate_default_cfgs({
    'miil_sdl': backbone_facts(BACKBONE, CLASSIFIER) | {'num_classes': 0},
    'miil_sdl_scenes': backbone_facts(SCENES_BACKBONE, CLASSIFIER) | dict(
        input_size=(3, 64, 64), pool_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, num_classes=0),
})


@register_model
def miil_sdl(pretrained: bool = False, backbone: str = BACKBONE, **kwargs: Any) -> SDLClassifier:
    """SDL on any timm model: `timm.create_model('miil_sdl', backbone=..., labels=...)`, arXiv:2105.05926."""
    kwargs = with_backbone_facts(kwargs, backbone, CLASSIFIER)
    return create_label_set(SDLClassifier, 'miil_sdl', pretrained, backbone=backbone, **kwargs)


@register_model
def miil_sdl_scenes(pretrained: bool = False, **kwargs: Any) -> SDLClassifier:
    """The body of `mldecoder_zero_shot_scenes` with a `SemanticEmbeddingHead`, for `timm_miil.data.scenes`."""
    args = dict(channels=(16, 32, 64, 128), stem_width=8, output_stride=8)
    return create_label_set(
        SDLClassifier, 'miil_sdl_scenes', pretrained, backbone=SCENES_BACKBONE, **{**args, **kwargs})
