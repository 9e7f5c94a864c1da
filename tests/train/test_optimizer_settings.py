"""What the recipe says of weights: rates by layer, decay, schedules, clipping and averages."""
import math

import pytest
import torch
from torch import nn

import timm_miil.train._run as run_module
from timm_miil.train import Splits, read_splits, train
from timm_miil.train.build import build_model, build_optimizer, build_scheduler

NAMES = [f'thing {number}' for number in range(20)]
LR = 0.01  # of tiny.toml
ONECYCLE = {'schedule.name': 'onecycle', 'schedule.warmup_epochs': '0'}


@pytest.fixture(scope='module')
def pictures(tiny_scenes):
    splits = read_splits(tiny_scenes)
    return Splits(splits.train.select(range(32)), splits.val.select(range(8)))


@pytest.fixture
def model(tiny_recipe):
    return build_model(tiny_recipe, NAMES)


def settings_of(model, optimizer, key):
    """A group's setting by the name of each of its parameters."""
    values = {id(parameter): group[key] for group in optimizer.param_groups for parameter in group['params']}
    assert len(values) == sum(len(group['params']) for group in optimizer.param_groups)
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


def course(recipe, optimizer, steps_per_epoch, key='lr'):
    """What each group has at each step of all epochs, shape (steps, groups)."""
    schedule, found = build_scheduler(recipe, optimizer, steps_per_epoch), []
    for step in range(recipe.epochs * steps_per_epoch):
        found.append([group[key] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step_update(step + 1)
    return torch.tensor(found, dtype=torch.float64)


# ---- rates and decay by layer


def test_each_layer_learns_slower_than_the_one_above_it(tiny_recipe, model):
    optimizer = build_optimizer(tiny_recipe.override({'optimizer.layer_decay': '0.5'}), model)
    scales = settings_of(model, optimizer, 'lr_scale')
    # By hand: the stem, four stages of one block and the head are layers of their own.
    backbone = {name: scale for name, scale in scales.items() if name.startswith('backbone.')}
    assert backbone and all(scale == 1 for name, scale in scales.items() if name not in backbone)
    by_stage = [
        {scale for name, scale in backbone.items() if name.startswith(start)}
        for start in ('backbone.conv1', 'backbone.layer1', 'backbone.layer2', 'backbone.layer3', 'backbone.layer4')]
    assert all(len(scales) == 1 for scales in by_stage)
    values = [scale for [scale] in by_stage]
    assert [high / low for low, high in zip(values, [*values[1:], 1.0])] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize('layer_decay', ['0', '0.5'])
def test_biases_norms_and_what_the_model_excludes_are_not_decayed(tiny_recipe, model, layer_decay):
    model.no_weight_decay = lambda: {'backbone.conv1.0.weight'}
    assert 'backbone.conv1.0.weight' in dict(model.named_parameters())
    optimizer = build_optimizer(tiny_recipe.override({'optimizer.layer_decay': layer_decay}), model)
    for name, decay in settings_of(model, optimizer, 'weight_decay').items():
        parameter = model.get_parameter(name)
        assert decay == (0.01 if parameter.ndim > 1 and name != 'backbone.conv1.0.weight' else 0.0), name


def test_decay_shrinks_weights_and_leaves_biases(tiny_recipe):
    model = nn.Linear(3, 2)
    nn.init.ones_(model.bias)
    weight = model.weight.detach().clone()
    optimizer = build_optimizer(tiny_recipe.override({'optimizer.weight_decay': '0.5'}), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - LR * 0.5), rtol=1e-6, atol=0)
    assert torch.equal(model.bias.detach(), torch.ones(2))


# ---- schedules


def one_cycle(step, steps, high, pct_start=0.3, div_factor=25.0, final_div_factor=1e4):
    """torch's two halves of cosines, from its documentation."""
    low, peak = high / div_factor, pct_start * steps - 1
    start, end, part = (low, high, step / peak) if step <= peak else (
        high, low / final_div_factor, (step - peak) / (steps - 1 - peak))
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize('layer_decay', ['0', '0.5'])
def test_one_cycle_rises_to_the_recipes_rate_of_each_layer_and_falls(tiny_recipe, model, layer_decay):
    recipe = tiny_recipe.override(ONECYCLE | {'epochs': '4', 'optimizer.layer_decay': layer_decay})
    optimizer = build_optimizer(recipe, model)
    scales = [group.get('lr_scale', 1.0) for group in optimizer.param_groups]
    assert len(set(scales)) == (6 if layer_decay == '0.5' else 1)
    found = course(recipe, optimizer, steps_per_epoch=5)
    want = torch.tensor([[one_cycle(step, 20, LR * scale) for scale in scales] for step in range(20)])
    torch.testing.assert_close(found, want.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[5], LR * torch.tensor(scales, dtype=torch.float64))
    torch.testing.assert_close(found[-1], found[5] / 25 / 1e4)


def test_one_cycle_takes_its_own_arguments(tiny_recipe):
    recipe = tiny_recipe.override(ONECYCLE | {
        'epochs': '2', 'schedule.args': '{pct_start = 0.5, div_factor = 10.0, final_div_factor = 2.0}'})
    found = course(recipe, build_optimizer(recipe, nn.Linear(2, 2)), steps_per_epoch=10)[:, 0]
    want = torch.tensor([one_cycle(step, 20, LR, 0.5, 10.0, 2.0) for step in range(20)], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize('three_phase', ['false', 'true'])
@pytest.mark.parametrize('pct_start', [0.1, 0.2, 0.3, 0.5, 1.0])
def test_one_cycle_of_any_length_stays_within_its_rates(tiny_recipe, pct_start, three_phase):
    for steps in range(1, 13):
        recipe = tiny_recipe.override(ONECYCLE | {
            'epochs': str(steps), 'schedule.args': f'{{pct_start = {pct_start}, three_phase = {three_phase}}}'})
        found = course(recipe, build_optimizer(recipe, nn.Linear(2, 2)), steps_per_epoch=1)[:, 0]
        assert len(found) == steps and found.min() > 0 and found.max() <= LR * (1 + 1e-6), (steps, found)


@pytest.mark.parametrize(('steps', 'pct_start'), [(2, 0.5), (5, 0.2), (10, 0.1)])
def test_one_cycle_whose_rise_is_one_step_starts_at_the_top_and_falls(tiny_recipe, steps, pct_start):
    recipe = tiny_recipe.override(ONECYCLE | {
        'epochs': str(steps), 'optimizer.name': 'adam', 'schedule.args': f'{{pct_start = {pct_start}}}'})
    found = course(recipe, build_optimizer(recipe, nn.Linear(2, 2)), steps_per_epoch=1)[:, 0]
    want = [LR / 25e4 + (LR - LR / 25e4) * (1 + math.cos(math.pi * step / (steps - 1))) / 2 for step in range(steps)]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0)


def test_one_cycle_turns_momentum_where_there_is_some(tiny_recipe):
    recipe = tiny_recipe.override(ONECYCLE | {'epochs': '2', 'optimizer.name': 'adam'})
    first = course(recipe, build_optimizer(recipe, nn.Linear(2, 2)), 10, 'betas')[:, 0, 0]
    torch.testing.assert_close(first[[0, 5, 19]], torch.tensor([0.95, 0.85, 0.95], dtype=torch.float64))
    none = tiny_recipe.override(ONECYCLE | {'optimizer.name': 'adagrad'})
    assert course(none, build_optimizer(none, nn.Linear(2, 2)), 10)[5, 0] == pytest.approx(LR)


def test_one_cycle_goes_on_where_it_was(tiny_recipe, model):
    recipe = tiny_recipe.override(ONECYCLE | {'optimizer.layer_decay': '0.5'})
    first = build_optimizer(recipe, model)
    schedule = build_scheduler(recipe, first, 10)
    for step in range(7):
        first.step()
        schedule.step_update(step + 1)
    second = build_optimizer(recipe, model)
    other = build_scheduler(recipe, second, 10)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(schedule.state_dict())
    for step in range(7, 20):
        assert [group['lr'] for group in second.param_groups] == [group['lr'] for group in first.param_groups]
        for optimizer, course_of in ((first, schedule), (second, other)):
            optimizer.step()
            course_of.step_update(step + 1)


def test_a_run_steps_at_the_rates_of_its_schedule(tiny_recipe, pictures):
    steps = []
    train(tiny_recipe.override(ONECYCLE), pictures, on_step=steps.append)
    want = [one_cycle(step, 4, LR) for step in range(4)]
    assert [step.lr for step in steps] == pytest.approx(want, rel=1e-6) and len(set(want)) == 4


@pytest.mark.parametrize(('args', 'count'), [
    ('{}', 2), ('{cooldown_epochs = 1}', 3), ('{warmup_prefix = true}', 3),
    ('{cycle_limit = 2, cycle_decay = 1.0}', 4)])
def test_cycles_and_cooldown_make_a_run_longer_as_in_timms_script(tiny_recipe, pictures, args, count):
    changes = {'schedule.warmup_epochs': '1', 'schedule.min_lr': '1e-5', 'schedule.args': args}
    recipe, steps = tiny_recipe.override(changes), []
    assert recipe.num_epochs == count and recipe.override({'stop_epoch': '1'}).num_epochs == 1
    result = train(recipe, pictures, on_step=steps.append)
    assert len(result.epochs) == count
    rates = [step.lr for step in steps]
    if 'cooldown' in args:
        assert rates[-2:] == [1e-5, 1e-5]
    if 'cycle' in args:
        assert rates[4:] == pytest.approx([LR, (LR - 1e-5) * (1 + math.cos(math.pi / 4)) / 2 + 1e-5, *rates[2:4]])


@pytest.mark.parametrize(('epochs', 'lowest'), [(0.3, 0.0), (0.25, 0.0), (1.5, 0.002)])
def test_the_warmup_takes_parts_of_an_epoch(tiny_recipe, epochs, lowest):
    recipe = tiny_recipe.override({
        'epochs': '3', 'schedule.warmup_epochs': str(epochs), 'schedule.args': f'{{warmup_lr = {lowest}}}'})
    found = course(recipe, build_optimizer(recipe, nn.Linear(2, 2)), steps_per_epoch=10)[:, 0]
    steps = torch.arange(30, dtype=torch.float64)
    rising = lowest + (LR - lowest) * steps / (10 * epochs)
    falling = LR * (1 + (math.pi * steps / 30).cos()) / 2
    want = torch.where(steps < 10 * epochs, rising, falling)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-15)


