"""Weights of the catalogue go to the Hub: converted into a folder that is kept, pushed, and checked as they arrived."""
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from timm_miil import catalog
from timm_miil._atomic import write_file
from timm_miil._checks import cut, nearest, shown
from timm_miil._errors import CatalogError, CheckpointError
from timm_miil.hub._client import HubClient, TokenError, check_repo_id, without_secrets
from timm_miil.hub._config import read_config
from timm_miil.hub._files import read_file
from timm_miil.hub._journal import FileFacts, Journal, Record, open_journal, read_journal
from timm_miil.hub._refusal import why_not
from timm_miil.hub.card import catalog_card
from timm_miil.hub.convert import CONVERTER, convert
from timm_miil.hub.folder import FILES
from timm_miil.hub.push import Push, check_arrived, push_folder

__all__ = ['Outcome', 'State', 'publish', 'publish_all']

State = Literal['pushed', 'up to date', 'to push', 'refused', 'failed', 'not tried']
NAMESPACE = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')  # of files that are here already


@dataclass(frozen=True)
class Outcome:
    """What became of one entry of the catalogue.

    Attributes:
        name: 'architecture.tag'.
        repo_id: 'owner/name'.
        state: 'to push' is a dry run's; 'not tried' is what came after a token that the Hub does not take.
        words: The address and what somebody should know of the conversion, or why not.
    """
    name: str
    repo_id: str
    state: State
    words: str


def publish(
        name: str,
        repo_id: str,
        *,
        source: str | os.PathLike[str] | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        private: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        dry_run: bool = False,
        force: bool = False,
        verify: bool = True,
        progress: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
) -> Push:
    """Convert weights of the catalogue and push them, as `push_folder` does.

    The converted folder is kept: after an interruption only what is missing is done.

    Args:
        name: 'architecture.tag' of the catalogue.
        repo_id: 'owner/name'; made if it is not there.
        source: File or URL to convert in place of the catalogue's own.
        work_dir: Where converted folders are kept; None for `timm_miil/converted` in the Hub's home folder.
        cache_dir: Where downloads are kept; None for the place that `convert` takes.
        private: Whether a repository that is made is private.
        create_pr: Whether to propose the change in a pull request.
        revision: Branch to push to; None for main.
        dry_run: Whether to find out what would be done, without changing anything on the Hub.
        force: Whether to replace files that somebody else has edited on the Hub.
        verify: Whether to download what arrived and check it.
        progress: Whether to show a download's progress on stderr.
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address of the Hub; None for the usual one.

    Raises:
        CatalogError: If there are no such weights.
        CheckpointError: If the source cannot be had, read safely or converted, or is not of the entry.
        HubError: If the Hub refuses or does not answer, somebody has edited a file, or what arrived fails a check.
        ValueError: If the weights may not be published or cannot yet, timm hosts them, or an argument is wrong.
    """
    entry = catalog.weight(name)
    if (reason := why_not(entry)) is not None:
        raise ValueError(f'{name} is not for the Hub: {reason}.')
    check_repo_id(repo_id)
    folder, notes = _converted(entry, repo_id, source, work_dir, cache_dir, progress)
    push = push_folder(
        folder, repo_id, private=private, create_pr=create_pr, revision=revision, dry_run=dry_run, force=force,
        verify=verify, token=token, endpoint=endpoint)
    return replace(push, notes=notes)


