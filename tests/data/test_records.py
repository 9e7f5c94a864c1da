"""The data set that feeds a network, and the generators it borrows."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_miil.data import MultiLabelDataset, MultiLabelRecords, mix_seed, seeded


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
