"""Words for people: safe to show on a terminal, in columns."""
from collections.abc import Iterable, Sequence

__all__ = ['columns', 'printable']


def printable(text: object) -> str:
    """The text with control characters escaped: names of files and labels may come from anyone."""
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape', 'backslashreplace').decode()
        for char in str(text))


def columns(rows: Iterable[Sequence[object]]) -> str:
    """Rows as lines with aligned columns, two spaces apart."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ''.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + '\n' for row in cells)
