"""A small Hub for tests: the real client talks to it over HTTP on loopback, and it can be told to fail.

It has users, repositories with branches, tags and pull requests, regular and LFS files, and the answers that
huggingface_hub 1.x and 2.x need to create, upload, list, verify and download; nothing of it is a mock of the client.
Files live in memory. A `Fault` changes what happens to the requests that it matches.
"""
import base64
import binascii
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

__all__ = ['Fault', 'Hub', 'Refused', 'run_hub']

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt')
SMALL = 10_000_000    # above it a file is LFS whatever its name
PART_BYTES = 1 << 20  # of a multipart upload, for objects above MULTIPART_BYTES
MULTIPART_BYTES = 4 << 20


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests of one kind.

    Args:
        pattern: Regular expression that is searched for in 'METHOD /path?query'.
        times: Requests it happens to; then all is well again.
        skip: Requests that match and are left alone first.
        status: Answer this status and nothing else happens.
        headers: Of that answer, or more headers of the usual one.
        drop: Bytes of the answer's body that are sent before the connection breaks.
        deaf: The connection breaks before the request's body is read.
        late: The request is carried out and the connection breaks before the answer.
        flip: A bit of the answer's body is wrong.
        before: Called with the Hub before the request is carried out.
    """
    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    drop: int | None = None
    deaf: bool = False
    late: bool = False
    flip: bool = False
    before: Callable[['Hub'], None] | None = None


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = '', **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {'error': message, **body}


@dataclasses.dataclass
class User:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = 'write'


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    files: dict[str, str]    # path -> git oid of what is stored: bytes or, for LFS, a pointer
    lfs: dict[str, tuple[str, int]]    # path -> sha256 and size


@dataclasses.dataclass
class Repo:
    id: str
    private: bool = False
    refs: dict[str, str] = dataclasses.field(default_factory=dict)    # 'main', 'refs/pr/1' -> commit
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def commit_at(self, revision: str) -> Commit:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f'no revision {revision}', 'RevisionNotFound')
        return self.commits[oid]

    def add(self, ref: str, files: dict[str, str], lfs: dict[str, tuple[str, int]], title: str, author: str) -> Commit:
        parent = self.refs.get(ref)
        facts = json.dumps([parent, sorted(files.items()), sorted(lfs.items()), title, len(self.commits)])
        commit = Commit(hashlib.sha1(facts.encode()).hexdigest(), parent, title, author, files, lfs)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


class Hub:
    """The state, and what each request does to it.

    Args:
        users: By token.
    """

    def __init__(self, users: dict[str, User] | None = None) -> None:
        self.users = users or {
            'hf_write': User('me', ('lab',)), 'hf_read': User('me', ('lab',), 'read'), 'hf_other': User('other')}
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}    # old name -> new name
        self.blobs: dict[str, bytes] = {}  # by git oid
        self.objects: dict[str, bytes] = {}    # LFS, by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, str | None]] = []    # method, path, token
        self.lock = threading.RLock()
        self.url = ''

    # ---- for tests

    def fail(self, pattern: str, **settings: Any) -> Fault:
        self.faults.append(Fault(pattern, **settings))
        return self.faults[-1]

    def requests(self, pattern: str) -> list[str]:
        """'METHOD /path' of all requests so far that match."""
        return [found for method, path, _ in self.seen for found in [f'{method} {path}'] if re.search(pattern, found)]

    def read(self, id: str, path: str, revision: str = 'main') -> bytes:
        commit = self.repos[id].commit_at(revision)
        return self.objects[commit.lfs[path][0]] if path in commit.lfs else self.blobs[commit.files[path]]

    def write(self, id: str, files: dict[str, bytes], *, private: bool = False, title: str = 'by hand') -> Commit:
        """Commit files to main as somebody else would, in a repository that is made if need be."""
        with self.lock:
            repo = self._create(id, private) if id not in self.repos else self.repos[id]
            old = repo.commit_at('main')
            stored, lfs = dict(old.files), dict(old.lfs)
            for path, content in files.items():
                self._store(path, content, stored, lfs)
            return repo.add('main', stored, lfs, title, 'other')

    def move(self, old: str, new: str) -> None:
        self.repos[new] = self.repos.pop(old)
        self.repos[new].id, self.moved[old] = new, new

    # ---- storage

    def _create(self, id: str, private: bool) -> Repo:
        repo = self.repos[id] = Repo(id, private)
        stored: dict[str, str] = {}
        self._store('.gitattributes', b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n', stored, {})
        repo.add('main', stored, {}, 'initial commit', 'system')
        return repo

    def _store(self, path: str, content: bytes, stored: dict[str, str], lfs: dict[str, tuple[str, int]]) -> None:
        lfs.pop(path, None)
        if is_lfs(path, len(content)):
            sha = hashlib.sha256(content).hexdigest()
            self.objects[sha], lfs[path] = content, (sha, len(content))
            content = pointer(sha, len(content))
        stored[path] = git_oid(content)
        self.blobs[stored[path]] = content

    def _user(self, token: str | None) -> User | None:
        if token is not None and token not in self.users:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return self.users[token] if token else None

    def _repo(self, id: str, user: User | None, write: bool = False) -> Repo:
        if id in self.moved:
            raise Moved(self.moved[id])
        repo = self.repos.get(id)
        owner = id.partition('/')[0]
        mine = user is not None and owner in (user.name, *user.orgs)
        if repo is None or (repo.private and not mine):
            raise Refused(404 if user else 401, f'Repository {id} not found', 'RepoNotFound')
        if write and (not mine or user is None or user.role != 'write'):
            raise Refused(403, f'you may not write to {id} with this token')
        return repo

    # ---- the API; each returns a JSON value or raises Refused

    def whoami(self, user: User | None) -> Any:
        if user is None:
            raise Refused(401, 'not logged in')
        return {'name': user.name, 'type': 'user', 'orgs': [{'name': name} for name in user.orgs],
                'auth': {'accessToken': {'role': user.role}}}

    def create_repo(self, user: User | None, body: dict[str, Any]) -> Any:
        if user is None:
            raise Refused(401, 'not logged in')
        owner = body.get('organization') or user.name
        if owner not in (user.name, *user.orgs) or user.role != 'write':
            raise Refused(403, f'you may not create repositories of {owner} with this token')
        id = f'{owner}/{body["name"]}'
        url = {'url': f'{self.url}/{id}', 'name': id, 'id': id}
        if id in self.repos:
            raise Refused(409, 'You already created this model repo', **url)
        self._create(id, body.get('visibility') == 'private' or bool(body.get('private')))
        return url

    def delete_repo(self, user: User | None, body: dict[str, Any]) -> Any:
        id = f'{body.get("organization") or user and user.name}/{body["name"]}'
        self._repo(id, user, write=True)
        del self.repos[id]
        return {}

    def info(self, repo: Repo, revision: str) -> Any:
        commit = repo.commit_at(revision)
        readme = self.read(repo.id, 'README.md', revision).decode() if 'README.md' in commit.files else ''
        data = _head(readme) or {}
        return {
            '_id': '0', 'id': repo.id, 'modelId': repo.id, 'sha': commit.oid, 'private': repo.private, 'gated': False,
            'disabled': False, 'downloads': 0, 'likes': 0, 'tags': data.get('tags', []), 'cardData': data,
            'pipeline_tag': data.get('pipeline_tag'), 'library_name': data.get('library_name'),
            'lastModified': '2024-01-01T00:00:00.000Z', 'createdAt': '2024-01-01T00:00:00.000Z',
            'siblings': [{'rfilename': path, **self._facts(commit, path)} for path in sorted(commit.files)]}

    def _facts(self, commit: Commit, path: str) -> dict[str, Any]:
        oid = commit.files[path]
        if path not in commit.lfs:
            return {'size': len(self.blobs[oid]), 'oid': oid, 'blobId': oid}
        sha, size = commit.lfs[path]
        return {'size': size, 'oid': oid, 'blobId': oid, 'lfs': {
            'oid': sha, 'sha256': sha, 'size': size, 'pointerSize': len(self.blobs[oid])}}

    def tree(self, repo: Repo, revision: str, folder: str = '') -> Any:
        commit = repo.commit_at(revision)
        return [{'type': 'file', 'path': path, **self._facts(commit, path)} for path in sorted(commit.files)
                if not folder or path.startswith(f'{folder}/')]

    def paths_info(self, repo: Repo, revision: str, paths: list[str]) -> Any:
        commit = repo.commit_at(revision)
        return [{'type': 'file', 'path': path, **self._facts(commit, path)} for path in paths if path in commit.files]

    def preupload(self, repo: Repo, revision: str, body: dict[str, Any]) -> Any:
        commit = repo.commit_at(revision)
        files = []
        for file in body['files']:
            path = file['path']
            known = commit.lfs[path][0] if path in commit.lfs else commit.files.get(path)
            files.append({
                'path': path, 'uploadMode': 'lfs' if is_lfs(path, file['size']) else 'regular', 'shouldIgnore': False,
                **({'oid': known} if known else {})})
        return {'files': files}

    def lfs_batch(self, repo: Repo, body: dict[str, Any]) -> Any:
        objects = []
        for each in body['objects']:
            oid, size = each['oid'], each['size']
            found: dict[str, Any] = {'oid': oid, 'size': size}
            if oid not in self.objects:
                upload: dict[str, Any] = {'href': f'{self.url}/storage/{oid}'}
                if size > MULTIPART_BYTES and 'multipart' in body.get('transfers', ()):
                    count = -(-size // PART_BYTES)
                    upload = {'href': f'{self.url}/storage/{oid}/complete', 'header': {
                        'chunk_size': str(PART_BYTES),
                        **{f'{part:05}': f'{self.url}/storage/{oid}/part/{part}' for part in range(1, count + 1)}}}
                found['actions'] = {
                    'upload': upload, 'verify': {'href': f'{self.url}/{repo.id}.git/info/lfs/objects/verify'}}
            objects.append(found)
        is_multipart = any('header' in each.get('actions', {}).get('upload', {}) for each in objects)
        return {'transfer': 'multipart' if is_multipart else 'basic', 'objects': objects}

    def lfs_verify(self, body: dict[str, Any]) -> Any:
        if len(self.objects.get(body['oid'], b'')) != body['size']:
            raise Refused(404, f'object {body["oid"]} is not there')
        return {}

    def put_object(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, 'the content is not what its hash says')
        self.objects[oid] = content

    def complete(self, oid: str, body: dict[str, Any]) -> Any:
        numbers = [part['partNumber'] for part in body['parts']]
        self.put_object(oid, b''.join(self.parts[oid, number] for number in sorted(numbers)))
        return {}

    def commit(self, repo: Repo, user: User, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> Any:
        header = next(line['value'] for line in lines if line['key'] == 'header')
        base = repo.commit_at(revision)
        if header.get('parentCommit') not in (None, base.oid):
            raise Refused(412, f'A commit has happened since. {header["parentCommit"]} is not the head')
        stored, lfs = dict(base.files), dict(base.lfs)
        for line in lines:
            kind, value = line['key'], line['value']
            if kind == 'file':
                content = value['content'].encode()
                if value.get('encoding') == 'base64':
                    try:
                        content = base64.b64decode(content, validate=True)
                    except binascii.Error as error:
                        raise Refused(400, 'content is no base64') from error
                lfs.pop(value['path'], None)
                stored[value['path']] = git_oid(content)
                self.blobs[git_oid(content)] = content
            elif kind == 'lfsFile':
                oid = value['oid']
                if oid not in self.objects:
                    raise Refused(400, f'LFS pointer to {oid}, which was not uploaded')
                size = len(self.objects[oid])
                lfs[value['path']] = (oid, size)
                stored[value['path']] = git_oid(pointer(oid, size))
                self.blobs[stored[value['path']]] = pointer(oid, size)
            elif kind == 'deletedFile':
                stored.pop(value['path'], None)
                lfs.pop(value['path'], None)
        ref, pull = revision, {}
        if create_pr:
            number = len(repo.pulls) + 1
            ref = f'refs/pr/{number}'
            repo.refs[ref] = base.oid
            repo.pulls[number] = {
                'num': number, 'title': header['summary'], 'author': {'name': user.name}, 'isPullRequest': True,
                'createdAt': '2024-01-01T00:00:00.000Z', 'status': 'open', 'repo': {'name': repo.id, 'type': 'model'}}
            pull = {'pullRequestUrl': f'{self.url}/{repo.id}/discussions/{number}'}
        elif revision not in repo.refs:
            raise Refused(400, f'{revision} is no branch')
        made = repo.add(ref, stored, lfs, header['summary'], user.name)
        return {'commitOid': made.oid, 'commitUrl': f'{self.url}/{repo.id}/commit/{made.oid}', 'success': True, **pull}

    def refs(self, repo: Repo) -> Any:
        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{'name': name, 'ref': f'{prefix}{name}', 'targetCommit': oid} for name, oid in refs.items()]

        branches = {name: oid for name, oid in repo.refs.items() if not name.startswith('refs/')}
        pulls = {name: oid for name, oid in repo.refs.items() if name.startswith('refs/')}
        return {'branches': listed(branches, 'refs/heads/'), 'tags': listed(repo.tags, 'refs/tags/'), 'converts': [],
                'pullRequests': listed(pulls, '')}

    def history(self, repo: Repo, revision: str) -> Any:
        found, commit = [], repo.commit_at(revision)
        while True:
            found.append({
                'id': commit.oid, 'title': commit.title, 'message': '', 'authors': [{'user': commit.author}],
                'date': '2024-01-01T00:00:00.000Z'})
            if commit.parent is None:
                return found
            commit = repo.commits[commit.parent]


class Moved(Exception):
    """The repository has another name now."""


def pointer(sha: str, size: int) -> bytes:
    return f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n'.encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > SMALL


def _head(card: str) -> dict[str, Any] | None:
    """The YAML head of a card; None if there is none."""
    found = re.match(r'---\r?\n(.*?)\r?\n---', card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


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
        if fault.deaf:
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
        data = _head(json.loads(body)['content'])
    except yaml.YAMLError as error:
        return _json({'errors': [{'message': str(error)}], 'warnings': []}, 400)
    if data is not None and 'model-index' in data and not isinstance(data['model-index'], list):
        return _json({'errors': [{'message': '"model-index" must be an array'}], 'warnings': []}, 400)
    return _json({'errors': [], 'warnings': []})


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
    (('POST', f'/api/models/{ID}/paths-info/{REV}'), lambda hub, user, words, asked, body, headers: _json(
        hub.paths_info(hub._repo(words[0], user), words[1], urllib.parse.parse_qs(body.decode()).get('paths', [])))),
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
