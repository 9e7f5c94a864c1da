"""Cards of the catalogue's weights: every sentence follows from a fact of the catalogue or of the converted file."""
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from timm.models import is_model, is_model_pretrained, model_entrypoint

from timm_miil import catalog
from timm_miil._checks import shown
from timm_miil.hub import _card_words as words
from timm_miil.hub._card_check import check_card
from timm_miil.hub._card_subject import Subject
from timm_miil.hub._card_text import assemble, embedding_code, prediction_code
from timm_miil.models.published import Network

__all__ = ['catalog_card']

# The Hub's words for what we measure, where it has them.
HUB_METRICS = {'top1': 'accuracy'}
# 'table in README.md of owner/name'
REPOSITORY = re.compile(r' of ([\w.-]+/[\w.-]+)$')
SHA256 = re.compile(r'[0-9a-f]{64}')
PICTURES, CLIPS, WORDS = 'image-classification', 'video-classification', 'zero-shot-image-classification'


def catalog_card(
        name: str,
        *,
        repo_id: str | None = None,
        network: Network | None = None,
        label_names: Sequence[str] | None = None,
        source_sha256: str | None = None,
        source_name: str | None = None,
) -> str:
    """The card of an entry of the catalogue; equal arguments give equal bytes.

    Args:
        name: 'architecture.tag' of the entry.
        repo_id: 'owner/name' of the repository on the Hub that the card is for, from which its code then loads. None
            makes a card with code that loads the weights by their name.
        network: Network of the converted file; None makes a card of the published file, as the catalogue knows it.
        label_names: Names of the classes that the file has; None takes the catalogue's label set, if there is one.
        source_sha256: SHA-256 of the file that was converted, which the card compares with what the catalogue knows;
            None leaves that out.
        source_name: Name of that file, or the URL that it was downloaded from; the card shows it beside its SHA-256.

    Raises:
        CatalogError: If there is no such entry.
        ValueError: If there is a repo_id and nobody may publish a copy of these weights, if there is not one label
            name a class, or source_sha256 is no SHA-256 or there is one of a card of the published file.
    """
    entry = catalog.weight(name)
    if repo_id is not None and entry.why_not_publish is not None:
        raise ValueError(f'{name} must not be published: {entry.why_not_publish}.')
    if source_sha256 is not None and not SHA256.fullmatch(source_sha256):
        raise ValueError(f'source_sha256 must be 64 hexadecimal digits in lower case, got {shown(source_sha256)}.')
    if source_sha256 is not None and repo_id is None and network is None:
        raise ValueError('source_sha256 is of a file that was converted: give network or repo_id with it.')
    subject = dataclasses.replace(
        _subject(entry, repo_id, network, label_names), source_sha256=source_sha256, source_name=source_name)
    card = assemble(_head(subject), _body(subject))
    check_card(card)
    return card


def _subject(
        entry: catalog.Weights,
        repo_id: str | None,
        network: Network | None,
        label_names: Sequence[str] | None,
) -> Subject:
    architecture = network.architecture if network else entry.architecture
    num_classes = network.num_classes if network else entry.num_classes
    if label_names is None and entry.labels is not None:
        label_names = catalog.label_set(entry.labels).labels
    if label_names is not None and len(label_names) != num_classes:
        raise ValueError(
            f'label_names must have one name a class, got {len(label_names)} for the {num_classes or "unknown"} '
            f'classes of {entry.name}.')
    num_params = entry.num_params
    if network is not None:
        num_params = sum(parameter.numel() for parameter in network.build(device='meta').parameters())
    return Subject(
        entry=entry,
        paper=catalog.paper(entry.paper),
        data_set=catalog.data_set(entry.dataset),
        repo_id=repo_id,
        is_converted=repo_id is not None or network is not None,
        architecture=architecture,
        model_args=dict(network.model_args) if network else {},
        num_classes=num_classes,
        num_params=num_params,
        label_names=None if label_names is None else tuple(label_names),
        has_network=entry.timm.loadable and is_model(architecture),
        is_ours=is_model(architecture) and model_entrypoint(architecture).__module__.startswith('timm_miil.'),
        is_named=is_model_pretrained(entry.name),
        source_sha256=None,
        source_name=None,
    )


