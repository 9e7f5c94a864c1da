"""The benchmarks' harness: who runs when, what the columns say, and where the rows go."""
import csv
import importlib.util
import platform
from pathlib import Path

import pytest
import timm
import torch

HARNESS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'run.py'


@pytest.fixture(scope='module')
def harness():
    spec = importlib.util.spec_from_file_location('benchmarks_run', HARNESS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_round_runs_each_contestant_once_in_changing_order(harness):
    ran = []
    contestants = {name: lambda name=name: ran.append(name) for name in 'abc'}
    harness.compare(contestants, repeats=20, warmup=2)
    rounds = [tuple(ran[start:start + 3]) for start in range(0, len(ran), 3)]
    assert len(rounds) == 22
    assert {frozenset(turns) for turns in rounds} == {frozenset('abc')}
    assert len(set(rounds)) == 6


def test_medians_quartiles_and_paired_ratios(harness):
    # The load doubles every round; within a round the second takes three times as long as the first.
    seconds = {'first': iter([99.0, 1.0, 2.0, 4.0, 8.0, 16.0]), 'second': iter([0.0, 3.0, 6.0, 12.0, 24.0, 48.0])}
    contestants = {name: values.__next__ for name, values in seconds.items()}
    rows = harness.compare(contestants, repeats=5, warmup=1, clock=harness.itself, batch_size=64)
    assert rows == [
        {'batch_size': 64, 'contestant': 'first', 'repeats': 5, 'median_ms': 4000.0, 'q1_ms': 2000.0, 'q3_ms': 8000.0,
         'ratio': 1.0, 'ratio_q1': 1.0, 'ratio_q3': 1.0},
        {'batch_size': 64, 'contestant': 'second', 'repeats': 5, 'median_ms': 12000.0, 'q1_ms': 6000.0,
         'q3_ms': 24000.0, 'ratio': 3.0, 'ratio_q1': 3.0, 'ratio_q3': 3.0},
    ]


def test_the_wall_clock_gives_seconds(harness, monkeypatch):
    now = iter([10.0, 12.5])
    monkeypatch.setattr(harness.time, 'perf_counter', lambda: next(now))
    assert harness.wall(lambda: None) == 2.5


def test_rows_are_saved_with_the_environment(harness, tmp_path, capsys):
    rows = [{'contestant': 'a', 'median_ms': 1.5}, {'contestant': 'b', 'median_ms': 2.0, 'dtype': 'bfloat16'}]
    path = harness.save('question', rows, tmp_path)
    assert path == tmp_path / 'question.csv'
    with path.open(newline='') as file:
        saved = list(csv.DictReader(file))
    assert [(row['contestant'], row['median_ms'], row['dtype']) for row in saved] == [
        ('a', '1.5', ''), ('b', '2.0', 'bfloat16')]
    for row in saved:
        assert (row['python'], row['torch'], row['timm']) == (
            platform.python_version(), torch.__version__, timm.__version__)
        assert row['threads'] == str(torch.get_num_threads()) and row['cpu'] and row['command'] and row['date']
    assert capsys.readouterr().out.splitlines()[1] == 'contestant=b median_ms=2.0 dtype=bfloat16'


def test_the_commit_says_when_the_code_differs_from_it(harness, tmp_path, monkeypatch):
    def git(*words):
        harness.subprocess.run(
            ['git', '-c', 'user.name=a', '-c', 'user.email=a@example.org', *words], cwd=tmp_path, check=True,
            capture_output=True)

    monkeypatch.setattr(harness, 'RESULTS', tmp_path / 'results')
    assert harness.environment()['commit'] == ''
    git('init')
    (tmp_path / 'code').write_text('1')
    git('add', '.')
    git('commit', '-m', 'first')
    commit = harness.environment()['commit']
    assert len(commit) >= 7 and set(commit) <= set('0123456789abcdef')
    (tmp_path / 'code').write_text('2')
    assert harness.environment()['commit'] == f'{commit}-dirty'
