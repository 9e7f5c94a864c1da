"""Heads by name, for networks, recipes and command lines."""
import fnmatch
import importlib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from timm_miil._checks import check_text, nearest, shown

__all__ = ['create_head', 'list_heads']

_CLASS_OF_NAME: Mapping[str, str] = MappingProxyType({
    'csra': 'CSRA',
    'gap': 'GAPHead',
    'ml_decoder': 'MLDecoder',
    'query2label': 'Query2Label',
})


def list_heads(pattern: str = '*') -> list[str]:
    """Names that `create_head` takes.

    Args:
        pattern: Shell pattern, such as 'ml_*'.

    Returns:
        The names that match, sorted.
    """
    return sorted(fnmatch.filter(_CLASS_OF_NAME, pattern))


def create_head(
        name: str,
        in_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: object,
) -> nn.Module:
    """Make a head of this package for a fixed number of classes.

    Args:
        name: One of `list_heads`, or a class name such as 'MLDecoder'; capital letters, '-' and '_' do not matter.
        in_features: Channels of the features.
        num_classes: Number of classes.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        **settings: Further arguments of its constructor.

    Raises:
        TypeError: If name is no string, or the constructor does not know a setting.
        ValueError: If there is no such head, or a setting is out of range.

    Example:
        >>> create_head('csra', in_features=64, num_classes=20, num_heads=4).num_heads
        4
    """
    check_text(name=name)
    known = {_plain(word): class_name for key, class_name in _CLASS_OF_NAME.items() for word in (key, class_name)}
    class_name = known.get(_plain(name))
    if class_name is None:
        raise ValueError(f'unknown head {shown(name)}; {nearest(name, _CLASS_OF_NAME)}')
    head: nn.Module = getattr(importlib.import_module('timm_miil.heads'), class_name)(
        in_features=in_features, num_classes=num_classes, device=device, dtype=dtype, **settings)
    return head


def _plain(name: str) -> str:
    return name.lower().replace('_', '').replace('-', '').removesuffix('head')
