"""Published files at first use: fetched from a real server, converted once, kept, and used again by every process."""
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import timm_miil
from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil.models._pretrained_file import PublishedFile

STOCK = 'hardcorenas_a.miil_kd_in1k'
OURS = 'miil_resnet8x4.miil_student_cifar100'
CODE = '''
import json, sys
import timm, timm_miil, torch
model = timm.create_model(sys.argv[1], pretrained=True, pretrained_cfg_overlay=json.loads(sys.argv[2]))
print(float(model.state_dict()[sys.argv[3]].double().sum()))
'''


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The Hub's home folder of this test, where converted weights are kept, and no repository to ask."""
    monkeypatch.setattr('timm_miil.models._pretrained_file.constants.HF_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home' / 'timm_miil'


def original(name, seed=0):
    """Tensors of a network, as its authors' file has them."""
    torch.manual_seed(seed)
    tensors = timm.create_model(name).state_dict()
    return {key: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


@pytest.fixture
def publish(server):
    """Serve tensors as a file that its authors wrote, and give its address."""
    def serve(tensors, name='weights.pth', **extras):
        torch.save({'state_dict': {f'module.{key}': tensor for key, tensor in tensors.items()}, **extras},
                   server.folder / name)
        return server.url(name)
    return serve


def create(name, url, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(url=url), **kwargs)


def check_equal(model, tensors):
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


def files(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file() and path.suffix != '.lock')


@pytest.mark.parametrize('name', [STOCK, OURS])
def test_the_first_load_converts_and_the_second_reads_what_was_kept(name, publish, server, home):
    tensors = original(name)
    url = publish(tensors)
    check_equal(create(name, url), tensors)
    [kept] = files(home)  # the download is gone
    with safe_open(kept, 'pt') as file:
        facts = file.metadata()
    assert (facts['name'], facts['source_url'], facts['architecture']) == (name, url, name.partition('.')[0])
    assert facts['licence'] and facts['converter'] == f'timm-miil {timm_miil.__version__}'
    assert len(facts['source_sha256']) == 64
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(kept).items())

    before = kept.stat()
    (server.folder / 'weights.pth').unlink()
    check_equal(create(name, url), tensors)
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert server.requests == ['/weights.pth']


def test_each_address_has_its_own_file(publish, home):
    first, second = original(OURS, 1), original(OURS, 2)
    urls = publish(first, 'first.pth'), publish(second, 'second.pth')
    for _ in range(2):
        check_equal(create(OURS, urls[0]), first)
        check_equal(create(OURS, urls[1]), second)
    assert len(files(home)) == 2


def test_another_conversion_makes_its_own_file(publish, server, home, monkeypatch):
    url = publish(original(OURS))
    create(OURS, url)
    monkeypatch.setattr('timm_miil.models._pretrained_file.CONVERSION', 2)
    create(OURS, url)
    assert len(files(home)) == len(server.requests) == 2


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(path.read_bytes().replace(OURS.encode(), b'another.name'.ljust(len(OURS)), 1)),
])
def test_a_damaged_file_is_made_again(damage, publish, server, home):
    tensors = original(OURS)
    url = publish(tensors)
    create(OURS, url)
    [kept] = files(home)
    whole = kept.read_bytes()
    damage(kept)
    check_equal(create(OURS, url), tensors)
    assert kept.read_bytes() == whole
    assert len(server.requests) == 2


def test_of_processes_that_start_together_one_converts(publish, server, home):
    tensors = original(STOCK)
    url = publish(tensors)
    words = [sys.executable, '-c', CODE, STOCK, json.dumps({'url': url}), 'conv_stem.weight']
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert {float(words) for words in said} == {float(tensors['conv_stem.weight'].double().sum())}
    assert server.requests == ['/weights.pth']
    assert len(files(home)) == 1


