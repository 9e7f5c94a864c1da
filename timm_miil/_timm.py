"""The one place for timm names that are private or recently changed, each with its reason."""
from timm.models import PretrainedCfg
from timm.models import get_model_input_config  # public since 1.0.31
# The parts that timm's own searched networks are built of; `timm.models` gives out the finished networks only.
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
# timm's rule for the `indices` of forward_intermediates.
from timm.models._features import feature_take_indices
# Which of a configuration's sources is read is decided here alone.
from timm.models._builder import _resolve_pretrained_source as resolve_pretrained_source
# `save_for_hf` writes weights too, without metadata and not whole or not at all.
from timm.models._hub import save_config_for_hf
# No public way to say which arguments rebuild a model.
from timm.models._input import update_model_args, update_model_input_size
# No public way to give more weights to an architecture that is registered: registering it again replaces it.
from timm.models._registry import _model_has_pretrained, _model_pretrained_cfgs, _model_with_tags

__all__ = [
    'SqueezeExcite', 'add_pretrained_cfg', 'decode_arch_def', 'feature_take_indices', 'get_model_input_config',
    'pretrained_cfg_for_features', 'resolve_pretrained_source', 'round_channels',
    'save_config_for_hf', 'update_model_args', 'update_model_input_size',
]


def add_pretrained_cfg(name: str, cfg: PretrainedCfg) -> None:
    """Register weights for a registered architecture, whose default stays what it is; again for the same name.

    Args:
        name: 'architecture.tag'.
        cfg: Configuration with the architecture, the tag and a source of weights.
    """
    architecture, _, tag = name.partition('.')
    names = [name]
    default = _model_pretrained_cfgs.get(architecture)
    if default is not None and default.tag == tag:
        names.append(architecture)
    for known in names:
        _model_pretrained_cfgs[known] = cfg
        _model_has_pretrained.add(known)
    if name not in _model_with_tags[architecture]:
        _model_with_tags[architecture].append(name)
