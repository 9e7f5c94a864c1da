"""Arrays in pickles and in files of `torch.save`, without running the programs that such files are.

A pickle is a program for a stack machine, with calls of any function. Here a machine of our own goes through it that
knows lists, dictionaries, strings and numbers, and of calls those that make an array of NumPy or a tensor of torch;
these it does by itself, from bytes that are in the file. Anything else is refused by its name.
"""
import functools
import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from timm_miil._checks import cut, shown

__all__ = ['MAX_BYTES', 'read_pickle']

MAX_BYTES = 1 << 31  # of a file; a million words of 300 numbers are 1.2e9
MAX_INSTRUCTIONS = 1 << 25  # an array by name takes about 25; each makes a hundred bytes or so out of one
MAX_NAME_CHARS = 1 << 8  # of a module or a function, which a pickle may join as often as it likes
ZIP_START = b'PK\x03\x04'
FLOATS = frozenset({'f2', 'f4', 'f8'})
STORAGES = MappingProxyType({
    f'torch.{kind}Storage': dtype for kind, dtype in {'Half': '<f2', 'Float': '<f4', 'Double': '<f8'}.items()})
ARRAY_MAKERS = frozenset({'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct'})
BUFFER_ARRAY_MAKERS = frozenset({'numpy.core.numeric._frombuffer', 'numpy._core.numeric._frombuffer'})
NUMBER_MAKERS = frozenset({'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'})
VALUES = frozenset({
    'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'INT', 'FLOAT', 'BINFLOAT', 'UNICODE', 'BINUNICODE',
    'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BINSTRING', 'SHORT_BINSTRING',
    'BYTEARRAY8'})
