"""The task of embeddings: ArcFace from its equation, what is kept, the teacher's term, and the refusals."""
import math
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from timm_miil.tasks import MarginSoftmax, Teacher, VerificationTask, kept_network

pytest.importorskip('pytorch_metric_learning')
STATISTICS = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(num_identities=5, embed_dim=8, **settings):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, embed_dim))
    return MarginSoftmax(network, num_identities, embed_dim, **settings)


def batch(num=6, num_identities=5):
    return drawn(num, 3, 2, 2), torch.eye(num_identities)[torch.arange(num) % num_identities]


def arcface(embeddings, weights, identities, margin, scale):
    """Eq. 3 of arXiv:1801.07698, picture by picture in float64; past pi - margin, where the cosine would rise again,
    the target falls on along the straight line that the authors' code takes."""
    losses = []
    for row, own in zip(F.normalize(embeddings.double(), dim=1), identities.tolist()):
        cosines = [float(row @ column) for column in F.normalize(weights.double(), dim=0).T]
        angle = math.acos(max(-1.0, min(1.0, cosines[own])))
        cosines[own] = (
            math.cos(angle + margin) if angle <= math.pi - margin else cosines[own] - margin * math.sin(margin))
        largest = scale * max(cosines)
        total = sum(math.exp(scale * cosine - largest) for cosine in cosines)
        losses.append(largest + math.log(total) - scale * cosines[own])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize('margin, scale', [(28.6, 64.0), (60.0, 10.0), (0.0, 1.0)])
def test_the_loss_is_that_of_the_equation(margin, scale):
    model = build(margin=margin, scale=scale)
    task, (images, targets) = VerificationTask(model), batch(40)
    with torch.no_grad():  # one picture is opposite to its identity, past the fold
        model.margin.W[:, 0] = -model.network(images[:1])[0]
    result = task(images, targets)
    wanted = arcface(result['output'].detach(), model.margin.W.detach(), targets.argmax(1), math.radians(margin), scale)
    assert wanted[0] > wanted[1:].mean()
    torch.testing.assert_close(result['loss'].double(), wanted.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result['output'], model.network(images))


def test_without_margin_it_is_a_softmax_of_cosines():
    model = build(margin=0.0, scale=16.0)
    images, targets = batch()
    cosines = F.normalize(model.network(images), dim=1) @ F.normalize(model.margin.W, dim=0)
    wanted = F.cross_entropy(16.0 * cosines, targets.argmax(1))
    torch.testing.assert_close(VerificationTask(model)(images, targets)['loss'], wanted, rtol=1e-5, atol=1e-5)


def test_a_step_changes_the_network_and_the_identities():
    model = build()
    task, before = VerificationTask(model), {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task(*batch())['loss'].backward()
    optimizer.step()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == {
        'network.1.weight', 'network.1.bias', 'margin.W'}


def test_the_network_alone_is_kept_and_averaged():
    model = build()
    task = VerificationTask(model)
    task.setup_ema(decay=0.9)
    task(*batch())['loss'].backward()
    images = batch()[0]
    assert kept_network(task.trainable_module) is model.network and task.get_eval_model() is model.network
    averaged = task.get_eval_model(ema=True)
    assert averaged.state_dict().keys() == model.network.state_dict().keys()
    assert torch.equal(averaged(images), model.network(images))
    assert torch.equal(model.eval()(images), model.network(images))
    assert list(task.get_task_state()['parts']) == ['margin.W']


def test_half_precision_ends_before_the_margin():
    model, (images, targets) = build(), batch()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = VerificationTask(model)(images, targets)
    assert result['output'].dtype == torch.bfloat16 and result['loss'].dtype == torch.float32
    wanted = arcface(
        result['output'].detach().float(), model.margin.W.detach(), targets.argmax(1), math.radians(28.6), 64.0)
    torch.testing.assert_close(result['loss'].double(), wanted.mean(), rtol=1e-5, atol=1e-5)


def test_a_teacher_adds_the_distance_of_directions():
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    before = [value.clone() for value in network.state_dict().values()]
    model, (images, targets) = build(), batch()
    alone = VerificationTask(model)(images, targets)
    task = VerificationTask(
        model, Teacher(network, **STATISTICS), task_loss_weight=0.5, distill_loss_weight=3.0)
    result = task(images, targets)
    gap = F.normalize(alone['output'].double(), dim=1) - F.normalize(network(images).double(), dim=1)
    wanted = 0.5 * alone['loss'].double() + 3.0 * gap.square().sum(1).mean()
    torch.testing.assert_close(result['loss'].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(result['task_loss'], alone['loss'].detach()) and not result['kd_loss'].requires_grad
    result['loss'].backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before))


def test_a_network_of_timm_embeds_by_its_classifier():
    network = timm.create_model('test_resnet', num_classes=8, in_chans=3)
    task = VerificationTask(MarginSoftmax(network, 3, 8))
    assert task(drawn(2, 3, 32, 32), torch.eye(3)[:2])['output'].shape == (2, 8)


@pytest.mark.parametrize('settings, error, words', [
    ({'num_identities': 0}, ValueError, 'num_identities must be at least 1, got 0'),
    ({'embed_dim': 8.0}, TypeError, 'embed_dim must be an int, got float 8.0'),
    ({'margin': 91.0}, ValueError, r'margin must be in \[0, 90\], got 91.0'),
    ({'scale': 0.0}, ValueError, r'scale must be in \[0.001, 1e\+06\), got 0.0'),
])
def test_settings_out_of_range(settings, error, words):
    with pytest.raises(error, match=words):
        MarginSoftmax(nn.Identity(), **{'num_identities': 3, 'embed_dim': 8, **settings})


@pytest.mark.parametrize('targets, words', [
    (torch.zeros(6, dtype=torch.int64), r'float of shape \(B, 5\), one column an identity, got torch.int64 \(6,\)'),
    (torch.zeros(6, 4), r'got torch.float32 \(6, 4\)'),
    (torch.zeros(6, 5, dtype=torch.int64), r'got torch.int64 \(6, 5\)'),
])
def test_targets_of_another_kind(targets, words):
    with pytest.raises(ValueError, match=words):
        VerificationTask(build())(batch()[0], targets)


def test_networks_that_do_not_fit():
    images, targets = batch()
    wide = MarginSoftmax(nn.Flatten(), 5, 8)
    with pytest.raises(ValueError, match=r'embeddings \(B, 8\), got \(6, 12\); create it by .*num_classes=8'):
        VerificationTask(wide)(images, targets)
    with pytest.raises(TypeError, match='model must be a MarginSoftmax, got Linear'):
        VerificationTask(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='teacher must be a Teacher, got Linear'):
        VerificationTask(build(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match='embeddings of 12 numbers of the teacher and 8 of the student'):
        VerificationTask(build(), Teacher(nn.Flatten(), **STATISTICS))(images, targets)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning.losses', None)
    with pytest.raises(ImportError, match=r'pip install "timm-miil\[metric\]"'):
        build()
