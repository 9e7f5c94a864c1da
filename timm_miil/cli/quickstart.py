"""`timm-miil quickstart`: from nothing to a trained model and a tagged picture, offline."""
import argparse
import dataclasses
import os
import shlex
import time
from pathlib import Path

import torch

from timm_miil._errors import PredictionError
from timm_miil.cli._device import parse_device
from timm_miil.cli._text import printable
from timm_miil.cli._training import (
    SCENES, SCENES_LICENCE, counts_line, make_pictures, render_run_card, train_with_progress)
from timm_miil.data import SceneConfig, read_coco
from timm_miil.hub import check_model_folder, save_model_folder
from timm_miil.inference import Tagger, draw_tags, load_image
from timm_miil.train import TrainResult, load_recipe, read_splits

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'make pictures, train a small model on them and tag one with it'

RECIPE = 'scenes_asl'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        '--out', type=Path, default=Path('quickstart'), metavar='DIR',
        help='where to write; pictures made before are used again (default: %(default)s)')
    parser.add_argument('--seed', type=int, help='decides the pictures and the training')
    parser.add_argument('--epochs', type=int, help='passes over the pictures')
    parser.add_argument('--num-classes', type=int, help='labels, 10 to 100')
    parser.add_argument('--device', default='cpu', help='auto, cpu, cuda, ... (default: %(default)s)')


def run(ns: argparse.Namespace) -> int:
    """Make pictures, train, save the model, load it again, tag a picture."""
    threads = torch.get_num_threads()
    # So small a network gains little from a second thread, and loses much where another program uses that core. One
    # thread also gives one result on any number of cores.
    torch.set_num_threads(1)
    try:
        return _run(ns)
    finally:
        torch.set_num_threads(threads)


def _run(ns: argparse.Namespace) -> int:
    start = time.monotonic()
    device = parse_device(ns.device)
    check_model_folder(ns.out / 'model')  # before the training, not after it
    recipe = load_recipe(RECIPE).override(_given(ns, 'seed', 'epochs'))
    config = dataclasses.replace(
        SceneConfig(seed=recipe.seed), **{key: int(value) for key, value in _given(ns, 'num_classes').items()})

    scenes = make_pictures(ns.out / 'scenes', config)
    splits = read_splits(scenes)
    print(f'{printable(scenes)}: {counts_line(splits)}')

    result = train_with_progress(recipe, splits, device=device)
    print(f'test mAP {result.test_metrics["map"]:.2f} with the weights of epoch {result.best_epoch}')

    folder = save_model_folder(
        result.model.cpu(), ns.out / 'model', label_names=result.label_names, card=_card(config, result))
    print(f'{printable(folder)}: {", ".join(sorted(path.name for path in folder.iterdir()))}')

    tagged = _tag_first(scenes, folder, ns.out)
    print(f'{printable(tagged)}: a test picture and its labels')
    print(f'done in {time.monotonic() - start:.0f} s; now try')
    model, pictures = shlex.quote(str(folder)), shlex.quote(str(scenes / 'test'))
    print(f'  timm-miil predict {pictures} --model {model}')
    print(f'  timm-miil predict {pictures} --model {model} --format csv --output labels.csv')
    return 0


def _given(ns: argparse.Namespace, *names: str) -> dict[str, str]:
    """The options that were given, as text."""
    return {name: str(getattr(ns, name)) for name in names if getattr(ns, name) is not None}


def _card(config: SceneConfig, result: TrainResult) -> str:
    recipe = result.recipe
    command = f'timm-miil quickstart --seed {recipe.seed} --epochs {recipe.epochs} --num-classes {config.num_classes}'
    return render_run_card(
        result, dataset=SCENES, dataset_id='scenes', licence=SCENES_LICENCE,
        summary=f'{recipe.summary} It names the handwritten digits in a picture, and their colours.',
        training=f'Recipe `{RECIPE}`. The command `{command}` makes the data and trains it again.')


def _tag_first(scenes: Path, folder: Path, out: Path) -> Path:
    """Tag the first test picture with the saved model; print and draw its labels."""
    records = read_coco(scenes / 'annotations' / 'instances_test.json', scenes / 'test')
    path = records.image_paths[0]
    prediction, = Tagger.from_name(f'local-dir:{folder}')([path])
    if prediction.error is not None:
        raise PredictionError(prediction.error)
    shown = [name for name, target in zip(records.label_names, records.targets[0].tolist()) if target]
    found = [f'{tag.label} {tag.confidence:.2f}' for tag in prediction.tags]
    print(f'{printable(path)} shows {", ".join(shown)}; the model says {", ".join(found) or "nothing"}')
    target = out / 'tagged.png'
    partial = target.with_suffix('.partial')
    draw_tags(load_image(path), prediction.tags).save(partial, 'PNG')
    os.replace(partial, target)
    return target
