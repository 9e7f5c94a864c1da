"""Where the rows of the benchmarks go."""
import csv
import platform

import pytest
import timm
import torch
from benchmark_scripts import load_script


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
    assert capsys.readouterr().out.splitlines()[1] == 'contestant=b median_ms=2.0 dtype=bfloat16'
