"""A step whose loss or whose weights are not finite."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from timm_miil._errors import TrainingError
from timm_miil.train._host import Host
from timm_miil.train._loaders import Batch
from timm_miil.train._output import RunFolder

__all__ = ['has_spoilt_weights', 'not_finite']


def has_spoilt_weights(module: nn.Module, host: Host) -> bool:
    """Whether a weight is infinite or nan, in any process."""
    spoilt = torch.zeros((), device=host.device)
    for parameter in module.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        spoilt += (~local.detach().isfinite()).any()
    return bool(host.total(spoilt))


def not_finite(
        words: str, facts: dict[str, Any], parts: Sequence[Batch], host: Host, folder: RunFolder | None,
) -> TrainingError:
    """The error of such a step, whose pictures are written for someone to look at.

    Args:
        words: What happened and what to do.
        facts: Of the step, to be written with its pictures.
        parts: Its pictures, those of this process.
        host: The place where the run is.
        folder: Where to write; None writes nothing.
    """
    if folder is None:
        return TrainingError(f'{words}.')
    images = host.gather(torch.cat([part.images for part in parts]))
    targets = host.gather(torch.cat([part.targets for part in parts]))
    names = host.gather_objects([name for part in parts for name in part.names()])
    facts = {**facts, 'names': [name for each in names for name in each]}

    def write() -> str:
        try:
            return f'the pictures of the step are in {folder.write_step(images, targets, facts)}'  # type: ignore
        except OSError as error:
            return f'the pictures of the step could not be written ({error})'
    writing: Callable[[], str] = write
    return TrainingError(f'{words}; {host.on_main(writing)}.')
