"""Which positions of a feature map speak for a class: a head's own attention, or class activation maps.

Attention is that of the heads which have `attention_maps`: ML-Decoder (arXiv:2111.12933) and its siblings. Grad-CAM
(Selvaraju et al., arXiv:1610.02391) and LayerCAM (Jiang et al., IEEE TIP 2021, doi:10.1109/TIP.2021.3089943) come from
the package grad-cam, on the last features by timm's contract. Deviation: where nothing reads the last positions, as in
a transformer that classifies its class token, the last level before that is taken which the class depends on.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_ndim
from timm_miil._errors import PredictionError
from timm_miil._extras import require
from timm_miil.inference.load import input_like, uncompiled

__all__ = ['METHODS', 'Method', 'at_rest', 'choose_method', 'class_maps', 'feature_map']

Method = Literal['attention', 'grad_cam', 'layer_cam']

METHODS: tuple[Method, ...] = get_args(Method)
CHUNK_CLASSES = 16
_CAMS: Mapping[str, str] = MappingProxyType({'grad_cam': 'GradCAM', 'layer_cam': 'LayerCAM'})


def class_maps(
        model: nn.Module,
        images: Tensor,
        classes: Sequence[int],
        *,
        method: Method | None = None,
) -> Tensor:
    """How much each position of the last feature map speaks for each class.

    The model is left as it was: its modes, gradients and the random number generators.

    Args:
        model: A timm model; evaluated without dropout.
        images: Preprocessed pictures (B, C, H, W); moved to the model's device and dtype.
        classes: Indices of classes, in any order.
        method: 'attention' for where the query of the class looks, which needs a head that attends (classes that share
            a query share it); 'grad_cam' or 'layer_cam' for the evidence in the features, by the gradient of the
            class's logit averaged over positions or at each position. None for 'attention' where the head attends,
            else 'grad_cam'.

    Returns:
        Maps (B, len(classes), h, w) on the grid of the feature map, float32 on the model's device, not negative. Each
        sums to 1, or is 0 everywhere if nothing speaks for the class.

    Raises:
        ImportError: If grad-cam is needed and not installed.
        PredictionError: If the model has no single map of features, its logits depend on no positions, or it gives
            values that are not finite.
        TypeError: If the model is not timm's, or an index is not an int.
        ValueError: If method is unknown or not for this model, an index is out of range, or images have another rank or
            number of channels.

    Example:
        >>> import timm, timm_miil
        >>> model = timm.create_model('mldecoder_scenes', pretrained=True)
        >>> class_maps(model, torch.rand(2, 3, 64, 96), classes=[7, 17]).shape
        torch.Size([2, 2, 8, 12])
    """
    model = uncompiled(model)
    method = choose_method(model, method)
    check_ndim(4, images=images)
    if images.shape[1] != (in_chans := getattr(model, 'in_chans', images.shape[1])):
        raise ValueError(f'images must have the {in_chans} channels of the model, got shape {tuple(images.shape)}.')
    num_classes: int = model.num_classes  # type: ignore[assignment]  # timm's contract
    for index in classes:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f'classes must be ints, got {type(index).__name__} {index!r}.')
        if not 0 <= index < num_classes:
            raise ValueError(f'classes must be in [0, {num_classes}), got {index}.')
    with at_rest(model):
        images = images.to(input_like(model))
        maps = _attention(model, images, classes) if method == 'attention' else _cams(model, images, classes, method)
    if not maps.isfinite().all():
        raise PredictionError('the model gives maps that are not finite.')
    maps = maps.float().clamp(min=0)
    return maps / maps.sum((2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def choose_method(model: nn.Module, method: Method | None = None) -> Method:
    """The method, chosen for the model if it is None.

    Raises:
        TypeError: If the model is not timm's.
        ValueError: If the method is unknown, or 'attention' and the model's head does not attend.
    """
    if not hasattr(model, 'forward_features'):
        raise TypeError(
            f'model must be a timm model, got {type(model).__name__} without forward_features(); create it with '
            f'timm.create_model.')
    head = getattr(model, 'head', None)
    attends = hasattr(head, 'attention_maps') and hasattr(model, 'token_grid')
    if method is None:
        return 'attention' if attends else 'grad_cam'
    check_choice(method=method, choices=METHODS)
    if method == 'attention' and not attends:
        raise ValueError(
            f"method 'attention' is for heads that attend, such as MLDecoder; {type(model).__name__} has none, take "
            f"'grad_cam' or 'layer_cam'.")
    return method


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, no gradients for it, none recorded; afterwards all as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, was_training in modes:  # parents come before their parts
            if module.training != was_training:
                module.train(was_training)


def feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """The last features of preprocessed pictures, as a map (B, D, h, w) without prefix tokens.

    Raises:
        PredictionError: If the model has no single map of features.
    """
    timm_model = cast(Any, model)
    return _Level.of(timm_model, images, timm_model.forward_features(images)).map


def _attention(model: Any, images: Tensor, classes: Sequence[int]) -> Tensor:
    features = model.forward_features(images)
    rows, columns = _grid(model, images, features)
    weights: Tensor = model.head.attention_maps(model.head_input(features), classes)
    return weights[:, :, model.num_prefix_tokens:].unflatten(2, (rows, columns))


@dataclass(frozen=True)
class _Level:
    """Features of one level: a map (B, D, h, w), and what makes the model's own layout of it."""

    map: Tensor
    prefix: Tensor | None = None
    is_channels_last: bool = False

    @classmethod
    def of(cls, model: Any, images: Tensor, features: Any) -> '_Level':
        rows, columns = _grid(model, images, features)
        if features.ndim == 3:
            prefix, positions = features.split([features.shape[1] - rows * columns, rows * columns], dim=1)
            return cls(positions.transpose(1, 2).unflatten(2, (rows, columns)), prefix)
        if _is_channels_last(model):
            return cls(features.permute(0, 3, 1, 2), is_channels_last=True)
        return cls(features)

    def features(self, maps: Tensor, row: int) -> Tensor:
        """The model's layout of other maps (K, D, h, w), with the prefix tokens of one picture."""
        if self.prefix is not None:
            prefix = self.prefix[row].expand(len(maps), -1, -1)
            return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        return maps.permute(0, 2, 3, 1) if self.is_channels_last else maps