def _head(subject: Subject) -> dict[str, Any]:
    entry, data_set = subject.entry, subject.data_set
    task = CLIPS if data_set.items == 'clips' else WORDS if subject.gives_words else PICTURES
    head: dict[str, Any] = {
        'license': entry.licence.lower() if entry.licence else 'unknown',
        'library_name': 'timm',
        'pipeline_tag': task,
        'tags': [
            'timm', 'timm-miil', task, f'{subject.kind}-classification',
            *([f'arxiv:{subject.paper.arxiv}'] if subject.paper.arxiv else [])],
    }
    if data_set.hub_id is not None:
        head['datasets'] = [data_set.hub_id]
    if entry.base is not None and (base := catalog.weight(entry.base).hf_hub_id) is not None:
        head['base_model'] = [base]
    own = [metric for metric in entry.metrics if metric.setting is None]
    if own and subject.is_published_file is not False:
        head['metrics'] = [HUB_METRICS.get(metric.name, metric.name) for metric in own]
        head['model-index'] = [{'name': entry.name, 'results': [_result(subject, task, metric) for metric in own]}]
    return head


def _result(subject: Subject, task: str, metric: catalog.Metric) -> dict[str, Any]:
    """One result; its arguments and its source say whose number it is."""
    data_set = subject.data_set
    facts = {'origin': metric.origin, 'command': metric.command, 'hardware': metric.hardware, 'date': metric.date}
    result: dict[str, Any] = {
        'task': {'type': task, 'name': f'{subject.kind.capitalize()} classification'},
        'dataset': {'type': data_set.hub_id or data_set.name, 'name': metric.dataset or data_set.title},
        'metrics': [{
            'type': HUB_METRICS.get(metric.name, metric.name), 'value': metric.value,
            'name': catalog.METRICS[metric.name], 'args': {key: fact for key, fact in facts.items() if fact}}],
    }
    if metric.source is not None:
        repository = REPOSITORY.search(metric.source)
        url = f'https://github.com/{repository[1] if repository else subject.entry.source_repo}'
        result['source'] = {'name': metric.source, 'url': url}
    return result


def _body(subject: Subject) -> list[str]:
    paper = subject.paper
    return [
        f'# Model card for {subject.entry.name}',
        *words.summary(subject),
        '## Model details',
        '\n'.join(f'- **{key}:** {value}' for key, value in words.details(subject)),
        *([] if (remarks := words.remarks(subject)) is None else ['## Remarks on the file', remarks]),
        '## Usage',
        *_usage(subject),
        '## Intended use',
        words.intended_use(subject),
        '## Limits',
        *words.limits(subject),
        '## Results',
        *words.results(subject),
        *([] if (converted := words.conversion(subject)) is None else ['## Conversion', converted]),
        '## Citation',
        f'```bibtex\n{paper.bibtex}\n```',
    ]


def _usage(subject: Subject) -> list[str]:
    if not subject.has_network:
        return ['No network of timm or of timm-miil holds these weights yet, so no code here loads them.']
    entry = subject.entry
    blocks = []
    if subject.repo_id is not None:
        source, is_ours = f'hf-hub:{subject.repo_id}', subject.is_ours
    elif subject.is_named:
        source, is_ours = entry.name, entry.timm_tag is None
    else:
        source, is_ours = 'local-dir:model', subject.is_ours
        blocks.append(
            f'Convert the file first, as the published facts do not suffice to load it by name: '
            f'`timm-miil convert {entry.name} -o model`, which needs `timm-miil` '
            f'installed (its README says how).')
    needed = '`timm-miil` installed (its README says how)' if is_ours else 'timm (`pip install timm`)'
    blocks.append(f'The code needs {needed} and reads `picture.png`, any picture of yours.')
    if subject.gives_words:
        code = words.word_code(source, is_ours=is_ours)
    else:
        names, index = _names(subject)
        code = prediction_code(
            source, is_ours=is_ours, is_multi_label=subject.is_multi_label, names=names, index=index)
    return [
        *blocks, *([] if subject.gives_words else ['### What a picture shows']), f'```python\n{code}```',
        '### A picture as a vector', f'```python\n{embedding_code(source, is_ours=is_ours)}```']


def _names(subject: Subject) -> tuple[str, str]:
    """Python for the classes' names, and what takes one of them."""
    if subject.timm_names is not None:
        return f'timm.data.ImageNetInfo({subject.timm_names!r})', '.index_to_description(index)'
    if subject.label_names is not None:
        return "model.pretrained_cfg['label_names']", '[index]'
    return 'range(model.num_classes)  # numbers, as the names of the classes are not known', '[index]'
