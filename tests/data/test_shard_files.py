"""Shards that are missing, broken, hostile or of another program."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_miil.data import MultiLabelRecords, _shard_tar
from timm_miil.data.shards import index_shards, read_shards, write_shards

NAMES = ('cat', 'dog', 'gnu')
forks = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads


@pytest.fixture
def copied(tmp_path) -> Path:
    """23 pictures in 5 shards."""
    (tmp_path / 'in').mkdir()
    files = [tmp_path / 'in' / f'{number}.png' for number in range(23)]
    for file in files:
        Image.new('L', (4, 3)).save(file)
    write_shards(
        MultiLabelRecords(files, torch.ones(23, 3, dtype=torch.uint8), NAMES), tmp_path, split='train',
        images_per_shard=5, workers=0)
    return tmp_path


def read_all(folder: Path, split: str) -> list[tuple[Image.Image, torch.Tensor, str]]:
    return list(read_shards(folder, split).iterate(seed=None, epoch=0, process=0, num_processes=1))


def test_missing_shards_are_counted_and_named(copied):
    for number in (1, 3):
        (copied / f'train-00000{number}.tar').unlink()
    with pytest.raises(FileNotFoundError, match=(
            r'2 of 5 shards of .*train.shards.json are missing: train-000001.tar, train-000003.tar; bring them back')):
        read_shards(copied, 'train')


def test_a_shard_of_another_size_is_broken(copied):
    path = copied / 'train-000002.tar'
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=(
            r'1 of 5 shards of .*train.shards.json are broken: train-000002.tar \(\d+ bytes instead of \d+\); bring')):
        read_shards(copied, 'train')


@pytest.mark.parametrize('change, words', [
    (lambda index: index.update(format=2), "'format' 1"),
    (lambda index: index.update(split='val'), "'split' 'train'"),
    (lambda index: index.update(source=None), "'source', a string"),
    (lambda index: index.update(images=22), "'images', the sum of those of the shards"),
    (lambda index: index.update(shards=[], images=0), "'images', the sum of those of the shards"),
    (lambda index: index.update(shards={}), "a list 'shards'"),
    (lambda index: index.pop('labels'), "a list 'labels'"),
    (lambda index: index.update(labels=[]), 'labels with names of their own'),
    (lambda index: index['labels'].append(index['labels'][0]), 'labels with names of their own'),
    (lambda index: index['shards'].append(index['shards'][0]), 'shards with names of their own'),
    (lambda index: index['shards'][1].update(file='../x.tar'), 'shards whose names are plain, without folders'),
    (lambda index: index['shards'][1].update(file='/etc/passwd'), 'shards whose names are plain, without folders'),
    (lambda index: index['shards'][1].update(images=-5), r'shards\[1\] with exactly file, images, bytes, sha256'),
    (lambda index: index['shards'][1].update(images=True), r'shards\[1\] with exactly file, images, bytes, sha256'),
    (lambda index: index['shards'][1].update(more=1), r'shards\[1\] with exactly file, images, bytes, sha256'),
    (lambda index: index['labels'].insert(0, 7), r'labels\[0\] with exactly name, present, absent, unknown'),
])
def test_a_damaged_index_is_refused(copied, change, words):
    path = copied / 'train.shards.json'
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'train.shards.json must have {words}; it is no index of shards, or a'):
        read_shards(copied, 'train')


@pytest.mark.parametrize('text', ['', '{', '[' * 100_000, '\udcff'])
def test_an_index_that_is_no_json_is_refused(copied, text):
    (copied / 'train.shards.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match='train.shards.json is not a JSON file: '):
        read_shards(copied, 'train')


def png() -> bytes:
    file = io.BytesIO()
    Image.new('L', (4, 3)).save(file, 'PNG')
    return file.getvalue()


def tar_of(*members: tuple[str, bytes], change=None, format=tarfile.USTAR_FORMAT) -> bytes:
    """A tar file; `change` is applied to the head of the first member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w', format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if change:
                change(member)
                change = None
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


