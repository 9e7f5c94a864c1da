"""Any picture file becomes 8-bit RGB, or one clear error; folders are listed in order, lazily."""
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_miil._errors import PredictionError
from timm_miil.inference import IMAGE_SUFFIXES, find_images, load_image

ORIENTATION = 0x0112
# How a camera that held the scene upright would have stored it, by the orientation it noted.
STORED = {
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.transpose(1, 0, 2),
    6: lambda scene: np.rot90(scene, 1),
    7: lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),
    8: lambda scene: np.rot90(scene, -1),
}


@pytest.fixture
def scene() -> np.ndarray:
    """Smooth colours without symmetry, (24, 40, 3)."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([x * 6, y * 10, (x + 2 * y) * 2], axis=2).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == 'RGB'
    return np.asarray(image).astype(int)


# -- what is in the picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix, options', [
    ('.png', {}), ('.bmp', {}), ('.tif', {}), ('.tiff', {'compression': 'tiff_lzw'}), ('.webp', {'lossless': True})])
def test_lossless_formats_give_the_very_pixels(suffix, options, scene, tmp_path):
    np.testing.assert_array_equal(read(save(tmp_path / f'a{suffix}', scene, **options)), scene)


@pytest.mark.parametrize('suffix, mode', [
    ('.jpg', None), ('.jpg', 'CMYK'), ('.tif', 'CMYK'), ('.webp', None), ('.gif', None), ('.tif', 'YCbCr')])
def test_lossy_ones_come_near(suffix, mode, scene, tmp_path):
    options = {'quality': 100, 'subsampling': 0} if suffix == '.jpg' else {}
    if mode == 'YCbCr':
        options = {'compression': 'tiff_lzw'}  # Pillow 12.3 cannot read what it writes without
    error = np.abs(read(save(tmp_path / f'a{suffix}', scene, mode, **options)) - scene)
    assert error.mean() < (10 if suffix == '.gif' else 3)


def test_cmyk_jpeg_of_adobe_is_not_a_negative(scene, tmp_path):
    """Adobe stores CMYK inverted and says so in an APP14 segment."""
    cmyk = save(tmp_path / 'plain.jpg', scene, 'CMYK', quality=100, subsampling=0)
    data = cmyk.read_bytes()
    assert b'Adobe' in data  # what Pillow writes is Adobe's form
    with Image.open(cmyk) as image:
        assert image.mode == 'CMYK'
    assert np.abs(read(cmyk) - scene).mean() < 3


def test_grey_bilevel_and_their_alpha_forms(scene, tmp_path):
    grey = scene[..., 0]
    want = np.repeat(grey[..., None], 3, axis=2)
    for mode in ('L', 'LA'):
        np.testing.assert_array_equal(read(save(tmp_path / f'{mode}.png', grey, mode)), want)
    bilevel = save(tmp_path / '1.png', (grey > 99).astype(np.uint8) * 255, '1')
    np.testing.assert_array_equal(read(bilevel), np.where(want > 99, 255, 0))


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_sixteen_bits_are_divided_by_257(suffix, scene, tmp_path):
    grey = scene[..., 0].astype(np.uint16)
    want = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(read(save(tmp_path / f'a{suffix}', grey * 257)), want)
    for off in (-128, 128):  # to the nearest: 128 / 257 < 0.5
        near = np.clip(grey.astype(int) * 257 + off, 0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(read(save(tmp_path / f'b{suffix}', near)), want)


def test_big_endian_sixteen_bit_tiff(scene, tmp_path):
    grey = scene[..., 1].astype(np.uint16) * 257
    path = tmp_path / 'a.tif'
    image = Image.frombytes('I;16B', (40, 24), grey.astype('>u2').tobytes())
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == 'I;16B'
    np.testing.assert_array_equal(read(path)[..., 2], scene[..., 1])


@pytest.mark.parametrize('dtype, scale, offset', [
    (np.int32, 257, 0),                       # 16-bit values in 32 bits
    (np.float32, 1 / 255, 0), (np.float32, 1, 0), (np.float32, 257, 0),
    (np.int32, 10 ** 6, 5), (np.int32, 1, -100), (np.float32, 1e4, -7.0),   # stretched
])
def test_thirty_two_bits_are_scaled_and_never_clipped(dtype, scale, offset, tmp_path):
    ramp = np.arange(256).reshape(16, 16)
    path = save(tmp_path / 'a.tif', (ramp * scale + offset).astype(dtype))
    np.testing.assert_allclose(read(path)[..., 0], ramp, atol=0 if offset == 0 else 1)


@pytest.mark.parametrize('value, shown', [(0, 0), (-3, 0), (1e9, 0)])
def test_a_constant_float_picture_is_read(value, shown, tmp_path):
    path = save(tmp_path / 'a.tif', np.full((4, 4), value, np.float32))
    assert (read(path) == shown).all()


def test_values_that_are_not_finite_are_an_error(tmp_path):
    path = save(tmp_path / 'a.tif', np.array([[0, np.nan]], np.float32))
    with pytest.raises(PredictionError, match=r'holds values that are not finite\.$'):
        load_image(path)


def test_transparent_parts_are_white(scene, tmp_path):
    alpha = np.full((24, 40), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 51
    want = scene.astype(float)
    want[:, :10] = 255
    want[:, 10:20] = 255 * 0.8 + want[:, 10:20] * 0.2
    rgba = np.dstack([scene, alpha])
    for name in ('a.png', 'a.tif'):
        np.testing.assert_allclose(read(save(tmp_path / name, rgba)), want, atol=1)
    np.testing.assert_allclose(read(save(tmp_path / 'a.webp', rgba, lossless=True, exact=True)), want, atol=1)


def test_opaque_alpha_changes_nothing(scene, tmp_path):
    rgba = np.dstack([scene, np.full((24, 40), 255, np.uint8)])
    np.testing.assert_array_equal(read(save(tmp_path / 'a.png', rgba)), scene)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.frombytes('P', (2, 2), bytes([0, 1, 2, 3]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]])
    image.save(tmp_path / 'opaque.png')
    np.testing.assert_array_equal(read(tmp_path / 'opaque.png'), colours)
    image.save(tmp_path / 'index.png', transparency=2)
    image.save(tmp_path / 'bytes.png', transparency=bytes([255, 255, 0, 255]))
    image.save(tmp_path / 'index.gif', transparency=2)
    colours[1, 0] = 255
    for name in ('index.png', 'bytes.png', 'index.gif'):
        np.testing.assert_array_equal(read(tmp_path / name), colours, err_msg=name)


def test_a_transparent_colour_key_is_white(tmp_path):
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    path = save(tmp_path / 'a.png', pixels, transparency=(4, 5, 6))
    np.testing.assert_array_equal(read(path), [[[1, 2, 3], [255, 255, 255]]])


@pytest.mark.parametrize('suffix, options', [('.gif', {}), ('.webp', {'lossless': True}), ('.tif', {}), ('.png', {})])
def test_the_first_frame_counts(suffix, options, tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    frames[0].save(tmp_path / f'a{suffix}', save_all=True, append_images=frames[1:], **options)
    assert read(tmp_path / f'a{suffix}')[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize('suffix, options', [
    ('.png', {}), ('.tif', {}), ('.webp', {'lossless': True}), ('.jpg', {'quality': 100, 'subsampling': 0})])
@pytest.mark.parametrize('orientation', STORED)
def test_exif_rotation_is_applied_once(orientation, suffix, options, scene, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / f'a{suffix}', STORED[orientation](scene), exif=exif, **options)
    np.testing.assert_allclose(read(path), scene, atol=6 if suffix == '.jpg' else 0)
    assert load_image(path).getexif().get(ORIENTATION) is None  # or the next reader turns it again


@pytest.mark.parametrize('orientation', [0, 9, 65535])
def test_an_unknown_orientation_is_passed_over(orientation, scene, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(read(save(tmp_path / 'a.png', scene, exif=exif)), scene)


def test_metadata_that_cannot_be_parsed_does_not_spoil_the_picture(scene, tmp_path):
    local = random.Random(0)
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 1, 'maker'
    good = exif.tobytes()
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(local.randint(1, 6)):
            bad[local.randrange(6, len(bad))] = local.randrange(256)
        path = save(tmp_path / 'a.png', scene, exif=bytes(bad))
        assert sorted(read(path).shape[:2]) == [24, 40]


def test_the_picture_is_detached_from_its_file(scene, tmp_path):
    path = save(tmp_path / 'a.jpg', scene)
    image = load_image(path)
    path.unlink()
    assert type(image) is Image.Image and not image.info
    assert np.asarray(image).shape == (24, 40, 3)


def test_the_content_decides_not_the_suffix(scene, tmp_path):
    save(tmp_path / 'a.png', scene).rename(tmp_path / 'a.jpg')
    np.testing.assert_array_equal(read(tmp_path / 'a.jpg'), scene)


# -- what is none ----------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """The beginning of an RGB PNG that claims a size and then ends."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''))


