"""Whether float32 products of a CUDA device are exact or of TF32 inputs."""
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ['float32_products']


@contextlib.contextmanager
def float32_products(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """While it is entered, float32 products and convolutions of a CUDA device are of TF32 inputs or exact."""
    if device.type != 'cuda':
        yield
        return
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    name: str = 'allow_tf32'
    value: object = tf32
    if hasattr(products, 'fp32_precision'):  # torch 2.9 and later, which refuses to mix the two
        convolutions, name, value = convolutions.conv, 'fp32_precision', 'tf32' if tf32 else 'ieee'
    backends = products, convolutions
    before = [getattr(backend, name) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, name, value)
        yield
    finally:
        for backend, old in zip(backends, before):
            setattr(backend, name, old)
