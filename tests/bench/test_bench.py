"""Measurements of tiny networks: a row each whatever happens, resumed after a kill, compared with an earlier table."""
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_miil import bench
from timm_miil.bench import Case, Ceilings, Cost, Journal, contestants, environment, measuring, plan_groups

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')
CEILINGS = Ceilings(copy_gb_s=10.0, tflops={'fp32': 0.1, 'bf16': 0.1})
TINY = Case(model='test_resnet', image_size=32)


def measure(*cases, **settings):
    return bench.measure_group(cases, CPU, **{'ceilings': CEILINGS, 'seconds': 0.01} | settings)


def test_a_group_has_its_baseline_first_whether_or_not_it_was_asked_for():
    [group] = plan_groups(['resnet50'], variants=('optimized',), precisions=('bf16', 'fp32'), layouts=('nhwc',))
    assert [case.form for case in group] == [
        'plain bf16 nchw eager', 'optimized bf16 nhwc eager', 'optimized fp32 nhwc eager']


def test_combinations_are_grouped_by_model_phase_and_size():
    groups = plan_groups(
        ['resnet18', 'resnet50'], phases=bench.PHASES, layouts=bench.LAYOUTS, image_sizes=(64, 96), batch_sizes=(1, 2))
    assert len(groups) == 2 * 2 * 2 * 2
    assert all(len({(c.model, c.phase, c.image_size, c.batch_size) for c in group}) == 1 for group in groups)
    assert all([case.layout for case in group] == ['nchw', 'nhwc'] for group in groups)


@pytest.mark.parametrize('wrong', [
    {'phase': 'test'}, {'variant': 'x'}, {'precision': 'fp8'}, {'layout': 'nc'}, {'mode': 'jit'}, {'batch_size': 0},
    {'image_size': 0}])
def test_a_wrong_case_is_told(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f'{name} must be'):
        Case(model='resnet18', **wrong)


def test_rows_have_the_figures_of_their_medians():
    cases = [dataclasses.replace(TINY, layout=layout, batch_size=2) for layout in bench.LAYOUTS]
    rows = measure(*cases)
    assert [tuple(row) for row in rows] == [bench.COLUMNS] * 2
    for row in rows:
        assert row['status'] == 'ok' and row['baseline'] == 'plain fp32 nchw eager'
        assert row['images_per_second'] == pytest.approx(2000 / row['median_ms'], rel=1e-3)
        assert row['of_roofline'] == pytest.approx(row['roofline_ms'] / row['median_ms'], rel=1e-2)
        assert row['q1_ms'] <= row['median_ms'] <= row['q3_ms'] and row['repeats'] >= 5
    assert rows[0]['ratio'] == 1.0 and rows[1]['ratio'] > 0


def test_training_steps_are_measured_and_counted_three_times():
    pair = dataclasses.replace(TINY, batch_size=2)
    [forward], [step] = measure(pair), measure(dataclasses.replace(pair, phase='training'))
    assert step['status'] == 'ok'
    assert step['gflops_per_image'] == pytest.approx(3 * forward['gflops_per_image'], rel=1e-3)
    assert step['median_ms'] > forward['median_ms']


def test_what_the_device_has_not_is_a_row():
    rows = measure(
        TINY, dataclasses.replace(TINY, mode='graphs'), dataclasses.replace(TINY, precision='tf32'),
        dataclasses.replace(TINY, variant='optimized'))
    assert [row['status'] for row in rows] == ['ok', 'unsupported', 'unsupported', 'unsupported']
    assert rows[1]['note'] == 'graphs are of CUDA devices, not of cpu'


def test_memory_that_is_lacking_is_a_row():
    [row] = measure(Case(model='test_resnet', image_size=32, batch_size=2 ** 40))
    assert row['status'] == 'out_of_memory' and row['median_ms'] == ''


class Room:
    """Holds so many networks at once, as a small card does."""

    def __init__(self, most: int) -> None:
        self.most, self.alive, self.asked = most, weakref.WeakSet(), 0

    def __call__(self, model, **settings):
        self.asked += 1
        if len(self.alive) == self.most:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        self.alive.add(model)
        return model


