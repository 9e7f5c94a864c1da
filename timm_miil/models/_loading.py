"""What every family needs to read published checkpoints: whole, or one clear error."""
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_miil._errors import CheckpointError
from timm_miil.models._pretrained_file import PublishedFile

__all__ = ['check_fit', 'explain_checkpoint_errors', 'unwrap']

WRAPPERS = ('model', 'state_dict')
SHOWN_KEYS = 5
REASON_CHARS = 200


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: out of a 'model' or 'state_dict' wrapper, and without a `module.` prefix.

    Raises:
        CheckpointError: If what is found is not a mapping of names to tensors.
    """
    for wrapper in WRAPPERS:
        inner = checkpoint.get(wrapper)
        if isinstance(inner, Mapping):
            checkpoint = inner
    if not checkpoint or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        found = ', '.join(map(repr, list(checkpoint)[:SHOWN_KEYS])) or 'nothing'
        raise CheckpointError(
            f'a checkpoint must map names to tensors, bare or under {" or ".join(map(repr, WRAPPERS))}; found {found}.')
    return {key.removeprefix('module.'): value for key, value in checkpoint.items()}


def check_fit(state_dict: Mapping[str, Tensor], model: nn.Module, free: frozenset[str] = frozenset()) -> None:
    """Raise CheckpointError unless names and shapes are exactly the model's.

    Args:
        state_dict: Tensors under the model's names.
        model: The network to load into.
        free: Names whose shape may differ, since they are adapted later.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state_dict]
    unknown = [key for key in state_dict if key not in wanted]
    differing = [
        f'{key} is {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}'
        for key, tensor in wanted.items()
        if key in state_dict and key not in free and state_dict[key].shape != tensor.shape]
    problems = [
        f'{len(found)} {what}: {", ".join(found[:SHOWN_KEYS])}{", ..." if len(found) > SHOWN_KEYS else ""}'
        for what, found in (('missing', missing), ('unknown', unknown), ('of another shape', differing)) if found]
    if problems:
        raise CheckpointError(
            f'the checkpoint does not fit {type(model).__name__}; {"; ".join(problems)}. Nothing was loaded; check '
            f'that the architecture and its arguments are those of the checkpoint.')


@contextmanager
def explain_checkpoint_errors(pretrained_cfg: Mapping[str, Any], cache_dir: str | None = None) -> Iterator[None]:
    """Turn what goes wrong with a file or download inside the block into one CheckpointError.

    A download that cannot be read, or that was made just now and does not fit, is removed from the cache, so that
    the next try starts anew.

    Args:
        pretrained_cfg: timm's configuration; its `file` or `url` is the source, in this order. A file that is made when
            it is opened explains itself.
        cache_dir: Where downloads are kept; None for torch.hub's folder.
    """
    file, url = pretrained_cfg.get('file'), pretrained_cfg.get('url')
    if isinstance(file, PublishedFile):
        yield
        return
    if file:
        path, source = Path(file), str(file)
        path = path / 'model.safetensors' if path.is_dir() else path  # a folder, as `local-dir:` names
    elif url and not pretrained_cfg.get('hf_hub_id'):
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
        path, source = folder / os.path.basename(urlparse(url).path), url
    else:
        yield
        return
    downloaded, was_there = not file, path.is_file()
    try:
        yield
    except Exception as error:
        if not path.is_file():
            if not isinstance(error, OSError):
                raise
            if isinstance(error, HTTPError):
                error.close()  # an answer of the server: it holds the connection
            advice = 'check the network, or get the file elsewhere' if downloaded else 'check the path'
            raise CheckpointError(
                f'{source} could not be read: {str(error) or "no such file"}; {advice} and pass '
                f'pretrained_cfg_overlay=dict(file=...), or use pretrained=False.') from error
        reason = _unreadable(path)
        removed = downloaded and (reason is not None or isinstance(error, CheckpointError) and not was_there)
        if removed:
            path.unlink()
        if reason is None:
            raise
        after = 'it was removed from the cache, try again' if removed else 'get it again'
        raise CheckpointError(f'{source} is not a checkpoint that can be read: {reason}; {after}.') from error


def _unreadable(path: Path) -> str | None:
    """What is wrong with the content of a checkpoint file, in one line; None for nothing."""
    try:
        load_state_dict(str(path))
    except (MemoryError, OSError):  # not the content's fault
        return None
    except Exception as error:
        words = textwrap.shorten(str(error) or 'no message', REASON_CHARS, placeholder=' ...')
        return f'{path.stat().st_size} bytes, {type(error).__name__}: {words}'
    return None
