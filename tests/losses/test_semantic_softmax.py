"""Semantic softmax and its distillation: published values, an independent form, invariants and refusals."""
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from timm_miil.losses import (
    SemanticDistillationLoss, SemanticHierarchy, SemanticSoftmaxLoss, semantic_distillation_loss,
    semantic_softmax, semantic_softmax_loss)
from timm_miil.losses._reduce import ROW_REDUCTIONS

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'semantic_softmax'
CASES = json.loads((FIXTURES / 'manifest.json').read_text(encoding='utf-8'))['cases']
SEMANTIC = sorted(name for name, case in CASES.items() if case['config']['kind'] == 'semantic')
PLAIN = sorted(name for name, case in CASES.items() if case['config']['kind'] == 'ce_ls')

# Four depths; one lone class in the third, which is no level, and two in the deepest, which is none by default.
PARENTS = [None, None, 0, 0, 1, 2, 5, 5]


def draw(num_classes=8, batch_size=6, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_classes, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(num_classes, (batch_size,), generator=generator)


def loops(logits, targets, hierarchy, smoothing):
    """The equation sample by sample, from the list of parents."""
    losses = []
    for row, target in zip(logits, targets.tolist()):
        line = [target]
        while hierarchy.parents[line[-1]] != -1:
            line.append(hierarchy.parents[line[-1]])
        loss = 0.0
        for ancestor in line:
            depth = hierarchy.depths[ancestor]
            peers = [index for index, other in enumerate(hierarchy.depths) if other == depth]
            if len(peers) < 2 or (depth == max(hierarchy.depths) and not hierarchy.include_deepest):
                continue
            deeper = sum(other >= depth for other in hierarchy.depths)
            exps = [math.exp(row[index]) for index in peers]
            for index, value in zip(peers, exps):
                weight = smoothing / len(peers) + (1 - smoothing) * (index == ancestor)
                loss -= min(20, len(hierarchy.depths) / deeper) * weight * math.log(value / sum(exps))
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def padded(logits, targets, hierarchy, smoothing):
    """Loss and gradient as they are computed where values cannot be read, as on accelerators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_softmax, 'can_read', lambda tensor: False)
        patch.setattr(semantic_softmax, 'fits', lambda sizes: True)
        return plain(logits, targets, hierarchy, smoothing)


def masked(logits, targets, hierarchy, smoothing):
    """The same where one level is much larger than the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_softmax, 'can_read', lambda tensor: False)
        patch.setattr(semantic_softmax, 'fits', lambda sizes: False)
        return plain(logits, targets, hierarchy, smoothing)


def plain(logits, targets, hierarchy, smoothing):
    logits = logits.clone().requires_grad_()
    loss = semantic_softmax_loss(logits, targets, hierarchy, smoothing=smoothing)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize('compute', [plain, padded, masked])
@pytest.mark.parametrize('name', SEMANTIC)
def test_published_values_and_gradients(name, compute):
    case, tensors = CASES[name], load_file(FIXTURES / CASES[name]['file'])
    hierarchy = SemanticHierarchy.from_class_tree(
        case['config']['class_tree_list'], max_factor=case['config']['max_normalization_factor'])
    loss, grad = compute(tensors['logits'], tensors['targets'], hierarchy, case['config']['label_smooth'])
    assert loss.dtype == tensors['logits'].dtype == getattr(torch, case['dtype'])
    torch.testing.assert_close(loss, tensors['loss'], **case['tolerance'])
    torch.testing.assert_close(grad, tensors['grad'], **case['tolerance'])


@pytest.mark.parametrize('name', SEMANTIC)
def test_published_distillation(name):
    case, tensors = CASES[name], load_file(FIXTURES / CASES[name]['file'])
    hierarchy = SemanticHierarchy.from_class_tree(case['config']['class_tree_list'])
    student = tensors['logits'].clone().requires_grad_()
    teacher = tensors['teacher_logits'].clone().requires_grad_()
    loss = semantic_distillation_loss(student, teacher, hierarchy)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors['kd_loss'], **case['tolerance'])
    torch.testing.assert_close(student.grad, tensors['kd_grad_student'], **case['tolerance'])
    assert teacher.grad is None


