"""Which pictures a step takes and what happens to them, whoever reads them, and the generators that are borrowed."""
import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_miil.data.shards as shards_module
import timm_miil.train._loaders as loaders_module
from timm_miil._errors import ImageError
from timm_miil.data import ImageStream, MultiLabelDataset, MultiLabelRecords, read_shards, seeded, write_shards
from timm_miil.train._loaders import EpochLoader, Share, StreamLoader

NUM_IMAGES, BATCH, STEPS = 27, 8, 3
NAMES = [f'{number}.png' for number in range(NUM_IMAGES)]
both = pytest.mark.parametrize('kind', ['files', 'stream'])


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    """Picture i is i grey and has one label, i modulo 3; of the next one nothing is known."""
    folder = tmp_path_factory.mktemp('grey')
    for number, name in enumerate(NAMES):
        Image.new('L', (4, 3), number).save(folder / name)
    targets = torch.zeros(NUM_IMAGES, 3, dtype=torch.int8)
    rows = torch.arange(NUM_IMAGES)
    targets[rows, rows % 3], targets[rows, (rows + 1) % 3] = 1, -1
    return MultiLabelRecords([folder / name for name in NAMES], targets, 'abc')


@pytest.fixture(scope='module')
def shards(records, tmp_path_factory):
    """As a stream, in shards of five pictures."""
    folder = tmp_path_factory.mktemp('grey_shards')
    write_shards(records, folder, split='train', images_per_shard=5, workers=0)
    return read_shards(folder, 'train')


class Stream(ImageStream):
    """Shuffled pictures, of which a reader has every num_processes-th one, or the first few of those."""

    def __init__(self, records, *, most=(NUM_IMAGES, NUM_IMAGES)):
        super().__init__(records.label_names, len(records))
        self.records, self.most = records, most

    def iterate(self, *, seed, epoch, process, num_processes):
        rows = list(range(self.num_images))[process::num_processes][:self.most[process]]
        random.Random(f'{seed} {epoch}').shuffle(rows)
        for row in rows:
            yield self.records.load_image(row), self.records.labels.row(row), Path(self.records.image_name(row)).name


def noisy(picture):
    """The grey and one number of each global generator."""
    return torch.tensor([picture.getpixel((0, 0))[0], random.random(), np.random.random(), torch.rand(()).item()])


def files(records, transform=noisy, *, seed=5, workers=0, batch_size=BATCH, **settings):
    dataset = MultiLabelDataset(records, transform, seed=seed)
    return EpochLoader(dataset, batch_size, seed=seed, workers=workers, **settings)


def stream(source, transform=noisy, *, seed=5, workers=0, batch_size=BATCH, **settings):
    return StreamLoader(source, transform, batch_size, seed=seed, workers=workers, **settings)


@pytest.fixture
def make(kind, records):
    """A function that makes a loader of the kind."""
    return lambda *args, **settings: (
        files(records, *args, **settings) if kind == 'files' else stream(Stream(records), *args, **settings))


def greys(batches):
    return torch.cat([batch.images[:, 0] for batch in batches]).int().tolist()


def assert_same(found, wanted):
    for batch, other in itertools.zip_longest(found, wanted):
        assert torch.equal(batch.images, other.images) and torch.equal(batch.targets, other.targets)
        assert batch.names() == other.names()


def states():
    _, numbers, *rest = np.random.get_state()
    return random.getstate(), numbers.tolist(), rest, torch.get_rng_state().tolist()


# ---- which pictures


@both
def test_every_picture_at_most_once_an_epoch_with_its_own_targets(make, records):
    batches = list(make().batches(0))
    assert len(batches) == len(make()) == STEPS and all(len(batch.images) == BATCH for batch in batches)
    seen = greys(batches)
    assert len(set(seen)) == STEPS * BATCH
    assert [Path(name).name for batch in batches for name in batch.names()] == [NAMES[number] for number in seen]
    targets = torch.cat([batch.targets for batch in batches])
    assert targets.dtype == torch.float32 and torch.equal(targets, records.targets[seen].float())


def test_files_have_places_and_a_stream_has_none(records):
    for batch in files(records, repeats=2, share=Share(1, 2, 2)).batches(1):
        assert batch.indices.dtype == torch.int64 and batch.indices.tolist() == greys([batch])
    assert all(batch.indices is None for batch in stream(Stream(records)).batches(0))


@both
def test_the_epochs_leave_out_other_pictures(make):
    loader = make()
    assert set().union(*(greys(loader.batches(epoch)) for epoch in range(12))) == set(range(NUM_IMAGES))


