"""Every row of the table of published files is in the catalogue, fact by fact, and nothing else published is."""
import csv
import re
from pathlib import Path

import pytest
import timm
from timm.models import model_entrypoint

from timm_miil import catalog

TABLE = Path(__file__).parent.parent / 'fixtures' / 'catalog' / 'weights_catalog.csv'
with TABLE.open(encoding='utf-8', newline='') as file:
    ROWS = {row['source_url']: row for row in csv.DictReader(file)}

FAMILY_OF_REPOSITORY = {'TResNet': 'tresnet', 'ASL': 'asl'}      # the table has both under one name
FAMILY_OF_ROWS = {'ml_decoder': 'mldecoder', 'zs_sdl': 'sdl', 'shkd': 'headsharing'}


def published() -> dict[str | None, catalog.Weights]:
    return {entry.url: entry for entry in catalog.weights().values() if entry.url}


def in_timm(architecture: str) -> bool:
    return timm.is_model(architecture) and model_entrypoint(architecture).__module__.startswith('timm.')


def before_remark(cell: str) -> str:
    """'tresnet_l (v2 layout)' -> 'tresnet_l'; the remark belongs to the notes."""
    return cell.partition(' (')[0]


# The table leaves these cells empty; the repository's loader of the data set has the numbers.
CIFAR_NORMALISATION = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def numbers(cell: str) -> tuple[float, ...] | None:
    return tuple(map(float, cell.split())) or None


def test_the_table_has_89_files_and_the_catalogue_the_same():
    assert len(ROWS) == 89
    assert published().keys() == ROWS.keys()


@pytest.mark.parametrize('url', ROWS)
def test_facts_are_those_of_the_table(url):
    row, entry = ROWS[url], published()[url]
    frames, _, size = row['input_size'].rpartition('x')
    metric = (row['metric_name'].replace(' ', '_'), float(row['metric_value'])) if row['metric_value'] else None
    first = entry.metrics[0] if entry.metrics else None
    body = entry.timm.body or (entry.architecture if in_timm(entry.architecture) else 'none')

    assert {
        'family': entry.family,
        'arch': entry.source_architecture or entry.architecture,
        'timm_arch': body,
        'head': entry.head,
        'dataset': entry.dataset,
        'num_classes': entry.num_classes,
        'input_size': entry.input_size,
        'frames': entry.frames,
        'mean': entry.mean,
        'std': entry.std,
        'metric': first and (first.name, first.value),
        'source_file': entry.file_name,
        'source_repo': entry.source_repo,
        'published_in': entry.published_in,
        'licence': entry.licence,
        'arxiv': catalog.paper(entry.paper).arxiv,
    } == {
        'family': FAMILY_OF_REPOSITORY.get(
            row['source_repo'].partition('/')[2], FAMILY_OF_ROWS.get(row['family'], row['family'])),
        'arch': before_remark(row['arch']),
        'timm_arch': before_remark(row['timm_arch']),
        'head': re.match(r'fc|ml_decoder|sdl_embedding', row['head'])[0],
        'dataset': before_remark(row['dataset']),
        'num_classes': int(row['num_classes']) if row['num_classes'] else None,
        'input_size': (3, int(size), int(size)),
        'frames': int(frames) if frames else None,
        'mean': CIFAR_NORMALISATION[0] if row['family'] == 'shkd' else numbers(row['mean']),
        'std': CIFAR_NORMALISATION[1] if row['family'] == 'shkd' else numbers(row['std']),
        'metric': metric,
        'source_file': row['source_file'],
        'source_repo': row['source_repo'],
        'published_in': row['published_in'],
        'licence': None if row['repo_licence'].startswith('none') else row['repo_licence'],
        'arxiv': row['arxiv_id'],
    }
    if groups := re.fullmatch(r'ml_decoder_g(\d+)', row['head']):
        assert entry.num_groups == int(groups[1])


