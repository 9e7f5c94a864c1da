"""The page of measurements: drawn from the files of results, whole, and harmless whatever stands in them."""
import csv
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_scripts import BENCHMARKS, load_script
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

HEADER = ('phase', 'model', 'variant', 'precision', 'layout', 'mode', 'image_size', 'batch_size', 'status',
          'images_per_second', 'gpu', 'cpu', 'command')


@pytest.fixture(scope='module')
def page():
    return load_script('page')


def save(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / 'pareto-cpu.csv'
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(dict.fromkeys(HEADER, '') | row for row in rows)
    return path


def row(model: str, speed: float, **cells: str) -> dict[str, str]:
    return dict(
        phase='inference', model=model, variant='plain', precision='fp32', layout='nchw', mode='eager',
        image_size='224', batch_size='1', status='ok', images_per_second=str(speed), cpu='chip') | cells


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ('src', 'href', 'srcset')]
        assert tag != 'img' or dict(attrs)['alt']


def test_all_files_become_the_committed_pictures_and_one_page_that_needs_no_network(page, tmp_path, monkeypatch):
    for path in (BENCHMARKS / 'results').glob('*.csv'):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sys, 'argv', ['page.py', '--results', str(tmp_path)])
    page.main()
    pictures = sorted(tmp_path.glob('*.png'))
    results = BENCHMARKS / 'results'
    assert {path.name for path in pictures} == {path.name for path in results.glob('*.png')}
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 500
    text = (tmp_path / 'page.html').read_text()
    sources = Sources()
    sources.feed(text)
    assert len(sources.found) == len(pictures)
    assert all(source.startswith('data:image/png;base64,') for source in sources.found)
    assert 'script' not in sources.tags and not re.search(r'url\(|@import', text)
    now, committed = (re.sub('base64,[^"]*', '', each) for each in (text, (results / 'page.html').read_text()))
    assert now == committed, 'run: python benchmarks/page.py'


def test_what_failed_or_has_no_published_accuracy_is_no_point(page, tmp_path):
    path = save(
        tmp_path, row('tresnet_m', 9), row('tresnet_l', 99, status='out_of_memory'), row('tresnet_l', 4),
        row('no_such_model', 70))
    points = page.speed_points(page.read(path, 'model'))
    assert {(point.weights.split('.')[0], point.speed) for point in points} == {('tresnet_m', 9.0), ('tresnet_l', 4.0)}
    accuracies = {point.weights: (point.accuracy, point.origin) for point in points}
    assert accuracies['tresnet_m.miil_in1k'] == (80.8, 'paper')


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_the_front_is_what_nothing_beats(page, values):
    points = [page.Point(str(index), speed, accuracy, '') for index, (speed, accuracy) in enumerate(values)]
    front = page.pareto(points)
    on_front = {(point.speed, point.accuracy) for point in front}
    unbeaten = {
        (s, a) for s, a in values if not any((t >= s and b >= a) and (t, b) != (s, a) for t, b in values)}
    assert on_front == unbeaten and len(on_front) == len(front)


def test_names_from_a_file_are_text(page, tmp_path):
    path = save(tmp_path, row('tresnet_m', 5, cpu='<script>alert(1)</script>', command='a & "b"', variant='<b>'))
    text = page.as_page([page.draw_speeds(path)], has_gpu=True)
    assert '<script' not in text and '<b>' not in text
    assert '&lt;b&gt;' in text and '&lt;script&gt;' in text and 'a &amp; &quot;b&quot;' in text


def test_another_file_is_refused_in_words(page, tmp_path):
    path = tmp_path / 'losses-cpu.csv'
    path.write_text('loss,dtype\n')
    with pytest.raises(ValueError, match=r'losses-cpu.csv must have rows with loss, dtype, batch_size.*measure again'):
        page.draw_losses(path)


def test_a_file_without_what_is_drawn_is_refused_in_words(page, tmp_path):
    path = tmp_path / 'losses-cpu.csv'
    path.write_text('loss,dtype,batch_size,num_classes,contestant,ratio\nbce,float32,2,3,ours,1.0\n')
    with pytest.raises(ValueError, match='losses-cpu.csv must have rows of ASL or CSL'):
        page.draw_losses(path)
