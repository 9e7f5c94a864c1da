"""Downloads from a real server that fails in every way we know of; nothing is mocked but the seconds between tries."""
import hashlib
import http.client
import http.server
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from timm_miil import _web
from timm_miil._errors import CheckpointError
from timm_miil.models import download as download_module
from timm_miil.models.download import download, name_hash, sha256_of

from file_server import Fault, run_file_server

MB = 1 << 20
BIG = os.urandom(5 * MB)
OTHER = os.urandom(4 * MB)
SHORT_WAITS = (0.0, 0.0, 0.0, 0.0)
FETCH = 'import sys; from timm_miil.models.download import download; print(download(*sys.argv[1:3]).sha256)'


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download_module, 'WAITS', SHORT_WAITS)
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web():
    with run_file_server() as running:
        yield running


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith('.lock'))


def check(found, content):
    assert found.path.read_bytes() == content
    assert (found.size, found.sha256) == (len(content), sha256(content))
    assert visible(found.path.parent) == [found.path.name, f'{found.path.name}.json']


# ---- when all is well


def test_a_file_arrives_once(tmp_path, web):
    url = web.put('/zoo/x%20y.pth', BIG)
    found = download(url, tmp_path / 'deep' / 'folder')
    check(found, BIG)
    assert found.path == tmp_path / 'deep' / 'folder' / 'x y.pth'
    assert json.loads((found.path.parent / 'x y.pth.json').read_text()) == {
        'url': url, 'size': len(BIG), 'sha256': sha256(BIG)}
    assert download(url, tmp_path / 'deep' / 'folder') == found
    assert web.ranges == [None]
    assert web.requests[0][2]['User-Agent'].startswith('timm-miil/')


def test_an_empty_file_arrives(tmp_path, web):
    check(download(web.put('/x.pth', b''), tmp_path), b'')


def test_the_bar_goes_to_stderr_and_only_where_it_is_wanted(tmp_path, web, capsys):
    download(web.put('/x.pth', BIG), tmp_path / '1')
    assert capsys.readouterr() == ('', '')
    download(web.address + '/x.pth', tmp_path / '2', progress=True)
    out, err = capsys.readouterr()
    assert out == '' and 'x.pth: 100%' in err and '5.00M/5.00M' in err


@pytest.mark.parametrize('spoil', [
    lambda path: path.write_bytes(BIG[:-1] + b'\0'),
    lambda path: path.write_bytes(BIG[:-1]),
    lambda path: path.unlink(),
    lambda path: path.with_name('x.pth.json').unlink(),
    lambda path: path.with_name('x.pth.json').write_text('{"url": 3'),
    lambda path: path.with_name('x.pth.json').write_text('[' * 100_000),
    lambda path: path.with_name('x.pth.json').write_text('[]'),
    lambda path: path.with_name('x.pth.json').write_bytes(b'\xff'),
], ids=range(8))
def test_a_file_that_is_not_what_was_fetched_is_fetched_again(tmp_path, web, spoil):
    url = web.put('/x.pth', BIG)
    spoil(download(url, tmp_path).path)
    check(download(url, tmp_path), BIG)
    assert len(web.requests) == 2


def test_a_file_of_the_same_name_from_elsewhere_is_another(tmp_path, web):
    download(web.put('/a/x.pth', BIG), tmp_path)
    check(download(web.put('/b/x.pth', OTHER), tmp_path), OTHER)


def test_a_name_may_be_given(tmp_path, web):
    assert download(web.put('/get', BIG), tmp_path, name='x.pth').path == tmp_path / 'x.pth'


# ---- broken connections


def test_a_broken_download_goes_on_where_it_was(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB + 5), Fault(stop=MB)]
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, f'bytes={2 * MB + 5}-', f'bytes={3 * MB + 5}-']


def test_tries_are_counted_from_the_last_progress(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=MB), *[Fault(status=503)] * 3, Fault(stop=MB), *[Fault(status=503)] * 3]
    check(download(url, tmp_path), BIG)
    assert len(web.requests) == 9


def test_a_connection_that_always_breaks_ends_in_an_error_and_the_next_call_goes_on(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=3 * MB), *[Fault(stop=0)] * 4]
    with pytest.raises(CheckpointError, match=(
            f'could not be fetched in 5 tries: the connection ended after {3 * MB} of {5 * MB} bytes; try again later, '
            f'which goes on from byte {3 * MB}, or get the file elsewhere')):
        download(url, tmp_path)
    assert visible(tmp_path) == ['.x.pth.part', '.x.pth.part.json']
    web.requests.clear()
    check(download(url, tmp_path), BIG)
    assert web.ranges == [f'bytes={3 * MB}-']


