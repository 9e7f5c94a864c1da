"""How one scene is painted, in arithmetic that gives the same bytes on every machine.

Only uniform numbers of the Philox bit generator are drawn, and only + - * / and comparisons are applied to them:
these are exact by IEEE 754, while sines, powers, sums of arrays and compressed files depend on the build.
"""
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    'COLOURS', 'DIGIT_SIDE', 'FRAGMENTS', 'Bytes', 'Draws', 'Floats', 'SceneObject', 'encode_png', 'paint_background',
    'paint_scene',
]

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

COLOURS = {
    'red': (225, 55, 50), 'green': (60, 185, 75), 'blue': (65, 105, 245), 'yellow': (240, 220, 60),
    'purple': (165, 70, 215), 'orange': (245, 145, 40), 'cyan': (70, 215, 225), 'pink': (250, 160, 205),
    'white': (245, 245, 245),
}
GLYPH_PX = 8                     # side of a source digit
DIGIT_SIDE = (0.34, 0.50)        # side of a painted digit, as a part of the picture's
FRAGMENT_SIDE = (0.18, 0.45)
FRAGMENTS = (6, 14)              # pieces of digits in the background, fewest and most
FRAGMENT_PX = 4                  # side of the piece that is cut out of a source digit
MARGIN = 1.1                     # a painted digit's square over the digit's own
BACKGROUND_CELLS = 4
PLACES = 12                      # positions tried for a digit; the one that covers least of the others is taken
NOISE = 12.0                     # of 255
STORED_BLOCK_BYTES = 65535


@dataclass(frozen=True)
class SceneObject:
    """A digit in a scene: its class, its colour (number in `COLOURS`) and which source digit it is drawn from."""
    digit: int
    colour: int
    source: int


class Draws:
    """Uniform numbers from a named stream, equal on every machine."""

    def __init__(self, seed: int, stream: int) -> None:
        key = np.array([seed, stream], dtype=np.uint64)
        # Of Generator, only random() is used: numpy may change the others' algorithms between releases.
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._generator.random()

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self._generator.random() * count)

    def array(self, *shape: int) -> Floats:
        """Numbers in [0, 1)."""
        return self._generator.random(shape)

    def permutation(self, count: int) -> list[int]:
        """0 .. count - 1 in random order."""
        return [int(i) for i in np.argsort(self._generator.random(count), kind='stable')]


def paint_scene(
        objects: list[SceneObject],
        glyphs: Floats,
        clutter: list[int],
        size: int,
        draws: Draws,
        *,
        digit_side: tuple[float, float] = DIGIT_SIDE,
        fragments: tuple[int, int] = FRAGMENTS,
) -> tuple[Bytes, list[tuple[int, int, int, int]], list[int]]:
    """Paint digits on a cluttered background.

    Args:
        objects: The digits, painted in this order.
        glyphs: All source digits, (N, 8, 8) in [0, 1].
        clutter: Which source digits may be cut into background pieces.
        size: Side of the picture in pixels.
        draws: The scene's own stream.
        digit_side: Least and greatest side of a digit, as a part of the picture's.
        fragments: Fewest and most background pieces.

    Returns:
        The picture (size, size, 3), each object's box (x, y, width, height) in pixels, and its area in pixels.
    """
    picture = paint_background(size, draws)
    palette = [np.array(colour, dtype=np.float64) for colour in COLOURS.values()]
    for _ in range(fragments[0] + draws.below(fragments[1] - fragments[0] + 1)):
        glyph = np.zeros((GLYPH_PX, GLYPH_PX))
        top, left = (draws.below(GLYPH_PX - FRAGMENT_PX + 1) for _ in range(2))
        piece = np.s_[top:top + FRAGMENT_PX, left:left + FRAGMENT_PX]
        glyph[piece] = glyphs[clutter[draws.below(len(clutter))]][piece]
        side = int(draws.between(*FRAGMENT_SIDE) * size)
        alpha = _warp(glyph, side, draws.between(-1.0, 1.0), draws.between(-0.3, 0.3))
        colour = palette[draws.below(len(palette))] * draws.between(0.4, 0.9)
        _blend(picture, alpha * draws.between(0.3, 0.8), colour, draws.below(size - side), draws.below(size - side))
    boxes: list[tuple[int, int, int, int]] = []
    areas: list[int] = []
    covered = np.zeros((size, size), dtype=bool)
    for item in objects:
        side = int(draws.between(*digit_side) * size)
        alpha = _warp(glyphs[item.source], side, draws.between(-0.15, 0.15), draws.between(-0.2, 0.2))
        ink = alpha >= 0.5
        places = [(draws.below(size - side + 1), draws.below(size - side + 1)) for _ in range(PLACES)]
        y, x = min(places, key=lambda at: int(np.count_nonzero(
            covered[at[0]:at[0] + side, at[1]:at[1] + side])))
        colour = np.clip(palette[item.colour] * draws.between(0.85, 1.1), 0.0, 255.0)
        _blend(picture, alpha, colour, y, x)
        covered[y:y + side, x:x + side] |= ink
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        boxes.append((
            x + int(columns[0]), y + int(rows[0]),
            int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1))
        areas.append(int(np.count_nonzero(ink)))
    picture += (draws.array(size, size, 3) * 2.0 - 1.0) * NOISE
    return np.floor(np.clip(picture, 0.0, 255.0) + 0.5).astype(np.uint8), boxes, areas


