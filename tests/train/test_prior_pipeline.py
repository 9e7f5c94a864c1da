"""The temporary network: what it estimates is what the loss gets, however often the run is stopped."""
import csv
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

import timm_miil.train._run as run_module
import timm_miil.train.pipeline as pipeline_module
from timm_miil._errors import RecipeError, TrainingInterrupted
from timm_miil.losses import LabelPriorEstimator, load_label_prior
from timm_miil.train import Splits, load_recipe, read_splits, train
from timm_miil.train.pipeline import prior_recipe

STEPS = 4  # an epoch; the temporary network has two and the main one has one
CHANGES = {
    'epochs': '1', 'batch_size': '8', 'model.args.drop_rate': '0.2',
    'partial': '{scheme = "random_per_sample", drop_prob = 0.5}',
    'loss.name': 'class_aware_selective',
    'loss.args': '{mode = "selective", gamma_neg = 1.0, likelihood_topk = 1, prior_threshold = 0.5}',
    'prior': '{epochs = 2, loss = {name = "class_aware_selective", args = {mode = "ignore"}}}'}


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.override(CHANGES)


@pytest.fixture(scope='module')
def pictures(tiny_scenes):
    splits = read_splits(tiny_scenes)
    return Splits(splits.train.select(range(8 * STEPS)), splits.val.select(range(8)), splits.test.select(range(8)))


@pytest.fixture
def spy(monkeypatch):
    """What a run's parts got: priors of the losses, logits that were averaged, and the steps of all networks."""
    class Spy:
        priors, logits, num_steps, before_step = [], [], 0, staticmethod(lambda number: None)

    class Observer(LabelPriorEstimator):
        def update(self, logits):
            Spy.logits.append(logits.clone())
            return super().update(logits)

    real_build, real_update = run_module.build_loss, run_module.Run._update

    def build(*args, **settings):
        loss = real_build(*args, **settings)
        Spy.priors.append(loss.prior)
        return loss

    def update(run, done):
        Spy.num_steps += 1
        Spy.before_step(Spy.num_steps)
        real_update(run, done)

    monkeypatch.setattr(run_module, 'build_loss', build)
    monkeypatch.setattr(run_module.Run, '_update', update)
    monkeypatch.setattr(pipeline_module, 'LabelPriorEstimator', Observer)
    return Spy


@pytest.fixture(scope='module')
def undisturbed(pictures, tmp_path_factory):
    recipe = load_recipe(Path(__file__).with_name('tiny.toml')).override(CHANGES)
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    return folder, train(recipe, pictures, output=folder)


def assert_same(result, other):
    assert result.epochs == other.epochs and result.test_metrics == other.test_metrics
    weights, wanted = result.model.state_dict(), other.model.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


def estimate(folder):
    return (folder / 'prior.csv').read_text(encoding='utf-8')


# ---- what is estimated


@pytest.mark.parametrize(('average', 'num_batches'), [('last_epoch', STEPS), ('all_epochs', 2 * STEPS)])
def test_the_prior_is_the_mean_confidence_and_is_what_the_loss_gets(
        pictures, recipe, tmp_path, spy, average, num_batches):
    result = train(recipe.override({'prior.average': average}), pictures, output=tmp_path / 'run')
    assert len(spy.logits) == 2 * STEPS and all(logits.shape == (8, 20) for logits in spy.logits)
    want = torch.cat(spy.logits[-num_batches:]).double().sigmoid().mean(0)
    with open(tmp_path / 'run' / 'prior.csv', newline='') as file:
        header, *rows = csv.reader(file)
    assert header == ['Classes', 'avg_pred'] and [name for name, _ in rows] == list(result.label_names)
    found = torch.tensor([float(number) for _, number in rows], dtype=torch.float64)
    assert 0 < found.min() and found.max() < 1
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)  # float64: sums of 32 or 64 terms
    of_temporary, of_main = spy.priors
    assert of_temporary is None and torch.equal(of_main, found.float())


def test_the_temporary_network_has_its_own_loss_and_the_training_pictures_unknown_labels(
        pictures, recipe, undisturbed):
    folder, result = undisturbed
    own = load_recipe(folder / 'prior' / 'recipe.toml')
    assert own == prior_recipe(recipe) == dataclasses.replace(
        recipe, prior=None, epochs=2, loss=recipe.prior.loss, paper=None)
    assert own.loss.args == {'mode': 'ignore'} and result.recipe == recipe
    assert (result.splits.train.targets == -1).any()
    assert not (folder / 'prior' / 'summary.json').exists(), 'it is not tested'


def test_the_temporary_network_stops_at_no_epoch_of_the_main_one(recipe):
    own = prior_recipe(recipe.override({'epochs': '9', 'stop_epoch': '5', 'prior.epochs': '3'}))
    assert (own.epochs, own.stop_epoch) == (3, 0)


def test_a_recipe_without_a_table_has_no_temporary_network(tiny_recipe):
    with pytest.raises(RecipeError, match='the recipe has no table prior, which says how to train a temporary network'):
        prior_recipe(tiny_recipe)


def test_the_estimate_is_all_that_the_temporary_network_leaves(pictures, recipe):
    # With this threshold no class counts as common, so that the prior says nothing.
    without = recipe.override({'loss.args.prior_threshold': '1.0', 'prior': 'none'})
    found = train(recipe.override({'loss.args.prior_threshold': '1.0'}), pictures)
    assert_same(found, train(without, pictures))


def test_the_prior_changes_what_is_learnt(pictures, recipe, undisturbed):
    _, result = undisturbed
    without = train(recipe.override({'prior': 'none'}), pictures)
    assert [record.train_loss for record in without.epochs] != [record.train_loss for record in result.epochs]


