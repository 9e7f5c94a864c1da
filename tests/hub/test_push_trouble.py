"""Pushing to a Hub in trouble: it recovers or ends in one error, and nothing is ever half-written."""
import concurrent.futures

import pytest
import timm
import torch

from small_models import FILES, check_there, digests, make, push, titles
from timm_miil._errors import HubError

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


CALLS = {
    'GET /api/models/me/model$': 'status drop deaf', 'POST /api/repos/create': 'status deaf late',
    'GET .*revision/main': 'status', 'POST .*paths-info': 'status drop', 'POST .*preupload': 'status',
    'POST .*objects/batch': 'status deaf', 'PUT /storage': 'status deaf choke late', 'POST .*objects/verify': 'status',
    'POST .*validate-yaml': 'status late', 'POST .*/commit/': 'status deaf choke late drop',
    'HEAD .*resolve': 'status', 'GET .*resolve.*safetensors': 'status drop deaf flip',
}
KINDS = {
    'status': {'status': 500}, 'drop': {'drop': 10}, 'deaf': {'deaf': True}, 'choke': {'choke': 100},
    'late': {'late': True}, 'flip': {'flip': True}}
# One of each kind by default, and what a commit goes through; the same at every other call is slow.
FAST = (
    'GET /api/models/me/model$ drop', 'POST /api/repos/create late', 'POST .*objects/batch deaf', 'PUT /storage choke',
    'POST .*/commit/ status', 'POST .*/commit/ late', 'GET .*resolve.*safetensors flip')
FAST_THAT_STAY = ('GET /api/models/me/model$ status', 'POST .*objects/batch deaf', 'POST .*/commit/ status')
FAST_OF_LOADING = ('HEAD .*resolve.*config.json status', 'GET .*resolve.*safetensors drop')


def faults(calls, fast):
    """Parameters of calls and kinds of trouble, those that are not among `fast` slow."""
    return pytest.mark.parametrize('fault', [
        pytest.param(
            {'pattern': pattern, **KINDS[kind]}, id=f'{pattern} {kind}',
            marks=() if f'{pattern} {kind}' in fast else pytest.mark.slow)
        for pattern, kinds in calls for kind in kinds.split()])


@faults(CALLS.items(), FAST)
def test_trouble_that_passes_costs_nothing(hub, folder, fault):
    hub.fail(**fault)
    done = push(hub, folder)
    assert not hub.faults[0].times, 'the fault did not happen'
    check_there(hub, folder)
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'initial commit']
    assert done.commit == hub.repos['me/model'].refs['main'] and done.changed == FILES


HEADERS = {
    'seconds': ({'Retry-After': '9'}, 9), 'limit': ({'RateLimit': '"api";r=0;t=17'}, 17),
    'date': ({'Retry-After': 'Fri, 31 Dec 2199 23:59:59 GMT'}, 30)}
ASKED_AT = {'seconds': 'POST /api/repos/create', 'limit': 'POST .*paths-info', 'date': 'POST .*/commit/'}


@pytest.mark.parametrize(('kind', 'pattern'), [
    pytest.param(kind, pattern, marks=() if ASKED_AT[kind] == pattern else pytest.mark.slow)
    for kind in HEADERS for pattern in ASKED_AT.values()])
def test_a_server_that_asks_to_wait_is_waited_for(hub, folder, kind, pattern):
    headers, least = HEADERS[kind]
    hub.fail(pattern, status=429, headers=headers)
    push(hub, folder)
    check_there(hub, folder)
    assert least <= max(hub.waits) <= 120, hub.waits


@faults([(pattern, 'status deaf') for pattern in CALLS if 'resolve' not in pattern and 'verify' not in pattern],
        FAST_THAT_STAY)
def test_trouble_that_stays_is_one_error_and_nothing_is_half_written(hub, folder, fault):
    before = digests(folder)
    hub.fail(**fault, times=999)
    with pytest.raises(HubError, match='the Hub ') as caught:
        push(hub, folder)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
    assert digests(folder) == before
    if 'me/model' in hub.repos:
        assert titles(hub) == ['initial commit']
        assert set(hub.repos['me/model'].commit_at('main').files) == {'.gitattributes'}
    hub.faults.clear()
    push(hub, folder)
    check_there(hub, folder)
    assert titles(hub) == ['Upload mldecoder with timm-miil', 'initial commit']


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


