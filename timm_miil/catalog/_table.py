"""Strict reading of TOML: a table that is taken apart key by key, and the kinds of values it may hold."""
import dataclasses
import datetime
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from timm_miil._checks import nearest
from timm_miil._errors import CatalogError

__all__ = [
    'ARXIV', 'CROP_PCT', 'DASHED', 'DATE', 'HTTPS', 'MEAN', 'MODULES', 'NAME', 'NAME_TAG', 'PACKAGED', 'PERCENT',
    'REPO', 'SHA256', 'SHAPE', 'STD', 'TABLE', 'TABLES', 'TEXT', 'TEXTS', 'WHOLE', 'YEAR', 'YES_NO', 'Kind', 'Table',
    'load', 'one_of',
]

T = TypeVar('T')
T_co = TypeVar('T_co', covariant=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind(Generic[T_co]):
    """What a value must be: in words, and as a function that converts it and gives None when it is unfit."""

    expected: str
    convert: Callable[[object], T_co | None]


class Table:
    """One TOML table, taken key by key; `close` then finds the keys nobody asked for.

    Args:
        file: The file, for messages.
        name: Full name of the table, for messages.
        values: Its contents.

    Raises:
        CatalogError: If `values` is not a table.
    """

    def __init__(self, file: Path, name: str, values: object) -> None:
        if not isinstance(values, dict):
            raise CatalogError(f'{file}: [{name}]: got {values!r}, expected a table.')
        self.file, self.name = file, name
        self._values: dict[str, object] = dict(values)
        self._inherited: dict[str, str] = {}
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def inherit(self, other: 'Table') -> None:
        """Take from another table the keys that this one lacks; errors in them name the other."""
        for key, value in other._values.items():
            if key not in self._values:
                self._values[key] = value
                self._inherited[key] = other.name

    def required(self, key: str, kind: Kind[T]) -> T:
        """The converted value of `key`.

        Raises:
            CatalogError: If it is missing or unfit.
        """
        value = self.optional(key, kind)
        if value is None:
            raise self.error(key, kind.expected)
        return value

    def optional(self, key: str, kind: Kind[T]) -> T | None:
        """As `required`, but None when the key is missing."""
        self._known.append(key)
        if key not in self._values:
            return None
        value = kind.convert(self._values[key])
        if value is None:
            raise self.error(key, kind.expected)
        return value

    def error(self, key: str, expected: str) -> CatalogError:
        """An error about the value of `key`, to be raised by the caller."""
        got = repr(self._values[key]) if key in self._values else 'nothing'
        return CatalogError(
            f'{self.file}: [{self._inherited.get(key, self.name)}] {key}: got {got}, expected {expected}.')

    def close(self) -> None:
        """Raise CatalogError when the table has a key that was never asked for."""
        for key in self._values:
            if key not in self._known:
                table = self._inherited.get(key, self.name)
                raise CatalogError(f'{self.file}: [{table}] {key}: unknown key; {nearest(key, set(self._known))}')


def load(file: Path) -> dict[str, object]:
    """Contents of a TOML file.

    Raises:
        CatalogError: If there is no such file, or it is not TOML in UTF-8 (a table given twice included).
    """
    try:
        return tomllib.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise CatalogError(f'{file}: got no such file, expected a file of the catalogue.') from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f'{file}: got {error}, expected TOML in UTF-8.') from error


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value and value.strip() == value else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _matching(pattern: str) -> Callable[[object], str | None]:
    return lambda value: value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _up_to(high: float, *, zero: bool) -> Callable[[object], float | None]:
    """A number in [0, high], or in (0, high] unless `zero`."""
    def convert(value: object) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if 0 <= value <= high and (zero or value > 0) else None
    return convert


def _list_of(item: Callable[[object], T | None]) -> Callable[[object], tuple[T, ...] | None]:
    """A list with at least one item, all of them fit."""
    def convert(value: object) -> tuple[T, ...] | None:
        if not isinstance(value, list) or not value:
            return None
        fit = [converted for converted in map(item, value) if converted is not None]
        return tuple(fit) if len(fit) == len(value) else None
    return convert


def _three(item: Callable[[object], T | None]) -> Callable[[object], tuple[T, T, T] | None]:
    def convert(value: object) -> tuple[T, T, T] | None:
        items = _list_of(item)(value)
        return (items[0], items[1], items[2]) if items is not None and len(items) == 3 else None
    return convert


def _date(value: object) -> str | None:
    try:
        return value if isinstance(value, str) and str(datetime.date.fromisoformat(value)) == value else None
    except ValueError:
        return None


def _packaged(value: object) -> str | None:
    if not isinstance(value, str) or '\\' in value or not value.endswith('.safetensors'):
        return None
    path = PurePosixPath(value)
    return value if str(path) == value and not path.is_absolute() and '..' not in path.parts else None


def _bool(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _dict(value: object) -> dict[str, object] | None:
    return value if isinstance(value, dict) else None


def _year(value: object) -> int | None:
    year = _whole(value)
    return year if year is not None and 1950 <= year <= 2100 else None


def _modules(value: object) -> tuple[str, ...] | None:
    """Dotted names: one string, or a list of them."""
    return _list_of(_matching(r'\w+(\.\w+)*'))([value] if isinstance(value, str) else value)


def one_of(choices: Iterable[str]) -> Kind[str]:
    """One word of a closed choice."""
    known = tuple(choices)
    words = ', '.join(map(repr, known))
    return Kind(f'one of {words}', lambda value: next((word for word in known if word == value), None))


TEXT = Kind('a string, not empty and without outer blanks', _text)
TEXTS = Kind('a list of strings, none empty or with outer blanks', _list_of(_text))
NAME = Kind("a word of lower-case letters, digits and '_'", _matching(r'[a-z0-9_]+'))
DASHED = Kind("words of lower-case letters and digits, joined by '-'", _matching(r'[a-z0-9]+(-[a-z0-9]+)*'))
NAME_TAG = Kind(
    "'architecture.tag', words of lower-case letters, digits and '_'", _matching(r'[a-z0-9_]+\.[a-z0-9_]+'))
MODULES = Kind('the dotted name of a module, or a list of them', _modules)
ARXIV = Kind("an arXiv identifier without a version, such as '2111.12933'", _matching(r'\d{4}\.\d{4,5}'))
HTTPS = Kind("a URL that starts with 'https://'", _matching(r'https://[^/\s]+/\S+'))
REPO = Kind("'owner/name'", _matching(r'[\w.-]+/[\w.-]+'))
SHA256 = Kind('64 hexadecimal digits in lower case', _matching(r'[0-9a-f]{64}'))
DATE = Kind("a day as 'YYYY-MM-DD'", _date)
PACKAGED = Kind("the path of a '.safetensors' file below the package, with '/' and without '..'", _packaged)
WHOLE = Kind('a whole number of at least 1', _whole)
YEAR = Kind('a year from 1950 to 2100', _year)
YES_NO = Kind('true or false', _bool)
PERCENT = Kind('a number in [0, 100]', _up_to(100, zero=True))
CROP_PCT = Kind('a number in (0, 1]', _up_to(1, zero=False))
MEAN = Kind('three numbers in [0, 1]', _three(_up_to(1, zero=True)))
STD = Kind('three numbers in (0, 1]', _three(_up_to(1, zero=False)))
SHAPE = Kind('[channels, height, width], whole numbers of at least 1', _three(_whole))
TABLE = Kind('a table', _dict)
TABLES = Kind('a list of tables', _list_of(_dict))
