"""Publishing all of the catalogue: a journal that is good at any moment, and one failure that stops nobody."""
import json
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch

from small_models import quick_hub, titles  # pytest puts this folder on the path
from timm_miil import catalog
from timm_miil._errors import CatalogError, HubError
from timm_miil.cli.main import main
from timm_miil.hub._journal import open_journal, read_journal
from timm_miil.hub.publish import publish_all
from timm_miil.hub.verify import verify_repo

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCENES, STUDENT, RED = (
    'mldecoder_scenes.miil_scenes', 'miil_resnet8x4.miil_student_cifar100', 'hardcorenas_a.miil_red_in1k')
PETA, HOSTED = 'peta_album.miil_ml_cufed', 'tresnet_m.miil_in1k'
NAMES = (RED, STUDENT, SCENES, PETA, HOSTED)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HOME', str(tmp_path / 'hf'))
    with quick_hub(monkeypatch) as (hub, waits):
        yield hub


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """Files of two entries; that of the first is damaged."""
    folder = tmp_path_factory.mktemp('sources')
    torch.save(timm.create_model('miil_resnet8x4').state_dict(), folder / 'resnet8x4_student.pth')
    (folder / f'{RED}.pth').write_bytes(b'\x80\x02cos\nsystem\nU\x04trueR.')
    return folder


@pytest.fixture
def send(tmp_path, sources):
    def sent(names=NAMES, **settings):
        outcomes = publish_all('lab', names=names, **{
            'journal': tmp_path / 'journal.json', 'sources': sources, 'work_dir': tmp_path / 'work', **settings})
        return {outcome.name: outcome for outcome in outcomes}
    return sent


def states(outcomes):
    return {name: outcome.state for name, outcome in outcomes.items()}


def test_one_failure_stops_nobody_and_a_second_run_does_the_rest(hub, send, tmp_path, sources):
    told = []
    first = send(told=told.append)
    assert states(first) == {RED: 'failed', STUDENT: 'pushed', SCENES: 'pushed', PETA: 'refused', HOSTED: 'refused'}
    assert [outcome.name for outcome in told] == list(first)
    assert 'states no licence' in first[PETA].words and 'timm/tresnet_m.miil_in1k' in first[HOSTED].words
    assert set(hub.repos) == {f'lab/{STUDENT}', f'lab/{SCENES}'}

    journal = json.loads((tmp_path / 'journal.json').read_text())
    assert 'hf_write' not in json.dumps(journal) and set(journal['entries']) == {RED, STUDENT, SCENES}
    record = journal['entries'][STUDENT]
    repo = hub.repos[f'lab/{STUDENT}']
    assert (record['state'], record['commit']) == ('pushed', repo.refs['main'])
    assert record['files']['model.safetensors'] == dict(zip(('sha256', 'size'), repo.commit_at('main').lfs[
        'model.safetensors']))
    assert record['source'] == 'resnet8x4_student.pth' and len(record['source_sha256']) == 64
    assert journal['entries'][RED]['state'] == 'failed' and first[RED].words == journal['entries'][RED]['error']
    assert verify_repo(f'lab/{STUDENT}', journal=tmp_path / 'journal.json').passed

    before, mended = len(hub.seen), tmp_path / 'mended'
    mended.mkdir()
    torch.save(timm.create_model('hardcorenas_a').state_dict(), mended / f'{RED}.pth')
    again = send(sources=mended)
    assert states(again) == {
        RED: 'pushed', STUDENT: 'up to date', SCENES: 'up to date', PETA: 'refused', HOSTED: 'refused'}
    touched = hub.requests('.')[before:]
    assert not [line for line in touched if ('/commit/' in line or 'resolve' in line) and RED not in line]
    assert read_journal(tmp_path / 'journal.json')[RED].state == 'pushed'


