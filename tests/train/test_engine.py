"""The training loop on a data set of seconds: repeatable, honest about its best epoch, and loud on failure."""
import copy
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from timm_miil._errors import TrainingError
from timm_miil.data import MultiLabelRecords, seeded
from timm_miil.train import evaluate, load_recipe, read_splits, train
from timm_miil.train.build import (
    EpochLoader, build_eval_loader, build_model, build_optimizer, build_scheduler, build_train_loader)

NAMES = [f'thing {number}' for number in range(20)]
# What compiles in seconds, and a step that rounding does not turn.
PLAIN = {
    'model.name': 'vit_tiny_patch16_224', 'optimizer.name': 'momentum', 'optimizer.lr': '0.003',
    'model.args': '{img_size = 32, patch_size = 8, embed_dim = 16, depth = 1, num_heads = 2, '
                  'pretrained_cfg_overlay = {input_size = [3, 32, 32]}}'}


@pytest.fixture(scope='module')
def trained(tiny_scenes):
    return train(load_recipe(Path(__file__).with_name('tiny.toml')), tiny_scenes)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_one_seed_gives_one_result_to_the_bit(tiny_scenes, tiny_recipe, trained):
    torch.manual_seed(99)
    again = train(tiny_recipe, tiny_scenes)
    assert again.epochs == trained.epochs and again.test_map == trained.test_map
    assert same_weights(again.model, trained.model)


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads
def test_worker_processes_change_nothing(tiny_scenes, tiny_recipe, trained):
    again = train(tiny_recipe.override({'workers': '2'}), tiny_scenes)
    assert again.epochs == trained.epochs and same_weights(again.model, trained.model)


def test_another_seed_gives_another_result(tiny_scenes, tiny_recipe, trained):
    assert not same_weights(train(tiny_recipe.override({'seed': '4'}), tiny_scenes).model, trained.model)


def test_the_callers_generators_are_left_alone(tiny_scenes, tiny_recipe):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    train(tiny_recipe.override({'epochs': '1'}), tiny_scenes)
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_training_lowers_the_loss(tiny_scenes, tiny_recipe):
    result = train(tiny_recipe.override({'epochs': '6'}), tiny_scenes)
    losses = [record.train_loss for record in result.epochs]
    assert losses[-1] < 0.9 * losses[0]
    assert [record.epoch for record in result.epochs] == [1, 2, 3, 4, 5, 6]


def test_the_result_is_the_best_epochs_model(tiny_scenes, tiny_recipe):
    # A learning rate this high makes epochs worse as well as better.
    changes = {'epochs': '5', 'optimizer.lr': '0.1', 'schedule.name': 'constant'}
    result = train(tiny_recipe.override(changes), tiny_scenes)
    maps = [record.val_map for record in result.epochs]
    assert result.val_map == max(maps) and result.best_epoch == 1 + maps.index(max(maps))
    assert maps[-1] < max(maps), 'choose settings under which the last epoch is not the best'
    splits = read_splits(tiny_scenes)
    assert not result.model.training
    assert evaluate(result.model, splits.val)['map'] == pytest.approx(result.val_map, abs=1e-6)
    assert evaluate(result.model, splits.test)['map'] == pytest.approx(result.test_map, abs=1e-6)


def test_averaged_weights_are_kept_when_asked_for(tiny_scenes, tiny_recipe, trained):
    averaged = train(tiny_recipe.override({'ema_decay': '0.5'}), tiny_scenes)
    assert [record.train_loss for record in averaged.epochs] == [record.train_loss for record in trained.epochs]
    assert not same_weights(averaged.model, trained.model)
    splits = read_splits(tiny_scenes)
    assert evaluate(averaged.model, splits.test)['map'] == pytest.approx(averaged.test_map, abs=1e-6)


def test_memory_layout_is_plain_at_the_end(trained):
    assert all(tensor.is_contiguous() for tensor in trained.model.state_dict().values())


def test_callbacks_see_every_step_and_epoch(tiny_scenes, tiny_recipe, trained):
    steps, epochs = [], []
    train(tiny_recipe, tiny_scenes, on_step=steps.append, on_epoch=epochs.append)
    assert [(step.epoch, step.step, step.steps, step.images) for step in steps] == [
        (epoch, step, 4, 16) for epoch in (1, 2) for step in (1, 2, 3, 4)]  # 72 pictures, batches of 16
    assert tuple(epochs) == trained.epochs
    for record in epochs:
        of_epoch = steps[4 * (record.epoch - 1):4 * record.epoch]
        assert record.train_loss == pytest.approx(sum(step.loss for step in of_epoch) / 4)
        assert record.lr == of_epoch[-1].lr and record.seconds > 0
        assert record.images_per_second == pytest.approx(64 / record.seconds)


def test_numbers_as_json(trained):
    numbers = json.loads(trained.to_json())
    assert numbers['metric'] == 'map' and numbers['unseen'] == {}
    assert numbers['test']['map'] == trained.test_map and numbers['val']['map'] == trained.val_map
    assert numbers['best_epoch'] == trained.best_epoch and len(numbers['epochs']) == 2
    assert set(numbers['epochs'][0]) == {
        'epoch', 'lr', 'train_loss', 'val_map', 'val_micro_f1', 'val_macro_f1', 'val_loss', 'seconds',
        'images_per_second'}


