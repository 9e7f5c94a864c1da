"""The papers' transforms: what they draw, how often, and what each operation does to pixels."""
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from timm_miil.data import seeded, transforms
from timm_miil.data.transforms import Cutout, RandAugment, create_paper_transform

IDENTITY = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
OPERATIONS = {operation.__name__.strip('_'): operation for operation in transforms.OPERATIONS}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(image: Image.Image) -> bytes:
    assert image.mode == 'RGB'
    return image.tobytes()


def covered(image: Image.Image, result: Image.Image) -> np.ndarray:
    return (np.asarray(image) != np.asarray(result)).any(2)


# ---- the whole


@pytest.mark.parametrize('size', [24, (24, 40), (64, 31)])
def test_evaluation_is_pillows_squish_resize_exactly(size):
    image = noise(50, 37)
    height, width = (size, size) if isinstance(size, int) else size
    got = create_paper_transform(size, is_training=False, **IDENTITY)(image)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    assert type(got) is torch.Tensor and got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_mean_and_std_come_last_and_by_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 2.0, 4.0)
    image = noise(20, 20)
    plain = create_paper_transform(10, is_training=False, **IDENTITY)(image)
    got = create_paper_transform(10, is_training=False, mean=mean, std=std)(image)
    want = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_training_is_decided_by_the_seed_and_varies_with_it():
    transform, image = create_paper_transform(32, is_training=True, **IDENTITY), noise(40, 30)

    def draw(seed):
        with seeded(seed):
            return transform(image)

    first = [draw(seed) for seed in range(20)]
    assert all(torch.equal(draw(seed), first[seed]) for seed in range(20))
    assert all(not torch.equal(one, other) for one, other in zip(first, first[1:]))
    with seeded(7):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), first[7])


