"""Put a head on a timm model by timm's contract, never by class name.

What a backbone gives is found by looking at the output of `forward_features` and at its gradient. Weights that take
no part in it (a convolution behind the pool, a norm of the old head) are taken out, so that every parameter trains.

A map (B, D, H, W) and tokens (B, N, D) go to the head as they are, a map (B, H, W, D) as a view with the channels
first. Of several branches, such as CrossViT's, the head reads all tokens, one branch behind the other; each branch has
channels of its own and zeros in those of the others, so the head's first linear layer is one for each branch. Of
patches with padding (NaFlex) it reads those that are valid.
"""
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_not_negative, check_positive
from timm_miil._timm import update_model_args, update_model_input_size
from timm_miil.heads._builder import check_builder
from timm_miil.heads._features import Features, adapt_to_features, as_tokens, join_branches
from timm_miil.heads._grid import find_grid
from timm_miil.heads._groups import PartNumber, Prefixed, prefixed
from timm_miil.heads.ml_decoder import MLDecoder

__all__ = ['BackboneWithHead', 'attach_head']

POOLS = ('avg', '')


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
        ValueError: If num_classes is negative, global_pool is unknown, or the backbone fails on images of its input
            size or its features are neither maps nor tokens. It may have lost its classifier by then.
        TypeError: If the backbone lacks `forward_features`, num_classes is not an int, or head cannot be called so.

    Attributes:
        num_features: Channels that the head reads; of several branches, the sum.
        layout: 'NCHW', 'NHWC', 'NLC' or 'NCL', of the features; `output_fmt` is timm's name for it.
        num_prefix_tokens: Tokens before the positions, such as a class token; of several branches, in each.
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
        check_not_negative(num_classes=num_classes)
        check_builder(head)
        if not hasattr(backbone, 'forward_features'):
            raise TypeError(
                f'backbone must be a timm image model, got {type(backbone).__name__} without forward_features(); '
                f'create it with timm.create_model, without features_only.')
        if hasattr(backbone, 'reset_classifier'):  # encoders of language models have no classifier
            backbone.reset_classifier(0)
        kind = adapt_to_features(backbone)
        self.num_features = sum(kind.widths)
        self.layout: str = kind.layout
        self.output_fmt: str = kind.layout
        self.num_prefix_tokens = kind.num_prefix_tokens
        self.backbone = backbone
        self.feature_info = getattr(backbone, 'feature_info', [])
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
            TypeError: If num_classes is not an int.
            ValueError: If it is negative, or global_pool is unknown.
        """
        check_not_negative(num_classes=num_classes)
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
            return Prefixed(PartNumber(self.backbone))
        matcher = self.backbone.group_matcher(coarse=coarse)
        if callable(matcher):
            return Prefixed(matcher)
        return {name: prefixed(pattern) for name, pattern in matcher.items()}

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

    def forward_features(self, x: Tensor | dict[str, Tensor]) -> Features:
        """Unpooled features, in the backbone's own layout.

        Args:
            x: Images (B, in_chans, H, W). A NaFlex backbone takes its loader's batches too: 'patches', 'patch_coord'
                and 'patch_valid'; without the last, all are valid.

        Returns:
            A map or tokens; a list of them, if the backbone has several branches; for patches, a dict of the tokens
            as 'patches' and of 'patch_valid' (B, N without prefix tokens), false for padding.

        Raises:
            TypeError: If the backbone takes no patches.
            ValueError: If a batch lacks its patches or where they lie, or the backbone merges patches, so that padding
                cannot be told from them.
        """
        if isinstance(x, Tensor):
            return self.backbone.forward_features(x)
        return self._forward_patches(x)

    @torch.jit.unused
    def _forward_patches(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        kind = type(self.backbone).__name__
        if 'patch_coord' not in inspect.signature(self.backbone.forward_features).parameters:
            raise TypeError(f'x must be images (B, {self.in_chans}, H, W), got a dict; {kind} takes no patches.')
        missing = [key for key in ('patches', 'patch_coord') if key not in x]
        if missing:
            raise ValueError(
                f'x must have {" and ".join(map(repr, missing))}, got a dict of {", ".join(x) or "nothing"}; give '
                f"images, or a NaFlex loader's batch.")
        coord, valid = x['patch_coord'], x.get('patch_valid')
        valid = torch.ones_like(coord[..., 0], dtype=torch.bool) if valid is None else valid.bool()
        features = self.backbone.forward_features(x['patches'], patch_coord=coord, patch_valid=valid)
        if not isinstance(features, Tensor):  # patch dropout may have left fewer
            features, valid = features['patches'], features['patch_valid']
        if features.shape[1] != self.num_prefix_tokens + valid.shape[1]:
            raise ValueError(
                f'the features of patches must be one token each, got {features.shape[1]} tokens from '
                f'{valid.shape[1]} patches; {kind} merges them, so give images.')
        return {'patches': features, 'patch_valid': valid}

    def forward_head(self, x: Features, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of unpooled features.

        Args:
            x: What `forward_features` gave.
            pre_logits: Give the pooled features (B, num_features) instead, as a model with num_classes=0 does.
        """
        if pre_logits or self.num_classes == 0:
            return self._pool(x)
        return self._classify(x)

    def _classify(self, x: Features) -> Tensor:
        if isinstance(x, Tensor):
            return self.head(self.head_input(x))
        return self._classify_parts(x)

    @torch.jit.unused
    def _classify_parts(self, x: list[Tensor] | dict[str, Tensor]) -> Tensor:
        tokens = self.head_input(x)
        if not isinstance(x, dict):
            return self.head(tokens)
        # A head knows no padding, so images of as many valid patches go through it together.
        valid = _with_prefix(x['patch_valid'], self.num_prefix_tokens)
        lengths, logits, order = valid.sum(1), [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            logits.append(self.head(tokens[rows][valid[rows]].unflatten(0, (-1, length))))
            order.append(rows)
        return torch.cat(logits)[torch.cat(order).argsort()]

    def head_input(self, features: Features) -> Tensor:
        """What the head reads of features.

        Args:
            features: What `forward_features` gave.

        Returns:
            A map (B, num_features, H, W), or tokens (B, N, num_features), with prefix tokens and any padding; of one
            map or one branch of tokens a view.
        """
        if isinstance(features, Tensor):
            if self.layout == 'NHWC':
                return features.permute(0, 3, 1, 2)
            return features if self.layout == 'NCHW' else as_tokens(features, self.layout)
        return self._join(features)

    @torch.jit.unused
    def _join(self, features: list[Tensor] | dict[str, Tensor]) -> Tensor:
        if isinstance(features, dict):
            return features['patches']
        return join_branches([as_tokens(branch, self.layout) for branch in features])

    def _pool(self, x: Features) -> Tensor:
        if self.global_pool == '':
            return x if isinstance(x, Tensor) else self._join(x)
        if isinstance(x, Tensor):
            return self._mean(x)
        return self._pool_parts(x)

    @torch.jit.unused
    def _pool_parts(self, x: list[Tensor] | dict[str, Tensor]) -> Tensor:
        if not isinstance(x, dict):
            return torch.cat([self._mean(branch) for branch in x], dim=1)
        valid = x['patch_valid'].unsqueeze(2)
        return torch.where(valid, x['patches'][:, self.num_prefix_tokens:], 0).sum(1) / valid.sum(1).clamp(min=1)

    def _mean(self, x: Tensor) -> Tensor:
        if self.layout == 'NCHW':
            return x.mean((2, 3))
        if self.layout == 'NHWC':
            return x.mean((1, 2))
        if self.layout == 'NCL':
            return x.mean(2)
        return x[:, self.num_prefix_tokens:].mean(1)

    @torch.jit.ignore
    def token_grid(self, features: Features, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the positions that features have behind the prefix tokens, which come row by row.

        Args:
            features: What `forward_features` gave.
            image_size: Height and width of the pictures that went in, in pixels.

        Returns:
            (H, W), so that H * W is the number of positions without the `num_prefix_tokens` first ones.

        Raises:
            TypeError: If image_size is not of ints.
            ValueError: If they are below 1, or explain no grid of as many tokens; for one token, which may be a class
                token, for features of several branches, which have a grid each, and of patches, where each image has
                its own.
        """
        if isinstance(image_size, int):
            raise TypeError(f'image_size must be (height, width), got the int {image_size}.')
        height, width = image_size
        check_positive(height=height, width=width)
        if not isinstance(features, Tensor):
            raise ValueError(
                f'features must be a tensor, got a {type(features).__name__}: those of several branches, or of patches '
                f'with padding, are on more than one grid.')
        if features.ndim == 4:
            rows, columns = features.shape[2:] if self.layout == 'NCHW' else features.shape[1:3]
            return rows, columns
        positions = as_tokens(features, self.layout).shape[1] - self.num_prefix_tokens
        if positions == 1:
            raise ValueError(
                f'features must have several positions, got the one token {tuple(features.shape)}: '
                f'{type(self.backbone).__name__} may give its class token only, as PiT does, which lies on no grid.')
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

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        """Classify images (B, in_chans, H, W), or a NaFlex batch; returns logits (B, num_classes)."""
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
        num_classes: Number of classes; 0 for no head, then the result gives pooled features.
        head: Class or function called with in_features, num_classes, device and dtype; fix further arguments with
            `functools.partial(MLDecoder, num_groups=50)`.

    Returns:
        The new model.

    Raises:
        ValueError: If the model fails on images of its input size, its features are neither maps nor tokens, or
            num_classes is negative.
        TypeError: If it is not a timm image model, num_classes is not an int, or head cannot be called so.

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


def _with_prefix(patch_valid: Tensor, num_prefix_tokens: int) -> Tensor:
    """Which tokens are valid: the prefix tokens always are."""
    return torch.cat([patch_valid.new_ones(len(patch_valid), num_prefix_tokens), patch_valid], dim=1)
