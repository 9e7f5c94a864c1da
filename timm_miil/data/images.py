"""Finding picture files and reading any of them as 8-bit RGB.

One place decides what an odd picture looks like: EXIF rotation is applied, transparency lies on white, more
than 8 bits are scaled (never clipped), the first frame of an animation counts, colour profiles are ignored.
"""
import io
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from timm_miil._checks import check_paths
from timm_miil._errors import ImageError
from timm_miil.data._files import is_folder

__all__ = ['IMAGE_SUFFIXES', 'decode_image', 'find_images', 'load_image', 'walk_images']

IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff'})
_SUFFIXES = tuple(IMAGE_SUFFIXES)

# What Pillow may try. Its other readers are rarely met and some start programs (EPS runs Ghostscript).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')
# Some readers take the whole file into memory; no picture within Pillow's pixel limit needs as much.
_MAX_FILE_BYTES = 2 ** 30
# What may stand for white in pictures of 32 bits; one that fits none of its mode's is stretched.
_RANGES = {'I': (65535.0,), 'F': (1.0, 255.0, 65535.0)}

# How to turn a picture upright by its EXIF orientation. Not by `ImageOps.exif_transpose`: that also writes
# the metadata anew, which fails on some that read well.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# The folders from a root down to one folder, innermost first, as (device, inode) pairs.
_Chain = tuple[tuple[int, int], '_Chain'] | None


def find_images(
        paths: Iterable[str | os.PathLike[str]],
        *,
        exclude: Collection[str | os.PathLike[str]] = (),
        suffixes: Collection[str] = IMAGE_SUFFIXES,
) -> Iterator[Path]:
    """List pictures: files as given, folders with everything below them.

    A folder gives its files with a suffix in `suffixes` (in any case) by name, then its subfolders by
    name. Names that start with a dot are passed over; symbolic links are followed, but never back into a folder
    that is being listed. A file named in `paths` is taken whatever its suffix. A folder that cannot be listed
    comes out itself, so that reading it reports why.

    Args:
        paths: Files and folders, relative or absolute.
        exclude: Folders not to enter, such as one that is being written.
        suffixes: Of the files to find, in lower case.

    Returns:
        An iterator that holds the names of one folder (and of the folders still to list) at a time.

    Raises:
        FileNotFoundError: Before anything is listed, if one of `paths` does not exist.
        TypeError: If `paths` is a single path.
    """
    check_paths(paths=paths)
    roots = [Path(path) for path in paths]
    for root in roots:
        try:
            root.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f'no such file or folder: {str(root)!r}.') from None
    excluded = {_identity(folder) for folder in exclude if os.path.isdir(folder)}
    return (Path(path) for root in roots for path in walk_images(str(root), excluded, tuple(suffixes)))


def walk_images(
        root: str, excluded: Collection[tuple[int, int]] = (), suffixes: tuple[str, ...] = _SUFFIXES) -> Iterator[str]:
    """What `find_images` lists of one root, as strings: of millions, objects would take most of the time.

    Args:
        root: File or folder.
        excluded: Device and inode of folders not to enter.
        suffixes: Of the files to find, in lower case.
    """
    # A stack, not recursion: folders nest deeper than Python's calls may.
    stack: list[tuple[str, _Chain]] = [(root, None)]
    if not os.path.isdir(root):
        stack.clear()
        yield root
    while stack:
        folder, parents = stack.pop()
        try:
            identity = _identity(folder)
            if identity in excluded or _is_in(identity, parents):
                continue
            files, folders = _list_folder(folder, suffixes)
        except OSError:
            yield folder
            continue
        start = os.path.join(folder, '')
        for name in files:
            yield start + name
        stack.extend((start + name, (identity, parents)) for name in reversed(folders))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as 8-bit RGB, upright.

    Reads JPEG (also CMYK), PNG, WebP, GIF, BMP and TIFF; the content decides, not the suffix. Transparent parts
    show white, as on a page. 16-bit values are divided by 257. Integers of 32 bits are taken as 16-bit values
    where all fit, and floats as fractions of 1, 255 or 65535, the least that holds them all; otherwise they are
    stretched from their least to their greatest value. `PIL.Image.MAX_IMAGE_PIXELS` limits what is decoded.

    Args:
        path: The file.

    Returns:
        A picture of mode 'RGB' without metadata, detached from the file.

    Raises:
        ImageError: If the file is missing, unreadable, empty, damaged, too large or no picture; the message is one
            line with path and reason.
    """
    try:
        _check_file(path)
        with open(path, 'rb') as file:
            return _decode(file)
    except Exception as error:  # Pillow's readers raise whatever their parsing of a damaged file meets
        raise ImageError(f'cannot read {os.fspath(path)!r}: {_reason(error)}.') from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Read the bytes of a picture file, as `load_image` does.

    Args:
        data: All of the file.
        name: What the error calls it.

    Raises:
        ImageError: If it is empty, damaged, too large or no picture.
    """
    try:
        if not data:
            raise ImageError('the file is empty')
        return _decode(io.BytesIO(data))
    except Exception as error:
        raise ImageError(f'cannot read {name!r}: {_reason(error)}.') from error


def _list_folder(folder: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Sorted names of the pictures and of the folders in a folder."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            if is_folder(entry):
                folders.append(entry.name)
            elif entry.name.lower().endswith(suffixes):
                files.append(entry.name)
    return sorted(files), sorted(folders)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_in(identity: tuple[int, int], chain: _Chain) -> bool:
    while chain is not None:
        head, chain = chain
        if head == identity:
            return True
    return False


def _check_file(path: str | os.PathLike[str]) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        listable = os.access(path, os.R_OK | os.X_OK)
        raise ImageError('it is a folder' if listable else 'it is a folder that may not be listed')
    if not stat.S_ISREG(status.st_mode):
        raise ImageError('it is not a regular file')  # opening a pipe would wait for ever
    if not status.st_size:
        raise ImageError('the file is empty')
    if status.st_size > _MAX_FILE_BYTES:
        raise ImageError(f'it has {status.st_size} bytes, more than {_MAX_FILE_BYTES}')


def _decode(file: IO[bytes]) -> Image.Image:
    with Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise ImageError(
                f'it has {width} x {height} pixels, PIL.Image.MAX_IMAGE_PIXELS allows {Image.MAX_IMAGE_PIXELS}')
        image.load()
        return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that cannot be parsed does not spoil the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _RANGES or image.mode.startswith('I;16'):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert('RGBA')
        rgb = Image.new('RGB', image.size, 'white')
        rgb.paste(layer, mask=layer.getchannel('A'))
        return rgb
    rgb = image.convert('RGB')  # a copy even of RGB: it must not hold the file
    rgb.info.clear()            # rotation noted there has been applied
    return rgb


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = 0.0, 65535.0
    if image.mode in _RANGES:
        least, greatest = float(values.min()), float(values.max())
        if not np.isfinite([least, greatest]).all():
            raise ImageError('it holds values that are not finite')
        fitting = [limit for limit in _RANGES[image.mode] if least >= 0 and greatest <= limit]
        low, high = (0.0, fitting[0]) if fitting else (least, greatest)
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values - low) * scale).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Why a picture could not be read, on one line."""
    words = ' '.join(str(error).split()).rstrip('.')
    match error:
        case ImageError() | Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return words
        case UnidentifiedImageError():
            return 'it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture'
        case OSError(strerror=str(words)):  # the system's: missing, no permission, name too long
            return words.lower()
    return f'it is damaged ({words or type(error).__name__})'
