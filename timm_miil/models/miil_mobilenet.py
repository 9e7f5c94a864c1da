"""Searched mobile networks that timm lacks: BINAS A to F, and OFA-595M of the ImageNet-21K zoo.

Nayman et al., "BINAS: Bilinear Interpretable Neural Architecture Search", arXiv:2110.12399; Ridnik et al.,
"ImageNet-21K Pretraining for the Masses", arXiv:2104.10972; original code in Alibaba-MIIL/BINAS and
Alibaba-MIIL/ImageNet21K. The networks are timm's `MobileNetV3`. No deviations.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models import MobileNetV3, MobileNetV3Features, generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil._timm import SqueezeExcite, decode_arch_def, pretrained_cfg_for_features, round_channels
from timm_miil.models._fit import create_published, fit_published
from timm_miil.models._loading import unwrap

__all__ = ['convert_original_ofa', 'to_timm_names']

# One word a block: kernel, expansion, and a + where it has squeeze-and-excitation.
BINAS_STAGES = ('s2 c24 re', 's2 c40 re', 's2 c80 hs', 's1 c112 hs', 's2 c192 hs')  # first stride, width, activation
BINAS_BLOCKS = {
    'a': ('5x3 3x3+', '5x3+ 5x4+', '5x3 5x3+ 5x4+', '5x4+ 5x4+', '5x4+ 5x4+ 3x4+ 5x3+'),
    'b': ('5x3 5x3+', '5x3+ 5x4+', '5x4+ 5x4+ 5x4+', '3x4+ 5x4+ 5x4+', '3x4+ 5x4+ 3x4+ 5x4+'),
    'c': ('5x3 5x3+', '5x3+ 5x4+', '5x4+ 5x4+ 5x4+', '3x4+ 5x6+ 5x4+', '3x6+ 5x6+ 3x6+ 5x4+'),
    'd': ('5x3 5x3+', '5x3+ 5x4+', '5x3 5x6+ 3x4+ 5x3+', '3x6+ 5x6+ 5x4+ 3x4+', '3x6+ 5x4+ 5x6+ 5x4+'),
    'e': ('5x3 3x3 3x3+', '5x3 3x4+ 3x4+ 5x6+', '5x3 5x3+ 3x4+ 5x6+', '3x4+ 5x6+ 3x6+ 5x4+', '3x6+ 3x4+ 5x6+ 5x6+'),
    'f': ('5x3 3x3 3x3+', '5x3 5x4 3x4+ 5x6+', '5x3 3x6+ 5x6+ 5x6+', '5x6+ 5x6+ 3x6+ 3x6+', '3x6+ 3x4+ 5x6+ 5x6+'),
}
OFA_STAGES = ('s2 c32 re', 's2 c48 re', 's2 c96 sw', 's1 c136 sw', 's2 c192 sw')
OFA_BLOCKS = ('3x3 5x4 3x3', '5x4+ 5x4+ 3x6+ 5x3+', '7x6 5x6 3x3 5x4', '3x6+ 5x6+ 7x6+ 3x4+', '3x6+ 3x6+ 5x6+ 3x3+')
SE_RATIO = 0.25

# Modules of the original OFA, below those of one block and beside the blocks, -> timm's.
OFA_SEPARABLE = {
    'depth_conv.conv': 'conv_dw',
    'depth_conv.bn': 'bn1',
    'point_linear.conv': 'conv_pw',
    'point_linear.bn': 'bn2',
}
OFA_INVERTED = {
    'inverted_bottleneck.conv': 'conv_pw',
    'inverted_bottleneck.bn': 'bn1',
    'depth_conv.conv': 'conv_dw',
    'depth_conv.bn': 'bn2',
    'depth_conv.se.fc.reduce': 'se.conv_reduce',
    'depth_conv.se.fc.expand': 'se.conv_expand',
    'point_linear.conv': 'conv_pwl',
    'point_linear.bn': 'bn3',
}
OFA_BESIDE = {
    'first_conv.conv': 'conv_stem',
    'first_conv.bn': 'bn1',
    'final_expand_layer.conv': 'blocks.6.0.conv',
    'final_expand_layer.bn': 'blocks.6.0.bn1',
    'feature_mix_layer.conv': 'conv_head',
    'classifier.linear': 'classifier',
}
OFA_MARKER = '.mobile_inverted_conv.'


def convert_original_ofa(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the original OFA-595M tensors to timm's; its classifier, a convolution, becomes a matrix.

    Args:
        state_dict: Tensors of the original layout, such as `blocks.4.mobile_inverted_conv.depth_conv.conv.weight`.

    Returns:
        The tensors under timm's names. Missing keys are left to the caller.

    Raises:
        CheckpointError: If a key is not of this layout.
    """
    depths = (1, *(len(stage.split()) for stage in OFA_BLOCKS))
    places = [f'blocks.{stage}.{index}' for stage, depth in enumerate(depths) for index in range(depth)]
    names = dict(OFA_BESIDE)
    for i, place in enumerate(places):
        for old, new in (OFA_INVERTED if i else OFA_SEPARABLE).items():
            names[f'blocks.{i}.mobile_inverted_conv.{old}'] = f'{place}.{new}'
    converted = {}
    for key, tensor in state_dict.items():
        module, _, kind = key.rpartition('.')
        if module not in names:
            raise CheckpointError(
                f'{key!r} is not a key of the original OFA-595M, which has {len(names)} modules, such as '
                f'{next(reversed(names))!r}.')
        is_classifier = module == 'classifier.linear' and tensor.ndim == 4
        converted[f'{names[module]}.{kind}'] = tensor.flatten(1) if is_classifier else tensor
    return converted


