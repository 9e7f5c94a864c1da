"""Requests of files from the web by the standard library: http and https only, through the proxies of the environment.

Redirects stay within these two, and never lead from https to http.
"""
import contextlib
import email.utils
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from timm_miil._checks import cut, shown
from timm_miil._version import __version__

__all__ = ['TROUBLE', 'asked_wait', 'check_url', 'is_passing', 'open_url', 'reason_of']

SCHEMES = ('http', 'https')
SECONDS = 30.0         # without a byte, before a connection counts as broken
LONGEST_WAIT = 120.0   # that a server may ask for
TOO_MANY = 429

# What a request may raise. HTTPError and URLError are OSErrors, and so is a broken connection.
TROUBLE = (OSError, http.client.HTTPException)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
            self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any,
            newurl: str) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in SCHEMES or (old, new) == ('https', 'http'):
            raise urllib.error.HTTPError(req.full_url, code, f'it leads to {shown(newurl)}', headers, fp)
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None:
            found.method = req.get_method()  # Python 3.12 and before ask for the whole file after HEAD
        return found


def check_url(url: str) -> None:
    """Raise ValueError unless the URL is one of a file on the web, without a password in it."""
    parts = urlsplit(url) if url.isascii() and url.isprintable() and ' ' not in url else None
    if parts is None or parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError(f'expected the URL of a file, https://..., got {shown(url)}.')
    if parts.username is not None or parts.password is not None:
        raise ValueError('a URL may not hold a user name or password; get the file by another program.')


@contextlib.contextmanager
def open_url(
        url: str, *, headers: Mapping[str, str] | None = None, method: str = 'GET',
        seconds: float = SECONDS) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, open while the block runs.

    Args:
        url: As `check_url` wants it.
        headers: Of the request, besides who asks.
        method: 'GET' or 'HEAD'.
        seconds: Without a byte, before the connection counts as broken.

    Raises:
        OSError: If the answer is no success (urllib's HTTPError, already closed), or the connection fails.
        http.client.HTTPException: If the answer is not of the protocol.
    """
    opener = urllib.request.OpenerDirector()    # build_opener's would also read local files
    for handler in (
            urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(), _Redirects(), urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    request = urllib.request.Request(
        url, headers={'User-Agent': f'timm-miil/{__version__}', **(headers or {})}, method=method)
    try:
        answer = opener.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer, and holds the connection
        raise
    with answer:
        yield answer


def is_passing(error: Exception) -> bool:
    """Whether the next try may do better: too many requests, trouble of the server, a connection that fails."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == TOO_MANY or error.code >= 500
    cause = getattr(error, 'reason', error)    # URLError wraps what the connection said
    if isinstance(cause, ssl.SSLCertVerificationError):
        return False
    if isinstance(cause, socket.gaierror):  # no such host; EAI_AGAIN is trouble of the name server
        return cause.errno == socket.EAI_AGAIN
    return isinstance(error, http.client.HTTPException | urllib.error.URLError | ConnectionError | TimeoutError
                      | ssl.SSLError) and not isinstance(error, http.client.InvalidURL)


def asked_wait(error: Exception) -> float | None:
    """The seconds that a server asks to wait before the next try, cut to what is bearable; None if it does not."""
    headers = getattr(error, 'headers', None)
    words = str(headers.get('Retry-After', '')).strip() if headers is not None else ''
    if words.isdecimal() and words.isascii():
        return min(float(words), LONGEST_WAIT)
    try:
        until = email.utils.parsedate_to_datetime(words).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(until - time.time(), 0.0), LONGEST_WAIT)


def reason_of(error: Exception) -> str:
    """The error in a few words on one line."""
    if isinstance(error, urllib.error.HTTPError):
        return f'the server answers {error.code} {cut(" ".join(str(error.reason).split()), 200)}'.rstrip()
    reason = getattr(error, 'reason', error)
    return cut(' '.join(str(reason).split()), 200) or type(reason).__name__
