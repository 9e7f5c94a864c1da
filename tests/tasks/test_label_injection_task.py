"""What is frozen while labels are injected stays as it is to the bit, and all else is ordinary training."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_miil.tasks import LabelInjectionTask, SingleLabelTask


def build(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model('test_resnet', num_classes=3, **kwargs)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(6, 3, 32, 32, generator=generator), torch.eye(3).repeat(2, 1)


def step(task, count=1):
    task.train()
    trained = [parameter for parameter in task.trainable_module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for number in range(count):
        optimizer.zero_grad()
        task(*batch(number))['loss'].backward()
        optimizer.step()


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_frozen_backbone_stays_to_the_bit():
    model = build(drop_rate=0.5)
    before = copy.deepcopy(model.state_dict())
    task = LabelInjectionTask(model, frozen='backbone')
    step(task, 3)
    assert changed(model, before) == {'fc.weight', 'fc.bias'}
    # It speaks as in evaluation: without dropout, with the statistics it has.
    images, targets = batch()
    with torch.no_grad():
        assert torch.equal(task.train()(images, targets)['output'], model.eval()(images))


def test_frozen_statistics():
    model = build()
    before = copy.deepcopy(model.state_dict())
    task = LabelInjectionTask(model, frozen='statistics')
    step(task)
    found = changed(model, before)
    statistics = {name for name, _ in model.named_buffers()}
    assert statistics and not found & statistics and 'conv1.0.weight' in found and 'fc.weight' in found
    assert model.training and {module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {
        False}


def test_nothing_frozen_is_ordinary_training():
    models = build(), build()
    for task in (LabelInjectionTask(models[0], frozen='nothing'), SingleLabelTask(models[1])):
        step(task, 2)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_evaluation_and_averages():
    task = LabelInjectionTask(build(), frozen='backbone')
    task.setup_ema(decay=0.5)
    before = copy.deepcopy(task.trainable_module_ema.module.state_dict())
    step(task)
    task.update_ema(step=1)
    assert changed(task.trainable_module_ema.module, before) == {'fc.weight', 'fc.bias'}
    assert not any(module.training for module in task.eval().modules())


def test_what_is_refused():
    with pytest.raises(ValueError, match="frozen must be one of 'backbone', 'statistics', 'nothing', got 'head'"):
        LabelInjectionTask(build(), frozen='head')
    with pytest.raises(TypeError, match='one classifier with parameters to train alone, got ResNet with Identity'):
        LabelInjectionTask(timm.create_model('test_resnet', num_classes=0), frozen='backbone')
    with pytest.raises(TypeError, match='got Linear with NoneType'):
        LabelInjectionTask(nn.Linear(2, 2), frozen='backbone')
