"""Picture files for inference: `timm_miil.data` finds and reads them, here a failure is a `PredictionError`."""
import os

from PIL import Image

from timm_miil import data
from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import IMAGE_SUFFIXES, find_images

__all__ = ['IMAGE_SUFFIXES', 'find_images', 'load_image']


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
