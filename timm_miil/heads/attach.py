"""Put a head on a timm model by timm's contract, never by class name.

What a backbone gives is found by looking: a copy without storage (the meta device) runs `forward_features`, and the
shape of its output says how many channels there are, its gradient says which weights take part. Weights that do
not (a convolution behind the pool, a norm of the old head) are taken out, so that every parameter trains.
"""
import copy
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_positive
from timm_miil._timm import get_model_input_config, update_model_args, update_model_input_size
from timm_miil.heads._grid import find_grid
from timm_miil.heads.ml_decoder import MLDecoder

__all__ = ['BackboneWithHead', 'attach_head']

Layout = Literal['NCHW', 'NHWC', 'NLC']
POOLS = ('avg', '')
PROBE_BATCH = 2


class BackboneWithHead(nn.Module):
    """A timm backbone and a head that reads its unpooled features, under timm's model contract.

    State-dict keys are `backbone.<key of the timm model>` and `head.<key of the head>`.

    Args:
        backbone: A timm image model; its classifier is removed in place.
        num_classes: Number of classes; 0 for no head, then `forward` gives pooled features.
        head: Builds the head: called with in_features, num_classes, device and dtype.
        global_pool: 'avg' for the mean over positions (prefix tokens left out), '' for none. It serves
            `num_classes=0` and `pre_logits=True`; the head always reads unpooled features.

    Raises:
        ValueError: If global_pool is unknown, or the backbone's features are neither a map nor tokens.
        TypeError: If the backbone lacks `forward_features` or `reset_classifier`.
    """

    multi_label = True

    if TYPE_CHECKING:  # not annotations proper, which TorchScript would try to compile
        backbone: Any  # timm's contract is methods, which nn.Module does not declare
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]

    def __init__(
            self,
            backbone: Any,
            num_classes: int,
            head: Callable[..., nn.Module] = MLDecoder,
            global_pool: str = 'avg',
    ) -> None:
        super().__init__()
        check_choice(global_pool=global_pool, choices=POOLS)
        for method in ('forward_features', 'reset_classifier'):
            if not hasattr(backbone, method):
                raise TypeError(
                    f'backbone must be a timm image model, got {type(backbone).__name__} without {method}(); '
                    f'create it with timm.create_model.')
        backbone.reset_classifier(0)
        self.num_features, self.layout = _adapt_to_features(backbone)
        self.backbone = backbone
        self.feature_info = getattr(backbone, 'feature_info', [])
        self.num_prefix_tokens: int = getattr(backbone, 'num_prefix_tokens', 0)
        self.head_hidden_size = self.num_features
        self.in_chans: int = getattr(backbone, 'in_chans', 3)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self._build_head = head
        self.head = self._new_head(num_classes)

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        like = next(self.backbone.parameters())
        return self._build_head(
            in_features=self.num_features, num_classes=num_classes, device=like.device, dtype=like.dtype)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head; Identity when num_classes is 0."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Change the number of classes in place.

        A head with `reset_classes` keeps what does not depend on the classes.

        Args:
            num_classes: New number; 0 removes the head.
            global_pool: New pooling, 'avg' or ''; None keeps it.

        Raises:
            ValueError: If global_pool is unknown.
        """
        if global_pool is not None:
            check_choice(global_pool=global_pool, choices=POOLS)
            self.global_pool = global_pool
        reset_classes = getattr(self.head, 'reset_classes', None)
        if num_classes and self.num_classes and reset_classes is not None:
            reset_classes(num_classes)
        else:
            self.head = self._new_head(num_classes).train(self.training)
        self.num_classes = num_classes

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """timm's parameter groups: the backbone's, under its prefix, then the head.

        A backbone that knows no groups gets one for each of its parts, in their order.
        """
        if not hasattr(self.backbone, 'group_matcher'):
            return _Prefixed(_PartNumber(self.backbone))
        matcher = self.backbone.group_matcher(coarse=coarse)
        if callable(matcher):
            return _Prefixed(matcher)
        return {name: _prefixed(pattern) for name, pattern in matcher.items()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone wants without weight decay."""
        skip = getattr(self.backbone, 'no_weight_decay', None)
        return {f'backbone.{name}' for name in skip()} if skip is not None else set()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> None:
        """Change the input size, in pixels, of a backbone that has one.

        Args:
            img_size: New size, one side or (H, W); None keeps it.
            **kwargs: Further arguments of the timm model's method, such as `patch_size` or `window_size`.

        Raises:
            AttributeError: If the backbone takes any size, and so has no such method.
        """
        self.backbone.set_input_size(img_size, **kwargs)
        if img_size is not None:
            update_model_input_size(self, img_size, **kwargs)
        else:
            update_model_args(self, **kwargs)

    @torch.jit.ignore
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Features of several levels; arguments and results are those of the timm backbone."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    @torch.jit.ignore
    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Cut what `forward_intermediates` does not need for these levels; returns their indices."""
        if prune_head:
            self.reset_classifier(0, '')
        taken: list[int] = self.backbone.prune_intermediate_layers(indices, prune_norm, False)
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features of images (B, in_chans, H, W), in the backbone's own layout."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of unpooled features.

        Args:
            x: What `forward_features` gave.
            pre_logits: Give the pooled features (B, num_features) instead, as a model with num_classes=0 does.
        """
        if pre_logits or self.num_classes == 0:
            return self._pool(x)
        if self.layout == 'NHWC':
            x = x.flatten(1, 2)
        return self.head(x)

    @torch.jit.ignore
    def token_grid(self, features: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the positions that features have behind the prefix tokens, which come row by row.

        Args:
            features: What `forward_features` gave.
            image_size: Height and width of the pictures that went in, in pixels.

        Returns:
            (H, W), so that H * W is the number of positions without the `num_prefix_tokens` first ones.

        Raises:
            TypeError: If image_size is not of ints.
            ValueError: If they are below 1, or explain no grid of as many tokens.
        """
        height, width = image_size
        check_positive(height=height, width=width)
        if self.layout != 'NLC':
            rows, columns = features.shape[2:] if self.layout == 'NCHW' else features.shape[1:3]
            return rows, columns
        positions = features.shape[1] - self.num_prefix_tokens
        grid_of = getattr(getattr(self.backbone, 'patch_embed', None), 'dynamic_feat_size', None)
        if grid_of is not None:  # it knows patches that are not square
            rows, columns = grid_of((height, width))
            if rows * columns == positions:
                return rows, columns
        grid = find_grid(positions, (height, width))
        if grid is None:
            raise ValueError(
                f'image_size must be the (height, width) of the pictures behind the features, got {(height, width)}, '
                f'which no grid of {positions} positions covers (tokens {tuple(features.shape)}, the first '
                f'{self.num_prefix_tokens} of them prefix tokens).')
        return grid

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == '':
            return x
        if self.layout == 'NCHW':
            return x.mean((2, 3))
        if self.layout == 'NHWC':
            return x.mean((1, 2))
        return x[:, self.num_prefix_tokens:].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W); returns logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def attach_head(
        model: nn.Module,
        num_classes: int,
        head: Callable[..., nn.Module] = MLDecoder,
) -> BackboneWithHead:
    """Replace the classifier of a timm model by a head that reads its unpooled features.

    timm knows no name that builds the result anew, so it is kept by its state dict. What shall be a folder that
    `timm.create_model` loads is made by `timm.create_model('mldecoder', backbone=...)`.

    Args:
        model: A timm image model with any weights; changed in place and kept as `.backbone`.
        num_classes: Number of classes.
        head: Class or function called with in_features, num_classes, device and dtype; fix further arguments with
            `functools.partial(MLDecoder, num_groups=50)`.

    Returns:
        The new model.

    Raises:
        ValueError: If the model's features are neither a map nor tokens.
        TypeError: If it is not a timm image model.

    Example:
        >>> import timm, torch
        >>> model = attach_head(timm.create_model('resnet18'), num_classes=20)
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 20])
    """
    attached = BackboneWithHead(model, num_classes, head).train(model.training)
    cfg = dict(getattr(model, 'pretrained_cfg', {}))
    convs = cfg.get('first_conv') or ()
    attached.pretrained_cfg = attached.default_cfg = cfg | {
        'architecture': f'attach_head({cfg.get("architecture")})',
        'first_conv': tuple(f'backbone.{conv}' for conv in ([convs] if isinstance(convs, str) else convs)) or None,
        'classifier': None, 'num_classes': num_classes, 'label_names': None, 'label_descriptions': None,
    }
    return attached


def _adapt_to_features(backbone: Any) -> tuple[int, Layout]:
    """Take out what `forward_features` does not use; returns channels and layout of what it gives."""
    input_size = get_model_input_config(backbone)['input_size']
    with torch.inference_mode(False), torch.enable_grad():
        twin = _without_storage(backbone)
        like = next(twin.parameters())
        features = twin.forward_features(torch.empty(PROBE_BATCH, *input_size, device='meta', dtype=like.dtype))
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f'forward_features of {type(backbone).__name__} must give a map (B, D, H, W), (B, H, W, D) or tokens '
                f'(B, N, D), got {got}; this backbone cannot carry a head on its features.')
        params = dict(twin.named_parameters())
        grads = torch.autograd.grad(features.sum(), list(params.values()), allow_unused=True)
    unused = {name for name, grad in zip(params, grads) if grad is None}
    removed: tuple[str, ...] = ()
    for name, module in list(backbone.named_modules()):
        owns = next(module.parameters(recurse=False), None) is not None  # containers stay: timm resets heads by them
        if owns and name and not name.startswith(removed) and {
                f'{name}.{key}' for key, _ in module.named_parameters()} <= unused:
            backbone.set_submodule(name, nn.Identity())
            removed += (f'{name}.',)
    layout: Layout = 'NLC' if features.ndim == 3 else getattr(backbone, 'output_fmt', 'NCHW')
    check_choice(output_fmt=layout, choices=('NCHW', 'NHWC', 'NLC'))
    return features.shape[1 if layout == 'NCHW' else -1], layout


def _without_storage(module: nn.Module) -> Any:
    """A copy on the meta device, in evaluation mode, with every parameter ready for a gradient."""
    known: dict[int, Any] = {}
    for parameter in module.parameters():
        known[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device='meta'), requires_grad=parameter.is_floating_point())
    for buffer in module.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device='meta')
    return copy.deepcopy(module, known).eval()


class _PartNumber:
    """Groups of a backbone that names none: its parts of the first two levels, numbered as they stand."""

    def __init__(self, backbone: nn.Module) -> None:
        parts = dict.fromkeys(self._part(name) for name, _ in backbone.named_parameters())
        self.number = {part: number for number, part in enumerate(parts)}

    def __call__(self, name: str) -> float:
        return self.number[self._part(name)]

    @staticmethod
    def _part(name: str) -> str:
        return '.'.join(name.split('.')[:2])


class _Prefixed:
    """A group function of the backbone, for names with our prefix; the head comes last."""

    def __init__(self, matcher: Callable[[str], Any]) -> None:
        self.matcher = matcher

    def __call__(self, name: str) -> Any:
        return self.matcher(name.removeprefix('backbone.')) if name.startswith('backbone.') else math.inf


def _prefixed(pattern: Any) -> Any:
    """timm's group patterns, moved below `backbone.`; they nest in lists and tuples beside plain values."""
    if isinstance(pattern, str):
        unanchored = re.sub(r'(?<!\[)\^', '', pattern)  # a caret that opens a character class stays
        return rf'^backbone\.(?:{unanchored})'
    if isinstance(pattern, (list, tuple)):
        return type(pattern)(_prefixed(part) for part in pattern)
    return pattern
