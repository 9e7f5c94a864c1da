"""What semantic softmax costs, forward and backward.

    python benchmarks/semantic_softmax.py                  # one thread of the processor
    python benchmarks/semantic_softmax.py --device cuda
"""
import argparse
import functools
import random
from collections.abc import Callable

import torch
from run import save
from torch import Tensor
from torch.nn import functional as F

from timm_miil.bench import clocks_of, compare, place
from timm_miil.losses import SemanticHierarchy, SemanticSoftmaxLoss

BATCH_SIZES = (64, 256)
DTYPES = (torch.float32, torch.bfloat16)
# As many classes and levels as ImageNet-21K-P (fall11); how they spread over the depths is made up, and the 50 deepest
# classes are no level.
DEPTH_SIZES = (20, 60, 180, 500, 1200, 2400, 2900, 2200, 1100, 480, 131, 50)
SMOOTHING = 0.2
REPEATS = 15

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--eager', action='store_true', help='leave out what compiles')
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(1)
    class_tree = random_class_tree(random.Random(0))
    hierarchy = SemanticHierarchy.from_class_tree(class_tree).to(device)
    rows = []
    for dtype in DTYPES:
        for batch_size in BATCH_SIZES:
            generator = torch.Generator().manual_seed(batch_size)
            logits = torch.randn(batch_size, hierarchy.num_classes, generator=generator).to(dtype)
            targets = torch.randint(hierarchy.num_classes, (batch_size,), generator=generator)
            rows += measure(hierarchy, class_tree, logits.to(device), targets.to(device), compiles=not options.eager)
            save(f'semantic-softmax-{place(device)}', rows, device=device, quiet=True)  # so far


def measure(
        hierarchy: SemanticHierarchy,
        class_tree: list[list[int]],
        logits: Tensor,
        targets: Tensor,
        *,
        compiles: bool,
) -> list[dict[str, object]]:
    plain, ordered = (
        SemanticSoftmaxLoss(tree).to(logits.device) for tree in (hierarchy, hierarchy.level_ordered()))
    in_order = logits[:, hierarchy.level_order].contiguous()
    rank_targets = hierarchy.level_rank[targets]
    loops, loops_table = PerLevelLoop(hierarchy, class_tree), PerLevelLoop(hierarchy, None)
    contestants: dict[str, tuple[Loss, Tensor, Tensor]] = {
        'per-level loop': (loops, logits, targets),
        'per-level loop, table of targets': (loops_table, logits, targets),
        'F.cross_entropy': (cross_entropy, logits, targets),
        'ours': (plain, logits, targets),
        'ours, level order': (ordered, in_order, rank_targets)}
    if compiles:
        # For these shapes alone, as a training run would be.
        torch.compiler.reset()
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        contestants |= {
            'ours, compiled': (compiled(plain), logits, targets),
            'ours, level order, compiled': (compiled(ordered), in_order, rank_targets)}
    want, want_grad = run(loops, logits, targets)
    for name, contestant in contestants.items():
        if name != 'F.cross_entropy':
            order = hierarchy.level_order if 'level order' in name else slice(None)
            assert_same(*contestant, want, want_grad[:, order])
    rows = []
    for clock_name, clock in clocks_of(logits.device).items():
        found = compare(
            {name: functools.partial(run, *contestant) for name, contestant in contestants.items()},
            repeats=REPEATS, warmup=2, clock=clock, dtype=str(logits.dtype).removeprefix('torch.'),
            batch_size=len(logits), num_classes=logits.shape[1], levels=len(hierarchy.levels), timed=clock_name)
        print(clock_name, {row['contestant']: (row['median_ms'], row['ratio']) for row in found}, flush=True)
        rows += found
    return rows


def run(criterion: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = criterion(logits, targets)
    loss.backward()
    return loss.detach(), logits.grad


def assert_same(criterion: Loss, logits: Tensor, targets: Tensor, want: Tensor, want_grad: Tensor) -> None:
    loss, grad = run(criterion, logits, targets)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=2e-2 if grad.dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The unit: one softmax over all classes."""
    return F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)


class PerLevelLoop:
    """The straightforward form: a smoothed one-hot and a log-softmax for each level, summed over all samples.

    Semantic targets come from a Python loop over samples and their ancestors, as published, if a class tree is given;
    otherwise from a table.
    """

    def __init__(self, hierarchy: SemanticHierarchy, class_tree: list[list[int]] | None) -> None:
        self.hierarchy = hierarchy
        self.class_tree = class_tree
        self.level_classes = hierarchy.level_order[:sum(hierarchy.level_sizes)].split(hierarchy.level_sizes)
        self.ranks = [
            {index: place for place, index in enumerate(indices.tolist())} for indices in self.level_classes]

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        semantic_targets = self.hierarchy(targets) if self.class_tree is None else self.convert(targets)
        total = torch.zeros((), device=logits.device)
        for level, (indices, factor) in enumerate(zip(self.level_classes, self.hierarchy.level_factors)):
            log_prob = logits[:, indices].float().log_softmax(dim=1)
            level_targets = semantic_targets[:, level]
            one_hot = torch.zeros_like(log_prob).scatter_(1, level_targets.clamp(min=0)[:, None], 1.0)
            smoothed = one_hot * (1 - SMOOTHING) + SMOOTHING / len(indices)
            losses = -(smoothed * log_prob).sum(dim=1) * (level_targets >= 0)
            total = total + factor * losses.sum() / len(logits)
        return total

    def convert(self, targets: Tensor) -> Tensor:
        converted = torch.full((len(targets), len(self.level_classes)), -1)
        for row, target in enumerate(targets.tolist()):
            for depth, ancestor in enumerate(reversed(self.class_tree[target])):
                if depth < len(self.ranks):
                    converted[row, depth] = self.ranks[depth][ancestor]
        return converted.to(targets.device)


def random_class_tree(generator: random.Random) -> list[list[int]]:
    """Lists of ancestors for DEPTH_SIZES classes of each depth, numbered and hung at random."""
    indices = list(range(sum(DEPTH_SIZES)))
    generator.shuffle(indices)
    tree: list[list[int]] = [[] for _ in indices]
    above: list[int] = []
    for size in DEPTH_SIZES:
        here, indices = indices[:size], indices[size:]
        for index in here:
            tree[index] = [index, *tree[generator.choice(above)]] if above else [index]
        above = here
    return tree


if __name__ == '__main__':
    main()