def _is_channels_last(model: Any) -> bool:
    return 'NHWC' in (getattr(model, 'layout', None), getattr(model, 'output_fmt', None))


def _grid(model: Any, images: Tensor, features: Any) -> tuple[int, int]:
    """Rows and columns of a level's positions."""
    kind = type(model).__name__
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise PredictionError(f'{kind} gives no single map of features, got {got}; there is nothing to look at.')
    if features.ndim == 4:
        rows, columns = features.shape[1:3] if _is_channels_last(model) else features.shape[2:]
        return rows, columns
    if hasattr(model, 'token_grid'):
        try:
            return cast(tuple[int, int], model.token_grid(features, tuple(images.shape[2:])))
        except ValueError as error:
            raise PredictionError(f'{kind}: {error}') from error
    if not hasattr(model, 'forward_intermediates'):
        raise PredictionError(f'{kind} does not say on which grid its tokens lie (it has no forward_intermediates).')
    level = model.forward_intermediates(images[:1], indices=1, intermediates_only=True)[-1]
    rows, columns = level.shape[2:]
    # Where the class token joins late, as in CaiT, tokens of the levels before have no prefix.
    if features.shape[1] - rows * columns not in (0, getattr(model, 'num_prefix_tokens', 0)):
        raise PredictionError(
            f'{kind} gives {features.shape[1]} tokens, which are not its grid of {rows} x {columns}; for a model whose '
            f'positions are known take attach_head(model, num_classes), and train its head.')
    return rows, columns


def _cams(model: Any, images: Tensor, classes: Sequence[int], method: str) -> Tensor:
    package = require('pytorch_grad_cam')
    target = require('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget
    level, tail = _deepest_read(model, images, classes)
    maps = []
    for row in range(len(images)):
        for start in range(0, len(classes), CHUNK_CLASSES):
            chunk = classes[start:start + CHUNK_CLASSES]
            network = _Tail(lambda x, row=row: tail(x, row), level.map)  # type: ignore[misc]
            inputs = level.map[row].float().expand(len(chunk), -1, -1, -1).clone().requires_grad_()
            cam = getattr(package, _CAMS[method])(model=network, target_layers=[network.map])
            with torch.enable_grad():
                found = cam(input_tensor=inputs, targets=[target(index) for index in chunk])
            maps.append(torch.from_numpy(found).to(inputs))
    if not maps:
        return level.map.new_zeros(len(images), 0, *level.map.shape[2:])
    return torch.cat(maps).unflatten(0, (len(images), len(classes)))


class _Tail(nn.Module):
    """What follows a feature map, as a network of its own: the package may change its mode and gradients."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__()
        self.map = nn.Identity()
        self.logits_of = logits_of
        self.dtype = like.dtype
        self.anchor = nn.Parameter(like.new_empty(0))  # the package asks the first parameter for the device

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_of(self.map(x).to(self.dtype))


def _deepest_read(
        model: Any, images: Tensor, classes: Sequence[int]) -> tuple[_Level, Callable[[Tensor, int], Tensor]]:
    """The deepest level whose positions the logits depend on, and the function from its map to the logits."""
    last = _Level.of(model, images, model.forward_features(images))

    def head(maps: Tensor, row: int) -> Tensor:
        return model.forward_head(last.features(maps, row))

    if not classes or _reads(head, last, classes):
        return last, head
    names = [info['module'] for info in getattr(model, 'feature_info', ()) if 'module' in info]
    for name in reversed(names[-2:]):
        module = model.get_submodule(name)
        found: list[Any] = []
        with _hooked(module, lambda module, args, output: found.append(output)):
            model.forward_features(images)
        features = found[-1][-1] if isinstance(found[-1], tuple) else found[-1]  # TNT's patches come behind its pixels
        try:
            level = _Level.of(model, images, features)
        except PredictionError:
            continue

        def rest(maps: Tensor, row: int, level: _Level = level, module: nn.Module = module) -> Tensor:
            def exchange(module: nn.Module, args: Any, output: Any) -> Any:
                features = level.features(maps, row)
                return (*output[:-1], features) if isinstance(output, tuple) else features

            with _hooked(module, exchange):
                return model(images[row].expand(len(maps), -1, -1, -1))

        if _reads(rest, level, classes):
            return level, rest
    raise PredictionError(
        f'{type(model).__name__} gives logits that depend on none of its last positions, so no map shows what speaks '
        f'for a class; for a head that reads positions take attach_head(model, num_classes), and train it.')


def _reads(tail: Callable[[Tensor, int], Tensor], level: _Level, classes: Sequence[int]) -> bool:
    """Whether a logit depends on the positions of the first picture."""
    with torch.enable_grad():
        maps = level.map[:1].clone().requires_grad_()
        logits = tail(maps, 0)[:, list(classes)]
        if not logits.requires_grad:
            return False
        [gradient] = torch.autograd.grad(logits.square().sum(), maps, allow_unused=True)
    return gradient is not None and bool(gradient.any())


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
