"""What a zero-shot network reads: label names from a text file, and their embeddings from files of word vectors."""
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_miil._checks import check_floating, cut, shown
from timm_miil.data._word_pickles import MAX_BYTES, read_pickle
from timm_miil.data._word_vectors import Row, read_binary_rows, read_text_rows, refuse_other_forms

__all__ = ['read_labels', 'read_word_vectors', 'save_word_vectors']

NAMED_AT_MOST = 5
UNREADABLE = (ValueError, TypeError, EOFError, SyntaxError, RuntimeError, MemoryError)
"""What a damaged head of a NumPy file leads to; MemoryError, if it tells of more than there can be."""
WHOLE = frozenset({'.npz', '.pickle', '.pkl', '.pt', '.pth', '.safetensors'})


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read label names, one a line.

    Args:
        path: Text file in UTF-8, with or without byte order mark, with any line ends. Blank lines and spaces round a
            name do not count.

    Returns:
        The names in the order of the lines.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, has no names, or one twice.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{os.fspath(path)} must be a text file in UTF-8, and its byte {error.start} is not; save it as UTF-8.'
        ) from None
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        label = line.strip()
        if label and (first := numbers.setdefault(label, number)) != number:
            raise ValueError(
                f'{os.fspath(path)} must have each label once, and {shown(label)} is on lines {first} and {number}.')
    if not numbers:
        raise ValueError(f'{os.fspath(path)} must have label names, one a line, and has none.')
    return tuple(numbers)


def read_word_vectors(path: str | os.PathLike[str], labels: Sequence[str]) -> Tensor:
    """Read the embeddings of labels from a file of word vectors, or of embeddings.

    The suffix says the form:

    - '.npy': an array (K, E), the rows in the order of the labels.
    - '.safetensors', '.npz': one array (K, E), the rows in the order of the labels, or an array (E) a name.
    - '.pt', '.pth', '.pkl', '.pickle': the same as an array, or in a dictionary, by torch.save or pickle. No code of
      the file is run: anything but arrays of floats, names and numbers in lists and dictionaries is refused.
    - '.bin': the binary form of word2vec.
    - else text, one word a line with its numbers behind it: GloVe, fastText, word2vec with its first line.

    An array (1, E, K), as the authors of SDL publish theirs, is read as its rows.

    Where there are names a label is looked up by name: as it is written, with underscores for its spaces, and both in
    lower case. A label that is not there is the mean of its words, each as it is written or in lower case. Of a name
    that occurs twice the first row counts. Text, .bin and .safetensors of any size are read with little memory; .npz
    and pickles may have 2 GiB. Anything else, such as .gz, is refused.

    Args:
        path: The file.
        labels: Names, such as `read_labels` gives.

    Returns:
        One row a label as the file has it, not normalised, shape (K, E), float32.

    Raises:
        OSError: If the file cannot be read.
        TypeError: If labels is one string, or a label is none.
        ValueError: If there are no labels, the file is damaged or of another form, a needed value is not finite, or it
            lacks a word; the first few are named.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f'labels must be a list of strings, got {shown(labels)}.')
    if not labels:
        raise ValueError('labels must have at least one name, got none.')
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == '.npy':
        return _check_table(_read_array(path), len(labels), path)
    wanted = {name for label in labels for name in (*_names(label), *(form for word in _split(label) for form in word))}
    if suffix in WHOLE:
        if suffix == '.safetensors':
            found = _read_safetensors(path, wanted)
        else:
            found = _rows_of(_read_npz(path) if suffix == '.npz' else read_pickle(path), wanted, path)
        return _check_table(found, len(labels), path) if isinstance(found, Tensor) else _look_up(found, labels, path)
    refuse_other_forms(path)
    read_rows = read_binary_rows if suffix == '.bin' else read_text_rows
    return _look_up(read_rows(path, wanted), labels, path)


def save_word_vectors(path: str | os.PathLike[str], labels: Sequence[str], embeddings: Tensor) -> None:
    """Write embeddings with their names, which `read_word_vectors` reads in an instant and without doubt.

    A small file for training and use is made of any other by
    `save_word_vectors('words.safetensors', labels, read_word_vectors('glove.6B.300d.txt', labels))`.

    Args:
        path: File to write, with the suffix '.safetensors'.
        labels: Different names.
        embeddings: One row a label, shape (K, E), any floating dtype, finite.

    Raises:
        OSError: If the file cannot be written.
        TypeError: If labels is one string, or embeddings are no floats.
        ValueError: If the suffix is another, a label is there twice, or the shape does not fit.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f'labels must be a list of strings, got {shown(labels)}.')
    check_floating(embeddings=embeddings)
    if Path(path).suffix.lower() != '.safetensors':
        raise ValueError(f"path must end in '.safetensors', got {shown(os.fspath(path))}.")
    if len(set(labels)) != len(labels) or not labels:
        raise ValueError(f'labels must be different names, got {len(set(labels))} different among {len(labels)}.')
    if embeddings.ndim != 2 or len(embeddings) != len(labels) or not embeddings.isfinite().all():
        raise ValueError(
            f'embeddings must be finite, of shape ({len(labels)}, E), one row a label, got {tuple(embeddings.shape)}.')
    rows = embeddings.detach().cpu()
    save_file({label: row.clone() for label, row in zip(labels, rows)}, path)


