"""Checkpoint files of any origin, read without running anything and without believing what they claim."""
import dataclasses
import os
import stat
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_miil._checks import cut, shown
from timm_miil._errors import CheckpointError
from timm_miil.models._loading import WRAPPERS, unwrap
from timm_miil.models._safetensors_file import check_dense, load_safetensors, read_metadata, write_safetensors
from timm_miil.models._torch_file import LEGACY_START, ZIP_START, load_torch_file

__all__ = ['Checkpoint', 'read_checkpoint', 'read_metadata', 'write_safetensors']

LABELS, COUNT = 'idx_to_class', 'num_classes'    # the words of the original files
MAX_LABELS, MAX_LABEL_CHARS = 100_000, 200
MIN_SPARSE_BYTES = 1 << 20
SAFETENSORS, HEADER_START = '.safetensors', b'{'    # at byte 8
BLOCK_BYTES = 512    # of st_blocks, whatever the file system
OTHER_STARTS = (
    (b'<', 'a web page: the link gives no file, or asks for a login'),
    (b'version https://git-lfs', 'a pointer of Git LFS; run `git lfs pull`'),
    (b'\x1f\x8b', 'packed by gzip; unpack it first'),
    (b'BZh', 'packed by bzip2; unpack it first'),
    (b'\xfd7zXZ', 'packed by xz; unpack it first'),
    (b'\x89HDF', 'an HDF5 file, as Keras writes it'),
    (b'{', 'a JSON text'),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: By name, without a wrapper and without `module.`; mapped from the file where its format allows it, so
            the file must stay as it is while they are used.
        label_names: One a class in the order of the logits, distinct and printable, else as their author wrote them:
            they may hold HTML. None if the file has none.
        extras: Names of what else the file holds, as anyone wrote them.
    """

    tensors: dict[str, Tensor]
    label_names: tuple[str, ...] | None = None
    extras: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file or one of `torch.save`, told apart by their content.

    Nothing in the file is executed. What it claims is compared with what it holds before memory is taken, so a short or
    hostile file cannot ask for much. Names of classes that cannot be used are left out with a warning.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it cannot be read, is no checkpoint, is damaged, claims what it does not hold, or asks for
            code to be run; the message says what to do.
    """
    path = Path(path)
    try:
        start = _start_of(path)
        # The length of a safetensors header may begin as a pickle does.
        is_torch = start.startswith((ZIP_START, LEGACY_START)) and start[8:9] != HEADER_START
        if is_torch and path.suffix == SAFETENSORS:  # torch goes by the name
            raise CheckpointError(f'{path} is a file of torch.save, or an archive, under the name of a safetensors '
                                  f'file; give it the suffix .pth.')
        if is_torch:
            content = load_torch_file(path)
        elif start[8:9] == HEADER_START or path.suffix == SAFETENSORS:
            content = load_safetensors(path)
        else:
            raise CheckpointError(f'{path} is not a checkpoint but {_looks_like(start)}; expected a safetensors file '
                                  f'or one of torch.save.')
    except (OSError, ValueError) as error:  # a path may hold what no path may
        raise CheckpointError(
            f'{cut(str(path))} cannot be read: {getattr(error, "strerror", None) or error}; check the path.') from error
    return _checkpoint(path, content)


def _start_of(path: Path) -> bytes:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # before it is opened: one end of a pipe waits for the other
        kind = 'a folder' if stat.S_ISDIR(facts.st_mode) else 'no regular file'
        raise CheckpointError(f'{path} is {kind}; give the path of a checkpoint file.')
    if not facts.st_size:
        raise CheckpointError(f'{path} is empty; get it again.')
    held = getattr(facts, 'st_blocks', 0) * BLOCK_BYTES    # 0 where the file system does not say
    if facts.st_size > MIN_SPARSE_BYTES and 0 < held < facts.st_size // 2:
        raise CheckpointError(f'{path} has a length of {facts.st_size} bytes, of which {held} are there, as of a '
                              f'download that was not finished; get it again.')
    with open(path, 'rb') as file:
        return file.read(64)


def _looks_like(start: bytes) -> str:
    for known, words in OTHER_STARTS:
        if start.lstrip().startswith(known):
            return words
    return f'begins with {start[:8]!r}'


def _checkpoint(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}; a checkpoint must map names to tensors.')
    try:
        content = _plain(content)
        tensors = {name: tensor.detach() for name, tensor in unwrap(content).items()}
        for name, tensor in tensors.items():
            check_dense(name, tensor)
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error
    wrapped = any(isinstance(content.get(name), dict) for name in WRAPPERS)
    extras = tuple(name for name in content if name not in WRAPPERS) if wrapped else ()
    return Checkpoint(tensors, _label_names(path, content), extras)


def _plain(content: dict[Any, Any]) -> dict[str, Any]:
    """The same as plain dictionaries: a file may give an OrderedDict attributes that hide its methods."""
    found = {}
    for name, value in dict.items(content):
        if not isinstance(name, str):
            raise CheckpointError(f'a name must be a string, found {shown(name)}.')
        if f'module.{name}' in content:
            raise CheckpointError(f'{shown(name)} is there with and without module. before it; one of them must go.')
        found[name] = _plain(value) if name in WRAPPERS and isinstance(value, dict) else value
    return found


def _label_names(path: Path, content: dict[str, Any]) -> tuple[str, ...] | None:
    labels = content.get(LABELS)
    if labels is None or isinstance(labels, Tensor):
        return None
    problem = _label_problem(labels, content.get(COUNT))
    if problem:
        warnings.warn(f'{path}: its {LABELS} is left out, since {problem}; the classes have no names.', stacklevel=4)
        return None
    return tuple(labels[index] for index in range(dict.__len__(labels)))


def _label_problem(labels: Any, count: Any) -> str:
    """Why the map of class numbers to names cannot be used; '' if it can."""
    if not isinstance(labels, dict):
        return f'it is a {type(labels).__name__} and not a dict'
    names, size = list(dict.values(labels)), dict.__len__(labels)
    if not 0 < size <= MAX_LABELS:
        return f'it has {size} names'
    if not all(type(index) is int for index in dict.keys(labels)) or set(dict.keys(labels)) != set(range(size)):
        return f'its {size} numbers are not those from 0 to {size - 1}'
    if count is not None and count != size:
        return f'it has {size} names, and {COUNT} is {shown(count)}'
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_LABEL_CHARS:
            return f'{shown(name)} is no printable name of at most {MAX_LABEL_CHARS} characters'
    if len(set(names)) < size:
        return f'{shown(max(names, key=names.count))} is the name of several classes'
    return ''