def paint_background(size: int, draws: Draws) -> Floats:
    """A smooth dark mix of colours, (size, size, 3)."""
    shape = (BACKGROUND_CELLS + 1, BACKGROUND_CELLS + 1)
    corners = 15.0 + 95.0 * (0.6 * draws.array(*shape, 1) + 0.4 * draws.array(*shape, 3))
    place = np.arange(size) * (BACKGROUND_CELLS / size)
    cell = place.astype(np.int64)
    part = place - cell
    down, across = part[:, None, None], part[None, :, None]
    rows = corners[cell] * (1.0 - down) + corners[cell + 1] * down
    return rows[:, cell] * (1.0 - across) + rows[:, cell + 1] * across


def _warp(glyph: Floats, side: int, half_turn: float, shear: float) -> Floats:
    """Enlarge a source digit to (side, side), turned and sheared; opacity in [0, 1].

    half_turn is the tangent of half the angle, from which sine and cosine follow by division.
    """
    square = half_turn * half_turn
    cos, sin = (1.0 - square) / (1.0 + square), 2.0 * half_turn / (1.0 + square)
    centred = (np.arange(side) + 0.5) * (2.0 / side) - 1.0
    across, down = centred[None, :], centred[:, None]
    x = cos * across + sin * down
    y = cos * down - sin * across
    x = x + shear * y
    framed = np.zeros((GLYPH_PX + 2, GLYPH_PX + 2))  # the sampling runs into an empty frame, not off the edge
    framed[1:-1, 1:-1] = glyph
    middle = (GLYPH_PX + 1) / 2
    column = np.clip(x * (GLYPH_PX / 2 * MARGIN) + middle, 0.0, GLYPH_PX + 0.999)
    row = np.clip(y * (GLYPH_PX / 2 * MARGIN) + middle, 0.0, GLYPH_PX + 0.999)
    left, top = column.astype(np.int64), row.astype(np.int64)
    right_part, low_part = column - left, row - top
    upper = framed[top, left] * (1.0 - right_part) + framed[top, left + 1] * right_part
    lower = framed[top + 1, left] * (1.0 - right_part) + framed[top + 1, left + 1] * right_part
    return np.clip((upper * (1.0 - low_part) + lower * low_part) * 2.0 - 0.4, 0.0, 1.0)


def _blend(picture: Floats, alpha: Floats, colour: Floats, y: int, x: int) -> None:
    window = picture[y:y + len(alpha), x:x + len(alpha)]
    window += (colour - window) * alpha[:, :, None]


def encode_png(pixels: Bytes) -> bytes:
    """A PNG file of (H, W, 3) pixels, without compression: compressed bytes would depend on the zlib build."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row begins with filter type 0
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    stored = bytearray(b'\x78\x01')
    for start in range(0, len(raw), STORED_BLOCK_BYTES):
        block = raw[start:start + STORED_BLOCK_BYTES]
        is_last = start + STORED_BLOCK_BYTES >= len(raw)
        stored += struct.pack('<BHH', is_last, len(block), len(block) ^ 0xFFFF) + block
    stored += struct.pack('>I', zlib.adler32(raw))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', bytes(stored)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        for kind, body in chunks)
