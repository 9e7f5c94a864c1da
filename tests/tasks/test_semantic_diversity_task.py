"""The task of semantic diversity learning: fixtures through a network, label sets, averaging, and errors."""
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_miil.heads import SemanticEmbeddingHead
from timm_miil.losses import SemanticDiversityLoss, semantic_diversity_loss
from timm_miil.tasks import SemanticDiversityTask
from timm_miil.tasks.training_model import kept_network

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'sdl'
CASES = {
    name: case for name, case in json.loads((FIXTURES / 'manifest.json').read_text())['cases'].items()
    if case['config']['kind'] == 'loss'}


class Vectors(nn.Module):
    """Its input is the picture's vectors already."""

    def __init__(self, num_rows):
        super().__init__()
        self.head = SemanticEmbeddingHead(1, num_rows=num_rows, dtype=torch.float64)
        self.set_queries = self.head.set_queries

    num_classes = property(lambda self: self.head.num_classes)

    def get_classifier(self):
        return self.head

    def embed(self, x):
        return x + 0 * self.head.weight.sum()

    def forward(self, x):
        return self.head.score(x)


def build(**kwargs):
    torch.manual_seed(0)
    args = dict(backbone='test_resnet', text_dim=12, num_rows=3, labels=['red 1', 'blue 2', 'green 3'])
    return timm.create_model('miil_sdl', **args | kwargs)


def batch():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([[1., 0, 1], [0, 1, 0], [0, 0, 0], [1, -1, 0]])


@pytest.mark.parametrize('name', CASES)
def test_the_fixtures_of_the_original_are_reproduced(name):
    case = CASES[name]
    tensors, config = load_file(FIXTURES / case['file']), case['config']
    task = SemanticDiversityTask(
        Vectors(config['num_rows']),
        SemanticDiversityLoss(diversity_weight=config['weight'], reduction=config['reduction']))
    task.set_queries(tensors['wordvecs'][0].T)
    x = tensors['x'].clone().requires_grad_()
    result = task(x, tensors['targets'])
    torch.testing.assert_close(result['loss'], tensors['loss'], check_dtype=False, **case['tolerance'])
    result['loss'].backward()
    torch.testing.assert_close(x.grad, tensors['grad'], **case['tolerance'])


def test_a_batch_gives_the_loss_of_the_vectors_and_the_scores():
    model, (images, targets) = build().eval(), batch()
    words = model.head.text_embeddings
    task = SemanticDiversityTask(model).eval()
    want = semantic_diversity_loss(model.embed(images), targets, words, num_rows=3)
    result = task(images, targets)
    torch.testing.assert_close(result['loss'], want)
    torch.testing.assert_close(result['output'], model(images).detach())
    assert kept_network(task.trainable_module) is model and task.get_eval_model() is model


def test_a_step_trains_every_weight_and_leaves_the_words():
    model, (images, targets) = build(), batch()
    words = model.head.text_embeddings.clone()
    task = SemanticDiversityTask(model).train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    first = task(images, targets)['loss']
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert torch.equal(model.head.text_embeddings, words) and task(images, targets)['loss'] < first


def test_another_label_set_reaches_the_network_its_average_and_the_loss():
    model, (images, _) = build(), batch()
    task = SemanticDiversityTask(model)
    task.setup_ema(decay=0.5)
    words = torch.randn(5, 12)
    task.set_queries(words)
    targets = torch.eye(5)[[0, 1, 2, 4]]
    task.eval()
    want = semantic_diversity_loss(model.embed(images), targets, words, num_rows=3)
    torch.testing.assert_close(task(images, targets)['loss'], want)
    assert task.get_eval_model(ema=True)(images).shape == (4, 5)
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, 5\), .* got torch.float32 \(4, 3\)'):
        task(*batch())


def test_networks_without_vectors_are_refused():
    with pytest.raises(TypeError, match=r"model must have embed\(images\), got Linear; create it by timm.create_model"):
        SemanticDiversityTask(nn.Linear(2, 2))


def test_the_loss_wants_words_from_somewhere():
    loss = SemanticDiversityLoss()
    with pytest.raises(ValueError, match=r'word_vectors must be given, of shape \(K, D\), to the loss or with each'):
        loss(torch.zeros(1, 4), torch.ones(1, 2))
    words = torch.eye(2)
    own, given = SemanticDiversityLoss(words, 2), loss(torch.ones(1, 4), torch.ones(1, 2), words)
    assert torch.equal(own(torch.ones(1, 4), torch.ones(1, 2)), given) and 'word_vectors=None' in repr(loss)
    with pytest.raises(ValueError, match=r'embedding must have shape \(B, 4\), num_rows=2'):
        loss(torch.zeros(1, 5), torch.ones(1, 2), words)
