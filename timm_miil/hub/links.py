"""Whether the files that the catalogue points at are still there."""
import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from urllib.error import HTTPError

from huggingface_hub import hf_hub_url

from timm_miil import catalog
from timm_miil._checks import check_positive
from timm_miil._web import TROUBLE, asked_wait, check_url, is_passing, open_url, reason_of

__all__ = ['Link', 'check_links', 'links', 'sources']

WAITS = (1.0, 4.0)     # seconds between tries
SECONDS = 20.0         # without an answer
THREADS = 8
NO_HEAD = (400, 401, 403, 404, 405, 501)    # how servers answer that know no HEAD, or sign addresses for GET alone
HUB_FILE = 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class Link:
    """One address, as it answered.

    Attributes:
        name: Weights that it is of.
        url: The address.
        status: Of HTTP; 0 if there was no answer.
        size: Of the file in bytes; None if the server does not say.
        problem: Why the file cannot be had, in a few words; '' if it can.
    """

    name: str
    url: str
    status: int
    size: int | None = None
    problem: str = ''

    @property
    def is_dead(self) -> bool:
        """Whether the file cannot be had there now."""
        return bool(self.problem)


def links(names: Iterable[str] | None = None) -> tuple[Link, ...]:
    """Ask for every address that the catalogue has of weights, and fetch none.

    Args:
        names: Weights as 'architecture.tag'; None for all.

    Raises:
        CatalogError: If there are no weights of a name.
    """
    return check_links(sources(names))


def sources(names: Iterable[str] | None = None) -> tuple[tuple[str, str], ...]:
    """Name and address of each place that has weights: where their authors published them, and the Hub.

    Args:
        names: Weights as 'architecture.tag'; None for all.

    Raises:
        CatalogError: If there are no weights of a name.
    """
    entries = catalog.weights().values() if names is None else map(catalog.weight, names)
    return tuple(
        (entry.name, url) for entry in entries
        for url in (entry.url, entry.hf_hub_id and hf_hub_url(entry.hf_hub_id, HUB_FILE)) if url)


def check_links(
        found: Mapping[str, str] | Iterable[tuple[str, str]], *, threads: int = THREADS) -> tuple[Link, ...]:
    """Ask for addresses, each once, and fetch nothing.

    Args:
        found: Names and their addresses; one address may have several names.
        threads: Addresses that are asked for at a time.

    Returns:
        One link a pair, in their order.

    Raises:
        ValueError: If threads is not positive.
    """
    check_positive(threads=threads)
    pairs = list(found.items() if isinstance(found, Mapping) else found)
    urls = list(dict.fromkeys(url for _, url in pairs))
    with ThreadPoolExecutor(threads) as pool:
        answers = dict(zip(urls, pool.map(_ask, urls), strict=True))
    return tuple(dataclasses.replace(answers[url], name=name) for name, url in pairs)


def _ask(url: str) -> Link:
    try:
        check_url(url)
    except ValueError as error:
        return Link('', url, 0, problem=str(error))
    for wait in (*WAITS, None):
        try:
            return _ask_once(url)
        except TROUBLE as error:
            if wait is None or not is_passing(error):
                return Link('', url, error.code if isinstance(error, HTTPError) else 0, problem=reason_of(error))
            asked = asked_wait(error)
            time.sleep(wait if asked is None else asked)
    raise AssertionError('the last try returns')


def _ask_once(url: str) -> Link:
    try:
        with open_url(url, method='HEAD', seconds=SECONDS) as answer:
            return _link(url, answer)
    except HTTPError as error:
        if error.code not in NO_HEAD:
            raise
    with open_url(url, headers={'Range': 'bytes=0-0'}, seconds=SECONDS) as answer:  # closed before more is read
        return _link(url, answer)


def _link(url: str, answer: HTTPResponse) -> Link:
    whole = re.fullmatch(r'bytes .*/(\d+)', answer.headers.get('Content-Range') or '', re.ASCII)
    length = whole[1] if whole else answer.headers.get('Content-Length') or ''
    is_page = answer.headers.get_content_type() == 'text/html'
    return Link('', url, answer.status, int(length) if length.isdecimal() else None,
                'a web page in place of the file' if is_page else '')
