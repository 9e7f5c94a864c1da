"""The harness: who runs when, what the columns say, and where and when it was."""
import subprocess

import torch

from timm_miil.bench import clock_of, compare, environment, itself, processor, timing, wall


def test_each_round_runs_each_contestant_once_in_changing_order():
    ran = []
    contestants = {name: lambda name=name: ran.append(name) for name in 'abc'}
    compare(contestants, repeats=20, warmup=2)
    rounds = [tuple(ran[start:start + 3]) for start in range(0, len(ran), 3)]
    assert len(rounds) == 22
    assert {frozenset(turns) for turns in rounds} == {frozenset('abc')}
    assert len(set(rounds)) == 6


def test_medians_quartiles_and_paired_ratios():
    # The load doubles every round; within a round the second takes three times as long as the first.
    seconds = {'first': iter([99.0, 1.0, 2.0, 4.0, 8.0, 16.0]), 'second': iter([0.0, 3.0, 6.0, 12.0, 24.0, 48.0])}
    contestants = {name: values.__next__ for name, values in seconds.items()}
    rows = compare(contestants, repeats=5, warmup=1, clock=itself, batch_size=64)
    assert rows == [
        {'batch_size': 64, 'contestant': 'first', 'repeats': 5, 'median_ms': 4000.0, 'q1_ms': 2000.0, 'q3_ms': 8000.0,
         'ratio': 1.0, 'ratio_q1': 1.0, 'ratio_q3': 1.0},
        {'batch_size': 64, 'contestant': 'second', 'repeats': 5, 'median_ms': 12000.0, 'q1_ms': 6000.0,
         'q3_ms': 24000.0, 'ratio': 3.0, 'ratio_q1': 3.0, 'ratio_q3': 3.0},
    ]


def test_the_wall_clock_gives_seconds(monkeypatch):
    now = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(now))
    assert wall(lambda: None) == 2.5


def test_more_threads_are_timed_on_the_wall():
    before = torch.get_num_threads()
    try:
        for threads, clock in ((1, processor), (2, wall)):
            torch.set_num_threads(threads)
            assert clock_of(torch.device('cpu')) is clock
    finally:
        torch.set_num_threads(before)


def test_the_card_is_of_the_device_and_a_processor_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: f'card {device and device.index}')
    assert environment(torch.device('cuda', 1))['gpu'] == 'card 1'
    stamp = environment()
    assert stamp['gpu'] == stamp['driver'] == ''


def test_the_commit_says_when_the_code_differs_from_it(tmp_path):
    def git(*words):
        subprocess.run(
            ['git', '-c', 'user.name=a', '-c', 'user.email=a@example.org', *words], cwd=tmp_path, check=True,
            capture_output=True)

    assert environment(checkout=tmp_path)['commit'] == ''
    git('init')
    (tmp_path / 'code').write_text('1')
    git('add', '.')
    git('commit', '-m', 'first')
    commit = environment(checkout=tmp_path)['commit']
    assert len(commit) >= 7 and set(commit) <= set('0123456789abcdef')
    (tmp_path / 'code').write_text('2')
    assert environment(checkout=tmp_path)['commit'] == f'{commit}-dirty'
