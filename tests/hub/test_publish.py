"""Publishing weights of the catalogue by name: refused before any request, or converted once, sent and verified."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch

from small_models import FILES, titles  # pytest puts this folder on the path
from timm_miil._errors import CatalogError, CheckpointError, HubError
from timm_miil.cli.main import main
from timm_miil.hub.publish import publish

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCENES, STUDENT = 'mldecoder_scenes.miil_scenes', 'miil_resnet8x4.miil_student_cifar100'


def save_student(path, seed=0):
    """A file such as the authors', of weights that mean nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save({'model': timm.create_model('miil_resnet8x4').state_dict(), 'epoch': 240}, path)
    return path


def stamp(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_name_is_converted_and_sent_once(hub, tmp_path):
    done = publish(SCENES, 'lab/scenes', work_dir=tmp_path)
    assert done.changed == FILES and done.is_new and titles(hub, 'lab/scenes')[1:] == ['initial commit']
    folder = tmp_path / 'lab--scenes'
    assert all(hub.read('lab/scenes', name) == (folder / name).read_bytes() for name in FILES)
    card, config = hub.read('lab/scenes', 'README.md').decode(), json.loads(hub.read('lab/scenes', 'config.json'))
    assert 'hf-hub:lab/scenes' in card and config['conversion']['name'] == SCENES
    before, sent = stamp(folder), len(hub.requests('PUT|POST .*/commit/'))
    assert publish(SCENES, 'lab/scenes', work_dir=tmp_path).changed == ()
    assert stamp(folder) == before and len(hub.requests('PUT|POST .*/commit/')) == sent


def test_another_repository_gets_a_card_of_its_own(hub, tmp_path):
    for repo in ('me/one', 'me/two'):
        publish(SCENES, repo, work_dir=tmp_path, private=True)
        assert f'hf-hub:{repo}' in hub.read(repo, 'README.md').decode() and hub.repos[repo].private
    assert hub.read('me/one', 'model.safetensors') == hub.read('me/two', 'model.safetensors')


def test_after_trouble_what_is_finished_is_not_done_again(hub, tmp_path):
    hub.fail('POST .*/commit/', status=503, times=99)
    with pytest.raises(HubError, match='does not answer as it should'):
        publish(SCENES, 'lab/scenes', work_dir=tmp_path)
    before, sent = stamp(tmp_path / 'lab--scenes'), len(hub.requests('PUT'))
    hub.faults.clear()
    assert publish(SCENES, 'lab/scenes', work_dir=tmp_path).changed == FILES
    assert stamp(tmp_path / 'lab--scenes') == before and len(hub.requests('PUT')) == sent


def test_a_folder_that_is_not_whole_or_of_other_facts_is_made_again(hub, tmp_path, monkeypatch):
    folder = tmp_path / 'lab--scenes'

    def made_anew():
        before = stamp(folder)
        publish(SCENES, 'lab/scenes', work_dir=tmp_path, dry_run=True)
        return stamp(folder) != before

    publish(SCENES, 'lab/scenes', work_dir=tmp_path, dry_run=True)
    assert not made_anew()
    os.truncate(folder / 'model.safetensors', 1000)
    assert made_anew() and not made_anew()
    (folder / 'config.json').write_text('{}')
    assert made_anew() and not made_anew()
    (tmp_path / 'lab--scenes.facts').unlink()  # as an interruption leaves it
    assert made_anew() and not made_anew()
    (tmp_path / 'lab--scenes.facts').write_text('')
    assert made_anew() and not made_anew()
    monkeypatch.setattr(sys.modules[publish.__module__], 'CONVERTER', 'timm-miil 99')
    assert made_anew() and not made_anew()
    assert not hub.repos


def test_a_source_of_ones_own_is_taken_and_another_one_told_apart(hub, tmp_path, monkeypatch):
    source = save_student(tmp_path / 'mine.pth')
    done = publish(STUDENT, 'lab/student', source=source, work_dir=tmp_path / 'work')
    assert done.changed == FILES
    save_student(source, seed=1)
    assert publish(STUDENT, 'lab/student', source=source, work_dir=tmp_path / 'work').changed == FILES
    assert publish(STUDENT, 'lab/student', source=source, work_dir=tmp_path / 'work').changed == ()
    with pytest.raises(CheckpointError, match='HF_HUB_OFFLINE'):  # what was converted is not the published file
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        publish(STUDENT, 'lab/student', work_dir=tmp_path / 'work', cache_dir=tmp_path / 'cache')


def test_a_source_may_be_a_url(hub, tmp_path):
    (tmp_path / 'web').mkdir()
    save_student(tmp_path / 'web' / 'student.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'web')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}).start()
    try:
        url = f'http://127.0.0.1:{server.server_port}/student.pth'
        publish(STUDENT, 'lab/student', source=url, work_dir=tmp_path / 'work', cache_dir=tmp_path / 'cache')
    finally:
        server.shutdown()
        server.server_close()
    assert json.loads(hub.read('lab/student', 'config.json'))['conversion']['source_url'] == url
    # The server is gone, and what is finished needs it no more.
    again = publish(STUDENT, 'lab/student', source=url, work_dir=tmp_path / 'work', cache_dir=tmp_path / 'none')
    assert again.changed == () and not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('name', 'error', 'words'), [
    ('peta_album.miil_ml_cufed', ValueError, 'is not for the Hub: Alibaba-MIIL/PETA states no licence'),
    ('tresnet_m.miil_in1k', ValueError, 'timm has them on the Hub already, as timm/tresnet_m.miil_in1k'),
    ('stam_16.miil_k400', ValueError, 'no architecture stam_16 yet'),
    ('miil_mobilenasnet.miil_one_shot_in1k', ValueError, 'is not for the Hub: no network of the timm kind'),
    ('mldecoder_scenes.miil_scene', CatalogError, f'did you mean {SCENES!r}'),
])
def test_what_may_not_be_published_asks_nobody(hub, tmp_path, name, error, words):
    with pytest.raises(error, match=words):
        publish(name, 'lab/model', work_dir=tmp_path, cache_dir=tmp_path)
    assert not hub.seen and not list(tmp_path.iterdir())


def test_a_wrong_source_or_repository_asks_nobody(hub, tmp_path):
    (tmp_path / 'bomb.pth').write_bytes(b'\x80\x02cos\nsystem\nU\x04trueR.')
    with pytest.raises(CheckpointError):
        publish(STUDENT, 'lab/model', source=tmp_path / 'bomb.pth', work_dir=tmp_path / 'work')
    with pytest.raises(ValueError, match='repo_id must be owner/name'):
        publish(STUDENT, 'model', work_dir=tmp_path / 'work')
    assert not hub.seen and not (tmp_path / 'work' / 'lab--model').exists()


def test_a_file_of_another_class_count_is_not_sent(hub, tmp_path):
    torch.save(timm.create_model('hardcorenas_a', num_classes=7).state_dict(), tmp_path / 'seven.pth')
    for _ in range(2):  # nor is what was converted taken for finished
        with pytest.raises(CheckpointError, match='7 classes.*1000'):
            publish('hardcorenas_a.miil_kd_in1k', 'lab/seven', source=tmp_path / 'seven.pth', work_dir=tmp_path / 'w')
    assert not hub.seen


BARE = """
import sys, timm, torch
model = timm.create_model('hf-hub:lab/hardcorenas', pretrained=True).eval()
assert 'timm_miil' not in sys.modules
with torch.no_grad():
    print(model(torch.ones(1, 3, 64, 64))[0, :9].tolist())
"""


@pytest.mark.slow
def test_weights_of_a_stock_network_load_in_timm_without_us(hub, tmp_path):  # a process: 5 to 20 s
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('hardcorenas_a')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    publish(
        'hardcorenas_a.miil_kd_in1k', 'lab/hardcorenas', source=tmp_path / 'weights.pth', work_dir=tmp_path / 'work')
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    done = subprocess.run([sys.executable, '-c', BARE], capture_output=True, text=True, timeout=300, env=kept | {
        'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1', 'TIMM_MIIL_AUTOLOAD': '0'})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = model.eval()(torch.ones(1, 3, 64, 64))[0, :9].tolist()
    assert json.loads(done.stdout) == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_the_command_takes_a_name(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.chdir(tmp_path)
    assert main(['push', SCENES, '--repo', 'lab/scenes', '--dry-run']) == 0
    assert 'would make the repository and send README.md, config.json, model.safetensors' in capsys.readouterr().out
    assert main(['push', SCENES, '--repo', 'lab/scenes']) == 0
    assert 'lab/scenes: sent README.md, config.json, model.safetensors, and it arrived whole' in capsys.readouterr().out
    assert main(['push', SCENES, '--repo', 'lab/scenes']) == 0
    assert 'lab/scenes is up to date: nothing was sent' in capsys.readouterr().out
    assert (tmp_path / 'hf' / 'timm_miil' / 'converted' / 'lab--scenes' / 'model.safetensors').is_file()
    assert main(['push', 'mldecoder_scenes', '--repo', 'lab/scenes']) == 2
    told = capsys.readouterr().err
    assert f"'mldecoder_scenes' is no folder and no weights of the catalogue; did you mean {SCENES!r}?" in told
    assert 'Give the path of a folder that is there, or a name of `timm-miil list --weights`' in told


@pytest.mark.parametrize(('words', 'message'), [
    ([SCENES], 'give NAME.TAG or a model folder with --repo'), (['--repo', 'a/b'], 'give NAME.TAG or a model folder'),
    (['--all'], 'or --all with --org OWNER'), ([SCENES, '--all', '--org', 'lab'], 'a model does not go with --all'),
    (['--all', '--org', 'lab', '--create-pr'], '--create-pr does not go with --all'),
    ([SCENES, '--repo', 'a/b', '--only', '*'], '--only does not go with one model'),
    (['--all', '--org', 'lab', '--only', 'nothing*'], "no weights match 'nothing*'"),
    (['--all', '--org', 'a/b'], 'org must name a user or an organisation')])
def test_words_that_do_not_go_together(hub, words, message, capsys):
    assert main(['push', *words]) == 2
    assert message in capsys.readouterr().err and not hub.seen
