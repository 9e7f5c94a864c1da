"""Text from anyone is safe to show, and columns stand below each other."""
import pytest

from timm_miil.cli._text import columns, printable


@pytest.mark.parametrize('text, shown', [
    ('plain ünïcødé 图', 'plain ünïcødé 图'),
    ('a\nb\tc\r', r'a\nb\tc\r'),
    ('\x1b[31mred\x07', r'\x1b[31mred\x07'),
    ('right\u202eleft', r'right\u202eleft'),
    ('byte \udce9', r'byte \udce9'),
    (17, '17'),
])
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_columns_are_aligned_without_trailing_blanks():
    assert columns([('name', 'n'), ('a', 10), ('long name', None)]) == 'name       n\na          10\nlong name  None\n'
