"""Two heads: both published objectives, who learns from whom, what is kept, and how the heads are mixed."""
import copy
import math

import pytest
import timm
import torch
from torch import distributed, nn
from torch.nn import functional as F

from timm_miil.losses import dual_head_prob
from timm_miil.tasks import DualHead, DualHeadTask, Teacher, TeacherCache, fit_dual_head, kept_network

HALF = (0.5, 0.5, 0.5)


def small(seed=0, classes=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(
            'test_resnet', num_classes=classes, pretrained_cfg_overlay={'input_size': (3, 32, 32)})


def dual(seed=1, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DualHead(small(seed), **settings)


def teacher_of(model, **settings):
    return Teacher(model, mean=HALF, std=HALF, image_size='student', **settings)


def batch(labelled=(True, True, False, True)):
    generator = torch.Generator().manual_seed(1)
    targets = torch.eye(5)[torch.randint(5, (len(labelled),), generator=generator)]
    targets[~torch.tensor(labelled)] = -1
    return torch.randn(len(labelled), 3, 32, 32, generator=generator), targets


def expected(main, aux, teacher, targets, temperature, weight, mode):
    """The equation, row by row, in float64."""
    cross_entropies, distances = [], {True: [], False: []}
    for z_main, z, z_teacher, target in zip(main.double(), aux.double(), teacher.double(), targets):
        is_labelled = bool((target == 1).any())
        if is_labelled:
            cross_entropies.append(-z_main.softmax(0)[target == 1].log().sum())
        if mode == 'binary':
            p = 1 / (1 + (-(z - z_teacher) / temperature).exp())
            distance = -0.5 * (4 * p * (1 - p)).log().sum()
        else:
            p, q = (z_teacher / temperature).softmax(0), (z / temperature).softmax(0)
            distance = (p * (p / q).log()).sum()
        distances[is_labelled].append(distance)
    total = sum(sum(rows) / len(rows) for rows in (cross_entropies,) if rows)
    return total + weight * temperature ** 2 * sum(sum(rows) / len(rows) for rows in distances.values() if rows)


@pytest.mark.parametrize('mode, weight, temperature', [('binary', 0.1, 2.0), ('softmax', 1.0, 3.0)])
def test_the_loss_is_the_equation_and_only_the_student_learns(mode, weight, temperature):
    model, taught = dual(), small()
    before = copy.deepcopy(taught.state_dict())
    task = DualHeadTask(
        model, teacher_of(taught), mode=mode, distill_loss_weight=weight, temperature=temperature).train()
    images, targets = batch()
    result = task(images, targets)
    main, aux = model.train()(images)
    with torch.no_grad():
        teacher = taught.eval()(images)
    torch.testing.assert_close(result['output'], main, rtol=1e-4, atol=1e-5)
    want = expected(main, aux, teacher, targets, temperature, weight, mode)
    torch.testing.assert_close(result['loss'].double(), want, rtol=1e-4, atol=1e-5)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(
        head.weight.grad.abs().sum() > 0 for head in (model.network.conv1[0], model.network.fc, model.aux_head))
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    for name, tensor in task.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_without_other_settings_it_is_dhkds():
    task = DualHeadTask(dual(), teacher_of(small()))
    loss = task.distillation
    assert (loss.mode, loss.temperature, loss.weight) == ('binary', 2.0, 1.0)


@pytest.mark.parametrize('mode', ['binary', 'softmax'])
@pytest.mark.parametrize('is_labelled', [True, False])
def test_each_head_has_one_teacher(mode, is_labelled):
    images, targets = batch((is_labelled,) * 4)

    def gradients(**settings):
        model = dual().eval()  # batch norms that do not move
        model.training = True
        DualHeadTask(model, teacher_of(small()), mode=mode, **settings)(images, targets)['loss'].backward()
        return model.network.get_classifier().weight.grad, model.aux_head.weight.grad

    own, second = gradients(distill_loss_weight=1.0)
    labels_only, none = gradients(distill_loss_weight=1e-9)
    torch.testing.assert_close(own, labels_only)  # the teacher says nothing to the own head
    assert own.abs().sum() > 0 if is_labelled else torch.equal(own, torch.zeros_like(own))
    torch.testing.assert_close(second * 1e-9, none)  # nor do the labels to the second


def test_other_networks_learn_both_with_one_head():
    student, taught = small(1), small()
    images, targets = batch()
    result = DualHeadTask(student, teacher_of(taught), distill_loss_weight=0.5).train()(images, targets)
    with torch.no_grad():
        teacher = taught.eval()(images)
    output = result['output']
    want = expected(output, output, teacher, targets, 2.0, 0.5, 'binary')
    torch.testing.assert_close(result['loss'].double(), want, rtol=1e-4, atol=1e-5)


def test_the_second_head_sees_the_embedding():
    images = batch()[0]
    model = dual(normalize=True, scale=100.0).eval()
    embedding = model.network.forward_head(model.network.forward_features(images), pre_logits=True)
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    want = 100 * (unit @ model.aux_head.weight.T + model.aux_head.bias)
    main, aux = model.forward_both(images)
    torch.testing.assert_close(aux, want)
    assert torch.equal(main, model(images)) and torch.equal(main, model.network(images))


def test_a_hidden_layer_is_that_of_the_published_code():
    model, images = dual(hidden=7).eval(), batch()[0]
    embedding = model.network.forward_head(model.network.forward_features(images), pre_logits=True)
    first, dropout, norm, _, last = model.aux_head
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2.0)
    hidden = ((first(embedding) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).relu()
    torch.testing.assert_close(model.forward_both(images)[1], last(hidden))
    assert dropout.p == 0.1 and last.in_features == 7


def test_in_evaluation_mode_there_is_the_network_alone():
    model = dual()
    task = DualHeadTask(model, teacher_of(small())).eval()
    images, targets = batch()
    result = task(images, targets)
    assert torch.equal(result['output'], model.network(images))
    rows = (targets == 1).any(1)
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'][rows], targets[rows]))
    assert kept_network(task.get_eval_model()) is model.network


def test_averages_and_checkpoints_hold_both_heads():
    model = dual()
    task = DualHeadTask(model, teacher_of(small()))
    task.setup_ema(decay=0.5)
    names = set(small().state_dict())
    state = task.get_checkpoint_state()
    assert set(state['state_dict']) == names
    assert set(state['task_state']['parts']) == {'aux_head.weight', 'aux_head.bias'}
    with torch.no_grad():
        model.aux_head.bias.add_(1.0)
    task.update_ema()
    torch.testing.assert_close(task.trainable_module_ema.module.aux_head.bias, model.aux_head.bias - 0.5)
    other = DualHeadTask(dual(seed=2), teacher_of(small()))
    other.load_checkpoint_state(**{**task.get_checkpoint_state()})
    images = batch()[0]
    for got, want in zip(other.trainable_module.eval().forward_both(images), model.eval().forward_both(images)):
        assert torch.equal(got, want)


def test_processes_agree_whether_there_are_labels_or_not():
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        task = DualHeadTask(dual(), teacher_of(small()), mode='softmax').prepare_distributed().train()
        for labelled in (False, True, False):  # DDP refuses a step after one in which a parameter had no part
            task(*batch((labelled,) * 4))['loss'].backward()
        assert all(parameter.grad.isfinite().all() for parameter in task.trainable_module.parameters())
        del task
    finally:
        distributed.destroy_process_group()


def test_the_mixture_is_the_best_of_the_grid():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (60,), generator=generator)
    main, aux = (
        torch.randn(60, 4, generator=generator) + strength * F.one_hot(targets, 4) for strength in (1.0, 1.5))
    found = fit_dual_head(main, aux, targets)
    assert 0 < found[0] < 1  # both heads know something

    def merit(alpha, beta):
        prob = dual_head_prob(main.double(), aux.double(), alpha=alpha, beta=beta)
        right = sum(int(row.argmax()) == int(target) for row, target in zip(prob, targets))
        return right, math.fsum(math.log(row[target]) for row, target in zip(prob.tolist(), targets.tolist())) / 60

    grid = [(alpha / 10, beta) for alpha in range(11) for beta in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)]
    best = max(merit(*pair) for pair in grid)
    assert merit(*found) == pytest.approx(best)
    noise = torch.randn(60, 4, generator=generator)
    assert fit_dual_head(9.0 * F.one_hot(targets, 4), noise, targets)[0] == 1
    assert fit_dual_head(noise, 9.0 * F.one_hot(targets, 4), targets)[0] == 0


