"""Files of every kind that somebody may pass as a checkpoint: all of them real, none of them trusted."""
import argparse
import collections
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch

from timm_miil._errors import CheckpointError
from timm_miil.models import checkpoint_file
from timm_miil.models.checkpoint_file import read_checkpoint
from timm_miil.models._torch_file import MAX_PICKLE_BYTES

LEGACY = {'_use_new_zipfile_serialization': False}
BOTH_FORMATS = pytest.mark.parametrize('form', [{}, LEGACY], ids=['zip', 'legacy'])
TEN_GB = 10_000_000_000


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        'conv.weight': torch.randn(4, 3, 2, 2, generator=generator),
        'conv.bias': torch.randn(4, generator=generator).half(),
        'bn.num_batches_tracked': torch.tensor(7),
    }


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def refusal(path, words):
    """The message of the error, which must name the file and come without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- what is a checkpoint


@BOTH_FORMATS
@pytest.mark.parametrize('wrap', [
    lambda tensors: tensors,
    lambda tensors: {'model': tensors, 'epoch': 3},
    lambda tensors: {'state_dict': {f'module.{name}': tensor for name, tensor in tensors.items()}, 'epoch': 3},
    lambda tensors: {'model': {'state_dict': collections.OrderedDict(tensors)}, 'epoch': 3},
], ids=['bare', 'model', 'state_dict', 'nested'])
def test_the_forms_of_original_files_are_read(tmp_path, form, wrap):
    torch.save(wrap(weights()), tmp_path / 'x.pth', **form)
    found = read_checkpoint(tmp_path / 'x.pth')
    assert_same(found.tensors, weights())
    assert found.extras == (() if 'conv.bias' in wrap(weights()) else ('epoch',))
    assert found.label_names is None


@BOTH_FORMATS
def test_what_training_leaves_beside_the_tensors_is_named(tmp_path, form):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({'epoch': 3, 'state_dict': layer.state_dict(), 'optimizer': optimizer.state_dict(), 'arch': 'x',
                'best': (0.5, None, True), 'size': torch.Size([1, 2])}, tmp_path / 'x.pth.tar', **form)
    found = read_checkpoint(tmp_path / 'x.pth.tar')
    assert_same(found.tensors, layer.state_dict())
    assert found.extras == ('epoch', 'optimizer', 'arch', 'best', 'size')


@BOTH_FORMATS
def test_parameters_come_without_gradients(tmp_path, form):
    torch.save({'weight': torch.nn.Parameter(torch.ones(3))}, tmp_path / 'x.pth', **form)
    tensor = read_checkpoint(tmp_path / 'x.pth').tensors['weight']
    assert type(tensor) is torch.Tensor and not tensor.requires_grad


@BOTH_FORMATS
def test_views_and_shared_memory_are_read(tmp_path, form):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({'all': base, 'turned': base.t(), 'row': base[1], 'none': base[:0], 'tied': base}, tmp_path / 'x.pth',
               **form)
    assert_same(read_checkpoint(tmp_path / 'x.pth').tensors, {
        'all': base, 'turned': base.t(), 'row': base[1], 'none': base[:0], 'tied': base})


def test_dtypes_of_today_are_read(tmp_path):
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.uint16, torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / 'x.pth')
    found = read_checkpoint(tmp_path / 'x.pth').tensors
    assert {name: (tensor.dtype, tensor.float().tolist()) for name, tensor in found.items()} == {
        name: (tensor.dtype, [1.0, 1.0, 1.0]) for name, tensor in tensors.items()}


def test_a_zip_file_is_mapped_and_not_copied(tmp_path):
    torch.save({'weight': torch.ones(1000)}, tmp_path / 'x.pth')
    found = read_checkpoint(tmp_path / 'x.pth')
    with open('/proc/self/maps', encoding='utf-8') as maps:
        assert str(tmp_path / 'x.pth') in maps.read()
    found.tensors['weight'][0] = 5    # a private mapping: the file stays
    assert read_checkpoint(tmp_path / 'x.pth').tensors['weight'][0] == 1


def test_the_suffix_does_not_decide(tmp_path):
    torch.save(weights(), tmp_path / 'x.bin')
    assert_same(read_checkpoint(str(tmp_path / 'x.bin')).tensors, weights())
    (tmp_path / 'x.bin').rename(tmp_path / 'x.safetensors')
    refusal(tmp_path / 'x.safetensors', 'under the name of a safetensors file.*suffix .pth')
    checkpoint_file.write_safetensors(tmp_path / 'x.pth', weights())
    assert_same(read_checkpoint(tmp_path / 'x.pth').tensors, weights())


@BOTH_FORMATS
@pytest.mark.parametrize('protocol', [1, 2, 3, 4, 5])
def test_protocols_of_pickle(tmp_path, form, protocol):
    torch.save(weights(), tmp_path / 'x.pth', pickle_protocol=protocol, **form)
    if protocol in (2, 3):
        assert_same(read_checkpoint(tmp_path / 'x.pth').tensors, weights())
    elif protocol > 3:
        assert 'weights_only=False' in refusal(tmp_path / 'x.pth', f'asks for pickle protocol {protocol}')
    else:
        refusal(tmp_path / 'x.pth', 'begins with' if form else 'instruction INT')


# ---- what is none


@pytest.mark.parametrize(('content', 'words'), [
    (b'', 'is empty'),
    (b'<!DOCTYPE html><title>Sign in</title>', 'is not a checkpoint but a web page'),
    (b'\n  <html>', 'a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00', 'git lfs pull'),
    (b'\x1f\x8b\x08 packed', 'gzip; unpack it'),
    (b'{"a": 1}', 'a JSON text'),
    (b'hello', re.escape("begins with b'hello'")),
    (b'\x80', 'damaged'),
    (b'\x80\x02.', 'damaged'),
    (b'PK\x03\x04', 'damaged'),
    (pickle.dumps({'weight': 1}), 'a pickle, but not one of torch.save'),
])
def test_other_files_are_called_by_their_kind(tmp_path, content, words):
    (tmp_path / 'x.pth').write_bytes(content)
    refusal(tmp_path / 'x.pth', words)


def test_what_is_no_file_is_refused(tmp_path):
    refusal(tmp_path, 'is a folder')
    refusal(tmp_path / 'none.pth', 'No such file.*check the path')
    os.mkfifo(tmp_path / 'pipe.pth')
    refusal(tmp_path / 'pipe.pth', 'no regular file')
    (tmp_path / 'a.pth').symlink_to('b.pth')
    (tmp_path / 'b.pth').symlink_to('a.pth')
    refusal(tmp_path / 'a.pth', 'cannot be read: .*symbolic links')
    with pytest.raises(CheckpointError, match='cannot be read: embedded null'):
        read_checkpoint('a\0b.pth')


@pytest.mark.parametrize('make', [
    lambda path: torch.save(weights(), path),
    lambda path: torch.save(weights(), path, **LEGACY),
    lambda path: checkpoint_file.write_safetensors(path, weights()),
], ids=['zip', 'legacy', 'safetensors'])
def test_every_beginning_of_a_file_is_refused(tmp_path, make):
    make(tmp_path / 'x.pth')
    whole = (tmp_path / 'x.pth').read_bytes()
    for length in range(1, len(whole), 13):
        (tmp_path / 'short.pth').write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / 'short.pth')


@pytest.mark.parametrize('make', [
    lambda path: torch.save(weights(), path),
    lambda path: torch.save(weights(), path, **LEGACY),
    lambda path: checkpoint_file.write_safetensors(path, weights(), {'a': 'b'}),
], ids=['zip', 'legacy', 'safetensors'])
def test_a_wrong_byte_anywhere_gives_tensors_or_one_kind_of_error(tmp_path, make):
    make(tmp_path / 'x.pth')
    whole = (tmp_path / 'x.pth').read_bytes()
    refused = 0
    for place in range(0, len(whole), max(len(whole) // 400, 1)):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        (tmp_path / 'wrong.pth').write_bytes(changed)
        try:
            found = read_checkpoint(tmp_path / 'wrong.pth')
            assert sum(tensor.numel() for tensor in found.tensors.values()) < 1000
        except CheckpointError:
            refused += 1
    assert refused > 20


@BOTH_FORMATS
@pytest.mark.parametrize(('content', 'words'), [
    (torch.ones(3), 'holds a Tensor'),
    ([torch.ones(3)], 'holds a list'),
    ({}, 'found nothing'),
    ({'weight': 1.0}, 'must map names to tensors'),
    ({'weight': torch.ones(3), 'inner': {'weight': torch.ones(3)}}, "names to tensors.*found 'weight', 'inner'"),
    ({'model': {'weight': torch.ones(3), 'names': ['a']}}, 'must map names to tensors'),
    ({1: torch.ones(3)}, 'a name must be a string, found 1'),
    ({'a': torch.ones(3), 'module.a': torch.ones(3)}, "'a' is there with and without module"),
])
def test_what_does_not_map_names_to_tensors_is_refused(tmp_path, form, content, words):
    torch.save(content, tmp_path / 'x.pth', **form)
    refusal(tmp_path / 'x.pth', words)


@pytest.mark.parametrize(('tensor', 'words'), [
    (lambda: torch.eye(3).to_sparse(), 'asks for the global .*sparse tensor'),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), 'asks for the global .*quantised tensor'),
    (lambda: torch.ones(3, dtype=torch.complex64), 'asks for the global .*complex numbers'),
    (lambda: torch.ones(3, device='meta'), 'asks for the global'),
], ids=['sparse', 'quantised', 'complex', 'meta'])
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensor, words):
    torch.save({'weight': tensor()}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', words)


# ---- names of classes


@BOTH_FORMATS
def test_names_of_classes_are_taken_in_the_order_of_their_numbers(tmp_path, form):
    torch.save({'model': weights(), 'num_classes': 3, 'idx_to_class': {2: 'a <b>', 0: 'é', 1: 'c'}},
               tmp_path / 'x.pth', **form)
    assert read_checkpoint(tmp_path / 'x.pth').label_names == ('é', 'c', 'a <b>')


@pytest.mark.parametrize(('labels', 'count', 'words'), [
    ({0: 'a', 2: 'b'}, 2, 'not those from 0 to 1'),
    ({0: 'a', True: 'b'}, 2, 'not those from 0 to 1'),
    ({'0': 'a', '1': 'b'}, 2, 'not those from 0 to 1'),
    ({0: 'a', 1: 'a'}, 2, "'a' is the name of several classes"),
    ({0: 'a', 1: 'b'}, 3, '2 names, and num_classes is 3'),
    ({0: 'a', 1: 'b\x1b[31m'}, 2, r"'b\\x1b\[31m' is no printable name"),
    ({0: 'a', 1: 'b\u202e'}, 2, 'no printable name'),
    ({0: 'a', 1: ' '}, 2, 'no printable name'),
    ({0: 'a', 1: 7}, 2, '7 is no printable name'),
    ({0: 'a', 1: 'b' * 201}, 2, 'at most 200 characters'),
    ({}, 0, 'it has 0 names'),
    (['a', 'b'], 2, 'it is a list and not a dict'),
    ({number: str(number) for number in range(100_001)}, None, 'it has 100001 names'),
], ids=range(13))
def test_a_map_of_classes_that_cannot_be_used_is_left_out_with_a_warning(tmp_path, labels, count, words):
    torch.save({'model': weights(), 'num_classes': count, 'idx_to_class': labels}, tmp_path / 'x.pth')
    with pytest.warns(UserWarning, match=words) as caught:
        found = read_checkpoint(tmp_path / 'x.pth')
    assert caught[0].filename == __file__
    assert found.label_names is None
    assert_same(found.tensors, weights())


# ---- pickles that are programs


class Call:
    """What pickles into a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def torch_zip(path, code, *, top='x', more=()):
    """A file as torch.save writes it, with a pickle of one's own."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in ((f'{top}/data.pkl', code), (f'{top}/version', b'3\n'), *more):
            archive.writestr(name, content)


@pytest.mark.parametrize('nest', [
    lambda bomb: bomb,
    lambda bomb: {'model': {'weight': torch.ones(2), 'deep': [{'er': (bomb,)}]}},
    lambda bomb: collections.OrderedDict(weight=torch.ones(2), idx_to_class={0: bomb}),
], ids=['bare', 'deep', 'labels'])
@BOTH_FORMATS
def test_a_bomb_does_not_go_off(tmp_path, form, nest):
    marker = tmp_path / 'marker'
    torch.save(nest(Call(os.system, f'touch {marker}')), tmp_path / 'x.pth', **form)
    assert "asks for the global 'posix.system'" in refusal(tmp_path / 'x.pth', 'Nothing of it was run')
    assert not marker.exists()


@pytest.mark.parametrize('protocol', range(6))
def test_a_bare_pickle_does_not_go_off(tmp_path, protocol):
    marker = tmp_path / 'marker'
    (tmp_path / 'x.pth').write_bytes(pickle.dumps(Call(os.system, f'touch {marker}'), protocol))
    refusal(tmp_path / 'x.pth', 'posix.system' if protocol > 1 else 'is not a checkpoint')
    assert not marker.exists()


@BOTH_FORMATS
@pytest.mark.parametrize(('extra', 'named'), [
    (np.float64(81.5), 'numpy.*scalar'),
    (argparse.Namespace(lr=0.1), 'argparse.Namespace'),
    (torch.nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'),
    (np.ones(3), 'numpy.*reconstruct'),
], ids=['numpy', 'namespace', 'module', 'array'])
def test_the_three_lines_of_the_error_save_the_tensors(tmp_path, monkeypatch, form, extra, named):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it's.pth"
    torch.save({'state_dict': weights(), 'args': extra}, path, **form)
    message = refusal(path, named)
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert len(lines) == 3
    for program in '\n'.join(lines), ' '.join(lines):  # the command line shows an error as one line
        exec(program, {})
        [saved] = tmp_path.glob('tensors-*')
        assert_same(read_checkpoint(saved).tensors, weights())
        saved.unlink()


GLOBAL, STORAGE = b'ctorch._utils\n_rebuild_tensor_v2\n', b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
KEY = b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpu'


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor_code(*, items=b'K\x04', offset=b'K\x00', shape=b'K\x04\x85', stride=b'K\x01\x85', count=1, view=b''):
    """A pickle of a dict with one or several tensors of one storage."""
    one = GLOBAL + b'((' + STORAGE[1:] + KEY + items + view + b'tQ' + offset + shape + stride + (
        b'\x89ccollections\nOrderedDict\n)RtR')
    names = (number(f'w{each}') for each in range(count))
    return b'\x80\x02}(' + b''.join(name + one for name in names) + b'u.'


DATA = ('x/data/0', struct.pack('<4f', 1, 2, 3, 4))


def test_the_hand_made_file_is_one_that_torch_reads(tmp_path):
    torch_zip(tmp_path / 'x.pth', tensor_code(), more=[DATA])
    assert read_checkpoint(tmp_path / 'x.pth').tensors['w0'].tolist() == [1, 2, 3, 4]
    assert torch.load(tmp_path / 'x.pth', weights_only=True)['w0'].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(('changes', 'words'), [
    ({'items': number(TEN_GB)}, "storage '0' claims 40000000000 bytes and has 16"),
    ({'items': b'K\x03'}, 'reaches beyond its storage of 12'),
    ({'items': number(-1)}, "storage '0' is of no kind"),
    ({'items': number(True)}, "storage '0' is of no kind"),
    ({'items': number(4.0)}, "storage '0' is of no kind"),
    ({'offset': b'K\x01'}, 'reaches beyond its storage of 16'),
    ({'offset': number(-1)}, 'has shape'),
    ({'shape': number((TEN_GB,)), 'stride': number((0,))}, 'again and again, as after expand'),
    ({'shape': number((2**62, 4))[:-2], 'stride': number((0, 0))[:-2]}, 'again and again'),
    ({'shape': number((-4,))}, 'has shape'),
    ({'shape': number((2.0,))}, 'has shape'),
    ({'stride': number((-1,))}, 'has shape'),
    ({'stride': number((2**70,))}, 'reaches beyond'),
    ({'shape': number((1,) * 99), 'stride': number((1,) * 99)}, 'has shape'),
    ({'shape': number((2, 2))}, 'has shape'),
    ({'count': 2000}, 'more than 16 times the size of the file'),
    ({'view': number((0, 1))}, "storage '0' is of no kind"),
], ids=range(17))
def test_claims_of_tensors_are_compared_with_the_file(tmp_path, changes, words):
    if changes.get('count'):
        code = tensor_code(items=number(100_000), shape=number((100_000,)), **changes)
        torch_zip(tmp_path / 'x.pth', code, more=[('x/data/0', bytes(400_000))])
    else:
        torch_zip(tmp_path / 'x.pth', tensor_code(**changes), more=[DATA])
    refusal(tmp_path / 'x.pth', words)


def test_an_expanded_tensor_is_not_written_out(tmp_path):
    torch.save({'weight': torch.zeros(1).expand(TEN_GB // 4)}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', f'has {TEN_GB} bytes and shows the same 4 again and again')


def legacy_file(path, code, storages):
    parts = [pickle.dumps(part, 2) for part in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True})]
    path.write_bytes(b''.join(parts) + code + pickle.dumps(['0'], 2) + storages)


def test_a_legacy_file_cannot_claim_more_than_it_has(tmp_path):
    good = struct.pack('<q4f', 4, 1, 2, 3, 4)
    legacy_file(tmp_path / 'x.pth', tensor_code(view=b'N'), good)
    assert read_checkpoint(tmp_path / 'x.pth').tensors['w0'].tolist() == [1, 2, 3, 4]
    legacy_file(tmp_path / 'x.pth', tensor_code(view=b'N', items=number(TEN_GB)), good)
    refusal(tmp_path / 'x.pth', 'its tensors claim 40000000000 bytes, and 24 are left')


@pytest.mark.parametrize(('code', 'words'), [
    (b'cbuiltins\nbytearray\n' + number((TEN_GB,)) + b'R', "global 'builtins.bytearray'"),
    (b'cbuiltins\neval\n' + number(('1',)) + b'R', "global 'builtins.eval'"),
    (b'ctorch.storage\nUntypedStorage\n' + number((TEN_GB,)) + b'R', "call of 'torch.storage.UntypedStorage'"),
    (b'ccollections\nOrderedDict\n' + number(([('a', 1)],)) + b'R', "call of 'collections.OrderedDict'"),
    (b'ctorch\nfloat32\n)R', "call of 'torch.float32'"),
    (b'ctorch\nhub\n', "global 'torch.hub'"),
    (b'ctorch.hub\nload\n', "global 'torch.hub.load'"),
    (b'ctorch._utils\n_rebuild_tensor_v2\n}b', 'given a state'),
    (number('a') + number('b') + b'\x93', "global 'a.b'"),
    (b')R', 'takes what is not there'),
    (number(1) + b')R', 'a call of what is no function'),
    (b'(iposix\nsystem\n', 'instruction INST'),
    (b'ccollections\nOrderedDict\n)\x81', 'instruction NEWOBJ'),
    (b'\x82\x01', 'instruction EXT1'),
    (b'N2', 'instruction DUP'),
    (b'X\xff\xff\xff\x7fab', 'damaged'),
    (b'\x8d' + struct.pack('<Q', TEN_GB) + b'ab', 'damaged|instruction'),
    (b'\x8e' + struct.pack('<Q', TEN_GB) + b'ab', 'damaged|instruction'),
    (b'h\x07', 'damaged'),
    (b'u', 'damaged'),
    (b'N', 'exhausted'),
    (b'}' + number((1, 2)) + b'Ns', 'a key is a tuple'),
    (b'(' + number((1,)) + b'\x90', 'damaged'),
], ids=range(23))
def test_instructions_beyond_tensors_in_dictionaries_are_refused(tmp_path, code, words):
    torch_zip(tmp_path / 'x.pth', b'\x80\x02' + code + (b'' if words == 'exhausted' else b'.'))
    refusal(tmp_path / 'x.pth', words)


def test_a_key_nested_too_deeply_does_not_end_the_process(tmp_path):
    torch_zip(tmp_path / 'x.pth', b'\x80\x02})' + b'\x85' * 100_000 + b'K\x01s.')
    refusal(tmp_path / 'x.pth', 'a key is a tuple')


def test_a_value_nested_too_deeply_is_only_an_extra(tmp_path):
    inner = tensor_code()[2:-1]
    code = b'\x80\x02}(' + number('model') + inner + number('deep') + b')' + b'\x85' * 100_000 + b'u.'
    torch_zip(tmp_path / 'x.pth', code, more=[DATA])
    assert read_checkpoint(tmp_path / 'x.pth').extras == ('deep',)


@pytest.mark.parametrize('wrap', [b'%s', b'}' + number('model') + b'%ss'], ids=['bare', 'wrapped'])
def test_attributes_of_a_dictionary_hide_none_of_its_methods(tmp_path, wrap):
    hidden = b'}(' + b''.join(number(name) + b'N' for name in ('items', 'get', 'values', 'keys')) + b'u'
    code = b'ccollections\nOrderedDict\n)R(' + tensor_code()[4:-2] + b'u' + hidden + b'b'
    torch_zip(tmp_path / 'x.pth', b'\x80\x02' + wrap % code + b'.', more=[DATA])
    assert read_checkpoint(tmp_path / 'x.pth').tensors['w0'].tolist() == [1, 2, 3, 4]


def test_a_description_without_end_is_not_read(tmp_path):
    torch_zip(tmp_path / 'x.pth', b'\x80\x02' + b'N' * MAX_PICKLE_BYTES + b'.')
    refusal(tmp_path / 'x.pth', f'its description of the tensors has {MAX_PICKLE_BYTES + 3} bytes')


# ---- zip files


@pytest.mark.parametrize('name', [
    '../x/evil', 'x/../../evil', '/etc/evil', 'x/..', 'C:/evil', 'x/a\\..\\evil', 'x/a\nb'])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    torch_zip(tmp_path / 'x.pth', tensor_code(), more=[DATA, (name, b'evil')])
    refusal(tmp_path / 'x.pth', 'it has an entry named .* outside')
    assert [entry.name for entry in tmp_path.parent.iterdir() if entry.name == 'evil'] == []


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_zip_files_of_other_make_are_refused(tmp_path):
    path = tmp_path / 'x.pth'
    torch_zip(path, tensor_code(), more=[DATA, DATA])
    refusal(path, 'two of its entries have one name')
    torch_zip(path, tensor_code(), more=[DATA, ('y/data.pkl', b'')])
    refusal(path, 'not one of torch.save; unpack it')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/weights.bin', b'1')
    refusal(path, 'damaged, or no checkpoint: .*data.pkl')
    torch_zip(path, tensor_code())
    refusal(path, 'x/data/0')
    torch_zip(path, tensor_code(), more=[DATA, ('x/constants.pkl', b'')])
    refusal(path, 'asks for a TorchScript program')


def test_compressed_bombs_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', tensor_code())
        archive.writestr('x/data/0', bytes(30_000_000))
    refusal(tmp_path / 'x.pth', "entry .* is compressed")


def test_compression_that_changes_no_size_is_refused_too(tmp_path):
    content = next(b'a' * length for length in range(4, 20) if len(zlib.compress(b'a' * length, wbits=-15)) == length)
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as archive:
        archive.writestr('x/data.pkl', tensor_code())
        archive.writestr('x/data/0', content, zipfile.ZIP_DEFLATED)
        assert archive.getinfo('x/data/0').compress_size == len(content)
    refusal(tmp_path / 'x.pth', "entry 'x/data/0' is compressed")


def patched(path, field, value):
    """The same file, with the sizes of its last entry changed wherever they stand."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b'PK\x01\x02', 20), (b'PK\x03\x04', 18)):
        place = content.rindex(signature) + offset
        content[place:place + 8] = struct.pack('<II', *field(value))
    path.write_bytes(content)


