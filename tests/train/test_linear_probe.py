"""Linear probes of embeddings: against a fit written out, few pictures a class, several labels, and the refusals."""
import math

import pytest
import timm
import torch
from torch import nn

from timm_miil.metrics import multilabel_average_precision
from timm_miil.train import read_splits
from timm_miil.train.build import build_eval_loader
from timm_miil.train.linear_probe import embed_pictures, linear_probe, probe_metric


def blobs(count, seed, classes=3, spread=1.0):
    """Embeddings around a centre a class, and their labels as a table."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % classes
    centres = 2.0 * torch.eye(classes, 4, dtype=torch.float64)
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return centres[label] + spread * noise, nn.functional.one_hot(label, classes).to(torch.int8)


def softmax_regression(features, targets, penalty):
    """Newton's method would be shorter to run; gradient descent is shorter to believe."""
    weight = torch.zeros(features.shape[1], targets.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(features @ weight + bias, targets.argmax(1), reduction='sum')
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda rows: (rows @ weight + bias).detach()


@pytest.mark.parametrize('penalty', [1.0, 200.0])
def test_it_is_penalised_softmax_regression_on_scaled_channels(penalty):
    features, targets = blobs(40, 0)
    tested, truth = blobs(200, 1)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    scores = softmax_regression((features - mean) / deviation, targets, penalty)((tested - mean) / deviation)
    want = 100 * (scores.argmax(1) == truth.argmax(1)).double().mean().item()
    scaled = [rows * torch.tensor([1.0, 50.0, 0.02, 1.0]) + 3 for rows in (features, tested)]
    found = linear_probe(scaled[0], targets, scaled[1], truth, penalty=penalty)
    assert found == pytest.approx(want, abs=0.51) and 40 < found < 99      # one picture of 200 may be on the line
    assert linear_probe(tested, truth, tested, truth, penalty=penalty) > 60


def test_channels_that_say_nothing_do_not_count():
    features, targets = blobs(40, 0)
    tested, truth = blobs(200, 1)
    silent = torch.full((200, 1), 7.0)
    with_silent = [torch.cat([rows, silent[:len(rows)] + 1e-9 * rows[:, :1]], 1) for rows in (features, tested)]
    assert linear_probe(with_silent[0], targets, with_silent[1], truth) == linear_probe(
        features, targets, tested, truth)


def test_few_pictures_of_each_class():
    features, targets = blobs(90, 0, spread=1.5)
    tested, truth = blobs(300, 1, spread=1.5)
    first, again, other = (
        linear_probe(features, targets, tested, truth, shots=2, draws=4, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first < linear_probe(features, targets, tested, truth, shots=30) == linear_probe(
        features, targets, tested, truth)


def test_a_class_that_nothing_was_learnt_of_is_wrong():
    features, targets = blobs(60, 0, spread=0.01)
    tested, truth = blobs(60, 1, spread=0.01)
    rows = targets[:, 1] == 0
    assert linear_probe(features[rows], targets[rows], tested, truth) == pytest.approx(200 / 3)
    assert linear_probe(features, targets, tested, truth) == 100


def test_several_labels_and_what_is_not_known_of_them():
    features, _ = blobs(80, 0)
    targets = (features[:, :3] > 0.5).to(torch.int8)
    assert probe_metric(targets) == 'map'
    tested, _ = blobs(80, 1)
    truth = (tested[:, :3] > 0.5).to(torch.int8)
    full = linear_probe(features, targets, tested, truth)
    assert full > 95
    # Unknown labels teach nothing: it is as if their pictures were not there, for that label.
    partly = targets.clone()
    partly[40:, 1] = -1
    partly[:, 2] = -1
    found = linear_probe(features, partly, tested, truth)
    alone = [linear_probe(rows, labels.unsqueeze(1), tested, truth[:, [place]]) for rows, labels, place in (
        (features, targets[:, 0], 0), (features[:40], targets[:40, 1], 1))]
    silent = 100 * multilabel_average_precision(torch.zeros(80, 1), truth[:, [2]]).item()
    # Scaling is over all pictures, which moves a value a little.
    assert found == pytest.approx((sum(alone) + silent) / 3, abs=0.5)


@pytest.mark.parametrize(('targets', 'metric'), [
    (torch.eye(3), 'top1'), (torch.tensor([[1, 1], [0, 1]]), 'map'), (torch.tensor([[1, -1], [0, 1]]), 'map'),
    (torch.tensor([[1, 0], [0, 0]]), 'map')])
def test_what_is_measured(targets, metric):
    assert probe_metric(targets) == metric


def test_embeddings_are_what_the_classifier_reads(tiny_tree):
    model = timm.create_model('test_resnet', num_classes=5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = read_splits(tiny_tree).test.select(range(20))
    features, targets = embed_pictures(model, source, batch_size=7)
    assert features.shape == (20, model.num_features) and features.dtype == torch.float64
    assert torch.equal(targets.float(), source.targets) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    images = torch.cat([images for images, _ in build_eval_loader(source, model, batch_size=20)])
    with torch.no_grad():
        logits = model.eval()(images)
    torch.testing.assert_close(model.fc(features.float()), logits)
    model.reset_classifier(0)
    assert torch.equal(embed_pictures(model, source, batch_size=7)[0], features)


def test_networks_without_embeddings(tiny_tree):
    source = read_splits(tiny_tree).test
    with pytest.raises(TypeError, match='model must have forward_features and forward_head, got Linear'):
        embed_pictures(nn.Linear(2, 2), source)
    model = timm.create_model('test_resnet', global_pool='', num_classes=0)
    with pytest.raises(TypeError, match=r'must give embeddings \(B, D\) by forward_head'):
        embed_pictures(model, source)
    with pytest.raises(ValueError, match='source must have pictures, got none'):
        embed_pictures(timm.create_model('test_resnet'), source.select([]))


@pytest.mark.parametrize(('settings', 'words'), [
    ({'shots': 21}, 'got 21 for class 0 with 20'),
    ({'draws': 2}, 'draws must be 1 where all pictures are learnt from, got 2'),
    ({'penalty': 0.0}, 'penalty must be above 0, got 0.0'),
    ({'penalty': math.nan}, 'penalty must be above 0, got nan'),
    ({'shots': -1}, 'shots must be at least 0'),
])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        linear_probe(*blobs(60, 0), *blobs(9, 1), **settings)


def test_bad_pictures():
    features, targets = blobs(12, 0)
    both = (targets + targets.roll(1, 1)).clamp(max=1)
    with pytest.raises(ValueError, match='shots is for pictures of one label each'):
        linear_probe(features, both, features, both, shots=1)
    one = torch.zeros_like(targets)
    one[:, 1] = 1
    with pytest.raises(ValueError, match='two classes or more, got one'):
        linear_probe(features, one, features, targets)
    with pytest.raises(ValueError, match='show a label in some and lack it in others'):
        linear_probe(features, torch.ones_like(both), features, both)
    with pytest.raises(ValueError, match='first dimensions must be equal'):
        linear_probe(features, targets[1:], features, targets)
