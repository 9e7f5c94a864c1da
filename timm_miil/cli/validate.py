"""`timm-miil validate`: measure a model on labelled pictures."""
import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from timm_miil._atomic import write_file
from timm_miil._errors import CheckpointError
from timm_miil._extras import require
from timm_miil.cli._data import add_data_arguments, few, open_data, running
from timm_miil.cli._pairs import run_pairs
from timm_miil.cli._text import columns, printable
from timm_miil.data import TREE_FILE, ClassTree, LabelledImages, read_class_tree, read_label_set, read_word_vectors
from timm_miil.inference import ACTIVATIONS, Validation, validate, write_report
from timm_miil.inference.load import is_embedding
from timm_miil.inference.pairs import FARS
from timm_miil.losses import SemanticHierarchy
from timm_miil.metrics import semantic_accuracy

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'measure a model on labelled pictures'

# A table of more classes is for a file.
MAX_TABLE, TABLE_WORST = 100, 20
RESULTS_SUFFIXES = ('.csv', '.json')
# Names of the figures of a tree, by whether its deepest level counts: ImageNet-21K's published figure is without.
SEMANTIC = MappingProxyType({False: 'semantic_top1', True: 'semantic_top1_with_deepest_level'})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('model', metavar='MODEL', help='timm model, hf-hub:owner/repo, or folder of a model')
    add_data_arguments(parser)
    parser.add_argument('--activation', choices=ACTIVATIONS, help="default: the model's own")
    parser.add_argument(
        '--embeddings', type=Path, metavar='FILE',
        help="of the data's labels, for a zero-shot model that was trained with others than its own: GloVe or word2vec "
             '(.txt, .bin), or .npy or .safetensors')
    parser.add_argument(
        '--threshold', type=float, help="least confidence of a prediction (default: the model's own, else 0.5)")
    parser.add_argument(
        '--fars', type=float, nargs='+', metavar='PERCENT',
        help='of a model of embeddings: false accept rates (default: '
             f'{" ".join(f"{100 * far:g}" for far in FARS)})')
    parser.add_argument(
        '--results-file', type=Path, metavar='FILE', help='write all numbers to .json, or those of the classes to .csv')
    parser.add_argument(
        '--report', type=Path, metavar='FILE.html', help='write a page with plots and mistakes (pip extra `train`)')


def run(ns: argparse.Namespace) -> int:
    """Measure the model; 1 if some pictures could not be used."""
    _check_targets(ns)
    source = open_data(ns)
    if is_embedding(ns.model):
        return run_pairs(ns, source)
    if ns.fars:
        raise ValueError('--fars are for a model of embeddings, got one of labels; leave them out.')
    labels = read_label_set(ns.labels, ns.data_dir)
    tree = _read_tree(ns, source.label_names)
    embeddings = read_word_vectors(ns.embeddings, source.label_names) if ns.embeddings else None
    with running(ns, source) as options:
        result = validate(
            ns.model, source, label_names=labels, embeddings=embeddings, common=ns.common, activation=ns.activation,
            threshold=ns.threshold, **options)
    semantic = _semantic(result, tree)
    print(f'{printable(ns.model)} on {printable(ns.data_dir)}, {printable(ns.split)}\n{_summary(result, semantic)}')
    print(_table(result), end='')
    for which, names in (('data lack', result.only_model), ('model lacks', result.only_data)):
        if names:
            _note(f'not measured, since the {which} them: {few(names, ", ")}')
    if result.broken:
        _note(f'{len(result.broken)} pictures left out:\n  {few(result.broken, chr(10) + "  ")}')
    if ns.results_file:
        facts = {'model': ns.model, 'data_dir': str(ns.data_dir), 'split': ns.split, **semantic}
        write_file(ns.results_file, result.to_csv() if ns.results_file.suffix == '.csv' else result.to_json(facts))
    if ns.report:
        _write_report(ns, result, source if isinstance(source, LabelledImages) else None)
    return 1 if result.broken else 0


def _check_targets(ns: argparse.Namespace) -> None:
    """Find out before a long run what would fail after it."""
    if ns.results_file and ns.results_file.suffix not in RESULTS_SUFFIXES:
        raise ValueError(f'--results-file must end in {" or ".join(RESULTS_SUFFIXES)}, got {str(ns.results_file)!r}.')
    if ns.report:
        if ns.report.suffix not in ('.html', '.htm'):
            raise ValueError(f'--report must end in .html, got {str(ns.report)!r}.')
        require('matplotlib')
    for path in (ns.results_file, ns.report):
        if path and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f'there is no folder {str(path.parent)!r} for {path.name!r}.')