def test_a_card_that_is_edited_in_the_meantime_stays(hub, folder):
    push(hub, folder)
    edited = hub.read('me/model', 'README.md').replace(b'A test.', b'My words.')
    (folder / 'README.md').write_text((folder / 'README.md').read_text() + 'more')
    hub.fail('POST .*/commit/', before=lambda hub: hub.write('me/model', {'README.md': edited}))
    with pytest.raises(HubError, match='was written or edited by somebody'):
        push(hub, folder)
    assert hub.read('me/model', 'README.md') == edited and titles(hub)[0] == 'by hand'


def test_a_branch_that_never_stands_still_is_one_error(hub, folder):
    hub.fail('POST .*/commit/', times=99, before=lambda hub: hub.write('me/model', {'notes.txt': b'again'}))
    with pytest.raises(HubError, match='others commit to it all the time'):
        push(hub, folder)
    assert set(titles(hub)) == {'by hand', 'initial commit'}


def test_two_at_once_leave_what_one_of_them_sent(hub, folder, tmp_path):
    other = make(tmp_path / 'other', seed=1, summary='Another.')
    push(hub, folder)
    (folder / 'README.md').write_bytes(make(tmp_path / 'third', summary='A third.').joinpath('README.md').read_bytes())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        # One builds upon the other's commit, whichever comes first.
        list(pool.map(lambda each: push(hub, each, verify=False), (folder, other)))
    states = [{name: hub.read('me/model', name, commit['id']) for name in FILES}
              for commit in hub.history(hub.repos['me/model'], 'main')[:2]]
    sent = [{name: (each / name).read_bytes() for name in FILES} for each in (folder, other)]
    assert states[0] in sent and states[1] in sent and states[0] != states[1]


def test_a_repository_that_was_renamed_is_pushed_to(hub, folder, tmp_path):
    push(hub, folder)
    hub.move('me/model', 'lab/model')
    other = make(tmp_path / 'other', seed=1)
    assert push(hub, other).changed == ('model.safetensors',)
    check_there(hub, other, 'lab/model')
    assert 'me/model' not in hub.repos


def test_parts_of_a_large_file_that_fail_are_sent_again(hub, folder, monkeypatch):
    monkeypatch.setattr('hub_state.MULTIPART_BYTES', 20_000)
    monkeypatch.setattr('hub_state.PART_BYTES', 20_000)
    hub.fail('PUT .*/part/2', choke=100)
    hub.fail('PUT .*/part/3', status=503)
    push(hub, folder)
    check_there(hub, folder)
    parts = hub.requests('PUT .*/part/')
    assert len(parts) == -(-(folder / 'model.safetensors').stat().st_size // 20_000) + 2, 'only those come twice'


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
    with pytest.raises(HubError, match='me/model is at [0-9a-f]{40} not what was sent .*model.safetensors'):
        push(hub, folder)
    assert push(hub, folder, verify=False).changed == ()


def test_an_upload_that_fails_says_why(hub, folder):
    hub.fail('PUT /storage', status=507, times=99)
    with pytest.raises(HubError, match='the Hub does not answer as it should, .*507'):
        push(hub, folder)


# ---- loading what was pushed, by timm and its client alone


@faults([(f'{method} .*resolve.*{name}', kinds)
         for method, kinds in (('HEAD', 'status deaf'), ('GET', 'status drop deaf'))
         for name in ('config.json', 'safetensors')], FAST_OF_LOADING)
def test_timm_loads_or_fails_and_loads_the_next_time(hub, folder, tmp_path, fault):
    push(hub, folder, verify=False)
    pictures = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    want = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(pictures)
    hub.fail(**fault)
    try:
        model = timm.create_model('hf-hub:me/model', pretrained=True, cache_dir=tmp_path / 'cache')
    except Exception:  # the client's own; what matters is what it leaves behind
        model = timm.create_model('hf-hub:me/model', pretrained=True, cache_dir=tmp_path / 'cache')
    assert not hub.faults[0].times, 'the fault did not happen'
    assert torch.equal(model.eval()(pictures), want)
