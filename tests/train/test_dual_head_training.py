"""Training a second head beside the network: from the recipe to the task, without labels, resumed, saved plain."""
import dataclasses
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_miil._errors import RecipeError
from timm_miil.data import MultiLabelRecords
from timm_miil.tasks import DualHead, DualHeadTask, LabelAugmentation, LabelAugmentationTask
from timm_miil.train import Splits, evaluate, load_recipe, train
from timm_miil.train.build import build_model, build_task
from timm_miil.train.checkpoint import list_checkpoints, newest_checkpoint
from timm_miil.train.splits import prepare_splits
from timm_miil.train.teaching import build_teacher

CPU = torch.device('cpu')
NAMES = [f'thing {number}' for number in range(4)]
NETWORK = {
    'task': 'single_label', 'loss': '{name = "cross_entropy"}', 'model': '{name = "test_resnet"}',
    'augment.image_size': '32', 'epochs': '1'}
TEACHER = {'teacher': '{name = "test_resnet", pretrained = false, precision = "fp32", image_size = 32, '
                      'temperature = 2.0, distill_loss_weight = 0.1}'}
DUAL = NETWORK | TEACHER | {'dual_head': '{hidden = 8}'}
FEW = {'partial': '{scheme = "labelled_per_class", num_per_class = 1}'}
SLA = NETWORK | {'label_augmentation': '{self_distillation = true}'}


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    """Squares of noise of four labels, some darker than others."""
    folder = tmp_path_factory.mktemp('squares')
    generator = np.random.default_rng(0)
    targets = torch.eye(len(NAMES), dtype=torch.int8)[torch.arange(70) % len(NAMES)]
    paths = []
    for number, target in enumerate(targets):
        pixels = generator.integers(0, 60 * (1 + int(target.argmax())), (32, 32, 3), dtype=np.uint8)
        paths.append(folder / f'{number}.png')
        Image.fromarray(pixels).save(paths[-1])
    records = MultiLabelRecords(paths, targets, NAMES)
    return Splits(records.select(range(50)), records.select(range(50, 70)))


def task_of(recipe):
    model = build_model(recipe, NAMES)
    return model, build_task(recipe, model, CPU, teacher=build_teacher(recipe, NAMES, model, CPU))


def test_a_recipe_decides_the_second_head(tiny_recipe):
    recipe = tiny_recipe.override(
        DUAL | {'dual_head': '{mode = "softmax", hidden = 8, normalize = true, scale = 100.0}'})
    network, task = task_of(recipe)
    model, loss = task.trainable_module, task.distillation
    assert isinstance(task, DualHeadTask) and isinstance(model, DualHead) and model.network is network
    assert (model.normalize, model.scale, model.aux_head[0].out_features) == (True, 100.0, 8)
    assert (loss.mode, loss.temperature, loss.weight) == ('softmax', 2.0, 0.1)
    network, task = task_of(tiny_recipe.override(DUAL | {'dual_head': '{same_head = true}'}))
    assert isinstance(task, DualHeadTask) and task.trainable_module is network and not task.has_two_heads


def test_a_recipe_decides_the_transforms(tiny_recipe):
    table = '{transforms = "colour_permutation", self_distillation = true, joint_loss_weight = 6.0, temperature = 3.0}'
    network, task = task_of(tiny_recipe.override(SLA | {'label_augmentation': table}))
    model = task.trainable_module
    assert isinstance(task, LabelAugmentationTask) and isinstance(model, LabelAugmentation)
    assert model.network is network and model.transforms == 'colour_permutation' and model.self_distillation
    assert (task.joint_loss_weight, task.distillation.temperature) == (6.0, 3.0)
    assert task_of(tiny_recipe.override(SLA | {'label_augmentation': '{}'}))[1].distillation is None


@pytest.mark.parametrize('changes', [DUAL | FEW, SLA], ids=['dual_head', 'label_augmentation'])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped_and_saves_the_network(
        splits, tiny_recipe, tmp_path, changes):
    recipe = tiny_recipe.override(
        changes | {'checkpoint_steps': '1', 'keep_checkpoints': '9', 'ema_decay': '0.5'})
    whole = train(recipe, splits, output=tmp_path / 'whole')
    _, state = newest_checkpoint(tmp_path / 'whole' / 'checkpoints')
    assert {name.partition('.')[0] for name in state['model']} == {
        'network', 'aux_head' if 'dual_head' in changes else 'joint_head'}
    early = list_checkpoints(tmp_path / 'whole' / 'checkpoints')[-1]
    folder = shutil.copytree(tmp_path / 'whole', tmp_path / 'resumed')
    steps = []
    resumed = train(
        recipe, splits, output=folder, resume=folder / 'checkpoints' / early.name, on_step=steps.append)
    assert len(steps) == 2 and resumed.epochs == whole.epochs
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    plain = timm.create_model('test_resnet', num_classes=len(NAMES))
    assert type(whole.model) is type(plain) and first.keys() == plain.state_dict().keys()
    assert evaluate(whole.model, splits.val, task='single_label')['top1'] == whole.epochs[0].metrics['top1']


