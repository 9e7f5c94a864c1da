"""Two tables of measurements, case by case."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_miil.bench.cases import CASE_COLUMNS

__all__ = ['Change', 'compare_tables']


@dataclass(frozen=True)
class Change:
    """A case that both tables have.

    Attributes:
        case: Its cells, in the order of `CASE_COLUMNS`.
        before_ms: Median before, in milliseconds.
        after_ms: Median now.
        ratio: Now by before; above 1 is slower.
        is_slower: Whether it is slower beyond the spread: the first quartile now is above the third of before.
    """

    case: tuple[str, ...]
    before_ms: float
    after_ms: float
    ratio: float
    is_slower: bool


def compare_tables(
        before: Sequence[Mapping[str, object]], after: Sequence[Mapping[str, object]]) -> list[Change]:
    """Compare the cases that were measured in both tables.

    Args:
        before: Rows of an earlier measurement.
        after: Rows of the present one.

    Returns:
        The changes in the order of `after`; cases that only one table has are left out.

    Raises:
        ValueError: If the earlier table has no rows, or a table lacks a column.
    """
    if not before:
        raise ValueError('before must be a table of `timm-miil bench`, got one without rows.')
    needed = {*CASE_COLUMNS, 'status', 'median_ms', 'q1_ms', 'q3_ms'}
    for name, rows in (('before', before), ('after', after)):
        missing = sorted(needed - rows[0].keys()) if rows else []
        if missing:
            raise ValueError(f'{name} must be a table of `timm-miil bench`, got one without {", ".join(missing)}.')
    known = {_case(row): row for row in before if _is_measured(row)}
    return [_change(known[_case(row)], row) for row in after if _is_measured(row) and _case(row) in known]


def _case(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in CASE_COLUMNS)


def _is_measured(row: Mapping[str, object]) -> bool:
    return row['status'] == 'ok' and row['median_ms'] != ''


def _change(before: Mapping[str, object], after: Mapping[str, object]) -> Change:
    old, new = (float(str(row['median_ms'])) for row in (before, after))
    is_slower = float(str(after['q1_ms'])) > float(str(before['q3_ms']))
    return Change(_case(after), old, new, new / old, is_slower)
