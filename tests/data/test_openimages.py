"""Open Images' label files: names and ids, classes to read, contradictions, and a million pictures."""
import logging

import pytest

from timm_miil.data import find_format, list_splits, open_split

CLASSES = {'/m/1': 'Cat', '/m/2': 'Dog', '/m/3': 'Bird', '/m/4': 'Bird', '/m/5': 'Sea, open'}
ROWS = [
    ('aa', '/m/1', 1), ('aa', '/m/2', 0), ('bb', '/m/2', 1), ('bb', '/m/5', 1), ('cc', '/m/3', 0), ('cc', '/m/4', 1)]
NAMES = ('Cat', 'Dog', 'Bird (/m/3)', 'Bird (/m/4)', 'Sea, open')
TABLE = {'aa': [1, 0, -1, -1, -1], 'bb': [-1, 1, -1, -1, 1], 'cc': [-1, -1, 0, 1, -1]}


@pytest.fixture
def write(tmp_path, add_pictures):
    def write_set(rows=ROWS, split='train', name='{split}-annotations-human-imagelabels.csv', folder='.', header=False,
                  described='class-descriptions.csv', trainable=(), images='{split}'):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = ''.join(f'{image},verification,{label},{value}\n' for image, label, value in rows)
        (tmp_path / folder / name.format(split=split)).write_text('ImageID,Source,LabelName,Confidence\n' + text)
        if described:
            classes = ''.join(f'{key},"{value}"\n' for key, value in CLASSES.items())
            (tmp_path / folder / described).write_text('LabelName,DisplayName\n' * header + classes)
        if trainable:
            (tmp_path / folder / 'classes-trainable.txt').write_text('\n'.join(trainable) + '\n')
        add_pictures(*(f'{images.format(split=split)}/{name}.jpg' for name in {image for image, _, _ in rows}))
        return tmp_path
    return write_set


def table(records):
    return {path.stem: row for path, row in zip(records.image_paths, records.targets.tolist())}


@pytest.mark.parametrize('layout', [
    {}, {'name': 'oidv6-{split}-annotations-human-imagelabels.csv', 'described': 'oidv6-class-descriptions.csv',
         'header': True, 'folder': 'annotations', 'images': 'images/{split}'},
    {'name': '{split}-annotations-human-imagelabels-boxable.csv', 'described': 'class-descriptions-boxable.csv'}])
def test_labels_that_nobody_verified_are_unknown(layout, write):
    data_dir = write(**layout)
    assert find_format(data_dir) == 'openimages' and list_splits(data_dir) == ('train',)
    records = open_split(data_dir, 'train')
    assert records.label_names == NAMES and table(records) == TABLE and records.labels.fill == -1
    assert records.load_image(0).size == (5, 3)


def test_val_is_validation(write):
    assert table(open_split(write(split='validation'), 'val')) == TABLE


@pytest.mark.parametrize('rows', [ROWS, ROWS + [('dd', '/m/1', 1)]])
def test_only_the_trainable_classes_are_read(rows, write, caplog):
    data_dir = write(rows=rows, trainable=['/m/2', '/m/5'])
    with caplog.at_level(logging.INFO):
        records = open_split(data_dir, 'train')
    assert records.label_names == ('Dog', 'Sea, open') and table(records) == {'aa': [0, -1], 'bb': [1, 1]}
    assert f'{len(rows) - 3} rows are of classes that are not read' in caplog.text
    assert open_split(data_dir, 'train', classes='all').label_names == NAMES
    # The labels of one split open another.
    assert table(open_split(data_dir, 'train', labels=records.label_names)) == table(records)
    (data_dir / 'few.txt').write_text('/m/1\n')
    assert open_split(data_dir, 'train', classes='few.txt').label_names == ('Cat',)


