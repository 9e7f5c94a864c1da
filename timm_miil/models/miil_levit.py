"""LeViT of any size, and the key layout of the original LeViT checkpoints.

Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", arXiv:2104.01136; the weights
are those of "Solving ImageNet: a Unified Scheme for Training any Backbone to Top Results", arXiv:2204.03475. The
networks are timm's `Levit`. No deviations. LeViT-768 is defined by no repository: its sizes are those of its file.
"""
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from math import inf, isqrt, nextafter
from typing import Any

from timm.models import (
    Levit, PretrainedCfg, generate_default_cfgs, get_pretrained_cfg, load_state_dict, register_model,
    resolve_pretrained_cfg)
from timm.models.levit import LevitDistilled
from torch import Tensor, nn

from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil._timm import update_model_args
from timm_miil.models._fit import create_published, fit_published
from timm_miil.models._loading import explain_checkpoint_errors, unwrap
from timm_miil.models._pretrained_file import keep_in

__all__ = ['convert_original_levit', 'read_levit_sizes', 'to_timm_names']

ORIGINAL = 'blocks.0.m.'
STEM = 'stem.conv1.linear.weight'
NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
TABLE = 'attention_bias_idxs'  # an index table that old files hold
# Modules of one entry of the original's flat list of blocks -> timm's, by what the entry is.
ATTENTION = {'m.qkv': 'qkv', 'm.proj.1': 'proj.ln'}
MLP = {'m.0': 'ln1', 'm.2': 'ln2'}
SUBSAMPLE = {'kv': 'kv', 'q.1': 'q.ln', 'proj.1': 'proj.ln'}
SIZES = ('embed_dim', 'key_dim', 'depth', 'num_heads')
PATCH_PX = 16
IMAGE_PX, MAX_IMAGE_PX = 224, 1024
CLASSIFIER = 'head.linear'
DISTILLED = ('head.linear', 'head_dist.linear')


def convert_original_levit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the original LeViT tensors to timm's.

    The original has one flat list: attention and MLP in turn, and between stages an attention that subsamples, which
    the list itself tells by its keys.

    Args:
        state_dict: Tensors of the original layout, such as `blocks.8.kv.c.weight`.

    Returns:
        The tensors under timm's names; the index tables of the attention biases are dropped. Missing keys are left to
        the caller.

    Raises:
        CheckpointError: If a key is not of this layout.
    """
    rename: dict[str, str] = {}
    for i in range(4):
        rename |= _layer(f'patch_embed.{2 * i}', f'stem.conv{i + 1}')
    for head in ('head', 'head_dist'):
        rename |= {f'{head}.l.{kind}': f'{head}.linear.{kind}' for kind in ('weight', 'bias')}
        rename |= {f'{head}.bn.{kind}': f'{head}.bn.{kind}' for kind in NORM_KEYS}
    stage = index = 0
    for n in range(_entries(state_dict)):
        if f'blocks.{n}.kv.c.weight' in state_dict:
            stage, index = stage + 1, -1
            rename |= _entry(f'blocks.{n}', f'stages.{stage}.downsample.attn_downsample', SUBSAMPLE, '')
        elif f'blocks.{n}.m.qkv.c.weight' in state_dict:
            rename |= _entry(f'blocks.{n}', f'stages.{stage}.blocks.{index}.attn', ATTENTION, 'm.')
        else:
            place = f'blocks.{index}' if index >= 0 else 'downsample'
            rename |= _entry(f'blocks.{n}', f'stages.{stage}.{place}.mlp', MLP, '')
            index += 1
    kept = {key: tensor for key, tensor in state_dict.items() if not key.endswith(TABLE)}
    unknown = [key for key in kept if key not in rename]
    if unknown:
        raise CheckpointError(
            f'{len(unknown)} keys are not of an original LeViT, the first is {unknown[0]!r}; expected patch_embed.*, '
            f'blocks.<n>.* of attention and MLP in turn, head.* and maybe head_dist.*.')
    return {rename[key]: tensor for key, tensor in kept.items()}


def _entries(state_dict: Mapping[str, Tensor]) -> int:
    """Length of the original's list of blocks."""
    numbers = [int(match[1]) for key in state_dict if (match := re.match(r'blocks\.(\d{1,4})\.', key))]
    return max(numbers, default=-1) + 1


