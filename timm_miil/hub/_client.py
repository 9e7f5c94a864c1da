"""The Hub's client with what it lacks: retries of calls that it makes once, errors of one kind, no token in them."""
import email.utils
import importlib
import importlib.util
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_miil._checks import cut, shown
from timm_miil._errors import HubError
from timm_miil._version import __version__

__all__ = ['HubClient', 'TokenError', 'check_repo_id', 'is_passing', 'status_of', 'without_secrets']

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries
LONGEST_WAIT = 120.0    # that a server may ask for
HIDDEN = '***'
REPO_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*')

# A token of the Hub, the name and password of an address, and what a header or a query carries.
_SECRETS = (
    (re.compile(r'\bhf_[A-Za-z0-9]{16,}'), HIDDEN),
    (re.compile(r'(?<=://)[^/@\s]+@'), f'{HIDDEN}@'),
    (re.compile(r'(?i)(\bbearer\s+)[^\s\'"]+'), rf'\1{HIDDEN}'),
    (re.compile(r'(?i)([?&](?:token|access_token|api_key|key|signature|x-amz-[a-z-]+)=)[^&\s\'"]+'), rf'\1{HIDDEN}'),
)
_RATE_LIMIT = re.compile(r'"\w+"\s*;\s*r\s*=\s*0+\s*;\s*t\s*=\s*([0-9]+)')

_T = TypeVar('_T')


class TokenError(HubError):
    """The Hub does not take the token, whatever is asked with it."""


class HubClient:
    """Calls of the Hub that are tried again where that may help.

    Args:
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address; None for the Hub, or what HF_ENDPOINT says.

    Raises:
        TokenError: If the token has characters that none has; it is not shown.
    """

    def __init__(self, token: str | None = None, endpoint: str | None = None) -> None:
        self._token = token if token is not None else get_token()
        if self._token and not re.fullmatch(r'[\x21-\x7e]+', self._token):
            raise TokenError('the token has spaces, line ends or other characters that no token has; copy it again.')
        self.api = HfApi(endpoint=endpoint, token=token, library_name='timm-miil', library_version=__version__)

    def ask(self, call: Callable[..., _T], *args: Any, **settings: Any) -> _T:
        """The answer of a call that changes nothing, or the same thing when it is made twice.

        Raises:
            HubError: If it fails; the cause is the client's error, unless that tells a secret.
        """
        for wait in (*WAITS, None):
            try:
                return call(*args, **settings)
            except Exception as error:
                if wait is None or not is_passing(error):
                    raise self.explained(error) from self.told(error)
                pause(error, wait)
        raise AssertionError('the last try returns or raises')

    def explained(self, error: Exception) -> HubError:
        """The error in one line that says what to do; it never quotes a token."""
        if isinstance(error, HubError):
            return error
        error = _first(error)
        status, reason = status_of(error), cut(without_secrets(' '.join(str(error).split()), self._token), 300)
        if isinstance(error, RepositoryNotFoundError):
            return HubError('there is no such repository, or the token may not see it; check the name, or log in by '
                            '`hf auth login`.')
        if isinstance(error, RevisionNotFoundError):
            return HubError(f'the repository has no such branch, tag or commit: {reason}')
        if isinstance(error, OfflineModeIsEnabled):
            return HubError('the Hub is switched off by HF_HUB_OFFLINE; unset it, as this needs the Hub.')
        if isinstance(error, LocalTokenNotFoundError) or status == 401 and not self._token:
            return TokenError('there is no token; log in by `hf auth login`, or set HF_TOKEN.')
        if status == 401:
            return TokenError('the Hub knows no such token; log in by `hf auth login`, or set HF_TOKEN.')
        if status == 403:
            return HubError(f'the token may not do this; take one that may write: {reason}')
        if status == 412:
            return HubError('others commit to it all the time; nothing was changed, try again later.')
        if is_passing(error):
            return HubError(f'the Hub does not answer as it should, {len(WAITS) + 1} times or more: {reason}; try '
                            f'again later.')
        return HubError(f'the Hub refuses: {reason or type(error).__name__}')

    def told(self, error: Exception) -> Exception | None:
        """The error as the cause of another one, which a traceback shows; None if it would tell a secret."""
        words = ' '.join(_words(error))
        return error if without_secrets(words, self._token) == words else None

    def url(self, repo_id: str) -> str:
        """Where to look at a repository."""
        return f'{without_secrets(str(self.api.endpoint), self._token)}/{repo_id}'


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is 'owner/name' in the characters that the Hub takes."""
    if not REPO_ID.fullmatch(repo_id) or '..' in repo_id or '--' in repo_id or len(repo_id) > 192:
        raise ValueError(f'repo_id must be owner/name, got {shown(repo_id)}.')


def without_secrets(words: str, token: str | None = None) -> str:
    """The words with tokens and passwords hidden, also those that are quoted or part of an address."""
    for form in {token, token and repr(token)[1:-1], token and urllib.parse.quote(token, safe='')}:
        if form:
            words = words.replace(form, HIDDEN)
    for pattern, hidden in _SECRETS:
        words = pattern.sub(hidden, words)
    return words


def pause(error: Exception, wait: float) -> None:
    """Wait before the next try, as long as the server asks for if it does."""
    headers = getattr(getattr(error, 'response', None), 'headers', {})
    asked = _seconds(headers.get('Retry-After', ''), headers.get('RateLimit', ''))
    time.sleep(wait if asked is None else min(max(asked, 0.0), LONGEST_WAIT))


def status_of(error: BaseException) -> int:
    """The HTTP status of an error, 0 if it has none."""
    return int(getattr(getattr(error, 'response', None), 'status_code', 0)) if isinstance(error, HfHubHTTPError) else 0


def is_passing(error: Exception) -> bool:
    """Whether the next try may do better: too many requests, trouble of the server, a connection that broke."""
    error = _first(error)
    if isinstance(error, HubError | OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status:
        return status in (408, 429) or status >= 500
    causes = [error, error.__cause__, error.__context__]
    return any(isinstance(cause, (ConnectionError, TimeoutError, *_transport_errors())) for cause in causes)


def _first(error: Exception) -> Exception:
    """What an error comes from, where the client's own, of an upload or a download, says less."""
    while ((type(error) is RuntimeError or isinstance(error, LocalEntryNotFoundError))
           and isinstance(error.__cause__, Exception)):
        error = error.__cause__
    return error


def _words(error: BaseException | None) -> Iterator[str]:
    """What a traceback quotes of an error and of those before it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield from (str(error), repr(error), *getattr(error, '__notes__', ()))
        error = error.__cause__ or error.__context__


def _seconds(retry_after: str, rate_limit: str) -> float | None:
    """What the server asks to wait, as a number, as a day and hour, or in the words of the Hub's own header."""
    if retry_after.isdecimal():
        return float(retry_after)
    if found := _RATE_LIMIT.search(rate_limit):
        return float(found[1])
    if retry_after:
        try:
            return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            pass
    return None


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the client raises where a connection fails; releases of the client differ in it."""
    return tuple(
        importlib.import_module(name).TransportError for name in ('httpx2', 'httpx')
        if importlib.util.find_spec(name) is not None)
