"""What `timm-miil validate` does with a model that embeds pictures."""
import argparse
import math
import sys

from timm_miil._atomic import write_file
from timm_miil._checks import check_range
from timm_miil.cli._data import few, running
from timm_miil.cli._text import columns, printable
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.inference import PairValidation, validate_pairs
from timm_miil.inference.pairs import FARS
from timm_miil.metrics import rate_of_percent

__all__ = ['run_pairs']

# What is for labels.
OTHERS = ('activation', 'ancestors', 'common', 'embeddings', 'report', 'threshold', 'tree')
PERCENT = 100.0


def run_pairs(ns: argparse.Namespace, source: LabelledImages | ImageStream) -> int:
    """Measure the model on all pairs; 1 if some pictures could not be used.

    Raises:
        ValueError: If a word is given that is for labels.
    """
    if wrong := [name for name in OTHERS if getattr(ns, name)]:
        raise ValueError(f'--{wrong[0]} is for a model of labels, got one of embeddings; leave it out.')
    if ns.results_file and ns.results_file.suffix != '.json':
        raise ValueError(f'--results-file of a model of embeddings must end in .json, got {str(ns.results_file)!r}.')
    for far in ns.fars or ():
        check_range(low=math.ulp(0.0), high=PERCENT, closed=False, **{'--fars': far})
    fars = FARS if ns.fars is None else [rate_of_percent(far) for far in ns.fars]
    with running(ns, source) as options:
        result = validate_pairs(ns.model, source, fars=fars, **options)
    rates = result.rates
    print(f'{printable(ns.model)} on {printable(ns.data_dir)}, {printable(ns.split)}')
    print(
        f'{len(result.identities)} pictures of {len(result.identities.unique())} identities: {rates.num_same} pairs of '
        f'one, {rates.num_different} of two')
    print(f'{result.images_per_second:.1f} pictures/s, the model alone {result.model_images_per_second:.1f}')
    print(_table(result), end='')
    for far, tar in zip(rates.fars, rates.tars):
        if math.isnan(tar):
            _note(f'no rate at {PERCENT * far:g} %: it takes pairs of one identity, and {math.ceil(1 / far)} of two.')
    if result.broken:
        _note(f'{len(result.broken)} pictures left out:\n  {few(result.broken, chr(10) + "  ")}')
    if ns.results_file:
        facts = {'model': ns.model, 'data_dir': str(ns.data_dir), 'split': ns.split}
        write_file(ns.results_file, result.to_json(facts))
    return 1 if result.broken else 0


def _table(result: PairValidation) -> str:
    rows = [
        (f'{PERCENT * far:g} %', '-' if math.isnan(tar) else f'{PERCENT * tar:.2f} %',
         '-' if math.isnan(tar) else f'{threshold:.4f}')
        for far, tar, threshold in zip(result.rates.fars, result.rates.tars, result.rates.thresholds)]
    return columns([('false accept rate', 'true accept rate', 'cosine above'), *rows])


def _note(text: str) -> None:
    print(f'timm-miil validate: {text}', file=sys.stderr)
