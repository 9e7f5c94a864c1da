"""What the machine can do at most, and what a network asks of it at least.

The roofline model (Williams et al., 2009): work can end no sooner than its arithmetic at the machine's measured rate of
matrix products, nor than its bytes at the measured bandwidth of a copy.
"""
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_miil._tf32 import float32_products
from timm_miil.bench.cases import Case
from timm_miil.bench.timing import Clock, Run, clock_of, current

__all__ = ['Ceilings', 'Cost', 'count_cost', 'measure_ceilings', 'roofline_seconds']

MATRIX_OPS = frozenset({'convolution', 'addmm', 'mm', 'bmm', 'baddbmm', 'linear'})
DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'amp_bf16': torch.bfloat16, 'bf16': torch.bfloat16}
TRAINING_FACTOR = 3  # a backward pass makes two products, and two transfers, for each of the forward pass


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Attributes:
        copy_gb_s: Bytes read and written by a large copy, in GB/s.
        tflops: Precision -> floating-point operations of a large matrix product, in 10^12 a second.
    """

    copy_gb_s: float
    tflops: dict[str, float]

    def product_tflops(self, precision: str) -> float:
        """The rate of a case's precision; autocast's products are those of bfloat16."""
        return self.tflops['bf16' if precision == 'amp_bf16' else precision]


@dataclass(frozen=True)
class Cost:
    """What a forward pass of one image asks for.

    Attributes:
        flops: Floating-point operations of convolutions and matrix products; a multiply and an add are two.
        outputs: Elements that these write.
        parameters: Elements of the weights.
    """

    flops: int
    outputs: int
    parameters: int


def measure_ceilings(
        device: torch.device, *, precisions: Sequence[str] = ('fp32', 'bf16'), seconds: float = 1.0) -> Ceilings:
    """Measure the limits of a device, by the fastest of ten runs or more.

    Args:
        device: Where; the CPU with the threads that torch has now.
        precisions: Of those of a `Case`; 'amp_bf16' has the rate of 'bf16'.
        seconds: How long each limit is tried at least: on a shared machine a moment may be a bad one.
    """
    is_small = device.type == 'cpu'
    clock = clock_of(device)
    width = 1024 if is_small else 8192
    rates = {}
    with current(device):
        source = torch.ones(2 ** (24 if is_small else 28), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_seconds = _fastest(clock, lambda: target.copy_(source), seconds)
        for precision in precisions:
            # Random: equal bits switch so little that a card runs at a higher clock than any network sees.
            matrix = torch.randn(width, width, dtype=DTYPES[precision], device=device)
            with float32_products(device, tf32=precision == 'tf32'):
                taken = _fastest(clock, lambda: matrix @ matrix, seconds)
            rates[precision] = 2 * width ** 3 / taken / 1e12
    return Ceilings(2 * source.numel() / copy_seconds / 1e9, rates)


def _fastest(clock: Clock, run: Run, seconds: float) -> float:
    end, times = time.monotonic() + seconds, [clock(run) for _ in range(10)]
    while time.monotonic() < end:
        times.append(clock(run))
    return min(times)


def count_cost(model: nn.Module, images: Tensor) -> Cost:
    """Count what a forward pass asks for, by running it.

    Args:
        model: In evaluation mode, in float32 on the CPU.
        images: Shape (1, 3, H, W).
    """
    flops, outputs = FlopCounterMode(display=False), _OutputCounter()
    with torch.no_grad(), flops, outputs:
        model(images)
    return Cost(flops.get_total_flops(), outputs.elements, sum(weight.numel() for weight in model.parameters()))


class _OutputCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in MATRIX_OPS:
            self.elements += result.numel()
        return result


def roofline_seconds(cost: Cost, case: Case, ceilings: Ceilings) -> float:
    """The least seconds a batch can take.

    The bytes are each output of a convolution or matrix product written and read once, and the weights read once;
    a training step is counted as three forward passes.

    Args:
        cost: Of one image.
        case: Gives the batch size, the precision and the phase.
        ceilings: Of the device, with the rate of the case's precision.
    """
    rate = ceilings.product_tflops(case.precision) * 1e12
    width = DTYPES[case.precision].itemsize
    elements = 2 * cost.outputs * case.batch_size + cost.parameters
    least = max(cost.flops * case.batch_size / rate, elements * width / (ceilings.copy_gb_s * 1e9))
    return least * (TRAINING_FACTOR if case.phase == 'training' else 1)
