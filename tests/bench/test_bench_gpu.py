"""The room on a CUDA device."""
import dataclasses

import pytest
import torch

from timm_miil import bench, inference
from timm_miil.bench import Case, device_work, plan_groups

pytestmark = pytest.mark.gpu

CARD = torch.device('cuda', 0)
TINY = Case(model='test_resnet', image_size=64)


@pytest.mark.parametrize('batch_size', [1, 2])
def test_every_form_runs_on_a_gpu(batch_size):
    groups = plan_groups(
        [TINY], phases=bench.PHASES, batch_sizes=(batch_size,), variants=bench.VARIANTS,
        precisions=bench.PRECISIONS, layouts=('nhwc',), modes=bench.MODES)
    result = bench.measure_groups(groups, CARD, seconds=0.1, optimize=inference.optimize_for_inference)
    for row in result.rows:
        is_told = row['phase'] == 'training' and row['mode'] == 'graphs'
        assert row['status'] == ('unsupported' if is_told else 'ok'), row
        assert is_told or row['peak_mib'] > 0
        assert row['gpu'] == torch.cuda.get_device_name(CARD) and row['driver']


def test_queued_work_is_timed_by_the_device():
    matrix = torch.randn(4096, 4096, device=CARD)
    taken = [device_work(lambda times=times: [matrix @ matrix for _ in range(times)]) for times in (8, 8, 32)]
    assert taken[2] / taken[1] == pytest.approx(4, rel=0.3)  # the first warms up


def test_operators_of_a_gpu_have_their_kernels_time_once():
    rows = bench.profile_case(TINY, CARD, top=1000)
    assert sum(row['share'] for row in rows) == pytest.approx(1, abs=0.02)
    assert all(row['operator'].startswith('aten::') for row in rows[:3])


def test_a_replayed_graph_is_listed_by_kernel():
    rows = bench.profile_case(dataclasses.replace(TINY, mode='graphs'), CARD, top=3)
    assert len(rows) == 3 and all(row['self_ms'] > 0 for row in rows)


@pytest.mark.parametrize('phase', bench.PHASES)
def test_the_largest_batch_of_a_gpu(phase):
    row = bench.search_batch(dataclasses.replace(TINY, phase=phase), CARD, limit=5)
    assert (row['status'], row['batch_size']) == ('ok', 5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two cards')
def test_the_device_of_a_case_is_the_current_one():
    last, seen = torch.device('cuda', torch.cuda.device_count() - 1), []

    def optimize(model, **settings):
        seen.append(torch.cuda.current_device())
        return model
    case = dataclasses.replace(TINY, variant='optimized')
    result = bench.measure_groups([[case]], last, seconds=0.1, optimize=optimize)
    bench.search_batch(case, last, limit=1, optimize=optimize)
    bench.profile_case(case, last, optimize=optimize)
    assert result.rows[0]['status'] == 'ok' and set(seen) == {last.index} and torch.cuda.current_device() == 0
