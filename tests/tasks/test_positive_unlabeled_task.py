"""PU-MLC: the loss with its mixed pictures written out, and that unlabelled is unlabelled however it is written."""
import pytest
import timm
import torch
from torch import nn
from torch.distributions import Beta

from timm_miil.losses import AsymmetricLoss, PUMultiLabelLoss, pu_multilabel_loss
from timm_miil.tasks import PositiveUnlabeledTask


def build(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    return PositiveUnlabeledTask(model, **kwargs)


def batch(size=6):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(-1, 2, (size, 3), generator=generator).double()
    return torch.randn(size, 3, 2, 2, generator=generator, dtype=torch.float64), targets


def run(task, images, targets, seed=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return task(images, targets)


def draws(half, alpha, seed=5):
    """The share and the order that a task draws from this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Beta(alpha, alpha).sample().item(), torch.randperm(half)


@pytest.mark.parametrize('size', [6, 7])
@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_the_loss_is_the_equation(size, reduction):
    task = build(criterion=PUMultiLabelLoss(reduction=reduction), consistency_weight=2.0, mixup_alpha=0.7)
    images, targets = batch(size)
    lam, order = draws(3, 0.7)
    assert 0.01 < lam < 0.99
    got = run(task, images, targets)
    model = task.trainable_module
    output = model(images)
    assert torch.equal(got['output'], output)
    want = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        first, second = int(order[row]), size - 3 + row
        mixed = model((lam * images[first] + (1 - lam) * images[second])[None])[0]
        found = [torch.where(targets[place] == 1, 1.0, output[place].sigmoid()) for place in (first, second)]
        want = want + ((lam * found[0] + (1 - lam) * found[1]).log() - mixed.sigmoid().log()).square().sum()
    want = 2.0 * want / (3 if reduction == 'sum' else 9) + pu_multilabel_loss(output, targets, reduction=reduction)
    torch.testing.assert_close(got['loss'], want)
    gradients = [torch.autograd.grad(loss, model[1].weight)[0] for loss in (got['loss'], want)]
    torch.testing.assert_close(*gradients)


def test_zero_and_unknown_are_the_same():
    images, targets = batch()
    task, swapped = build(), torch.where(targets == 1, targets, -1 - targets)
    assert not torch.equal(swapped, targets)
    assert torch.equal(run(task, images, targets)['loss'], run(task, images, swapped)['loss'])


@pytest.mark.parametrize('change', ['weight', 'evaluation', 'one picture'])
def test_nothing_is_mixed(change):
    task = build(consistency_weight=0.0 if change == 'weight' else 1.0)
    task.train(change != 'evaluation')
    images, targets = batch(1 if change == 'one picture' else 4)
    state = torch.get_rng_state()
    got = task(images, targets)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got['loss'], pu_multilabel_loss(task.trainable_module(images), targets))


def test_the_network_runs_once_a_batch():
    model = timm.create_model('test_resnet', num_classes=3)
    got = PositiveUnlabeledTask(model)(torch.randn(4, 3, 32, 32), torch.eye(4)[:, :3])
    got['loss'].backward()
    assert model.bn1.num_batches_tracked == 1 and got['output'].shape == (4, 3)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_refusals():
    with pytest.raises(TypeError, match='criterion must be a PUMultiLabelLoss, got AsymmetricLoss; train with another'):
        build(criterion=AsymmetricLoss())
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        build(criterion=PUMultiLabelLoss(reduction='none'))
    with pytest.raises(ValueError, match='consistency_weight must be .*, got -1'):
        build(consistency_weight=-1.0)
    with pytest.raises(ValueError, match='mixup_alpha must be .*, got 0'):
        build(mixup_alpha=0.0)
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, C\), got torch.int64 \(6, 3\)'):
        build()(batch()[0], batch()[1].long())
