"""Pushing to a real server by the real client: one commit or none, whatever goes wrong on the way."""
import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from small_models import FILES, check_there, make, push, titles
from timm_miil._errors import HubError
from timm_miil.cli.main import main

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


# ---- as people do it


LOAD = """
import timm, timm_miil, torch
model = timm.create_model('hf-hub:me/model', pretrained=True).eval()
with torch.no_grad():
    print(model(torch.zeros(1, 3, 48, 48))[0].tolist())
"""


def test_the_command_pushes_and_timm_loads(hub, folder, tmp_path, monkeypatch, capsys):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    environment = kept | {
        'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_TOKEN': 'hf_write', 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1'}

    command = ('push', str(folder), '--repo', 'me/model')
    assert main(list(command)) == 0
    out, err = capsys.readouterr()
    assert 'me/model: sent README.md, config.json, model.safetensors, and it arrived whole' in out
    assert "now timm.create_model('hf-hub:me/model', pretrained=True) loads it" in out
    assert 'hf_write' not in out + err
    loaded = subprocess.run(
        [sys.executable, '-c', LOAD], env=environment, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        want = model(torch.zeros(1, 3, 48, 48))[0].tolist()
    assert json.loads(loaded.stdout) == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert main([*command, '--dry-run']) == 0 and 'me/model is up to date: nothing was sent' in capsys.readouterr().out
    monkeypatch.setenv('HF_TOKEN', 'hf_expired')
    assert main(list(command)) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert 'log in by `hf auth login`' in refused and 'hf_expired' not in refused
