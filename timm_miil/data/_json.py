"""Tables of a large JSON file, read row by row: no more of the text is in memory than the row at hand needs."""
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from timm_miil._checks import cut

__all__ = ['Columns', 'read_columns']

Columns = dict[str, list[Any]]
"""The values of each column that was asked for, in the order of the rows."""

CHUNK = 1 << 20  # characters

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r'[ \t\n\r]*')
_REST_OF_NUMBER = re.compile(r'[-+.eE0-9]*')


def read_columns(path: Path, tables: Mapping[str, Mapping[str, type]]) -> dict[str, Columns]:
    """Some columns of the lists of objects that a JSON object holds; all else is passed over.

    Args:
        path: Of the file.
        tables: The lists by name, and the type of each of their columns.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no JSON, lacks a list, or a row lacks a column or has another type there.
    """
    found: dict[str, Columns] = {}
    with open(path, encoding='utf-8-sig', newline='') as file:
        text = _Text(file)
        try:
            if text.peek() != '{':
                kind = type(text.value()).__name__
                text.end()
                raise _Refused(f'{path} must hold a JSON object with {", ".join(tables)}, got {kind}.')
            for table in text.members():
                if table in tables and text.peek() == '[':
                    found[table] = _read_table(text, table, tables[table], path)
                else:
                    text.value()
                    found.pop(table, None)  # the last of a name counts, as json has it
            text.end()
        except (ValueError, RecursionError) as error:
            if isinstance(error, _Refused):
                raise
            raise ValueError(f'{path} is not a JSON file: {cut(str(error))}.') from error
    for table in tables:
        if table not in found:
            there = ', '.join(name for name in tables if name in found) or 'none'
            raise ValueError(f'{path} has no list {table!r}; of {", ".join(tables)} it has {there}.')
    return found


def _read_table(text: '_Text', table: str, columns: Mapping[str, type], path: Path) -> Columns:
    values: Columns = {column: [] for column in columns}
    wanted = [(column, kind, values[column].append) for column, kind in columns.items()]
    for number, row in enumerate(text.elements()):
        for column, kind, append in wanted:
            value = row.get(column) if isinstance(row, dict) else None
            if type(value) is not kind:  # not isinstance: True is no number here
                raise _Refused(f'{path}: {table}[{number}] must have {column!r} of type {kind.__name__}.')
            append(value)
    return values


class _Refused(ValueError):
    """The file is JSON, and not of the form that is read."""


class _Text:
    """A JSON text, of which a part is in memory and a place in that is where reading has come to."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.part, self.place = '', 0
        self.before = 0  # characters in front of the part

    def peek(self) -> str:
        """The next character that is no white space; '' at the end."""
        while True:
            self.place = _SPACE.match(self.part, self.place).end()  # type: ignore[union-attr]  # it matches nothing too
            if self.place < len(self.part) or not self._read_on():
                return self.part[self.place:self.place + 1]

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.part, self.place)
            except json.JSONDecodeError as error:
                where = self.before + error.pos
                if not self._read_on():
                    raise ValueError(f'{error.msg} at character {where}') from error
            else:
                # A number may go on behind the part; of `-0.` and `1e+` that ends in one, the decoder takes the digits.
                rest = _REST_OF_NUMBER.match(self.part, end).end()  # type: ignore[union-attr]
                if rest < len(self.part) or not self._read_on():
                    self.place = end
                    return value

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self._take('[')
        if self.peek() == ']':
            self._take(']')
            return
        while True:
            yield self.value()
            if self._take(',]') == ']':
                return

    def members(self) -> Iterator[str]:
        """The names of the object that begins here; behind each its value is to be read."""
        self._take('{')
        if self.peek() == '}':
            self._take('}')
            return
        while True:
            if self.peek() != '"':
                self._refuse('"')
            name = self.value()
            self._take(':')
            yield name
            if self._take(',}') == '}':
                return

    def end(self) -> None:
        """Raise ValueError unless nothing follows."""
        if self.peek():
            self._refuse('')

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            self._refuse(expected)
        self.place += 1
        return found

    def _refuse(self, expected: str) -> None:
        words = ' or '.join(expected) or 'the end'
        raise ValueError(f'expected {words} at character {self.before + self.place}, got {self.peek() or "the end"}')

    def _read_on(self) -> bool:
        """Take more of the file, as much as is left of the part at least; False at its end."""
        left = self.part[self.place:]
        more = self.file.read(max(CHUNK, len(left)))
        self.part, self.before, self.place = left + more, self.before + self.place, 0
        return bool(more)