def test_what_others_changed_is_looked_at_again(hub, send):
    send([SCENES])
    repo = f'lab/{SCENES}'
    hub.write(repo, {'notes.txt': b'mine'})
    assert states(send([SCENES])) == {SCENES: 'up to date'}, 'the files are the same'
    hub.write(repo, {'README.md': hub.read(repo, 'README.md').replace(b'# ', b'# My ', 1)})
    assert 'was written or edited by somebody' in send([SCENES])[SCENES].words
    assert states(send([SCENES], force=True)) == {SCENES: 'pushed'}
    del hub.repos[repo]
    assert states(send([SCENES])) == {SCENES: 'pushed'}


def test_what_was_sent_and_not_verified_is_verified_the_next_time(hub, send):
    hub.fail('GET .*resolve.*safetensors', flip=True, times=4)
    assert 'not what was sent' in send([SCENES])[SCENES].words
    assert 'not what was sent' in send([SCENES])[SCENES].words, 'two tries of each run came wrong'
    assert states(send([SCENES])) == {SCENES: 'up to date'} and not hub.faults[0].times
    before = len(hub.requests('resolve'))
    assert states(send([SCENES])) == {SCENES: 'up to date'} and len(hub.requests('resolve')) == before


def test_a_change_of_the_catalogue_or_the_converter_is_sent(hub, send, monkeypatch):
    send([SCENES])
    monkeypatch.setattr(sys.modules[publish_all.__module__], 'CONVERTER', 'timm-miil 99')
    assert send([SCENES], dry_run=True)[SCENES].words == (
        'the catalogue or the converter has changed since it was pushed')


