"""The largest batch that memory holds, and what else stops it."""
import dataclasses
import itertools

import pytest
import torch

from timm_miil import bench
from timm_miil.bench import Case, contestants, measuring

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')
TINY = Case(model='test_resnet', image_size=32)


@pytest.mark.parametrize('limit', [1, 2, 7, 8, 100])
@pytest.mark.parametrize('most', [0, 1, 5, 8, 63, 1000])
def test_the_largest_batch_is_found(limit, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most
    assert bench.find_largest_batch(fits, limit=limit) == min(limit, most)
    assert max(tried) <= limit and len(tried) == len(set(tried)) <= 15


def test_the_largest_batch_of_a_network():
    row = bench.search_batch(TINY, CPU, limit=3)
    assert (row['status'], row['batch_size'], row['note']) == ('ok', 3, 'largest batch of those up to 3')
    row = bench.search_batch(Case(model='no_such_network'), CPU, limit=3)
    assert row['status'] == 'failed' and row['batch_size'] == 1
    with pytest.raises(ValueError, match='limit must be at least 1'):
        bench.search_batch(TINY, CPU, limit=0)


class Card:
    """Steps of a network that asks for memory at the second one, and for an index that is too large."""

    def __init__(self, most: int, most_indexed: int) -> None:
        self.most, self.most_indexed = most, most_indexed

    def __call__(self, case, device, *, optimize):
        steps = itertools.count()

        def run():
            if case.batch_size > self.most_indexed:
                raise RuntimeError('index is too large')
            if next(steps) and case.batch_size > self.most:
                raise torch.OutOfMemoryError('CUDA out of memory.')
        return run


@pytest.mark.parametrize(('card', 'size', 'note'), [
    (Card(5, 100), 5, 'largest batch of those up to 64'),
    (Card(100, 6), 6, '7: RuntimeError: index is too large')])
def test_the_largest_batch_holds_a_second_step_and_survives_other_limits(card, size, note, monkeypatch):
    monkeypatch.setattr(measuring, 'build_run', card)
    row = bench.search_batch(TINY, CPU, limit=64)
    assert (row['status'], row['batch_size'], row['note']) == ('ok', size, note)


def test_sizes_of_a_search_are_compiled_one_by_one(quick_compiler, monkeypatch):
    monkeypatch.setattr(contestants, 'COMPILED_FORMS', 1)
    assert bench.search_batch(dataclasses.replace(TINY, mode='compile'), CPU, limit=3)['batch_size'] == 3
