"""`timm-miil in21k prepare` on a made-up release: what is written and said, and what is wrong use."""
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from timm_miil.cli import in21k
from timm_miil.cli.main import main
from timm_miil.data import ClassTree, ImageStream, open_split, read_class_tree, write_class_tree


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with two synsets of four pictures, one of them in a tar file, and a synset of one."""
    monkeypatch.chdir(tmp_path)
    for synset, count in {'n00000001': 4, 'n00000002': 4, 'n00000003': 1}.items():
        Path('in', synset).mkdir(parents=True)
        for number in range(count):
            Image.new('L', (9, 7), 20 * number).save(f'in/{synset}/{synset}_{number}.JPEG')
    with tarfile.open('in/n00000002.tar', 'w') as tar:
        for path in sorted(Path('in/n00000002').iterdir()):
            tar.add(path, path.name)
            path.unlink()
    Path('in/n00000002').rmdir()
    return tmp_path


SMALL = ['--release', 'custom', '--min-images', '2', '--val-images', '1', '--size', '8', '-j', '0']
COMMAND = ['in21k', 'prepare', 'in', '--out', 'out', *SMALL]


def test_what_is_made_is_said_and_read_again(folder, capsys):
    Path('in/n00000001/n00000001_3.JPEG').write_bytes(b'broken')
    assert main(COMMAND) == 0
    assert capsys.readouterr().out == (
        'out: 2 classes, 5 pictures in train, 2 in val\n'
        '1 synsets with fewer pictures are no classes; there is no tree: give --tree or --is-a\n'
        'left out, unreadable: 1 files\n'
        'out/report.json names every one\n')
    source = open_split('out', 'train')
    assert (len(source), source.label_names) == (5, ('n00000001', 'n00000002'))
    assert source.load_image(0).size == (8, 8)


def test_every_flag_arrives(folder, capsys):
    Path('is_a.txt').write_text('n00000002 n00000001\n')
    Path('words.txt').write_text('n00000001\tone\nn00000002\ttwo\n')
    assert main([
        *COMMAND, '--resize', 'short_edge', '--is-a', 'is_a.txt', '--words', 'words.txt', '--shards',
        '--images-per-shard', '4']) == 0
    assert 'tree.json has the tree' in capsys.readouterr().out
    assert open_split('out', 'train').load_image(0).size == (10, 8)
    assert read_class_tree('out/tree.json') == ClassTree(('n00000001', 'n00000002'), (1, -1), ('one', 'two'))
    assert read_class_tree('out/shards/tree.json') == read_class_tree('out/tree.json')
    stream = open_split('out/shards', 'train')
    assert isinstance(stream, ImageStream) and stream.num_images == 6
    assert sorted(path.name for path in Path('out/shards').glob('train-*')) == ['train-000000.tar', 'train-000001.tar']
    write_class_tree(ClassTree(('n00000001', 'n00000002'), (-1, 0)), 'tree.pth')
    assert main([*COMMAND, '--resize', 'short_edge', '--tree', 'tree.pth']) == 0
    assert read_class_tree('out/tree.json').parents == (-1, 0)


def test_a_damaged_tar_file_is_status_1_and_named(folder, capsys):
    data = Path('in/n00000002.tar').read_bytes()
    Path('in/n00000002.tar').write_bytes(data[:data.rindex(b'n00000002_3.JPEG') + 600])
    assert main(COMMAND) == 1
    assert 'damaged: n00000002: it is not a whole tar file (unexpected end of data)\n' in capsys.readouterr().out
    assert list(json.loads(Path('out/report.json').read_text())['damaged']) == ['n00000002']


def test_what_was_made_is_checked(folder, capsys, monkeypatch):
    assert main(COMMAND) == 0
    capsys.readouterr()
    assert main(['in21k', 'check', 'out', '-j', '0']) == 0
    assert capsys.readouterr().out == 'out: all as it was made\n'
    for path in Path('out/train').glob('*/*.jpg'):
        path.unlink()
    for number in range(30):
        Path(f'out/val/n00000001/{number:02}.jpg').touch()
    assert main(['in21k', 'check', 'out', '-j', '0']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'train/n00000001/n00000001_1.jpg is missing'
    end = [
        'out: 36 files or folders are wrong',
        'delete the files with other bytes, then prepare again: that makes their classes anew, and no others']
    assert lines[36:] == end
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    assert main(['in21k', 'check', 'out', '-j', '0']) == 1
    assert capsys.readouterr().out.splitlines() == [*lines[:20], 'and 16 more; into a file (> FILE) go all', *end]


def test_a_file_with_other_bytes_is_made_again_as_check_says(folder, capsys):
    assert main(COMMAND) == 0
    spoilt = Path('out/train/n00000001/n00000001_1.jpg')
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:-1])
    assert main(['in21k', 'check', 'out', '-j', '0']) == 1
    assert f'{spoilt.relative_to("out")} has other bytes' in capsys.readouterr().out
    spoilt.unlink()
    assert main(COMMAND) == 0 and main(['in21k', 'check', 'out', '-j', '0']) == 0
    assert spoilt.read_bytes() == whole


def test_without_a_terminal_progress_is_a_line_now_and_then(folder, capsys, monkeypatch):
    monkeypatch.setattr(in21k, 'SECONDS_A_LINE', 0.0)
    assert main(COMMAND) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith('synsets:') for line in lines)
    assert '0/3' in lines[0] and '3/3' in lines[-1] and ' synsets/s]' in lines[-1]
    monkeypatch.setattr(in21k, 'SECONDS_A_LINE', 60.0)
    assert main(COMMAND) == 0
    assert not capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(in21k, 'prepare_in21k', interrupted)
    assert main(COMMAND) == 130
    assert capsys.readouterr().err == 'interrupted; what is finished is kept, run it again to go on\n'


@pytest.mark.parametrize(('words', 'message'), [
    (['in21k', 'prepare', 'in'], 'prepare needs --out'),
    (['in21k', 'check', 'in', '--out', 'out'], 'and no --out'),
    (['in21k', 'check', 'in'], 'in has no manifest.jsonl'),
    (['in21k', 'prepare', 'in', '--out', 'out', '-j', '0'], 'fall11 has 11221 classes, got 3 synsets in source; take'),
    ([*COMMAND, '--release', 'winter21'], 'min_images must be 500 for the 10450 classes of winter21, got 2'),
    ([*COMMAND, '--tree', 'a', '--is-a', 'b'], 'not allowed with argument'),
    ([*COMMAND, '--words', 'b'], 'words needs is_a'),
    (['in21k', 'unpack', 'in', '--out', 'out'], "invalid choice: 'unpack'"),
    (['in21k', 'prepare', 'none', '--out', 'out'], "got 'none', where nothing is"),
])
def test_wrong_use_is_one_line_and_2(folder, capsys, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
