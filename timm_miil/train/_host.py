"""What a training run needs of the place where it runs, in words that hold for one process and for many."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_miil.train._loaders import Share

__all__ = ['Host']

_T = TypeVar('_T')


class Host(Protocol):
    """What a run needs of the place where it runs; the engine has one."""
    device: torch.device
    share: Share
    is_main: bool
    lag: int
    """Steps until the numbers of a step can be read without waiting for the device."""

    is_sharded: bool
    """Whether parts of the network lie in several processes."""

    rebuilds: bool
    """Whether the network itself is changed for training, not just wrapped."""

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the layout of the recipe."""

    def bring(self, tensor: Tensor) -> Tensor:
        """Pictures or targets on the device."""

    def wrap(self, task: ClassificationTask) -> None:
        """Make the task's model and its average ready to be trained here."""

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """What steps the optimizer here."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks run."""

    def part(self, task: ClassificationTask, is_last: bool) -> AbstractContextManager[object]:
        """The context of a part of a step, whose gradients add up until the last."""

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""

    def clip(self, parameters: Iterator[nn.Parameter], max_norm: float) -> None:
        """Clip the norm of all gradients."""

    def add_up(self, loss: Tensor, stops: bool) -> Callable[[], tuple[float, bool]]:
        """The sum over all processes, and whether any stops; to be read by calling what is returned."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""

    def gather(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes in order, in host memory; None elsewhere than on the main one."""

    def gather_objects(self, value: _T) -> list[_T]:
        """The values of all processes in order."""

    def on_main(self, action: Callable[[], _T]) -> _T:
        """What the main process's action returned, or raised, on all of them."""

    def match_buffers(self, module: nn.Module) -> None:
        """Let all processes have the main one's buffers."""

    def match_weights(self, module: nn.Module) -> None:
        """Let all processes have the main one's parameters and buffers."""

    def get_states(self, task: ClassificationTask, optimizer: Optimizer) -> dict[str, Any]:
        """States of model, average, optimizer and loss scaler; only the main process's need be whole."""

    def set_states(self, task: ClassificationTask, optimizer: Optimizer, states: Mapping[str, Any]) -> None:
        """Put back what `get_states` gave."""

    def get_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's whole state dict; only the main process's need be."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell the trackers."""
