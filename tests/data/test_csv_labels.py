"""CSV files in three forms: what is told from the content, what is refused, and how large they may be."""
import csv
import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.data import find_format, list_splits, open_split


@pytest.fixture
def write(add_pictures):
    """Write train.csv beside pictures a.jpg, b.jpg and c.jpg."""
    def write_csv(text, name='train.csv', encoding='utf-8'):
        data_dir = add_pictures('a.jpg', 'b.jpg', 'c.jpg')
        (data_dir / name).write_bytes(text.encode(encoding))
        return data_dir
    return write_csv


def read(data_dir, split='train', **options):
    records = open_split(data_dir, split, format='csv', **options)
    names = [path.relative_to(data_dir).as_posix() for path in records.image_paths]
    return records.label_names, dict(zip(names, records.targets.tolist()))


LABELS = ('cat', 'dog')
FORMS = {
    'wide': ('image,cat,dog\na.jpg,1,0\nb.jpg,0,1\n', {'a.jpg': [1, 0], 'b.jpg': [0, 1]}),
    'wide with unknown': ('image,cat,dog\na.jpg,1,\nb.jpg,-1,0\n', {'a.jpg': [1, -1], 'b.jpg': [-1, 0]}),
    'wide with points': ('Path,cat,dog\na.jpg,1.0,0.0\nb.jpg,,-1.0\n', {'a.jpg': [1, 0], 'b.jpg': [-1, -1]}),
    'wide with spaces': ('image,cat,dog\na.jpg, 1, 0\nb.jpg,0 ,\n', {'a.jpg': [1, 0], 'b.jpg': [0, -1]}),
    'semicolons, other line ends': ('file_name;cat;dog\r\na.jpg;1;0\r\n\r\nb.jpg;0;1', {
        'a.jpg': [1, 0], 'b.jpg': [0, 1]}),
    'list': ('image,labels\na.jpg,cat;dog\nb.jpg,\nc.jpg,dog\n', {'a.jpg': [1, 1], 'b.jpg': [0, 0], 'c.jpg': [0, 1]}),
    'list with bars': ('image\tlabels\na.jpg\tcat | dog\nb.jpg\tcat|\n', {'a.jpg': [1, 1], 'b.jpg': [1, 0]}),
    'list in brackets': ('image,label\na.jpg,"[\'cat\', ""dog""]"\nb.jpg,[]\nc.jpg,[dog]\n', {
        'a.jpg': [1, 1], 'b.jpg': [0, 0], 'c.jpg': [0, 1]}),
    'list without header': ('a.jpg,cat;dog\nb.jpg,cat\n', {'a.jpg': [1, 1], 'b.jpg': [1, 0]}),
    'long': ('image,label\na.jpg,cat\nb.jpg,cat\na.jpg,dog\n', {'a.jpg': [1, 1], 'b.jpg': [1, 0]}),
    'long with confidences': ('ImageID,Source,LabelName,Confidence\na.jpg,x,cat,1\nb.jpg,x,cat,0\nb.jpg,y,dog,-1\n', {
        'a.jpg': [1, -1], 'b.jpg': [0, -1]}),
    'long without header': ('a.jpg,cat,1\na.jpg,dog,0\nb.jpg,dog,1\n', {'a.jpg': [1, 0], 'b.jpg': [-1, 1]}),
    'quoted': ('"image","labels"\n"a.jpg","cat"\n"b.jpg","dog;cat"\n', {'a.jpg': [1, 0], 'b.jpg': [1, 1]}),
}


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_the_form_is_told_from_the_content(name, mark, write):
    text, want = FORMS[name]
    data_dir = write(mark + text)
    assert find_format(data_dir) == 'csv'
    assert read(data_dir) == (LABELS, want)


def test_a_label_with_commas_that_is_made_of_other_labels(write):
    text = 'image,labels\na.jpg,"cat, dog"\nb.jpg,cat\nc.jpg,dog\n'
    with pytest.raises(ValueError, match="'cat, dog' is one label or 2, all of which are there too; divide labels by"):
        read(write(text))
    assert read(write(text), separator=',')[0] == LABELS
    assert read(write(text.replace('c.jpg,dog', 'c.jpg,emu')))[0] == ('cat', 'cat, dog', 'emu')


