"""From a recipe to its parts: whose settings win, and what is found wrong before anything is trained."""
import pytest
import torch
from timm.data import resolve_model_data_config

from timm_miil._errors import RecipeError
from timm_miil.train import build, load_recipe, read_splits, train
from timm_miil.train.build import build_model

LABELS = ['a', 'b']
PRIOR = {
    'loss.name': 'class_aware_selective', 'loss.args': '{}',
    'partial': '{scheme = "random_per_sample", drop_prob = 0.5}',
    'prior': '{epochs = 1, loss = {name = "bce", args = {ignore_unknown = true}}}'}


def test_the_size_of_the_recipe_wins_over_the_models(tiny_recipe):
    assert resolve_model_data_config(build_model(tiny_recipe, LABELS))['input_size'] == [3, 32, 32]
    larger = build_model(tiny_recipe.override({'augment.image_size': '64'}), LABELS)
    assert resolve_model_data_config(larger)['input_size'] == (3, 64, 64)


def test_evaluation_keeps_the_part_that_the_recipe_says(tiny_recipe):
    plain = resolve_model_data_config(build_model(tiny_recipe, LABELS))
    found = resolve_model_data_config(build_model(tiny_recipe.override({'augment.crop_pct': '0.95'}), LABELS))
    assert plain['crop_pct'] == 1.0 and found == {**plain, 'crop_pct': 0.95}


@pytest.mark.parametrize('changes', [
    {'augment.name': 'paper'}, {'augment.image_size': '96'},
    {'model.args.pretrained_cfg_overlay': '{input_size = [3, 96, 96], crop_pct = 1.0}'}])
def test_tests_are_on_pictures_of_the_trained_size(changes):
    plain = load_recipe('finetune').override({'model.args.pretrained_backbone': 'false', 'augment.name': 'crop'})
    model = build_model(plain, LABELS)
    assert resolve_model_data_config(model, use_test_size=True)['input_size'] == (3, 288, 288)
    model = build_model(plain.override(changes), LABELS)
    trained = resolve_model_data_config(model)
    assert resolve_model_data_config(model, use_test_size=True) == trained
    assert trained['crop_mode'] == ('squash' if 'augment.name' in changes else 'center')


def test_a_file_of_other_weights_is_told_in_few_words(tiny_recipe, tmp_path):
    torch.save(build_model(tiny_recipe, LABELS[:-1]).state_dict(), tmp_path / 'weights.pth')
    recipe = tiny_recipe.override({'model.args.checkpoint_path': str(tmp_path / 'weights.pth')})
    build_model(recipe, LABELS[:-1])
    with pytest.raises(ValueError, match=r"checkpoint_path must be weights of .*, got '.*weights.pth': .* other class"):
        build_model(recipe, LABELS)


def test_pictures_to_learn_from_have_an_interpolation_of_their_own(tiny_recipe, tiny_scenes, monkeypatch):
    seen, splits = [], read_splits(tiny_scenes)
    monkeypatch.setattr(build, 'create_transform', lambda **kwargs: seen.append(kwargs['interpolation']))
    for args in ({}, {'augment.args.interpolation': 'lanczos'}):
        recipe = tiny_recipe.override({'augment.name': 'timm', **args})
        model = build_model(recipe, splits.label_names)
        build.build_train_loader(recipe, splits.train, model)
    assert seen == [model.pretrained_cfg['interpolation'], 'lanczos'] and seen[0] != 'lanczos'
    with pytest.raises(RecipeError, match="augment.args.interpolation must be one of 'nearest', .* got 'cubic'"):
        tiny_recipe.override({'augment.name': 'timm', 'augment.args.interpolation': 'cubic'})


def test_what_the_model_is_told_wins_over_squishing(tiny_recipe):
    overlay = '{input_size = [3, 32, 32], crop_mode = "border"}'
    model = build_model(
        tiny_recipe.override({'augment.name': 'paper', 'augment.scale': '[0.08, 1.0]',
                              'model.args.pretrained_cfg_overlay': overlay}), LABELS)
    assert resolve_model_data_config(model)['crop_mode'] == 'border'


def test_a_wrong_loss_is_found_before_the_temporary_network_trains(tiny_recipe, tiny_scenes, tmp_path):
    steps = []
    recipe = tiny_recipe.override({**PRIOR, 'loss.args': '{gamma_positive = 1.0}'})
    with pytest.raises(TypeError, match='gamma_positive'):
        train(recipe, tiny_scenes, output=tmp_path / 'run', on_step=steps.append)
    assert not steps and not (tmp_path / 'run').exists()


def test_the_temporary_networks_steps_are_told(tiny_recipe, tiny_scenes):
    steps = []
    train(tiny_recipe.override({**PRIOR, 'epochs': '1'}), tiny_scenes, on_step=steps.append)
    count = steps[0].steps
    assert [step.is_prior for step in steps] == [True] * count + [False] * count


def test_weights_that_cannot_be_had_are_one_error(tiny_recipe):
    recipe = tiny_recipe.override({
        'model.name': 'resnet10t', 'model.pretrained': 'true',
        'model.args': '{pretrained_cfg_overlay = {url = "http://127.0.0.1:9/weights.pth", hf_hub_id = ""}}'})
    with pytest.raises(OSError, match='^the weights that resnet10t starts from could not be had: .*; check the net'
                                      r'work, or start at random .model.pretrained = false'):
        build_model(recipe, LABELS)
