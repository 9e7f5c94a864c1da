"""A folder that is to go to the Hub: searched as anyone's, loaded once, and with the card that the repository needs."""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model
from torch import nn

from timm_miil import catalog
from timm_miil._errors import CheckpointError, HubError
from timm_miil.hub._config import check_config, read_config
from timm_miil.hub._files import LocalFile, read_file
from timm_miil.hub._probe import check_probe
from timm_miil.hub._refusal import check_may_go
from timm_miil.hub.card import CARD_FILE, catalog_card, check_card, is_sealed
from timm_miil.hub.folder import FILES
from timm_miil.models.checkpoint_file import read_checkpoint
from timm_miil.models.published import Network, identify, is_network_of
from timm_miil.models.saved_config import check_links

__all__ = ['Outgoing', 'check_outgoing']

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'


@dataclass(frozen=True)
class Outgoing:
    """What would be sent.

    Attributes:
        files: By name; the card's facts are those of `card`, if there is one.
        architecture: Of the model.
        card: Text that README.md must get first; None where it stays.
    """
    files: Mapping[str, LocalFile]
    architecture: str
    card: str | None


def check_outgoing(folder: Path, repo_id: str) -> Outgoing:
    """What a push of the folder to a repository sends.

    Raises:
        CheckpointError: If it does not load, leads elsewhere, or is not as it was converted.
        FileNotFoundError: If a file is missing.
        ValueError: If there are other files or links, the card is wrong, or the weights may not be passed on.
    """
    paths = _paths(folder)
    text = paths[CARD_FILE].read_text(encoding='utf-8')
    check_card(text)
    try:
        config = read_config(paths[CONFIG])
        check_config(config)
        read_checkpoint(paths[WEIGHTS])
        with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
            model = create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:
        raise CheckpointError(f'{folder} does not load: {error}') from error
    check_may_go(text, config)
    files = {name: read_file(path) for name, path in paths.items()}
    if isinstance(conversion := config.get('conversion'), dict):
        try:
            if conversion.get('weights_sha256') != files[WEIGHTS].sha256:
                raise HubError(f'{WEIGHTS} is another one.')
            check_probe(model, conversion.get('probe'))
        except HubError as error:
            raise CheckpointError(f'{folder} is not as it was converted: {error} Convert it again.') from error
    card = _card_for(repo_id, config, model) if is_sealed(text) else None
    if card is None or card == text:
        return Outgoing(files, str(config['architecture']), None)
    content = card.encode()
    facts = LocalFile(
        paths[CARD_FILE], len(content), hashlib.sha256(content).hexdigest(),
        hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest())
    return Outgoing({**files, CARD_FILE: facts}, str(config['architecture']), card)


def _paths(folder: Path) -> dict[str, Path]:
    """The files of a model folder, if it has these and nothing else."""
    if not folder.is_dir():
        raise FileNotFoundError(f'the folder of a model must be given, got {str(folder)!r}, which is none.')
    paths = {path.name: path for path in folder.iterdir()}
    if missing := sorted(FILES - paths.keys()):
        raise FileNotFoundError(f'{folder} is no model folder: it lacks {", ".join(missing)}.')
    if more := sorted(paths.keys() - FILES):
        raise ValueError(f'{folder} has other files than a model folder, such as {more[0]!r}; take them out.')
    check_links(folder)
    if strange := sorted(name for name, path in paths.items() if not path.is_file()):
        raise ValueError(f'{strange[0]} of {folder} is no file; put one there.')
    return paths


def _card_for(repo_id: str, config: Mapping[str, Any], model: nn.Module) -> str | None:
    """The catalogue's card for the repository; None for what is not of the catalogue."""
    conversion = config.get('conversion')
    if not isinstance(conversion, dict):
        return None
    name = conversion.get('name')
    if not isinstance(name, str) or name not in catalog.weights():
        return None
    entry = catalog.weight(name)
    # config.json has every argument of the network; those that are not its defaults are told by the tensors.
    network = (identify(model.state_dict(), entry.architecture) if entry.file is None
               else Network(entry.architecture, num_classes=entry.num_classes or 0))
    if network.architecture != config['architecture'] or not is_network_of(network, entry.architecture):
        raise CheckpointError(
            f'{config["architecture"]} cannot be {name}, which is of {entry.architecture}; convert the right file.')
    label_names, sha256, source = (config.get('label_names'), *map(conversion.get, ('source_sha256', 'source')))
    return catalog_card(
        name, repo_id=repo_id, network=network,
        label_names=tuple(map(str, label_names)) if isinstance(label_names, list) else None,
        source_sha256=None if sha256 is None else str(sha256), source_name=None if source is None else str(source))