@pytest.mark.parametrize(('most', 'status', 'are_first'), [
    (3, 'ok', [True, False, False]), (2, 'ok', [True, False, False]), (1, 'ok', [True, True, True]),
    (0, 'out_of_memory', [False, False, False])])
def test_what_fits_alone_is_measured_with_the_first_or_alone(most, status, are_first):
    case = dataclasses.replace(TINY, variant='optimized')
    cases = [dataclasses.replace(case, image_size=size) for size in (32, 48, 64)]
    room = Room(most)
    rows = measure(*cases, optimize=room)
    assert [row['status'] for row in rows] == [status] * 3
    assert most or room.asked == 3 + 1 + 2 * 3  # all, the first alone, the others as a pair whose first fails and alone
    assert [row['image_size'] for row in rows] == [32, 48, 64]
    assert [row['ratio'] == 1.0 for row in rows] == are_first


def test_networks_take_turns_and_each_has_its_own_roofline():
    rows = measure(TINY, dataclasses.replace(TINY, model='test_vit', image_size=160))
    assert [row['baseline'] for row in rows] == ['plain fp32 nchw eager', 'test_resnet plain fp32 nchw eager']
    alone, = measure(dataclasses.replace(TINY, model='test_vit', image_size=160))
    assert rows[1]['gflops_per_image'] == alone['gflops_per_image'] != rows[0]['gflops_per_image']
    assert rows[1]['ratio'] != 1.0


def test_an_unknown_model_is_a_row():
    [row] = measure(Case(model='no_such_network'))
    assert row['status'] == 'failed' and 'no_such_network' in row['note']


@pytest.mark.parametrize('error', [OSError, KeyError, IndexError, ImportError, ZeroDivisionError])
def test_whatever_a_network_raises_is_a_row(error):
    def optimize(model, **settings):
        raise error('of some kind')
    rows = measure(TINY, dataclasses.replace(TINY, variant='optimized'), optimize=optimize)
    assert [row['status'] for row in rows] == ['ok', 'failed']
    assert 'of some kind' in rows[1]['note'] and error.__name__ in rows[1]['note']


def test_an_error_of_building_a_network_is_not_taken_for_one_of_its_size(monkeypatch):
    def create(name, **args):
        if 'img_size' in args:
            raise TypeError('its windows are of no size')
        return nn.Identity()
    monkeypatch.setattr(timm, 'create_model', create)
    [row] = measure(TINY)
    assert row['status'] == 'failed' and 'its windows are of no size' in row['note']


COMPILED = [dataclasses.replace(TINY, mode='compile', layout=layout) for layout in bench.LAYOUTS]


def test_every_compiled_form_of_a_class_is_compiled(quick_compiler):
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        rows = measure(*COMPILED)
    assert [row['status'] for row in rows] == ['ok', 'ok']


def test_a_form_that_would_run_eagerly_for_a_compiled_one_is_a_failure(quick_compiler, monkeypatch):
    monkeypatch.setattr(contestants, 'COMPILED_FORMS', 1)
    rows = measure(*COMPILED)
    assert [row['status'] for row in rows] == ['ok', 'failed'] and 'imit' in rows[1]['note']


def test_a_training_step_is_compiled_once(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    [row] = measure(dataclasses.replace(TINY, mode='compile', phase='training', batch_size=2))
    assert row['status'] == 'ok' and len(graphs) == 1


def test_the_optimized_variant_is_what_the_function_makes():
    asked = []

    def optimize(model, **settings):
        asked.append(settings)
        return model.to(settings['dtype'])
    [row] = measure(dataclasses.replace(TINY, variant='optimized', precision='bf16'), optimize=optimize)
    assert row['status'] == 'ok'
    example = asked[0].pop('example_input')
    assert example.shape == (1, 3, 32, 32) and example.device == CPU
    assert asked == [{'dtype': torch.bfloat16, 'device': CPU, 'channels_last': False}]


def test_seconds_are_of_all_that_a_clock_does(monkeypatch):
    def clock(run):
        time.sleep(0.05)  # as by a rehearsal
        return bench.wall(run)
    monkeypatch.setattr(measuring, 'clock_of', lambda device: clock)
    [row] = measure(TINY, seconds=0.5)
    assert 5 <= row['repeats'] <= 10


def test_operations_of_a_known_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16 * 16, 5, bias=False))
    cost = bench.count_cost(model, torch.randn(1, 3, 16, 16))
    assert cost == Cost(
        flops=2 * 16 * 16 * 8 * 27 + 2 * 8 * 16 * 16 * 5, outputs=8 * 16 * 16 + 5, parameters=8 * 27 + 8 * 16 * 16 * 5)