SAMPLE = (('a.png', png()), ('a.json', b'{"present": ["cat"]}'))


def with_size(size: int) -> bytes:
    """A shard whose first head claims a size, its checksum right."""
    data = bytearray(tar_of(*SAMPLE))
    if 0 <= size < 8 ** 11:
        data[124:136] = b'%011o\0' % size
    else:
        data[124:136] = bytes([0x80 if size > 0 else 0xff]) + size.to_bytes(11, 'big', signed=True)
    data[148:156] = b' ' * 8
    data[148:156] = b'%06o\0 ' % sum(data[:512])
    return bytes(data)


def long_head(size: int) -> bytes:
    """A member with extended attributes that claim a size."""
    data = bytearray(tar_of(('b.png', png()), change=lambda member: member.pax_headers.update(comment='x'),
                            format=tarfile.PAX_FORMAT))
    assert data[156:157] == b'x'
    data[124:136] = b'%011o\0' % size
    data[148:156] = b' ' * 8
    data[148:156] = b'%06o\0 ' % sum(data[:512])
    return bytes(data)


HOSTILE = {
    'parent': (tar_of(*SAMPLE, ('../b.png', png())), r"its member '../b.png' leaves the folder"),
    'inner parent': (tar_of(('a/../../b.png', png())), r"its member 'a/../../b.png' leaves the folder"),
    'absolute': (tar_of(('/etc/b.png', png())), r"its member '/etc/b.png' leaves the folder"),
    'backslash': (tar_of(('a\\..\\..\\b.png', png())), 'leaves the folder'),
    'symbolic link': (
        tar_of(('b.png', b''), change=lambda member: setattr(member, 'type', tarfile.SYMTYPE)),
        "its member 'b.png' is neither file nor folder"),
    'hard link': (
        tar_of(('b.png', b''), change=lambda member: setattr(member, 'type', tarfile.LNKTYPE)),
        "its member 'b.png' is neither file nor folder"),
    'sparse file': (
        tar_of(('b.png', b''), change=lambda member: setattr(member, 'type', tarfile.GNUTYPE_SPARSE)),
        "its member 'b.png' is neither file nor folder"),
    'device': (
        tar_of(('b.png', b''), change=lambda member: setattr(member, 'type', tarfile.CHRTYPE)),
        "its member 'b.png' is neither file nor folder"),
    'pipe': (
        tar_of(('b.png', b''), change=lambda member: setattr(member, 'type', tarfile.FIFOTYPE)),
        "its member 'b.png' is neither file nor folder"),
    'huge claim': (with_size(8 ** 11 - 1), r"its member 'a.png' claims 8589934591 bytes, and the whole shard has \d+"),
    'huger claim': (with_size(2 ** 80), r"its member 'a.png' claims 1208925819614629174706176 bytes"),
    'negative claim': (with_size(-512), "its member 'a.png' claims -512 bytes"),
    'huge head': (long_head(8 ** 11 - 1), r'a head claims 8589934592 bytes, and 65536 at most are read'),
    'twice': (tar_of(*SAMPLE, SAMPLE[0]), "its member 'a.png' is there twice"),
    'two pictures': (tar_of(*SAMPLE, ('a.jpg', png())), "its sample 'a' must have one .* got .jpg, .json, .png"),
    'no labels': (tar_of(*SAMPLE, ('b.png', png())), r"its sample 'b' must have one picture and labels .* got .png"),
    'no picture': (tar_of(*SAMPLE, ('b.json', b'{}')), r"its sample 'b' must have one picture and labels .* got .json"),
    'no tar': (b'no tar' * 1000, 'it is not a whole tar file'),
    'empty': (b'', 'it is not a whole tar file'),
    'gzip': (b'\x1f\x8b' + bytes(1000), 'it is not a whole tar file'),
    'cut in a head': (tar_of(*SAMPLE)[:700], 'it is not a whole tar file'),
    'cut in a member': (tar_of(*SAMPLE)[:1100 + 512], 'claims 20 bytes|it is not a whole tar file'),
    'no end': (tar_of(*SAMPLE)[:2048], r'it is not a whole tar file \(its end is missing\)'),
    'damaged head': (
        tar_of(*SAMPLE)[:1024] + b'\1' + tar_of(*SAMPLE)[1025:], r'it is not a whole tar file \(its end is missing\)'),
    'another number': (tar_of(), 'it has 0 samples and the index says 1|it is not a whole'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_tar_file_that_is_no_shard_is_refused(tmp_path, name):
    data, words = HOSTILE[name]
    write_one(tmp_path, data)
    with pytest.raises(ValueError, match=f'x.tar is broken: .*(?:{words}).*; write it again'):
        read_all(tmp_path, 'x')
    (tmp_path / 'x.shards.json').unlink()
    with pytest.raises(ValueError, match=f'x.tar(: .*(?:{words})|  ?has no pictures)'):
        index_shards(tmp_path, split='x', workers=0)
    assert not (tmp_path / 'x.shards.json').exists() and not (tmp_path.parent / 'b.png').exists()


def write_one(folder: Path, data: bytes) -> None:
    """A shard x.tar with an index that fits."""
    (folder / 'x.tar').write_bytes(data)
    (folder / 'x.shards.json').write_text(json.dumps({
        'format': 1, 'images': 1, 'split': 'x', 'source': '', 'labels': [
            {'name': 'cat', 'present': 1, 'absent': 0, 'unknown': 0}],
        'shards': [{'file': 'x.tar', 'images': 1, 'bytes': len(data), 'sha256': ''}]}))


def test_a_member_that_is_larger_than_any_is_refused(tmp_path, monkeypatch):
    write_one(tmp_path, tar_of(*SAMPLE))
    monkeypatch.setattr(_shard_tar, 'MAX_LABEL_BYTES', 19)
    with pytest.raises(ValueError, match="x.tar is broken: its member 'a.json' has 20 bytes, and 19 at most are read"):
        read_all(tmp_path, 'x')
    monkeypatch.setattr(_shard_tar, 'MAX_PICTURE_BYTES', 20)
    with pytest.raises(ValueError, match=r"x.tar is broken: its member 'a.png' has \d+ bytes, and 20 at most are read"):
        read_all(tmp_path, 'x')


@pytest.mark.parametrize('labels, words', [
    (b'', 'its labels are no JSON'),
    (b'\xff', 'its labels are no JSON'),
    (b'[' * 100_000, 'its labels are no JSON'),
    (b'[]', r'its labels must be a JSON object, got \[\]'),
    (b'{}', "its labels must have 'labels', a list of names, got None"),
    (b'{"present": "cat"}', "its labels must have 'present', a list of names, got 'cat'"),
    (b'{"present": [1]}', r"its labels must have 'present', a list of names, got \[1\]"),
    (b'{"present": [], "absent": null}', "its labels must have 'absent', a list of names, got None"),
    (b'{"present": [], "absent": [], "unknown": []}', "its labels must have one of 'unknown' and .*; got both"),
    (b'{"present": ["cat"], "absent": ["cat"]}', "its label 'cat' is in two lists"),
    (b'{"present": ["dog"]}', "its label 'dog' is not in the index"),
])
def test_wrong_labels_are_refused_with_their_sample(tmp_path, labels, words):
    write_one(tmp_path, tar_of(SAMPLE[0], ('a.json', labels)))
    with pytest.raises(ValueError, match=f'x.tar, a: {words}'):
        read_all(tmp_path, 'x')


# ---- shards of another program


def test_shards_of_the_package_webdataset_are_indexed(tmp_path):
    webdataset = pytest.importorskip('webdataset', reason='needs the extra data')
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f'train-{shard}.tar')) as writer:
            for number in range(4):
                writer.write({
                    '__key__': f'part/{shard}{number}', 'jpg': np.full((8, 8, 3), 60 * number, np.uint8),
                    'txt': 'words', 'json': {'labels': NAMES[:number], 'width': 8}})
    (tmp_path / 'train-notes.txt').write_text('no shard')
    seen = []
    index = index_shards(tmp_path, split='train', workers=0, on_progress=lambda *step: seen.append(step))
    assert [(row.name, row.present, row.absent, row.unknown) for row in index.labels] == [
        ('cat', 6, 2, 0), ('dog', 4, 4, 0), ('gnu', 2, 6, 0)]
    assert seen == [(1, 2), (2, 2)]
    passed = read_all(tmp_path, 'train')
    assert [image.getpixel((0, 0))[0] for image, _, _ in passed] == [0, 60, 120, 180] * 2
    assert [targets.tolist() for _, targets, _ in passed[:3]] == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert passed[0][2].endswith('train-0.tar, part/00')
    with pytest.raises(FileExistsError, match='train.shards.json is there; delete it to have it made anew'):
        index_shards(tmp_path, split='train', workers=0)


