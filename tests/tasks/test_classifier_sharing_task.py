"""Classifier sharing: the published objective, every term from its equation, a teacher that stays, and what is kept."""
import copy
import datetime
import gc
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn import functional as F

from timm_miil.tasks import (
    ClassifierSharingTask, SharedHeadModel, SupervisedDistillationTask, Teacher, TeacherCache, freeze_head,
    merge_adapter)

HALF = (0.5, 0.5, 0.5)
SIDE = 32
TIMEOUT = datetime.timedelta(seconds=120)
ALL_TERMS = {'head_loss_weight': 0.3, 'embedding_loss_weight': 0.2, 'contrast_loss_weight': 0.8, 'num_train': 9,
             'num_negatives': 3, 'temperature': 2.0}


class Toy(nn.Module):
    """The network of the fixtures, with timm's contract; without tensors it is a random one."""

    def __init__(self, tensors=None, who=''):
        super().__init__()
        self.bb, self.fc = nn.Linear(8, 16), nn.Linear(16, 10)
        if tensors is not None:
            self.load_state_dict({name: tensors[f'{who}.{name}'] for name in self.state_dict()}, assign=True)
        self.pretrained_cfg, self.num_classes = {'input_size': (8, 1, 1)}, 10

    def forward_features(self, images):
        return self.bb(images.flatten(1)).relu()

    def forward_head(self, features, pre_logits=False):
        return features if pre_logits else self.fc(features)

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def cases(fixtures_dir):
    folder = fixtures_dir / 'headsharing'
    found = json.loads((folder / 'manifest.json').read_text())['cases']
    return {name: (case, load_file(folder / case['file'])) for name, case in found.items()
            if case['config']['kind'] == 'total'}


