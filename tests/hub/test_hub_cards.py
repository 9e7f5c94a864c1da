"""The cards of the catalogue: committed as the template makes them, true to the catalogue, and their code runs."""
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import get_pretrained_cfg, is_model

from server import run_hub  # pytest puts this folder on the path
from timm_miil import catalog
from timm_miil.cli.main import main
from timm_miil.hub.card import catalog_card, check_card, is_sealed
from timm_miil.hub.cards import check_cards, write_cards
from timm_miil.hub.folder import write_model_folder
from timm_miil.models.published import Network

CHECKOUT = Path(__file__).parent.parent.parent
NAMES = tuple(catalog.weights())
CARDS = {name: catalog_card(name) for name in NAMES}
HUB_METRICS = {'accuracy': 'top1'}
LICENCES = {'Apache-2.0': 'apache-2.0', 'MIT': 'mit', 'BSD-2-Clause': 'bsd-2-clause', None: 'unknown'}


def blocks(card: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', card, re.DOTALL | re.MULTILINE)


def section(card: str, title: str) -> str:
    [found] = re.findall(rf'^## {title}\n(.*?)(?=^## |\Z)', card, re.DOTALL | re.MULTILINE)
    return found


# ---- the files


def test_the_committed_cards_are_what_the_catalogue_says():
    assert check_cards(CHECKOUT / 'hub_cards') == ()
    assert len(list((CHECKOUT / 'hub_cards').iterdir())) == len(NAMES) >= 97


@pytest.fixture
def rendered(monkeypatch):
    """The cards that were rendered above, instead of once more."""
    monkeypatch.setattr('timm_miil.hub.cards.catalog_card', CARDS.__getitem__)


def test_the_command_writes_what_differs_and_checks_the_rest(rendered, tmp_path, capsys):
    folder, name = tmp_path / 'new' / 'cards', 'resnet50.miil_in21k.md'
    assert main(['cards', str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES) == len(list(folder.iterdir()))
    assert (folder / name).read_bytes() == CARDS['resnet50.miil_in21k'].encode()
    assert main(['cards', str(folder), '--check']) == 0
    assert 'all cards are what the catalogue says' in capsys.readouterr().out

    (folder / name).write_text(CARDS['resnet50.miil_in21k'].replace('\n', '\r\n'), newline='')
    (folder / 'tresnet_m.miil_in1k.md').unlink()
    (folder / 'other.md').write_text('mine')
    kept = (folder / 'tresnet_l.miil_in1k.md').stat().st_mtime_ns
    assert main(['cards', str(folder), '--check']) == 1
    assert capsys.readouterr().out.splitlines() == [
        f'{folder}/{name}: is not what the catalogue says', f'{folder}/tresnet_m.miil_in1k.md: is not there',
        f'{folder}/other.md: is of no weights in the catalogue']
    assert write_cards(folder) == (name, 'tresnet_m.miil_in1k.md')
    assert (folder / 'tresnet_l.miil_in1k.md').stat().st_mtime_ns == kept
    assert (folder / 'other.md').read_text() == 'mine'
    assert check_cards(folder) == ('other.md: is of no weights in the catalogue',)


def test_a_folder_that_is_not_there_has_no_cards(rendered, tmp_path):
    assert check_cards(tmp_path / 'none')[0].endswith('.md: is not there')
    assert not (tmp_path / 'none').exists()


# ---- the head


@pytest.mark.parametrize('name', NAMES)
def test_the_head_is_true_to_the_catalogue(name):
    entry, card = catalog.weight(name), CARDS[name]
    data = ModelCard(card).data
    check_card(card)
    assert is_sealed(card)
    assert ModelCard(f'---\n{data.to_yaml()}\n---\n').data.to_dict() == data.to_dict()
    assert data.license == LICENCES[entry.licence]
    assert data.library_name == 'timm' and data.model_name in (name, None)
    kind = 'multi-label' if entry.problem_type.startswith('multi') else 'single-label'
    assert data.tags == [
        'timm', 'timm-miil', data.pipeline_tag, f'{kind}-classification', f'arxiv:{catalog.paper(entry.paper).arxiv}']
    assert data.get('datasets') == ([hub_id] if (hub_id := catalog.data_set(entry.dataset).hub_id) else None)

    own = {metric.name: metric for metric in entry.metrics if metric.setting is None}
    results = {HUB_METRICS.get(result.metric_type, result.metric_type): result for result in data.eval_results or ()}
    assert {key: result.metric_value for key, result in results.items()} == {
        key: metric.value for key, metric in own.items()}
    for key, result in results.items():
        assert result.metric_args['origin'] == own[key].origin
        assert result.source_name == own[key].source and result.metric_args.get('command') == own[key].command
        assert (result.source_url or '').startswith('https://github.com/') == (own[key].origin == 'paper')


def test_tasks_are_those_of_the_hub():
    tasks = {name: ModelCard(card).data.pipeline_tag for name, card in CARDS.items()}
    odd = {name: task for name, task in tasks.items() if task != 'image-classification'}
    assert odd == {
        **{f'stam_{frames}.miil_k400': 'video-classification' for frames in (8, 16, 32, 64)},
        'miil_sdl_tresnet_m.miil_nus_wide_224': 'zero-shot-image-classification'}


def test_a_source_is_the_page_of_the_repository_that_it_names():
    [result] = ModelCard(CARDS['tresnet_m.miil_in21k_ft_in1k']).data.eval_results
    assert (result.source_name, result.source_url) == (
        'table in MODEL_ZOO.md of Alibaba-MIIL/ImageNet21K', 'https://github.com/Alibaba-MIIL/ImageNet21K')
    [result] = ModelCard(CARDS['miil_tresnet_v2_l_slope1e6.miil_stanford_cars_368']).data.eval_results
    assert (result.source_name, result.source_url) == (
        'file name stanford_cars_tresnet-l-v2_96_27.pth', 'https://github.com/Alibaba-MIIL/TResNet')


def test_base_models_are_repositories_that_timm_has():
    bases = {name: base for name, card in CARDS.items() for base in ModelCard(card).data.get('base_model') or ()}
    assert bases == {
        name: f'timm/{base}' for name, base in {
            'tresnet_m.miil_in21k_ft_in1k': 'tresnet_m.miil_in21k',
            'mixer_b16_224.miil_in21k_ft_in1k': 'mixer_b16_224.miil_in21k',
            'mobilenetv3_large_100.miil_in21k_ft_in1k': 'mobilenetv3_large_100.miil_in21k',
            'vit_base_patch16_224_miil.in21k_ft_in1k': 'vit_base_patch16_224_miil.in21k',
            'tresnet_v2_l.miil_in21k_ft_in1k': 'tresnet_v2_l.miil_in21k'}.items()}
    for base in bases.values():
        assert get_pretrained_cfg(base.removeprefix('timm/')).hf_hub_id == base


# ---- the text


@pytest.mark.parametrize('name', NAMES)
def test_the_text_says_what_the_catalogue_knows(name):
    entry, card = catalog.weight(name), CARDS[name]
    titles = re.findall(r'^## (.*)$', card, re.MULTILINE)
    assert [title for title in titles if title not in ('Remarks on the file', 'Conversion')] == [
        'Model details', 'Usage', 'Intended use', 'Limits', 'Results', 'Citation']
    paper = catalog.paper(entry.paper)
    facts = [f'# Model card for {name}\n', paper.bibtex, f'https://arxiv.org/abs/{paper.arxiv}']
    facts += [entry.url, f'`{entry.published_in}` of [{entry.source_repo}]'] if entry.url else []
    facts += [f'https://huggingface.co/{entry.hf_hub_id}'] if entry.hf_hub_id else []
    facts += [f'{metric.value:.2f}' for metric in entry.metrics]
    facts += [f'**Parameters:** {entry.num_params / 1e6:.2f} M'] if entry.num_params else []
    facts += catalog.data_set(entry.dataset).limits
    assert [fact for fact in facts if fact not in card] == []
    assert '\n\n\n' not in card and '  \n' not in card
    prose = re.sub(r'```.*?```|`[^`]*`', '', card, flags=re.DOTALL)
    assert not re.search(r'\bNone\b|\bTODO\b|\(None|\bnan\b|\{|\}', prose.partition('## Citation')[0])


def test_preprocessing_is_in_words():
    def words(name: str) -> str:
        return re.search(r'^- \*\*Preprocessing:\*\* (.*)$', CARDS[name], re.MULTILINE)[1]

    assert words('tresnet_l.miil_coco_448') == (
        'resized to 448 x 448 pixels whatever its shape, without a crop (bilinear); values divided by 255 and not '
        'normalised any further')
    assert words('hardcorenas_a.miil_red_in1k') == (
        'shorter side resized to 256 pixels, then the middle 224 x 224 cut out (bilinear); values divided by 255, then '
        'normalised with mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225)')
    assert words('resnet50.miil_multi_label_in21k') == 'not published: the code uses what timm assumes for the network'


def test_what_is_not_known_is_said():
    card = CARDS['resnet50.miil_single_label_in21k']
    assert '**Classes:** as many as the file has: the number is not published, but is 11221 or 10450' in card
    assert '**Parameters:** not known until the file is opened, as they depend on its number of classes' in card
    assert 'as neither the sizes of the network nor' in CARDS['miil_levit_768.miil_single_label_in21k']
    assert 'only the file tells which it holds' in CARDS['tresnet_l.miil_openimages_448']
    assert 'No number for these very weights is published' in section(card, 'Results')
    assert 'The preprocessing is not published' in section(card, 'Limits')
    assert '`timm-miil convert resnet50.miil_single_label_in21k -o model`' in section(card, 'Usage')


@pytest.mark.parametrize('name', NAMES)
def test_what_maintainers_note_is_not_told_to_readers(name):
    entry, card = catalog.weight(name), CARDS[name]
    assert [remark for remark in entry.remarks if remark in card] == []
    assert not re.search(
        r'as converting does|must detect|inspect the|\brepo\b|block strings|pip install timm-miil', card)
    for phrase in dataclasses.astuple(entry.unsettled):
        assert phrase is None or phrase in card


def test_what_the_file_has_settled_is_not_called_open():
    for name, network, head in (
            ('tresnet_l.miil_openimages_448', Network('miil_tresnet_l_bottleneck', num_classes=9605), 'two linear'),
            ('tresnet_l.miil_openimages_448', Network('tresnet_l', num_classes=9605), 'one linear layer on pooled'),
            ('tresnet_l.miil_openimages_448', Network('mldecoder_tresnet_l', {'num_groups': 7}, 9605), 'ML-Decoder:'),
            ('tresnet_v2_l.miil_csl_openimages_224', Network('tresnet_v2_l', num_classes=9605), 'one linear layer'),
            ('resnet50.miil_multi_label_in21k', Network('resnet50', num_classes=10450), 'one linear layer')):
        card = catalog_card(name, network=network)
        assert f'**Head:** {head}' in card and re.search(r'\*\*Parameters:\*\* [\d.]+ M\n', card)
        phrases = dataclasses.astuple(catalog.weight(name).unsettled)
        assert any(phrases) and [phrase for phrase in phrases if phrase and phrase in card] == []


def test_code_and_words_agree_on_the_vectors_of_words():
    card = CARDS['miil_sdl_tresnet_m.miil_nus_wide_224']
    assert 'a matrix of 300 x 7, whose 7 columns are' in card and '.reshape(300, -1)' in card and '7 rows' not in card


def test_a_number_of_a_network_trained_further_is_not_these_weights_own():
    card = CARDS['resnet50.miil_in21k']
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [75.6]
    assert 'fine-tuned from them on ImageNet-1k (ILSVRC 2012): 82.00' in section(card, 'Results')


def test_whose_weights_nobody_may_pass_on_is_told():
    assert 'must not be published again' in CARDS['peta_album.miil_ml_cufed']
    assert {name for name, card in CARDS.items() if 'must not be published again' in card} == {
        'peta_album.miil_ml_cufed'}
    assert {name for name in NAMES if 'nothing is hosted a second time' in CARDS[name]} == {
        name for name in NAMES if catalog.weight(name).hf_hub_id}


@pytest.mark.parametrize('name', NAMES)
def test_what_converting_changes_is_told_where_something_is_converted(name):
    entry, card = catalog.weight(name), CARDS[name]
    told = '## Conversion' in card
    assert told == (entry.url is not None and entry.hf_hub_id is None and is_model(entry.architecture))
    if told:
        assert all(sentence in section(card, 'Conversion') for sentence in entry.conversion)


# ---- the card of a repository


def test_a_repositorys_card_is_of_its_file():
    name, labels = 'tresnet_l.miil_openimages_448', [f'thing {number}' for number in range(9605)]
    network = Network('miil_tresnet_l_bottleneck', num_classes=9605)
    card = catalog_card(name, repo_id='lab/things', network=network, label_names=labels)
    assert '**Architecture:** `miil_tresnet_l_bottleneck` of timm-miil; the catalogue calls it `tresnet_l`' in card
    assert '**Parameters:** 59.73 M' in card and '`thing 11`, and 9593 more in `config.json`' in card
    assert {re.search(r"create_model\('(.*?)'", block)[1] for block in blocks(card)} == {'hf-hub:lab/things'}
    assert "names = model.pretrained_cfg['label_names']" in card and 'made these files of the original file' in card
    assert catalog_card(name, repo_id='lab/things', network=network, label_names=labels) == card

    folder = catalog_card(name, network=Network('mldecoder_tresnet_m', {'num_groups': 7}, 9605))
    assert '`mldecoder_tresnet_m` of timm-miil with `num_groups=7`' in folder
    assert "timm.create_model('tresnet_l.miil_openimages_448', pretrained=True)" in folder


SHA = 'd52c3a06' + '0' * 56


def converted(source_sha256: str | None, source_name: str | None = None, **changes: object) -> str:
    """A card of a file of BINAS-A, whose name begins its checksum."""
    entry = dataclasses.replace(catalog.weight('miil_binas_a.miil_in1k'), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, 'weight', lambda name: entry)
        return catalog_card(
            entry.name, repo_id='lab/x', network=Network('miil_binas_a', num_classes=1000),
            source_sha256=source_sha256, source_name=source_name)


def test_a_converted_card_says_of_which_file_it_is():
    url, doubt = catalog.weight('miil_binas_a.miil_in1k').url, 'from a file that was given as that one'
    plain = converted(None)
    assert 'Converted from' not in plain and 'here they are converted' in plain

    own = converted(SHA, 'my <b>`file.pth')
    assert f"- **Converted from:** `my <b>'file.pth`, a file with the SHA-256 `{SHA}`, which the catalogue does" in own
    assert 'it begins as the name of the published file says' in own and doubt in own and own == converted(
        SHA, 'my <b>`file.pth')
    assert 'by its name, that of the published file begins with `d52c3a06`' in converted('e' * 64)
    assert 'as it has none to compare it with' in converted('e' * 64, url='https://x.org/a.pth')

    loaded = converted(SHA, url)
    assert 'that file, as it was downloaded from there, with the SHA-256' in loaded and doubt not in loaded

    known = converted(SHA, 'file.pth', sha256=SHA)
    assert 'which the catalogue knows as that of the published file' in known and doubt not in known
    assert ModelCard(known).data.eval_results

    other = converted('e' * 64, url, sha256=SHA)
    assert 'was converted from another file than that' in other and 'which is not that of the published file' in other
    assert 'the results below need not be its own' in section(other, 'Limits')
    assert not ModelCard(other).data.eval_results


def test_classes_of_imagenet_are_told_in_words():
    info = timm.data.ImageNetInfo('imagenet-1k')
    for names in (None, info.label_names()):
        card = catalog_card('hardcorenas_a.miil_red_in1k', repo_id='lab/x', label_names=names)
        assert '**Classes:** 1000: `n01440764` (tench), `n01443537` (goldfish), ' in card
        assert "and 988 more in timm's list `imagenet-1k`" in card and "ImageNetInfo('imagenet-1k')" in blocks(card)[0]
    card = catalog_card('hardcorenas_a.miil_red_in1k', repo_id='lab/x', label_names=info.label_names()[::-1])
    assert '**Classes:** 1000: `n15075141`, ' in card and 'more in `config.json`' in card
    assert "names = model.pretrained_cfg['label_names']" in card


def test_names_of_classes_do_nothing_to_the_card():
    evil = ['<script>alert(1)</script>', 'a\nb', '[x](javascript:1)', 'tick ` tock', '\x1b[31mred', '\u202eold']
    card = catalog_card('tresnet_m.miil_coco_224', network=Network('test_resnet', num_classes=6), label_names=evil)
    [line] = [line for line in card.splitlines() if line.startswith('- **Classes:**')]
    assert line == (
        r"- **Classes:** 6: `<script>alert(1)</script>`, `a\nb`, `[x](javascript:1)`, `tick ' tock`, `\x1b[31mred`, "
        r"`\u202eold`")
    assert all(char.isprintable() or char == '\n' for char in card)


@pytest.mark.parametrize(('name', 'facts', 'message'), [
    ('tresnet_m.miil_coco', {}, "unknown weights 'tresnet_m.miil_coco'; did you mean"),
    ('tresnet_m.miil_coco_224', {'label_names': ['a']}, 'one name a class, got 1 for the 80 classes of tresnet_m.miil'),
    ('resnet50.miil_single_label_in21k', {'label_names': ['a']}, 'got 1 for the unknown classes'),
    ('tresnet_m.miil_coco_224', {'repo_id': 'lab/x', 'source_sha256': 'E' * 64}, 'must be 64 hexadecimal digits in'),
    ('tresnet_m.miil_coco_224', {'source_sha256': 'e' * 64}, 'of a file that was converted: give network or repo_id'),
    ('peta_album.miil_ml_cufed', {'repo_id': 'lab/x'}, 'peta_album.miil_ml_cufed must not be published: Alibaba-MIIL/'),
    ('tresnet_m.miil_in1k', {'repo_id': 'lab/x'}, 'must not be published: timm has them on the Hub already'),
])
def test_cards_that_would_be_wrong_are_refused(name, facts, message):
    with pytest.raises(ValueError, match=message):
        catalog_card(name, **facts)


# ---- the code


# Entry, a small network in the place of its own, and whether the code works with timm alone. `LOCAL` is loaded from a
# folder, those without a network by their name, and all others from a Hub.
LOCAL = 'resnet50.miil_single_label_in21k'
SMALL_DECODER = {
    'backbone': 'resnet10t', 'channels': (8, 8, 16, 16), 'stem_width': 8, 'embed_dim': 16, 'num_heads': 2,
    'feedforward_dim': 32}
RUN = (
    ('hardcorenas_a.miil_red_in1k', Network('test_efficientnet', num_classes=1000), True),
    ('resnet50.miil_in21k', Network('test_resnet', num_classes=11221), True),
    ('tresnet_m.miil_coco_224', Network('test_resnet', num_classes=80), True),
    (LOCAL, Network('test_resnet', num_classes=4), True),
    ('miil_sdl_tresnet_m.miil_nus_wide_224', Network('test_resnet', num_classes=2100), True),
    ('miil_resnet8x4.miil_student_cifar100', Network('miil_resnet8x4', num_classes=100), False),
    ('mldecoder_tresnet_m.miil_coco_224', Network('mldecoder', SMALL_DECODER, 80), False),
    ('mldecoder_scenes.miil_scenes', None, False),
    ('mldecoder_zero_shot_scenes.miil_scenes', None, False),
)
RUNNER = """
import json, sys
for name, code in json.load(open('code.json')):
    print('##', name)
    exec(compile(code, name, 'exec'), {'__name__': '__main__'})
    print('#', 'timm_miil' in sys.modules)
"""


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    """What the code of some cards prints, block by block, by name of the card; one process runs all, as a reader."""
    folder = tmp_path_factory.mktemp('reader')
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'picture.png')
    code = []
    with run_hub() as hub:
        for name, network, _ in RUN:
            card = CARDS[name]
            if network is not None:
                repo_id = None if name == LOCAL else f'lab/{name}'
                names = catalog.weight(name).labels
                labels = list(catalog.label_set(names).labels) if names else None
                made = catalog_card(name, repo_id=repo_id, network=network)
                target = folder / ('model' if name == LOCAL else name)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    write_model_folder(
                        network.build().eval(), target, card=made, config={'label_names': labels} if labels else {})
                if repo_id is not None:
                    card = made
                    hub.write(repo_id, {path.name: path.read_bytes() for path in target.iterdir()})
            code += [(name, block) for block in blocks(card)]
        (folder / 'code.json').write_text(json.dumps(code))
        kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'TIMM_MIIL_'))}
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', RUNNER], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300, env={
                **kept, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(folder / 'hf'), 'HF_HUB_DISABLE_XET': '1',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'NO_PROXY': '127.0.0.1',
                'TIMM_MIIL_AUTOLOAD': '0', 'PYTHONPATH': str(CHECKOUT)})
    assert done.returncode == 0, done.stderr
    found: dict[str, list[list[str]]] = {}
    for part in done.stdout.split('## ')[1:]:
        name, *lines = part.splitlines()
        found.setdefault(name, []).append(lines)
    return found


