"""Does tagging many pictures keep the network busy? From files and shards to results, against the network alone.

    python benchmarks/tagging.py                                     # about 5 minutes on two cores
    python benchmarks/tagging.py --device cuda --workers 4 8 16      # in bfloat16; as many workers as it has cores

Pictures are JPEGs of 500 x 375 noise with about the spectrum of photographs; they lie in the system's cache, so that no
disk is measured. The network is as `--optimize` makes it; alone it has batches that lie ready on its device, in its
layout and dtype. Reading: what it takes to read and to preprocess the pictures in this process, and then all that
tagging does, for a network that does nothing. A start with nothing left to do is taken off each run, so that what stays
grows with the pictures: `start_ms` says how long it is.

Two clocks: the wall's, and the processor's, of this process and of its workers apart. Where all of them have a core,
pictures come at the rate of the slower of both; the wall says so only of a machine with nothing beside. On a CPU the
network has one thread, so that one worker has a core as well, and memory that is freed stays with the process.
"""
import argparse
import ctypes
import functools
import io
import itertools
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from in21k_loader import photograph
from run import save
from torch import Tensor, nn

from timm_miil.bench import compare, itself, place, quartiles
from timm_miil.inference import Tagger, load_image, optimize_for_inference, tag_to_folder

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4    # of malloc.h
CLASSES, TOPK = 9605, 10    # of Open Images
DISTINCT = 64               # pictures; their files are as many as are needed
SHARDS = 4
READY = 4                   # batches of the network alone, taken in turns
OUTPUTS = ('files', 'json'), ('shards', 'json'), ('shards', 'parquet')
CPU_PICTURES = {'mobilenetv3_large_100': 256, 'tresnet_l': 32}
CUDA_PICTURES = {'mobilenetv3_large_100': 16_384, 'tresnet_l': 16_384}


@dataclass(frozen=True)
class Pictures:
    """Some pictures as files and as webdataset shards, and where results go."""
    folder: Path
    count: int
    batch_size: int


class Spent(NamedTuple):
    """Seconds on the wall, and of a processor in this process and in those that it started and that have ended."""
    wall: float
    own: float
    workers: float
    start: float = 0.0


class Way(NamedTuple):
    """What runs, in how many workers."""
    run: Callable[[], Spent]
    workers: int = 0