def small(seed=0, classes=5, width=96, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model('test_resnet', num_classes=classes, channels=(8, 8, 8, width), **settings)
        # Layers that differ from picture to picture, from the start.
        nn.init.normal_(model.fc.weight), nn.init.normal_(model.fc.bias)
        return model


def teacher_of(model, **settings):
    return Teacher(model, **{'mean': HALF, 'std': HALF, 'image_size': 'student', 'shares_head': True, **settings})


def batch(classes=5, size=4):
    generator = torch.Generator().manual_seed(1)
    targets = (3 * torch.rand(size, classes, generator=generator)).softmax(1)
    return torch.randn(size, 3, SIDE, SIDE, generator=generator), targets


# ---- the objective


def test_the_published_objective_gradients_and_mixed_probabilities(fixtures_dir):
    found = cases(fixtures_dir)
    assert len(found) == 4
    for case, tensors in found.values():
        config, tolerance = case['config'], case['tolerance']
        images = tensors['x'][:, :, None, None]
        # The student's own last layer: another one until it is initialised.
        student, model = Toy(tensors, 'student'), Toy(tensors, 'teacher')
        one = (1.0,) * 8
        teacher = Teacher(model, mean=one, std=one, image_size='student', shares_head=True)
        task = ClassifierSharingTask(
            student, teacher, task_loss_weight=config['gamma'], distill_loss_weight=config['alpha'],
            head_loss_weight=config['beta'], temperature=config['T'],
            init_head=config['init_student_head_from_teacher'])
        result = task(images, F.one_hot(tensors['targets'], 10).to(images.dtype))
        result['loss'].backward()
        torch.testing.assert_close(result['loss'], tensors['loss'], **tolerance)
        torch.testing.assert_close(result['output'], tensors['logits'], **tolerance)
        for name in config['trainable']:
            gradient = student.get_parameter(name.removeprefix('model_s.')).grad
            torch.testing.assert_close(gradient, tensors[f'grad.{name}'], **tolerance)
        mixed = SharedHeadModel(student, teacher.head, head_weight=config['validation_th_weight'])
        torch.testing.assert_close(mixed(images), tensors['mixed_probs'], **tolerance)


def test_the_defaults_are_those_of_th_kd():
    images, targets = batch()
    result = ClassifierSharingTask(small(1), teacher_of(small()))(images, targets)
    assert set(result) == {'loss', 'output', 'task_loss', 'kd_loss', 'head_loss'}
    torch.testing.assert_close(
        result['loss'], result['task_loss'] + 1.5 * result['kd_loss'] + 0.02 * result['head_loss'])
    assert result['head_loss'] > 0 and not result['head_loss'].requires_grad


def divergence(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return temperature ** 2 * (p * (p.log() - q.log())).sum() / len(p)


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_every_term_is_that_of_its_equation(reduction):
    """KDE, TH-KD and CRD through an adapter, in float64 from the networks' own outputs."""
    images, targets = (tensor.double() for tensor in batch())
    student, model = small(1, width=16).double(), small(width=24).double()
    task = ClassifierSharingTask(
        student, teacher_of(model), adapter=True, embedding_reduction=reduction, **ALL_TERMS).double()
    indices = torch.tensor([7, 0, 3, 8])
    parts = copy.deepcopy(task.trainable_module)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        negatives = torch.randint(8, (4, 3))
        negatives += negatives >= indices[:, None]
        torch.manual_seed(5)
        result = task(images, targets, indices)
    copied = parts.network.train()
    features = copied.forward_head(copied.forward_features(images), pre_logits=True)
    logits = copied.fc(features)
    with torch.no_grad():
        told = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        teacher_logits = model.fc(told)
    adapted = features @ parts.adapter.weight.T + parts.adapter.bias
    direction = adapted / adapted.norm(dim=1, keepdim=True) - told / told.norm(dim=1, keepdim=True)
    want = {
        'task_loss': -(targets * logits.log_softmax(1)).sum(1).mean(), 'kd_loss': divergence(logits, teacher_logits, 2),
        'head_loss': divergence(model.fc(adapted), teacher_logits, 2),
        'embedding_loss': getattr(direction.square().sum(1), reduction)(),
        'contrast_loss': parts.contrast(features, told, indices, negatives)}
    for name, value in want.items():
        torch.testing.assert_close(result[name], value.detach(), rtol=1e-9, atol=1e-11, msg=lambda text: name + text)
    total = (want['task_loss'] + 1.5 * want['kd_loss'] + 0.3 * want['head_loss'] + 0.2 * want['embedding_loss']
             + 0.8 * want['contrast_loss'])
    torch.testing.assert_close(result['loss'], total)
    gradients = torch.autograd.grad(total, list(parts.parameters()))
    result['loss'].backward()
    for parameter, gradient in zip(task.trainable_module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
    contrast = task.trainable_module.contrast
    assert seen(contrast.student_memory) == seen(contrast.teacher_memory) == [0, 3, 7, 8]


def seen(memory):
    """Which rows are unit vectors, as those are that were remembered; the others are as they were drawn."""
    return ((memory.norm(dim=1) - 1).abs() < 1e-6).nonzero().flatten().tolist()


def test_without_what_is_shared_it_is_plain_distillation():
    images, targets = batch()
    task = ClassifierSharingTask(small(1), teacher_of(small()), head_loss_weight=0.0)
    plain = SupervisedDistillationTask(small(1), teacher_of(small()), distill_loss_weight=1.5, temperature=4.0)
    found, want = task(images, targets), plain(images, targets)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_the_shared_head_teaches_the_backbone_alone():
    images, targets = batch()
    gradients = []
    for weight in (0.0, 5.0):
        student = small(1)
        ClassifierSharingTask(student, teacher_of(small()), head_loss_weight=weight)(images, targets)['loss'].backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    changed = {name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])}
    assert {'conv1.0.weight', 'layer4.0.bn2.bias'} < changed and not {'fc.weight', 'fc.bias'} & changed


def test_a_criterion_of_indices_gets_such_and_evaluation_has_all_terms():
    images, targets = batch()
    task = ClassifierSharingTask(
        small(1), teacher_of(small()), timm.loss.LabelSmoothingCrossEntropy(0.1), soft_targets=False).eval()
    result = task(images, targets)
    want = F.cross_entropy(task.trainable_module(images), targets.argmax(1), label_smoothing=0.1)
    torch.testing.assert_close(result['task_loss'], want.detach())
    assert 'head_loss' in result


# ---- the teacher


def test_the_teacher_stays_and_is_not_trained():
    model = small()
    before = copy.deepcopy(model.state_dict())
    teacher, student = teacher_of(model), small(1)
    task = ClassifierSharingTask(student, teacher, init_head=True, **ALL_TERMS)
    assert torch.equal(student.fc.weight, model.fc.weight) and student.fc.weight is not model.fc.weight
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    images, targets = batch()
    task(images, targets, torch.arange(4))['loss'].backward()
    optimizer.step()
    for held in (model, teacher.model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in held.state_dict().items())
    assert torch.equal(teacher.head.weight, before['fc.weight']) and model.fc.weight.requires_grad
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not torch.equal(student.fc.weight, before['fc.weight'])


def test_its_head_keeps_all_digits_in_low_precision():
    model, images = small(), batch()[0]
    teacher = teacher_of(model, precision=torch.bfloat16, columns=[4, 1])
    assert teacher.model.fc.weight.dtype == torch.bfloat16 and teacher.head.out_features == 2
    assert torch.equal(teacher.head.weight, model.fc.weight[[4, 1]])
    assert torch.equal(teacher.head.bias, model.fc.bias[[4, 1]])
    logits, embedding = teacher.answer_with_embedding(images)
    assert logits.dtype == embedding.dtype == torch.float32 and torch.equal(logits, teacher(images))
    torch.testing.assert_close(teacher.head(embedding), logits, rtol=0.05, atol=0.2)


def test_it_sees_the_pictures_renormalised_and_resized():
    model, images = small(), batch()[0]
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
    teacher = teacher_of(model, image_size=48)
    logits, embedding = teacher.answer_with_embedding(images)
    seen = teacher.prepare(images)
    assert seen.shape[-1] == 48
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits, model(seen))
        assert torch.equal(embedding, model.forward_head(model.forward_features(seen), pre_logits=True))