def publish_all(
        org: str,
        *,
        names: Sequence[str] | None = None,
        journal: str | os.PathLike[str] | None = None,
        sources: str | os.PathLike[str] | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        private: bool = False,
        dry_run: bool = False,
        force: bool = False,
        verify: bool = True,
        progress: bool = False,
        told: Callable[[Outcome], None] = lambda outcome: None,
        token: str | None = None,
        endpoint: str | None = None,
) -> tuple[Outcome, ...]:
    """Publish all of the catalogue that may be, each entry as 'org/architecture.tag'.

    A journal says after each entry what has been done. A later run passes over what it says was done, if the
    repository's head is still that commit. What fails does not stop the others.

    Args:
        org: User or organisation on the Hub.
        names: Entries of the catalogue; None for all.
        journal: File; None for one of this org in the Hub's home folder.
        sources: Folder with original files that are here already, by the name of the entry or by their own name where
            only one entry has it; None downloads all.
        work_dir: Where converted folders are kept; None for `timm_miil/converted` in the Hub's home folder.
        cache_dir: Where downloads are kept; None for the place that `convert` takes.
        private: Whether repositories that are made are private.
        dry_run: Whether to find out what would be done: nothing is downloaded, converted, changed or written.
        force: Whether to replace files that somebody else has edited on the Hub.
        verify: Whether to download what arrived and check it.
        progress: Whether to show a download's progress on stderr.
        told: Called with each outcome as it comes.
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address of the Hub; None for the usual one.

    Returns:
        An outcome an entry, in the catalogue's order.

    Raises:
        CatalogError: If a name is none of the catalogue.
        HubError: If the Hub does not take the token or does not answer, the journal is damaged, or another run is at
            work with it.
        FileNotFoundError: If there is no such folder of sources.
        ValueError: If org is no name.
    """
    if not NAMESPACE.fullmatch(org):
        raise ValueError(f'org must name a user or an organisation on the Hub, got {shown(org)}.')
    if sources is not None and not Path(sources).is_dir():
        raise FileNotFoundError(
            f'sources must be a folder that is there, got {str(sources)!r}; leave it out to download all.')
    known = catalog.weights()
    if strange := [name for name in names or () if name not in known]:
        raise CatalogError(f'unknown weights {strange[0]!r}; {nearest(strange[0], known)}')
    entries = [entry for name, entry in known.items() if names is None or name in names]
    client = HubClient(token, endpoint)
    path = Path(journal) if journal is not None else _home() / f'push-{org}.json'
    if dry_run:
        records = read_journal(path)
        return tuple(_tell(told, _foreseen(client, entry, f'{org}/{entry.name}', records)) for entry in entries)
    _check_token(client)

    def send(entry: catalog.Weights, repo_id: str, kept: Journal) -> Outcome:
        foreseen = _foreseen(client, entry, repo_id, kept.records)
        if foreseen.state != 'to push':
            return foreseen
        folder, notes = _converted(entry, repo_id, _source_here(entry, sources), work_dir, cache_dir, progress)
        push = push_folder(
            folder, repo_id, private=private, force=force, verify=verify, token=token, endpoint=endpoint)
        if verify and not push.changed and push.commit is not None:  # sent by a run that may have ended before this
            check_arrived(repo_id, push.commit, folder, token=token, endpoint=endpoint)
        state: State = 'pushed' if push.changed else 'up to date'
        record = _record(client, entry, push, state, folder, ' '.join(notes))
        kept.add(record)
        return Outcome(entry.name, repo_id, state, _words(push.url, record))

    outcomes: list[Outcome] = []
    locked_out = False
    with open_journal(path) as kept:
        for entry in entries:
            repo_id = f'{org}/{entry.name}'
            try:
                outcome = (Outcome(entry.name, repo_id, 'not tried', 'the Hub did not take the token any more')
                           if locked_out else send(entry, repo_id, kept))
            except Exception as error:  # whatever is wrong with one entry, the others have their turn
                locked_out = isinstance(error, TokenError)
                words = cut(without_secrets(' '.join(str(error).split()), token)) or type(error).__name__
                kept.add(Record(entry.name, repo_id, client.url(''), 'failed', _now(), error=words))
                outcome = Outcome(entry.name, repo_id, 'failed', words)
            outcomes.append(_tell(told, outcome))
    return tuple(outcomes)


def _tell(told: Callable[[Outcome], None], outcome: Outcome) -> Outcome:
    told(outcome)
    return outcome


def _foreseen(client: HubClient, entry: catalog.Weights, repo_id: str, records: Mapping[str, Record]) -> Outcome:
    """What is to be done with an entry, by what is on the Hub and in the journal."""
    if (reason := why_not(entry)) is not None:
        return Outcome(entry.name, repo_id, 'refused', reason)
    if not client.ask(client.api.repo_exists, repo_id):
        return Outcome(entry.name, repo_id, 'to push', 'a new repository')
    head, record = client.ask(client.api.repo_info, repo_id).sha, records.get(entry.name)
    if record is None or not record.commit or (record.repo_id, record.endpoint) != (repo_id, client.url('')):
        return Outcome(entry.name, repo_id, 'to push', 'the repository is there, and the journal has nothing of it')
    if record.commit != head:
        return Outcome(entry.name, repo_id, 'to push', 'the repository has changed since it was pushed')
    if record.facts != _facts(entry, repo_id):
        return Outcome(entry.name, repo_id, 'to push', 'the catalogue or the converter has changed since it was pushed')
    return Outcome(entry.name, repo_id, 'up to date', _words(f'{client.url(repo_id)}/tree/{head}', record))


