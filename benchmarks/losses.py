"""What ASL and CSL cost, forward and backward, beside binary cross-entropy, timm's ASL and the plain formulas.

    python benchmarks/losses.py                  # one thread of the processor, about 12 minutes
    python benchmarks/losses.py --device cuda

Logits are of a network that has begun to train, N(-3, 2), where about half of the negatives are above the clip; for
9605 classes also of a trained one, N(-7, 1.5), where 0.6 % are. Targets are float32, 3 % (80 classes) or 0.1 % of them
positive; for CSL half of the labels are unannotated. "Bytes alone" copies as many bytes as logits, targets and gradient
have, which no loss can do without: its time by that of a loss is the part of the copy bandwidth that the loss reaches.
Peak memory is what is allocated above the inputs at any moment, in bytes a label.
"""
import argparse
import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import timm.loss
import torch
from run import save
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from timm_miil.bench import clocks_of, compare, place
from timm_miil.losses import AsymmetricLoss, ClassAwareSelectiveLoss

Loss = Callable[[Tensor, Tensor], Tensor]

DTYPES = (torch.float32, torch.bfloat16)
CSL = dict(mode='selective', gamma_pos=0.0, gamma_neg=4.0, gamma_unann=4.0, likelihood_topk=5, prior_threshold=0.5)


@dataclass(frozen=True)
class Size:
    batch_size: int
    num_classes: int
    is_trained: bool = False
    compiles: bool = False  # compiling takes longer than all the rest

    @property
    def elements(self) -> int:
        return self.batch_size * self.num_classes


SIZES = (
    Size(64, 80, compiles=True), Size(1024, 80), Size(256, 1000, compiles=True), Size(64, 9605, compiles=True),
    Size(64, 9605, is_trained=True), Size(256, 11221, compiles=True), Size(1024, 11221))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    parser.add_argument('--eager', action='store_true', help='leave out what compiles, which takes most of the time')
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        size = dataclasses.replace(size, compiles=size.compiles and not options.eager)
        for dtype in DTYPES:
            rows += measure(size, dtype, device)
            save(f'losses-{place(device)}', rows, device=device, quiet=True)  # so far