def started(web, url, folder):
    """A process that downloads, and has been answered."""
    process = subprocess.Popen([sys.executable, '-c', FETCH, url, str(folder)], stdout=subprocess.PIPE, text=True)
    until(lambda: web.requests or process.poll() is not None)
    assert process.poll() is None
    return process


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_process_loses_little(tmp_path, web):
    url, part, hold = web.put('/x.pth', BIG), tmp_path / '.x.pth.part', threading.Event()
    web.faults = [Fault(stop=3 * MB + 100_000, hold=hold)]
    with started(web, url, tmp_path) as process:
        until(lambda: part.exists() and part.stat().st_size >= 3 * MB)
        process.send_signal(signal.SIGKILL)
    hold.set()
    assert not (tmp_path / 'x.pth').exists()
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, f'bytes={3 * MB}-']


def test_two_processes_fetch_a_file_once(tmp_path, web):
    url, hold = web.put('/x.pth', BIG), threading.Event()
    web.faults = [Fault(stop=0, hold=hold)]
    with started(web, url, tmp_path) as process, ThreadPoolExecutor() as pool:
        second = pool.submit(download, url, tmp_path)
        time.sleep(0.3)
        assert not second.done()
        hold.set()    # the first try of the process brings nothing; it asks again
        check(second.result(60), BIG)
        assert process.communicate(timeout=60)[0].strip() == sha256(BIG)
    assert web.ranges == [None, None]


def test_a_server_without_parts_starts_anew(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB), Fault(no_range=True)]
    check(download(url, tmp_path), BIG)


def test_a_server_that_says_nothing_of_the_version_starts_anew(tmp_path, web):
    url = web.put('/x.pth', BIG, etag='')
    web.faults = [Fault(stop=2 * MB)]
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, None]


@pytest.mark.parametrize('etag', ['', 'W/"weak"'])
def test_the_date_serves_where_there_is_no_strong_etag(tmp_path, web, etag):
    url = web.put('/x.pth', BIG, etag=etag, modified='Thu, 01 Jan 2026 00:00:00 GMT')
    web.faults = [Fault(stop=2 * MB)]
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, f'bytes={2 * MB}-']
    assert web.requests[1][2]['If-Range'] == 'Thu, 01 Jan 2026 00:00:00 GMT'


@pytest.mark.parametrize('careless', [False, True])
@pytest.mark.parametrize('content', [OTHER, BIG[::-1], BIG[:MB]], ids=['other', 'as long', 'shorter'])
def test_a_file_that_was_replaced_meanwhile_starts_anew(tmp_path, web, careless, content):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB), *[Fault(status=500)] * 4]
    with pytest.raises(CheckpointError):
        download(url, tmp_path)
    web.put('/x.pth', content)
    web.faults = [Fault(careless=careless)]
    check(download(url, tmp_path), content)


def test_a_replaced_file_shows_by_its_length_where_the_server_says_no_more(tmp_path, web):
    url = web.put('/x.pth', BIG, etag='"1"')
    web.faults = [Fault(stop=2 * MB), *[Fault(status=500)] * 4]
    with pytest.raises(CheckpointError):
        download(url, tmp_path)
    web.put('/x.pth', OTHER)
    web.faults = [Fault(careless=True, headers={'ETag': None})]
    web.requests.clear()
    check(download(url, tmp_path), OTHER)
    assert web.ranges == [f'bytes={2 * MB}-', None]


def test_a_part_of_another_address_is_not_used(tmp_path, web):
    url, other = web.put('/a/x.pth', BIG, etag='"1"'), web.put('/b/x.pth', BIG[::-1], etag='"1"')
    web.faults = [Fault(stop=2 * MB), *[Fault(status=500)] * 4]
    with pytest.raises(CheckpointError):
        download(url, tmp_path)
    check(download(other, tmp_path), BIG[::-1])


