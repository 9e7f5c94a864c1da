"""Tables of large JSON files: the same values and the same refusals as reading all at once, whatever is in memory."""
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_miil.data import _json
from timm_miil.data._json import read_columns

TABLES = {'images': {'id': int, 'name': str}, 'empty': {'id': int}}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)
ROWS = st.lists(st.fixed_dictionaries({'id': st.integers(), 'name': st.text(max_size=8), 'other': VALUES}), max_size=4)


@pytest.fixture
def write(tmp_path):
    def write_text(text):
        (tmp_path / 'file.json').write_text(text, encoding='utf-8')
        return tmp_path / 'file.json'
    return write_text


NUMBERS = st.sampled_from([-0.0, 1.5, 1e300, 2.5e-9, -1e22, 12345678901234567890])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, before=VALUES, after=VALUES | NUMBERS, chunk=st.integers(1, 40), indent=st.sampled_from([None, 0, 3]),
       is_ascii=st.booleans())
def test_any_part_in_memory_gives_the_same(write, rows, before, after, chunk, indent, is_ascii):
    content = {'before': before, 'images': rows, 'empty': [], 'after': after}
    path = write(json.dumps(content, indent=indent, ensure_ascii=is_ascii))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_json, 'CHUNK', chunk)
        assert read_columns(path, TABLES) == {
            'images': {'id': [row['id'] for row in rows], 'name': [row['name'] for row in rows]}, 'empty': {'id': []}}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, chunk=st.integers(1, 40), data=st.data())
def test_what_is_cut_short_or_spoilt_is_no_json(write, rows, chunk, data):
    text = json.dumps({'images': rows, 'empty': []})
    place = data.draw(st.integers(0, len(text) - 1))
    spoilt = data.draw(st.sampled_from([text[:place], text[:place] + data.draw(st.characters()) + text[place + 1:]]))
    path = write(spoilt)
    # Newlines are read as the file's, so what is compared is what a program that reads all at once gets.
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except ValueError:
        content = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_json, 'CHUNK', chunk)
        try:
            found = read_columns(path, TABLES)
        except ValueError as error:
            assert ('is not a JSON file' in str(error)) == (content is None) or 'must have' in str(error)
        else:
            assert found['images']['id'] == [row['id'] for row in content['images']]


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'is not a JSON file: Expecting value at character 0'),
    ('{"images" []}', r"expected : at character 10, got \["),
    ('{"images": [}', 'Expecting value at character 12'),
    ('{"images": [] "empty": []}', 'expected , or } at character 14, got "'),
    ('{"images": [{}, 7]', r"images\[0\] must have 'id' of type int"),
    ('{"images": [], "empty": []} x', 'expected the end at character 28, got x'),
    ('{"images": [], }', 'expected " at character 15, got }'),
    ('{"images": [], 7: []}', 'expected " at character 15, got 7'),
    ('{"images": [], "empty": [], "other": 12', 'expected , or } at character 39, got the end'),
    ('12', 'must hold a JSON object with images, empty, got int'),
    ('{"images": {}, "empty": []}', "has no list 'images'; of images, empty it has empty"),
    ('{"images": [' + '[' * 100_000, 'is not a JSON file'),
    ('{"images": [{"id": ' + '1' * 5000 + '}]}', 'is not a JSON file'),
])
def test_what_is_wrong_is_said_with_its_place(write, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_columns(write(text), TABLES)
    assert 'file.json' in str(caught.value) and len(str(caught.value)) < 500


def test_bytes_that_are_no_text_and_a_mark_at_the_front(tmp_path):
    path = tmp_path / 'file.json'
    path.write_bytes(b'{"images": [], "empty": [{"id": 3}]\xff}')
    with pytest.raises(ValueError, match='is not a JSON file'):
        read_columns(path, TABLES)
    path.write_bytes(b'\xef\xbb\xbf{"images": [], "empty": [{"id": 3}]}')
    assert read_columns(path, TABLES)['empty']['id'] == [3]


def test_the_last_of_a_name_counts(write):
    text = '{"images": [{"id": 1, "name": "a"}], "empty": [], "images": [{"id": 2, "name": "b"}]}'
    assert read_columns(write(text), TABLES)['images'] == {'id': [2], 'name': ['b']}
    with pytest.raises(ValueError, match="has no list 'images'"):
        read_columns(write(text[:-1] + ', "images": 7}'), TABLES)


def test_a_large_file_is_never_whole_in_memory(write, monkeypatch):
    monkeypatch.setattr(_json, 'CHUNK', 1 << 17)
    outline = [[round(0.37 * number, 2) for number in range(1000)]]
    path = write(json.dumps({
        'images': [{'id': number, 'name': 'x', 'outline': outline} for number in range(600)], 'empty': []}))
    tracemalloc.start()
    read_columns(path, TABLES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2
