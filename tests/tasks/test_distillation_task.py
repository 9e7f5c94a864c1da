"""Tasks with a teacher: the published figures, only the student learns, timm's methods know who is who."""
import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_miil.losses import AsymmetricLoss, asymmetric_loss, multilabel_distillation_loss
from timm_miil.tasks import MultiLabelDistillationTask, SupervisedDistillationTask, Teacher

HALF = (0.5, 0.5, 0.5)


class Logits(nn.Module):
    """Logits of one fixed batch, to be learnt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits * 1


def usi_cases(fixtures_dir):
    folder = fixtures_dir / 'usi'
    cases = json.loads((folder / 'manifest.json').read_text())['cases']
    for name, case in cases.items():
        if case['config']['kind'] == 'loss':
            yield name, case, load_file(folder / case['file'])


def small(name='test_resnet', classes=5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=classes)


def teacher_of(model, **settings):
    return Teacher(model, **{'mean': HALF, 'std': HALF, 'image_size': 'student', **settings})


def batch(classes=5, size=4, side=32):
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(size, classes, generator=generator).softmax(1)
    return torch.randn(size, 3, side, side, generator=generator), targets


def test_the_published_loss_and_gradient(fixtures_dir):
    names = set()
    for name, case, tensors in usi_cases(fixtures_dir):
        names.add(name.rpartition('_')[0])
        config, tolerance, targets = case['config'], case['tolerance'], tensors['targets']
        student = Logits(tensors['student'])
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, student.logits.shape[1]).to(student.logits.dtype)
        task = SupervisedDistillationTask(
            student, teacher_of(Logits(tensors['teacher'])), distill_loss_weight=config['alpha_kd'],
            temperature=config['temperature'], task_loss_weight=float(not config['use_kd_only_loss']))
        result = task(torch.zeros(len(targets), 3, 2, 2), targets)
        result['loss'].backward()
        torch.testing.assert_close(result['loss'], tensors['loss'], **tolerance)
        torch.testing.assert_close(result['kd_loss'], tensors['kd'], **tolerance)
        torch.testing.assert_close(result['task_loss'], tensors['base_loss'], **tolerance)
        torch.testing.assert_close(student.logits.grad, tensors['grad'], **tolerance)
    assert names == {'default', 'alpha1', 'hard_targets', 'kd_only'}


def test_without_other_settings_it_is_the_papers():
    images, targets = batch()
    result = SupervisedDistillationTask(small(seed=1), teacher_of(small()))(images, targets)
    assert result['kd_loss'] > 0
    torch.testing.assert_close(result['loss'], result['task_loss'] + 5 * result['kd_loss'])


@pytest.mark.parametrize('kind', [SupervisedDistillationTask, MultiLabelDistillationTask])
def test_only_the_student_learns(kind):
    student, model = small(seed=1), small()
    before = copy.deepcopy(model.state_dict())
    task = kind(student, teacher_of(model))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, weight_decay=0.1)
    images, targets = batch()
    first = copy.deepcopy(student.state_dict())
    for _ in range(2):
        task.train()
        optimizer.zero_grad()
        task(images, targets)['loss'].backward()
        optimizer.step()
    assert not task.teacher.model.training and student.training
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    for name, tensor in task.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(torch.equal(tensor, first[name]) for name, tensor in student.named_parameters())


def test_several_labels_are_taught_label_by_label():
    student, model, (images, _) = small(seed=1), small(), batch()
    targets = torch.tensor([[1.0, 0, 0, 1, 0]]).repeat(4, 1)
    task = MultiLabelDistillationTask(student, teacher_of(model), temperature=2.0, distill_loss_weight=3.0)
    result = task(images, targets)
    with torch.no_grad():
        taught = model.eval()(images)
    output = result['output']
    want = asymmetric_loss(output, targets) + 3 * multilabel_distillation_loss(
        output, taught, temperature=2.0, reduction='sum')
    torch.testing.assert_close(result['loss'], want)


@pytest.mark.parametrize('reduction', ['mean', 'batchmean', 'sum'])
def test_the_divergence_is_reduced_as_the_criterion_is(reduction):
    def task(of):
        return MultiLabelDistillationTask(small(seed=1).eval(), teacher_of(small()), AsymmetricLoss(reduction=of))

    images, targets = batch()
    result, summed = task(reduction)(images, targets), task('sum')(images, targets)
    scale = {'mean': targets.numel(), 'batchmean': len(targets), 'sum': 1}[reduction]
    for name in ('loss', 'task_loss', 'kd_loss'):
        torch.testing.assert_close(result[name] * scale, summed[name])
