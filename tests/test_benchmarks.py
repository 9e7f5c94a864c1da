"""Where the rows of the benchmarks go."""
import csv
import platform

import pytest
import timm
import torch
from benchmark_scripts import load_script

from timm_miil import bench


@pytest.fixture(scope='module')
def harness():
    return load_script('run')


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
        assert row['gpu'] == row['driver'] == ''
    assert capsys.readouterr().out.splitlines()[1] == 'contestant=b median_ms=2.0 dtype=bfloat16'


def test_rows_name_the_card_they_are_of_and_the_commit_of_the_first_save(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card {device.index}')
    harness.save('first', [{'a': 1}], tmp_path, quiet=True)
    commit = harness.environment()['commit']
    monkeypatch.setattr(harness, 'environment', lambda *args, **kwargs: bench.environment(*args) | {'commit': 'later'})
    path = harness.save('second', [{'a': 1}], tmp_path, device=torch.device('cuda', 1), quiet=True)
    with path.open(newline='') as file:
        [row] = csv.DictReader(file)
    assert (row['gpu'], row['commit']) == ('card 1', commit)
