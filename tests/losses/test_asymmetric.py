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

from timm_miil.losses import ASL_PRESETS, AsymmetricLoss, _chunked, asymmetric_loss
from timm_miil.losses._focal import Focal, Weights, element_loss, hard_gradient, hard_loss, soft_gradient
from timm_miil.losses._reduce import REDUCTIONS

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'asl'
CASES = {
    name: case for name, case in json.loads((FIXTURES / 'manifest.json').read_text(encoding='utf-8'))['cases'].items()
    if case['config']['kind'] == 'ml'}


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
        clip=config['clip'], eps=config['eps'],
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
    for shape in (0, 4), (3, 0), (0,), (2, 0, 3):
        logits = torch.zeros(shape, requires_grad=True)
        loss = asymmetric_loss(logits, torch.zeros(shape))
        loss.backward()
        assert loss == 0 and logits.grad.shape == shape


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
        "AsymmetricLoss(gamma_neg=3.0, gamma_pos=1.0, clip=0.1, eps=1e-06, detach_focal=False, "
        "ignore_unknown=False, reduction='mean')")


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
    with pytest.raises(ValueError, match=rf'targets must be in \[0, 1\], got values from {value:g} to {value:g}'):
        asymmetric_loss(torch.zeros(1, 2), targets)


def test_the_refusal_of_unannotated_labels_says_what_to_do():
    with pytest.raises(ValueError, match=r'; ignore_unknown=True leaves unannotated labels \(-1\) out'):
        asymmetric_loss(torch.zeros(1, 2), torch.tensor([[1, -1]]))


@pytest.mark.parametrize('value', [-1.0, 2.0, math.nan])
def test_where_reading_targets_would_cost_time_a_foreign_one_makes_nan(value):
    torch._dynamo.reset()
    logits, targets = torch.zeros(2, 2), torch.tensor([[1.0, value], [0.0, 0.5]])
    assert torch.compile(asymmetric_loss, backend='eager', fullgraph=True)(logits, targets).isnan()
    assert torch.func.vmap(asymmetric_loss)(logits[None], targets[None]).isnan().all()
    if value != 0.5 and not math.isnan(value):
        assert torch.compile(asymmetric_loss, backend='eager', fullgraph=True)(logits, targets.int()).isnan()


# ---- unannotated labels, class weights, presets


@pytest.mark.parametrize('dtype', [torch.int8, torch.float32])
@pytest.mark.parametrize('soft', [False, True])
def test_ignored_labels_cost_nothing_and_get_no_gradient(dtype, soft):
    logits, targets = draw((7, 5))
    unknown = draw((7, 5), seed=9)[0] > 1
    targets = targets * 0.5 if soft and dtype == torch.float32 else targets
    partial = targets.masked_fill(unknown, -1).to(dtype)
    logits.requires_grad_()
    got = asymmetric_loss(logits, partial, ignore_unknown=True)
    want = asymmetric_loss(logits, targets.to(dtype), reduction='none')[~unknown].sum()
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads)
    assert unknown.any() and (grads[0][unknown] == 0).all()


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_class_weights_without_focusing_are_those_of_bce(soft, reduction):
    logits, targets = draw()
    targets = targets * 0.6 + 0.2 if soft else targets
    logits.requires_grad_()
    weight, pos_weight = torch.linspace(0, 2, 6).double(), torch.linspace(3, 1, 6).double()
    got = asymmetric_loss(
        logits, targets, gamma_neg=0, gamma_pos=0, clip=0, weight=weight, pos_weight=pos_weight, reduction=reduction)
    want = F.binary_cross_entropy_with_logits(
        logits, targets, weight, pos_weight=pos_weight, reduction='sum' if reduction == 'batchmean' else reduction)
    want = want / 4 if reduction == 'batchmean' else want
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, want)))


def test_weights_of_the_module_are_buffers_in_the_precision_of_the_module():
    logits, targets = draw()
    criterion = AsymmetricLoss(weight=torch.linspace(1, 2, 6), pos_weight=torch.tensor(2.0)).double()
    assert [name for name, _ in criterion.named_buffers()] == ['weight', 'pos_weight'] and not criterion.state_dict()
    torch.testing.assert_close(criterion(logits, targets), asymmetric_loss(
        logits, targets, weight=torch.linspace(1, 2, 6).double(), pos_weight=torch.full((6,), 2.0).double()))


