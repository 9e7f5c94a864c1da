"""Models with their weights, and no second copy of them: the file is mapped, and nothing is drawn at random.

timm builds a network, fills it with random numbers and copies a file over them. Here the network is built without
storage, and its parameters are the pages of a safetensors file, which the system reads when they are used and shares
between processes. Where that is not possible, timm's own way is taken: the result is the same.
"""
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import create_model, is_model, list_models, parse_model_name, resolve_pretrained_cfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_miil import catalog
from timm_miil._checks import nearest
from timm_miil._timm import resolve_pretrained_source
from timm_miil.models._pretrained_file import keep_in
from timm_miil.models.saved_config import read_config

__all__ = ['load_model']

WEIGHTS_FILE = 'model.safetensors'
DRAWS = frozenset({
    Tensor.normal_, Tensor.uniform_, nn.init.constant_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_,
    nn.init.normal_, nn.init.uniform_})
CONTAINERS = (dict, list, tuple)
# What every module has, without what can hold tensors of its own.
MODULE_FIELDS = frozenset(vars(nn.Module())) - {'_parameters', '_buffers'}

_logger = logging.getLogger(__name__)


def load_model(
        source: str | os.PathLike[str],
        *,
        device: torch.device | str = 'cpu',
        dtype: torch.dtype | None = None,
        private_copy: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Load a model with its weights; equal to `timm.create_model(source, pretrained=True)`, and faster.

    Parameters on the CPU are pages of the file, read when they are first used and copied when they are first written
    to: training changes the model and never the file. But the file must stay as it is while the model is in use. A
    file that is replaced by another of its name does no harm, and so this package writes; one that is written over,
    as by `timm.models.save_for_hf` into the folder that the model was loaded from, changes the model or ends the
    process. Take `private_copy` for that, and for files on a network disk.

    Weights that do not fit name by name and shape by shape (other classes, other channels, a layout that timm
    converts), are no safetensors, or need more than parameters and buffers, are loaded by timm.

    Args:
        source: A folder ('local-dir:path', or its path) or Hub repository ('hf-hub:owner/repo@revision') with
            `config.json` and weights, or a registered name whose weights are published ('resnet50.miil_in21k').
        device: Where the model shall be.
        dtype: Floating dtype of the model; None for float32, as timm's.
        private_copy: Read all of the file now, into memory of the model's own.
        cache_dir: Folder for downloads; None for the default.
        **kwargs: As for `timm.create_model`.

    Returns:
        The model in training mode, as timm gives it.

    Raises:
        CheckpointError: If published weights cannot be had or do not fit.
        TypeError: If `config.json` has a value of a wrong kind.
        ValueError: If there is no such folder or registered name, or `config.json` has a value that is refused.
        RuntimeError: If the weights do not fit, or another error of timm or the Hub's client.

    Example:
        >>> from timm_miil.models import load_model
        >>> model = load_model('mldecoder_scenes')
        >>> model.num_classes, model.training
        (30, True)
    """
    name = _with_source(source)
    config = read_config(*parse_model_name(name), cache_dir)
    arguments = {**kwargs, 'dtype': dtype, 'cache_dir': cache_dir and os.fspath(cache_dir)}
    if 'pretrained_backbone' in config.get('model_args', {}):
        arguments['pretrained_backbone'] = False  # its weights are the folder's
    if not config:
        arguments = _kept(name, arguments)
    model = _built_without_storage(name, arguments)
    if model is not None:
        path = _weights_of(model, arguments['cache_dir'])
        if path is not None and _map(model, path, torch.device(device), private_copy):
            return model
    del model
    return create_model(name, pretrained=True, **arguments).to(device)


def _kept(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by which published weights are kept in the caller's folder, also where timm does not pass it on."""
    architecture, _, tag = name.partition('.')
    cfg = resolve_pretrained_cfg(
        architecture, arguments.get('pretrained_cfg') or tag, arguments.get('pretrained_cfg_overlay'))
    return keep_in(cfg, arguments)


def _with_source(source: str | os.PathLike[str]) -> str:
    """The name as timm takes it."""
    name = os.fspath(source)
    if not isinstance(source, str):
        return f'local-dir:{name}'
    if ':' in name and not os.path.isdir(name):
        return name
    if is_model(name) and os.sep not in name:
        return _check_registered(name)
    if os.path.isdir(name):
        return f'local-dir:{name}'
    raise ValueError(f'no folder and no registered model is called {name!r}; {_hint(name)}')


def _check_registered(name: str) -> str:
    architecture, dot, _ = name.partition('.')
    known = list_models(architecture, include_tags=True)
    if dot and name not in known:
        raise ValueError(f'unknown weights {name!r}; {_hint(name, known)}')
    return name


def _hint(name: str, known: list[str] | None = None) -> str:
    if name in catalog.weights() and not is_model(name):
        return 'the catalogue has them, and this version has no network for them.'
    if name in catalog.weights():
        return (
            f'the catalogue has them, but not all that a network needs to know: `timm-miil convert {name} -o DIR` '
            f'makes a folder of them, which this function loads.')
    called = catalog.named_by_authors(name.partition('.')[0])
    if called and not known:
        return f"that is the authors' name of {' and '.join(called)}."
    return nearest(name, known or list_models())


def _built_without_storage(name: str, arguments: dict[str, Any]) -> nn.Module | None:
    """The network on the meta device, with timm's configuration; None if it cannot be built there."""
    try:
        with torch.random.fork_rng(devices=[]), _NoDraws():
            model = create_model(name, pretrained=False, device=torch.device('meta'), **arguments)
    except Exception as error:  # if it is the caller's mistake, timm's own way raises it too
        _logger.debug(f'{name} cannot be built on the meta device: {error}')
        return None
    # timm drops the classifier of a file for other classes.
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a module's attributes are of any type
    is_adapted = cfg.get('num_classes') != getattr(model, 'num_classes', None)
    return None if is_adapted or getattr(model, 'settings_in_file', False) else model


class _NoDraws(TorchFunctionMode):
    """Leaves tensors without storage as they are: drawing what nobody keeps takes most of the time of building."""

    def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            tensor = args[0] if args else kwargs['tensor']
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _weights_of(model: nn.Module, cache_dir: str | None) -> Path | None:
    """The safetensors file that timm would read; None if it would read something else."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a module's attributes are of any type
    kind, where = resolve_pretrained_source(cfg)
    if cfg.get('custom_load'):
        return None
    match kind:
        case 'file' if str(where).endswith('.safetensors'):
            return Path(where)
        case 'local-dir' if (path := Path(where, WEIGHTS_FILE)).is_file():
            return path
        case 'hf-hub' if isinstance(where, str):
            repository, _, revision = where.partition('@')
            try:
                return Path(hf_hub_download(
                    repository, WEIGHTS_FILE, revision=revision or None, cache_dir=cache_dir))
            except EntryNotFoundError:  # a pickle, perhaps
                return None
    return None


def _map(model: nn.Module, path: Path, device: torch.device, private_copy: bool) -> bool:
    """Make the file's tensors the model's; False if they do not fit, or do not make the whole model."""
    wanted = model.state_dict(keep_vars=True)
    if len(set(map(id, wanted.values()))) < len(wanted):  # assigning would part what is shared
        return False
    try:
        with safe_open(path, 'pt', device=str(device)) as file:
            if wanted.keys() != set(file.keys()):
                return False
            tensors = {key: file.get_tensor(key) for key in wanted}
    except SafetensorError:  # timm's way explains it
        return False
    if any(tensors[key].shape != tensor.shape for key, tensor in wanted.items()):
        return False
    tensors = {key: tensors[key].to(tensor.dtype) for key, tensor in wanted.items()}
    if private_copy and device.type == 'cpu':
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    computing: list[Any] = [
        module for module in model.modules() if hasattr(type(module), 'init_non_persistent_buffers')]
    for module in computing:
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))
    for module in computing:  # timm's rule for buffers that are computed and not saved
        module.init_non_persistent_buffers()
    return not any(tensor.is_meta for tensor in _all_tensors(model))


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules keep otherwise."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name in MODULE_FIELDS:
                continue
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, CONTAINERS) and value:
                items = value.values() if isinstance(value, dict) else value
                yield from (item for item in items if isinstance(item, Tensor))
