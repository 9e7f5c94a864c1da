"""How fast do prepared pictures of ImageNet-21K-P reach the step, and what holds them up?

    python benchmarks/in21k_loader.py           # about 5 minutes
    python benchmarks/in21k_loader.py --quick   # about 1 minute

Pictures are noise with about the spectrum of photographs, prepared at 224 pixels by `prepare_in21k`; their targets have
11,221 columns. They lie in the system's cache, so that no disk is measured.

Stages: one process, its processor's time; each contestant does one stage more than the one before, and what a stage
takes is the difference. Loaders: batches of 64 with the transform of the recipe `in21k_semantic`, by worker processes
that are there already, on the wall. "Transport alone" is the engine's loader with pictures that lie ready in each
worker: what is left is to gather them and to hand them over, which is the most that any number of workers can give.
"""
import argparse
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from run import save
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from timm_miil.bench import compare, processor, wall
from timm_miil.data import (
    LabelledImages, MultiLabelDataset, MultiLabelRecords, create_paper_transform, load_image, open_split,
    prepare_in21k, write_shards)
from timm_miil.data.shards import ShardStream
from timm_miil.train import load_recipe
from timm_miil.train.build import build_train_loader

SIDE_PX, SOURCE_PX = 224, (500, 375)
CLASSES, SYNSETS, VAL_IMAGES, BATCH = 11_221, 16, 1, 64
DISTINCT = 64          # pictures; their files are as many as are needed
CONTRAST, FALL = 0.15, 1.4  # of the noise: they give files of the size that photographs have here, about 25 kB
WORKERS = (1, 2, 4, 8, 16, 32)


# ---- the pictures


def photograph(seed: int) -> bytes:
    """A JPEG of coloured noise whose amplitude falls with frequency about as in photographs."""
    generator = np.random.default_rng(seed)
    width, height = SOURCE_PX
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = generator.standard_normal((4, *frequency.shape)) + 1j * generator.standard_normal((4, *frequency.shape))
    fields = np.fft.irfft2(noise / frequency ** FALL, (height, width))
    fields /= fields.std((1, 2), keepdims=True)
    rgb = 0.5 + CONTRAST * (fields[:1] + 0.4 * fields[1:])   # much in common, as of real colours
    buffer = io.BytesIO()
    Image.fromarray((255 * rgb.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)).save(buffer, 'JPEG', quality=90)
    return buffer.getvalue()


