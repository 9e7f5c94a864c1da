"""What does ML-Decoder cost, against the loop one writes down from the paper, and of a whole model's time?

The loop version, at the end of this file, is the specification read line by line: queries of every image through the
norm and `nn.MultiheadAttention`, which computes and averages attention weights that nobody reads, and one product a
group into a slice of the output. Training is forward and backward, to the features and to every weight.

    python benchmarks/head.py
    python benchmarks/head.py --models          # the head's share of whole models
    python benchmarks/head.py --device cuda
"""
import argparse
import dataclasses
import functools
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from run import save
from torch import Tensor, nn

from timm_miil.bench import clocks_of, compare, place
from timm_miil.heads import MLDecoder

DTYPES = torch.float32, torch.bfloat16  # the latter by autocast
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CHECKED_IMAGES = 2
MODELS = ('resnet50', 224, 8), ('tresnet_l', 224, 8), ('tresnet_l', 448, 2)


@dataclass(frozen=True)
class Size:
    """Features, classes and groups; a compiler's minutes are spent where `compiles`, on a CPU in evaluation only."""

    features: tuple[int, ...]
    num_classes: int
    num_groups: int
    compiles: bool = False

    @property
    def in_features(self) -> int:
        return self.features[1] if len(self.features) == 4 else self.features[2]


