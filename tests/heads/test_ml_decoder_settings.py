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
