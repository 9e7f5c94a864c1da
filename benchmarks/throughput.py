"""How fast are our networks beside timm's, in every form, and how near to what the machine can do?

Forms of one network at one size take turns; ratios are to the first, the network as timm builds it, eager, in nchw. A
batch of one is timed from an idle device (latency), larger ones as queued work. On a CPU times are of the processor,
with one thread.

    python benchmarks/throughput.py                      # a CPU, minutes; --quick for a look that is not kept
    python benchmarks/throughput.py --device cuda        # a card, less than ten minutes
    python benchmarks/throughput.py --device cuda --full # hours; started again, it goes on
"""
import argparse
from pathlib import Path

import torch
from run import RESULTS

import timm_miil  # noqa: F401  registers our networks
from timm_miil.bench import Case, Journal, measure_groups, place, plan_groups, write_table
from timm_miil.inference import optimize_for_inference

MODELS = (
    'tresnet_l', 'mldecoder_tresnet_l', 'resnet50', 'tresnet_m', 'tresnet_xl', 'tresnet_v2_l', 'mobilenetv3_large_100',
    'hardcorenas_a', 'hardcorenas_f', 'vit_base_patch16_224', 'mixer_b16_224', 'mldecoder_resnet50')
LARGE = Case(model='tresnet_l', image_size=448), Case(model='mldecoder_tresnet_l', image_size=448)
QUICK = 'resnet50', 'tresnet_m', 'mobilenetv3_large_100'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    parser.add_argument('--full', action='store_true', help='all precisions and modes, without a limit of time')
    parser.add_argument('--quick', action='store_true', help='a few networks, printed')
    parser.add_argument('--output', type=Path, help='default: the file of results of the device')
    parser.add_argument('--minutes', type=float, default=9, help='begin no group after these')
    parser.add_argument('--seconds', type=float, default=2, help='of the rounds of a group')
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    path = options.output or (None if options.quick else RESULTS / f'throughput-{place(device)}.csv')
    journal = Journal(f'{path}.jsonl') if path else None
    result = measure_groups(
        plan(options, device.type == 'cuda'), device, journal=journal, optimize=optimize_for_inference,
        minutes=None if options.full else options.minutes, seconds=options.seconds,
        on_row=lambda row: print(*(row[name] for name in (
            'model', 'phase', 'variant', 'precision', 'layout', 'mode', 'image_size', 'batch_size', 'status',
            'images_per_second', 'ratio', 'of_roofline', 'note')), flush=True))
    if result.left_out:
        print(f'no time was left for {len(result.left_out)} cases; started again, it goes on')
    elif path and journal:
        write_table(path, result.rows)
        journal.path.unlink(missing_ok=True)


def plan(options: argparse.Namespace, is_cuda: bool) -> list[list[Case]]:
    """Inference, then training."""
    models = QUICK if options.quick else (*MODELS, *LARGE)
    if not is_cuda:
        full = dict(precisions=('fp32', 'amp_bf16', 'bf16'), modes=('eager', 'compile')) if options.full else {}
        inference = plan_groups(
            models, variants=('plain', 'optimized'), layouts=('nchw', 'nhwc'),
            batch_sizes=(1, 4) if options.full else (1,), **full)
        return inference + plan_groups(
            models[:3], phases=('training',), layouts=('nchw', 'nhwc'), batch_sizes=(4,), **full)
    if options.full:
        forms = dict(
            precisions=('amp_bf16', 'bf16', 'tf32', 'fp32'), layouts=('nchw', 'nhwc'),
            modes=('eager', 'compile', 'graphs'))
        batches, training_batches = (1, 32, 256, 1024), (32, 128)
    else:
        forms = dict(precisions=('amp_bf16', 'bf16'), layouts=('nchw', 'nhwc'))
        batches, training_batches = (256,), (128,)
    inference = plan_groups(models, variants=('plain', 'optimized'), batch_sizes=batches, **forms)
    training = plan_groups(models, phases=('training',), batch_sizes=training_batches, **forms)
    if options.full:
        return inference + training
    return inference + training + plan_groups(  # last: compiling takes most of the time
        models[:3], variants=('plain', 'optimized'), precisions=('amp_bf16', 'bf16'), layouts=('nhwc',),
        modes=('eager', 'compile'), batch_sizes=(1,))


if __name__ == '__main__':
    main()
