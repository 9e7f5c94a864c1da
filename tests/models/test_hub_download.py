"""`pretrained=True` from a Hub repository: the real client in a fresh process, against a real local server."""
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch
from safetensors.torch import save

import timm_miil  # noqa: F401 - registers the models

COMMIT = '0' * 39 + '1'
TAGGED = 'mldecoder_tresnet_m.miil_coco_224'

QUESTIONS = '''
import functools, json, sys
import timm, timm_miil, torch
from timm_miil.models import load_model

def logits(name, create=functools.partial(timm.create_model, pretrained=True), **overlay):
    model = create(name, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        return model(torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))[0, :3].tolist()

answers = {
    'folder': logits('hf-hub:someone/tagger'),
    'again': logits('hf-hub:someone/tagger'),
    'fast': logits('hf-hub:someone/tagger', create=load_model),
    'tag': logits(sys.argv[1], hf_hub_id='someone/mldecoder_tresnet_m'),
}
model = timm.create_model('mldecoder', backbone='resnet10t', num_classes=5, pretrained_backbone=True)
answers['backbone'] = model.backbone.conv1[0].weight[0, 0, 0].tolist()
print(json.dumps(answers))
'''


# Asked with a namespace of one's own, of repositories that the Hub answers for by STATES.
HUB_FIRST = '''
import json, os, sys
import timm, timm_miil
from timm_miil.models._pretrained_file import PublishedFile

def first(name, **overlay):
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    return next(iter(model.state_dict().values())).flatten()[0].item()

def outcome(repository, url, token=''):
    os.environ['HF_TOKEN'] = token
    try:
        sources = dict(url=url, hf_hub_id=f'lab/{repository}')
        file = PublishedFile(sys.argv[1], url=url, hub_id=sources['hf_hub_id'])
        return first(sys.argv[1], file=file, **sources)
    except Exception as error:
        return f'{type(error).__name__}: {error}'

source, other = sys.argv[2:]
answers = {'published': first(sys.argv[1])}
answers |= {kind: outcome(kind, source) for kind in ('gated', 'refused')}
answers['another'] = outcome('another', source)
answers['no source'] = outcome('missing', None)
answers |= {kind: outcome(kind, source) for kind in ('missing', 'unknown', 'empty')}
answers['expired'] = outcome('unknown', source, token='hf_expired')
answers['refused, kept'] = outcome('refused', source)
answers['refused, not kept'] = outcome('refused', other)
print(json.dumps(answers))
'''
STATES = {
    'missing': (404, 'RepoNotFound'), 'unknown': (401, 'RepoNotFound'), 'empty': (404, 'EntryNotFound'),
    'gated': (403, 'GatedRepo'), 'refused': (403, ''),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what a download asks for: HEAD and GET of `/<repo>/resolve/<revision>/<file>`."""

    def answer(self, with_body):
        repo, _, rest = self.path[1:].partition('/resolve/')
        body = self.server.files.get((repo, rest.partition('/')[2]))
        self.server.seen.append((self.command, self.path, self.headers.get('Authorization')))
        status, code = STATES.get(repo.removeprefix('lab/'), (404, 'EntryNotFound'))
        self.send_response(200 if body is not None else status)
        self.send_header('X-Repo-Commit', COMMIT)
        if body is None:
            self.send_header('X-Error-Code', code)
            body = b''
        else:
            self.send_header('ETag', f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running(files):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.seen, server.files = [], files
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, home, code, *words, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    environment = kept | variables | {
        'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1'}
    return subprocess.run(
        [sys.executable, '-c', code, *words], env=environment, capture_output=True, text=True, timeout=300)


def logits(model):
    picture = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        return model.eval()(picture)[0, :3]


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    """What the process printed, what our own models say, and every request: (command, path, token)."""
    folder = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    tagger = timm.create_model(
        'mldecoder', backbone='resnet10t', num_classes=5, num_groups=3, embed_dim=16, feedforward_dim=16)
    timm.models.save_for_hf(
        tagger, folder / 'tagger', safe_serialization=True, model_config=dict(label_names=['a', 'b', 'c', 'd', 'e']))
    assert json.loads((folder / 'tagger' / 'config.json').read_text())['model_args']['backbone'] == 'resnet10t'
    tagged, backbone = timm.create_model(TAGGED), timm.create_model('resnet10t')

    files = {
        **{('someone/tagger', path.name): path.read_bytes() for path in (folder / 'tagger').iterdir()},
        ('someone/mldecoder_tresnet_m', 'model.safetensors'): save(tagged.state_dict()),
        ('timm/resnet10t.c3_in1k', 'model.safetensors'): save(backbone.state_dict()),
    }
    with running(files) as server:
        done = ask(server, folder / 'hf', QUESTIONS, TAGGED)
    assert done.returncode == 0, done.stderr
    own = {'folder': logits(tagger), 'tag': logits(tagged), 'backbone': backbone.conv1[0].weight[0, 0, 0].data}
    return json.loads(done.stdout), own, server.seen


def test_a_folder_on_the_hub_loads_by_its_name_and_once(asked):
    answers, own, seen = asked
    torch.testing.assert_close(torch.tensor(answers['folder']), own['folder'], rtol=1e-4, atol=1e-5)
    assert answers['again'] == answers['fast'] == answers['folder']
    fetched = [path for command, path, _ in seen if command == 'GET' and path.startswith('/someone/tagger/')]
    assert sorted(path.rpartition('/')[2] for path in fetched) == ['config.json', 'model.safetensors']


def test_published_weights_come_from_the_repository_of_the_catalogue(asked):
    answers, own, _ = asked
    torch.testing.assert_close(torch.tensor(answers['tag']), own['tag'], rtol=1e-4, atol=1e-4)


def test_a_pretrained_backbone_comes_from_timms_repository(asked):
    answers, own, _ = asked
    torch.testing.assert_close(torch.tensor(answers['backbone']), own['backbone'])


def test_nobody_logged_in_so_no_token_is_sent(asked):
    _, _, seen = asked
    assert len({path for _, path, _ in seen}) > 3 and {token for _, _, token in seen} == {None}


# ---- the repository first, and the authors' file where it is not there

SMALL = 'miil_resnet8x4.miil_student_cifar100'


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """What each answer of the Hub led to: the first number of the weights, or the error."""
    folder = tmp_path_factory.mktemp('first')
    tensors = timm.create_model(SMALL).state_dict()
    numbers = {}
    for number, where in enumerate(('published', 'source'), 1):
        numbers[where] = float(number)
        torch.save({key: torch.full_like(tensor, number) for key, tensor in tensors.items()}, folder / f'{where}.pth')
    published = {key: torch.full_like(tensor, 1) for key, tensor in tensors.items()}
    files = {
        (f'lab/{SMALL}', 'model.safetensors'): save(published),
        ('lab/another', 'model.safetensors'): save(published),
        ('lab/another', 'config.json'): json.dumps({'architecture': 'resnet18'}).encode(),
    }
    with running(files) as server:
        files['source', 'weights.pth'] = (folder / 'source.pth').read_bytes()
        urls = [f'http://127.0.0.1:{server.server_port}/source/resolve/x/{name}.pth' for name in ('weights', 'other')]
        done = ask(server, folder / 'hf', HUB_FIRST, SMALL, *urls, TIMM_MIIL_HUB_NAMESPACE='lab')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_repository_in_the_own_namespace_comes_first(outcomes):
    assert outcomes['published'] == 1


@pytest.mark.parametrize('kind', ['missing', 'unknown', 'empty', 'refused, kept'])
def test_the_authors_file_serves_where_the_repository_is_not_there_or_it_was_kept(outcomes, kind):
    assert outcomes[kind] == 2


@pytest.mark.parametrize('kind', ['gated', 'refused', 'expired', 'no source', 'refused, not kept'])
def test_a_repository_that_refuses_or_does_not_answer_is_an_error(outcomes, kind):
    repository = {'expired': 'unknown', 'no source': 'missing', 'refused, not kept': 'refused'}.get(kind, kind)
    words = f"CheckpointError: {SMALL}: the repository 'lab/{repository}' cannot be read: "
    assert outcomes[kind].startswith(words)
    assert 'dict(hf_hub_id=None)' in outcomes[kind]


def test_a_repository_of_another_network_says_how_it_is_loaded(outcomes):
    assert outcomes['another'] == (
        f"CheckpointError: {SMALL}: the repository 'lab/another' is of resnet18; load it with "
        f"timm.create_model('hf-hub:lab/another', pretrained=True).")
