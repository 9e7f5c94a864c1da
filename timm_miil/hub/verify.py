"""What a repository on the Hub gives is looked at as a stranger gets it: in a clean cache, by all that is recorded.

Each check stands alone, so that one answer tells all that is wrong. Nothing that is downloaded is believed: weights are
read by `read_checkpoint`, which executes nothing, and config.json is searched for what could lead elsewhere before timm
sees it.
"""
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from timm.models import create_model, model_entrypoint
from torch import nn

from timm_miil import catalog
from timm_miil._checks import cut, shown
from timm_miil._errors import HubError
from timm_miil.hub._client import HubClient, check_repo_id, without_secrets
from timm_miil.hub._config import check_config, read_config
from timm_miil.hub._files import LocalFile, is_same, read_file
from timm_miil.hub._journal import read_journal
from timm_miil.hub._probe import check_probe
from timm_miil.hub.card import CARD_FILE, check_card, is_sealed
from timm_miil.hub.folder import FILES
from timm_miil.models.checkpoint_file import read_checkpoint, read_metadata
from timm_miil.models.published import Network, is_network_of

__all__ = ['Check', 'Verification', 'verify_repo']

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
# Files that run code when they are loaded the usual way.
UNSAFE = ('.bin', '.ckpt', '.joblib', '.pickle', '.pkl', '.pt', '.pth', '.tar')


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Which.
        passed: Whether it is as it should be; None where there is nothing to compare with.
        words: What was found.
    """
    name: str
    passed: bool | None
    words: str


@dataclass(frozen=True)
class Verification:
    """What was found of a repository.

    Attributes:
        repo_id: 'owner/name'.
        commit: Which state of it.
        checks: In the order in which they were made.
    """
    repo_id: str
    commit: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)


class _Unknown(Exception):
    """There is nothing to compare with; the message says why."""


def verify_repo(
        repo_id: str,
        *,
        revision: str | None = None,
        journal: str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        token: str | None = None,
        endpoint: str | None = None,
) -> Verification:
    """Download a model repository into a clean cache and check it.

    Args:
        repo_id: 'owner/name'.
        revision: Branch, tag or commit; None for main.
        journal: Of `publish_all`, whose hashes it must have; None does without.
        folder: Model folder whose files it must have; None does without.
        token: Of a user; None takes the one that is logged in or in the environment.
        endpoint: Address of the Hub; None for the usual one.

    Raises:
        FileNotFoundError: If there is no such journal.
        HubError: If the Hub does not answer or has no such repository or revision, or the journal is damaged. What is
            wrong with the repository's content raises nothing: it is a check that failed.
        ValueError: If repo_id is not 'owner/name'.
    """
    check_repo_id(repo_id)
    records = read_journal(Path(journal), must_exist=True) if journal is not None else {}
    client = HubClient(token, endpoint)
    info = client.ask(client.api.model_info, repo_id, revision=revision, files_metadata=True)
    with tempfile.TemporaryDirectory() as cache:
        there = _Arrived(client, repo_id, str(info.sha), {file.rfilename: file for file in info.siblings or ()}, cache)
        looked = _Looked()
        looked.at('files', there.check_names)
        looked.at('transfer', there.check_transfer)
        if folder is not None:
            own = {path.name: path for path in Path(folder).iterdir() if path.name in FILES}
            looked.at('sent', lambda: _check_hashes(there, {name: read_file(path).sha256 for name, path in own.items()},
                                                    'than was sent'))
        if journal is not None:
            of_it = [record.files for record in records.values() if record.repo_id == repo_id]
            looked.at('journal', lambda: _check_journal(there, of_it))
        looked.at('config', lambda: check_config(there.config()))
        looked.at('record', lambda: _check_record(there))
        looked.at('catalogue', lambda: _check_catalogue(there))
        looked.at('weights', lambda: _check_weights(there))
        # What may lead elsewhere is not given to timm.
        model: list[nn.Module] = []
        looked.at('model', lambda: _load(there, model), after=('files', 'transfer', 'config', 'weights'))
        looked.at('logits', lambda: _check_logits(there, model[0]), after=('model',))
        looked.at('card', lambda: _check_card(there))
        return Verification(repo_id, there.commit, tuple(looked.checks))


class _Looked:
    """The checks so far."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def at(self, name: str, look: Callable[[], str], after: tuple[str, ...] = ()) -> None:
        """Make one more check, unless one that it needs has failed."""
        failed = [check.name for check in self.checks if check.name in after and check.passed is not True]
        if failed:
            self.checks.append(Check(name, None, f'not looked at, as {" and ".join(failed)} must be right first'))
            return
        try:
            check = Check(name, True, look())
        except _Unknown as unknown:
            check = Check(name, None, str(unknown))
        except Exception as error:  # whatever strange content makes a reader raise is what was looked for
            words = without_secrets(' '.join(str(error).split())) or type(error).__name__
            check = Check(name, False, cut(words).rstrip('.'))
        self.checks.append(check)


