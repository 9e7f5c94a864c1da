"""Model cards: metadata the Hub accepts, text without gaps, bytes that repeat."""
import dataclasses

import pytest
from huggingface_hub import ModelCard

from timm_miil._errors import CatalogError
from timm_miil.hub import CardFacts, CardMetric, check_card, render_card
from timm_miil.hub.card import is_sealed

FACTS = CardFacts(
    name='mldecoder.test',
    summary='A network: it "sees" things.',
    source='local-dir:model',
    licence='apache-2.0',
    architecture='mldecoder',
    num_params=1_234_567,
    input_size=(3, 64, 96),
    dataset='Things: a data set',
    dataset_id='things',
    label_names=[f'thing {number}' for number in range(14)],
    metrics=[CardMetric('mAP', 91.25, 'test'), CardMetric('mAP', 90.0, 'val')],
    training='Recipe `none`.',
    papers=['mldecoder', 'asl'],
)


def test_the_head_is_metadata_the_hub_reads():
    data = ModelCard(render_card(FACTS)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ('apache-2.0', 'timm', 'image-classification')
    assert {'timm', 'multi-label-classification'} <= set(data.tags)
    assert data.model_name == 'mldecoder.test'
    assert [(result.metric_type, result.metric_value, result.dataset_type, result.dataset_name, result.dataset_split)
            for result in data.eval_results] == [
        ('mAP', 91.25, 'things', 'Things: a data set', 'test'), ('mAP', 90.0, 'things', 'Things: a data set', 'val')]
    assert {result.task_type for result in data.eval_results} == {'image-classification'}


def test_the_head_survives_the_hubs_own_writer():
    data = ModelCard(render_card(FACTS)).data
    assert ModelCard(f'---\n{data.to_yaml()}\n---\n').data.to_dict() == data.to_dict()


def test_the_text_says_every_fact():
    text = render_card(FACTS)
    for words in (
            '# Model card for mldecoder.test', 'A network: it "sees" things.', '**Parameters:** 1.23 M',
            '**Input:** 3 x 64 x 96', '**Classes:** 14: `thing 0`, ', '`thing 11`, and 2 more in `config.json`',
            '| test | 91.25 |', '| val | 90.00 |', 'arXiv:2111.12933', '@inproceedings{asl,', 'Recipe `none`.',
            "timm.create_model('local-dir:model', pretrained=True)"):
        assert words in text
    assert text.endswith('\n') and '\n\n\n' not in text and 'None' not in text and '{' + '}' not in text


def test_names_of_labels_are_shown_and_do_nothing():
    names = ['<script>alert(1)</script>', 'a\nb', '[x](javascript:1)', 'tick ` tock', '\x1b[31mred', 'long ' * 50]
    text = render_card(dataclasses.replace(FACTS, label_names=names))
    [line] = [line for line in text.splitlines() if line.startswith('- **Classes:**')]
    assert line.startswith(
        r"- **Classes:** 6: `<script>alert(1)</script>`, `a\nb`, `[x](javascript:1)`, `tick ' tock`, `\x1b[31mred`, `")
    assert line.count('`') == 12 and len(line) < 250 and '\x1b' not in text


def test_a_card_is_sealed_until_somebody_edits_it():
    text = render_card(FACTS)
    assert is_sealed(text) and is_sealed(text.replace('\n', '\r\n')) and is_sealed(text + '\n')
    for edited in (text.replace('things', 'Things'), text + 'more', text.replace('sees', 'saw'), text[1:], '# me', ''):
        assert not is_sealed(edited)


def test_a_model_of_exclusive_classes_is_described_as_one():
    text = render_card(dataclasses.replace(FACTS, problem_type='single_label_classification', papers=[]))
    data = ModelCard(text).data
    assert 'single-label-classification' in data.tags and 'multi-label-classification' not in data.tags
    assert {result.task_name for result in data.eval_results} == {'Single-label classification'}
    assert '**Model type:** single-label image classification' in text and 'softmax(-1)[0]' in text
    assert 'Citation' not in text and 'sigmoid' not in text and 'ulti-label' not in text


def test_equal_facts_give_equal_bytes():
    assert render_card(FACTS) == render_card(dataclasses.replace(FACTS))


def test_an_unknown_paper_is_refused():
    with pytest.raises(CatalogError, match="unknown paper 'als'; did you mean 'asl'"):
        render_card(dataclasses.replace(FACTS, papers=['als']))


@pytest.mark.parametrize(('card', 'message'), [
    ('# No head', 'the head of the card must name license, library_name, pipeline_tag, tags'),
    ('---\nlicense: [\n---\n', 'the card has no valid YAML head'),
    ('---\nlicense: mit\nlibrary_name: timm\ntags: [a]\n---\n', 'the head of the card must name pipeline_tag'),
])
def test_cards_without_metadata_are_refused(card, message):
    with pytest.raises(ValueError, match=message):
        check_card(card)


def test_an_empty_licence_is_refused():
    with pytest.raises(ValueError, match='must name license'):
        render_card(dataclasses.replace(FACTS, licence=''))
