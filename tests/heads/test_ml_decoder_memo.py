"""What ML-Decoder's evaluation computes once: equal to the plain computation, and never out of date."""
import copy
import io
import pickle
import threading

import pytest
import torch
from prepared_heads import FEATURES, assert_fresh, holds, in_place, new_head, plain, warm
from timm.utils import ModelEmaV3
from torch import nn

from timm_miil.heads import MLDecoder
from timm_miil.heads._prepared import Memo


@pytest.mark.parametrize('shape', [(3, 6, 2, 2), (3, 5, 6), (2, 6, 12, 12), (1, 6, 1, 1), (0, 5, 6)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_prepared_logits_are_the_plain_ones(shape, dtype, tolerance):
    head = new_head(dtype=dtype)
    features = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(warm(head, features), plain(head, features), rtol=tolerance, atol=tolerance)
    if len(shape) == 4:
        channels_last = features.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(warm(head, channels_last), plain(head, features), rtol=tolerance, atol=tolerance)


def test_batches_in_pieces_are_whole(monkeypatch):
    head = new_head(dtype=torch.float64)
    features = torch.randn(7, 6, 2, 2, dtype=torch.float64)
    monkeypatch.setattr('timm_miil.heads._prepared.PIECE_BYTES', features.nbytes // 3)
    torch.testing.assert_close(warm(head, features), plain(head, features), rtol=1e-10, atol=1e-10)


def test_the_query_is_projected_once():
    head = new_head()
    first = warm(head)
    entry = head._memo._entry
    assert torch.equal(warm(head), first)
    assert head._memo._entry is entry
    warm(head, torch.randn(2, 5, 6))
    assert head._memo._entry is entry


def optimizer_step(head):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head(FEATURES).square().sum().backward()
    optimizer.step()


def load(assign):
    def change(head):
        state = {key: tensor + 0.5 for key, tensor in head.state_dict().items()}
        head.load_state_dict(state, assign=assign)
    return change


def swap_parameter(head):
    attn = head.decoder.attn
    attn.in_proj_weight = nn.Parameter(attn.in_proj_weight.detach() * 1.5)


def ema_update(head):
    other = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ema = ModelEmaV3(head, decay=0.5)
    ema.module = head  # the averaged copy is what evaluates
    ema.update(other)


@torch.inference_mode()
def in_place_in_inference_mode(head):
    head.query_embed.pow_(2)


CHANGES = {
    'optimizer step': optimizer_step,
    'query, in place': lambda head: in_place(head.query_embed),
    'query, one number': lambda head: in_place(head.query_embed[0, 1:2]),  # not in the sample
    'norm, in place': lambda head: in_place(head.decoder.norm1.bias),
    'norm behind, in place': lambda head: in_place(head.decoder.norm3.weight),
    'projection, in place': lambda head: in_place(head.decoder.attn.in_proj_weight[:16]),
    'value bias, in place': lambda head: in_place(head.decoder.attn.in_proj_bias[32:]),
    'output, in place': lambda head: in_place(head.decoder.attn.out_proj.weight),
    'group weight, in place': lambda head: in_place(head.group_fc.weight),
    'class bias, in place': lambda head: in_place(head.group_fc.bias),
    'embedding, in place': lambda head: in_place(head.embed.weight),
    'in inference mode': in_place_in_inference_mode,
    'load_state_dict': load(assign=False),
    'load_state_dict, assigned': load(assign=True),
    'new parameter': swap_parameter,
    'averaged weights': ema_update,
    '.data, in place': lambda head: head.decoder.attn.in_proj_weight.data.mul_(1.5),
    '.data, all of it': lambda head: [p.data.copy_(p.data * 1.5) for p in head.parameters()] and None,
    '.data, assigned': lambda head: setattr(head.query_embed, 'data', head.query_embed ** 2),
    'reset_parameters': MLDecoder.reset_parameters,
    'reset_classes': lambda head: head.reset_classes(3),
    'new first norm': lambda head: setattr(head.decoder, 'norm1', nn.LayerNorm(16)),
    'new last norm': lambda head: setattr(head.decoder, 'norm3', nn.LayerNorm(16)),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_of_weights_is_seen(change):
    head = new_head()
    before = warm(head)
    CHANGES[change](head)
    after = assert_fresh(head)
    assert before.shape != after.shape or not torch.allclose(before, after)


def test_conversions_there_and_back_are_seen():
    head = new_head()
    before = warm(head)
    head.to(torch.bfloat16)
    assert not holds(head)
    assert warm(head, FEATURES.bfloat16()).dtype == torch.bfloat16
    head.to(torch.float32)
    rounded = assert_fresh(head)
    assert not torch.equal(before, rounded)
    assert warm(head.double(), FEATURES.double()).dtype == torch.float64


def test_training_forgets():
    head = new_head()
    warm(head)
    head.train()
    assert not holds(head)
    with torch.no_grad():
        head(FEATURES)
    assert not holds(head)
    warm(head.eval())
    head.eval()  # a loop that shards weights steps between calls of train and eval
    assert not holds(head)
    warm(head)
    head.forget()
    assert not holds(head)


def test_gradients_flow_after_evaluation_and_evaluation_is_not_used_for_them():
    head = new_head(dtype=torch.float64)
    features = FEATURES.double().requires_grad_()
    with torch.inference_mode():
        first = head(features)
    with torch.no_grad():
        assert torch.equal(head(features), first)  # prepared in inference mode, used outside
    assert torch.autograd.gradcheck(head, features)
    head(features).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_frozen_head_passes_gradients_to_the_features():
    head = new_head(dtype=torch.float64)
    features = FEATURES.double().requires_grad_()
    wanted, = torch.autograd.grad(head(features).square().sum(), features)
    head.requires_grad_(False)
    with torch.inference_mode():
        head(features)
    got, = torch.autograd.grad(head(features).square().sum(), features)
    assert holds(head)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    many = torch.randn(2, 6, 12, 12, dtype=torch.float64, requires_grad=True)  # the product reads this map in place
    assert torch.autograd.gradcheck(lambda x: head(x)[:, :2], many[:1, :, :, :].detach().requires_grad_())


@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16])
def test_autocast_is_part_of_what_is_remembered(low):
    head = new_head(embed_dim=64)
    wide = warm(head)
    with torch.autocast('cpu', dtype=low):
        narrow = warm(head)
        assert torch.equal(warm(head), narrow)
    wanted = plain(copy.deepcopy(head), low=low)
    assert narrow.dtype == wanted.dtype
    assert (narrow - wide).norm() / wide.norm() < 0.02
    assert (narrow - wanted).norm() / wide.norm() < 0.02
    assert not torch.equal(narrow, wide)
    assert torch.equal(warm(head), wide)
    with torch.autocast('cpu', dtype=low):
        assert torch.equal(warm(head), narrow)
    assert torch.equal(warm(head), wide)


def test_autocast_with_float64_weights_keeps_them():
    head = new_head(dtype=torch.float64)
    with torch.autocast('cpu'):
        got = warm(head, FEATURES.double())
    torch.testing.assert_close(got, warm(head, FEATURES.double()))


def test_evaluation_under_autocast_leaves_gradients_of_a_later_step():
    head = new_head()
    with torch.autocast('cpu'):
        warm(head)
        head(FEATURES).float().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_copies_and_pickles_start_empty():
    head = new_head()
    logits = warm(head)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert not holds(twin)
        torch.testing.assert_close(warm(twin), logits)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    assert not holds(torch.load(buffer, weights_only=False))
    assert holds(head)
    assert head.state_dict().keys() == MLDecoder(6, 5, embed_dim=8).state_dict().keys()


def test_a_shallow_copy_with_other_weights_has_its_own_logits():
    head = new_head()
    warm(head)
    twin = copy.copy(head)  # as DataParallel makes replicas
    twin._buffers = {'query_embed': head.query_embed ** 2}
    assert not torch.allclose(assert_fresh(twin), warm(head))
    assert_fresh(head)


def test_parts_that_were_replaced_or_hooked_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = new_head()
    logits = warm(head)
    calls = []
    hook = head.decoder.linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(head(FEATURES), logits)
    assert calls == [1]
    hook.remove()
    warm(head)
    doubled = Doubled(10, 16)
    doubled.load_state_dict(head.decoder.linear2.state_dict())
    head.decoder.linear2 = doubled
    assert not torch.allclose(assert_fresh(head), logits)
    head = new_head()
    warm(head)
    nn.utils.parametrizations.weight_norm(head.embed)
    in_place(head.embed.parametrizations.weight.original0)
    assert not torch.allclose(assert_fresh(head), logits)


def silent(module):
    """The module, of a class of its own whose calls give zeros."""
    kind = type(module)
    module.__class__ = type('Silent', (kind,), {'forward': lambda self, *args: 0 * kind.forward(self, *args)})


def silent_forward(module):
    forward = module.forward
    module.forward = lambda *args: 0 * forward(*args)


@pytest.mark.parametrize('change', [silent, silent_forward])
@pytest.mark.parametrize('part', ['decoder', 'decoder.attn', 'decoder.linear1', 'decoder.norm2', 'group_fc'])
def test_parts_of_another_class_or_call_are_called(part, change):
    head = new_head()
    logits = warm(head)
    change(head.get_submodule(part))
    with torch.no_grad():
        got = head(FEATURES)
    assert not torch.allclose(got, logits)
    torch.testing.assert_close(got, plain(head))


def test_a_decoder_of_any_class_is_called():
    class Repeat(nn.Module):
        def forward(self, query, memory):
            return query.expand(len(memory), -1, -1)

    head = new_head()
    warm(head)
    head.decoder = Repeat()
    with torch.no_grad():
        torch.testing.assert_close(head(FEATURES), head.group_fc(head.query_embed.expand(3, -1, -1)))


def test_hooks_on_all_modules_see_all_modules():
    head = new_head()
    warm(head)
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        with torch.no_grad():
            head(FEATURES)
    finally:
        hook.remove()
    assert seen == set(head.modules())


@pytest.mark.filterwarnings('ignore:.torch.jit')  # torch's own
def test_dual_numbers_are_not_remembered():
    head = new_head(dtype=torch.float64).requires_grad_(False)
    warm(head, FEATURES.double())
    bias = head.group_fc.bias
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias.detach(), torch.ones_like(bias))
        logits = torch.func.functional_call(head, {'group_fc.bias': dual}, FEATURES.double())
        tangent = torch.autograd.forward_ad.unpack_dual(logits).tangent
    torch.testing.assert_close(tangent, torch.ones_like(logits))
    assert not holds(head)


@pytest.mark.gpu
def test_cuda_graphs_leave_nothing_behind_and_follow_the_weights():
    head, features = new_head().cuda(), FEATURES.cuda()
    with torch.no_grad():
        wanted = head(features)  # also what libraries need before a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = head(features)
        assert not holds(head)
        torch.testing.assert_close(head(features), wanted)
        graph.replay()
        torch.testing.assert_close(captured, wanted)
        head.group_fc.bias.add_(1)
        graph.replay()
        torch.testing.assert_close(captured, wanted + 1)


def test_a_part_left_in_training_mode_drops_out():
    head = new_head(drop_rate=0.5)
    warm(head)
    head.decoder.train()
    with torch.no_grad():
        assert not torch.equal(head(FEATURES), head(FEATURES))


def test_inference_tensors_are_not_remembered():
    with torch.inference_mode():
        head = new_head()
        before = head(FEATURES).clone()
        assert not holds(head)
        head.query_embed.pow_(2)
        assert not torch.allclose(head(FEATURES), before)


def test_a_process_group_means_nothing_is_remembered(tmp_path):
    head = new_head()
    logits = warm(head)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with torch.no_grad():
            torch.testing.assert_close(head(FEATURES), logits)
        assert not holds(head)
    finally:
        torch.distributed.destroy_process_group()
    warm(head)


def test_threads_share_a_head():
    head = new_head()
    wanted = warm(head)
    wrong = []

    def work():
        for _ in range(20):
            head.forget()
            if not torch.equal(warm_or_not(head), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def warm_or_not(head):
    return head(FEATURES)


def test_memo_compares_samples_in_host_memory():
    memo, source = Memo(), torch.randn(1000)
    calls = []

    def build():
        calls.append(1)
        return (source.sum(),)

    memo.get([source], build)
    memo.get([source], build)
    assert len(calls) == 1
    source.data.add_(1)
    assert memo.get([source], build)[0] == source.sum()
    source.data[1] = float('nan')  # not in the sample: past the counter this is not seen
    assert memo.get([source], build)[0].isfinite()
    memo.clear()
    assert memo.get([source], build)[0].isnan()