class _Arrived:
    """The files as they came."""

    def __init__(
            self, client: HubClient, repo_id: str, commit: str, remote: Mapping[str, Any], cache: str) -> None:
        self.repo_id, self.commit, self.remote, self.cache = repo_id, commit, remote, cache
        self.files: dict[str, LocalFile] = {}
        self.wrong: list[str] = []
        for name in sorted(FILES & remote.keys()):
            for again in (False, True):  # a bit that flipped on its way comes right the second time
                path = client.ask(
                    client.api.hf_hub_download, repo_id, name, revision=commit, cache_dir=cache, force_download=again)
                self.files[name] = read_file(Path(path))
                if is_same(self.files[name], remote[name]):
                    break
            else:
                self.wrong.append(name)

    def path(self, name: str) -> Path:
        if name not in self.files:
            raise FileNotFoundError(f'there is no {name}')
        return self.files[name].path

    def config(self) -> dict[str, Any]:
        return read_config(self.path(CONFIG))

    def conversion(self) -> dict[str, Any]:
        found = self.config().get('conversion')
        if found is None:
            raise _Unknown('config.json has no record of a conversion')
        if not isinstance(found, dict):
            raise ValueError(f'the record of the conversion must be an object, got {shown(found)}')
        return found

    def check_names(self) -> str:
        if missing := sorted(FILES - self.remote.keys()):
            raise ValueError(f'there is no {", ".join(missing)}')
        if unsafe := sorted(name for name in self.remote if name.lower().endswith(UNSAFE)):
            raise ValueError(f'there is {shown(unsafe[0])}, a file that can run code when it is loaded; delete it')
        return f'{", ".join(sorted(FILES))}, and nothing that runs code'

    def check_transfer(self) -> str:
        if self.wrong:
            raise ValueError(f'what the Hub sends of {", ".join(self.wrong)} has not the hash that it names')
        return f'{sum(file.size for file in self.files.values())} bytes with the hashes that the Hub names'


def _check_hashes(there: _Arrived, expected: Mapping[str, str], than: str) -> str:
    wrong = sorted(name for name, sha256 in expected.items()
                   if name not in there.files or there.files[name].sha256 != sha256)
    if wrong:
        raise ValueError(f'the Hub has another {", ".join(wrong)} {than}')
    return f'{", ".join(sorted(expected))} to the bit'


def _check_journal(there: _Arrived, files: list[Mapping[str, Any]]) -> str:
    if not files:
        raise ValueError(f'the journal has no {there.repo_id}')
    return _check_hashes(there, {name: facts.sha256 for name, facts in files[-1].items()}, 'than the journal says')


