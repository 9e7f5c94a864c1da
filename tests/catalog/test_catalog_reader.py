"""The reader takes a good catalogue as it stands and says of a bad one which file, table and key is wrong."""
import dataclasses
import re
from pathlib import Path

import pytest

from timm_miil._errors import CatalogError
from timm_miil.catalog import DataSet, LabelSet, Metric, Paper, TimmFacts, Unsettled, Weights, _reader

PAPERS = '''
[ink]
title = "Ink"
authors = ["Ada One", "Bo Two"]
year = 2021
venue = "Somewhere"
arxiv = "2101.00001"
repository = "https://example.org/ink"
code_licence = "MIT"
'''
LABELS = '''
[two]
source = "made up"
licence = "CC0-1.0"
'''
FAMILY = '''
[defaults]
paper = "ink"
dataset = "blots"
input_size = [3, 64, 32]
head = "ml_decoder"
problem_type = "multi_label_classification"
licence = "MIT"

[defaults.metric]
name = "mAP"
origin = "paper"
source = "Table 1"

[timm]
first_conv = "stem"
pool_stride = 32

[timm.ink_net]
body = "resnet18"
classifier = ["head.a", "head.b"]

[weights."ink_net.lab_blots"]
num_classes = 2
num_params = 1234
frames = 4
mean = [0, 0.5, 1]
std = [0.25, 0.5, 1]
interpolation = "bilinear"
crop_pct = 0.875
crop_mode = "center"
num_groups = 2
labels = "two"
metrics = [{ value = 12.5 }, { name = "top1", value = 80, dataset = "dots", setting = "fine-tuned" }]
url = "https://example.org/ink.pth"
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
base = "ink_tiny.own"
hf_hub_id = "lab/ink"
source_repo = "lab/ink"
published_in = "README.md"
source_architecture = "inky"
timm_tag = "ink_net.lab_blots"
conversion = ["Halved."]
notes = ["one", "two"]
unsettled = { architecture = "or another", head = "one of two", num_params = "open", num_classes = "a guess" }
remarks = ["three"]

[weights."ink_tiny.own"]
inherit = false
paper = "ink"
dataset = "dots"
input_size = [1, 8, 8]
head = "fc"
problem_type = "single_label_classification"
file = "models/weights/tiny.safetensors"

[[weights."ink_tiny.own".metrics]]
name = "mAP"
value = 97.25
origin = "measured"
command = "measure --all"
hardware = "2 CPU cores"
date = "2025-01-31"
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small correct catalogue below a folder that stands for the package."""
    for name, text in {
        'catalog/papers.toml': PAPERS,
        'catalog/labels.toml': LABELS,
        'catalog/labels/two.txt': 'dry\nwet ink\n',
        'catalog/weights/ink.toml': FAMILY,
        'models/weights/tiny.safetensors': '',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8')
    return tmp_path


def change(root: Path, name: str, old: str, new: str) -> None:
    file = root / 'catalog' / name
    text = file.read_text(encoding='utf-8')
    assert text.count(old) == 1, f'{old!r} must stand once in {name}'
    file.write_text(text.replace(old, new), encoding='utf-8')


def read(root: Path) -> dict[str, Weights]:
    return dict(_reader.read_all_weights(root, _reader.read_papers(root), _reader.read_label_sets(root)))


def test_a_good_catalogue_is_read_as_it_stands(root):
    assert _reader.read_papers(root) == {
        'ink': Paper(
            id='ink', title='Ink', authors=('Ada One', 'Bo Two'), year=2021, venue='Somewhere', arxiv='2101.00001',
            repository='https://example.org/ink', code_licence='MIT')}
    assert _reader.read_label_sets(root) == {
        'two': LabelSet(name='two', labels=('dry', 'wet ink'), source='made up', licence='CC0-1.0')}
    assert read(root) == {
        'ink_net.lab_blots': Weights(
            name='ink_net.lab_blots', family='ink', paper='ink', dataset='blots',
            problem_type='multi_label_classification', num_classes=2, num_params=1234, input_size=(3, 64, 32), frames=4,
            mean=(0.0, 0.5, 1.0), std=(0.25, 0.5, 1.0), interpolation='bilinear', crop_pct=0.875,
            crop_mode='center', head='ml_decoder', num_groups=2, labels='two',
            metrics=(
                Metric(name='mAP', value=12.5, origin='paper', source='Table 1'),
                Metric(name='top1', value=80.0, origin='paper', source='Table 1', dataset='dots', setting='fine-tuned'),
            ),
            url='https://example.org/ink.pth', sha256='0123456789abcdef' * 4, base='ink_tiny.own', hf_hub_id='lab/ink',
            source_repo='lab/ink', published_in='README.md',
            source_architecture='inky', timm_tag='ink_net.lab_blots', licence='MIT', conversion=('Halved.',),
            notes=('one', 'two'), unsettled=Unsettled('or another', 'one of two', 'open', 'a guess'),
            remarks=('three',),
            timm=TimmFacts(
                body='resnet18', first_conv=('stem',), classifier=('head.a', 'head.b'), pool_stride=32)),
        'ink_tiny.own': Weights(
            name='ink_tiny.own', family='ink', paper='ink', dataset='dots', input_size=(1, 8, 8), head='fc',
            problem_type='single_label_classification',
            file='models/weights/tiny.safetensors',
            metrics=(
                Metric(
                    name='mAP', value=97.25, origin='measured', command='measure --all', hardware='2 CPU cores',
                    date='2025-01-31'),
            ),
            timm=TimmFacts(first_conv=('stem',), pool_stride=32)),
    }


def test_every_fact_of_the_records_is_covered_by_the_good_catalogue(root):
    records = [*_reader.read_papers(root).values(), *_reader.read_label_sets(root).values(), *read(root).values()]
    records += [part for entry in read(root).values() for part in (*entry.metrics, entry.unsettled)]
    given = {
        (type(record).__name__, field.name) for record in records for field in dataclasses.fields(record)
        if getattr(record, field.name) not in (None, (), Unsettled())}
    assert given == {
        (kind.__name__, field.name)
        for kind in (Paper, LabelSet, Weights, Metric, Unsettled) for field in dataclasses.fields(kind)}


def test_results_cannot_be_changed(root):
    papers, entries = _reader.read_papers(root), _reader.read_family(
        root, 'ink', _reader.read_papers(root), _reader.read_label_sets(root))
    with pytest.raises(TypeError, match='does not support item assignment'):
        papers['ink'] = None
    with pytest.raises(TypeError, match='does not support item assignment'):
        entries['x.y'] = None
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'dataset'"):
        entries['ink_tiny.own'].dataset = 'other'


ENTRY = 'weights."ink_net.lab_blots"'
TINY = 'weights."ink_tiny.own"'
BAD_VALUES = [
    # key, its line, what it becomes, the table at fault, what the message shows of it, what it expects
    ('paper', 'paper = "ink"\ndataset = "blots"', 'paper = "inc"\ndataset = "blots"', 'defaults',
     "'inc'", "a paper of papers.toml; did you mean 'ink'? Known: ink."),
    ('dataset', 'dataset = "blots"\n', '', ENTRY, 'nothing', 'a string'),
    ('dataset', '"blots"', '" blots"', 'defaults', "' blots'", 'a string, not empty and without outer blanks'),
    ('dataset', '"blots"', '""', 'defaults', "''", 'a string, not empty'),
    ('dataset', '"blots"', '7', 'defaults', '7', 'a string'),
    ('problem_type', '"multi_label_classification"', '"multi_label"', 'defaults', "'multi_label'",
     "one of 'multi_label_classification', 'single_label_classification'"),
    ('problem_type', 'problem_type = "multi_label_classification"\n', '', ENTRY, 'nothing', 'one of'),
    ('num_params', 'num_params = 1234', 'num_params = 1.5', ENTRY, '1.5', 'a whole number of at least 1'),
    ('sha256', 'sha256 = "0123', 'sha256 = "0123Z', ENTRY, "'0123Z", '64 hexadecimal digits in lower case'),
    ('sha256', 'inherit = false', f'inherit = false\nsha256 = "{"0" * 64}"', TINY, "'000",
     'no value, because there is no url'),
    ('base', 'base = "ink_tiny.own"', 'base = "ink_tiny"', ENTRY, "'ink_tiny'", "'architecture.tag'"),
    ('input_size', '[3, 64, 32]', '[64, 32]', 'defaults', '[64, 32]', '[channels, height, width], whole numbers'),
    ('input_size', '[3, 64, 32]', '[3, 64, 0]', 'defaults', '[3, 64, 0]', '[channels, height, width]'),
    ('input_size', '[3, 64, 32]', '[3, 64.0, 32]', 'defaults', '[3, 64.0, 32]', '[channels, height, width]'),
    ('input_size', '[3, 64, 32]', '[true, 64, 32]', 'defaults', '[True, 64, 32]', '[channels, height, width]'),
    ('head', '"ml_decoder"', '"decoder"', 'defaults', "'decoder'", "one of 'fc', 'ml_decoder', 'sdl_embedding'"),
    ('num_classes', 'num_classes = 2', 'num_classes = 0', ENTRY, '0', 'a whole number of at least 1'),
    ('num_classes', 'num_classes = 2', 'num_classes = true', ENTRY, 'True', 'a whole number of at least 1'),
    ('num_classes', 'num_classes = 2', 'num_classes = 3', ENTRY, '3', "2, as many as label set 'two' has"),
    ('num_classes', 'num_classes = 2\n', '', ENTRY, 'nothing', "2, as many as label set 'two' has"),
    ('frames', 'frames = 4', 'frames = "4"', ENTRY, "'4'", 'a whole number'),
    ('mean', '[0, 0.5, 1]', '[0, 0.5]', ENTRY, '[0, 0.5]', 'three numbers in [0, 1]'),
    ('mean', '[0, 0.5, 1]', '[0, -0.5, 1]', ENTRY, '[0, -0.5, 1]', 'three numbers in [0, 1]'),
    ('mean', '[0, 0.5, 1]', '[0, nan, 1]', ENTRY, '[0, nan, 1]', 'three numbers in [0, 1]'),
    ('mean', 'mean = [0, 0.5, 1]\n', '', ENTRY, 'nothing', 'a value, because std has one'),
    ('std', '[0.25, 0.5, 1]', '[0.25, 0, 1]', ENTRY, '[0.25, 0, 1]', 'three numbers in (0, 1]'),
    ('std', '[0.25, 0.5, 1]', '[57.3, 57, 58]', ENTRY, '[57.3, 57, 58]', 'three numbers in (0, 1]'),
    ('std', 'std = [0.25, 0.5, 1]\n', '', ENTRY, 'nothing', 'a value, because mean has one'),
    ('interpolation', '"bilinear"', '"linear"', ENTRY, "'linear'", "one of 'nearest', 'bilinear'"),
    ('crop_pct', '0.875', '0', ENTRY, '0', 'a number in (0, 1]'),
    ('crop_pct', '0.875', '87.5', ENTRY, '87.5', 'a number in (0, 1]'),
    ('crop_pct', 'crop_pct = 0.875\n', '', ENTRY, 'nothing', 'a value, because crop_mode has one'),
    ('crop_mode', '"center"', '"squish"', ENTRY, "'squish'", "one of 'center', 'squash', 'border'"),
    ('crop_mode', 'crop_mode = "center"\n', '', ENTRY, 'nothing', 'a value, because crop_pct has one'),
    ('num_groups', 'num_groups = 2', 'num_groups = -1', ENTRY, '-1', 'a whole number of at least 1'),
    ('num_groups', 'num_groups = 2', 'num_groups = 2\nhead = "fc"', ENTRY,
     '2', "no value, because head is 'fc' and not 'ml_decoder'"),
    ('labels', 'labels = "two"', 'labels = "too"', ENTRY,
     "'too'", "a label set of labels.toml; did you mean 'two'? Known: two."),
    ('metrics', 'metrics = [{ value = 12.5 }, ', 'metrics = [7, ', ENTRY, '[7, ', 'a list of tables'),
    ('url', 'https://example.org/ink.pth', 'http://example.org/ink.pth', ENTRY,
     "'http://example.org/ink.pth'", "a URL that starts with 'https://'"),
    ('url', 'https://example.org/ink.pth', 'https://example.org', ENTRY, "'https://example.org'", 'a URL'),
    ('url', 'file = "models/weights/tiny.safetensors"\n', '', TINY,
     'nothing', 'a URL, unless file or hf_hub_id says where the weights are'),
    ('source_repo', 'source_repo = "lab/ink"\n', '', ENTRY, 'nothing', "'owner/name'"),
    ('source_repo', 'source_repo = "lab/ink"', 'source_repo = "ink"', ENTRY, "'ink'", "'owner/name'"),
    ('published_in', 'published_in = "README.md"\n', '', ENTRY, 'nothing', 'a string'),
    ('hf_hub_id', 'hf_hub_id = "lab/ink"', 'hf_hub_id = "lab/"', ENTRY, "'lab/'", "'owner/name'"),
    ('file', 'tiny.safetensors', 'small.safetensors', TINY,
     "'models/weights/small.safetensors'", 'a file of the package'),
    ('file', 'models/weights/tiny', '../weights/tiny', TINY, "'../weights/tiny.safetensors'", 'below the package'),
    ('file', 'models/weights/tiny', '/weights/tiny', TINY, "'/weights/tiny.safetensors'", 'below the package'),
    ('file', 'tiny.safetensors', 'tiny.pth', TINY, "'models/weights/tiny.pth'", "a '.safetensors' file"),
    ('timm_tag', 'timm_tag = "ink_net.lab_blots"', 'timm_tag = "ink_net"', ENTRY, "'ink_net'", "'architecture.tag'"),
    ('conversion', '["Halved."]', '["Halved. "]', ENTRY, "['Halved. ']", 'a list of strings'),
    ('notes', '["one", "two"]', '[]', ENTRY, '[]', 'a list of strings'),
    ('notes', '["one", "two"]', '["one", ""]', ENTRY, "['one', '']", 'a list of strings, none empty'),
    ('remarks', '["three"]', '"three"', ENTRY, "'three'", 'a list of strings'),
    ('unsettled', '{ architecture = "or another", head = "one of two", num_params = "open", num_classes = "a guess" }',
     '"all"', ENTRY, "'all'", 'a table'),
    ('num_params', 'num_params = "open"', 'num_params = 3', f'{ENTRY}.unsettled', '3', 'a string'),
    ('inherit', 'inherit = false', 'inherit = "no"', TINY, "'no'", 'true or false'),
    ('origin', 'origin = "paper"\n', '', f'{ENTRY}.metrics[0]', 'nothing', "one of 'paper', 'measured'"),
    ('origin', 'origin = "paper"', 'origin = "rumour"', 'defaults.metric', "'rumour'", "one of 'paper', 'measured'"),
    ('source', 'source = "Table 1"\n', '', f'{ENTRY}.metrics[0]', 'nothing', 'a string'),
    ('name', 'name = "top1", value = 80', 'name = "top2", value = 80', f'{ENTRY}.metrics[1]',
     "'top2'", "one of 'mAP', 'top1', 'semantic_top1'"),
    ('value', '{ value = 12.5 }', '{ dataset = "x" }', f'{ENTRY}.metrics[0]', 'nothing', 'a number in [0, 100]'),
    ('value', '12.5', '125', f'{ENTRY}.metrics[0]', '125', 'a number in [0, 100]'),
    ('value', '12.5', 'true', f'{ENTRY}.metrics[0]', 'True', 'a number in [0, 100]'),
    ('command', 'command = "measure --all"\n', '', f'{TINY}.metrics[0]', 'nothing', 'a string'),
    ('hardware', 'hardware = "2 CPU cores"\n', '', f'{TINY}.metrics[0]', 'nothing', 'a string'),
    ('date', 'date = "2025-01-31"\n', '', f'{TINY}.metrics[0]', 'nothing', "a day as 'YYYY-MM-DD'"),
    ('date', '"2025-01-31"', '"2025-02-31"', f'{TINY}.metrics[0]', "'2025-02-31'", "a day as 'YYYY-MM-DD'"),
    ('date', '"2025-01-31"', '"20250131"', f'{TINY}.metrics[0]', "'20250131'", "a day as 'YYYY-MM-DD'"),
    ('first_conv', 'first_conv = "stem"', 'first_conv = "stem."', 'timm', "'stem.'", 'the dotted name of a module'),
    ('classifier', '["head.a", "head.b"]', '[]', 'timm.ink_net', '[]', 'the dotted name of a module'),
    ('pool_stride', 'pool_stride = 32', 'pool_stride = 0', 'timm', '0', 'a whole number of at least 1'),
]


@pytest.mark.parametrize(
    ('key', 'old', 'new', 'table', 'got', 'expected'), BAD_VALUES,
    ids=[f'{row[0]}-{row[2][:24]}' for row in BAD_VALUES])
def test_a_bad_value_is_named_with_file_table_and_key(root, key, old, new, table, got, expected):
    change(root, 'weights/ink.toml', old, new)
    file = root / 'catalog' / 'weights' / 'ink.toml'
    message = f'{re.escape(f"{file}: [{table}] {key}: got {got}")}.*, expected .*{re.escape(expected)}'
    with pytest.raises(CatalogError, match=message):
        read(root)


@pytest.mark.parametrize(('old', 'new', 'where', 'hint'), [
    ('frames = 4', 'frame = 4', f'[{ENTRY}] frame', "did you mean 'frames'?"),
    ('licence = "MIT"', 'license = "MIT"', '[defaults] license', "did you mean 'licence'?"),
    ('setting = "fine-tuned"', 'settings = "x"', f'[{ENTRY}.metrics[1]] settings', "did you mean 'setting'?"),
    ('source = "Table 1"', 'source = "Table 1"\nhardware = "CPU"', '[defaults.metric] hardware', 'Known: '),
    ('date = "2025-01-31"', 'date = "2025-01-31"\nsource = "us"', f'[{TINY}.metrics[0]] source', 'Known: '),
    ('pool_stride = 32', 'pool_size = 32', '[timm] pool_size', "did you mean 'pool_stride'?"),
    ('body = "resnet18"', 'bodies = "resnet18"', '[timm.ink_net] bodies', "did you mean 'body'?"),
    ('[defaults]\npaper', '[default]\npaper', '[ink] default', "did you mean 'defaults'?"),
])
def test_an_unknown_key_is_named_with_the_nearest_known_one(root, old, new, where, hint):
    change(root, 'weights/ink.toml', old, new)
    if new.startswith('[default]'):
        change(root, 'weights/ink.toml', '[defaults.metric]', '[default.metric]')
    with pytest.raises(CatalogError, match=f'{re.escape(f"ink.toml: {where}: unknown key;")}.*{re.escape(hint)}'):
        read(root)


def test_a_metric_with_an_origin_of_its_own_takes_no_default(root):
    change(root, 'weights/ink.toml', '{ value = 12.5 }',
           '{ name = "mAP", value = 12, origin = "measured", command = "c", hardware = "h", date = "2025-01-01" }')
    assert read(root)['ink_net.lab_blots'].metrics[0] == Metric(
        name='mAP', value=12.0, origin='measured', command='c', hardware='h', date='2025-01-01')
    change(root, 'weights/ink.toml', 'origin = "measured", command = "c"', 'origin = "paper"')
    with pytest.raises(CatalogError, match=r'\.metrics\[0\]\] source: got nothing, expected a string'):
        read(root)


def test_facts_for_timm_of_an_architecture_without_weights_are_an_error(root):
    change(root, 'weights/ink.toml', '[timm.ink_net]', '[timm.ink_ned]')
    with pytest.raises(CatalogError, match=r"ink.toml: \[timm.ink_ned\]: unknown architecture; did you mean 'ink_net'"):
        read(root)


@pytest.mark.parametrize('name', ['ink_net', 'ink.net.blots', 'Ink.blots', 'ink_net.'])
def test_a_name_must_be_architecture_and_tag(root, name):
    change(root, 'weights/ink.toml', '[weights."ink_net.lab_blots"]', f'[weights."{name}"]')
    change(root, 'weights/ink.toml', '[timm.ink_net]\nbody = "resnet18"\nclassifier = ["head.a", "head.b"]\n', '')
    with pytest.raises(CatalogError, match=rf"\[weights.\"{name}\"\]: got '{name}', expected 'architecture.tag'"):
        read(root)


@pytest.mark.parametrize(('text', 'where'), [
    ('weights = 1', r'\[ink\] weights: '),
    ('[weights]\n"ink_net.x" = 1', r'\[weights."ink_net.x"\]: '),
    ('defaults = 1\n[weights]', r'\[ink\] defaults: '),
    ('[defaults]\nmetric = 1\n[weights]', r'\[defaults.metric\]: '),
    ('timm = 1\n[weights]', r'\[ink\] timm: '),
])
def test_a_value_in_the_place_of_a_table_is_named(root, text, where):
    (root / 'catalog' / 'weights' / 'ink.toml').write_text(text)
    with pytest.raises(CatalogError, match=f'ink.toml: {where}got 1, expected a table'):
        read(root)


def test_a_name_in_two_families_is_an_error_that_names_both(root):
    (root / 'catalog' / 'weights' / 'quill.toml').write_text(FAMILY)
    message = r'quill.toml: \[weights."ink_net.lab_blots"\]: got a name that the family \'ink\' has too'
    with pytest.raises(CatalogError, match=message):
        read(root)


def test_a_name_twice_in_a_family_is_an_error(root):
    file = root / 'catalog' / 'weights' / 'ink.toml'
    file.write_text(f'{FAMILY}\n[{ENTRY}]\nframes = 2\n')
    with pytest.raises(CatalogError, match=rf'{file}: got Cannot declare .*ink_net.lab_blots.* expected TOML'):
        read(root)


@pytest.mark.parametrize('name', ['papers.toml', 'labels.toml', 'weights/ink.toml'])
@pytest.mark.parametrize('content', [b'a = [1,', b'a = "\xff"'], ids=['cut', 'not-utf-8'])
def test_a_file_that_is_not_toml_is_named(root, name, content):
    (root / 'catalog' / name).write_bytes(content)
    file = re.escape(str(root / 'catalog' / name))
    with pytest.raises(CatalogError, match=f'{file}: got .*, expected TOML in UTF-8'):
        read(root)


DATA_SETS = '''
[small-blots]
title = "Small blots"
contents = "blots"
limits = ["They are small.", "They are blots."]
items = "sheets"
use = "None."
timm_names = "blots-1k"
hub_id = "lab/blots"
homepage = "https://example.org/blots"
'''


def test_data_sets_are_read_as_they_stand(root):
    (root / 'catalog' / 'datasets.toml').write_text(DATA_SETS)
    assert _reader.read_data_sets(root) == {
        'small-blots': DataSet(
            name='small-blots', title='Small blots', contents='blots', limits=('They are small.', 'They are blots.'),
            items='sheets', use='None.', timm_names='blots-1k', hub_id='lab/blots',
            homepage='https://example.org/blots')}


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ('title = "Small blots"\n', '', r'\[small-blots\] title: got nothing, expected a string'),
    ('contents = "blots"', 'contents = ""', r"\[small-blots\] contents: got '', expected a string"),
    ('["They are small.", "They are blots."]', '[]', r'\[small-blots\] limits: got \[\], expected a list of strings'),
    ('lab/blots', 'blots', r"\[small-blots\] hub_id: got 'blots', expected 'owner/name'"),
    ('https://', 'http://', r"\[small-blots\] homepage: got 'http://example.org/blots', expected a URL that"),
    ('homepage', 'home_page', r"\[small-blots\] home_page: unknown key; did you mean 'homepage'"),
    ('[small-blots]', '[Small_blots]', r"\[Small_blots\]: got 'Small_blots' as a name, expected words of lower-case"),
])
def test_a_bad_data_set_is_named(root, old, new, message):
    (root / 'catalog' / 'datasets.toml').write_text(DATA_SETS.replace(old, new))
    with pytest.raises(CatalogError, match=f'datasets.toml: {message}'):
        _reader.read_data_sets(root)


def test_missing_data_sets_are_named(root):
    with pytest.raises(CatalogError, match='datasets.toml: got no such file'):
        _reader.read_data_sets(root)


@pytest.mark.parametrize('name', ['papers.toml', 'labels.toml'])
def test_a_missing_file_is_named(root, name):
    (root / 'catalog' / name).unlink()
    with pytest.raises(CatalogError, match=rf'{re.escape(str(root / "catalog" / name))}: got no such file'):
        read(root)


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ('title = "Ink"\n', '', r'\[ink\] title: got nothing, expected a string'),
    ('["Ada One", "Bo Two"]', '"Ada One"', r"\[ink\] authors: got 'Ada One', expected a list of strings"),
    ('year = 2021', 'year = 21', r'\[ink\] year: got 21, expected a year from 1950 to 2100'),
    ('2101.00001', '2101.00001v2', r"\[ink\] arxiv: got '2101.00001v2', expected an arXiv identifier without a"),
    ('https://example.org/ink', 'git@example.org', r"\[ink\] repository: got 'git@example.org', expected a URL"),
    ('code_licence', 'code_license', r"\[ink\] code_license: unknown key; did you mean 'code_licence'"),
    ('[ink]', '["In-k"]', r"\[In-k\]: got 'In-k' as an id, expected a word of lower-case letters"),
    ('[ink]', 'pen = 1\n[ink]', r'\[pen\]: got 1, expected a table'),
])
def test_a_bad_paper_is_named(root, old, new, message):
    change(root, 'papers.toml', old, new)
    with pytest.raises(CatalogError, match=f'papers.toml: {message}'):
        read(root)


@pytest.mark.parametrize(('text', 'message'), [
    ('dry\n\n', "two.txt: line 2: got '', expected a label"),
    ('dry\nwet \n', "two.txt: line 2: got 'wet ', expected a label without outer blanks"),
    ('dry\ndry\n', "two.txt: line 2: got 'dry', expected a label without outer blanks, only once"),
    ('', "two.txt: line 1: got '', expected a label"),
    ('dry\nwet\nsoaked\n', r'\[weights."ink_net.lab_blots"\] num_classes: got 2, expected 3, as many as'),
])
def test_a_bad_list_of_labels_is_named(root, text, message):
    (root / 'catalog' / 'labels' / 'two.txt').write_text(text)
    with pytest.raises(CatalogError, match=message):
        read(root)


def test_lists_of_labels_and_their_tables_must_match(root):
    labels = root / 'catalog' / 'labels'
    (labels / 'three.txt').write_text('a\nb\nc\n')
    message = r'three.txt: got a file without a table in .*labels.toml, expected \[three\]'
    with pytest.raises(CatalogError, match=message):
        read(root)
    (labels / 'three.txt').unlink()
    (labels / 'two.txt').write_bytes(b'dry\n\xff\n')
    with pytest.raises(CatalogError, match='two.txt: got .*utf-8.*, expected UTF-8'):
        read(root)
    (labels / 'two.txt').unlink()
    with pytest.raises(CatalogError, match=r'labels.toml: \[two\]: got no file .*two.txt, expected one label a line'):
        read(root)
    change(root, 'labels.toml', 'source = "made up"\n', '')
    (labels / 'two.txt').write_text('dry\nwet\n')
    with pytest.raises(CatalogError, match=r'labels.toml: \[two\] source: got nothing, expected a string'):
        read(root)


def test_a_family_is_read_without_the_others(root):
    (root / 'catalog' / 'weights' / 'quill.toml').write_text('broken')
    papers, label_sets = _reader.read_papers(root), _reader.read_label_sets(root)
    assert _reader.family_names(root) == ('ink', 'quill')
    assert len(_reader.read_family(root, 'ink', papers, label_sets)) == 2
