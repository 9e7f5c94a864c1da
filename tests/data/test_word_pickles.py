"""Word vectors in .npz, pickles and files of torch: read without running them; whatever is else is refused by name."""
import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from timm_miil.data import read_word_vectors, save_word_vectors
from timm_miil.data._word_pickles import read_pickle

LABELS = ['cat', 'red dog']
ROWS = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
BY_NAME = {'cat': ROWS[0], 'red_dog': ROWS[1], 'unused': np.zeros(7)}
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def same(path, labels=LABELS):
    found = read_word_vectors(path, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(ROWS))


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('content', [
    ROWS, ROWS.astype('>f8'), np.asfortranarray(ROWS), ROWS.T[None],
    {'words': ROWS, 'names': ['a', 3, 0.5, None, True]}, BY_NAME, collections.OrderedDict(BY_NAME)], ids=range(7))
def test_pickles_of_arrays(content, protocol, tmp_path):
    same(dump(tmp_path / 'w.pkl', content, protocol))


@pytest.mark.parametrize('content', [
    torch.from_numpy(ROWS), torch.from_numpy(ROWS).double().T.contiguous().T,
    torch.from_numpy(ROWS).T[None].clone(), {'wordvec_array': torch.from_numpy(ROWS), 'size': 2},
    {name: torch.from_numpy(row) for name, row in BY_NAME.items()},
    torch.nn.Embedding.from_pretrained(torch.from_numpy(ROWS)).state_dict()], ids=range(6))
def test_files_of_torch(content, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    same(tmp_path / 'w.pth')


def test_archives_of_numpy(tmp_path):
    np.savez(tmp_path / 'table.npz', words=ROWS)
    np.savez_compressed(tmp_path / 'rows.npz', **BY_NAME)
    np.savez(tmp_path / 'published.npz', ROWS.T[None])
    for name in ('table', 'rows', 'published'):
        same(tmp_path / f'{name}.npz')


def test_any_file_becomes_a_small_one_by_name(tmp_path):
    dump(tmp_path / 'w.pkl', ROWS)
    save_word_vectors(tmp_path / 'w.safetensors', LABELS, read_word_vectors(tmp_path / 'w.pkl', LABELS))
    same(tmp_path / 'w.safetensors')
    torch.testing.assert_close(
        read_word_vectors(tmp_path / 'w.safetensors', LABELS[::-1]), torch.from_numpy(ROWS[::-1].copy()))


class Evil:
    def __reduce__(self):
        return os.mkdir, ('made by a pickle',)


class Mine:
    pass


def zipped(path, pickled, **entries):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('w/data.pkl', pickled)
        for name, content in entries.items():
            archive.writestr(f'w/{name}', content)


@pytest.mark.parametrize(('content', 'words'), [
    (Evil(), r"it calls '(posix|nt)\.mkdir'"), ({'a': [Evil()]}, r"it calls '(posix|nt)\.mkdir'"),
    (Mine(), 'it calls|NEWOBJ'), ({(1, 2): ROWS}, 'it has tuple where str is wanted'), ({1, 2}, 'EMPTY_SET'),
    ([ROWS], 'it has list at its top'), (np.array([Mine()]), "an array of dtype 'O8', where word vectors are floats"),
    (np.arange(3), "an array of dtype 'i8'"), (np.float32, r"it has _Global at its top")])
def test_what_is_no_array_is_refused_and_not_run(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / 'w.pkl', content)
    with pytest.raises(ValueError, match=f'w.pkl is no pickle of word vectors: .*({words}).*No code of it was run'):
        read_word_vectors(tmp_path / 'w.pkl', LABELS)
    assert os.listdir(tmp_path) == ['w.pkl']


def test_torch_files_with_code_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'a': Evil()}, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=r"it calls '(posix|nt)\.mkdir'"):
        read_word_vectors(tmp_path / 'w.pt', LABELS)
    assert os.listdir(tmp_path) == ['w.pt']


