"""What a backbone's features are, found by looking.

A copy without storage (the meta device) runs `forward_features`: the shapes of its output say how many channels and
positions there are, its gradient says which weights take part.
"""
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_choice
from timm_miil._timm import get_model_input_config
from timm_miil.heads._grid import find_grid

__all__ = ['Features', 'FeatureKind', 'Layout', 'adapt_to_features', 'as_tokens', 'join_branches']

Layout = Literal['NCHW', 'NHWC', 'NCL', 'NLC']
# A map or tokens; those of several branches; tokens of which some are padding, {'patches': ..., 'patch_valid': ...}.
Features = Tensor | list[Tensor] | dict[str, Tensor]
PROBE_BATCH = 2


@dataclass(frozen=True)
class FeatureKind:
    """What `forward_features` gives: the layout, the channels of each branch, the tokens before the positions."""

    layout: Layout
    widths: tuple[int, ...]
    num_prefix_tokens: int


def as_tokens(features: Tensor, layout: str) -> Tensor:
    """Tokens (B, N, D) of one map or branch, row by row; a view where the layout allows one."""
    if layout in ('NCHW', 'NCL'):
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, -2)


def join_branches(branches: Sequence[Tensor]) -> Tensor:
    """Tokens of several branches, one behind the other, with channels of its own for each.

    A branch has zeros in the channels of the others, so a linear layer over the sum of the widths is one linear layer
    for each branch.

    Args:
        branches: Tokens (B, N_i, D_i).

    Returns:
        Tokens (B, sum of N_i, sum of D_i).
    """
    width, before, padded = sum(branch.shape[-1] for branch in branches), 0, []
    for branch in branches:
        behind = width - before - branch.shape[-1]
        padded.append(F.pad(branch, (before, behind)))
        before += branch.shape[-1]
    return torch.cat(padded, dim=1)


def adapt_to_features(backbone: Any) -> FeatureKind:
    """Take out what `forward_features` does not use, in place, and say what it gives.

    Raises:
        ValueError: If that is neither a map nor tokens, nor a list of them, or it fails on images.
    """
    input_size = get_model_input_config(backbone)['input_size']
    with torch.inference_mode(False), torch.enable_grad():
        twin = _without_storage(backbone)
        like = next(twin.parameters())
        images = torch.empty(PROBE_BATCH, *input_size, device='meta', dtype=like.dtype)
        try:
            features = twin.forward_features(images)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f'forward_features of {type(backbone).__name__} must take images {tuple(images.shape)}, by its own '
                f'input size and channels, got: {error}') from error
        branches = list(features) if isinstance(features, (list, tuple)) else [features]
        _check_branches(branches, type(backbone).__name__)
        params = dict(twin.named_parameters())
        total = sum(branch.sum() for branch in branches)
        grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        layout = _find_layout(twin, features, branches)
    _remove(backbone, {name for name, grad in zip(params, grads) if grad is None})
    widths = tuple(branch.shape[1 if layout in ('NCHW', 'NCL') else -1] for branch in branches)
    num_prefix_tokens = getattr(backbone, 'num_prefix_tokens', None)
    if num_prefix_tokens is None:
        lengths = [branch.shape[1] for branch in branches] if layout == 'NLC' else []
        num_prefix_tokens = _count_prefix_tokens(lengths, input_size[-2:])
    return FeatureKind(layout, widths, num_prefix_tokens)


def _check_branches(branches: Sequence[Any], kind: str) -> None:
    ranks = {branch.ndim if isinstance(branch, Tensor) else None for branch in branches}
    if ranks not in ({3}, {4}):
        got = ', '.join(
            str(tuple(branch.shape)) if isinstance(branch, Tensor) else type(branch).__name__ for branch in branches)
        raise ValueError(
            f'forward_features of {kind} must give a map (B, D, H, W), (B, H, W, D) or tokens (B, N, D), or a list of '
            f'one of them, got {got or "an empty list"}; this backbone cannot carry a head on its features.')


def _find_layout(twin: Any, features: Any, branches: Sequence[Tensor]) -> Layout:
    """The layout that the backbone names, or else the usual one of the rank.

    Branches of tokens may have their channels first. timm's own pool, which puts the channels of the branches side by
    side, tells.
    """
    rank = branches[0].ndim
    layout: Layout = getattr(twin, 'output_fmt', 'NCHW') if rank == 4 else 'NLC'
    check_choice(output_fmt=layout, choices=('NCHW', 'NHWC') if rank == 4 else ('NLC',))
    if len(branches) > 1 and rank == 3 and hasattr(twin, 'forward_head'):
        if hasattr(twin, 'reset_classifier'):
            twin.reset_classifier(0, 'avg')
        pooled = twin.forward_head(features, pre_logits=True)
        first, last = (sum(branch.shape[dim] for branch in branches) for dim in (1, 2))
        if pooled.shape[-1] == first != last:
            layout = 'NCL'
    return layout


def _count_prefix_tokens(lengths: Sequence[int], image_size: tuple[int, int]) -> int:
    """The least number of tokens before a grid of positions, for a backbone that does not tell; 0 if none fits."""
    for count in range((min(lengths, default=0) + 1) // 2):
        if all(find_grid(length - count, image_size) is not None for length in lengths):
            return count
    return 0


def _remove(backbone: nn.Module, unused: set[str]) -> None:
    """Take out the modules all of whose parameters are unused."""
    removed: tuple[str, ...] = ()
    for name, module in list(backbone.named_modules()):
        owns = next(module.parameters(recurse=False), None) is not None  # containers stay: timm resets heads by them
        if owns and name and not name.startswith(removed) and {
                f'{name}.{key}' for key, _ in module.named_parameters()} <= unused:
            backbone.set_submodule(name, nn.Identity())
            removed += (f'{name}.',)


def _without_storage(module: nn.Module) -> Any:
    """A copy on the meta device, in evaluation mode, with every parameter ready for a gradient."""
    known: dict[int, Any] = {}
    for parameter in module.parameters():
        known[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device='meta'), requires_grad=parameter.is_floating_point())
    for buffer in module.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device='meta')
    return copy.deepcopy(module, known).eval()