def to_timm_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under timm's names, whichever layout they come in.

    Raises:
        CheckpointError: If it is an original OFA-595M with a key that is not its own.
    """
    is_original = any(OFA_MARKER in key for key in state_dict)
    return convert_original_ofa(state_dict) if is_original else dict(state_dict)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names and classes; timm loads the result.

    Args:
        state_dict: What was read from the file, wrappers included, in the original layout or timm's.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    tensors = to_timm_names(unwrap(state_dict))
    if isinstance(model, MobileNetV3Features):  # ends before the head
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(('conv_head.', 'classifier.'))}
    return fit_published(tensors, model)


def _blocks(stages: tuple[str, ...], blocks: tuple[str, ...], width: int, last: int) -> list[list[str]]:
    """timm's words for the blocks of all stages; the first and the last stage have one block of their own."""
    words = [[f'ds_r1_k3_s1_e1_c{width}_nre']]
    for stage, row in zip(stages, blocks, strict=True):
        stride, channels, act = stage.split()
        kinds = [block.removesuffix('+').split('x') + [f'_se{SE_RATIO}' * block.endswith('+')] for block in row.split()]
        words.append([
            f'ir_r1_k{kernel}_{"s1" if i else stride}_e{ratio}_{channels}_n{act}{squeeze}'
            for i, (kernel, ratio, squeeze) in enumerate(kinds)])
    return [*words, [f'cn_r1_k1_s1_c{last}']]


def _create(
        variant: str, pretrained: bool, blocks: list[list[str]], act_layer: str, gate_layer: str,
        features_only: bool = False, **kwargs: Any) -> Any:
    se_layer = partial(SqueezeExcite, gate_layer=gate_layer, force_act_layer=nn.ReLU, rd_round_fn=round_channels)
    network = dict(block_args=decode_arch_def(blocks), act_layer=get_act_layer(act_layer), se_layer=se_layer)
    if not features_only:
        return create_published(MobileNetV3, variant, pretrained, checkpoint_filter_fn, **network, **kwargs)
    model = create_published(
        MobileNetV3Features, variant, pretrained, checkpoint_filter_fn, pretrained_strict=False,
        kwargs_filter=('num_classes', 'num_features', 'head_bias', 'global_pool'), **network, **kwargs)
    model.default_cfg = pretrained_cfg_for_features(model.default_cfg)
    return model


def _binas(letter: str, pretrained: bool, **kwargs: Any) -> Any:
    blocks = _blocks(BINAS_STAGES, BINAS_BLOCKS[letter], width=16, last=960)
    model_args = dict(stem_size=32, num_features=1280, act_layer='hard_swish', gate_layer='hard_sigmoid')
    return _create(f'miil_binas_{letter}', pretrained, blocks, **dict(model_args, **kwargs))


default_cfgs = generate_default_cfgs({
    **catalog.pretrained_cfgs('binas'),
    **{name: cfg for name, cfg in catalog.pretrained_cfgs('imagenet21k').items() if name.startswith('miil_ofa_595m.')},
})


@register_model
def miil_binas_a(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-A, arXiv:2110.12399."""
    return _binas('a', pretrained, **kwargs)


@register_model
def miil_binas_b(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-B, arXiv:2110.12399."""
    return _binas('b', pretrained, **kwargs)


@register_model
def miil_binas_c(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-C, arXiv:2110.12399."""
    return _binas('c', pretrained, **kwargs)


@register_model
def miil_binas_d(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-D, arXiv:2110.12399."""
    return _binas('d', pretrained, **kwargs)


@register_model
def miil_binas_e(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-E, arXiv:2110.12399."""
    return _binas('e', pretrained, **kwargs)


@register_model
def miil_binas_f(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """BINAS-F, arXiv:2110.12399."""
    return _binas('f', pretrained, **kwargs)


@register_model
def miil_ofa_595m(pretrained: bool = False, **kwargs: Any) -> MobileNetV3 | MobileNetV3Features:
    """OFA of 595 million multiply-adds ("ofa_flops_595m_s"), arXiv:2104.10972."""
    blocks = _blocks(OFA_STAGES, OFA_BLOCKS, width=24, last=1152)
    model_args = dict(stem_size=24, num_features=1536, head_bias=False, act_layer='silu', gate_layer='sigmoid')
    return _create('miil_ofa_595m', pretrained, blocks, **dict(model_args, **kwargs))
