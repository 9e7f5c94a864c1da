"""The `config.json` of a model folder or Hub repository, which may be anyone's: checked before timm acts on it."""
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from timm_miil._checks import shown

__all__ = ['CONFIG_FILE', 'check_links', 'read_config']

CONFIG_FILE = 'config.json'

# What timm takes as it stands in config.json; only the first must be there.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    'architecture': (str, 'a string'),
    'num_classes': ((int, type(None)), 'an int'),
    'model_args': (dict, 'an object'),
    'pretrained_cfg': (dict, 'an object'),
}
# Arguments of timm's loading, not of a network: they name other files.
_SOURCES = frozenset({'cache_dir', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'})


def read_config(source: str | None, where: str, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Read and check what a folder or repository says about its model; empty for a registered name.

    Args:
        source: 'local-dir', 'hf-hub', or None for a registered name.
        where: The folder or repository, as timm's `parse_model_name` gives it.
        cache_dir: Folder of the Hub's cache; None for the default.

    Raises:
        HfHubHTTPError: If the Hub does not give the file, or another error of its client.
        OSError: If the file cannot be read.
        TypeError: If a value is of a kind that timm cannot take.
        ValueError: If it is not JSON, has a value out of range or names other files, or a file of the folder is a link
            out of it.
    """
    match source:
        case 'local-dir':
            check_links(Path(where))
            path = Path(where, CONFIG_FILE)
        case 'hf-hub':
            repository, _, revision = where.partition('@')
            path = Path(hf_hub_download(
                repository, CONFIG_FILE, revision=revision or None,
                cache_dir=os.fspath(cache_dir) if cache_dir is not None else None))
        case _:
            return {}
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and nesting without end
        raise ValueError(f'{CONFIG_FILE} is not valid JSON: {error}.') from error
    if not isinstance(config, dict):
        raise ValueError(f'{CONFIG_FILE} must hold an object, got {type(config).__name__}.')
    _check_values(config)
    return config


def check_links(folder: Path) -> None:
    """Raise ValueError if a file of the folder lies elsewhere: an archive from anyone may hold links to anything."""
    homes = [folder.resolve()]
    if homes[0].parent.name == 'snapshots':  # the Hub's cache links <repo>/snapshots/<revision>/* to <repo>/blobs
        homes.append(homes[0].parents[1] / 'blobs')
    for path in folder.iterdir():
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
            raise ValueError(f'{path.name} is a link out of the folder; put the file itself there.')


def _check_values(config: Mapping[str, Any]) -> None:
    """Refuse values that timm would fail on without a word of where they stand, or follow to other files."""
    for key, (kind, words) in _KINDS.items():
        value = config.get(key)
        is_wrong = not isinstance(value, kind) or isinstance(value, bool)
        if is_wrong and (key in config or key == 'architecture'):
            raise TypeError(f'{key} in {CONFIG_FILE} must be {words}, got {shown(value)}.')
    size = config.get('pretrained_cfg', config).get('input_size')
    if size is not None and not (
            isinstance(size, list) and len(size) == 3 and all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(
            f'input_size in {CONFIG_FILE} must be [channels, height, width] in whole numbers, got {shown(size)}.')
    args = config.get('model_args', {})
    for found in args, args.get('backbone_args'):
        if isinstance(found, dict) and (named := sorted(_SOURCES & found.keys())):
            raise ValueError(
                f'model_args in {CONFIG_FILE} must be arguments of the network, got {shown(named[0])}, which says '
                f'where weights lie; remove it.')
