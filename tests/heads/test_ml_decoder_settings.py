"""What ML-Decoder's evaluation remembers, and changes that no version counter sees."""
import pytest
import torch
from prepared_heads import FEATURES, assert_fresh, holds, new_head, warm


@pytest.mark.parametrize('kind', [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_past_the_version_counters_is_seen(kind):
    head = new_head()
    optimizer = kind(head.parameters(), lr=0.1, fused=True)
    head(FEATURES).square().sum().backward()
    with torch.no_grad():
        before = head(FEATURES)
    if holds(head):
        head._memo._entry.sample = None  # as on an accelerator
    counted = head.embed.weight._version
    optimizer.step()
    assert head.embed.weight._version == counted  # else this shows nothing
    assert not torch.allclose(assert_fresh(head), before)
    assert not holds(head)
    optimizer.zero_grad()
    warm(head)


@pytest.mark.parametrize('change', [
    lambda decoder: setattr(decoder.attn, 'num_heads', 4),
    *(lambda decoder, name=name: setattr(getattr(decoder, name), 'eps', 1.0) for name in ('norm1', 'norm2', 'norm3')),
])
def test_heads_and_eps_set_by_hand_are_seen(change):
    head = new_head()
    before = warm(head)
    change(head.decoder)
    assert not torch.allclose(assert_fresh(head), before)