@pytest.mark.parametrize('name', PLAIN)
def test_the_published_baseline_is_cross_entropy_and_one_level_of_all_classes(name):
    case, tensors = CASES[name], load_file(FIXTURES / CASES[name]['file'])
    smoothing = case['config']['eps']
    flat = SemanticHierarchy([None] * tensors['logits'].shape[1], include_deepest=True)
    for compute in (
            lambda logits: F.cross_entropy(logits, tensors['targets'], label_smoothing=smoothing),
            lambda logits: semantic_softmax_loss(logits, tensors['targets'], flat, smoothing=smoothing)):
        logits = tensors['logits'].clone().requires_grad_()
        loss = compute(logits)
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors['loss'], **case['tolerance'])
        torch.testing.assert_close(logits.grad, tensors['grad'], **case['tolerance'])


def test_fixtures_cover_what_they_should():
    assert len(SEMANTIC) == 8 and len(PLAIN) == 2
    assert {CASES[name]['config']['label_smooth'] for name in SEMANTIC} == {0.0, 0.1, 0.2}


@given(
    parents=st.lists(st.integers(-1, 8), min_size=3, max_size=10), include_deepest=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2, 0.7]), seed=st.integers(0, 2 ** 16))
@settings(max_examples=40, deadline=None)
def test_equals_the_equation_sample_by_sample(parents, include_deepest, smoothing, seed):
    parents = [None, None, *(parent if parent < place + 2 else -1 for place, parent in enumerate(parents)), 0, 2]
    hierarchy = SemanticHierarchy(parents, include_deepest=include_deepest)
    logits, targets = draw(len(parents), seed=seed)
    want = loops(logits, targets, hierarchy, smoothing)
    got = semantic_softmax_loss(logits, targets, hierarchy, smoothing=smoothing, reduction='none')
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    loss, grad = plain(logits, targets, hierarchy, smoothing)
    torch.testing.assert_close(loss, want.mean(), rtol=1e-9, atol=1e-12)
    for compute in padded, masked:
        other_loss, other_grad = compute(logits, targets, hierarchy, smoothing)
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-14)


def test_levels_are_filled_up_unless_one_is_much_larger():
    assert semantic_softmax.fits((3, 5, 0)) and semantic_softmax.fits((2, 6, 3, 1))
    assert not semantic_softmax.fits((7,)) and not semantic_softmax.fits((*[2] * 9, 100, 0))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('ordered', [False, True])
