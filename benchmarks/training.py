"""What does the training loop cost beside the network's own steps, and how fast are its pictures read?

    python benchmarks/training.py                  # about 10 minutes on two cores

Steps: the engine's loop, told by its own callback, against the same steps written down by hand over the same batches,
and against steps on one batch that lies ready. Pictures are in memory; processor time of one thread. Reading: from
files to batches with the same transform, by the engine's loader and by timm's. Memory: the most that a process which
trains ever held. Processes: one and two, of one thread each, started by torchrun, on the wall.
"""
import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from run import compare, itself, save, wall
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import Tensor

from timm_miil.data import LabelledImages, SceneConfig, make_scenes, seeded
from timm_miil.train import Recipe, Splits, load_recipe, read_splits, train
from timm_miil.train.build import build_model, build_optimizer, build_scheduler, build_task, build_train_loader

SCENES = SceneConfig(num_train=1000, num_val=40, num_test=40)
RESNET50 = {
    'batch_size': '8', 'optimizer.name': 'adamw', 'optimizer.lr': '1e-4', 'model.name': 'mldecoder',
    'model.args': '{backbone = "resnet50"}'}
CASES = {'mldecoder_scenes, 64 px': ({}, 30, 7), 'mldecoder on resnet50, 224 px': (RESNET50, 5, 3)}
SKIPPED = 1    # the first step, which sets up


class InMemory(LabelledImages):
    """Pictures that were read before."""

    def __init__(self, source: LabelledImages, length: int) -> None:
        super().__init__(source.labels.select_rows(range(length)), source.label_names)
        self.images = [source.load_image(index) for index in range(length)]

    def load_image(self, index: int) -> Image.Image:
        return self.images[index]

    def image_name(self, index: int) -> str:
        return str(index)

    def select(self, rows: object) -> 'InMemory':
        raise NotImplementedError('nothing here selects')


def contestants(recipe: Recipe, splits: Splits) -> dict[str, Callable[[], float]]:
    """Three ways to do an epoch's steps, each of which returns the seconds of a step."""
    def by_engine() -> float:
        marks: list[float] = []
        train(recipe, splits, device='cpu', on_step=lambda _: marks.append(time.process_time()))
        return (marks[-1] - marks[SKIPPED - 1]) / (len(marks) - SKIPPED)

    def by_hand(is_ready: bool) -> float:
        with seeded(recipe.seed):
            model = build_model(recipe, splits.label_names).to(memory_format=torch.channels_last)
            task, optimizer = build_task(recipe, model, torch.device('cpu')), build_optimizer(recipe, model)
            loader = build_train_loader(recipe, splits.train, model)
            scheduler = build_scheduler(recipe, optimizer, len(loader))
            batches = ((batch.images, batch.targets) for batch in loader.batches(0))
            if is_ready:
                batches = iter([next(batches)] * len(loader))
            task.train()
            for done in range(1, len(loader) + 1):
                images, targets = next(batches)
                loss: Tensor = task(images, targets)['loss']
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step_update(done)
                loss.item()
                if done == SKIPPED:
                    start = time.process_time()
        return (time.process_time() - start) / (len(loader) - SKIPPED)

    return {'by hand': lambda: by_hand(False), 'engine': by_engine, 'steps alone': lambda: by_hand(True)}


def steps(scenes: Path) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    rows = []
    for case, (changes, num_steps, repeats) in CASES.items():
        recipe = load_recipe('scenes_asl').override({**changes, 'epochs': '1'})
        own = read_splits(scenes)
        few = InMemory(own.val, recipe.batch_size)
        splits = Splits(InMemory(own.train, num_steps * recipe.batch_size), few, None)
        rows += compare(
            contestants(recipe, splits), repeats=repeats, clock=itself, question='steps', case=case,
            batch_size=recipe.batch_size, kilobytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return rows


def reading(scenes: Path) -> list[dict[str, object]]:
    """One epoch of files to batches, in processes of their own; timm's loader reads the same files in its own order."""
    recipe, splits = load_recipe('scenes_asl'), read_splits(scenes)
    model = build_model(recipe, splits.label_names)
    config, augment = resolve_model_data_config(model), recipe.augment
    rows = []
    for workers in (1, 2):
        ours = build_train_loader(recipe.override({'workers': str(workers)}), splits.train, model)
        timms = create_loader(
            ImageDataset(str(scenes / 'train'), reader='folder', class_map=''), config['input_size'], recipe.batch_size,
            is_training=True, scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip, color_jitter=0.0,
            interpolation=config['interpolation'], mean=config['mean'], std=config['std'], num_workers=workers,
            use_prefetcher=False, persistent_workers=True, device=torch.device('cpu'))
        found = compare(
            {'timm': lambda: sum(len(images) for images, _ in timms),
             'engine': lambda: sum(len(batch.images) for batch in ours.batches(0))},
            repeats=7, clock=wall, question='reading', case=f'scenes, {workers} workers', batch_size=recipe.batch_size)
        num_images = len(ours) * recipe.batch_size
        rows += [row | {'images_per_second': round(1e3 * num_images / float(str(row['median_ms'])))} for row in found]
    return rows


def processes(scenes: Path, folder: Path) -> list[dict[str, object]]:
    """Pictures a second of one and of two processes of one thread, the second epoch of two; in turns."""
    def seconds(count: int) -> float:
        output = folder / f'run-{count}-{time.monotonic_ns()}'
        subprocess.run([
            sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}', '-m',
            'timm_miil.cli.main', 'train', 'scenes_asl', '--data-dir', str(scenes), '--output', str(output),
            '--epochs', '2', '--device', 'cpu',
        ], check=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        with (output / 'results.csv').open(newline='') as file:
            return 1 / float(list(csv.DictReader(file))[-1]['images_per_second'])

    rows = compare(
        {'one process': lambda: seconds(1), 'two processes': lambda: seconds(2)}, repeats=3, warmup=0, clock=itself,
        question='processes', case='scenes_asl', batch_size=32)
    return [row | {'images_per_second': round(1e3 / float(str(row['median_ms'])))} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', choices=['steps', 'reading', 'processes'])
    ns = parser.parse_args()
    wanted = ns.only or ['steps', 'reading', 'processes']
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = make_scenes(folder / 'scenes', SCENES)
        rows += steps(scenes) if 'steps' in wanted else []
        rows += reading(scenes) if 'reading' in wanted else []
        rows += processes(scenes, folder) if 'processes' in wanted else []
    save('training-cpu', rows)


if __name__ == '__main__':
    main()
