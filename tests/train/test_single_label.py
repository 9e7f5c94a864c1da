"""Training where each picture has one label: its losses, Mixup, and accuracy as what is measured."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import timm_miil.train._run as run_module
from timm_miil._errors import RecipeError
from timm_miil.data import SceneConfig, make_scenes, seeded
from timm_miil.train import Splits, evaluate, measure, read_splits, train
from timm_miil.train.build import build_loss, build_mixup, build_model, build_task, build_train_loader
from timm_miil.train.checkpoint import list_checkpoints
from timm_miil.train.recipe import LossSettings

CLASSES = 10
ONE_DIGIT = SceneConfig(num_classes=CLASSES, num_train=64, num_val=64, num_test=64, image_size=32, max_digits=1)
MIXUP = '{mixup_alpha = 1.0, label_smoothing = 0.0}'
CUTMIX = '{mixup_alpha = 0.0, cutmix_alpha = 1.0, label_smoothing = 0.0}'
LOSSES = {
    'cross_entropy': {'loss.name': 'cross_entropy', 'loss.args': '{}'},
    'smoothing': {'loss.name': 'cross_entropy', 'loss.args': '{smoothing = 0.1}'},
    'bce': {'loss.name': 'bce', 'loss.args': '{}'},
    'asymmetric': {'loss.name': 'asymmetric_single_label', 'loss.args': '{}'},
    'mixup': {'augment.name': 'timm', 'augment.args.mixup': MIXUP},
    'cutmix': {'augment.name': 'timm', 'augment.args.mixup': CUTMIX, 'loss.name': 'bce', 'loss.args': '{}'},
}


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    splits = read_splits(make_scenes(tmp_path_factory.mktemp('one_digit') / 'scenes', ONE_DIGIT))
    return Splits(splits.train.select(range(48)), splits.val.select(range(16)), splits.test.select(range(16)))


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.override({'task': 'single_label', 'batch_size': '16', **LOSSES['cross_entropy']})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (6,), generator=generator)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- losses


def loss_of(recipe, logits, targets):
    """What the task that training builds says of a network with these logits."""
    task = build_task(recipe, torch.nn.Identity(), torch.device('cpu'), criterion=build_loss(
        recipe.loss, recipe.task, is_mixed=bool(recipe.augment.args)))
    return float(task(logits, targets)['loss'])


def test_each_loss_is_its_formula_on_one_label(recipe, batch):
    logits, labels = batch
    hot = F.one_hot(labels, CLASSES).double()
    log_prob, prob = logits.log_softmax(1), logits.softmax(1)
    for changes, want in (
            (LOSSES['cross_entropy'], F.cross_entropy(logits, labels)),
            (LOSSES['smoothing'], F.cross_entropy(logits, labels, label_smoothing=0.1)),
            ({'loss.name': 'bce', 'loss.args': '{smoothing = 0.0}'}, F.binary_cross_entropy_with_logits(logits, hot)),
            # timm shares the smoothing out over the classes.
            ({'loss.name': 'bce', 'loss.args': '{smoothing = 0.1}'},
             F.binary_cross_entropy_with_logits(logits, hot * 0.9 + 0.1 / CLASSES)),
            ({'loss.name': 'asymmetric_single_label', 'loss.args': '{gamma_pos = 1.0, gamma_neg = 2.0}'},
             -((hot * 0.9 + 0.1 / CLASSES) * torch.where(hot == 1, 1 - prob, prob ** 2) * log_prob).sum(1).mean())):
        assert loss_of(recipe.override(changes), logits, hot) == pytest.approx(float(want), rel=1e-6), changes


def test_mixed_targets_reach_the_loss_as_they_are(recipe, batch):
    logits, labels = batch
    hot = F.one_hot(labels, CLASSES).double()
    mixed = 0.3 * hot + 0.7 * hot.flip(0)
    recipe = recipe.override(LOSSES['mixup'])
    assert loss_of(recipe, logits, mixed) == pytest.approx(float(F.cross_entropy(logits, mixed)), rel=1e-6)
    for args, want in (('{smoothing = 0.0}', mixed), ('{target_threshold = 0.5}', (mixed > 0.5).double())):
        changed = recipe.override({'loss.name': 'bce', 'loss.args': args})
        assert loss_of(changed, logits, mixed) == pytest.approx(
            float(F.binary_cross_entropy_with_logits(logits, want)), rel=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_training_lowers_the_loss_below_a_constant_guess(recipe, splits, name):
    few = Splits(splits.train.select(range(16)), splits.val.select(range(4)))
    still = {'augment.hflip': '0.0', 'augment.scale': '[1.0, 1.0]', 'augment.ratio': '[1.0, 1.0]'}
    result = train(recipe.override({'epochs': '10', 'optimizer.lr': '0.02', **still, **LOSSES[name]}), few)
    losses = [record.train_loss for record in result.epochs]
    share = 1 / CLASSES
    is_binary = LOSSES[name].get('loss.name') == 'bce'
    guess = -share * math.log(share) - (1 - share) * math.log(1 - share) if is_binary else math.log(CLASSES)
    assert losses[-1] < 0.95 * guess < losses[0], losses


def test_accuracy_counts_first_places_and_first_five():
    # Scores fall from the first class to the last, so that a label is its own place.
    labels = torch.tensor([0, 0, 0, 4, 9])
    logits = torch.arange(10.0).flip(0).repeat(5, 1)
    found = measure(logits, F.one_hot(labels, CLASSES), 'single_label')
    assert found['top1'] == pytest.approx(60) and found['top5'] == pytest.approx(80)
    assert found['loss'] == pytest.approx(float(F.cross_entropy(logits, labels)))
    few = measure(logits[:, :3], F.one_hot(torch.tensor([0, 1, 2, 2, 2]), 3), 'single_label')
    assert few['top1'] == pytest.approx(20) and few['top5'] == 100


def test_what_is_measured_is_accuracy(recipe, splits, tmp_path):
    result = train(recipe.override({'epochs': '3'}), splits, output=tmp_path / 'run')
    assert result.metric == 'top1' and result.val_map is None and result.test_map is None
    labels = result.val_targets.argmax(1)
    assert result.val_metrics['top1'] == pytest.approx(100 * (result.val_logits.argmax(1) == labels).double().mean())
    fifth = result.val_logits.sort(1, descending=True).values[:, 4]
    is_in = result.val_logits[torch.arange(len(labels)), labels] >= fifth
    assert result.val_metrics['top5'] == pytest.approx(100 * is_in.double().mean())
    assert result.val_metrics['loss'] == pytest.approx(float(F.cross_entropy(result.val_logits, labels)))
    scores = [record.metrics['top1'] for record in result.epochs]
    assert result.best_epoch == 1 + scores.index(max(scores))
    found = evaluate(result.model, splits.test, task='single_label')
    assert found == pytest.approx(dict(result.test_metrics), abs=1e-6) and set(found) == {'top1', 'top5', 'loss'}
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['metric'] == 'top1'


def test_a_picture_with_several_labels_is_named(recipe, tiny_scenes):
    with pytest.raises(ValueError, match=(
            r"task 'single_label' needs exactly one present label a picture, got \d in train, picture '.*', and \d+ "
            r"such pictures; take task 'multi_label'")):
        train(recipe, tiny_scenes)


def test_losses_of_several_labels_are_refused(recipe, splits):
    with pytest.raises(ValueError, match="must be a loss of logits and targets for task 'single_label', got 'asym"):
        train(recipe.override({'loss.name': 'asymmetric'}), splits)
    with pytest.raises(ValueError, match="for task 'multi_label', got 'cross_entropy'"):
        build_loss(LossSettings('cross_entropy'), 'multi_label')


# ---- Mixup


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_targets_are_mixed_as_pictures_are(recipe, splits, name):
    recipe = recipe.override(LOSSES[name])
    with seeded(0):
        loader = build_train_loader(recipe, splits.train, build_model(recipe, splits.label_names))
        [images, targets, *_], *_ = loader.batches(0)
        mixed, found = build_mixup(recipe, CLASSES)(images.clone(), targets)
    one, other = targets, targets.flip(0)
    assert torch.allclose(found.sum(1), torch.ones(16)) and not torch.equal(found, targets)
    if name == 'mixup':
        share = ((mixed - images.flip(0)) * (images - images.flip(0))).sum() / (images - images.flip(0)).square().sum()
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), rtol=1e-4, atol=1e-5)
    else:
        is_own = (mixed == images).all(1).all(0)  # a pixel that each picture has kept; others are the partners'
        assert torch.equal(mixed[:, :, ~is_own], images.flip(0)[:, :, ~is_own])
        share = is_own.double().mean()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(found.double(), (share * one + (1 - share) * other).double(), rtol=1e-4, atol=1e-4)


def test_what_is_mixed_is_what_is_learnt_from(recipe, splits, monkeypatch):
    mixed, learnt, build_mixup_, build_loss_ = [], [], run_module.build_mixup, run_module.build_loss

    def spy_mixup(*args):
        mixup = build_mixup_(*args)

        def mix(images, targets):
            assert targets.sum() == 16
            mixed.append(mixup(images, targets)[1])
            return images, mixed[-1]
        return mix

    def spy_loss(*args, **settings):
        loss = build_loss_(*args, **settings)
        loss.register_forward_pre_hook(lambda module, inputs: learnt.append(inputs[1]))
        return loss

    monkeypatch.setattr(run_module, 'build_mixup', spy_mixup)
    monkeypatch.setattr(run_module, 'build_loss', spy_loss)
    train(recipe.override(LOSSES['mixup'] | {'epochs': '1'}), splits)
    assert len(mixed) == len(learnt) == 3
    assert all(torch.equal(one, other) for one, other in zip(mixed, learnt))
    assert all(targets.shape == (16, CLASSES) and ((targets > 0).sum(1) == 2).any() for targets in mixed)


def test_mixing_follows_from_the_seed_and_spares_validation(recipe, splits):
    recipe, found = recipe.override(LOSSES['mixup'] | {'epochs': '1'}), []
    for seed in (98, 99):
        with seeded(seed):
            found.append(train(recipe, splits))
    assert found[0].epochs == found[1].epochs and same_weights(found[0].model, found[1].model)
    assert torch.equal(found[0].val_targets, splits.val.targets)


def test_mixing_goes_on_where_it_was(recipe, splits, tmp_path):
    recipe = recipe.override(LOSSES['cutmix'] | {'checkpoint_steps': '1', 'keep_checkpoints': '9'})
    whole = train(recipe, splits, output=tmp_path / 'whole')
    folder = shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    newest_first = list_checkpoints(folder / 'checkpoints')
    assert len(newest_first) == 6
    again = train(recipe, splits, output=folder, resume=newest_first[4])  # after the second of three steps
    assert again.epochs == whole.epochs and same_weights(again.model, whole.model)


@pytest.mark.parametrize(('changes', 'shown'), [
    ({'batch_size': '31'}, '31 / 1 = 31'), ({'batch_size': '30', 'grad_accum_steps': '2'}, '30 / 2 = 15')])
def test_pairs_need_an_even_number(recipe, splits, changes, shown):
    with pytest.raises(ValueError, match=(
            f'augment.args.mixup mixes pairs: batch_size over processes and grad_accum_steps must be even, got '
            f'{shown}')):
        train(recipe.override(LOSSES['mixup'] | changes), splits)


def test_without_mixing_the_number_may_be_odd(recipe, splits):
    result = train(recipe.override({'batch_size': '15', 'epochs': '1'}), Splits(splits.train, splits.val))
    assert len(result.epochs) == 1


def test_a_loss_that_takes_no_mixed_targets(recipe, splits):
    with pytest.raises(ValueError, match=(
            "loss.name must be one of 'bce', 'cross_entropy' with augment.args.mixup, got 'asymmetric_single_label', "
            'which takes no mixed targets')):
        train(recipe.override(LOSSES['mixup'] | LOSSES['asymmetric']), splits)


def test_mixing_is_for_one_label_and_for_timms_augmentation(recipe, tiny_recipe, tiny_scenes):
    with pytest.raises(ValueError, match="augment.args.mixup is for task 'single_label', got 'multi_label'"):
        train(tiny_recipe.override({'augment.name': 'timm', 'augment.args.mixup': MIXUP}), tiny_scenes)
    with pytest.raises(RecipeError, match="args of 'crop' must be empty, got 'mixup'"):
        recipe.override({'augment.args.mixup': MIXUP})
    with pytest.raises(RecipeError, match="args.mixup has the unknown key 'num_classes'"):
        recipe.override({'augment.name': 'timm', 'augment.args.mixup': '{num_classes = 5}'})
