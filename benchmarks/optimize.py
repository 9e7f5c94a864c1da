"""What optimize_for_inference saves, against timm's own network, eager and compiled, in one process.

The unit is timm's network in NCHW, eager; at 16 bits the same under autocast.
"""
import argparse
import contextlib
from collections.abc import Callable

import timm
import torch
from run import save
from torch import Tensor, nn

import timm_miil  # noqa: F401  registers our networks
from timm_miil._tf32 import float32_products
from timm_miil.bench import clock_of, compare, place
from timm_miil.inference import optimize_for_inference

MODELS = 'tresnet_l', 'resnet50', 'mobilenetv3_large_100', 'vit_base_patch16_224', 'mldecoder_tresnet_l'


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--batch-size', type=int, help='default: 1 on a CPU, else 128')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--precisions', nargs='+', choices=('fp32', 'bf16'), default=('fp32', 'bf16'))
    parser.add_argument('--no-compile', action='store_true')
    args = parser.parse_args()
    if args.device.type == 'cpu':
        torch.set_num_threads(1)
    batch_size = args.batch_size or (1 if args.device.type == 'cpu' else 128)
    rows = []
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(args.device)
        x = torch.rand(batch_size, 3, args.image_size, args.image_size, device=args.device)
        for precision in args.precisions:
            ways = contestants(model, x, precision, compiled=not args.no_compile)
            exact = ways['timm'][1]().float()
            timed = compare(
                {way: run for way, (_, run) in ways.items()}, repeats=args.repeats, warmup=2,
                clock=clock_of(args.device), model=name, precision=precision, image_size=args.image_size,
                batch_size=batch_size)
            for row in timed:
                found = ways[str(row['contestant'])][1]().float()
                rows.append(row | {'distance': f'{float((found - exact).norm() / exact.norm()):.2g}'})
            torch.compiler.reset()
            save(f'optimize-{place(args.device)}', rows, device=args.device, quiet=True)  # what there is so far
            for row in timed:
                print(name, precision, row['contestant'], row['ratio'], flush=True)


Way = tuple[nn.Module, Callable[[], Tensor]]


def contestants(model: nn.Module, x: Tensor, precision: str, *, compiled: bool) -> dict[str, Way]:
    """Name -> network and what runs it; the first is the unit."""
    dtype = torch.bfloat16 if precision == 'bf16' else None
    fast = optimize_for_inference(model, dtype=dtype)
    plain = {'timm': model}
    ours = {'ours': fast}
    if compiled:
        plain['timm compiled'] = torch.compile(model)
        ours['ours compiled'] = torch.compile(fast)
    casts: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
        name: (lambda: torch.autocast(x.device.type, dtype)) if dtype else contextlib.nullcontext for name in plain}
    inputs = x.to(memory_format=torch.channels_last).to(dtype or x.dtype)

    def runner(network: nn.Module, pictures: Tensor, cast: Callable[[], contextlib.AbstractContextManager[object]]):
        def run() -> Tensor:
            with torch.inference_mode(), float32_products(x.device), cast():
                return network(pictures)
        return run

    return {name: (each, runner(each, x, casts[name])) for name, each in plain.items()} | {
        name: (each, runner(each, inputs, contextlib.nullcontext)) for name, each in ours.items()}


if __name__ == '__main__':
    main()
