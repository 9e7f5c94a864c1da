"""What `attach_head` builds a head with: a class or function, and how it is called."""
import functools
import inspect
from collections.abc import Callable

from torch import nn

from timm_miil._checks import shown

__all__ = ['check_builder']


def check_builder(head: Callable[..., nn.Module]) -> None:
    """Raise TypeError unless the head can be called with in_features, num_classes, device and dtype."""
    if not callable(head):
        raise TypeError(
            f'head must be a class or function, got {shown(head)}; for a head by name give '
            f"functools.partial(create_head, 'ml_decoder').")
    try:
        signature = inspect.signature(head)
    except ValueError:  # some that are written in C have none
        return
    try:
        signature.bind(in_features=1, num_classes=1, device=None, dtype=None)
    except TypeError as error:
        kind = head.func if isinstance(head, functools.partial) else head
        advice = (
            "its labels are queries, so take timm.create_model('mldecoder_zero_shot', backbone=..., labels=[...])"
            if hasattr(kind, 'set_queries') else 'wrap it in a function that takes them')
        raise TypeError(
            f'head must take in_features, num_classes, device and dtype; {getattr(kind, "__name__", shown(kind))} '
            f'{error}: {advice}.') from None
