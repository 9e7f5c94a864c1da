"""Recipes: what is read, what is refused, what overriding does."""
import dataclasses
from pathlib import Path

import pytest

from timm_miil._errors import RecipeError
from timm_miil.train import list_recipes, load_recipe

TINY = Path(__file__).with_name('tiny.toml')


def test_every_packaged_recipe_reads():
    assert 'scenes_asl' in list_recipes()
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.summary.endswith('.') and recipe.epochs > 0


def test_a_file_reads_into_typed_frozen_settings():
    recipe = load_recipe(TINY)
    assert recipe.epochs == 2 and recipe.optimizer.lr == 0.01 and recipe.augment.scale == (0.8, 1.0)
    assert recipe.model.args['channels'] == [8, 8, 16, 16]
    assert load_recipe(str(TINY)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 3


def test_whole_numbers_serve_as_floats(tmp_path):
    file = tmp_path / 'a.toml'
    file.write_text(TINY.read_text().replace('weight_decay = 0.01', 'weight_decay = 0'))
    value = load_recipe(file).optimizer.weight_decay
    assert value == 0.0 and isinstance(value, float)


def test_override_changes_what_it_names_and_nothing_else():
    recipe = load_recipe(TINY)
    changed = recipe.override({
        'epochs': '3', 'optimizer.lr': '1e-3', 'optimizer.name': 'sgd', 'augment.scale': '[0.5, 1]',
        'channels_last': 'false', 'model.args.embed_dim': '8', 'summary': 'two words'})
    want = dataclasses.replace(
        recipe, epochs=3, channels_last=False, summary='two words',
        optimizer=dataclasses.replace(recipe.optimizer, lr=1e-3, name='sgd'),
        augment=dataclasses.replace(recipe.augment, scale=(0.5, 1.0)),
        model=dataclasses.replace(recipe.model, args={**recipe.model.args, 'embed_dim': 8}))
    assert changed == want
    assert recipe == load_recipe(TINY)
    assert recipe.override({}) == recipe


@pytest.mark.parametrize(('changes', 'message'), [
    ({'epoch': '3'}, "override: unknown key 'epoch'; did you mean 'epochs'"),
    ({'optimizer.rl': '3'}, "override: unknown key 'optimizer.rl'; Known: args, layer_decay, lr, name, weight_decay"),
    ({'optimiser.lr': '3'}, "override: unknown key 'optimiser'; did you mean 'optimizer'"),
    ({'epochs': '2.5'}, "override: 'epochs' must be a whole number, got 2.5"),
    ({'epochs': 'many'}, "override: 'epochs' must be a whole number, got 'many'"),
    ({'epochs': 'true'}, "override: 'epochs' must be a whole number, got True"),
    ({'epochs': '0'}, 'override: epochs must be at least 1, got 0'),
    ({'epochs.x': '1'}, 'epochs.x: epochs is no table'),
    ({'seed': '-1'}, r'override: seed must be in \[0, 4.29497e\+09\), got -1'),
    ({'ema_decay': '1'}, r'override: ema_decay must be in \[0, 1\), got 1.0'),
    ({'workers': '-1'}, r'override: workers must be in \[0, inf\), got -1'),
    ({'channels_last': '1'}, "override: 'channels_last' must be true or false, got 1"),
    ({'optimizer.lr': '0'}, r'override: optimizer.lr must be in .*, got 0.0'),
    ({'optimizer.lr': 'nan'}, r'override: optimizer.lr must be in .*, got nan'),
    ({'optimizer.name': 'adamm'}, "override: optimizer.name must be an optimizer of timm, got 'adamm'; did you mean"),
    ({'schedule.name': 'plateau'}, "override: schedule.name must be one of 'constant', 'cosine', .*, got 'plateau'"),
    ({'augment.scale': '[0.5]'}, r"override: 'augment.scale' must be a list of 2 numbers, got \[0.5\]"),
    ({'augment.scale': '[0.9, 0.5]'}, 'override: augment.scale must be two rising numbers above 0, got 0.9 and 0.5'),
    ({'augment.scale': '[0.5, 1.5]'}, r'override: augment.scale must be in \[0, 1\], got 1.5'),
    ({'loss.name': 'asymetric'}, "override: loss.name must be a loss, got 'asymetric'; did you mean 'asymmetric'"),
    ({'loss.gamma_neg': '4'}, "override: unknown key 'loss.gamma_neg'; Known: args, name"),
    ({'model.args': '3'}, "override: 'model.args' must be a table, got 3"),
    ({'model': 'x'}, "override: 'model' must be a table, got 'x'"),
    ({'model.args.num_classes': '3'}, 'override: model.args must not hold num_classes: training decides it'),
])
def test_overrides_are_as_strict_as_files(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(TINY).override(changes)


PARTIAL = {'partial.scheme': 'fixed_per_class', 'partial.num_per_class': '5'}
PRIOR = {
    'loss.name': 'class_aware_selective', 'loss.args': '{}', 'prior.epochs': '2',
    'prior.loss.name': 'class_aware_selective'}
PAPER = {
    'paper.id': 'asl', 'paper.metric': 'mAP', 'paper.value': '86.6', 'paper.split': 'val', 'paper.source': 'a table'}
ONECYCLE = {'schedule.name': 'onecycle', 'schedule.warmup_epochs': '0', 'schedule.min_lr': '0'}
TIMM = {'augment.name': 'timm'}


@pytest.mark.parametrize('changes', [
    PARTIAL, {'partial.scheme': 'random_per_sample', 'partial.drop_prob': '0.5'}, PRIOR, PAPER, ONECYCLE,
    {**ONECYCLE, 'schedule.args.pct_start': '0.2'}, {'schedule.args': '{warmup_lr = 1e-5, k_decay = 0.5}'},
    {**TIMM, 'augment.args': '{aug_repeats = 3, re_prob = 0.1, mixup = {mixup_alpha = 0.1, prob = 0.5}}'},
    {'augment.name': 'paper', 'augment.args': '{cutout = 0.3, randaugment = false}'},
    {'optimizer.args': '{betas = [0.9, 0.99]}'}, {'stop_epoch': '2'}, {'batch_size': '12', 'grad_accum_steps': '3'},
    {'data.args.drop_unlabelled': 'true'}, {'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}'},
])
def test_tables_that_fit(changes):
    assert load_recipe(TINY).override(changes) != load_recipe(TINY)


@pytest.mark.parametrize(('changes', 'message'), [
    ({**PARTIAL, 'partial.scheme': 'fpc'}, "partial.scheme must be one of 'fixed_per_class', 'l"),
    ({**PARTIAL, 'partial.num_per_class': '0'}, 'partial.num_per_class must be at least 1, got 0'),
    ({**PARTIAL, 'partial.drop_prob': '0.5'},
     "partial.scheme must be given its own number only, got 'fixed_per_class' with num_per_class 5 and drop_prob 0.5"),
    ({**PARTIAL, 'partial.scheme': 'random_per_sample'}, 'partial.scheme must be given its own number only'),
    ({**PARTIAL, 'partial.scheme': 'positives_only'}, 'partial.scheme must be given its own number only'),
    ({'partial.scheme': 'random_per_sample', 'partial.drop_prob': '2'}, r'partial.drop_prob must be in \[0, 1\], got'),
    ({'partial.num_per_class': '5'}, "'partial.scheme' is missing"),
    ({**PRIOR, 'prior.epochs': '0'}, 'prior.epochs must be at least 1, got 0'),
    ({**PRIOR, 'prior.average': 'mean'}, "prior.average must be one of 'last_epoch', 'all_epochs', got 'mean'"),
    ({**PRIOR, 'prior.loss.name': 'ignore'}, "prior.loss.name must be a loss, got 'ignore'"),
    ({**PRIOR, 'loss.name': 'asymmetric'},
     "override: prior is for the loss 'class_aware_selective', got 'asymmetric'; leave the prior out"),
    ({**PAPER, 'paper.id': 'als'}, "paper.id must be a paper of the catalogue, got 'als'; did you mean 'asl'"),
    ({**PAPER, 'paper.metric': 'map'}, "paper.metric must be one of 'mAP', .*, got 'map'"),
    ({**PAPER, 'paper.value': '866'}, r'paper.value must be in \[0, 100\], got 866'),
    ({'schedule.name': 'onecycle'},
     r'schedule.warmup_epochs and min_lr must be 0 with onecycle, got 0.5 and 0.0; set args.pct_start'),
    ({**ONECYCLE, 'schedule.args.pct_strat': '0.2'}, "schedule.args has the unknown key 'pct_strat'; did you mean"),
    ({**ONECYCLE, 'schedule.args.max_lr': '1'}, "schedule.args has the unknown key 'max_lr'"),
    ({**ONECYCLE, 'schedule.args.pct_start': '2'}, "schedule.args must be those of onecycle, got {'pct_start': 2}: "),
    ({'schedule.args.warmup_lr': 'low'}, "schedule.args must be those of cosine, got {'warmup_lr': 'low'}: "),
    ({'schedule.name': 'multistep', 'schedule.args.decay_milestones': '3'}, 'schedule.args must be those of multistep'),
    ({'schedule.args.sched': 'step'}, "schedule.args has the unknown key 'sched'"),
    ({'optimizer.args.beta': '0.9'}, "override: optimizer.args must be those of adamw: .*keyword argument 'beta'"),
    ({'optimizer.name': 'adahessian'}, "optimizer.name must be an optimizer of timm, got 'adahessian'"),
    ({'optimizer.lr': '-1'}, r'optimizer.lr must be in \(0, inf\), got -1.0'),
    ({'model.name': 'resnet5'}, "model.name must be a model of timm, got 'resnet5'; did you mean 'resnet50'"),
    ({'optimizer.args.lr': '1'}, 'optimizer.args must not hold lr: training decides it, or another setting of the rec'),
    ({'optimizer.layer_decay': '2'}, r'optimizer.layer_decay must be in \[0, 1\], got 2'),
    ({'augment.name': 'papers'}, "augment.name must be one of 'crop', 'paper', 'timm', got 'papers'"),
    ({'augment.args.re_prob': '0.1'}, "augment.args of 'crop' must be empty, got 're_prob'; name = \"timm\" takes"),
    ({'augment.name': 'paper', 'augment.args.cut': '1'}, "args of 'paper' must be cutout and randaugment, got 'cut'"),
    ({**TIMM, 'augment.args.reprob': '1'}, "augment.args has the unknown key 'reprob'; did you mean 're_prob'"),
    ({**TIMM, 'augment.args.mixup': '0.1'}, 'augment.args.mixup must be a table, got 0.1'),
    ({**TIMM, 'augment.args.mixup.alpha': '0.1'}, "augment.args.mixup has the unknown key 'alpha'"),
    ({**TIMM, 'augment.args.aug_repeats': '-1'}, 'augment.args.aug_repeats must be at least 0, got -1'),
    ({**TIMM, 'augment.args.scale': '1'}, "augment.args has the unknown key 'scale'"),
    ({'augment.image_size': '100000'}, r'augment.image_size must be in \[0, 4096\], got 100000'),
    ({'augment.image_size': '-1'}, 'augment.image_size must be at least 0, got -1'),
    ({'data.val_fraction': '0'}, 'data.val_fraction must be between 0 and 1, got 0.0'),
    ({'data.train': ''}, "data.train and val must name splits, got '' and 'val'"),
    ({'stop_epoch': '3'}, r'override: stop_epoch must be in \[0, 2\], got 3'),
    ({'grad_accum_steps': '3'}, 'override: batch_size must be a multiple of 3, got 16; the nearest are 15 or 18'),
    ({'precision': 'half'}, "override: precision must be one of 'fp32', 'bf16', 'fp16', got 'half'"),
    ({'clip_grad': '-1'}, r'override: clip_grad must be in \[0, inf\), got -1.0'),
    ({'keep_checkpoints': '0'}, 'override: keep_checkpoints must be at least 1, got 0'),
    ({'partial': '3'}, "override: 'partial' must be a table, got 3"),
])
def test_tables_that_do_not_fit(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(TINY).override(changes)


def test_a_recipe_of_another_network_or_loss_is_not_called_as_before():
    recipe = load_recipe('finetune')
    assert recipe.override({'epochs': '3', 'model.args.drop_rate': '0.1'}).summary == recipe.summary
    other = recipe.override({'model.args.backbone': 'resnet18', 'loss.name': 'bce'})
    assert other.summary == 'mldecoder on resnet18, trained with the loss bce.'
    assert recipe.override({'model.name': 'resnet18', 'model.args': '{}'}).summary == (
        'resnet18, trained with the loss asymmetric.')
    assert recipe.override({'loss.name': 'bce', 'summary': 'Mine.'}).summary == 'Mine.'


def test_a_text_may_look_like_a_number():
    recipe = load_recipe(TINY).override({
        'data.train': '2017', 'data.labels': 'true', 'model.name': 'hf-hub:1/2', 'summary': '[1]', 'data.val': '"7"'})
    assert (recipe.data.train, recipe.data.labels, recipe.summary, recipe.data.val) == ('2017', 'true', '[1]', '7')
    prior = load_recipe('scenes_csl').override({'prior.average': 'all_epochs', 'prior.loss.args.clip': '1'})
    assert prior.prior.average == 'all_epochs' and prior.prior.loss.args['clip'] == 1
    assert load_recipe(TINY).override({'model.args.block_args': '7'}).model.args['block_args'] == 7


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ('epochs = 2', 'epoch = 2', "unknown key 'epoch'; did you mean 'epochs'"),
    ('epochs = 2\n', '', "'epochs' is missing"),
    ('lr = 0.01\n', '', "'optimizer.lr' is missing"),
    ('epochs = 2', 'epochs = ', 'is not TOML'),
])
def test_wrong_files_are_refused_by_name(tmp_path, old, new, message):
    file = tmp_path / 'broken.toml'
    text = TINY.read_text(encoding='utf-8')
    assert old in text
    file.write_text(text.replace(old, new), encoding='utf-8')
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_an_unknown_name_tells_the_nearest():
    with pytest.raises(RecipeError, match="unknown recipe 'scene_asl'; did you mean 'scenes_asl'"):
        load_recipe('scene_asl')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.toml'):
        load_recipe(tmp_path / 'none.toml')