def test_declared_sizes_above_the_file_are_refused(tmp_path):
    torch_zip(tmp_path / 'x.pth', tensor_code(items=number(1_000_000_000)), more=[DATA])
    patched(tmp_path / 'x.pth', lambda size: (size, size), 4_000_000_000)
    refusal(tmp_path / 'x.pth', 'its entries claim more than the')
    patched(tmp_path / 'x.pth', lambda size: (16, size), 4_000_000_000)
    refusal(tmp_path / 'x.pth', 'is compressed, 16 bytes for 4000000000')


def test_a_directory_that_claims_gigabytes_is_not_read(tmp_path):
    torch_zip(tmp_path / 'x.pth', tensor_code(), more=[DATA])
    content = (tmp_path / 'x.pth').read_bytes()
    end = bytearray(content[content.rindex(b'PK\x05\x06'):])
    end[12:20] = struct.pack('<II', 100_000_000, 0)
    (tmp_path / 'x.pth').write_bytes(content[:4] + os.urandom(100_000_000) + end)
    refusal(tmp_path / 'x.pth', 'its list of entries claims 100000000 bytes')


# ---- files that are larger than what is in them


@pytest.mark.parametrize('make', [
    lambda path: torch_zip(path, tensor_code(), more=[DATA]),
    lambda path: torch.save(weights(), path, **LEGACY),
    lambda path: checkpoint_file.write_safetensors(path, weights()),
], ids=['zip', 'legacy', 'safetensors'])
def test_a_sparse_file_is_refused(tmp_path, make):
    make(tmp_path / 'x.pth')
    os.truncate(tmp_path / 'x.pth', TEN_GB)
    refusal(tmp_path / 'x.pth', f'has a length of {TEN_GB} bytes, of which .* are there')


