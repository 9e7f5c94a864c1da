"""A small Hub for tests: the real client talks to it over HTTP on loopback, and it can be told to fail.

It has users, repositories with branches, tags and pull requests, regular and LFS files, and the answers that
huggingface_hub 1.x and 2.x need to create, upload, list, verify and download; nothing of it is a mock of the client.
Files live in memory, see `hub_state`. A `Fault` changes what happens to the requests that it matches.
"""
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from hub_state import Fault, Hub, Moved, Refused, User, head_of  # pytest puts this folder on the path

__all__ = ['Fault', 'Hub', 'Refused', 'run_hub']


class Handler(http.server.BaseHTTPRequestHandler):
    """From requests to the Hub's methods, and back."""
    protocol_version = 'HTTP/1.1'
    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self) -> None:
        hub: Hub = self.server.hub
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None
        with hub.lock:
            hub.seen.append((self.command, self.path, token))
            fault = self._fault(hub)
        if fault.deaf or fault.choke is not None:
            self.rfile.read(fault.choke or 0)
            self._hang_up()
            return
        body = self._body()
        if fault.before is not None:
            fault.before(hub)
        if fault.status:
            self._send(fault.status, json.dumps({'error': f'fault {fault.status}'}).encode(), fault.headers, fault)
            return
        try:
            with hub.lock:
                status, headers, content = self._route(hub, hub._user(token), body)
        except Moved as moved:
            old = next(old for old, new in hub.moved.items() if new == str(moved))
            status, content = 307, b''
            headers = {'Location': self.path.replace(f'/{old}', f'/{moved}', 1)}
        except Refused as refused:
            status, content = refused.status, json.dumps(refused.body).encode()
            headers = {'X-Error-Message': str(refused), **({'X-Error-Code': refused.code} if refused.code else {})}
        if fault.late:
            self._hang_up()
            return
        self._send(status, content, {**headers, **fault.headers}, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _fault(self, hub: Hub) -> Fault:
        for fault in hub.faults:
            if fault.times and re.search(fault.pattern, f'{self.command} {self.path}'):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return Fault('')

    def _body(self) -> bytes:
        if 'chunked' in (self.headers.get('Transfer-Encoding') or ''):
            chunks = []
            while size := int(self.rfile.readline().split(b';')[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content: bytes, headers: dict[str, str], fault: Fault) -> None:
        self.send_response(status)
        length = headers.pop('Content-Length', str(len(content)))
        for name, value in {'Content-Type': 'application/json', 'Content-Length': length, **headers}.items():
            if name not in fault.bare:
                self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault.flip and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content if fault.drop is None else content[:fault.drop])
        self.wfile.flush()
        if fault.drop is not None:
            self._hang_up()

    # ---- routes

    def _route(self, hub: Hub, user: User | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path, _, query = self.path.partition('?')
        asked = urllib.parse.parse_qs(query, keep_blank_values=True)
        for (method, pattern), action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and (method == self.command or (method == 'GET' and self.command == 'HEAD')):
                words = [urllib.parse.unquote(word or '') for word in found.groups()]
                return action(hub, user, words, asked, body, self.headers)
        raise Refused(404, f'{self.command} {path} is nothing that this server has')


Answer = tuple[int, dict[str, str], bytes]


def _json(value: Any, status: int = 200) -> Answer:
    return status, {}, json.dumps(value).encode()


def _resolve(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    id, revision, path = words
    repo = hub._repo(id, user)
    commit = repo.commit_at(revision)
    if path not in commit.files:
        error = Refused(404, f'no file {path}', 'EntryNotFound')
        return 404, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit.oid}, json.dumps(error.body).encode()
    facts = {'X-Repo-Commit': commit.oid, 'ETag': f'"{commit.files[path]}"', 'Accept-Ranges': 'bytes',
             'Content-Type': 'application/octet-stream'}
    if path in commit.lfs:
        sha, size = commit.lfs[path]
        facts |= {'X-Linked-Etag': f'"{sha}"', 'X-Linked-Size': str(size), 'ETag': f'"{sha}"'}
    content = hub.read(id, path, commit.oid)
    asked_range = re.fullmatch(r'bytes=(\d+)-(\d*)', headers.get('Range') or '')
    if not asked_range:
        return 200, facts, content
    start, end = int(asked_range[1]), int(asked_range[2] or len(content) - 1)
    if start >= len(content):
        return 416, facts | {'Content-Range': f'bytes */{len(content)}'}, b''
    return 206, facts | {'Content-Range': f'bytes {start}-{end}/{len(content)}'}, content[start:end + 1]


def _commit(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    create_pr = 'create_pr' in asked
    repo = hub._repo(words[0], user, write=not (create_pr or words[1].startswith('refs/pr/')))
    if user is None or user.role != 'write':
        raise Refused(403, 'this token may not write')
    return _json(hub.commit(repo, user, words[1], lines, create_pr))


def _validate(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    try:
        data = head_of(json.loads(body)['content'])
    except yaml.YAMLError as error:
        return _json({'errors': [{'message': str(error)}], 'warnings': []}, 400)
    if data is not None and 'model-index' in data and not isinstance(data['model-index'], list):
        return _json({'errors': [{'message': '"model-index" must be an array'}], 'warnings': []}, 400)
    return _json({'errors': [], 'warnings': []})


def _paths_info(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    form = urllib.parse.parse_qs(body.decode())
    expand = form.get('expand', [''])[0].lower() == 'true'
    return _json(hub.paths_info(hub._repo(words[0], user), words[1], form.get('paths', []), expand))


def _tag(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    repo, name = hub._repo(words[0], user, write=True), json.loads(body)['tag']
    if name in repo.tags:
        raise Refused(409, f'tag {name} exists')
    repo.tags[name] = repo.commit_at(words[1]).oid
    return _json({})


def _branch(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    repo = hub._repo(words[0], user, write=True)
    if words[1] in repo.refs:
        raise Refused(409, f'branch {words[1]} exists')
    repo.refs[words[1]] = repo.commit_at(json.loads(body or b'{}').get('startingPoint') or 'main').oid
    return _json({})


def _put(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    hub.put_object(words[0], body)
    return 200, {'ETag': '"1"'}, b''


def _put_part(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
    hub.parts[words[0], int(words[1])] = body
    return 200, {'ETag': f'"{words[1]}"'}, b''


def _in_repo(method: Callable[..., Any], *, write: bool = False) -> Callable[..., Answer]:
    """A route whose first word is the repository and whose next is a revision, if there are more."""
    def route(hub: Hub, user: User | None, words: list[str], asked: Any, body: bytes, headers: Any) -> Answer:
        repo = hub._repo(words[0], user, write=write)
        return _json(method(hub, repo, *(word or 'main' for word in words[1:2]), *words[2:]))
    return route


ID, REV = r'([^/]+/[^/]+)', r'([^/]+)'
ROUTES: list[tuple[tuple[str, str], Callable[..., Answer]]] = [
    (('GET', '/api/whoami-v2'), lambda hub, user, *_: _json(hub.whoami(user))),
    (('POST', '/api/repos/create'), lambda hub, user, w, a, body, h: _json(hub.create_repo(user, json.loads(body)))),
    (('DELETE', '/api/repos/delete'), lambda hub, user, w, a, body, h: _json(hub.delete_repo(user, json.loads(body)))),
    (('POST', '/api/validate-yaml'), _validate),
    (('GET', f'/api/models/{ID}/tree/{REV}(?:/(.*))?'), _in_repo(Hub.tree)),
    (('GET', f'/api/models/{ID}/refs'), _in_repo(Hub.refs)),
    (('GET', f'/api/models/{ID}/commits/{REV}'), _in_repo(Hub.history)),
    (('GET', f'/api/models/{ID}/discussions'), lambda hub, user, words, *_: _json({
        'discussions': list(hub._repo(words[0], user).pulls.values()), 'count': len(hub.repos[words[0]].pulls),
        'start': 0})),
    (('POST', f'/api/models/{ID}/paths-info/{REV}'), _paths_info),
    (('POST', f'/api/models/{ID}/preupload/{REV}'), lambda hub, user, words, asked, body, headers: _json(
        hub.preupload(hub._repo(words[0], user), words[1], json.loads(body)))),
    (('POST', f'/api/models/{ID}/commit/{REV}'), _commit),
    (('POST', f'/api/models/{ID}/tag/{REV}'), _tag),
    (('POST', f'/api/models/{ID}/branch/(.+)'), _branch),
    (('GET', f'/api/models/{ID}/revision/{REV}'), _in_repo(Hub.info)),
    (('GET', f'/api/models/{ID}'), lambda hub, user, words, *_: _json(hub.info(hub._repo(words[0], user), 'main'))),
    (('POST', f'/{ID}[.]git/info/lfs/objects/batch'), lambda hub, user, words, asked, body, headers: _json(
        hub.lfs_batch(hub._repo(words[0], user), json.loads(body)))),  # who proposes a change may not write
    (('POST', f'/{ID}[.]git/info/lfs/objects/verify'), lambda hub, user, words, asked, body, headers: _json(
        hub.lfs_verify(json.loads(body)))),
    (('PUT', '/storage/([0-9a-f]{64})'), _put),
    (('PUT', '/storage/([0-9a-f]{64})/part/([0-9]+)'), _put_part),
    (('POST', '/storage/([0-9a-f]{64})/complete'), lambda hub, user, words, asked, body, headers: _json(
        hub.complete(words[0], json.loads(body)))),
    (('GET', f'/{ID}/resolve/{REV}/(.+)'), _resolve),
]


@contextmanager
def run_hub(hub: Hub | None = None) -> Iterator[Hub]:
    """Serve a Hub on loopback while the block runs; its address is in `url`."""
    hub = hub or Hub()
    server: Any = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.hub, server.daemon_threads = hub, True
    hub.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
