"""Pushing to a real server by the real client: one commit or none, whatever goes wrong on the way."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import constants

import timm_miil  # noqa: F401 - registers the models
import timm_miil.hub._client as client_module
from server import run_hub  # pytest puts this folder on the path
from timm_miil._errors import CheckpointError, HubError
from timm_miil.hub import CardFacts, push_folder, render_card, save_model_folder

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

LABELS = ['cat', 'dog', 'emu']
FILES = ('README.md', 'config.json', 'model.safetensors')


def make(folder, seed=0, summary='A test.'):
    torch.manual_seed(seed)
    model = timm.create_model(
        'mldecoder', backbone='resnet10t', channels=(8, 8, 16, 16), stem_width=8, embed_dim=16, num_heads=2,
        feedforward_dim=32, num_classes=3, pretrained_cfg_overlay={'input_size': (3, 48, 48)})
    card = render_card(CardFacts(
        name='mldecoder.test', summary=summary, source='hf-hub:me/model', licence='apache-2.0',
        architecture='mldecoder', num_params=10, input_size=(3, 48, 48), dataset='None such', dataset_id='none',
        label_names=LABELS, metrics=[], training='Not trained.', papers=['mldecoder']))
    return save_model_folder(model, folder, label_names=LABELS, card=card)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp('made') / 'model')


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'model')


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(client_module, 'WAITS', (0.01, 0.02, 0.04))
    monkeypatch.setattr('timm_miil.hub.push.WAITS', (0.01, 0.02, 0.04))
    with run_hub() as hub:
        yield hub


def push(hub, folder, repo='me/model', **settings):
    return push_folder(folder, repo, endpoint=hub.url, **{'token': 'hf_write', **settings})


def titles(hub, repo='me/model', revision='main'):
    return [commit['title'] for commit in hub.history(hub.repos[repo], revision)]


def check_there(hub, folder, repo='me/model', revision='main'):
    for name in FILES:
        assert hub.read(repo, name, revision) == (folder / name).read_bytes(), name


# ---- all well


def test_a_folder_goes_up_in_one_commit_and_once(hub, folder):
    done = push(hub, folder)
    assert done.changed == FILES and done.is_new and done.commit == hub.repos['me/model'].refs['main']
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'initial commit']
    check_there(hub, folder)
    assert not hub.repos['me/model'].private
    before = len(hub.seen)
    again = push(hub, folder)
    assert again.changed == () and again.commit == done.commit and not again.is_new
    assert titles(hub)[1:] == ['initial commit']
    assert not [request for request in hub.requests('.')[before:] if 'preupload' in request or '/commit/' in request]


def test_what_changed_goes_up_and_what_others_added_stays(hub, folder, tmp_path):
    push(hub, folder)
    hub.write('me/model', {'notes.txt': b'mine'})
    other = make(tmp_path / 'other', seed=1)
    assert push(hub, other).changed == ('model.safetensors',)
    check_there(hub, other)
    assert hub.read('me/model', 'notes.txt') == b'mine'


def test_private_and_a_branch(hub, folder, tmp_path):
    push(hub, folder, 'lab/secret', private=True)
    assert hub.repos['lab/secret'].private
    with pytest.raises(HubError, match='other/model is there and public; make it private in its settings'):
        hub.write('other/model', {'notes.txt': b'theirs'})
        push(hub, folder, 'other/model', private=True)
    hub.repos['lab/secret'].refs['next'] = hub.repos['lab/secret'].refs['main']
    other = make(tmp_path / 'other', seed=1)
    push(hub, other, 'lab/secret', revision='next')
    check_there(hub, other, 'lab/secret', 'next')
    check_there(hub, folder, 'lab/secret')


def test_a_dry_run_asks_and_changes_nothing(hub, folder):
    done = push(hub, folder, dry_run=True)
    assert done.changed == FILES and done.commit is None and done.is_new and not hub.repos
    push(hub, folder)
    (folder / 'README.md').write_text((folder / 'README.md').read_text() + 'more\n')
    before = len(hub.seen)
    done = push(hub, folder, dry_run=True)
    assert done.changed == ('README.md',) and done.commit is None and len(titles(hub)) == 2
    assert not [request for request in hub.requests('.')[before:] if 'commit/' in request or 'create' in request]


def test_a_pull_request_is_opened_once_and_brought_up_to_date(hub, folder, tmp_path):
    hub.write('other/model', {'notes.txt': b'theirs'})
    done = push(hub, folder, 'other/model', create_pr=True)
    assert done.pull_request == f'{hub.url}/other/model/discussions/1'
    check_there(hub, folder, 'other/model', 'refs/pr/1')
    assert set(hub.repos['other/model'].commit_at('main').files) == {'.gitattributes', 'notes.txt'}
    again = push(hub, folder, 'other/model', create_pr=True)
    assert again.changed == () and again.pull_request == done.pull_request
    assert len(hub.repos['other/model'].pulls) == 1
    hub.repos['other/model'].pulls[1]['author']['name'] = 'somebody'
    assert push(hub, folder, 'other/model', create_pr=True).pull_request.endswith('/discussions/2')
    with pytest.raises(HubError, match='there is no repository me/none to propose a change to'):
        push(hub, folder, 'me/none', create_pr=True)


def test_a_card_that_somebody_edited_stays_unless_forced(hub, folder, tmp_path):
    push(hub, folder)
    edited = hub.read('me/model', 'README.md').replace(b'A test.', b'My words.')
    hub.write('me/model', {'README.md': edited})
    other = make(tmp_path / 'other', seed=1, summary='New words.')
    with pytest.raises(HubError, match=r'the card of me/model was written or edited by somebody; force replaces it'):
        push(hub, other)
    assert hub.read('me/model', 'README.md') == edited
    assert hub.read('me/model', 'model.safetensors') == (folder / 'model.safetensors').read_bytes()
    assert push(hub, other, force=True).changed == ('README.md', 'model.safetensors')
    check_there(hub, other)
    assert push(hub, folder).changed == ('README.md', 'model.safetensors'), 'a card of ours is replaced'


# ---- what goes wrong


@pytest.mark.parametrize('fault', [
    {'pattern': 'POST /api/repos/create', 'status': 503}, {'pattern': 'GET /api/models/me/model', 'status': 500},
    {'pattern': 'POST .*paths-info', 'status': 429, 'headers': {'Retry-After': '0'}},
    {'pattern': 'POST .*/commit/', 'status': 503}, {'pattern': 'POST .*/commit/', 'deaf': True},
    {'pattern': 'POST .*/commit/', 'late': True}, {'pattern': 'POST /api/repos/create', 'late': True},
    {'pattern': 'POST /api/validate-yaml', 'status': 429}, {'pattern': 'GET .*resolve.*safetensors', 'drop': 100},
    {'pattern': 'POST .*preupload', 'status': 503},
], ids=lambda fault: ' '.join(map(str, fault.values())))
def test_trouble_that_passes_costs_nothing(hub, folder, fault):
    hub.fail(**fault)
    done = push(hub, folder)
    assert not hub.faults[0].times, 'the fault did not happen'
    check_there(hub, folder)
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'initial commit']
    assert done.commit == hub.repos['me/model'].refs['main'] and done.changed == FILES


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(hub, folder):
    hub.write('other/model', {'notes.txt': b'theirs'})
    hub.fail('POST .*/commit/', late=True)
    done = push(hub, folder, 'other/model', create_pr=True)
    assert len(hub.repos['other/model'].pulls) == 1 and done.pull_request.endswith('/discussions/1')
    check_there(hub, folder, 'other/model', 'refs/pr/1')


def test_a_commit_that_came_between_is_built_upon(hub, folder):
    hub.fail('POST .*/commit/', before=lambda hub: hub.write('me/model', {'notes.txt': b'now'}))
    push(hub, folder)
    check_there(hub, folder)
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'by hand', 'initial commit']
    assert hub.read('me/model', 'notes.txt') == b'now'


def test_trouble_that_stays_is_one_error_and_leaves_the_branch(hub, folder):
    hub.write('me/model', {'notes.txt': b'mine'})
    head = hub.repos['me/model'].refs['main']
    hub.fail('POST .*/commit/', status=503, times=99)
    with pytest.raises(HubError, match='the Hub does not answer as it should'):
        push(hub, folder)
    assert hub.repos['me/model'].refs['main'] == head
    hub.faults.clear()
    sent = len(hub.requests('PUT /storage'))
    push(hub, folder)
    assert len(hub.requests('PUT /storage')) == sent == 1, 'what arrived is not sent again'
    check_there(hub, folder)


def test_what_arrives_wrong_is_told(hub, folder):
    hub.fail('GET .*resolve.*safetensors', flip=True, times=99)
    with pytest.raises(HubError, match='me/model has at [0-9a-f]{40} another model.safetensors than was sent'):
        push(hub, folder)
    assert push(hub, folder, verify=False).changed == ()


def test_an_upload_that_fails_says_why(hub, folder):
    hub.fail('PUT /storage', status=507, times=99)
    with pytest.raises(HubError, match='the Hub does not answer as it should, .*507'):
        push(hub, folder)


@pytest.mark.parametrize(('token', 'message'), [
    ('hf_expired', 'the Hub knows no such token; log in by `hf auth login`'),
    ('hf_read', 'the token may not do this'), ('hf_other', 'the token may not do this')])
def test_tokens_that_may_not(hub, folder, token, message):
    with pytest.raises(HubError, match=message) as caught:
        push(hub, folder, token=token)
    assert token not in str(caught.value) and not hub.repos


def no_licence(folder):
    text = (folder / 'README.md').read_text().replace('license: "apache-2.0"\n', '')
    (folder / 'README.md').write_text(text)


@pytest.mark.parametrize(('spoil', 'error', 'message'), [
    (lambda folder: (folder / 'config.json').unlink(), FileNotFoundError, 'it lacks config.json'),
    (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b'x'), ValueError, "other files.*'pytorch_model.bin'"),
    (no_licence, ValueError, 'the head of the card must name license'),
    (lambda folder: (folder / 'README.md').write_text('# mine'), ValueError, 'must name license'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'x' * 99), CheckpointError, 'does not load'),
    (lambda folder: (folder / 'config.json').write_text('{}'), CheckpointError, 'does not load'),
    (lambda folder: (folder / 'config.json').write_text(
        json.dumps({'architecture': 'os.system', 'num_classes': 3})), CheckpointError, 'does not load'),
])
def test_what_may_not_be_published_sends_no_request(hub, folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message):
        push(hub, folder)
    assert not hub.seen


@pytest.mark.parametrize(('settings', 'message'), [
    ({'repo': 'model'}, "repo_id must be owner/name, got 'model'"), ({'repo': 'a/b/c'}, 'repo_id must be owner/name'),
    ({'repo': '../x'}, 'repo_id must be owner/name'),
    ({'create_pr': True, 'revision': 'next'}, 'create_pr is for the branch main')])
def test_wrong_arguments_send_no_request(hub, folder, settings, message):
    with pytest.raises(ValueError, match=message):
        push(hub, folder, **settings)
    assert not hub.seen


# ---- as people do it


LOAD = """
import timm, timm_miil, torch
model = timm.create_model('hf-hub:me/model', pretrained=True).eval()
with torch.no_grad():
    print(model(torch.zeros(1, 3, 48, 48))[0].tolist())
"""


def test_the_command_pushes_and_timm_loads(hub, folder, tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    environment = kept | {
        'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_TOKEN': 'hf_write', 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1'}

    def run(*words):
        return subprocess.run(
            [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300)

    command = ('-m', 'timm_miil.cli.main', 'push', folder, '--repo', 'me/model')
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert 'me/model: sent README.md, config.json, model.safetensors, and it arrived whole' in done.stdout
    assert "now timm.create_model('hf-hub:me/model', pretrained=True) loads it" in done.stdout
    again = run(*command)
    assert again.returncode == 0 and 'me/model is up to date: nothing was sent' in again.stdout
    assert 'hf_write' not in done.stdout + done.stderr + again.stdout + again.stderr
    loaded = run('-c', LOAD)
    assert loaded.returncode == 0, loaded.stderr
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        want = model(torch.zeros(1, 3, 48, 48))[0].tolist()
    assert json.loads(loaded.stdout) == pytest.approx(want, rel=1e-5, abs=1e-6)
    environment['HF_TOKEN'] = 'hf_expired'
    refused = run(*command)
    assert refused.returncode == 2 and refused.stderr.count('\n') == 1 and 'log in by `hf auth login`' in refused.stderr
