"""What is trained beside a network and left behind when it is saved: heads, adapters, projections."""
from collections.abc import Callable
from typing import Any

from timm.models import group_parameters
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

__all__ = ['TrainingModel', 'TrainingModelTask', 'kept_network']

NETWORK = 'network.'


class TrainingModel(nn.Module):
    """A network with parts that learn with it. Modules that a subclass sets are such parts.

    All that is computed in training happens in `forward`, so that DDP and FSDP see it; what is saved, exported and
    measured is the network alone.

    Args:
        network: What is kept.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        """What `forward_training` gives in training mode, and the network's answer in evaluation mode."""
        return self.forward_training(x) if self.training else self.network(x)

    def forward_training(self, x: Tensor) -> Any:
        """What the loss needs of pictures (B, I, H, W), computed with the parts; every subclass has its own."""
        raise NotImplementedError(f'{type(self).__name__} must define forward_training.')

    def no_weight_decay(self) -> set[str]:
        """Parameters of the network that timm's optimizers do not decay."""
        names = getattr(self.network, 'no_weight_decay', set)
        return {NETWORK + name for name in names()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layers of the network, and the parts as one with the last of them, for timm's layer decay."""
        matcher: Any = getattr(self.network, 'group_matcher', None)
        if matcher is None:
            raise TypeError(
                f'layer decay needs a network with group_matcher, got {type(self.network).__name__}; train without it.')
        layers: dict[str, float] = group_parameters(self.network, matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix(NETWORK), last) if name.startswith(NETWORK) else last

    def parts_state(self) -> dict[str, Tensor]:
        """The state dict without the network's."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(NETWORK)}


class TrainingModelTask(ClassificationTask):
    """A task whose model may be a `TrainingModel`: timm's checkpoints hold the network, and beside it the parts."""

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The network alone, for validation and export."""
        found = super().get_eval_model(module=module, ema=ema)
        return None if found is None else kept_network(found)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State of the parts."""
        model = self._training_model(module, ema)
        parts = {} if model is None else model.parts_state()
        return {'parts': parts} if parts else {}

    def load_task_state(
            self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        """Put back what `get_task_state` gave.

        Raises:
            RuntimeError: If the parts are others, and strict.
        """
        model = self._training_model(module, ema)
        if model is None:
            return
        network = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(NETWORK)}
        model.load_state_dict({**network, **(state or {}).get('parts', {})}, strict=strict)

    def _training_model(self, module: nn.Module | None, ema: bool) -> TrainingModel | None:
        found = unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
        return found if isinstance(found, TrainingModel) else None


def kept_network(module: nn.Module) -> nn.Module:
    """The network without DDP, averaging, the compiler and the parts of a `TrainingModel` around it."""
    module = unwrap_model(module)
    return unwrap_model(module.network) if isinstance(module, TrainingModel) else module
