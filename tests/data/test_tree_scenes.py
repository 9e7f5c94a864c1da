"""The offline data set with a tree: its bytes, its labels at all depths, its splits and its care for folders."""
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_miil.data import SceneConfig, TreeSceneConfig, make_scenes, make_tree_scenes, open_split, read_class_tree
from timm_miil.data import tree_scenes as tree_scenes_module

SMALL = TreeSceneConfig(
    num_colours=2, num_train=120, num_val=66, num_test=67, shares=(0.34, 0.33, 0.33), image_size=32, seed=7)
# Made by make_tree_scenes(..., SMALL) on 2026-11-27, numpy 2.4, scikit-learn 1.9, x86-64. It changes with FORMAT only.
SMALL_SHA256 = '0c69b740023ad34a0856c4e91830fe12b2c4db727e54e34b2acffcb3865141d4'


def folder_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob('*') if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b'\0')
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make_tree_scenes(tmp_path_factory.mktemp('trees') / 'small', SMALL)


def test_bytes_are_the_recorded_ones(small):
    assert folder_digest(small) == SMALL_SHA256


def test_the_tree_goes_from_coloured_digits_to_groups(small):
    tree = read_class_tree(small / 'tree.json')
    assert tree == SMALL.tree and len(tree) == 3 + 10 + 20
    index = tree.class_names.index
    assert [tree.class_names[above] for above in tree.ancestors(index('red 7'))] == ['digit 7', 'straight digit']
    depths = Counter(len(tree.ancestors(place)) for place in range(len(tree)))
    assert depths == {0: 3, 1: 10, 2: 20}
    by_group = Counter(tree.class_names[tree.ancestors(index(f'digit {digit}'))[-1]] for digit in range(10))
    assert by_group == {'round digit': 4, 'straight digit': 3, 'bent digit': 3}


def test_folders_read_as_labels_in_the_trees_order(small):
    for split in ('train', 'val', 'test'):
        records = open_split(small, split)
        assert records.label_names == SMALL.tree.class_names and len(records) == SMALL.num_pictures(split)
        assert ((records.targets == 1).sum(1) == 1).all()
        path = next((small / split / 'red 3').iterdir())
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ('PNG', 'RGB', (32, 32))


def test_each_depth_shows_each_digit_in_each_colour_equally_often():
    pool = [[digit] for digit in range(10)]
    for split in ('train', 'val', 'test'):
        plan = tree_scenes_module._plan(SMALL, split, pool)
        tree = SMALL.tree
        by_depth = {0: Counter(), 1: Counter(), 2: Counter()}
        for label, item in plan:
            above = tree.ancestors(tree.class_names.index(label))
            by_depth[len(above)][item.digit, item.colour] += 1
            family = {label, *(tree.class_names[place] for place in above)}
            whole = {f'{("red", "green")[item.colour]} {item.digit}', f'digit {item.digit}'}
            whole.add(tree_scenes_module.GROUP_OF[item.digit])
            assert family <= whole  # the label is true of the digit that is shown
        assert tuple(counts.total() for counts in by_depth.values()) == SMALL.depth_counts(split)
        for counts in by_depth.values():
            assert len(counts) == 20 and max(counts.values()) - min(counts.values()) <= 1


def test_source_digits_are_split_as_those_of_scenes_of_the_seed(monkeypatch, tmp_path):
    """So that a network pretrained on these is tested on digits that it has not seen."""
    classes = [int(digit) for digit in load_digits().target]
    drawn = {'make_scenes': {}, 'make_tree_scenes': {}}

    def record(module, kind, name):
        paint = module.paint_scene

        def painted(objects, glyphs, clutter, size, draws, **settings):
            drawn[kind].setdefault(tuple(clutter), set()).update(item.source for item in objects)
            return paint(objects, glyphs, clutter, size, draws, **settings)

        monkeypatch.setattr(module, name, painted)

    from timm_miil.data import scenes as scenes_module
    record(scenes_module, 'make_scenes', 'paint_scene')
    record(tree_scenes_module, 'make_tree_scenes', 'paint_scene')
    make_scenes(tmp_path / 'a', SceneConfig(num_train=40, num_val=24, num_test=24, image_size=32, seed=7))
    make_tree_scenes(tmp_path / 'b', SMALL)
    pools = drawn['make_tree_scenes']
    assert len(pools) == 3 and pools.keys() == drawn['make_scenes'].keys()
    assert all(used <= set(pool) for kind in drawn.values() for pool, used in kind.items())
    assert sum(map(len, pools)) == len(classes) == len(set().union(*pools))


