"""Showing tags: a picture with its labels and confidences written below it."""
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from timm_miil._checks import check_choice
from timm_miil.inference.images import load_image
from timm_miil.inference.predict import Prediction, Tag

__all__ = ['draw_tags', 'save_new', 'save_tagged']

MIN_SIDE_PX = 320
MIN_FONT_PX = 14
MAX_LINES = 20
JPEG_QUALITY = 90
JPEG_MAX_PX = 65500  # the format's limit

_BACKGROUND, _BAR, _TEXT = '#181818', '#2f5d8a', '#ffffff'


def draw_tags(image: Image.Image, tags: Sequence[Tag]) -> Image.Image:
    """Write tags below a picture, each with a bar as long as its confidence.

    The text stands on its own dark panel, so the whole picture stays visible and the text readable on any picture.
    A picture with no side of 320 pixels is enlarged first. At most 20 tags are written. The font is Pillow's own,
    which has no letters beyond ASCII.

    Args:
        image: Picture of mode 'RGB'; it is not changed.
        tags: What to write, from top to bottom.

    Returns:
        A new picture of mode 'RGB'.

    Raises:
        ValueError: If the picture has another mode.
    """
    check_choice(image_mode=image.mode, choices=['RGB'])
    factor = -(-MIN_SIDE_PX // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    width = max(image.width, MIN_SIDE_PX)
    size = max(MIN_FONT_PX, width // 48)
    font = ImageFont.load_default(size)
    lines = [(tag.label, f'{tag.confidence:.2f}', tag.confidence) for tag in tags[:MAX_LINES]]
    if not lines:
        lines.append(('no tags', '', 0.0))
    if len(tags) > MAX_LINES:
        lines.append((f'and {len(tags) - MAX_LINES} more', '', 0.0))

    margin, pitch = size // 2, round(1.5 * size)
    canvas = Image.new('RGB', (width, image.height + pitch * len(lines) + 2 * margin), _BACKGROUND)
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (label, number, confidence) in enumerate(lines):
        top = image.height + margin + row * pitch
        bar_px = round((width - 2 * margin) * confidence)
        if bar_px:
            draw.rectangle((margin, top + 1, margin + bar_px - 1, top + pitch - 2), _BAR)
        room_px = width - 4 * margin - draw.textlength(number, font)
        middle = top + pitch / 2
        draw.text((2 * margin, middle), _shorten(label, room_px, font), _TEXT, font, anchor='lm')
        draw.text((width - 2 * margin, middle), number, _TEXT, font, anchor='rm')
    return canvas


def save_tagged(
        prediction: Prediction,
        folder: str | os.PathLike[str],
        *,
        roots: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Save a tagged picture with its tags drawn below it.

    The place in `folder` is the file's place below the first of `roots` that holds it, else just its name. No
    file is ever replaced: a number is added to a name that is taken. The file is empty until it is complete.

    Args:
        prediction: A prediction without error; its file is read again.
        folder: Where to write; made if missing.
        roots: Folders whose structure is kept, as they were given to `find_images`.

    Returns:
        The file written: JPEG, or PNG when JPEG cannot hold the size.

    Raises:
        OSError: If the file cannot be written.
        PredictionError: If the picture can no longer be read.
    """
    picture = draw_tags(load_image(prediction.path), prediction.tags)
    path = prediction.path
    root = next((root for root in map(Path, roots) if root in path.parents), path.parent)
    suffix = '.jpg' if max(picture.size) <= JPEG_MAX_PX else '.png'
    return save_new(picture, Path(folder, path.relative_to(root)).with_suffix(suffix))


def save_new(picture: Image.Image, target: Path) -> Path:
    """Save a picture under a name, or the first free 'name_2', 'name_3', ...; no file is ever replaced.

    Args:
        picture: Picture of mode 'RGB'.
        target: The file, '.jpg' or '.png'; folders are made.

    Returns:
        The file written. It is empty until it is complete.

    Raises:
        OSError: If the file cannot be written.
    """
    target = _reserve(target)
    partial = target.with_name(f'.{uuid.uuid4().hex}.partial')
    try:
        picture.save(partial, 'JPEG' if target.suffix == '.jpg' else 'PNG', quality=JPEG_QUALITY)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        target.unlink()
        raise
    return target


def _reserve(target: Path) -> Path:
    """Create an empty file under the name, or under the first free 'name_2', 'name_3', ..."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stem, number = target.stem, 1
    while True:
        try:
            target.open('xb').close()
            return target
        except FileExistsError:
            number += 1
            target = target.with_stem(f'{stem}_{number}')


def _shorten(label: str, room_px: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    label = ' '.join(label.split())
    if font.getlength(label) <= room_px:
        return label
    while label and font.getlength(f'{label}...') > room_px:
        label = label[:-1]
    return f'{label}...'
