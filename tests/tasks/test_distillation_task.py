"""Tasks with a teacher: the published figures, only the student learns, timm's methods know who is who."""
import copy
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from timm_miil.losses import AsymmetricLoss, asymmetric_loss, multilabel_distillation_loss
from timm_miil.tasks import MultiLabelDistillationTask, SupervisedDistillationTask, Teacher

HALF = (0.5, 0.5, 0.5)
LOSSES = ('loss', 'task_loss', 'kd_loss')


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


def test_teacher_and_student_see_the_same_pictures():
    class Seeing(nn.Module):
        def forward(self, images):
            self.seen = images
            return images.mean((2, 3))

    student, images = Seeing(), batch()[0]
    task = SupervisedDistillationTask(student, teacher_of(Seeing()))
    result = task(images, torch.eye(3)[[0, 1, 2, 0]])
    assert student.seen is images and task.teacher.model.seen is images
    assert result['kd_loss'] == 0


def test_without_labels_the_criterion_does_not_matter():
    class Broken(nn.Module):
        def forward(self, logits, targets):
            return logits.sum() * torch.nan

    student, (images, targets) = small(seed=1), batch()
    result = SupervisedDistillationTask(student, teacher_of(small()), Broken(), task_loss_weight=0.0)(images, targets)
    torch.testing.assert_close(result['loss'], 5 * result['kd_loss'])
    result['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_a_criterion_of_indices_gets_such():
    images, targets = batch()
    task = SupervisedDistillationTask(
        small(seed=1), teacher_of(small()), timm.loss.LabelSmoothingCrossEntropy(0.1), soft_targets=False)
    result = task(images, targets)
    want = nn.functional.cross_entropy(result['output'], targets.argmax(1), label_smoothing=0.1)
    torch.testing.assert_close(result['task_loss'], want.detach())


@pytest.mark.parametrize('kind', [SupervisedDistillationTask, MultiLabelDistillationTask])
def test_timms_methods_are_of_the_student(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # Small, as what is traced takes long.
    student, model = (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)) for _ in range(2))
    images, targets = batch()
    names, task = set(student.state_dict()), kind(student, teacher_of(model))
    want = task.eval()(images, targets)['output']
    task.setup_ema(decay=0.5)
    assert task.compile(backend=backend) is task.get_eval_model()
    result = task(images, targets)
    assert len(graphs) == 2  # of student and teacher
    torch.testing.assert_close(result['output'], want)
    torch.testing.assert_close(task.get_eval_model()(images), want)
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict'} and set(state['state_dict']) == names
    assert set(task.get_checkpoint_state(ema=True)['state_dict_ema']) == names
    assert len(list(task.get_clip_parameters())) == len(list(student.parameters()))
    task.load_checkpoint_state(state['state_dict'])
    with torch.no_grad():
        student[1].bias.add_(1.0)
    task.update_ema()
    torch.testing.assert_close(
        task.get_eval_model(ema=True).module[1].bias, student[1].bias - 0.5)
    evaluator = task.create_evaluator()
    evaluator.update(result['output'], (targets > 0.2).float() if task.multi_label else targets.argmax(1))
    assert evaluator.compute()


@pytest.mark.parametrize('settings, error, message', [
    ({'teacher': nn.Linear(2, 2)}, TypeError, r'teacher must be a Teacher, got Linear; make one by Teacher\(model'),
    ({'teacher': None}, TypeError, r'teacher must be a Teacher, got NoneType'),
    ({'task_loss_weight': -1.0}, ValueError, r'task_loss_weight must be in \[0, inf\), got -1.0'),
    ({'distill_loss_weight': '5'}, TypeError, r"distill_loss_weight must be a number, got str '5'"),
    ({'task_loss_weight': 0.0, 'distill_loss_weight': 0.0}, ValueError, r'one of task_loss_weight and distill_loss'),
    ({'temperature': 0.0}, ValueError, r'temperature must be in \[0.001, 1000\], got 0.0'),
])
@pytest.mark.parametrize('kind', [SupervisedDistillationTask, MultiLabelDistillationTask])
def test_wrong_settings_are_refused(kind, settings, error, message):
    with pytest.raises(error, match=message):
        kind(nn.Identity(), **{'teacher': teacher_of(nn.Identity()), **settings})


