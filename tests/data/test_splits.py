"""Finding the format and splits of a data set, and matching its labels by name."""
import json
import logging

import pytest

from timm_miil import catalog
from timm_miil.data import find_format, has_split, list_formats, list_splits, open_split, read_label_set
from timm_miil.data._files import clean_name, find_missing
from timm_miil.data.splits import ALIASES

COCO = {
    'images': [{'id': 1, 'file_name': 'a.jpg'}, {'id': 2, 'file_name': 'b.jpg'}],
    'annotations': [{'image_id': 1, 'category_id': 3}, {'image_id': 2, 'category_id': 5}],
    'categories': [{'id': 3, 'name': 'cat'}, {'id': 5, 'name': 'dog'}],
}


@pytest.fixture
def add_coco(tmp_path, add_pictures):
    def add(*splits):
        for split in splits:
            add_pictures(f'{split}/a.jpg', f'{split}/b.jpg')
            (tmp_path / 'annotations').mkdir(exist_ok=True)
            (tmp_path / 'annotations' / f'instances_{split}.json').write_text(json.dumps(COCO))
        return tmp_path
    return add


def test_every_format_is_listed_and_its_module_keeps_to_the_protocol(tmp_path):
    assert {'coco', 'csv', 'folder', 'nuswide', 'openimages', 'voc'} <= set(list_formats())
    assert list(list_formats()) == sorted(list_formats())
    for name in list_formats():
        assert list_splits(tmp_path, format=name) == ()
        assert not has_split(tmp_path, 'train', name)
        with pytest.raises(FileNotFoundError, match="has no split 'train'; it has none"):
            open_split(tmp_path, 'train', format=name)


def test_the_format_is_found_by_the_files(tmp_path, add_coco, add_pictures):
    with pytest.raises(ValueError, match='looks like no format; give format as one of coco, csv, folder, '):
        find_format(tmp_path)
    add_pictures('train/cat/a.jpg')
    assert find_format(tmp_path) == 'folder'
    add_coco('train')
    assert find_format(tmp_path) == 'coco'
    (tmp_path / 'val.csv').write_text('image,label\n')
    with pytest.raises(ValueError, match='looks like coco and csv; give format as one of '):
        open_split(tmp_path, 'train')
    assert len(open_split(tmp_path, 'train', format='coco')) == 2


def test_splits_are_found_by_their_usual_names(add_coco):
    data_dir = add_coco('train2017', 'val2017')
    assert list_splits(data_dir) == ('train2017', 'val2017')
    for split, is_there in {'train': True, 'val': True, 'test': False, 'train2017': True, 'train2014': False}.items():
        assert has_split(data_dir, split) == is_there
    assert open_split(data_dir, 'val').image_paths[0].parent.name == 'val2017'
    with pytest.raises(FileNotFoundError, match="has no split 'test'; it has 'train2017', 'val2017'"):
        open_split(data_dir, 'test')
    add_coco('train2014')
    with pytest.raises(ValueError, match="split 'train' of .* may be train2017 or train2014; give the name of one"):
        open_split(data_dir, 'train')
    assert len(open_split(data_dir, 'train2014')) == 2
    add_coco('train')
    assert open_split(data_dir, 'train').image_paths[0].parent.name == 'train'
    assert not set.intersection(*({split, *names} for split, names in ALIASES.items()))


@pytest.mark.parametrize('give', ['names', 'file here', 'file there', 'path'])
def test_labels_are_matched_by_name_from_any_source(give, add_coco, monkeypatch, tmp_path_factory):
    data_dir = add_coco('train')
    names = ['zebra', 'dog', 'cat']
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    monkeypatch.chdir(elsewhere)
    ((data_dir if give == 'file there' else elsewhere) / 'names.txt').write_text('\n'.join(names))
    labels = {'names': names, 'path': elsewhere / 'names.txt'}.get(give, 'names.txt')
    records = open_split(data_dir, 'train', labels=labels)
    assert records.label_names == ('zebra', 'dog', 'cat')
    # Nobody was asked about zebras.
    assert records.targets.tolist() == [[-1, 0, 1], [-1, 1, 0]]


def test_a_label_set_of_the_catalogue(add_coco):
    records = open_split(add_coco('train'), 'train', labels='coco_80')
    assert records.label_names == catalog.label_set('coco_80').labels
    row = dict(zip(records.label_names, records.targets[0].tolist()))
    assert row.pop('cat') == 1 and row.pop('dog') == 0 and set(row.values()) == {-1}