def test_a_cache_answers_where_logits_are_enough(tmp_path):
    images, targets = batch()
    teacher = teacher_of(small())
    want = ClassifierSharingTask(small(1), teacher)(images, targets)
    teacher.cache = TeacherCache(tmp_path, num_classes=5, topk=5, max_bytes=10**6, teacher=teacher.fingerprint())
    for _ in range(2):
        result = ClassifierSharingTask(small(1), teacher)(images, targets)
        torch.testing.assert_close(result['head_loss'], want['head_loss'], rtol=1e-2, atol=1e-3)
    assert (teacher.cache.num_asked, teacher.cache.num_found) == (4, 4)
    with pytest.raises(ValueError, match='the teacher must have no cache where its embedding is asked for'):
        ClassifierSharingTask(small(1), teacher, embedding_loss_weight=1.0)(images, targets)
    assert len(teacher.cache) == 0 or teacher.cache.num_asked == 4


def test_a_student_aware_teacher_learns_without_its_head():
    student, model = small(1), small(2, layers=(1, 1, 1, 2))
    freeze_head(model, student.get_classifier())
    before = copy.deepcopy(model.state_dict())
    images, targets = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert 'conv1.0.weight' in changed and not {'fc.weight', 'fc.bias'} & changed
    assert torch.equal(model.fc.weight, student.fc.weight) and student.fc.weight.requires_grad
    with pytest.raises(ValueError, match='of width 96, and the teacher.s has width 24; .* adapter=True'):
        freeze_head(small(width=24), student.fc)
    with pytest.raises(ValueError, match='of the same shape only'):
        freeze_head(small(), nn.Linear(96, 5, bias=False))


