"""Where catalogued weights come from: their repository on the Hub, else the authors' file, converted once and kept.

timm looks at the `file` of a configuration before it looks at `hf_hub_id` and `url`. Here that is a path whose file is
made when somebody opens it, and not before: listing, copying and printing configurations never use the network.
"""
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError, EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError,
    RevisionNotFoundError)
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]  # not in its __all__
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, model_entrypoint

from timm_miil import catalog
from timm_miil._checks import cut
from timm_miil._errors import CheckpointError
from timm_miil._locks import locked
from timm_miil._version import __version__
from timm_miil.models.saved_config import read_config

if TYPE_CHECKING:
    from timm_miil.models.download import Downloaded
    from timm_miil.models.published import Network

__all__ = ['PublishedCfg', 'PublishedFile', 'is_ours', 'keep_in']

WEIGHTS_FILE = 'model.safetensors'
# Part of the names of kept files: raise it when a conversion gives other tensors, so that older files are not used.
CONVERSION = 1
KEY_CHARS = 12

_logger = logging.getLogger(__name__)


class PublishedFile(os.PathLike[str]):
    """The weights of a catalogue entry as a safetensors file under timm's names, downloaded when it is opened.

    Looked for in this order:

    1. the repository on the Hub, by its own client (HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, proxies and tokens count);
    2. the authors' file, downloaded, read without running anything it holds, converted, and kept as safetensors. The
       download is deleted then. What was kept is named by entry, URL and `CONVERSION`, so that a later version that
       converts otherwise makes its own; a damaged one is made again. Of several processes one converts.

    A repository that is not there is passed over; one that does not answer, or refuses, is an error, but for a file
    that was kept before: the weights are the same.

    Args:
        name: 'architecture.tag' of the catalogue.
        url: Where the original file is, or None.
        hub_id: Repository with the converted weights, with '@revision' or without, or None.
        cache_dir: Folder of the Hub's cache, which also gets the folder `timm_miil` of converted files; None for the
            Hub's own cache, and `timm_miil` in its home folder (HF_HOME).
    """

    def __init__(
            self,
            name: str,
            *,
            url: str | None = None,
            hub_id: str | None = None,
            cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name, self.url, self.hub_id = name, url, hub_id
        self.cache_dir = os.fspath(cache_dir) if cache_dir is not None else None
        self._found: Path | None = None

    def __fspath__(self) -> str:
        """The path of the file, which is made if it is not there.

        Raises:
            CheckpointError: If the weights cannot be had; the message says what to do.
        """
        if self._found is None or not self._found.is_file():
            try:
                self._found = self._from_hub() or self._from_source()
            except OSError as error:  # who asks whether a path is a file takes it for a no
                raise CheckpointError(
                    f'{self.name}: {cut(str(error))}; converted weights are kept in {str(self.folder)!r}; cache_dir or '
                    f'HF_HOME puts them elsewhere.') from error
        return str(self._found)

    def __str__(self) -> str:
        return f'{self.name}.safetensors'  # timm asks it for the suffix

    def __repr__(self) -> str:
        return f'PublishedFile({self.name!r}, url={self.url!r}, hub_id={self.hub_id!r})'

    def __reduce__(self) -> Any:  # for copies and pickles, without what was found
        return functools.partial(
            PublishedFile, self.name, url=self.url, hub_id=self.hub_id, cache_dir=self.cache_dir), ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublishedFile) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[str | None, ...]:
        return self.name, self.url, self.hub_id, self.cache_dir

    @property
    def folder(self) -> Path:
        """Where the converted file is kept."""
        return Path(self.cache_dir or constants.HF_HOME) / 'timm_miil'

    @property
    def kept(self) -> Path:
        """The converted file of the URL; nothing need be there."""
        key = hashlib.sha256(f'{CONVERSION} {self.url}'.encode()).hexdigest()
        return self.folder / f'{self.name}-{key[:KEY_CHARS]}.safetensors'

    def of(self, url: object, hub_id: str | None) -> 'PublishedFile | None':
        """The file for the sources of a configuration that somebody changed; None where timm shall read them itself."""
        if hub_id not in (None, self.hub_id):
            return None  # a repository of the user's
        if url is not None and not (isinstance(url, str) and urlparse(url).scheme in ('http', 'https')):
            return None
        if url != self.url and url is not None:
            hub_id = None  # who gives a URL wants what is there
        if url is None and hub_id is None:
            return None
        return PublishedFile(self.name, url=url, hub_id=hub_id, cache_dir=self.cache_dir)

    def _from_hub(self) -> Path | None:
        """The repository's file; None if it is not there."""
        if self.hub_id is None:
            return None
        repository, _, revision = self.hub_id.partition('@')
        try:
            path = Path(hf_hub_download(
                repository, WEIGHTS_FILE, revision=revision or None, cache_dir=self.cache_dir))
            found = self._architecture_on_hub(self.hub_id)
        except Exception as error:  # the client's, and whatever its transport raises
            if self.url is not None and self._may_pass(error):
                _logger.info(f'{self.name}: not in {self.hub_id!r} on the Hub, so that {self.url} serves')
                return None
            raise CheckpointError(
                f'{self.name}: the repository {self.hub_id!r} cannot be read: {cut(str(error))}; check the network, '
                f'HF_ENDPOINT and your token, or pass pretrained_cfg_overlay=dict(hf_hub_id=None) for the original '
                f'file, or dict(file=...) for one of yours.') from error

        if found not in (None, self.name.partition('.')[0]):
            raise CheckpointError(
                f'{self.name}: the repository {self.hub_id!r} is of {found}; load it with '
                f"timm.create_model('hf-hub:{self.hub_id}', pretrained=True).")
        return path

    def _architecture_on_hub(self, hub_id: str) -> object:
        try:
            return read_config('hf-hub', hub_id, self.cache_dir)['architecture']
        except EntryNotFoundError:  # weights alone
            return None

    def _may_pass(self, error: Exception) -> bool:
        """Whether the original file may serve where the repository does not."""
        match error:
            case LocalEntryNotFoundError():  # no network, or none wanted
                return constants.HF_HUB_OFFLINE or _is_whole(self.kept, self.name)
            case GatedRepoError() | DisabledRepoError():
                return False
            case RepositoryNotFoundError():  # the Hub says 401 of what is not there to who is not logged in
                return error.response.status_code == 404 or get_token() is None
        return isinstance(error, EntryNotFoundError | RevisionNotFoundError)

    def _from_source(self) -> Path:
        kept = self.kept
        if not _is_whole(kept, self.name):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / f'.{kept.stem}.lock', seconds=None):
                if not _is_whole(kept, self.name):  # now: another process may have made it
                    self._convert(kept)
        return kept

    def _convert(self, kept: Path) -> None:
        # Here: what `import timm_miil` does not need, and the networks, which import this module.
        from timm_miil.models.checkpoint_file import read_checkpoint, write_safetensors
        from timm_miil.models.download import download
        from timm_miil.models.published import convert_published, identify

        entry, url = catalog.weight(self.name), self.url or ''
        room = self.folder / 'downloads' / kept.stem
        try:
            got = download(url, room, progress=not are_progress_bars_disabled())
        except CheckpointError as error:
            raise CheckpointError(
                f'{self.name}: {error} With timm.create_model, pretrained_cfg_overlay=dict(url=...) says where else it '
                f'is; of a file of yours, `timm-miil convert FILE --as {self.name} -o DIR` makes a folder that '
                f"timm.create_model('local-dir:DIR', pretrained=True) loads.") from error
        try:
            _check_file(got, url, entry)
            checkpoint = read_checkpoint(got.path)
            network = identify(checkpoint.tensors, entry.architecture)
            _check_network(network, url, entry)
            write_safetensors(kept, convert_published(checkpoint.tensors, network), {
                'format': 'pt',
                'name': self.name,
                'source_url': url,
                'source_sha256': got.sha256,
                'converter': f'timm-miil {__version__}',
                'licence': entry.licence or 'none stated',
                'architecture': network.architecture,
                'model_args': json.dumps(dict(network.model_args), sort_keys=True),
                'num_classes': str(network.num_classes),
            })
        except CheckpointError as error:
            raise CheckpointError(f'{self.name}: {url}: {error}') from error
        finally:
            shutil.rmtree(room, ignore_errors=True)


