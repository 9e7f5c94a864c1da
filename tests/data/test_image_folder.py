"""Folders of labels: which are splits, which are labels, and what is refused."""
import os
import shutil

import pytest

from timm_miil.data import find_format, list_splits, open_split


def test_splits_of_folders_of_labels(add_pictures):
    data_dir = add_pictures(
        'train/dog/1.jpg', 'train/dog/deep/er/2.JPEG', 'train/cat/3.jpg', 'valid/cat/4.jpg', 'valid/dog/5.jpg')
    (data_dir / 'train' / 'cat' / 'notes.txt').write_text('no picture')
    (data_dir / 'train' / 'cat' / '.hidden.jpg').write_text('no picture')
    (data_dir / 'train' / '.cache').mkdir()
    assert find_format(data_dir) == 'folder' and list_splits(data_dir) == ('train', 'valid')
    records = open_split(data_dir, 'train')
    assert records.label_names == ('cat', 'dog')
    assert [path.relative_to(data_dir).as_posix() for path in records.image_paths] == [
        'train/cat/3.jpg', 'train/dog/1.jpg', 'train/dog/deep/er/2.JPEG']
    assert records.targets.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert records.load_image(2).size == (5, 3)
    assert open_split(data_dir, 'val').image_paths[0] == data_dir / 'valid/cat/4.jpg'


def test_without_splits_all_is_for_training(add_pictures):
    data_dir = add_pictures('dog/1.jpg', 'cat/2.jpg', 'train/3.jpg')  # a train may be a label
    assert list_splits(data_dir) == ('train',)
    assert open_split(data_dir, 'train').label_names == ('cat', 'dog', 'train')


def test_one_folder_of_pictures_is_no_data_set(add_pictures):
    assert list_splits(add_pictures('images/1.jpg'), format='folder') == ()


def test_labels_are_matched_by_name_and_empty_ones_stay(add_pictures):
    data_dir = add_pictures('train/cat/1.jpg', 'train/dog/2.jpg')
    (data_dir / 'train' / 'emu').mkdir()
    assert open_split(data_dir, 'train').label_names == ('cat', 'dog', 'emu')
    records = open_split(data_dir, 'train', labels=['dog', 'yak', 'emu', 'cat'])
    assert records.targets.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"not among the 2 given ones: 'dog' \(a folder; did you mean 'dogs'\?\)"):
        open_split(data_dir, 'train', labels=['dogs', 'cat'], ignore_unknown_labels=False)
    records = open_split(data_dir, 'train', labels=['cat'], ignore_unknown_labels=True)
    assert len(records) == 1 and records.targets.tolist() == [[1]]


def test_links_to_folders_are_followed_but_not_in_circles(add_pictures, tmp_path_factory):
    data_dir = add_pictures('train/cat/1.jpg')
    other = tmp_path_factory.mktemp('other')
    shutil.copy(data_dir / 'train/cat/1.jpg', other)
    (data_dir / 'train' / 'dog').symlink_to(other)
    (data_dir / 'train' / 'cat' / 'again').symlink_to(data_dir / 'train' / 'cat')
    assert [path.relative_to(data_dir).as_posix() for path in open_split(data_dir, 'train').image_paths] == [
        'train/cat/1.jpg', 'train/dog/1.jpg']


def test_pictures_beside_the_folders_of_labels_are_refused(add_pictures):
    data_dir = add_pictures('cat/0.jpg', 'dog/0.jpg', *(f'{number}.jpg' for number in range(7)))
    with pytest.raises(ValueError, match=(
            "has 7 pictures beside the folders of labels: '0.jpg', '1.jpg', '2.jpg', '3.jpg', '4.jpg' and 2 more; move "
            "each to the folder of its label")):
        open_split(data_dir, 'train')


def test_splits_without_labels_are_not_taken_for_labels(add_pictures):
    data_dir = add_pictures('train/0.jpg', 'val/1.jpg')
    with pytest.raises(ValueError, match='has folders train, val with pictures and no folders of labels in them; move'):
        open_split(data_dir, 'train')


def test_no_pictures_at_all(tmp_path):
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'train has no pictures; these are files \.bmp \.gif \.jfif'):
        open_split(tmp_path, 'train')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may list any folder')
def test_a_folder_that_cannot_be_listed_is_an_error(add_pictures):
    data_dir = add_pictures('train/cat/1.jpg', 'train/cat/deep/2.jpg')
    (data_dir / 'train/cat/deep').chmod(0)
    try:
        with pytest.raises(OSError, match="cannot list the folder '.*deep'"):
            open_split(data_dir, 'train')
    finally:
        (data_dir / 'train/cat/deep').chmod(0o755)
