"""A running Hub, and a model folder to push to it."""
import shutil

import pytest

from small_models import make, quick_hub


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp('made') / 'model')


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'model')


@pytest.fixture
def hub(monkeypatch):
    """A Hub with `waits`, the seconds that were asked to wait."""
    with quick_hub(monkeypatch) as (hub, waits):
        hub.waits = waits
        yield hub
