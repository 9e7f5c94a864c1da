"""A data set and a recipe that train in a second."""
from pathlib import Path

import pytest

from timm_miil.data import SceneConfig, TreeSceneConfig, make_scenes, make_tree_scenes
from timm_miil.train import load_recipe

TINY = SceneConfig(num_classes=20, num_train=72, num_val=24, num_test=32, image_size=32)
TREE = TreeSceneConfig(num_colours=2, num_train=100, num_val=100, num_test=100, image_size=32)


@pytest.fixture(scope='session')
def tiny_scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('tiny') / 'scenes', TINY)


@pytest.fixture(scope='session')
def tiny_tree(tmp_path_factory):
    """Pictures of one label each of 33, which form a tree."""
    return make_tree_scenes(tmp_path_factory.mktemp('tiny_tree') / 'scenes', TREE)


@pytest.fixture
def tiny_recipe():
    return load_recipe(Path(__file__).with_name('tiny.toml'))