def test_a_dry_run_changes_nothing(hub, send, tmp_path, capsys):
    assert states(send(dry_run=True)) == {
        RED: 'to push', STUDENT: 'to push', SCENES: 'to push', PETA: 'refused', HOSTED: 'refused'}
    assert main(['push', '--all', '--org', 'lab', '--dry-run', '--journal', str(tmp_path / 'journal.json')]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(catalog.weights()) + 2 and out[-1].endswith('to push')
    assert {line.split()[0] for line in hub.requests('.')} <= {'GET', 'HEAD'} and not hub.repos
    assert not list(tmp_path.iterdir())
    hub.write(f'lab/{SCENES}', {'notes.txt': b'mine'})
    assert 'the journal has nothing of it' in send(dry_run=True)[SCENES].words


def test_the_command_prints_a_table_and_fails_if_one_fails(hub, sources, capsys):
    words = ['push', '--all', '--org', 'lab', '--sources', str(sources)]
    assert main([*words, '--only', 'miil_resnet8x4*']) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == '1 pushed' and f'{STUDENT}: pushed' in shown.err
    assert [line.split()[:3] for line in shown.out.splitlines()[1:2]] == [[STUDENT, f'lab/{STUDENT}', 'pushed']]
    assert main([*words, '--only', 'hardcorenas_a.miil_red*']) == 1
    assert capsys.readouterr().out.splitlines()[-1] == '1 failed'
    assert main([*words, '--only', 'peta*']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '1 refused'


def test_a_token_that_expires_ends_the_run(hub, send):
    hub.fail('POST .*/commit/', before=lambda hub: hub.users.pop('hf_write'))
    outcomes = send([STUDENT, SCENES, PETA])
    assert states(outcomes) == {STUDENT: 'failed', SCENES: 'not tried', PETA: 'not tried'}
    assert 'the Hub knows no such token' in outcomes[STUDENT].words
    assert titles(hub, f'lab/{STUDENT}') == ['initial commit'] and not hub.requests(SCENES)


@pytest.mark.parametrize(('token', 'words'), [
    ('hf_read', 'the token of me may only read'), ('hf_expired', 'the Hub knows no such token')])
def test_a_token_that_may_not_is_found_out_first(hub, send, tmp_path, token, words):
    with pytest.raises(HubError, match=words):
        send(token=token)
    assert not list(tmp_path.iterdir()) and len(hub.seen) == 1


def test_notes_of_a_conversion_are_in_the_table_of_each_run(hub, send, tmp_path):
    torch.save(timm.create_model('miil_resnet8x4').state_dict(), tmp_path / f'{STUDENT}.pth')
    first = send([STUDENT], sources=tmp_path)[STUDENT]
    url, _, note = first.words.partition('; note: ')
    assert first.state == 'pushed' and note == 'neither the file nor the catalogue names its classes.'
    journal = json.loads((tmp_path / 'journal.json').read_text())
    journal['entries'][STUDENT]['notes'] = 'it is strange.'
    (tmp_path / 'journal.json').write_text(json.dumps(journal))
    again = send([STUDENT], sources=tmp_path)[STUDENT]
    assert (again.state, again.words) == ('up to date', f'{url}; note: it is strange.')
    facts = tmp_path / 'work' / f'lab--{STUDENT}.facts'
    facts.write_text(facts.read_text() + '\nits name is odd.\nand so on.')
    (tmp_path / 'journal.json').unlink()
    assert send([STUDENT], sources=tmp_path)[STUDENT].words == f'{url}; note: {note} its name is odd. and so on.'
    assert read_journal(tmp_path / 'journal.json')[STUDENT].notes == f'{note} its name is odd. and so on.'


def test_sources_must_be_there(hub, send, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="sources must be a folder that is there, got 'nowhere'"):
        send(sources='nowhere')
    assert main(['push', '--all', '--org', 'lab', '--sources', str(tmp_path / 'none'), '--dry-run']) == 2
    assert 'sources must be a folder' in capsys.readouterr().err and not hub.seen


def test_names_must_be_known(hub, send):
    with pytest.raises(CatalogError, match=f"unknown weights 'scenes.miil'; did you mean {SCENES!r}|Known"):
        send(['scenes.miil'])


# ---- the journal


def test_two_runs_do_not_share_a_journal(hub, send, tmp_path):
    with open_journal(tmp_path / 'journal.json'):
        with pytest.raises(HubError, match='another run is at work with the journal .*; wait for its end, or give'):
            send([SCENES])
    assert states(send([SCENES])) == {SCENES: 'pushed'}


SPOILT = [
    lambda text: text[:-20], lambda text: '[]', lambda text: '{}', lambda text: text.replace('journal 1', 'journal 9'),
    lambda text: text.replace('"commit": "', '"commits": "'),
    lambda text: text.replace('"state": "pushed"', '"state": 1'),
    lambda text: text.replace('"sha256": "', '"sha256": "x'), lambda text: '[' * 100_000, lambda text: '\x00']


def test_a_damaged_journal_is_one_error_and_stays(hub, send, tmp_path):
    send([SCENES])
    path, seen = tmp_path / 'journal.json', len(hub.requests('PUT|/commit/'))
    whole = path.read_text()
    for number, spoil in enumerate(SPOILT):
        path.write_text(spoil(whole))
        before = path.read_bytes()
        assert before != whole.encode(), number
        with pytest.raises(HubError, match='the journal .* is damaged: .*; move it away'):
            send([SCENES])
        assert path.read_bytes() == before and len(hub.requests('PUT|/commit/')) == seen, number


def test_an_interruption_leaves_a_good_journal(hub, tmp_path, sources, send):  # a process: 5 to 20 s
    journal = tmp_path / 'journal.json'
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    # The first entry is done; in the middle of the second somebody presses Ctrl-C.
    hub.fail(f'POST .*/lab/{SCENES}/commit/', before=lambda hub: process.send_signal(signal.SIGINT))
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_miil.cli.main', 'push', '--all', '--org', 'lab', '--journal', str(journal),
         '--sources', str(sources), '--only', '*.miil_s[ct][eu][dn]e*'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | {
            'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_TOKEN': 'hf_write', 'NO_PROXY': '127.0.0.1',
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1'})
    out, error = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT), (out, error)
    assert 'hf_write' not in out + error
    records = read_journal(journal)
    assert records[STUDENT].state == 'pushed' and SCENES not in records
    after = states(send([STUDENT, SCENES], journal=journal))
    # The commit may have landed before the process was gone.
    assert after[STUDENT] == 'up to date' and after[SCENES] in ('pushed', 'up to date')
    assert titles(hub, f'lab/{SCENES}') == ['Upload mldecoder_scenes with timm-miil', 'initial commit']