def tensor_pickle(shape, strides):
    storage = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ'
    shape, strides = (b'(' + b''.join(b'J' + struct.pack('<i', side) for side in sides) + b't' for sides in (
        shape, strides))
    return b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\x00' + shape + strides + b'\x89NtR.'


@pytest.mark.parametrize(('shape', 'strides', 'words'), [
    ((1 << 20, 1 << 20), (0, 0), r'a tensor of shape \(1048576, 1048576\) made of 2 numbers'),
    ((1, 2), (2, 5), 'out of bounds'), ((1, 2), (-1, -1), 'stride')])
def test_tensors_that_claim_more_than_there_is(shape, strides, words, tmp_path):
    zipped(tmp_path / 'w.pt', tensor_pickle(shape, strides), **{'data/0': bytes(8)})
    with pytest.raises(ValueError, match=words):
        read_word_vectors(tmp_path / 'w.pt', ['a'])
    zipped(tmp_path / 'w.pt', tensor_pickle((1, 2), (2, 1)), **{'data/0': bytes(8)})
    assert read_word_vectors(tmp_path / 'w.pt', ['a']).tolist() == [[0, 0]]


def test_pickles_that_no_pickler_writes(tmp_path):
    deep = b'\x80\x02)' + b'\x85' * 200_000 + b'.'
    for content, words in {
            deep: 'it has tuple at its top', b'\x80\x02}(X\x01\x00\x00\x00au.': 'zip|argument', b'\x80\x02.': 'empty',
            b'\x80\x02]q\x00h\x00a.': 'it has list at its top', b'\x80\x04N\x94h\x05.': '5', b'N': 'end|exhausted',
            b'\x80\x02}r\xff\xff\xff\x7f.': '', b'\x8e' + b'\xff' * 7 + b'\x7f': 'bytes|end'}.items():
        path = tmp_path / 'w.pkl'
        path.write_bytes(content)
        if not words:
            assert read_pickle(path) == {}
            continue
        with pytest.raises(ValueError, match=f'no pickle of word vectors: .*({words})'):
            read_pickle(path)


def test_every_cut_file_is_one_error(tmp_path):
    whole = pickle.dumps(BY_NAME)
    for end in range(0, len(whole), 7):
        (tmp_path / 'w.pkl').write_bytes(whole[:end])
        with pytest.raises(ValueError, match='is no pickle of word vectors'):
            read_word_vectors(tmp_path / 'w.pkl', LABELS)


def test_archives_that_are_none(tmp_path):
    np.savez(tmp_path / 'objects.npz', np.array([Mine()]))
    with pytest.raises(ValueError, match='is no NumPy archive of numbers: Object arrays cannot be loaded'):
        read_word_vectors(tmp_path / 'objects.npz', ['a'])
    np.savez(tmp_path / 'ints.npz', np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r'must have floats of shape \(2, E\)'):
        read_word_vectors(tmp_path / 'ints.npz', LABELS)
    np.savez(tmp_path / 'few.npz', cat=ROWS[0])
    with pytest.raises(ValueError, match="lacks words of 1 of 2 labels: 'red' of 'red dog'"):
        read_word_vectors(tmp_path / 'few.npz', LABELS)