def test_neither_the_picture_nor_other_generators_are_touched():
    transform, image = create_paper_transform(30, is_training=True, **IDENTITY), noise(30, 30)
    before, numpy_state, torch_state = np.asarray(image).copy(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(0):
        for _ in range(60):
            transform(image)
    assert np.array_equal(np.asarray(image), before)
    assert np.array_equal(np.random.get_state()[1], numpy_state) and torch.equal(torch.get_rng_state(), torch_state)


def test_augmentations_are_for_training_and_can_be_left_out():
    image = noise(16, 16)
    plain = create_paper_transform(16, is_training=False, **IDENTITY)(image)
    off = create_paper_transform(16, is_training=True, cutout=0, randaugment=False, **IDENTITY)
    cut = create_paper_transform(16, is_training=True, randaugment=False, **IDENTITY)
    assert torch.equal(off(image), plain)
    with seeded(0):
        changed = (cut(image) != plain).any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert 0 < len(rows) <= 8 and 0 < len(columns) <= 8  # a rectangle of half a side, and nothing else


def test_cutout_comes_before_randaugment(monkeypatch):
    """Inverted after it was covered, the rectangle has the inverse of the colour drawn."""
    monkeypatch.setattr(transforms, 'OPERATIONS', (OPERATIONS['invert'],))
    transform, image = create_paper_transform(8, is_training=True, cutout=1.0, **IDENTITY), noise(8, 8)
    seen = set()
    for seed in range(30):
        with seeded(seed):
            alone = Cutout(1.0)(image)
        with seeded(seed):
            both = (transform(image) * 255).round().byte().permute(1, 2, 0).numpy()
        seen.add(both.tobytes() == pixels_of(alone))
        assert both.tobytes() in {pixels_of(alone), pixels_of(ImageOps.invert(alone))}
    assert seen == {True, False}


@pytest.mark.parametrize('arguments, error, words', [
    ({'image_size': 0}, ValueError, 'image_size must be at least 1, got 0'),
    ({'image_size': (3, -1)}, ValueError, r'image_size \(width\) must be at least 1, got -1'),
    ({'image_size': (3.0, 1)}, TypeError, 'image_size must be an int, got float 3.0'),
    ({'mean': (0.0,)}, ValueError, r'mean must have three numbers, one a channel, got \(0.0,\)'),
    ({'std': (1.0, 1.0)}, ValueError, r'std must have three numbers, one a channel, got \(1.0, 1.0\)'),
    ({'std': (1.0, 0.0, 1.0)}, ValueError, r'std must be above 0, got \(1.0, 0.0, 1.0\)'),
    ({'cutout': 1.5}, ValueError, r'cutout must be in \[0, 1\], got 1.5'),
    ({'cutout': 'half'}, TypeError, "cutout must be a number, got str 'half'"),
])
def test_wrong_settings_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        create_paper_transform(**({'image_size': 8, 'is_training': True} | IDENTITY | arguments))


# ---- Cutout


def test_cutout_covers_half_of_each_side_around_a_uniform_centre_in_one_colour():
    width, height, draws = 20, 30, 2000
    image, centres, colours = Image.new('RGB', (width, height)), Counter(), Counter()
    heat = np.zeros((height, width))
    with seeded(0):
        for _ in range(draws):
            pixels = np.asarray(Cutout(0.5)(image))
            hit = pixels.any(2)
            heat += hit
            rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
            if not len(rows):  # a black one
                continue
            assert hit[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
            assert len(np.unique(pixels[hit], axis=0)) == 1
            colours[tuple(pixels[rows[0], columns[0]])] += 1
            # Where nothing is clipped the rectangle is whole.
            if rows[0] > 0 and rows[-1] < height - 1:
                assert len(rows) == 15
            if columns[0] > 0 and columns[-1] < width - 1:
                assert len(columns) == 10
                centres[columns[0] + 5] += 1
    # Of 20 centres, 9 have their rectangle clear of both sides; each comes as often: 5 standard deviations.
    assert set(centres) == set(range(6, 15))
    assert all(abs(count - draws / 20) < 5 * (draws / 20) ** 0.5 for count in centres.values())
    # Rows and columns that a rectangle can reach, over all centres, gives the expected heat.
    reach = [sum(0 <= place - (centre - part // 2) < part for centre in range(side))
             for side, part in ((height, 15), (width, 10)) for place in range(side)]
    want = np.outer(reach[:height], reach[height:]) / (width * height) * draws
    assert np.abs(heat - want).max() < 5 * np.sqrt(want.max())
    mean = np.average(list(colours), axis=0, weights=list(colours.values()))
    assert np.abs(mean - 127.5).max() < 5 * 74 / draws ** 0.5


# ---- RandAugment


def test_each_operation_and_level_comes_as_often_and_half_of_the_time(monkeypatch):
    calls = Counter()

    def recorded(name):
        def operation(image, level):
            calls[name, level] += 1
            return image
        return operation

    monkeypatch.setattr(transforms, 'OPERATIONS', tuple(recorded(name) for name in OPERATIONS))
    draws, image = 20_000, Image.new('RGB', (2, 2))
    with seeded(1):
        applied = Counter()
        for _ in range(draws):
            before = calls.total()
            RandAugment()(image)
            applied[calls.total() - before] += 1
    assert len(OPERATIONS) == 15 and set(calls) == {(name, level) for name in OPERATIONS for level in range(1, 10)}
    expected = draws / 135  # two draws, each applied half of the time
    assert all(abs(count - expected) < 5 * expected ** 0.5 for count in calls.values())
    assert [applied[times] / draws for times in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def enhance(kind, factor):
    return lambda image, sign, level: kind(image).enhance(factor(sign, level))


def affine(matrix, resample=Image.Resampling.NEAREST):
    def apply(image, sign, level):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix(image, sign * level / 9), resample, fillcolor=(128, 128, 128))
    return apply


# Each operation by its formula: (image, sign, level) -> image.
FORMULAS = {
    'auto_contrast': lambda image, sign, level: ImageOps.autocontrast(image),
    'brightness': enhance(ImageEnhance.Brightness, lambda sign, level: 1 + sign * level / 10),
    'color': enhance(ImageEnhance.Color, lambda sign, level: 1 + sign * level / 10),
    'contrast': enhance(ImageEnhance.Contrast, lambda sign, level: 1 + sign * level / 10),
    'equalize': lambda image, sign, level: ImageOps.equalize(image),
    'invert': lambda image, sign, level: ImageOps.invert(image),
    'posterize': lambda image, sign, level: ImageOps.posterize(image, [8, 8, 7, 7, 6, 6, 5, 5, 4, 4][level]),
    'rotate': lambda image, sign, level: image.rotate(level * 30 / 9, fillcolor=(128, 128, 128)),
    'sharpness': enhance(ImageEnhance.Sharpness, lambda sign, level: 1 + sign * level / 10),
    'shear_x': affine(lambda image, part: (1, 0.3 * part, 0, 0, 1, 0), Image.Resampling.BICUBIC),
    'shear_y': affine(lambda image, part: (1, 0, 0, 0.3 * part, 1, 0), Image.Resampling.BICUBIC),
    'solarize': lambda image, sign, level: ImageOps.solarize(image, 256 - 256 * level / 9),
    'translate_x': affine(lambda image, part: (1, 0, 150 / 331 * part * image.width, 0, 1, 0)),
    'translate_y': affine(lambda image, part: (1, 0, 0, 0, 1, 150 / 331 * part * image.height)),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_an_operation_follows_its_formula_with_either_sign(name):
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(40, 200, (6, 8, 3), dtype=np.uint8)).resize((48, 36))
    for level in range(1, 10):
        want = {pixels_of(FORMULAS[name](smooth, sign, level)) for sign in (-1, 1)}
        with seeded(level):
            got = {pixels_of(OPERATIONS[name](smooth, level)) for _ in range(30)}
        assert got == want, level


def test_the_operation_cutout_covers_a_small_grey_square():
    image = Image.new('RGB', (60, 50))
    with seeded(0):
        for level, side in enumerate([2, 4, 6, 8, 10, 12, 16, 18, 20], start=1):
            areas = Counter()
            for _ in range(100):
                result = OPERATIONS['cutout'](image, level)
                assert set(map(tuple, np.asarray(result)[covered(image, result)])) == {(125, 122, 113)}
                areas[int(covered(image, result).sum())] += 1
            assert max(areas) == side ** 2 == areas.most_common(1)[0][0]
    assert set(OPERATIONS) == {*FORMULAS, 'cutout'}
