"""Pictures within a tar file, such as a webdataset shard, read where they lie; labels beside them are passed over.

A tar file may come from anyone: nothing is unpacked, and a file with members that no shard has is refused, see
`timm_miil.data.shards`.
"""
import os
from typing import IO, NamedTuple

from PIL import Image

from timm_miil._errors import ImageError
from timm_miil.data._shard_tar import MAX_PICTURE_BYTES, Span, list_files, read_span
from timm_miil.data.images import IMAGE_SUFFIXES, decode_image

__all__ = ['TarImage', 'list_tar_images', 'load_tar_image']


class TarImage(NamedTuple):
    """A member that is a picture by its suffix.

    Attributes:
        name: Of the member, folders included.
        offset: Where its bytes begin in the tar file.
        size: How many there are.
    """
    name: str
    offset: int
    size: int


def list_tar_images(path: str | os.PathLike[str]) -> list[TarImage]:
    """The pictures in a tar file, in their order; only the heads of its members are read.

    Args:
        path: The file; it is not compressed.

    Raises:
        ImageError: If it cannot be read, is not a whole tar file, or has members that no shard has; the message is
            one line with path and reason.
    """
    try:
        with open(path, 'rb') as file:
            return [TarImage(name, *span) for name, span in list_files(file) if _is_picture(name)]
    except OSError as error:
        raise ImageError(f'cannot read {os.fspath(path)!r}: {(error.strerror or str(error)).lower()}.') from error
    except ValueError as error:
        raise ImageError(f'cannot read {os.fspath(path)!r}: {error}.') from error


def load_tar_image(file: IO[bytes], image: TarImage, path: str) -> Image.Image:
    """Read a picture in a tar file as `timm_miil.data.load_image` reads a file.

    Args:
        file: The open tar file.
        image: One that `list_tar_images` found there.
        path: What an error calls the picture.

    Raises:
        ImageError: If it cannot be read.
    """
    if image.size > MAX_PICTURE_BYTES:
        raise ImageError(f'cannot read {path!r}: it has {image.size} bytes, more than {MAX_PICTURE_BYTES}.')
    try:
        data = read_span(file, Span(image.offset, image.size))
    except ValueError as error:
        raise ImageError(f'cannot read {path!r}: {error}.') from error
    return decode_image(data, path)


def _is_picture(name: str) -> bool:
    return not os.path.basename(name).startswith('.') and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
