"""What the tests of pushing and verifying share: a small model's folder, and a Hub that nobody waits for."""
import contextlib
import hashlib
import time

import timm
import torch
from huggingface_hub import constants

import timm_miil  # noqa: F401 - registers the models
from server import run_hub  # pytest puts this folder on the path
from timm_miil.hub import CardFacts, push_folder, render_card, save_model_folder
from timm_miil.hub.folder import write_model_folder

LABELS = ['cat', 'dog', 'emu']
FILES = ('README.md', 'config.json', 'model.safetensors')


def build(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(
            'mldecoder', backbone='resnet10t', channels=(8, 8, 16, 16), stem_width=8, embed_dim=16, num_heads=2,
            feedforward_dim=32, num_classes=3, pretrained_cfg_overlay={'input_size': (3, 48, 48)})


def card(summary='A test.'):
    return render_card(CardFacts(
        name='mldecoder.test', summary=summary, source='hf-hub:me/model', licence='apache-2.0',
        architecture='mldecoder', num_params=10, input_size=(3, 48, 48), dataset='None such', dataset_id='none',
        label_names=LABELS, metrics=[], training='Not trained.', papers=['mldecoder']))


def make(folder, seed=0, summary='A test.'):
    """A folder as training writes it."""
    return save_model_folder(build(seed), folder, label_names=LABELS, card=card(summary))


def make_converted(folder, seed=0, name='mldecoder.test'):
    """A folder as `convert` writes it, of weights that the catalogue does not have."""
    write_model_folder(
        build(seed).eval(), folder, card=card(), config={'label_names': LABELS},
        conversion={'name': name, 'source_sha256': 64 * '0', 'licence': 'Apache-2.0'})
    return folder


@contextlib.contextmanager
def quick_hub(monkeypatch, hub=None):
    """A Hub for this process, by endpoint or as its default; yields it and the seconds that were asked to wait."""
    waits, sleep = [], time.sleep

    def wait(seconds):
        waits.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(time, 'sleep', wait)
    with run_hub(hub) as hub:
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', f'{hub.url}/{{repo_id}}/resolve/'
                            '{revision}/{filename}')
        monkeypatch.setenv('HF_TOKEN', 'hf_write')
        yield hub, waits


def push(hub, folder, repo='me/model', **settings):
    return push_folder(folder, repo, endpoint=hub.url, **{'token': 'hf_write', **settings})


def titles(hub, repo='me/model', revision='main'):
    return [commit['title'] for commit in hub.history(hub.repos[repo], revision)]


def check_there(hub, folder, repo='me/model', revision='main'):
    for name in FILES:
        assert hub.read(repo, name, revision) == (folder / name).read_bytes(), name


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
