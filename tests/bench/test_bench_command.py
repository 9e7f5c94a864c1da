"""`timm-miil bench`: what it prints, refuses and returns."""
import pytest
import torch

from timm_miil import bench
from timm_miil.bench import Case, Ceilings, environment
from timm_miil.cli.main import main

pytestmark = pytest.mark.usefixtures('one_thread')


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


def test_the_command_refuses_a_limit_without_a_table(capsys):
    assert main(['bench', '--fail-above', '1.1']) == 2
    assert '--fail-above needs --against' in capsys.readouterr().err


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
    case = Case(model='test_resnet', image_size=32, batch_size=7)
    [row] = bench.measure_group(
        [case], torch.device('cpu'), seconds=0.01, ceilings=Ceilings(10.0, {'fp32': 0.1}))
    bench.write_table(table, [row | environment() | {'threads': 99}])
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


def test_a_folder_without_a_network_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    assert main(['bench', f'local-dir:{tmp_path / "empty"}', 'test_resnet', *QUICK]) == 1
    rows = capsys.readouterr().out.splitlines()[1:]
    assert '\tfailed\t' in rows[0] and rows[1].startswith('test_resnet\t') and '\tok\t' in rows[1]


def test_a_failed_profile_does_not_lose_the_others(tmp_path, capsys):
    table = tmp_path / 'rows.csv'
    words = ['bench', 'test_vit', 'test_resnet', *QUICK, '--image-size', '36', '--profile', '--output', str(table)]
    assert main(words) == 1  # 36 is no multiple of a patch of 16
    assert 'test_vit plain fp32 nchw eager: AssertionError: ' in capsys.readouterr().err
    assert {row['model'] for row in bench.read_table(table)} == {'test_resnet'}
    assert main(['bench', 'test_resnet', *QUICK, '--variant', 'optimized', '--mode', 'graphs', '--profile']) == 0


def test_a_failed_search_is_the_exit_status(capsys):
    assert main(['bench', 'test_vit', 'test_resnet', *QUICK, '--image-size', '36', '--largest-batch', '2']) == 1
    rows = capsys.readouterr().out.splitlines()[1:]
    assert '\tfailed\t' in rows[0] and '\tok\t' in rows[1]


@pytest.mark.parametrize(('words', 'reason'), [
    (['--profile', '--largest-batch', '2'], 'are two questions'),
    (['--profile', '--against', 'x.csv'], '--against compares times'),
    (['--largest-batch', '2', '--against', 'x.csv', '--fail-above', '1.1'], '--against compares times'),
    (['--largest-batch', '0'], '--largest-batch must be at least 1, got 0.'),
    (['--seconds', '-1'], '--seconds must be in (0, inf), got -1.0.'),
    (['--minutes', 'nan'], '--minutes must be in (0, inf), got nan.'),
    (['--against', 'x.csv', '--fail-above', 'nan'], '--fail-above must be in (0, inf), got nan.'),
    (['--output', '/nonexistent/x.csv'], "--output must be a file in a folder that can be written to, got '/nonex"),
    (['--output', '.'], "--output must be a file in a folder that can be written to, got '.'."),
    (['--output', f'{__file__}/x.csv'], '--output must be a file in a folder')])
def test_wrong_flags_are_told_in_a_line_before_anything_is_measured(words, reason, capsys):
    assert main(['bench', 'test_resnet', *QUICK, *words]) == 2
    out, err = capsys.readouterr()
    assert not out and reason in err and err.count('\n') == 1