@pytest.mark.parametrize('bias', [True, False])
def test_an_adapter_learns_between_the_teacher_and_the_frozen_layer(bias):
    model, head, (images, targets) = small(width=24).double().eval(), nn.Linear(96, 5, bias=bias).double(), batch()
    images = images.double()
    freeze_head(model, head, adapter=True)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = nn.Linear(24, 96).double()
    with torch.no_grad():
        for name in ('weight', 'bias'):
            names.remove(f'fc.parametrizations.{name}.original')
            getattr(adapter, name).copy_(model.fc.parametrizations[name].original)
    assert not any(name.startswith('fc') for name in names)
    want = head(adapter(model.forward_head(model.forward_features(images), pre_logits=True)))
    logits = model(images)
    torch.testing.assert_close(logits, want, rtol=1e-12, atol=1e-12)
    own = [steps.original for steps in (model.fc.parametrizations.weight, model.fc.parametrizations.bias)]
    grads = [torch.autograd.grad(F.cross_entropy(out, targets.double()), parameters, retain_graph=True)
             for out, parameters in ((logits, own), (want, [adapter.weight, adapter.bias]))]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    merge_adapter(model)
    assert type(model.fc) is nn.Linear and model.state_dict().keys() == small(width=24).state_dict().keys()
    torch.testing.assert_close(model(images), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match='of the same classes with a bias, got .*=7'):
        freeze_head(small(), nn.Linear(96, 7), adapter=True)


# ---- the student


def test_timms_methods_are_of_the_student():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # Small, as what is traced takes long.
    student, one = Toy(), (1.0,) * 8
    names, images, targets = set(student.state_dict()), torch.randn(4, 8, 1, 1), torch.eye(10)[:4]
    teacher = Teacher(Toy(), mean=one, std=one, shares_head=True, image_size='student')
    want = student(images)
    task = ClassifierSharingTask(student, teacher, adapter=True, **ALL_TERMS)
    task.setup_ema(decay=0.5)
    task.compile(backend=backend)
    result = task(images, targets, torch.arange(4))
    assert len(graphs) == 2  # of student and teacher
    torch.testing.assert_close(result['output'], want)
    state = task.get_checkpoint_state()
    assert set(state['state_dict']) == names
    parts = set(state['task_state']['parts'])
    assert {'adapter.weight', 'contrast.student_projection.bias', 'contrast.teacher_memory'} < parts
    assert not any('teacher.' in name or 'network' in name for name in parts)
    other = ClassifierSharingTask(Toy(), teacher, adapter=True, **ALL_TERMS)
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    for name, tensor in other.trainable_module.state_dict().items():
        assert torch.equal(tensor, task.trainable_module.state_dict()[f'_orig_mod.{name}']), name


def test_a_trained_student_is_a_plain_model(tmp_path):
    images, targets = batch()
    student, model = small(1), small()
    task = ClassifierSharingTask(student, teacher_of(model), adapter=True)
    task(images, targets)['loss'].backward()
    timm.models.save_for_hf(student.eval(), str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
        for weight, want in ((0.0, student(images)), (1.0, model.eval().fc(
                task.trainable_module.adapter(student.forward_head(student.forward_features(images), True))))):
            mixed = SharedHeadModel(
                loaded, model.fc, head_weight=weight, adapter=task.trainable_module.adapter)
            torch.testing.assert_close(mixed(images), want.softmax(1))


# ---- what does not fit


@pytest.mark.parametrize(('settings', 'error', 'message'), [
    ({'teacher': nn.Linear(2, 2)}, TypeError, r'teacher must be a Teacher, got Linear; make one by Teacher\(model'),
    ({'teacher': Teacher(small(), mean=HALF, std=HALF)}, ValueError, 'must be made with shares_head=True'),
    ({'head_loss_weight': -1.0}, ValueError, r'head_loss_weight must be in \[0, inf\), got -1.0'),
    ({'embedding_loss_weight': '1'}, TypeError, "embedding_loss_weight must be a number, got str '1'"),
    ({'contrast_loss_weight': 1.0}, ValueError, 'num_train must be given with contrast_loss_weight'),
    ({'contrast_loss_weight': 1.0, 'num_train': 1}, ValueError, 'num_samples'),
    ({'adapter': True, 'head_loss_weight': 0.0}, ValueError, 'adapter is for head_loss_weight and embedding_loss_wei'),
    ({'teacher': teacher_of(small(width=24))}, ValueError,
     'last layer reads embeddings of width 24, and the student\'s has width 96; .* by adapter=True'),
    ({'teacher': teacher_of(small(width=24)), 'init_head': True, 'adapter': True}, ValueError,
     'a last layer can be copied to one of the same shape only, got .*=24.* for .*=96'),
    ({'temperature': 0.0}, ValueError, r'temperature must be in \[0.001, 1000\], got 0.0'),
    ({'embedding_reduction': 'max'}, ValueError, "reduction must be one of .*, got 'max'"),
    ({'criterion': nn.CrossEntropyLoss(reduction='sum')}, ValueError, 'criterion must average over the batch'),
    ({'task_loss_weight': 0.0, 'distill_loss_weight': 0.0}, ValueError, 'one of task_loss_weight and distill_loss'),
    ({'model': nn.Linear(2, 2)}, TypeError, 'got Linear without forward_features'),
])
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ClassifierSharingTask(**{'model': small(1), 'teacher': teacher_of(small()), **settings})


def test_wrong_batches_are_refused():
    images, targets = batch()
    task = ClassifierSharingTask(small(1), teacher_of(small()), **ALL_TERMS)
    assert task.needs_indices and not ClassifierSharingTask(small(1), teacher_of(small())).needs_indices
    with pytest.raises(ValueError, match='indices must be given with contrast_loss_weight'):
        task(images, targets)
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, C\)'):
        task(images, targets.argmax(1))
    with pytest.raises(ValueError, match=r'\(4, 7\) of the teacher and \(4, 5\) of the student'):
        ClassifierSharingTask(small(1), teacher_of(small(classes=7)))(images, targets)
    with pytest.raises(ValueError, match='made with shares_head=True to give its embedding'):
        Teacher(small(), mean=HALF, std=HALF).answer_with_embedding(images)