def _names(label: str) -> tuple[str, ...]:
    """What a file may call the whole label, the best first."""
    return label, label.replace(' ', '_'), label.lower(), label.lower().replace(' ', '_')


def _split(label: str) -> list[tuple[str, str]]:
    """What a file may call each word of the label."""
    return [(word, word.lower()) for word in label.replace('_', ' ').split()]


def _look_up(rows: Mapping[str, Row], labels: Sequence[str], path: Path) -> Tensor:
    """One row a label (K, E): the label's own, or the mean of its words'."""
    found: list[Row] = []
    missing: dict[str, str] = {}
    for label in labels:
        whole = _first(rows, _names(label))
        parts = [whole] if whole is not None else [_first(rows, names) for names in _split(label)]
        known = [row for row in parts if row is not None]
        if known and len(known) == len(parts):
            found.append(np.mean(known, axis=0, dtype=np.float32))
        else:
            missing[label] = next((word for (word, _), row in zip(_split(label), parts) if row is None), label)
    if missing:
        words = [shown(word) + (f' of {shown(label)}' if word != label else '') for label, word in missing.items()]
        more = f' and {len(words) - NAMED_AT_MOST} more' if len(words) > NAMED_AT_MOST else ''
        raise ValueError(
            f'{path} lacks words of {len(missing)} of {len(labels)} labels: {", ".join(words[:NAMED_AT_MOST])}{more}; '
            f'rename these labels, or take another file.')
    return torch.from_numpy(np.stack(found))


def _first(rows: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    return next((rows[name] for name in names if name in rows), None)


def _read_array(path: Path) -> Tensor:
    try:
        array = np.lib.format.open_memmap(path, mode='r')  # it reads no pickles
        return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype.kind == 'f' else None))
    except UNREADABLE as error:
        raise ValueError(f'{path} is no NumPy file of numbers: {_reason(error)}.') from error


def _read_safetensors(path: Path, wanted: Collection[str]) -> Tensor | dict[str, Row]:
    """The table of a file that has nothing else, or the wanted rows by name."""
    try:
        with safe_open(path, framework='pt') as file:
            names = list(file.keys())
            if len(names) == 1 and len(file.get_slice(names[0]).get_shape()) == 2:
                return file.get_tensor(names[0])
            found = {name: file.get_tensor(name) for name in names if name in wanted}
    except SafetensorError as error:
        raise ValueError(f'{path} is no safetensors file: {cut(str(error))}.') from error
    return _check_rows(found, path)


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = sum(info.file_size for info in entries)
            other = next((info.filename for info in entries if not info.filename.endswith('.npy')), '')
        if other:
            raise ValueError(f'it has {shown(other)}, which is no array')
        if size > MAX_BYTES:
            raise ValueError(f'unpacked it has {size} bytes, more than {MAX_BYTES}')
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (*UNREADABLE, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'{path} is no NumPy archive of numbers: {_reason(error)}.') from error


def _reason(error: BaseException) -> str:
    return cut(str(error) or type(error).__name__).rstrip('.')


def _rows_of(
        found: np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]], wanted: Collection[str], path: Path,
) -> Tensor | dict[str, Row]:
    """The table, if that is all, or the wanted rows by name."""
    arrays = {'': found} if isinstance(found, np.ndarray) else found
    if len(arrays) == 1 and next(iter(arrays.values())).ndim > 1:
        [table] = arrays.values()
        return torch.from_numpy(_plain(table))
    return _check_rows({name: torch.from_numpy(_plain(arrays[name])) for name in wanted if name in arrays}, path)


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of a dtype that torch has: float32, or zeros that are no floats."""
    return array.astype(np.float32) if array.dtype.kind == 'f' else np.zeros(array.shape, np.int8)


def _check_rows(found: Mapping[str, Tensor], path: Path) -> dict[str, Row]:
    for name, row in found.items():
        if row.ndim != 1 or not row.is_floating_point() or not row.isfinite().all():
            raise ValueError(
                f'{path} must have one row of finite floats a name, got {row.dtype} of shape {tuple(row.shape)} for '
                f'{shown(name)}.')
    if len(lengths := {len(row) for row in found.values()}) > 1:
        raise ValueError(f'{path} must have rows of one length, got {min(lengths)} to {max(lengths)}.')
    return {name: row.float().numpy() for name, row in found.items()}


def _check_table(table: Tensor, num_labels: int, path: Path) -> Tensor:
    if table.ndim == 3 and len(table) == 1:
        table = table[0].T
    if not table.is_floating_point() or table.ndim != 2 or len(table) != num_labels or not table.numel():
        raise ValueError(
            f'{path} must have floats of shape ({num_labels}, E), a row for each of the {num_labels} labels in their '
            f'order, got {table.dtype} of shape {tuple(table.shape)}.')
    if not (finite := table.isfinite().all(1)).all():
        raise ValueError(f'{path} has a value that is not finite in row {int(finite.long().argmin())}.')
    return table.float()
