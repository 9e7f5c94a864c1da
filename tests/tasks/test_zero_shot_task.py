"""The zero-shot task: random queries are absent labels, and the label set changes wherever the model is kept."""
import copy
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import distributed, nn

from timm_miil.heads import ZeroShotMLDecoder
from timm_miil.losses import AsymmetricLoss, asymmetric_loss
from timm_miil.tasks import ZeroShotTask

TEXT_DIM = 6


def build(labels=3, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ZeroShotMLDecoder(
            4, embed_dim=8, text_dim=TEXT_DIM, num_heads=2, feedforward_dim=16, drop_rate=0.0, **kwargs)
    head.set_queries(embeddings(labels))
    return head


def embeddings(labels, seed=1):
    return torch.randn(labels, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def batch(labels=3, size=5):
    generator = torch.Generator().manual_seed(2)
    targets = (torch.rand(size, labels, generator=generator) > 0.5).float()
    return torch.randn(size, 9, 4, generator=generator), targets


def test_a_batch_gives_loss_and_output():
    model = build()
    features, targets = batch()
    result = ZeroShotTask(model)(features, targets)
    assert set(result) == {'loss', 'output'} and torch.equal(result['output'], model(features))
    torch.testing.assert_close(result['loss'], asymmetric_loss(model(features), targets))


def test_random_queries_are_labels_that_are_absent():
    class Recorded(nn.Module):
        def forward(self, logits, targets):
            self.got = logits, targets
            return asymmetric_loss(logits, targets)

    task = ZeroShotTask(build(num_random_queries=4), Recorded()).train()
    features, targets = batch()
    result = task(features, targets)
    logits, padded = task.criterion.got
    assert logits.shape == padded.shape == (5, 7)
    assert torch.equal(padded[:, :3], targets) and not padded[:, 3:].any()
    assert torch.equal(result['output'], logits[:, :3])
    torch.testing.assert_close(result['loss'], asymmetric_loss(logits, padded))
    task.eval()
    assert task(features, targets)['output'].shape == task.criterion.got[0].shape == (5, 3)


def test_the_label_set_changes_for_training_and_validation():
    task = ZeroShotTask(build(3))
    features, _ = batch()
    seen = task(features, torch.zeros(5, 3))['output']
    task.set_queries(embeddings(7, seed=8))
    assert task(features, torch.zeros(5, 7))['output'].shape == (5, 7)
    task.set_queries(embeddings(3))
    assert torch.equal(task(features, torch.zeros(5, 3))['output'], seen)


def test_the_averaged_copy_has_the_same_label_set():
    task = ZeroShotTask(build(3))
    task.setup_ema(decay=0.5)
    task.set_queries(embeddings(7, seed=8))
    features, _ = batch()
    want = copy.deepcopy(task.trainable_module)(features)
    averaged = task.get_eval_model(ema=True)
    assert want.shape == (5, 7)
    torch.testing.assert_close(averaged(features), want)
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1.0)
    task.update_ema()
    assert averaged(features).shape == (5, 7) and not torch.allclose(averaged(features), want)


def test_the_label_set_changes_behind_the_compiler():
    features, _ = batch()
    task = ZeroShotTask(build(3))
    task.compile(backend='eager')
    task.setup_ema(decay=0.5)
    task.compile_ema(backend='eager')
    task.set_queries(embeddings(7, seed=8))
    want = ZeroShotTask(build(7))
    want.set_queries(embeddings(7, seed=8))
    want = want(features, torch.zeros(5, 7))['output']
    torch.testing.assert_close(task(features, torch.zeros(5, 7))['output'], want)
    torch.testing.assert_close(task.get_eval_model(ema=True)(features), want)


def test_a_registered_model_knows_the_number_of_its_labels():
    model = timm.create_model(
        'mldecoder_zero_shot', backbone='resnet10t', labels=['red 1', 'red 2'], embed_dim=16, num_heads=2,
        feedforward_dim=16)
    task = ZeroShotTask(model)
    assert task(torch.rand(2, 3, 64, 64), torch.ones(2, 2))['output'].shape == (2, 2)
    task.set_queries(torch.randn(5, 300))
    assert model.num_classes == 5
    assert task(torch.rand(2, 3, 64, 64), torch.ones(2, 5))['output'].shape == (2, 5)


def test_default_is_the_papers_loss():
    assert repr(ZeroShotTask(build()).criterion) == repr(AsymmetricLoss())


@pytest.mark.parametrize('targets', [
    torch.ones(5, 2), torch.ones(5, 4), torch.ones(5), torch.ones(5, 3, dtype=torch.int64)])
def test_targets_of_another_label_set_are_refused(targets):
    message = r'target must be float of shape \(B, 3\), one column a label that is set, got torch.*; for other labels'
    with pytest.raises(ValueError, match=message):
        ZeroShotTask(build(num_random_queries=1))(batch()[0], targets)


def test_a_model_with_fixed_classes_is_refused():
    with pytest.raises(TypeError, match=r'model must have set_queries\(embeddings\), got Linear; create it by'):
        ZeroShotTask(nn.Linear(4, 3))


def test_a_wrong_threshold_is_refused():
    with pytest.raises(ValueError, match='threshold must be between 0 and 1'):
        ZeroShotTask(build(), threshold=1.0)


def in_process(rank, store):
    """Two steps under DDP on this rank's half of the pictures, with another label set for the second."""
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    try:
        task = ZeroShotTask(build(3))
        task.setup_ema(decay=0.5)
        task.prepare_distributed()
        losses = []
        for labels in (3, 7):
            task.set_queries(embeddings(labels, seed=labels))
            features, targets = batch(labels, size=4)
            half = slice(2 * rank, 2 * rank + 2)
            loss = task(features[half], targets[half])['loss']
            task.trainable_module.zero_grad()
            loss.backward()
            losses.append(loss.item())
        gradients = [parameter.grad.sum().item() for parameter in task.trainable_module.parameters()]
        averaged = task.get_eval_model(ema=True)(features[:1])
        del task
        return {'losses': losses, 'gradients': gradients, 'averaged': averaged.tolist()}
    finally:
        distributed.destroy_process_group()


def test_two_processes_train_the_same_label_sets(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / 'store')], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = [json.loads(output) for output in outputs]

    task, losses = ZeroShotTask(build(3)), []
    for labels in (3, 7):
        task.set_queries(embeddings(labels, seed=labels))
        loss = task(*batch(labels, size=4))['loss']
        task.zero_grad()
        loss.backward()
        losses.append(loss.item())
    # The loss is a sum over pictures, and DDP gives the mean of the two halves.
    assert [sum(pair) for pair in zip(found[0]['losses'], found[1]['losses'])] == pytest.approx(losses, rel=1e-5)
    want = [parameter.grad.sum().item() / 2 for parameter in task.trainable_module.parameters()]
    assert found[0]['gradients'] == found[1]['gradients'] == pytest.approx(want, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(
        torch.tensor(found[0]['averaged']), task.trainable_module(batch(7, size=4)[0][:1]).detach())


if __name__ == '__main__':
    warnings.simplefilter('error')
    print(json.dumps(in_process(int(sys.argv[1]), sys.argv[2])))