def _words(url: str, record: Record) -> str:
    return f'{url}; note: {record.notes}' if record.notes else url


def _check_token(client: HubClient) -> None:
    """Raise HubError unless the token is one that may write: better now than after the first download."""
    user: dict[str, Any] = client.ask(client.api.whoami)
    if (user.get('auth') or {}).get('accessToken', {}).get('role') == 'read':
        raise TokenError(f'the token of {user.get("name")} may only read; take one that may write.')


def _converted(
        entry: catalog.Weights,
        repo_id: str,
        source: str | os.PathLike[str] | None,
        work_dir: str | os.PathLike[str] | None,
        cache_dir: str | os.PathLike[str] | None,
        progress: bool,
) -> tuple[Path, tuple[str, ...]]:
    """The model folder for a repository, and what somebody should know of it.

    It is the one that an earlier run has finished, else one made now.
    """
    work = Path(work_dir) if work_dir is not None else _home() / 'converted'
    folder = work / repo_id.replace('/', '--')
    note = folder.with_name(f'{folder.name}.facts')  # written last, so that a folder with it is finished
    facts = _facts(entry, repo_id)
    known, *notes = (note.read_text(encoding='utf-8') if note.is_file() else '').splitlines() or ['']
    if known != facts or not _is_of(folder, entry, source):
        note.unlink(missing_ok=True)
        done = convert(
            entry.name if source is None else source, folder, name=entry.name, repo_id=repo_id, progress=progress,
            cache_dir=cache_dir)
        if entry.num_classes not in (None, done.network.num_classes):
            raise CheckpointError(
                f'{done.source} has {done.network.num_classes} classes, and {entry.name} {entry.num_classes}; give the '
                f'file of these weights.')
        notes = [' '.join(each.split()) for each in done.notes]
        write_file(note, '\n'.join([facts, *notes]))
    return folder, tuple(notes)


def _facts(entry: catalog.Weights, repo_id: str) -> str:
    """A digest of all but the source that a converted folder is made of."""
    return hashlib.sha256(f'{CONVERTER} {entry!r} {catalog_card(entry.name, repo_id=repo_id)}'.encode()).hexdigest()


def _is_of(folder: Path, entry: catalog.Weights, source: str | os.PathLike[str] | None) -> bool:
    """Whether a folder is whole and was converted from this source."""
    try:
        conversion = read_config(folder / 'config.json')['conversion']
        is_whole = ({path.name for path in folder.iterdir()} == FILES
                    and conversion['weights_sha256'] == read_file(folder / 'model.safetensors').sha256)
        path = Path(source) if source is not None else Path(catalog.__file__).parents[1] / (entry.file or '')
        is_same = (
            conversion['source_sha256'] == read_file(path).sha256 if path.is_file()
            else conversion['source'] == (source or entry.url)
            and entry.sha256 in (None, conversion['source_sha256']))
    except (KeyError, OSError, TypeError, ValueError):
        return False
    return is_whole and is_same


def _source_here(entry: catalog.Weights, sources: str | os.PathLike[str] | None) -> Path | None:
    """The entry's original file in a folder of them."""
    if sources is None:
        return None
    folder, name = Path(sources), entry.file_name
    candidates = [folder / f'{entry.name}{suffix}' for suffix in SUFFIXES]
    if name is not None and sum(other.file_name == name for other in catalog.weights().values()) == 1:
        candidates.append(folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _record(client: HubClient, entry: catalog.Weights, push: Push, state: State, folder: Path, notes: str) -> Record:
    conversion = read_config(folder / 'config.json')['conversion']
    files = {name: read_file(folder / name) for name in sorted(FILES)}
    return Record(
        entry.name, push.repo_id, client.url(''), state, _now(), commit=push.commit or '',
        facts=_facts(entry, push.repo_id), source=str(conversion.get('source', '')),
        source_sha256=str(conversion['source_sha256']),
        files={name: FileFacts(file.sha256, file.size) for name, file in files.items()}, notes=notes)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _home() -> Path:
    return Path(constants.HF_HOME) / 'timm_miil'
