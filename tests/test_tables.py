"""Tables of the READMEs are what the files of results say."""
import pytest
from benchmark_scripts import load_script


@pytest.fixture(scope='module')
def tables():
    return load_script('tables')


def test_no_table_is_stale(tables):
    texts = [path.read_text(encoding='utf-8') for path in tables.READMES]
    for text in texts:
        assert tables.updated(text) == text, 'run: python benchmarks/tables.py --write'
    assert {name for text in texts for _, name, _, _ in tables.MARK.findall(text)} == tables.TABLES.keys()


def test_a_stale_table_is_written_anew_and_the_words_around_it_stay(tables):
    text = 'before\n<!-- table systems: how -->\n| old |\n<!-- end of table -->\nafter\n'
    new = tables.updated(text)
    assert new.startswith('before\n<!-- table systems: how -->\n| claim | ours |') and new.endswith(
        ' |\n<!-- end of table -->\nafter\n')
    assert '| old |' not in new and tables.updated(new) == new


def test_a_gap_within_two_errors_shows_nothing(tables):
    row = {'claim': 'a over b', 'metric': 'map', 'ours': '1', 'other': '2', 'appears': 'False'}
    for gap, error, shows in (('-1.0', '0.6', 'no'), ('-1.0', '0.4', 'no, the reverse'), ('0.1', '0.1', 'no')):
        assert tables.claim_cells(row | {'gap': gap, 'standard_error': error})[-1] == shows
