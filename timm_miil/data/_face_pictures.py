"""How one made-up face is painted, in the arithmetic of `_scene_pictures`: the same bytes on every machine."""
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timm_miil.data._scene_pictures import Bytes, Draws, Floats, paint_background

__all__ = ['Face', 'draw_face', 'paint_face']

Mask = npt.NDArray[np.bool_]

# Lengths are parts of the picture's side, in front of a face that looks straight ahead: x to the right, y downwards.
# Two tones between and around which skins lie.
LIGHT_SKIN, DARK_SKIN = (240.0, 205.0, 175.0), (120.0, 80.0, 55.0)
EYE_WHITE = (240.0, 240.0, 235.0)
IRIS = 0.024                # half axis
SAMPLES = 2                 # of a pixel, in each direction
TURN = 0.12                 # greatest tangent of half the angle in the picture's plane
YAW = 0.05                  # greatest shift of the features to a side
NOSE_DEPTH = 1.6            # the nose shifts so much farther
SHIFT = 0.06
SCALE = (0.85, 1.1)
LIGHT = (0.55, 1.15)
SLANT = 0.45                # greatest change of the light from the middle to an edge
CAST = 0.15                 # greatest change of a colour by the light
NOISE = 14.0                # of 255
COVER_SIDE = (0.25, 0.5)


@dataclass(frozen=True)
class Face:
    """What makes an identity: proportions and colours, the same in all its pictures."""
    skin: Floats
    hair: Floats
    iris: Floats
    lips: Floats
    width: float
    height: float
    hairline: float
    fringe: float
    hair_width: float
    hair_end: float
    eye_gap: float
    eye_y: float
    eye_width: float
    eye_height: float
    brow_y: float
    brow_width: float
    brow_slope: float
    nose_width: float
    nose_end: float
    mouth_y: float
    mouth_width: float
    mouth_height: float
    mouth_bend: float


def draw_face(draws: Draws) -> Face:
    """An identity from its own stream."""
    tone = draws.between(0.0, 1.0)
    skin = np.array(DARK_SKIN) * (1.0 - tone) + np.array(LIGHT_SKIN) * tone
    return Face(
        skin=skin + (draws.array(3) * 2.0 - 1.0) * 15.0,
        hair=20.0 + 200.0 * (0.7 * draws.array(1) + 0.3 * draws.array(3)),
        iris=30.0 + 150.0 * draws.array(3),
        lips=skin * 0.6 + np.array([70.0, 10.0, 20.0]) + 30.0 * draws.array(3),
        width=draws.between(0.22, 0.31),
        height=draws.between(0.31, 0.40),
        hairline=draws.between(0.35, 0.75),
        fringe=draws.between(-2.0, 4.0),
        hair_width=draws.between(1.04, 1.35),
        hair_end=draws.between(-0.1, 0.4),
        eye_gap=draws.between(0.085, 0.14),
        eye_y=draws.between(-0.07, 0.0),
        eye_width=draws.between(0.04, 0.07),
        eye_height=draws.between(0.02, 0.045),
        brow_y=draws.between(0.05, 0.085),
        brow_width=draws.between(0.008, 0.024),
        brow_slope=draws.between(-0.4, 0.4),
        nose_width=draws.between(0.025, 0.06),
        nose_end=draws.between(0.06, 0.12),
        mouth_y=draws.between(0.16, 0.22),
        mouth_width=draws.between(0.06, 0.13),
        mouth_height=draws.between(0.012, 0.035),
        mouth_bend=draws.between(-2.5, 2.5))


def paint_face(face: Face, size: int, draws: Draws, *, is_covered: bool) -> Bytes:
    """A picture of an identity.

    Args:
        face: The identity.
        size: Side of the picture in pixels.
        draws: The picture's own stream: pose, light, background, what covers the face and noise.
        is_covered: Whether a patch of one colour hides a part of the picture.

    Returns:
        The picture (size, size, 3).
    """
    fine = size * SAMPLES
    picture = paint_background(fine, draws)
    half_turn, scale = draws.between(-TURN, TURN), draws.between(*SCALE)
    yaw, right, down = (draws.between(-most, most) for most in (YAW, SHIFT, SHIFT))
    place = (np.arange(fine) + 0.5) / fine - 0.5
    across, along = (place[None, :] - right) / scale, (place[:, None] - down) / scale
    # A tangent of half the angle gives both by division.
    cosine = (1.0 - half_turn * half_turn) / (1.0 + half_turn * half_turn)
    sine = 2.0 * half_turn / (1.0 + half_turn * half_turn)
    _paint_features(picture, face, across * cosine + along * sine, along * cosine - across * sine, yaw)
    slant = place[None, :] * draws.between(-SLANT, SLANT) * 2.0 + place[:, None] * draws.between(-SLANT, SLANT) * 2.0
    light = draws.between(*LIGHT) * (1.0 + slant[:, :, None]) * (1.0 + (draws.array(3) * 2.0 - 1.0) * CAST)
    noise = (draws.array(size, size, 3) * 2.0 - 1.0) * NOISE
    if is_covered:
        side = [int(draws.between(*COVER_SIDE) * fine) for _ in range(2)]
        top, left = (draws.below(fine - length + 1) for length in side)
        picture[top:top + side[0], left:left + side[1]] = 30.0 + 200.0 * draws.array(3)
    picture *= light
    rows = (picture[0::2] + picture[1::2]) * 0.5
    pixels = (rows[:, 0::2] + rows[:, 1::2]) * 0.5 + noise
    return np.floor(np.clip(pixels, 0.0, 255.0) + 0.5).astype(np.uint8)


def _paint_features(picture: Floats, face: Face, x: Floats, y: Floats, yaw: float) -> None:
    """Paint a face at the coordinates (x, y) of each point of a picture."""
    dark = face.skin * 0.72
    head = _ellipse(x, y, face.width, face.height)
    picture[_ellipse(x, y + 0.02, face.width * face.hair_width, face.height * 1.08) & (y < face.hair_end)] = face.hair
    picture[head] = face.skin
    turned = x - yaw
    picture[head & (y < face.fringe * turned * turned - face.height * face.hairline)] = face.hair
    for side in (-1.0, 1.0):
        aside = turned * side - face.eye_gap                            # from the middle of the eye, outwards
        eye = _ellipse(aside, y - face.eye_y, face.eye_width, face.eye_height)
        picture[eye] = EYE_WHITE
        picture[eye & _ellipse(aside, y - face.eye_y, IRIS, IRIS)] = face.iris
        brow = np.abs(y - face.eye_y + face.brow_y - face.brow_slope * aside) < face.brow_width
        picture[brow & (np.abs(aside) < face.eye_width * 1.2)] = face.hair * 0.7
    nose_x, nose_y = x - yaw * NOSE_DEPTH, y - face.eye_y
    length = face.nose_end - face.eye_y
    picture[(nose_y > 0.0) & (nose_y < length) & (np.abs(nose_x) < face.nose_width * nose_y / length)] = dark
    mouth = y - face.mouth_y - face.mouth_bend * turned * turned
    picture[(np.abs(turned) < face.mouth_width) & (np.abs(mouth) < face.mouth_height)] = face.lips


def _ellipse(x: Floats, y: Floats, width: float, height: float) -> Mask:
    """Whether points lie in the ellipse around 0 of these half axes."""
    inside: Mask = (x / width) * (x / width) + (y / height) * (y / height) <= 1.0
    return inside
