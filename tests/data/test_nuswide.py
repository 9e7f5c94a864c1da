"""NUS-WIDE in the layouts that its archives unpack to, and as one CSV file."""
import logging

import pytest

from timm_miil.data import find_format, list_splits, open_split

CONCEPTS = ('sky', 'clouds', 'person')
TRAIN = {'actor/1_2.jpg': [1, 1, 0], 'zoo/3_4.jpg': [0, 0, 0], 'zoo/5_6.jpg': [0, 0, 1]}
TEST = {'actor/7_8.jpg': [1, 0, 0]}


@pytest.fixture
def write(tmp_path, add_pictures):
    def write_lists(lists='ImageList', labels='Groundtruth/TrainTestLabels', concepts='.', images='Flickr'):
        for folder in (lists, labels, concepts):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / concepts / 'Concepts81.txt').write_text('\n'.join(CONCEPTS) + '\n')
        for part, rows in (('Train', TRAIN), ('Test', TEST)):
            add_pictures(*(f'{images}/{name}' for name in rows))
            (tmp_path / lists / f'{part}Imagelist.txt').write_bytes(
                ''.join(name.replace('/', '\\') + '\r\n' for name in rows).encode())
            for column, concept in enumerate(CONCEPTS):
                (tmp_path / labels / f'Labels_{concept}_{part}.txt').write_text(
                    ''.join(f'{row[column]}\n' for row in rows.values()))
        return tmp_path
    return write_lists


def rows(records, folder):
    names = [path.relative_to(folder).as_posix() for path in records.image_paths]
    return dict(zip(names, records.targets.tolist()))


@pytest.mark.parametrize('layout', [
    {}, {'lists': 'ImageList/Imagelist', 'labels': 'TrainTestLabels', 'concepts': 'ConceptsList', 'images': 'images'},
    {'lists': '.', 'labels': '.'}])
def test_the_authors_lists(layout, write):
    data_dir = write(**layout)
    assert find_format(data_dir) == 'nuswide' and list_splits(data_dir) == ('train', 'test')
    records = open_split(data_dir, 'train')
    assert records.label_names == CONCEPTS
    assert rows(records, data_dir / layout.get('images', 'Flickr')) == TRAIN
    assert rows(open_split(data_dir, 'test'), data_dir / layout.get('images', 'Flickr')) == TEST
    assert len(open_split(data_dir, 'train', drop_unlabelled=True)) == 2


def test_labels_are_matched_by_name(write):
    data_dir = write()
    records = open_split(data_dir, 'train', labels=['person', 'dog', 'sky', 'clouds'])
    assert records.targets.tolist() == [[0, -1, 1, 1], [0, -1, 0, 0], [1, -1, 0, 0]]
    with pytest.raises(ValueError, match=r"Concepts81.txt has labels .*: 'clouds' \(line 2; did you mean 'cloud'\?\)"):
        open_split(data_dir, 'train', labels=['sky', 'cloud', 'person'])
    records = open_split(data_dir, 'train', labels=['person'], ignore_unknown_labels=True)
    assert records.targets.tolist() == [[0], [0], [1]]


