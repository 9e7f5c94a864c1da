"""The transforms the papers train with: squish resize, Cutout, RandAugment.

Ridnik et al., arXiv:2009.14119 (ASL), and the papers after it. Cutout is that of DeVries and Taylor, arXiv:1708.04552,
filled with one random colour. RandAugment is not that of arXiv:1909.13719, nor timm's or torchvision's: it is what the
authors' scripts import, the pip package `randaugment` 1.0.2, written anew from its distribution. Deviations:

- Cutout covers exactly its share of a side where the border does not clip it.
- All draws come from Python's `random`; the authors' also take numpy's. The distributions are the same.
"""
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from timm_miil._checks import check_positive, check_range

__all__ = ['Cutout', 'RandAugment', 'create_paper_transform']

GREY = (128, 128, 128)
CUTOUT_GREY = (125, 122, 113)
MAX_LEVEL = 9
MAX_CUTOUT_PX = 20


def create_paper_transform(
        image_size: int | tuple[int, int],
        *,
        is_training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        cutout: float = 0.5,
        randaugment: bool = True,
) -> Callable[[Image.Image], Tensor]:
    """The papers' preprocessing, in their order: resize, Cutout, RandAugment, tensor, normalisation.

    Pictures are squished: resized to the given size whatever their shape was, without a crop or a flip.

    Args:
        image_size: Side of the square in pixels, or (height, width).
        is_training: Whether to augment; the two arguments at the end are for training only.
        mean: Subtracted from values in [0, 1], a number a channel; the papers' is 0.
        std: Divided by after that, a number a channel; the papers' is 1.
        cutout: Share of a side that Cutout covers, in [0, 1]; 0 for none.
        randaugment: Whether to apply RandAugment.

    Returns:
        A function of an RGB picture that gives a float32 tensor (3, H, W). What is random is drawn from Python's
        global generator, so that `timm_miil.data.seeded` makes it repeatable. It can be pickled.

    Raises:
        TypeError: If the size is not made of whole numbers, or cutout is no number.
        ValueError: If a value is out of range, or mean and std are not three numbers each.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_positive(**{'image_size': height, 'image_size (width)': width})
    for name, values in {'mean': mean, 'std': std}.items():
        if len(values) != 3:
            raise ValueError(f'{name} must have three numbers, one a channel, got {tuple(values)}.')
    if not all(value > 0 for value in std):
        raise ValueError(f'std must be above 0, got {tuple(std)}.')
    check_range(cutout=cutout, low=0.0, high=1.0, closed=True)

    augment: list[Callable[[Image.Image], Image.Image]] = []
    if is_training and cutout:
        augment.append(Cutout(cutout))
    if is_training and randaugment:
        augment.append(RandAugment())
    shift, scale = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return _PaperTransform((height, width), tuple(augment), shift, scale)


@dataclass(frozen=True, eq=False)
class _PaperTransform:
    """Functional, because torchvision's chain of modules takes longer than the work itself on small pictures."""
    size: tuple[int, int]
    augment: tuple[Callable[[Image.Image], Image.Image], ...]
    mean: Tensor  # (3, 1, 1)
    std: Tensor   # (3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        image = F.resize(image, list(self.size), F.InterpolationMode.BILINEAR)
        for augment in self.augment:
            image = augment(image)
        values = F.pil_to_tensor(image).contiguous().float().div_(255)
        return values.sub_(self.mean).div_(self.std)


@dataclass(frozen=True)
class Cutout:
    """Covers a rectangle of one random colour, its centre uniform over the picture, clipped at the border.

    Args:
        share: Side of the rectangle over side of the picture, in (0, 1].
    """
    share: float

    def __call__(self, image: Image.Image) -> Image.Image:
        size = tuple(round(self.share * side) for side in image.size)
        return _cover(image, size, tuple(random.randrange(256) for _ in range(3)))


