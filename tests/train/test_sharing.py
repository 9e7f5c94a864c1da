"""Classifier sharing in recipes: the table, what is trained and kept, and the three trainings of SH-KD."""
import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from timm_miil._errors import RecipeError
from timm_miil.data import seeded
from timm_miil.losses import embedding_distillation_loss
from timm_miil.train import Splits, load_recipe, read_splits, train
from timm_miil.train.build import build_model, build_task
from timm_miil.train.checkpoint import list_checkpoints
from timm_miil.train.sharing import aware_teacher_recipe
from timm_miil.train.teaching import build_teacher

CPU = torch.device('cpu')
PIXELS = '{input_size = [3, 32, 32], fixed_input_size = false, mean = [0.0, 0.0, 0.0], std = [1.0, 1.0, 1.0]}'
STUDENT = {
    'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}', 'model.name': 'test_resnet',
    'model.args': f'{{channels = [8, 8, 8, 16], drop_rate = 0.1, pretrained_cfg_overlay = {PIXELS}}}'}
TEACHER = {
    'teacher.name': 'test_resnet', 'teacher.pretrained': 'false', 'teacher.precision': 'fp32',
    'teacher.args': f'{{channels = [8, 8, 16, 16], pretrained_cfg_overlay = {PIXELS}}}'}
THKD = {**STUDENT, **TEACHER, 'sharing.head_loss_weight': '0.02'}
SHKD = {**STUDENT, **TEACHER, 'sharing.scheme': 'shkd'}
CONTRAST = {'sharing.contrast_loss_weight': '0.8', 'sharing.num_negatives': '4'}
MIXED = {'augment.name': 'timm', 'augment.args.mixup': '{mixup_alpha = 0.8}'}


@pytest.fixture(scope='module')
def one_label(tiny_tree):
    found = read_splits(tiny_tree)
    return Splits(found.train.select(range(0, 100, 3)), found.val.select(range(0, 100, 20)))


@pytest.fixture(scope='module')
def teacher_folder(tmp_path_factory, one_label):
    """A network whose scores differ from picture to picture."""
    folder = tmp_path_factory.mktemp('teacher')
    with seeded(1):
        model = timm.create_model(
            'test_resnet', num_classes=len(one_label.label_names), channels=(8, 8, 16, 16),
            pretrained_cfg_overlay={'input_size': (3, 32, 32), 'fixed_input_size': False})
        nn.init.normal_(model.fc.weight)
    timm.models.save_for_hf(
        model, str(folder), safe_serialization=True, model_config={'label_names': list(one_label.label_names)},
        model_args={'channels': (8, 8, 16, 16)})
    return {'teacher.name': f'local-dir:{folder}', 'teacher.pretrained': 'true', 'teacher.args': '{}'}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def changes(name, other):
    one, two = load_recipe(name), load_recipe(other)
    return {field.name for field in dataclasses.fields(one)
            if getattr(one, field.name) != getattr(two, field.name)} - {'summary'}


# ---- the table


