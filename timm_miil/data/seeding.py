"""Random numbers that a block of code owns, while the caller's generators stay as they were."""
import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ['kept_generators', 'mix_seed', 'seed_generators', 'seeded']


def mix_seed(*parts: int) -> int:
    """One seed in [0, 2**32) out of several numbers, such as a run's seed, the epoch and a picture's index."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), 'little')


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (CPU) back after a block. It takes most of a millisecond."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU).

    Args:
        seed: In [0, 2**32).
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every accelerator too


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) for a block, and put them back after it.

    timm's augmentations and initialisations draw from these, so this is how they are made repeatable without
    configuring anything for the caller.

    Args:
        seed: In [0, 2**32).
    """
    with kept_generators():
        seed_generators(seed)
        yield
