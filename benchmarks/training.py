"""What does the training loop cost beside the network's own steps, and how fast are its pictures read?

    python benchmarks/training.py                                   # about 10 minutes on two cores
    python benchmarks/training.py --device cuda --only steps        # the same steps there

Steps: the engine's loop, told by its own callback, against the same steps written down by hand over the same batches,
and against steps on one batch that lies ready. Pictures are in memory; processor time of one thread, and on an
accelerator the wall's, to the end of the device's work. Reading: from files to batches with the same transform, by the
engine's loader and by timm's. Memory: the most that a process which trains ever held. Processes: one and two, of one
thread each, started by torchrun, on the wall.
"""
import argparse
import csv
import itertools
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
from run import save
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import Tensor

from timm_miil.bench import compare, itself, place, wall
from timm_miil.data import LabelledImages, SceneConfig, make_scenes, seeded
from timm_miil.train import Recipe, Splits, load_recipe, read_splits, train
from timm_miil.train.build import build_model, build_optimizer, build_scheduler, build_task, build_train_loader

SCENES = SceneConfig(num_train=1000, num_val=40, num_test=40)
PICTURES = {
    '64 px': (SCENES, 64),
    '448 px to 224': (SceneConfig(num_train=256, num_val=40, num_test=40, image_size=448), 224)}
RESNET50 = {
    'batch_size': '8', 'optimizer.name': 'adamw', 'optimizer.lr': '1e-4', 'model.name': 'mldecoder',
    'model.args': '{backbone = "resnet50"}'}
CASES = {'mldecoder_scenes, 64 px': ({}, 30, 9), 'mldecoder on resnet50, 224 px': (RESNET50, 5, 5)}
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


def contestants(recipe: Recipe, splits: Splits, device: torch.device) -> dict[str, Callable[[], float]]:
    """Three ways to do an epoch's steps, each of which returns the seconds of a step."""
    def clock() -> float:
        if device.type == 'cpu':
            return time.process_time()
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    def by_engine() -> float:
        marks: list[float] = []
        # Called when a step's loss was read, so that on an accelerator the next step is under way: no waiting here.
        now = clock if device.type == 'cpu' else time.perf_counter
        train(recipe, splits, device=device, on_step=lambda _: marks.append(now()))
        return (marks[-1] - marks[SKIPPED - 1]) / (len(marks) - SKIPPED)

    def by_hand(is_ready: bool) -> float:
        with seeded(recipe.seed):
            model = build_model(recipe, splits.label_names).to(device, memory_format=torch.channels_last)
            task, optimizer = build_task(recipe, model, device), build_optimizer(recipe, model)
            loader = build_train_loader(recipe, splits.train, model, device=device)
            scheduler = build_scheduler(recipe, optimizer, len(loader))
            batches = (
                (batch.images.to(device, memory_format=torch.channels_last, non_blocking=True),
                 batch.targets.to(device, non_blocking=True)) for batch in loader.batches(0))
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
                    start = clock()
        return (clock() - start) / (len(loader) - SKIPPED)

    return {'steps alone': lambda: by_hand(True), 'by hand': lambda: by_hand(False), 'engine': by_engine}


def steps(folder: Path, device: torch.device) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    rows = []
    for case, (changes, num_steps, repeats) in CASES.items():
        recipe = load_recipe('scenes_asl').override({**changes, 'epochs': '1'})
        own = read_splits(make_scenes(folder / 'scenes', SCENES))
        few = InMemory(own.val, recipe.batch_size)
        splits = Splits(InMemory(own.train, num_steps * recipe.batch_size), few, None)
        rows += compare(
            contestants(recipe, splits, device), repeats=repeats, clock=itself, case=case, batch_size=recipe.batch_size,
            kilobytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, device=device.type)
        save(f'training-steps-{place(device)}', rows, device=device, quiet=True)  # so far
    return rows


def reading(folder: Path, device: torch.device) -> list[dict[str, object]]:
    """One epoch of files to batches, in processes of their own; timm's loader reads the same files in its own order."""
    rows = []
    for (case, (scenes, size)), workers in itertools.product(PICTURES.items(), (1, 2)):
        data = make_scenes(folder / f'pictures-{scenes.image_size}', scenes)
        recipe, splits = load_recipe('scenes_asl').override({'augment.image_size': str(size)}), read_splits(data)
        model = build_model(recipe, splits.label_names)
        config, augment = resolve_model_data_config(model), recipe.augment
        ours = build_train_loader(recipe.override({'workers': str(workers)}), splits.train, model)
        timms = create_loader(
            ImageDataset(str(data / 'train'), reader='folder', class_map=''), config['input_size'], recipe.batch_size,
            is_training=True, scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip, color_jitter=0.0,
            interpolation=config['interpolation'], mean=config['mean'], std=config['std'], num_workers=workers,
            use_prefetcher=False, persistent_workers=True, device=torch.device('cpu'))
        found = compare(
            {'timm': lambda: sum(len(images) for images, _ in timms),
             'engine': lambda: sum(len(batch.images) for batch in ours.batches(0))},
            repeats=7, clock=wall, case=f'{case}, {workers} workers', batch_size=recipe.batch_size)
        num_images = len(ours) * recipe.batch_size
        rows += [row | {'images_per_second': round(1e3 * num_images / float(str(row['median_ms'])))} for row in found]
    return rows


def processes(folder: Path, device: torch.device) -> list[dict[str, object]]:
    """Pictures a second of one and of two processes of one thread, the second epoch of two; in turns."""
    scenes = make_scenes(folder / 'scenes', SCENES)

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
        case='scenes_asl', batch_size=32)
    return [row | {'images_per_second': round(1e3 / float(str(row['median_ms'])))} for row in rows]


QUESTIONS = {'steps': steps, 'reading': reading, 'processes': processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', choices=QUESTIONS)
    parser.add_argument(
        '--device', type=torch.device, default=torch.device('cpu'), help='of the steps; the rest is of the CPU')
    ns = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for question in ns.only or QUESTIONS:
            where = ns.device if question == 'steps' else torch.device('cpu')
            save(
                f'training-{question}-{place(where)}', QUESTIONS[question](Path(name), ns.device), device=where)


if __name__ == '__main__':
    main()
