"""Classes times transforms: the transforms, the objectives, what the network that is kept has learnt."""
import math

import pytest
import timm
import torch
from torch import nn

from timm_miil.tasks import (
    NUM_TRANSFORMS, LabelAugmentation, LabelAugmentationTask, aggregate_logits, joint_cross_entropy, kept_network,
    transform_images)


def model_of(seed=0, classes=5, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(
            'test_resnet', num_classes=classes, pretrained_cfg_overlay={'input_size': (3, 32, 32)})
        return LabelAugmentation(network, **settings)


def batch(size=3, classes=5):
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(size, classes, generator=generator, dtype=torch.float64).softmax(1)
    return torch.randn(size, 3, 32, 32, generator=generator), targets.float()


def joint(num_ways=4, size=3, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_ways, size, classes, num_ways, generator=generator, dtype=torch.float64)


def log_softmax(values):
    total = math.log(math.fsum(map(math.exp, values)))
    return [value - total for value in values]


def loops(joint_logits, targets):
    """The cross-entropy of label y * M + j, picture by picture and way by way."""
    num_ways, size, num_classes, _ = joint_logits.shape
    total = 0.0
    for way in range(num_ways):
        for picture in range(size):
            scores = log_softmax(joint_logits[way, picture].reshape(-1).tolist())
            total -= math.fsum(
                targets[picture, y].item() * scores[y * num_ways + way] for y in range(num_classes))
    return total / (num_ways * size)


def test_rotations_are_quarters_counter_clockwise_and_the_first_is_none():
    images = torch.randn(2, 3, 6, 6)
    ways = transform_images(images, 'rotation')
    assert torch.equal(ways[0], images)
    for way in range(1, 4):
        for row in range(6):  # the top row of a picture turned once is its right column, from above
            assert torch.equal(ways[way][:, :, row], ways[way - 1][:, :, :, 5 - row])


def test_colours_are_in_each_order_once_and_the_first_is_theirs():
    images = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    ways = transform_images(images, 'colour_permutation')
    assert torch.equal(ways[0], images)
    orders = {tuple(way[0, :, 0, 0].tolist()) for way in ways}
    assert len(orders) == 6 and all(sorted(order) == [0, 1, 2] for order in orders)
    assert all(torch.equal(way, way[:1, :, :1, :1].expand_as(way)) for way in ways)


@pytest.mark.parametrize('num_ways', [1, 4, 6])
def test_the_loss_is_of_the_label_and_the_way(num_ways):
    logits, targets = joint(num_ways), batch()[1].double()
    assert joint_cross_entropy(logits, targets).item() == pytest.approx(loops(logits, targets), rel=1e-12)
    hard = torch.eye(5, dtype=torch.float64)[[4, 0, 2]]
    assert joint_cross_entropy(logits, hard).item() == pytest.approx(loops(logits, hard), rel=1e-12)


def test_with_one_way_it_is_the_cross_entropy():
    logits, targets = joint(1), batch()[1].double()
    want = nn.functional.cross_entropy(logits[0, :, :, 0], targets)
    torch.testing.assert_close(joint_cross_entropy(logits, targets), want)
    torch.testing.assert_close(aggregate_logits(logits), logits[0, :, :, 0])


def test_the_gradient():
    targets = batch()[1].double()
    assert torch.autograd.gradcheck(lambda logits: joint_cross_entropy(logits, targets), joint().requires_grad_())


def test_aggregation_is_the_mean_of_each_way_by_its_own_outputs_in_any_order():
    logits = joint()
    want = [[sum(logits[j, b, k, j].item() for j in range(4)) / 4 for k in range(5)] for b in range(3)]
    torch.testing.assert_close(aggregate_logits(logits), torch.tensor(want, dtype=torch.float64))
    order = [2, 0, 3, 1]
    torch.testing.assert_close(aggregate_logits(logits[order][..., order]), aggregate_logits(logits))


def test_half_precision_is_computed_in_float32():
    logits, targets = joint().bfloat16(), batch()[1]
    for got, want in ((joint_cross_entropy(logits, targets), joint_cross_entropy(logits.float(), targets)),
                      (aggregate_logits(logits), aggregate_logits(logits.float()))):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    assert joint_cross_entropy(torch.zeros(4, 0, 5, 4), torch.zeros(0, 5)) == 0


@pytest.mark.parametrize('transforms', NUM_TRANSFORMS)
def test_the_own_head_is_the_joint_one_of_the_picture_as_it_is(transforms):
    model, images = model_of(transforms=transforms).eval(), batch()[0]
    ways = NUM_TRANSFORMS[transforms]
    own, logits = model.forward_training(images)
    assert logits.shape == (ways, 3, 5, ways) and model.joint_head.out_features == 5 * (ways - 1)
    torch.testing.assert_close(own, model(images))
    for way, shown in enumerate(transform_images(images, transforms)):
        torch.testing.assert_close(logits[way, :, :, 0], model.network(shown))
    torch.testing.assert_close(model.forward_aggregated(images), aggregate_logits(logits))


def test_with_self_distillation_it_is_another_one():
    model, images = model_of(self_distillation=True).eval(), batch()[0]
    own, logits = model.forward_training(images)
    assert logits.shape == (4, 3, 5, 4) and model.joint_head.out_features == 20
    torch.testing.assert_close(own, model(images))
    embedding = model.network.forward_head(
        model.network.forward_features(images.rot90(1, (2, 3))), pre_logits=True)
    torch.testing.assert_close(logits[1], model.joint_head(embedding).view(3, 5, 4))


@pytest.mark.parametrize('is_distilled', [False, True])
def test_the_objective(is_distilled):
    model, (images, targets) = model_of(self_distillation=is_distilled), batch()
    task = LabelAugmentationTask(model, joint_loss_weight=4.0, temperature=3.0).train()
    result = task(images, targets)
    own, logits = (tensor.detach().double() for tensor in model.train()(images))
    want = 4 * loops(logits, targets.double())
    if is_distilled:
        aggregated = logits.diagonal(dim1=0, dim2=3).mean(2)
        want += -(targets.double() * own.log_softmax(1)).sum().item() / 3
        p, q = (aggregated / 3).softmax(1), (own / 3).softmax(1)
        want += 9 * (p * (p / q).log()).sum().item() / 3
    assert result['loss'].item() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(result['output'].double(), own, rtol=1e-4, atol=1e-5)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_aggregated_answer_learns_nothing_from_the_own_head():
    def gradient(temperature):
        model, (images, targets) = model_of(self_distillation=True).eval(), batch()
        model.training = True
        LabelAugmentationTask(model, temperature=temperature)(images, targets)['loss'].backward()
        return model.joint_head.weight.grad, model.network.get_classifier().weight.grad

    (joint_one, own_one), (joint_other, own_other) = gradient(1.0), gradient(4.0)
    torch.testing.assert_close(joint_one, joint_other)
    assert (own_one - own_other).abs().max() > 1e-3


def test_in_evaluation_mode_there_is_the_network_alone():
    model, (images, targets) = model_of(), batch()
    task = LabelAugmentationTask(model).eval()
    result = task(images, targets)
    assert torch.equal(result['output'], model.network(images))
    torch.testing.assert_close(result['loss'], nn.functional.cross_entropy(result['output'], targets))
    assert kept_network(task.get_eval_model()) is model.network
    state = task.get_checkpoint_state()
    assert not any('joint_head' in name for name in state['state_dict'])
    assert set(state['task_state']['parts']) == {'joint_head.weight', 'joint_head.bias'}


def test_it_learns_the_ways():
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, :4], images[1, :, :, 4:8] = 1.0, 1.0
    targets, model = torch.eye(2), model_of(classes=2).train()
    task = LabelAugmentationTask(model)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(task(images, targets)['loss'])
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1.5 and losses[-1] < 0.2  # log 8 knows nothing
    logits = model(images)[1]
    assert torch.equal(logits.flatten(2).argmax(2), torch.arange(2) * 4 + torch.arange(4)[:, None])