def test_names_that_are_not_among_the_labels(add_coco):
    data_dir = add_coco('train')
    with pytest.raises(ValueError, match=(
            r"instances_train.json has labels that are not among the 2 given ones: 'dog' \(category 5; did you mean "
            r"'dogs'\?\); correct them, give labels that has them, or pass ignore_unknown_labels=True")):
        open_split(data_dir, 'train', labels=['cat', 'dogs'])
    records = open_split(data_dir, 'train', labels=['cat'], ignore_unknown_labels=True)
    assert records.label_names == ('cat',) and records.targets.tolist() == [[1], [0]]


@pytest.mark.parametrize('labels, kind, words', [
    ('voc_21', FileNotFoundError, "text file here or in .*, got 'voc_21'; did you mean 'voc_20'"),
    (['a', 'b', 'a'], ValueError, "label names must be distinct, got 'a' twice"),
])
def test_label_sets_that_are_none(labels, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        read_label_set(labels, tmp_path)
    assert read_label_set(None, tmp_path) is None


def test_labels_that_are_never_present_are_reported(add_coco, caplog):
    with caplog.at_level(logging.WARNING):
        open_split(add_coco('train'), 'train', labels=['cat', 'emu', 'dog', 'yak'])
    assert [message.partition('split ')[2] for message in caplog.messages] == [
        "train: 2 of 4 labels are never present: 'emu', 'yak'."]


@pytest.mark.parametrize('options, kind, words', [
    ({'format': 'coko'}, ValueError, "unknown format 'coko'; did you mean 'coco'"),
    ({'image_dri': 'x'}, ValueError, "unknown option 'image_dri' of format coco; did you mean 'image_dir'"),
    ({'drop_unlabelled': 1}, TypeError, 'drop_unlabelled must be bool, got int 1'),
    ({'image_dir': 7}, TypeError, 'image_dir must be str, got int 7'),
    ({'format': 'csv', 'form': 'tall'}, ValueError, "form must be one of 'auto', 'wide', 'list', 'long', got 'tall'"),
    ({'format': 'csv', 'unlisted': True}, TypeError, 'unlisted must be int or NoneType, got bool True'),
    ({'format': 'folder', 'image_dir': 'x'}, ValueError, "unknown option 'image_dir' of format folder; it has none"),
])
def test_wrong_formats_and_options_are_refused(options, kind, words, add_coco):
    with pytest.raises(kind, match=words):
        open_split(add_coco('train'), 'train', **options)


def test_a_folder_that_is_none(tmp_path):
    for function in (find_format, list_splits):
        with pytest.raises(FileNotFoundError, match='data_dir must be the folder of a data set, got .*nowhere'):
            function(tmp_path / 'nowhere')


@pytest.mark.parametrize('name, want', [
    ('a.jpg', 'a.jpg'), ('./a.jpg', 'a.jpg'), ('a/./b//c..jpg', 'a/b/c..jpg'), ('a/', 'a'), ('a..b', 'a..b'),
    ('.hidden/a', '.hidden/a'), ('', ''), ('.', ''), ('/a', ''), ('../a', ''), ('a/../../b', ''), ('a\\..\\b', ''),
    ('C:\\a', ''), ('C:a', ''), ('\\\\host\\a', ''), ('a\0b', ''), ('a/..', ''),
])
def test_names_stay_inside_their_folder(name, want):
    assert clean_name(name) == want


def test_missing_files_are_found_in_folders_listed_once(add_pictures, monkeypatch):
    names = [f'{folder}/{number}.jpg' for folder in 'ab' for number in range(100)] + ['c/0.jpg']
    folder = add_pictures(*names)
    (folder / 'a' / 'link.jpg').symlink_to('0.jpg')
    (folder / 'a' / 'broken.jpg').symlink_to('nowhere')
    (folder / 'a' / 'folder.jpg').mkdir()
    wanted = [*names, 'a/link.jpg', 'a/broken.jpg', 'a/folder.jpg', 'd/0.jpg', *(f'lost/{n}.jpg' for n in range(100))]
    assert find_missing(folder, wanted) == list(range(len(names) + 1, len(wanted)))

    from pathlib import Path
    monkeypatch.setattr(Path, 'is_file', lambda path: pytest.fail(f'{path} is looked up alone'))
    assert find_missing(folder, names[:200]) == []