def test_the_label_set_of_the_wide_form_is_its_header(write):
    data_dir = write('image,zebra,cat\na.jpg,0,1\n')
    assert read(data_dir) == (('zebra', 'cat'), {'a.jpg': [0, 1]})
    assert read(data_dir, labels=['dog', 'cat', 'zebra'])[1] == {'a.jpg': [-1, 1, 0]}
    with pytest.raises(ValueError, match=r"train.csv has labels .* the 1 given ones: 'zebra' \(column 2\); correct"):
        read(data_dir, labels=['cat'])
    assert read(data_dir, labels=['cat'], ignore_unknown_labels=True)[1] == {'a.jpg': [1]}


@pytest.mark.parametrize('text', ['image,labels\na.jpg,cat;dg\n', 'image,label\na.jpg,cat\na.jpg,dg\n'])
def test_the_label_set_of_the_other_forms_is_what_occurs_or_is_given(text, write):
    data_dir = write(text)
    assert read(data_dir) == (('cat', 'dg'), {'a.jpg': [1, 1]})
    assert read(data_dir, labels=['dg', 'emu', 'cat'])[1] == {'a.jpg': [1, 0, 1]}
    with pytest.raises(ValueError, match=r"2 given ones: 'dg' \(line [23]; did you mean 'dog'\?\)"):
        read(data_dir, labels=['cat', 'dog'])
    assert read(data_dir, labels=['dog', 'cat'], ignore_unknown_labels=True)[1] == {'a.jpg': [0, 1]}


def test_what_is_not_listed_may_be_said(write):
    assert read(write('image,labels\na.jpg,cat\nb.jpg,dog\n'), unlisted=-1)[1] == {'a.jpg': [1, -1], 'b.jpg': [-1, 1]}
    text = 'image,label,confidence\na.jpg,cat,1\nb.jpg,dog,-1\n'
    assert read(write(text), unlisted=0)[1] == {'a.jpg': [1, 0], 'b.jpg': [0, -1]}


def test_options_name_what_has_other_names(write, add_pictures):
    add_pictures('pics/train/x.jpg')
    data_dir = write('who,where,what,sure\nme,x,cat,1\nme,x,dog,0\n', name='labels_train.csv')
    assert read(
        data_dir, file='labels_{split}.csv', image_dir='pics/{split}', image_suffix='.jpg', header=True, form='long',
        image_column='where', label_column='what', confidence_column='sure') == (
            LABELS, {'pics/train/x.jpg': [1, 0]})
    assert list_splits(data_dir, format='csv', file='labels_{split}.csv') == ('train',)
    assert find_format(data_dir, file='labels_{split}.csv') == 'csv'
    assert read(write('a.jpg,cat dog\n'), separator=' ', delimiter=',') == (LABELS, {'a.jpg': [1, 1]})
    assert read(write('id,labels\na,cat,dog\n'.replace(',', '\t', 1).replace('a,', 'a\t')), image_suffix='.jpg',
                separator=',') == (LABELS, {'a.jpg': [1, 1]})


def test_one_file_may_have_all_splits(write):
    data_dir = write('image,cat,split\na.jpg,1,train\nb.jpg,0,valid\nc.jpg,1,train\n', name='all.csv')
    assert list_splits(data_dir, file='all.csv', format='csv') == ('train', 'valid')
    assert read(data_dir, file='all.csv') == (('cat',), {'a.jpg': [1], 'c.jpg': [1]})
    assert read(data_dir, 'val', file='all.csv')[1] == {'b.jpg': [0]}
    data_dir = write('image,cat\na.jpg,1\n', name='all.csv')
    assert list_splits(data_dir, file='all.csv', format='csv') == ('train',)
    assert list_splits(data_dir, file='nothing.csv', format='csv') == ()


def test_other_files_are_no_splits(write):
    data_dir = write('image,cat\na.jpg,1\n')
    (data_dir / 'fold7.csv').write_text('image,cat\nb.jpg,1\n')
    assert list_splits(data_dir) == ('fold7', 'train')
    assert read(data_dir, 'fold7')[1] == {'b.jpg': [1]}
    (data_dir / 'train.csv').unlink()
    assert list_splits(data_dir, format='csv') == ()


