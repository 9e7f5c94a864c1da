"""Shards: what is written and when, who reads which picture, and what hostile or broken files lead to."""
import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from worker_shares import WorkerShares

import timm_miil.data.shards as shards_module
from timm_miil.data import LabelledImages, MultiLabelRecords, SparseTargets
from timm_miil.data._packed import PackedPaths
from timm_miil._locks import locked
from timm_miil.data.shards import ShardStream, list_splits, read_shards, write_shards

NAMES = ('cat', 'dog', 'gnu')
forks = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads


def make_pictures(folder: Path, count: int) -> MultiLabelRecords:
    """Picture i is i grey; its labels are 1, 0 and -1 by turns."""
    folder.mkdir(parents=True)
    names = [f'{number}.png' for number in range(count)]
    for number, name in enumerate(names):
        Image.new('L', (4, 3), number).save(folder / name)
    targets = torch.tensor([[(row + column) % 3 - 1 for column in range(3)] for row in range(count)], dtype=torch.int8)
    return MultiLabelRecords(PackedPaths(names, folder), targets, NAMES)


@pytest.fixture(scope='module')
def records(tmp_path_factory) -> MultiLabelRecords:
    return make_pictures(tmp_path_factory.mktemp('pictures') / 'in', 23)


@pytest.fixture(scope='module')
def shards(records, tmp_path_factory) -> Path:
    """23 pictures in 5 shards."""
    folder = tmp_path_factory.mktemp('shards')
    write_shards(records, folder, split='train', images_per_shard=5, workers=0)
    return folder


def numbers(stream, *, seed=None, epoch=0, process=0, num_processes=1) -> list[int]:
    passed = stream.iterate(seed=seed, epoch=epoch, process=process, num_processes=num_processes)
    return [image.getpixel((0, 0))[0] for image, _, _ in passed]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but locks."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.suffix != '.lock'}


# ---- what is written


def test_what_is_read_is_what_was_written(records, shards):
    stream = read_shards(shards, 'train')
    assert (stream.label_names, stream.num_images, list_splits(shards)) == (NAMES, 23, ('train',))
    passed = list(stream.iterate(seed=None, epoch=0, process=0, num_processes=1))
    assert [name for _, _, name in passed] == [f'{number}.png' for number in range(23)]
    targets = torch.stack([targets for _, targets, _ in passed])
    assert targets.dtype == torch.int8 and torch.equal(targets, records.targets)
    assert all(
        np.array_equal(image, records.load_image(number)) and image.mode == 'RGB'
        for number, (image, _, _) in enumerate(passed))


