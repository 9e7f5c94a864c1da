"""An overlay is bright where the map is high, and saving it replaces nothing and leaves its folder by no label."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_miil.inference import Tag, draw_overlay, save_overlay


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def spot() -> torch.Tensor:
    heat = torch.zeros(3, 4)
    heat[1, 2] = 0.5
    return heat


def test_nothing_covers_and_everything_covers(picture):
    before = np.asarray(picture).copy()
    np.testing.assert_array_equal(np.asarray(draw_overlay(picture, spot(), alpha=0.0)), before)
    covered = draw_overlay(picture, spot(), alpha=1.0)
    assert covered.size == picture.size and covered.mode == 'RGB'
    np.testing.assert_array_equal(
        np.asarray(covered), np.asarray(draw_overlay(Image.new('RGB', (40, 30)), spot(), alpha=1.0)))
    np.testing.assert_array_equal(np.asarray(picture), before)


def test_it_is_brightest_where_the_map_is_highest(picture):
    light = np.asarray(draw_overlay(picture, spot(), alpha=1.0).convert('L'))
    assert light.max() > 190 and light.min() == 0
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert 10 <= row < 20 and 20 <= column < 30  # cell (1, 2) of 10 pixels
    heat = torch.arange(40.0).expand(30, 40)
    light = np.asarray(draw_overlay(picture, heat, alpha=1.0).convert('L')).astype(int)
    assert (np.diff(light[0]) >= 0).all() and (np.diff(light[0]) > 0).mean() > 0.9


def test_the_scale_of_the_map_does_not_matter(picture):
    want = np.asarray(draw_overlay(picture, spot()))
    np.testing.assert_array_equal(np.asarray(draw_overlay(picture, 1e-6 * spot())), want)
    empty = np.asarray(draw_overlay(picture, torch.zeros(3, 4), alpha=1.0))
    assert (empty == 0).all()


@pytest.mark.parametrize('change, words', [
    ({'image': Image.new('L', (9, 9))}, "^image_mode must be one of 'RGB', got 'L'"),
    ({'heat': torch.zeros(2, 3, 4)}, r'^heat must have 2 dimensions, got shape \(2, 3, 4\)'),
    ({'alpha': 1.1}, r'^alpha must be in \[0, 1\], got 1.1'),
])
def test_wrong_use_is_told(picture, change, words):
    with pytest.raises(ValueError, match=words):
        draw_overlay(**{'image': picture, 'heat': spot()} | change)


# -- saving ----------------------------------------------------------------------------------------------------


def save(picture, label, folder, path='in/sub/a.b.png', **options) -> str:
    file = save_overlay(picture, spot(), Tag(label, 0.5, 0), Path(path), folder, **options)
    with Image.open(file) as saved:
        assert saved.format == 'PNG' and saved.width == 320 and saved.height > 240  # enlarged, and the label below
    return file.relative_to(folder).as_posix()


@pytest.mark.parametrize('label, want', [
    ('digit 7', 'a.b_digit_7.png'), ('../../etc/passwd', 'a.b_______etc_passwd.png'), ('', 'a.b_.png'),
    ('a\\b:c*d\n\0', 'a.b_a_b_c_d__.png'), ('Kätzchen 猫', 'a.b_Kätzchen_猫.png'), ('\ud800', 'a.b__.png')])
def test_any_label_makes_a_name(picture, tmp_path, label, want):
    assert save(picture, label, tmp_path) == want


def test_labels_that_look_alike_and_files_that_exist_stay(picture, tmp_path):
    (tmp_path / 'a.b_x_y.png').write_text('mine')
    assert [save(picture, label, tmp_path) for label in ('x y', 'x/y')] == ['a.b_x_y_2.png', 'a.b_x_y_3.png']
    assert (tmp_path / 'a.b_x_y.png').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 3


def test_long_names_are_cut(picture, tmp_path):
    name = save(picture, '猫' * 300, tmp_path, path=f'{"ä" * 120}.png')
    assert name == f'{"ä" * 50}_{"猫" * 33}.png'


def test_the_folder_structure_is_kept_below_a_root(picture, tmp_path):
    assert save(picture, 'x', tmp_path, roots=['other', 'in']) == 'sub/a.b_x.png'
    assert save(picture, 'x', tmp_path, roots=['in/sub/a.b.png']) == 'a.b_x.png'