def test_mostly_unknown_and_mostly_known_tables_are_both_small(write, monkeypatch):
    from timm_miil.data import _csv_forms
    monkeypatch.setattr(_csv_forms, 'BLOCK_ROWS', 2)
    data_dir = write('image,a,b,c\na.jpg,,,1\nb.jpg,,0,\nc.jpg,1,1,0\n')
    records = open_split(data_dir, 'train')
    assert records.targets.tolist() == [[-1, -1, 1], [-1, 0, -1], [1, 1, 0]] and records.labels.fill == -1
    data_dir = write('image,a,b,c\na.jpg,0,0,1\nb.jpg,,0,0\nc.jpg,1,,\n')
    records = open_split(data_dir, 'train')
    assert records.targets.tolist() == [[0, 0, 1], [-1, 0, 0], [1, -1, -1]] and records.labels.fill == 0


REFUSED = {
    'bad value': ('image,cat,dog\na.jpg,1,0\nb.jpg,2,0\n',
                  "line 3: a label must be 1, 0, -1 or empty, got '2' in column 'cat'"),
    'bad confidence': ('image,label,confidence\na.jpg,cat,0.7\n', "line 2: a confidence must be 1, 0 or -1, got '0.7'"),
    'repeated picture': ('image,cat\na.jpg,1\nb.jpg,0\n./a.jpg,1\n',
                         r"line 4: picture './a.jpg' is on line 2 already; each must have one row in this form"),
    'repeated in list': ('a.jpg,cat\na.jpg,dog\n', "line 2: picture 'a.jpg' is on line 1 already"),
    'contradiction': ('image,label,confidence\na.jpg,cat,1\nb.jpg,cat,1\na.jpg,cat,0\n',
                      "lines 2 and 4: 'a.jpg' has 'cat' as both 1 and 0; keep one of them. 1 in all"),
    'leaving': ('image,cat\n../a.jpg,1\n', r"line 2: a picture must be a path .* stays in it, got '\.\./a.jpg'"),
    'absolute': ('image,label\n/etc/passwd,cat\n', "line 2: a picture must be a path .*, got '/etc/passwd'"),
    'no name': ('image,cat\n,1\n', "line 2: a picture must be a path .*, got ''"),
    'no label': ('image,label\na.jpg,\n', r"line 2: one label a row is expected, got ''; give form='list' if"),
    'several labels': ('image,label\na.jpg,cat;dog\n', "line 2: one label a row is expected, got 'cat;dog'; give form"),
    'two separators': ('image,labels\na.jpg,cat;dog|emu\n', r"line 2: labels may be divided by ';' or '\|', got"),
    'ragged': ('image,cat,dog\na.jpg,1\n', "line 2: 2 fields where the first row has 3; put a field that holds ','"),
    'two delimiters': ('a.jpg,cat;dog\n', "one of ',' ';' .* must divide fields, and ',' and ';' may; give delimiter"),
    'no delimiter': ('image\na.jpg\n', "must divide fields, and none does; give delimiter, or put"),
    'no header': ('picture 1,cat\npicture 2,dog\n',
                  "line 1: the first field must be a picture file, or .* got 'picture 1'"),
    'wide without header': ('a.jpg,1,0,1\n', 'has 4 columns and no header to name them; write one, such as image,'),
    'labels twice': ('image,cat,cat\na.jpg,1,0\n', "line 1: label names must be distinct, got 'cat' twice"),
    'no columns': ('image,subset\na.jpg,train\n',
                   "line 2: a label must be 1, 0, -1 or empty, got 'train' in column 'subset'; leave out"),
    'empty': ('', 'train.csv is empty; it must have a row a picture'),
    'header only': ('image,cat\n', 'has no rows below its header'),
    'open quote': ('image,label\na.jpg,"cat\n', 'line 2: unexpected end of data'),
    'stray quote': ('image,label\na.jpg,"cat"s\n', "line 2: ',' expected after"),
    'no labels at all': ('image,labels\na.jpg,\n', 'train.csv has no labels'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_wrong_files_are_one_error_with_the_line(name, write):
    text, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as raised:
        read(write(text))
    assert 'train.csv' in str(raised.value) and '\n' not in str(raised.value) and str(raised.value).endswith('.')


@pytest.mark.parametrize('options, words', [
    (dict(unlisted=1), 'unlisted must be 0 or -1, got 1'),
    (dict(unlisted=0), 'has the wide form, which lists all labels; leave out unlisted'),
    (dict(delimiter=',,'), "delimiter must be one character, got ',,'"),
    (dict(image_column='name'), "has no column 'name' for option image_column; it has 'image', 'cat'"),
    (dict(header=False, form='wide'), 'has no header with the labels of the wide form; write one'),
    (dict(header=False, label_column='cat'), "has no column 'cat' for option label_column; it has no header"),
    (dict(image_dir='lost'), "no folder with the pictures of split 'train', which is .*lost; give image_dir"),
])
def test_wrong_options_are_refused(options, words, write):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read(write('image,cat\na.jpg,1\n'), **options)


def test_a_split_that_the_column_lacks(write):
    data_dir = write('image,cat,split\na.jpg,1,train\n', name='all.csv')
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has 'train'"):
        read(data_dir, 'test', file='all.csv')


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_other_encodings_are_refused(encoding, write):
    with pytest.raises(ValueError, match='train.csv .*not UTF-8'):
        read(write('image,label\na.jpg,café\n', encoding=encoding))


def test_a_late_byte_that_is_no_utf8_is_found(write):
    data_dir = write('image,label\n' + 'a.jpg,cat\n' * 5000)
    with open(data_dir / 'train.csv', 'ab') as file:
        file.write(b'b.jpg,caf\xe9\n')
    with pytest.raises(ValueError, match=r'train.csv, after line \d+: not UTF-8; save the file as UTF-8'):
        read(data_dir)


def test_missing_pictures_are_an_error_or_left_out(write, caplog):
    data_dir = write('image,cat\nlost1.jpg,1\na.jpg,0\nlost2.jpg,1\n')
    words = f"2 of 3 pictures of {data_dir / 'train.csv'} are missing in {data_dir}: 'lost1.jpg', 'lost2.jpg'"
    with pytest.raises(FileNotFoundError, match=re.escape(words) + r'\.$'):
        read(data_dir)
    with caplog.at_level(logging.WARNING):
        assert read(data_dir, drop_missing=True)[1] == {'a.jpg': [0]}
    assert caplog.messages[0] == f'{words}; they are left out.'
    with pytest.raises(FileNotFoundError, match='1 of 1 pictures'):
        read(write('image,cat\nlost1.jpg,1\n'), drop_missing=True)


def test_repeated_rows_count_once_and_are_told(write, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(write('image,label\na.jpg,cat\na.jpg,cat\n./a.jpg,cat\n'))[1] == {'a.jpg': [1]}
    assert 'train.csv: 2 rows repeat a row before them.' in caplog.text


def test_brackets_with_any_text_are_refused_or_read_quickly(write):
    data_dir = write("image,labels\na.jpg,\"[" + 'x  ,' * 30_000 + "x ']\"\n")
    assert len(read(data_dir)[0]) == 1  # no brackets then, but one strange label


NAMES = st.text(st.characters(codec='utf-8', exclude_categories=['C', 'Z']), min_size=1, max_size=8).filter(
    lambda name: not set(name) & set(';|[]'))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), names=st.lists(NAMES, min_size=1, max_size=5, unique=True), rows=st.integers(1, 4),
       delimiter=st.sampled_from(',;\t'), form=st.sampled_from(['wide', 'list', 'long']))
def test_what_is_written_is_read_back(data, names, rows, delimiter, form, tmp_path_factory, jpeg):
    values = [0, 1] if form == 'list' else [0, 1, -1]
    labels = data.draw(st.lists(st.sampled_from(values), min_size=rows * len(names), max_size=rows * len(names)))
    dense = torch.tensor(labels).reshape(rows, len(names))
    folder = tmp_path_factory.mktemp('csv')
    pictures = [f'{row}.jpg' for row in range(rows)]
    for name in pictures:
        (folder / name).write_bytes(jpeg)
    with open(folder / 'train.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, delimiter=delimiter)
        if form == 'wide':
            writer.writerow(['image', *names])
            writer.writerows([picture, *row] for picture, row in zip(pictures, dense.tolist()))
        elif form == 'list':
            writer.writerow(['image', 'labels'])
            writer.writerows(
                [picture, '|'.join(name for name, label in zip(names, row) if label == 1)]
                for picture, row in zip(pictures, dense.tolist()))
        else:
            writer.writerow(['image', 'label', 'confidence'])
            writer.writerows(
                [picture, name, label] for picture, row in zip(pictures, dense.tolist())
                for name, label in data.draw(st.permutations(list(zip(names, row)))))
    records = open_split(
        folder, 'train', format='csv', labels=names, form=form, delimiter=delimiter, separator='|')
    assert records.label_names == tuple(names)
    assert torch.equal(records.targets.long(), dense)
