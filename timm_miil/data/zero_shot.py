"""What a zero-shot network reads: label names from a text file, and their embeddings from files of word vectors."""
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timm_miil._checks import cut, shown
from timm_miil.data._word_vectors import Row, read_binary_rows, read_text_rows, refuse_other_forms

__all__ = ['read_labels', 'read_word_vectors']

NAMED_AT_MOST = 5


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
    - '.safetensors': one tensor (K, E), the rows in the order of the labels, or a tensor (E) a name.
    - '.bin': the binary form of word2vec.
    - else text, one word a line with its numbers behind it: GloVe, fastText, word2vec with its first line.

    In the last three a label is looked up by name: as it is written, with underscores for its spaces, and both in lower
    case. A label that is not there is the mean of its words, each as it is written or in lower case. Of a name that
    occurs twice the first row counts. Files of any size are read with little memory. Pickles
    and archives, such as .pt, .npz and .gz, are refused.

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
    if suffix == '.safetensors':
        found = _read_safetensors(path, wanted)
        return _check_table(found, len(labels), path) if isinstance(found, Tensor) else _look_up(found, labels, path)
    refuse_other_forms(path)
    read_rows = read_binary_rows if suffix == '.bin' else read_text_rows
    return _look_up(read_rows(path, wanted), labels, path)


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
    except (ValueError, TypeError, EOFError, SyntaxError) as error:  # whatever a damaged head leads to
        raise ValueError(f'{path} is no NumPy file of numbers: {cut(str(error)).rstrip(".")}.') from error


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
    for name, row in found.items():
        if row.ndim != 1 or not row.is_floating_point() or not row.isfinite().all():
            raise ValueError(
                f'{path} must have one row of finite floats a name, got {row.dtype} of shape {tuple(row.shape)} for '
                f'{shown(name)}.')
    if len(lengths := {len(row) for row in found.values()}) > 1:
        raise ValueError(f'{path} must have rows of one length, got {min(lengths)} to {max(lengths)}.')
    return {name: row.float().numpy() for name, row in found.items()}


def _check_table(table: Tensor, num_labels: int, path: Path) -> Tensor:
    if not table.is_floating_point() or table.ndim != 2 or len(table) != num_labels or not table.numel():
        raise ValueError(
            f'{path} must have floats of shape ({num_labels}, E), a row for each of the {num_labels} labels in their '
            f'order, got {table.dtype} of shape {tuple(table.shape)}.')
    if not (finite := table.isfinite().all(1)).all():
        raise ValueError(f'{path} has a value that is not finite in row {int(finite.long().argmin())}.')
    return table.float()