def check_error(path: Path | str, reason: str) -> None:
    with pytest.raises(PredictionError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f'cannot read {str(path)!r}: ') and message.endswith('.') and '\n' not in message
    assert reason in message, message


def test_what_is_no_picture_file(tmp_path):
    for name, content, reason in [
            ('empty.jpg', b'', 'the file is empty'),
            ('text.jpg', b'hello, world\n', 'it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture'),
            ('page.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'it is not a JPEG'),
    ]:
        (tmp_path / name).write_bytes(content)
        check_error(tmp_path / name, reason)
    check_error(tmp_path / 'missing.jpg', 'no such file or directory')
    check_error(tmp_path / ('x' * 300 + '.jpg'), 'file name too long')
    check_error(tmp_path, 'it is a folder.')
    (tmp_path / 'line\nbreak.jpg').write_bytes(b'')
    check_error(tmp_path / 'line\nbreak.jpg', 'the file is empty')


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    check_error(tmp_path / 'pipe.jpg', 'it is not a regular file')


@pytest.mark.parametrize('suffix, options', [
    ('.jpg', {}), ('.jpg', {'progressive': True}), ('.png', {}), ('.webp', {}), ('.gif', {}), ('.bmp', {}),
    ('.tif', {}), ('.tif', {'compression': 'tiff_lzw'})])
@pytest.mark.parametrize('kept', [0.2, 0.6, 0.9])
@pytest.mark.filterwarnings('ignore:Truncated File Read:UserWarning')
def test_a_truncated_picture_is_an_error(kept, suffix, options, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f'a{suffix}', noise, **options)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * kept)])
    check_error(path, 'it is')


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.gif', '.bmp', '.tif'])
@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
def test_damage_gives_a_picture_or_one_error(suffix, scene, tmp_path):
    local = random.Random(suffix)
    path = save(tmp_path / f'a{suffix}', scene)
    good = path.read_bytes()
    outcomes = set()
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(local.randint(1, 8)):
            bad[local.randrange(len(bad) if local.random() < 0.5 else 64)] = local.randrange(256)
        path.write_bytes(bad)
        try:
            outcomes.add(load_image(path).mode)
        except PredictionError as error:
            assert str(error).startswith(f'cannot read {str(path)!r}: ') and '\n' not in str(error)
            outcomes.add('error')
    assert outcomes == {'RGB', 'error'}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('width, height', [(9_500, 9_500), (60_000, 60_000), (2 ** 31 - 1, 2 ** 31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width, height, tmp_path):
    (tmp_path / 'bomb.png').write_bytes(png_header(width, height))
    check_error(tmp_path / 'bomb.png', 'pixels')


def test_pillows_own_limit_is_the_limit(scene, tmp_path, monkeypatch):
    path = save(tmp_path / 'a.png', scene)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24 * 40)
    assert load_image(path).size == (40, 24)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24 * 40 // 2 - 1)
    check_error(path, 'could be decompression bomb')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert load_image(path).size == (40, 24)


def test_a_huge_file_is_refused_before_it_is_read(scene, tmp_path):
    path = save(tmp_path / 'a.webp', scene)
    os.truncate(path, 2 ** 31)  # a sparse file; the WebP reader would take all of it into memory
    check_error(path, 'it has 2147483648 bytes, more than 1073741824')


# -- where they are --------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, **options) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_images([folder], **options)]


def test_a_folder_gives_its_files_then_its_folders_by_name(tmp_path):
    touch(tmp_path, 'b/z.jpg', 'b/a/deep.png', 'b.jpg', 'a.png', 'Z.PNG', 'a/x y.JPeG', 'ü.webp')
    assert found(tmp_path) == ['Z.PNG', 'a.png', 'b.jpg', 'ü.webp', 'a/x y.JPeG', 'b/z.jpg', 'b/a/deep.png']


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    touch(tmp_path, *[f'a{suffix}' for suffix in IMAGE_SUFFIXES])
    touch(tmp_path, 'notes.txt', 'jpg', 'a.jpg.part', '.hidden.jpg', '._a.jpg', '.git/a.jpg')
    assert found(tmp_path) == sorted(f'a{suffix}' for suffix in IMAGE_SUFFIXES)


def test_named_files_come_in_their_order_whatever_their_name(tmp_path):
    touch(tmp_path, 'b.data', 'a.jpg', '.hidden.jpg', 'folder/c.jpg')
    names = ['b.data', 'folder', 'a.jpg', '.hidden.jpg', 'a.jpg']
    assert list(find_images([tmp_path / name for name in names])) == [
        tmp_path / name for name in ['b.data', 'folder/c.jpg', 'a.jpg', '.hidden.jpg', 'a.jpg']]


def test_links_are_followed_but_never_in_circles(tmp_path):
    touch(tmp_path, 'a/x.jpg', 'other/y.jpg')
    (tmp_path / 'a' / 'back').symlink_to('..')
    (tmp_path / 'a' / 'self').symlink_to('.')
    (tmp_path / 'a' / 'over').symlink_to(tmp_path / 'other')
    (tmp_path / 'a' / 'lost.jpg').symlink_to('nowhere.jpg')
    (tmp_path / 'a' / 'loop.jpg').symlink_to('loop.jpg')
    assert found(tmp_path) == ['a/loop.jpg', 'a/lost.jpg', 'a/x.jpg', 'a/over/y.jpg', 'other/y.jpg']


def test_folders_nest_deeper_than_calls_may(tmp_path):
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):  # by steps: the whole path would be too long for one call
            os.mkdir('d')
            os.chdir('d')
        os.chdir(before)
        touch(tmp_path, 'z.jpg')
        assert found(tmp_path)[0] == 'z.jpg'
        os.chdir(tmp_path)
        for _ in range(1200):
            os.chdir('d')
        for _ in range(1200):  # what pytest leaves behind for a while, shutil could not remove
            os.chdir('..')
            os.rmdir('d')
    finally:
        os.chdir(before)


