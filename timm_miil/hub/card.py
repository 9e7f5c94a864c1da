"""Model cards: README.md of a model folder, with the metadata that the Hub reads."""
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from timm.models import create_model

from timm_miil import catalog
from timm_miil._checks import cut

__all__ = [
    'CARD_FILE', 'CardFacts', 'CardMetric', 'ProblemType', 'catalog_facts', 'check_card', 'is_sealed', 'render_card']

ProblemType = Literal['multi_label_classification', 'single_label_classification']

CARD_FILE = 'README.md'
NAMED_LABELS = 12
LABEL_CHARS = 80

# The last line of a card that a program wrote; who edits the text breaks it, so that a push leaves it alone.
_SEAL = '<!-- written by timm-miil, {digest} -->\n'
_SEALED = re.compile(r'(.*)\n<!-- written by timm-miil, ([0-9a-f]{16}) -->\s*', re.DOTALL)


@dataclass(frozen=True)
class CardMetric:
    """One measured number.

    Args:
        name: What is measured: a key of `timm_miil.catalog.METRICS`.
        value: In percent.
        split: Part of the data set it was measured on.
    """
    name: str
    value: float
    split: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        name: Title, usually 'architecture.tag'.
        summary: One paragraph: what it is, trained on what.
        source: What `timm.create_model` takes, such as 'mldecoder_scenes' or 'local-dir:model'.
        licence: Identifier that the Hub knows, in lower case.
        architecture: Name in timm's registry.
        num_params: Number of parameters.
        input_size: (channels, height, width).
        dataset: Name of the data set.
        dataset_id: Its short identifier.
        label_names: The classes.
        metrics: What was measured; may be empty.
        training: One paragraph: how it was trained, and the command that does it again.
        papers: Ids of the papers to cite, see `timm_miil.catalog.papers`.
        problem_type: Whether the classes are independent or exclusive.
    """
    name: str
    summary: str
    source: str
    licence: str
    architecture: str
    num_params: int
    input_size: tuple[int, int, int]
    dataset: str
    dataset_id: str
    label_names: Sequence[str]
    metrics: Sequence[CardMetric]
    training: str
    papers: Sequence[str]
    problem_type: ProblemType = 'multi_label_classification'


def render_card(facts: CardFacts) -> str:
    """The text of a card; equal facts give equal bytes.

    Raises:
        CatalogError: If a paper is unknown.
        ValueError: If the result is no valid card, such as with an empty licence.
    """
    kind = 'multi-label' if facts.problem_type == 'multi_label_classification' else 'single-label'
    head: dict[str, Any] = {
        'license': facts.licence,
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        'tags': ['timm', 'timm-miil', 'image-classification', f'{kind}-classification'],
    }
    results: list[str] = []
    if facts.metrics:
        head['model-index'] = [{
            'name': facts.name,
            'results': [{
                'task': {'type': 'image-classification', 'name': f'{kind.capitalize()} classification'},
                'dataset': {'type': facts.dataset_id, 'name': facts.dataset, 'split': metric.split},
                'metrics': [{'type': metric.name, 'value': metric.value, 'name': catalog.METRICS[metric.name]}],
            } for metric in facts.metrics],
        }]
        results = ['## Results', '\n'.join([
            '| metric | split | value |', '|---|---|---|',
            *(f'| {catalog.METRICS[metric.name]} | {metric.split} | {metric.value:.2f} |' for metric in facts.metrics),
        ])]
    papers = [catalog.paper(id) for id in facts.papers]
    channels, height, width = facts.input_size
    labels = ', '.join(map(_as_code, facts.label_names[:NAMED_LABELS]))
    if len(facts.label_names) > NAMED_LABELS:
        labels += f', and {len(facts.label_names) - NAMED_LABELS} more in `config.json`'
    body = [
        f'# Model card for {facts.name}',
        facts.summary,
        '## Model details',
        '\n'.join([
            f'- **Model type:** {kind} image classification',
            f'- **Architecture:** `{facts.architecture}`',
            f'- **Parameters:** {facts.num_params / 1e6:.2f} M',
            f'- **Input:** {channels} x {height} x {width}',
            f'- **Data set:** {facts.dataset}',
            f'- **Classes:** {len(facts.label_names)}: {labels}',
            *(f'- **Paper:** {paper.title}' + (f', arXiv:{paper.arxiv}' if paper.arxiv else '') for paper in papers),
        ]),
        *results,
        '## Usage',
        f'```python\n{_usage(facts.source, facts.problem_type)}```',
        '## Training',
        facts.training,
        *(['## Citation'] if papers else []),
        *(f'```bibtex\n{paper.bibtex}\n```' for paper in papers),
    ]
    card = '---\n' + ''.join(f'{line}\n' for line in _yaml(head)) + '---\n\n' + '\n\n'.join(body) + '\n'
    check_card(card)
    return f'{card}\n{_SEAL.format(digest=_digest(card))}'


def catalog_facts(name: str) -> CardFacts:
    """What the catalogue knows of weights that we measured, as a card says it.

    Args:
        name: 'architecture.tag' of an entry with label set, licence and at least one measured metric.

    Raises:
        CatalogError: If there is no such entry.
        ValueError: If the entry lacks what a card needs.
    """
    entry = catalog.weight(name)
    measured = [metric for metric in entry.metrics if metric.origin == 'measured']
    if entry.labels is None or entry.licence is None or not measured:
        raise ValueError(f'{name} must have labels, a licence and a measured metric for this card; it lacks one.')
    with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        model = create_model(name, pretrained=False)
    return CardFacts(
        name=name,
        summary=' '.join(entry.notes),
        source=entry.architecture,
        licence=entry.licence.lower(),
        architecture=entry.architecture,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        input_size=entry.input_size,
        dataset=entry.dataset,
        dataset_id=entry.dataset,
        label_names=catalog.label_set(entry.labels).labels,
        metrics=[CardMetric(metric.name, metric.value, 'test') for metric in measured],
        training=f'`{measured[0].command}` makes the data, trains and measures again what was measured here on '
                 f'{measured[0].date} ({measured[0].hardware}).',
        papers=[entry.paper],
    )


def is_sealed(card: str) -> bool:
    """Whether the card is as `render_card` wrote it."""
    found = _SEALED.fullmatch(card.replace('\r\n', '\n'))
    return found is not None and _digest(found[1]) == found[2]


def check_card(card: str) -> None:
    """Raise ValueError unless the Hub would take the card and show library, task, licence and results."""
    try:
        data = ModelCard(card).data
    except Exception as error:  # yaml's and huggingface_hub's own kinds
        raise ValueError(f'the card has no valid YAML head: {error}') from error
    missing = [key for key in ('license', 'library_name', 'pipeline_tag', 'tags') if not data.get(key)]
    if missing:
        raise ValueError(f'the head of the card must name {", ".join(missing)}.')


def _as_code(name: str) -> str:
    """A name that anyone may have chosen, as Markdown that shows it and does nothing else."""
    plain = ''.join(
        char if char.isprintable() else char.encode('unicode_escape', 'backslashreplace').decode()
        for char in name.replace('`', "'"))
    return f'`{cut(plain, LABEL_CHARS)}`'


def _digest(card: str) -> str:
    return hashlib.sha256(card.rstrip().encode()).hexdigest()[:16]


def _usage(source: str, problem_type: ProblemType) -> str:
    activation, shown = {
        'multi_label_classification': ('sigmoid()', 'if confidence >= 0.5'),
        'single_label_classification': ('softmax(-1)', 'if confidence == confidences.max()'),
    }[problem_type]
    return f'''\
import timm
import timm_miil  # registers the architecture
import torch
from PIL import Image

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

picture = Image.open('picture.png').convert('RGB')
with torch.no_grad():
    confidences = model(transform(picture).unsqueeze(0)).{activation}[0]
for label, confidence in zip(model.pretrained_cfg['label_names'], confidences.tolist()):
    {shown}:
        print(f'{{label}}: {{confidence:.2f}}')
'''


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
    return [json.dumps(value, ensure_ascii=False)]  # JSON's scalars are YAML's