def _check_record(there: _Arrived) -> str:
    conversion, found = there.conversion(), there.files[WEIGHTS].sha256
    if (recorded := conversion.get('weights_sha256')) != found:
        raise ValueError(f'{WEIGHTS} has SHA-256 {found}, and at its conversion it had {shown(recorded)}')
    for key, value in read_metadata(there.path(WEIGHTS)).items():
        if value != conversion.get(key, value):
            raise ValueError(f'{key} is {shown(conversion[key])} in {CONFIG}, and {shown(value)} in {WEIGHTS}')
    return f'{WEIGHTS} has SHA-256 {found}, as at its conversion'


def _check_catalogue(there: _Arrived) -> str:
    conversion = there.conversion()
    name = conversion.get('name')
    if not isinstance(name, str) or name not in catalog.weights():
        raise _Unknown(f'it has no {shown(name)}')
    entry = catalog.weight(name)
    licence = entry.licence or 'none stated'
    if conversion.get('licence') != licence:
        raise ValueError(
            f'the licence of {name} is {licence!r}, and config.json has {shown(conversion.get("licence"))}')
    config = there.config()
    architecture, num_classes = config.get('architecture'), config.get('num_classes')
    model_args = config.get('model_args')
    network = Network(str(architecture), model_args if isinstance(model_args, dict) else {})
    if not is_network_of(network, entry.architecture):
        raise ValueError(f'{name} is of {entry.architecture}, and config.json has {shown(architecture)}')
    if entry.num_classes not in (None, num_classes):
        raise ValueError(f'{name} has {entry.num_classes} classes, and config.json {shown(num_classes)}')
    sha256 = conversion.get('source_sha256')
    if entry.sha256 is None:
        return f'{name} by licence and network; of its file the catalogue has no hash, and this has {shown(sha256)}'
    if sha256 != entry.sha256:
        raise ValueError(f'the file of {name} has SHA-256 {entry.sha256}, and this came from {shown(sha256)}')
    return f'{name} by licence, network and the SHA-256 of its file'


def _check_weights(there: _Arrived) -> str:
    checkpoint = read_checkpoint(there.path(WEIGHTS))
    count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    return f'{len(checkpoint.tensors)} tensors of {count} numbers, whose header fits the file'


def _load(there: _Arrived, found: list[nn.Module]) -> str:
    # At a commit timm takes what is in the cache, and asks nobody.
    with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        model = create_model(f'hf-hub:{there.repo_id}@{there.commit}', pretrained=True, cache_dir=there.cache)
    config = there.config()
    if getattr(model, 'num_classes', None) != config.get('num_classes'):
        raise ValueError(
            f'the model has {getattr(model, "num_classes", None)} classes, and config.json {config.get("num_classes")}')
    found.append(model.eval())
    is_ours = model_entrypoint(config['architecture']).__module__.startswith('timm_miil.')
    needs = ', after import timm_miil' if is_ours else ''
    return f"timm.create_model('hf-hub:{there.repo_id}', pretrained=True) loads it{needs}"


def _check_logits(there: _Arrived, model: nn.Module) -> str:
    recorded = there.conversion().get('probe')
    if recorded is None:
        raise _Unknown('config.json has no logits recorded')
    check_probe(model, recorded)
    return 'for a fixed input as at the conversion'


def _check_card(there: _Arrived) -> str:
    text = there.path(CARD_FILE).read_text(encoding='utf-8')
    check_card(text)
    data = ModelCard(text).data
    if data.get('library_name') != 'timm':
        raise ValueError(f'the library of the card must be timm, got {shown(data.get("library_name"))}')
    name = _name_of(there)
    licence = catalog.weight(name).licence if name else None
    if licence is not None and data.get('license') != licence.lower():
        raise ValueError(f'the card names the licence {shown(data.get("license"))}, and {name} has {licence!r}')
    return 'valid, and ' + ('as a program wrote it' if is_sealed(text) else 'edited by somebody')


def _name_of(there: _Arrived) -> str | None:
    """The catalogue's name in config.json, if that can be read and has one."""
    try:
        name = there.conversion().get('name')
    except (OSError, ValueError, HubError, _Unknown):
        return None
    return name if isinstance(name, str) and name in catalog.weights() else None