def _layer(old: str, new: str) -> dict[str, str]:
    """Keys of one linear layer and its norm."""
    return {f'{old}.c.weight': f'{new}.linear.weight', **{f'{old}.bn.{kind}': f'{new}.bn.{kind}' for kind in NORM_KEYS}}


def _entry(old: str, new: str, layers: Mapping[str, str], biases: str) -> dict[str, str]:
    """Keys of one entry of the list of blocks."""
    keys = {} if layers is MLP else {f'{old}.{biases}attention_biases': f'{new}.attention_biases'}
    for there, here in layers.items():
        keys |= _layer(f'{old}.{there}', f'{new}.{here}')
    return keys


def to_timm_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LeViT file under timm's names, whichever layout they come in.

    Raises:
        CheckpointError: If a key of an original file is not of its layout.
    """
    if any(key.startswith(ORIGINAL) for key in state_dict):
        return convert_original_levit(state_dict)
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith(TABLE)}


def read_levit_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of timm's `Levit` by the shapes of a file's tensors; activations cannot be seen in them.

    Args:
        state_dict: The tensors, in the original layout or timm's.

    Returns:
        embed_dim, key_dim, depth, num_heads, attn_ratio and mlp_ratio; `distilled` if there is a second head, and
        `img_size` if it is not 224 pixels.

    Raises:
        CheckpointError: If the tensors are not of a LeViT that timm can build.
    """
    tensors = to_timm_names(state_dict)
    found = [_stage_sizes(tensors, stage) for stage in range(_stages(tensors))]
    key_dims = {stage['key_dim'] for stage in found}
    if len(key_dims) != 1:
        raise CheckpointError(
            f'the stages of the LeViT have keys of {[stage["key_dim"] for stage in found]} dimensions; timm\'s Levit '
            f'has the same in all stages.')
    sizes: dict[str, Any] = {
        **{name: [stage[name] for stage in found] for name in ('embed_dim', 'depth', 'num_heads')},
        'key_dim': key_dims.pop(),
        **{name: [stage[name] for stage in found] for name in ('attn_ratio', 'mlp_ratio')},
    }
    positions = _shape(tensors, 'stages.0.blocks.0.attn.attention_biases')[1]
    side = isqrt(positions) * PATCH_PX
    if side * side != positions * PATCH_PX ** 2 or side > MAX_IMAGE_PX:  # index tables grow with the fourth power
        raise CheckpointError(
            f'the LeViT attends over {positions} positions; expected the square of a side of at most '
            f'{MAX_IMAGE_PX // PATCH_PX}, as pictures of {MAX_IMAGE_PX} pixels have.')
    if side != IMAGE_PX:
        sizes['img_size'] = [side, side]
    if f'{DISTILLED[1]}.weight' in tensors:
        sizes['distilled'] = True
    return sizes


def _stages(tensors: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in tensors if (match := re.match(r'stages\.(\d+)\.', key))})


