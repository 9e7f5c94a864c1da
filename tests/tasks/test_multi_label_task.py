"""The multi-label task: timm's shape, our loss."""
import pytest
import torch
from torch import nn

from timm_miil.losses import AsymmetricLoss, asymmetric_loss
from timm_miil.tasks import MultiLabelTask


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, generator=generator), (torch.rand(5, 3, generator=generator) > 0.5).float()


def test_a_batch_gives_loss_and_output():
    model = nn.Linear(4, 3)
    images, targets = batch()
    result = MultiLabelTask(model)(images, targets)
    assert set(result) == {'loss', 'output'}
    assert torch.equal(result['output'], model(images))
    torch.testing.assert_close(result['loss'], asymmetric_loss(model(images), targets))


def test_another_criterion_is_used():
    images, targets = batch()
    task = MultiLabelTask(nn.Linear(4, 3), nn.BCEWithLogitsLoss())
    result = task(images, targets)
    torch.testing.assert_close(
        result['loss'], nn.functional.binary_cross_entropy_with_logits(result['output'], targets))


def test_default_is_the_papers_loss():
    assert repr(MultiLabelTask(nn.Identity()).criterion) == repr(AsymmetricLoss())


def test_it_is_quiet(caplog):
    with caplog.at_level('INFO'):
        MultiLabelTask(nn.Linear(4, 3))
    assert caplog.records == []


def test_class_indices_are_refused():
    images, _ = batch()
    with pytest.raises(ValueError, match='dense floating-point targets'):
        MultiLabelTask(nn.Linear(4, 3))(images, torch.tensor([0, 1, 2, 0, 1]))


def test_the_evaluator_uses_the_threshold():
    evaluator = MultiLabelTask(nn.Identity(), threshold=0.9).create_evaluator()
    evaluator.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]))  # p = 0.73 and 0.95
    assert evaluator.compute()['micro_f1'] == pytest.approx(100 * 2 / 3)
    with pytest.raises(ValueError, match='threshold must be between 0 and 1'):
        MultiLabelTask(nn.Identity(), threshold=1.0)
