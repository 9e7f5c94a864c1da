"""ImageNet-21K-P on a lab's disk: sources that change or may not be read, and runs into what is there already."""
import errno
import json
import os
import tarfile

import pytest
from in21k_corpus import LEAST, VAL, names, picture, write_folder, write_tar

from timm_miil.data import ClassTree, _in21k_source, in21k, list_splits, open_split, read_class_tree, write_class_tree
from timm_miil.data.in21k import check_in21k, prepare_in21k

SMALL = {'release': 'custom', 'size': 8, 'min_images': LEAST, 'val_images': VAL, 'workers': 0}


@pytest.fixture
def small(tmp_path):
    """Two synsets of six pictures, the second a tar file, prepared in 'out'."""
    for number, write in enumerate((write_folder, write_tar), 1):
        synset = f'n0000000{number}'
        write(
            tmp_path / 'in' / (synset + ('.tar' if write is write_tar else '')),
            {name: picture(number * 10 + place) for place, name in enumerate(names(synset, 6))})
    prepare_in21k(tmp_path / 'in', tmp_path / 'out', **SMALL)
    return tmp_path


def again(folder, **changes):
    return prepare_in21k(folder / 'in', folder / 'out', **SMALL | changes)


# ---- the source


def test_a_folder_with_more_files_is_made_again_as_when_it_was_still_being_unpacked(small):
    (small / 'in' / 'n00000001' / 'n00000001_6.JPEG').write_bytes(picture(6))
    assert again(small).classes['n00000001'] == (7, 5, 2)
    assert check_in21k(small / 'out', workers=0) == []
    # What has gone may have been deleted because it was finished.
    for name in os.listdir(small / 'in' / 'n00000001'):
        (small / 'in' / 'n00000001' / name).unlink()
    assert again(small).classes['n00000001'] == (7, 5, 2)


@pytest.mark.parametrize('unpacked', [False, True])
def test_a_tar_file_that_was_damaged_is_made_again_though_it_has_the_same_size(small, unpacked):
    tar = small / 'in' / 'n00000003.tar'
    write_tar(tar, {name: picture(1) for name in names('n00000003', 8)})
    whole = tar.read_bytes()
    place = whole.rindex(b'n00000003_6.JPEG')
    tar.write_bytes(whole[:place] + bytes(16) + whole[place + 16:])
    report = again(small)
    assert list(report.damaged) == ['n00000003'] and report.classes['n00000003'] == (6, 4, 2)
    tar.write_bytes(whole)
    if unpacked:
        with tarfile.open(tar) as files:
            files.extractall(small / 'in' / 'n00000003', filter='data')
        tar.unlink()
    report = again(small)
    assert not report.damaged and report.classes['n00000003'] == (8, 6, 2)


def test_a_deleted_folder_has_the_mended_pictures_of_its_synset_read(small):
    broken = small / 'in' / 'n00000001' / 'n00000001_4.JPEG'
    broken.write_bytes(b'')
    (small / 'in' / 'n00000001' / 'n00000001_6.JPEG').write_bytes(picture(6))
    assert again(small).classes['n00000001'] == (7, 4, 2)
    broken.write_bytes(picture(4))
    assert again(small).classes['n00000001'] == (7, 4, 2)
    for path in (small / 'out' / 'train' / 'n00000001').iterdir():
        path.unlink()
    assert again(small).classes['n00000001'] == (7, 5, 2)


def test_links_to_themselves_are_no_folders(small):
    for name in ('n00000004', 'n00000005.tar', 'loop', 'n00000001/loop.JPEG'):
        os.symlink(os.path.basename(name), small / 'in' / name)
    report = again(small)
    assert report.passed_over == ('loop', 'n00000004', 'n00000005.tar')
    assert [(omission.file, omission.reason) for omission in report.omissions] == [
        ('n00000001/loop.JPEG', 'too many levels of symbolic links')]
    os.symlink('loop', small / 'out' / 'train' / 'loop')
    os.symlink('loop', small / 'out' / 'train' / 'n00000001' / 'loop.txt')
    assert len(open_split(small / 'out', 'train')) == 9


def test_what_may_not_be_read_is_said_before_anything_is_made(small, monkeypatch):
    shut = {small / 'in' / 'n00000001': os.X_OK, small / 'in' / 'n00000002.tar': os.R_OK}
    monkeypatch.setattr(_in21k_source.os, 'access', lambda path, mode: not mode & shut.get(path, 0))
    with pytest.raises(PermissionError, match='2 synsets may not be read: .*n00000001, .*n00000002.tar; change th'):
        prepare_in21k(small / 'in', small / 'fresh', **SMALL)
    assert not (small / 'fresh').exists()


