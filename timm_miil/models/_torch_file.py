"""Files of `torch.save`, read only after what they claim was checked.

A pickle is a program. `torch.load(weights_only=True)` runs none of its calls but those that make tensors; these can
still ask for any amount of memory or hash a tuple nested so deeply that the process dies. So the pickle is gone
through first by a machine that makes nothing: it follows the stack, knows the few instructions and globals that
tensors in dictionaries need, and compares what is claimed with what the file holds.
"""
import io
import math
import os
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from timm_miil._checks import cut, shown
from timm_miil._errors import CheckpointError
from timm_miil.models._safetensors_file import DTYPES

__all__ = ['LEGACY_START', 'ZIP_START', 'load_torch_file']

ZIP_START, LEGACY_START = b'PK\x03\x04', b'\x80'
MAX_PICKLE_BYTES = 4_000_000      # 600 tensors and 11221 labels are 0.5 million
MAX_DIRECTORY_BYTES = 64_000_000  # of a zip file, whose end says how long it is
MAX_PROTOCOL = 3      # of pickle, which torch takes with weights_only=True
MAX_DIMENSIONS = 16
MAX_SHARING = 16      # bytes of all tensors to bytes of the file
LEGACY_MAGIC, LEGACY_VERSION = 0x1950a86a20f9469cfc6c, 1001
LEGACY_PICKLES = 3    # after magic and version: system, content, order of the storages; then these

ITEM_BYTES = {
    'DoubleStorage': 8, 'FloatStorage': 4, 'HalfStorage': 2, 'BFloat16Storage': 2, 'LongStorage': 8, 'IntStorage': 4,
    'ShortStorage': 2, 'CharStorage': 1, 'ByteStorage': 1, 'BoolStorage': 1, 'UntypedStorage': 1}
STORAGES = {
    f'{module}.{kind}': size for kind, size in ITEM_BYTES.items() for module in ('torch', 'torch.storage')}
TENSOR_MAKERS = frozenset(f'torch._utils.{name}' for name in (
    '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3'))
PARAMETER, ORDERED_DICT, SIZE = 'torch._utils._rebuild_parameter', 'collections.OrderedDict', 'torch.Size'
DTYPE_BYTES = {str(dtype): dtype.itemsize for dtype in DTYPES.values()}
KNOWN = frozenset((*STORAGES, *TENSOR_MAKERS, *DTYPE_BYTES, PARAMETER, ORDERED_DICT, SIZE))
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
CONTAINERS = frozenset(('EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_SET'))
VALUES = frozenset((
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINSTRING',
    'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES'))


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    item_bytes: int
    items: int


class _Made(NamedTuple):
    """Stands for a tensor or a container, whose content does not matter here."""
    is_dict: bool = False


class _NeedsCode(Exception):
    """The pickle asks for something that is no tensor in a dictionary."""


def load_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to a file, with its tensors mapped into memory where the format allows it.

    Raises:
        CheckpointError: If it is damaged, claims what it does not hold, or asks for more than data.
        OSError: If it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            is_zip = file.read(len(ZIP_START)) == ZIP_START
            check = _check_zip if is_zip else _check_legacy
            protocol = check(file, path.stat().st_size).protocol
            if protocol > MAX_PROTOCOL:
                raise _NeedsCode(f'pickle protocol {protocol}')
    except _NeedsCode as error:
        raise CheckpointError(f'{path} asks for {error}, which is more than tensors and names. '
                              f'{_how_to_save_again(path)}') from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, IndexError, TypeError, ValueError, KeyError,
            RecursionError) as error:
        raise CheckpointError(f'{path} is damaged, or no checkpoint: {cut(str(error)) or type(error).__name__}; get it '
                              f'again.') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's remarks on typed storages of old files
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # its words advise to run the file
        raise CheckpointError(f'{path} is none that this version of torch reads safely. '
                              f'{_how_to_save_again(path)}') from error
    except Exception as error:  # whatever a file can still cause in torch
        raise CheckpointError(f'{path} is not a checkpoint that torch can read: {type(error).__name__}: '
                              f'{cut(str(error))}; get it again.') from error


def _how_to_save_again(path: Path) -> str:
    name = path.name
    # Each line ends such that all of them on one line are a program, too: the command line shows an error so.
    return (
        f'Nothing of it was run. If you trust its source, save the tensors again where running it does no harm, such '
        f'as a container without network, and take the new file:\n'
        f'    import torch;\n'
        f'    found = torch.load({name!r}, map_location="cpu", weights_only=False);\n'
        f'    torch.save(found.get("model", found.get("state_dict", found)), {"tensors-" + name!r})')