def test_a_loss_that_is_not_finite_stops_the_run(tiny_scenes, tiny_recipe):
    with pytest.raises(TrainingError, match=(
            r'the loss became (nan|inf) in epoch \d, step \d of 4, at learning rate 1e\+30; lower optimizer.lr')):
        train(
            tiny_recipe.override({'optimizer.lr': '1e30', 'schedule.name': 'constant', 'schedule.warmup_epochs': '0'}),
            tiny_scenes)


def test_too_few_pictures_for_a_batch(tiny_scenes, tiny_recipe):
    with pytest.raises(ValueError, match='batch_size must be at most the number of training pictures, got 80 for 72'):
        train(tiny_recipe.override({'batch_size': '80'}), tiny_scenes)


def test_splits_must_agree_on_labels(tiny_scenes, tmp_path):
    folder = shutil.copytree(tiny_scenes, tmp_path / 'scenes')
    file = folder / 'annotations' / 'instances_val.json'
    file.write_text(file.read_text().replace('red 9', 'crimson 9'))
    with pytest.raises(ValueError, match="has labels that are not among the 20 given ones: 'crimson 9'"):
        read_splits(folder)


def test_a_split_need_not_show_each_label(tmp_path):
    for name in ('train/ant', 'train/bee', 'train/cat', 'val/cat', 'val/ant'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    splits = read_splits(tmp_path)
    assert splits.label_names == splits.val.label_names == ('ant', 'bee', 'cat')
    assert splits.val.targets.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_map_is_the_exact_one(tiny_scenes, trained):
    records = read_splits(tiny_scenes).test
    loader = build_eval_loader(records, trained.model, batch_size=7)
    with torch.no_grad():
        scores = torch.cat([trained.model(images) for images, _ in loader])
    want = 100 * np.mean([
        average_precision_score(records.targets[:, label], scores[:, label]) for label in range(20)])
    assert evaluate(trained.model, records, batch_size=7)['map'] == pytest.approx(want, abs=1e-9)


def test_evaluation_leaves_the_mode_as_found(tiny_scenes, trained):
    model = copy.deepcopy(trained.model).train()
    evaluate(model, read_splits(tiny_scenes).val)
    assert model.training


def test_evaluation_checks_the_number_of_labels(tiny_scenes, trained):
    records = read_splits(tiny_scenes).val
    fewer = MultiLabelRecords(records.image_paths, records.targets[:, :19], records.label_names[:19])
    with pytest.raises(ValueError, match='must have one output a label, got 20 outputs for 19 labels'):
        evaluate(trained.model, fewer)


def test_the_learning_rate_warms_up_and_falls(tiny_recipe):
    model = torch.nn.Linear(2, 2)
    recipe = tiny_recipe.override({'epochs': '4'})
    optimizer = build_optimizer(recipe, model)
    scheduler = build_scheduler(recipe, optimizer, steps_per_epoch=10)
    rates = []
    for step in range(40):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step_update(step + 1)
    assert rates[0] == 0 and rates[5] == pytest.approx(0.01 * (1 + math.cos(math.pi * 5 / 40)) / 2)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 1e-4


def test_biases_and_norms_are_not_decayed(tiny_recipe):
    model = build_model(tiny_recipe, NAMES)
    optimizer = build_optimizer(tiny_recipe, model)
    decayed = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for parameter in model.parameters():
        assert decayed[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0)


def test_training_pictures_are_shuffled_and_augmented_anew_every_epoch(tiny_scenes, tiny_recipe):
    with seeded(0):
        model = build_model(tiny_recipe, NAMES)
    loader = build_train_loader(tiny_recipe, read_splits(tiny_scenes).train, model)
    epochs = []
    for epoch in (0, 1, 0):
        epochs.append(torch.cat([batch.images for batch in loader.batches(epoch)]))
    assert epochs[0].shape == (64, 3, 32, 32) and 0 <= epochs[0].min() and epochs[0].max() <= 1
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_training_names_every_epoch_to_its_loader(tiny_scenes, tiny_recipe, monkeypatch):
    seen, real = [], EpochLoader.batches

    def spy(loader, epoch, start):
        seen.append(epoch)
        return real(loader, epoch, start)

    monkeypatch.setattr(EpochLoader, 'batches', spy)
    train(tiny_recipe, tiny_scenes)
    assert seen == [0, 1]


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')  # inside the compiler
def test_a_compiled_network_trains_as_it_is_and_goes_on(tiny_scenes, tiny_recipe, tmp_path, monkeypatch):
    calls, compile_network = [], torch.compile

    def spy(*args, **settings):
        calls.append(args)
        return compile_network(*args, **settings)

    monkeypatch.setattr(torch, 'compile', spy)
    recipe = tiny_recipe.override({**PLAIN, 'ema_decay': '0.5'})
    want = train(recipe, tiny_scenes)
    assert not calls
    compiled = recipe.override({'torchcompile': 'true'})
    first = train(compiled.override({'stop_epoch': '1'}), tiny_scenes, output=tmp_path / 'run')
    assert len(first.epochs) == 1
    found = train(compiled, tiny_scenes, output=tmp_path / 'run', resume='auto')
    assert len(calls) >= 2
    assert found.model.state_dict().keys() == want.model.state_dict().keys()
    for name, tensor in want.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert found.test_map == pytest.approx(want.test_map, abs=1.0)  # scores that differ by rounding change places
