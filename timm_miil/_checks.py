"""Every input error is worded here: what was got, what was expected, what to do."""
import difflib
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the catalogue uses this module without torch
    from torch import Tensor

__all__ = [
    'check_choice', 'check_class_settings', 'check_floating', 'check_folder', 'check_indices', 'check_labels',
    'check_multiple', 'check_ndim', 'check_not_negative', 'check_paths', 'check_positive', 'check_range',
    'check_same_length', 'check_same_shape', 'check_shape', 'check_text', 'check_values', 'cut', 'nearest', 'shown',
]

# A message may quote what anyone wrote, of any length.
VALUE_CHARS, MESSAGE_CHARS = 100, 500


def shown(value: object) -> str:
    """The value as a message quotes it: its repr, cut to VALUE_CHARS characters."""
    try:
        return cut(repr(value), VALUE_CHARS)
    except (RecursionError, ValueError):  # nested too deeply; an int of too many digits
        return 'one too large to show'


def cut(words: str, length: int = MESSAGE_CHARS) -> str:
    """The words on one line, and of a long one the beginning."""
    words = words.replace('\n', ' ')
    return words if len(words) <= length else f'{words[:length]}...'


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that end an 'unknown name' message: the nearest known name, or all of them when few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    listed = ', '.join(names) if len(names) <= 30 else f'{len(names)} names'
    return f'{hint}Known: {listed}.'


def check_choice(*, choices: Iterable[str], **named: str) -> None:
    """Raise ValueError unless each named value is one of `choices`."""
    choices = tuple(choices)
    for name, value in named.items():
        if value not in choices:
            raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {shown(value)}.')


def check_text(**named: str) -> None:
    """Raise TypeError unless each named value is a string."""
    for name, value in named.items():
        _check_kind(name, value, str, 'a string')


def check_range(*, low: float, high: float, closed: bool = False, **named: float) -> None:
    """Raise ValueError unless low <= value < high (low <= value <= high when closed) for each named number."""
    for name, value in named.items():
        _check_kind(name, value, numbers.Real, 'a number')
        if not (low <= value <= high if closed else low <= value < high):
            above = '(0' if low == math.ulp(0.0) else f'[{low:g}'
            raise ValueError(f'{name} must be in {above}, {high:g}{"]" if closed else ")"}, got {shown(value)}.')


def check_positive(**named: int) -> None:
    """Raise ValueError unless each named value is a whole number of at least 1."""
    for name, value in named.items():
        _check_kind(name, value, numbers.Integral, 'an int')
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')


def check_not_negative(**named: int) -> None:
    """Raise ValueError unless each named value is a whole number of at least 0."""
    for name, value in named.items():
        _check_kind(name, value, numbers.Integral, 'an int')
        if value < 0:
            raise ValueError(f'{name} must be at least 0, got {value}.')


def check_multiple(*, of: int, **named: int) -> None:
    """Raise ValueError unless each named value is a multiple of `of`."""
    for name, value in named.items():
        if value % of:
            below, above = value // of * of, -(-value // of) * of
            hint = f'{below} or {above}' if below else f'{above}'
            raise ValueError(f'{name} must be a multiple of {of}, got {value}; the nearest are {hint}.')


def check_folder(**named: str | os.PathLike[str]) -> None:
    """Raise NotADirectoryError if a named folder to write to, or one that it shall be in, is a file."""
    for name, value in named.items():
        for path in (Path(value), *Path(value).parents):
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f'{name} must be a folder, got {os.fspath(value)!r}, where {path} is a file.')


def check_same_shape(**named: 'Tensor') -> None:
    """Raise ValueError unless all named tensors have one shape."""
    if len({tuple(tensor.shape) for tensor in named.values()}) > 1:
        shapes = ', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in named.items())
        hint = ''
        if {'logits', 'targets'} <= named.keys() and named['targets'].ndim == named['logits'].ndim - 1:
            hint = (
                f'; class indices become multi-hot by torch.nn.functional.one_hot(targets, '
                f'{named["logits"].shape[-1]}), or take AsymmetricLossSingleLabel for one label each')
        raise ValueError(f'shapes must be equal, got {shapes}{hint}.')


