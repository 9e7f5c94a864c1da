"""Settings as frozen dataclasses: read strictly from TOML's tables, and written back to TOML."""
import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, cast

from timm_miil._checks import nearest, shown
from timm_miil._errors import RecipeError

__all__ = ['NONE', 'as_table', 'is_text', 'parse_value', 'read_settings', 'write_toml']

NONE = 'none'  # what stands for a table that is left out; TOML has no word for it

_BARE_KEY = re.compile(r'[A-Za-z0-9_-]+')

_Settings = typing.TypeVar('_Settings')


def read_settings(kind: type[_Settings], table: Mapping[str, Any], source: str, prefix: str = '') -> _Settings:
    """Build settings from a table; anything unknown, missing or ill-typed is an error that names it.

    Args:
        kind: A dataclass whose fields are bool, int, float, str, tuples and mappings of them, or such dataclasses, each
            possibly None.
        table: Values by field.
        source: What errors name: a recipe, a file.
        prefix: The dotted keys that lead to the table, with a dot at the end.

    Raises:
        RecipeError: If the table does not fit, or `kind` refuses a value.
    """
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in fields:
            raise RecipeError(f'{source}: unknown key {prefix + key!r}; {nearest(key, fields)}')
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], source, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f'{source}: {prefix + name!r} is missing.')
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f'{source}: {prefix}{error}') from error


def as_table(settings: Any) -> dict[str, Any]:
    """The table that `read_settings` makes these settings of; what is None is left out."""
    return {
        field.name: as_table(value) if dataclasses.is_dataclass(value) else _copied(value)
        for field in dataclasses.fields(settings) for value in [getattr(settings, field.name)] if value is not None}


def parse_value(text: str) -> object:
    """A value in TOML's notation; what is none is a bare word, such as adamw for "adamw"."""
    try:
        table = tomllib.loads(f'value = {text}')
    except tomllib.TOMLDecodeError:
        return text
    return table['value'] if len(table) == 1 else text


def is_text(kind: Any, key: str) -> bool:
    """Whether the setting with a dotted key is text, so that a number there is one too."""
    first, _, rest = key.partition('.')
    hint: Any = typing.get_type_hints(kind).get(first)
    if isinstance(hint, types.UnionType):  # X | None
        hint = typing.get_args(hint)[0]
    return is_text(hint, rest) if rest and dataclasses.is_dataclass(hint) else hint is str and not rest


def write_toml(table: Mapping[str, Any]) -> str:
    """The table as a TOML file, which reads back as the same table."""
    return '\n'.join(_lines(table, ())) + '\n'


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        return None if value == NONE else _convert(typing.get_args(hint)[0], value, source, key)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return read_settings(cast(Any, hint), value, source, f'{key}.')
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, list | tuple) and kinds[-1] is ...:
            return tuple(_convert(kinds[0], item, source, key) for item in value)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_convert(kind, item, source, key) for kind, item in zip(kinds, value))
        wanted = 'a list of texts' if kinds[-1] is ... else f'a list of {len(kinds)} numbers'
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif typing.get_origin(hint) is Mapping and isinstance(value, dict):
        _check_plain(value, source, key)
        return _copied(value)
    else:
        wanted = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}.get(hint, 'a table')
    raise RecipeError(f'{source}: {key!r} must be {wanted}, got {shown(value)}.')


def _check_plain(value: object, source: str, key: str) -> None:
    """Dates are TOML too, and nothing that anyone means."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(item, source, f'{key}.{name}')
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, source, key)
    elif type(value) not in (bool, int, float, str):
        raise RecipeError(
            f'{source}: {key!r} must be true or false, a number, text, a list or a table, got {shown(value)}.')


def _copied(value: Any) -> Any:
    """A copy that shares no list or table."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Values first: below the head of a table all belongs to it."""
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f'{_key(key)} = {_value(value)}'
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = (*path, key)
            yield from ('', f'[{".".join(map(_key, inner))}]')
            yield from _lines(value, inner)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace('\x7f', '\\u007f')  # the one escape that JSON lacks
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items()) + '}'
    if isinstance(value, list | tuple):
        return '[' + ', '.join(map(_value, value)) + ']'
    return repr(value)
