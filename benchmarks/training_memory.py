"""What a training step keeps for its backward pass, plain, with norms in place and with checkpoints, and its time.

Norms have weights and biases as after training; `kept_ratio_fresh` is of the network as it is made.
"""
import argparse
import copy
from collections.abc import Callable

import timm
import torch
from run import save
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import timm_miil  # noqa: F401  registers our networks
from timm_miil.bench import clock_of, compare, place
from timm_miil.models import convert_to_inplace_norm

MODELS = 'tresnet_m', 'tresnet_l', 'mldecoder_tresnet_l'
LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
MIB = 2**20


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--batch-size', type=int, help='default: 2 on a CPU, else 64')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--precisions', nargs='+', choices=('fp32', 'bf16'), default=('fp32', 'bf16'))
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=tuple(LAYOUTS))
    args = parser.parse_args()
    if args.device.type == 'cpu':
        torch.set_num_threads(1)
    batch_size = args.batch_size or (2 if args.device.type == 'cpu' else 64)
    rows: list[dict[str, object]] = []
    for name in args.models:
        torch.manual_seed(0)
        without_chance = {'decoder_drop_rate': 0.0} if name.startswith('mldecoder') else {}
        fresh = timm.create_model(name, **without_chance).train().to(args.device)
        learnt = settled(fresh)
        x = torch.rand(2 * batch_size, 3, args.image_size, args.image_size, device=args.device)
        exact = gradient(step_of(copy.deepcopy(learnt).double(), x[:batch_size].double(), bf16=False))
        for precision in args.precisions:
            for layout in args.layouts:
                bf16, pictures = precision == 'bf16', x.to(memory_format=LAYOUTS[layout])
                found = [
                    {key: model.to(memory_format=LAYOUTS[layout]) for key, model in forms(start).items()}
                    for start in (fresh, learnt)]
                kept = [{key: kept_per_image(model, pictures, bf16) for key, model in made.items()} for made in found]
                steps = {key: step_of(model, pictures[:batch_size], bf16) for key, model in found[1].items()}
                measured: dict[str, dict[str, object]] = {}
                for key, step in steps.items():
                    measured[key] = {
                        'kept_mib': f'{kept[1][key] / MIB:.2f}',
                        'kept_ratio': f'{kept[1][key] / kept[1]["plain"]:.4f}',
                        'kept_ratio_fresh': f'{kept[0][key] / kept[0]["plain"]:.4f}',
                        'peak_mib': peak(step, args.device),
                        'gradient_distance': f'{float((gradient(step) - exact).norm() / exact.norm()):.2g}'}
                timed = compare(
                    steps, repeats=args.repeats,
                    clock=clock_of(args.device), model=name, precision=precision, layout=layout,
                    image_size=args.image_size, batch_size=batch_size)
                rows += [row | measured[str(row['contestant'])] for row in timed]
                save(f'training-memory-{place(args.device)}', rows, device=args.device, quiet=True)  # so far
                for row in rows[-len(timed):]:
                    print(name, precision, layout, row['contestant'], row['kept_ratio'], row['ratio'], flush=True)


def settled(model: nn.Module) -> nn.Module:
    """A copy whose norms have learnt: no weight is 0, as those of residual branches are at first."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            nn.init.uniform_(module.weight, 0.2, 1)
            nn.init.normal_(module.bias, std=0.2)
    return model


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> network; the first is the unit."""
    inplace, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    convert_to_inplace_norm(inplace)
    checkpointed.set_grad_checkpointing()  # type: ignore[operator]
    return {'plain': copy.deepcopy(model), 'in place': inplace, 'checkpoints': checkpointed}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of what is kept for the backward pass, but parameters and the input; one storage counts once."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node kept would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # alive, and with it all that is kept
    del output
    return sum(size for pointer, size in kept.items() if pointer not in ours)


def kept_per_image(model: nn.Module, x: Tensor, bf16: bool) -> float:
    """What a picture more keeps, which the copies of weights that autocast makes are no part of."""
    half = len(x) // 2
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return (kept_bytes(model, x) - kept_bytes(model, x[:half].clone(memory_format=torch.preserve_format))) / half


def step_of(model: nn.Module, x: Tensor, bf16: bool) -> Callable[[], nn.Module]:
    """Forward and backward pass; gives the network, with its gradients."""
    def step() -> nn.Module:
        model.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = model(x)
        output.to(torch.promote_types(output.dtype, torch.float32)).square().mean().backward()
        return model
    return step


def gradient(step: Callable[[], nn.Module]) -> Tensor:
    """All gradients of a step in float64, one after another."""
    return torch.cat([parameter.grad.double().flatten() for parameter in step().parameters()])


def peak(step: Callable[[], nn.Module], device: torch.device) -> float | str:
    """MiB that a step takes beyond what is there before it; '' on a CPU."""
    if device.type == 'cpu':
        return ''
    step().zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


if __name__ == '__main__':
    main()
