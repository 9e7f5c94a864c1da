"""The Hub of the tests against the real client: what it promises the tests of pushing and loading."""
import hashlib
import io

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError)

from server import run_hub  # pytest puts this folder on the path

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = b'---\nlicense: mit\ntags:\n- timm\n---\n# A card\n'
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    with run_hub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token='hf_write')


def add(path, content):
    return CommitOperationAdd(path, io.BytesIO(content))


def push(api, id, files, **settings):
    return api.create_commit(
        id, [add(path, content) for path, content in files.items()], commit_message='push', **settings)


def download(api, id, path, folder, **settings):
    return (folder / api.hf_hub_download(id, path, cache_dir=folder, **settings)).read_bytes()


def test_what_is_pushed_is_there(hub, api, tmp_path):
    assert api.whoami()['name'] == 'me'
    api.create_repo('me/model')
    api.create_repo('me/model', exist_ok=True)
    before = api.model_info('me/model').sha
    made = push(api, 'me/model', {'README.md': CARD, 'model.safetensors': WEIGHTS}, parent_commit=before)
    info = api.model_info('me/model', files_metadata=True)
    assert info.sha == made.oid != before and info.card_data.license == 'mit'
    by_name = {file.rfilename: file for file in info.siblings}
    assert by_name['model.safetensors'].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert by_name['README.md'].size == len(CARD) and by_name['README.md'].lfs is None
    assert download(api, 'me/model', 'model.safetensors', tmp_path) == WEIGHTS == hub.read(
        'me/model', 'model.safetensors')
    assert download(api, 'me/model', 'README.md', tmp_path) == CARD
    [known] = api.get_paths_info('me/model', ['model.safetensors', 'none'])
    assert known.lfs.size == len(WEIGHTS)
    assert [commit.title for commit in api.list_repo_commits('me/model')] == ['push', 'initial commit']
    assert set(api.list_repo_files('me/model')) == {'.gitattributes', 'README.md', 'model.safetensors'}
    api.create_tag('me/model', tag='v1')
    assert download(api, 'me/model', 'README.md', tmp_path, revision='v1') == CARD
    assert api.verify_repo_checksums('me/model', cache_dir=tmp_path, revision=made.oid).mismatches == []


def test_a_commit_on_another_head_is_refused(hub, api):
    api.create_repo('me/model')
    head = api.model_info('me/model').sha
    hub.write('me/model', {'README.md': b'mine'})
    with pytest.raises(HfHubHTTPError) as caught:
        push(api, 'me/model', {'config.json': b'{}'}, parent_commit=head)
    assert caught.value.response.status_code == 412
    assert hub.read('me/model', 'README.md') == b'mine' and 'config.json' not in api.list_repo_files('me/model')


def test_a_pull_request_leaves_main_alone(hub, api, tmp_path):
    hub.write('other/model', {'README.md': b'theirs'})
    made = push(api, 'other/model', {'README.md': CARD}, create_pr=True)
    assert made.pr_revision == 'refs/pr/1' and hub.read('other/model', 'README.md') == b'theirs'
    assert download(api, 'other/model', 'README.md', tmp_path, revision='refs/pr/1') == CARD
    with pytest.raises(HfHubHTTPError, match='may not write'):
        push(api, 'other/model', {'README.md': CARD})
    [pull] = api.get_repo_discussions('other/model')
    assert pull.is_pull_request and pull.title == 'push'


def test_who_may_see_and_write(hub, api):
    hub.write('lab/secret', {'README.md': CARD}, private=True)
    assert api.model_info('lab/secret').private
    for token in ('hf_other', False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=token).model_info('lab/secret')
    with pytest.raises(HfHubHTTPError, match='403|may not'):
        push(HfApi(endpoint=hub.url, token='hf_read'), 'lab/secret', {'config.json': b'{}'})
    with pytest.raises(HfHubHTTPError, match='(?i)invalid .*token|401'):
        HfApi(endpoint=hub.url, token='hf_expired').whoami()
    assert api.create_repo('lab/new', private=True) and hub.repos['lab/new'].private


def test_what_is_not_there(hub, api, tmp_path):
    hub.write('me/model', {'README.md': CARD})
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download('me/model', 'config.json', cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download('me/model', 'README.md', revision='v9', cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info('me/nothing')


def test_a_repository_that_was_renamed_is_found(hub, api, tmp_path):
    hub.write('me/model', {'README.md': CARD})
    hub.move('me/model', 'lab/model')
    assert api.model_info('me/model').id == 'lab/model'
    assert download(api, 'me/model', 'README.md', tmp_path) == CARD


def test_large_files_go_up_in_parts(hub, api):
    api.create_repo('me/model')
    large = WEIGHTS * 500
    push(api, 'me/model', {'model.safetensors': large})
    assert hub.read('me/model', 'model.safetensors') == large
    assert len(hub.requests('PUT .*/part/')) == 5
    push(api, 'me/model', {'model.safetensors': large, 'config.json': b'{}'})
    assert len(hub.requests('PUT .*/part/')) == 5, 'what is there is not sent again'


def test_faults_happen_to_what_they_match_and_then_no_more(hub, api, tmp_path):
    hub.write('me/model', {'model.safetensors': WEIGHTS})
    hub.fail('GET /api/models/me/model', status=503)
    with pytest.raises(HfHubHTTPError, match='503'):
        api.model_info('me/model')
    assert api.model_info('me/model').id == 'me/model'
    # The client goes on behind what has come, and does not see a bit that is wrong.
    hub.fail('GET .*/resolve/.*safetensors', drop=5000)
    assert download(api, 'me/model', 'model.safetensors', tmp_path / 'a') == WEIGHTS
    hub.fail('GET .*/resolve/.*safetensors', flip=True)
    wrong = download(api, 'me/model', 'model.safetensors', tmp_path / 'b')
    assert len(wrong) == len(WEIGHTS) and wrong != WEIGHTS
    hub.fail('POST .*/commit/main', late=True)
    with pytest.raises(Exception, match='(?i)disconnected|closed|reset|peer'):
        push(api, 'me/model', {'config.json': b'{}'})
    assert hub.read('me/model', 'config.json') == b'{}', 'the commit landed all the same'
    hub.fail('POST .*/preupload/', status=429, headers={'Retry-After': '0'})
    push(api, 'me/model', {'config.json': b'[]'})
    assert hub.read('me/model', 'config.json') == b'[]'


def test_versions():
    assert int(huggingface_hub.__version__.partition('.')[0]) in (1, 2)
