"""Batch norm and leaky ReLU that keep their output for the backward pass, not their input: less memory in training.

Rota Bulò et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", arXiv:1712.02616, the variant
that inverts the affine map and the activation.

Deviations: scales may have any sign and any size, so that the network is the one with timm's norms. Where a scale is
too small beside its shift to be inverted, that channel keeps its input.
"""
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ['InplaceNormAct2d', 'convert_to_inplace_norm']

# Of an inverted channel, |shift / scale|: inverting multiplies the rounding of the output by at most 1 + this.
MAX_SHIFT = 16


class InplaceNormAct2d(BatchNormAct2d):
    """timm's `BatchNormAct2d`, with the same keys and outputs, that keeps its output instead of its input.

    The operation that comes next, such as a convolution, keeps that output too, so that one feature map is kept where
    there were two. If nothing else keeps it, as before a residual sum, nothing is saved. Channels with
    |weight| <= |bias| / 16, weight 0 among them, keep their input besides; in float16 also those of weights below 0.06
    with a slope of 0.001. The norm without an activation keeps all of its input where most channels are such: so do the
    last norms of residual branches, which start with weight 0, until they have learnt.

    The input is recovered with the rounding of the output, up to 17 times as large. Against a layer in float64, the
    input's gradient is as exact as timm's. The weight's is within 1e-6 in float32; in bfloat16 within 1 % where biases
    are as large as weights and 5 % where they are 16 times as large, and timm's within 1e-5.

    - Which channels keep their input is asked of the device at each pass, which waits for the answer.
    - On a GPU the kernel is torch's own, where timm's layer may run cuDNN's: outputs differ by rounding.
    - `torch.compile`, `torch.jit.trace` and passes without gradients run timm's layer: a compiler decides itself what
      to keep.
    - The output must not be written to before the backward pass (`y += shortcut`, `nn.ReLU(inplace=True)` on it): torch
      refuses that. Second derivatives are refused too.
    - timm's `convert_sync_batchnorm` makes its `SyncBatchNormAct` of it: right, but nothing is saved any more.

    Args:
        num_features: Channels C.
        act_layer: Makes a leaky ReLU.
        **kwargs: As of `BatchNormAct2d`, such as `apply_act=False` for no activation.

    Raises:
        ValueError: If the activation is neither none nor a leaky ReLU of a slope above 0, or there is dropout, or the
            norm has no weight.

    Example:
        >>> norm = InplaceNormAct2d(16, act_layer=nn.LeakyReLU)
        >>> norm(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, num_features: int, *, act_layer: Any = nn.LeakyReLU, **kwargs: Any) -> None:
        super().__init__(num_features, act_layer=act_layer, **kwargs)
        if not _can_be_inverted(self):
            raise ValueError(
                f'the norm must have a weight, no dropout, and a LeakyReLU of a slope above 0 or apply_act=False, got '
                f'{self}.')

    def forward(self, x: Tensor) -> Tensor:
        """Features of the shape, dtype and memory format of x (B, C, H, W)."""
        batch_statistics = self.training or self.running_mean is None
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        # Refused by timm's layer, in its words.
        is_wrong = x.ndim != 4 or x.shape[1] != self.num_features or batch_statistics and x.numel() <= x.shape[1]
        if is_traced or is_wrong or x.is_meta or not x.numel() or not torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean of all batches
                momentum = 1 / float(self.num_batches_tracked)
        has_use = self.track_running_stats or not self.training
        mean, variance = (self.running_mean, self.running_var) if has_use else (None, None)
        return cast(Tensor, _NormAct.apply(
            x, self.weight, self.bias, mean, variance, batch_statistics, momentum or 0.0, self.eps, _slope(self)))


def convert_to_inplace_norm(model: nn.Module) -> int:
    """Make the norms of a network keep their outputs, in place; what it computes stays the same.

    Converted are timm's `BatchNormAct2d` with a leaky ReLU or without an activation, such as all of TResNet's; see
    `InplaceNormAct2d` for what is saved. Parameters, buffers, hooks and keys stay.

    Args:
        model: Network whose parts are converted.

    Returns:
        The number of converted norms.

    Raises:
        ValueError: If there is nothing to convert.

    Example:
        >>> from timm.models import create_model
        >>> convert_to_inplace_norm(create_model('tresnet_m'))
        60
    """
    found = [module for module in model.modules() if type(module) is BatchNormAct2d and _can_be_inverted(module)]
    if not found and not any(isinstance(module, InplaceNormAct2d) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no norm that could be converted; take a network of timm's BatchNormAct2d with "
            f'leaky ReLUs, such as TResNet, before its norms become those of many processes.')
    for module in found:
        module.__class__ = InplaceNormAct2d
    return len(found)


def _can_be_inverted(norm: BatchNormAct2d) -> bool:
    is_leaky = type(norm.act) is nn.LeakyReLU and norm.act.negative_slope > 0
    return (is_leaky or type(norm.act) is nn.Identity) and type(norm.drop) is nn.Identity and norm.affine


def _slope(norm: BatchNormAct2d) -> float:
    return norm.act.negative_slope if isinstance(norm.act, nn.LeakyReLU) else 1.0


class _NormAct(torch.autograd.Function):
    """y = leaky(z) of z = weight * normalized(x) + bias.

    The gradient is that of torch's kernel, which is given z in the place of x, as a map of mean `bias` and deviation
    |weight|. What it makes of that is normalized(x) but for the weight's sign, which its gradient gets afterwards; the
    weight that the kernel is told puts the factor of the input's gradient right.
    """

    @staticmethod
    def forward(
            ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
            training: bool, momentum: float, eps: float, slope: float) -> Tensor:
        y, mean, inv_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps)
        if running_mean is not None and running_var is not None and not training:
            mean, inv_std = running_mean, (running_var + eps).rsqrt()
        if slope != 1:
            F.leaky_relu_(y, slope)

        # Below the smallest normal number a slope's product has lost digits: of float16, soon.
        limit = (bias.abs() / MAX_SHIFT).clamp(min=torch.finfo(y.dtype).smallest_normal / slope)
        is_lost = weight.abs() <= limit
        lost = is_lost.nonzero().flatten()
        keeps_all = slope == 1 and 2 * len(lost) > len(weight)
        if keeps_all:
            is_lost = torch.ones_like(is_lost)
        scale = weight.abs()
        ctx.training, ctx.slope = training, slope
        ctx.save_for_backward(
            None if keeps_all else y,
            x if keeps_all else x.index_select(1, lost) if len(lost) else None,
            lost,
            torch.where(is_lost, mean, bias.to(mean.dtype)),
            torch.where(is_lost, inv_std, (1 / scale).to(inv_std.dtype)),
            torch.where(is_lost, weight, scale * weight * inv_std.to(weight.dtype)),
            torch.where(is_lost, 1, weight.sign()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, lost, mean, inv_std, weight, sign = ctx.saved_tensors
        z = x if y is None else y
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
            z = F.leaky_relu(y, 1 / ctx.slope)
        if y is not None and x is not None:
            z = (z.clone() if z is y else z).index_copy_(1, lost, x)  # in the memory format of z, unlike index_copy
        for_x, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            grad, z, weight, mean, inv_std.square().reciprocal(), mean, inv_std, ctx.training, 0.0,
            ctx.needs_input_grad[:3])
        if for_weight is not None:
            for_weight = for_weight * sign
        return for_x, for_weight, for_bias, None, None, None, None, None, None
