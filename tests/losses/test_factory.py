"""Losses by name, and in timm's own tasks."""
import pytest
import timm
import torch
from cases import CASES
from timm.loss import create_classification_loss
from timm.task import ClassificationTask, MultiLabelClassificationTask

from timm_miil import losses
from timm_miil.losses import create_loss, list_losses
from timm_miil.losses.factory import _CLASS_OF_NAME


def test_names_are_those_of_all_losses():
    assert list_losses() == sorted(_CLASS_OF_NAME)
    assert sorted(_CLASS_OF_NAME.values()) == sorted(CASES)
    assert list_losses('*distillation')[:2] == ['contrastive_distillation', 'distillation']
    assert list_losses('nothing') == []


@pytest.mark.parametrize('name', sorted(_CLASS_OF_NAME))
def test_a_name_is_its_class_without_the_word_loss(name):
    assert _CLASS_OF_NAME[name].replace('Loss', '').lower() == name.replace('_', '')


@pytest.mark.parametrize('name', ['asymmetric', 'asl', 'ASL', 'AsymmetricLoss', 'asymmetric_loss', 'asymmetric-loss'])
def test_settings_reach_the_loss_whatever_the_spelling(name):
    criterion = create_loss(name, gamma_neg=2, reduction='mean')
    assert type(criterion) is losses.AsymmetricLoss
    assert (criterion.gamma_neg, criterion.reduction) == (2, 'mean')


@pytest.mark.parametrize(('short', 'settings_', 'want'), [
    ('csl', {}, losses.ClassAwareSelectiveLoss),
    ('sdl', {'word_vectors': torch.rand(5, 4), 'num_rows': 2}, losses.SemanticDiversityLoss)])
def test_short_names(short, settings_, want):
    assert type(create_loss(short, **settings_)) is want


def test_unknown_names_and_settings():
    with pytest.raises(ValueError, match="unknown loss 'asymetric'; did you mean 'asymmetric'"):
        create_loss('asymetric')
    with pytest.raises(TypeError, match='^name must be a string, got int 3[.]$'):
        create_loss(3)
    with pytest.raises(TypeError, match="^AsymmetricLoss has no setting 'gama_neg'; did you mean 'gamma_neg'"):
        create_loss('asymmetric', gama_neg=2)
    with pytest.raises(ValueError, match=r'clip must be in \[0, 1\), got 2'):
        create_loss('asymmetric', clip=2)


def test_timm_multi_label_task_takes_them():
    model = timm.create_model('test_vit', num_classes=5)
    images, targets = torch.rand(2, 3, 160, 160), torch.tensor([[1.0, 0, 0, 1, 0], [0.0, 1, 0, 0, 0]])
    for name, settings_ in (('asymmetric', {}), ('class_aware_selective', {'mode': 'ignore'}), ('pu_multilabel', {})):
        criterion = create_loss(name, **settings_)
        out = MultiLabelClassificationTask(model, criterion)(images, targets)
        torch.testing.assert_close(out['loss'], criterion(out['output'], targets))
        out['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_timm_single_label_task_takes_them():
    model = timm.create_model('test_vit', num_classes=5)
    criterion = create_loss('asymmetric_single_label')
    out = ClassificationTask(model, criterion)(torch.rand(2, 3, 160, 160), torch.tensor([1, 4]))
    torch.testing.assert_close(out['loss'], criterion(out['output'], torch.tensor([1, 4])))


@pytest.mark.parametrize('reduction', ['sum', 'mean', 'batchmean'])
def test_it_is_the_loss_of_timm_where_the_settings_agree(reduction):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator)
    targets = (torch.rand(4, 6, generator=generator) < 0.3).float()
    timms = create_classification_loss('asl', multi_label=True, asl_reduction=reduction, asl_gamma_pos=1.0)
    ours = create_loss('asl', gamma_pos=1.0, detach_focal=False, reduction=reduction)
    torch.testing.assert_close(ours(logits, targets), timms(logits, targets))