@pytest.mark.parametrize('settings, error, message', [
    ({'teacher': nn.Linear(2, 2)}, TypeError, r'teacher must be a Teacher, got Linear'),
    ({'mode': 'hinge'}, ValueError, r"mode must be one of 'binary', 'softmax', got 'hinge'"),
    ({'temperature': 0.0}, ValueError, r'temperature must be in \[0.001, 1000\], got 0.0'),
    ({'distill_loss_weight': -1.0}, ValueError, r'distill_loss_weight must be in \[0, inf\), got -1.0'),
])
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        DualHeadTask(nn.Identity(), **{'teacher': teacher_of(nn.Identity()), **settings})


def test_networks_and_numbers_that_do_not_serve_are_refused():
    with pytest.raises(TypeError, match=r'must be a timm image model with forward_features'):
        DualHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'hidden must be at least 0, got -1'):
        DualHead(small(), hidden=-1)
    with pytest.raises(ValueError, match=r'scale must be in \(0, inf\), got 0'):
        DualHead(small(), scale=0.0)


def test_a_teacher_of_other_classes_and_other_targets_are_refused():
    images, targets = batch()
    with pytest.raises(ValueError, match=r"must have the student's classes, got logits \(4, 7\) of the teacher and"):
        DualHeadTask(dual(), teacher_of(small(classes=7)))(images, targets)
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, C\)'):
        DualHeadTask(dual(), teacher_of(small()))(images, targets.argmax(1))


def test_a_cache_of_a_few_logits_serves_the_softmax_only(tmp_path):
    cache = TeacherCache(tmp_path, num_classes=5, topk=2, max_bytes=1 << 20, teacher='0' * 64, tail='softmax')
    with pytest.raises(ValueError, match=r"must keep all logits for mode 'binary', .* got topk 2 of 5 classes; open"):
        DualHeadTask(dual(), teacher_of(small(), cache=cache))
    assert DualHeadTask(dual(), teacher_of(small(), cache=cache), mode='softmax').teacher.cache is cache


@pytest.mark.parametrize('main, targets, message', [
    (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), r'there must be pictures to choose by, got none'),
    (torch.zeros(2, 3), torch.tensor([0, 3]), r'targets must be in \[0, 3\), got values from 0 to 3'),
    (torch.zeros(2, 3), torch.tensor([[0, 1]]), r'targets must have 1 dimension'),
    (torch.zeros(2), torch.tensor([0, 1]), r'main_logits must have 2 dimensions'),
    (torch.zeros(2, 3), torch.tensor([0]), r'first dimensions must be equal, got main_logits \(2, 3\), targets \(1,\)'),
])
def test_what_cannot_be_mixed_is_refused(main, targets, message):
    with pytest.raises(ValueError, match=message):
        fit_dual_head(main, main, targets)
