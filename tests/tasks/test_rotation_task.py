"""Turned pictures: the loss written out, learning, and the refusals."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_miil.tasks import RotationHead, RotationTask, kept_network


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        return RotationHead(network, embed_dim=5).train()


def pictures(count=3, seed=1):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_that_of_four_turned_copies():
    model, images = build(), pictures()
    same = copy.deepcopy(model)
    result = RotationTask(model)(images, torch.full((3, 2), torch.nan))
    turned = [images, images.transpose(2, 3).flip(2), images.flip(2).flip(3), images.flip(2).transpose(2, 3)]
    logits = same.head(same.network(torch.cat(turned)))
    want = -torch.stack([row.log_softmax(0)[place // 3] for place, row in enumerate(logits)]).mean()
    torch.testing.assert_close(result['loss'], want)
    torch.testing.assert_close(result['output'], logits)
    result['loss'].backward()
    want.backward()
    for (name, one), other in zip(model.named_parameters(), same.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_it_learns_which_way_is_up():
    model, images = build(), pictures(8)
    images[:, :, :3] += 1.0  # a bright top
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        result = RotationTask(model)(images)
        result['loss'].backward()
        optimizer.step()
    assert (result['output'].argmax(1) == torch.arange(4).repeat_interleave(8)).float().mean() > 0.9


def test_what_is_kept_and_what_is_refused():
    network = timm.create_model('test_resnet', num_classes=0)
    task = RotationTask(RotationHead(network, network.head_hidden_size).train())
    task(torch.rand(2, 3, 32, 32))['loss'].backward()
    assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())
    assert kept_network(task.trainable_module) is network
    with pytest.raises(TypeError, match='model must be a RotationHead, got Linear'):
        RotationTask(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'x must be square pictures \(B, I, S, S\), to be turned, got \(2, 3, 8, 9\)'):
        build()(torch.rand(2, 3, 8, 9))
    with pytest.raises(ValueError, match='embed_dim must be at least 1'):
        RotationHead(network, 0)
