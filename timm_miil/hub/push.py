"""A model folder goes to the Hub: checked before the first request, in one commit, and compared with what arrived."""
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from timm_miil._atomic import write_file
from timm_miil._checks import shown
from timm_miil._errors import HubError
from timm_miil.hub._client import WAITS, HubClient, check_repo_id, is_passing, pause, status_of
from timm_miil.hub._files import LocalFile, differing
from timm_miil.hub._outgoing import check_outgoing
from timm_miil.hub.card import CARD_FILE, is_sealed
from timm_miil.hub.verify import verify_repo

__all__ = ['Push', 'check_arrived', 'push_folder']

MAIN = 'main'
# Of the commits that a push makes, also where the Hub merges them as a pull request.
TITLE = re.compile(r'Upload \S+ with timm-miil(?: \(#[0-9]+\))?')


@dataclass(frozen=True)
class Push:
    """What a push did, or would do.

    Args:
        repo_id: 'owner/name'.
        changed: Files that differed from those on the Hub.
        commit: The commit that has them; None of a dry run that would make one.
        url: Where to look at it.
        pull_request: Address of the pull request; '' without.
        is_new: Whether the repository was, or would be, made.
        notes: What somebody should know of the conversion, one sentence each.
    """
    repo_id: str
    changed: tuple[str, ...]
    commit: str | None
    url: str
    pull_request: str = ''
    is_new: bool = False
    notes: tuple[str, ...] = ()


def push_folder(
        folder: str | os.PathLike[str],
        repo_id: str,
        *,
        private: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        dry_run: bool = False,
        force: bool = False,
        verify: bool = True,
        token: str | None = None,
        endpoint: str | None = None,
) -> Push:
    """Upload a model folder as one commit, or nothing if the Hub has it already.

    Files of the repository that are not a model folder's stay as they are. An upload that was interrupted goes on:
    large files that arrived are not sent again. After a lost answer the repository is looked at before anything is
    sent again.

    The card of a folder that was converted for the catalogue is written anew, in the folder, for this repository; one
    that somebody has edited goes as it is.

    Args:
        folder: As `save_model_folder` or `convert` writes it.
        repo_id: 'owner/name'; made if it is not there.
        private: Whether a repository that is made is private.
        create_pr: Whether to propose the change in a pull request; an open one of the same title is brought up to date.
        revision: Branch to push to; None for main.
        dry_run: Whether to find out what would be done, without changing anything.
        force: Whether to replace files that somebody else has edited on the Hub.
        verify: Whether to download what arrived and check it, as `verify_repo` does.
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address of the Hub; None for the usual one.

    Raises:
        CheckpointError: If the folder does not load, leads elsewhere, or is not as it was converted.
        FileNotFoundError: If a file is missing.
        HubError: If the Hub refuses or does not answer, somebody has edited a file, or what arrived fails a check.
        ValueError: If the folder has other files or links out of it, the card is wrong or names no licence, the weights
            may not be passed on, or an argument is wrong.
    """
    if create_pr and revision not in (None, MAIN):
        raise ValueError(f'create_pr is for the branch {MAIN}, got revision {revision!r}; leave one of them out.')
    check_repo_id(repo_id)
    folder = Path(folder)
    outgoing = check_outgoing(folder, repo_id)
    files = outgoing.files
    if outgoing.card is not None and not dry_run:
        write_file(folder / CARD_FILE, outgoing.card)
    client = HubClient(token, endpoint)
    is_new = not client.ask(client.api.repo_exists, repo_id)
    if is_new:
        if dry_run:
            return Push(repo_id, tuple(sorted(files)), None, client.url(repo_id), is_new=True)
        if create_pr:
            raise HubError(f'there is no repository {repo_id} to propose a change to; push without a pull request.')
        client.ask(client.api.create_repo, repo_id, private=private, exist_ok=True)
    elif private and not client.ask(client.api.repo_info, repo_id).private:
        raise HubError(f'{repo_id} is there and public; make it private in its settings, or choose another name.')
    title = f'Upload {outgoing.architecture} with timm-miil'
    branch, pull_request = revision or MAIN, ''
    if create_pr and (found := _open_pull(client, repo_id, title)):
        branch, pull_request, create_pr = f'refs/pr/{found}', f'{client.url(repo_id)}/discussions/{found}', False

    sent: tuple[str, ...] = ()
    commit: str | None = None
    for wait in (*WAITS, None):
        head = str(client.ask(client.api.repo_info, repo_id, revision=branch).sha)
        changed = _changed(client, repo_id, head, files)
        if not changed:
            commit = head
            break
        if not force:
            _check_is_ours(client, repo_id, head, changed)
        if dry_run:
            break
        sent = tuple(sorted(changed))
        try:
            made = client.api.create_commit(
                repo_id, [CommitOperationAdd(name, files[name].path) for name in sent], commit_message=title,
                revision=branch, parent_commit=head, create_pr=create_pr)
        except Exception as error:
            # The commit may have landed, or another one come between: the next round looks at what is there.
            if wait is None or not (is_passing(error) or status_of(error) == 412):
                raise client.explained(error) from client.told(error)
            pause(error, wait)
            if create_pr and (found := _open_pull(client, repo_id, title)):
                branch, create_pr = f'refs/pr/{found}', False
                pull_request = f'{client.url(repo_id)}/discussions/{found}'
        else:
            commit, changed = made.oid, {}
            pull_request = made.pr_url or pull_request
            break
    if commit is not None and sent and verify:
        check_arrived(repo_id, commit, folder, token=token, endpoint=endpoint)
    where = f'{client.url(repo_id)}/tree/{commit or branch}'
    return Push(repo_id, sent or tuple(sorted(changed)), commit, where, pull_request, is_new)