def test_labels_of_one_depth_have_folders_of_their_own_alone(tmp_path):
    settings = {'shares': (0.0, 1.0, 0.0), 'digit_side': (0.6, 0.9), 'fragments': (0, 0)}
    config = TreeSceneConfig(**{**vars(SMALL), **settings})
    folder = make_tree_scenes(tmp_path / 'set', config)
    for split in ('train', 'val', 'test'):
        records = open_split(folder, split)
        assert records.label_names == tuple(f'digit {digit}' for digit in range(10))
        assert len(records) == config.num_pictures(split)
    assert make_tree_scenes(folder, config, on_progress=pytest.fail) == folder


def test_the_last_depth_that_is_shown_takes_what_rounding_leaves():
    config = TreeSceneConfig(num_train=101, num_val=101, num_test=101, num_colours=2, shares=(0.5, 0.5, 0.0))
    assert config.depth_counts('train') == (50, 51, 0)


def test_another_seed_gives_other_pictures(small, tmp_path):
    other = make_tree_scenes(tmp_path / 'other', TreeSceneConfig(**{**vars(SMALL), 'seed': 8}))
    contents = [{path.read_bytes() for path in folder.rglob('*.png')} for folder in (small, other)]
    assert all(len(pictures) == 253 for pictures in contents) and not contents[0] & contents[1]


def test_a_complete_folder_is_reused_and_an_incomplete_one_made_again(tmp_path):
    calls = []
    folder = make_tree_scenes(tmp_path / 'set', SMALL, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 253) for done in range(1, 254)]
    del calls[:]
    assert make_tree_scenes(folder, SMALL, on_progress=lambda *args: calls.append(args)) == folder and calls == []
    whole = folder_digest(folder)
    next((folder / 'val' / 'digit 5').iterdir()).unlink()
    make_tree_scenes(folder, SMALL)
    assert folder_digest(folder) == whole


def test_other_contents_are_refused_and_untouched(small, tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='is not empty and holds no scenes; choose another folder'):
        make_tree_scenes(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']
    other = TreeSceneConfig(**{**vars(SMALL), 'shares': (0.4, 0.3, 0.3), 'num_train': 200, 'num_val': 100,
                               'num_test': 100})
    with pytest.raises(FileExistsError, match='holds scenes made with another num_train, num_val, num_test, shares'):
        make_tree_scenes(small, other)


def test_settings_are_kept_beside_the_pictures(small):
    settings = json.loads((small / 'tree_scenes.json').read_text())
    assert settings == {
        'format': 1, **vars(SMALL), 'shares': [0.34, 0.33, 0.33], 'digit_side': [0.34, 0.5], 'fragments': [6, 14]}


@pytest.mark.parametrize(('settings', 'error', 'message'), [
    ({'num_colours': 1}, ValueError, r'num_colours must be in \[2, 9\], got 1'),
    ({'num_train': 0}, ValueError, 'num_train must be at least 1, got 0'),
    ({'num_val': 400.0}, TypeError, 'num_val must be an int, got float 400.0'),
    ({'image_size': 8}, ValueError, r'image_size must be in \[32, 1024\], got 8'),
    ({'shares': (0.5, 0.5)}, ValueError, r'shares must be 3 numbers from 0 whose sum is 1, got \(0.5, 0.5\)'),
    ({'shares': (1.5, -0.5, 0.0)}, ValueError, 'shares must be 3 numbers from 0'),
    ({'digit_side': (0.9, 0.6)}, ValueError, r'digit_side must be two rising numbers in \[0.2, 0.95\], got \(0.9, 0.6'),
    ({'digit_side': (0.5, 1.0)}, ValueError, 'digit_side must be two rising numbers'),
    ({'fragments': (-1, 4)}, ValueError, r'fragments must be two rising whole numbers in \[0, 100\], got \(-1, 4\)'),
    ({'shares': (0.5, 0.5, 0.5)}, ValueError, 'shares must be 3 numbers from 0'),
    ({'seed': -1}, ValueError, 'seed must be in .*, got -1'),
    ({'seed': 1.5}, TypeError, 'seed must be an int, got float 1.5'),
    ({'num_val': 199}, ValueError, r'num_val must be large enough.*40 pairs.*got 199 pictures, of which \(39, 59,'),
])
def test_configurations_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        TreeSceneConfig(**settings)
