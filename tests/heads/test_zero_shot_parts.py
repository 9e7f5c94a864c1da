"""Parts of the zero-shot head that were replaced, hooked or altered take part in every call."""
import copy

import pytest
import torch
from test_zero_shot import build
from torch import nn
from torch.nn.utils import prune


@torch.no_grad()
def warm(head, features):
    logits = head(features)
    assert head._memo._entry is not None
    return logits


def test_embeddings_of_any_strides_are_remembered():
    head, features = build()
    embeddings = torch.randn(10, 7)
    head.set_queries(embeddings.T)
    first = warm(head, features)
    head.set_queries(embeddings.T.contiguous())
    torch.testing.assert_close(warm(head, features), first)


@pytest.mark.parametrize('chunk_size', [3, 20])
@pytest.mark.parametrize('part', ['word_embed', 'decoder', 'decoder.attn', 'decoder.norm1'])
def test_hooks_fire_and_what_they_give_counts(part, chunk_size):
    head, features = build(chunk_size=chunk_size)
    calls = []

    def hook(module, args, output):
        calls.append(module)
        return output.flip(-1)

    with torch.no_grad():
        before = head(features)
        head.get_submodule(part).register_forward_hook(hook)
        once = head(features)
        assert len(calls) == (1 if chunk_size > 7 else 3)
        assert not torch.allclose(once, before)
        assert torch.equal(head(features), once) and len(calls) == (2 if chunk_size > 7 else 6)
    assert head._memo._entry is None


def test_hooks_on_all_modules_see_all_modules():
    head, features = build()
    warm(head, features)
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        with torch.no_grad():
            head(features)
    finally:
        hook.remove()
    assert seen == set(head.modules())


def test_an_adapter_in_training_drops_out():
    head, features = build()
    plain = warm(head, features)
    head.word_embed = nn.Sequential(head.word_embed, nn.Dropout(0.5))
    with torch.no_grad():
        torch.testing.assert_close(head.eval()(features), plain)
        head.word_embed.train()
        assert not torch.equal(head(features), head(features))
    head.set_queries(torch.randn(4, 10))  # neither device nor dtype is asked of the part


def test_a_decoder_left_in_training_mode_is_not_remembered():
    head, features = build(drop_rate=0.5)
    warm(head, features)
    head.decoder.train()
    with torch.no_grad():
        head(features)
    assert head._memo._entry is None


@pytest.mark.parametrize('chunk_size', [3, 20])
def test_a_pruned_attention_trains(chunk_size):
    head, features = build(chunk_size=chunk_size)
    prune.l1_unstructured(head.decoder.attn, 'in_proj_weight', 0.5)
    want = copy.deepcopy(head.state_dict())
    for _ in range(2):
        head(features).sum().backward()
    weight = head.decoder.attn.in_proj_weight_orig
    assert weight.grad.any() and not weight.grad[want['decoder.attn.in_proj_weight_mask'] == 0].any()


@pytest.mark.parametrize('chunk_size', [3, 20])
def test_a_decoder_of_any_class_is_called(chunk_size):
    class Repeat(nn.Module):
        def forward(self, query, memory):
            return query.expand(len(memory), -1, -1)

    head, features = build(chunk_size=chunk_size)
    head.decoder = Repeat()
    query = head.word_embed(head.text_embeddings).relu()
    with torch.no_grad():
        torch.testing.assert_close(head(features), head.group_fc(query.expand(2, -1, -1)))


@pytest.mark.parametrize('change', [
    lambda decoder: setattr(decoder.attn, 'num_heads', 4), lambda decoder: setattr(decoder.norm1, 'eps', 1.0)])
def test_heads_and_eps_set_by_hand_are_seen(change):
    head, features = build()
    before = warm(head, features)
    change(head.decoder)
    fresh = copy.deepcopy(head)
    after = warm(head, features)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, fresh(features))