def test_pictures_that_are_lost_may_be_left_out(write, caplog):
    data_dir = write()
    (data_dir / 'Flickr' / 'actor' / '1_2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures of .*TrainImagelist.txt .*: 'actor/1_2.jpg'\.$"):
        open_split(data_dir, 'train')
    with caplog.at_level(logging.WARNING):
        records = open_split(data_dir, 'train', drop_missing=True)
    assert records.targets.tolist() == list(TRAIN.values())[1:]
    assert '1 of 3 pictures' in caplog.text and 'they are left out' in caplog.text


@pytest.mark.parametrize('name, text, words', [
    ('Groundtruth/TrainTestLabels/Labels_sky_Train.txt', '1\n0\n',
     'Labels_sky_Train.txt must have one line a picture of .*TrainImagelist.txt, 3 in all, got 2'),
    ('Groundtruth/TrainTestLabels/Labels_sky_Train.txt', '1\n0\n7\n', "line 3: a label must be 0 or 1, got b'7'"),
    ('ImageList/TrainImagelist.txt', 'a\\1.jpg\nb\\2.jpg\na\\1.jpg\n',
     "line 3: picture 'a/1.jpg' is on line 1 already"),
    ('ImageList/TrainImagelist.txt', '..\\1.jpg\n', "line 1: a picture must be a path .* got '../1.jpg'"),
    ('Concepts81.txt', 'sky\nsky\n', "'sky' is on lines 1 and 2"),
])
def test_wrong_files_are_refused(name, text, words, write):
    data_dir = write()
    (data_dir / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        open_split(data_dir, 'train')


@pytest.mark.parametrize('name, words', [
    ('Groundtruth/TrainTestLabels/Labels_sky_Train.txt', r'has no Labels_sky_Train.txt in \. or Groundtruth/Train'),
    ('Concepts81.txt', 'has no Concepts81.txt or .*, with the names of the concepts'),
])
def test_missing_files_are_named(name, words, write):
    data_dir = write()
    (data_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        open_split(data_dir, 'train')


TAGS = ('blue', 'sky', 'nikon')
TAG_ROWS = {'Train': [[1, 1, 0], [0, 0, 1], [0, 1, 1]], 'Test': [[1, 0, 1]]}


def write_tags(data_dir, folder='NUS_WID_Tags'):
    (data_dir / folder).mkdir(exist_ok=True)
    (data_dir / folder / 'TagList1k.txt').write_text('\n'.join(TAGS) + '\n')
    for part, rows in TAG_ROWS.items():
        (data_dir / folder / f'{part}_Tags1k.dat').write_text(
            ''.join('\t'.join(map(str, row)) + '\t\n' for row in rows))


def test_tags_that_are_no_concept_are_labels_before_the_concepts(write):
    data_dir = write()
    write_tags(data_dir)
    records = open_split(data_dir, 'train', tags=True)
    assert records.label_names == ('blue', 'nikon', *CONCEPTS)
    assert records.targets.tolist() == [
        [row[0], row[2], *shows] for row, shows in zip(TAG_ROWS['Train'], TRAIN.values())]
    assert open_split(data_dir, 'test', tags=True).targets.tolist() == [[1, 1, 1, 0, 0]]
    assert open_split(data_dir, 'train').label_names == CONCEPTS
    some = open_split(data_dir, 'train', tags=True, labels=['person', 'nikon'], ignore_unknown_labels=True)
    assert some.targets.tolist() == [[0, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(('text', 'words'), [
    ('1 0 0\n1 0 0\n', 'must have one line a picture of .*TrainImagelist.txt, 3 in all, got 2'),
    ('1 0 0\n1 0\n', 'of 3 numbers, one a tag of .*TagList1k.txt, got 2 in line 2'),
    ('1 0 0\n' * 4, 'must have 3 lines, .* in line 4'), ('1 0 0\n1 7 0\n1 0 0\n', 'line 2: a tag must be 0 or 1'),
])
def test_wrong_tags_are_refused(text, words, write):
    data_dir = write()
    with pytest.raises(FileNotFoundError, match='has no TagList1k.txt or Train_Tags1k.dat in . or NUS_WID_Tags'):
        open_split(data_dir, 'train', tags=True)
    write_tags(data_dir)
    (data_dir / 'NUS_WID_Tags' / 'Train_Tags1k.dat').write_text(text)
    with pytest.raises(ValueError, match=words):
        open_split(data_dir, 'train', tags=True)


CSV = """filepath,label,split_name
actor/1_2.jpg,"['clouds', 'sky']",train
zoo/3_4.jpg,[],val
zoo/5_6.jpg,['person'],train
"""


def test_the_csv_file(tmp_path, add_pictures):
    add_pictures(*(f'images/{name}' for name in TRAIN))
    (tmp_path / 'nus_wid_data.csv').write_text(CSV)
    assert find_format(tmp_path) == 'nuswide' and list_splits(tmp_path) == ('train', 'val')
    records = open_split(tmp_path, 'train', image_dir='images')
    assert records.label_names == ('clouds', 'person', 'sky')
    assert rows(records, tmp_path / 'images') == {'actor/1_2.jpg': [1, 0, 1], 'zoo/5_6.jpg': [0, 1, 0]}
    val = open_split(tmp_path, 'val', image_dir='images', labels=CONCEPTS)
    assert rows(val, tmp_path / 'images') == {'zoo/3_4.jpg': [0, 0, 0]}
    with pytest.raises(ValueError, match='no picture of split val shows a label; leave out drop_unlabelled'):
        open_split(tmp_path, 'val', image_dir='images', labels=CONCEPTS, drop_unlabelled=True)
    (tmp_path / 'Concepts81.txt').write_text('\n'.join(CONCEPTS))
    assert open_split(tmp_path, 'val', image_dir='images').label_names == CONCEPTS


def test_both_kinds_of_lists_are_a_choice(write):
    data_dir = write()
    (data_dir / 'nus_wid_data.csv').write_text(CSV)
    with pytest.raises(ValueError, match="has both nus_wid_data.csv and the authors' lists; give lists='csv' or "):
        open_split(data_dir, 'train')
    assert len(open_split(data_dir, 'train', lists='authors')) == 3
    assert len(open_split(data_dir, 'train', lists='csv', image_dir='Flickr')) == 2
    with pytest.raises(ValueError, match="tags must be false for nus_wid_data.csv, .* lists='authors'"):
        open_split(data_dir, 'train', lists='csv', tags=True)