@pytest.mark.parametrize(('name', 'needs_timm_alone'), [(name, alone) for name, _, alone in RUN])
def test_the_code_of_a_card_runs(printed, name, needs_timm_alone):
    first, second = printed[name]
    assert (first[-1], second[-1]) == (f'# {not needs_timm_alone}',) * 2
    assert re.fullmatch(r'torch\.Size\(\[\d+\]\)', second[0]) and len(second) == 2
    entry, lines = catalog.weight(name), first[:-1]
    if entry.head == 'sdl_embedding':
        assert lines == ['torch.Size([300, 7])']
        return
    labels, confidences = zip(*(line.rsplit(': ', 1) for line in lines), strict=True) if lines else ((), ())
    values = list(map(float, confidences))
    if entry.problem_type == 'multi_label_classification':
        assert set(labels) <= set(catalog.label_set(entry.labels).labels) and all(value >= 0.5 for value in values)
    else:
        assert len(lines) == (4 if name == LOCAL else 5) and values == sorted(values, reverse=True)
        known = {'hardcorenas_a.miil_red_in1k': 'imagenet-1k', 'resnet50.miil_in21k': 'imagenet-21k-miil'}
        if name in known:
            info = timm.data.ImageNetInfo(known[name])
            assert set(labels) <= {info.index_to_description(index) for index in range(info.num_classes())}
        else:
            assert all(label.isdigit() for label in labels)


