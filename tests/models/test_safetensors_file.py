"""Safetensors files: lying headers are refused before use, and what is written depends on the content alone."""
import json
import os
import stat
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_miil._errors import CheckpointError
from timm_miil.models.checkpoint_file import read_checkpoint, read_metadata, write_safetensors
from timm_miil.models._safetensors_file import DTYPES, MAX_HEADER_BYTES

GOOD = {'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]},
        'b': {'dtype': 'U8', 'shape': [8], 'data_offsets': [24, 32]}}


def with_header(path, header, size=32, *, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header) if length is None else length) + header + bytes(size))
    return path


def changed(name, **facts):
    return GOOD | {name: GOOD[name] | facts}


def test_the_header_that_the_others_change_is_good(tmp_path):
    found = read_checkpoint(with_header(tmp_path / 'x.safetensors', GOOD)).tensors
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {'a': (2, 3), 'b': (8,)}


@pytest.mark.parametrize(('header', 'words'), [
    (changed('a', data_offsets=[0, 28], shape=[7]), "'b' begins before byte 28, where the one before it ends"),
    (changed('a', data_offsets=[0, 20], shape=[5]), "'b' begins at byte 24, 4 after the one before it"),
    (changed('a', data_offsets=[4, 24], shape=[5]), "'a' begins at byte 4, 4 after"),
    (changed('b', data_offsets=[24, 28], shape=[4]), 'its tensors claim 28 bytes, and the file has 32'),
    (changed('b', data_offsets=[24, 36], shape=[12]), 'its tensors claim 36 bytes, and the file has 32'),
    (changed('b', data_offsets=[24, 10_000_000_024], shape=[10_000_000_000]), 'claim 10000000024 bytes'),
    (changed('a', data_offsets=[-24, 0]), "'a' has the offsets"),
    (changed('a', data_offsets=[24, 0]), "'a' has the offsets"),
    (changed('a', data_offsets=[False, 24]), "'a' has the offsets"),
    (changed('a', data_offsets=[0.0, 24.0]), "'a' has the offsets"),
    (changed('a', data_offsets=[0, 24, 32]), "'a' has the offsets"),
    (changed('a', data_offsets={'0': 24}), "'a' has the offsets"),
    (changed('a', dtype='F33'), "'a' is of 'F33', which is not one of F64"),
    (changed('a', dtype=['F32']), 'which is not one of'),
    (changed('a', dtype='C64', shape=[3]), "is of 'C64'"),
    (changed('a', shape=[2, 2]), r"'a' of shape \[2, 2\] and F32 has 24 bytes, and not 16"),
    (changed('a', shape=[2**62, 2, 2**60, 0, 3]), 'has 24 bytes, and not 0'),
    (changed('a', shape=[2**40, 2**40]), 'has 24 bytes, and not'),
    (changed('a', shape=[10**4000]), 'has 24 bytes, and not one too large|and not 4'),
    (changed('a', shape=[-2, -3]), 'has the shape'),
    (changed('a', shape=[2.0, 3]), 'has the shape'),
    (changed('a', shape=[True, 6]), 'has the shape'),
    (changed('a', shape='6'), 'has the shape'),
    (changed('a', shape=[1] * 100 + [6]), 'has the shape'),
    (changed('a', more=1), 'must have dtype, shape and data_offsets'),
    (GOOD | {'a': {'dtype': 'F32'}}, 'must have dtype, shape and data_offsets'),
    (GOOD | {'a': [1]}, 'must have dtype, shape and data_offsets'),
    (GOOD | {'__metadata__': {'a': 1}}, '__metadata__ maps no strings to strings'),
    (GOOD | {'__metadata__': {'a': {'b': 'c'}}}, '__metadata__ maps no strings to strings'),
    (GOOD | {'__metadata__': ['a']}, '__metadata__ maps no strings to strings'),
    ([GOOD], 'no JSON object but a list'),
    (b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}',
     "the name 'a' is there twice"),
    (b'{"a":{"dtype":"F32","dtype":"I32","shape":[8],"data_offsets":[0,32]}}', "'dtype' is there twice"),
    (b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,NaN]}}', 'has the offsets'),
    (b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,3' + b'2' * 5000 + b']}}', 'Exceeds'),
    (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'recursion'),
    (b'{"a":' + b'[' * 200_000, 'recursion'),
    (b'{"\xff": 1}', 'decode'),
    (b'{not json', 'Expecting'),
], ids=range(39))
def test_a_header_that_lies_is_refused(tmp_path, header, words):
    start = 'x.safetensors is not a safetensors file that can be trusted: '
    with pytest.raises(CheckpointError, match=f'{start}.*{words}.*get it again'):
        read_checkpoint(with_header(tmp_path / 'x.safetensors', header))


@pytest.mark.parametrize(('content', 'words'), [
    (b'', 'is empty'),
    (b'\0\0\0', '3 bytes are no header'),
    (struct.pack('<Q', 0), 'Expecting'),
    (struct.pack('<Q', 10_000_000_000) + b'{}', 'the header claims 10000000000 bytes, and the file has 10'),
    (struct.pack('<Q', 2**64 - 1) + b'{}', 'the header claims 18446744073709551615 bytes'),
])
def test_a_length_that_lies_is_refused(tmp_path, content, words):
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('length', [MAX_HEADER_BYTES + 1, 110_000_000])
def test_a_header_of_many_megabytes_is_not_read(tmp_path, length):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(struct.pack('<Q', length) + b'{"' + b'a' * length)    # nothing sparse about it
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f'the header has {length} bytes, more than'):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# ---- writing


def tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    found = {f'x.{name}': torch.arange(5).to(dtype) for name, dtype in DTYPES.items()}
    return found | {'turned': base.t(), 'tied': base, 'again': base, 'row': base[1], 'scalar': torch.tensor(3.0),
                    'none': torch.empty(0, 3), 'wide': torch.ones(1).expand(7), 'grad': torch.nn.Parameter(base),
                    'é"\n': base}


def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, tensors(), {'format': 'pt', 'b': 'é"', 'a': ''})
    for found in load_file(path), read_checkpoint(path).tensors:
        assert found.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert found[name].dtype == tensor.dtype and found[name].is_contiguous()
            assert torch.equal(found[name].contiguous().view(torch.uint8).flatten(),
                               tensor.detach().contiguous().view(torch.uint8).flatten()) if tensor.ndim else (
                                   found[name] == tensor)
        starts = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
        assert len(set(starts)) == len(starts)    # nothing is shared any more
    with safe_open(path, 'pt') as file:
        assert file.metadata() == read_metadata(path) == {'format': 'pt', 'b': 'é"', 'a': ''}


def test_what_the_library_writes_is_read(tmp_path):
    kept = {name: tensor for name, tensor in tensors().items() if name.startswith('x.')}
    save_file(kept, tmp_path / 'x.safetensors')
    found = read_checkpoint(tmp_path / 'x.safetensors')
    assert found.tensors.keys() == kept.keys() and found.extras == () and found.label_names is None
    assert read_metadata(tmp_path / 'x.safetensors') == {}


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    metadata = {letter: letter for letter in 'qwertzuiop'}
    write_safetensors(tmp_path / '1', tensors(), metadata)
    write_safetensors(tmp_path / '2', dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert (tmp_path / '1').read_bytes() == (tmp_path / '2').read_bytes()
    length, = struct.unpack('<Q', (tmp_path / '1').read_bytes()[:8])
    assert length % 8 == 0


def test_the_bytes_are_the_librarys_where_those_are_certain(tmp_path):
    kept = {'b': torch.ones(3), 'a': torch.ones(2, 2), 'c': torch.ones(3, dtype=torch.float64)}
    write_safetensors(tmp_path / '1', kept, {'format': 'pt'})
    save_file(kept, tmp_path / '2', {'format': 'pt'})
    assert (tmp_path / '1').read_bytes() == (tmp_path / '2').read_bytes()


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5), data=st.data())
def test_any_shapes_and_dtypes_come_back(tmp_path_factory, shapes, data):
    path = tmp_path_factory.getbasetemp() / 'any.safetensors'
    wanted = {f'{number}': torch.zeros(shape, dtype=data.draw(st.sampled_from(sorted(DTYPES.values(), key=str))))
              for number, shape in enumerate(shapes)}
    write_safetensors(path, wanted)
    found = load_file(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in wanted.items()}


@pytest.mark.parametrize(('tensor', 'words'), [
    (lambda: torch.eye(3).to_sparse(), "tensor 'w' is of layout torch.sparse_coo"),
    (lambda: torch.ones(3, dtype=torch.complex64), "tensor 'w' is of torch.complex64"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "tensor 'w' is quantised"),
    (lambda: torch.ones(3, device='meta'), "tensor 'w' is without values"),
], ids=['sparse', 'complex', 'quantised', 'meta'])
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')
def test_tensors_that_the_format_cannot_hold_leave_the_old_file(tmp_path, tensor, words):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, {'a': torch.ones(1)})
    with pytest.raises(CheckpointError, match=words):
        write_safetensors(path, {'w': tensor()})
    assert list(load_file(path)) == ['a'] and os.listdir(tmp_path) == ['x.safetensors']


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no tensor may have the name __metadata__'):
        write_safetensors(tmp_path / 'x', {'__metadata__': torch.ones(1)})
    with pytest.raises(TypeError, match='must be strings, got int 3'):
        write_safetensors(tmp_path / 'x', {'a': torch.ones(1)}, {'size': 3})
    with pytest.raises(OSError, match='none'):
        write_safetensors(tmp_path / 'none' / 'x', {'a': torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_the_file_is_as_readable_as_its_neighbours(tmp_path):
    (tmp_path / 'beside').touch()
    write_safetensors(tmp_path / 'x', {'a': torch.ones(1)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('beside', 'x')}
    assert len(modes) == 1


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    names = (f'{"a" * length}' for length in range(200))
    for name in names:
        write_safetensors(tmp_path / 'x', {name: torch.ones(1)})
        if (tmp_path / 'x').read_bytes()[0] == 0x80:
            break
    assert (tmp_path / 'x').read_bytes()[0] == 0x80
    assert list(read_checkpoint(tmp_path / 'x').tensors) == [name]