@pytest.mark.parametrize(('weight', 'message'), [
    (torch.ones(5), r'weight must have one value a class, shape \(6,\), got shape \(5,\)'),
    (torch.ones(6, 1), r'weight must have one value a class, shape \(6,\), got shape \(6, 1\)'),
])
def test_weights_of_another_shape_are_refused(weight, message):
    for name in 'weight', 'pos_weight':
        with pytest.raises(ValueError, match=message):
            asymmetric_loss(*draw(), **{name: weight})


@pytest.mark.parametrize('value', [-1.0, math.nan, math.inf])
def test_weights_that_are_no_factors_are_refused(value):
    with pytest.raises(ValueError, match='pos_weight must hold finite factors of at least 0, one a class'):
        AsymmetricLoss(pos_weight=torch.tensor([1.0, value]))


def test_presets():
    logits, targets = draw()
    logits = logits.clamp(-15, 15)
    bce = AsymmetricLoss(**ASL_PRESETS['bce'])
    torch.testing.assert_close(
        bce(logits, targets), F.binary_cross_entropy_with_logits(logits, targets, reduction='sum'))
    p_true = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(
        AsymmetricLoss(**ASL_PRESETS['focal'])(logits, targets), ((1 - p_true) ** 2 * -p_true.log()).sum())
    assert AsymmetricLoss(**ASL_PRESETS['train'])(logits, targets) == AsymmetricLoss()(logits, targets)
    assert {name: CASES_CONFIG[case] for name, case in PRESET_CASES.items()} == {
        name: dict(ASL_PRESETS[name]) for name in PRESET_CASES}


PRESET_CASES = {
    'train': 'train_recipe_float64', 'class': 'default_float64', 'optimized_class': 'optimized_default_float64'}
CASES_CONFIG = {
    name: {
        'gamma_neg': case['config']['gamma_neg'], 'gamma_pos': case['config']['gamma_pos'],
        'clip': case['config']['clip'], 'detach_focal': case['config']['disable_torch_grad_focal_loss']}
    for name, case in CASES.items()}


# ---- one pass over memory: what host memory, a graph and the formula compute is the same


ways = dict(
    gammas=st.sampled_from([(4.0, 0.0), (4.0, 1.0), (0.0, 0.0), (2.5, 0.5), (0.5, 3.0), (7.0, 2.0)]),
    clip=st.sampled_from([0.0, 1e-5, 0.05, 0.4]), eps=st.sampled_from([1e-8, 1e-3]),
    detach_focal=st.booleans(), ignore_unknown=st.booleans(), weighted=st.booleans(),
    kind=st.sampled_from(['float', 'bool', 'int8', 'soft']), mean=st.sampled_from([-8.0, -3.0, 0.0, 5.0]),
    seed=st.integers(0, 2 ** 16))


def draw_for(kind, mean, seed, ignore_unknown):
    logits, targets = draw((9, 7), seed=seed)
    if kind == 'soft':
        targets = targets * 0.7 + 0.1
    if ignore_unknown and kind != 'bool':
        targets = targets.masked_fill(draw((9, 7), seed=seed + 1)[0] > 2, -1)
    dtype = {'bool': torch.bool, 'int8': torch.int8}.get(kind, torch.float64)
    return (logits + mean).requires_grad_(), targets.to(dtype)


def settings_of(gammas, clip, eps, detach_focal, ignore_unknown, weighted):
    weights = dict(weight=torch.linspace(0, 2, 7).double(), pos_weight=torch.tensor(3.0)) if weighted else {}
    return dict(
        gamma_neg=gammas[0], gamma_pos=gammas[1], clip=clip, eps=eps, detach_focal=detach_focal,
        ignore_unknown=ignore_unknown, **weights)


