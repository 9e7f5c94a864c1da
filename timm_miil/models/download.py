"""Large files from the web that arrive whole: resumed over connections and processes, and hashed on the way."""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from tqdm import tqdm

from timm_miil._atomic import write_file
from timm_miil._checks import shown
from timm_miil._errors import CheckpointError
from timm_miil._locks import locked
from timm_miil._web import TROUBLE, asked_wait, check_url, is_passing, open_url, reason_of

__all__ = ['Downloaded', 'download', 'name_hash', 'sha256_of']

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries that bring nothing new
CHUNK_BYTES = 1 << 20
PROGRESS_BYTES = 1 << 20       # after so many new bytes the count of tries begins anew
MAX_BYTES = 1 << 36    # of one file, whose length the server need not say
MAX_NAME_BYTES = 200
WHOLE, REST, OUT_OF_RANGE = 200, 206, 416   # of HTTP
OFFLINE_WORDS = ('1', 'ON', 'YES', 'TRUE')
FROM_ELSEWHERE = 'get the file elsewhere and give its path in place of the URL'


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """A file that is there.

    Attributes:
        path: Where it is.
        size: In bytes.
        sha256: Of its content, 64 hex digits.
    """

    path: Path
    size: int
    sha256: str


def download(
        url: str, folder: str | os.PathLike[str], *, name: str | None = None, progress: bool = False) -> Downloaded:
    """Fetch a file into a folder, unless a former call has.

    What has arrived stays in a hidden file beside it when the connection or the process ends; the next call goes on
    from there if the server's file is still the same. Proxies are those of the environment; with HF_HUB_OFFLINE=1
    nothing is fetched. Calls of several processes wait for each other.

    Args:
        url: Of http or https.
        folder: Made as needed.
        name: Of the file in the folder; None takes the last part of the URL.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: If the URL or the name cannot be used, the file cannot be had, or does not fit on the disk; the
            message says what to do.
        OSError: If the folder cannot be written to.
    """
    try:
        check_url(url)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    name = unquote(urlsplit(url).path.rpartition('/')[2]) if name is None else name
    _check_name(name, url)
    target = Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f'.{name}.lock'), seconds=None):
        there = _fetched(target, url)
        if there is not None:
            return there
        if constants.HF_HUB_OFFLINE or os.environ.get('HF_HUB_OFFLINE', '').upper() in OFFLINE_WORDS:
            raise CheckpointError(f'{url} is not in {target.parent}, and HF_HUB_OFFLINE forbids to fetch it; unset it, '
                                  f'or {FROM_ELSEWHERE}.')
        part = _Part(target, url)
        with tqdm(desc=name, unit='B', unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
            _fetch(url, part, bar)
        return part.finish()


def name_hash(name: str) -> str:
    """The eight hex digits before the suffix of a name such as 'BINAS_A_37ms_75.9_d52c3a06.pth'; '' without.

    That they begin the file's SHA-256 is a convention, not a promise. Eight decimal digits are more often a date.
    """
    found = re.search(r'[_-]([0-9a-f]{8})(?:\.[A-Za-z]\w*)+$', name, re.ASCII)
    return found[1] if found and not found[1].isdecimal() else ''


def sha256_of(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Size and SHA-256 of a file.

    Raises:
        OSError: If it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _check_name(name: str, url: str) -> None:
    if (not name or name.startswith('.') or not name.isprintable() or any(char in name for char in '/\\:')
            or len(name.encode(errors='replace')) > MAX_NAME_BYTES):
        raise CheckpointError(f'{url} gives the name {shown(name)}, which is no name of a file to write; pass another.')


def _fetched(target: Path, url: str) -> Downloaded | None:
    """The file of a former call, if it is still what that call left."""
    try:
        record = json.loads(_record_of(target).read_text(encoding='utf-8'))
        if record['url'] != url or target.stat().st_size != record['size']:
            return None
        size, digest = sha256_of(target)
        return Downloaded(target, size, digest) if digest == record['sha256'] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # no record, or no record of ours
        return None


def _record_of(target: Path) -> Path:
    return target.with_name(f'{target.name}.json')


# ---- what has arrived


class _Part:
    """The bytes that have arrived, and what the server said of the file that they are the beginning of.

    Args:
        target: The file it shall become.
        url: Where it comes from.
    """

    def __init__(self, target: Path, url: str) -> None:
        self.target, self.url = target, url
        self.path = target.with_name(f'.{target.name}.part')
        self.facts_path = target.with_name(f'.{target.name}.part.json')
        self.etag, self.modified, self.total, self.size = '', '', None, 0    # type: str, str, int | None, int
        self.digest = hashlib.sha256()
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            facts = json.loads(self.facts_path.read_text(encoding='utf-8'))
            if facts['url'] == url and self.path.is_file():
                self.etag, self.modified = str(facts['etag']), str(facts['modified'])
                self.total = None if facts['total'] is None else int(facts['total'])
                with open(self.path, 'rb') as file:
                    while chunk := file.read(CHUNK_BYTES):
                        self.digest.update(chunk)
                        self.size += len(chunk)
        if not self._validator or (self.total is not None and self.size > self.total):
            self.clear()

    @property
    def _validator(self) -> str:
        """By which the server can tell that the file is still the same; '' if it gave nothing for that."""
        return self.modified if self.etag.startswith('W/') else self.etag or self.modified

    @property
    def is_whole(self) -> bool:
        return self.total is not None and self.size == self.total > 0

    def clear(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self.facts_path.unlink(missing_ok=True)
        self.etag, self.modified, self.total, self.size, self.digest = '', '', None, 0, hashlib.sha256()

    def begin(self, answer: HTTPResponse) -> None:
        """Start anew with an answer that brings the whole file."""
        self.clear()
        length = answer.headers.get('Content-Length') or ''
        self.total = int(length) if length.isdecimal() else None
        self.etag, self.modified = answer.headers.get('ETag') or '', answer.headers.get('Last-Modified') or ''
        # The facts first: bytes without them are not used.
        facts = {'url': self.url, 'etag': self.etag, 'modified': self.modified, 'total': self.total}
        write_file(self.facts_path, json.dumps(facts))

    def range_headers(self) -> dict[str, str]:
        """Of a request for the rest, or for all if what has arrived is nothing, or of a file that may have changed."""
        if not self.size or not self._validator:
            return {}
        return {'Range': f'bytes={self.size}-', 'If-Range': self._validator}

    def continues_with(self, answer: HTTPResponse) -> bool:
        """Whether an answer is the rest of the same file."""
        found = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', answer.headers.get('Content-Range') or '', re.ASCII)
        etag, modified = answer.headers.get('ETag'), answer.headers.get('Last-Modified')
        return bool(found and int(found[1]) == self.size and int(found[2]) == self.total
                    and etag in (None, self.etag) and modified in (None, self.modified))

    def add(self, chunks: Iterator[bytes]) -> Iterator[int]:
        """Append chunks; yields the length of each."""
        with open(self.path, 'ab') as file:
            for chunk in chunks:
                file.write(chunk)
                self.digest.update(chunk)
                self.size += len(chunk)
                yield len(chunk)

    def finish(self) -> Downloaded:
        """Give the file its name."""
        self.path.touch()    # an empty file has no bytes that would have made it
        found = Downloaded(self.target, self.size, self.digest.hexdigest())
        os.replace(self.path, self.target)
        write_file(_record_of(self.target), json.dumps(
            {'url': self.url, 'size': found.size, 'sha256': found.sha256}, indent=2) + '\n')
        self.facts_path.unlink(missing_ok=True)
        return found


# ---- the requests


class _Passing(Exception):
    """Trouble that may be over at the next try."""

    def __init__(self, words: str, wait: float | None = None) -> None:
        super().__init__(words)
        self.wait = wait


def _fetch(url: str, part: _Part, bar: 'tqdm[None]') -> None:
    """Fetch what is missing, by as many requests as it takes."""
    tries, most = 0, part.size
    while not part.is_whole:
        try:
            _request(url, part, bar)
            return
        except _Passing as trouble:
            # More than ever: a server that always starts anew and always breaks brings nothing.
            tries = 1 if part.size - most >= PROGRESS_BYTES else tries + 1
            most = max(most, part.size)
            if tries > len(WAITS):
                raise CheckpointError(
                    f'{url} could not be fetched in {tries} tries: {trouble}; try again later, which goes on from byte '
                    f'{part.size if part.range_headers() else 0}, or {FROM_ELSEWHERE}.') from trouble
            time.sleep(WAITS[tries - 1] if trouble.wait is None else trouble.wait)


def _request(url: str, part: _Part, bar: 'tqdm[None]') -> None:
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(open_url(url, headers=part.range_headers()))
        except TROUBLE as error:
            if isinstance(error, HTTPError) and error.code == OUT_OF_RANGE:
                part.clear()
                raise _Passing(reason_of(error)) from error
            if is_passing(error):
                raise _Passing(reason_of(error), asked_wait(error)) from error
            raise CheckpointError(f'{url} could not be fetched: {reason_of(error)}; {FROM_ELSEWHERE}.') from error
        _take(url, part, answer, bar)


def _take(url: str, part: _Part, answer: HTTPResponse, bar: 'tqdm[None]') -> None:
    if answer.status == REST and not part.continues_with(answer):
        part.clear()
        raise _Passing('the server sends another part than was asked for')
    if answer.status not in (WHOLE, REST):
        raise CheckpointError(f'{url} answers {answer.status}, which is no file; {FROM_ELSEWHERE}.')
    kind = answer.headers.get_content_type()
    if kind == 'text/html' or (answer.headers.get('Content-Encoding') or 'identity') != 'identity':
        raise CheckpointError(f'{url} gives a web page or packed text ({kind}) and no file; {FROM_ELSEWHERE}.')
    if answer.status == WHOLE:
        part.begin(answer)
    _check_space(url, part)
    bar.total, bar.n = part.total, part.size
    for length in part.add(_chunks(answer)):
        bar.update(length)
        if part.size > MAX_BYTES:
            part.clear()
            raise CheckpointError(f'{url} has no end: it was given up after {MAX_BYTES} bytes; {FROM_ELSEWHERE}.')
    if part.total is not None and part.size < part.total:
        raise _Passing(f'the connection ended after {part.size} of {part.total} bytes')
    if part.total is not None and part.size > part.total:
        part.clear()
        raise _Passing('the server sends more than it said')


def _chunks(answer: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := answer.read(CHUNK_BYTES):
            yield chunk
    except TROUBLE as error:
        raise _Passing(reason_of(error)) from error


def _check_space(url: str, part: _Part) -> None:
    missing, free = (part.total or 0) - part.size, shutil.disk_usage(part.target.parent).free
    if missing > free:
        raise CheckpointError(f'{url} needs {missing} more bytes, and the disk of {part.target.parent} has {free}; '
                              f'make room, or pass a folder on another disk.')
