"""What a user gets: the wheel's content and metadata, and the wheel at work where there is no repository."""
import configparser
import email
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from timm_miil._version import __version__

CORE = {'torch', 'timm', 'huggingface_hub', 'safetensors'}
EXTRAS = {
    'train', 'data', 'log', 'export', 'nas', 'audio', 'video', 'demo', 'explain', 'metric', 'text', 'test', 'dev'}
INFO = f'timm_miil-{__version__}.dist-info'


@pytest.fixture(scope='module')
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith('/')}


@pytest.fixture(scope='module')
def metadata(contents):
    return email.message_from_bytes(contents[f'{INFO}/METADATA'])


def test_the_wheel_holds_the_package_the_hook_and_nothing_else(contents, source_tree):
    package = {
        str(file.relative_to(source_tree)) for file in (source_tree / 'timm_miil').rglob('*') if file.is_file()}
    assert 'timm_miil/py.typed' in package and any(name.endswith('.toml') for name in package)
    assert {name for name in contents if not name.startswith(f'{INFO}/')} == {*package, '_timm_miil_boot.py'}


def test_every_file_is_the_checkouts(contents, source_tree):
    differing = [
        name for name, content in contents.items()
        if not name.startswith(f'{INFO}/') and (source_tree / name).read_bytes() != content]
    assert differing == []


def test_the_licence_comes_along(contents, source_tree, metadata):
    assert contents[f'{INFO}/licenses/LICENSE'] == (source_tree / 'LICENSE').read_bytes()
    assert metadata['License-Expression'] == 'Apache-2.0'


def test_name_version_and_description(metadata, source_tree):
    assert (metadata['Name'], metadata['Version']) == ('timm-miil', __version__)
    assert metadata['Requires-Python'] == '>=3.11'
    assert metadata.get_payload().strip() == (source_tree / 'README.md').read_text().strip()


def test_four_core_requirements_and_the_extras(metadata):
    requirements = metadata.get_all('Requires-Dist')
    core = {re.split(r'[^\w.-]', row)[0].replace('-', '_') for row in requirements if 'extra ==' not in row}
    assert core == CORE
    assert set(metadata.get_all('Provides-Extra')) == EXTRAS


def test_the_entry_points_are_the_program_and_the_start_hook(contents):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(contents[f'{INFO}/entry_points.txt'].decode())
    assert {group: dict(entry_points[group]) for group in entry_points.sections()} == {
        'console_scripts': {'timm-miil': 'timm_miil.cli.main:main'},
        'torch.backends': {'timm_miil': '_timm_miil_boot:install'},
    }


def test_the_sdist_builds_the_same_wheel(source_tree, contents, build_distribution, tmp_path):
    sdist = build_distribution(source_tree, tmp_path / 'sdist', '--sdist')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter='data')
    rebuilt = build_distribution(tmp_path / f'timm_miil-{__version__}', tmp_path / 'wheel', '--wheel')
    with zipfile.ZipFile(rebuilt) as archive:
        again = {name: archive.read(name) for name in archive.namelist() if not name.endswith('/')}
    assert again == contents


# ---- the wheel at work, outside the checkout


@pytest.mark.slow
def test_the_program_runs(installed, tmp_path):
    version = installed.run('timm-miil', '--version', cwd=tmp_path)
    assert (version.returncode, version.stdout.split()[-1]) == (0, __version__)


@pytest.mark.slow
def test_it_lists_the_models(installed, tmp_path):
    done = installed.run('timm-miil', 'list', 'mldecoder_tresnet_*', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert 'mldecoder_tresnet_l' in done.stdout.split()


def test_the_embedded_model_works_without_the_network(installed, tmp_path):
    done = installed.run('python', '-c', '''
import json, sys
sys.addaudithook(lambda event, args: sys.exit(f'{event} {args}') if event == 'socket.getaddrinfo' else None)
import timm, torch
model = timm.create_model('mldecoder_scenes', pretrained=True).eval()
picture = torch.zeros(1, *timm.data.resolve_model_data_config(model)['input_size'])
with torch.inference_mode():
    logits = model(picture)
labels = model.pretrained_cfg['label_names']
print(json.dumps([sys.modules['timm_miil'].__file__, list(logits.shape), len(labels)]))
''', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    file, shape, num_labels = json.loads(done.stdout)
    assert Path(file).is_relative_to(installed.site_packages)
    assert shape == [1, num_labels]


def test_it_tags_a_picture(installed, tmp_path):
    Image.new('RGB', (96, 64), 'white').save(tmp_path / 'picture.png')
    done = installed.run('timm-miil', 'predict', 'picture.png', '--topk', '2', '--format', 'json', cwd=tmp_path)
    assert (done.returncode, done.stdout.count('\n')) == (0, 1), done.stderr
    record = json.loads(done.stdout)
    assert (record['path'], len(record['tags']), record['error']) == ('picture.png', 2, None)
