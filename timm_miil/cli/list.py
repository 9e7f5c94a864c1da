"""`timm-miil list`: what there is."""
import argparse
import fnmatch

from timm.models import is_model_pretrained, list_models, model_entrypoint

from timm_miil import catalog
from timm_miil._errors import CatalogError
from timm_miil.cli._text import columns

__all__ = ['HELP', 'add_arguments', 'loadable_name', 'our_architectures', 'run']

HELP = 'list our architectures, or the published weights'

COLUMNS = ('name', 'dataset', 'classes', 'input', 'metric', 'licence', 'load with timm as')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('pattern', nargs='?', default='*', help="shell pattern of names, such as '*coco*'")
    parser.add_argument('--weights', action='store_true', help='list the catalogue of weights')


def run(ns: argparse.Namespace) -> int:
    """Print one line an architecture or weights entry."""
    if ns.weights:
        rows = [_weights_row(entry) for entry in catalog.find(ns.pattern)]
        header = COLUMNS
    else:
        rows = [(name, summary) for name, summary in our_architectures().items() if fnmatch.fnmatchcase(name, ns.pattern)]
        header = ('name', 'what it is')
    if not rows:
        what = 'weights' if ns.weights else 'architectures'
        raise CatalogError(f"no {what} match {ns.pattern!r}; patterns are like '*tresnet*'.")
    print(columns([header, *rows]), end='')
    return 0


def our_architectures() -> dict[str, str]:
    """Name and first docstring line of each architecture that this package adds to timm."""
    entry_points = {name: model_entrypoint(name) for name in list_models()}
    return {
        name: (function.__doc__ or '').strip().partition('\n')[0]
        for name, function in entry_points.items() if function.__module__.startswith('timm_miil.')}


def loadable_name(entry: catalog.Weights) -> str | None:
    """Name under which timm loads the weights today: its own, or that of our registered model; None if it cannot."""
    name = entry.timm_tag or entry.name
    return name if is_model_pretrained(name) else None


def metric_words(metric: catalog.Metric) -> str:
    """Value and origin of a metric, such as 'mAP 90.1 (paper)'."""
    return f'{metric.name} {metric.value} ({metric.origin})'


def input_words(entry: catalog.Weights) -> str:
    """Size of one input, such as '16 x 3 x 224 x 224' for a clip."""
    return ' x '.join(map(str, ((entry.frames,) if entry.frames else ()) + entry.input_size))


def _weights_row(entry: catalog.Weights) -> tuple[object, ...]:
    metric = metric_words(entry.metrics[0]) if entry.metrics else '-'
    return (
        entry.name, entry.dataset, entry.num_classes or '?', input_words(entry), metric, entry.licence or 'none stated',
        loadable_name(entry) or 'not yet')