def _read_tree(ns: argparse.Namespace, labels: tuple[str, ...]) -> ClassTree | None:
    """The tree that is named, or that of the data if it is over these labels."""
    path = ns.tree or ns.data_dir / TREE_FILE
    if not ns.tree and not path.is_file():
        return None
    try:
        return read_class_tree(path).ordered_as(labels)
    except (CheckpointError, ValueError) as error:
        if ns.tree:
            raise
        _note(f'no semantic accuracy, since {printable(path)} is no tree over these labels: {printable(error)}')
        return None


def _semantic(result: Validation, tree: ClassTree | None) -> dict[str, float]:
    """Shares of right answers over the levels of the tree, of pictures with one label, by name."""
    if tree is None or result.top1 is None:
        return {}
    is_single = (result.targets == 1).sum(1) == 1
    logits, labels = result.logits[is_single], result.targets[is_single].argmax(1)
    parents, found = tree.ordered_as(result.label_names).parents, {}
    for has_deepest, name in SEMANTIC.items():
        try:
            hierarchy = SemanticHierarchy(parents, include_deepest=has_deepest)
        except ValueError:  # no level of two classes
            continue
        found[name] = float(semantic_accuracy(logits, labels, hierarchy))
    return {name: share for name, share in found.items() if math.isfinite(share)}


def _summary(result: Validation, semantic: Mapping[str, float]) -> str:
    ranking, f1 = result.average_precision, result.f1
    exclusive = [
        f'{name} {_percent(value)}' for name, value in (('top-1', result.top1), ('top-5', result.top5))
        if value is not None]
    exclusive += [
        f'semantic top-1{" with the deepest level" if name == SEMANTIC[True] else ""} {_percent(share)}'
        for name, share in semantic.items()]
    left_out = ', '.join(f'{count} without {what}' for what, count in ranking.left_out.items() if count)
    unknown = float((result.targets == -1).double().mean())
    return ''.join(f'{line}\n' for line in (
        f'{len(result.targets)} pictures, {len(result.label_names)} labels'
        + (f', {_percent(unknown)} % of them unknown' if unknown else ''),
        *exclusive,
        f'mAP {_percent(ranking.mean)}' + (
            f', with 0 for the {left_out}: {_percent(ranking.mean_with_zeros)}' if left_out else ''),
        f'OF1 {_percent(f1.overall_f1)} (precision {_percent(f1.overall_precision)}, recall '
        f'{_percent(f1.overall_recall)})',
        f'CF1 {_percent(f1.class_f1)} (precision {_percent(f1.class_precision)}, recall '
        f'{_percent(f1.class_recall)}; of these means {_percent(f1.class_f1_of_means)})',
        f'calibration error {result.calibration_error:.4f}',
        f'{result.images_per_second:.1f} pictures/s, the model alone {result.model_images_per_second:.1f}'))


def _table(result: Validation) -> str:
    rows = sorted(
        result.class_results(),
        key=lambda row: (-math.inf if math.isnan(row.average_precision) else row.average_precision, row.present))
    if len(rows) > MAX_TABLE:
        _note(f'of {len(rows)} labels the worst {TABLE_WORST} are shown; --results-file has all.')
        rows = [row for row in rows if not math.isnan(row.average_precision)][:TABLE_WORST]
    cells = [
        (row.label, _percent(row.average_precision), row.present, row.absent, row.unknown, f'{row.threshold:.3f}',
         _percent(row.precision), _percent(row.recall), _percent(row.f1)) for row in rows]
    head = ('label', 'AP', 'present', 'absent', 'unknown', 'threshold', 'precision', 'recall', 'F1')
    return columns([head, *cells])


def _write_report(ns: argparse.Namespace, result: Validation, source: LabelledImages | None) -> None:
    name = Path(ns.model).absolute().name if Path(ns.model).is_dir() else ns.model
    is_default = ns.threshold is None and set(result.thresholds) == {0.5}
    facts = {
        'model': ns.model, 'data': ns.data_dir, 'split': ns.split,
        'speed': f'{result.images_per_second:.1f} pictures/s, the model alone {result.model_images_per_second:.1f}'}
    if result.broken:
        facts['pictures left out'] = len(result.broken)
    if result.only_model or result.only_data:
        facts['labels left out'] = f'{len(result.only_model)} of the model, {len(result.only_data)} of the data'
    if source is not None and result.rows is not None:
        source = source.select(result.rows)
    write_report(
        ns.report, logits=result.logits, targets=result.targets, label_names=result.label_names, source=source,
        title=f'{name} on {ns.data_dir.absolute().name}', facts=facts,
        thresholds=None if is_default else result.thresholds, temperatures=result.temperatures,
        activation=result.activation)


def _percent(fraction: float) -> str:
    return '-' if math.isnan(fraction) else f'{100 * fraction:.2f}'


def _note(text: str) -> None:
    print(f'timm-miil validate: {text}', file=sys.stderr)