@pytest.mark.parametrize('name', NAMES)
def test_the_code_of_all_cards_differs_in_import_source_and_names_only(name):
    entry, code = catalog.weight(name), blocks(CARDS[name])
    if not is_model(entry.architecture):
        assert code == [] and 'No network of timm or of timm-miil holds these weights yet' in CARDS[name]
        return
    first = code[0].splitlines()[0]
    is_stock = not entry.architecture.startswith('miil_')
    is_timms = entry.hf_hub_id is not None or 'local-dir:model' in code[0] and is_stock
    assert first == 'import timm' if is_timms else first.startswith('import timm_miil  #')
    is_multi_label = entry.problem_type == 'multi_label_classification'
    like = blocks(CARDS['tresnet_m.miil_coco_224' if is_multi_label else 'tresnet_m.miil_in1k'])
    if entry.head == 'sdl_embedding':
        assert len(code) == 2 and normal(code[1]) == normal(like[1])
    else:
        assert list(map(normal, code)) == list(map(normal, like))


def normal(code: str) -> str:
    """The code with what may differ taken out."""
    code = re.sub(r"^import timm_miil.*\n", '', code)
    code = re.sub(r"create_model\('[^']+', ", 'create_model(SOURCE, ', code)
    code = re.sub(r'^names = .*$', 'names = NAMES', code, flags=re.MULTILINE)
    return code.replace('names.index_to_description(index)', 'names[index]')
