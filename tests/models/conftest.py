"""Checkpoints in the original layout, made by the rule that made the fixtures, and a real server that serves them."""
import http.server
import json
import math
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ARCH = Path(__file__).parents[1] / 'fixtures' / 'arch'
GAIN = 2.0


class ArchFixture:
    """One architecture case: the outputs of the original network with weights of rule "philox-u12/1"."""

    def __init__(self, case):
        self.facts = json.loads((ARCH / f'{case}.json').read_text())
        self.expected = load_file(ARCH / f'{case}.safetensors')
        assert self.facts['rule'] == 'philox-u12/1'

    def state_dict(self):
        """The original checkpoint's tensors under the original's keys."""
        gain = self.facts.get('conv_gain', GAIN)
        return {key: weight(self.facts['salt'] + key, key, shape, dtype, gain)
                for key, shape, dtype in self.facts['entries']}

    def images(self):
        n, c, h, w = shape = self.facts['input_shape']
        i, j, y, x = np.meshgrid(*map(np.arange, shape), indexing='ij')
        ramp = (y * (j + 1) + x * (i + 1)) / h
        values = (0.5 * uniform(self.facts['input_name'], shape) + 0.5 * (ramp % 1)) * (1 + (5 * i + 3 * j) % 7) / 7
        return torch.from_numpy(values.astype(np.float32))

    def check_logits(self, logits):
        bound = max(1e-5, 10 * self.facts['float32_vs_float64_relative_l2'])
        assert list(logits.shape) == self.facts['logits_shape']
        want = self.expected['logits_first64']
        got = logits[:, :want.shape[1]]
        assert (got - want).norm() / want.norm() <= bound
        assert logits.argmax(1).tolist() == self.facts['argmax']
        torch.testing.assert_close(
            logits.double().norm(dim=1), self.expected['logits_l2'].double(), rtol=bound, atol=0)


def uniform(name, shape):
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return generator.random(math.prod(shape)).reshape(shape)


def weight(name, key, shape, dtype, gain):
    last = key.rpartition('.')[2]
    if last == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.int64)
    u = uniform(name, shape)
    z = math.sqrt(12) * (u - 0.5)
    if last == 'running_var':
        values = 0.5 + u
    elif last == 'running_mean' or last.endswith('bias'):
        values = 0.1 * z
    elif last.endswith('weight') and len(shape) == 1:
        values = 0.6 + 0.6 * u
        values[4::5] *= -1
    elif last.endswith('weight'):
        values = z * math.sqrt((gain if len(shape) == 4 else 1) / math.prod(shape[1:]))
    else:
        values = 0.5 * z
    assert dtype == 'float32'
    return torch.from_numpy(values.astype(np.float32))


class Server:
    """A web server on this machine that gives the files of a folder, or a wrong answer set by `answers`."""

    def __init__(self, folder):
        self.folder, self.answers, self.requests = folder, {}, []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                if self.path not in outer.answers:
                    super().do_GET()
                    return
                status, length, body = outer.answers[self.path]
                self.send_response(status)
                self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), lambda *args: Handler(*args, directory=str(folder)))
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def url(self, name):
        return f'http://127.0.0.1:{self.server.server_port}/{name}'

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    folder = tmp_path / 'served'
    folder.mkdir()
    running = Server(folder)
    yield running
    running.close()


@pytest.fixture(scope='session')
def arch_fixture():
    return ArchFixture


@pytest.fixture(scope='session')
def mldecoder_m(arch_fixture):
    return arch_fixture('mldecoder_tresnet_m_coco80_224')


@pytest.fixture(scope='session')
def mldecoder_m_weights(mldecoder_m):
    return mldecoder_m.state_dict()
