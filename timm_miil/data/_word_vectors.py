"""Readers of word-vector files, a row at a time: text (GloVe, word2vec, fastText) and word2vec's binary form.

Both are streamed, so that memory holds the wanted rows only, however large the file. Nothing in a file is trusted:
every row is measured, and what is kept must be numbers.
"""
import itertools
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from timm_miil._checks import shown

__all__ = ['Row', 'read_binary_rows', 'read_text_rows', 'refuse_other_forms']

MAX_DIM = 1 << 16
MAX_HEADER_BYTES = 64
MAX_LINE_BYTES = 1 << 21  # MAX_DIM numbers of 30 characters, and a word
READ_BYTES = 1 << 20
OTHER_FORMS = MappingProxyType({
    b'PK\x03\x04': 'a zip archive, as .npz and .pt files are', b'\x80': 'a pickle, as .pkl files are',
    b'\x1f\x8b': 'compressed by gzip', b'\x89HDF': 'an HDF5 file'})
"""What files that are neither text nor word2vec's binary form begin with."""

Row = np.ndarray[tuple[int], np.dtype[np.float32]]


def refuse_other_forms(path: Path) -> None:
    """Raise ValueError, with the forms that are read, if a file begins like one of another form."""
    with open(path, 'rb') as file:
        head = file.read(MAX_HEADER_BYTES)
    for start, words in OTHER_FORMS.items():
        if head.startswith(start):
            raise ValueError(
                f'{path} is {words}, which its name does not say; name it so, or give text (.txt, .vec), the binary '
                f'form of word2vec (.bin), or an array (K, E) by numpy.save (.npy) or save_file (.safetensors).')


def read_text_rows(path: Path, wanted: Collection[str]) -> dict[str, Row]:
    """The rows of the wanted words, of which a file has one a line: the word, and numbers between single spaces.

    A first line of two whole numbers is word2vec's header: the number of rows, and of numbers in one.
    """
    keys = set(wanted)
    found: dict[str, Row] = {}
    with open(path, 'rb') as file:
        header, dim, rows = _read_header(file), 0, 0
        if header is None:
            file.seek(0)
        else:
            dim = header[1]
        for number in itertools.count(1 if header is None else 2):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                break
            where = f'{path}, line {number}'
            if not line.endswith(b'\n') and len(line) == MAX_LINE_BYTES:
                raise ValueError(f'{where} is longer than {MAX_LINE_BYTES} bytes; this is no text of word vectors.')
            line = line.rstrip()
            if not line:
                continue
            rows += 1
            dim = dim or line.count(b' ')
            key, *values = line.rsplit(b' ', dim) if dim else (b'',)  # a few words of GloVe have spaces
            if len(values) != dim or not key:
                expected = f'{dim} numbers, as the lines before' if rows > 1 or header else 'numbers'
                raise ValueError(f'{where} must have a word and {expected}, got {_show(line)}.')
            try:
                word = key.decode()
            except UnicodeDecodeError:
                raise ValueError(
                    f'{where} is not UTF-8; convert the file, or name it .bin if it is in the binary form of '
                    f'word2vec.') from None
            if word in keys and word not in found:
                found[word] = _to_row(values, where)
    if header is not None and rows != header[0]:
        raise ValueError(f'{path} must have the {header[0]} rows that its first line says, got {rows}; it is damaged.')
    return found


def read_binary_rows(path: Path, wanted: Collection[str]) -> dict[str, Row]:
    """The rows of the wanted words, of which word2vec's binary form has each as the word, a space and float32 values.

    The first line has the number of rows, and of numbers in one. Words that are no UTF-8 are passed over.
    """
    keys = {word.encode(errors='surrogateescape'): word for word in wanted}
    found: dict[str, Row] = {}
    with open(path, 'rb') as file:
        header = _read_header(file)
        if header is None:
            raise ValueError(
                f'{path} must begin with a line of two numbers, as the binary form of word2vec does; name a file of '
                f'text .txt.')
        num_rows, num_bytes = header[0], 4 * header[1]
        buffer, start = b'', 0
        for row in range(num_rows):
            while (end := buffer.find(b' ', start)) < 0 or len(buffer) < end + 1 + num_bytes:
                block = file.read(READ_BYTES) if end >= 0 or len(buffer) - start < MAX_LINE_BYTES else b''
                if not block:
                    raise ValueError(f'{path} ends within row {row + 1} of {num_rows}; it is damaged, or no such file.')
                buffer, start = buffer[start:] + block, 0
            word = keys.get(buffer[start:end].lstrip(b'\n'))
            start = end + 1 + num_bytes
            if word is not None and word not in found:
                values = np.frombuffer(buffer, '<f4', header[1], end + 1).astype(np.float32)
                found[word] = _check_row(values, f'{path}, row {row + 1}')
        rest = buffer[start:] + file.read(READ_BYTES)
    if rest.strip():
        raise ValueError(f'{path} goes on after the {num_rows} rows that its first line says; it is damaged.')
    return found


def _read_header(file: BinaryIO) -> tuple[int, int] | None:
    """Rows and numbers a row, if the first line has these."""
    line = file.readline(MAX_HEADER_BYTES)
    words = line.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    num_rows, dim = map(int, words)
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(f'{file.name}: a row must have 1 to {MAX_DIM} numbers, got a first line of {_show(line)}.')
    return num_rows, dim


def _to_row(values: list[bytes], where: str) -> Row:
    try:
        with np.errstate(over='ignore'):
            row = np.array([float(value) for value in values], np.float32)
    except ValueError as error:
        raise ValueError(f'{where} must have numbers after its word, and {error}.') from None
    return _check_row(row, where)


def _check_row(row: Row, where: str) -> Row:
    if not np.isfinite(row).all():
        raise ValueError(f'{where} has a value that is not finite.')
    return row


def _show(line: bytes) -> str:
    return shown(line.decode(errors='replace').rstrip())
