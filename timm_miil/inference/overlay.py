"""Showing maps: a picture with a heat map over it."""
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from timm_miil._checks import check_choice, check_ndim, check_range
from timm_miil.inference.draw import draw_tags, save_new
from timm_miil.inference.predict import Tag

__all__ = ['draw_overlay', 'save_overlay']

ALPHA = 0.5
MAX_NAME_BYTES = 100
# From nothing to most, as one goes from black over red to light yellow; each is brighter than the one before.
_COLOURS = ((0, 0, 0), (80, 10, 110), (190, 40, 85), (245, 125, 20), (255, 245, 160))


def draw_overlay(image: Image.Image, heat: Tensor, *, alpha: float = ALPHA) -> Image.Image:
    """Lay a heat map over a picture: bright where it is high, dark where it is low.

    Args:
        image: Picture of mode 'RGB'; it is not changed.
        heat: Map (H, W) that spans the picture, not negative and of any scale; its maximum is shown brightest.
        alpha: Opacity of the colours, in [0, 1].

    Returns:
        A new picture of mode 'RGB' and the size of `image`.

    Raises:
        ValueError: If the picture has another mode, the map another rank, or alpha is out of range.
    """
    check_choice(image_mode=image.mode, choices=['RGB'])
    check_ndim(2, heat=heat)
    check_range(alpha=alpha, low=0.0, high=1.0, closed=True)
    values = heat.detach().float().cpu().numpy()
    values = values / max(float(values.max(initial=0.0)), np.finfo(np.float32).tiny)
    if values.shape != (image.height, image.width):
        values = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BILINEAR))
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    colours = np.stack([np.interp(values, stops, channel) for channel in np.array(_COLOURS).T], axis=2)
    return Image.blend(image, Image.fromarray(np.rint(colours).astype(np.uint8)), alpha)


def save_overlay(
        image: Image.Image,
        heat: Tensor,
        tag: Tag,
        path: Path,
        folder: str | os.PathLike[str],
        *,
        alpha: float = ALPHA,
        roots: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Save a picture with a heat map over it, and label and confidence below.

    The file is `<name of the picture>_<label>.png`, where what may not stand in a file name is '_' and long names are
    cut. Its place in `folder` is as that of `save_tagged`. No file is ever replaced: a number is added to a name that
    is taken.

    Args:
        image: Picture of mode 'RGB'.
        heat: Map (H, W), see `draw_overlay`.
        tag: The label that the map explains.
        path: The picture's file, for the name.
        folder: Where to write; made if missing.
        alpha: Opacity of the colours, in [0, 1].
        roots: Folders whose structure is kept, as they were given to `find_images`.

    Returns:
        The file written.

    Raises:
        OSError: If the file cannot be written.
        ValueError: See `draw_overlay`.
    """
    picture = draw_tags(draw_overlay(image, heat, alpha=alpha), [tag])
    root = next((root for root in map(Path, roots) if root in path.parents), path.parent)
    label = ''.join(char if char.isalnum() or char in '-_' else '_' for char in tag.label)
    return save_new(picture, Path(folder, path.relative_to(root).parent, f'{_cut(path.stem)}_{_cut(label)}.png'))


def _cut(name: str) -> str:
    """The beginning of a name, so that a file may have it."""
    return os.fsencode(name)[:MAX_NAME_BYTES].decode('utf-8', 'ignore')