def test_excluded_folders_are_not_entered(tmp_path):
    touch(tmp_path, 'a.jpg', 'out/b.jpg', 'c/out/d.jpg')
    assert found(tmp_path, exclude=[tmp_path / 'c' / '..' / 'out', tmp_path / 'absent']) == ['a.jpg', 'c/out/d.jpg']


@pytest.mark.parametrize('name', ['absent', 'absent.jpg', 'a.jpg/b.jpg', 'lost'])
def test_a_missing_path_is_told_before_anything_is_listed(name, tmp_path):
    touch(tmp_path, 'a.jpg')
    (tmp_path / 'lost').symlink_to('nowhere')
    with pytest.raises(FileNotFoundError, match=r"^no such file or folder: '.*'\.$"):
        find_images([tmp_path, tmp_path / name])


def test_one_path_is_no_list_of_paths():
    for path in ('photos', b'photos', Path('photos')):
        with pytest.raises(TypeError, match='paths must be a list of paths, got the single path'):
            find_images(path)


def test_listing_is_lazy(tmp_path, monkeypatch):
    touch(tmp_path, *[f'{folder}/{index}.jpg' for folder in 'abc' for index in range(3)])
    opened = []
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda folder: opened.append(Path(folder).name) or scandir(folder))
    files = find_images([tmp_path])
    assert opened == []
    assert [next(files).name for _ in range(4)] == ['0.jpg', '1.jpg', '2.jpg', '0.jpg']
    assert opened == [tmp_path.name, 'a', 'b']


@pytest.mark.skipif(os.geteuid() == 0, reason='root reads everything')
def test_a_folder_that_cannot_be_listed_comes_out_itself(tmp_path):
    touch(tmp_path, 'a.jpg', 'closed/b.jpg')
    (tmp_path / 'closed').chmod(0)
    try:
        assert found(tmp_path) == ['a.jpg', 'closed']
        check_error(tmp_path / 'closed', 'it is a folder that may not be listed')
    finally:
        (tmp_path / 'closed').chmod(0o700)
