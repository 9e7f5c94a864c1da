"""COMIC: its loss written out, the correction of labels, who learns from whom, and what is kept."""
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import distributed, nn

from timm_miil.losses import AsymmetricLoss, MultiFocalModifierLoss, asymmetric_loss
from timm_miil.tasks import ComicModel, ComicTask, kept_network

COUNTS = torch.tensor([60, 9, 2])
LINEAR = {'model_name': 'test_resnet'}
DECODER = {
    'model_name': 'mldecoder', 'backbone': 'test_resnet', 'embed_dim': 8, 'num_heads': 2, 'feedforward_dim': 16,
    'decoder_drop_rate': 0.0}


def build(network=LINEAR, warmup_steps=0, balance=True, correct_threshold=0.7, **kwargs):
    """A task in float64 whose classifiers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ComicModel(
            timm.create_model(**network, num_classes=3), warmup_steps=warmup_steps, balance=balance,
            correct_threshold=correct_threshold).double()
        for classifier in (model.head, model.tail)[:2 * balance]:
            for parameter in classifier.parameters():
                nn.init.normal_(parameter, std=0.3)
    kwargs.setdefault('criterion', MultiFocalModifierLoss(COUNTS, ignore_unknown=True))
    return ComicTask(model, **kwargs)


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(-1, 2, (size, 3), generator=generator).double()
    return torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64), targets


def classifiers(task):
    """What each classifier says, by parts of the network."""
    model = task.trainable_module
    features = model.network.forward_features(batch()[0])
    if hasattr(model.network, 'head_input'):
        read = model.network.head_input(features)
    else:
        read = model.network.forward_head(features, pre_logits=True)
    return [classifier(read) for classifier in (model.network.get_classifier(), model.head, model.tail)]


def modified(logits, targets, exponent, gamma_neg=3.0, clip=0.05):
    """The multi-focal modifier loss, summed over known labels, from its definition."""
    weight = (1 + (COUNTS.max() / COUNTS).double().log()) ** exponent
    prob = logits.sigmoid()
    shifted = (prob - clip).clamp(min=0)
    loss = torch.where(
        targets == 1, -prob.log(), -(shifted.detach() ** (gamma_neg + weight)) * (1 - shifted).log()) * weight
    return loss[targets >= 0].sum()


def divergence(teacher, student):
    """KL of the distributions (p, 1 - p) of each label, summed."""
    p, q = teacher.detach().sigmoid(), student.sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


@pytest.mark.parametrize('network', [LINEAR, DECODER], ids=['linear', 'decoder'])
def test_the_loss_is_the_equation(network):
    task = build(
        network, correct_threshold=0.3, head_exponent=0.25, tail_exponent=0.75, correct_loss_weight=0.5,
        distill_loss_weight=2.0)
    images, targets = batch()
    balanced, head, tail = classifiers(task)
    assert not torch.allclose(head, balanced) and not torch.allclose(tail, head)
    got = task(images, targets)
    torch.testing.assert_close(got['output'], balanced)
    given, prob = targets.clamp(min=0), balanced.sigmoid()
    corrected = torch.where((targets == -1) & (prob > 0.3) & (prob > prob.mean(0)), 1.0, given)
    assert not torch.equal(corrected, given)
    of_head, of_tail = (modified(logits, given, 1 / 3) ** 2 for logits in (head, tail))
    taught = (of_head * divergence(head, balanced) + of_tail * divergence(tail, balanced)) / (of_head + of_tail)
    want = 2 * taught
    for logits, exponent in ((balanced, 1 / 3), (head, 0.25), (tail, 0.75)):
        want = want + modified(logits, given, exponent) + 0.5 * modified(logits, corrected, exponent)
    torch.testing.assert_close(got['loss'], want.detach(), check_dtype=False)


def test_the_balanced_classifier_learns_from_the_others_and_they_from_labels_alone():
    task = build(warmup_steps=9, unknown_is_absent=False)
    images, targets = batch()
    targets[:, 1:] = -1  # they cost nothing
    model = task.trainable_module
    _, head, tail = classifiers(task)
    want = [torch.autograd.grad(1.2 * modified(logits, targets, exponent), part.weight, retain_graph=True)[0]
            for logits, part, exponent in ((head, model.head, 0.0), (tail, model.tail, 1.0))]
    task(images, targets)['loss'].backward()
    for part, gradient in zip((model.head, model.tail), want):
        torch.testing.assert_close(part.weight.grad, gradient, check_dtype=False)
        assert gradient[0].any() and not gradient[1:].any()
    assert (model.network.get_classifier().weight.grad[1:] != 0).any(1).all()


@pytest.mark.parametrize(('unknown_is_absent', 'filled'), [(True, 0.0), (False, -1.0)])
def test_unknown_labels_are_corrected_after_the_warm_up(unknown_is_absent, filled):
    task = build(warmup_steps=2, balance=False, unknown_is_absent=unknown_is_absent, correct_loss_weight=0.5)
    images, _ = batch()
    targets = torch.tensor([[-1.0, 0, -1]] * 8, dtype=torch.float64)
    with torch.no_grad():
        task.trainable_module.network.get_classifier().bias.copy_(torch.tensor([4.0, 4.0, -9.0]))
    plain = torch.where(targets < 0, filled, targets)
    before = targets.clone()
    for step in range(4):
        got = task(images, targets)
        prob = got['output'].sigmoid()
        corrected = plain.clone()
        if step >= 2:
            found = prob[:, 0] > prob[:, 0].mean()
            assert found.any() and not found.all()
            corrected[found, 0] = 1.0
        want = modified(got['output'], plain, 1 / 3) + 0.5 * modified(got['output'], corrected, 1 / 3)
        torch.testing.assert_close(got['loss'], want, check_dtype=False)
    assert torch.equal(targets, before)
    assert task.trainable_module.state_dict()['corrector.num_steps'] == 4


def test_evaluation_corrects_nothing_and_asks_the_network_alone():
    task = build().eval()
    images, targets = batch()
    got = task(images, targets)
    assert torch.equal(got['output'], task.trainable_module.network(images))
    assert task.trainable_module.corrector.num_steps == 0
    torch.testing.assert_close(
        got['loss'], modified(got['output'], targets.clamp(min=0), 1 / 3), check_dtype=False)


def test_for_equal_counts_without_balance_it_is_the_asymmetric_loss():
    task = build(balance=False, correct_loss_weight=0.0, criterion=MultiFocalModifierLoss([7, 7, 7]))
    images, targets = batch()
    targets = targets.clamp(min=0)
    got = task(images, targets)
    torch.testing.assert_close(got['loss'], asymmetric_loss(got['output'], targets))
    assert [name for name, _ in task.trainable_module.named_parameters() if not name.startswith('network.')] == []


@pytest.mark.parametrize('network', [LINEAR, DECODER], ids=['linear', 'decoder'])
def test_the_other_classifiers_start_as_copies_and_are_left_behind(network):
    plain = timm.create_model(**network, num_classes=3)
    model = ComicModel(plain, warmup_steps=1)
    own = plain.get_classifier().state_dict()
    for other in (model.head, model.tail):
        assert all(torch.equal(tensor, own[name]) for name, tensor in other.state_dict().items())
        assert not {id(p) for p in other.parameters()} & {id(p) for p in plain.parameters()}
    task = ComicTask(model, MultiFocalModifierLoss(COUNTS))
    task.setup_ema(decay=0.5)
    assert kept_network(task.trainable_module) is plain
    assert list(task.get_checkpoint_state()['state_dict']) == list(plain.state_dict())
    assert list(task.get_checkpoint_state(ema=True)['state_dict_ema']) == list(plain.state_dict())


def test_refusals():
    network = timm.create_model('test_resnet', num_classes=3)
    with pytest.raises(TypeError, match=r'model must be a ComicModel, got ResNet; make one by ComicModel\(network'):
        ComicTask(network, MultiFocalModifierLoss(COUNTS))
    model = ComicModel(network, warmup_steps=0)
    with pytest.raises(TypeError, match='criterion must be a MultiFocalModifierLoss, got AsymmetricLoss; make one'):
        ComicTask(model, AsymmetricLoss())
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', 'batchmean', got 'none'"):
        ComicTask(model, MultiFocalModifierLoss(COUNTS, reduction='none'))
    with pytest.raises(ValueError, match='tail_exponent must be .*, got -1'):
        ComicTask(model, MultiFocalModifierLoss(COUNTS), tail_exponent=-1.0)
    with pytest.raises(ValueError, match=r'target must be float of shape \(B, C\), got torch.int64 \(4,\)'):
        build()(batch()[0], torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match='threshold must be in'):
        ComicModel(network, warmup_steps=0, correct_threshold=1.5)
    with pytest.raises(ValueError, match='warmup_steps must be .*, got -1'):
        ComicModel(network, warmup_steps=-1)
    with pytest.raises(TypeError, match='the classifier of .* must be one nn.Linear on the embedding, got Conv2d'):
        ComicModel(Convolutional(), warmup_steps=0)


class Convolutional(nn.Module):
    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        return x

    def get_classifier(self):
        return nn.Conv2d(3, 3, 1)


def in_process(rank, store):
    """A step under DDP on this rank's half of the pictures."""
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    try:
        task = build(warmup_steps=9)
        for module in task.modules():  # batch norms see one process's pictures
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
        task.prepare_distributed()
        images, targets = batch()
        task(images[2 * rank:2 * rank + 2], targets[2 * rank:2 * rank + 2])['loss'].backward()
        model = task.trainable_module.module
        return {name: parameter.grad.sum().item() for name, parameter in model.named_parameters()} | {
            'steps': int(model.corrector.num_steps)}
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_gradients_of_all_classifiers(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / 'store')], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert first == second and first.pop('steps') == 1
    assert {name.partition('.')[0] for name, value in first.items() if value} == {'network', 'head', 'tail'}


if __name__ == '__main__':
    warnings.simplefilter('error')
    print(json.dumps(in_process(int(sys.argv[1]), sys.argv[2])))
