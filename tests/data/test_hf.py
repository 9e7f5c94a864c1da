"""Data sets of the package `datasets`: made here, saved in each form it has, and read without a network."""
import json
import os
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

os.environ.setdefault('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')
datasets = pytest.importorskip('datasets', reason='needs the extra data')

from worker_shares import WorkerShares  # noqa: E402

from timm_miil.data import open_split  # noqa: E402
from timm_miil.data.hf import list_splits, read_hf  # noqa: E402
from timm_miil.data.shards import read_shards, write_shards  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning'),  # Python 3.12, where torch has threads
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),  # the package leaves files open
    pytest.mark.filterwarnings('ignore::ResourceWarning'),
]
NAMES = ['cat', 'dog', 'gnu']
ROWS = [['cat'], ['cat', 'dog'], [], ['gnu'], None, ['dog', 'gnu'], ['cat'], ['dog']]
UNKNOWN = [-1] * 3
TARGETS = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], UNKNOWN, [0, 1, 1], [1, 0, 0], [0, 1, 0]]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing in these tests asks the Hub."""
    for constants in ('datasets.config', 'huggingface_hub.constants'):
        monkeypatch.setattr(f'{constants}.HF_HUB_OFFLINE', True)


def numbers_of(names):
    return None if names is None else [NAMES.index(name) for name in names]


def make(rows=None, *, count=8, **columns):
    """A data set of pictures i grey with columns (values, type)."""
    columns = columns or {'labels': (ROWS if rows is None else rows, datasets.Sequence(datasets.Value('string')))}
    features = {'image': datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}}
    content = {'image': [Image.new('L', (4, 3), number) for number in range(count)]}
    return datasets.Dataset.from_dict(
        content | {name: values for name, (values, _) in columns.items()}, features=datasets.Features(features))


def saved(dataset, folder, split='train'):
    datasets.DatasetDict({split: dataset}).save_to_disk(folder)
    return folder


def as_parquet(dataset, folder, files=1, split='train'):
    (folder / 'data').mkdir(parents=True)
    for number in range(files):
        part = dataset.shard(files, number, contiguous=True)
        part.to_parquet(folder / 'data' / f'{split}-{number:05d}-of-{files:05d}.parquet')
    return folder


def grey(image):
    assert image.mode == 'RGB'
    return image.getpixel((0, 0))[0]


def list_all(stream, *, seed=None, epoch=0, process=0, num_processes=1):
    return list(stream.iterate(seed=seed, epoch=epoch, process=process, num_processes=num_processes))


# ---- whole data sets


@pytest.fixture(scope='module')
def forms(tmp_path_factory) -> dict[str, Path]:
    """The same pictures in each form that needs no picture files."""
    folder = tmp_path_factory.mktemp('forms')
    dataset = make(labels=([numbers_of(row) for row in ROWS], datasets.Sequence(datasets.ClassLabel(names=NAMES))))
    dataset.save_to_disk(folder / 'table')
    return {
        'table': folder / 'table', 'splits': saved(dataset, folder / 'splits'),
        'parquet': as_parquet(dataset, folder / 'parquet', 3)}


@pytest.mark.parametrize('form', ['table', 'splits', 'parquet'])
@pytest.mark.parametrize('streaming', [False, True])
def test_each_form_gives_pictures_and_labels(forms, tmp_path, form, streaming):
    assert list_splits(forms[form]) == ('train',)
    source = read_hf(forms[form], 'train', streaming=streaming, num_images=8, cache_dir=str(tmp_path))
    assert source.label_names == tuple(NAMES)
    if streaming:
        images, targets, _ = zip(*list_all(source))
        targets = torch.stack(targets)
        assert source.num_images == 8
    else:
        images, targets = [source.load_image(row) for row in range(len(source))], source.targets
    assert [grey(image) for image in images] == list(range(8))
    assert targets.dtype == torch.int8 and targets.tolist() == TARGETS


def test_a_format_for_tensors_does_not_matter(tmp_path):
    classes = datasets.Sequence(datasets.ClassLabel(names=NAMES))
    numbered = make(labels=([numbers_of(row) for row in ROWS], classes))
    numbered.with_format('numpy').save_to_disk(tmp_path)
    assert datasets.load_from_disk(tmp_path).format['type'] == 'numpy'
    records = read_hf(tmp_path, 'train')
    assert records.targets.tolist() == TARGETS and grey(records.load_image(3)) == 3


def test_open_split_finds_the_format_and_the_split(forms, tmp_path):
    dataset = make()
    saved(dataset, tmp_path / 'a', 'validation')
    assert open_split(tmp_path / 'a', 'val').targets.tolist() == TARGETS
    assert open_split(forms['parquet'], 'train', cache_dir=str(tmp_path / 'cache')).targets.tolist() == TARGETS
    stream = open_split(
        forms['parquet'], 'train', format='hf', streaming=True, num_images=8, labels=['gnu', 'cat', 'dog', 'eel'])
    assert [targets.tolist() for _, targets, _ in list_all(stream)][:2] == [[0, 1, 0, -1], [0, 1, 1, -1]]
    with pytest.raises(ValueError, match="unknown option 'shuffle' of format hf; did you mean 'shuffle_buffer'?"):
        open_split(forms['parquet'], 'train', format='hf', shuffle=1)


def test_picture_files_in_folders_of_labels_are_read_upright_and_by_name(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, label, number in (('train', 'cat', 0), ('train', 'dog', 1), ('train', 'dog', 2), ('test', 'dog', 3)):
        path = tmp_path / 'in' / split / label / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (8, 4), number * 60).save(path, exif=exif)
    options = {'loader': 'imagefolder', 'cache_dir': str(tmp_path / 'cache')}
    assert set(list_splits(tmp_path / 'in', loader='imagefolder')) == {'train', 'test'}
    records = open_split(tmp_path / 'in', 'train', format='hf', **options)
    assert records.label_names == ('cat', 'dog') and records.targets.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert records.image_name(1) == str(tmp_path / 'in' / 'train' / 'dog' / '1.jpg')
    assert records.load_image(0).size == (4, 8)
    stream = read_hf(tmp_path / 'in', 'train', streaming=True, num_images=3, **options)
    items = list_all(stream)
    assert [image.size for image, _, _ in items] == [(4, 8)] * 3
    assert [targets.tolist() for _, targets, _ in items] == [[1, 0], [0, 1], [0, 1]]
    assert items[1][2].endswith('train/dog/1.jpg') and len({name for _, _, name in items}) == 3


def test_pictures_with_metadata_and_pictures_in_an_archive(tmp_path):
    (tmp_path / 'a' / 'train').mkdir(parents=True)
    lines = []
    for number in range(3):
        Image.new('L', (4, 4), number).save(tmp_path / 'a' / 'train' / f'{number}.png')
        lines.append(json.dumps({'file_name': f'{number}.png', 'tags': NAMES[:number]}))
    (tmp_path / 'a' / 'train' / 'metadata.jsonl').write_text('\n'.join(lines))
    assert list_splits(tmp_path / 'a') == ('train',)
    records = read_hf(tmp_path / 'a', 'train', cache_dir=str(tmp_path / 'cache'))
    assert records.label_names == ('cat', 'dog') and records.targets.tolist() == [[0, 0], [1, 0], [1, 1]]

    (tmp_path / 'b').mkdir()
    with zipfile.ZipFile(tmp_path / 'b' / 'train.zip', 'w') as archive:
        for path in sorted((tmp_path / 'a' / 'train').iterdir()):
            archive.write(path, path.name)
    stream = read_hf(
        tmp_path / 'b', 'train', streaming=True, labels=['dog', 'cat'], num_images=3, loader='imagefolder')
    assert [(grey(image), targets.tolist()) for image, targets, _ in list_all(stream)] == [
        (0, [0, 0]), (1, [0, 1]), (2, [1, 1])]


def test_rows_are_selected_in_any_order_without_a_file_beside_the_data(forms):
    before = sorted(forms['table'].rglob('*'))
    records = read_hf(forms['table'], 'train').select([5, 0, 5, 2]).select(torch.tensor([3, 0]))
    assert [grey(records.load_image(row)) for row in range(2)] == [2, 5]
    assert records.targets.tolist() == [TARGETS[2], TARGETS[5]]
    assert records.image_name(1) == f'{forms["table"]}, split train, row 5'
    assert records.with_labels(['gnu', 'cat']).targets.tolist() == [[0, 0], [1, 0]]
    assert sorted(forms['table'].rglob('*')) == before
    with pytest.raises(IndexError):
        records.select([2])


def test_shards_take_over_the_bytes_of_the_rows(forms, tmp_path):
    records = read_hf(forms['parquet'], 'train', cache_dir=str(tmp_path / 'cache'))
    write_shards(records, tmp_path / 'out', split='train', images_per_shard=3, workers=2)
    items = list_all(read_shards(tmp_path / 'out', 'train'))
    assert [grey(image) for image, _, _ in items] == list(range(8))
    assert [targets.tolist() for _, targets, _ in items] == TARGETS
    data = (tmp_path / 'out' / 'train-000000.tar').read_bytes()
    assert all(records.load_bytes(row) in data for row in range(3))


def test_data_loader_workers_read_pictures_in_any_order(forms):
    records = read_hf(forms['table'], 'train')

    class Greys(torch.utils.data.Dataset):
        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            return grey(records.load_image(index))

    assert torch.cat(list(DataLoader(Greys(), batch_size=3, num_workers=2))).tolist() == list(range(8))


# ---- label columns


def values_by_kind():
    """Name, column values, type, options: all say the same as TARGETS."""
    ints = [numbers_of(row) for row in ROWS]
    dense = [None if row == UNKNOWN else row for row in TARGETS]
    value, sequence, label = datasets.Value, datasets.Sequence, datasets.ClassLabel(names=NAMES)
    return {
        'list of ClassLabel': (ints, sequence(label), {}),
        'list of strings': (ROWS, sequence(value('string')), {}),
        'list of ints': (ints, sequence(value('int64')), {'labels': NAMES, 'label_column': 'labels'}),
        'fixed list': (dense, sequence(value('float32'), length=3), {'labels': NAMES, 'label_column': 'labels'}),
        'struct': (
            [dict(zip(NAMES, row or UNKNOWN)) for row in dense], {name: value('int8') for name in NAMES},
            {'label_column': 'labels'}),
        'struct of null': (
            [dict(zip(NAMES, row or [None] * 3)) for row in dense], {name: value('bool') for name in NAMES},
            {'label_column': 'labels'}),
        'inside a struct': (
            [{'kind': row, 'box': 0} for row in ints], {'kind': sequence(label), 'box': value('int8')},
            {'label_column': 'labels.kind'}),
        'inside a list': (
            [None if row is None else [{'kind': number} for number in row] for row in ints], [{'kind': label}],
            {'label_column': 'labels.kind'}),
    }


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('kind', values_by_kind())
def test_each_kind_of_label_column(tmp_path, kind, streaming):
    values, feature, options = values_by_kind()[kind]
    make(labels=(values, feature)).save_to_disk(tmp_path)
    if streaming:
        options = {'labels': NAMES} | options
        source = read_hf(tmp_path, 'train', streaming=True, **options)
        got = [targets.tolist() for _, targets, _ in list_all(source)]
    else:
        source = read_hf(tmp_path, 'train', **options)
        got = source.targets.tolist()
    assert source.label_names == tuple(NAMES) and got == TARGETS


@pytest.mark.parametrize('value, options', [
    ((['cat', None, 'gnu'], 'string'), {'label_column': 'labels', 'labels': NAMES}),
    (([0, -1, 2], 'class'), {}),
    (([0, None, 2], 'class'), {'labels': NAMES}),
    (([0, -1, 2], 'int32'), {'label_column': 'labels', 'labels': NAMES}),
])
def test_one_label_a_picture(tmp_path, value, options):
    values, kind = value
    feature = datasets.ClassLabel(names=NAMES) if kind == 'class' else datasets.Value(kind)
    make(count=3, labels=(values, feature)).save_to_disk(tmp_path)
    assert read_hf(tmp_path, 'train', **options).targets.tolist() == [[1, 0, 0], UNKNOWN, [0, 0, 1]]


@pytest.mark.parametrize('options', [{'label_column': ['dog', 'cat']}, {'labels': ['dog', 'cat']}])
def test_a_column_a_label(tmp_path, options):
    make(
        count=3, cat=([1, 0, -1], datasets.Value('int8')), dog=([None, True, False], datasets.Value('bool')),
        id=([7, 8, 9], datasets.Value('int64'))).save_to_disk(tmp_path)
    records = read_hf(tmp_path, 'train', **options)
    assert records.label_names == ('dog', 'cat') and records.targets.tolist() == [[-1, 1], [1, 0], [0, -1]]


@pytest.mark.parametrize('blank', [1, 4, 6])
def test_rows_without_labels_are_unknown_whether_few_or_most(tmp_path, blank):
    rows = [['cat'], ['dog', 'gnu'], ['gnu'], ['cat'], [], ['dog']] + [['gnu']]
    want = [[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    rows[:blank], want[:blank] = [None] * blank, [UNKNOWN] * blank
    make(rows, count=7).save_to_disk(tmp_path)
    records = read_hf(tmp_path, 'train', labels=NAMES)
    assert records.targets.tolist() == want and records.labels.fill == (-1 if blank > 3 else 0)


def test_labels_are_matched_by_name(forms, tmp_path):
    """One that the type does not list is unknown; one that no string mentions is absent."""
    wanted = ['gnu', 'eel', 'cat', 'dog']
    records = read_hf(forms['table'], 'train', labels=wanted)
    assert records.label_names == tuple(wanted)
    assert records.targets.tolist() == [[row[2], -1, row[0], row[1]] for row in TARGETS]
    make().save_to_disk(tmp_path)
    records = read_hf(tmp_path, 'train', labels=wanted)
    assert records.targets.tolist() == [[row[2], min(row), row[0], row[1]] for row in TARGETS]
    for source in (forms['table'], tmp_path):
        assert read_hf(source, 'train', labels=['gnu'], ignore_unknown_labels=True).targets.tolist() == [
            [row[2]] for row in TARGETS]
        with pytest.raises(ValueError, match="split train has labels that are not among the 1 given ones: '(cat|dog)'"):
            read_hf(source, 'train', labels=['gnu'])
        stream = read_hf(source, 'train', streaming=True, labels=['gnu'], ignore_unknown_labels=True)
        assert [targets.tolist() for _, targets, _ in list_all(stream)] == [[row[2]] for row in TARGETS]


def test_a_stream_meets_an_unknown_name_when_it_comes(tmp_path):
    make().save_to_disk(tmp_path)
    stream = read_hf(tmp_path, 'train', streaming=True, labels=['dog', 'cat']).iterate(
        seed=None, epoch=0, process=0, num_processes=1)
    assert [next(stream)[1].tolist() for _ in range(3)] == [[0, 1], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="has labels that are not among the 2 given ones: 'gnu' .*file 3, row 0"):
        next(stream)


# ---- wrong columns and values


@pytest.mark.parametrize('columns, options, words', [
    ({}, {'image_column': 'imag'}, "image_column must be a column, got 'imag'; did you mean 'image'?"),
    ({}, {'image_column': 'labels'}, "image_column must hold pictures, got 'labels' of type "),
    ({'second': ('image', 'image')}, {}, "image_column must be given where there is not one .*got 'image', 'second'"),
    ({'more': (ROWS, 'strings')}, {}, "label_column must be given where there is not one .* got 'labels', 'more'"),
    ({}, {'label_column': 'label'}, "label_column must be a column, got 'label'; did you mean 'labels'?"),
    ({}, {'label_column': 'labels.kind'}, "label_column 'labels.kind' has no 'kind'; labels is "),
    ({}, {'label_column': ['labels']}, "label_column must be columns of numbers where they are several, got 'labels'"),
    ({}, {'label_column': ['cat']}, "label_column must be columns, got 'cat'; "),
    ({'n': ([1] * 8, 'int8')}, {'label_column': 'n'}, "'n' is .*give labels, the names that its numbers mean"),
    ({'n': ([1.0] * 8, 'float32')}, {'label_column': 'n', 'labels': NAMES}, "label_column must be .*; 'n' is"),
    ({'d': (['2020-01-01'] * 8, 'binary')}, {'label_column': 'd'}, "label_column must be ClassLabel, .*; 'd' is"),
    ({'n': ([3] * 8, 'int8')}, {'label_column': 'n', 'labels': NAMES}, r"0: labels must be numbers in \[0, 3\), got 3"),
    ({'n': ([2] * 8, 'int8')}, {'label_column': ['n']}, "row 0: label 'n' must be 1, 0, -1 or null, got 2"),
    ({'n': ([float('nan')] * 8, 'float32')}, {'label_column': ['n']}, "0: label 'n' must be 1, 0, -1 or null, got nan"),
    ({'n': ([['cat', None]] * 8, 'strings')}, {'label_column': 'n'}, 'row 0: labels must be names, got None'),
    ({'n': ([''] * 8, 'string')}, {'label_column': 'n'}, "row 0: labels must be names, got ''"),
])
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, options, words):
    kinds = {
        'image': datasets.Image(), 'strings': datasets.Sequence(datasets.Value('string')),
        **{name: datasets.Value(name) for name in ('int8', 'float32', 'binary', 'string')}}
    pictures = [Image.new('L', (2, 2))] * 8
    make(labels=(ROWS, kinds['strings']), **{
        name: (pictures if values == 'image' else values, kinds[kind])
        for name, (values, kind) in columns.items()}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=words):
        read_hf(tmp_path, 'train', **options)


def test_pictures_that_are_not_there_are_image_errors(tmp_path):
    dataset = make(count=3, rows=[[], [], []]).cast_column('image', datasets.Image(decode=False))
    cells = [None, {'bytes': b'no picture', 'path': 'a.png'}, {'bytes': b'', 'path': None}]
    datasets.Dataset.from_dict(
        {'image': cells, 'labels': [[], [], []]}, features=dataset.features).save_to_disk(tmp_path / 'a')
    records = read_hf(tmp_path / 'a', 'train', labels=NAMES)
    for row, words in enumerate([
            "'.*a, split train, row 0': its row has no picture", "'a.png': it is not a JPEG",
            "row 2': the file is empty"]):
        with pytest.raises(OSError, match=f'cannot read .*{words}'):
            records.load_image(row)
    with pytest.raises(OSError, match='its row has no picture'):
        list_all(read_hf(tmp_path / 'a', 'train', labels=NAMES, streaming=True))

    path = tmp_path / 'b' / 'train' / 'cat' / '0.png'
    for other in (path, tmp_path / 'b' / 'train' / 'dog' / '1.png'):
        other.parent.mkdir(parents=True)
        Image.new('L', (2, 2)).save(other)
    records = read_hf(tmp_path / 'b', 'train', cache_dir=str(tmp_path / 'cache'))
    path.unlink()
    with pytest.raises(OSError, match="cannot read '.*cat/0.png': no such file"):
        records.load_image(0)


@pytest.mark.parametrize('options, error, words', [
    ({'split': 'test'}, ValueError, "split test cannot be opened: unknown split 'test'; Known: train"),
    ({'shuffle_buffer': 0}, ValueError, 'shuffle_buffer must be at least 1, got 0'),
    ({'streaming': True, 'num_images': 0}, ValueError, 'num_images must be at least 1, got 0'),
    ({'streaming': True, 'num_images': 'all'}, TypeError, "num_images must be an int, got str 'all'"),
])
def test_wrong_settings_are_refused(forms, options, error, words):
    with pytest.raises(error, match=words):
        read_hf(forms['table'], **({'split': 'train'} | options))


def test_what_a_stream_cannot_know_must_be_given(forms, tmp_path):
    with pytest.raises(ValueError, match='split train does not say how many pictures it has; give num_images'):
        read_hf(forms['parquet'], 'train', streaming=True)
    as_parquet(make(), tmp_path)
    with pytest.raises(ValueError, match='has labels that are strings, and a stream cannot be .*; give labels'):
        read_hf(tmp_path, 'train', streaming=True, num_images=8)


def test_a_data_set_that_cannot_be_had_is_one_error(tmp_path):
    with pytest.raises(OSError, match='nobody/nothing'):
        read_hf('nobody/nothing', 'train')
    with pytest.raises(OSError, match='nobody/nothing'):
        open_split('nobody/nothing', 'train', format='hf')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train.parquet').write_bytes(b'no parquet')
    with pytest.raises(ValueError, match='split train cannot be opened: '):
        read_hf(tmp_path, 'train', cache_dir=str(tmp_path / 'cache'))
    (tmp_path / 'dataset_dict.json').write_text('{}')
    with pytest.raises(ValueError, match="dataset_dict.json must be a JSON object with 'splits', as save_to_disk"):
        list_splits(tmp_path)


def test_the_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ImportError, match=r'pip install "timm-miil\[data\]"'):
        read_hf('owner/name', 'train')


def test_folders_of_other_formats_are_passed_over(tmp_path):
    for name in ('train/cat/a.png', 'annotations/instances_train.json', 'labels.csv'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    assert list_splits(tmp_path) == ()


# ---- who reads what of a stream


@pytest.fixture(scope='module')
def streamed(tmp_path_factory) -> Path:
    """23 pictures in 3 files of unequal length."""
    folder = tmp_path_factory.mktemp('streamed')
    (folder / 'data').mkdir()
    dataset = make([NAMES[:number % 4] for number in range(23)], count=23)
    for number, (start, end) in enumerate([(0, 5), (5, 19), (19, 23)]):
        dataset.select(range(start, end)).to_parquet(folder / 'data' / f'train-{number:05d}-of-00003.parquet')
    return folder


def read_streamed(folder, **options):
    return read_hf(folder, 'train', streaming=True, num_images=23, labels=NAMES, **options)


@pytest.mark.parametrize('seed', [None, 0, 1])
@pytest.mark.parametrize('num_processes', [1, 2, 3, 5, 8])
def test_each_picture_of_a_stream_is_read_once_by_one_process(streamed, num_processes, seed):
    stream = read_streamed(streamed, shuffle_buffer=4)
    parts = [
        list_all(stream, seed=seed, epoch=2, process=process, num_processes=num_processes)
        for process in range(num_processes)]
    assert sorted(grey(image) for part in parts for image, _, _ in part) == list(range(23))
    assert all(targets.tolist() == [int(column < grey(image) % 4) for column in range(3)]
               for part in parts for image, targets, _ in part)
    assert len({name for part in parts for _, _, name in part}) == 23
    if seed is None and num_processes == 1:
        assert [grey(image) for image, _, _ in parts[0]] == list(range(23))
    if num_processes == 8 and seed is None:  # of 5, 14 and 4 rows
        assert [len(part) for part in parts] == [2, 5, 2, 2, 5, 2, 1, 4]


def test_the_order_of_a_stream_depends_on_seed_and_epoch(streamed):
    stream = read_streamed(streamed, shuffle_buffer=6)
    orders = {
        (seed, epoch): tuple(grey(image) for image, _, _ in list_all(stream, seed=seed, epoch=epoch))
        for seed in range(3) for epoch in range(4)}
    assert len(set(orders.values())) == 12 and tuple(range(23)) not in orders.values()
    assert any(order[0] >= 19 for order in orders.values())  # the files are shuffled too
    again = tuple(grey(image) for image, _, _ in list_all(read_streamed(streamed, shuffle_buffer=6), seed=1, epoch=2))
    assert again == orders[1, 2]


@pytest.mark.parametrize('workers', [0, 2])
def test_data_loader_workers_read_each_picture_of_a_stream_once(streamed, workers):
    stream = read_streamed(streamed)
    seen = Counter()
    for rank in range(2):
        for pixels, targets in DataLoader(WorkerShares(stream, rank, 2), batch_size=4, num_workers=workers):
            seen.update(pixels.tolist())
            assert torch.equal(targets, (torch.arange(3) < (pixels % 4)[:, None]).to(torch.int8))
    assert seen == Counter(range(23))


def test_a_process_that_cannot_be_is_refused_at_once(streamed):
    with pytest.raises(ValueError, match='process must be below num_processes, got 2 of 2'):
        read_streamed(streamed).iterate(seed=0, epoch=0, process=2, num_processes=2)


@pytest.mark.slow
def test_a_million_rows_are_indexed_in_a_minute(tmp_path):
    count, names = 1_000_000, [f'label {number}' for number in range(50)]
    rows = np.random.default_rng(0).integers(0, 50, (count, 3)).tolist()
    features = datasets.Features({
        'image': datasets.Image(decode=False), 'labels': datasets.Sequence(datasets.ClassLabel(names=names))})
    datasets.Dataset.from_dict(
        {'image': [{'bytes': b'', 'path': None}] * count, 'labels': rows}, features=features).save_to_disk(tmp_path)
    start = time.monotonic()
    records = read_hf(tmp_path, 'train')
    assert time.monotonic() - start < 60
    assert len(records) == count
    assert records.labels.row(17).nonzero().flatten().tolist() == sorted(set(rows[17]))
