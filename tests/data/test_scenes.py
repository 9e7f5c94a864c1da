"""The offline data set: its bytes, its law, its splits and its care for folders."""
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_miil.data import SceneConfig, make_scenes, read_coco
from timm_miil.data import scenes as scenes_module
from timm_miil.data._scene_pictures import COLOURS, Draws, encode_png, paint_scene
from timm_miil.data.scenes import SPLITS

SMALL = SceneConfig(num_classes=20, num_train=40, num_val=24, num_test=32, image_size=48, seed=7)
# Made by make_scenes(..., SMALL) on 2025-11-21, numpy 2.4.6, scikit-learn 1.9.1, x86-64. It changes only with FORMAT.
SMALL_SHA256 = '605a63da0a83667e04ad204da333ad6d659f47912c97be66138b7015a2fee3f8'


def folder_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob('*') if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b'\0')
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('scenes') / 'small', SMALL)


def instances(folder, split):
    return json.loads((folder / 'annotations' / f'instances_{split}.json').read_text(encoding='utf-8'))


def test_bytes_are_the_recorded_ones(small):
    assert folder_digest(small) == SMALL_SHA256


def test_bytes_do_not_depend_on_hash_seed_or_threads(small, tmp_path):
    script = (
        'import sys; from timm_miil.data import SceneConfig, make_scenes; '
        'make_scenes(sys.argv[1], SceneConfig(num_classes=20, num_train=40, num_val=24, num_test=32, '
        'image_size=48, seed=7))')
    environment = {**os.environ, 'PYTHONHASHSEED': '12345', 'OMP_NUM_THREADS': '2'}
    subprocess.run([sys.executable, '-c', script, str(tmp_path / 'again')], check=True, env=environment)
    assert folder_digest(tmp_path / 'again') == folder_digest(small)


def test_another_seed_gives_other_pictures(small, tmp_path):
    other = make_scenes(tmp_path / 'other', SceneConfig(**{**vars(SMALL), 'seed': 8}))
    same = [
        name for name in (f'{index:06d}.png' for index in range(SMALL.num_train))
        if (small / 'train' / name).read_bytes() == (other / 'train' / name).read_bytes()]
    assert same == []


def test_json_describes_the_pictures(small):
    for split in SPLITS:
        content = instances(small, split)
        assert [row['name'] for row in content['categories']] == list(SMALL.label_names)
        assert [row['id'] for row in content['categories']] == list(range(1, 21))
        assert len(content['images']) == SMALL.num_pictures(split)
        assert sorted(path.name for path in (small / split).iterdir()) == [
            row['file_name'] for row in content['images']]
        assert [row['id'] for row in content['annotations']] == list(range(1, len(content['annotations']) + 1))
        for row in content['images']:
            with Image.open(small / split / row['file_name']) as image:
                assert (image.format, image.mode, image.size) == ('PNG', 'RGB', (48, 48))
        for row in content['annotations']:
            x, y, width, height = row['bbox']
            assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= 48 and y + height <= 48
            assert 0 < row['area'] <= width * height and row['iscrowd'] == 0


def test_a_box_holds_its_digit_in_its_colour():
    glyphs = load_digits().images / 16.0
    config = SceneConfig()
    objects = [scenes_module.SceneObject(digit=0, colour=2, source=0)]
    pixels, boxes, areas = paint_scene(objects, glyphs, [0], config.image_size, Draws(1, 2))
    distance = np.abs(pixels.astype(int) - np.array(COLOURS['blue'])).max(axis=2)
    x, y, width, height = boxes[0]
    inside = np.zeros(distance.shape, dtype=bool)
    inside[y:y + height, x:x + width] = True
    blue = distance < 90
    assert blue[inside].sum() > 0.5 * areas[0]
    assert blue[~inside].sum() < 0.1 * areas[0]


def test_labels_are_digits_and_then_colours_with_digits(small):
    names = SceneConfig(num_classes=100).label_names
    assert names[:10] == tuple(f'digit {digit}' for digit in range(10))
    assert names[10] == 'red 0' and names[99] == f'{list(COLOURS)[-1]} 9' and len(set(names)) == 100
    records = read_coco(small / 'annotations' / 'instances_train.json', small / 'train')
    digits, red = records.targets[:, :10], records.targets[:, 10:]
    assert (digits >= red).all()
    assert ((digits.sum(dim=1) >= 1) & (digits.sum(dim=1) <= SMALL.max_digits)).all()