def test_pictures_without_a_label_are_taken_only_with_a_second_head(splits, tiny_recipe):
    recipe = tiny_recipe.override(DUAL | FEW)
    train_split = prepare_splits(recipe, splits).train
    shown = (train_split.targets == 1).sum(0)
    assert torch.equal(shown, (splits.train.targets == 1).sum(0).clamp(max=1))
    unlabelled = dataclasses.replace(splits, train=train_split)
    assert prepare_splits(recipe.override({'partial': 'none'}), unlabelled).train is train_split
    message = r"task 'single_label' needs exactly one present label a picture, got 0 in train"
    with pytest.raises(ValueError, match=message):
        prepare_splits(tiny_recipe.override(NETWORK), unlabelled)
    with pytest.raises(ValueError, match=message.replace('train', 'val')):
        prepare_splits(recipe, dataclasses.replace(splits, val=train_split))


@pytest.mark.parametrize('changes, message', [
    (DUAL | {'teacher': 'none'}, r'dual_head needs the table teacher, got none; name one by teacher.name'),
    (DUAL | {'teacher.task_loss_weight': '0.5'}, r'teacher.task_loss_weight must be 1 with dual_head, got 0.5; weigh'),
    (DUAL | {'loss.args': '{smoothing = 0.1}'}, r"loss must be the plain 'cross_entropy' with dual_head, got 'cross_e"),
    (DUAL | {'loss.name': 'bce'}, r"loss must be the plain 'cross_entropy' with dual_head, got 'bce'"),
    (DUAL | {'task': 'multi_label'}, r"dual_head is for task 'single_label', got 'multi_label'"),
    (DUAL | {'augment.name': 'timm', 'augment.args.mixup': '{mixup_alpha = 1.0}'}, r'augment.args.mixup must be left'),
    (DUAL | {'dual_head': '{same_head = true, hidden = 8}'}, r'hidden, normalize and scale are of a second head; leav'),
    (DUAL | {'dual_head.mode': 'hinge'}, r"mode must be one of 'binary', 'softmax', got 'hinge'"),
    (DUAL | {'dual_head.hidden': '-1'}, r'hidden must be at least 0, got -1'),
    (DUAL | {'dual_head.scale': '0.0'}, r'scale must be in \(0, inf\), got 0.0'),
    (NETWORK | FEW, r"partial.scheme 'labelled_per_class' needs the table dual_head, by which a teacher teaches"),
    (DUAL | {'partial': '{scheme = "labelled_per_class"}'}, r'num_per_class must be at least 1, got 0'),
    (SLA | TEACHER, r'teacher must be left out with label_augmentation'),
    (SLA | {'loss.name': 'bce'}, r"loss must be the plain 'cross_entropy' with label_augmentation, got 'bce'"),
    (SLA | {'label_augmentation.transforms': 'flip'}, r"transforms must be one of 'rotation', 'colour_permutation'"),
    (SLA | {'label_augmentation.temperature': '0.0'}, r'temperature must be in \[0.001, 1000\], got 0.0'),
    (SLA | {'label_augmentation.joint_loss_weight': '0.0'}, r'joint_loss_weight must be in \(0, inf\), got 0.0'),
    (SLA | {'label_augmentation': '{temperature = 2.0}'}, r'temperature is of self_distillation, got 2.0 without it'),
    (SLA | TEACHER | {'dual_head': '{}'}, r'got dual_head and label_augmentation; leave the others out'),
])
def test_settings_that_contradict_each_other_are_refused(tiny_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe.override(changes)


@pytest.mark.parametrize('name, other, changed', [
    ('scenes_dhkd', 'scenes_same_head', {'dual_head'}),
    ('scenes_sla', 'scenes_sla_sd', {'label_augmentation'})])
def test_arms_differ_in_the_method_alone(name, other, changed):
    recipes = [load_recipe(each) for each in (name, other)]
    assert {field.name for field in dataclasses.fields(recipes[0])
            if len({repr(getattr(recipe, field.name)) for recipe in recipes}) > 1} == changed | {'summary'}


def test_the_published_settings():
    dhkd, same, dho = (load_recipe(f'scenes_{name}') for name in ('dhkd', 'same_head', 'dho'))
    for recipe, mode in ((dhkd, 'binary'), (same, 'binary'), (dho, 'softmax')):
        assert (recipe.teacher.temperature, recipe.teacher.distill_loss_weight, recipe.dual_head.mode) == (2, 1, mode)
    assert same.dual_head.same_head and not dhkd.dual_head.same_head
