"""`timm-miil list`: what there is."""
import argparse
import fnmatch

from timm.models import is_model_pretrained, list_models, model_entrypoint

from timm_miil import catalog
from timm_miil._errors import CatalogError
from timm_miil.cli._text import columns

__all__ = [
    'HELP', 'add_arguments', 'input_words', 'loadable_name', 'metric_words', 'our_architectures', 'run',
]

HELP = 'list our architectures, or the catalogue of weights'

ARCHITECTURE_COLUMNS = ('architecture', 'what it is')
WEIGHTS_COLUMNS = ('weights', 'dataset', 'classes', 'input', 'metric', 'licence', 'timm loads it as')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('pattern', nargs='?', default='*', help="shell pattern of names, such as '*coco*'")
    parser.add_argument('--weights', action='store_true', help='list the catalogue of weights')


def run(ns: argparse.Namespace) -> int:
    """Print one line an architecture or weights entry."""
    header: tuple[str, ...]
    rows: list[tuple[object, ...]]
    if ns.weights:
        header, rows = WEIGHTS_COLUMNS, [_weights_row(entry) for entry in catalog.find(ns.pattern)]
    else:
        header, rows = ARCHITECTURE_COLUMNS, [
            row for row in our_architectures().items() if fnmatch.fnmatchcase(row[0], ns.pattern)]
    if not rows:
        raise CatalogError(f"no {header[0]} matches {ns.pattern!r}; a pattern is like '*tresnet*'.")
    print(columns([header, *rows]), end='')
    return 0


def our_architectures() -> dict[str, str]:
    """The architectures that this package adds to timm, each with the first line of its documentation."""
    entry_points = {name: model_entrypoint(name) for name in list_models()}
    return {
        name: (entry_point.__doc__ or '').strip().partition('\n')[0]
        for name, entry_point in entry_points.items() if entry_point.__module__.startswith('timm_miil.')}


def loadable_name(entry: catalog.Weights) -> str | None:
    """The name under which `timm.create_model(..., pretrained=True)` gives the weights; None if none does yet."""
    name = entry.timm_tag or entry.name
    return name if is_model_pretrained(name) else None


def metric_words(metric: catalog.Metric) -> str:
    """Name, value and origin, such as 'mAP 90.1 (paper)'."""
    return f'{metric.name} {metric.value} ({metric.origin})'


def input_words(entry: catalog.Weights) -> str:
    """Size of one input, such as '3x448x448', or '16x3x224x224' for 16 pictures."""
    return 'x'.join(map(str, ((entry.frames,) if entry.frames else ()) + entry.input_size))


def _weights_row(entry: catalog.Weights) -> tuple[object, ...]:
    return (
        entry.name,
        entry.dataset,
        entry.num_classes or '?',
        input_words(entry),
        metric_words(entry.metrics[0]) if entry.metrics else '-',
        entry.licence or 'none stated',
        loadable_name(entry) or 'not yet',
    )
