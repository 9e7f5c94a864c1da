"""A copy of a network that computes the same for less: norms folded into layers, channels last, 16-bit weights."""
import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, EffectiveSEModule, LayerScale, LayerScale2d, SEModule
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from timm_miil._checks import check_choice
from timm_miil._errors import PredictionError
from timm_miil._tf32 import float32_products
from timm_miil._timm import SqueezeExcite, get_model_input_config
from timm_miil.inference.load import input_like, uncompiled

__all__ = ['optimize_for_inference']

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Layers whose output is linear in their weight and bias; a subclass may make its weight anew at each call.
LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2dSame
NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
SCALES = LayerScale, LayerScale2d
# They multiply their input by what their children, one after the other, make of its mean.
SQUEEZES = SEModule, EffectiveSEModule, SqueezeExcite
# Of the largest output, what the order of sums and products may change.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}

Change = Callable[[nn.Module], object]  # made in place


class _Pair(NamedTuple):
    layer: str
    norm: str


def optimize_for_inference(
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        channels_last: bool = True,
        example_input: Tensor | None = None,
) -> nn.Module:
    """A copy of a network for inference only, with the same outputs but for rounding.

    - Layers with several branches in training become one, by timm's `reparameterize_model`.
    - A batch norm or layer scale goes into the convolution or linear layer before it. That no other operation reads
      that layer's output is found by running the network once.
    - 1x1 convolutions of pooled features, as in squeeze-and-excitation, become linear layers, and the excitation scales
      its features in place where nothing else reads them.
    - Weights are in channels_last, and of `dtype`: faster than autocast, which converts them at each pass. Pictures of
      another floating dtype are converted by `forward`; the output has the network's dtype.

    A change that shows in the output for the example is not made: by more than 1e-3 of the largest value in float32
    (1e-8 in float64, 0.05 in 16 bits), where the usual difference is 1e-6. All this is of `forward`: what a network
    returns from inside by other methods, such as `forward_intermediates`, may be folded.

    The copy is in evaluation mode and wants no gradients. Its state dict is not that of the network: save and push the
    network, and optimize what was loaded. `torch.compile` and `torch.export` take the copy.

    Args:
        model: Any network of one picture tensor, such as timm's; it is not changed.
        dtype: float64, float32, bfloat16 or float16; None keeps the weights'.
        device: Where the copy is; None keeps the network's.
        channels_last: Whether weights of 2-D convolutions are in channels_last.
        example_input: What `forward` takes, of the network's device and dtype, such as (1, 3, H, W); None makes one of
            the size that a timm network names.

    Raises:
        TypeError: If model is no module.
        ValueError: If dtype is another or cannot hold a value of the network, or there is no example_input for a
            network that does not say its input's size.
        PredictionError: If the network does not run on the example.

    Example:
        >>> from timm.models import create_model
        >>> fast = optimize_for_inference(create_model('test_resnet'), dtype=torch.bfloat16)
        >>> fast(torch.rand(1, 3, 64, 64)).dtype
        torch.bfloat16
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch module, got {type(model).__name__}.')
    if dtype is not None:
        check_choice(dtype=str(dtype), choices=map(str, DTYPES))
    model = uncompiled(model)
    plain = copy.deepcopy(model).eval()
    example = _example(plain) if example_input is None else example_input
    with torch.no_grad(), float32_products(example.device):  # TF32's rounding would hide whether outputs are the same
        fast = _improved(plain, example)
        _use_linear(fast, example)
        for module in fast.modules() if channels_last else ():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        finite = {name for name, tensor in _tensors(fast) if tensor.isfinite().all()}
        fast = fast.to(device=device, dtype=dtype)
        if lost := [name for name, tensor in _tensors(fast) if name in finite and not tensor.isfinite().all()]:
            raise ValueError(f'dtype {dtype} cannot hold the values of {lost[0]}; take bfloat16 or float32.')
    fast.register_forward_pre_hook(_convert_input)
    return fast.requires_grad_(False)


def _example(model: nn.Module) -> Tensor:
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'example_input must be given for {type(model).__name__}, which does not say its input size.')
    size = get_model_input_config(model)['input_size']
    values = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    return values.to(input_like(model))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _improved(plain: nn.Module, example: Tensor) -> nn.Module:
    """The network with every change that its output for the example does not show."""
    try:
        expected = plain(example)
    except Exception as error:  # whatever a network may raise
        raise PredictionError(
            f'the model does not run on an input of shape {tuple(example.shape)}: {type(error).__name__}: {error}; '
            f'give an example_input that it takes.') from error
    fast = _changed(plain, [partial(reparameterize_model, inplace=True)], example, expected)
    for find in (_find_folds, _find_scales):
        fast = _changed(fast, find(fast, example), example, expected)
    return fast


def _changed(model: nn.Module, changes: Sequence[Change], example: Tensor, expected: object) -> nn.Module:
    """A copy with all changes that leave its output what it was; the model itself if none does."""
    if not changes:
        return model
    changed = copy.deepcopy(model)
    try:
        for change in changes:
            change(changed)
        if all(_is_close(changed(example), expected) for _ in range(2)):  # what it keeps may be changed by the first
            return changed
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a network that reads its own norms, or timm's fusing of one that it does not know
        pass
    if len(changes) == 1:
        return model
    half = len(changes) // 2
    return _changed(_changed(model, changes[:half], example, expected), changes[half:], example, expected)


def _is_close(found: object, expected: object) -> bool:
    """Whether two outputs, tensors in whatever containers, are the same but for rounding."""
    (values, form), (wanted, wanted_form) = tree_flatten(found), tree_flatten(expected)
    return form == wanted_form and all(map(_is_near, values, wanted))


def _is_near(found: object, expected: object) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(found) is type(expected) and found == expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype not in TOLERANCE or not found.numel():
        return torch.equal(found, expected)
    limit = TOLERANCE[found.dtype] * float(expected.abs().max().clamp(min=1e-6))
    return bool((found - expected).abs().max() <= limit)


class _Uses(TorchDispatchMode):
    """Counts the operations that read each of some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # alive, so that no other tensor gets the identity
        self.counts: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        self.kept[id(tensor)] = tensor
        self.counts.setdefault(id(tensor), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        for key in {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self.counts.keys():
            self.counts[key] += 1
        return func(*args, **(kwargs or {}))


def _run_once(
        model: nn.Module, example: Tensor, handles: Iterable[RemovableHandle],
        watched: contextlib.AbstractContextManager[object] = contextlib.nullcontext()) -> None:
    """Run a network with hooks that are taken off then."""
    try:
        with watched:
            model(example)
    finally:
        for handle in handles:
            handle.remove()


def _find_folds(model: nn.Module, example: Tensor) -> list[Change]:
    """Changes that put norms into layers whose outputs they alone read, each called once."""
    uses = _Uses()
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, str] = {}                    # tensor -> layer
    read: dict[str, tuple[int, int]] = {}        # norm -> tensor that it got, and how many had read it
    calls: dict[str, int] = {}
    handles = []

    def after_layer(module: nn.Module, inputs: object, output: Tensor) -> None:
        calls[names[module]] = calls.get(names[module], 0) + 1
        uses.watch(output)
        made[id(output)] = names[module]

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[names[module]] = calls.get(names[module], 0) + 1
        if inputs and uses.kept.get(id(inputs[0])) is inputs[0]:
            read[names[module]] = id(inputs[0]), uses.counts[id(inputs[0])]

    for module in names:
        if type(module) in LAYERS and _has_own_weights(module):
            handles.append(module.register_forward_hook(after_layer))
        elif (type(module) in SCALES or _is_norm(module) and module.track_running_stats) and not (
                module._forward_hooks or module._forward_pre_hooks):
            handles.append(module.register_forward_pre_hook(before_norm))
    _run_once(model, example, handles, uses)
    users = [id(parameter) for module in names for parameter in module._parameters.values() if parameter is not None]
    shared = {key for key in users if users.count(key) > 1} if len(set(users)) < len(users) else set()
    return [
        partial(_fold, pair=_Pair(made[tensor], norm)) for norm, (tensor, uses_before) in read.items()
        if uses_before == 0 and uses.counts[tensor] == 1
        and calls[norm] == calls[made[tensor]] == 1
        and id(model.get_submodule(made[tensor]).weight) not in shared]


def _is_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(module) in NORMS or isinstance(module, BatchNormAct2d)  # its subclasses differ in training


def _has_own_weights(layer: nn.Module) -> bool:
    return not layer._forward_hooks and isinstance(layer._parameters.get('weight'), nn.Parameter)


def _fold(model: nn.Module, pair: _Pair) -> None:
    """Put an affine map into the layer before it, in place; in float64."""
    layer, norm = cast(nn.Conv2d, model.get_submodule(pair.layer)), model.get_submodule(pair.norm)
    scale, shift = _affine(norm)
    weight, bias = layer.weight.double(), 0 if layer.bias is None else layer.bias.double()
    folded = weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias * scale + shift
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (nn.Parameter(value.to(dtype), requires_grad=False) for value in folded)
    model.set_submodule(pair.norm, _after(norm))


def _affine(module: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, in float64."""
    if type(module) in SCALES:
        return module.gamma.double(), torch.zeros_like(module.gamma, dtype=torch.float64)
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.double()
    shift = -module.running_mean.double() * scale
    return scale, shift if module.bias is None else shift + module.bias.double()


def _after(norm: nn.Module) -> nn.Module:
    """What timm's norm does besides: dropout and activation."""
    kept = [module for module in norm.children() if not isinstance(module, nn.Identity)]
    return nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)


class _InPlaceScale(nn.Module):
    """Squeeze-and-excitation that needs no second map."""

    def __init__(self, squeeze: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(*squeeze.children())

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gate(x.mean((2, 3), keepdim=True)))


def _find_scales(model: nn.Module, example: Tensor) -> list[Change]:
    """Changes of squeeze-and-excitations that are the last to read their input."""
    uses = _Uses()
    inside: dict[str, tuple[int, int]] = {}     # module -> its input, and how often that was read when it had ended
    handles = []

    kept = {tensor.untyped_storage().data_ptr() for _, tensor in [('', example), *_tensors(model)]}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for x in inputs:  # one, or none where it is given by name
            uses.watch(x)

    def after(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for x in inputs:
            is_own = x.untyped_storage().data_ptr() not in kept
            inside[name] = id(x), uses.counts[id(x)] if is_own and name not in inside else -1

    for name, module in model.named_modules():
        if type(module) in SQUEEZES and not getattr(module, 'add_maxpool', False) and not (
                module._forward_hooks or module._forward_pre_hooks):
            handles += [
                module.register_forward_pre_hook(before), module.register_forward_hook(partial(after, name))]
    _run_once(model, example, handles, uses)
    return [partial(_scale, name=name) for name, (tensor, reads) in inside.items() if uses.counts[tensor] == reads]


def _scale(model: nn.Module, name: str) -> None:
    model.set_submodule(name, _InPlaceScale(model.get_submodule(name)))


class _PointConv2d(nn.Conv2d):
    """A 1x1 convolution that is a linear layer on maps of one pixel."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] == (1, 1):
            return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        return super().forward(input)


def _use_linear(model: nn.Module, example: Tensor) -> None:
    """Make linear layers of 1x1 convolutions whose input has one pixel, in place."""
    found, handles = set(), []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].shape[2:] == (1, 1):
            found.add(module)

    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1 and not any(
                module.padding) and _has_own_weights(module):
            handles.append(module.register_forward_pre_hook(look))
    _run_once(model, example, handles)
    for module in found:
        module.__class__ = _PointConv2d


def _convert_input(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    like = input_like(module)
    return tuple(
        value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs)
