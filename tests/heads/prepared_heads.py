"""Small ML-Decoder heads, and what they give without anything prepared."""
import copy

import torch
from torch import nn

from timm_miil.heads import MLDecoder

FEATURES = torch.randn(3, 6, 2, 2, generator=torch.Generator().manual_seed(1))


def new_head(**settings):
    torch.manual_seed(0)
    settings = dict(num_classes=25, num_groups=6, embed_dim=16, num_heads=2, feedforward_dim=10) | settings
    head = MLDecoder(6, **settings).eval()
    for name, parameter in head.named_parameters():
        if 'weight' not in name or 'norm' in name:
            nn.init.normal_(parameter)
    return head


def plain(head, features=FEATURES, low=None):
    """The logits with a gradient to flow: nothing is prepared."""
    with torch.enable_grad(), torch.autocast('cpu', dtype=low or torch.bfloat16, enabled=low is not None):
        logits = head(features)
    assert logits.requires_grad and not holds(head)
    return logits.detach()


@torch.no_grad()
def warm(head, features=FEATURES):
    logits = head(features)
    assert holds(head)
    return logits


def holds(head):
    return head._memo._entry is not None


def assert_fresh(head, features=FEATURES, **close):
    """What evaluation gives now is what an empty copy computes plainly."""
    with torch.no_grad():
        got = head(features)
    torch.testing.assert_close(got, plain(copy.deepcopy(head), features), **close)
    return got


@torch.no_grad()
def in_place(tensor):
    tensor.pow_(2)  # a norm would take out a factor
