"""The multi-label asymmetric loss: published values, properties, gradients and refusals."""
import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from timm_miil.losses import AsymmetricLoss, asymmetric_loss
from timm_miil.losses._reduce import REDUCTIONS

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'asl'
CASES = json.loads((FIXTURES / 'manifest.json').read_text(encoding='utf-8'))['cases']


def asl_loops(logits, targets, gamma_neg, gamma_pos, clip, eps):
    """The equation element by element with Python floats: an independent formulation."""
    rows = []
    for x_row, y_row in zip(logits.tolist(), targets.tolist()):
        row = []
        for x, y in zip(x_row, y_row):
            p = 1 / (1 + math.exp(-x))
            q = min(1 - p + clip, 1) if clip else 1 - p
            log_term = y * math.log(max(p, eps)) + (1 - y) * math.log(max(q, eps))
            p_true = p * y + q * (1 - y)
            row.append(-(1 - p_true) ** (gamma_pos * y + gamma_neg * (1 - y)) * log_term)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def draw(shape=(4, 6), seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    targets = (torch.rand(shape, generator=generator) > 0.6).double()
    return logits.to(dtype), targets.to(dtype)


@pytest.mark.parametrize('name', sorted(CASES))
def test_published_values_and_gradients(name):
    case = CASES[name]
    tensors = load_file(FIXTURES / case['file'])
    config = case['config']
    logits = tensors['logits'].clone().requires_grad_()
    loss = asymmetric_loss(
        logits, tensors['targets'], gamma_neg=config['gamma_neg'], gamma_pos=config['gamma_pos'],
        clip=config['clip'] or 0.0, eps=config['eps'],
        detach_focal=config['disable_torch_grad_focal_loss'])
    loss.backward()
    assert loss.dtype == logits.dtype == getattr(torch, case['dtype'])
    torch.testing.assert_close(loss.detach(), tensors['loss'], **case['tolerance'])
    torch.testing.assert_close(logits.grad, tensors['grad'], **case['tolerance'])


def test_fixtures_cover_what_they_should():
    configs = [case['config'] for case in CASES.values()]
    assert len(CASES) == 24
    assert {config['impl'] for config in configs} == {'plain', 'optimized'}
    assert {config['disable_torch_grad_focal_loss'] for config in configs} == {True, False}


@given(
    gamma_neg=st.floats(0, 6), gamma_pos=st.floats(0, 4), clip=st.sampled_from([0.0, 0.05, 0.3]),
    soft=st.booleans(), seed=st.integers(0, 2 ** 16))
@settings(max_examples=60, deadline=None)
def test_equals_the_equation_element_by_element(gamma_neg, gamma_pos, clip, soft, seed):
    logits, targets = draw(seed=seed)
    targets = targets * 0.75 + 0.1 if soft else targets
    got = asymmetric_loss(
        logits, targets, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, reduction='none')
    want = asl_loops(logits, targets, gamma_neg, gamma_pos, clip, 1e-8)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('reduction', ['sum', 'mean', 'none'])
@given(seed=st.integers(0, 2 ** 16), soft=st.booleans())
@settings(max_examples=25, deadline=None)
def test_without_focusing_it_is_bce(reduction, seed, soft):
    logits, targets = draw(seed=seed, scale=4.0, dtype=torch.float32)
    logits = logits.clamp(-18, 18)  # inside the eps clamp
    targets = targets * 0.5 + 0.2 if soft else targets
    logits.requires_grad_()
    got = asymmetric_loss(logits, targets, gamma_pos=0, gamma_neg=0, clip=0, reduction=reduction)
    want = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got_grad, = torch.autograd.grad(got.sum(), logits)
    want_grad, = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('clip', [0.0, 0.05])
@pytest.mark.parametrize('gammas', [(4.0, 0.0), (4.0, 1.0), (2.5, 0.5)])
@pytest.mark.parametrize('soft', [False, True])
def test_coupled_gradient_is_the_derivative(clip, gammas, soft):
    logits, targets = draw(seed=3, scale=1.5)
    targets = targets * 0.75 + 0.1 if soft else targets
    logits.requires_grad_()
    torch.autograd.gradcheck(
        lambda x: asymmetric_loss(
            x, targets, gamma_neg=gammas[0], gamma_pos=gammas[1], clip=clip, detach_focal=False,
            reduction='none'),
        logits)


def test_detached_gradient_is_weight_times_bce_gradient():
    logits, targets = draw(seed=5, scale=1.5)
    logits.requires_grad_()
    asymmetric_loss(logits, targets, gamma_neg=4, gamma_pos=1, clip=0).backward()
    p = logits.detach().sigmoid()
    weight = torch.where(targets > 0, 1 - p, p ** 4)
    torch.testing.assert_close(logits.grad, weight * (p - targets), rtol=1e-9, atol=1e-12)


def test_clip_silences_negatives_below_it():
    logits = torch.tensor([[-4.0, -2.0]], requires_grad=True)    # p = 0.018 and 0.119
    loss = asymmetric_loss(logits, torch.zeros(1, 2), clip=0.05, gamma_neg=0, reduction='none')
    loss.sum().backward()
    assert loss[0, 0] == 0 and logits.grad[0, 0] == 0
    assert loss[0, 1] > 0.05 and logits.grad[0, 1] > 0.05


@pytest.mark.parametrize('clip', [0.0, 1e-10])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_beyond_the_eps_clamp_value_is_flat_and_gradient_zero(dtype, clip):
    logits = torch.tensor([[-50.0, 50.0, -17.0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 1.0]], dtype=dtype)
    loss = asymmetric_loss(logits, targets, gamma_neg=0, clip=clip, reduction='none')
    loss.sum().backward()
    want = torch.tensor([[-math.log(1e-8), -math.log(1e-8), 17.0]], dtype=dtype)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    assert logits.grad[0, :2].tolist() == [0.0, 0.0] and logits.grad[0, 2] < -0.99


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('detach_focal', [True, False])
@pytest.mark.parametrize('gammas', [(4.0, 0.0), (0.5, 0.01), (0.01, 3.0)])
@pytest.mark.parametrize('clip', [0.0, 0.05])
def test_saturated_logits_stay_finite(dtype, detach_focal, gammas, clip):
    values = [0.0, 1e-3, 5.0, 20.0, 87.0, 88.5, 95.0, 104.0, 1e4, math.log(0.05 / 0.95)]
    logits = torch.tensor([values + [-value for value in values]] * 4).to(dtype).requires_grad_()
    targets = torch.tensor([0.0, 1.0, 0.5, 1e-42])[:, None].expand(logits.shape)
    loss = asymmetric_loss(
        logits, targets, gamma_neg=gammas[0], gamma_pos=gammas[1], clip=clip, detach_focal=detach_focal,
        reduction='none')
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
    assert (loss >= 0).all()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize('enabled', [True, False])
def test_grad_mode_is_left_as_found(enabled):
    logits, targets = draw()
    with torch.set_grad_enabled(enabled):
        asymmetric_loss(logits, targets)
        assert torch.is_grad_enabled() == enabled


def test_inputs_are_not_edited():
    logits, targets = draw()
    before = logits.clone(), targets.clone()
    asymmetric_loss(logits, targets, gamma_pos=1)
    assert torch.equal(logits, before[0]) and torch.equal(targets, before[1])


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_target_dtype_does_not_matter(dtype):
    logits, targets = draw()
    assert asymmetric_loss(logits, targets.to(dtype)) == asymmetric_loss(logits, targets)


def test_reductions():
    logits, targets = draw()
    none = asymmetric_loss(logits, targets, reduction='none')
    want = {'none': none, 'sum': none.sum(), 'mean': none.mean(), 'batchmean': none.sum() / 4}
    assert set(want) == set(REDUCTIONS)
    for reduction, value in want.items():
        torch.testing.assert_close(asymmetric_loss(logits, targets, reduction=reduction), value)


def test_any_layout_and_an_empty_batch():
    logits, targets = draw((6, 4))
    torch.testing.assert_close(
        asymmetric_loss(logits.t(), targets.t()), asymmetric_loss(logits.t().contiguous(), targets.t()))
    assert asymmetric_loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_under_autocast_it_computes_in_float32():
    logits, targets = draw(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = asymmetric_loss(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, asymmetric_loss(logits, targets))


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(asymmetric_loss, fullgraph=True, backend='eager')
    logits, targets = draw()
    torch.testing.assert_close(compiled(logits, targets), asymmetric_loss(logits, targets))


def test_module_is_the_function_and_keeps_no_state():
    logits, targets = draw()
    logits.requires_grad_()
    chosen = dict(gamma_neg=3, gamma_pos=1, clip=0.1, eps=1e-6, detach_focal=False, reduction='mean')
    criterion = AsymmetricLoss(**chosen)
    want = asymmetric_loss(logits, targets, **chosen)
    assert criterion(logits, targets) == want
    copied = copy.deepcopy(criterion)
    assert copied(logits, targets) == want
    assert not list(criterion.buffers()) and not list(criterion.parameters())
    assert repr(criterion) == (
        "AsymmetricLoss(gamma_neg=3, gamma_pos=1, clip=0.1, eps=1e-06, detach_focal=False, reduction='mean')")


@pytest.mark.parametrize(('settings_', 'message'), [
    ({'gamma_neg': -1.0}, r'gamma_neg must be in \[0, inf\), got -1.0'),
    ({'gamma_pos': math.inf}, r'gamma_pos must be in \[0, inf\), got inf'),
    ({'clip': 1.0}, r'clip must be in \[0, 1\), got 1.0'),
    ({'eps': 0.0}, r'eps must be in \[1.17549e-38, 1\), got 0.0'),
    ({'reduction': 'avg'}, "reduction must be one of 'sum', 'mean', 'batchmean', 'none', got 'avg'"),
])
def test_settings_out_of_range(settings_, message):
    logits, targets = draw()
    with pytest.raises(ValueError, match=message):
        asymmetric_loss(logits, targets, **settings_)
    with pytest.raises(ValueError, match=message):
        AsymmetricLoss(**settings_)


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r'shapes must be equal, got logits \(2, 3\), targets \(2,\)'):
        asymmetric_loss(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize('value', [-1.0, 2.0, math.nan])
def test_unannotated_and_foreign_targets_are_refused(value):
    targets = torch.tensor([[1.0, value]])
    with pytest.raises(ValueError, match=r'targets must be in \[0, 1\], got values from .*unannotated'):
        asymmetric_loss(torch.zeros(1, 2), targets)