def prepared(folder: Path, num_images: int) -> tuple[MultiLabelRecords, ShardStream]:
    """The same pictures as class folders and as shards, with the columns of all classes."""
    pictures = [photograph(seed) for seed in range(DISTINCT)]
    for number in range(SYNSETS):
        synset = folder / 'release' / f'n{number:08d}'
        synset.mkdir(parents=True)
        for place in range(VAL_IMAGES + num_images // SYNSETS):
            (synset / f'{place}.JPEG').write_bytes(pictures[(number + place) % DISTINCT])
    out = folder / 'in21k'
    prepare_in21k(
        folder / 'release', out, release='custom', min_images=VAL_IMAGES, val_images=VAL_IMAGES, size=SIDE_PX)
    records = open_split(out, 'train', labels=[f'n{number:08d}' for number in range(CLASSES)])
    assert isinstance(records, MultiLabelRecords)
    write_shards(records, folder / 'shards', split='train', seed=0, images_per_shard=256, check_images=False)
    stream = open_split(folder / 'shards', 'train')
    assert isinstance(stream, ShardStream)
    return records, stream


# ---- stages


def stages(records: MultiLabelRecords, stream: ShardStream, settings: dict[str, Sequence[float]], repeats: int,
           ) -> list[dict[str, object]]:
    num_images = len(records)
    augment = create_paper_transform(SIDE_PX, is_training=True, **settings)
    plain = create_paper_transform(SIDE_PX, is_training=False, **settings)
    paths, dataset = list(records.image_paths), MultiLabelDataset(records, augment, seed=0)

    def walk(use: Callable[[Callable[[], Image.Image], Tensor], object]) -> None:
        unread = stream.iterate_unread(seed=0, epoch=0, process=0, num_processes=1)
        for read, targets, _ in unread:
            use(read, targets)

    def batches_of_stream() -> None:
        unread = stream.iterate_unread(seed=0, epoch=0, process=0, num_processes=1)
        for _ in range(num_images // BATCH):
            default_collate([
                (augment(read()), targets.float()) for read, targets, _ in itertools.islice(unread, BATCH)])

    def each(use: Callable[[Path], object]) -> None:
        for path in paths:
            use(path)

    cases: dict[str, dict[str, Callable[[], object]]] = {
        'folders': {
            'read': lambda: each(Path.read_bytes),
            'decode': lambda: each(load_image),
            'tensor': lambda: each(lambda path: plain(load_image(path))),
            'augment': lambda: each(lambda path: augment(load_image(path))),
            'targets and batch': lambda: [
                default_collate(dataset.__getitems__(range(start, start + BATCH)))
                for start in range(0, num_images, BATCH)]},
        'shards': {
            'read': lambda: walk(lambda read, targets: None),
            'decode': lambda: walk(lambda read, targets: read()),
            'tensor': lambda: walk(lambda read, targets: plain(read())),
            'augment': lambda: walk(lambda read, targets: augment(read())),
            'targets and batch': batches_of_stream}}
    kilobytes = sum(path.stat().st_size for path in paths) / num_images / 1e3
    rows = []
    for case, contestants in cases.items():
        found = compare(contestants, repeats=repeats, clock=processor, case=f'stages of {case}', workers=0)
        before, last = 0.0, 1e3 * float(str(found[-1]['median_ms'])) / num_images
        for row in found:
            microseconds = 1e3 * float(str(row['median_ms'])) / num_images
            rows.append(row | {
                'images_per_second': round(1e6 / microseconds), 'microseconds': round(microseconds),
                'stage_microseconds': round(microseconds - before),
                'stage_share': round((microseconds - before) / last, 2), 'kilobytes': round(kilobytes, 1)})
            before = microseconds
        slowest = max(rows[-len(found):], key=lambda row: float(str(row['stage_share'])))
        print(f'{case}: of one process most time goes to "{slowest["contestant"]}", {slowest["stage_share"]:.0%}')
    return rows


# ---- loaders


class Ready(LabelledImages):
    """Pictures that need not be read."""

    def __init__(self, records: MultiLabelRecords) -> None:
        super().__init__(records.labels, records.label_names)
        self.image = Image.new('RGB', (SIDE_PX, SIDE_PX))

    def load_image(self, index: int) -> Image.Image:
        return self.image

    def image_name(self, index: int) -> str:
        return str(index)

    def select(self, rows: object) -> 'Ready':
        raise NotImplementedError('nothing here selects')


def ready_tensor(image: Image.Image, tensor: Tensor = torch.zeros(3, SIDE_PX, SIDE_PX)) -> Tensor:
    return tensor


def all_of(batches: Iterable[Sequence[Tensor]], num_images: int) -> None:
    found = sum(len(batch[0]) for batch in batches)
    assert found == num_images, (found, num_images)


def loaders(
        records: MultiLabelRecords, stream: ShardStream, model: torch.nn.Module, workers: int, repeats: int,
) -> list[dict[str, object]]:
    recipe = load_recipe('in21k_semantic').override({'batch_size': str(BATCH), 'workers': str(workers)})
    config = resolve_model_data_config(model)
    augment = create_paper_transform(SIDE_PX, is_training=True, mean=config['mean'], std=config['std'])
    folders, shards, ready = (build_train_loader(recipe, source, model) for source in (records, stream, Ready(records)))
    ready.dataset.transform = ready_tensor  # type: ignore[attr-defined]
    root = str(records.image_paths.root)
    timms = create_loader(
        ImageDataset(root, reader='folder', class_map=''), config['input_size'], BATCH, is_training=True,
        num_workers=workers, use_prefetcher=False, persistent_workers=True, device=torch.device('cpu'))
    timms.dataset.transform = augment  # the same for all
    plain = DataLoader(
        ImageFolder(root, augment), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)
    passes: dict[str, Callable[[], Iterable[Sequence[Tensor]]]] = {
        'engine, folders': lambda: folders.batches(0), 'engine, shards': lambda: shards.batches(0),
        'timm': lambda: timms, 'ImageFolder': lambda: plain, 'transport alone': lambda: ready.batches(0)}
    contestants = {
        name: lambda batches=batches: all_of(batches(), len(records)) for name, batches in passes.items()}
    found = compare(contestants, repeats=repeats, clock=wall, case='loaders', workers=workers)
    rows = []
    for row in found:
        rate = 1e3 * len(records) / float(str(row['median_ms']))
        rows.append(row | {'images_per_second': round(rate), 'images_per_second_and_worker': round(rate / workers)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='fewer pictures, rounds and numbers of workers')
    ns = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    counts = [workers for workers in WORKERS if workers < cores] + [cores]
    if ns.quick:
        counts = sorted({1, max(cores // 2, 1), cores})
    repeats, each = (2, 3 * BATCH) if ns.quick else (5, 8 * BATCH)
    model = timm.create_model('resnet18', num_classes=1)
    config = resolve_model_data_config(model)
    with tempfile.TemporaryDirectory() as name:
        rows = stages(
            *prepared(Path(name) / 'stages', 2 * BATCH), {'mean': config['mean'], 'std': config['std']},
            repeats=3 if ns.quick else 9)
        for workers in counts:
            # As many pictures a worker, so that each round takes about as long.
            rows += loaders(*prepared(Path(name) / f'{workers}', each * workers), model, workers, repeats)
            save('in21k-loader-cpu', rows, quiet=True)  # so far
    save('in21k-loader-cpu', rows)


if __name__ == '__main__':
    main()
