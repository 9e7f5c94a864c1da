"""The data set that feeds a network, and the generators it borrows."""
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_miil._errors import ImageError
from timm_miil.data import (
    ImageStream, LabelledImages, MultiLabelDataset, MultiLabelRecords, SparseTargets, decode_image, load_image,
    mix_seed, seeded)
from timm_miil.data._packed import PackedPaths
from timm_miil.data.records import check_share


@pytest.fixture
def records(tmp_path):
    paths = []
    for number in range(6):
        paths.append(tmp_path / f'{number}.png')
        Image.new('L', (4, 3), number).save(paths[-1])
    return MultiLabelRecords(tuple(paths), torch.eye(6, dtype=torch.uint8), tuple('abcdef'))


def noisy(picture):
    """A transform that draws from all three global generators."""
    assert picture.mode == 'RGB' and picture.size == (4, 3)
    return torch.tensor([picture.getpixel((0, 0))[0], random.random(), np.random.random(), torch.rand(()).item()])


def collect(dataset, **loading):
    return torch.cat([images for images, _ in DataLoader(dataset, batch_size=2, **loading)])


def test_an_item_is_picture_and_float_targets(records):
    image, targets = MultiLabelDataset(records, noisy)[2]
    assert image[0] == 2 and targets.dtype == torch.float32 and targets.tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads
def test_seeded_draws_depend_on_seed_epoch_and_index_alone(records):
    dataset = MultiLabelDataset(records, noisy, seed=5)
    first = collect(dataset)
    assert len(set(first[:, 1].tolist())) == 6
    assert torch.equal(collect(dataset, num_workers=2), first)
    assert torch.equal(torch.stack([dataset[index][0] for index in reversed(range(6))]).flip(0), first)
    dataset.set_epoch(1)
    assert not torch.equal(collect(dataset), first)
    assert not torch.equal(collect(MultiLabelDataset(records, noisy, seed=6)), first)


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads
def test_workers_see_a_new_epoch(records):
    dataset = MultiLabelDataset(records, noisy, seed=5)
    loader = DataLoader(dataset, batch_size=6, num_workers=1)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs += [next(iter(loader))[0], torch.stack([dataset[index][0] for index in range(6)])]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[2], epochs[3])
    assert not torch.equal(epochs[0], epochs[2])


def test_without_a_seed_the_global_generators_serve(records):
    dataset = MultiLabelDataset(records, noisy)
    with seeded(3):
        first = dataset[0][0]
    with seeded(3):
        assert torch.equal(dataset[0][0], first)
        assert not torch.equal(dataset[0][0], first)


def test_seeded_leaves_the_callers_generators_alone():
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with pytest.raises(RuntimeError):
        with seeded(1):
            inside = draw()
            raise RuntimeError
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert torch.equal(torch.get_rng_state(), before[2])
    with seeded(1):
        assert draw() == inside


def test_mixed_seeds_differ_in_every_part():
    seeds = [mix_seed(a, b) for a in range(30) for b in range(30)]
    assert len(set(seeds)) == 900 and all(0 <= seed < 2 ** 32 for seed in seeds)
    assert mix_seed(1, 23) == 3629837499  # recorded: a seed must go on meaning the same run


def test_sizes_must_agree(records):
    with pytest.raises(ValueError, match=r'targets must have shape \(6, 5\) for 6 pictures and 5 labels, got \(6, 6\)'):
        MultiLabelRecords(records.image_paths, records.targets, tuple('abcde'))
    with pytest.raises(TypeError, match='targets must be uint8 or int8, got torch.float32'):
        MultiLabelRecords(records.image_paths, records.targets.float(), records.label_names)


def test_unknown_labels_reach_the_network(records):
    targets = torch.tensor([[1, -1, 0, 0, 0, 0]] * 6, dtype=torch.int8)
    image, row = MultiLabelDataset(MultiLabelRecords(records.image_paths, targets, tuple('abcdef')), noisy)[0]
    assert row.tolist() == [1, -1, 0, 0, 0, 0] and row.dtype == torch.float32


@pytest.mark.parametrize('pick', [list, torch.tensor, np.array])
def test_some_pictures_in_another_order(records, pick):
    some = records.select(pick([4, 1, 1]))
    assert type(some) is MultiLabelRecords and len(some) == 3
    assert some.targets.argmax(1).tolist() == [4, 1, 1]
    assert [some.load_image(index).getpixel((0, 0))[0] for index in range(3)] == [4, 1, 1]
    assert [Path(some.image_name(index)).name for index in range(3)] == ['4.png', '1.png', '1.png']
    assert len(records.select([])) == 0
    with pytest.raises(IndexError, match=r'rows must be in \[0, 6\), got 6'):
        records.select([6])