@given(**ways, chunk=st.sampled_from([7, 20, 1000]))
@settings(max_examples=120, deadline=None)
def test_pieces_give_what_autograd_gives(
        gammas, clip, eps, detach_focal, ignore_unknown, weighted, kind, mean, seed, chunk):
    logits, targets = draw_for(kind, mean, seed, ignore_unknown)
    chosen = settings_of(gammas, clip, eps, detach_focal, ignore_unknown, weighted)
    want = asymmetric_loss(logits, targets, reduction='none', **chosen).sum() / 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_miil.losses._chunked.SCRATCH_ELEMENTS', 2 * chunk)
        got = asymmetric_loss(logits, targets, reduction='batchmean', **chosen)
        without_gradient = asymmetric_loss(logits.detach(), targets, reduction='batchmean', **chosen)
        got_grad, = torch.autograd.grad(got, logits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert without_gradient == got.detach()
    torch.testing.assert_close(got_grad, torch.autograd.grad(want, logits)[0], rtol=1e-8, atol=1e-12)


@given(**ways)
@settings(max_examples=80, deadline=None)
def test_closed_form_of_a_graph_is_what_autograd_gives(
        gammas, clip, eps, detach_focal, ignore_unknown, weighted, kind, mean, seed):
    logits, targets = draw_for(kind, mean, seed, ignore_unknown)
    clip = clip if clip != 1e-5 else 0.0    # the smallest ones have no closed form
    focal = Focal(
        gamma_neg=gammas[0], gamma_pos=gammas[1], clip=clip, eps=eps, detach=detach_focal, unknown=ignore_unknown,
        soft=True)
    weights = Weights(neg=torch.linspace(0, 2, 7).double(), pos=torch.linspace(1, 3, 7).double()) if weighted else (
        Weights())
    loss = element_loss(logits, targets, focal, weights)
    grad, = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(soft_gradient(logits.detach(), targets, focal, weights), grad, rtol=1e-8, atol=1e-12)
    if kind != 'soft':
        torch.testing.assert_close(hard_loss(logits, targets, focal, weights), loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            hard_gradient(logits.detach(), targets, focal, weights), grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('kind', ['float', 'bool', 'int8', 'soft'])
def test_a_compiled_graph_finds_out_by_itself_whether_targets_are_soft(kind):
    torch._dynamo.reset()
    compiled = torch.compile(AsymmetricLoss(gamma_pos=1, detach_focal=False), fullgraph=True, backend='aot_eager')
    for seed in range(2):
        logits, targets = draw_for(kind, -2.0, seed, False)
        want = asymmetric_loss(logits, targets, gamma_pos=1, detach_focal=False, reduction='none').sum()
        got = compiled(logits, targets)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


@pytest.mark.parametrize('mean', [-8.0, 0.0])
def test_silent_negatives_are_skipped_only_where_few_are_active(mean, monkeypatch):
    chosen = []
    monkeypatch.setattr(_chunked._Piece, 'sum_at', lambda self, found: chosen.append(len(found)) or 0.0)
    logits, targets = draw((300, 500), scale=0.5)
    asymmetric_loss(logits + mean, targets * 0)
    assert chosen == ([0] if mean == -8.0 else [])


@pytest.mark.parametrize('dtype', [torch.bool, torch.int8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(('start', 'length'), [(0, 20000), (1, 20000), (8, 20003), (0, 100)])
@pytest.mark.parametrize('share', [0.001, 0.3])
def test_positions_are_found_by_words_as_by_elements(dtype, start, length, share):
    values = (torch.rand(start + length, generator=torch.Generator().manual_seed(0)) < share).to(dtype)[start:]
    if dtype.is_floating_point:
        values = -values  # -0.0 is 0, though not all of its bits are
    assert torch.equal(_chunked._nonzero(values), values.nonzero().squeeze(1))


@pytest.mark.parametrize('mean', [-8.0, 0.0])
def test_nan_logits_are_not_hidden(mean):
    logits, targets = draw((300, 500), scale=0.5)
    logits = (logits + mean).index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(math.nan).double())
    logits.requires_grad_()
    loss = asymmetric_loss(logits, targets * 0)
    loss.backward()
    assert loss.isnan() and logits.grad[3, 4].isnan() and logits.grad.isnan().sum() == 1


def test_a_second_backward_pass_gives_the_same_gradient():
    logits, targets = draw()
    logits.requires_grad_()
    loss = asymmetric_loss(logits, targets)
    first, = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    second, = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(2.0).double(), retain_graph=True)
    torch.testing.assert_close(second, 2 * kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize('detach_focal', [False, True])
def test_the_gradient_can_be_differentiated(detach_focal):
    logits, targets = draw(scale=1.0)
    logits.requires_grad_()

    def gradient_norm(reduction):
        loss = asymmetric_loss(logits, targets, detach_focal=detach_focal, reduction=reduction).sum()
        grad, = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    torch.testing.assert_close(gradient_norm('sum'), gradient_norm('none'))
    assert gradient_norm('sum').abs().max() > 0


@pytest.mark.parametrize('shape', [(5,), (2, 3, 4), (2, 2, 2, 2)])
def test_any_number_of_dimensions(shape):
    logits, targets = draw(shape)
    logits.requires_grad_()
    for reduction in 'sum', 'mean', 'batchmean':
        want = asymmetric_loss(logits, targets, reduction='none').sum()
        want = want / {'sum': 1, 'mean': logits.numel(), 'batchmean': shape[0]}[reduction]
        got = asymmetric_loss(logits, targets, reduction=reduction)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


# ---- what a review found


@pytest.mark.parametrize('dynamic', [None, pytest.param(True, marks=pytest.mark.slow)])
def test_modules_of_several_settings_compile_in_one_process(dynamic):
    torch._dynamo.reset()
    logits, targets = draw()
    logits.requires_grad_()
    weight = torch.linspace(0, 2, 6).double()
    for chosen in (
            {}, {'gamma_neg': 2.5}, {'clip': 0.1, 'eps': 1e-6}, {'weight': weight}, {'pos_weight': weight},
            {'weight': weight, 'pos_weight': weight, 'ignore_unknown': True}):
        compiled = torch.compile(AsymmetricLoss(**chosen), fullgraph=True, backend='aot_eager', dynamic=dynamic)
        for some in targets, targets * 0.5:
            got, want = compiled(logits, some), asymmetric_loss(logits, some, **chosen)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))


def test_the_function_compiles_with_numbers_that_change():
    torch._dynamo.reset()
    logits, targets = draw()
    compiled = torch.compile(
        lambda x, y, gamma: asymmetric_loss(x, y, gamma_neg=gamma), fullgraph=True, backend='aot_eager')
    for gamma in 4.0, 2.5, 3.0:
        torch.testing.assert_close(
            compiled(logits, targets, gamma), asymmetric_loss(logits, targets, gamma_neg=gamma))


def test_settings_stand_in_the_order_of_the_published_class():
    logits, targets = draw()
    want = asymmetric_loss(logits, targets, gamma_neg=3, gamma_pos=1, clip=0.1, eps=1e-6, detach_focal=False)
    assert AsymmetricLoss(3, 1, 0.1, 1e-6, False)(logits, targets) == want


def test_a_setting_may_change_while_training():
    logits, targets = draw()
    criterion = AsymmetricLoss()
    criterion.gamma_neg = 2
    assert criterion(logits, targets) == asymmetric_loss(logits, targets, gamma_neg=2)


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_a_loss_scaler_saves_small_gradients_in_half_precision(reduction):
    logits, targets = draw((64, 500), scale=1.0)
    half = (logits - 3).half().requires_grad_()
    exact = half.detach().double().requires_grad_()
    for x in half, exact:
        (asymmetric_loss(x, targets, reduction=reduction) * 2.0 ** 14).backward()
    assert (half.grad != 0).sum() > 0.9 * (exact.grad.abs() > 1e-7).sum()
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('detach_focal', [False, True])
@pytest.mark.parametrize('kind', [torch.float64, torch.bool, torch.int8])
def test_the_few_active_among_silent_negatives(detach_focal, kind, monkeypatch):
    logits, targets = draw((40, 50), scale=0.5)
    logits, targets = logits - 8, targets * (draw((40, 50), seed=8)[0] > 5)
    edge = math.log(0.05 / 0.95)
    logits[::7, 3] = edge + torch.tensor([-0.01, -1e-6, 1e-6, 0.01, 0.3, 2.0])
    targets[::7, 3] = 0
    logits.requires_grad_()
    sparse, sum_at = [], _chunked._Piece.sum_at
    monkeypatch.setattr(_chunked._Piece, 'sum_at', lambda self, found: sparse.append(len(found)) or sum_at(self, found))
    monkeypatch.setattr(_chunked, 'SCRATCH_ELEMENTS', 300)
    got = asymmetric_loss(logits, targets.to(kind), gamma_neg=1, gamma_pos=1, detach_focal=detach_focal)
    want = asymmetric_loss(
        logits, targets, gamma_neg=1, gamma_pos=1, detach_focal=detach_focal, reduction='none').sum()
    torch.testing.assert_close(got, want)
    got_grad, want_grad = (torch.autograd.grad(loss, logits)[0] for loss in (got, want))
    torch.testing.assert_close(got_grad, want_grad)
    assert len(sparse) == 1 and 5 < sparse[0] < 100 and 4 < (want_grad != 0).sum() < 100


@pytest.mark.parametrize('ignore_unknown', [False, True])
def test_soft_targets_among_silent_negatives(ignore_unknown, monkeypatch):
    logits, targets = draw((20, 30), scale=0.5)
    logits, targets = (logits - 8).requires_grad_(), targets * 0.7
    targets[:, 3:] = 0
    weights = dict(weight=torch.linspace(0, 2, 30).double(), pos_weight=torch.linspace(3, 1, 30).double())
    want = asymmetric_loss(logits, targets, reduction='none', ignore_unknown=ignore_unknown, **weights).sum()
    monkeypatch.setattr(_chunked, 'SCRATCH_ELEMENTS', 100)
    got = asymmetric_loss(logits, targets, ignore_unknown=ignore_unknown, **weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))


