"""Verifying what a Hub gives: each way in which it can be wrong fails its own check, and nothing of it is run."""
import json
import re
import struct

import pytest
import torch

from small_models import FILES, card, make, make_converted  # pytest puts this folder on the path
from timm_miil._errors import HubError
from timm_miil.cli.main import main
from timm_miil.hub.publish import publish
from timm_miil.hub.push import push_folder
from timm_miil.hub.verify import verify_repo

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return make_converted(tmp_path_factory.mktemp('made') / 'model')


def put(hub, folder, repo='me/model', **more):
    hub.write(repo, {name: (folder / name).read_bytes() for name in FILES} | more)


def states(found):
    return {check.name: check.passed for check in found.checks}


def wrong(found):
    return {check.name: check.words for check in found.checks if check.passed is False}


def test_all_is_well_and_nothing_is_changed(hub, folder):
    put(hub, folder)
    before = len(hub.seen)
    found = verify_repo('me/model', folder=folder)
    assert found.passed and found.commit == hub.repos['me/model'].refs['main']
    assert states(found) == {
        'files': True, 'transfer': True, 'sent': True, 'config': True, 'record': True, 'catalogue': None,
        'weights': True, 'model': True, 'logits': True, 'card': True}
    assert {line.split()[0] for line in hub.requests('.')[before:]} <= {'GET', 'HEAD'}
    # Each file comes once: timm takes what is in the cache.
    assert len([line for line in hub.requests('GET .*/resolve/')[before:]]) <= 3


def test_a_trained_models_folder_is_checked_as_far_as_it_goes(hub, tmp_path):
    put(hub, make(tmp_path / 'trained'))
    found = verify_repo('me/model')
    assert found.passed and {name for name, passed in states(found).items() if passed is None} == {
        'record', 'catalogue', 'logits'}
    assert 'config.json has no record of a conversion' in [check.words for check in found.checks]


def flip_weight(content):
    return content[:-1] + bytes([content[-1] ^ 64])


def lie(content):
    size = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8:8 + size])
    first, second = [name for name in header if name != '__metadata__'][:2]
    header[first]['data_offsets'] = header[second]['data_offsets']
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + content[8 + size:]


def config(**changes):
    def changed(content):
        return json.dumps(json.loads(content) | changes).encode()
    return changed


def inside(name, **changes):
    def changed(content):
        values = json.loads(content)
        return json.dumps(values | {name: values[name] | changes}).encode()
    return changed


