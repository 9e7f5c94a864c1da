"""Is it a card that the Hub takes, and that leaves its reader no gap?"""
import math
import re

from huggingface_hub import CardData, ModelCard

from timm_miil._checks import cut, shown
from timm_miil.hub._card_text import GAPS, code_spans

__all__ = ['check_card']

NEEDED = ('license', 'library_name', 'pipeline_tag', 'tags')
LICENCE = re.compile(r'[a-z0-9][a-z0-9.+-]*')
# The tag makes the Hub offer code of another library, which cannot load these models.
WRONG_TAGS = ('transformers',)
CODE_BLOCK = re.compile(r'^```.*?^```', re.DOTALL | re.MULTILINE)


def check_card(card: str) -> None:
    """Raise ValueError unless the Hub would take the card, show library, task, licence and results, and no gap is left.

    A gap is a word such as TODO outside code, an empty section or an empty value.
    """
    try:
        parsed = ModelCard(card)
        data = parsed.data
    except Exception as error:  # yaml's and huggingface_hub's own kinds
        raise ValueError(f'the card has no valid YAML head: {cut(str(error))}') from error
    missing = [key for key in NEEDED if not data.get(key)]
    if missing:
        raise ValueError(f'the head of the card must name {", ".join(missing)}.')
    _check_head(data)
    _check_results(data)
    _check_text(parsed.text)


def _check_head(data: CardData) -> None:
    licence, tags = data.get('license'), data.get('tags')
    if not isinstance(licence, str) or not LICENCE.fullmatch(licence):
        raise ValueError(
            f"license in the head of the card must be an identifier of the Hub's, such as 'mit', got {shown(licence)}.")
    if licence == 'other' and not (data.get('license_name') and data.get('license_link')):
        raise ValueError("license 'other' in the head of the card needs license_name and license_link beside it.")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise ValueError(f'tags in the head of the card must be a list of words, got {shown(tags)}.')
    for tag in WRONG_TAGS:
        if tag in tags or data.get('library_name') == tag:
            raise ValueError(f'the head of the card must not name {tag}, which cannot load the model; remove it.')


def _check_results(data: CardData) -> None:
    for result in data.get('eval_results') or []:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f'{result.metric_type} in model-index of the card must be a number, got {shown(value)}.')


def _check_text(text: str) -> None:
    prose = CODE_BLOCK.sub('code', text)
    if not prose.strip():
        raise ValueError('the card has a head and no text.')
    for line in prose.splitlines():
        plain = ' '.join(code_spans(line)[::2])
        if found := GAPS.search(plain):
            raise ValueError(f'the card has a gap, {found[0]!r}, in {shown(line.strip())}; fill it in.')
        if re.match(r'- \*\*[^*]+:\*\*\s*$', line):
            raise ValueError(f'the card has a gap at the end of {shown(line.strip())}; fill it in.')
    headings = re.findall(r'^(#+) (.*)\n+(?=(#+) |\Z)', prose, re.MULTILINE)
    empty = [title for depth, title, following in headings if not following or len(following) <= len(depth)]
    if empty:
        raise ValueError(f'the section {shown(empty[0])} of the card is empty; fill it in or remove it.')
