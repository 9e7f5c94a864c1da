"""`timm-miil shards` on real files: shards that train, a second run that writes nothing, and what is refused."""
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from timm_miil.cli import main as entry
from timm_miil.cli.main import main
from timm_miil.data import open_split

forks = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads


@pytest.fixture(autouse=True)
def verb(monkeypatch):
    if 'shards' not in entry.VERBS:
        monkeypatch.setattr(entry, 'VERBS', (*entry.VERBS, 'shards'))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with six pictures of cats and dogs in `in/`."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        path = Path('in', 'train', ('cat', 'dog')[number % 2], f'{number}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (4, 3), number).save(path)
    return tmp_path


def read(source):
    passed = source.iterate(seed=None, epoch=0, process=0, num_processes=1)
    return [(image.getpixel((0, 0))[0], targets.tolist()) for image, targets, _ in passed]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@forks
def test_what_is_written_is_said_and_read_again(folder, capsys):
    assert main(['shards', 'in', '--split', 'train', '--out', 'out', '--workers', '2']) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ' '.join(lines[0]) == 'out, train: 6 pictures with 2 labels, 1 shards of 0.0 MB in all'
    assert lines[1:] == [['label', 'present', 'absent', 'unknown'], ['cat', '3', '3', '0'], ['dog', '3', '3', '0']]
    assert read(open_split('out', 'train')) == [
        (0, [1, 0]), (2, [1, 0]), (4, [1, 0]), (1, [0, 1]), (3, [0, 1]), (5, [0, 1])]


@forks
def test_settings_decide_what_is_written_and_a_second_run_writes_nothing(folder, capsys):
    words = ['shards', 'in', '--out', 'out', '--images-per-shard', '4', '--seed', '3', '-j', '2']
    assert main(words) == 0
    before = {path: path.stat().st_ino for path in Path('out').glob('*.tar')}
    assert len(before) == 2 and main(words) == 0
    assert {path: path.stat().st_ino for path in Path('out').glob('*.tar')} == before
    assert [number for number, _ in read(open_split('out', 'train'))] != [0, 2, 4, 1, 3, 5]
    assert capsys.readouterr().out.count(' 2 shards of ') == 2


def test_labels_and_options_reach_the_reader(folder, capsys):
    Path('names.txt').write_text('dog\neel\n')
    assert main(['shards', 'in', '--out', 'out', '--labels', 'names.txt', '-j', '0']) == 2
    assert "labels that are not among the 2 given ones: 'cat'" in capsys.readouterr().err
    assert main([
        'shards', 'in', '--out', 'out', '--labels', 'names.txt', '--set', 'ignore_unknown_labels=true', '-j', '0']) == 0
    assert open_split('out', 'train').label_names == ('dog', 'eel')


def test_a_damaged_picture_is_told_and_may_be_passed_unseen(folder, capsys):
    data = Path('in/train/dog/3.png').read_bytes()
    Path('in/train/dog/3.png').write_bytes(data[:-20].ljust(len(data), b'\0'))
    assert main(['shards', 'in', '--out', 'out', '-j', '0']) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-miil shards: cannot read 'in/train/dog/3.png': it is dam") and error.count('\n') == 1
    assert main(['shards', 'in', '--out', 'out', '-j', '0', '--no-check']) == 0


def test_shards_of_another_program_are_indexed(folder, capsys):
    Path('tars').mkdir()
    for shard in range(2):
        with tarfile.open(f'tars/part{shard}.tar', 'w') as tar:
            for number in range(3):
                Path('label').write_text(str(number % 2))
                tar.add(f'in/train/{("cat", "dog")[number % 2]}/{number}.png', f'{number}.png')
                tar.add('label', f'{number}.cls')
    Path('names.txt').write_text('cat\ndog\n')
    words = ['shards', 'tars', '--index', '--split', 'val', '--pattern', 'part*', '--labels', 'names.txt', '-j', '0']
    assert main(words) == 0
    assert capsys.readouterr().out.startswith('tars, val: 6 pictures with 2 labels, 2 shards of ')
    assert read(open_split('tars', 'val')) == [(0, [1, 0]), (1, [0, 1]), (2, [1, 0])] * 2
    assert main(words) == 2
    assert 'val.shards.json is there; delete it to have it made anew' in capsys.readouterr().err
    assert main(['shards', 'tars', '--split', 'val', '--out', 'out']) == 2
    assert 'tars is read in sequence, as shards are; they are written of pictures that can' in capsys.readouterr().err


@pytest.mark.parametrize('words, said', [
    (['in'], 'one of the arguments --out --index is required'),
    (['in', '--out', 'out', '--index'], 'argument --index: not allowed with argument --out'),
    (['none', '--out', 'out'], "data_dir must be the folder of a data set, got 'none', which is none"),
    (['in', '--split', 'test', '--out', 'out'], "in has no split 'test'; it has 'train'"),
    (['in', '--out', 'out', '--images-per-shard', '0'], 'images_per_shard must be at least 1, got 0'),
    (['in', '--out', 'out', '-j', '-1'], 'workers must be at least 0, got -1'),
    (['in', '--index'], "in has no files 'train*.tar'"),
    (['in', '--out', 'in/train/cat/0.png'], 'File exists'),
])
def test_wrong_use_ends_in_one_line(folder, capsys, words, said):
    before = contents(folder / 'in' / 'train' / 'cat')
    assert main(['shards', *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith('timm-miil shards: ') and said in error and error.count('\n') == 1
    assert not Path('out').exists() and contents(folder / 'in' / 'train' / 'cat') == before


def test_of_many_labels_the_first_are_shown(folder, capsys):
    Path('names.txt').write_text('cat\ndog\n' + ''.join(f'label {number}\n' for number in range(28)))
    assert main(['shards', 'in', '--out', 'out', '--labels', 'names.txt', '-j', '0']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 23 and lines[-1] == 'and 10 more'
