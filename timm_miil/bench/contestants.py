"""A case made ready to run."""
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._tf32 import float32_products
from timm_miil.bench.cases import Case
from timm_miil.bench.timing import Run, current

__all__ = [
    'Optimize', 'UnsupportedCase', 'build_model', 'build_run', 'compiled_or_failed', 'free_memory',
    'is_out_of_memory']

Optimize = Callable[..., nn.Module]  # (model, dtype=..., device=..., channels_last=..., example_input=...) -> model
COMPILED_FORMS = 256  # of one class, at a time
OUT_OF_MEMORY_WORDS = "can't allocate memory", 'not enough memory', 'out of memory'


class UnsupportedCase(RuntimeError):
    """This device, or what was given to the measurement, has no such form of a network."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, of an accelerator or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


@contextlib.contextmanager
def compiled_or_failed(device: torch.device) -> Iterator[None]:
    """For building and running cases: what is compiled stays so, and a CUDA device is the current one.

    By itself torch runs networks of a class eagerly, without a word, once it has compiled eight of them. What cases
    before have left, compiled or in memory, is dropped first.
    """
    from torch._dynamo import config  # seconds of import
    torch.compiler.reset()
    free_memory(device)
    names = ('recompile_limit', 'fail_on_recompile_limit_hit')
    if not hasattr(config, names[0]):  # torch 2.6
        names = ('cache_size_limit', 'fail_on_cache_limit_hit')
    with current(device), config.patch(dict(zip(names, (COMPILED_FORMS, True)))):
        yield


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses any more."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def build_model(case: Case) -> nn.Module:
    """The plain network of a case, with random weights, in evaluation mode on the CPU."""
    args: dict[str, Any] = dict(case.model_args)
    try:
        model = timm.create_model(case.model, img_size=case.image_size, **args)
    except TypeError as error:  # networks of convolutions take no size
        if 'img_size' not in str(error):
            raise
        model = timm.create_model(case.model, **args)
    return model.eval()


def build_run(case: Case, device: torch.device, *, optimize: Optimize | None = None) -> Run:
    """What runs one batch of a case.

    Args:
        case: What to run.
        device: Where.
        optimize: Makes the 'optimized' variant: called with the network on the device, `dtype`, `device`,
            `channels_last` and `example_input`. A CUDA device's peak of memory is reset when it is done.

    Raises:
        UnsupportedCase: If the case cannot be run there.
    """
    _check_supported(case, device, optimize)
    model, dtype = build_model(case), torch.bfloat16 if case.precision == 'bf16' else torch.float32
    memory_format = torch.channels_last if case.layout == 'nhwc' else torch.contiguous_format
    if case.variant == 'optimized' and optimize is not None:
        example = torch.rand(1, 3, case.image_size, case.image_size, device=device)
        model = optimize(
            model.to(device), dtype=None if dtype == torch.float32 else dtype, device=device,
            channels_last=case.layout == 'nhwc', example_input=example)
    else:
        model = model.to(device, dtype).to(memory_format=memory_format)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device).to(
        dtype, memory_format=memory_format)
    step = _training_step(model, images, case) if case.phase == 'training' else _forward(model, images, case)

    def run() -> object:
        with float32_products(device, tf32=case.precision == 'tf32'):
            return step()
    return run


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
        targets = torch.zeros_like(model(images), dtype=torch.float32)  # by `net` it would be compiled twice

    def run() -> object:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(images, case):
            logits = net(images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return run
