"""Real picture files for the readers' tests."""
import io

import pytest
from PIL import Image


@pytest.fixture(scope='session')
def jpeg() -> bytes:
    """The bytes of a small JPEG."""
    file = io.BytesIO()
    Image.new('RGB', (5, 3), (200, 30, 40)).save(file, 'JPEG')
    return file.getvalue()


@pytest.fixture
def add_pictures(jpeg, tmp_path):
    """Write JPEG files below `tmp_path`, with the folders that they need."""
    def add(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(jpeg)
        return tmp_path
    return add