def measure(size: Size, dtype: torch.dtype, device: torch.device) -> list[dict[str, object]]:
    torch.compiler.reset()
    logits, targets, partial, prior = draw(size, dtype, device)
    asl = AsymmetricLoss()
    csl = ClassAwareSelectiveLoss(prior=prior, **CSL).to(device)
    timm_asl, timm_coupled = (
        timm.loss.AsymmetricLossMultiLabel(gamma_pos=0, disable_torch_grad_focal_loss=detach, reduction='sum')
        for detach in (True, False))
    contestants: dict[str, dict[str, Loss]] = {
        'asl': {'BCEWithLogits': bce, 'timm': timm_asl, 'plain formula': plain_asl, 'ours': asl},
        # The gradient goes through the weight, as is timm's default.
        'asl coupled': {'BCEWithLogits': bce, 'timm': timm_coupled, 'ours': AsymmetricLoss(detach_focal=False)},
        'csl': {'BCEWithLogits': bce, 'sort formula': functools.partial(sorted_csl, prior=prior), 'ours': csl},
    }
    if size.compiles:
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        contestants['asl'] |= {
            'BCEWithLogits compiled': compiled(bce), 'timm compiled': compiled(timm_asl),
            'ours compiled': compiled(asl)}
        contestants['csl'] |= {'ours compiled': compiled(csl)}
    rows = []
    for loss, others in contestants.items():
        wanted = partial if loss == 'csl' else targets
        check({name: other for name, other in others.items() if 'BCE' not in name}, logits, wanted)
        case = dict(
            loss=loss, dtype=str(dtype).removeprefix('torch.'), batch_size=size.batch_size,
            num_classes=size.num_classes, logits='N(-7, 1.5)' if size.is_trained else 'N(-3, 2)')
        runs = {
            name: functools.partial(step, other, logits, targets if other is bce else wanted)
            for name, other in others.items()}
        moved = torch.empty((2 * logits.nbytes + wanted.nbytes) // 2, dtype=torch.uint8, device=device)
        runs['bytes alone'] = functools.partial(torch.empty_like(moved).copy_, moved)
        peaks = {name: round(peak_memory(run, logits) / size.elements, 1) for name, run in runs.items()}
        for clock_name, clock in clocks_of(device).items():
            found = compare(
                runs, repeats=50 if device.type == 'cuda' else 25 if size.elements < 1e6 else 9, warmup=3, clock=clock,
                **case, timed=clock_name)
            rows += [row | {'peak_bytes_per_label': peaks[str(row['contestant'])]} for row in found]
            print(
                case, clock_name, {row['contestant']: (row['median_ms'], row['ratio']) for row in found}, flush=True)
    return rows


def draw(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size.elements)
    shape = size.batch_size, size.num_classes
    mean, std = (-7.0, 1.5) if size.is_trained else (-3.0, 2.0)
    logits = (torch.randn(shape, generator=generator) * std + mean).to(dtype)
    targets = (torch.rand(shape, generator=generator) < (0.03 if size.num_classes == 80 else 0.001)).float()
    partial = targets.masked_fill(torch.rand(shape, generator=generator) < 0.5, -1)
    prior = torch.rand(size.num_classes, generator=generator)
    return logits.to(device).requires_grad_(), targets.to(device), partial.to(device), prior.to(device)


def step(criterion: Loss, logits: Tensor, targets: Tensor) -> None:
    logits.grad = None
    criterion(logits, targets).backward()


def check(contestants: dict[str, Loss], logits: Tensor, targets: Tensor) -> None:
    """Stop if contestants disagree by more than rounding of their output; bfloat16 logits tie, so there CSL may."""
    found = {}
    for name, criterion in random.Random(0).sample(list(contestants.items()), len(contestants)):
        loss = criterion(logits, targets)
        grad, = torch.autograd.grad(loss, logits)
        found[name] = loss.double().item(), grad.double()
    value, grad = next(iter(found.values()))
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    for name, (other, other_grad) in found.items():
        error = float((other_grad - grad).norm() / grad.norm())
        if abs(other - value) > tolerance * abs(value) or error > tolerance:
            raise SystemExit(f'{name} differs: loss {other} and {value}, gradient by {error:.2g}')


def peak_memory(run: Callable[[], None], logits: Tensor) -> float:
    """Most bytes allocated at any moment of a run, above what was there."""
    run()
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            now += event.nbytes()
            peak = max(peak, now)
    return float(peak)


# ---- the formulas as one writes them down


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction='sum')


def plain_asl(logits: Tensor, targets: Tensor) -> Tensor:
    """gamma- 4, gamma+ 0, clip 0.05, with the weight detached."""
    logits = logits.float()
    prob = logits.sigmoid()
    truth = targets * prob + (1 - targets) * (1 - prob + 0.05).clamp(max=1)
    weight = (1 - truth.detach()) ** (4 * (1 - targets))
    return -(weight * truth.clamp(min=1e-8).log()).sum()


def sorted_csl(logits: Tensor, targets: Tensor, prior: Tensor) -> Tensor:
    """Mode 'selective' of `CSL`, the most likely unannotated labels found by sorting all of them."""
    logits = logits.float()
    is_pos, is_unknown = (targets == 1).float(), (targets == -1).float()
    is_neg = 1 - is_pos - is_unknown
    prob = logits.sigmoid()
    kept = torch.ones_like(logits)
    kept[:, prior > CSL['prior_threshold']] = 0
    order = torch.where(is_unknown > 0, prob, -1.0).flatten().argsort(descending=True)
    kept.view(-1)[order[:CSL['likelihood_topk'] * len(logits)]] = 0
    kept = torch.where(is_unknown > 0, kept, 1.0)
    log_truth = is_pos * prob.clamp(min=1e-8).log() + (1 - is_pos) * (1 - prob).clamp(min=1e-8).log()
    wrong = (1 - prob * is_pos - (1 - prob) * (1 - is_pos)).detach()
    gamma = CSL['gamma_pos'] * is_pos + CSL['gamma_neg'] * is_neg + CSL['gamma_unann'] * is_unknown
    return -(log_truth * wrong ** gamma * kept).sum()


if __name__ == '__main__':
    main()
