"""What the small Hub of the tests has and does: users, repositories, files in memory, faults. `server` is its HTTP."""
import base64
import binascii
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import yaml

__all__ = ['Fault', 'Hub', 'Moved', 'Refused', 'Repo', 'User', 'head_of']

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
        choke: Bytes of the request's body that are read before the connection breaks.
        late: The request is carried out and the connection breaks before the answer.
        flip: A bit of the answer's body is wrong.
        bare: Headers that the answer lacks.
        before: Called with the Hub before the request is carried out.
    """
    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    drop: int | None = None
    deaf: bool = False
    choke: int | None = None
    late: bool = False
    flip: bool = False
    bare: tuple[str, ...] = ()
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
        readme = self.read(repo.id, 'README.md', revision) if 'README.md' in commit.files else b''
        data = head_of(readme.decode(errors='replace')) or {}
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

    def paths_info(self, repo: Repo, revision: str, paths: list[str], expand: bool = False) -> Any:
        commit = repo.commit_at(revision)
        return [{'type': 'file', 'path': path, **self._facts(commit, path),
                 **({'lastCommit': self._last_commit(repo, commit, path)} if expand else {})}
                for path in paths if path in commit.files]

    def _last_commit(self, repo: Repo, commit: Commit, path: str) -> Any:
        while commit.parent and repo.commits[commit.parent].files.get(path) == commit.files[path]:
            commit = repo.commits[commit.parent]
        return {'id': commit.oid, 'title': commit.title, 'date': '2024-01-01T00:00:00.000Z'}

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


def head_of(card: str) -> dict[str, Any] | None:
    """The YAML head of a card; None if there is none."""
    found = re.match(r'---\r?\n(.*?)\r?\n---', card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None
