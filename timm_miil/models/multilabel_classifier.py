"""Any timm backbone with any head of `timm_miil.heads.list_heads`, saved and loaded by timm.

CSRA (arXiv:2108.02456), Query2Label (arXiv:2107.10834), ML-Decoder (arXiv:2111.12933) and the plain pooled baseline.
The backbones are timm's, unchanged; keys are `backbone.<timm's key>` and `head.<the head's key>`. No deviations.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from timm_miil._checks import check_choice
from timm_miil.heads import create_head, list_heads
from timm_miil.models._headed import (
    HeadedClassifier, backbone_facts, create_headed, fit_checkpoint, with_backbone_facts)
from timm_miil.models._loading import unwrap
from timm_miil.models.lgconv import convert_to_lgconv

__all__ = ['MultiLabelClassifier']

BACKBONE = 'resnet50'  # unless another is given
HEAD = 'csra'


class MultiLabelClassifier(HeadedClassifier):
    """A timm backbone and a head by name.

    Args:
        backbone: Name of a registered model, optionally with a tag.
        num_classes: Number of classes; 0 for pooled features without a head.
        in_chans: Channels of the pictures.
        head: Name of the head, see `timm_miil.heads.list_heads`.
        head_args: Further arguments of the head, such as `dict(num_heads=4)`.
        drop_rate: Dropout of the head, in [0, 1); None for its own default.
        global_pool: 'avg' or '', for features without a head.
        pretrained_backbone: Start from timm's weights of the backbone; not needed with `pretrained=True`.
        lgconv: Whether the backbone's 3x3 convolutions have global branches, see `convert_to_lgconv`; with them it
            starts as what it is without.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        backbone_args: Passed to the timm backbone, whatever their names; for those that are also ours, such as
            `global_pool`.
        **backbone_kwargs: `inplace_norm=True` for norms that save memory in training, see `convert_to_inplace_norm`;
            the others are passed to the timm backbone, such as `drop_path_rate` or `img_size`.

    Raises:
        TypeError: If the head does not know an argument.
        ValueError: If there is no such backbone or head, the backbone's features cannot carry a head, or a setting is
            out of range.
    """

    def __init__(
            self,
            backbone: str,
            num_classes: int = 1000,
            in_chans: int = 3,
            head: str = HEAD,
            head_args: Mapping[str, Any] | None = None,
            drop_rate: float | None = None,
            global_pool: str = 'avg',
            pretrained_backbone: bool = False,
            lgconv: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            backbone_args: Mapping[str, Any] | None = None,
            **backbone_kwargs: Any,
    ) -> None:
        check_choice(head=head, choices=list_heads())
        dropout = {} if drop_rate is None else {'drop_rate': drop_rate}
        super().__init__(
            backbone, num_classes, partial(create_head, head, **{**dropout, **(head_args or {})}), in_chans=in_chans,
            global_pool=global_pool, pretrained_backbone=pretrained_backbone, device=device, dtype=dtype,
            backbone_args=backbone_args, **backbone_kwargs)
        self.classifier_key = _classifier_key(head)
        if lgconv:
            convert_to_lgconv(self.backbone)


def _classifier_key(head: str) -> str:
    return 'head.group_fc' if head == 'ml_decoder' else 'head.fc'


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MultiLabelClassifier) -> dict[str, Tensor]:
    """Bring a checkpoint of our keys to the model's shapes; timm loads the result.

    Args:
        state_dict: What was read from the file, wrappers included.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    return fit_checkpoint(unwrap(state_dict), model)


default_cfgs = generate_default_cfgs({'multilabel_classifier': backbone_facts(BACKBONE, _classifier_key(HEAD))})


@register_model
def multilabel_classifier(
        pretrained: bool = False, backbone: str = BACKBONE, head: str = HEAD, **kwargs: Any) -> MultiLabelClassifier:
    """Any head on any timm model: `timm.create_model('multilabel_classifier', backbone=..., head='csra')`."""
    kwargs = with_backbone_facts(kwargs, backbone, _classifier_key(head))
    return create_headed(
        MultiLabelClassifier, 'multilabel_classifier', pretrained, checkpoint_filter_fn, backbone=backbone, head=head,
        **kwargs)
