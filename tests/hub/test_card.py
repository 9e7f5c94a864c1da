"""Model cards: metadata the Hub accepts, text without gaps, bytes that repeat."""
import dataclasses
import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

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


def outside_code(text: str) -> str:
    """Markdown without its fenced blocks, code spans (CommonMark 0.31, 6.1) and escaped characters."""
    lines = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE).splitlines()
    return '\n'.join(map(outside_spans, lines))     # each is a paragraph, heading, item or row: no span goes further


def outside_spans(text: str) -> str:
    kept, at = [], 0
    while at < len(text):
        run = re.compile('`*').match(text, at)[0]
        if text[at] == '\\':
            at += 2
        elif run:
            closing = re.compile(f'(?<!`){run}(?!`)').search(text, at + len(run))
            at = closing.end() if closing else at + len(run)
        else:
            kept.append(text[at])
            at += 1
    return ''.join(kept)


MARKS = '`\\<>[]()!*_#-~|=&;:/a1.\n\t "\'{}\x00\x1b\x85\u2028\u202e'
HOSTILE = st.text(st.sampled_from(MARKS), max_size=30) | st.text(max_size=20)


@settings(max_examples=60)
@given(words=st.lists(HOSTILE, min_size=6, max_size=6), labels=st.lists(HOSTILE, min_size=1, max_size=4))
def test_no_fact_can_do_anything_to_the_card(words, labels):
    name, source, architecture, dataset = (f'a{word}' for word in words[:4])
    summary, training = words[4:]
    text = render_card(dataclasses.replace(
        FACTS, name=name, summary=summary, source=source, architecture=architecture, dataset=dataset,
        training=f'{training} a', label_names=labels, metrics=[CardMetric('mAP', 1.0, name)]))
    plain = render_card(dataclasses.replace(FACTS, label_names=['x'], metrics=[CardMetric('mAP', 1.0, 'x')]))
    data = ModelCard(text).data
    [result] = data.eval_results
    assert (data.model_name, result.dataset_name, result.dataset_split) == (name, dataset, name)
    body = text.partition('\n---\n')[2]
    seal = body.splitlines()[-1]
    assert '<' not in outside_code(body.removesuffix(f'{seal}\n')) and is_sealed(text)
    assert all(char.isprintable() or char == '\n' for char in text)
    # Every block of the template is there, once, and none besides.
    for pattern in (r'^#+ ', r'^(?:```|~~~)', r'^[-+*>] ', r'^\| .*\d \|$', r'^(?:[-_*=] ?)+$'):
        assert len(re.findall(pattern, text, re.MULTILINE)) == len(re.findall(pattern, plain, re.MULTILINE)), pattern
    # What Markdown would take for a link is the template's own.
    assert re.findall(r'\]\(', outside_code(body)) == []


@pytest.mark.parametrize(('words', 'shown'), [
    ('# Free money', r'\# Free money'), ('~~~', r'\~~~'), ('```\nx', '` x'), ('- x', r'\- x'),
    ('> x', r'\> x'), ('---', r'\---'), ('    code', 'code'), ('| a |', r'\| a \|'), ('![a](b)', r'!\[a\](b)'),
    ('<b>', '&lt;b>'), ('&lt;', '&amp;lt;'), (r'\`<b>`', r'\\`<b>`'), ('```<b>`', '`<b>`'),
])
def test_a_paragraph_begins_no_other_block(words, shown):
    assert f'\n\n{shown}\n\n## Model details\n' in render_card(dataclasses.replace(FACTS, summary=words))


def test_half_a_character_is_replaced():
    """Names of files that are not UTF-8 reach us so."""
    data = ModelCard(render_card(dataclasses.replace(FACTS, dataset='caf\udce9', label_names=['a\udce9']))).data
    assert data.eval_results[0].dataset_name == 'caf\ufffd'


def test_what_somebody_calls_todo_is_a_name_and_no_gap():
    text = render_card(
        dataclasses.replace(FACTS, dataset='TODO', summary='Trained on None.', label_names=['TBD', 'nan']))
    assert '**Data set:** `TODO`' in text and 'Trained on `None`.' in text and '2: `TBD`, `nan`' in text


HEAD = 'license: mit\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [timm]'
RESULT = """
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: x, name: x}
    metrics: [{type: mAP, value: VALUE}]"""


def card_of(head: str = HEAD, text: str = '# A card\n\nIt is one.\n') -> str:
    return f'---\n{head}\n---\n\n{text}'


def test_a_card_that_somebody_wrote_is_taken():
    check_card(card_of())
    check_card(card_of(HEAD + RESULT.replace('VALUE', '12.5')))
    check_card(card_of(HEAD.replace('mit', 'other') + '\nlicense_name: own\nlicense_link: https://x.org/own'))
    check_card(card_of(
        text='# A\n\n`TODO` and\n\n```python\n# TODO: None\n\n## x\n```\n\n## B\n\n### C\n\ntext\n'))


@pytest.mark.parametrize(('card', 'message'), [
    ('# No head', 'the head of the card must name license, library_name, pipeline_tag, tags'),
    ('---\nlicense: [\n---\n', 'the card has no valid YAML head'),
    ('---\nlicense: mit\nlibrary_name: timm\ntags: [a]\n---\n', 'the head of the card must name pipeline_tag'),
    (card_of(HEAD.replace('mit', 'MIT License')), "an identifier of the Hub's, such as 'mit', got 'MIT License'"),
    (card_of(HEAD.replace('mit', '[mit]')), r"an identifier of the Hub's, such as 'mit', got \['mit'\]"),
    (card_of(HEAD.replace('mit', 'other')), "license 'other' .* needs license_name and license_link"),
    (card_of(HEAD.replace('[timm]', '[timm, 3]')), r"tags .* must be a list of words, got \['timm', 3\]"),
    (card_of(HEAD.replace('[timm]', '[timm, transformers]')), 'must not name transformers, which cannot load'),
    (card_of(HEAD.replace('library_name: timm', 'library_name: transformers')), 'must not name transformers'),
    (card_of(HEAD + RESULT.replace('VALUE', 'high')), "mAP in model-index of the card must be a number, got 'high'"),
    (card_of(HEAD + RESULT.replace('VALUE', '.nan')), 'mAP in model-index of the card must be a number, got nan'),
    (card_of(HEAD + '\nmodel-index: [{results: 3}]'), 'no valid YAML head'),
    (card_of(text=''), 'a head and no text'),
    (card_of(text='# A\n\nIt is TODO.'), "the card has a gap, 'TODO', in 'It is TODO.'"),
    (card_of(text='# A\n\n[More Information Needed]'), r"has a gap, '\[More Information Needed\]'"),
    (card_of(text='# A\n\n- **Data:** None\n'), "has a gap, 'None', in '- .*Data:.* None'"),
    (card_of(text='# A\n\n{{ model_summary }}\n'), 'has a gap, .*model_summary'),
    (card_of(text='# A\n\n- **Data:**\n- **More:** x\n'), 'has a gap at the end of'),
    (card_of(text='# A\n\ntext\n\n## B\n\n## C\n\ntext\n'), "the section 'B' of the card is empty"),
    (card_of(text='# A\n\ntext\n\n## B\n'), "the section 'B' of the card is empty"),
])
def test_cards_with_a_gap_or_without_metadata_are_refused(card, message):
    with pytest.raises(ValueError, match=message):
        check_card(card)


def test_an_empty_licence_is_refused():
    with pytest.raises(ValueError, match='must name license'):
        render_card(dataclasses.replace(FACTS, licence=''))
