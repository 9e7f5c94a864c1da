"""Which pictures to ask a teacher about, when some of its answers are wrong.

The setting is that of Baykal et al., "Robust Active Distillation", arXiv:2210.01213: a student of few labels asks a
teacher about some pictures of many, those that it would learn most from, which are also those that the teacher errs on
most easily.

Deviation: the probabilities are our own solution of a game that fits the paper's description (`robust_query_prob`);
they were not compared with the paper's algorithm, and no claim is made that they are equal.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from timm_miil._checks import check_floating, check_ndim, check_not_negative, check_positive, check_values

__all__ = ['RobustQuerySampler', 'query_gains', 'robust_query_prob']


def query_gains(logits: Tensor) -> Tensor:
    """What is gained by asking about each picture: 1 minus the student's margin.

    Args:
        logits: The student's raw scores, shape (N, C), C at least 2.

    Returns:
        1 - (probability of the likeliest class - that of the next), in [0, 1], float64, shape (N,).

    Raises:
        TypeError: If logits are not floating-point.
        ValueError: If they are not (N, C), or of fewer than two classes.

    Example:
        >>> query_gains(torch.tensor([[2.0, 2.0, -9.0], [9.0, -9.0, -9.0]])).round(decimals=3)
        tensor([1., 0.], dtype=torch.float64)
    """
    check_floating(logits=logits)
    check_ndim(2, logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f'logits must be of two or more classes, got shape {tuple(logits.shape)}.')
    first, second = logits.double().softmax(1).topk(2).values.unbind(1)
    return 1 - (first - second)


def robust_query_prob(gains: Tensor, num_errors: int) -> Tensor:
    """How often to ask about each picture, so that the worst teacher with `num_errors` errors does least harm.

    The game: we draw a picture by p; the teacher errs on m pictures, the worst for us; of the others we gain g. With
    p_i g_i = v on h pictures and p = 0 elsewhere, each error takes the same v away, and we expect (h - m) v, where
    v = 1 / sum of 1 / g_i as p sums to 1. That is largest with the h pictures of largest gain, for

        h = argmax (h - m) / (sum of 1 / g_i over the h largest gains),

    and no other p expects more in the worst case. Pictures of equal gain are treated alike; with m = 0 those of the
    largest gain are asked about, and no others. The scale of the gains does not matter.

    Args:
        gains: What is gained by a right answer on each picture (g), at least 0, shape (N,), as of `query_gains`.
        num_errors: Answers that are taken to be wrong (m), at least 0 and fewer than the pictures of gain above 0.

    Returns:
        Probabilities that sum to 1, float64, shape (N,).

    Raises:
        TypeError: If gains are not floating-point, or `num_errors` is no int.
        ValueError: If gains are not (N,), negative or not finite, or all that is gained may be lost to the errors.

    Example:
        >>> robust_query_prob(torch.tensor([0.1, 0.8, 0.4, 0.8]), num_errors=1)
        tensor([0.0000, 0.2500, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_floating(gains=gains)
    check_ndim(1, gains=gains)
    check_values(gains=gains, low=0.0, high=torch.finfo(gains.dtype).max, hint='query_gains makes them')
    check_not_negative(num_errors=num_errors)
    num_positive = int((gains > 0).sum())
    if num_positive <= num_errors:
        raise ValueError(
            f'num_errors must be below the number of pictures with a gain above 0, got {num_errors} for {num_positive} '
            f'of {len(gains)} pictures; lower it, or give more pictures.')

    cost = -gains.double().log()  # of logarithms, as 1 / g is infinite for tiny gains
    order = cost.sort().values[:num_positive]
    sizes = torch.arange(1, num_positive + 1, device=gains.device)
    value = (sizes - num_errors).clamp(min=0).log() - order.logcumsumexp(0)
    is_asked = cost <= order[value.argmax()]
    return cost.masked_fill(~is_asked, -math.inf).softmax(0)


class RobustQuerySampler(Sampler[int]):
    """Draws the pictures to ask a teacher about, each once, by `robust_query_prob`.

    It needs no training loop of ours: give it to a `DataLoader` of the pictures without labels.

    Args:
        gains: As of `robust_query_prob`.
        num_errors: As of `robust_query_prob`. The larger it is, the more pictures come into question.
        num_queries: Pictures to draw, at least 1, each at most once: one after the other, by the probabilities that are
            left.
        generator: Source of the draws; each iteration draws anew from it. None takes torch's global one.

    Attributes:
        prob: The probabilities, float64 in host memory, shape (N,).

    Raises:
        TypeError: As `robust_query_prob`, or if `num_queries` is no int.
        ValueError: As `robust_query_prob`, or if fewer pictures than `num_queries` come into question.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> pictures, generator = torch.randn(100, 8), torch.Generator().manual_seed(0)
        >>> student, teacher = nn.Linear(8, 3), nn.Linear(8, 3)  # two trained networks
        >>> gains = query_gains(student(pictures).detach())
        >>> sampler = RobustQuerySampler(gains, num_errors=20, num_queries=16, generator=generator)
        >>> for (batch,) in DataLoader(TensorDataset(pictures), batch_size=8, sampler=sampler):
        ...     targets = teacher(batch).softmax(1)  # the answers that the student learns next
        >>> targets.shape
        torch.Size([8, 3])
    """

    def __init__(
            self, gains: Tensor, num_errors: int, num_queries: int, *, generator: torch.Generator | None = None,
    ) -> None:
        check_positive(num_queries=num_queries)
        self.prob = robust_query_prob(gains, num_errors).cpu()
        self.num_queries = num_queries
        self.generator = generator
        num_asked = int((self.prob > 0).sum())
        if num_queries > num_asked:
            raise ValueError(
                f'num_queries must be at most the number of pictures that come into question, got {num_queries} for '
                f'{num_asked}, with num_errors {num_errors}; raise num_errors, or ask less at a time.')

    def __len__(self) -> int:
        return self.num_queries

    def __iter__(self) -> Iterator[int]:
        # The first of exponential clocks at these rates: torch.multinomial ends at 2^24 pictures.
        clocks = torch.empty_like(self.prob).exponential_(generator=self.generator) / self.prob
        yield from clocks.topk(self.num_queries, largest=False).indices.tolist()