# ---- the containers


class _Bounded(io.BufferedReader):
    """A file of which nobody reads much at once, whatever the file says of its own length."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError(f'its list of entries claims {size} bytes')
        return super().read(size)


def _check_zip(file: BinaryIO, size: int) -> '_Machine':
    with open(file.fileno(), 'rb', buffering=0, closefd=False) as raw, zipfile.ZipFile(_Bounded(raw)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for entry in entries:
            _check_entry(entry)
        if len(set(names)) < len(names):
            raise ValueError('two of its entries have one name')
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError(f'its entries claim more than the {size} bytes of the file')
        tops = {name.partition('/')[0] for name in names}
        if len(tops) != 1:
            raise ValueError('it is a zip file, but not one of torch.save; unpack it if it holds a checkpoint')
        [top] = tops
        if f'{top}/constants.pkl' in names:
            raise _NeedsCode('a TorchScript program')
        pickle_entry = archive.getinfo(f'{top}/data.pkl')
        if pickle_entry.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f'its description of the tensors has {pickle_entry.file_size} bytes')
        machine = _Machine(size)
        machine.run(io.BytesIO(archive.read(pickle_entry)))
        for key, storage in machine.storages.items():
            held, claimed = archive.getinfo(f'{top}/data/{key}').file_size, storage.items * storage.item_bytes
            if held != claimed:
                raise ValueError(f'storage {shown(key)} claims {claimed} bytes and has {held}')
        return machine


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    parts = name.split('/')
    if '..' in parts or '\\' in name or ':' in name or not parts[0] or not name.isprintable():
        raise ValueError(f'it has an entry named {shown(name)}, which would lie outside of the folder it belongs to')
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f'entry {shown(name)} is compressed, {entry.compress_size} bytes for {entry.file_size}; '
                         f'torch.save does not do this')


def _check_legacy(file: BinaryIO, size: int) -> '_Machine':
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    machine = _Machine(size)
    if machine.run(head) != LEGACY_MAGIC or machine.run(head) != LEGACY_VERSION:
        raise ValueError('it is a pickle, but not one of torch.save')
    for _ in range(LEGACY_PICKLES):
        machine.run(head)
    claimed, left = sum(each.items * each.item_bytes for each in machine.storages.values()), size - head.tell()
    if claimed > left:
        raise ValueError(f'its tensors claim {claimed} bytes, and {left} are left')
    return machine


# ---- the pickle


class _Machine:
    """Goes through pickles without making what they describe.

    Args:
        size: Of the file, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.storages: dict[str, _Storage] = {}
        self.protocol = 0    # of the last pickle
        self.most, self.total = MAX_SHARING * size, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []

    def run(self, stream: BinaryIO) -> Any:
        """The value of one pickle, which ends where the stream then stands.

        Raises:
            _NeedsCode: If it asks for something else than tensors, containers and plain values.
            ValueError: If it is damaged or claims what cannot be; so for IndexError, KeyError and TypeError.
        """
        memo: dict[int, Any] = {}
        self.stack, self.marks = [], []
        for instruction, argument, _ in pickletools.genops(stream):
            op, value = instruction.name, argument    # type: str, Any
            if op in ('BINPUT', 'LONG_BINPUT'):
                memo[value] = self.stack[-1]
            elif op == 'MEMOIZE':
                memo[len(memo)] = self.stack[-1]
            elif op in ('BINGET', 'LONG_BINGET'):
                self.stack.append(memo[value])
            elif op == 'PROTO':
                self.protocol = value
            elif op == 'STOP':
                return self.stack.pop()
            else:
                self._step(op, value)
        raise ValueError('its pickle has no end')

    def _step(self, op: str, value: Any) -> None:
        stack = self.stack
        if op in VALUES:
            stack.append(value)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in CONTAINERS:
            stack.append(_Made(is_dict=op == 'EMPTY_DICT'))
        elif op == 'MARK':
            self.marks.append(len(stack))
        elif op == 'TUPLE':
            stack.append(tuple(self._to_mark()))
        elif op in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            stack.append(tuple(self._last(int(op[-1]))))
        elif op == 'SETITEM':
            self._fill(self._last(2))
        elif op in ('SETITEMS', 'ADDITEMS'):
            self._fill(self._to_mark(), step=2 if op == 'SETITEMS' else 1)
        elif op in ('APPEND', 'APPENDS'):
            self._last(1) if op == 'APPEND' else self._to_mark()
            _expect(isinstance(stack[-1], _Made), 'something is put into what is no list')
        elif op in ('GLOBAL', 'STACK_GLOBAL'):
            stack.append(_known('.'.join(value.split(' ') if op == 'GLOBAL' else map(str, self._last(2)))))
        elif op == 'BINPERSID':
            stack.append(self._storage(stack.pop()))
        elif op == 'REDUCE':
            function, arguments = self._last(2)
            stack.append(self._call(function, arguments))
        elif op == 'BUILD':
            inner = stack.pop()
            _expect(isinstance(inner, _Made) and isinstance(stack[-1], _Made), 'something is given a state')
        elif op != 'FRAME':
            raise _NeedsCode(f'the pickle instruction {op}')

    def _last(self, count: int) -> list[Any]:
        _expect(len(self.stack) >= count + (self.marks[-1] if self.marks else 0), 'its pickle takes what is not there')
        taken = self.stack[len(self.stack) - count:]
        del self.stack[len(self.stack) - count:]
        return taken

    def _to_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _fill(self, items: list[Any], step: int = 2) -> None:
        """Keys are hashed when the file is loaded: of a tuple that may take the whole stack of the process."""
        _expect(isinstance(self.stack[-1], _Made) and len(items) % step == 0, 'something is put into what is no dict')
        for key in items[::step]:
            _expect(isinstance(key, str | int | float | bytes | None), f'a key is a {type(key).__name__}')

    def _storage(self, claim: Any) -> _Storage:
        _expect(isinstance(claim, tuple) and len(claim) in (5, 6) and claim[0] == 'storage', 'a storage is none')
        _, kind, key, _, items, *view = claim
        _expect(isinstance(kind, _Global) and kind.name in STORAGES and isinstance(key, str) and _is_count(items)
                and view in ([], [None]), f'storage {shown(key)} is of no kind that we know')
        storage = _Storage(STORAGES[kind.name], items)
        _expect(self.storages.setdefault(key, storage) == storage, f'storage {shown(key)} is described in two ways')
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else ''
        _expect(isinstance(arguments, tuple), 'a call has no arguments')
        if name in TENSOR_MAKERS:
            storage, offset, shape, stride, *more = arguments
            dtype = more[2] if name.endswith('_v3') else None
            self._tensor(storage, offset, shape, stride, DTYPE_BYTES[dtype.name] if dtype else storage.item_bytes)
            return _Made()
        if name == PARAMETER:
            _expect(isinstance(arguments[0], _Made) and not arguments[0].is_dict, 'a parameter is no tensor')
            return _Made()
        if name == ORDERED_DICT and arguments == ():
            return _Made(is_dict=True)
        if name == SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        raise _NeedsCode(f'a call of {shown(name) if name else "what is no function"}')

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, item_bytes: int) -> None:
        _expect(isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)
                and len(shape) == len(stride) <= MAX_DIMENSIONS and all(map(_is_count, (offset, *shape, *stride))),
                f'a tensor has shape {shown(shape)} and strides {shown(stride)}')
        items, held = math.prod(shape), storage.items * storage.item_bytes
        reach = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if items else 0
        if reach * item_bytes > held:
            raise ValueError(f'a tensor of shape {shown(shape)} reaches beyond its storage of {held} bytes')
        if items * item_bytes > held:
            raise ValueError(f'a tensor of shape {shown(shape)} has {items * item_bytes} bytes and shows the same '
                             f'{held} again and again, as after expand(); it is not written out')
        self.total += items * item_bytes
        if self.total > self.most:
            raise ValueError(f'its tensors show the same storage again and again, to more than {MAX_SHARING} times the '
                             f'size of the file')


def _known(name: str) -> _Global:
    if name not in KNOWN:
        raise _NeedsCode(f'the global {shown(name)}{_said_of(name)}')
    return _Global(name)


def _said_of(name: str) -> str:
    kinds = {'sparse': 'a sparse tensor', 'qtensor': 'a quantised tensor', 'Complex': 'complex numbers',
             'QInt': 'a quantised tensor', 'QUInt': 'a quantised tensor'}
    return next((f' ({words})' for part, words in kinds.items() if name.startswith('torch') and part in name), '')


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expect(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)