@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_eps_above_the_clip_still_clamps(reduction):
    logits = torch.tensor([[20.0, 1.0]], requires_grad=True)
    loss = asymmetric_loss(logits, torch.zeros(1, 2), gamma_neg=0, clip=0.05, eps=0.1, reduction=reduction).sum()
    loss.backward()
    torch.testing.assert_close(loss.item(), -math.log(0.1) - math.log(1 / (1 + math.e) + 0.05), rtol=1e-6, atol=0)
    assert logits.grad[0, 0] == 0 and logits.grad[0, 1] > 0.1


@pytest.mark.parametrize('value', [-1.0, 2.0, math.nan])
def test_foreign_targets_are_refused_for_every_reduction(value):
    for reduction in REDUCTIONS:
        with pytest.raises(ValueError, match=r'targets must be in \[0, 1\], got values from'):
            asymmetric_loss(torch.zeros(1, 2), torch.tensor([[1.0, value]]), reduction=reduction)


def test_targets_and_weights_get_their_gradients_too():
    logits, targets = draw()
    weight = torch.linspace(1, 2, 6).double()
    for tensor in targets, weight:
        tensor.requires_grad_()
        grads = [torch.autograd.grad(loss, tensor)[0] for loss in (
            asymmetric_loss(logits, targets, weight=weight),
            asymmetric_loss(logits, targets, weight=weight, reduction='none').sum())]
        torch.testing.assert_close(*grads)
        assert grads[0].abs().sum() > 0


def test_weights_keep_their_precision():
    logits, targets = draw()
    weight = torch.linspace(0, 1, 6, dtype=torch.float64) / 3
    want = asymmetric_loss(logits, targets, weight=weight)
    for criterion in AsymmetricLoss(weight=weight), AsymmetricLoss(weight=weight).half():
        torch.testing.assert_close(criterion(logits, targets), want, rtol=1e-12, atol=0)
    assert asymmetric_loss(logits.float(), targets, weight=weight, reduction='none').dtype == torch.float32


def test_class_indices_are_told_what_to_become():
    with pytest.raises(ValueError, match=r'one_hot\(targets, 6\), or take AsymmetricLossSingleLabel'):
        asymmetric_loss(draw()[0], torch.zeros(4).long())


@pytest.mark.parametrize('dtype', [torch.uint16, torch.uint32, torch.uint64])
def test_wide_unsigned_targets(dtype):
    logits, targets = draw()
    assert asymmetric_loss(logits, targets.to(torch.int64).to(dtype)) == asymmetric_loss(logits, targets)
