"""`timm-miil explain`: show where in pictures the labels are seen."""
import argparse
import itertools
import sys
from pathlib import Path

from timm_miil._checks import check_range
from timm_miil._errors import PredictionError
from timm_miil.cli._device import parse_device
from timm_miil.cli._labels import add_model_arguments
from timm_miil.cli._text import printable
from timm_miil.data import read_labels
from timm_miil.inference import (
    IMAGE_SUFFIXES, METHODS, Explainer, Prediction, Tagger, find_classes, find_images, load_image, save_overlay)
from timm_miil.inference.overlay import ALPHA

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'show where in pictures the labels are seen'

MAX_SIDE_PX = 1600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('paths', nargs='+', type=Path, metavar='IMAGE_OR_FOLDER')
    add_model_arguments(parser)
    parser.add_argument(
        '--label', nargs='+', action='extend', metavar='NAME',
        help='labels to show, after the pictures; default: those that the model finds in each picture')
    parser.add_argument('--topk', type=int, help='most labels of a picture, of those that reach their threshold')
    parser.add_argument('--threshold', type=float, help='least confidence of a label; default: as of predict')
    parser.add_argument(
        '--method', choices=METHODS,
        help="attention of the model's head, or evidence by gradients (pip extra `explain`); default: attention where "
             'the head attends, else grad_cam')
    parser.add_argument(
        '--output', type=Path, default=Path('explained'), metavar='DIR',
        help='where to write <picture>_<label>.png (default: %(default)s)')
    parser.add_argument('--alpha', type=float, default=ALPHA, help='opacity of the colours (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')


def run(ns: argparse.Namespace) -> int:
    """Save a picture for each label; 1 if some pictures could not be read or saved."""
    if ns.label and (ns.topk is not None or ns.threshold is not None):
        raise ValueError('--label says which labels to show; leave out --topk and --threshold.')
    check_range(alpha=ns.alpha, low=0.0, high=1.0, closed=True)
    files = find_images(ns.paths, exclude=[ns.output])  # before the model: a wrong path is told at once
    first = next(files, None)
    if first is None:
        raise FileNotFoundError(f'no pictures found; folders are searched for {" ".join(sorted(IMAGE_SUFFIXES))}.')
    tagger = Tagger.from_name(
        ns.model, labels=read_labels(ns.labels) if ns.labels else None, embeddings=ns.embeddings,
        device=parse_device(ns.device), threshold=0.0 if ns.label else ns.threshold, topk=ns.topk)
    classes = find_classes(tagger.label_names, ns.label) if ns.label else None
    explainer = Explainer(tagger, method=ns.method)
    failed = 0
    for prediction in tagger(itertools.chain([first], files)):
        try:
            _explain(explainer, prediction, classes, ns)
        except (OSError, PredictionError) as error:
            failed += 1
            print(f'timm-miil explain: {printable(error)}', file=sys.stderr)
    return 1 if failed else 0


def _explain(
        explainer: Explainer, prediction: Prediction, classes: list[int] | None, ns: argparse.Namespace) -> None:
    print(printable(prediction.path))
    if prediction.error is not None:
        print('  not read')
        raise PredictionError(prediction.error)
    image = load_image(prediction.path)
    tags = prediction.tags
    if classes is not None:
        by_index = {tag.index: tag for tag in tags}
        tags = tuple(by_index[index] for index in classes)
    if not tags:
        print('  no label')
        return
    shown = image.copy()
    shown.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    maps = explainer(image, [tag.index for tag in tags], size=(shown.height, shown.width))
    for tag, heat in zip(tags, maps):
        file = save_overlay(shown, heat, tag, prediction.path, ns.output, alpha=ns.alpha, roots=ns.paths)
        print(f'  {tag.confidence:.3f}  {printable(tag.label)}  {printable(file)}')
