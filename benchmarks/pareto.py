"""How fast are the networks whose accuracy on ImageNet-1K is published? All take turns, in one form, at 224 pixels.

Their form is that of `optimize_for_inference` in channels_last: in float32 on a CPU, one picture at a time on one
thread; in bfloat16 on a GPU. Accuracies are the catalogue's; `page.py` draws one against the other.
"""
import argparse

import torch
from run import RESULTS

import timm_miil  # noqa: F401  registers our networks
from timm_miil import catalog
from timm_miil.bench import Case, environment, measure_ceilings, measure_group, place, write_table
from timm_miil.inference import optimize_for_inference

__all__ = ['IMAGE_SIZE', 'published_accuracies']

IMAGE_SIZE = 224


def published_accuracies() -> dict[str, list[tuple[str, float, str]]]:
    """Architecture -> (name of the weights, top-1 on ImageNet-1K at 224 pixels, origin) of the catalogue."""
    found: dict[str, list[tuple[str, float, str]]] = {}
    for name in catalog.weights():
        weight = catalog.weight(name)
        metric = next((each for each in weight.metrics if each.name == 'top1' and each.setting is None), None)
        if metric and weight.dataset == 'imagenet-1k' and weight.input_size[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
            found.setdefault(name.split('.')[0], []).append((name, metric.value, metric.origin))
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--batch-size', type=int, help='default: 1 on a CPU, else 256')
    parser.add_argument('--seconds', type=float, default=60, help='of the rounds, together')
    args = parser.parse_args()
    is_cpu = args.device.type == 'cpu'
    torch.set_num_threads(1)
    precision = 'fp32' if is_cpu else 'bf16'
    cases = [
        Case(model=name, variant='optimized', precision=precision, layout='nhwc', image_size=IMAGE_SIZE,
             batch_size=args.batch_size or (1 if is_cpu else 256))
        for name in published_accuracies()]
    rows = measure_group(
        cases, args.device, ceilings=measure_ceilings(args.device, precisions=(precision,)),
        optimize=optimize_for_inference, seconds=args.seconds)
    stamp = environment(args.device)
    write_table(RESULTS / f'pareto-{place(args.device)}.csv', [row | stamp for row in rows])
    for row in rows:
        print(row['model'], row['status'], row['images_per_second'], row['of_roofline'], row['note'])


if __name__ == '__main__':
    main()
