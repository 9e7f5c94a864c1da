"""A stranger's config.json, searched for what could lead timm elsewhere than to the weights beside it."""
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.models import is_model, model_entrypoint

from timm_miil._checks import cut, shown

__all__ = ['check_config', 'read_config']

MAX_BYTES = 64 << 20  # of 100 thousand classes with descriptions it has 10 MB
# Keys of a pretrained configuration that name another place for weights, or code.
SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')
# Arguments of timm.create_model, which config.json's model_args must not bring in.
FACTORY = frozenset({'cache_dir', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'})
NAMES = ('label_names', 'label_descriptions')  # anyone's words, that lead nowhere
# A place in the file system or a network, also by a Windows drive, and what reads as the name of a module's attribute.
PLACE = re.compile(r'(?:[/\\~]|[A-Za-z]:[/\\]|file:|[A-Za-z0-9+.-]+:[^\s])')
CLASS = re.compile(r'(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*')
MAX_NUMBERS = 1 << 24  # of a picture: timm's largest have 3 million
MODULES = frozenset({'first_conv', 'classifier'})  # dotted names of the network's own modules
LINKS = frozenset({'origin_url', 'license', 'paper_name', 'paper_ids', 'description', 'notes', 'tag', 'architecture'})


def read_config(path: Path) -> dict[str, Any]:
    """The file's object.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON object, or too large or too deeply nested to be a model's.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f'{path.name} has {size} bytes, where a model needs no more than {MAX_BYTES}')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (RecursionError, ValueError) as error:
        raise ValueError(f'{path.name} is no JSON that can be read: {cut(str(error), 100)}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path.name} must hold an object, got {shown(config)}')
    return config


def check_config(config: Mapping[str, Any]) -> str:
    """Words on what the file says.

    Raises:
        ValueError: If timm does not know the architecture, numbers disagree, or something leads out of the folder.
    """
    architecture, num_classes = config.get('architecture'), config.get('num_classes')
    if not isinstance(architecture, str) or not re.fullmatch(r'\w{1,200}', architecture):
        raise ValueError(f'the architecture must be a name of timm\'s registry, got {shown(architecture)}')
    if not is_model(architecture):
        raise ValueError(
            f'timm has no architecture {architecture!r}, nor has timm_miil; import the package that registers it, or '
            f'take a later release of timm')
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
        raise ValueError(f'num_classes must be a whole number, got {shown(num_classes)}')
    model_args = _object(config, 'model_args')
    # Without one, timm takes the whole file for it.
    cfg = _object(config, 'pretrained_cfg') if 'pretrained_cfg' in config else config
    if set_by_file := [name for name in SOURCES if cfg.get(name)]:
        raise ValueError(f'pretrained_cfg names another place for the weights: {set_by_file[0]} is '
                         f'{shown(cfg[set_by_file[0]])}')
    if cfg.get('custom_load'):
        raise ValueError(f'pretrained_cfg asks for a loader of its own: custom_load is {shown(cfg["custom_load"])}')
    if cfg.get('num_classes', num_classes) != num_classes:
        raise ValueError(f'num_classes is {num_classes}, and in pretrained_cfg {shown(cfg["num_classes"])}')
    if strange := sorted(FACTORY & set(_names(model_args))):
        raise ValueError(f'model_args has {strange[0]!r}, which is not an argument of a network')
    _check_pictures(cfg)
    for key, text in _texts({name: value for name, value in config.items() if name not in (*NAMES, 'conversion')}):
        if key not in LINKS and (PLACE.match(text) or key not in MODULES and CLASS.fullmatch(text)):
            raise ValueError(f'{key} leads out of the folder: {shown(text)}')
        if key in LINKS and re.match(r'[/\\~]|[A-Za-z]:[/\\]|file:', text):
            raise ValueError(f'{key} is a place in the file system: {shown(text)}')
    names = config.get('label_names', cfg.get('label_names'))
    if isinstance(names, list) and len(names) != num_classes:
        raise ValueError(f'there are {len(names)} label names for {num_classes} classes')
    owner = 'timm_miil' if model_entrypoint(architecture).__module__.startswith('timm_miil.') else 'timm'
    return f'{architecture} of {owner} with {num_classes} classes'


def _check_pictures(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError unless pictures of this preprocessing can be made, and are of a size to compute with."""
    for name in ('input_size', 'test_input_size', 'min_input_size'):
        size = cfg.get(name)
        if size is not None and not (
                isinstance(size, list) and len(size) == 3 and all(type(side) is int and side > 0 for side in size)
                and math.prod(size) <= MAX_NUMBERS):
            raise ValueError(f'{name} must be [channels, height, width] of at most {MAX_NUMBERS} numbers in all, got '
                             f'{shown(size)}')
    for name, least in (('mean', -1e3), ('std', 1e-6)):
        values = cfg.get(name)
        if values is not None and not (
                isinstance(values, list) and len(values) in (1, (cfg.get('input_size') or [3])[0])
                and all(_is_number(value, least, 1e3) for value in values)):
            raise ValueError(f'{name} must be one number a channel from {least:g} to 1000, got {shown(values)}')
    for name in ('crop_pct', 'test_crop_pct'):
        if cfg.get(name) is not None and not _is_number(cfg[name], 0.01, 2):
            raise ValueError(f'{name} must be a number from 0.01 to 2, got {shown(cfg[name])}')


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _names(value: object) -> Iterator[str]:
    """Every name of a JSON value."""
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(item)


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f'{name} must be an object, got {shown(found)}')
    return found


def _texts(value: object, key: str = '') -> Iterator[tuple[str, str]]:
    """Every string of a JSON value, with the last name on the way to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in NAMES:
                yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