SIZES = (
    Size((32, 2048, 7, 7), 1000, 100, compiles=True), Size((32, 2432, 14, 14), 80, 80),
    Size((16, 2048, 7, 7), 9605, 200), Size((32, 197, 768), 1000, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    parser.add_argument('--models', action='store_true', help='measure whole models instead')
    parser.add_argument('--eager', action='store_true', help='leave out what compiles')
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.models:
        rows = [row for model in MODELS for dtype in DTYPES for row in share(*model, dtype, device)]
        save(f'head-share-{place(device)}', rows, device=device)
        return
    rows = []
    for size in SIZES:
        size = dataclasses.replace(size, compiles=size.compiles and not options.eager)
        heads = build(size, device)
        for dtype in DTYPES:
            check(size, dtype, device)
            for mode in ('eval', 'train'):
                rows += measure(heads, size, dtype, mode, device)
                save(f'head-{place(device)}', rows, device=device, quiet=True)  # so far


def build(size: Size, device: torch.device, drop_rate: float = 0.1) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    settings = dict(
        in_features=size.in_features, num_classes=size.num_classes, num_groups=size.num_groups, drop_rate=drop_rate)
    ours = MLDecoder(**settings)
    nn.init.normal_(ours.decoder.attn.in_proj_bias, std=0.1)  # zero at the start of training, not later
    shared = MLDecoder(**settings, shared_query_dropout=True)
    heads = {'loop': LoopHead(**settings), 'ours': ours, 'ours, shared mask': shared}
    for head in heads.values():
        head.load_state_dict(ours.state_dict())
    return {name: head.to(device) for name, head in heads.items()}


def measure(
        heads: dict[str, nn.Module], size: Size, dtype: torch.dtype, mode: str, device: torch.device,
) -> list[dict[str, object]]:
    torch.compiler.reset()
    features = torch.randn(size.features, device=device).relu_()
    contestants = {
        name: head.train(mode == 'train') for name, head in heads.items()
        if mode == 'train' or name != 'ours, shared mask'}
    if size.compiles and (device.type == 'cuda' or mode == 'eval'):
        compiled = torch.compile(contestants['ours'], fullgraph=True, dynamic=False)
        contestants['ours, compiled'] = compiled  # type: ignore[assignment]
    run = evaluate if mode == 'eval' else step
    case = dict(
        mode=mode, dtype=str(dtype).removeprefix('torch.'), features='x'.join(map(str, size.features)),
        num_classes=size.num_classes, num_groups=size.num_groups)
    rows = []
    for clock_name, clock in clocks_of(device).items():
        found = compare(
            {name: functools.partial(run, head, features, dtype) for name, head in contestants.items()},
            repeats=25 if device.type == 'cuda' else 9 if mode == 'eval' else 5, clock=clock,
            warmup=3 if device.type == 'cuda' else 1, **case, timed=clock_name)
        print(case, clock_name, {row['contestant']: (row['median_ms'], row['ratio']) for row in found}, flush=True)
        rows += found
    return rows


def evaluate(head: nn.Module, features: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits: Tensor = head(features)
    return logits


def step(head: nn.Module, features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    head.zero_grad()
    features = features.detach().requires_grad_()
    with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = head(features)
    logits.float().square().sum().backward()
    assert features.grad is not None
    return logits.detach(), features.grad


def check(size: Size, dtype: torch.dtype, device: torch.device) -> None:
    """Stop if contestants disagree: in evaluation, and in training without dropout, down to the features' gradient."""
    heads = build(size, device, drop_rate=0.0)
    features = torch.randn(CHECKED_IMAGES, *size.features[1:], device=device).relu_()
    for found in (
            {name: (evaluate(head.eval(), features, dtype),) for name, head in heads.items()},
            {name: step(head.train(), features, dtype) for name, head in heads.items()}):
        for name, values in found.items():
            for value, wanted in zip(values, found['loop'], strict=True):
                error = float((value.double() - wanted.double()).norm() / wanted.double().norm())
                if not error <= TOLERANCE[dtype]:
                    raise SystemExit(f'{name} differs from the loop by {error:.2g} at {size} in {dtype}')


def share(
        name: str, pixels: int, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[dict[str, object]]:
    """The whole model in evaluation, and its head alone: the ratio is the head's share."""
    import timm_miil  # noqa: F401  registers `mldecoder`
    model = timm.create_model('mldecoder', backbone=name, num_classes=80).eval().to(device)
    images = torch.randn(batch_size, 3, pixels, pixels, device=device)
    with torch.no_grad():
        features = model.forward_features(images)
    rows = []
    for clock_name, clock in clocks_of(device).items():
        found = compare(
            {'model': functools.partial(evaluate, model, images, dtype),
             'head': functools.partial(evaluate, model.head, features, dtype)},
            repeats=30 if device.type == 'cuda' else 3, warmup=3 if device.type == 'cuda' else 1, clock=clock,
            mode='eval', dtype=str(dtype).removeprefix('torch.'), features='x'.join(map(str, features.shape)),
            num_classes=80, num_groups=80, model=f'{name} at {pixels}', timed=clock_name)
        print(
            name, pixels, dtype, clock_name, {row['contestant']: (row['median_ms'], row['ratio']) for row in found},
            flush=True)
        rows += found
    return rows


# ---- the head as one writes it down


class LoopHead(nn.Module):
    """ML-Decoder with the state-dict keys of ours."""

    def __init__(
            self, in_features: int, num_classes: int, num_groups: int, drop_rate: float, embed_dim: int = 768,
            num_heads: int = 8, feedforward_dim: int = 2048) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Linear(in_features, embed_dim)
        self.register_buffer('query_embed', torch.empty(num_groups, embed_dim))
        self.decoder = nn.ModuleDict({
            'norm1': nn.LayerNorm(embed_dim), 'attn': nn.MultiheadAttention(embed_dim, num_heads, drop_rate),
            'norm2': nn.LayerNorm(embed_dim), 'linear1': nn.Linear(embed_dim, feedforward_dim),
            'linear2': nn.Linear(feedforward_dim, embed_dim), 'norm3': nn.LayerNorm(embed_dim)})
        self.group_fc = nn.ParameterDict({
            'weight': torch.empty(num_groups, embed_dim, -(-num_classes // num_groups)),
            'bias': torch.empty(num_classes)})
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        memory = F.relu(self.embed(x), inplace=True).transpose(0, 1)
        layer = self.decoder
        query = self.query_embed.unsqueeze(1).expand(-1, len(x), -1)
        query = layer['norm1'](query + self.drop(query))
        query = layer['norm2'](query + self.drop(layer['attn'](query, memory, memory)[0]))
        hidden = self.drop(F.relu(layer['linear1'](query)))
        query = layer['norm3'](query + self.drop(layer['linear2'](hidden))).transpose(0, 1)
        weight = self.group_fc['weight']
        logits = torch.zeros(len(x), len(weight), weight.shape[2], device=x.device, dtype=x.dtype)
        for group in range(len(weight)):
            logits[:, group] = query[:, group] @ weight[group]
        logits = logits.flatten(1)[:, :self.num_classes]
        logits += self.group_fc['bias']
        return logits


if __name__ == '__main__':
    main()
