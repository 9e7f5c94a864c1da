"""Residual networks for pictures of 32 pixels: the teachers and the student of the head-sharing distillation.

"It's All in the Head: Representation Knowledge Distillation through Classifier Sharing", arXiv:2201.06945; original
code in Alibaba-MIIL/HeadSharingKD. The network is that of He et al., "Deep Residual Learning for Image Recognition",
arXiv:1512.03385, for CIFAR, four times as wide; keys are the original's. No deviations.
"""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_miil import catalog
from timm_miil._timm import feature_take_indices
from timm_miil.models._fit import create_published, fit_published
from timm_miil.models._loading import unwrap

__all__ = ['CifarResNet']

STEM_WIDTH = 32
WIDTHS = (64, 128, 256)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a strided or wider one has a 1x1 convolution in its shortcut."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, **placement: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False, **placement)
        self.bn1 = nn.BatchNorm2d(out_chans, **placement)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False, **placement)
        self.bn2 = nn.BatchNorm2d(out_chans, **placement)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chans != out_chans:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chans, out_chans, 1, stride, bias=False, **placement),
                nn.BatchNorm2d(out_chans, **placement))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class CifarResNet(nn.Module):
    """A residual network of three stages on maps of full, half and quarter size.

    Args:
        depth: Layers: two more than six times the blocks of a stage.
        num_classes: Number of classes; 0 for pooled features.
        in_chans: Channels of the pictures.
        global_pool: timm's name of a pooling; '' for the feature map.
        drop_rate: Dropout of the pooled features, in [0, 1).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: If there is no network of this depth.
    """

    def __init__(
            self,
            depth: int,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f'depth must be 6n + 2 with a positive n, such as 8 or 32, got {depth}.')
        placement: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 3, padding=1, bias=False, **placement)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, **placement)
        self.act1 = nn.ReLU(inplace=True)
        blocks, below, stages = (depth - 2) // 6, STEM_WIDTH, []
        for i, width in enumerate(WIDTHS):
            first = _BasicBlock(below, width, 2 if i else 1, **placement)
            stages.append(nn.Sequential(first, *(_BasicBlock(width, width, 1, **placement) for _ in range(blocks - 1))))
            below = width
        self.layer1, self.layer2, self.layer3 = stages
        self.feature_info = [
            dict(num_chs=STEM_WIDTH, reduction=1, module='act1'),
            *(dict(num_chs=width, reduction=2 ** i, module=f'layer{i + 1}') for i, width in enumerate(WIDTHS))]
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool, **placement)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions of the stem and the blocks."""
        return dict(stem=r'^(?:conv1|bn1)\.', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer, in place.

        Args:
            num_classes: Number of classes; 0 for pooled features.
            global_pool: timm's name of a pooling; '' for the feature map, None keeps it.
        """
        weight = self.conv1.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool, device=weight.device, dtype=weight.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)
        self.num_classes = num_classes

    @torch.jit.ignore
    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature map and those on the way: of the stem and of each stage.

        Args:
            x: Pictures (B, in_chans, H, W).
            indices: The last so many, those of a list, or all for None.
            norm: Without meaning here: every map is normalised.
            stop_early: Leave out the stages that are not asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Give the list alone.

        Raises:
            ValueError: If output_fmt is another.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt must be \'NCHW\', got {output_fmt!r}.')
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x]
        for stage in (self.layer1, self.layer2, self.layer3)[:last if stop_early else None]:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            maps.append(x)
        taken = [maps[i] for i in wanted]
        return taken if intermediates_only else (x, taken)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (B, 256, H / 4, W / 4) of pictures (B, in_chans, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint_seq(nn.Sequential(self.layer1, self.layer2, self.layer3), x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of a map; pooled features with `pre_logits`."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's classes; timm loads the result.

    Args:
        state_dict: What was read from the file, wrappers included.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    return fit_published(unwrap(state_dict), model)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return create_published(
        CifarResNet, variant, pretrained, checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


default_cfgs = generate_default_cfgs({**catalog.pretrained_cfgs('headsharing')})


@register_model
def miil_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Student of 8 layers, four times as wide as the plain one, arXiv:2201.06945."""
    return _create('miil_resnet8x4', pretrained, **dict(dict(depth=8), **kwargs))


@register_model
def miil_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Teacher of 32 layers, four times as wide as the plain one, arXiv:2201.06945."""
    return _create('miil_resnet32x4', pretrained, **dict(dict(depth=32), **kwargs))
