"""A published checkpoint becomes a model folder, as timm and the Hub take: configuration, safetensors and a card.

Nothing is trained and nothing is guessed: the tensors say which network they are of, the catalogue says the rest, and
what the authors do not state the card calls so. The folder appears when timm has read the same weights back from it.
"""
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import constants
from timm.data import ImageNetInfo
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from timm_miil import catalog
from timm_miil._checks import nearest, shown
from timm_miil._errors import CatalogError, CheckpointError
from timm_miil._version import __version__
from timm_miil.hub.card import catalog_card
from timm_miil.hub.folder import check_model_folder, write_model_folder
from timm_miil.models.checkpoint_file import read_checkpoint
from timm_miil.models.download import download, name_hash, sha256_of
from timm_miil.models.published import Network, convert_published, identify, is_network_of

__all__ = ['CONVERTER', 'Conversion', 'convert', 'entry_of']

CONVERTER = f'timm-miil {__version__}'
KEY_CHARS = 12
URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')
# timm's lists of ImageNet's classes by their number; of ImageNet-21K-P it has the selection from the release of 2011.
IMAGENETS = MappingProxyType({1000: 'imagenet-1k', 11221: 'imagenet-21k-miil'})
# What timm should know of an entry beyond these is the network's own.
PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')


@dataclass(frozen=True)
class Conversion:
    """What was converted into what.

    Attributes:
        folder: The model folder.
        name: 'architecture.tag' of the catalogue.
        network: What the tensors are of; its architecture is another than the name's where the name misleads.
        source: The URL, or the name of the file.
        source_size: Its size in bytes.
        source_sha256: Its SHA-256, in hex.
        weights_sha256: That of `model.safetensors`.
        notes: What somebody should know, one sentence each.
    """
    folder: Path
    name: str
    network: Network
    source: str
    source_size: int
    source_sha256: str
    weights_sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A file, and the URL that it is from; of a file that is here already, the one that the catalogue has."""
    path: Path
    where: str
    url: str | None
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(urlparse(self.where).path if URL.match(self.where) else self.where).name


def convert(
        source: str | os.PathLike[str],
        directory: str | os.PathLike[str],
        *,
        name: str | None = None,
        repo_id: str | None = None,
        progress: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Convert a published checkpoint to a model folder.

    Args:
        source: A file, a URL, or the name of catalogued weights, whose file is downloaded.
        directory: Folder to write; a model folder of that name is replaced.
        name: 'architecture.tag' of the catalogue; None for that of the source, by its name, URL or file name.
        repo_id: 'owner/name' on the Hub that the card is written for; None for the catalogue's name.
        progress: Whether to show a download's progress on stderr.
        cache_dir: Where downloads are kept; None for `timm_miil/downloads` in the Hub's home folder.

    Raises:
        CatalogError: If the source or name is none of the catalogue, or which is meant is not clear.
        CheckpointError: If the source cannot be had or read safely, is of no network of ours or of another than its
            name says, or its tensors do not fit.
        FileExistsError: If the directory holds something else than a model folder.
    """
    check_model_folder(directory)
    entry = entry_of(source, name)
    found = _fetch(source, entry, progress, cache_dir)
    if entry.sha256 not in (None, found.sha256):
        raise CheckpointError(
            f'{found.where} has SHA-256 {found.sha256}, and the file of {entry.name} has {entry.sha256}; get it again.')
    checkpoint = read_checkpoint(found.path)
    network = _own_network(entry) or identify(checkpoint.tensors, entry.architecture)
    _check_is_of(network, entry)
    tensors = convert_published(checkpoint.tensors, network)
    labels = _labels(entry, network, checkpoint.label_names)
    label_names = tuple(labels) or None
    model = _build(entry, network, label_names)
    model.load_state_dict(tensors, strict=True, assign=True)
    facts = {
        'name': entry.name,
        'source_url': found.url or '',
        'source_file': found.file_name,
        'source_sha256': found.sha256,
        'converter': CONVERTER,
        'licence': entry.licence or 'none stated',
    }
    digest = write_model_folder(
        model, directory,
        card=catalog_card(
            entry.name, repo_id=repo_id, network=network, label_names=label_names, source_sha256=found.sha256,
            source_name=found.where),
        config={'problem_type': entry.problem_type, **_described(labels)},
        metadata=facts,
        conversion={**facts, 'source': found.where, 'source_size': found.size},
    )
    return Conversion(
        folder=Path(directory), name=entry.name, network=network, source=found.where, source_size=found.size,
        source_sha256=found.sha256, weights_sha256=digest, notes=tuple(_notes(entry, network, found, label_names)))


def entry_of(source: str | os.PathLike[str], name: str | None = None) -> catalog.Weights:
    """The catalogue's entry of a file, URL or name.

    Raises:
        CatalogError: If there is none, or several have a file of this name.
    """
    if name is not None:
        return catalog.weight(name)
    text = os.fspath(source)
    entries = catalog.weights()
    if text in entries and not Path(text).is_file():
        return entries[text]
    by_url = [entry for entry in entries.values() if entry.url == text]
    file_name = Path(urlparse(text).path if URL.match(text) else text).name
    found = by_url or [entry for entry in entries.values() if entry.file_name == file_name]
    if len(found) == 1:
        return found[0]
    if found:
        names = ', '.join(entry.name for entry in found)
        raise CatalogError(f'{file_name!r} may be of {len(found)} entries; say which by name (--as): {names}.')
    if URL.match(text) or Path(text).exists() or os.sep in text:
        raise CatalogError(
            f'the catalogue has no file {file_name!r}; say which weights it has by name (--as), such as '
            f'{next(iter(entries))!r}; `timm-miil list --weights` has all.')
    raise CatalogError(
        f'{text!r} is no file, URL or weights of the catalogue; {nearest(text, entries)} Give the path of a file that '
        f'is there, or a name of `timm-miil list --weights`.')


