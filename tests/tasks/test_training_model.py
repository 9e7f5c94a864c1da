"""A network with parts that are trained beside it: what is saved, decayed and measured is the network's."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_miil.tasks import TrainingModel, TrainingModelTask, kept_network


class Pair(TrainingModel):
    """A second head beside the network's own."""

    def __init__(self, network):
        super().__init__(network)
        self.second = nn.Linear(3, 2)

    def forward_training(self, x):
        return self.network(x), self.second(x.mean((2, 3)))


class PairTask(TrainingModelTask):
    def forward(self, input, target):
        own, second = self.trainable_module(input)
        return {'loss': own.mean() + second.mean(), 'output': own}


@pytest.fixture
def model():
    return Pair(timm.create_model('test_vit', num_classes=2))


@pytest.fixture
def images():
    return torch.randn(2, 3, 160, 160)


def test_training_gives_what_the_loss_needs_and_evaluation_the_networks_answer(model, images):
    own, second = model(images)
    assert own.shape == second.shape == (2, 2)
    model.eval()
    assert torch.equal(model(images), model.network(images))
    with pytest.raises(NotImplementedError, match='TrainingModel must define forward_training'):
        TrainingModel(nn.Identity())(images)


def test_the_kept_network_is_the_bare_one(model):
    network = model.network
    assert kept_network(model) is kept_network(nn.DataParallel(model)) is kept_network(network) is network
    assert kept_network(torch.compile(model)) is kept_network(Pair(torch.compile(network))) is network
    task = PairTask(model)
    task.setup_ema()
    assert task.get_eval_model() is network
    averaged = task.get_eval_model(ema=True)
    assert type(averaged) is type(network) and averaged is not network


def test_a_checkpoint_of_timm_holds_the_network_and_the_parts_apart(model):
    task, other = PairTask(model), PairTask(Pair(timm.create_model('test_vit', num_classes=2)))
    state = task.get_checkpoint_state()
    assert state['state_dict'].keys() == model.network.state_dict().keys()
    assert state['task_state']['parts'].keys() == {'second.weight', 'second.bias'}
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert all(map(torch.equal, other.state_dict().values(), task.state_dict().values()))
    with pytest.raises(RuntimeError, match='second.bias'):
        other.load_checkpoint_state(state['state_dict'], {'parts': {'second.weight': torch.ones(2, 3)}})
    plain = TrainingModelTask(model.network)
    assert 'task_state' not in plain.get_checkpoint_state()
    plain.load_task_state(None)


def test_the_optimizer_treats_the_network_as_without_parts(model):
    def settings(module, prefix=''):
        optimizer = create_optimizer_v2(module, opt='sgd', lr=1.0, weight_decay=0.1, layer_decay=0.5)
        names = {id(tensor): name for name, tensor in module.named_parameters()}
        return {
            names[id(tensor)].removeprefix(prefix): (group['weight_decay'], group['lr_scale'])
            for group in optimizer.param_groups for tensor in group['params']}

    alone, together = settings(model.network), settings(model, 'network.')
    assert together.pop('second.weight') == (0.1, 1.0) and together.pop('second.bias') == (0.0, 1.0)
    assert together == alone and len({scale for _, scale in alone.values()}) > 2


def test_layer_decay_needs_layers():
    with pytest.raises(TypeError, match='layer decay needs a network with group_matcher, got Identity'):
        TrainingModel(nn.Identity()).group_matcher()
