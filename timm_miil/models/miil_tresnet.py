"""TResNet variants that timm lacks, and the key layout of the original TResNet checkpoints.

Ridnik et al., "TResNet: High Performance GPU-Dedicated Architecture", arXiv:2003.13630; original code in
Alibaba-MIIL/TResNet, Alibaba-MIIL/ML_Decoder. The networks are timm's `TResNet`. No deviations: the originals'
InPlaceABN becomes a plain BatchNorm of equal outputs when weights are loaded.
"""
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.layers import BlurPool2d, ConvNormAct
from timm.models import (
    PretrainedCfg, TResNet, build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model)
from torch import Tensor, nn

from timm_miil._errors import CheckpointError

__all__ = ['convert_original_tresnet']

ABN_EPS = 1e-5
NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def convert_original_tresnet(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the original repositories' TResNet tensors to timm's, and make BatchNorm of InPlaceABN.

    The original wraps a convolution and its norm in a Sequential, and that in another when a blur follows.
    InPlaceABN scales by |weight| + 1e-5, so that is the weight of the BatchNorm; applied exactly once, here.

    Args:
        state_dict: Tensors of the original layout, such as `body.layer2.0.conv1.0.0.weight`.
        model: A timm TResNet of the same layers.

    Returns:
        The tensors under the model's names. A missing `num_batches_tracked` (absent from old InPlaceABN) is the
        model's; the blur's constant filter is dropped.

    Raises:
        CheckpointError: If a key is not of this layout. Missing keys are left to the caller.
    """
    own = model.state_dict()
    rename = {key: key for key in own}
    norm_weights, counters, constants = set(), set(), set()
    for name, module in model.named_modules():
        if not isinstance(module, ConvNormAct):
            continue
        blurred = isinstance(module.aa, BlurPool2d)
        original = f'{name}.0' if blurred else name
        constants |= {f'{name}.1.op.filt'} if blurred else set()
        norm_weights.add(f'{name}.bn.weight')
        counters.add(f'{name}.bn.num_batches_tracked')
        pairs = [('conv.weight', '0.weight'), *((f'bn.{key}', f'1.{key}') for key in NORM_KEYS)]
        for new, old in pairs:
            del rename[f'{name}.{new}']
            rename[f'{original}.{old}'] = f'{name}.{new}'
    unknown = [key for key in state_dict if key not in rename and key not in constants]
    if unknown:
        raise CheckpointError(
            f'{len(unknown)} keys are not of an original TResNet of these layers, the first is {unknown[0]!r}; check '
            f'that the architecture is that of the checkpoint.')
    converted = {rename[key]: tensor for key, tensor in state_dict.items() if key in rename}
    for key in norm_weights & converted.keys():
        converted[key] = converted[key].abs() + ABN_EPS
    for key in counters - converted.keys():
        converted[key] = own[key]
    return converted


default_cfgs = generate_default_cfgs({
    'miil_tresnet_v2_xl': replace(
        get_pretrained_cfg('tresnet_v2_l') or PretrainedCfg(), hf_hub_id=None, architecture=None, tag=None),
})


@register_model
def miil_tresnet_v2_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-XL of ML-Decoder: the v2 layout with 3-8-34-5 bottleneck blocks, arXiv:2111.12933."""
    model_args = dict(layers=[3, 8, 34, 5], width_factor=1.0, v2=True)
    return build_model_with_cfg(
        TResNet, 'miil_tresnet_v2_xl', pretrained,
        feature_cfg=dict(out_indices=(1, 2, 3, 4), flatten_sequential=True), **dict(model_args, **kwargs))
