"""`timm-miil list` and `timm-miil info` print the catalogue and the registry, nothing of their own."""
import timm
import pytest

from timm_miil import catalog
from timm_miil.cli.main import main


def lines_of(capsys, *argv: str) -> list[str]:
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert err == ''
    return out.splitlines()


# -- list ------------------------------------------------------------------------------------------------------


def test_our_architectures_are_listed_and_only_they(capsys):
    header, *lines = lines_of(capsys, 'list')
    names = [line.split()[0] for line in lines]
    assert header.split()[0] == 'architecture' and names == [
        name for name in timm.list_models() if name in names]
    assert {'mldecoder', 'mldecoder_tresnet_l', 'mldecoder_vit_base_patch16_224'} <= set(names)
    assert 'tresnet_l' not in names and all(timm.is_model(name) for name in names)
    assert all(len(line.split()) > 2 for line in lines)  # each says what it is


def test_a_pattern_selects(capsys):
    lines = lines_of(capsys, 'list', '*r_tresnet_?')
    assert [line.split()[0] for line in lines[1:]] == ['mldecoder_tresnet_l', 'mldecoder_tresnet_m']


def test_every_entry_of_the_catalogue_is_listed(capsys):
    header, *lines = lines_of(capsys, 'list', '--weights')
    assert [line.split()[0] for line in lines] == list(catalog.weights())
    starts = [header.index(column) for column in (
        'weights', 'dataset', 'classes', 'input', 'metric', 'licence', 'timm loads it as')]
    for line, entry in zip(lines, catalog.weights().values(), strict=True):
        cells = [line[start:stop].strip() for start, stop in zip(starts, [*starts[1:], None])]
        assert cells[1] == entry.dataset
        assert cells[2] == (str(entry.num_classes) if entry.num_classes else '?')
        assert cells[3].endswith('x'.join(map(str, entry.input_size)))
        assert cells[4] == (f'{entry.metrics[0].name} {entry.metrics[0].value} ({entry.metrics[0].origin})'
                            if entry.metrics else '-')
        assert cells[5] == (entry.licence or 'none stated')
        assert cells[6] == 'not yet' or cells[6] in timm.list_pretrained(cells[6])


@pytest.mark.parametrize('name, loads', [
    ('mldecoder_tresnet_l.miil_coco_448', 'mldecoder_tresnet_l.miil_coco_448'),   # registered by us
    ('tresnet_l.miil_in1k_448', 'tresnet_l.miil_in1k_448'),                       # timm's own
    ('stam_16.miil_k400', 'not yet'),
])
def test_what_loads_today_is_said(name, loads, capsys):
    [_, line] = lines_of(capsys, 'list', '--weights', name)
    assert line.endswith(f'  {loads}')


@pytest.mark.parametrize('argv, what', [(['x*'], 'architecture'), (['--weights', 'x*'], 'weights')])
def test_a_pattern_without_match_is_an_error(argv, what, capsys):
    assert main(['list', *argv]) == 2
    assert capsys.readouterr() == (
        '', f"timm-miil list: no {what} matches 'x*'; a pattern is like '*tresnet*'.\n")


# -- info ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', list(catalog.weights()))
def test_everything_known_of_weights_is_shown(name, capsys):
    entry = catalog.weights()[name]
    text = '\n'.join(lines_of(capsys, 'info', name))
    paper = catalog.paper(entry.paper)
    for fact in (
            entry.name, entry.dataset, entry.num_classes, entry.labels, entry.num_groups, entry.mean, entry.std,
            entry.interpolation, entry.crop_mode, entry.crop_pct, entry.url, entry.source_repo, entry.published_in,
            entry.source_architecture, entry.hf_hub_id,
            entry.licence or 'none stated by the authors', catalog.HEADS[entry.head], *entry.notes, *entry.remarks,
            entry.unsettled.architecture, entry.unsettled.num_params, entry.unsettled.num_classes,
            paper.title, *paper.authors, paper.venue, paper.arxiv, paper.repository, paper.bibtex):
        assert fact is None or str(fact) in text, fact
    for metric in entry.metrics:
        assert f'{metric.name} {metric.value} ({metric.origin})' in text and (metric.source or '') in text
    assert 'None' not in text


@pytest.mark.parametrize('name, ours', [('ofa_flops_595m_s', 'miil_ofa_595m'), ('binas_a', 'miil_binas_a')])
def test_a_name_that_only_the_authors_use_is_told(name, ours, capsys):
    assert main(['info', name]) == 2
    assert capsys.readouterr() == (
        '', f"timm-miil info: unknown name {name!r}; that is the authors' name of {ours!r}.\n")


def test_weights_that_load_come_with_lines_to_use_them(capsys):
    lines = lines_of(capsys, 'info', 'mldecoder_tresnet_m.miil_coco_224')
    start = lines.index('Use')
    assert lines[start + 1:start + 4] == [
        '  import timm, timm_miil',
        "  model = timm.create_model('mldecoder_tresnet_m.miil_coco_224', pretrained=True)",
        '  timm-miil predict --model mldecoder_tresnet_m.miil_coco_224 picture.jpg']


@pytest.mark.parametrize('name, use', [
    ('stam_16.miil_k400', ['  timm does not load these weights yet.']),
    ('levit_384.miil_single_label_in21k', [
        '  timm-miil convert levit_384.miil_single_label_in21k -o model  '
        '# the file alone can tell all that a network needs to know',
        "  model = timm.create_model('local-dir:model', pretrained=True)"]),
    ('stam_16', ['  Not implemented yet.']),
    ('mldecoder_resnet50', [
        '  import timm, timm_miil', "  model = timm.create_model('mldecoder_resnet50', num_classes=80)  # untrained"]),
])
def test_what_cannot_be_loaded_says_so(name, use, capsys):
    lines = lines_of(capsys, 'info', name)
    start = lines.index('Use')
    assert lines[start + 1:start + 1 + len(use)] == use


def test_an_architecture_lists_its_weights(capsys):
    lines = lines_of(capsys, 'info', 'mldecoder_tresnet_m')
    assert lines[0].split() == ['architecture', 'mldecoder_tresnet_m']
    listed = [line.split()[1] for line in lines if line.startswith('weights ')]
    assert listed == [name for name in catalog.weights() if name.startswith('mldecoder_tresnet_m.')]
    assert sum(line.startswith('@') for line in lines) == 1  # one citation a paper, not one a file


def test_an_unknown_name_leads_to_the_nearest(capsys):
    assert main(['info', 'mldecoder_tresnt_l']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith(
        "timm-miil info: unknown name 'mldecoder_tresnt_l'; did you mean 'mldecoder_tresnet_l'? Known: ")


def test_info_gives_the_generic_entry_point_its_backbone(capsys):
    assert main(['info', 'mldecoder']) == 0
    assert "timm.create_model('mldecoder', backbone='resnet50', num_classes=80)" in capsys.readouterr().out


def test_info_of_timms_own_model_says_whose_it_is(capsys):
    assert main(['info', 'resnet18']) == 2
    assert "'resnet18' is timm's own, and nothing of ours belongs to it" in capsys.readouterr().err
