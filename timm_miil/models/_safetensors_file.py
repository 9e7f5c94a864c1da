"""Safetensors files: their header checked by hand before use, and bytes that depend on the content alone.

The format: eight bytes with the length of the header, the header as JSON, then the tensors without gaps.
"""
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from timm_miil._atomic import whole_file
from timm_miil._checks import cut, shown
from timm_miil._errors import CheckpointError

__all__ = ['DTYPES', 'check_dense', 'load_safetensors', 'read_metadata', 'write_safetensors']

DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U64': torch.uint64, 'U32': torch.uint32,
    'U16': torch.uint16, 'U8': torch.uint8, 'BOOL': torch.bool, 'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 10_000_000    # 700 tensors are 0.1 million; the format allows 100 million
MAX_DIMENSIONS = 16
METADATA = '__metadata__'
LENGTH = struct.Struct('<Q')
ALIGNMENT = 8     # bytes


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Raises:
        CheckpointError: If the header does not describe exactly what the file holds.
        OSError: If it cannot be read.
    """
    _checked_header(path)
    try:
        return dict(load_file(path))
    except OSError:
        raise
    except Exception as error:  # the library is stricter than we know
        raise CheckpointError(f'{path} is not a file that safetensors can read: {cut(str(error))}; get it '
                              f'again.') from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty if there is none.

    Raises:
        CheckpointError: If the header does not describe exactly what the file holds.
        OSError: If it cannot be read.
    """
    metadata: dict[str, str] = _checked_header(Path(path)).get(METADATA, {})
    return metadata


def write_safetensors(
        path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whose bytes depend on the arguments' content alone; it appears whole or not at all.

    Args:
        path: The file to make or replace, in a folder that is there.
        tensors: Dense tensors by name; each is written out in full, whatever memory it shares.
        metadata: Strings by name.

    Raises:
        CheckpointError: If a tensor is sparse, quantised, complex, has no values, or a name is reserved.
        TypeError: If a name or a string of the metadata is none.
        OSError: If it cannot be written; a file of that name is then as it was.
    """
    for words in (*tensors, *(metadata or {}), *(metadata or {}).values()):
        if not isinstance(words, str):
            raise TypeError(f'names and metadata must be strings, got {type(words).__name__} {shown(words)}.')
    for name, tensor in tensors.items():
        check_dense(name, tensor)
    if METADATA in tensors:
        raise CheckpointError(f'no tensor may have the name {METADATA}, which the format keeps for itself.')
    # The widest first, as the library does: then each starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.dtype.itemsize
        header[name] = {'dtype': NAMES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % ALIGNMENT)
    with whole_file(path) as file:
        file.write(LENGTH.pack(len(text)) + text)
        for name in names:
            values = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(values.numpy().data)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the tensor is one that a safetensors file can hold."""
    if tensor.layout != torch.strided:
        kind = f'of layout {tensor.layout}'
    elif tensor.is_quantized:
        kind = 'quantised'
    elif tensor.is_meta:
        kind = 'without values, on the meta device'
    elif tensor.dtype not in NAMES:
        kind = f'of {tensor.dtype}'
    else:
        return
    raise CheckpointError(f'tensor {shown(name)} is {kind}; weights must be dense, of one of '
                          f'{", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)}.')


# ---- the header


def _checked_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    try:
        with open(path, 'rb') as file:
            start = file.read(LENGTH.size)
            if len(start) < LENGTH.size:
                raise ValueError(f'{size} bytes are no header')
            length, = LENGTH.unpack(start)
            if length > size - LENGTH.size:
                raise ValueError(f'the header claims {length} bytes, and the file has {size}')
            if length > MAX_HEADER_BYTES:
                raise ValueError(f'the header has {length} bytes, more than {MAX_HEADER_BYTES}')
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        _check_header(header, size - LENGTH.size - length)
    except (ValueError, RecursionError) as error:  # of the JSON parser, too
        raise CheckpointError(f'{path} is not a safetensors file that can be trusted: {cut(str(error))}; get it '
                              f'again.') from error
    checked: dict[str, Any] = header
    return checked


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f'the name {shown(twice)} is there twice')
    return found


def _check_header(header: Any, size: int) -> None:
    if not isinstance(header, dict):
        raise ValueError(f'the header is no JSON object but a {type(header).__name__}')
    ranges = []
    for name, facts in header.items():
        if name == METADATA:
            if not (isinstance(facts, dict) and all(isinstance(words, str) for words in facts.values())):
                raise ValueError(f'{METADATA} maps no strings to strings')
        else:
            ranges.append((*_checked_range(name, facts), name))
    end = 0
    for first, last, name in sorted(ranges):
        if first != end:
            words = f'begins before byte {end}, where the one before it ends' if first < end else \
                f'begins at byte {first}, {first - end} after the one before it'
            raise ValueError(f'tensor {shown(name)} {words}')
        end = last
    if end != size:
        raise ValueError(f'its tensors claim {end} bytes, and the file has {size} for them')


def _checked_range(name: str, facts: Any) -> tuple[int, int]:
    if not isinstance(facts, dict) or facts.keys() != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'tensor {shown(name)} must have dtype, shape and data_offsets')
    dtype, shape, offsets = facts['dtype'], facts['shape'], facts['data_offsets']
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f'tensor {shown(name)} is of {shown(dtype)}, which is not one of {", ".join(DTYPES)}')
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f'tensor {shown(name)} has the shape {shown(shape)}')
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f'tensor {shown(name)} has the offsets {shown(offsets)}')
    first, last = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != wanted:
        raise ValueError(f'tensor {shown(name)} of shape {shown(shape)} and {dtype} has {last - first} bytes, and not '
                         f'{shown(wanted)}')
    return first, last


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
