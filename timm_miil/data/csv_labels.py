"""Reader of pictures that are listed in CSV files, in one of three forms.

- wide: a row a picture, a column a label, with 1 for present, 0 for absent, -1 or nothing for unknown::

      image,cat,dog
      a.jpg,1,0

- list: a row a picture, its present labels in one field, divided by ; or | (or written as ['cat', 'dog'])::

      image,labels
      a.jpg,cat;dog

- long: a row a label of a picture, present without a third column, which may say 1, 0 or -1::

      image,label,confidence
      a.jpg,cat,1
      a.jpg,dog,0

Open Images' label files have the last form; they have a reader of their own.
"""
from collections.abc import Sequence
from pathlib import Path

from timm_miil._checks import shown
from timm_miil.data._csv_forms import Form, find_layout, read_list, read_long, read_wide
from timm_miil.data._entries import Pictures
from timm_miil.data._files import find_folder
from timm_miil.data._labels import LabelColumns
from timm_miil.data._table import open_table
from timm_miil.data.records import MultiLabelRecords, files_of

__all__ = ['list_splits', 'read_split']

USUAL_FILE = '{split}.csv'
USUAL_SPLITS = frozenset({'train', 'training', 'val', 'valid', 'validation', 'dev', 'test', 'testing'})
SPLIT_COLUMNS = frozenset({'split', 'splitname', 'subset'})


def list_splits(data_dir: Path, *, file: str = '', delimiter: str = '', header: bool | None = None) -> tuple[str, ...]:
    """The splits that have a file, or the words in a column `split` if one file has all of them.

    Args:
        data_dir: The data set's folder.
        file: As of `read_split`.
        delimiter: As of `read_split`.
        header: As of `read_split`.

    Raises:
        ValueError: If `file` names one table that cannot be read.
    """
    if file and '{split}' not in file:
        return _splits_in(data_dir / file, delimiter, header) if (data_dir / file).is_file() else ()
    before, _, after = (file or USUAL_FILE).partition('{split}')
    found = (path.relative_to(data_dir).as_posix() for path in data_dir.glob(f'{before}*{after}'))
    names = sorted(name.removeprefix(before).removesuffix(after) for name in found)
    # Any folder may have some CSV file; without `file` at least one must be named like a split.
    return tuple(names) if file or not USUAL_SPLITS.isdisjoint(names) else ()


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
        file: str = '',
        image_dir: str = '',
        image_suffix: str = '',
        form: Form = 'auto',
        delimiter: str = '',
        header: bool | None = None,
        separator: str = '',
        image_column: str = '',
        label_column: str = '',
        confidence_column: str = '',
        unlisted: int | None = None,
        drop_missing: bool = False,
) -> MultiLabelRecords:
    """Read a CSV file; its delimiter, header and form are told from its content.

    Args:
        data_dir: The data set's folder.
        split: Name of the split.
        labels: The columns; None for those of the wide form's header, or all labels that occur, sorted.
        ignore_unknown_labels: Whether labels that are not among `labels` are passed over.
        file: Relative to the folder, with '{split}' for the split's name; '' for '{split}.csv'. A file for all splits
            may have a column 'split'; one that has none is 'train'.
        image_dir: Folder that the pictures' names are relative to, with '{split}' for the split's name; '' for the
            data set's.
        image_suffix: What the pictures' names lack, such as '.jpg'.
        form: 'wide', 'list' or 'long'. 'auto': a header with a column 'labels' is that of a list, one with 'label'
            that of the long form, any other that of the wide form.
        delimiter: Between fields; '' to find it.
        header: Whether the first row names the columns; None to find out.
        separator: Between the labels of a list; '' for ; or |, whichever occurs.
        image_column: Name of the column of pictures; '' for the first.
        label_column: Name of the column of labels; '' for the usual names, or the second.
        confidence_column: Name of the column of confidences; '' for the usual names, or the third.
        unlisted: Label, 0 or -1, of what a list or the long form does not mention; None for -1 if there are
            confidences, else 0.
        drop_missing: Whether pictures without a file are left out, with a warning, and are no error.

    Returns:
        Pictures in the order of the file.

    Raises:
        FileNotFoundError: If the file or pictures are missing; the first few are named.
        ValueError: If the file is wrong, with the line, or its form cannot be told.
    """
    if unlisted not in (None, 0, -1):
        raise ValueError(f'unlisted must be 0 or -1, got {shown(unlisted)}.')
    file = file or USUAL_FILE
    table = open_table(data_dir / file.replace('{split}', split), delimiter=delimiter, header=header)
    layout = find_layout(
        table, form, image_column=image_column, label_column=label_column, confidence_column=confidence_column,
        split_column=-1 if '{split}' in file else table.column(SPLIT_COLUMNS), split=split)
    pictures = Pictures(table.path)
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    if layout.form == 'wide':
        if unlisted is not None:
            raise ValueError(f'{table.path} has the wide form, which lists all labels; leave out unlisted.')
        targets, label_names = read_wide(layout, pictures, columns)
    elif layout.form == 'list':
        targets, label_names = read_list(layout, pictures, columns, separator=separator, unlisted=unlisted or 0)
    else:
        targets, label_names = read_long(layout, pictures, columns, unlisted=unlisted)
    folder = find_folder(data_dir, image_dir, split, ('.',))
    names = [name + image_suffix for name in pictures.names]
    return files_of(folder, names, targets, label_names, table.path, drop_missing=drop_missing)


def _splits_in(path: Path, delimiter: str, header: bool | None) -> tuple[str, ...]:
    """The words in a table's column of splits; 'train' if it has none."""
    table = open_table(path, delimiter=delimiter, header=header)
    column = table.column(SPLIT_COLUMNS)
    return ('train',) if column < 0 else tuple(sorted({row[column].strip() for _, row in table.rows()}))
