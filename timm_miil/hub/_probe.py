"""What a network answers to two fixed pictures: recorded at conversion, compared after the weights have travelled.

The pictures are made by arithmetic of integers and are exact in every floating dtype, so that they are the same on each
machine, under each release of torch and whatever the random generators did before.
"""
import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from timm_miil._checks import cut, shown
from timm_miil._errors import HubError

__all__ = ['check_probe', 'probe_pictures', 'record_probe']

RECIPE = 'blocks-of-integers-1'  # how `probe_pictures` makes them; another way gets another name
PICTURES = 2
SHOWN_LOGITS = 16
LARGEST_SIDE = 224  # a network that takes other sizes than its own is asked at this one, which is quicker
BLOCK_PX = 8
TOLERANCE = 1e-4  # of the largest logit; float32 is off by 1e-6 to 1e-5, another tensor by 1e-2 and more
DIGITS = 6  # that are recorded; float64 gives the same ones on each machine, so that equal weights give equal records

# What a record of somebody else's may ask for.
MAX_CHANNELS, MAX_SIDE = 16, 1024


def probe_pictures(shape: tuple[int, int, int, int]) -> Tensor:
    """The pictures, normalised already: shape (B, channels, H, W), float32, multiples of 1/64 in [-2, 2).

    Noise upon coarse blocks, of which a network makes more than of noise alone.
    """
    batch, channels, height, width = shape
    planes, rows, columns = (torch.arange(size, device='cpu') for size in (batch * channels, height, width))
    pixel = (planes[:, None, None] * height + rows[:, None]) * width + columns
    block = (planes[:, None, None] * MAX_SIDE + rows[:, None] // BLOCK_PX) * MAX_SIDE + columns // BLOCK_PX
    mixed = (3 * _scatter(block) + _scatter(pixel)) // 4
    return (mixed.to(torch.float32) / 64 - 2).reshape(shape)


def record_probe(model: nn.Module) -> dict[str, Any]:
    """What the model answers, as JSON takes it.

    A copy of it is asked, in evaluation mode, in float64 on the CPU.

    Args:
        model: With timm's `pretrained_cfg`, whose `input_size` and `fixed_input_size` are used.

    Raises:
        HubError: If it gives no finite logits.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    channels, height, width = cfg.get('input_size', (3, LARGEST_SIDE, LARGEST_SIDE))
    if not cfg.get('fixed_input_size', False):
        _, low_height, low_width = cfg.get('min_input_size') or (channels, 1, 1)
        height, width = (
            max(low, min(side, LARGEST_SIDE)) for side, low in ((height, low_height), (width, low_width)))
    shape = (PICTURES, int(channels), int(height), int(width))
    logits = _ask(model, shape, torch.float64)
    return {
        'recipe': RECIPE,
        'shape': list(shape),
        'num_logits': logits.shape[1],
        'logits': [[_rounded(value) for value in row] for row in logits[:, :SHOWN_LOGITS].tolist()],
        'norms': [_rounded(value) for value in logits.norm(dim=1).tolist()],
    }


def check_probe(model: nn.Module, recorded: object) -> None:
    """Raise HubError unless the model answers what `record_probe` has recorded, or if that is no such record.

    It is asked in evaluation mode, in float32 on the CPU: of a model in another dtype or place a copy is asked. The
    model's modes are as before afterwards.
    """
    record = _read(recorded)
    logits = _ask(model, tuple(record['shape']), torch.float32)
    if logits.shape[1] != record['num_logits']:
        raise HubError(f'the model gives {logits.shape[1]} logits where {record["num_logits"]} were recorded.')
    norms = logits.double().norm(dim=1).tolist()
    for number, (got, want) in enumerate(zip(logits.tolist(), record['logits'], strict=True)):
        norm = record['norms'][number]
        scale = max(norm / math.sqrt(logits.shape[1]), *map(abs, want))
        worst = max(abs(one - other) for one, other in zip(got, want))
        if worst > TOLERANCE * scale or abs(norms[number] - norm) > TOLERANCE * norm:
            raise HubError(
                f'the model answers otherwise than at its conversion: logits of fixed picture {number + 1} are off by '
                f'{worst:.3g} where {TOLERANCE * scale:.3g} is allowed, their norm is {norms[number]:.7g} for a '
                f'recorded {norm:.7g}; the weights are others, or the network is.')


def _scatter(numbers: Tensor) -> Tensor:
    """Each number as one in [0, 256) that tells nothing of it; below 2 ** 31 nothing overflows."""
    return (numbers * numbers % 2147483647 * 48271 + numbers * 69621 + 11) % 2147483647 % 256


def _ask(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Logits of the pictures, (PICTURES, classes)."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type != 'cpu' or tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors):
        model = copy.deepcopy(model).to(device='cpu', dtype=dtype)
    pictures = probe_pictures((shape[0], shape[1], shape[2], shape[3])).to(dtype)
    try:
        with _evaluated(model), torch.no_grad(), torch.autocast('cpu', enabled=False):
            logits = model(pictures)
    except Exception as error:  # whatever a network of somebody raises
        raise HubError(f'the model fails on pictures of shape {tuple(shape)}: {cut(str(error), 200)}') from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != PICTURES or not logits.shape[1]:
        what = f'shape {tuple(logits.shape)}' if isinstance(logits, Tensor) else type(logits).__name__
        raise HubError(f'the model must give logits of shape ({PICTURES}, classes), got {what}.')
    if not logits.isfinite().all():
        raise HubError('the model gives logits that are not finite numbers for the fixed pictures; its weights are '
                       'damaged.')
    return logits.to(dtype)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _rounded(value: float) -> float:
    return float(f'{value:.{DIGITS}g}')


def _read(recorded: object) -> Mapping[str, Any]:
    """The record, checked: it comes from anyone's config.json."""
    if not isinstance(recorded, Mapping):
        raise HubError(f'the recorded logits must be an object, got {shown(recorded)}.')
    if (recipe := recorded.get('recipe')) != RECIPE:
        raise HubError(f'the recorded logits are of pictures made by {shown(recipe)}, this release knows {RECIPE!r}; '
                       f'install the release of timm-miil that converted the weights, or a later one.')
    shape, count = recorded.get('shape'), recorded.get('num_logits')
    limits = (PICTURES, MAX_CHANNELS, MAX_SIDE, MAX_SIDE)
    if not (isinstance(shape, list) and len(shape) == 4 and shape[0] == PICTURES
            and all(_is_count(size) and size <= limit for size, limit in zip(shape, limits))):
        raise HubError(f'the pictures of the recorded logits must have a shape up to {limits}, got {shown(shape)}.')
    rows, norms = recorded.get('logits'), recorded.get('norms')
    if not (_is_count(count) and isinstance(rows, list) and len(rows) == PICTURES
            and all(_is_numbers(row, min(count, SHOWN_LOGITS)) for row in rows)
            and _is_numbers(norms, PICTURES) and min(norms) >= 0):
        raise HubError(f'the record must have the first {SHOWN_LOGITS} logits of each of {PICTURES} pictures and their '
                       f'norms as finite numbers, got {shown(dict(recorded))}.')
    return recorded


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_numbers(values: object, count: int) -> TypeGuard[list[float]]:
    """Whether it is a list of so many finite numbers."""
    return isinstance(values, list) and len(values) == count and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 for value in values)
