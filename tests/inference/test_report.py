"""The report's page: complete in itself, safe with any name, right in its numbers, and written whole or not at all."""
import base64
import html
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

from timm_miil.data import MultiLabelRecords
from timm_miil.inference import write_report
from timm_miil.metrics import multilabel_average_precision, multilabel_f1

VOID = {'meta', 'img', 'input', 'link', 'br', 'use', 'path', 'rect', 'image'}
HOSTILE = ('</script><script>alert(1)</script>', '<img src=x onerror=y>', '"quoted" & \'so\'', '$x^2$ \\frac{1}{2}',
           '\u732b \u202e\x1b[31m', '@0@ @1@', 'a' * 300)
EPOCHS = [
    {'epoch': number, 'lr': 0.1 / number, 'train_loss': 5.0 / number, 'val_map': 90.0 - number, 'note': 'text'}
    for number in (1, 2, 3)]


class Page(HTMLParser):
    """A page's elements: all start tags with attributes, and text by the tag it stands in; unclosed tags are errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.words = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append((self.open[-1] if self.open else '', data.strip()))

    def of(self, tag: str) -> list[str]:
        return [words for where, words in self.words if where == tag]

    def rows(self) -> list[list[str]]:
        """The cells of the last table's body."""
        body = self.text[self.text.rindex('<tbody>'):self.text.rindex('</tbody>')]
        return [[html.unescape(cell) for cell in re.findall(r'<td[^>]*>(.*?)</td>', row)]
                for row in re.findall(r'<tr>(.*?)</tr>', body)]


def scores(num: int = 40, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(num, classes, generator=generator) < 0.4).to(torch.int8)
    return torch.randn(num, classes, generator=generator) + 1.5 * targets - 1, targets


