"""Keys of pictures by their very pixels."""
import numpy as np
import torch
from torch import Tensor

__all__ = ['PictureKeys']

# The counter-based generator splitmix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014):
# keys on a disk must not depend on the version of a library.
_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class PictureKeys:
    """Pictures (B, ...) to keys (B, 2) of 128 bits, as int64, computed where the pictures are.

    A key is two multilinear hashes sum_i r_i w_i mod 2^64 of the 32-bit words w of shape and pixels, with fixed random
    r, independent of each other. Words of two pictures that differ by d_i collide in one of them with probability
    2^(v - 64), where 2^v is the largest power of 2 that divides all d_i: at most 2^-66 in both, and 2^-128 if any
    difference is odd, as it is for all but made-up pictures.

    Pixels are taken as float32, or float64; equal keys mean equal bits, and 0 and -0 are two things.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pictures: Tensor) -> Tensor:
        """Keys of a batch."""
        wide = pictures.detach().to(torch.promote_types(pictures.dtype, torch.float32))
        words = wide.contiguous().flatten(1).view(torch.int32)
        start, first, second = self._known_factors((*pictures.shape[1:],), words)
        return torch.stack([(words * first).sum(1), (words * second).sum(1)], dim=1) + start

    def _known_factors(self, shape: tuple[int, ...], words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (shape, words.shape[1], words.device)
        if key not in self._factors:
            numbers = _random_words(2 * (words.shape[1] + len(shape))).reshape(-1, 2)
            sides = np.array(shape, dtype=np.uint64)[:, None]
            start = (numbers[:len(shape)] * sides).sum(0, dtype=np.uint64)
            parts = (start, *(numbers[len(shape):, hash].copy() for hash in (0, 1)))
            start, first, second = (torch.from_numpy(part.view(np.int64)).to(words.device) for part in parts)
            self._factors[key] = start, first, second
        return self._factors[key]


def _random_words(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX_2)
    return words ^ (words >> np.uint64(31))