@pytest.mark.parametrize('name', [STOCK, OURS])
def test_other_classes_and_channels_are_adapted_as_ever(name, publish):
    tensors = original(name)
    url = publish(tensors)
    model = create(name, url, num_classes=7, in_chans=1)
    stem = model.pretrained_cfg['first_conv']
    torch.testing.assert_close(
        model.get_submodule(stem).weight.data, tensors[f'{stem}.weight'].sum(1, keepdim=True))
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert torch.equal(model.bn1.bias, tensors['bn1.bias'])


def test_cache_dir_holds_the_converted_file(publish, tmp_path, home):
    create(OURS, publish(original(OURS)), cache_dir=tmp_path / 'elsewhere')
    assert [path.parent for path in files(tmp_path / 'elsewhere')] == [tmp_path / 'elsewhere' / 'timm_miil']
    assert not home.exists()


def test_a_file_of_another_network_is_called_what_it_is(publish, home):
    url = publish(original('tresnet_v2_l'))
    words = (
        rf'tresnet_l.miil_coco_448: {url}: by its tensors the file is of tresnet_v2_l and not of tresnet_l and for '
        rf'1000 classes and not for 80; run `timm-miil convert {url} --as tresnet_l.miil_coco_448 -o DIR`, and load')
    with pytest.raises(CheckpointError, match=words):
        create('tresnet_l.miil_coco_448', url)
    assert files(home) == []


def test_a_pickle_that_wants_code_to_run_is_refused(publish, home, capfd):
    url = publish(original(OURS), extra=Shout())
    with pytest.raises(CheckpointError, match=f'{OURS}: {url}: .*__builtin__.print'):
        create(OURS, url)
    assert files(home) == []
    assert 'code ran' not in capfd.readouterr().out


class Shout:
    def __reduce__(self):
        return print, ('code ran',)


def test_a_dead_link_says_what_to_do(server):
    url = server.url('gone.pth')
    words = (
        rf'^{STOCK}: {url} .*404.* pretrained_cfg_overlay=dict\(url=...\) '
        rf'.*`timm-miil convert FILE --as {STOCK} -o DIR`')
    with pytest.raises(CheckpointError, match=words):
        create(STOCK, url)


def test_a_folder_that_cannot_be_written_is_named(publish, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError, match=f'{OURS}: .*{tmp_path}/file.*HF_HOME puts them elsewhere'):
        create(OURS, publish(original(OURS)), cache_dir=tmp_path / 'file')


def test_a_sum_that_differs_from_the_names_is_told(publish, caplog):
    url = publish(original(OURS), 'student_0123abcd.pth')
    create(OURS, url)
    assert 'its name says 0123abcd' in caplog.text


def test_the_catalogues_sum_is_binding(publish, monkeypatch, home):
    url, entry = publish(original(OURS)), catalog.weight(OURS)
    other = dataclasses.replace(entry, url=url, sha256='0' * 64)
    monkeypatch.setattr('timm_miil.models._pretrained_file.catalog.weight', lambda name: other)
    with pytest.raises(CheckpointError, match=f'{url}: .*SHA-256 is [0-9a-f]{{64}}, and the catalogue has 0000'):
        create(OURS, url)
    assert files(home) == []


def test_offline_what_was_kept_serves_and_nothing_else(publish, server, home):
    tensors = original(STOCK)
    url = publish(tensors)
    words = [sys.executable, '-c', CODE, STOCK, json.dumps({'url': url}), 'conv_stem.weight']
    offline = os.environ | {'HF_HUB_OFFLINE': '1'}
    refused = subprocess.run(words, env=offline, capture_output=True, text=True)
    assert refused.returncode == 1 and 'HF_HUB_OFFLINE forbids to fetch it' in refused.stderr
    assert server.requests == []
    create(STOCK, url)
    (server.folder / 'weights.pth').unlink()
    done = subprocess.run(words, env=offline, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert float(done.stdout) == float(tensors['conv_stem.weight'].double().sum())


def test_the_path_is_one_that_every_reader_takes(publish, home):
    tensors = original(OURS)
    file = PublishedFile(OURS, url=publish(tensors))
    assert os.path.isfile(file) and os.fspath(file) == str(files(home)[0])
    assert load_file(file).keys() == tensors.keys()
