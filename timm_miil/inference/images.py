"""Picture files for inference: `timm_miil.data` finds and reads them, here a failure is a `PredictionError`."""
import os
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from timm_miil import data
from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import IMAGE_SUFFIXES, find_images

__all__ = ['IMAGE_SUFFIXES', 'MAX_ASPECT', 'find_images', 'load_image', 'read_input']

# Resizing the short side of a longer strip to the model's input would need gigabytes.
MAX_ASPECT = 200


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as 8-bit RGB, upright; `timm_miil.data.load_image` says what becomes of odd ones.

    Args:
        path: The file.

    Returns:
        A picture of mode 'RGB' without metadata, detached from the file.

    Raises:
        PredictionError: If the file is missing, unreadable, empty, damaged, too large or no picture; the
            message is one line with path and reason.
    """
    try:
        return data.load_image(path)
    except ImageError as error:
        raise PredictionError(str(error)) from error


def read_input(load: Callable[[], Image.Image], transform: Callable[[Image.Image], Tensor], path: str) -> Tensor | str:
    """A network's input (3, H, W) of one picture, or in one line with the path why there is none.

    Args:
        load: Reads the picture; it raises PredictionError or ImageError if it cannot.
        transform: What makes the input of it.
        path: What the line calls the picture.
    """
    try:
        image = load()
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(
                f'one side of {image.width} x {image.height} pixels is more than {MAX_ASPECT} times the other')
        return transform(image)
    except (ImageError, PredictionError) as error:
        return str(error)
    except ValueError as error:  # also from the transform, when a side would resize to nothing
        return f'cannot tag {path!r}: {error}.'