def test_some_labels_in_another_order(records):
    some = records.with_labels(['e', 'a'])
    assert some.label_names == ('e', 'a') and some.targets.tolist() == [[0, 1], *[[0, 0]] * 3, [1, 0], [0, 0]]
    assert records.label_names == tuple('abcdef') and some.image_paths == records.image_paths
    with pytest.raises(ValueError, match=r"unknown label 'g'; .*Known: a, b, c, d, e, f"):
        records.with_labels(['g'])
    with pytest.raises(ValueError, match=r"label names must be distinct, got 'a' twice"):
        records.with_labels(['a', 'a'])


def test_labels_may_be_sparse_and_names_must_fit(records):
    sparse = MultiLabelRecords(records.image_paths, SparseTargets.from_dense(records.targets), tuple('abcdef'))
    assert torch.equal(sparse.targets, records.targets) and sparse.targets.dtype == torch.int8
    with pytest.raises(ValueError, match="label names must be distinct, got 'a' twice"):
        MultiLabelRecords(records.image_paths, records.targets, tuple('abcdea'))
    with pytest.raises(TypeError, match='targets must be a tensor or SparseTargets, got list'):
        MultiLabelRecords(records.image_paths, records.targets.tolist(), tuple('abcdef'))

    class Fewer(LabelledImages):
        load_image = image_name = select = None
    with pytest.raises(ValueError, match='label_names must have one name a column, got 1 names for 6 columns'):
        Fewer(sparse.labels, ['a'])


def test_a_stream_has_distinct_labels():
    class Nothing(ImageStream):
        def iterate(self, *, seed, epoch, process, num_processes):
            return iter(())
    assert Nothing(['a', 'b'], 7).num_images == 7
    with pytest.raises(ValueError, match="label names must be distinct, got 'a' twice"):
        Nothing(['a', 'a'], 7)


@pytest.mark.parametrize('change, error, words', [
    ({'process': 2}, ValueError, 'process must be below num_processes, got 2 of 2'),
    ({'process': -1}, ValueError, 'process must be at least 0, got -1'),
    ({'epoch': -1}, ValueError, 'epoch must be at least 0, got -1'),
    ({'num_processes': 0}, ValueError, 'num_processes must be at least 1, got 0'),
    ({'num_processes': 1.0}, TypeError, 'num_processes must be an int, got float 1.0'),
])
def test_a_share_that_cannot_be_is_refused(change, error, words):
    check_share(epoch=0, process=1, num_processes=2)
    with pytest.raises(error, match=words):
        check_share(**{'epoch': 0, 'process': 0, 'num_processes': 2} | change)


def test_records_travel_to_other_processes_packed(records):
    many = records.select(np.zeros(20_000, dtype=int))
    data = pickle.dumps(many)
    assert len(data) < 20_000 * (len(str(records.image_paths[0])) + 30)
    assert pickle.loads(data).image_paths[19_999] == records.image_paths[0]


def test_packed_paths_are_a_sequence_of_paths(tmp_path):
    names = ['a.png', 'sub/ü b.png', os.fsdecode(b'\xff.png'), 'a.png']
    paths = PackedPaths(names, tmp_path)
    assert list(paths) == [tmp_path / name for name in names] and len(paths) == 4
    assert paths[-2] == tmp_path / names[2] and paths[1:3] == [tmp_path / name for name in names[1:3]]
    assert paths != list(paths)[:3] and paths != 7 and paths.name(1) == names[1]
    assert paths.select([3, 1])[1] == tmp_path / names[1] and str(tmp_path) in repr(paths)
    assert list(map(os.fsdecode, paths.raw())) == [str(path) for path in paths]
    assert PackedPaths(list(paths)) == paths and paths.select([]) == ()
    with pytest.raises(IndexError, match=r'index must be in \[-4, 4\), got 4'):
        paths[4]
    with pytest.raises(IndexError, match=r'indices must be in \[0, 4\), got -1 to 0'):
        paths.select([0, -1])


def test_pictures_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture = Image.new('RGB', (4, 3))
    picture.save(tmp_path / 'a.jpg', exif=exif)
    assert load_image(tmp_path / 'a.jpg').size == (3, 4)
    assert decode_image((tmp_path / 'a.jpg').read_bytes(), 'a').size == (3, 4)
    records = MultiLabelRecords([tmp_path / 'a.jpg'], torch.ones(1, 1, dtype=torch.uint8), 'x')
    assert records.load_image(0).size == (3, 4)


def test_a_picture_that_cannot_be_read_is_named(tmp_path, records):
    with pytest.raises(ImageError, match=r"^cannot read '.*lost.png': no such file or directory\.$"):
        MultiLabelDataset(MultiLabelRecords([tmp_path / 'lost.png'], records.targets[:1], tuple('abcdef')), noisy)[0]
    with pytest.raises(ImageError, match=r"^cannot read 'shard/7': the file is empty\.$"):
        decode_image(b'', 'shard/7')
    with pytest.raises(ImageError, match=r"^cannot read 'shard/7': it is not a JPEG, PNG, "):
        decode_image(b'hello', 'shard/7')
