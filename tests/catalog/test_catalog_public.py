"""What the catalogue offers: papers to cite, labels in order, look-ups that help, and no need for torch or timm."""
import ast
import dataclasses
import doctest
import re
import sys
import zipfile
from pathlib import Path

import pytest

from timm_miil import catalog
from timm_miil.catalog import CatalogError, Paper

FOLDER = Path(catalog.__file__).parent


@pytest.mark.parametrize('paper', catalog.papers().values(), ids=lambda paper: paper.id)
def test_bibtex_is_one_entry_with_the_facts_of_the_paper(paper):
    [(kind, key, body)] = re.findall(r'\A@(\w+)\{([^,]+),\n(.*)\n\}\Z', paper.bibtex, flags=re.DOTALL)
    fields = dict(re.findall(r'^  (\w+) = \{(.*)\},$', body, flags=re.MULTILINE))

    assert body.count('\n') + 1 == len(fields)                   # every line is a field
    assert paper.bibtex.count('{') == paper.bibtex.count('}')
    assert (kind, key) == ('inproceedings' if paper.venue else 'misc', paper.id)
    assert fields.get('booktitle') == paper.venue
    assert fields['title'] == f'{{{paper.title}}}'
    assert tuple(fields['author'].split(' and ')) == paper.authors
    assert (fields['year'], fields['eprint']) == (str(paper.year), paper.arxiv)


def test_bibtex_escapes_what_latex_would_read_as_a_command():
    paper = Paper(id='p', title='50% of R&D', authors=('A_B',), year=2020, venue='C # D')
    assert paper.bibtex == (
        '@inproceedings{p,\n  title = {{50\\% of R\\&D}},\n  author = {A\\_B},\n  booktitle = {C \\# D},\n'
        '  year = {2020},\n}')


def test_years_are_not_before_the_preprint():
    for paper in catalog.papers().values():
        assert paper.year >= 2000 + int(paper.arxiv[:2]), paper.id


def test_all_papers_of_the_lab_are_there():
    others = {'1910.03151'}             # papers of networks that the lab has trained
    assert {paper.arxiv for paper in catalog.papers().values()} - others == {
        '1904.04123', '1906.08031', '1910.07038', '2002.08258', '2003.13630', '2009.14119', '2102.11646', '2103.13915',
        '2104.10972', '2105.05926', '2109.12499', '2110.10955', '2110.12399', '2111.12933', '2201.06945', '2204.03475',
        '2204.09134', '2204.11479'}


def test_coco_labels_are_in_the_order_of_the_category_ids():
    labels = catalog.label_set('coco_80').labels
    # Category ids have gaps: 12, 26, 29, 30, 45, 66, 68, 69, 71 and 83 are not used.
    ids = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    assert len(labels) == len(ids) == 80
    known = {1: 'person', 11: 'fire hydrant', 13: 'stop sign', 25: 'giraffe', 27: 'backpack', 44: 'bottle',
             46: 'wine glass', 67: 'dining table', 70: 'toilet', 72: 'tv', 82: 'refrigerator', 84: 'book',
             90: 'toothbrush'}
    assert {number: labels[ids.index(number)] for number in known} == known


def test_voc_labels_are_in_alphabetical_order():
    labels = catalog.label_set('voc_20').labels
    assert len(labels) == 20
    assert list(labels) == sorted(labels)


def test_label_sets_name_their_source():
    sources = {name: label_set.source for name, label_set in catalog.label_sets().items()}
    assert 'https://cocodataset.org' in sources['coco_80']
    assert 'http://host.robots.ox.ac.uk/pascal/VOC' in sources['voc_20']


def test_what_is_read_is_read_once_and_read_only():
    for read in (catalog.papers, catalog.data_sets, catalog.label_sets, catalog.weights):
        assert read() is read()
        with pytest.raises(TypeError, match='does not support item assignment'):
            read()['x'] = None
    assert catalog.weights_of('asl') is catalog.weights_of('asl')


def test_families_make_up_the_catalogue():
    together = {name: entry for family in catalog.families() for name, entry in catalog.weights_of(family).items()}
    assert together == dict(catalog.weights())
    assert all(entry.family == family for family in catalog.families() for entry in catalog.weights_of(family).values())


@pytest.mark.parametrize(('look_up', 'name', 'message'), [
    (catalog.paper, 'mldecodr', "unknown paper 'mldecodr'; did you mean 'mldecoder'? Known: asap, "),
    (catalog.data_set, 'coco-2014', "unknown data set 'coco-2014'; did you mean 'ms-coco-2014'? Known: cifar-100, "),
    (catalog.label_set, 'coco', "unknown label set 'coco'; did you mean 'coco_80'? Known: coco_80, "),
    (catalog.weight, 'mldecoder_tresnet_l.miil_coco', "did you mean 'mldecoder_tresnet_l.miil_coco_448'? Known: "),
    (catalog.weights_of, 'stan', "unknown family 'stan'; did you mean 'stam'? Known: asl, "),
    (catalog.pretrained_cfgs, 'ml_decoder', "unknown family 'ml_decoder'; did you mean 'mldecoder'? Known: "),
    (catalog.weight, 'qqq', "unknown weights 'qqq'; Known: "),
])
def test_an_unknown_name_is_answered_with_the_nearest(look_up, name, message):
    with pytest.raises(CatalogError, match=re.escape(message)):
        look_up(name)


