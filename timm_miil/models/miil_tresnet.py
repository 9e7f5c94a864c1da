"""TResNet variants that timm lacks, and the key layout of the original TResNet checkpoints.

Ridnik et al., "TResNet: High Performance GPU-Dedicated Architecture", arXiv:2003.13630; the two-layer head is that of
"Asymmetric Loss For Multi-Label Classification", arXiv:2009.14119, the SDL classifier that of "Semantic Diversity
Learning for Zero-Shot Multi-label Classification", arXiv:2105.05926; original code in Alibaba-MIIL/TResNet,
Alibaba-MIIL/ASL, Alibaba-MIIL/ML_Decoder, Alibaba-MIIL/ZS_SDL. The bodies are timm's `TResNet`. No deviations: the
originals' InPlaceABN becomes a plain BatchNorm of equal outputs when weights are loaded.
"""
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import BlurPool2d, ClassifierHead, ConvNormAct
from timm.models import PretrainedCfg, TResNet, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil._timm import update_model_args
from timm_miil.heads import SemanticEmbeddingHead
from timm_miil.heads.text import TEXT_DIM
from timm_miil.models._fit import create_published, fit_published
from timm_miil.models._loading import unwrap

__all__ = ['BottleneckTResNet', 'SDLTResNet', 'SlopedTResNet', 'convert_original_tresnet', 'to_timm_names']

ABN_EPS = 1e-5
NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
BODY = ('conv1.', 'layer1.', 'layer2.', 'layer3.', 'layer4.')
PLAIN_HEAD = {f'head.fc.{kind}': f'head.fc.{kind}' for kind in ('weight', 'bias')}
BOTTLENECK_HEAD = {
    'head.fc.embedding_generator.0.weight': 'head.embed.weight',
    'head.fc.embedding_generator.0.bias': 'head.embed.bias',
    'head.fc.FC.weight': 'head.fc.weight',
    'head.fc.FC.bias': 'head.fc.bias',
}
SDL_HEAD = {'embedding.weight': 'embedding.weight'}


class _TwoLayerHead(ClassifierHead):
    """Pooling, a linear layer to an embedding, and a classifier on that; nothing between the two.

    Without pooling it passes the features on.
    """

    def __init__(self, in_features: int, embed_dim: int, num_classes: int, pool_type: str, drop_rate: float, **dd: Any):
        super().__init__(in_features, 0, pool_type=pool_type, drop_rate=drop_rate)
        self.embed = nn.Linear(in_features, embed_dim, **dd)
        self.set_classes(num_classes)

    def set_classes(self, num_classes: int, pool_type: str | None = None) -> None:
        weight = self.embed.weight
        super().reset(0, pool_type)
        self.fc = nn.Identity() if num_classes == 0 else nn.Linear(
            weight.shape[0], num_classes, device=weight.device, dtype=weight.dtype)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if x.ndim == 4:
            return x
        x = self.embed(self.drop(x))
        return x if pre_logits else self.fc(x)


class BottleneckTResNet(TResNet):
    """A TResNet whose head has two linear layers, the first to a narrow embedding.

    Args:
        layers: Blocks of each stage.
        embed_dim: Width between the two layers.
        in_chans: Channels of the pictures.
        num_classes: Number of classes; 0 for the embedding.
        width_factor: Scales the widths.
        v2: Whether stages 1 and 2 have bottleneck blocks too.
        global_pool: timm's name of a pooling; '' for the feature map.
        drop_rate: Dropout of the pooled features.
        drop_path_rate: Stochastic depth.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
            self,
            layers: list[int],
            embed_dim: int = 512,
            in_chans: int = 3,
            num_classes: int = 1000,
            width_factor: float = 1.0,
            v2: bool = False,
            global_pool: str = 'fast',
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            layers, in_chans=in_chans, num_classes=0, width_factor=width_factor, v2=v2, global_pool=global_pool,
            drop_rate=drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype)
        self.num_classes = num_classes
        self.head = _TwoLayerHead(
            self.num_features, embed_dim, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = embed_dim

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer, in place; the embedding keeps its weights.

        Args:
            num_classes: Number of classes; 0 for the embedding.
            global_pool: timm's name of a pooling; '' for the feature map, None keeps it.
        """
        self.num_classes = num_classes
        head: Any = self.head
        head.set_classes(num_classes, global_pool)