def _stage_sizes(tensors: Mapping[str, Tensor], stage: int) -> dict[str, Any]:
    """What one stage says of itself: its first block, of which the others are copies."""
    blocks = {match[1] for key in tensors if (match := re.match(rf'stages\.{stage}\.blocks\.(\d+)\.', key))}
    first = f'stages.{stage}.blocks.0'
    heads = _shape(tensors, f'{first}.attn.attention_biases')[0]
    rows, dim = _shape(tensors, f'{first}.attn.qkv.linear.weight')
    value_rows = _shape(tensors, f'{first}.attn.proj.ln.linear.weight')[1]
    hidden = _shape(tensors, f'{first}.mlp.ln1.linear.weight')[0]
    key_dim, rest = divmod(rows - value_rows, 2 * heads)
    if rest or value_rows % heads or key_dim < 1:
        raise CheckpointError(
            f'{first} has {heads} heads, {rows} rows of queries, keys and values and {value_rows} values, which is not '
            f'the same number a head.')
    return dict(
        embed_dim=dim, depth=len(blocks), num_heads=heads, key_dim=key_dim,
        attn_ratio=_ratio(value_rows // heads, key_dim), mlp_ratio=_ratio(hidden, dim))


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    shape = tuple(tensors[key].shape) if key in tensors else ()
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f'{key} must be a matrix for the sizes of a LeViT to be read off it, got '
            f'{f"shape {shape}" if key in tensors else "no such tensor"}.')
    return shape


def _ratio(part: int, whole: int) -> float:
    """A factor that timm's rounding down, `int(whole * factor)`, makes the part of."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else nextafter(ratio, inf)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names and classes; timm loads the result.

    Args:
        state_dict: What was read from the file, wrappers included, in the original layout or timm's.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    return fit_published(to_timm_names(unwrap(state_dict)), model)


def _default_cfgs() -> dict[str, Any]:
    published = {
        name: cfg for name, cfg in catalog.pretrained_cfgs('usi').items() if name.startswith('miil_levit_768.')}
    if published:
        return published
    timms = get_pretrained_cfg('levit_384') or PretrainedCfg()
    return {'miil_levit_768': replace(timms, hf_hub_id=None, architecture=None, tag=None, classifier=CLASSIFIER)}


default_cfgs = generate_default_cfgs(_default_cfgs())


def _cfg(kwargs: Mapping[str, Any]) -> PretrainedCfg:
    return resolve_pretrained_cfg('miil_levit_768', kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))


@register_model
def miil_levit_768(pretrained: bool = False, distilled: bool = False, **kwargs: Any) -> Levit:
    """LeViT of the sizes of a file or of those given: `embed_dim`, `key_dim`, `depth`, `num_heads`, arXiv:2204.03475.

    Args:
        pretrained: Load the weights of the configuration's file, and take the sizes from it unless they are given.
        distilled: Whether there is a second head; the file decides where the sizes are read from it.
        **kwargs: Sizes and further arguments of timm's `Levit`.

    Raises:
        CheckpointError: If the file cannot be read or is not of a LeViT.
        ValueError: If there are neither sizes nor a file.
    """
    sizes: dict[str, Any] = {}
    if not all(size in kwargs for size in SIZES):
        cfg = _cfg(kwargs)
        kwargs = keep_in(cfg, kwargs)
        if not (pretrained and cfg.file):
            raise ValueError(
                'miil_levit_768 has no sizes of its own, for no repository defines it: they are those of its file. Use '
                'pretrained=True with pretrained_cfg_overlay=dict(file=...), or give '
                f'{", ".join(SIZES)} (got {", ".join(size for size in SIZES if size in kwargs) or "none"}); '
                'timm_miil.models.published.identify reads them from the tensors of a file.')
        with explain_checkpoint_errors(cfg.to_dict(), kwargs.get('cache_dir')):
            sizes = read_levit_sizes(unwrap(load_state_dict(os.fspath(_cfg(kwargs).file or ''))))
    args = {'distilled': distilled, **sizes, **kwargs}
    model_class = LevitDistilled if args.pop('distilled') else Levit
    if model_class is LevitDistilled:
        overlay = args.get('pretrained_cfg_overlay') or {}
        args['pretrained_cfg_overlay'] = {'classifier': DISTILLED, **overlay}
    if args.get('features_only'):
        args.setdefault('feature_cls', 'getter')
    model: Levit = create_published(
        model_class, 'miil_levit_768', pretrained, checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2)), **args)
    update_model_args(model, **sizes)
    return model