@pytest.mark.parametrize('spoil', [
    lambda part, facts: facts.unlink(),
    lambda part, facts: facts.write_text('[' * 100_000),
    lambda part, facts: facts.write_text('{"url": 1}'),
    lambda part, facts: facts.write_text(json.dumps(json.loads(facts.read_text()) | {'total': 'x'})),
    lambda part, facts: facts.write_text(json.dumps(json.loads(facts.read_text()) | {'total': 7})),
    lambda part, facts: part.write_bytes(BIG + b'more'),
    lambda part, facts: part.unlink(),
], ids=range(7))
def test_a_part_that_nobody_can_vouch_for_is_not_used(tmp_path, web, spoil):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB), *[Fault(status=500)] * 4]
    with pytest.raises(CheckpointError):
        download(url, tmp_path)
    web.requests.clear()
    spoil(tmp_path / '.x.pth.part', tmp_path / '.x.pth.part.json')
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None]


def test_a_part_that_only_lacked_its_name_needs_no_request(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB), *[Fault(status=500)] * 4]
    with pytest.raises(CheckpointError):
        download(url, tmp_path)
    (tmp_path / '.x.pth.part').write_bytes(BIG)
    web.requests.clear()
    check(download(url, tmp_path), BIG)
    assert web.requests == []


# ---- answers


def test_a_server_that_is_busy_is_asked_again_when_it_says(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(status=429, headers={'Retry-After': '1'}), Fault(status=503), Fault(status=500)]
    start = time.monotonic()
    check(download(url, tmp_path), BIG)
    assert 1 <= time.monotonic() - start < 10 and len(web.requests) == 4