@pytest.mark.parametrize('call, error, message', [
    (lambda: transform_images(torch.zeros(1, 3, 4, 5), 'rotation'), ValueError, r'be square to be rotated, got \(1, 3'),
    (lambda: transform_images(torch.zeros(1, 1, 4, 5), 'colour_permutation'), ValueError, r'have 3 channels'),
    (lambda: transform_images(torch.zeros(3, 4, 4), 'rotation'), ValueError, r'images must have 4 dimensions'),
    (lambda: transform_images(torch.zeros(1, 3, 4, 4), 'flip'), ValueError, r"transforms must be one of 'rotation', "),
    (lambda: joint_cross_entropy(joint(), torch.eye(5)), ValueError, r'targets must be \(B, K\) .* got \(5, 5\)'),
    (lambda: joint_cross_entropy(joint(), torch.zeros(3, 5, dtype=torch.int64)), TypeError, r'targets must be fl'),
    (lambda: aggregate_logits(torch.zeros(4, 2, 5, 3)), ValueError, r'must be \(M, B, K, M\), got \(4, 2, 5, 3\)'),
    (lambda: aggregate_logits(torch.zeros(4, 2, 5)), ValueError, r'joint_logits must have 4 dimensions'),
    (lambda: LabelAugmentation(nn.Linear(2, 2)), TypeError, r'must be a timm image model with forward_features'),
    (lambda: model_of(transforms='flip'), ValueError, r'transforms must be one of'),
    (lambda: LabelAugmentationTask(nn.Linear(2, 2)), TypeError, r'model must be a LabelAugmentation, got Linear'),
    (lambda: LabelAugmentationTask(model_of(), joint_loss_weight=0.0), ValueError, r'joint_loss_weight must be in \(0'),
    (lambda: LabelAugmentationTask(model_of(self_distillation=True), temperature=0.0), ValueError, r'temperature mus'),
    (lambda: LabelAugmentationTask(model_of())(batch()[0], torch.tensor([0, 1, 2])), ValueError, r'target must be'),
])
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
