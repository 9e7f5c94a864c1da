"""`timm-miil info`: everything known about an architecture or weights."""
import argparse
import dataclasses
import inspect
from collections.abc import Iterable, Iterator

from timm.models import is_model, is_model_pretrained, model_entrypoint

from timm_miil import catalog
from timm_miil._checks import nearest
from timm_miil._errors import CatalogError
from timm_miil.cli._text import columns
from timm_miil.cli.list import input_words, loadable_name, metric_words, our_architectures

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'show what is known about an architecture or weights'

# Name and value, in the order shown; a fact that is None or '' is left out.
_Facts = Iterator[tuple[str, object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('name', help="an architecture, or weights as 'architecture.tag'")


def run(ns: argparse.Namespace) -> int:
    """Print facts, papers, use and citations."""
    entries, ours = catalog.weights(), our_architectures()
    entry = entries.get(ns.name)
    family = [entry] if entry else [other for other in entries.values() if other.architecture == ns.name]
    called = catalog.named_by_authors(ns.name)
    if not family and ns.name not in ours and is_model(ns.name) and not ours.keys() & set(called):
        raise CatalogError(
            f"{ns.name!r} is timm's own, and nothing of ours belongs to it; timm.create_model({ns.name!r}) builds it.")
    if not family and ns.name not in ours:
        known = {*ours, *entries, *(other.architecture for other in entries.values())}
        theirs = ' and '.join(map(repr, called))
        hint = f"that is the authors' name of {theirs}." if called else nearest(ns.name, known)
        raise CatalogError(f'unknown name {ns.name!r}; {hint}')

    papers = [catalog.paper(id) for id in dict.fromkeys(other.paper for other in family)]
    _print_facts(_weights_facts(entry) if entry else _architecture_facts(ns.name, ours.get(ns.name), family))
    for paper in papers:
        print('\nPaper')
        _print_facts(_paper_facts(paper))
    print('\nUse')
    print('\n'.join(f'  {line}' for line in _use(ns.name, entry)))
    for paper in papers:
        print(f'\nCitation\n{paper.bibtex}')
    return 0


def _architecture_facts(name: str, summary: str | None, family: Iterable[catalog.Weights]) -> _Facts:
    yield 'architecture', name
    yield 'what it is', summary or ("timm's own" if is_model(name) else 'not implemented yet')
    for entry in family:
        yield 'weights', f'{entry.name}  {entry.dataset}, {input_words(entry)}' + ''.join(
            f', {metric_words(metric)}' for metric in entry.metrics[:1])


def _weights_facts(entry: catalog.Weights) -> _Facts:
    yield 'weights', entry.name
    yield 'timm loads it as', loadable_name(entry) or 'not yet'
    yield 'trained on', entry.dataset
    yield 'classes', entry.num_classes
    yield 'label names', entry.labels
    yield 'head', f'{entry.head}: {catalog.HEADS[entry.head]}'
    yield 'groups', entry.num_groups
    yield 'input', input_words(entry)
    yield 'mean', entry.mean
    yield 'std', entry.std
    yield 'resize', _listed(entry.interpolation, entry.crop_mode, entry.crop_pct and f'crop {entry.crop_pct}')
    for metric in entry.metrics:
        yield 'metric', f'{metric_words(metric)}: {catalog.METRICS[metric.name]}'
        yield '  on', _listed(metric.dataset, metric.setting)
        yield '  from', _listed(metric.source, metric.command, metric.hardware, metric.date)
    yield 'licence', entry.licence or 'none stated by the authors'
    yield 'file', entry.url or entry.file
    yield 'on the Hub', entry.hf_hub_id
    yield 'source', entry.source_repo and f'https://github.com/{entry.source_repo} ({entry.published_in})'
    yield 'authors call it', entry.source_architecture
    for note in entry.notes:
        yield 'note', note
    for field in dataclasses.fields(entry.unsettled):
        yield f'open: {field.name}', getattr(entry.unsettled, field.name)
    for remark in entry.remarks:
        yield 'remark', remark


def _paper_facts(paper: catalog.Paper) -> _Facts:
    yield '  title', paper.title
    yield '  authors', ', '.join(paper.authors)
    yield '  published', f'{paper.venue or "preprint"}, {paper.year}'
    yield '  arXiv', paper.arxiv and f'https://arxiv.org/abs/{paper.arxiv}'
    yield '  code', paper.repository and f'{paper.repository} (licence: {paper.code_licence or "none stated"})'


def _use(name: str, entry: catalog.Weights | None) -> Iterator[str]:
    loadable = loadable_name(entry) if entry else name if is_model_pretrained(name) else None
    if loadable:
        yield 'import timm, timm_miil'
        yield f'model = timm.create_model({loadable!r}, pretrained=True)'
        yield f'timm-miil predict --model {loadable} picture.jpg'
    elif entry and is_model(entry.architecture):
        yield f'timm-miil convert {entry.name} -o model  # the file alone can tell all that a network needs to know'
        yield "model = timm.create_model('local-dir:model', pretrained=True)"
    elif entry:
        yield 'timm does not load these weights yet.'
    elif is_model(name):
        yield 'import timm, timm_miil'
        backbone = inspect.signature(model_entrypoint(name)).parameters.get('backbone')
        chosen = f', backbone={backbone.default!r}' if backbone else ''
        yield f'model = timm.create_model({name!r}{chosen}, num_classes=80)  # untrained'
    else:
        yield 'Not implemented yet.'


def _listed(*facts: object) -> str:
    return ', '.join(str(fact) for fact in facts if fact is not None)


def _print_facts(facts: _Facts) -> None:
    known = [(key, value) for key, value in facts if value not in (None, '')]
    print(columns(known), end='')
