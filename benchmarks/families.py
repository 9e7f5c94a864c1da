"""Which of timm's architectures carry the head? All of them are asked, on the meta device: shapes without numbers.

    python benchmarks/families.py                # about 20 minutes, one process
    python benchmarks/families.py 'vit_*'        # those that match, printed and not saved

Each architecture goes through `attach_head` in training and through `timm.create_model('mldecoder', backbone=...)` in
evaluation, at its own input size: two images forward, the sum of the logits backward. It works if the logits have
their shape and every parameter that asks for a gradient gets one.
"""
import math
import sys
import warnings
from collections.abc import Callable
from typing import cast

import timm
import torch
from run import save
from timm.models import get_model_input_config, list_models, list_modules, model_entrypoint
from torch import Tensor, nn

from timm_miil.heads import BackboneWithHead, attach_head
from timm_miil.heads.attach import Features

BATCH, NUM_CLASSES = 2, 20


def attached(name: str) -> BackboneWithHead:
    return attach_head(timm.create_model(name, device='meta'), NUM_CLASSES).train()


def generic(name: str) -> BackboneWithHead:
    model = timm.create_model('mldecoder', backbone=name, num_classes=NUM_CLASSES, device='meta').eval()
    return cast(BackboneWithHead, model)


ENTRIES: dict[str, Callable[[str], BackboneWithHead]] = {'attach_head': attached, 'mldecoder': generic}


def image_size(model: nn.Module) -> tuple[int, int, int]:
    channels, height, width = get_model_input_config(model)['input_size']
    return channels, height, width


def step(model: BackboneWithHead) -> Features:
    """Images through the network and back; returns the features."""
    features = model.forward_features(torch.empty(BATCH, *image_size(model.backbone), device='meta'))
    logits = model.forward_head(features)
    if logits.shape != (BATCH, NUM_CLASSES):
        raise RuntimeError(f'logits have shape {tuple(logits.shape)}')
    params = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(logits.sum(), list(params.values()), allow_unused=True)
    without = [name for name, grad in zip(params, grads) if grad is None]
    if without:
        raise RuntimeError(f'{len(without)} parameters have no gradient: {", ".join(without[:3])}')
    return features


def facts(model: BackboneWithHead, features: Features) -> dict[str, object]:
    """What the features are; several branches are joined by +."""
    size = image_size(model.backbone)
    branches = [features] if isinstance(features, Tensor) else cast(list[Tensor], features)
    channels_dim = 1 if model.layout in ('NCHW', 'NCL') else -1
    channels = [branch.shape[channels_dim] for branch in branches]
    positions = [math.prod(branch.shape[1:]) // width for branch, width in zip(branches, channels)]
    try:
        grid = 'x'.join(map(str, model.token_grid(features, size[1:])))
    except ValueError:
        grid = 'several' if len(branches) > 1 else 'none'
    return {
        'input_size': 'x'.join(map(str, size)),
        'layout': model.layout,
        'channels': '+'.join(map(str, channels)),
        'num_features': getattr(model.backbone, 'num_features', ''),  # as timm states it
        'prefix_tokens': model.num_prefix_tokens,
        'positions': '+'.join(str(count - model.num_prefix_tokens) for count in positions),
        'grid': grid,
    }


def ask(name: str, module: str) -> dict[str, object]:
    row: dict[str, object] = {'architecture': name, 'module': module, **dict.fromkeys(ENTRIES, 'yes'), 'why_not': ''}
    for entry, build in ENTRIES.items():
        try:
            model = build(name)
            row |= facts(model, step(model))
        except Exception as error:  # whatever it is, it is the answer
            row |= {entry: 'no', 'why_not': f'{type(error).__name__}: {error}'.replace('\n', ' ')}
    return row


def works(row: dict[str, object]) -> bool:
    return all(row[entry] == 'yes' for entry in ENTRIES)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')  # timm's, on its own names
    pattern = sys.argv[1] if len(sys.argv) > 1 else ''
    rows = []
    for module in list_modules():
        for name in list_models(pattern, module=module):
            if model_entrypoint(name).__module__.startswith('timm.'):  # not ours
                rows.append(ask(name, module))
                print(name, *(rows[-1][entry] for entry in ENTRIES), rows[-1]['why_not'], flush=True)
    if not pattern:
        save('families', rows)
    families: dict[object, list[bool]] = {}
    for row in rows:
        families.setdefault(row['module'], []).append(works(row))
    print(f'{sum(map(works, rows))} of {len(rows)} architectures')
    print(f'{sum(map(any, families.values()))} of {len(families)} families have one that works, '
          f'{sum(map(all, families.values()))} have all')


if __name__ == '__main__':
    main()
