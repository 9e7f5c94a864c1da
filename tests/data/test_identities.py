"""Made-up faces: their bytes, who is in which split, what differs between pictures, and care for folders."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_miil.data import IdentityConfig, list_splits, make_identities, open_split
from timm_miil.data._face_pictures import draw_face, paint_face
from timm_miil.data._scene_pictures import Draws

SMALL = IdentityConfig(num_train=4, num_val=2, num_test=3, num_pictures=4, image_size=24, covered=0.5, seed=7)
# Made by make_identities(..., SMALL) on 2026-11-27, numpy 2.4, x86-64. It changes with FORMAT only.
SMALL_SHA256 = '414f01e45da2047e4c63c35e67910d1374007568b0ecb26fd7cdebebfe6fa60a'


def folder_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob('*') if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b'\0')
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp('identities') / 'small', SMALL)


def test_bytes_are_the_recorded_ones(small):
    assert folder_digest(small) == SMALL_SHA256


def test_no_identity_is_in_two_splits(small):
    assert list_splits(small) == ('test', 'train', 'val')
    sources = {split: open_split(small, split) for split in ('train', 'val', 'test')}
    names = [name for split in ('train', 'val', 'test') for name in sources[split].label_names]
    assert names == [f'id_{number:05d}' for number in range(9)]
    for split, source in sources.items():
        assert len(source.label_names) == len(SMALL.identities(split)) and len(source) == 4 * len(source.label_names)
        assert ((source.targets == 1).sum(1) == 1).all()
    with Image.open(small / 'train' / 'id_00000' / '00000.png') as image:
        assert (image.format, image.mode, image.size) == ('PNG', 'RGB', (24, 24))


def test_each_picture_is_another_one_and_a_seed_gives_other_faces(small, tmp_path):
    other = make_identities(tmp_path / 'other', IdentityConfig(**{**vars(SMALL), 'seed': 8}))
    contents = [{path.read_bytes() for path in folder.rglob('*.png')} for folder in (small, other)]
    assert all(len(pictures) == 36 for pictures in contents) and not contents[0] & contents[1]


def test_a_larger_set_keeps_the_pictures_of_its_first_identities(small, tmp_path):
    more = make_identities(tmp_path / 'more', IdentityConfig(**{**vars(SMALL), 'num_train': 5, 'num_pictures': 5}))
    for path in (small / 'train').rglob('*.png'):
        assert (more / path.relative_to(small)).read_bytes() == path.read_bytes()


def test_pictures_of_one_face_are_more_alike_than_those_of_two():
    """Averaged over pose and light, faces differ by far more than two halves of one's pictures do."""
    means = np.array([[
        np.mean([paint_face(face, 24, Draws(2, 1000 * number + 100 * half + index), is_covered=False)
                 for index in range(24)], axis=0)
        for half in range(2)] for number, face in enumerate(draw_face(Draws(1, number)) for number in range(6))])
    gaps = np.abs(means[:, None, 0] - means[None, :, 1]).mean((2, 3, 4))
    same, other = np.diag(gaps), gaps[~np.eye(6, dtype=bool)]
    assert same.mean() < 0.5 * other.mean()


def test_a_patch_hides_one_rectangle():
    face = draw_face(Draws(1, 0))
    bare, covered = (paint_face(face, 64, Draws(2, 5), is_covered=hides).astype(float) for hides in (False, True))
    differs = (bare != covered).any(2)
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 15 <= height <= 33 and 15 <= width <= 33     # a quarter to a half of the side, and a pixel of each edge
    assert differs[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].mean() > 0.95


def test_a_complete_folder_is_reused_and_an_incomplete_one_made_again(tmp_path):
    calls = []
    folder = make_identities(tmp_path / 'set', SMALL, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 36) for done in range(1, 37)]
    assert make_identities(folder, SMALL, on_progress=pytest.fail) == folder
    whole = folder_digest(folder)
    next((folder / 'val' / 'id_00005').iterdir()).unlink()
    make_identities(folder, SMALL)
    assert folder_digest(folder) == whole


def test_other_contents_are_refused_and_untouched(small, tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='is not empty'):
        make_identities(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']
    with pytest.raises(FileExistsError, match='made with another num_val, covered'):
        make_identities(small, IdentityConfig(**{**vars(SMALL), 'num_val': 3, 'covered': 0.1}))


def test_settings_are_kept_beside_the_pictures(small):
    assert json.loads((small / 'identities.json').read_text()) == {'format': 1, **vars(SMALL)}


@pytest.mark.parametrize(('settings', 'error', 'message'), [
    ({'num_train': 1}, ValueError, r'num_train must be in \[2, 65536\], got 1'),
    ({'num_val': 0}, ValueError, 'num_val must be at least 1, got 0'),
    ({'num_test': 4.0}, TypeError, 'num_test must be an int, got float 4.0'),
    ({'num_pictures': 1}, ValueError, r'num_pictures must be in \[2, 65536\], got 1'),
    ({'num_train': 65000, 'num_test': 1000}, ValueError, r'the identities of all splits must be in .*, got 66020'),
    ({'image_size': 16}, ValueError, r'image_size must be in \[24, 1024\], got 16'),
    ({'covered': 1.5}, ValueError, r'covered must be in \[0, 1\], got 1.5'),
    ({'seed': -1}, ValueError, 'seed must be in .*, got -1'),
    ({'seed': 1.5}, TypeError, 'seed must be an int, got float 1.5'),
])
def test_configurations_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        IdentityConfig(**settings)