def check_same_length(**named: 'Tensor') -> None:
    """Raise ValueError unless the first dimension of all named tensors has one size."""
    if len({tuple(tensor.shape[:1]) for tensor in named.values()}) > 1:
        shapes = ', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in named.items())
        raise ValueError(f'first dimensions must be equal, got {shapes}.')


def check_shape(*, shape: tuple[int, ...], **named: 'Tensor') -> None:
    """Raise ValueError unless each named tensor has `shape`."""
    for name, tensor in named.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(tensor.shape)}.')


def check_floating(**named: 'Tensor') -> None:
    """Raise TypeError unless each named tensor has a floating dtype."""
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f'{name} must be floating-point, got {tensor.dtype}; call .float() if these are scores.')


def check_ndim(ndim: int, **named: 'Tensor') -> None:
    """Raise ValueError unless each named tensor has `ndim` dimensions."""
    for name, tensor in named.items():
        if tensor.ndim != ndim:
            raise ValueError(f'{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}.')


def check_indices(*, num_classes: int, read: bool, **named: 'Tensor') -> None:
    """Raise unless each named tensor holds class indices: TypeError for its dtype, ValueError for its values.

    Args:
        num_classes: Indices are in [0, num_classes).
        read: Whether the values may be read; False checks the dtype only.
        **named: The tensors.
    """
    for name, tensor in named.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize == 1:
            raise TypeError(f'{name} must be class indices of an integer dtype, int64 at best, got {tensor.dtype}.')
        if read and tensor.numel():
            low, high = (int(value) for value in tensor.detach().aminmax())
            if low < 0 or high >= num_classes:
                raise ValueError(f'{name} must be in [0, {num_classes}), got values from {low} to {high}.')


def check_values(*, low: float, high: float, hint: str = '', **named: 'Tensor') -> None:
    """Raise ValueError unless the values of each named tensor are in [low, high]; NaN is not. It reads the values."""
    for name, tensor in named.items():
        if tensor.numel():
            least, most = (float(value) for value in tensor.detach().aminmax())
            if not (least >= low and most <= high):
                words = f'{name} must be in [{low:g}, {high:g}], got values from {least:g} to {most:g}'
                raise ValueError(f'{words}; {hint}.' if hint else f'{words}.')


def check_labels(*, hint: str = '', **named: 'Tensor') -> None:
    """Raise ValueError unless each value of each named tensor is 1, 0 or -1; NaN is not. It reads the values."""
    for name, tensor in named.items():
        wrong = tensor[tensor != tensor.sign()]
        if wrong.numel():
            words = f'{name} must be 1, 0 or -1, got {wrong[0].item():g}'
            raise ValueError(f'{words}; {hint}.' if hint else f'{words}.')


def check_class_settings(
        *, num_classes: int, thresholds: Sequence[float] | None, temperatures: Sequence[float] | None) -> None:
    """Raise unless there is a threshold in [0, 1] and a temperature in [0.01, 100] for each class; None passes.

    TypeError for what is no list of numbers, ValueError for a wrong length or value.
    """
    for name, values, low, high in (
            ('thresholds', thresholds, 0.0, 1.0), ('temperatures', temperatures, 0.01, 100.0)):
        if values is None:
            continue
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise TypeError(f'{name} must be a list of numbers, got {_shown_kind(values)}.')
        if len(values) != num_classes:
            raise ValueError(f'{name} must have one number a class, got {len(values)} for {num_classes} classes.')
        for index, value in enumerate(values):
            check_range(low=low, high=high, closed=True, **{f'{name}[{index}]': value})


def check_paths(**named: Iterable[str | os.PathLike[str]]) -> None:
    """Raise TypeError if a named value is one path where several are expected: a string is iterable too."""
    for name, value in named.items():
        if isinstance(value, (str, bytes, os.PathLike)):
            raise TypeError(f'{name} must be a list of paths, got the single path {value!r}.')


def _check_kind(name: str, value: object, kind: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f'{name} must be {words}, got {_shown_kind(value)}.')


def _shown_kind(value: object) -> str:
    kind = type(value).__name__
    return f'{kind}; call .tolist()' if hasattr(value, 'tolist') else f'{kind} {shown(value)}'