class RandAugment:
    """Two operations, each drawn from `OPERATIONS` with a level in 1...9 and then applied with probability 0.5.

    Both draws are independent: the same operation may come twice. What a level means stands at each operation.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(2):
            operation, level = random.choice(OPERATIONS), random.randint(1, MAX_LEVEL)
            if random.random() < 0.5:
                image = operation(image, level)
        return image

    def __repr__(self) -> str:
        return 'RandAugment()'


def _cover(image: Image.Image, size: Sequence[int], colour: tuple[int, ...]) -> Image.Image:
    """The picture with a rectangle of (width, height) around a random pixel, what lies outside cut off."""
    left, top = (random.randrange(side) - part // 2 for side, part in zip(image.size, size))
    covered = image.copy()
    covered.paste(colour, (max(0, left), max(0, top), left + size[0], top + size[1]))
    return covered


# ---- the 15 operations


def _sharpness(image: Image.Image, level: int) -> Image.Image:
    return F.adjust_sharpness(image, _factor(level))


def _contrast(image: Image.Image, level: int) -> Image.Image:
    return F.adjust_contrast(image, _factor(level))


def _color(image: Image.Image, level: int) -> Image.Image:
    return F.adjust_saturation(image, _factor(level))


def _brightness(image: Image.Image, level: int) -> Image.Image:
    return F.adjust_brightness(image, _factor(level))


def _factor(level: int) -> float:
    """1 - 0.1 level or 1 + 0.1 level; 1 leaves the picture as it is."""
    return 1.0 + _signed(0.1 * level)


def _invert(image: Image.Image, level: int) -> Image.Image:
    return F.invert(image)


def _auto_contrast(image: Image.Image, level: int) -> Image.Image:
    return F.autocontrast(image)


def _equalize(image: Image.Image, level: int) -> Image.Image:
    return F.equalize(image)


def _posterize(image: Image.Image, level: int) -> Image.Image:
    """Keep 8 bits of each value at level 0, 4 at level 9."""
    return F.posterize(image, round(8 - 4 * level / MAX_LEVEL))


def _solarize(image: Image.Image, level: int) -> Image.Image:
    """Invert values from 256 on at level 0, all at level 9."""
    return F.solarize(image, 256 * (1 - level / MAX_LEVEL))


def _cutout(image: Image.Image, level: int) -> Image.Image:
    """Cover a grey square of 2 pixels at level 1, 20 at level 9, whatever the size of the picture; always even."""
    side = 2 * (round(MAX_CUTOUT_PX * level / MAX_LEVEL) // 2)
    return _cover(image, (side, side), CUTOUT_GREY)


def _rotate(image: Image.Image, level: int) -> Image.Image:
    """Turn by up to 30 degrees, always counter-clockwise."""
    return F.rotate(image, 30 * level / MAX_LEVEL, fill=list(GREY))


def _shear_x(image: Image.Image, level: int) -> Image.Image:
    """Shift each row by up to 0.3 of its distance from the top."""
    return _affine(image, (1, _signed(0.3 * level / MAX_LEVEL), 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, level: int) -> Image.Image:
    """Shift each column by up to 0.3 of its distance from the left."""
    return _affine(image, (1, 0, 0, _signed(0.3 * level / MAX_LEVEL), 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, level: int) -> Image.Image:
    """Shift by up to 150 / 331 of the width."""
    return _affine(image, (1, 0, _signed(150 / 331 * level / MAX_LEVEL) * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, level: int) -> Image.Image:
    """Shift by up to 150 / 331 of the height."""
    return _affine(image, (1, 0, 0, 0, 1, _signed(150 / 331 * level / MAX_LEVEL) * image.height))


def _affine(
        image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    """Pillow's own: torchvision's shears about the centre, not the corner, and shifts by whole pixels only."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GREY)


def _signed(value: float) -> float:
    return random.choice((-1, 1)) * value


OPERATIONS = (
    _auto_contrast, _brightness, _color, _contrast, _cutout, _equalize, _invert, _posterize, _rotate, _sharpness,
    _shear_x, _shear_y, _solarize, _translate_x, _translate_y)
