"""Training without labels: two views a picture, what is kept and told, resuming, and what contradicts it."""
import dataclasses

import pytest
import timm
import torch

from timm_miil._errors import RecipeError
from timm_miil.metrics import output_std
from timm_miil.train import Splits, evaluate, measure, read_splits, train
from timm_miil.train._loaders import Share
from timm_miil.train.build import build_train_loader
from timm_miil.train.linear_probe import embed_pictures

SIMSIAM = {
    'task': 'self_supervised', 'model.name': 'test_resnet', 'model.args': '{}', 'loss.name': 'simsiam',
    'loss.args': '{proj_dim = 16, pred_dim = 4}', 'augment.image_size': '32', 'epochs': '2', 'batch_size': '20'}


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.override(SIMSIAM)


@pytest.fixture(scope='module')
def splits(tiny_tree):
    found = read_splits(tiny_tree)
    return Splits(found.train.select(range(40)), found.val.select(range(20)), found.test.select(range(20)))


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def test_a_run_keeps_the_network_of_its_last_epoch(recipe, splits, tmp_path):
    result = train(recipe, splits, output=tmp_path / 'run')
    assert result.best_epoch == 2 and result.metric == 'output_std'
    assert result.model.num_classes == 0 and not any('predictor' in name for name in result.model.state_dict())
    for source, figures in ((splits.val, result.val_metrics), (splits.test, result.test_metrics)):
        features, _ = embed_pictures(result.model, source)
        assert figures == {'output_std': pytest.approx(output_std(features), rel=1e-4)}
        assert 0 < figures['output_std'] < 1
        assert evaluate(result.model, source, task='self_supervised') == pytest.approx(figures, rel=1e-4)
    assert all(-1 <= record.train_loss <= 1 for record in result.epochs)
    assert result.val_logits.shape == (20, result.model.head_hidden_size)


def test_labels_teach_nothing(recipe, splits):
    source = splits.train
    other = dataclasses.replace(splits, train=source.with_labels(source.label_names[::-1]),
                                val=splits.val.with_labels(source.label_names[::-1]),
                                test=splits.test.with_labels(source.label_names[::-1]))
    one, two = (train(recipe, each) for each in (splits, other))
    assert torch.equal(weights(one.model), weights(two.model)) and one.epochs == two.epochs


def test_a_batch_has_two_views_of_each_picture(recipe, splits):
    loader = build_train_loader(recipe, splits.train, timm.create_model('test_resnet'))
    assert len(loader) == 2     # an epoch has as many views as pictures
    seen = []
    for batch in loader.batches(0):
        rows = batch.indices.view(-1, 2)
        assert len(batch.images) == 20 and torch.equal(rows[:, 0], rows[:, 1])
        views = batch.images.unflatten(0, (-1, 2))
        assert not any(torch.equal(first, second) for first, second in views)
        seen += rows[:, 0].tolist()
    assert len(set(seen)) == 20


def test_parts_of_a_step_keep_views_together(recipe, splits):
    halves = recipe.override({'grad_accum_steps': '2'})
    model = timm.create_model('test_resnet')
    for share, size in ((Share(0, 1, 2), 10), (Share(1, 2, 1), 10)):
        for batch in build_train_loader(halves, splits.train, model, share=share).batches(0):
            assert len(batch.images) == size and torch.equal(batch.indices[0::2], batch.indices[1::2])
    with pytest.raises(ValueError, match=r"'simsiam' takes pairs: .* must be even, got 20 / 4 = 5"):
        build_train_loader(halves, splits.train, model, share=Share(0, 2, 2))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(recipe, splits, tmp_path):
    whole = train(recipe, splits, output=tmp_path / 'whole')
    train(recipe.override({'stop_epoch': '1'}), splits, output=tmp_path / 'parts')
    resumed = train(recipe, splits, output=tmp_path / 'parts', resume='auto')
    assert torch.equal(weights(whole.model), weights(resumed.model)) and whole.epochs == resumed.epochs


def test_turned_pictures_are_seen_once_each(recipe, splits):
    turns = recipe.override({'loss.name': 'rotation', 'loss.args': '{}'})
    loader = build_train_loader(turns, splits.train, timm.create_model('test_resnet'))
    assert sorted(row for batch in loader.batches(0) for row in batch.indices.tolist()) == list(range(40))
    result = train(turns, splits)
    assert result.best_epoch == 2 and result.model.num_classes == 0 and 0 < result.test_metrics['output_std'] < 1
    assert 0 < result.epochs[-1].train_loss < 3


def test_averaged_weights_are_kept_too(recipe, splits):
    result = train(recipe.override({'ema_decay': '0.9', 'epochs': '1'}), splits)
    assert result.model.num_classes == 0 and 0 < result.test_metrics['output_std'] < 1


def test_measuring_embeddings():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert measure(rows, torch.zeros(9, 2), 'self_supervised') == {'output_std': output_std(rows)}


@pytest.mark.parametrize(('changes', 'words'), [
    ({'loss.name': 'cross_entropy', 'loss.args': '{}'}, "loss must be 'rotation', or 'simsiam' with args pred_dim and"),
    ({'loss.args': '{width = 3}'}, "'simsiam' with {'width': 3}"),
    ({'partial': '{scheme = "random_per_sample", drop_prob = 0.5}'}, 'partial must be left out of task'),
    ({'teacher': '{name = "test_vit"}'}, 'teacher must be left out of task'),
    ({'unseen_labels': '["red 7"]'}, 'unseen_labels must be left out of task'),
    ({'augment.name': 'timm', 'augment.args': '{mixup = {mixup_alpha = 0.1}}'}, 'args.mixup must be left out of task'),
    ({'augment.name': 'timm', 'augment.args': '{aug_repeats = 3}'}, 'args.aug_repeats must be left out of task'),
])
def test_what_contradicts_it(recipe, changes, words):
    with pytest.raises(RecipeError, match=words):
        recipe.override(changes)


def test_other_tasks_have_other_losses(tiny_recipe, splits):
    with pytest.raises(ValueError, match="loss of logits and targets for task 'multi_label', got 'simsiam'"):
        train(tiny_recipe.override({'loss.name': 'simsiam', 'loss.args': '{}'}), splits)