@dataclasses.dataclass
class PublishedCfg(PretrainedCfg):
    """A timm configuration whose `file` is a `PublishedFile`, and gives way to sources that somebody names.

    An overlay of `url` says where else the original file is; one of `hf_hub_id` or `file` is read by timm as always.
    """

    def __post_init__(self) -> None:
        file: Any = self.file
        if isinstance(file, PublishedFile):
            found: Any = None if self.hf_hub_filename else file.of(self.url, self.hf_hub_id)
            self.file = found  # timm says str, and takes any path


def keep_in(cfg: PretrainedCfg, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm's builder that make it keep a published file in their `cache_dir`.

    Args:
        cfg: The configuration, as timm resolves it from the arguments.
        kwargs: The arguments.
    """
    file: object = cfg.file  # timm says str, and takes any path
    cache_dir = kwargs.get('cache_dir')
    if cache_dir is None or not isinstance(file, PublishedFile):
        return dict(kwargs)
    there = PublishedFile(file.name, url=file.url, hub_id=file.hub_id, cache_dir=cache_dir)
    return {**kwargs, 'pretrained_cfg_overlay': {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': there}}


def is_ours(architecture: str) -> bool:
    """Whether a registered architecture is of this package."""
    return model_entrypoint(architecture).__module__.startswith(__name__.rpartition('.')[0])


def _is_whole(path: Path, name: str) -> bool:
    """Whether this is a complete file of the entry: its header says the length and the name."""
    try:
        with safe_open(path, 'pt') as file:
            return (file.metadata() or {}).get('name') == name
    except (OSError, SafetensorError):
        return False


def _check_file(got: 'Downloaded', url: str, entry: catalog.Weights) -> None:
    from timm_miil.models.download import name_hash

    if entry.sha256 not in (None, got.sha256) and url == entry.url:
        raise CheckpointError(
            f'the file is not the one that was published: its SHA-256 is {got.sha256}, and the catalogue has '
            f'{entry.sha256}; get it elsewhere and pass pretrained_cfg_overlay=dict(file=...).')
    digits = name_hash(Path(urlparse(url).path).name)
    if digits and not got.sha256.startswith(digits):
        _logger.warning(
            f'{entry.name}: the SHA-256 of {url} starts with {got.sha256[:len(digits)]}, and its name says {digits}; '
            f'it may be another file')


def _check_network(network: 'Network', url: str, entry: catalog.Weights) -> None:
    """Refuse a file that does not fit the network that the entry's name stands for."""
    found = network.architecture
    if network.model_args and not is_ours(entry.architecture):
        found += f' with {", ".join(f"{key}={value!r}" for key, value in network.model_args.items())}'
    wrong = []
    if found != entry.architecture:
        wrong.append(f'of {found} and not of {entry.architecture}')
    if network.num_classes != entry.num_classes:
        wrong.append(f'for {network.num_classes} classes and not for {entry.num_classes}')
    if wrong:
        raise CheckpointError(
            f'by its tensors the file is {" and ".join(wrong)}; run `timm-miil convert {url} --as {entry.name} -o '
            f"DIR`, and load the result with timm.create_model('local-dir:DIR', pretrained=True).")
