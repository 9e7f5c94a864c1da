"""timm's parameter groups of a backbone, under the prefix it has in a larger model; layer decay reads them."""
import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ['PartNumber', 'Prefixed', 'prefixed']


class PartNumber:
    """Groups of a backbone that names none: its parts of the first two levels, numbered as they stand."""

    def __init__(self, backbone: nn.Module) -> None:
        parts = dict.fromkeys(self._part(name) for name, _ in backbone.named_parameters())
        self.number = {part: number for number, part in enumerate(parts)}

    def __call__(self, name: str) -> float:
        return self.number[self._part(name)]

    @staticmethod
    def _part(name: str) -> str:
        return '.'.join(name.split('.')[:2])


class Prefixed:
    """A group function of the backbone, for names with our prefix; the head comes last."""

    def __init__(self, matcher: Callable[[str], Any]) -> None:
        self.matcher = matcher

    def __call__(self, name: str) -> Any:
        return self.matcher(name.removeprefix('backbone.')) if name.startswith('backbone.') else math.inf


def prefixed(pattern: Any) -> Any:
    """timm's group patterns, moved below `backbone.`; they nest in lists and tuples beside plain values."""
    if isinstance(pattern, str):
        unanchored = re.sub(r'(?<!\[)\^', '', pattern)  # a caret that opens a character class stays
        return rf'^backbone\.(?:{unanchored})'
    if isinstance(pattern, (list, tuple)):
        return type(pattern)(prefixed(part) for part in pattern)
    return pattern
