"""`pretrained=True` from a Hub repository: the real client in a fresh process, against a real local server."""
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
from safetensors.torch import save_file

import timm_miil  # noqa: F401 - registers the models

TAG = 'miil_coco_224'
COMMIT = '0' * 39 + '1'

LOAD = '''
import json, sys
import timm, timm_miil, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
picture = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
with torch.inference_mode():
    print(json.dumps(model(picture)[0, :3].tolist()))
'''


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what a download asks for: HEAD and GET of `/<repo>/resolve/<revision>/<file>`."""

    def answer(self, with_body):
        repo, _, rest = self.path[1:].partition('/resolve/')
        body = self.server.files.get((repo, rest.partition('/')[2]))
        self.server.seen.append((self.command, self.path, self.headers.get('Authorization')))
        self.send_response(200 if body is not None else 404)
        self.send_header('X-Repo-Commit', COMMIT)
        if body is None:
            self.send_header('X-Error-Code', 'EntryNotFound')
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


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.seen = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_on_the_hub_loads_by_its_name(hub, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        'mldecoder', backbone='resnet10t', num_classes=5, num_groups=3, embed_dim=16, feedforward_dim=16).eval()
    folder = tmp_path / 'folder'
    labels = ['a', 'b', 'c', 'd', 'e']
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config=dict(label_names=labels))
    for name in ('config.json', 'model.safetensors'):
        hub.files['someone/tagger', name] = (folder / name).read_bytes()
    assert json.loads((folder / 'config.json').read_text())['model_args']['backbone'] == 'resnet10t'
    got = load('hf-hub:someone/tagger', hub, tmp_path)
    picture = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.tensor(got), model(picture)[0, :3], rtol=1e-4, atol=1e-5)
    # Nobody logged in: the token of the process must not be sent where nobody asked for it.
    assert {token for _, _, token in hub.seen} == {None}
    asked = len(hub.seen)
    assert load('hf-hub:someone/tagger', hub, tmp_path) == got
    assert not [path for command, path, _ in hub.seen[asked:] if command == 'GET']  # from the cache


def test_published_weights_come_from_the_repository_of_the_catalogue(hub, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(f'mldecoder_tresnet_m.{TAG}').eval()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    hub.files['someone/mldecoder_tresnet_m', 'model.safetensors'] = (tmp_path / 'model.safetensors').read_bytes()
    overlay = "pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='someone/mldecoder_tresnet_m')"
    got = load(f'mldecoder_tresnet_m.{TAG}', hub, tmp_path, script=LOAD.replace('pretrained=True', overlay))
    picture = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.tensor(got), model(picture)[0, :3], rtol=1e-4, atol=1e-4)


def test_a_pretrained_backbone_comes_from_timms_repository(hub, tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model('resnet10t')
    save_file(backbone.state_dict(), tmp_path / 'model.safetensors')
    hub.files['timm/resnet10t.c3_in1k', 'model.safetensors'] = (tmp_path / 'model.safetensors').read_bytes()
    script = '''
import json, sys, timm, timm_miil
model = timm.create_model('mldecoder', backbone=sys.argv[1], num_classes=5, pretrained_backbone=True)
print(json.dumps(model.backbone.conv1[0].weight[0, 0, 0].tolist()))
'''
    got = load('resnet10t', hub, tmp_path, script=script)
    torch.testing.assert_close(torch.tensor(got), backbone.conv1[0].weight[0, 0, 0].data)


def load(name, hub, tmp_path, script=LOAD):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TORCH_'))}
    environment = kept | {
        'HF_ENDPOINT': f'http://127.0.0.1:{hub.server_port}', 'HF_HOME': str(tmp_path / 'hf'),
        'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1'}
    done = subprocess.run(
        [sys.executable, '-c', script, name], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
