"""Label names and word vectors from files: every form, large files, and files that are not what they say."""
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from timm_miil.data import _word_vectors, read_labels, read_word_vectors

ROWS = {
    'red': [1.0, 2.0, -3.5], '7': [0.25, 0.5, 1e-8], 'cat': [1.0, 0.0, 0.0], 'New_York': [3.0, 3.0, 3.0],
    'new': [9.0, 9.0, 9.0], 'straße': [0.0, -1.0, 0.0], '. . .': [7.0, 7.0, 7.0]}
LABELS = ['cat', 'red 7', 'New York', 'Cat', 'Straße', '. . .', 'red_cat', 'red red 7']
WANT = torch.tensor([
    ROWS['cat'], [0.625, 1.25, -1.75], ROWS['New_York'], ROWS['cat'], ROWS['straße'], ROWS['. . .'], [1.0, 1.0, -1.75],
    [0.75, 1.5, -7 / 3]])


def text(rows, header=False, end='\n'):
    lines = [f'{len(rows)} {len(next(iter(rows.values())))}'] if header else []
    return end.join([*lines, *(' '.join([word, *map(str, row)]) for word, row in rows.items()), '']).encode()


def binary(rows, end=b'\n'):
    """As word2vec writes it: a line end behind each row; as gensim does: none."""
    head = f'{len(rows)} {len(next(iter(rows.values())))}\n'.encode()
    return head + b''.join(word.encode() + b' ' + np.array(row, '<f4').tobytes() + end for word, row in rows.items())


SPACELESS = {word: row for word, row in ROWS.items() if ' ' not in word}
FORMS = {
    'glove.txt': text(ROWS), 'crlf.txt': text(ROWS, end='\r\n'), 'word2vec.txt': text(ROWS, header=True),
    'fasttext.vec': text(ROWS, header=True, end=' \n'), 'word2vec.bin': binary(SPACELESS),
    'gensim.bin': binary(SPACELESS, b'')}


@pytest.mark.parametrize('name', FORMS)
def test_labels_are_found_in_every_form(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    kept = [i for i, label in enumerate(LABELS) if label != '. . .' or not name.endswith('.bin')]
    found = read_word_vectors(path, [LABELS[i] for i in kept])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, WANT[kept], rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dim=st.integers(1, 9), block=st.integers(1, 50))
