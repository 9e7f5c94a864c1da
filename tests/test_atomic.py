"""Files and folders that appear whole or not at all."""
import os

import pytest

from timm_miil._atomic import whole_file, whole_folder, write_file


def test_a_finished_folder_takes_its_name(tmp_path):
    target = tmp_path / 'deep' / 'set'
    with whole_folder(target) as folder:
        (folder / 'a.txt').write_text('a')
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ['a.txt']
    assert [path.name for path in target.parent.iterdir()] == ['set']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path, error):
    target = tmp_path / 'set'
    with pytest.raises(error):
        with whole_folder(target) as folder:
            (folder / 'a.txt').write_text('a')
            raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_folder(tmp_path):
    target = tmp_path / 'set'
    target.mkdir()
    (target / 'old.txt').write_text('old')
    with pytest.raises(RuntimeError):
        with whole_folder(target) as folder:
            (folder / 'new.txt').write_text('new')
            raise RuntimeError
    assert [path.name for path in target.iterdir()] == ['old.txt']
    assert list(tmp_path.iterdir()) == [target]


def test_a_replacement_holds_nothing_of_the_old_folder(tmp_path):
    target = tmp_path / 'set'
    for name in ('old.txt', 'new.txt'):
        with whole_folder(target) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ['new.txt']
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_put_in_place_brings_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / 'set'
    target.mkdir()
    (target / 'old.txt').write_text('old')
    replace = os.replace

    def refuse_the_fresh_one(source, destination):
        if os.path.basename(source) == 'fresh':
            raise PermissionError('refused')
        replace(source, destination)

    monkeypatch.setattr(os, 'replace', refuse_the_fresh_one)
    with pytest.raises(PermissionError, match='refused'):
        with whole_folder(target) as folder:
            (folder / 'new.txt').write_text('new')
    assert [path.name for path in target.iterdir()] == ['old.txt']


def test_a_relative_name_is_meant_from_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'elsewhere').mkdir()
    with whole_folder('set'):
        monkeypatch.chdir(tmp_path / 'elsewhere')
    assert (tmp_path / 'set').is_dir()


@pytest.mark.parametrize('content, stored', [('a\nü\r\n', b'a\n\xc3\xbc\r\n'), (b'\xff\r\n\0', b'\xff\r\n\0')])
def test_text_and_bytes_are_written_as_they_are(tmp_path, content, stored):
    (tmp_path / 'a').write_bytes(b'old')
    write_file(tmp_path / 'a', content)
    assert (tmp_path / 'a').read_bytes() == stored
    assert list(tmp_path.iterdir()) == [tmp_path / 'a']


@pytest.mark.parametrize('content', ['new', b'new'])
def test_a_file_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch, content):
    (tmp_path / 'a').write_bytes(b'old')

    def refuse(source, destination):
        raise PermissionError('refused')

    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError, match='refused'):
        write_file(tmp_path / 'a', content)
    assert (tmp_path / 'a').read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [tmp_path / 'a']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, error):
    (tmp_path / 'x').write_bytes(b'old')
    with pytest.raises(error), whole_file(tmp_path / 'x') as file:
        file.write(b'new')
        raise error
    assert (tmp_path / 'x').read_bytes() == b'old' and [entry.name for entry in tmp_path.iterdir()] == ['x']


def test_a_file_is_written_piece_by_piece(tmp_path):
    with whole_file(tmp_path / 'x') as file:
        file.write(b'a')
        file.flush()
        assert not (tmp_path / 'x').exists()
        file.write(b'b')
    assert (tmp_path / 'x').read_bytes() == b'ab'