def kept_as_a_fact(remark: str, entry: catalog.Weights) -> bool | None:
    """Whether a remark of the table holds as a fact of the entry; None when no fact is made for it."""
    squashed = (entry.crop_mode, entry.crop_pct) == ('squash', 1.0)
    match remark.split():
        case ['metric', 'from', 'README', 'table']:
            return 'README.md' in entry.metrics[0].source
        case ['metric', 'not', 'published', 'in', 'repo']:
            return entry.metrics == ()
        case ['metric', 'taken', 'from', 'the', 'file', 'name']:
            return entry.metrics[0].source == f'file name {entry.file_name}'
        case ['eval', 'resize', '256', 'then', 'centre', 'crop', '224']:
            return (entry.crop_mode, 224 / entry.crop_pct) == ('center', 256)
        case ['eval', 'squish-resize', 'to', size]:
            return squashed and size == f'{entry.input_size[1]}x{entry.input_size[2]}'
        case ['squish', 'resize']:
            return squashed
        case ['fine-tuned', '1k', 'top1', value]:
            return any(
                (metric.name, metric.value, metric.dataset, metric.setting) ==
                ('top1', float(value), 'imagenet-1k', 'fine-tuned') for metric in entry.metrics)
        case ['timm', 'tag', 'exists']:
            return entry.timm_tag == entry.name
        case ['timm', 'tag', name] | ['also', 'timm', 'tag', name]:
            return entry.timm_tag in (name, f'{entry.architecture}.{name}')
        case ['timm', 'has', 'no', 'tag'] | ['timm', 'has', 'no', 'such', 'tag']:
            return entry.timm_tag is None
        case ['variant', variant]:
            return entry.tag == f'miil_{variant.lower()}_in1k'
        case [count, 'frames'] | [count, 'images', 'per', 'album']:
            return entry.frames == int(count)
        case ['7x300']:
            return True                                     # the rows and dimensions also stand in the notes
        case ['table', '1k', 'accuracy', value]:
            return any(f'accuracy of {value} on ImageNet-1k' in note for note in entry.notes)
        case ['third-party', 'repo']:
            return entry.url.startswith('https://github.com/') and entry.source_repo not in entry.url
        case ['normalisation', 'per', 'timm', 'tag']:
            cfg = timm.get_pretrained_cfg(entry.timm_tag)
            return (entry.mean, entry.std) == (cfg.mean, cfg.std)
    return None


def words(text: str) -> set[str]:
    """The words of remarks and of sentences made of them, however they are capitalised, quoted or ended."""
    return {word.strip('.`').lower() for word in re.findall(r"[^\s,;:()]+", text)}


@pytest.mark.parametrize('url', ROWS)
def test_no_remark_of_the_table_is_lost(url):
    row, entry = ROWS[url], published()[url]
    remarks = [remark for remark in row['notes'].split('; ') if remark]
    remarks += [found for cell in ('dataset', 'arch', 'timm_arch') for found in re.findall(r'\((.*)\)', row[cell])]
    if row['repo_licence'].startswith('none'):
        remarks += re.findall(r'\((.*)\)', row['repo_licence'])

    told = words(' '.join((*entry.notes, *entry.remarks)))
    lost = [
        remark for remark in remarks
        if kept_as_a_fact(remark, entry) is False
        or kept_as_a_fact(remark, entry) is None and not words(remark) <= told]

    assert lost == []


def test_every_published_number_has_a_source():
    metrics = [metric for entry in published().values() for metric in entry.metrics]
    with_a_number = [row for row in ROWS.values() if row['metric_value']]
    fine_tuned = [row for row in with_a_number if 'fine-tuned 1k top1' in row['notes']]
    assert len(metrics) == len(with_a_number) + len(fine_tuned)
    assert {metric.origin for metric in metrics} == {'paper'}
    assert all(re.search(r'README\.md|MODEL_ZOO\.md|file name', metric.source) for metric in metrics)


def test_names_say_source_and_data_set():
    known = {
        'imagenet-1k': 'in1k', 'imagenet-21k-p': 'in21k', 'imagenet-21k': 'in21k', 'ms-coco-2014': 'coco',
        'openimages-v6': 'openimages', 'kinetics-400': 'k400', 'cifar-100': 'cifar100',
        'stanford-cars': 'stanford_cars',
        'pascal-voc-2007': 'voc2007', 'nus-wide': 'nus_wide', 'ml-cufed': 'ml_cufed'}
    for entry in published().values():
        if entry.timm_tag is None:
            assert re.fullmatch(rf'miil_(\w+_)?{known[entry.dataset]}(_\d+)?', entry.tag), entry.name


def test_the_five_ml_decoder_files_have_the_agreed_names():
    assert tuple(catalog.weights_of('mldecoder'))[:5] == (
        'mldecoder_tresnet_m.miil_coco_224',
        'mldecoder_tresnet_l.miil_coco_448',
        'mldecoder_tresnet_xl.miil_coco_640',
        'mldecoder_tresnet_m.miil_openimages_224',
        'mldecoder_tresnet_l.miil_stanford_cars_384',
    )
