"""`timm-miil data` on real files: what is there, what the labels look like, and what is wrong."""
import csv

import pytest
from PIL import Image

from timm_miil.cli.main import main
from timm_miil.data import open_split, source_statistics, write_shards

ROWS = {'a.png': 'cat dog', 'b.png': 'cat', 'c.png': 'cat dog', 'd.png': 'bird'}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ROWS:
        Image.new('RGB', (2, 2)).save(tmp_path / name)
    with open(tmp_path / 'train.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['image', 'cat', 'dog', 'bird', 'emu'])
        for name, labels in ROWS.items():
            shown = [int(label in labels) for label in ('cat', 'dog', 'bird')]
            writer.writerow([name, *shown, -1 if name < 'c' else 0])
    return tmp_path


def test_a_split_is_checked_and_its_labels_counted(folder, capsys, caplog):
    assert main(['data', '.', '--results-file', 'labels.csv']) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ' '.join(words[0]) == '.: format csv, splits train; this is train'
    assert ' '.join(words[1]).startswith('4 pictures, 4 labels, 1.50 labels a picture, 87.5 % of all known')
    assert ['cat', '3', '1', '0', '75.00', '%'] in words and ['emu', '0', '2', '2', '0.00', '%'] in words
    assert ['2', 'cat', '+', 'dog'] in words
    assert 'never present: emu' in [' '.join(line) for line in words]
    with open('labels.csv', newline='') as file:
        rows = {row['label']: row for row in csv.DictReader(file)}
    assert rows['dog'] == {'label': 'dog', 'present': '2', 'absent': '2', 'unknown': '0', 'prevalence': '0.5'}
    assert list(rows) == ['cat', 'dog', 'bird', 'emu']


def test_all_splits_are_checked_unless_one_is_named(folder, capsys):
    (folder / 'val.csv').write_text('image,labels\na.png,zebra\n')
    assert main(['data', '.']) == 2
    assert "val.csv has labels that are not among the 4 given ones: 'zebra'" in capsys.readouterr().err
    assert main(['data', '.', '--split', 'train']) == 0
    assert main(['data', '.', '--set', 'ignore_unknown_labels=true']) == 0
    assert '.: format csv, splits train, val; this is train' in capsys.readouterr().out


def test_few_rows_of_many_labels(folder, capsys):
    assert main(['data', '.', '--num-labels', '2']) == 0
    out = capsys.readouterr().out
    assert '... 2 labels in between' in out and '\ndog  ' not in out


def test_shards_say_what_their_index_knows(folder, capsys, caplog):
    write_shards(open_split('.', 'train'), 'out', split='train', workers=0)
    want = source_statistics(open_split('.', 'train'))
    caplog.clear()
    stream = open_split('out', 'train')
    found = source_statistics(stream)
    assert found.num_images == 4 and found.label_names == want.label_names
    for name in ('present', 'absent', 'unknown'):
        assert getattr(found, name).tolist() == getattr(want, name).tolist()
    assert "out, split train: 1 of 4 labels are never present: 'emu'" in caplog.text
    assert main(['data', 'out', '--labels', 'names.txt']) == 2  # no such file
    (folder / 'names.txt').write_text('zebra\ndog\n')
    capsys.readouterr()
    assert main(['data', 'out', '--labels', 'names.txt']) == 2
    assert "labels that are not among the 2 given ones: 'cat'" in capsys.readouterr().err
    others = open_split('out', 'train', labels=['zebra', 'dog'], ignore_unknown_labels=True)
    assert [count.tolist() for count in others.label_counts()] == [[0, 2], [0, 2], [4, 0]]
    assert main(['data', 'out']) == 0
    assert 'format webdataset' in capsys.readouterr().out


@pytest.mark.parametrize(('words', 'message'), [
    (['nowhere'], "data_dir must be the folder of a data set, got 'nowhere'"),
    (['.', '--split', 'test'], "has no split 'test'; it has 'train'."),
    (['.', '--num-labels', '0'], '--num-labels must be at least 1, got 0.'),
    (['.', '--results-file', 'x.txt'], "--results-file must end in .csv, got 'x.txt'."),
    (['.', '--results-file', 'no/x.csv'], "there is no folder 'no' for 'x.csv'."),
    (['.', '--set', 'streaming'], "--set must be OPTION=VALUE, got 'streaming'."),
    (['.', '--set', 'colour=1'], "unknown option 'colour' of format csv"),
])
def test_what_is_wrong_is_one_line(folder, capsys, words, message):
    assert main(['data', *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1


def test_a_stream_that_knows_nothing_is_refused(folder):
    class Stream:
        label_names, num_images = ('a',), 1

        def label_counts(self):
            return None

    with pytest.raises(ValueError, match='Stream is a stream that tells its labels only when all'):
        source_statistics(Stream())
