"""A case made ready to run."""
import contextlib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil.bench.cases import Case
from timm_miil.bench.roofline import float32_products
from timm_miil.bench.timing import Run

__all__ = ['Optimize', 'UnsupportedCase', 'build_model', 'build_run', 'is_out_of_memory', 'room_to_compile']

Optimize = Callable[..., nn.Module]  # (model, dtype=..., channels_last=..., example_input=...) -> model
COMPILED_FORMS = 256
OUT_OF_MEMORY_WORDS = "can't allocate memory", 'not enough memory', 'out of memory'


class UnsupportedCase(RuntimeError):
    """This device, or what was given to the measurement, has no such form of a network."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, of an accelerator or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def build_model(case: Case) -> nn.Module:
    """The plain network of a case, with random weights, in evaluation mode on the CPU."""
    args: dict[str, Any] = dict(case.model_args)
    try:
        model = timm.create_model(case.model, img_size=case.image_size, **args)
    except TypeError as error:
        if 'img_size' not in str(error):  # networks of convolutions take no size
            raise
        model = timm.create_model(case.model, **args)
    return model.eval()


def build_run(case: Case, device: torch.device, *, optimize: Optimize | None = None) -> Run:
    """What runs one batch of a case.

    Args:
        case: What to run.
        device: Where.
        optimize: Makes the 'optimized' variant: called with the network on the device, `dtype`, `channels_last` and an
            `example_input`.

    Raises:
        UnsupportedCase: If the case cannot be run there.
    """
    _check_supported(case, device, optimize)
    model, dtype = build_model(case).to(device), torch.bfloat16 if case.precision == 'bf16' else torch.float32
    memory_format = torch.channels_last if case.layout == 'nhwc' else torch.contiguous_format
    if case.variant == 'optimized' and optimize is not None:
        model = optimize(
            model, dtype=None if dtype == torch.float32 else dtype, channels_last=case.layout == 'nhwc',
            example_input=torch.rand(1, 3, case.image_size, case.image_size, device=device))
    else:
        model = model.to(dtype=dtype).to(memory_format=memory_format)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device).to(
        dtype, memory_format=memory_format)
    step = _training_step(model, images, case) if case.phase == 'training' else _forward(model, images, case)

    def run() -> object:
        with float32_products(device, case.precision):
            return step()
    return run


def room_to_compile() -> contextlib.AbstractContextManager[object]:
    """Every form is compiled while it is entered: past its limit of eight the compiler would run others eager."""
    from torch._dynamo import config  # a second of imports that eager cases do without
    wanted = {
        'recompile_limit': COMPILED_FORMS, 'cache_size_limit': COMPILED_FORMS,  # the second until torch 2.7
        'fail_on_recompile_limit_hit': True, 'fail_on_cache_limit_hit': True}
    known = {name: value for name, value in wanted.items() if hasattr(config, name)}
    manager: contextlib.AbstractContextManager[object] = config.patch(known)
    return manager


def _check_supported(case: Case, device: torch.device, optimize: Optimize | None) -> None:
    if device.type != 'cuda' and case.precision == 'tf32':
        raise UnsupportedCase(f'tf32 is of CUDA devices, not of {device.type}')
    if device.type != 'cuda' and case.mode == 'graphs':
        raise UnsupportedCase(f'graphs are of CUDA devices, not of {device.type}')
    if case.phase == 'training' and case.mode == 'graphs':
        raise UnsupportedCase('graphs are measured in inference only')
    if case.variant == 'optimized' and case.phase == 'training':
        raise UnsupportedCase('optimized networks are for inference')
    if case.variant == 'optimized' and optimize is None:
        raise UnsupportedCase('no function was given that optimizes')


def _autocast(images: Tensor, case: Case) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=case.precision == 'amp_bf16')


def _forward(model: nn.Module, images: Tensor, case: Case) -> Run:
    net = torch.compile(model, dynamic=False) if case.mode == 'compile' else model

    def run() -> object:
        with torch.no_grad(), _autocast(images, case):
            return net(images)
    return _captured(run) if case.mode == 'graphs' else run


def _captured(run: Run) -> Run:
    """A CUDA graph of the run, captured after three runs beside the current stream, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        return result
    return replay


def _training_step(model: nn.Module, images: Tensor, case: Case) -> Run:
    model.train()
    net = torch.compile(model, dynamic=False) if case.mode == 'compile' else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    with torch.no_grad(), _autocast(images, case):
        targets = torch.zeros_like(model(images), dtype=torch.float32)

    def run() -> object:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(images, case):
            logits = net(images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return run