@pytest.mark.parametrize('config', [SMALL, SceneConfig(num_classes=100), SceneConfig(imbalance=50.0)])
def test_pairs_follow_the_documented_long_tail(config):
    pool = [[digit] for digit in range(10)]
    for split in SPLITS:
        counts = Counter(
            (item.digit, item.colour) for scene in scenes_module._plan(config, split, pool) for item in scene)
        pairs = 10 * config.num_colours
        weights = {
            (digit, colour): config.imbalance ** (-(digit / 9 + colour / (config.num_colours - 1)) / 2)
            for digit in range(10) for colour in range(config.num_colours)}
        free, scale = sum(counts.values()) - pairs, sum(weights.values())
        assert set(counts) == set(weights)
        for pair, weight in weights.items():
            assert abs(counts[pair] - 1 - free * weight / scale) < 1
        assert max(weights.values()) / min(weights.values()) == pytest.approx(config.imbalance)


def test_pictures_have_one_to_max_digits_equally_often():
    pool = [[digit] for digit in range(10)]
    sizes = Counter(len(scene) for scene in scenes_module._plan(SMALL, 'train', pool))
    assert sizes == {1: 10, 2: 10, 3: 10, 4: 10}


@pytest.mark.parametrize('seed', [0, 3])
def test_no_source_digit_serves_two_splits(seed):
    classes = [int(digit) for digit in load_digits().target]
    pools = scenes_module.split_sources(classes, seed)
    used = {split: {source for sources in pools[split] for source in sources} for split in SPLITS}
    assert sum(map(len, used.values())) == len(set.union(*used.values())) == len(classes)
    for split in SPLITS:
        assert [{classes[source] for source in sources} for sources in pools[split]] == [{d} for d in range(10)]
    for split, pool in pools.items():
        for scene in scenes_module._plan(SMALL, split, pool):
            assert all(item.source in used[split] and classes[item.source] == item.digit for item in scene)


def test_a_complete_folder_is_reused(small):
    stamps = {path: path.stat().st_mtime_ns for path in small.rglob('*')}
    calls = []
    assert make_scenes(small, SMALL, on_progress=lambda done, total: calls.append(done)) == small
    assert calls == [] and {path: path.stat().st_mtime_ns for path in small.rglob('*')} == stamps


@pytest.mark.parametrize('lost', ['train/000003.png', 'annotations/instances_val.json'])
def test_an_incomplete_folder_is_made_again(tmp_path, lost):
    folder = make_scenes(tmp_path / 'set', SMALL)
    whole = folder_digest(folder)
    (folder / lost).unlink()
    make_scenes(folder, SMALL)
    assert folder_digest(folder) == whole


def test_progress_counts_every_picture(tmp_path):
    calls = []
    make_scenes(tmp_path / 'set', SMALL, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 96) for done in range(1, 97)]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / 'set', SMALL, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='is not empty and holds no scenes; choose another folder'):
        make_scenes(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_scenes_of_another_configuration_are_refused(small):
    other = SceneConfig(**{**vars(SMALL), 'seed': 9, 'num_val': 30})
    with pytest.raises(FileExistsError, match='holds scenes made with another num_val, seed; delete it or choose'):
        make_scenes(small, other)


def test_without_scikit_learn_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r'pip install "timm-miil\[train\]"'):
        make_scenes(tmp_path / 'set', SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('settings', 'error', 'message'), [
    ({'num_classes': 9}, ValueError, r'num_classes must be in \[10, 100\], got 9'),
    ({'num_classes': 101}, ValueError, r'num_classes must be in \[10, 100\], got 101'),
    ({'num_train': 0}, ValueError, 'num_train must be at least 1, got 0'),
    ({'num_val': 2.0}, TypeError, 'num_val must be an int, got float 2.0'),
    ({'image_size': 8}, ValueError, r'image_size must be in \[32, 1024\], got 8'),
    ({'max_digits': 10}, ValueError, r'max_digits must be in \[1, 9\], got 10'),
    ({'imbalance': 0.5}, ValueError, r'imbalance must be in \[1, 1e\+06\], got 0.5'),
    ({'seed': -1}, ValueError, 'seed must be in .*, got -1'),
    ({'seed': 1.5}, TypeError, 'seed must be an int, got float 1.5'),
    ({'num_test': 10}, ValueError, 'num_test must be large enough to show each of 40 pairs.*got 10 pictures with 23'),
])
def test_configurations_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        SceneConfig(**settings)


@pytest.mark.parametrize('shape', [(1, 1, 3), (5, 7, 3), (160, 170, 3)])
def test_png_files_read_back(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / 'a.png').write_bytes(encode_png(pixels))
    with Image.open(tmp_path / 'a.png') as image:
        assert np.array_equal(np.array(image), pixels)


def test_uniform_numbers_are_philox_words():
    words = np.random.Philox(key=np.array([5, 9], dtype=np.uint64)).random_raw(4)
    want = (words >> np.uint64(11)) * 2.0 ** -53
    assert Draws(5, 9).array(4).tolist() == want.tolist()
