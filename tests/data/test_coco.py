"""The COCO-style reader: what it returns and what it refuses before opening a picture."""
import json

import pytest
import torch
from PIL import Image

from timm_miil.data import read_coco


def valid():
    return {
        'images': [
            {'id': 7, 'file_name': 'b.png'}, {'id': 3, 'file_name': 'sub/a.png'}, {'id': 9, 'file_name': 'c.png'}],
        'annotations': [
            {'image_id': 7, 'category_id': 90}, {'image_id': 7, 'category_id': 90},
            {'image_id': 3, 'category_id': 90}, {'image_id': 3, 'category_id': 1}],
        'categories': [{'id': 90, 'name': 'toothbrush'}, {'id': 1, 'name': 'person'}],
    }


@pytest.fixture
def write(tmp_path):
    (tmp_path / 'pictures' / 'sub').mkdir(parents=True)
    for name in ('b.png', 'sub/a.png', 'c.png'):
        Image.new('RGB', (2, 2)).save(tmp_path / 'pictures' / name)

    def write_json(content):
        (tmp_path / 'instances.json').write_text(json.dumps(content), encoding='utf-8')
        return tmp_path / 'instances.json', tmp_path / 'pictures'
    return write_json


def test_labels_follow_the_categories_of_the_file(write):
    file, folder = write(valid())
    records = read_coco(file, folder)
    assert records.label_names == ('toothbrush', 'person')
    assert records.image_paths == (folder / 'b.png', folder / 'sub' / 'a.png', folder / 'c.png')
    assert records.targets.dtype == torch.int8 and records.targets.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert len(records) == 3


def test_no_annotations_at_all(write):
    assert read_coco(*write({**valid(), 'annotations': []})).targets.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(('table', 'row', 'message'), [
    ('images', {'id': 7, 'file_name': 'd.png'}, 'image ids that occur twice: 7'),
    ('images', {'id': 8, 'file_name': 'b.png'}, "file names that occur twice: 'b.png'"),
    ('images', {'id': 8, 'file_name': '../b.png'}, "file names that leave the picture folder: '../b.png'"),
    ('images', {'id': 8, 'file_name': '/etc/passwd'}, "file names that leave the picture folder: '/etc/passwd'"),
    ('images', {'id': 8, 'file_name': 'a\\..\\..\\b.png'}, 'file names that leave the picture folder'),
    ('images', {'id': 8, 'file_name': 'C:\\b.png'}, 'file names that leave the picture folder'),
    ('images', {'id': 8, 'file_name': ''}, "file names that leave the picture folder: ''"),
    ('images', {'id': '8', 'file_name': 'd.png'}, r"images\[3\] must have 'id' of type int"),
    ('images', {'id': 8}, r"images\[3\] must have 'file_name' of type str"),
    ('images', 8, r"images\[3\] must have 'id' of type int"),
    ('annotations', {'image_id': 7}, r"annotations\[4\] must have 'category_id' of type int"),
    ('annotations', {'image_id': 7, 'category_id': True}, r"annotations\[4\] must have 'category_id' of type int"),
    ('annotations', {'image_id': 5, 'category_id': 1}, 'annotations of unknown images: 5'),
    ('annotations', {'image_id': 7, 'category_id': 2}, 'annotations of unknown categories: 2'),
    ('categories', {'id': 90, 'name': 'cat'}, 'category ids that occur twice: 90'),
    ('categories', {'id': 2, 'name': 'person'}, "category names that occur twice: 'person'"),
])
def test_wrong_rows_are_refused_by_name(write, table, row, message):
    content = valid()
    content[table].append(row)
    file, folder = write(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_coco(file, folder)
    assert str(file) in str(caught.value)


def test_missing_pictures_are_counted_and_the_first_named(write):
    content = valid()
    content['images'] += [{'id': 100 + number, 'file_name': f'lost{number}.png'} for number in range(7)]
    file, folder = write(content)
    with pytest.raises(FileNotFoundError, match=(
            r"7 of 10 pictures of .*instances.json are missing in .*pictures: 'lost0.png', 'lost1.png', "
            r"'lost2.png', 'lost3.png', 'lost4.png' and 2 more\.")):
        read_coco(file, folder)


@pytest.mark.parametrize(('text', 'message'), [
    ('{', 'is not a JSON file'),
    ('[]', 'must hold a JSON object with images, annotations, categories, got list'),
    ('{"images": []}', "has no list 'annotations'; of images, annotations, categories it has images."),
    ('{}', "has no list 'images'; of images, annotations, categories it has none"),
])
def test_other_files_are_refused(write, text, message):
    file, folder = write({})
    file.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=message):
        read_coco(file, folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.json'):
        read_coco(tmp_path / 'nothing.json', tmp_path)
