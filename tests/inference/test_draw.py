"""A tagged picture shows the whole picture and readable tags; saving it replaces nothing."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_miil._errors import PredictionError
from timm_miil.inference import Prediction, Tag, draw_tags, save_tagged
from timm_miil.inference import draw as draw_module

TAGS = (Tag('ant', 0.9, 0), Tag('bee', 0.25, 1))


def panel_of(drawn: Image.Image, image_height: int) -> np.ndarray:
    return np.asarray(drawn)[image_height:].astype(int)


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_the_picture_stays_whole_above_the_tags(picture):
    before = np.asarray(picture).copy()
    drawn = draw_tags(picture, TAGS)
    assert drawn.mode == 'RGB' and drawn.width == 400 and drawn.height > 300
    np.testing.assert_array_equal(np.asarray(drawn)[:300], before)
    np.testing.assert_array_equal(np.asarray(picture), before)


@pytest.mark.parametrize('colour', ['black', 'white', 'gray', 'red'])
def test_text_is_readable_on_any_picture(colour):
    panel = panel_of(draw_tags(Image.new('RGB', (400, 300), colour), TAGS), 300)
    grey = panel.mean(axis=2)
    assert (grey > 240).sum() > 100 and (grey < 40).mean() > 0.3  # white letters on dark ground


def test_labels_and_numbers_are_written(picture):
    panels = [panel_of(draw_tags(picture, [tag]), 300) for tag in (
        Tag('ant', 0.5, 0), Tag('bee', 0.5, 0), Tag('ant', 0.52, 0), Tag('ant', 0.5, 7))]
    assert (panels[0] != panels[1]).any() and (panels[0] != panels[2]).any()
    np.testing.assert_array_equal(panels[0], panels[3])  # the class number is not shown


def test_a_bar_is_as_long_as_its_confidence(picture):
    def bar_px(confidence: float) -> int:
        panel = panel_of(draw_tags(picture, [Tag('', confidence, 0)]), 300)
        return int((panel == (0x2f, 0x5d, 0x8a)).all(axis=2).any(axis=0).sum())
    full = bar_px(1.0)
    assert bar_px(0.0) == 0 and bar_px(0.5) == pytest.approx(full / 2, abs=1) and full > 350


@pytest.mark.parametrize('size, want', [
    ((64, 64), (320, 320)), ((100, 50), (400, 200)), ((320, 1), (320, 1)), ((1, 320), (320, 320)),
    ((1, 1), (320, 320))])
def test_small_pictures_are_enlarged(size, want):
    drawn = draw_tags(Image.new('RGB', size, 'red'), TAGS)
    reddish = (np.asarray(drawn) == (255, 0, 0)).all(axis=2)
    assert (drawn.width, reddish.any(axis=1).sum()) == want


def test_a_very_tall_picture_stays_small(tmp_path):
    drawn = draw_tags(Image.new('RGB', (2, 9000)), TAGS)
    assert drawn.width == 320 and drawn.height < 9200


def test_many_long_and_strange_labels_fit(picture):
    tags = [Tag('long ' * 100, 0.5, 0), Tag('two\nlines\tand tab', 0.4, 1), Tag('', 0.3, 2)] + [Tag('x', 0.1, 3)] * 17
    height = draw_tags(picture, tags).height
    assert draw_tags(picture, tags + [Tag('x', 0.1, 3)] * 500).height > height  # one line: and 500 more
    assert draw_tags(picture, tags + [Tag('x', 0.1, 3)] * 2).height == draw_tags(picture, tags + tags).height
    margin = panel_of(draw_tags(picture, tags[:1]), 300)[:, -6:]
    assert (margin.mean(axis=2) < 40).all()  # nothing runs over the edge


def test_no_tags_are_said(picture):
    assert (panel_of(draw_tags(picture, []), 300).mean(axis=2) > 240).sum() > 30


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="^image_mode must be one of 'RGB', got 'L'"):
        draw_tags(Image.new('L', (9, 9)), TAGS)


# -- saving ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prediction(picture, tmp_path) -> Prediction:
    path = tmp_path / 'in' / 'sub' / 'a.b.png'
    path.parent.mkdir(parents=True)
    picture.save(path)
    return Prediction(path, TAGS)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if not path.is_dir())


def test_the_folder_structure_is_kept_below_a_root(prediction, tmp_path):
    out = tmp_path / 'out'
    for roots, want in [
            ([], 'a.b.jpg'), ([tmp_path / 'in'], 'sub/a.b.jpg'), ([tmp_path / 'x', tmp_path], 'in/sub/a.b.jpg'),
            ([prediction.path], 'a.b_2.jpg')]:
        assert save_tagged(prediction, out, roots=roots) == out / want
    assert files_in(out) == ['a.b.jpg', 'a.b_2.jpg', 'in/sub/a.b.jpg', 'sub/a.b.jpg']
    with Image.open(out / 'a.b.jpg') as saved:
        assert saved.format == 'JPEG' and saved.width == 400 and saved.height > 300


def test_relative_roots_work(prediction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / 'in')
    relative = Prediction(Path('sub/a.b.png'), TAGS)
    assert save_tagged(relative, '../out', roots=['.']) == Path('../out/sub/a.b.jpg')


def test_no_file_is_ever_replaced(prediction):
    folder = prediction.path.parent
    (folder / 'a.b.jpg').write_text('mine')
    assert save_tagged(prediction, folder).name == 'a.b_2.jpg'
    assert save_tagged(prediction, folder).name == 'a.b_3.jpg'
    assert (folder / 'a.b.jpg').read_text() == 'mine'


def test_a_failed_save_leaves_nothing(prediction, tmp_path, monkeypatch):
    out = tmp_path / 'out'

    def full_disk(*args, **kwargs):
        raise OSError('no space left')

    monkeypatch.setattr(os, 'replace', full_disk)
    with pytest.raises(OSError, match='no space left'):
        save_tagged(prediction, out)
    assert files_in(out) == []


def test_the_mode_of_the_file_is_the_users(prediction, tmp_path):
    (tmp_path / 'plain').touch()
    assert save_tagged(prediction, tmp_path / 'out').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_what_jpeg_cannot_hold_becomes_png(prediction, tmp_path, monkeypatch):
    monkeypatch.setattr(draw_module, 'JPEG_MAX_PX', 399)
    with Image.open(save_tagged(prediction, tmp_path / 'out')) as saved:
        assert saved.format == 'PNG' and Path(saved.filename).name == 'a.b.png'


def test_a_picture_that_is_gone_is_an_error(prediction, tmp_path):
    prediction.path.unlink()
    with pytest.raises(PredictionError, match='no such file or directory'):
        save_tagged(prediction, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