@pytest.mark.parametrize(('args', 'kind', 'words'), [
    (('w.npz', LABELS, torch.zeros(2, 3)), ValueError, "path must end in '.safetensors', got 'w.npz'"),
    (('w.safetensors', ['a', 'a'], torch.zeros(2, 3)), ValueError, 'different names, got 1 different among 2'),
    (('w.safetensors', ['a'], torch.zeros(2, 3)), ValueError, r'of shape \(1, E\), one row a label, got \(2, 3\)'),
    (('w.safetensors', ['a'], torch.full((1, 3), torch.inf)), ValueError, 'must be finite'),
    (('w.safetensors', 'a', torch.zeros(1, 3)), TypeError, 'labels must be a list of strings'),
    (('w.safetensors', ['a'], torch.zeros(1, 3, dtype=torch.int64)), TypeError, 'floating'),
])
def test_what_cannot_be_saved(args, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        save_word_vectors(tmp_path / args[0] if args[0] != 'w.npz' else args[0], *args[1:])


NESTED = b')\x94' + b''.join(b'h' + bytes([place]) + b'\x86\x94' for place in range(60))  # 2 ** 60 tuples in words
LONG = b'X' + struct.pack('<i', 1 << 20) + bytes(1 << 20)


@pytest.mark.parametrize(('content', 'words'), [
    (NESTED + NESTED + b'\x93.', 'it has tuple where str is wanted'),
    (b'\x8c\x05numpy\x8c\x05dtype\x93)' + b'\x85' * 50_000 + b'\x85R.', 'it has tuple where str is wanted'),
    (LONG + b'\x94' + b'h\x00h\x00\x93' * 1000 + b'.', r"it calls '\\x00.+ of '\\x00"),
    (LONG + b'\x94\x8c\x07_codecs\x8c\x06encode\x93\x94\x8c\x06latin1\x94' + b'h\x01h\x00h\x02\x86R' * 1000 + b'.',
     'it has bytes at its top')], ids=['nested', 'deep', 'names', 'encoded'])
def test_small_pickles_do_not_fill_memory_or_stack(content, words, tmp_path):
    (tmp_path / 'w.pkl').write_bytes(b'\x80\x04' + content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words):
            read_pickle(tmp_path / 'w.pkl')
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_pickle_has_so_many_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_miil.data._word_pickles.MAX_INSTRUCTIONS', 100)
    (tmp_path / 'w.pkl').write_bytes(b'\x80\x04' + b']' * 200 + b'.')
    with pytest.raises(ValueError, match='more than 100 instructions; take fewer words'):
        read_pickle(tmp_path / 'w.pkl')


def test_rows_of_one_table_share_it(tmp_path):
    table = torch.randn(200, 300)
    torch.save({f'w{row}': table[row] for row in range(200)}, tmp_path / 'w.pt')
    read_word_vectors(tmp_path / 'w.pt', ['w0'])
    tracemalloc.start()  # NumPy and bytes are counted
    try:
        found = read_word_vectors(tmp_path / 'w.pt', ['w0', 'w199'])
        assert tracemalloc.get_traced_memory()[1] < 20 * table.nbytes
    finally:
        tracemalloc.stop()
    torch.testing.assert_close(found, table[[0, 199]])


def test_compressed_files_of_torch_are_none(tmp_path):
    torch.save(torch.zeros(2, 5), tmp_path / 'whole.pt')
    with zipfile.ZipFile(tmp_path / 'whole.pt') as whole, zipfile.ZipFile(
            tmp_path / 'w.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match='torch.save does not compress'):
        read_word_vectors(tmp_path / 'w.pt', LABELS)


def test_numpy_files_that_claim_more_than_there_is(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {'descr': '<f4', 'fortran_order': False, 'shape': (1 << 52, 1)})
    dashes = b"{'descr':'<f4','fortran_order':False,'shape':(" + b'-' * 9000 + b'1,)}'
    dashes = b'\x93NUMPY\x01\x00' + struct.pack('<H', len(dashes)) + dashes
    for name, content in {'a.npy': head.getvalue(), 'b.npy': dashes, 'readme.txt': b'words'}.items():
        with zipfile.ZipFile(tmp_path / 'w.npz', 'w') as archive:
            archive.writestr(name, content)
        with pytest.raises(ValueError, match='w.npz is no NumPy archive of numbers: .+'):
            read_word_vectors(tmp_path / 'w.npz', LABELS)
        (tmp_path / 'w.npy').write_bytes(content)
        with pytest.raises(ValueError, match='w.npy is no NumPy file of numbers: .+'):
            read_word_vectors(tmp_path / 'w.npy', LABELS)
