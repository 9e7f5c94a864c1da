"""What cards are made of: a YAML head, Markdown that shows foreign words and no more, code that runs, a seal."""
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm_miil._checks import cut

__all__ = [
    'GAPS', 'as_code', 'as_text', 'assemble', 'code_spans', 'embedding_code', 'is_sealed', 'loading_code',
    'prediction_code', 'quoted_gaps', 'vector_code',
]

LABEL_CHARS = 80
# Words that a template leaves where a fact is missing.
GAPS = re.compile(
    r'(?i:\[more information needed\]|lorem ipsum|<fill[^>]*>)|\{\{.*?\}\}|\{\}|\b(?:TODO|TBD|FIXME|XXX|None|nan)\b')
CODE_SPAN = re.compile(r'(`[^`]*`)')
# What would begin a block of Markdown at the start of a paragraph: a heading, a list, a quotation, a fence, a rule.
BLOCK_START = re.compile(r'[#>+*=~|:_-]')

# The last line of a card that a program wrote; who edits the text breaks it, so that a push leaves it alone.
_SEAL = '<!-- written by timm-miil, {digest} -->\n'
_SEALED = re.compile(r'(.*)\n<!-- written by timm-miil, ([0-9a-f]{16}) -->\s*', re.DOTALL)


def assemble(head: Mapping[str, Any], body: Sequence[str]) -> str:
    """A card of a head and the blocks of its text, with its seal; equal arguments give equal bytes."""
    lines = ''.join(f'{line}\n' for line in _yaml(dict(head)))
    card = f'---\n{lines}---\n\n' + '\n\n'.join(body) + '\n'
    return f'{card}\n{_SEAL.format(digest=_digest(card))}'


def is_sealed(card: str) -> bool:
    """Whether the card is as a program of this package wrote it."""
    found = _SEALED.fullmatch(card.replace('\r\n', '\n'))
    return found is not None and _digest(found[1]) == found[2]


def as_code(name: str) -> str:
    """A name that anyone may have chosen, as Markdown that shows it and does nothing else."""
    return f'`{cut(_visible(name.replace("`", chr(39))), LABEL_CHARS)}`'


def as_text(words: str) -> str:
    """Words that anyone may have written, as one paragraph of Markdown: code spans stay, nothing else has an effect."""
    line = re.sub('`+', '`', _visible(' '.join(words.split())))
    parts = CODE_SPAN.split(line)
    plain = [re.sub(r'([\\\[\]|])', r'\\\1', part).replace('&', '&amp;').replace('<', '&lt;') for part in parts[::2]]
    text = ''.join(piece for pair in zip(plain, [*parts[1::2], ''], strict=True) for piece in pair)
    return f'\\{text}' if BLOCK_START.match(text) else text


def quoted_gaps(words: str) -> str:
    """Words with those of `GAPS` as code: what somebody calls 'TODO' is a name, and not a gap in the card."""
    return ''.join(
        part if part.startswith('`') else GAPS.sub(lambda found: f'`{found[0]}`', part)
        for part in CODE_SPAN.split(words))


def code_spans(text: str) -> list[str]:
    """The pieces of a line: every second one is a code span."""
    return CODE_SPAN.split(text)


def prediction_code(source: str, *, is_ours: bool, is_multi_label: bool, names: str, index: str) -> str:
    """Python that names what a picture shows.

    Args:
        source: What `timm.create_model` takes.
        is_ours: Whether timm knows it only once this package is imported.
        is_multi_label: Whether the classes are independent.
        names: An expression for the classes' names.
        index: What gives a name, such as '[index]'.
    """
    show = f'''\
    confidences = model(transform(picture).unsqueeze(0)).sigmoid()[0]

names = {names}
for index, confidence in enumerate(confidences.tolist()):
    if confidence >= 0.5:
        print(f'{{names{index}}}: {{confidence:.2f}}')
''' if is_multi_label else f'''\
    confidences = model(transform(picture).unsqueeze(0)).softmax(-1)[0]

names = {names}
best = confidences.topk(min(5, len(confidences)))
for index, confidence in zip(best.indices.tolist(), best.values.tolist()):
    print(f'{{names{index}}}: {{confidence:.2f}}')
'''
    return loading_code(source, is_ours=is_ours) + show


def embedding_code(source: str, *, is_ours: bool) -> str:
    """Python that turns a picture into a vector."""
    return loading_code(source, is_ours=is_ours) + '''\
    features = model.forward_features(transform(picture).unsqueeze(0))
    embedding = model.forward_head(features, pre_logits=True)[0]
print(embedding.shape)
'''


def vector_code(source: str, *, is_ours: bool) -> str:
    """Python that turns a picture into the vector that a network of embeddings gives."""
    return loading_code(source, is_ours=is_ours) + '''\
    embedding = model(transform(picture).unsqueeze(0))[0]
print(embedding.shape)
'''


def loading_code(source: str, *, is_ours: bool) -> str:
    """The beginning of both: a model and a picture, up to a block that records no gradients."""
    ours = 'import timm_miil  # adds our networks and weights to timm\n' if is_ours else ''
    return f'''\
{ours}import timm
import torch
from PIL import Image

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

picture = Image.open('picture.png').convert('RGB')
with torch.no_grad():
'''


def _visible(words: str) -> str:
    """The words with everything that is not printed written as an escape."""
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape', 'backslashreplace').decode() for char in words)


def _digest(card: str) -> str:
    return hashlib.sha256(card.rstrip().encode()).hexdigest()[:16]


def _yaml(value: Any, indent: str = '') -> list[str]:
    """Lines of YAML in block style; its own writer, as those of libraries change their layout between releases."""
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            inner = _yaml(item, indent + '  ')
            is_nested = isinstance(item, dict | list)
            lines += [f'{indent}{key}:', *inner] if is_nested else [f'{indent}{key}: {inner[0]}']
        return lines
    if isinstance(value, list):
        lines = []
        for item in value:
            first, *rest = _yaml(item, indent + '  ')
            lines += [f'{indent}- {first.removeprefix(indent + "  ")}', *rest]
        return lines
    # JSON's scalars are YAML's, but for characters that YAML wants escaped.
    return [''.join(map(_yaml_char, json.dumps(value, ensure_ascii=False)))]


def _yaml_char(char: str) -> str:
    if char.isprintable():
        return char
    return '\\ufffd' if 0xd800 <= ord(char) <= 0xdfff else f'\\U{ord(char):08x}'