class SDLTResNet(TResNet):
    """A TResNet that maps a picture to several rows in word-vector space by one linear layer without a bias.

    Without a label set the output is these rows, (B, num_classes); with one, the scores (B, K) of its labels, and
    `num_classes` is K. A saved folder gives the network without the label set: word vectors are the caller's.

    Args:
        layers: Blocks of each stage.
        num_classes: Rows times the length of a word vector; 0 for pooled features. A number that is no such product
            makes a plain linear classifier.
        text_dim: Length of a word vector.
        num_rows: Rows a picture, whatever number of labels num_classes has been since; None for what num_classes says.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        **kwargs: Passed to timm's TResNet.
    """

    def __init__(
            self,
            layers: list[int],
            num_classes: int = 2100,
            text_dim: int = TEXT_DIM,
            num_rows: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(layers, num_classes=0, device=device, dtype=dtype, **kwargs)
        self.text_dim = text_dim
        self.num_classes = num_rows * text_dim if num_rows and num_classes else num_classes
        self.embedding = self._new_embedding(self.num_classes, device, dtype)

    def _new_embedding(self, num_classes: int, device: Any, dtype: Any) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        if num_classes % self.text_dim:
            return nn.Linear(self.num_features, num_classes, bias=False, device=device, dtype=dtype)
        return SemanticEmbeddingHead(
            self.num_features, self.text_dim, num_classes // self.text_dim, device=device, dtype=dtype)

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set by its word vectors, of the source that the weights were trained with.

        Args:
            embeddings: One row a label, shape (K, text_dim), any floating dtype and device.

        Raises:
            TypeError: If embeddings is not a tensor of a floating dtype, or the network ends in a plain classifier.
            ValueError: If the shape is another, or a value is not finite.
        """
        head = self._semantic_head()
        head.set_queries(embeddings)
        self.num_classes = head.num_classes
        update_model_args(self, num_rows=head.num_rows)  # so that a saved folder fits its file

    @torch.jit.ignore
    def embed(self, x: Tensor) -> Tensor:
        """The rows (B, text_dim * num_rows) of pictures, whatever the label set is; the loss takes them.

        Raises:
            TypeError: If the network ends in a plain classifier.
        """
        return self._semantic_head().embed(self.head(self.forward_features(x)))

    def _semantic_head(self) -> SemanticEmbeddingHead:
        if not isinstance(self.embedding, SemanticEmbeddingHead):
            raise TypeError(
                f'num_classes must be a multiple of text_dim={self.text_dim} for a label set, got {self.num_classes}.')
        return self.embedding

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.embedding

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, in place.

        Args:
            num_classes: Size of the output; 0 for pooled features.
            global_pool: timm's name of a pooling; '' for the feature map, None keeps it.
        """
        super().reset_classifier(0, global_pool)
        weight = next(self.parameters())
        self.embedding = self._new_embedding(num_classes, weight.device, weight.dtype).train(self.training)
        self.num_classes = num_classes
        update_model_args(self, num_rows=None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Rows or scores of an unpooled map; pooled features with `pre_logits`."""
        x = self.head(x)
        return x if pre_logits else self.embedding(x)


class SlopedTResNet(TResNet):
    """timm's TResNet with one slope in all its leaky ReLUs.

    Args:
        layers: Blocks of each stage.
        leaky_slope: The slope.
        **kwargs: Passed to timm's TResNet.
    """

    def __init__(self, layers: list[int], leaky_slope: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(layers, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = leaky_slope


def convert_original_tresnet(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the original repositories' TResNet tensors to timm's, and make BatchNorm of InPlaceABN.

    The original wraps a convolution and its norm in a Sequential, and that in another when a blur follows.
    InPlaceABN scales by |weight| + 1e-5, so that is the weight of the BatchNorm; applied exactly once, here.

    Args:
        state_dict: Tensors of the original layout, such as `body.layer2.0.conv1.0.0.weight`.
        model: A timm TResNet of the same layers.

    Returns:
        The tensors under the model's names. A missing `num_batches_tracked` (absent from old InPlaceABN) is zero; the
        blur's constant filter is dropped.

    Raises:
        CheckpointError: If a key is not of this layout. Missing keys are left to the caller.
    """
    rename = {key: key for key in model.state_dict() if not key.startswith(('head.', 'embedding.'))} | _head_keys(model)
    norm_weights, counters, constants = set(), set(), set()
    for name, module in model.named_modules():
        if not isinstance(module, ConvNormAct):
            continue
        blurred = isinstance(module.aa, BlurPool2d)
        original = f'{name}.0' if blurred else name
        constants |= {f'{name}.1.op.filt'} if blurred else set()
        norm_weights.add(f'{name}.bn.weight')
        counters.add(f'{name}.bn.num_batches_tracked')
        pairs = [('conv.weight', '0.weight'), *((f'bn.{key}', f'1.{key}') for key in NORM_KEYS)]
        for new, old in pairs:
            del rename[f'{name}.{new}']
            rename[f'{original}.{old}'] = f'{name}.{new}'
    unknown = [key for key in state_dict if key not in rename and key not in constants]
    if unknown:
        raise CheckpointError(
            f'{len(unknown)} keys are not of an original TResNet of these layers, the first is {unknown[0]!r}; check '
            f'that the architecture is that of the checkpoint.')
    converted = {rename[key]: tensor for key, tensor in state_dict.items() if key in rename}
    for key in norm_weights & converted.keys():
        converted[key] = converted[key].abs() + ABN_EPS
    for key in counters - converted.keys():
        converted[key] = torch.zeros((), dtype=torch.int64)
    return converted


def _head_keys(model: nn.Module) -> dict[str, str]:
    if isinstance(model, BottleneckTResNet):
        return BOTTLENECK_HEAD
    return SDL_HEAD if isinstance(model, SDLTResNet) else PLAIN_HEAD


def to_timm_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a TResNet file under timm's names, whichever layout they come in.

    Raises:
        CheckpointError: If a key is of neither layout.
    """
    if 'body.conv1.conv.weight' in state_dict:
        return dict(state_dict)
    return convert_original_tresnet(
        {f'body.{key}' if key.startswith(BODY) else key: tensor for key, tensor in state_dict.items()}, model)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names and classes; timm loads the result.

    Args:
        state_dict: What was read from the file, wrappers included, in the original layout or timm's.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    return fit_published(to_timm_names(unwrap(state_dict), model), model)


def _create(model_class: Callable[..., TResNet], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return create_published(
        model_class, variant, pretrained, checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(1, 2, 3, 4), flatten_sequential=True), **kwargs)


def _without_weights(architecture: str) -> PretrainedCfg:
    """timm's configuration of a network, for one of ours that has no published weights under its own name."""
    return replace(get_pretrained_cfg(architecture) or PretrainedCfg(), hf_hub_id=None, architecture=None, tag=None)


default_cfgs = generate_default_cfgs({
    **catalog.pretrained_cfgs('tresnet'),
    **catalog.pretrained_cfgs('sdl'),
    'miil_tresnet_s': _without_weights('tresnet_m'),
    'miil_tresnet_v2_xl': _without_weights('tresnet_v2_l'),
    'miil_tresnet_m_bottleneck': _without_weights('tresnet_m'),
    'miil_tresnet_l_bottleneck': _without_weights('tresnet_l'),
})


@register_model
def miil_tresnet_s(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-S of ML-Decoder's repository, arXiv:2003.13630."""
    model_args = dict(layers=[3, 4, 6, 3])
    return _create(TResNet, 'miil_tresnet_s', pretrained, **dict(model_args, **kwargs))


@register_model
def miil_tresnet_v2_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-XL of ML-Decoder: the v2 layout with 3-8-34-5 bottleneck blocks, arXiv:2111.12933."""
    model_args = dict(layers=[3, 8, 34, 5], width_factor=1.0, v2=True)
    return _create(TResNet, 'miil_tresnet_v2_xl', pretrained, **dict(model_args, **kwargs))


@register_model
def miil_tresnet_v2_l_slope1e6(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-L of the TResNet repository's second layout: leaky slopes of 1e-6, arXiv:2003.13630."""
    model_args = dict(layers=[3, 4, 23, 3], width_factor=1.0, v2=True, leaky_slope=1e-6)
    return _create(SlopedTResNet, 'miil_tresnet_v2_l_slope1e6', pretrained, **dict(model_args, **kwargs))


@register_model
def miil_tresnet_m_bottleneck(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-M with the two-layer head of many classes, arXiv:2009.14119."""
    model_args = dict(layers=[3, 4, 11, 3])
    return _create(BottleneckTResNet, 'miil_tresnet_m_bottleneck', pretrained, **dict(model_args, **kwargs))


@register_model
def miil_tresnet_l_bottleneck(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-L with the two-layer head of many classes, arXiv:2009.14119."""
    model_args = dict(layers=[4, 5, 18, 3], width_factor=1.2)
    return _create(BottleneckTResNet, 'miil_tresnet_l_bottleneck', pretrained, **dict(model_args, **kwargs))


@register_model
def miil_sdl_tresnet_m(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-M to seven rows in word-vector space, arXiv:2105.05926."""
    model_args = dict(layers=[3, 4, 11, 3])
    return _create(SDLTResNet, 'miil_sdl_tresnet_m', pretrained, **dict(model_args, **kwargs))