def test_a_gpu_gives_what_host_memory_gives_and_does_not_wait(ordered, dtype, without_waiting):
    hierarchy = SemanticHierarchy([None, *[place // 3 for place in range(999)]])
    hierarchy = hierarchy.level_ordered() if ordered else hierarchy
    logits, targets = draw(hierarchy.num_classes, 33)
    logits = logits.to(dtype)
    want, want_grad = plain(logits, targets, hierarchy, 0.2)
    on_gpu = logits.cuda(), targets.cuda(), hierarchy.to('cuda'), 0.2
    plain(*on_gpu)  # makes the constants
    with without_waiting():
        loss, grad = plain(*on_gpu)
    torch.testing.assert_close(loss.cpu(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_level_ordered_logits_cost_the_same(dtype):
    hierarchy = SemanticHierarchy([3, None, 1, 1, None, 2, 3, 4], include_deepest=True)
    assert not hierarchy.is_level_ordered
    logits, targets = draw()
    logits = logits.to(dtype)
    loss, grad = plain(logits, targets, hierarchy, 0.2)
    order, rank = hierarchy.level_order, hierarchy.level_rank
    other_loss, other_grad = plain(logits[:, order], rank[targets], hierarchy.level_ordered(), 0.2)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_grad, grad[:, order])


def test_classes_of_no_level_get_no_gradient_and_roots_alone_cost_nothing():
    hierarchy = SemanticHierarchy([None, 0, 0, 1, 3, 3])      # levels: depth 1 alone
    logits, _ = draw(6)
    logits.requires_grad_()
    loss = semantic_softmax_loss(logits, torch.tensor([0, 0, 1, 2, 4, 5]), hierarchy, reduction='none')
    loss.sum().backward()
    assert loss[:2].tolist() == [0.0, 0.0] and (loss[2:] > 0).all()
    assert logits.grad[:, [0, 3, 4, 5]].abs().max() == 0
    assert logits.grad[:2].abs().max() == 0 and (logits.grad[2:, 1:3] != 0).all()


def test_it_does_not_change_with_a_shift_of_a_level():
    hierarchy = SemanticHierarchy(PARENTS)
    logits, targets = draw()
    shift = torch.zeros(8, dtype=torch.float64)
    shift[hierarchy.level_order[:2]], shift[hierarchy.level_order[2:5]] = 30.0, -7.0
    want, got = (semantic_softmax_loss(value, targets, hierarchy) for value in (logits, logits + shift))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_evaluation_mode_gives_the_same():
    logits, targets = draw()
    criterion = SemanticSoftmaxLoss(SemanticHierarchy(PARENTS))
    want = criterion(logits, targets)
    assert want > 0 and criterion.eval()(logits, targets) == want
    with torch.no_grad():
        assert criterion(logits, targets) == want


@pytest.mark.parametrize('is_masked', [False, True])
@pytest.mark.parametrize('ordered', [False, True])
def test_gradient_and_its_gradient_are_derivatives(ordered, is_masked, monkeypatch):
    if is_masked:
        monkeypatch.setattr(semantic_softmax, 'can_read', lambda tensor: False)
    hierarchy = SemanticHierarchy([3, None, 1, 1, None, 2, 3, 4])
    hierarchy = hierarchy.level_ordered() if ordered else hierarchy
    logits, targets = draw(batch_size=4)
    logits.requires_grad_()
    for smoothing in (0.0, 0.2):
        def loss_of(values):
            return semantic_softmax_loss(values, targets, hierarchy, smoothing=smoothing, reduction='none')
        assert torch.autograd.gradcheck(loss_of, logits)
        assert torch.autograd.gradgradcheck(loss_of, logits)


def test_the_gradient_of_the_gradient_stays_finite():
    hierarchy = SemanticHierarchy(PARENTS)
    logits = (draw()[0] * 1e4).requires_grad_()
    grad, = torch.autograd.grad(semantic_softmax_loss(logits, torch.arange(6), hierarchy), logits, create_graph=True)
    grad.square().sum().backward()
    assert grad.isfinite().all() and logits.grad.isfinite().all()


def test_distillation_gradient_is_the_derivative():
    hierarchy = SemanticHierarchy(PARENTS)
    student, teacher = draw()[0].requires_grad_(), draw(seed=1)[0]
    assert torch.autograd.gradcheck(lambda values: semantic_distillation_loss(values, teacher, hierarchy), student)


def test_distillation_of_itself_is_free_and_confidence_weighs():
    # 41 classes in one level: the confidence is that of the best 3.
    hierarchy = SemanticHierarchy([None] * 41, include_deepest=True)
    student, teacher = draw(41)[0], draw(41, seed=1)[0]
    assert semantic_distillation_loss(student, student, hierarchy) == 0
    prob, teacher_prob = student.softmax(1), teacher.softmax(1)
    confidence = teacher_prob.sort(1, descending=True).values[:, :3].sum(1)
    want = confidence * ((prob - teacher_prob) ** 2).sum(1)
    got = semantic_distillation_loss(student, teacher, hierarchy, reduction='none')
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_reductions():
    hierarchy = SemanticHierarchy(PARENTS)
    logits, targets = draw()
    for loss, other in (semantic_softmax_loss, targets), (semantic_distillation_loss, draw(seed=1)[0]):
        none = loss(logits, other, hierarchy, reduction='none')
        want = {'none': none, 'sum': none.sum(), 'mean': none.mean()}
        assert set(want) == set(ROW_REDUCTIONS) and none.shape == (6,)
        for reduction, value in want.items():
            torch.testing.assert_close(loss(logits, other, hierarchy, reduction=reduction), value)


def test_modules_are_the_functions_with_a_hierarchy_of_their_own():
    hierarchy = SemanticHierarchy(PARENTS)
    logits, targets = draw()
    criterion = SemanticSoftmaxLoss(hierarchy, smoothing=0.1, reduction='sum')
    assert criterion(logits, targets) == semantic_softmax_loss(
        logits, targets, hierarchy, smoothing=0.1, reduction='sum')
    distillation = SemanticDistillationLoss(hierarchy, reduction='mean')
    teacher = draw(seed=1)[0]
    assert distillation(logits, teacher) == semantic_distillation_loss(logits, teacher, hierarchy, reduction='mean')
    for module in criterion, distillation:
        assert module.hierarchy is not hierarchy and not module.state_dict()
        assert next(module.to('meta').buffers()).is_meta
    assert hierarchy.level_order.is_cpu
    assert repr(criterion).splitlines()[1].strip() == "smoothing=0.1, reduction='sum'"
    assert repr(distillation).splitlines()[1].strip() == "reduction='mean'"


@pytest.mark.parametrize('dtype', [torch.int16, torch.int32])
def test_other_integer_dtypes_serve(dtype):
    hierarchy = SemanticHierarchy(PARENTS)
    logits, targets = draw()
    assert semantic_softmax_loss(logits, targets.to(dtype), hierarchy) == semantic_softmax_loss(
        logits, targets, hierarchy)


@pytest.mark.parametrize(('logits', 'targets', 'error', 'message'), [
    (torch.zeros(2, 8).long(), torch.zeros(2).long(), TypeError, 'logits must be floating-point'),
    (torch.zeros(2, 8), torch.zeros(2), TypeError, 'targets must be class indices of an integer dtype'),
    (torch.zeros(8), torch.zeros(2).long(), ValueError, 'logits must have 2 dimensions'),
    (torch.zeros(2, 7), torch.zeros(2).long(), ValueError,
     r'logits must have a column for each of the 8 classes of the hierarchy, got shape \(2, 7\)'),
    (torch.zeros(2, 8), torch.zeros(2, 8).long(), ValueError, 'targets must have 1 dimensions'),
    (torch.zeros(2, 8), torch.zeros(3).long(), ValueError, r'logits \(2, 8\), targets \(3,\)'),
    (torch.zeros(2, 8), torch.tensor([0, 8]), ValueError, r'targets must be in \[0, 8\), got values from 0 to 8'),
    (torch.zeros(2, 8), torch.tensor([0, -1]), ValueError, r'targets must be in \[0, 8\), got values from -1 to 0'),
])
def test_wrong_tensors_are_refused(logits, targets, error, message):
    with pytest.raises(error, match=message):
        semantic_softmax_loss(logits, targets, SemanticHierarchy(PARENTS))


@pytest.mark.parametrize(('logits', 'teacher', 'error', 'message'), [
    (torch.zeros(2, 8), torch.zeros(2, 8).long(), TypeError, 'teacher_logits must be floating-point'),
    (torch.zeros(2, 8), torch.zeros(2, 9), ValueError, 'teacher_logits must have a column for each of the 8 classes'),
    (torch.zeros(2, 8), torch.zeros(1, 8), ValueError, r'logits \(2, 8\), teacher_logits \(1, 8\)'),
    (torch.zeros(2, 8), torch.zeros(8), ValueError, 'teacher_logits must have 2 dimensions'),
])
def test_wrong_teachers_are_refused(logits, teacher, error, message):
    with pytest.raises(error, match=message):
        semantic_distillation_loss(logits, teacher, SemanticHierarchy(PARENTS))


@pytest.mark.parametrize(('settings_', 'error', 'message'), [
    ({'smoothing': 1.0}, ValueError, r'smoothing must be in \[0, 1\), got 1.0'),
    ({'smoothing': '0.2'}, TypeError, 'smoothing must be a number'),
    ({'reduction': 'batchmean'}, ValueError, "reduction must be one of 'sum', 'mean', 'none', got 'batchmean'"),
    ({'hierarchy': [[0], [1]]}, TypeError, 'hierarchy must be a SemanticHierarchy, got list; make one with'),
])
def test_wrong_settings_are_refused(settings_, error, message):
    settings_ = {'hierarchy': SemanticHierarchy(PARENTS)} | settings_
    with pytest.raises(error, match=message):
        semantic_softmax_loss(*draw(), **settings_)
    with pytest.raises(error, match=message):
        SemanticSoftmaxLoss(**settings_)
    if 'smoothing' not in settings_:
        with pytest.raises(error, match=message):
            semantic_distillation_loss(draw()[0], draw()[0], **settings_)
        with pytest.raises(error, match=message):
            SemanticDistillationLoss(**settings_)