def _fetch(
        source: str | os.PathLike[str],
        entry: catalog.Weights,
        progress: bool,
        cache_dir: str | os.PathLike[str] | None,
) -> _Source:
    text = os.fspath(source)
    path = Path(text)
    if URL.match(text):
        url = text
    elif text == entry.name and not path.is_file():
        if entry.file is not None:
            path = Path(catalog.__file__).parent.parent / entry.file
            return _local(path, entry.file, entry)
        if entry.url is None:
            raise CheckpointError(
                f'{entry.name} is on the Hub and has no original file; timm.create_model({entry.name!r}, '
                f"pretrained=True) loads it from {entry.hf_hub_id!r}.")
        url = entry.url
    else:
        return _local(path, path.name, entry)
    home = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HOME) / 'timm_miil' / 'downloads'
    # A folder a URL: several published files have one name.
    got = download(url, home / hashlib.sha256(url.encode()).hexdigest()[:KEY_CHARS], progress=progress)
    return _Source(got.path, url, url, got.size, got.sha256)


def _local(path: Path, where: str, entry: catalog.Weights) -> _Source:
    if not path.is_file():
        raise CheckpointError(f'the source must be a file, a URL or weights of the catalogue, got {shown(str(path))}.')
    size, digest = sha256_of(path)
    return _Source(path, where, entry.url, size, digest)


def _own_network(entry: catalog.Weights) -> Network | None:
    """That of weights which ship with this package; its labels are arguments where it is a zero-shot one."""
    return None if entry.file is None else Network(entry.architecture, num_classes=entry.num_classes or 0)


def _check_is_of(network: Network, entry: catalog.Weights) -> None:
    """Raise CheckpointError if the file cannot be the entry's."""
    is_other_set = entry.labels is not None and network.num_classes != entry.num_classes
    if is_other_set or not is_network_of(network, entry.architecture):
        raise CheckpointError(
            f'by its tensors the file is of {network.architecture} with {network.num_classes} classes, and '
            f'{entry.name} is of {entry.architecture} with {entry.num_classes or "some"}; get the right file, or say '
            f'by name (--as) which weights it is.')


def _labels(entry: catalog.Weights, network: Network, in_file: Sequence[str] | None) -> dict[str, str]:
    """Names of the classes and what they mean: of the file, which knows the order of its own logits, else known ones.

    Nothing, if nobody says.
    """
    own = catalog.label_set(entry.labels).labels if entry.labels else None
    for names in (in_file, own):
        if names is not None and len(names) == network.num_classes:
            return {name: name for name in names}
    subset = IMAGENETS.get(network.num_classes) if entry.dataset.startswith('imagenet') else None
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    return dict(zip(info.label_names(), info.label_descriptions(detailed=True), strict=True))


def _described(labels: Mapping[str, str]) -> dict[str, Any]:
    return {'label_names': list(labels), 'label_descriptions': dict(labels)} if labels else {}


def _build(entry: catalog.Weights, network: Network, label_names: tuple[str, ...] | None) -> nn.Module:
    """The network without weights, whose configuration is the entry's."""
    base = get_pretrained_cfg(network.architecture) or PretrainedCfg()
    known = {field: getattr(entry, field) for field in PREPROCESSING if getattr(entry, field) is not None}
    paper = catalog.paper(entry.paper)
    changes: dict[str, Any] = dict(
        known, url=None, file=None, hf_hub_id=None, hf_hub_filename=None, state_dict=None, source=None,
        architecture=network.architecture, tag=entry.tag, custom_load=False, num_classes=network.num_classes,
        test_input_size=None, test_crop_pct=None, test_pool_size=None, min_input_size=None, label_offset=None,
        pool_size=_pool_size(base, known.get('input_size', base.input_size)), label_names=label_names,
        label_descriptions=None, license=(entry.licence or '').lower() or None, description=None, notes=None,
        origin_url=entry.source_repo and f'https://github.com/{entry.source_repo}', paper_name=paper.title,
        paper_ids=paper.arxiv and f'arXiv:{paper.arxiv}')
    return network.build(pretrained_cfg=replace(base, **changes), device='meta')


def _pool_size(base: PretrainedCfg, input_size: Sequence[int]) -> tuple[int, ...] | None:
    """The last feature map's size, which grows with the input."""
    if base.pool_size is None:
        return None
    return tuple(
        -(-new * pool // old) for new, old, pool in zip(input_size[1:], base.input_size[1:], base.pool_size))


def _notes(
        entry: catalog.Weights, network: Network, found: _Source, label_names: Sequence[str] | None) -> list[str]:
    notes = []
    if network.architecture != entry.architecture:
        notes.append(f'by its tensors the file is of {network.architecture}, which its name does not say.')
    if entry.num_classes is not None and network.num_classes != entry.num_classes:
        notes.append(f'it has {network.num_classes} classes, where the catalogue has {entry.num_classes}.')
    digits = name_hash(Path(urlparse(found.where).path).name)
    if digits and not found.sha256.startswith(digits):
        notes.append(
            f'its SHA-256 starts with {found.sha256[:8]}, and its name has {digits}; if these digits are of its '
            f'SHA-256, as is usual, it is another file.')
    if entry.mean is None:
        notes.append("the authors do not state the preprocessing; the folder has timm's for the network.")
    if label_names is None and entry.head != 'sdl_embedding':
        notes.append('neither the file nor the catalogue names its classes.')
    return notes