def test_layers_keep_their_scale_through_a_schedule(tiny_recipe, model):
    recipe = tiny_recipe.override({'optimizer.layer_decay': '0.5', 'schedule.min_lr': '1e-3'})
    optimizer = build_optimizer(recipe, model)
    found = course(recipe, optimizer, steps_per_epoch=10)
    scales = torch.tensor([group['lr_scale'] for group in optimizer.param_groups], dtype=torch.float64)
    # Half an epoch of warmup, then the cosine between the two rates.
    assert found[0].eq(0).all()
    want = 1e-3 + (LR - 1e-3) * (1 + math.cos(math.pi * 7 / 20)) / 2
    torch.testing.assert_close(found[7], want * scales)


# ---- clipping


@pytest.fixture
def changes_of(pictures, monkeypatch):
    """A function (recipe) -> how far each step of plain descent at rate 1 moved the weights."""
    def measure(recipe):
        norms, real = [], run_module.Run._update

        def weights(model):
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        def update(run, done):
            before = weights(run.model)
            real(run, done)
            norms.append(float((weights(run.model) - before).norm()))

        plain = {
            'optimizer': '{name = "momentum", lr = 1.0, weight_decay = 0.0, args = {momentum = 0.0}}', 'epochs': '1',
            'schedule': '{name = "constant"}', 'loss.args.reduction': 'mean'}
        with monkeypatch.context() as context:
            context.setattr(run_module.Run, '_update', update)
            train(recipe.override(plain), pictures)
        return norms
    return measure