MADE: Mapping[str, Callable[[], Any]] = MappingProxyType({
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False, 'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list, 'EMPTY_DICT': dict})
TUPLES = MappingProxyType({'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3})
PUTS, GETS = frozenset({'PUT', 'BINPUT', 'LONG_BINPUT'}), frozenset({'GET', 'BINGET', 'LONG_BINGET'})

Array = npt.NDArray[np.floating[Any]]


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: str
    data: bytearray


class _Dtype:
    """'f4' and the order of its bytes."""

    def __init__(self, name: Any) -> None:
        if _kind(name, str) not in FLOATS:  # the hash of a deep tuple would end the process
            raise ValueError(f'it has an array of dtype {shown(name)}, where word vectors are floats')
        self.name, self.order = name, '='

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ('<', '>', '=', '|'):
            raise ValueError('it has an array of a dtype that is no float')
        self.order = state[1]


class _Array:
    """An array of NumPy, whose content comes after it."""

    value: Array = np.empty(0, np.float32)

    def build(self, state: Any, encode: Callable[[str], bytes]) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise ValueError('it has an array of a layout that NumPy does not write')
        _, shape, dtype, is_fortran, data = state
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError('it has an array without a shape')
        data = encode(data) if isinstance(data, str) else data
        if not isinstance(data, bytes):
            raise ValueError('it has an array without content')
        # Not of the shape: NumPy raises ValueError.
        self.value = np.frombuffer(data, f'{dtype.order}{dtype.name}').reshape(shape, order='F' if is_fortran else 'C')


def read_pickle(path: Path) -> Array | dict[str, Array]:
    """The array of a pickle or a file of torch, or its arrays by name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger than 2 GiB, damaged, or has anything but arrays of floats in dictionaries.
    """
    with open(path, 'rb') as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise ValueError(f'{path} must have at most {MAX_BYTES} bytes, got {size}; take fewer words.')
        data = file.read(size)  # as much memory is taken at once
    try:
        found = _read_torch(data) if data.startswith(ZIP_START) else _run(data, {})
        return _floats(found)
    except (ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, RuntimeError, MemoryError,
            zipfile.BadZipFile) as error:
        reason = cut(str(error) or type(error).__name__).rstrip('.')
        raise ValueError(
            f'{path} is no pickle of word vectors: {reason}. No code of it was run; save an array '
            f'(K, E) by numpy.save (.npy), or give save_word_vectors the rows.') from error


def _read_torch(data: bytes) -> Any:
    """What `torch.save` wrote, whose tensors lie beside the pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename.partition('/')[2]: info for info in archive.infolist()}
        if 'data.pkl' not in entries:
            raise ValueError('it is a zip archive, but none of torch.save')
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError('it is compressed, and torch.save does not compress')
        if sum(info.file_size for info in entries.values()) > len(data):
            raise ValueError('it says that it has more bytes than it has')
        pickled = archive.read(entries.pop('data.pkl'))
        # To be written to, by which torch and NumPy share them; nobody does.
        content = {name: bytearray(archive.read(info)) for name, info in entries.items() if name.startswith('data/')}
    return _run(pickled, content)


def _floats(found: Any) -> Array | dict[str, Array]:
    found = found.value if isinstance(found, _Array) else found
    if isinstance(found, np.ndarray):
        return found
    if not isinstance(found, dict):
        raise ValueError(f'it has {type(found).__name__} at its top, where an array or a dictionary is wanted')
    named = {name: row.value if isinstance(row, _Array) else row for name, row in found.items()}
    arrays = {name: row for name, row in named.items() if isinstance(row, np.ndarray)}
    tables = [row for row in arrays.values() if row.ndim > 1]
    return tables[0] if len(tables) == 1 else arrays


def _run(data: bytes, storages: Mapping[str, bytearray]) -> Any:
    """What a pickle makes.

    What it names more than once is made once and shared: a small file must not fill the memory.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    @functools.cache
    def encode(text: str) -> bytes:
        return text.encode('latin1')

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    op: Any
    arg: Any
    for number, (op, arg, _) in enumerate(pickletools.genops(data)):
        name = op.name
        if number >= MAX_INSTRUCTIONS:
            raise ValueError(f'it has more than {MAX_INSTRUCTIONS} instructions; take fewer words')
        if name in VALUES:
            stack.append(bytes(arg) if name == 'BYTEARRAY8' else arg)
        elif name in MADE:
            stack.append(MADE[name]())
        elif name == 'MARK':
            marks.append(len(stack))
        elif name in PUTS:
            memo[int(arg)] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in GETS:
            stack.append(memo[int(arg)])
        elif name == 'TUPLE':
            stack.append(tuple(since_mark()))
        elif name in TUPLES:
            stack[-TUPLES[name]:] = [tuple(stack[-TUPLES[name]:])]
        elif name in ('LIST', 'DICT'):
            items = since_mark()
            stack.append(items if name == 'LIST' else _set({}, items))
        elif name in ('APPEND', 'APPENDS'):
            items = since_mark() if name == 'APPENDS' else [stack.pop()]
            _kind(stack[-1], list).extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = since_mark() if name == 'SETITEMS' else [stack.pop() for _ in range(2)][::-1]
            _set(_kind(stack[-1], dict), items)
        elif name == 'GLOBAL':
            stack.append(_Global(arg.replace(' ', '.')))
        elif name == 'STACK_GLOBAL':
            attribute, module = (_kind(stack.pop(), str) for _ in range(2))
            if max(len(module), len(attribute)) > MAX_NAME_CHARS:
                raise ValueError(f'it calls {shown(attribute)} of {shown(module)}')
            stack.append(_Global(f'{module}.{attribute}'))
        elif name == 'REDUCE':
            args = stack.pop()
            stack.append(_call(_kind(stack.pop(), _Global).name, _kind(args, tuple), encode))
        elif name == 'BINPERSID':
            stack.append(_find_storage(_kind(stack.pop(), tuple), storages))
        elif name == 'BUILD':
            state = stack.pop()
            if isinstance(stack[-1], _Array):
                stack[-1].build(state, encode)
            elif isinstance(stack[-1], _Dtype):
                stack[-1].build(state)
            elif not isinstance(stack[-1], dict):  # a dictionary of torch has attributes, which are left
                raise ValueError(f'it sets the state of {type(stack[-1]).__name__}')
        elif name == 'STOP':
            return stack.pop()
        elif name not in ('PROTO', 'FRAME', 'READONLY_BUFFER'):
            raise ValueError(f'it has the instruction {name}, which arrays do not need')
    raise ValueError('it has no end')


def _set(table: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        table[_kind(key, str)] = value
    return table


def _kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f'it has {type(value).__name__} where {kind.__name__.lstrip("_")} is wanted')
    return value


def _call(name: str, args: tuple[Any, ...], encode: Callable[[str], bytes]) -> Any:
    """Do what the call of a function of that name does, if arrays need it."""
    if name == 'collections.OrderedDict' and not args:
        return {}
    if name in ARRAY_MAKERS:
        return _Array()
    if name in BUFFER_ARRAY_MAKERS:
        data, dtype, shape, order = args[:4]
        array = _Array()
        array.build((1, shape, dtype, order == 'F', data), encode)
        return array
    if name == 'numpy.dtype':
        return _Dtype(args[0])
    if name == '_codecs.encode' and args[1:] == ('latin1',):  # bytes before protocol 3
        return encode(_kind(args[0], str))
    if name in NUMBER_MAKERS:
        dtype, number = _kind(args[0], _Dtype), _kind(args[1], bytes)
        return float(np.frombuffer(number, f'{dtype.order}{dtype.name}')[0])
    if name in ('torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor'):
        storage, (offset, shape, strides) = _kind(args[0], _Storage), args[1:4]
        flat = torch.from_numpy(np.frombuffer(storage.data, storage.dtype))
        if np.prod([float(side) for side in shape]) > len(flat):
            raise ValueError(f'it has a tensor of shape {shown(shape)} made of {len(flat)} numbers')
        return flat.as_strided(shape, strides, offset).numpy()  # beyond its end: RuntimeError
    raise ValueError(f'it calls {shown(name)}')


def _find_storage(words: tuple[Any, ...], storages: Mapping[str, bytearray]) -> _Storage:
    _, kind, key = words[:3]
    name = _kind(kind, _Global).name
    if name not in STORAGES:
        raise ValueError(f'it has a tensor of {shown(name)}, where word vectors are float16, float32 or float64')
    return _Storage(STORAGES[name], storages[f'data/{_kind(key, str)}'])