def test_find_takes_shell_patterns():
    assert [entry.name for entry in catalog.find('mldecoder_*.miil_coco_*')] == [
        'mldecoder_tresnet_m.miil_coco_224', 'mldecoder_tresnet_l.miil_coco_448', 'mldecoder_tresnet_xl.miil_coco_640']
    assert {entry.family for entry in catalog.find('*coco*')} == {'asl', 'mldecoder'}
    assert len(catalog.find('*')) == len(catalog.weights())
    assert catalog.find('MLDECODER*') == ()


def test_name_architecture_tag_and_file():
    entry = catalog.weight('stam_16.miil_k400')
    assert (entry.architecture, entry.tag, entry.file_name) == ('stam_16', 'miil_k400', 'stam_16.pth')


@pytest.mark.parametrize('file', sorted(FOLDER.glob('*.py')), ids=lambda file: file.name)
def test_it_needs_the_standard_library_only(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported |= {node.module}
    strangers = {
        name for name in imported if name.partition('.')[0] not in sys.stdlib_module_names
        and name not in ('timm_miil._checks', 'timm_miil._errors') and not name.startswith('timm_miil.catalog')}
    assert strangers == set()


def test_the_wheel_has_every_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith('timm_miil/catalog/')}
    files = {path.relative_to(FOLDER.parent.parent).as_posix() for path in FOLDER.rglob('*') if path.is_file()}
    assert packed == {name for name in files if '__pycache__' not in name}


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(catalog) == (0, 5)


def test_data_sets_are_those_of_the_weights():
    used = {entry.dataset for entry in catalog.weights().values()}
    used |= {metric.dataset for entry in catalog.weights().values() for metric in entry.metrics if metric.setting}
    assert used == set(catalog.data_sets())
    assert {name: data_set.hub_id for name, data_set in catalog.data_sets().items() if data_set.hub_id} == {
        'imagenet-1k': 'ILSVRC/imagenet-1k', 'cifar-100': 'uoft-cs/cifar100'}
    for data_set in catalog.data_sets().values():
        assert all(sentence.endswith('.') and sentence[0].isupper() for sentence in data_set.limits), data_set.name
        assert not data_set.contents.endswith('.')


def test_what_weights_were_fine_tuned_from_is_in_the_catalogue():
    bases = {entry.name: entry.base for entry in catalog.weights().values() if entry.base}
    assert len(bases) == 5
    for name, base in bases.items():
        assert catalog.weight(base).architecture == catalog.weight(name).architecture
        assert catalog.weight(base).dataset == 'imagenet-21k-p' and catalog.weight(name).dataset == 'imagenet-1k'


def test_what_may_be_published_and_why_not():
    reasons = {entry.name: entry.why_not_publish for entry in catalog.weights().values()}
    assert {name for name, entry in catalog.weights().items() if entry.may_be_published} == {
        name for name, reason in reasons.items() if reason is None}
    hosted = {name for name, entry in catalog.weights().items() if entry.hf_hub_id}
    assert {name for name, reason in reasons.items() if reason and name not in hosted} == {
        'peta_album.miil_ml_cufed', 'miil_mobilenasnet.miil_heaviest_in1k', 'miil_mobilenasnet.miil_one_shot_in1k'}
    assert reasons['peta_album.miil_ml_cufed'] == (
        'Alibaba-MIIL/PETA states no licence, which leaves redistribution to its authors alone')
    assert reasons['tresnet_m.miil_in1k'] == (
        'timm has them on the Hub already, as timm/tresnet_m.miil_in1k, and nothing is hosted twice')
    assert 'no network of the timm kind' in reasons['miil_mobilenasnet.miil_heaviest_in1k']
    ours = dataclasses.replace(catalog.weight('tresnet_m.miil_coco_224'), hf_hub_id='lab/tresnet_m.miil_coco_224')
    assert ours.may_be_published


def test_classes_that_exclude_each_other_are_told_from_those_that_do_not():
    kinds = {entry.dataset: set() for entry in catalog.weights().values()}
    for entry in catalog.weights().values():
        kinds[entry.dataset].add(entry.problem_type)
    both = set(catalog.PROBLEM_TYPES)
    assert {name for name, kind in kinds.items() if kind == both} == {'imagenet-21k'}    # USI trained both ways
    assert {name for name, kind in kinds.items() if kind == {'multi_label_classification'}} == {
        'ms-coco-2014', 'openimages-v6', 'pascal-voc-2007', 'nus-wide', 'ml-cufed', 'scenes'}


def test_notes_are_sentences():
    for entry in catalog.weights().values():
        for sentence in (*entry.notes, *entry.remarks, *entry.conversion):
            assert sentence.endswith('.') and (sentence[0].isupper() or sentence.startswith('timm')), sentence