@pytest.mark.parametrize(('given', 'message'), [
    ({**THKD, 'sharing.scheme': 'kd'}, "sharing.scheme must be one of 'thkd', 'shkd', 'frozen_head', got 'kd'"),
    ({**THKD, 'sharing.head_loss_weight': '-1'}, r'sharing.head_loss_weight must be in \[0, inf\), got -1'),
    ({**THKD, 'sharing.num_negatives': '0'}, 'sharing.num_negatives must be at least 1, got 0'),
    ({**THKD, 'sharing.head_loss_weight': '0'}, "scheme 'thkd' shares nothing while all weights are 0"),
    ({**THKD, 'sharing.head_loss_weight': '0', 'sharing.adapter': 'true'},
     'adapter is for head_loss_weight and embedding_loss_weight'),
    ({**STUDENT, 'sharing.head_loss_weight': '1'}, 'sharing needs a table teacher'),
    ({**STUDENT, 'sharing.scheme': 'frozen_head', 'sharing.init_head': 'true'}, "'frozen_head' is without a teacher"),
    ({**SHKD, 'sharing.scheme': 'frozen_head'}, "sharing.scheme 'frozen_head' is without a teacher"),
    ({**THKD, 'task': 'multi_label'}, "sharing is for task 'single_label', got 'multi_label'"),
    ({**THKD, 'teacher.cache': 'x', 'sharing.embedding_loss_weight': '1'}, 'teacher.cache keeps logits alone'),
    ({**SHKD, **CONTRAST, 'fsdp': 'true'}, 'sharing.contrast_loss_weight must be 0 with fsdp'),
    ({**SHKD, 'sharing.adapter': 'true', 'sync_bn': 'true'}, 'fsdp and sync_bn must be false with sharing.adapter'),
    ({**SHKD, **CONTRAST, **MIXED}, 'sharing.contrast_loss_weight must be 0 with augment.args.mixup'),
])
def test_tables_that_do_not_fit(tiny_recipe, given, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe.override(given)


def test_the_embeddings_are_summed_over_the_whole_batch(tiny_recipe, one_label, teacher_folder):
    recipe = tiny_recipe.override({
        **THKD, **teacher_folder, 'sharing.embedding_loss_weight': '0.5', 'sharing.head_loss_weight': '0',
        'model.args.drop_rate': '0.0'})
    images, targets = torch.rand(16, 3, 32, 32), torch.eye(33)[:16]
    model = build_model(recipe, one_label.label_names)
    teacher = build_teacher(recipe, one_label.label_names, model, CPU)
    # Statistics of a part are not those of the whole.
    task = build_task(recipe, model, CPU, teacher=teacher).eval()
    with torch.no_grad():
        whole, parts = task(images, targets), [task(images[rows], targets[rows]) for rows in (slice(8), slice(8, 16))]
        embedding = model.forward_head(model.forward_features(images), pre_logits=True)
        want = embedding_distillation_loss(embedding, teacher.answer_with_embedding(images)[1], reduction='sum')
    term = whole['loss'] - whole['task_loss'] - recipe.teacher.distill_loss_weight * whole['kd_loss']
    torch.testing.assert_close(term, 0.5 * want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((parts[0]['loss'] + parts[1]['loss']) / 2, whole['loss'], rtol=1e-5, atol=1e-5)


# ---- TH-KD


def test_a_run_with_contrast_goes_on_to_the_bit_and_keeps_a_plain_model(
        tiny_recipe, one_label, teacher_folder, tmp_path):
    recipe = tiny_recipe.override({
        **THKD, **teacher_folder, **CONTRAST, 'sharing.adapter': 'true', 'sharing.embedding_loss_weight': '0.1',
        'ema_decay': '0.5', 'checkpoint_steps': '1', 'keep_checkpoints': '9'})
    whole = train(recipe, one_label, output=tmp_path / 'whole')
    folder = shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    newest_first = list_checkpoints(folder / 'checkpoints')
    assert len(newest_first) == 4
    again = train(recipe, one_label, output=folder, resume=newest_first[3])
    assert again.epochs == whole.epochs and same_weights(again.model, whole.model)
    plain = timm.create_model('test_resnet', num_classes=33, channels=(8, 8, 8, 16))
    assert whole.model.state_dict().keys() == plain.state_dict().keys()


def test_widths_that_differ_name_both(tiny_recipe, one_label):
    recipe = tiny_recipe.override({**THKD, 'teacher.args.channels': '[8, 8, 8, 24]'})
    model = build_model(recipe, one_label.label_names)
    teacher = build_teacher(recipe, one_label.label_names, model, CPU)
    with pytest.raises(ValueError, match='embeddings of width 24, and the student.s has width 16; .* adapter=True'):
        build_task(recipe, model, CPU, teacher=teacher)
    assert build_task(recipe.override({'sharing.adapter': 'true'}), model, CPU, teacher=teacher)
    contrast = recipe.override({**CONTRAST, 'sharing.head_loss_weight': '0'})
    with pytest.raises(ValueError, match='sharing.contrast_loss_weight must be 0 for a stream'):
        build_task(contrast, model, CPU, teacher=teacher)
    assert build_task(contrast, model, CPU, teacher=teacher, num_train=9).needs_indices


# ---- SH-KD


def best(folder):
    """The weights that a training in this folder gave."""
    return load_file(max((folder / 'checkpoints').glob('best-*')))


def test_a_student_aware_teacher_is_trained_first(tiny_recipe, one_label, tmp_path):
    recipe = tiny_recipe.override({**SHKD, 'checkpoint_steps': '1', 'keep_checkpoints': '9'})
    result = train(recipe, one_label, output=tmp_path / 'whole')
    student, teacher = best(tmp_path / 'whole' / 'student'), best(tmp_path / 'whole' / 'teacher')
    # The student alone is the recipe's without what is shared; the teacher is another network with its last layer.
    alone = train(recipe.override({'teacher': 'none', 'sharing': 'none'}), one_label)
    assert all(torch.equal(tensor, student[name]) for name, tensor in alone.model.state_dict().items())
    assert teacher['layer3.0.conv1.weight'].shape[0] == 16 != student['layer3.0.conv1.weight'].shape[0]
    assert all(torch.equal(teacher[name], student[name]) for name in ('fc.weight', 'fc.bias'))
    # The main training is the one with this teacher's weights in a file.
    save_file(teacher, tmp_path / 'teacher.safetensors')
    given = recipe.override({
        'sharing': 'none', 'teacher.args.checkpoint_path': str(tmp_path / 'teacher.safetensors')})
    assert same_weights(train(given, one_label).model, result.model)
    assert not same_weights(alone.model, result.model)


@pytest.mark.parametrize('steps', [6, 11], ids=['teacher', 'main'])
def test_three_trainings_go_on_from_wherever_they_were(tiny_recipe, one_label, tmp_path, steps, whole_run):
    recipe, whole = whole_run
    seen = []

    def stop(record):
        seen.append(record)
        if len(seen) == steps:
            raise RuntimeError('enough')

    with pytest.raises(RuntimeError, match='enough'):
        train(recipe, one_label, output=tmp_path, on_step=stop)
    assert bool(list_checkpoints(tmp_path / 'checkpoints')) == (steps > 8)
    again = train(recipe, one_label, output=tmp_path, resume='auto', on_step=seen.append)
    assert again.epochs == whole.epochs and same_weights(again.model, whole.model)
    assert len(seen) < steps + 12  # what was done is not done again


@pytest.fixture(scope='module')
def whole_run(one_label):
    recipe = load_recipe(Path(__file__).with_name('tiny.toml')).override({
        **SHKD, **CONTRAST, 'checkpoint_steps': '1', 'keep_checkpoints': '9'})
    return recipe, train(recipe, one_label)


def test_widths_that_differ_are_found_before_anything_is_trained(tiny_recipe, one_label, tmp_path):
    recipe = tiny_recipe.override({**SHKD, 'teacher.args.channels': '[8, 8, 8, 24]'})
    with pytest.raises(ValueError, match='embeddings of width 16, and the teacher.s has width 24; .* adapter=True'):
        train(recipe, one_label, output=tmp_path / 'run')
    assert not (tmp_path / 'run' / 'student').exists()


def test_an_adapter_lets_a_teacher_of_another_width_have_the_students_last_layer(tiny_recipe, one_label, tmp_path):
    recipe = tiny_recipe.override({
        **SHKD, 'teacher.args.channels': '[8, 8, 8, 24]', 'sharing.adapter': 'true', 'ema_decay': '0.5'})
    whole = train(recipe, one_label, output=tmp_path)
    student, teacher = best(tmp_path / 'student'), best(tmp_path / 'teacher')
    assert teacher['fc.parametrizations.weight.original'].shape == (16, 24)
    for name in ('weight', 'bias'):
        assert torch.equal(teacher[f'fc.parametrizations.bias.0.{name}'], student[f'fc.{name}'])
    shutil.rmtree(tmp_path / 'checkpoints')  # as if it had been stopped between the trainings
    again = train(recipe, one_label, output=tmp_path, resume='auto')
    assert again.epochs == whole.epochs and same_weights(again.model, whole.model)


def test_a_frozen_head_behind_an_adapter_ends_as_one_layer(tiny_recipe, one_label):
    recipe = tiny_recipe.override({**STUDENT, 'sharing.scheme': 'frozen_head', 'sharing.adapter': 'true'})
    plain = timm.create_model('test_resnet', num_classes=33, channels=(8, 8, 8, 16))
    plain.load_state_dict(train(recipe, one_label).model.state_dict())


def test_a_frozen_head_alone_stays_as_it_starts(tiny_recipe, one_label):
    recipe = tiny_recipe.override({**STUDENT, 'sharing.scheme': 'frozen_head', 'model.args.drop_rate': '0.0'})
    with seeded(recipe.seed):
        start = build_model(recipe, one_label.label_names).state_dict()
    trained = train(recipe, one_label).model.state_dict()
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert 'conv1.0.weight' in changed and not {'fc.weight', 'fc.bias'} & changed


# ---- recipes


def test_arms_differ_in_what_is_shared_alone():
    assert changes('scenes_thkd', 'scenes_kd') == {'sharing'}
    assert changes('scenes_shkd', 'scenes_kd') == {'sharing', 'teacher'}
    assert changes('scenes_sharing_teacher', 'scenes_kd') == {'model', 'teacher'}
    kd, shkd, teacher = (load_recipe(name) for name in ('scenes_kd', 'scenes_shkd', 'scenes_sharing_teacher'))
    assert kd.teacher.name == 'local-dir:runs/scenes_sharing_teacher/model'
    network = {'name': 'test_resnet', 'pretrained': False, 'args': teacher.model.args}
    assert dataclasses.replace(kd.teacher, **network) == shkd.teacher
    assert aware_teacher_recipe(shkd).model == teacher.model and not any(
        (shkd.sharing.head_loss_weight, shkd.sharing.embedding_loss_weight, shkd.sharing.contrast_loss_weight))


@pytest.mark.parametrize('name', ['sharing_cifar100_thkd', 'sharing_cifar100_shkd'])
def test_the_settings_of_the_paper(name):
    recipe = load_recipe(name)
    assert (recipe.epochs, recipe.batch_size) == (240, 64)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ('momentum', 0.05, 5e-4)
    assert recipe.schedule.args == {'decay_milestones': [150, 180, 210], 'decay_rate': 0.1}
    sharing, weights = recipe.sharing, (recipe.teacher.task_loss_weight, recipe.teacher.distill_loss_weight)
    if name.endswith('thkd'):
        assert (*weights, sharing.head_loss_weight, sharing.contrast_loss_weight) == (1.0, 1.5, 0.02, 0.0)
    else:
        assert (*weights, sharing.head_loss_weight, sharing.contrast_loss_weight) == (1.0, 1.0, 0.0, 0.8)
    assert recipe.teacher.temperature == 4.0 and sharing.embedding_loss_weight == 0.0