def test_labels_are_matched_by_name_or_id(write):
    data_dir = write()
    records = open_split(data_dir, 'train', labels=['/m/3', 'Dog'], ignore_unknown_labels=True)
    assert records.label_names == ('/m/3', 'Dog')
    assert table(records) == {'aa': [-1, 0], 'bb': [-1, 1], 'cc': [0, -1]}
    with pytest.raises(ValueError, match=r"2 given ones: 'Cat' \(line 2; did you mean 'Cats'\?\), 'Sea, open'"):
        open_split(data_dir, 'train', labels=['Cats', 'Dog'])
    data_dir = write(described='')
    (data_dir / 'class-descriptions.csv').unlink()
    assert open_split(data_dir, 'train').label_names == tuple(CLASSES)


def test_contradictions_are_unknown_and_told(write, caplog):
    rows = [*ROWS, ('aa', '/m/1', 1), ('bb', '/m/2', 0), ('bb', '/m/2', 1), ('cc', '/m/4', 1)]
    with caplog.at_level(logging.WARNING):
        records = open_split(write(rows=rows), 'train')
    assert table(records) == {**TABLE, 'bb': [-1, -1, -1, -1, 1]}
    assert '4 rows repeat the picture and class of a row before them; 1 labels that they contradict are' in caplog.text


def test_pictures_that_are_not_downloaded_may_be_left_out(write):
    data_dir = write()
    (data_dir / 'train' / 'bb.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures of .*imagelabels.csv are missing in .*: 'bb.jpg'\.$"):
        open_split(data_dir, 'train')
    assert list(table(open_split(data_dir, 'train', drop_missing=True))) == ['aa', 'cc']


def test_files_with_other_names_are_given(write):
    data_dir = write(name='mine_{split}.csv', described='names.csv')
    options = dict(label_file='mine_{split}.csv', descriptions='names.csv')
    assert find_format(data_dir, **options) == 'openimages'
    assert table(open_split(data_dir, 'train', **options)) == TABLE
    assert list_splits(data_dir, format='openimages', label_file='mine_train.csv') == ('train',)
    with pytest.raises(FileNotFoundError, match="no file '.*lost.csv', which option descriptions names"):
        open_split(data_dir, 'train', label_file='mine_{split}.csv', descriptions='lost.csv')


def test_several_files_are_a_choice(write):
    data_dir = write()
    write(name='{split}-annotations-human-imagelabels-boxable.csv', described='class-descriptions-boxable.csv')
    with pytest.raises(ValueError, match=(
            'has train-annotations-human-imagelabels-boxable.csv and train-annotations-human-imagelabels.csv; give '
            'label_file')):
        open_split(data_dir, 'train')


@pytest.mark.parametrize('rows, words', [
    ([('aa', '/m/1', 0.8)],
     "line 2: a confidence must be 0 or 1, got '0.8'; labels made by machines have others, take"),
    ([('aa', '/m/9', 1)], r"5 given ones: '/m/9' \(line 2\)"),
    ([('../aa', '/m/1', 1)], r"line 2: a picture must be a path .* got '\.\./aa'"),
])
def test_wrong_rows_are_refused_with_the_line(rows, words, write):
    data_dir = write()
    write(rows=rows)
    with pytest.raises(ValueError, match=words):
        open_split(data_dir, 'train')


@pytest.mark.parametrize('name, text, words', [
    ('train-annotations-human-imagelabels.csv', 'ImageID,LabelName\naa,/m/1\n',
     'line 1: a column Confidence is expected, got ImageID, LabelName'),
    ('train-annotations-human-imagelabels.csv', '', 'is empty'),
    ('class-descriptions.csv', '/m/1,Cat\n/m/1,Dog\n', "must have each class once, got '/m/1' twice"),
    ('class-descriptions.csv', '/m/1,Cat\n/m/2,\n',
     r"line 2: a class id and a display name are expected, got \['/m/2'"),
    ('classes-trainable.txt', '/m/1\n/m/7\n', r"has ids that the descriptions of classes lack: '/m/7' \(line 2\)"),
    ('classes-trainable.txt', '/m/5\n', 'has no rows of the 1 labels'),
])
def test_wrong_files_are_refused(name, text, words, write):
    data_dir = write(rows=ROWS[:2])
    (data_dir / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        open_split(data_dir, 'train')
