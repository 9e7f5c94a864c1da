"""A real server of files, and checkpoints in the original layout."""
import http.server
import threading

import pytest

from original_checkpoints import ArchFixture


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