def test_lost_and_found_is_not_looked_into(small, monkeypatch):
    (small / 'in' / 'lost+found').mkdir()
    entries = _in21k_source._entries

    def guarded(folder):
        if folder.name == 'lost+found':
            raise PermissionError(folder)
        return entries(folder)

    monkeypatch.setattr(_in21k_source, '_entries', guarded)
    assert again(small).passed_over == ('lost+found',)


def test_a_folder_in_a_synset_says_where_pictures_are_looked_for(tmp_path):
    write_folder(tmp_path / 'in' / 'n00000001' / 'images', {name: picture(1) for name in names('n00000001', 6)})
    with pytest.raises(ValueError, match='no synset has enough pictures'):
        prepare_in21k(tmp_path / 'in', tmp_path / 'out', **SMALL)
    assert 'pictures are looked for beside it, not in it' in (tmp_path / 'out' / 'report.json').read_text()


# ---- what is there already


def test_a_record_that_is_cut_off_has_its_synset_made_again(small):
    """As a power cut leaves it."""
    record = small / 'out' / '.in21k' / 'synsets' / 'n00000001.json'
    whole = record.read_bytes()
    record.write_bytes(b'')
    again(small)
    assert record.read_bytes() == whole
    record.write_bytes(b'')
    (small / 'in' / 'n00000001').rename(small / 'n00000001')
    with pytest.raises(ValueError, match='n00000001.json is no record of a synset; delete it'):
        again(small)


def test_files_of_the_system_in_class_folders_do_not_count(small):
    for folder in ('train/n00000001', 'val', 'val/n00000002'):
        (small / 'out' / folder / '.DS_Store').touch()
    stamp = (small / 'out' / 'train' / 'n00000001').stat().st_mtime_ns
    again(small)
    assert (small / 'out' / 'train' / 'n00000001').stat().st_mtime_ns == stamp
    assert check_in21k(small / 'out', workers=0) == []


def test_what_a_kill_left_of_half_written_lists_goes_away(small):
    for name in ('.manifest.jsonl-x8f2', '.in21k/.settings.json-1', '.in21k/synsets/.n00000001.train.jsonl-2'):
        (small / 'out' / name).touch()
    again(small)
    assert [path for path in (small / 'out').rglob('.*-*')] == []


def test_a_tree_of_before_stays_while_it_fits_and_then_goes(small):
    tree = ClassTree(('n00000001', 'n00000002'), (-1, 0))
    write_class_tree(tree, small / 'tree.json')
    assert again(small, tree=small / 'tree.json').has_tree
    report = again(small)
    assert report.has_tree and read_class_tree(small / 'out' / 'tree.json') == tree
    write_folder(small / 'in' / 'n00000003', {name: picture(3) for name in names('n00000003', 6)})
    assert not again(small).has_tree
    assert not (small / 'out' / 'tree.json').exists()


def test_shards_of_other_pictures_are_said(small, caplog):
    again(small, shards=True)
    again(small)
    assert not caplog.records
    write_folder(small / 'in' / 'n00000003', {name: picture(3) for name in names('n00000003', 6)})
    again(small)
    assert caplog.messages == [f'{small}/out/shards has the pictures of before; delete it, or have it made again.']


def test_a_run_that_ends_early_leaves_no_manifest_that_says_all_was_made(small, monkeypatch, caplog):
    again(small, shards=True)
    write_folder(small / 'in' / 'n00000003', {name: picture(3) for name in names('n00000003', 6)})

    def ended(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(in21k, 'run_jobs', ended)
        again(small)
    with pytest.raises(FileNotFoundError, match='has no manifest.jsonl; prepare_in21k writes it at its end'):
        check_in21k(small / 'out', workers=0)
    again(small)
    assert check_in21k(small / 'out', workers=0) == []
    assert caplog.messages == [f'{small}/out/shards has the pictures of before; delete it, or have it made again.']
    assert not (small / 'out' / '.in21k' / 'manifest.jsonl').exists()


def test_a_disk_that_is_full_at_the_end_says_what_is_kept(small, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(in21k, 'write_class_tree', full)
    write_class_tree(ClassTree(('n00000001', 'n00000002'), (-1, 0)), small / 'tree.json')
    with pytest.raises(OSError, match=r'cannot write the lists in .*out \(.*No space.*\); all pictures are there, run'):
        again(small, tree=small / 'tree.json')


def test_without_pictures_for_validation_there_is_only_train(tmp_path):
    write_folder(tmp_path / 'in' / 'n00000001', {name: picture(1) for name in names('n00000001', 6)})
    report = prepare_in21k(tmp_path / 'in', tmp_path / 'out', **SMALL | {'val_images': 0, 'shards': True})
    assert (report.classes, report.num_val) == ({'n00000001': (6, 6, 0)}, 0)
    assert json.loads((tmp_path / 'out' / 'manifest.jsonl').read_text().splitlines()[0])['file'].startswith('train/')
    assert len(open_split(tmp_path / 'out', 'train')) == 6
    assert list_splits(tmp_path / 'out') == ('train',)
