"""Reader of pictures in folders that are named by their label: `<split>/<label>/**` or `<label>/**`.

Each picture shows one label, and all others are absent.
"""
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from timm_miil._checks import shown
from timm_miil.data._files import few, is_folder
from timm_miil.data._labels import LabelColumns
from timm_miil.data._packed import PackedPaths
from timm_miil.data.images import IMAGE_SUFFIXES, walk_images
from timm_miil.data.records import MultiLabelRecords
from timm_miil.data.targets import SparseTargets

__all__ = ['list_splits', 'read_split']

SPLITS = frozenset({'train', 'training', 'val', 'valid', 'validation', 'dev', 'test', 'testing'})


def list_splits(data_dir: Path) -> tuple[str, ...]:
    """The folders that are named like splits and hold folders; 'train' if there are none, only folders of labels."""
    folders = _folders(data_dir)
    splits = [name for name in folders if name in SPLITS and not _has_pictures(data_dir / name)]
    if splits:
        return tuple(splits)
    # A single folder of pictures is some other format's, or a data set without labels.
    return ('train',) if len(folders) > 1 and any(_has_pictures(data_dir / name) for name in folders) else ()


def read_split(
        data_dir: Path,
        split: str,
        *,
        labels: Sequence[str] | None = None,
        ignore_unknown_labels: bool = False,
) -> MultiLabelRecords:
    """Read the pictures of a split; without folders for splits all of them are 'train'.

    Args:
        data_dir: The data set's folder.
        split: Name of its folder.
        labels: The columns; None for the names of the folders in the split, sorted.
        ignore_unknown_labels: Whether folders that are not among `labels` are passed over.

    Returns:
        Pictures by label and path, at any depth below a label's folder. Names that start with a dot do not count.

    Raises:
        FileNotFoundError: If there are no pictures.
        OSError: If a folder cannot be listed.
        ValueError: If a folder is not among `labels`, or pictures lie beside the folders of labels.
    """
    root = data_dir / split if split in _folders(data_dir) and not _has_pictures(data_dir / split) else data_dir
    folders = _folders(root)
    if root == data_dir and SPLITS.issuperset(folders):
        raise ValueError(
            f'{data_dir} has folders {", ".join(folders)} with pictures and no folders of labels in them; move each '
            f'picture to <split>/<label>/.')
    if beside := _pictures(root):
        raise ValueError(
            f'{root} has {len(beside)} pictures beside the folders of labels: {few(map(shown, beside), len(beside))}; '
            f'move each to the folder of its label.')
    columns = LabelColumns(labels, ignore_unknown=ignore_unknown_labels)
    kept = [folder for folder in folders if columns.find(folder, 'a folder') >= 0]
    label_names, place = columns.finish(root)
    counts: list[int] = []
    paths = PackedPaths(_walk(root, kept, counts), root)
    if not len(paths):
        raise FileNotFoundError(f'{root} has no pictures; these are files {" ".join(sorted(IMAGE_SUFFIXES))}.')
    targets = SparseTargets.from_entries(
        np.arange(len(paths)), np.repeat(place[[columns.known[folder] for folder in kept]], counts), 1,
        shape=(len(paths), len(label_names)))
    return MultiLabelRecords(paths, targets, label_names)


def _walk(root: Path, folders: Sequence[str], counts: list[int]) -> Iterator[str]:
    """Names of the pictures below some folders, and in `counts` how many each of these has."""
    start, suffixes = os.path.join(root, ''), tuple(IMAGE_SUFFIXES)
    for folder in folders:
        counts.append(0)
        for path in walk_images(start + folder):
            if not path.lower().endswith(suffixes):  # a folder comes out of the search if it cannot be listed
                raise OSError(f'cannot list the folder {path!r}.')
            counts[-1] += 1
            yield path[len(start):]


def _folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith('.') and is_folder(entry))


def _pictures(folder: Path) -> list[str]:
    """Sorted names of the pictures in a folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_picture(entry))


def _has_pictures(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_picture(entry) for entry in entries)


def _is_picture(entry: 'os.DirEntry[str]') -> bool:
    return (
        not entry.name.startswith('.') and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
        and not is_folder(entry))