def check_arrived(
        repo_id: str, commit: str, folder: Path, *, token: str | None = None, endpoint: str | None = None) -> None:
    """Raise HubError unless what the commit has, downloaded anew, is what is here and passes every check."""
    found = verify_repo(repo_id, revision=commit, folder=folder, token=token, endpoint=endpoint)
    if not found.passed:
        wrong = '; '.join(f'{check.name}: {check.words}' for check in found.checks if check.passed is False)
        raise HubError(
            f'{repo_id} is at {commit} not what was sent ({wrong}); push again, and tell whoever runs the server.')


def _open_pull(client: HubClient, repo_id: str, title: str) -> int:
    """Number of the user's own open pull request of this title, 0 if there is none."""
    user = client.ask(client.api.whoami)['name']
    found = client.ask(lambda: list(client.api.get_repo_discussions(
        repo_id, discussion_type='pull_request', discussion_status='open')))
    return max((
        pull.num for pull in found if pull.is_pull_request and (pull.title, pull.author) == (title, user)), default=0)


def _changed(client: HubClient, repo_id: str, revision: str, files: Mapping[str, LocalFile]) -> dict[str, LocalFile]:
    """The files that are not on the Hub as they are here."""
    remote: dict[str, Any] = {
        info.path: info for info in client.ask(client.api.get_paths_info, repo_id, list(files), revision=revision)}
    return differing(files, remote)


def _check_is_ours(client: HubClient, repo_id: str, revision: str, names: Iterable[str]) -> None:
    """Raise HubError if files that would be replaced are not as a push left them.

    A card tells by its seal. Of another file the last commit that touched it must be one of a push.
    """
    there = client.ask(client.api.get_paths_info, repo_id, list(names), revision=revision, expand=True)
    for file in there:
        if file.path == CARD_FILE:
            _check_card_is_ours(client, repo_id, revision)
        elif file.last_commit is None or not TITLE.fullmatch(file.last_commit.title):
            by = shown(file.last_commit.title) if file.last_commit else 'a commit that the Hub does not name'
            raise HubError(
                f'{file.path} of {repo_id} was last changed by {by}, not by a push of timm-miil; force replaces it '
                f'(--force). Nothing was sent.')


def _check_card_is_ours(client: HubClient, repo_id: str, revision: str) -> None:
    """Raise HubError if the Hub has a card that no program wrote, or that was edited since."""
    with tempfile.TemporaryDirectory() as cache:
        path = client.ask(client.api.hf_hub_download, repo_id, CARD_FILE, revision=revision, cache_dir=cache)
        if not is_sealed(Path(path).read_text(encoding='utf-8', errors='replace')):
            raise HubError(
                f'the card of {repo_id} was written or edited by somebody; force replaces it (--force). Nothing was '
                f'sent.')
