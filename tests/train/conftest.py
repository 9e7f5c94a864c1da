"""A data set and a recipe that train in a second."""
from pathlib import Path

import pytest

from timm_miil.data import SceneConfig, make_scenes
from timm_miil.train import load_recipe

TINY = SceneConfig(num_classes=20, num_train=72, num_val=24, num_test=32, image_size=32)


@pytest.fixture(scope='session')
def tiny_scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('tiny') / 'scenes', TINY)


@pytest.fixture
def tiny_recipe():
    return load_recipe(Path(__file__).with_name('tiny.toml'))
