"""The Hub's client with what it lacks: retries of the calls that it makes once, and errors of one kind."""
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from timm_miil._checks import cut
from timm_miil._errors import HubError
from timm_miil._version import __version__

__all__ = ['HubClient', 'is_passing', 'status_of']

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries
LONGEST_WAIT = 120.0    # that a server may ask for

_T = TypeVar('_T')


class HubClient:
    """Calls of the Hub that are tried again where that may help.

    Args:
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address; None for the Hub, or what HF_ENDPOINT says.
    """

    def __init__(self, token: str | None = None, endpoint: str | None = None) -> None:
        self.api = HfApi(endpoint=endpoint, token=token, library_name='timm-miil', library_version=__version__)

    def ask(self, call: Callable[..., _T], *args: Any, **settings: Any) -> _T:
        """The answer of a call that changes nothing, or the same thing when it is made twice.

        Raises:
            HubError: If it fails; the cause is the client's error.
        """
        for wait in (*WAITS, None):
            try:
                return call(*args, **settings)
            except Exception as error:
                if wait is None or not is_passing(error):
                    raise explained(error) from error
                pause(error, wait)
        raise AssertionError('the last try returns or raises')


def pause(error: Exception, wait: float) -> None:
    """Wait before the next try, as long as the server asks for if it does."""
    asked = getattr(getattr(error, 'response', None), 'headers', {}).get('Retry-After', '')
    time.sleep(min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error, 0 if it has none."""
    return int(getattr(getattr(error, 'response', None), 'status_code', 0)) if isinstance(error, HfHubHTTPError) else 0


def is_passing(error: Exception) -> bool:
    """Whether the next try may do better: too many requests, trouble of the server, a connection that broke."""
    status = status_of(error)
    if status:
        return status == 429 or status >= 500
    causes = [error, error.__cause__, error.__context__]
    return any(isinstance(cause, (ConnectionError, TimeoutError, *_transport_errors())) for cause in causes)


def explained(error: Exception) -> HubError:
    """The error in one line that says what to do; it never quotes a token."""
    if isinstance(error, HubError):
        return error
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # the client's, of an upload
        error = error.__cause__
    status, reason = status_of(error), cut(' '.join(str(error).split()), 300)
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return HubError('the Hub knows no such token; log in by `hf auth login`, or set HF_TOKEN.')
    if isinstance(error, RepositoryNotFoundError):
        return HubError('there is no such repository, or the token may not see it; check the name, or log in by `hf '
                        'auth login`.')
    if status == 403:
        return HubError(f'the token may not do this; take one that may write: {reason}')
    if is_passing(error):
        return HubError(f'the Hub does not answer as it should, {len(WAITS) + 1} times: {reason}; try again later.')
    return HubError(f'the Hub refuses: {reason or type(error).__name__}')


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the client raises where a connection fails; releases of the client differ in it."""
    return tuple(
        importlib.import_module(name).TransportError for name in ('httpx2', 'httpx')
        if importlib.util.find_spec(name) is not None)