@pytest.mark.parametrize('parts', ['1', '2'])
def test_clipping_bounds_the_norm_of_the_whole_steps_gradient(tiny_recipe, changes_of, parts):
    recipe = tiny_recipe.override({'grad_accum_steps': parts})
    free = changes_of(recipe)
    assert min(free) > 1e-2
    limit = 0.5 * min(free)
    clipped = changes_of(recipe.override({'clip_grad': str(limit)}))
    assert len(clipped) == 2
    # In float32, of weights some orders of magnitude larger than the step.
    assert clipped == pytest.approx([limit] * 2, rel=1e-3)
    assert changes_of(recipe.override({'clip_grad': str(2 * max(free))})) == free, 'a shorter one stays as it is'


# ---- averages


@pytest.mark.parametrize(('is_warm', 'decay', 'decays'), [
    ('false', 0.9, [0.0, 0.9, 0.9, 0.9]),
    # 1 - n^(-2/3) in step n, at most the recipe's: timm's curve of the warmup.
    ('true', 0.5, [0.0, 1 - 2 ** (-2 / 3), 0.5, 0.5]),
    ('true', 0.9, [0.0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 1 - 4 ** (-2 / 3)])])
def test_the_average_takes_in_each_step_by_its_decay(tiny_recipe, pictures, monkeypatch, is_warm, decay, decays):
    raw, averaged, real = [], [], run_module.Run._update

    def update(run, done):
        real(run, done)
        for found, module in ((raw, run.model), (averaged, run.task.trainable_module_ema.module)):
            found.append({name: tensor.detach().clone() for name, tensor in module.state_dict().items()})

    monkeypatch.setattr(run_module.Run, '_update', update)
    result = train(tiny_recipe.override({'ema_decay': str(decay), 'ema_warmup': is_warm}), pictures)
    want = dict(raw[0])
    for step, share in enumerate(decays):
        for name, tensor in averaged[step].items():
            if tensor.is_floating_point():
                want[name] = share * want[name] + (1 - share) * raw[step][name]
                torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(tensor, raw[step][name])
    kept = averaged[2 * result.best_epoch - 1]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in result.model.state_dict().items())
    assert any(not torch.equal(raw[-1][name], averaged[-1][name]) for name in kept)
