"""SimSiam: the loss from its equations, what gets a gradient, collapse, and the refusals."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_miil.tasks import SimSiam, SimSiamTask, kept_network


def build(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        return SimSiam(network, embed_dim=6, **{'proj_dim': 4, 'pred_dim': 3, **settings})


def views(count=6, seed=1):
    return torch.randn(2 * count, 5, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_that_of_the_equations():
    model = build().train()
    same, pictures = copy.deepcopy(model), views()
    result = SimSiamTask(model)(pictures)
    z = [same.projector(same.network(pictures[first::2])) for first in (0, 1)]
    p = [same.predictor(each) for each in z]

    def distance(prediction, target):
        prediction, target = (x / x.norm(dim=1, keepdim=True) for x in (prediction, target))
        return -(prediction * target).sum(1).mean()

    want = distance(p[0], z[1].detach()) / 2 + distance(p[1], z[0].detach()) / 2
    torch.testing.assert_close(result['loss'], want)
    torch.testing.assert_close(result['output'][0::2], z[0].detach())
    torch.testing.assert_close(result['output'][1::2], z[1].detach())
    result['loss'].backward()
    want.backward()
    for (name, one), other in zip(model.named_parameters(), same.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    # Norms of both have seen the first views, then the second ones.
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), same.buffers()))


def test_targets_are_constants():
    model = build().train()
    predictions, targets = model(views())
    assert not targets.requires_grad
    # Without the predictor's way there is none: not even for the projector's last layer.
    for parameter in model.predictor[-1].parameters():
        parameter.data.zero_()
    SimSiamTask(model)(views())['loss'].backward()
    assert not model.projector[6].weight.grad.any() and predictions.requires_grad


def test_labels_are_not_looked_at():
    task = SimSiamTask(build().train())
    losses = [task(views(), target)['loss'] for target in (None, torch.full((12, 3), torch.nan))]
    assert torch.equal(*losses)


def test_equal_views_and_a_perfect_predictor():
    model = build()
    model.predictor = nn.Identity()
    task = SimSiamTask(model.train())
    torch.testing.assert_close(task(views().repeat_interleave(2, 0))['loss'].item(), -1.0, rtol=0, atol=1e-6)
    assert -1 < task(views())['loss'].item() < 1


def test_training_brings_views_together():
    model = build().train()
    task, pictures = SimSiamTask(model), torch.randn(32, 5, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        noise = 0.3 * torch.randn(32, 2, 5, generator=generator)
        result = task((pictures.unsqueeze(1) + noise).flatten(0, 1))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append(result['loss'].item())
    assert losses[0] > -0.3 and losses[-1] < -0.7
    assert nn.functional.normalize(result['output'], dim=1).std(0).mean() > 0.3   # 0.5 is the most: no collapse


def test_a_network_of_timm():
    network = timm.create_model('test_resnet', num_classes=0)
    model = SimSiam(network, network.head_hidden_size)
    projector = [type(layer).__name__ for layer in model.projector]
    assert projector == ['Linear', 'BatchNorm1d', 'ReLU'] * 2 + ['Linear', 'BatchNorm1d']
    assert model.projector[6].out_features == 2048 and not model.projector[7].affine
    assert [layer.out_features for layer in model.predictor if isinstance(layer, nn.Linear)] == [512, 2048]
    task, pictures = SimSiamTask(model.train()), torch.rand(8, 3, 32, 32)
    task(pictures)['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert kept_network(task.trainable_module) is network
    assert model.eval()(pictures).shape == (8, network.num_features)
    assert set(task.get_checkpoint_state()['state_dict']) == set(network.state_dict())


def test_half_precision_around_it():
    with torch.autocast('cpu', torch.bfloat16):
        result = SimSiamTask(build().train())(views())
    assert result['loss'].dtype == torch.float32 and abs(result['loss'].item()) <= 1


def test_what_is_refused():
    with pytest.raises(TypeError, match='model must be a SimSiam, got Linear'):
        SimSiamTask(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='two views of each picture, one after the other, got 3'):
        build().train()(torch.rand(3, 5))
    with pytest.raises(ValueError, match=r'network must give embeddings \(B, 6\), got \(2, 7\)'):
        SimSiam(nn.Linear(5, 7), 6).train()(torch.rand(4, 5))
    with pytest.raises(ValueError, match='pred_dim must be at least 1'):
        build(pred_dim=0)
