"""A model folder goes to the Hub: checked before the first request, in one commit, and compared with what arrived."""
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd
from timm.models import create_model

from timm_miil._checks import shown
from timm_miil._errors import CheckpointError, HubError
from timm_miil.hub._client import WAITS, HubClient, is_passing, pause, status_of
from timm_miil.hub._files import LocalFile, differing, read_file
from timm_miil.hub._probe import check_probe
from timm_miil.hub._refusal import check_may_go
from timm_miil.hub.card import CARD_FILE, check_card, is_sealed
from timm_miil.hub.folder import FILES
from timm_miil.hub.verify import verify_repo

__all__ = ['Push', 'check_arrived', 'check_repo_id', 'push_folder']

MAIN = 'main'
REPO_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*')


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
    """
    repo_id: str
    changed: tuple[str, ...]
    commit: str | None
    url: str
    pull_request: str = ''
    is_new: bool = False


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

    Args:
        folder: As `save_model_folder` writes it.
        repo_id: 'owner/name'; made if it is not there.
        private: Whether a repository that is made is private.
        create_pr: Whether to propose the change in a pull request; an open one of the same title is brought up to date.
        revision: Branch to push to; None for main.
        dry_run: Whether to find out what would be done, without changing anything.
        force: Whether to replace a card that somebody has edited on the Hub.
        verify: Whether to download what arrived and check it, as `verify_repo` does.
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address of the Hub; None for the usual one.

    Raises:
        CheckpointError: If the folder does not load, or is not as it was converted.
        FileNotFoundError: If a file is missing.
        HubError: If the Hub refuses or does not answer, somebody has edited the card, or what arrived fails a check.
        ValueError: If the folder has other files, the card is wrong or names no licence, the weights may not be
            passed on, or an argument is wrong.
    """
    if create_pr and revision not in (None, MAIN):
        raise ValueError(f'create_pr is for the branch {MAIN}, got revision {revision!r}; leave one of them out.')
    check_repo_id(repo_id)
    folder = Path(folder)
    files, architecture = _check_local(folder)
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
    title = f'Upload {architecture} with timm-miil'
    branch, pull_request = revision or MAIN, ''
    if create_pr and (found := _open_pull(client, repo_id, title)):
        branch, pull_request, create_pr = f'refs/pr/{found}', f'{client.url(repo_id)}/discussions/{found}', False

    sent: tuple[str, ...] = ()
    for wait in (*WAITS, None):
        head = str(client.ask(client.api.repo_info, repo_id, revision=branch).sha)
        changed = _changed(client, repo_id, head, files)
        if not changed or dry_run:
            commit = None if changed else head
            break
        if CARD_FILE in changed and not force:
            _check_card_is_ours(client, repo_id, head)
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


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is 'owner/name' in the characters that the Hub takes."""
    if not REPO_ID.fullmatch(repo_id) or '..' in repo_id or '--' in repo_id or len(repo_id) > 192:
        raise ValueError(f'repo_id must be owner/name, got {shown(repo_id)}.')


def check_arrived(
        repo_id: str, commit: str, folder: Path, *, token: str | None = None, endpoint: str | None = None) -> None:
    """Raise HubError unless what the commit has, downloaded anew, is what is here and passes every check."""
    found = verify_repo(repo_id, revision=commit, folder=folder, token=token, endpoint=endpoint)
    if not found.passed:
        wrong = '; '.join(f'{check.name}: {check.words}' for check in found.checks if check.passed is False)
        raise HubError(
            f'{repo_id} is at {commit} not what was sent ({wrong}); push again, and tell whoever runs the server.')


def _check_local(folder: Path) -> tuple[Mapping[str, LocalFile], str]:
    """The folder's files and its architecture, if they are a model that may be published."""
    if not folder.is_dir():
        raise FileNotFoundError(f'the folder of a model must be given, got {str(folder)!r}, which is none.')
    there = {path.name: path for path in folder.iterdir()}
    if missing := sorted(FILES - there.keys()):
        raise FileNotFoundError(f'{folder} is no model folder: it lacks {", ".join(missing)}.')
    if more := sorted(there.keys() - FILES):
        raise ValueError(f'{folder} has other files than a model folder, such as {more[0]!r}; take them out.')
    card = there[CARD_FILE].read_text(encoding='utf-8')
    check_card(card)
    try:
        config: dict[str, Any] = json.loads(there['config.json'].read_text(encoding='utf-8'))
        with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
            model = create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:
        raise CheckpointError(f'{folder} does not load: {error}') from error
    check_may_go(card, config)
    files = {name: read_file(path) for name, path in there.items()}
    if isinstance(conversion := config.get('conversion'), dict):
        try:
            if conversion.get('weights_sha256') != files['model.safetensors'].sha256:
                raise HubError('model.safetensors is another one.')
            check_probe(model, conversion.get('probe'))
        except HubError as error:
            raise CheckpointError(f'{folder} is not as it was converted: {error} Convert it again.') from error
    return files, str(config['architecture'])


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


def _check_card_is_ours(client: HubClient, repo_id: str, revision: str) -> None:
    """Raise HubError if the Hub has a card that no program wrote, or that was edited since."""
    if not client.ask(client.api.get_paths_info, repo_id, [CARD_FILE], revision=revision):
        return
    with tempfile.TemporaryDirectory() as cache:
        path = client.ask(client.api.hf_hub_download, repo_id, CARD_FILE, revision=revision, cache_dir=cache)
        if not is_sealed(Path(path).read_text(encoding='utf-8', errors='replace')):
            raise HubError(
                f'the card of {repo_id} was written or edited by somebody; force replaces it (--force). Nothing was '
                f'sent.')
