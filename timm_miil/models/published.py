"""Published files of the family: which network a file is of, and its tensors under the names of that network.

Names mislead (a "tresnet_l" is one of three networks), so the tensors decide; what they cannot tell is asked of the
architecture that a file is published for. Nothing is dropped in silence: a file converts whole, or is refused with
the keys that do not fit.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import EdgeNeXt, Levit, MobileNetV3, TResNet, create_model
from torch import Tensor, nn

from timm_miil.models import _identify, _label_set, miil_levit, miil_mobilenet, miil_tresnet, mldecoder
from timm_miil.models._fit import fill_counters
from timm_miil.models._loading import check_fit, unwrap

__all__ = ['Network', 'convert_published', 'identify', 'is_network_of']

# What one name stands for in the authors' repositories and files: layouts and heads of one size.
ALIKE = (
    frozenset({'tresnet_m', 'miil_tresnet_m_bottleneck'}),
    frozenset({'tresnet_l', 'tresnet_v2_l', 'miil_tresnet_v2_l_slope1e6', 'miil_tresnet_l_bottleneck'}),
    frozenset({'tresnet_xl', 'miil_tresnet_v2_xl'}),
)


@dataclass(frozen=True)
class Network:
    """What `timm.create_model` needs to build the network of a file.

    Attributes:
        architecture: Name in timm's registry.
        model_args: Further arguments, such as `num_groups` of an ML-Decoder; plain JSON.
        num_classes: Number of classes of the file; 0 where it has no classifier.
    """

    architecture: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 0

    def build(self, **kwargs: Any) -> nn.Module:
        """The network, with fresh weights.

        Args:
            **kwargs: Passed to `timm.create_model`, over those of `model_args`.

        Example:
            >>> Network('tresnet_m', num_classes=80).build(device='meta').num_features
            2048
        """
        return create_model(self.architecture, **{'num_classes': self.num_classes, **self.model_args, **kwargs})


def identify(tensors: Mapping[str, Tensor], architecture: str | None = None) -> Network:
    """Which network a published file is of, by the names and shapes of its tensors.

    Args:
        tensors: The tensors, in the original layout or under the network's own names.
        architecture: The network that the file is published for; None if nothing is known. It decides what tensors
            cannot tell, such as the slopes of leaky ReLUs, and yields where they contradict it.

    Raises:
        CheckpointError: If the network is none of ours, or one that timm cannot hold.

    Example:
        >>> network = Network('tresnet_m', num_classes=80)
        >>> identify(network.build(device='meta').state_dict()) == network
        True
    """
    found = _identify.identify(unwrap(tensors), architecture)
    return Network(found.architecture, dict(found.model_args), found.num_classes)


def is_network_of(network: Network, architecture: str) -> bool:
    """Whether a file of this network may be one that is published for this architecture.

    The same network, or one of those that share its name in the authors' repositories: a "tresnet_l" of one of them is
    a `tresnet_v2_l`. Classes are not looked at.
    """
    name = network.architecture
    if name == 'mldecoder' and 'backbone' in network.model_args:
        name = f'mldecoder_{network.model_args["backbone"]}'
    return name == architecture or any({name, architecture} <= alike for alike in ALIKE)


def convert_published(tensors: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """The tensors of a file under the names of a network, exactly all of them.

    Args:
        tensors: The tensors, in the original layout or under the network's own names, which stay as they are.
        network: The network of the file, as `identify` tells it.

    Returns:
        Contiguous tensors of the same dtype, in the network's order; no two share memory.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    model = network.build(device='meta')
    converted = fill_counters(_renamed(unwrap(tensors), model), model)
    check_fit(converted, model)
    taken = set[int]()
    return {key: _own_memory(converted[key], taken) for key in model.state_dict()}


def _renamed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    for model_class, rename in CONVERTERS:
        if isinstance(model, model_class):
            return rename(tensors, model)
    return tensors


def _own_memory(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor in one piece, alone in its memory."""
    tensor = tensor.detach().contiguous()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in taken or storage.nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    if tensor.device.type != 'meta':
        taken.add(tensor.untyped_storage().data_ptr())
    return tensor


Converter = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]
CONVERTERS: tuple[tuple[type[nn.Module], Converter], ...] = (
    (mldecoder.MLDecoderClassifier, mldecoder.checkpoint_filter_fn),
    (_label_set.LabelSetClassifier, _label_set.checkpoint_filter_fn),
    (TResNet, miil_tresnet.to_timm_names),
    (EdgeNeXt, _identify.edgenext_names),
    (Levit, lambda tensors, _: miil_levit.to_timm_names(tensors)),
    (MobileNetV3, lambda tensors, _: miil_mobilenet.to_timm_names(tensors)),
)
