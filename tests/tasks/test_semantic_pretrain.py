"""Semantic pretraining: the published loss of a batch as the engine gives it, with a teacher and without."""
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from timm_miil.losses import SemanticHierarchy, SemanticSoftmaxLoss, semantic_distillation_loss, semantic_softmax_loss
from timm_miil.tasks import SemanticPretrainTask, Teacher, TeacherCache

PARENTS = [None, None, 0, 0, 1, 2]
HALF = (0.5, 0.5, 0.5)


class Logits(nn.Module):
    """Logits of one fixed batch, to be learnt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits * 1


def small(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model('test_resnet', num_classes=len(PARENTS))


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.eye(len(PARENTS))[[5, 1, 3, 2]]


def build(seed=1, reduction='mean', **settings):
    criterion = SemanticSoftmaxLoss(SemanticHierarchy(PARENTS), smoothing=0.2, reduction=reduction)
    return SemanticPretrainTask(small(seed).eval(), criterion, **settings)


def teacher(cache=None):
    return Teacher(small(2), mean=HALF, std=HALF, image_size='student', cache=cache)


def test_the_published_losses_and_gradients(fixtures_dir):
    folder, number = fixtures_dir / 'semantic_softmax', 0
    for case in json.loads((folder / 'manifest.json').read_text())['cases'].values():
        if case['config']['kind'] != 'semantic':
            continue
        number += 1
        tensors, config = load_file(folder / case['file']), case['config']
        hierarchy = SemanticHierarchy.from_class_tree(config['class_tree_list'])
        images = torch.zeros(len(tensors['logits']), 3, 2, 2)
        targets = F.one_hot(tensors['targets'], hierarchy.num_classes).to(tensors['logits'].dtype)

        model = Logits(tensors['logits'])
        loss = SemanticPretrainTask(
            model, SemanticSoftmaxLoss(hierarchy, smoothing=config['label_smooth']))(images, targets)['loss']
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors['loss'], **case['tolerance'])
        torch.testing.assert_close(model.logits.grad, tensors['grad'], **case['tolerance'])

        model = Logits(tensors['logits'])
        loss = SemanticPretrainTask(
            model, SemanticSoftmaxLoss(hierarchy, reduction='sum'), task_loss_weight=0.0,
            teacher=Teacher(Logits(tensors['teacher_logits']), mean=HALF, std=HALF))(images, targets)['loss']
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors['kd_loss'], **case['tolerance'])
        torch.testing.assert_close(model.logits.grad, tensors['kd_grad_student'], **case['tolerance'])
    assert number == 8


def test_a_batch_gives_loss_and_output():
    task, (images, targets) = build(), batch()
    result = task(images, targets)
    assert set(result) == {'loss', 'output'}
    want = semantic_softmax_loss(result['output'], torch.tensor([5, 1, 3, 2]), SemanticHierarchy(PARENTS))
    torch.testing.assert_close(result['loss'], want)


def test_of_mixed_targets_the_most_probable_is_taken():
    task, (images, targets) = build(), batch()
    mixed = 0.7 * targets + 0.3 * targets.roll(1, 0)
    assert torch.equal(task(images, mixed)['loss'], task(images, targets)['loss'])


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_a_teacher_adds_its_distance_in_each_level(reduction):
    task, (images, targets) = build(reduction=reduction, teacher=teacher(), distill_loss_weight=3.0), batch()
    result = task(images, targets)
    with torch.no_grad():
        taught = small(2).eval()(images)
    hierarchy, output = SemanticHierarchy(PARENTS), result['output']
    distance = semantic_distillation_loss(output, taught, hierarchy, reduction=reduction)
    base = semantic_softmax_loss(output, torch.tensor([5, 1, 3, 2]), hierarchy, reduction=reduction)
    torch.testing.assert_close(result['kd_loss'], distance.detach())
    torch.testing.assert_close(result['task_loss'], base.detach())
    torch.testing.assert_close(result['loss'], base + 3 * distance)
    assert distance > 0
    result['loss'].backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())


def test_compiled_it_is_the_same():
    images, targets = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(PARENTS)))
    task = SemanticPretrainTask(model, SemanticSoftmaxLoss(SemanticHierarchy(PARENTS)))
    want = task(images, targets)['loss']
    task.compile(backend='eager')
    torch.testing.assert_close(task(images, targets)['loss'], want)
    assert set(task.get_checkpoint_state()['state_dict']) == {'1.weight', '1.bias'}


def test_a_cache_of_a_few_logits_is_refused(tmp_path):
    few = TeacherCache(tmp_path / 'few', num_classes=6, topk=2, max_bytes=10**6, teacher='x')
    message = r"the teacher's cache must keep all logits, .* got topk 2 of 6 classes; open it with topk=6"
    with pytest.raises(ValueError, match=message):
        build(teacher=teacher(few))
    images, targets = batch()
    whole = TeacherCache(tmp_path / 'all', num_classes=6, topk=6, max_bytes=10**6, teacher='x')
    got, want = (build(teacher=teacher(cache))(images, targets)['kd_loss'] for cache in (whole, None))
    torch.testing.assert_close(got, want, rtol=0.01, atol=1e-4)  # float16


def test_wrong_arguments_are_refused():
    criterion = SemanticSoftmaxLoss(SemanticHierarchy(PARENTS))
    with pytest.raises(TypeError, match=r'criterion must be a SemanticSoftmaxLoss, got CrossEntropyLoss; make one by'):
        SemanticPretrainTask(nn.Identity(), nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r'teacher must be a Teacher, got Identity'):
        SemanticPretrainTask(nn.Identity(), criterion, teacher=nn.Identity())
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', 'sum', got 'none'"):
        build(reduction='none')
    with pytest.raises(ValueError, match=r'distill_loss_weight must be in \[0, inf\), got -1'):
        build(teacher=teacher(), distill_loss_weight=-1)
    images, targets = batch()
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, C\)'):
        build()(images, targets.argmax(1))
    with pytest.raises(ValueError, match=r"must have the student's classes, got logits \(4, 7\) of the teacher"):
        other = timm.create_model('test_resnet', num_classes=7)
        build(teacher=Teacher(other, mean=HALF, std=HALF))(images, targets)