def test_binary_rows_are_found_across_any_blocks(data, dim, block, tmp_path_factory):
    word = st.text(st.characters(codec='utf-8', exclude_characters=' \n'), min_size=1, max_size=9)
    words = data.draw(st.lists(word, min_size=1, max_size=20, unique=True))
    values = np.random.default_rng(dim).standard_normal((len(words), dim)).astype(np.float32)
    path = tmp_path_factory.mktemp('words') / 'w.bin'
    path.write_bytes(binary(dict(zip(words, values)), data.draw(st.sampled_from([b'', b'\n']))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_word_vectors, 'READ_BYTES', block)
        found = _word_vectors.read_binary_rows(path, words)
    assert found.keys() == set(words)
    for word, row in zip(words, values):
        assert np.array_equal(found[word], row)


def test_arrays_and_tables_have_rows_in_the_order_of_the_labels(tmp_path):
    rows = torch.randn(3, 5)
    np.save(tmp_path / 'rows.npy', np.asfortranarray(rows.numpy().astype('>f8')))
    save_file({'any': rows.bfloat16()}, tmp_path / 'rows.safetensors')
    assert torch.equal(read_word_vectors(tmp_path / 'rows.npy', ['a', 'b', 'c']), rows)
    found = read_word_vectors(tmp_path / 'rows.safetensors', ['a', 'b', 'c'])
    assert found.dtype == torch.float32 and torch.equal(found, rows.bfloat16().float())


def test_safetensors_may_have_a_row_a_name(tmp_path):
    path = tmp_path / 'w.safetensors'
    save_file({'cat': torch.ones(4).half(), 'red': torch.zeros(4), 'unused': torch.zeros(2, 2)}, path)
    found = read_word_vectors(path, ['red cat', 'cat'])
    assert torch.equal(found, torch.tensor([[0.5] * 4, [1.0] * 4]))


def test_the_first_row_of_a_name_counts_and_its_own_row_comes_before_its_words(tmp_path):
    (tmp_path / 'w.txt').write_text('hot_dog 5\nhot 1\ndog 3\nhot 7\nHot 2\n')
    found = read_word_vectors(tmp_path / 'w.txt', ['hot dog', 'dog hot', 'Hot', 'HOT'])
    assert found.flatten().tolist() == [5, 2, 2, 1]


def test_all_words_that_are_lacking_are_counted_and_the_first_named(tmp_path):
    (tmp_path / 'w.txt').write_text('red 1 2\n')
    with pytest.raises(ValueError, match=re.escape(
            "w.txt lacks words of 7 of 8 labels: 'blue' of 'red blue', 'x0', 'x1', 'x2', 'x3' and 2 more; rename")):
        read_word_vectors(tmp_path / 'w.txt', ['red', 'red blue', *(f'x{i}' for i in range(6))])


BAD_FILES = {
    'short line.txt': (b'a 1 2\nb 1\n', r"line 2 must have a word and 2 numbers, as the lines before, got 'b 1'"),
    'no numbers.txt': (b'a\nb\n', "line 1 must have a word and numbers, got 'a'"),
    'words.txt': (b'the cat sat\n', 'line 1 must have numbers after its word, and could not convert string to float'),
    'no word.txt': (b'a 1 2\n 1 2\n', 'line 2 must have a word and 2 numbers'),
    'nan.txt': (b'a 1 2\nthe 1 nan\n', 'line 2 has a value that is not finite'),
    'huge value.txt': (b'the 1e39 1\n', 'line 1 has a value that is not finite'),
    'latin.txt': ('a 1 2\ncaf\xe9 1 2\n'.encode('latin-1'), 'line 2 is not UTF-8; convert the file, or name it .bin'),
    'binary.txt': (binary({'the': [1.0] * 30, 'b': [2.0] * 30}), 'line 2 (must have|is not UTF-8)'),
    'cut header.txt': (b'3 2\nthe 1 2\nb 1 2\n', 'must have the 3 rows that its first line says, got 2'),
    'wide.txt': (b'1 999999999\n', 'a row must have 1 to 65536 numbers'),
    'one line.txt': (b'a' * (1 << 21) + b' 1\n', 'line 1 is longer than 2097152 bytes'),
    'empty.txt': (b'', "lacks words of 1 of 1 labels: 'the'"),
    'cut.bin': (binary({'the': [1.0, 2.0]})[:-3], 'ends within row 1 of 1; it is damaged'),
    'lying.bin': (b'9999999999999 3\n', 'ends within row 1 of 9999999999999'),
    'long.bin': (binary({'the': [1.0, 2.0]}) + b'more', 'goes on after the 1 rows'),
    'text.bin': (b'the 1 2\n', 'must begin with a line of two numbers'),
    'nan.bin': (binary({'the': [1.0, float('inf')]}), 'row 1 has a value that is not finite'),
    'empty.npy': (b'', 'is no NumPy file of numbers'),
    'text.npy': (b'the 1 2\n', 'is no NumPy file of numbers'),
    'pickle.npy': (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127) + b'\n',
                   'is no NumPy file of numbers: .*Python objects'),
    'zipped.npz': (b'PK\x03\x04' + bytes(90), 'is no NumPy archive of numbers: File is not a zip file'),
    'saved.pt': (b'PK\x03\x04\0\0', 'no pickle of word vectors: File is not a zip file.* No code of it was run'),
    'saved.txt': (b'PK\x03\x04\0\0', r'text \(.txt, .vec\), the .* word2vec \(.bin\), or an array .* \(.npy\) or'),
    'model.bin': (b'PK\x03\x04\0\0', 'is a zip archive, .* which its name does not say; name it so'),
    'pickle.vec': (b'\x80\x02\x8a\n', 'is a pickle, as .pkl files are'),
    'cc.en.vec.gz': (b'\x1f\x8b\x08', 'is compressed by gzip'),
    'text.safetensors': (b'the 1 2\n', 'is no safetensors file'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_files_that_are_not_what_they_say_are_one_error(name, tmp_path):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        read_word_vectors(tmp_path / name, ['the'])
    assert name in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize('table, words', [
    (np.zeros((3, 4), np.float32), r'must have floats of shape \(2, E\).*got torch.float32 of shape \(3, 4\)'),
    (np.zeros(2, np.float32), r'got torch.float32 of shape \(2,\)'),
    (np.zeros((2, 0), np.float32), r'\(2, 0\)|no NumPy file'),
    (np.zeros((2, 4), np.int32), 'got torch.int32'),
    (np.array([[0.0], [np.nan]]), 'not finite in row 1'),
    (np.array(['a', 'b']), 'no NumPy file of numbers'),
])
def test_arrays_that_are_no_embeddings_are_refused(table, words, tmp_path):
    np.save(tmp_path / 'w.npy', table)
    with pytest.raises(ValueError, match=words):
        read_word_vectors(tmp_path / 'w.npy', ['a', 'b'])


@pytest.mark.parametrize('tensors, words', [
    ({'a': torch.zeros(2), 'b': torch.zeros(3)}, 'must have rows of one length, got 2 to 3'),
    ({'a': torch.zeros(2, 2), 'b': torch.zeros(2)}, r"one row of finite floats a name, got .* \(2, 2\) for 'a'"),
    ({'a': torch.tensor([float('nan')]), 'b': torch.zeros(1)}, "finite floats a name, got .* for 'a'"),
    ({'a': torch.zeros(2, dtype=torch.int64), 'b': torch.zeros(2)}, 'got torch.int64'),
    ({'a': torch.zeros(3, 2)}, r'must have floats of shape \(2, E\)'),
    ({'c': torch.zeros(2), 'd': torch.zeros(2)}, "lacks words of 2 of 2 labels: 'a', 'b';"),
])
def test_safetensors_that_are_no_embeddings_are_refused(tensors, words, tmp_path):
    save_file(tensors, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match=words):
        read_word_vectors(tmp_path / 'w.safetensors', ['a', 'b'])


@pytest.mark.parametrize('labels, kind, words', [
    ('cat', TypeError, "labels must be a list of strings, got 'cat'"),
    (['cat', 7], TypeError, 'labels must be a list of strings'),
    ([], ValueError, 'labels must have at least one name'),
])
def test_labels_that_are_none_are_refused(labels, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        read_word_vectors(tmp_path / 'never read', labels)


@pytest.mark.parametrize('suffix', ['.txt', '.bin', '.npy', '.safetensors'])
def test_a_missing_file_is_an_os_error(suffix, tmp_path):
    with pytest.raises(OSError, match='lost'):
        read_word_vectors(tmp_path / f'lost{suffix}', ['cat'])


def test_large_files_take_little_memory(tmp_path):
    rows = 20_000
    for name, numbers in (('w.txt', b' 0.12345678' * 300), ('w.bin', b' ' + np.ones(300, '<f4').tobytes())):
        with open(tmp_path / name, 'wb') as file:
            file.write(b'%d 300\n' % rows)
            file.writelines(b'word%d%s\n' % (row, numbers) for row in range(rows))
        assert (tmp_path / name).stat().st_size > 20e6
    code = f'''
        import resource
        from timm_miil.data import read_word_vectors
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in ('w.txt', 'w.bin'):
            assert read_word_vectors({str(tmp_path)!r} + '/' + name, ['word0', 'word19999 word7']).shape == (2, 300)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10  # MiB; a few blocks of one


def test_labels_are_read_with_any_line_ends_and_mark(tmp_path):
    for encoding, end in (('utf-8', '\n'), ('utf-8-sig', '\r\n'), ('utf-8', '\r')):
        (tmp_path / 'l.txt').write_bytes(end.join(['red 7', '', '  größe\t', ' ', 'a\x0bb\u2028c']).encode(encoding))
        assert read_labels(tmp_path / 'l.txt') == ('red 7', 'größe', 'a\x0bb\u2028c')


@pytest.mark.parametrize('content, words', [
    (b'cat\n\ndog\n cat \n', r"l.txt must have each label once, and 'cat' is on lines 1 and 4"),
    (b'\n \r\n', 'must have label names, one a line, and has none'),
    ('cat\n'.encode('utf-16'), 'must be a text file in UTF-8, and its byte 0 is not; save it as UTF-8'),
    (b'caf\xe9\n', 'byte 3 is not'),
])
def test_label_files_that_are_none_are_refused(content, words, tmp_path):
    (tmp_path / 'l.txt').write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_labels(tmp_path / 'l.txt')
    with pytest.raises(OSError):
        read_labels(tmp_path)