def test_the_roofline_is_the_higher_of_arithmetic_and_bytes():
    case = Case(model='x', batch_size=10)
    bound_by_arithmetic = bench.roofline_seconds(Cost(10 ** 9, 10, 10), case, CEILINGS)
    assert bound_by_arithmetic == pytest.approx(10 * 1e9 / 0.1e12)
    bound_by_bytes = bench.roofline_seconds(Cost(10, 10 ** 6, 10 ** 7), case, CEILINGS)
    assert bound_by_bytes == pytest.approx((2 * 10 * 1e6 + 1e7) * 4 / 10e9)
    training = Case(model='x', batch_size=10, phase='training')
    assert bench.roofline_seconds(Cost(10 ** 9, 10, 10), training, CEILINGS) == pytest.approx(3 * bound_by_arithmetic)


def test_ceilings_are_of_this_machine():
    ceilings = bench.measure_ceilings(CPU, precisions=('fp32',), seconds=0.1)
    assert 0.1 < ceilings.copy_gb_s < 1e5 and 1e-4 < ceilings.tflops['fp32'] < 1e4


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.spreads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.spreads += [float(value.float().std()) for value in args]
        return func(*args, **(kwargs or {}))


def test_ceilings_multiply_matrices_whose_bits_differ():
    with Products() as seen:
        bench.measure_ceilings(CPU, precisions=('fp32',), seconds=0.0)
    assert len(seen.spreads) == 20 and min(seen.spreads) == pytest.approx(1, rel=0.01)


def test_rows_say_which_ceilings_they_were_compared_with():
    [row, other] = measure(TINY, dataclasses.replace(TINY, precision='amp_bf16'), ceilings=Ceilings(
        copy_gb_s=12.0, tflops={'fp32': 0.1, 'bf16': 0.3}))
    assert (row['copy_gb_s'], row['product_tflops']) == (12.0, 0.1)
    assert (other['copy_gb_s'], other['product_tflops']) == (12.0, 0.3)


def test_a_torn_line_is_cut_and_what_was_measured_is_found(tmp_path):
    file, stamp = tmp_path / 'rows.jsonl', environment()
    Journal(file).add([TINY.columns | {'median_ms': 1.0} | stamp])
    with file.open('a') as opened:
        opened.write('{"phase": "infer')
    journal = Journal(file)
    assert journal.find(TINY.columns, stamp)['median_ms'] == 1.0
    assert journal.find(TINY.columns, stamp | {'torch': '0'}) is None
    journal.add([{'a': 1}])
    assert [json.loads(line) for line in file.read_text().splitlines()][1] == {'a': 1}
    file.write_text('[1]\n')
    with pytest.raises(ValueError, match='one JSON object a line'):
        Journal(file)


def test_what_a_cpu_has_measured_is_measured_again_on_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card {device.index}')
    journal, stamp = Journal(tmp_path / 'rows.jsonl'), environment(CPU)
    journal.add([TINY.columns | stamp])
    assert journal.find(TINY.columns, environment(CPU)) and stamp['gpu'] == stamp['driver'] == ''
    assert journal.find(TINY.columns, environment(torch.device('cuda', 1))) is None


def resume(journal, *cases, optimize=None):
    return bench.measure_groups(
        [cases], CPU, journal=journal, seconds=0.01, ceilings=CEILINGS, optimize=optimize).rows