def test_a_reduction_that_does_not_fit_is_refused():
    teacher = teacher_of(nn.Identity())
    with pytest.raises(ValueError, match=r"criterion must average over the batch, .* got reduction 'sum'; make it"):
        SupervisedDistillationTask(nn.Identity(), teacher, nn.CrossEntropyLoss(reduction='sum'))
    with pytest.raises(ValueError, match=r"reduction must be one of 'sum', 'mean', 'batchmean', got 'none'"):
        MultiLabelDistillationTask(nn.Identity(), teacher, AsymmetricLoss(reduction='none'))


@pytest.mark.parametrize('kind', [SupervisedDistillationTask, MultiLabelDistillationTask])
def test_a_teacher_of_other_classes_and_targets_of_another_form_are_refused(kind):
    images, targets = batch()
    message = r"must have the student's classes, got logits \(4, 7\) of the teacher and \(4, 5\) of the student; tell"
    with pytest.raises(ValueError, match=message):
        kind(small(), teacher_of(small(classes=7)))(images, targets)
    with pytest.raises(ValueError, match=r'target'):
        kind(small(), teacher_of(small()))(images, targets.argmax(1))


def in_process(rank, store):
    """A step under DDP on this rank's half of the pictures."""
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    try:
        task = SupervisedDistillationTask(small('test_vit', seed=1), teacher_of(small('test_vit'), image_size=None))
        task.prepare_distributed()
        images, targets = batch(side=160)
        half = slice(2 * rank, 2 * rank + 2)
        result = task(images[half], targets[half])
        result['loss'].backward()
        gradients = [parameter.grad.sum().item() for parameter in task.trainable_module.parameters()]
        wrapped = [type(module).__name__ for module in task.children()]
        del task
        return {'losses': [result[name].item() for name in LOSSES], 'gradients': gradients, 'wrapped': wrapped}
    finally:
        distributed.destroy_process_group()


def test_two_processes_teach_one_student(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / 'store')], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = [json.loads(output) for output in outputs]
    assert found[0]['wrapped'].count('DistributedDataParallel') == 1 and 'Teacher' in found[0]['wrapped']
    task = SupervisedDistillationTask(small('test_vit', seed=1), teacher_of(small('test_vit'), image_size=None))
    result = task(*batch(side=160))
    result['loss'].backward()
    means = [sum(pair) / 2 for pair in zip(found[0]['losses'], found[1]['losses'])]
    assert means == pytest.approx([result[name].item() for name in LOSSES], rel=1e-5)
    want = [parameter.grad.sum().item() for parameter in task.trainable_module.parameters()]
    assert found[0]['gradients'] == found[1]['gradients'] == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('kind', [SupervisedDistillationTask, MultiLabelDistillationTask])
def test_on_an_accelerator_it_is_the_same(kind):
    images, targets = batch(side=64)

    def step(device, **settings):
        student = small(seed=1).to(device).eval()
        task = kind(student, teacher_of(small(), **settings), device=device).to(device)
        result = task(images.to(device), targets.to(device))
        result['loss'].backward()
        return result, student.get_classifier().weight.grad.cpu()

    (result, gradient), (want, want_gradient) = step('cuda'), step('cpu')
    torch.testing.assert_close(result['loss'].cpu(), want['loss'], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-2, atol=1e-3)
    low, _ = step('cuda', precision=torch.bfloat16)
    torch.testing.assert_close(low['kd_loss'].cpu(), want['kd_loss'], rtol=0.1, atol=1e-3)


if __name__ == '__main__':
    warnings.simplefilter('error')
    print(json.dumps(in_process(int(sys.argv[1]), sys.argv[2])))