@forks
def test_classes_by_number_need_names(tmp_path):
    for shard in range(2):
        (tmp_path / f'{shard}.tar').write_bytes(tar_of(
            ('a.png', png()), ('a.cls', b'2\n'), ('b.jpeg', png()), ('b.cls', b'%d' % shard)))
    with pytest.raises(ValueError, match='0.tar, a: its label is the number of a class; give labels, the names'):
        index_shards(tmp_path, split='val', pattern='*.tar', workers=0)
    with pytest.raises(ValueError, match='0.tar, a: its class must be below 2, the number of labels, got 2'):
        index_shards(tmp_path, split='val', pattern='*.tar', labels=NAMES[:2], workers=0)
    index_shards(tmp_path, split='val', pattern='*.tar', labels=NAMES, workers=2)
    passed = read_all(tmp_path, 'val')
    assert [targets.tolist() for _, targets, _ in passed] == [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_counts_of_labels_that_are_left_to_the_rest(tmp_path):
    listed = [
        {'present': ['cat']}, {'present': ['dog'], 'absent': ['cat']}, {'present': [], 'unknown': ['dog']},
        {'present': [], 'absent': []}]
    (tmp_path / 'a.tar').write_bytes(tar_of(*(
        member for number, labels in enumerate(listed)
        for member in ((f'{number}.png', png()), (f'{number}.json', json.dumps(labels).encode())))))
    index = index_shards(tmp_path, split='a', workers=0)
    passed = read_all(tmp_path, 'a')
    targets = torch.stack([targets for _, targets, _ in passed])
    assert targets.tolist() == [[1, 0], [0, 1], [0, -1], [-1, -1]]
    for column, row in enumerate(index.labels):
        assert (row.present, row.absent, row.unknown) == tuple(
            int((targets[:, column] == value).sum()) for value in (1, 0, -1))


@pytest.mark.parametrize('options, error, words', [
    ({'split': 'none'}, FileNotFoundError, r"has no files 'none\*.tar'"),
    ({'split': 'x', 'pattern': '../*.tar'}, ValueError, "pattern must be of names in the folder, got '../"),
    ({'split': 'x', 'labels': ['dog']}, ValueError,
     r"has labels that are not among the 1 given ones: 'cat' \(x.tar\); correct them or give labels that has them[.]$"),
    ({'split': 'odd name', 'pattern': '*.tar'}, ValueError, 'split must be a plain word'),
    ({'split': 'odd', 'pattern': '* name.tar'}, ValueError, r'odd name.tar must have a plain name .*; rename it'),
    ({'split': 'digits'}, ValueError, r"its class must be a number in digits, got b'-1'"),
])
def test_what_cannot_be_indexed(tmp_path, options, error, words):
    for name in ('x.tar', 'odd name.tar'):
        (tmp_path / name).write_bytes(tar_of(*SAMPLE))
    (tmp_path / 'digits.tar').write_bytes(tar_of(SAMPLE[0], ('a.cls', b'-1')))
    with pytest.raises(error, match=words):
        index_shards(tmp_path, workers=0, **options)
