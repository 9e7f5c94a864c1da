"""What is not pushed, by whom not, and what nobody gets to see: tokens."""
import json
import logging
import shutil

import pytest

from small_models import FILES, digests, make_converted, push, titles
from timm_miil._errors import CheckpointError, HubError
from timm_miil.cli.main import main
from timm_miil.hub import push_folder
from timm_miil.hub._client import HubClient, without_secrets

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.parametrize(('token', 'message'), [
    ('hf_expired', 'the Hub knows no such token; log in by `hf auth login`'),
    ('hf_read', 'the token may not do this'), ('hf_other', 'the token may not do this')])
def test_tokens_that_may_not(hub, folder, token, message):
    with pytest.raises(HubError, match=message) as caught:
        push(hub, folder, token=token)
    assert token not in str(caught.value) and not hub.repos


SECRET = 'hf_' + 'SeCrEtToKeN' * 3


@pytest.mark.parametrize('words', [
    f'Illegal header value b"Bearer {SECRET}"', f'http://me:{SECRET}@hub.local', f'http://hub.local/?token={SECRET}',
    f'for {SECRET!r}.', "'authorization': 'Bearer abc.def'", 'http://me:pass@hub.local'])
def test_secrets_are_hidden_in_any_words(words):
    hidden = without_secrets(words)
    assert '***' in hidden and not any(secret in hidden for secret in (SECRET, 'abc.def', 'pass'))
    assert without_secrets('nothing to hide: hf_hub_download, 5 tokens') == 'nothing to hide: hf_hub_download, 5 tokens'
    assert without_secrets('my own-token is', 'own-token') == 'my *** is'


@pytest.mark.parametrize('debug', [[], ['--debug']])
@pytest.mark.parametrize('fault', [
    {'pattern': 'POST .*/commit/', 'status': 500, 'times': 99}, {'pattern': 'POST .*/commit/', 'status': 400},
    {'pattern': 'POST .*paths-info', 'status': 403}, {'pattern': 'GET /api/models', 'deaf': True, 'times': 99}])
def test_a_token_is_never_shown(hub, folder, monkeypatch, capsys, caplog, fault, debug):
    caplog.set_level(logging.DEBUG)
    hub.users[SECRET] = hub.users['hf_write']
    monkeypatch.setenv('HF_TOKEN', SECRET)
    hub.fail(**fault, headers={'X-Error-Message': f'not with {SECRET}', 'X-Request-Id': SECRET})
    assert main(['push', str(folder), '--repo', 'me/model', *debug]) == 2
    shown = capsys.readouterr()
    assert 'timm-miil push: the ' in shown.err and (debug == []) == ('Traceback' not in shown.err)
    assert SECRET not in shown.out + shown.err
    assert SECRET not in ''.join(record.getMessage() for record in caplog.records if 'timm_miil' in record.name)


def test_a_password_in_the_endpoint_is_never_shown(folder, monkeypatch, capsys):
    monkeypatch.setattr('timm_miil.hub._client.WAITS', ())
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', f'http://me:{SECRET}@127.0.0.1:9')
    assert main(['push', str(folder), '--repo', 'me/model', '--debug']) == 2
    shown = capsys.readouterr()
    assert 'does not answer as it should' in shown.err and SECRET not in shown.out + shown.err
    assert HubClient('x', f'http://me:{SECRET}@hub.local').url('me/model') == 'http://***@hub.local/me/model'


@pytest.mark.parametrize('token', ['hf_two words', 'hf_line\nend', 'hf_\x00', 'hf_ü'])
def test_a_token_with_strange_characters_is_refused_unshown(hub, folder, token):
    with pytest.raises(HubError, match='characters that no token has') as caught:
        push(hub, folder, token=token)
    assert token not in str(caught.value) and token not in repr(caught.value) and not hub.seen


def test_without_a_token_it_is_said(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'none'))
    monkeypatch.setattr('huggingface_hub.constants.HF_STORED_TOKENS_PATH', str(tmp_path / 'none'))
    with pytest.raises(HubError, match='there is no token; log in by `hf auth login`, or set HF_TOKEN'):
        push_folder(folder, 'me/model', endpoint=hub.url)
    assert not hub.repos


@pytest.mark.parametrize('pattern', ['POST /api/repos/create', 'POST .*preupload', 'POST .*batch', 'POST .*/commit/'])
def test_a_token_that_expires_in_mid_run_is_one_error(hub, folder, pattern):
    hub.fail(pattern, before=lambda hub: hub.users.pop('hf_write'))
    with pytest.raises(HubError, match='the Hub knows no such token'):
        push(hub, folder)
    assert 'me/model' not in hub.repos or titles(hub) == ['initial commit']


# ---- who may publish what


def set_licence(folder, licence):
    card = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text(card.replace('license: "apache-2.0"', f'license: {licence}'))


@pytest.mark.parametrize('licence', ['unknown', 'none', 'None', '"n/a"', 'unlicensed'])
def test_a_card_that_names_no_licence_sends_no_request(hub, folder, licence):
    set_licence(folder, licence)
    with pytest.raises(ValueError, match='licen[cs]e'):
        push(hub, folder)
    assert not hub.seen


@pytest.mark.parametrize(('name', 'words'), [
    ('peta_album.miil_ml_cufed', 'states no licence'), ('tresnet_m.miil_in1k', 'timm has them on the Hub already'),
    ('stam_16.miil_k400', 'no architecture stam_16 yet'),
    ('mldecoder_tresnet_m.miil_coco_224', "names 'apache-2.0' for a licence, and .* has 'MIT'; convert it again"),
])
def test_a_converted_folder_of_the_catalogue_must_be_publishable(hub, tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        push(hub, make_converted(tmp_path / 'model', name=name))
    assert not hub.seen


def test_a_converted_folder_must_be_as_it_was_converted(hub, tmp_path):
    folder = make_converted(tmp_path / 'model')
    assert push(hub, folder).changed == FILES
    other = make_converted(tmp_path / 'other', seed=1)
    shutil.copy(other / 'model.safetensors', folder / 'model.safetensors')
    with pytest.raises(CheckpointError, match='not as it was converted: model.safetensors is another one'):
        push(hub, folder)
    config = json.loads((folder / 'config.json').read_text())
    config['conversion']['weights_sha256'] = digests(folder)['model.safetensors']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='not as it was converted: the model answers otherwise'):
        push(hub, folder)
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'initial commit']


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