@both
def test_what_is_drawn_follows_from_seed_and_epoch(make):
    loader = make()
    epochs = [list(loader.batches(epoch)) for epoch in range(3)]
    assert_same(loader.batches(1), epochs[1])
    torch.manual_seed(99)
    assert_same(make().batches(1), epochs[1])
    others = [epochs[0], epochs[2], list(make(seed=6).batches(1))]
    assert all(greys(other) != greys(epochs[1]) for other in others)
    draws = torch.cat([batch.images[:, 1:] for batches in [epochs[1], *others] for batch in batches])
    assert len(draws.unique(dim=0)) == 4 * STEPS * BATCH, 'pictures or epochs share their numbers'


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('start', [0, 2])
def test_two_processes_take_the_steps_of_one_in_parts(records, repeats, start):
    whole = list(files(records, repeats=repeats).batches(4, start))
    shares = [
        list(files(records, repeats=repeats, share=Share(index, 2, 2)).batches(4, start)) for index in range(2)]
    assert len(whole) == STEPS - start and all(len(share) == 2 * len(whole) for share in shares)
    for step, batch in enumerate(whole):
        parts = [part for share in shares for part in share[2 * step:2 * step + 2]]
        assert all(len(part.images) == BATCH // 4 for part in parts)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
        assert [name for part in parts for name in part.names()] == batch.names()


def test_two_processes_share_a_stream_out(records):
    whole = {number: row for batch in stream(Stream(records)).batches(4) for number, row in zip(
        batch.images[:, 0].int().tolist(), batch.images)}
    shares = [list(stream(Stream(records), share=Share(index, 2, 2)).batches(4)) for index in range(2)]
    assert [len(share) for share in shares] == [2 * STEPS] * 2
    rows = torch.cat([part.images for share in shares for part in share])
    assert len({int(row[0]) for row in rows}) == len(rows) == STEPS * BATCH
    assert all(torch.equal(row, whole.get(int(row[0]), row)) for row in rows), 'a draw depends on the process'


@both
@pytest.mark.parametrize(('workers', 'parts'), [(0, 1), (0, 2), (2, 1)])
def test_a_start_skips_whole_steps_and_nothing_else(make, workers, parts):
    loader = make(workers=workers, share=Share(parts=parts))
    whole = list(loader.batches(3))
    for start in (2, 1, STEPS, 0):
        assert_same(loader.batches(3, start), whole[parts * start:])


def test_a_streams_start_falls_to_the_worker_whose_turn_it_is(shards):
    loader = stream(shards, workers=2, batch_size=3)
    whole = list(loader.batches(2))
    assert len(whole) == 9
    for start in (1, 2, 5):
        assert_same(loader.batches(2, start), whole[start:])


def test_what_a_stream_passes_over_is_not_decoded(shards, monkeypatch):
    decoded, decode = [], shards_module.decode_image

    def spy(data, name):
        decoded.append(name)
        return decode(data, name)

    monkeypatch.setattr(shards_module, 'decode_image', spy)
    found = list(stream(shards, batch_size=3).batches(2, 7))
    assert len(found) == 2 and len(decoded) == 6


def test_repeats_follow_each_other_and_differ(records):
    batches = list(files(records, repeats=3).batches(2))
    seen, rows = greys(batches), torch.cat([batch.images for batch in batches])
    assert len(batches) == STEPS, 'an epoch is as long as without'
    once = torch.cat([batch.images for batch in files(records).batches(2)])
    assert seen == [number for number in once[:8, 0].int().tolist() for _ in range(3)]
    assert torch.equal(rows[::3], once[:8]), 'the first time a picture is as it is without repeats'
    later = [row for epoch in range(3, 6) for batch in files(records).batches(epoch) for row in batch.images]
    assert len(torch.cat([rows, torch.stack(later)])[:, 1:].unique(dim=0)) == len(rows) + len(later)


# ---- who reads them


def test_worker_processes_give_the_same_batches_to_the_bit(records):
    alone, busy = files(records), files(records, workers=2)
    for epoch, start in ((0, 0), (1, 1), (0, 2)):
        assert_same(busy.batches(epoch, start), alone.batches(epoch, start))


def test_worker_processes_read_each_picture_of_a_stream_as_one_does(shards):
    alone, busy = ([
        (name, image, targets) for batch in stream(shards, workers=workers, batch_size=3).batches(1)
        for name, image, targets in zip(batch.names(), batch.images, batch.targets)] for workers in (0, 2))
    wanted = {name: (image, targets) for name, image, targets in alone}
    assert len(alone) == len(busy) == len(wanted) == NUM_IMAGES
    assert all(torch.equal(image, wanted[name][0]) and torch.equal(targets, wanted[name][1])
               for name, image, targets in busy)


def test_a_share_that_is_short_begins_anew_in_another_order(records):
    batches = stream(Stream(records, most=(4, 0)), share=Share(0, 2)).batches(0)
    rounds = [greys([batch]) for batch in batches]
    assert len(rounds) == STEPS and all(sorted(each) == [0, 2, 4, 6] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_a_reader_without_pictures_says_so(records):
    loader = stream(Stream(records, most=(4, 0)), share=Share(1, 2))
    with pytest.raises(ValueError, match='reader 1 of 2 has no pictures of 27; take fewer workers or processes, or wr'):
        next(loader.batches(0))


# ---- the generators


@both
def test_the_generators_are_the_callers_between_batches_too(make):
    batches = make().batches(0)
    before = states()
    for _ in range(STEPS):
        next(batches)
        assert states() == before
    assert next(batches, None) is None and states() == before


def test_the_generators_are_the_callers_between_batches_of_shards(shards):
    batches = stream(shards).batches(0)
    before = states()
    assert all(states() == before for _ in batches)


@both
def test_the_generators_are_the_callers_when_a_loader_is_left(make):
    batches = make().batches(0)
    before = states()
    next(batches)
    del batches
    assert states() == before


@both
@pytest.mark.parametrize('is_lost', [True, False], ids=['lost', 'refused'])
def test_the_generators_are_the_callers_where_a_picture_fails(kind, records, tmp_path, is_lost):
    paths = [Path(records.image_name(row)) for row in range(NUM_IMAGES)]
    order = greys(files(records).batches(0) if kind == 'files' else stream(Stream(records)).batches(0))
    bad = order[BATCH + 3]
    if is_lost:
        paths[bad] = tmp_path / 'lost.png'
    broken = MultiLabelRecords(paths, records.targets, records.label_names)

    def refuse(picture):
        drawn = noisy(picture)
        if drawn[0] == bad:
            raise ImageError('refused')
        return drawn

    batches = (files(broken, refuse) if kind == 'files' else stream(Stream(broken), refuse)).batches(0)
    before = states()
    assert greys([next(batches)]) == order[:BATCH]
    with pytest.raises(ImageError, match='lost.png' if is_lost else 'refused'):
        next(batches)
    assert states() == before


@both
@pytest.mark.parametrize('workers', [0, 2])
def test_the_call_draws_one_number_of_torchs_generator(make, workers):
    loader = make(workers=workers)
    for epoch in range(2):  # in the second one workers are there already
        with seeded(7):
            torch.empty((), dtype=torch.int64).random_()
            wanted = states()
        with seeded(7):
            batches = loader.batches(epoch)
            assert states() == wanted
            list(batches)
            assert states() == wanted


# ---- several items at once


@pytest.mark.parametrize('seed', [5, None])
def test_items_read_together_are_those_read_alone(records, seed):
    dataset, rows = MultiLabelDataset(records, noisy, seed=seed), [4, 1, 1, 20]
    dataset.set_epoch(3)
    with seeded(0):
        alone = [dataset[row] for row in rows]
    with seeded(0):
        together = dataset.__getitems__(rows)
    assert len(together) == 4
    assert all(torch.equal(a, b) for one, other in zip(alone, together) for a, b in zip(one, other, strict=True))


def test_each_item_is_drawn_as_in_its_own_epoch(records):
    dataset = MultiLabelDataset(records, noisy, seed=5)
    before = states()
    together = dataset.read([4, 1, 1], [0, 2, 9])
    assert states() == before and dataset.epoch == 0
    for (image, targets), row, epoch in zip(together, [4, 1, 1], [0, 2, 9], strict=True):
        dataset.set_epoch(epoch)
        assert torch.equal(image, dataset[row][0]) and torch.equal(targets, records.targets[row].float())
    assert not torch.equal(together[1][0], together[2][0])
    assert states() == before


def test_each_item_needs_an_epoch(records):
    with pytest.raises(ValueError, match='zip'):
        MultiLabelDataset(records, noisy, seed=5).read([4, 1], [0])


# ---- signals


def test_a_worker_outlives_a_signal_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(loaders_module, 'GRACE_SECONDS', 2)
    told, tells = multiprocessing.get_context('fork').Pipe(duplex=False)

    def work():
        loaders_module._outlive_signals(0)
        tells.send('ready')
        time.sleep(60)

    worker = multiprocessing.get_context('fork').Process(target=work)
    worker.start()
    assert told.recv() == 'ready'
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.join(0.5)
    assert worker.is_alive()
    worker.join(20)
    assert worker.exitcode == -signal.SIGALRM