def write(path: Path, **options) -> Page:
    logits, targets = scores()
    given = dict(logits=logits, targets=targets, label_names=HOSTILE, title='A title', facts={}) | options
    write_report(path, **given)
    return Page(path.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> MultiLabelRecords:
    folder = tmp_path_factory.mktemp('pictures')
    paths = [folder / f'<b>{index}.png' for index in range(40)]
    for index, path in enumerate(paths[:-1]):
        Image.new('RGB', (300 if index else 30, 400), (index * 6, 0, 0)).save(path)
    paths[-1].write_bytes(b'no picture')
    return MultiLabelRecords(paths, scores()[1], HOSTILE)


@pytest.fixture(scope='module')
def page(pictures, tmp_path_factory) -> Page:
    """With everything that can be in it."""
    logits, _ = scores()
    logits[-1] = torch.where(pictures.targets[-1] == 1, -90.0, 90.0)    # the damaged picture is the most wrong
    return write(
        tmp_path_factory.mktemp('report') / 'report.html', logits=logits, source=pictures, epochs=EPOCHS,
        title='<i>title</i>', facts={'model': '<b>', 'pictures': 40}, thresholds=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def test_nothing_comes_from_elsewhere(page):
    for tag, attributes in page.tags:
        assert tag not in ('link', 'iframe', 'object', 'base', 'form')
        for name in ('src', 'href', 'xlink:href', 'data', 'srcset'):
            assert attributes.get(name, '#').startswith(('#', 'data:image/jpeg;base64,')), attributes
        assert not any(name.startswith('on') for name in attributes)
    assert 'url(' not in page.text.replace('url(#', '') and '@import' not in page.text
    [policy] = [attributes['content'] for _, attributes in page.tags if 'http-equiv' in attributes]
    assert policy.startswith("default-src 'none'; img-src data:;") and 'sha256-' in policy
    assert [tag for tag, _ in page.tags].count('script') == 1


def test_ids_are_there_once_and_what_is_referred_to_is_there(page):
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', page.text)) and len(ids) == len(set(ids))
    assert {a or b for a, b in re.findall(r'url\(#(\w+)\)|href="#(\w+)"', page.text)} <= set(ids)


def test_names_are_text_and_nothing_else(page):
    assert '<i>title</i>' in page.of('title')[0] and page.of('h1') == ['<i>title</i>']
    assert page.of('dt') == ['model', 'pictures'] and page.of('dd') == ['<b>', '40']
    names = {row[0] for row in page.rows()}
    assert names == {name.replace('\u202e', '\ufffd').replace('\x1b', '\ufffd') for name in HOSTILE}
    assert 'alert(1)</script>' not in page.text and '\x1b' not in page.text and '\u202e' not in page.text
    shown = page.of('text')
    assert '$x^2$ \\frac{1}{2}' in shown                   # no formula
    assert '@0@ @1@' in shown                           # not taken for a placeholder
    assert max(map(len, shown)) < 30


def test_the_page_has_every_part(page):
    assert page.of('h2') == [
        'Training', 'Classes', 'Precision and recall', 'Thresholds', 'Labels taken for one another', 'Calibration',
        'The most wrong pictures', 'All classes']
    legends = page.of('li')
    assert legends[:3] == ['train_loss', 'val_map', 'lr'] and 'above: thresholds in use' in legends
    assert 'note' not in legends


def test_the_table_has_the_right_numbers(tmp_path):
    logits, targets = scores()
    targets[:10, 2] = -1
    targets[:, 4] = 0
    names = [f'class {index}' for index in range(7)]
    thresholds = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    page = write(tmp_path / 'a.html', targets=targets, label_names=names, thresholds=thresholds)
    precision = multilabel_average_precision(logits, targets)
    f1 = multilabel_f1(logits.double().sigmoid(), targets, threshold=thresholds)
    rows = {row[0]: row[1:] for row in page.rows()}
    assert list(rows)[-1] == 'class 4' and rows['class 4'] == ['\u2013', '0', '0.0', '0.0', '0.0', '0.600', '0']
    order = sorted(set(range(7)) - {4}, key=lambda column: -precision[column])
    assert list(rows)[:-1] == [names[column] for column in order]
    for column in order:
        assert rows[names[column]] == [
            f'{100 * precision[column]:.1f}', str(int((targets[:, column] == 1).sum())),
            *(f'{100 * values[column]:.1f}' for values in (f1.precision, f1.recall, f1.f1)),
            f'{thresholds[column]:.3f}', '10' if column == 2 else '0']
    assert page.of('b')[:4] == [
        f'{100 * precision.nanmean():.1f}', f'{100 * precision.nan_to_num(0).mean():.1f}', f'{100 * f1.overall_f1:.1f}',
        f'{100 * f1.class_f1:.1f}']
    assert page.of('b')[-1] == f'{100 * 10 / 280:.1f}'


def test_unknown_labels_change_nothing_whatever_their_scores(tmp_path):
    logits, targets = scores()
    targets[::3, 1] = -1
    write(tmp_path / 'a.html', logits=logits, targets=targets)
    logits[::3, 1] = 50.0
    write(tmp_path / 'b.html', logits=logits, targets=targets)
    assert (tmp_path / 'a.html').read_bytes() == (tmp_path / 'b.html').read_bytes()


def test_the_most_wrong_pictures_are_shown_small_with_their_labels(page, pictures):
    images = [attributes for tag, attributes in page.tags if tag == 'img']
    assert len(images) == 23 and page.text.count('cannot be read') == 1
    for attributes in images:
        data = base64.b64decode(attributes['src'].removeprefix('data:image/jpeg;base64,'))
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == 'JPEG' and max(image.size) == 200
        assert attributes['alt'] in {str(path) for path in pictures.image_paths}
    labels = page.of('div')
    assert any(re.fullmatch(r'missed .* 0\.000', label) for label in labels)
    assert any(re.fullmatch(r'false .* 1\.000', label) for label in labels)


def test_a_model_without_mistakes_has_no_wrong_pictures(tmp_path, pictures):
    targets = pictures.targets
    page = write(tmp_path / 'a.html', logits=targets * 8.0 - 4.0, targets=targets, source=pictures)
    assert 'There are none: every known label is decided rightly.' in page.of('p')
    assert 'img' not in {tag for tag, _ in page.tags}


def test_exclusive_classes_have_top_accuracy_and_no_thresholds(tmp_path):
    targets = torch.nn.functional.one_hot(torch.arange(40) % 7, 7)
    page = write(tmp_path / 'a.html', targets=targets, activation='softmax')
    assert 'Thresholds' not in page.of('h2')
    top1 = (scores()[0].argmax(1) == torch.arange(40) % 7).double().mean()
    assert page.of('span')[1:3] == ['top-1', 'top-5'] and page.of('b')[1] == f'{100 * top1:.1f}'


def test_many_classes_show_the_best_and_the_worst_and_list_all(tmp_path):
    logits, targets = scores(num=60, classes=500)
    page = write(tmp_path / 'a.html', logits=logits, targets=targets, label_names=[f'c{i}' for i in range(500)])
    assert len(page.rows()) == 500
    assert {'The 20 best', 'The 20 worst'} <= set(page.of('h3'))
    assert sum(bool(re.fullmatch(r'c\d+', words)) for words in page.of('text')) < 100


@pytest.mark.parametrize('support', [1, 3, 7, 30, 70])
def test_many_classes_of_as_many_pictures_have_that_number_below_them(support, tmp_path):
    targets = torch.zeros(80, 9)
    targets[:support] = 1
    page = write(
        tmp_path / 'a.html', logits=scores(80, 9)[0], targets=targets, label_names=[f'c{index}' for index in range(9)])
    plot = page.text[page.text.index('Do classes with more pictures do better?'):]
    assert re.findall(r'>([\d,]+)</text>', plot[:plot.index('</svg>')])[0] == str(support)


@pytest.mark.parametrize(('num', 'classes', 'label'), [(1, 1, 1), (3, 2, 0), (3, 9, -1)])
def test_data_that_say_nothing_still_give_a_page(num, classes, label, tmp_path):
    page = write(
        tmp_path / 'a.html', logits=torch.zeros(num, classes), targets=torch.full((num, classes), label),
        label_names=[f'c{index}' for index in range(classes)])
    assert len(page.rows()) == classes


def test_equal_arguments_give_equal_bytes_and_settings_of_matplotlib_do_not_count(tmp_path):
    write(tmp_path / 'a.html', epochs=EPOCHS)
    with matplotlib.rc_context({'text.usetex': True, 'svg.fonttype': 'path', 'axes.facecolor': 'red'}):
        own = dict(matplotlib.rcParams)
        write(tmp_path / 'b.html', epochs=EPOCHS)
        assert dict(matplotlib.rcParams) == own
    assert (tmp_path / 'a.html').read_bytes() == (tmp_path / 'b.html').read_bytes()
    assert 'matplotlib.pyplot' not in sys.modules or not sys.modules['matplotlib.pyplot'].get_fignums()


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / 'a.html').write_text('old')

    class Gone(MultiLabelRecords):
        def image_name(self, index: int) -> str:
            raise OSError('the disk went away')

    source = Gone([Path(f'{index}.png') for index in range(40)], scores()[1], HOSTILE)
    with pytest.raises(OSError, match='^the disk went away$'):
        write(tmp_path / 'a.html', source=source)
    assert [path.name for path in tmp_path.iterdir()] == ['a.html'] and (tmp_path / 'a.html').read_text() == 'old'


@pytest.mark.parametrize(('options', 'error', 'words'), [
    (dict(label_names=HOSTILE[:3]), ValueError, r'^label_names must have one name a class, got 3 for 7 classes\.$'),
    (dict(label_names=['a'] * 7), ValueError, r"^labels must be different names, got 'a' 7 times\.$"),
    (dict(targets=scores()[1][:5]), ValueError, r'^shapes must be equal, got logits \(40, 7\), targets \(5, 7\)\.$'),
    (dict(logits=torch.zeros(0, 7), targets=torch.zeros(0, 7)), ValueError,
     r'^logits must be of at least one picture, got none\.$'),
    (dict(logits=torch.full((40, 7), float('nan'))), ValueError,
     r'^logits must be finite, got 280 values that are not\.$'),
    (dict(targets=torch.full((40, 7), 2)), ValueError, r'^targets must be 1, 0 or -1, got 2\.$'),
    (dict(thresholds=[0.5]), ValueError, r'^thresholds must have one number a class, got 1 for 7 classes\.$'),
    (dict(temperatures=[0.0] * 7), ValueError, r'^temperatures\[0\] must be in \[0\.01, 100\], got 0\.0\.$'),
    (dict(temperatures=[1.0] * 7, activation='softmax'), ValueError,
     r"^temperatures are for the activation 'sigmoid', got 'softmax'\.$"),
    (dict(activation='relu'), ValueError, r"^activation must be one of 'sigmoid', 'softmax', got 'relu'\.$"),
    (dict(source=MultiLabelRecords(['a.png'], torch.zeros(1, 7, dtype=torch.uint8), HOSTILE)), ValueError,
     r'^source must be the pictures of logits, got 1 pictures for 40 rows; select those that were measured\.$'),
])
def test_wrong_arguments(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        write(tmp_path / 'a.html', **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r'matplotlib is needed .* pip install "timm-miil\[train\]"'):
        write(tmp_path / 'a.html')
    assert not list(tmp_path.iterdir())
