"""Model cards: README.md of a model folder, with the metadata that the Hub reads."""
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from timm_miil import catalog
from timm_miil.hub._card_check import check_card
from timm_miil.hub._card_text import (
    as_code, as_text, assemble, embedding_code, is_sealed, prediction_code, quoted_gaps, vector_code)
from timm_miil.hub._catalog_card import catalog_card

__all__ = [
    'CARD_FILE', 'CardFacts', 'CardMetric', 'ProblemType', 'catalog_card', 'check_card', 'is_sealed', 'render_card',
]

ProblemType = Literal['multi_label_classification', 'single_label_classification', 'embedding']

CARD_FILE = 'README.md'
NAMED_LABELS = 12
KINDS = MappingProxyType({
    'multi_label_classification': 'multi-label', 'single_label_classification': 'single-label'})


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
        label_names: The classes; none of an embedding.
        metrics: What was measured; may be empty.
        training: One paragraph: how it was trained, and the command that does it again.
        papers: Ids of the papers to cite, see `timm_miil.catalog.papers`.
        problem_type: Whether the classes are independent or exclusive, or the network embeds pictures.
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
    if facts.problem_type == 'embedding':
        task, kind = 'image-feature-extraction', 'image embedding'
    else:
        task, kind = 'image-classification', f'{KINDS[facts.problem_type]} classification'
    head: dict[str, Any] = {
        'license': facts.licence,
        'library_name': 'timm',
        'pipeline_tag': task,
        'tags': ['timm', 'timm-miil', task, kind.replace(' ', '-')],
    }
    results: list[str] = []
    if facts.metrics:
        head['model-index'] = [{
            'name': facts.name,
            'results': [{
                'task': {'type': task, 'name': kind.capitalize()},
                'dataset': {'type': facts.dataset_id, 'name': facts.dataset, 'split': metric.split},
                'metrics': [{'type': metric.name, 'value': metric.value, 'name': catalog.METRICS[metric.name]}],
            } for metric in facts.metrics],
        }]
        results = ['## Results', '\n'.join([
            '| metric | split | value |', '|---|---|---|',
            *(f'| {catalog.METRICS[metric.name]} | {_words(metric.split)} | {metric.value:.2f} |'
              for metric in facts.metrics),
        ])]
    papers = [catalog.paper(id) for id in facts.papers]
    channels, height, width = facts.input_size
    card = assemble(head, [
        f'# Model card for {_words(facts.name)}',
        _words(facts.summary),
        '## Model details',
        '\n'.join([
            f'- **Model type:** {kind.replace(" class", " image class")}',
            f'- **Architecture:** {as_code(facts.architecture)}',
            f'- **Parameters:** {facts.num_params / 1e6:.2f} M',
            f'- **Input:** {channels} x {height} x {width}',
            f'- **Data set:** {_words(facts.dataset or facts.dataset_id)}',
            *_classes(facts),
            *(f'- **Paper:** {paper.title}' + (f', arXiv:{paper.arxiv}' if paper.arxiv else '') for paper in papers),
        ]),
        *results,
        '## Usage',
        *_usage(facts),
        '## Training',
        _words(facts.training),
        *(['## Citation'] if papers else []),
        *(f'```bibtex\n{paper.bibtex}\n```' for paper in papers),
    ])
    check_card(card)
    return card


def _classes(facts: CardFacts) -> list[str]:
    """The line of the classes, if there are such."""
    if facts.problem_type == 'embedding':
        return []
    labels = ', '.join(map(as_code, facts.label_names[:NAMED_LABELS]))
    if len(facts.label_names) > NAMED_LABELS:
        labels += f', and {len(facts.label_names) - NAMED_LABELS} more in `config.json`'
    return [f'- **Classes:** {len(facts.label_names)}: {labels}']


def _usage(facts: CardFacts) -> list[str]:
    """Code that runs."""
    if facts.problem_type == 'embedding':
        return [
            'As a vector; the cosine of two tells how alike the pictures are:\n\n'
            f'```python\n{vector_code(facts.source, is_ours=True)}```']
    code = prediction_code(
        facts.source, is_ours=True, is_multi_label=facts.problem_type == 'multi_label_classification',
        names="model.pretrained_cfg['label_names']", index='[index]')
    return [
        f'```python\n{code}```',
        f'As a vector that describes the picture:\n\n```python\n{embedding_code(facts.source, is_ours=True)}```']


def _words(text: str) -> str:
    """Words of the caller as Markdown."""
    return as_text(quoted_gaps(text))