# ---- what the estimate depends on


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads
def test_the_estimate_follows_from_the_seed_and_no_setting_of_the_main_network(
        pictures, recipe, undisturbed, tmp_path):
    torch.manual_seed(99)
    changes = {
        'workers': '1', 'epochs': '2', 'loss.args.gamma_neg': '3.0', 'loss.args.prior_threshold': '0.1',
        'checkpoint_steps': '3'}
    train(recipe.override(changes), pictures, output=tmp_path / 'same')
    assert estimate(tmp_path / 'same') == estimate(undisturbed[0])
    train(recipe.override({'seed': '4'}), pictures, output=tmp_path / 'other')
    assert estimate(tmp_path / 'other') != estimate(undisturbed[0])


def test_no_folder_is_needed(pictures, recipe, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    epochs = []
    result = train(recipe, pictures, on_epoch=epochs.append)
    assert_same(result, undisturbed[1])
    assert tuple(epochs) == result.epochs and not list(tmp_path.iterdir())


# ---- stopped and resumed


@pytest.mark.parametrize('step', [
    2, 2 * STEPS + 2, *(pytest.param(step, marks=pytest.mark.slow) for step in (STEPS, STEPS + 3, 2 * STEPS))])
def test_a_signal_in_either_phase_costs_no_step(pictures, recipe, undisturbed, tmp_path, spy, step):
    """The first eight steps are the temporary network's; the one that the signal comes in is ended."""
    spy.before_step = lambda number: number == step and os.kill(os.getpid(), 15)
    with pytest.raises(TrainingInterrupted, match='SIGTERM') as caught:
        train(recipe, pictures, output=tmp_path / 'run')
    in_prior = step <= 2 * STEPS
    assert (f'{tmp_path / "run" / "prior" / "checkpoints"}' in str(caught.value)) == in_prior
    assert (tmp_path / 'run' / 'prior.csv').exists() != in_prior
    spy.before_step = lambda number: None
    result = train(recipe, pictures, output=tmp_path / 'run', resume='auto')
    assert_same(result, undisturbed[1])
    assert estimate(tmp_path / 'run') == estimate(undisturbed[0])
    assert spy.num_steps == 3 * STEPS, 'steps were repeated'


@pytest.mark.parametrize('average', ['last_epoch', pytest.param('all_epochs', marks=pytest.mark.slow)])
def test_a_crash_goes_back_to_the_last_checkpoint_of_the_estimate(pictures, recipe, tmp_path, spy, average):
    recipe = recipe.override({'prior.average': average, 'checkpoint_steps': '3'})
    whole, before = train(recipe, pictures, output=tmp_path / 'whole'), spy.num_steps

    def crash(number):
        if number == before + 8:
            raise RuntimeError('crash')

    spy.before_step = crash
    with pytest.raises(RuntimeError, match='crash'):
        train(recipe, pictures, output=tmp_path / 'run')
    spy.before_step = lambda number: None
    assert_same(train(recipe, pictures, output=tmp_path / 'run', resume='auto'), whole)
    assert estimate(tmp_path / 'run') == estimate(tmp_path / 'whole')
    assert spy.num_steps == before + 8 + 2 + STEPS, 'it goes on after step 6'


@pytest.mark.parametrize('place', ['save_label_prior', 'Run'])
def test_a_crash_between_the_phases(pictures, recipe, undisturbed, tmp_path, spy, monkeypatch, place):
    """Before the estimate is written, and after that."""
    import timm_miil.train.engine as engine_module
    with monkeypatch.context() as context:
        def crash(*args, **settings):
            raise RuntimeError('crash')
        context.setattr(engine_module if place == 'Run' else pipeline_module, place, crash)
        with pytest.raises(RuntimeError, match='crash'):
            train(recipe, pictures, output=tmp_path / 'run')
    assert (tmp_path / 'run' / 'prior.csv').exists() == (place == 'Run') and spy.num_steps == 2 * STEPS
    result = train(recipe, pictures, output=tmp_path / 'run', resume='auto')
    assert_same(result, undisturbed[1])
    assert estimate(tmp_path / 'run') == estimate(undisturbed[0]) and spy.num_steps == 3 * STEPS
    torch.testing.assert_close(
        spy.priors[-1], load_label_prior(tmp_path / 'run' / 'prior.csv', result.label_names).float(), rtol=0, atol=0)


def test_a_finished_run_trains_neither_network_again(pictures, recipe, undisturbed, tmp_path, spy):
    folder = shutil.copytree(undisturbed[0], tmp_path / 'run')
    assert_same(train(recipe, pictures, output=folder, resume='auto'), undisturbed[1])
    assert spy.num_steps == 0 and estimate(folder) == estimate(undisturbed[0])


def test_another_way_to_estimate_is_another_run(pictures, recipe, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / 'run')
    with pytest.raises(ValueError, match='is of another run: prior.average was "last_epoch" and is "all_epochs"'):
        train(recipe.override({'prior.average': 'all_epochs'}), pictures, output=folder, resume='auto')


def test_a_stopped_estimate_is_not_overwritten_by_chance(pictures, recipe, tmp_path, spy):
    spy.before_step = lambda number: number == 2 and os.kill(os.getpid(), 15)
    with pytest.raises(TrainingInterrupted):
        train(recipe, pictures, output=tmp_path / 'run')
    with pytest.raises(ValueError, match="prior' has a run in it .*; go on with it by resume='auto'"):
        train(recipe, pictures, output=tmp_path / 'run')
