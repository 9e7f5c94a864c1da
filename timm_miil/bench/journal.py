"""Rows on disk as they are measured, so that a run that was stopped goes on."""
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from timm_miil._atomic import write_file
from timm_miil._checks import shown

__all__ = ['Journal', 'read_table', 'write_table']

Row = dict[str, object]
SAME_PLACE = 'cpu', 'gpu', 'driver', 'threads', 'python', 'torch', 'timm', 'commit'


class Journal:
    """A file of rows, one JSON object a line, that is only ever appended to.

    Args:
        path: The file; it is made if it is not there. What a killed run has left of a last line is cut off.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b''
        whole = content[:content.rfind(b'\n') + 1]
        self.rows: list[Row] = [_parse(line, self.path) for line in whole.splitlines()]
        if whole != content:
            os.truncate(self.path, len(whole))

    def find(self, columns: Mapping[str, object], stamp: Mapping[str, object]) -> Row | None:
        """The last row of these cells that was measured in the same place by the same code, or None."""
        wanted = dict(columns) | {name: stamp[name] for name in SAME_PLACE}
        return next((row for row in reversed(self.rows) if wanted.items() <= row.items()), None)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; they are on disk when this returns."""
        new = list(rows)
        with self.path.open('a', encoding='utf-8') as file:
            file.write(''.join(json.dumps(row) + '\n' for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows += new


def _parse(line: bytes, path: Path) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{path} must hold one JSON object a line, got {shown(line)}; remove it.') from error
    if not isinstance(row, dict):
        raise ValueError(f'{path} must hold one JSON object a line, got {shown(row)}; remove it.')
    return row


def write_table(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, whole or not at all; columns are in the order in which rows first have them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Read rows of a CSV file; all cells are text."""
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))
