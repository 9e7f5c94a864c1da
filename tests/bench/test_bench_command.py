"""`timm-miil bench`: what it prints, writes, compares and refuses."""
import dataclasses

import pytest
import torch

from timm_miil import bench
from timm_miil.bench import Case
from timm_miil.cli.main import main

TINY = Case(model='test_resnet', image_size=32)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_command_measures_compares_and_says_what_is_slower(tmp_path, capsys):
    words = ['bench', 'test_resnet', '--variant', 'plain', '--image-size', '32', '--device', 'cpu', '--seconds', '0.01']
    table = tmp_path / 'rows.csv'
    assert main([*words, '--output', str(table)]) == 0
    rows = bench.read_table(table)
    assert [row['layout'] for row in rows] == ['nchw', 'nhwc'] and {row['status'] for row in rows} == {'ok'}
    assert list(rows[0])[:len(bench.COLUMNS)] == list(bench.COLUMNS) and rows[0]['torch'] == torch.__version__
    assert [entry.name for entry in tmp_path.iterdir()] == ['rows.csv']
    for row in rows:
        row |= {'q1_ms': '1e-6', 'median_ms': '1e-6', 'q3_ms': '1e-6'}
    bench.write_table(table, rows)
    assert main([*words, '--against', str(table)]) == 0
    assert main([*words, '--against', str(table), '--fail-above', '1.5']) == 1
    assert '2 cases compared, 2 slower beyond the spread' in capsys.readouterr().err


@pytest.mark.parametrize(('words', 'told'), [
    (['--fail-above', '1.1'], '--fail-above needs --against'),
    (['--profile', '--against', 'x.csv'], '--against compares times'),
    (['--largest-batch', '3', '--against', 'x.csv'], '--against compares times'),
    (['--largest-batch', '0'], 'largest_batch must be'), (['--seconds', '-1'], 'seconds must be'),
    (['--minutes', 'nan'], 'minutes must be'), (['--output', 'no/such/folder/x.csv'], '--output must be a file in'),
    (['--output', '.'], '--output must be a file in')])
def test_the_command_refuses_what_cannot_be(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['bench', 'test_resnet', *words]) == 2
    out, err = capsys.readouterr()
    assert not out and told in err and not any(tmp_path.iterdir())


def test_profiles_of_the_others_are_kept(tmp_path, capsys):
    words = ['bench', 'test_vit', 'test_resnet', *QUICK, '--image-size', '33', '--profile']  # patches of 16
    assert main([*words, '--output', str(tmp_path / 'found.csv')]) == 1
    assert {row['model'] for row in bench.read_table(tmp_path / 'found.csv')} == {'test_resnet'}
    assert 'timm-miil bench: test_vit' in capsys.readouterr().err


def test_a_folder_without_a_network_is_a_row(tmp_path, capsys):
    assert main(['bench', f'local-dir:{tmp_path}', 'test_resnet', *QUICK]) == 1
    assert [line.split('\t')[8] for line in capsys.readouterr().out.splitlines()] == ['status', 'failed', 'ok']


def test_a_network_of_another_size_is_optimized_at_that_size(capsys):
    words = ['bench', 'test_vit', *QUICK, '--image-size', '64', '--variant', 'optimized']
    assert main(words) == 0 and '\tfailed\t' not in capsys.readouterr().out


QUICK = ['--variant', 'plain', '--layout', 'nchw', '--image-size', '32', '--device', 'cpu', '--seconds', '0.01']


@pytest.mark.parametrize(('content', 'reason'), [
    ('', 'without rows'), ('model,status\n', 'without rows'), ('model,status\nx,ok\n', 'without batch_size'),
    (None, 'No such file')])
def test_another_table_is_refused_before_anything_is_measured(content, reason, tmp_path, capsys):
    if content is not None:
        (tmp_path / 'old.csv').write_text(content)
    assert main(['bench', 'test_resnet', *QUICK, '--against', str(tmp_path / 'old.csv')]) == 2
    out, err = capsys.readouterr()
    assert not out and '--against must be a table that --output wrote, got ' in err and reason in err


def test_a_limit_with_nothing_to_look_at_is_no_pass(tmp_path, capsys):
    table = tmp_path / 'old.csv'
    [row] = bench.measure_group(
        [dataclasses.replace(TINY, batch_size=7)], torch.device('cpu'), ceilings=bench.Ceilings(10.0, {'fp32': 0.1}),
        seconds=0.01)
    bench.write_table(table, [row | bench.environment() | {'threads': 99}])
    words = ['bench', 'test_resnet', *QUICK, '--against', str(table)]
    assert main(words) == 0
    assert 'threads was 99 and is 1.' in capsys.readouterr().err
    assert main([*words, '--fail-above', '1.1']) == 2
    assert 'no case was measured both now and in --against' in capsys.readouterr().err


def test_an_unknown_network_is_told_before_anything_is_measured(capsys):
    assert main(['bench', 'test_resnt', *QUICK]) == 2
    out, err = capsys.readouterr()
    assert not out and "unknown model 'test_resnt'; did you mean 'test_resnet'?" in err


def test_a_case_that_fails_is_a_row_and_the_exit_status(capsys):
    assert main(['bench', 'test_vit', *QUICK, '--image-size', '15']) == 1  # of patches of 16
    assert '\tfailed\t' in capsys.readouterr().out