def test_hostile_files_need_no_memory(tmp_path):
    """In a process that may have 300 MB more than it starts with."""
    torch_zip(tmp_path / '1.pth', tensor_code(items=number(TEN_GB)), more=[DATA])
    legacy_file(tmp_path / '2.pth', tensor_code(view=b'N', items=number(TEN_GB)), bytes(24))
    torch_zip(tmp_path / '3.pth', b'\x80\x02cbuiltins\nbytearray\n' + number((TEN_GB,)) + b'R.')
    torch.save({'weight': torch.zeros(1).expand(TEN_GB // 4)}, tmp_path / '4.pth')
    header = b'{"w":{"dtype":"U8","shape":[10000000000],"data_offsets":[0,10000000000]}}'
    for number_, body in ((5, b''), (6, bytes(100))):
        (tmp_path / f'{number_}.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + body)
    os.truncate(tmp_path / '6.safetensors', TEN_GB + len(header) + 8)
    (tmp_path / '7.safetensors').write_bytes(struct.pack('<Q', TEN_GB) + header)
    torch_zip(tmp_path / '8.pth', b'\x80\x02Nr\xff\xff\xff\xff.')    # a place four thousand million up in the memo
    code = textwrap.dedent('''
        import resource, sys
        from pathlib import Path
        from timm_miil._errors import CheckpointError
        from timm_miil.models.checkpoint_file import read_checkpoint
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
        for path in sorted(Path(sys.argv[1]).iterdir()):
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                print(path.name, error)
    ''')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert [line.split('.')[0] for line in done.stdout.splitlines() if not line.startswith(' ')] == list('12345678')
    assert 'MemoryError' not in done.stdout and 'alloc' not in done.stdout


def test_nothing_of_torch_save_is_lost_by_the_checks(tmp_path):
    """A network of many kinds of layers, with all that a state dict carries."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.MultiheadAttention(4, 2), torch.nn.LSTM(4, 4),
        torch.nn.Embedding(3, 4)).half()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    (tmp_path / 'x.pth').write_bytes(buffer.getvalue())    # its folder has another name than the file
    assert_same(read_checkpoint(tmp_path / 'x.pth').tensors, dict(network.state_dict()))