@pytest.mark.parametrize('status', [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_given_up_after_five_tries(tmp_path, web, status):
    web.always = Fault(status=status)
    with pytest.raises(CheckpointError, match=f'in 5 tries: the server answers {status}.*from byte 0, or get the file'):
        download(web.put('/x.pth', BIG), tmp_path)
    assert len(web.requests) == 5 and visible(tmp_path) == []


@pytest.mark.parametrize(('words', 'low', 'high'), [
    ('3', 3, 3), ('1000', 120, 120), ('Fri, 01 Jan 2100 00:00:00 GMT', 120, 120),
    ('Thu, 01 Jan 2015 00:00:00 GMT', 0, 0)])
def test_the_wait_that_a_server_asks_for_is_bounded(words, low, high):
    error = OSError()
    error.headers = {'Retry-After': words}
    assert low <= _web.asked_wait(error) <= high


@pytest.mark.parametrize('words', ['', '-1', 'soon', '٣', 'Fri, 99 Jan 2100 00:00:00 GMT'])
def test_a_wait_that_is_none_is_not_taken(words):
    error = OSError()
    error.headers = {'Retry-After': words}
    assert _web.asked_wait(error) is None


@pytest.mark.parametrize('status', [400, 401, 403, 404, 410])
def test_a_dead_link_is_said_at_once(tmp_path, web, status):
    web.always = Fault(status=status)
    with pytest.raises(CheckpointError, match=f'/x.pth could not be fetched: the server answers {status} .*; get the '
                                              f'file elsewhere and give its path in place of the URL'):
        download(web.put('/x.pth', BIG), tmp_path)
    assert len(web.requests) == 1


def test_nobody_there(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(CheckpointError, match='in 5 tries: .*Connection refused; try again later'):
        download(f'http://127.0.0.1:{port}/x.pth', tmp_path)


@pytest.mark.parametrize('etag', [None, ''])
def test_a_body_shorter_than_said(tmp_path, web, etag):
    web.always = Fault(headers={'Content-Length': str(len(BIG) + 5)})
    with pytest.raises(CheckpointError, match=f'the connection ended after {5 * MB} of {5 * MB + 5} bytes'):
        download(web.put('/x.pth', BIG, etag=etag), tmp_path)
    assert len(web.requests) == 5


def test_a_body_longer_than_said_ends_where_it_was_said(tmp_path, web):
    web.always = Fault(more=b'and more')
    check(download(web.put('/x.pth', BIG), tmp_path), BIG)


def test_a_body_without_a_length(tmp_path, web):
    web.faults = [Fault(chunked=True, stop=MB), Fault(chunked=True)]
    check(download(web.put('/x.pth', BIG), tmp_path), BIG)


def test_a_body_without_an_end_is_given_up(tmp_path, web, monkeypatch):
    monkeypatch.setattr(download_module, 'MAX_BYTES', 2 * MB)
    web.always = Fault(chunked=True)
    with pytest.raises(CheckpointError, match=f'has no end: it was given up after {2 * MB} bytes'):
        download(web.put('/x.pth', BIG), tmp_path)
    assert visible(tmp_path) == []


def test_a_part_that_was_not_asked_for_is_not_taken(tmp_path, web):
    url = web.put('/x.pth', BIG)
    web.faults = [Fault(stop=2 * MB), Fault(headers={'Content-Range': f'bytes 7-{5 * MB - 1}/{5 * MB}'})]
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, f'bytes={2 * MB}-', None]


def test_what_is_no_file_is_refused(tmp_path, web):
    with pytest.raises(CheckpointError, match=r'gives a web page or packed text \(text/html\) and no file'):
        download(web.put('/x.pth', b'<html>sign in', kind='text/html; charset=utf-8'), tmp_path)
    web.faults = [Fault(headers={'Content-Encoding': 'gzip'})]
    with pytest.raises(CheckpointError, match='packed text'):
        download(web.put('/x.pth', BIG), tmp_path)
    web.faults = [Fault(status=204)]
    with pytest.raises(CheckpointError, match='answers 204, which is no file'):
        download(web.put('/x.pth', BIG), tmp_path)


class Nonsense(http.server.BaseHTTPRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b'\x00\x01 this is not the protocol\r\n\r\n')


def test_an_answer_of_another_protocol(tmp_path):
    with run_file_server(Nonsense) as web, pytest.raises(CheckpointError, match='could not be fetched in 5 tries'):
        download(f'{web.address}/x.pth', tmp_path)


# ---- redirects


def test_a_redirect_is_followed_and_keeps_the_part(tmp_path, web):
    web.put('/real.pth', BIG)
    moved = Fault(status=302, headers={'Location': '/real.pth'})
    web.faults = [moved, Fault(stop=2 * MB), moved]
    found = download(f'{web.address}/x.pth', tmp_path)
    check(found, BIG)
    assert found.path.name == 'x.pth'
    assert web.ranges == [None, None, f'bytes={2 * MB}-', f'bytes={2 * MB}-']


@pytest.mark.parametrize('target', ['file:///etc/passwd', 'ftp://127.0.0.1/x', 'data:text/plain,x', 'gopher://x/'])
def test_a_redirect_to_anything_else_is_refused(tmp_path, web, target):
    web.always = Fault(status=302, headers={'Location': target})
    with pytest.raises(CheckpointError, match='could not be fetched: the server answers 302 .*get the file elsewhere'):
        download(f'{web.address}/x.pth', tmp_path)
    assert visible(tmp_path) == [] and len(web.requests) == 1


def test_redirects_in_a_circle_end(tmp_path, web):
    web.always = Fault(status=302, headers={'Location': '/x.pth'})
    with pytest.raises(CheckpointError, match='infinite loop'):
        download(f'{web.address}/x.pth', tmp_path)


@pytest.fixture
def secure_web(tmp_path):
    """A server of https with a certificate that nobody signed, and the file of that certificate."""
    certificate, key = tmp_path / 'certificate.pem', tmp_path / 'key.pem'
    subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost',
         '-addext', 'subjectAltName=DNS:localhost', '-keyout', key, '-out', certificate],
        check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with run_file_server() as running:
        running.server.socket = context.wrap_socket(running.server.socket, server_side=True)
        running.address = f'https://localhost:{running.server.server_port}'
        yield running, certificate


@pytest.mark.skipif(not shutil.which('openssl'), reason='openssl makes the certificate')
def test_https_needs_a_certificate_that_is_trusted_and_leads_to_no_http(tmp_path, secure_web, web, monkeypatch):
    secure, certificate = secure_web
    url = secure.put('/x.pth', BIG)
    with pytest.raises(CheckpointError, match='could not be fetched: .*certificate verify failed'):
        download(url, tmp_path / 'folder')
    monkeypatch.setenv('SSL_CERT_FILE', str(certificate))
    check(download(url, tmp_path / 'folder'), BIG)
    secure.always = Fault(status=302, headers={'Location': web.put('/x.pth', BIG)})
    with pytest.raises(CheckpointError, match="answers 302 it leads to 'http://127"):
        download(url, tmp_path / 'other')
    assert web.requests == []


# ---- the disk, the network, the names


def test_a_file_larger_than_the_disk_is_not_begun(tmp_path, web):
    web.always = Fault(headers={'Content-Length': str(10**15)})
    with pytest.raises(CheckpointError, match=f'needs {10**15} more bytes, and the disk of .* has .*make room'):
        download(web.put('/x.pth', BIG), tmp_path)
    assert not (tmp_path / '.x.pth.part').exists()


def test_a_disk_that_takes_no_more_is_no_trouble_of_the_network(tmp_path, web):
    url = web.put('/x.pth', BIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            download(url, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert web.ranges == [None]
    check(download(url, tmp_path), BIG)
    assert web.ranges == [None, f'bytes={2 * MB}-']


def test_a_folder_that_cannot_be_made(tmp_path, web):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file'):
        download(web.put('/x.pth', BIG), tmp_path / 'file' / 'folder')


def test_offline_only_what_is_there_is_had(tmp_path, web, monkeypatch):
    url = web.put('/x.pth', BIG)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(CheckpointError, match='x.pth is not in .*, and HF_HUB_OFFLINE forbids to fetch it; unset it'):
        download(url, tmp_path)
    assert web.requests == []
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    download(url, tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', 'true')
    check(download(url, tmp_path), BIG)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Fetches from the server of the test, whatever host is asked for."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.state.requests.append((self.command, self.path, dict(self.headers)))
        target = urlsplit(self.server.state.always)
        connection = http.client.HTTPConnection(target.hostname, target.port)
        connection.request('GET', urlsplit(self.path).path, headers={
            name: self.headers[name] for name in ('Range', 'If-Range') if name in self.headers})
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name in ('Content-Length', 'Content-Range', 'ETag', 'Content-Type'):
            if answer.headers[name]:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.read())
        connection.close()


def test_the_proxy_of_the_environment_is_used(tmp_path, web, monkeypatch):
    web.put('/x.pth', BIG)
    with run_file_server(Proxy) as proxy:
        proxy.always = web.address
        monkeypatch.setenv('http_proxy', proxy.address)
        monkeypatch.setenv('no_proxy', 'elsewhere.invalid')
        check(download('http://weights.invalid/x.pth', tmp_path), BIG)    # a host that only the proxy can know
        assert [path for _, path, _ in proxy.requests] == ['http://weights.invalid/x.pth']


@pytest.mark.parametrize('path', [
    '/', '', '/a/', '/..', '/%2e%2e', '/..%2Fevil', '/a%2Fb', '/a%5Cb', '/.hidden', '/a%00b', '/a%0Ab', '/C:x',
    '/' + 'a' * 201, '/%E2%80%AE'])
def test_names_that_are_none_are_refused(tmp_path, web, path):
    with pytest.raises(CheckpointError, match='which is no name of a file to write; pass another'):
        download(web.address + path, tmp_path / 'folder')
    assert list(tmp_path.iterdir()) == [] and web.requests == []


def test_a_given_name_is_checked_too(tmp_path, web):
    with pytest.raises(CheckpointError, match=r"gives the name '\.\./x', which is no name"):
        download(web.put('/x', BIG), tmp_path, name='../x')


@pytest.mark.parametrize('url', [
    'file:///etc/passwd', 'ftp://127.0.0.1/x', 'data:,x', '/etc/passwd', 'http://', 'https:///x', 'http://a b/x',
    'http://h/x\r\nHost: y', 'http://hö/x', '', 'javascript:1'])
def test_what_is_no_url_of_a_file_is_refused(tmp_path, url):
    with pytest.raises(CheckpointError, match='expected the URL of a file, https://..., got'):
        download(url, tmp_path)


def test_a_password_is_neither_sent_nor_shown(tmp_path):
    with pytest.raises(CheckpointError, match='may not hold a user name or password') as caught:
        download('http://me:secret@127.0.0.1/x', tmp_path)
    assert 'secret' not in str(caught.value)


@pytest.mark.parametrize(('name', 'digits'), [
    ('BINAS_A_37ms_75.9_d52c3a06.pth', 'd52c3a06'), ('x-0a1b2c3d.pth.tar', '0a1b2c3d'), ('x_20210304.pth', ''),
    ('x_D52C3A06.pth', ''), ('x_d52c3a067.pth', ''), ('d52c3a06.pth', ''), ('x_d52c3a06', ''), ('x_d52c3a06_y.pth', ''),
    ('', '')])
def test_the_digits_of_a_hash_in_a_name(name, digits):
    assert name_hash(name) == digits


def test_size_and_hash_of_a_file(tmp_path):
    (tmp_path / 'x').write_bytes(BIG)
    assert sha256_of(tmp_path / 'x') == (len(BIG), sha256(BIG))
