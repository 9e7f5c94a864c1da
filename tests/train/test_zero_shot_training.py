"""Training without some labels: nothing is learnt from their pictures, and a zero-shot network is asked for them."""
import dataclasses
import json

import pytest
import torch

from timm_miil._errors import RecipeError
from timm_miil.data import MultiLabelRecords
from timm_miil.tasks import MultiLabelTask, ZeroShotTask
from timm_miil.train import Splits, evaluate, hold_out, read_splits, train
from timm_miil.train.build import build_model, build_task, with_labels

UNSEEN = ('red 2', 'red 7')


@pytest.fixture(scope='module')
def splits(tiny_scenes):
    return read_splits(tiny_scenes)


@pytest.fixture
def zero_shot_recipe(tiny_recipe):
    return tiny_recipe.override({
        'task': 'zero_shot', 'model.name': 'mldecoder_zero_shot', 'unseen_labels': '["red 2", "red 7"]'})


def found_by(model, records):
    return pytest.approx(evaluate(model, records, batch_size=16)['map'], abs=1e-6)


def shown(records):
    return [
        (path.name, {label for label, is_shown in zip(records.label_names, row) if is_shown})
        for path, row in zip(records.image_paths, records.targets.tolist())]


def test_held_out_labels_are_in_no_picture_that_is_learnt_from(splits):
    held = hold_out(splits, UNSEEN)
    for split in ('train', 'val'):
        before, after = shown(getattr(splits, split)), shown(getattr(held, split))
        assert after == [(name, labels) for name, labels in before if not labels & set(UNSEEN)]
        assert 0 < len(after) < len(before)
    assert held.label_names == tuple(label for label in splits.label_names if label not in UNSEEN)
    assert held.test is splits.test


def test_holding_out_nothing_keeps_everything(splits):
    held = hold_out(splits, [])
    assert shown(held.train) == shown(splits.train) and shown(held.val) == shown(splits.val)


@pytest.mark.parametrize(('labels', 'message'), [
    (['red 11'], "unseen_labels must be distinct labels of the data, got 'red 11'; did you mean 'red 1'"),
    (['red 1', 'red 1'], "unseen_labels must be distinct labels of the data, got 'red 1'"),
])
def test_labels_that_cannot_be_held_out(splits, labels, message):
    with pytest.raises(ValueError, match=message):
        hold_out(splits, labels)


def test_something_must_be_left_to_learn(splits):
    names = splits.label_names
    with pytest.raises(ValueError, match='must leave pictures and labels, got 20 of 20 labels, which leave 0 pict'):
        hold_out(splits, names)
    one = MultiLabelRecords(splits.val.image_paths[:1], splits.val.targets[:1], names)
    label = names[int(one.targets[0].argmax())]
    with pytest.raises(ValueError, match='got 1 of 20 labels, which leave 0 pictures in val; hold out fewer labels'):
        hold_out(Splits(splits.train, one, splits.test), [label])


def test_columns_are_those_of_the_names(splits):
    records = with_labels(splits.test, ['red 7', 'digit 0'])
    assert records.label_names == ('red 7', 'digit 0') and records.image_paths == splits.test.image_paths
    assert torch.equal(records.targets, splits.test.targets[:, [17, 0]])


def test_a_zero_shot_network_is_tested_on_labels_it_never_saw(tiny_scenes, splits, zero_shot_recipe):
    result = train(zero_shot_recipe.override({'model.args.num_random_queries': '3'}), tiny_scenes)
    seen = hold_out(splits, UNSEEN).label_names
    assert result.label_names == seen and result.model.num_classes == 18 and result.model.labels == seen
    assert result.test_map == found_by(result.model, with_labels(splits.test, seen))
    held = hold_out(splits, UNSEEN)
    assert result.val_map == found_by(result.model, held.val)
    result.model.set_labels(UNSEEN)
    assert result.unseen_map == found_by(result.model, with_labels(splits.test, UNSEEN))
    assert json.loads(result.to_json())['unseen']['map'] == result.unseen_map


def test_averaged_weights_find_unseen_labels_too(tiny_scenes, splits, zero_shot_recipe):
    result = train(zero_shot_recipe.override({'ema_decay': '0.5', 'epochs': '1'}), tiny_scenes)
    result.model.set_labels(UNSEEN)
    assert result.unseen_map == found_by(result.model, with_labels(splits.test, UNSEEN))


def test_without_unseen_labels_there_is_no_such_figure(tiny_scenes, zero_shot_recipe):
    result = train(zero_shot_recipe.override({'unseen_labels': '[]', 'epochs': '1'}), tiny_scenes)
    assert result.unseen_map is None and len(result.label_names) == 20


def test_a_plain_network_trains_without_the_unseen_labels(tiny_scenes, splits, tiny_recipe):
    recipe = tiny_recipe.override({'unseen_labels': '["red 2", "red 7"]', 'epochs': '1'})
    result = train(recipe, tiny_scenes)
    seen = hold_out(splits, UNSEEN).label_names
    assert result.label_names == seen and result.unseen_map is None and result.model.num_classes == 18
    assert result.test_map == found_by(result.model, with_labels(splits.test, seen))


def test_the_recipe_names_the_task(tiny_recipe, zero_shot_recipe):
    cpu = torch.device('cpu')
    for recipe, kind in ((tiny_recipe, MultiLabelTask), (zero_shot_recipe, ZeroShotTask)):
        task = build_task(recipe, build_model(recipe, ['red 1', 'red 2']), cpu)
        assert type(task) is kind and task.trainable_module.num_classes == 2


def test_a_network_without_words_is_refused(zero_shot_recipe):
    recipe = zero_shot_recipe.override({'model.name': 'test_resnet', 'model.args': '{}'})
    with pytest.raises(ValueError, match="such as 'mldecoder_zero_shot' or 'miil_sdl', got 'test_resnet'"):
        build_model(recipe, ['red 1', 'red 2'])


def test_a_file_of_words_that_is_not_there_is_named_with_its_setting(zero_shot_recipe):
    recipe = zero_shot_recipe.override({'zero_shot.word_vectors': 'lost.vec'})
    with pytest.raises(FileNotFoundError, match="zero_shot.word_vectors must be a file .*got 'lost.vec'"):
        build_model(recipe, ['red 1', 'red 2'])


def test_the_settings_have_defaults_and_types(tiny_recipe):
    assert tiny_recipe.task == 'multi_label' and tiny_recipe.unseen_labels == ()
    changed = tiny_recipe.override({'unseen_labels': '["a", "b"]', 'task': 'zero_shot'})
    assert changed == dataclasses.replace(tiny_recipe, unseen_labels=('a', 'b'), task='zero_shot')
    for changes, message in (
            ({'unseen_labels': '["a", 2]'}, "override: 'unseen_labels' must be text, got 2"),
            ({'unseen_labels': 'red 2'}, "override: 'unseen_labels' must be a list of texts, got 'red 2'"),
            ({'task': 'zeroshot'}, "override: task must be one of 'multi_label', .*'zero_shot', got 'zeroshot'"),
            ({'model.args.labels': '["a"]'}, 'override: model.args must not hold labels: training decides it')):
        with pytest.raises(RecipeError, match=message):
            tiny_recipe.override(changes)