def test_files_are_taken_over_byte_by_byte(tmp_path):
    """A JPEG that lies on its side, and one whose name says PNG; both are read upright and by content."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'side.JPG', 'JPEG', exif=exif)
    Image.fromarray(pixels).save(tmp_path / 'wrong.png', 'JPEG')
    Image.fromarray(pixels).save(tmp_path / 'none', 'WEBP', lossless=True)
    files = [tmp_path / name for name in ('side.JPG', 'wrong.png', 'none')]
    records = MultiLabelRecords(files, torch.eye(3, dtype=torch.uint8), NAMES)
    write_shards(records, tmp_path / 'out', split='a', workers=0)
    with tarfile.open(tmp_path / 'out' / 'a-000000.tar') as tar:
        assert tar.getnames()[::2] == ['000000000.jpg', '000000001.jpg', '000000002.webp']
        assert [tar.extractfile(name).read() for name in tar.getnames()[::2]] == [file.read_bytes() for file in files]
    images = [image for image, _, _ in read_shards(tmp_path / 'out', 'a').iterate(
        seed=None, epoch=0, process=0, num_processes=1)]
    assert [image.size for image in images] == [(20, 30), (30, 20), (30, 20)]
    assert all(np.array_equal(image, records.load_image(row)) for row, image in enumerate(images))


class Drawn(LabelledImages):
    """Pictures that are no files."""

    def load_image(self, index):
        return Image.new('RGB', (3, 2), (index, 200, 100))

    def image_name(self, index):
        return f'drawn {index}'

    def select(self, rows):
        return Drawn(self.labels.select_rows(rows), self.label_names)


@pytest.mark.parametrize('fill', [0, -1])
def test_pictures_that_are_no_files_become_png_and_labels_stay_compact(tmp_path, fill):
    labels = SparseTargets.from_entries([0, 1, 1], [2, 0, 1], [1, 1, -1 - fill], shape=(2, 3), fill=fill)
    index = write_shards(Drawn(labels, NAMES), tmp_path, split='val', workers=0)
    with tarfile.open(tmp_path / 'val-000000.tar') as tar:
        assert tar.getnames() == ['000000000.png', '000000000.json', '000000001.png', '000000001.json']
        listed = [json.load(tar.extractfile(name)) for name in tar.getnames()[1::2]]
    other = [{'absent': []}, {'absent': ['dog']}] if fill else [{}, {'unknown': ['dog']}]
    assert listed == [
        {'name': 'drawn 0', 'present': ['gnu'], **other[0]}, {'name': 'drawn 1', 'present': ['cat'], **other[1]}]
    passed = read_shards(tmp_path, 'val').iterate(seed=None, epoch=0, process=0, num_processes=1)
    assert torch.equal(torch.stack([targets for _, targets, _ in passed]), labels.dense())
    counts = zip(*(count.tolist() for count in labels.counts()))
    assert [(row.present, row.absent, row.unknown) for row in index.labels] == list(counts)


def test_the_index_counts_and_hashes(records, shards):
    index = json.loads((shards / 'train.shards.json').read_text())
    assert [shard['images'] for shard in index['shards']] == [5, 5, 5, 5, 3] and index['images'] == 23
    present, absent, unknown = (count.tolist() for count in records.labels.counts())
    assert [tuple(row.values()) for row in index['labels']] == list(zip(NAMES, present, absent, unknown))
    for shard in index['shards']:
        done = subprocess.run(['sha256sum', shards / shard['file']], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == shard['sha256']
        assert (shards / shard['file']).stat().st_size == shard['bytes']


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # it leaves files open
def test_the_package_webdataset_reads_them(shards):
    webdataset = pytest.importorskip('webdataset', reason='needs the extra data')
    files = [str(path) for path in sorted(shards.glob('*.tar'))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode('rgb8').to_tuple('png', 'json'))
    gc.collect()
    assert [image[0, 0, 0] for image, _ in samples] == list(range(23))
    assert [labels['present'] for _, labels in samples[:3]] == [['gnu'], ['dog'], ['cat']]


@forks
def test_two_processes_do_not_write_one_split(records, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, 'LOCK_SECONDS', 0.2)
    with locked(tmp_path / '.train.lock', seconds=1), pytest.raises(
            BlockingIOError, match='is being written to by another process; wait for its end, or choose another'):
        write_shards(records, tmp_path, split='train', workers=0)
    assert not contents(tmp_path)
    write_shards(records, tmp_path, split='train', workers=0)


def test_processes_write_the_same_bytes_as_one(records, shards, tmp_path):
    seen = []
    write_shards(
        records, tmp_path, split='train', images_per_shard=5, workers=3, on_progress=lambda *step: seen.append(step))
    assert contents(tmp_path) == contents(shards)
    assert seen[-1] == (23, 23) and len(seen) == 5 and sorted(seen) == seen


def test_a_seed_shuffles_once_for_all(records, tmp_path):
    write_shards(records, tmp_path / 'a', split='train', images_per_shard=5, seed=1, workers=0)
    write_shards(records, tmp_path / 'b', split='train', images_per_shard=5, seed=2, workers=0)
    orders = [numbers(read_shards(tmp_path / name, 'train')) for name in 'ab']
    assert orders[0] != orders[1] != list(range(23)) and all(sorted(order) == list(range(23)) for order in orders)


# ---- written again


def test_what_is_there_is_not_written_again(records, tmp_path):
    write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob('*.tar')}
    write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob('*.tar')} == before
    write_shards(records, tmp_path, split='val', images_per_shard=5, workers=0)  # splits lie side by side
    assert list_splits(tmp_path) == ('train', 'val') and len(contents(tmp_path)) == 12


def test_a_missing_and_a_damaged_shard_are_written_again(records, shards, tmp_path):
    write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    (tmp_path / 'train-000001.tar').unlink()
    damaged = bytearray((tmp_path / 'train-000003.tar').read_bytes())
    damaged[700] ^= 1
    (tmp_path / 'train-000003.tar').write_bytes(damaged)
    untouched = (tmp_path / 'train-000002.tar').stat().st_ino
    write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    assert contents(tmp_path) == contents(shards) and (tmp_path / 'train-000002.tar').stat().st_ino == untouched


@pytest.mark.parametrize('change', ['labels', 'file', 'images_per_shard', 'seed', 'names'])
def test_shards_of_other_pictures_are_not_replaced(tmp_path, change):
    records = make_pictures(tmp_path / 'in', 6)
    options = {'split': 'train', 'images_per_shard': 5, 'workers': 0}
    write_shards(records, tmp_path / 'out', **options)
    before = contents(tmp_path / 'out')
    if change == 'labels':
        records = MultiLabelRecords(records.image_paths, -records.targets, NAMES)
    elif change == 'names':
        records = MultiLabelRecords(records.image_paths, records.targets, ('cat', 'dog', 'cow'))
    elif change == 'file':
        Image.new('L', (8, 8), 77).save(tmp_path / 'in' / '3.png')
    else:
        options[change] = 4
    with pytest.raises(FileExistsError, match="out has shards of split 'train' of other pictures, labels or settings"):
        write_shards(records, tmp_path / 'out', **options)
    assert contents(tmp_path / 'out') == before


def test_a_file_of_someone_else_is_not_replaced(records, tmp_path):
    (tmp_path / 'train-000001.tar').write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='train-000001.tar is there and not of these shards; delete it or choose'):
        write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    assert (tmp_path / 'train-000001.tar').read_bytes() == b'mine'


def test_an_unreadable_picture_stops_it_and_what_is_finished_is_kept(tmp_path, monkeypatch):
    records = make_pictures(tmp_path / 'in', 12)
    good = (tmp_path / 'in' / '7.png').read_bytes()
    status = os.stat(tmp_path / 'in' / '7.png')
    (tmp_path / 'in' / '7.png').write_bytes(good[:-20].ljust(len(good), b'\0'))
    os.utime(tmp_path / 'in' / '7.png', ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OSError, match=r"cannot read '.*in/7.png': it is damaged"):
        write_shards(records, tmp_path / 'out', split='train', images_per_shard=5, workers=0)
    assert set(contents(tmp_path / 'out')) == {
        f'.train.partial/{name}' for name in ('source.txt', 'train-000000.tar', 'train-000000.tar.json')}
    with pytest.raises(FileNotFoundError, match="has no shards of split 'train': train.shards.json is mis"):
        read_shards(tmp_path / 'out', 'train')

    (tmp_path / 'in' / '7.png').write_bytes(good)
    os.utime(tmp_path / 'in' / '7.png', ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / 'out' / '.train.partial' / 'train-000001.tar.77.tmp').write_bytes(b'of a run that was killed')
    kept = (tmp_path / 'out' / '.train.partial' / 'train-000000.tar').stat().st_ino
    with pytest.raises(FileExistsError, match='train.partial has the beginnings of shards of other pictures, labels'):
        write_shards(records, tmp_path / 'out', split='train', images_per_shard=4, workers=0)
    seen = []
    write_shards(
        records, tmp_path / 'out', split='train', images_per_shard=5, workers=0,
        on_progress=lambda done, total: seen.append((done, list((tmp_path / 'out').rglob('*.tmp')))))
    assert seen == [(5, []), (10, []), (12, [])]
    assert (tmp_path / 'out' / 'train-000000.tar').stat().st_ino == kept
    assert len(contents(tmp_path / 'out')) == 4 and numbers(read_shards(tmp_path / 'out', 'train')) == list(range(12))


def test_without_the_check_a_damaged_picture_is_met_when_it_is_read(tmp_path):
    records = make_pictures(tmp_path / 'in', 2)
    data = (tmp_path / 'in' / '1.png').read_bytes()
    (tmp_path / 'in' / '1.png').write_bytes(data[:-20].ljust(len(data), b'\0'))
    write_shards(records, tmp_path / 'out', split='a', check_images=False, workers=0)
    with pytest.raises(OSError, match="cannot read '.*a-000000.tar, 000000001': it is damaged"):
        numbers(read_shards(tmp_path / 'out', 'a'))
    (tmp_path / 'in' / '1.png').write_bytes(b'no picture')
    with pytest.raises(OSError, match=r"cannot read '.*in/1.png': it is not a JPEG"):
        write_shards(records, tmp_path / 'again', split='a', check_images=False, workers=0)
    (tmp_path / 'in' / '1.png').unlink()
    with pytest.raises(OSError, match=r"cannot read '.*in/1.png': no such file or directory"):
        write_shards(records, tmp_path / 'again', split='b', workers=0)


def test_a_full_disk_is_one_error_and_nothing_half_written_stays(records, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', lambda number: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
        with pytest.raises(OSError, match=(
                r'cannot write .*partial/train-000000.tar: no space left on device; what is finished is kept, run it')):
            write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    assert set(contents(tmp_path)) == {'.train.partial/source.txt'}
    write_shards(records, tmp_path, split='train', images_per_shard=5, workers=0)
    assert contents(tmp_path) == contents(shards)


@forks
def test_a_run_that_is_killed_goes_on(tmp_path):
    """Killed when some shards are finished: the rest are written, these are not, and no process is left behind."""
    rng = np.random.default_rng(0)
    (tmp_path / 'in').mkdir()
    files = [tmp_path / 'in' / f'{number}.png' for number in range(200)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    records = MultiLabelRecords(files, torch.ones(200, 1, dtype=torch.uint8), ('a',))
    told, tells = multiprocessing.get_context('fork').Pipe(duplex=False)

    def write():
        os.setpgid(0, 0)
        write_shards(
            records, tmp_path / 'out', split='train', images_per_shard=10, workers=2,
            on_progress=lambda *step: tells.send(step))

    writer = multiprocessing.get_context('fork').Process(target=write)
    writer.start()
    assert [told.recv()[0] for _ in range(3)] == [10, 20, 30]
    writer.kill()
    writer.join()
    deadline = time.monotonic() + 30
    while group_lives(writer.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_lives(writer.pid)
    assert not (tmp_path / 'out' / 'train.shards.json').exists()
    finished = {
        path.with_suffix('').name: path.with_suffix('').stat().st_ino
        for path in (tmp_path / 'out' / '.train.partial').glob('*.tar.json')}
    assert 3 <= len(finished) < 20

    for name in ('out', 'fresh'):
        write_shards(records, tmp_path / name, split='train', images_per_shard=10, workers=0)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'fresh')
    assert {name: (tmp_path / 'out' / name).stat().st_ino for name in finished} == finished


def group_lives(group: int) -> bool:
    """Whether the process group has a process that is no zombie."""
    for status in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = status.read_text().rpartition(')')[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != 'Z':
            return True
    return False


class Fatal(Drawn):
    def load_image(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def select(self, rows):
        return Fatal(self.labels.select_rows(rows), self.label_names)


@forks
def test_a_process_that_is_killed_is_one_error(tmp_path):
    source = Fatal(SparseTargets.from_dense(torch.ones(4, 3)), NAMES)
    with pytest.raises(RuntimeError, match='one of 2 processes was ended from outside, as happens when memory run'):
        write_shards(source, tmp_path, split='train', images_per_shard=1, workers=2)


@pytest.mark.parametrize('options, error, words', [
    ({'split': '../train'}, ValueError, r"split must be a plain word of letters, .*, got '../train'"),
    ({'split': ''}, ValueError, "split must be a plain word .* got ''"),
    ({'images_per_shard': 0}, ValueError, 'images_per_shard must be at least 1, got 0'),
    ({'workers': -1}, ValueError, 'workers must be at least 0, got -1'),
    ({'workers': 1.5}, TypeError, 'workers must be an int, got float 1.5'),
])
def test_wrong_settings_are_refused_before_anything_is_written(records, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        write_shards(records, tmp_path / 'out', **({'split': 'train', 'workers': 0} | options))
    with pytest.raises(ValueError, match="source must have pictures, got none for split 'train'"):
        write_shards(records.select([]), tmp_path / 'out', split='train', workers=0)
    assert not (tmp_path / 'out').exists()


# ---- who reads what


@settings(deadline=None, max_examples=40)
@given(
    num_processes=st.integers(1, 30), seed=st.none() | st.integers(0, 5), epoch=st.integers(0, 3),
    shuffle_shards=st.integers(1, 6))
def test_each_picture_is_read_once_by_one_process(shards, num_processes, seed, epoch, shuffle_shards):
    stream = read_shards(shards, 'train', shuffle_shards=shuffle_shards)
    options = {'seed': seed, 'epoch': epoch, 'num_processes': num_processes}
    parts = [numbers(stream, process=process, **options) for process in range(num_processes)]
    assert sorted(sum(parts, [])) == list(range(23))
    assert {len(part) for part in parts} <= {23 // num_processes, -(-23 // num_processes)}
    assert numbers(stream, process=0, **options) == parts[0]
    if seed is None:
        assert sum(parts, []) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_and_is_well_shuffled(shards):
    stream = read_shards(shards, 'train')
    orders = [numbers(stream, seed=seed, epoch=epoch) for seed in range(12) for epoch in range(12)]
    assert len({tuple(order) for order in orders}) == len(orders)
    # With all shards shuffled together a picture is as likely at any place: its mean place is that of the middle.
    places = np.array([np.argsort(order) for order in orders]).mean(0)
    assert np.abs(places - 11).max() < 5 * (23 ** 2 / 12 / len(orders)) ** 0.5


def test_few_shards_at_a_time_are_shuffled_together(shards):
    """Alone, the shards come one after the other, each shuffled; by two, two are mixed. Their order changes."""
    alone = [numbers(read_shards(shards, 'train', shuffle_shards=1), seed=seed) for seed in range(8)]
    runs = [[shard for shard, _ in itertools.groupby(number // 5 for number in order)] for order in alone]
    assert all(sorted(run) == list(range(5)) for run in runs) and len(set(map(tuple, runs))) > 4
    assert all(order != sorted(order, key=lambda number: (run.index(number // 5), number))
               for order, run in zip(alone, runs))
    for seed in range(8):
        order = [number // 5 for number in numbers(read_shards(shards, 'train', shuffle_shards=2), seed=seed)]
        assert sorted(set(order[:8])) != sorted(set(order)) and len(list(itertools.groupby(order))) > 5


def test_a_part_of_a_shard_is_another_one_in_each_epoch(shards, records, tmp_path):
    write_shards(records, tmp_path, split='one', images_per_shard=23, workers=0)
    stream = read_shards(tmp_path, 'one')
    parts = {frozenset(numbers(stream, seed=0, epoch=epoch, process=0, num_processes=4)) for epoch in range(5)}
    assert len(parts) == 5


def test_the_stored_order_holds_one_shard_open_at_a_time(shards, monkeypatch):
    opened = []
    samples = ShardStream._samples
    monkeypatch.setattr(ShardStream, '_samples', lambda *given: opened.append(given[1]) or samples(*given))
    stream = read_shards(shards, 'train').iterate(seed=None, epoch=0, process=0, num_processes=1)
    next(stream)
    assert opened == [0]


@forks
@pytest.mark.parametrize('workers', [0, 2])
def test_data_loader_workers_are_more_than_shards_and_read_each_picture_once(records, shards, workers):
    stream = read_shards(shards, 'train')
    seen = Counter()
    for rank in range(4):
        for pixels, targets in DataLoader(WorkerShares(stream, rank, 4), batch_size=4, num_workers=workers):
            seen.update(pixels.tolist())
            assert torch.equal(targets, records.targets[pixels])
    assert seen == Counter(range(23))


def test_a_share_can_be_empty(shards, records, tmp_path):
    write_shards(records.select([0]), tmp_path, split='one', workers=0)
    stream = read_shards(tmp_path, 'one')
    assert [numbers(stream, seed=0, process=process, num_processes=3) for process in range(3)] == [[], [], [0]]


def test_a_process_that_cannot_be_is_refused_at_once(shards):
    with pytest.raises(ValueError, match='process must be below num_processes, got 2 of 2'):
        read_shards(shards, 'train').iterate(seed=0, epoch=0, process=2, num_processes=2)


# ---- labels by name


def test_labels_are_matched_by_name_and_others_are_unknown(records, shards):
    stream = read_shards(shards, 'train', labels=['gnu', 'eel', 'cat', 'dog'])
    passed = stream.iterate(seed=None, epoch=0, process=0, num_processes=1)
    got = torch.stack([targets for _, targets, _ in passed])
    assert stream.label_names == ('gnu', 'eel', 'cat', 'dog')
    assert torch.equal(got[:, [2, 3, 0]], records.targets) and (got[:, 1] == -1).all()


def test_a_label_that_is_not_wanted_must_be_passed_over_expressly(records, shards):
    with pytest.raises(ValueError, match="shards.json has labels that are not among the 2 given ones: 'dog'"):
        read_shards(shards, 'train', labels=['gnu', 'cat'])
    stream = read_shards(shards, 'train', labels=['gnu', 'cat'], ignore_unknown_labels=True)
    passed = stream.iterate(seed=None, epoch=0, process=0, num_processes=1)
    assert torch.equal(torch.stack([targets for _, targets, _ in passed]), records.targets[:, [2, 0]])


def test_labels_are_listed_once_and_not_at_every_picture(records, tmp_path):
    """Listing 11,221 labels takes longer than reading a picture."""
    index = write_shards(records, tmp_path, split='train', workers=0)
    assert index.label_names is index.label_names == records.label_names
