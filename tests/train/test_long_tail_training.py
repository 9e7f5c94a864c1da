"""Long-tailed labels that are partly missing: from the recipe to the task, resumed to the bit, and saved plain."""
import shutil

import pytest
import torch
from torch import nn

from timm_miil._errors import RecipeError
from timm_miil.losses import MultiFocalModifierLoss
from timm_miil.models import MLDecoderClassifier
from timm_miil.tasks import ComicTask, PositiveUnlabeledTask, kept_network
from timm_miil.train import train
from timm_miil.train._task_parts import TaskParts
from timm_miil.train.build import build_model, build_task
from timm_miil.train.checkpoint import list_checkpoints, newest_checkpoint
from timm_miil.train.methods import build_method_task

PARTIAL = {'partial': '{scheme = "positives_only", drop_prob = 0.3}'}
COMIC = PARTIAL | {
    'loss': '{name = "multi_focal_modifier", args = {ignore_unknown = true}}',
    'balanced': '{warmup_epochs = 0.5, correct_threshold = 0.2, distill_loss_weight = 0.5}'}
PU = PARTIAL | {
    'loss': '{name = "pu_multilabel", args = {reduction = "mean"}}', 'positive_unlabeled': '{mixup_alpha = 0.5}'}
CHANGES = {'comic': COMIC, 'pu': PU}
NAMES = [f'thing {number}' for number in range(4)]


def weights_of(result):
    return list(result.model.state_dict().values())


@pytest.mark.parametrize('method', CHANGES)
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(tiny_scenes, tiny_recipe, tmp_path, method):
    recipe = tiny_recipe.override(
        CHANGES[method] | {'epochs': '1', 'checkpoint_steps': '1', 'keep_checkpoints': '9', 'ema_decay': '0.5'})
    whole = train(recipe, tiny_scenes, output=tmp_path / 'whole')
    assert type(whole.model) is MLDecoderClassifier
    _, state = newest_checkpoint(tmp_path / 'whole' / 'checkpoints')
    if method == 'comic':
        assert state['model']['corrector.num_steps'] == 4 and 'tail.group_fc.bias' in state['model']
    early = list_checkpoints(tmp_path / 'whole' / 'checkpoints')[-1]
    folder = shutil.copytree(tmp_path / 'whole', tmp_path / 'resumed')
    steps = []
    resumed = train(
        recipe, tiny_scenes, output=folder, resume=folder / 'checkpoints' / early.name, on_step=steps.append)
    assert len(steps) == 3 and resumed.epochs == whole.epochs
    assert all(torch.equal(*pair) for pair in zip(weights_of(resumed), weights_of(whole), strict=True))


def test_a_recipe_decides_the_task(tiny_recipe):
    recipe = tiny_recipe.override(COMIC | {
        'grad_accum_steps': '2', 'balanced.tail_exponent': '0.75', 'balanced.unknown_is_absent': 'false'})
    model = build_model(recipe, NAMES)
    task = build_task(
        recipe, model, torch.device('cpu'), criterion=MultiFocalModifierLoss(torch.arange(1, 5)), num_train=75,
        label_names=NAMES, class_counts=torch.arange(1, 5))
    assert isinstance(task, ComicTask) and kept_network(task.trainable_module) is model
    corrector = task.trainable_module.corrector
    assert (corrector.warmup_steps, corrector.threshold) == (4, 0.2)  # half of four steps, of two parts each
    assert (task.head_criterion.exponent, task.tail_criterion.exponent) == (0.0, 0.75)
    assert (task.distill_loss_weight, task.unknown_is_absent) == (0.5, False)
    bare = build_task(
        recipe.override({'balanced.balance': 'false'}), model, torch.device('cpu'), num_train=75,
        criterion=MultiFocalModifierLoss(torch.arange(1, 5)))
    assert bare.trainable_module.head is None

    task = build_task(tiny_recipe.override(PU), model, torch.device('cpu'))
    assert isinstance(task, PositiveUnlabeledTask)
    assert (task.mixup_alpha, task.consistency_weight, task.criterion.reduction) == (0.5, 1.0, 'mean')


def test_a_stream_cannot_be_balanced(tiny_recipe):
    parts = TaskParts(tiny_recipe.override(COMIC), nn.Identity(), torch.device('cpu'), MultiFocalModifierLoss([1, 2]))
    with pytest.raises(ValueError, match='balanced needs the number of training pictures .* which a stream does not'):
        build_method_task(parts)


@pytest.mark.parametrize(('changes', 'words'), [
    (COMIC | {'task': 'single_label'}, "balanced is for task 'multi_label', got 'single_label'; leave it out"),
    (COMIC | {'loss.name': 'asymmetric'}, "balanced is for the loss 'multi_focal_modifier', got 'asymmetric'; set"),
    (COMIC | {'teacher.name': 'resnet10t'}, 'balanced and teacher must not both be given; leave one out'),
    (COMIC | {'balanced.correct_threshold': '2'}, r'balanced.correct_threshold must be in \[0, 1\], got 2'),
    (COMIC | {'balanced.warmup_epochs': '-1'}, r'balanced.warmup_epochs must be in \[0, inf\), got -1'),
    (PU | {'loss.name': 'bce'}, "positive_unlabeled is for the loss 'pu_multilabel', got 'bce'"),
    (PU | {'loss.args': '{}'}, "loss.args.reduction must be 'mean' with positive_unlabeled: this loss is one of a"),
    (PU | {'positive_unlabeled.mixup_alpha': '0'}, 'positive_unlabeled.mixup_alpha must be in'),
    (PU | {'positive_unlabeled.consistency_weight': '-1'}, 'positive_unlabeled.consistency_weight must be in'),
    (COMIC | PU, 'may be given, got balanced and positive_unlabeled; leave the others out'),
])
def test_tables_that_do_not_fit(tiny_recipe, changes, words):
    with pytest.raises((RecipeError, ValueError), match=words):
        tiny_recipe.override(changes)