@pytest.mark.parametrize(('settings', 'error', 'message'), [
    ({'head_weight': 1.5}, ValueError, r'head_weight must be in \[0, 1\], got 1.5'),
    ({'head': nn.Identity()}, TypeError, "head must be the teacher's last layer, a nn.Linear, got Identity"),
    ({'head': nn.Linear(24, 5)}, ValueError, 'embeddings of width 24'),
    ({'head': nn.Linear(96, 7)}, ValueError, "head must be of the student's 5 classes, got one of 7"),
])
def test_mixtures_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=message):
        SharedHeadModel(**{'network': small(), 'head': nn.Linear(96, 5), 'head_weight': 0.5, **settings})


# ---- several processes


def in_process(rank, store):
    """Two steps under DDP on this rank's half of the pictures: what is remembered then."""
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            task = ClassifierSharingTask(small(1), teacher_of(small()), **ALL_TERMS)
            task.prepare_distributed()
            images, targets = batch()
            half = slice(2 * rank, 2 * rank + 2)
            for _ in range(2):
                task(images[half], targets[half], torch.arange(4)[half])['loss'].backward()
        contrast = task.trainable_module.module.contrast
        state = {name: tensor.tolist() for name, tensor in contrast.named_buffers()}
        rows = [seen(contrast.student_memory), seen(contrast.teacher_memory)]
        gradients = [parameter.grad.abs().sum().item() for parameter in contrast.parameters()]
        del task, contrast  # its threads end before the group's
        return {'state': state, 'seen': rows, 'gradients': gradients}
    finally:
        gc.collect()
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_remember_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # a process group leaves its own
    store = str(tmp_path / 'store')
    with subprocess.Popen([sys.executable, __file__, store], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        try:
            first = in_process(0, store)
            out, words = other.communicate(timeout=TIMEOUT.total_seconds())
        except BaseException:
            other.kill()
            raise
    assert other.returncode == 0, words.decode()
    assert json.loads(out) == first
    assert first['seen'] == [[0, 1, 2, 3]] * 2 and min(first['gradients']) > 0


@pytest.mark.gpu
def test_on_an_accelerator_it_is_the_same():
    images, targets = batch()
    found = []
    for device in ('cpu', 'cuda'):
        student = small(1).to(device)
        task = ClassifierSharingTask(
            student, teacher_of(small()).to(device), embedding_loss_weight=0.2, device=device).to(device)
        result = task(images.to(device), targets.to(device))
        result['loss'].backward()
        found.append((result['loss'].detach().cpu(), student.fc.weight.grad.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=1e-2)


if __name__ == '__main__':
    warnings.simplefilter('error')
    print(json.dumps(in_process(1, sys.argv[1])))