class Nothing(nn.Module):
    """A network with the same scores for any picture."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.pretrained_cfg, self.num_classes = like.pretrained_cfg, CLASSES
        self.scores = nn.Parameter(torch.randn(1, CLASSES, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return self.scores.expand(len(images), CLASSES)


def make_pictures(folder: Path, count: int, batch_size: int) -> Pictures:
    distinct = [photograph(seed) for seed in range(min(DISTINCT, count))]
    for source in 'files', 'shards':
        (folder / source).mkdir()
    for number in range(count):
        (folder / 'files' / f'{number:07}.jpg').write_bytes(distinct[number % DISTINCT])
    for shard in range(SHARDS):
        with tarfile.open(folder / 'shards' / f'{shard:06}.tar', 'w') as tar:
            for number in range(shard, count, SHARDS):
                for suffix, data in ('jpg', distinct[number % DISTINCT]), ('json', b'{"labels": []}'):
                    member = tarfile.TarInfo(f'{number:07}.{suffix}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return Pictures(folder, count, batch_size)


# ---- contestants


def spent(run: Callable[[], object]) -> Spent:
    before = seconds()
    run()
    return Spent(*(after - each for after, each in zip(seconds(), before)))


def seconds() -> tuple[float, float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), *(each.ru_utime + each.ru_stime for each in used)


def tagging(tagger: Tagger, pictures: Pictures, source: str, format: str, workers: int) -> Spent:
    out = pictures.folder / f'tags-{time.monotonic_ns()}'

    def run() -> None:
        summary = tag_to_folder(
            tagger, [pictures.folder / source], out, format=format, batch_size=pictures.batch_size, num_workers=workers)
        assert summary is not None and (summary.tagged, summary.errors) == (pictures.count, 0), summary
    whole, start = spent(run), spent(run)
    return Spent(*(one - other for one, other in zip(whole[:3], start)), start=start.wall)


def ways(tagger: Tagger, pictures: Pictures, workers: Sequence[int]) -> dict[str, Way]:
    """Files to JSON with each number of workers, the others with the last."""
    return {
        f'{source} to {format}, {number} workers':
            Way(functools.partial(tagging, tagger, pictures, source, format, number), number)
        for number in workers for source, format in (OUTPUTS if number == workers[-1] else OUTPUTS[:1])}


def alone(tagger: Tagger, pictures: Pictures, batches: Sequence[Tensor]) -> Spent:
    def run() -> None:
        with torch.inference_mode():
            for batch in itertools.islice(itertools.cycle(batches), -(-pictures.count // pictures.batch_size)):
                scores = tagger.model(batch)
            scores.cpu()  # its end
    return spent(run)


def read(tagger: Tagger, pictures: Pictures) -> Spent:
    def run() -> None:
        for path in (pictures.folder / 'files').iterdir():
            tagger.prepare(load_image(path))
    return spent(run)


# ---- rows


def keep_memory() -> None:
    """What is freed stays with the process, where the C library is glibc.

    Else it is given back to the system after each batch or not, as the heap happens to lie, and the network's own page
    faults pass for costs of one contestant or the other.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, 'mallopt'):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def measure(
        contestants: dict[str, Way], repeats: int, pictures: Pictures, *, warmup: int, **case: object,
) -> list[dict[str, object]]:
    """Contestants take turns; all milliseconds but those of the start are of one picture."""
    took: dict[str, list[Spent]] = {name: [] for name in contestants}

    def turn(name: str) -> float:
        took[name].append(contestants[name].run())
        return took[name][-1].wall / pictures.count

    rows = compare(
        {name: functools.partial(turn, name) for name in contestants}, repeats=repeats, warmup=warmup, clock=itself,
        pictures=pictures.count, batch_size=pictures.batch_size, **case)
    took = {name: each[warmup:] for name, each in took.items()}
    unit = took[next(iter(contestants))]
    for row in rows:
        name = str(row['contestant'])
        own, workers = (
            quartiles([1e3 * value / pictures.count for value in values])
            for values in ([one.own for one in took[name]], [one.workers for one in took[name]]))
        of_unit = quartiles([one.own / other.own for one, other in zip(took[name], unit)])
        row |= {
            'workers': contestants[name].workers, 'images_per_second': rate(float(str(row['median_ms']))),
            'own_ms': own[1], 'workers_ms': workers[1], 'own_ratio': of_unit[1], 'own_ratio_q1': of_unit[0],
            'own_ratio_q3': of_unit[2], 'start_ms': quartiles([1e3 * one.start for one in took[name]])[1]}
    return rows


def rate(milliseconds: float) -> float:
    return float(f'{1e3 / milliseconds:.3g}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--workers', type=int, nargs='+', default=[1])
    parser.add_argument('--batch-size', type=int, help='default: 8 on a CPU, else 128')
    parser.add_argument('--repeats', type=int, default=5)
    ns = parser.parse_args()
    is_cpu = ns.device.type == 'cpu'
    if is_cpu:
        torch.set_num_threads(1)
        keep_memory()
    warmup = 0 if is_cpu else 1  # a device sets up, which takes seconds
    rows: list[dict[str, object]] = []
    for number, (name, count) in enumerate((CPU_PICTURES if is_cpu else CUDA_PICTURES).items()):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES).eval().to(ns.device)
        tagger, nothing = (
            Tagger(each, activation='sigmoid', topk=TOPK, device=ns.device) for each in (model, Nothing(model)))
        dtype = torch.float32 if is_cpu else torch.bfloat16
        tagger.model = optimize_for_inference(model, dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            pictures = make_pictures(Path(folder), count, ns.batch_size or (8 if is_cpu else 128))
            if number == 0:  # it does not depend on the network
                rows += measure(
                    {'read and preprocess': Way(functools.partial(read, tagger, pictures)),
                     **ways(nothing, pictures, ns.workers)}, ns.repeats, pictures, warmup=warmup, network='none')
                save(f'tagging-{place(ns.device)}', rows, device=ns.device, quiet=True)  # so far
            shape = READY, pictures.batch_size, *tagger.model.pretrained_cfg['input_size']
            ready = torch.rand(shape, device=ns.device, dtype=dtype)
            batches = [batch.contiguous(memory_format=torch.channels_last) for batch in ready]
            rows += measure(
                {'network alone': Way(functools.partial(alone, tagger, pictures, batches)),
                 **ways(tagger, pictures, ns.workers)}, ns.repeats, pictures, warmup=warmup, network=name)
            save(f'tagging-{place(ns.device)}', rows, device=ns.device, quiet=True)
    for row in rows:
        print(row['network'], row['contestant'], row['images_per_second'], row['own_ms'], row['workers_ms'], sep=', ')


if __name__ == '__main__':
    main()