@pytest.mark.parametrize(('name', 'spoil', 'check', 'words'), [
    ('model.safetensors', flip_weight, 'record', 'model.safetensors has SHA-256 .*, and at its conversion it had'),
    ('model.safetensors', lambda content: content[:-1000], 'weights', '.'),
    ('model.safetensors', lambda content: b'', 'weights', '.'),
    ('model.safetensors', lambda content: struct.pack('<Q', 10 ** 10) + b'{}', 'weights', '.'),
    ('model.safetensors', lie, 'weights', '.'),
    ('model.safetensors', lambda content: b'\x80\x02cos\nsystem\nU\x04trueR.', 'weights', '.'),
    ('config.json', config(architecture='os.system'), 'config', "a name of timm's registry, got 'os.system'"),
    ('config.json', config(architecture='nowhere_net'), 'config', "no architecture 'nowhere_net'.*import the package"),
    ('config.json', config(num_classes=4), 'config', 'num_classes is 4, and in pretrained_cfg 3'),
    ('config.json', config(num_classes='3'), 'config', "num_classes must be a whole number, got '3'"),
    ('config.json', inside('pretrained_cfg', num_classes=4), 'config', 'num_classes is 3, and in pretrained_cfg 4'),
    ('config.json', inside('pretrained_cfg', file='/etc/passwd'), 'config', "another place.*file is '/etc/passwd'"),
    ('config.json', inside('pretrained_cfg', hf_hub_id='evil/model'), 'config', 'another place for the weights'),
    ('config.json', inside('pretrained_cfg', custom_load=True), 'config', 'a loader of its own'),
    ('config.json', inside('model_args', checkpoint_path='x'), 'config', "model_args has 'checkpoint_path'"),
    ('config.json', inside('model_args', backbone='hf-hub:evil/model'), 'config', 'backbone leads out of the folder'),
    ('config.json', inside('model_args', backbone='/tmp/evil'), 'config', 'backbone leads out of the folder'),
    ('config.json', inside('model_args', act_layer='os.system'), 'config', 'act_layer leads out of the folder'),
    ('config.json', inside('model_args', deep=[{'x': 'C:\\evil'}]), 'config', 'x leads out of the folder'),
    ('config.json', inside('pretrained_cfg', origin_url='file:///etc/passwd'), 'config', 'origin_url is a place'),
    ('config.json', config(label_names=['one']), 'config', '1 label names for 3 classes'),
    ('config.json', config(pretrained_cfg=[1]), 'config', r'pretrained_cfg must be an object, got \[1\]'),
    ('config.json', lambda content: b'{', 'config', 'config.json is no JSON that can be read'),
    ('config.json', lambda content: b'[' * 10 ** 6, 'config', 'config.json is no JSON that can be read'),
    ('config.json', lambda content: b'[]', 'config', 'config.json must hold an object'),
    ('config.json', lambda content: b'\xff\xfe', 'config', 'config.json is no JSON that can be read'),
    ('config.json', config(conversion=[1]), 'record', 'the record of the conversion must be an object'),
    ('config.json', inside('conversion', weights_sha256=None), 'record', 'at its conversion it had None'),
    ('config.json', inside('conversion', probe={'recipe': 'mine'}), 'logits', 'pictures made by'),
    ('config.json', inside('model_args', num_heads=4), 'logits', 'answers otherwise than at its conversion'),
    ('config.json', inside('model_args', embed_dim=32), 'model', '.'),
    ('config.json', inside('pretrained_cfg', strange=1), 'model', 'strange'),
    ('README.md', lambda content: content.replace(b'library_name: "timm"', b'library_name: "torch"'), 'card',
     "the library of the card must be timm, got 'torch'"),
    ('README.md', lambda content: content.replace(b'license: "apache-2.0"\n', b''), 'card', 'must name license'),
    ('README.md', lambda content: b'\xff', 'card', '.'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_is_wrong_fails_its_check(hub, folder, name, spoil, check, words):
    put(hub, folder)
    hub.write('me/model', {name: spoil(hub.read('me/model', name))})
    found = verify_repo('me/model')
    assert not found.passed and check in wrong(found), found.checks
    assert re.search(words, wrong(found)[check]), wrong(found)[check]
    if check in ('config', 'weights'):
        assert states(found)['model'] is states(found)['logits'] is None, 'timm is not given what is not safe'


@pytest.mark.parametrize('name', FILES)
def test_what_is_missing_is_told(hub, folder, name):
    hub.write('me/model', {other: (folder / other).read_bytes() for other in FILES if other != name})
    assert wrong(verify_repo('me/model'))['files'] == f'there is no {name}'


def test_files_that_run_code_are_told(hub, folder):
    put(hub, folder, **{'pytorch_model.bin': b'\x80\x02.'})
    assert wrong(verify_repo('me/model')) == {
        'files': "there is 'pytorch_model.bin', a file that can run code when it is loaded; delete it"}


def test_a_folder_and_a_journal_must_agree(hub, folder, tmp_path):
    put(hub, folder)
    other = make_converted(tmp_path / 'other', seed=1)
    assert wrong(verify_repo('me/model', folder=other))['sent'] == (
        'the Hub has another config.json, model.safetensors than was sent')
    with pytest.raises(FileNotFoundError, match='the journal must be a file that'):
        verify_repo('me/model', journal=tmp_path / 'none.json')
    (tmp_path / 'journal.json').write_text('{"format": "timm-miil journal 1", "entries": {}}')
    assert wrong(verify_repo('me/model', journal=tmp_path / 'journal.json')) == {
        'journal': 'the journal has no me/model'}


def test_the_catalogue_must_agree(hub, tmp_path, capsys):
    name = 'mldecoder_scenes.miil_scenes'
    done = publish(name, 'lab/scenes', work_dir=tmp_path, token='hf_write')
    assert main(['verify', 'lab/scenes']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'lab/scenes at {done.commit}: all well'
    assert ['catalogue', 'ok'] in [line.split()[:2] for line in lines] and not any('WRONG' in line for line in lines)
    config = inside('conversion', licence='MIT')(hub.read('lab/scenes', 'config.json'))
    hub.write('lab/scenes', {'config.json': config})
    assert main(['verify', 'lab/scenes']) == 1
    out = capsys.readouterr().out
    assert "the licence of mldecoder_scenes.miil_scenes is 'Apache-2.0', and config.json has 'MIT'" in out
    assert out.splitlines()[-1].endswith('2 of 9 checks failed')
    assert main(['verify', 'lab/scenes', '--revision', done.commit]) == 0
    changed = inside('conversion', source_sha256=64 * '1')(hub.read('lab/scenes', 'config.json', done.commit))
    hub.write('lab/scenes', {'config.json': changed})
    assert 'source_sha256 is' in wrong(verify_repo('lab/scenes'))['record']
    hub.write('lab/scenes', {
        'README.md': hub.read('lab/scenes', 'README.md').replace(b'license: "apache-2.0"', b'license: "mit"')})
    assert wrong(verify_repo('lab/scenes'))['card'] == (
        "the card names the licence 'mit', and mldecoder_scenes.miil_scenes has 'Apache-2.0'")


@pytest.mark.parametrize(('changes', 'words'), [
    ({'architecture': 'resnet10t'}, "is of mldecoder_scenes, and config.json has 'resnet10t'"),
    ({'num_classes': 31}, 'has 30 classes, and config.json 31')])
def test_the_network_must_be_the_entrys(hub, folder, changes, words):
    values = json.loads((folder / 'config.json').read_text()) | {'architecture': 'mldecoder_scenes', 'num_classes': 30}
    values['conversion'] |= {'name': 'mldecoder_scenes.miil_scenes'}
    put(hub, folder)
    hub.write('me/model', {'config.json': json.dumps(values | changes).encode()})
    assert words in wrong(verify_repo('me/model'))['catalogue']
    hub.write('me/model', {'config.json': json.dumps(values).encode()})
    assert words not in wrong(verify_repo('me/model')).get('catalogue', '')


@pytest.mark.parametrize('repo', ['foo', 'a/b/c', '../x', 'a/b@main', ''])
def test_a_repository_has_an_owner_and_a_name(hub, repo, capsys):
    with pytest.raises(ValueError, match='repo_id must be owner/name, got'):
        verify_repo(repo)
    assert main(['verify', repo]) == 2 and 'repo_id must be owner/name' in capsys.readouterr().err and not hub.seen


def test_the_callers_generator_is_left_alone(hub, folder):
    put(hub, folder)
    before = torch.get_rng_state()
    verify_repo('me/model')
    assert torch.equal(torch.get_rng_state(), before)


# ---- the Hub in trouble


@pytest.mark.parametrize('fault', [
    {'pattern': 'GET /api/models/me/model', 'status': 500}, {'pattern': 'GET /api/models/me/model', 'drop': 20},
    {'pattern': 'GET /api/models/me/model', 'deaf': True}, {'pattern': 'GET .*resolve.*safetensors', 'drop': 100},
    {'pattern': 'GET .*resolve.*config', 'deaf': True}, {'pattern': 'HEAD .*resolve.*config', 'status': 503},
    {'pattern': 'GET .*resolve.*safetensors', 'status': 429, 'headers': {'Retry-After': '3'}},
    {'pattern': 'GET .*resolve.*safetensors', 'status': 500}, {'pattern': 'GET .*resolve.*safetensors', 'flip': True},
    {'pattern': 'GET .*resolve.*README', 'flip': True},
    {'pattern': 'HEAD .*resolve.*safetensors', 'headers': {'ETag': '"0"', 'X-Linked-Etag': '"0"'}},
], ids=lambda fault: ' '.join(map(str, fault.values())))
def test_trouble_that_passes_is_waited_for(hub, folder, fault):
    put(hub, folder)
    hub.fail(**fault)
    found = verify_repo('me/model', folder=folder)
    assert not hub.faults[0].times, 'the fault did not happen'
    assert found.passed, found.checks


@pytest.mark.parametrize('fault', [
    {'pattern': 'GET /api/models/me/model', 'status': 500}, {'pattern': 'GET .*resolve.*safetensors', 'deaf': True},
    {'pattern': 'HEAD .*resolve', 'status': 503}], ids=lambda fault: ' '.join(map(str, fault.values())))
def test_trouble_that_stays_is_one_error(hub, folder, fault):
    put(hub, folder)
    hub.fail(**fault, times=99)
    with pytest.raises(HubError, match='the Hub does not answer as it should, 5 times'):
        verify_repo('me/model')


def test_bytes_that_come_wrong_each_time_fail_the_check(hub, folder):
    put(hub, folder)
    hub.fail('GET .*resolve.*safetensors', flip=True, times=99)
    found = verify_repo('me/model')
    assert wrong(found)['transfer'] == 'what the Hub sends of model.safetensors has not the hash that it names'
    assert states(found)['model'] is None


def test_an_answer_without_its_etag_is_one_error(hub, folder):
    put(hub, folder)
    hub.fail('HEAD .*resolve.*safetensors', bare=('ETag', 'X-Linked-Etag'), times=99)
    with pytest.raises(HubError, match='the Hub'):
        verify_repo('me/model')


def test_what_is_not_there_or_not_to_be_seen(hub, folder):
    put(hub, folder)
    hub.write('lab/secret', {name: (folder / name).read_bytes() for name in FILES}, private=True)
    assert verify_repo('lab/secret', token='hf_write').passed
    for repo, settings, words in [
            ('me/none', {}, 'there is no such repository'), ('lab/secret', {'token': 'hf_other'}, 'there is no such'),
            ('me/model', {'revision': 'v9'}, 'no such branch, tag or commit'),
            ('me/model', {'token': 'hf_expired'}, 'the Hub knows no such token')]:
        with pytest.raises(HubError, match=words) as caught:
            verify_repo(repo, **settings)
        assert settings.get('token', 'hf_') not in str(caught.value) or 'token' not in settings


def test_a_token_that_expires_in_mid_run_is_one_error(hub, folder):
    put(hub, folder)
    hub.fail('HEAD .*resolve.*safetensors', before=lambda hub: hub.users.pop('hf_write'))
    with pytest.raises(HubError, match='the Hub knows no such token'):
        verify_repo('me/model', token='hf_write')


def test_a_repository_that_was_renamed_is_followed(hub, folder):
    put(hub, folder)
    hub.move('me/model', 'lab/model')
    assert verify_repo('me/model', folder=folder).passed


def test_a_pull_requests_state_is_verified_by_its_commit(hub, folder):
    hub.write('other/model', {'notes.txt': b'theirs'})
    done = push_folder(folder, 'other/model', create_pr=True, token='hf_write')
    assert verify_repo('other/model', revision=done.commit).passed
    assert verify_repo('other/model', revision='refs/pr/1').passed
    assert wrong(verify_repo('other/model'))['files'] == 'there is no README.md, config.json, model.safetensors'


def test_a_card_that_somebody_edited_is_still_valid(hub, folder):
    put(hub, folder)
    hub.write('me/model', {'README.md': card().replace('A test.', 'My own words.').encode()})
    found = verify_repo('me/model')
    assert found.passed and found.checks[-1].words == 'valid, and edited by somebody'
