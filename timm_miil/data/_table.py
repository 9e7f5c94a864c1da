"""Tables in text files, read row by row and strictly: every error names file and line."""
import csv
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm_miil._checks import shown
from timm_miil.data.images import IMAGE_SUFFIXES

__all__ = ['Table', 'open_table', 'plain']

DELIMITERS = (',', ';', '\t', '|')
SNIFF_LINES = 100
# What a first column of pictures may be called, in lower case without '_', '-' and spaces.
IMAGE_COLUMNS = frozenset({
    'file', 'filename', 'filepath', 'files', 'id', 'image', 'imagefile', 'imageid', 'imagename', 'imagepath', 'images',
    'img', 'imgid', 'imgname', 'imgpath', 'name', 'path', 'picture'})


@dataclass(frozen=True)
class Table:
    """A text file of rows.

    Args:
        path: The file.
        delimiter: One character between fields; a field that holds it is in double quotes.
        header: Names of the columns from the first row; None if there is no such row.
    """
    path: Path
    delimiter: str
    header: tuple[str, ...] | None

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row below the header, with the number of its last line; empty lines are passed over.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not UTF-8, quotes do not match, or rows have different numbers of fields.
        """
        width, first = 0, self.header is not None
        for line, row in _read(self.path, self.delimiter):
            width = width or len(row)
            if len(row) != width:
                raise ValueError(
                    f'{self.path}, line {line}: {len(row)} fields where the first row has {width}; put a field that '
                    f'holds {self.delimiter!r} in double quotes.')
            if first:
                first = False
            else:
                yield line, row

    def column(self, names: frozenset[str]) -> int:
        """Number of the column with one of these names, as `plain` writes them; -1 if there is none."""
        return next((number for number, name in enumerate(self.header or ()) if plain(name) in names), -1)

    def named_column(self, name: str, option: str) -> int:
        """Number of the column that an option names.

        Raises:
            ValueError: If there is no such column.
        """
        if self.header is None or name not in self.header:
            there = ', '.join(map(repr, self.header)) if self.header else 'no header'
            raise ValueError(f'{self.path} has no column {name!r} for option {option}; it has {there}.')
        return self.header.index(name)


def open_table(path: Path, *, delimiter: str = '', header: bool | None = None) -> Table:
    """Find out what divides fields, and whether the first row names the columns.

    Args:
        path: The file.
        delimiter: One character; '' for the only one of , ; tab and | that divides the first rows equally.
        header: Whether the first row names the columns. None: it does if its first field is a usual name of a column
            of pictures, and does not if that is a picture file's name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is empty or not UTF-8, or either cannot be told.
    """
    if len(delimiter) > 1:
        raise ValueError(f'delimiter must be one character, got {shown(delimiter)}.')
    delimiter = delimiter or _find_delimiter(path)
    line, first = next(_read(path, delimiter), (0, ['']))
    if not line:
        raise ValueError(f'{path} is empty; it must have a row a picture.')
    if header is None:
        is_name = os.path.splitext(first[0])[1].lower() in IMAGE_SUFFIXES
        header = plain(first[0]) in IMAGE_COLUMNS
        if not header and not is_name:
            raise ValueError(
                f'{path}, line {line}: the first field must be a picture file, or the name of their column such as '
                f"'image', got {shown(first[0])}; give header=True or header=False.")
    return Table(path, delimiter, tuple(name.strip() for name in first) if header else None)


def plain(name: str) -> str:
    """A column's name in lower case, without spaces, '_' and '-'."""
    return name.strip().lower().translate({ord(char): None for char in ' _-'})


def _read(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with open(path, encoding='utf-8-sig', newline='') as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except UnicodeDecodeError:
            raise ValueError(f'{path}, after line {reader.line_num}: not UTF-8; save the file as UTF-8.') from None
        except csv.Error as error:
            raise ValueError(f'{path}, line {reader.line_num}: {error}.') from error


def _find_delimiter(path: Path) -> str:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            lines = list(itertools.islice(file, SNIFF_LINES))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 at byte {error.start}; save the file as UTF-8.') from None
    widths = {
        delimiter: [len(row) for row in csv.reader(lines, delimiter=delimiter) if row] for delimiter in DELIMITERS}
    dividing = [delimiter for delimiter in DELIMITERS if widths[delimiter] and widths[delimiter][0] > 1]
    fitting = [delimiter for delimiter in dividing if len(set(widths[delimiter])) == 1]
    # One that divides the first row, but not all alike: what is wrong is a row, and reading will say which.
    found = fitting or dividing
    if len(found) != 1 and widths[DELIMITERS[0]]:
        said = f'{" and ".join(map(repr, found))} may' if found else 'none does'
        raise ValueError(
            f'{path}: one of {" ".join(map(repr, DELIMITERS))} must divide fields, and {said}; give delimiter, or put '
            f'fields that hold it in double quotes.')
    return found[0] if found else DELIMITERS[0]