def test_what_failed_or_lacked_memory_is_tried_again_and_the_rest_is_not(tmp_path):
    journal = Journal(tmp_path / 'rows.jsonl')
    pair = TINY, dataclasses.replace(TINY, variant='optimized')
    assert [row['status'] for row in resume(journal, *pair, optimize=Room(0))] == ['ok', 'out_of_memory']
    assert [row['status'] for row in resume(journal, *pair, optimize=lambda model, **settings: 1 / 0)] == [
        'ok', 'failed']
    done = resume(journal, *pair, optimize=Room(1))
    assert [row['status'] for row in done] == ['ok', 'ok']
    assert resume(journal, *pair) == done and len(journal.rows) == 6
    unsupported = dataclasses.replace(TINY, precision='tf32'), TINY
    again = resume(journal, *unsupported)
    assert resume(journal, *unsupported) == again and [row['status'] for row in again] == ['unsupported', 'ok']
    alone = [dataclasses.replace(pair[1], image_size=size) for size in (32, 48)]
    again = resume(journal, *alone, optimize=Room(1))
    assert resume(journal, *alone) == again and [row['ratio'] for row in again] == [1.0, 1.0]


def test_ratios_to_another_baseline_are_not_taken_from_the_journal(tmp_path):
    journal, bf16 = Journal(tmp_path / 'rows.jsonl'), dataclasses.replace(TINY, precision='bf16')
    assert {row['baseline'] for row in resume(journal, TINY, bf16)} == {'plain fp32 nchw eager'}
    assert {row['baseline'] for row in resume(journal, bf16, TINY)} == {'plain bf16 nchw eager'}


ENDLESS = '''
import sys, torch
from timm_miil.bench import Case, Ceilings, Journal, measure_groups
torch.set_num_threads(1)
groups = [[Case(model='test_resnet', image_size=32, batch_size=size)] for size in range(1, 10000)]
measure_groups(
    groups, torch.device('cpu'), journal=Journal(sys.argv[1]), seconds=0.01,
    ceilings=Ceilings(10.0, {'fp32': 0.1, 'bf16': 0.1}))
'''


def test_a_killed_run_goes_on(tmp_path):
    file = tmp_path / 'rows.jsonl'
    child = subprocess.Popen([sys.executable, '-c', ENDLESS, str(file)], env=os.environ | {'OMP_NUM_THREADS': '1'})
    deadline = time.monotonic() + 120
    while (not file.exists() or file.read_bytes().count(b'\n') < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    journal = Journal(file)
    first, count = journal.rows[0], len(journal.rows)
    groups = [[Case(model='test_resnet', image_size=32, batch_size=size)] for size in range(1, count + 2)]
    result = bench.measure_groups(groups, CPU, journal=journal, seconds=0.01, ceilings=CEILINGS)
    assert result.rows[0] == first
    assert [row['batch_size'] for row in journal.rows] == list(range(1, count + 2))


def test_what_there_is_no_time_for_is_left_out():
    result = bench.measure_groups([[TINY]], CPU, minutes=-1.0, ceilings=CEILINGS)
    assert (result.rows, result.left_out) == ([], [TINY])


def test_tables_are_compared_case_by_case():
    def row(batch_size, *times, status='ok'):
        names = dict(zip(('q1_ms', 'median_ms', 'q3_ms'), times))
        return Case(model='x', batch_size=batch_size).columns | {'status': status} | names
    before = [row(1, 9.0, 10.0, 11.0), row(2, 9.0, 10.0, 11.0), row(3, '', '', '', status='failed')]
    after = [row(1, 11.5, 12.0, 13.0), row(2, 10.9, 12.0, 13.0), row(3, 1.0, 1.0, 1.0), row(4, 1.0, 1.0, 1.0)]
    changes = bench.compare_tables(before, after)
    assert [(change.ratio, change.is_slower) for change in changes] == [(1.2, True), (1.2, False)]
    with pytest.raises(ValueError, match='before must be a table .* without batch_size'):
        bench.compare_tables([{'model': 'x'}], after)


def test_operators_by_time():
    rows = bench.profile_case(TINY, CPU, top=3)
    assert len(rows) == 3
    assert [row['self_ms'] for row in rows] == sorted((row['self_ms'] for row in rows), reverse=True)
    assert all(0 < row['share'] <= 1 and row['calls'] >= 1 for row in rows)
