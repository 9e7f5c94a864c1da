"""The COCO-style reader: what it returns and what it refuses before opening a picture."""
import json

import pytest
import torch
from PIL import Image

from timm_miil.data import open_split, read_coco


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


def test_crowds_count_and_pictures_without_annotations_may_be_left_out(write):
    content = valid()
    content['annotations'][2]['iscrowd'] = 1
    file, folder = write(content)
    assert read_coco(file, folder).targets.tolist() == [[1, 0], [1, 1], [0, 0]]
    records = read_coco(file, folder, drop_unlabelled=True)
    assert records.image_paths == (folder / 'b.png', folder / 'sub' / 'a.png')
    assert records.targets.tolist() == [[1, 0], [1, 1]]


def test_labels_are_matched_by_name_and_others_unknown(write):
    records = read_coco(*write(valid()), labels=['person', 'zebra', 'toothbrush'])
    assert records.label_names == ('person', 'zebra', 'toothbrush')
    assert records.targets.tolist() == [[0, -1, 1], [1, -1, 1], [0, -1, 0]]
    with pytest.raises(ValueError, match=r"'toothbrush' \(category 90; did you mean 'toothbrushes'\?\)"):
        read_coco(*write(valid()), labels=['person', 'toothbrushes'])
    few = read_coco(*write(valid()), labels=['person'], ignore_unknown_labels=True, drop_unlabelled=True)
    assert few.targets.tolist() == [[0], [1]]  # a picture of other things is labelled too


def test_names_are_brought_to_one_form(write):
    content = valid()
    content['images'].append({'id': 8, 'file_name': './b.png'})
    with pytest.raises(ValueError, match="file names that occur twice: 'b.png'"):
        read_coco(*write(content))


@pytest.mark.parametrize('folder', ['val2017', 'images/val2017', 'elsewhere'])
def test_a_data_set_in_the_usual_layouts(folder, write, tmp_path):
    file, pictures = write(valid())
    (tmp_path / 'annotations').mkdir()
    file.rename(tmp_path / 'annotations' / 'instances_val2017.json')
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    pictures.rename(tmp_path / folder)
    options = {'image_dir': 'elsewhere'} if folder == 'elsewhere' else {}
    assert len(open_split(tmp_path, 'val', **options)) == 3
    with pytest.raises(FileNotFoundError, match="no folder with the pictures of split 'val2017', which is .*lost;"):
        open_split(tmp_path, 'val', image_dir='lost')


def test_a_file_nested_too_deeply_is_refused(write):
    file, folder = write({})
    file.write_text('[' * 100_000, encoding='utf-8')
    with pytest.raises(ValueError, match='is not a JSON file'):
        read_coco(file, folder)
