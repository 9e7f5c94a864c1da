"""Training with a teacher: which one it is, what of the student's training it leaves alone, and what is learnt."""
import logging
import shutil

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import timm_miil.train._run as run_module
import timm_miil.train.teaching as teaching_module
from timm_miil._errors import RecipeError
from timm_miil.data import ImageStream, seeded
from timm_miil.tasks import TeacherCache
from timm_miil.train import Splits, read_splits, train
from timm_miil.train.build import build_model
from timm_miil.train.checkpoint import list_checkpoints
from timm_miil.train.teaching import build_teacher

CPU = torch.device('cpu')
FLAT = {'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}'}
SEMANTIC = {'task': 'semantic', 'loss.name': 'semantic_softmax', 'loss.args': '{include_deepest = true}'}
# No weights of its own are at hand: what it says is fixed all the same.
TEACHER = {
    'teacher.name': 'test_resnet', 'teacher.pretrained': 'false', 'teacher.precision': 'fp32',
    'teacher.image_size': '32'}
MIXED = {'augment.name': 'timm', 'augment.args.mixup': '{mixup_alpha = 0.8, cutmix_alpha = 1.0}'}


@pytest.fixture(scope='module')
def one_label(tiny_tree):
    found = read_splits(tiny_tree)
    return Splits(found.train.select(range(0, 100, 3)), found.val.select(range(0, 100, 8)), tree=found.tree)


@pytest.fixture(scope='module')
def labels(one_label):
    return one_label.label_names


def save_teacher(folder, num_classes, **config):
    """A network in a folder whose scores differ from picture to picture."""
    with seeded(1):
        model = timm.create_model(
            'test_resnet', num_classes=num_classes,
            pretrained_cfg_overlay={'input_size': (3, 32, 32), 'fixed_input_size': False})
        nn.init.normal_(model.fc.weight)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_config=config)
    return model.eval()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def teacher_of(recipe, names):
    return build_teacher(recipe, names, build_model(recipe, names, pretrained=False), CPU)


# ---- the table


@pytest.mark.parametrize(('changes', 'message'), [
    ({'teacher.temperature': '2'}, "'teacher.name' is missing"),
    ({'teacher.name': 'resnet5'}, "teacher.name must be a model of timm, got 'resnet5'; did you mean"),
    ({**TEACHER, 'teacher.args.num_classes': '3'}, 'teacher.args must not hold num_classes: training decides it'),
    ({**TEACHER, 'teacher.task_loss_weight': '-1'}, r'teacher.task_loss_weight must be in \[0, inf\), got -1'),
    ({**TEACHER, 'teacher.distill_loss_weight': '0'}, 'teacher.distill_loss_weight must be above 0, got 0'),
    ({**TEACHER, 'teacher.temperature': '0'}, r'teacher.temperature must be in \[0.001, 1000\], got 0'),
    ({**TEACHER, 'teacher.precision': 'half'}, "teacher.precision must be one of 'fp32', 'bf16', 'fp16', got 'half'"),
    ({**TEACHER, 'teacher.image_size': '-1'}, 'teacher.image_size must be at least 0, got -1'),
    ({**TEACHER, 'teacher.cache_topk': '0'}, 'teacher.cache_topk must be at least 1, got 0'),
    ({**TEACHER, 'teacher.cache_gb': '0'}, r'teacher.cache_gb must be in .*, got 0'),
    ({**TEACHER, 'task': 'zero_shot'}, "teacher must be left out of task 'zero_shot', whose classes no teacher has"),
    ({**TEACHER, **SEMANTIC, 'teacher.temperature': '2'}, "teacher.temperature must be 1 with task 'semantic'"),
])
def test_tables_that_do_not_fit(tiny_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe.override(changes)


def test_defaults_are_those_of_usi(tiny_recipe):
    teacher = tiny_recipe.override({'teacher.name': 'resnet18'}).teacher
    assert (teacher.task_loss_weight, teacher.distill_loss_weight, teacher.temperature) == (1.0, 5.0, 1.0)
    assert tiny_recipe.override(TEACHER).override({'teacher': 'none'}).teacher is None


# ---- whose classes


def test_classes_are_matched_by_name(tiny_recipe, labels, tmp_path):
    known = ('a digit more', *reversed(labels))
    model = save_teacher(tmp_path, len(known), label_names=list(known))
    recipe = tiny_recipe.override({**FLAT, **TEACHER, 'teacher.name': f'local-dir:{tmp_path}',
                                   'teacher.pretrained': 'true'})
    pictures = torch.rand(3, 3, 32, 32)
    teacher = teacher_of(recipe, labels)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():  # the student's pictures are in [0, 1]
        want = model((pictures - mean) / std)[:, 1:].flip(1)
    torch.testing.assert_close(teacher(pictures), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=(
            r"the teacher local-dir:.* must have the labels of the data, and lacks 'digit 11', 'blue 1'; did you mean "
            r"'digit 1")):
        teacher_of(recipe, (*labels, 'digit 11', 'blue 1'))


def test_a_teacher_without_names_must_have_as_many_classes(tiny_recipe, labels, tmp_path, caplog):
    save_teacher(tmp_path / 'same', len(labels))
    save_teacher(tmp_path / 'other', len(labels) + 1)
    recipe = tiny_recipe.override({**FLAT, **TEACHER, 'teacher.pretrained': 'true'})
    with caplog.at_level(logging.WARNING):
        assert teacher_of(recipe.override({'teacher.name': f'local-dir:{tmp_path / "same"}'}), labels).columns is None
    assert f'does not tell the names of its {len(labels)} classes: they are taken to be the labels' in caplog.text
    with pytest.raises(ValueError, match='must have the classes of the data: it has 34, whose names it does not tell, '
                                         'and the data have 33'):
        teacher_of(recipe.override({'teacher.name': f'local-dir:{tmp_path / "other"}'}), labels)


def test_classes_of_imagenet_are_matched_by_synset(tiny_recipe, tmp_path):
    save_teacher(tmp_path, 1000)
    recipe = tiny_recipe.override({**FLAT, **TEACHER, 'teacher.name': f'local-dir:{tmp_path}',
                                   'teacher.pretrained': 'true'})
    synsets = ImageNetInfo('imagenet-1k').label_names()
    assert teacher_of(recipe, [synsets[7], synsets[2]]).columns.tolist() == [7, 2]
    with pytest.raises(ValueError, match="and lacks 'n00000001'"):
        teacher_of(recipe, [synsets[7], 'n00000001'])


def test_weights_that_cannot_be_had_are_the_teachers(tiny_recipe, labels, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('no network.')

    recipe = tiny_recipe.override({**FLAT, 'teacher.name': 'test_resnet.r160_in1k'})
    student = build_model(recipe, labels, pretrained=False)
    monkeypatch.setattr(teaching_module, 'create_model', fail)
    with pytest.raises(OSError, match='weights of the teacher test_resnet.r160_in1k could not be had: no network;'):
        build_teacher(recipe, labels, student, CPU)


def test_weights_of_another_network_are_the_teachers_in_few_words(tiny_recipe, labels, tmp_path, caplog):
    file = tmp_path / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=len(labels)).state_dict(), file)
    recipe = tiny_recipe.override({**FLAT, **TEACHER, 'teacher.args.checkpoint_path': str(file)})
    with caplog.at_level(logging.WARNING):
        assert same_weights(teacher_of(recipe, labels).model, timm.create_model(
            'test_resnet', num_classes=len(labels), checkpoint_path=str(file)))
    assert 'does not tell the names of its 33 classes' in caplog.text and 'random' not in caplog.text
    with pytest.raises(ValueError, match='weights of the teacher test_vit must be of this network') as info:
        teacher_of(recipe.override({'teacher.name': 'test_vit', 'teacher.image_size': '0'}), labels)
    assert len(str(info.value)) < 700


def test_a_teacher_that_knows_nothing_is_told_of(tiny_recipe, labels, caplog):
    with caplog.at_level(logging.WARNING):
        teacher_of(tiny_recipe.override({**FLAT, **TEACHER}), labels)
    assert 'the weights of the teacher test_resnet are random, so that it knows nothing' in caplog.text


# ---- what it leaves alone


def test_the_student_draws_what_it_draws_without_a_teacher(tiny_recipe, one_label):
    plain = {
        **FLAT, **MIXED, 'optimizer.name': 'momentum', 'model.args.drop_rate': '0.3', 'epochs': '1', 'clip_grad': '1.0'}
    recipe = tiny_recipe.override(plain)
    # So light that not one bit of a gradient knows of it.
    other = recipe.override({**TEACHER, 'teacher.distill_loss_weight': '1e-25'})
    with seeded(5):
        alone, before = train(recipe, one_label), torch.rand(1)
    with seeded(5):
        taught, after = train(other, one_label), torch.rand(1)
    assert same_weights(alone.model, taught.model) and torch.equal(before, after)
    assert [record.metrics for record in alone.epochs] == [record.metrics for record in taught.epochs]
    assert not same_weights(alone.model, train(recipe.override(TEACHER), one_label).model)


@pytest.mark.parametrize('changes', [
    {}, FLAT, {**FLAT, **MIXED, 'ema_decay': '0.5', 'grad_accum_steps': '2', 'teacher.precision': 'bf16'}, SEMANTIC,
], ids=['multi_label', 'single_label', 'mixed', 'semantic'])
def test_the_teacher_stays_and_both_see_the_same(tiny_recipe, one_label, changes, monkeypatch):
    teachers, seen, build = [], [], run_module.build_teacher

    def spy(*args, **settings):
        teachers.append(teacher := build(*args, **settings))
        teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        args[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        return teacher

    monkeypatch.setattr(run_module, 'build_teacher', spy)
    recipe = tiny_recipe.override({**TEACHER, **changes, 'epochs': '1'})
    result = train(recipe, Splits(one_label.train, one_label.val, tree=one_label.tree))
    [teacher] = teachers
    assert same_weights(teacher, teacher_of(recipe, one_label.label_names)) and not teacher.training
    parts = 2 * 2 * recipe.grad_accum_steps  # steps and networks; then pictures are validated
    assert all(torch.equal(*pair) for pair in zip(seen[0:parts:2], seen[1:parts:2], strict=True))
    assert len({float(images.sum()) for images in seen[:parts]}) == parts / 2
    assert not any('teacher' in name for name in result.model.state_dict())


# ---- what is learnt


@pytest.mark.parametrize('changes', [FLAT, {}], ids=['single_label', 'multi_label'])
def test_the_student_comes_to_say_what_the_teacher_says(tiny_recipe, one_label, labels, changes, tmp_path):
    save_teacher(tmp_path, len(labels), label_names=list(labels))
    still = {
        'augment.scale': '[1.0, 1.0]', 'augment.ratio': '[1.0, 1.0]', 'batch_size': '8', 'epochs': '10',
        'optimizer.lr': '0.02'}
    recipe = tiny_recipe.override({
        **changes, **still, **TEACHER, 'teacher.name': f'local-dir:{tmp_path}', 'teacher.pretrained': 'true',
        'teacher.task_loss_weight': '0'})
    few = one_label.train.select(range(16))
    result = train(recipe, Splits(few, few))
    teacher, untrained = teacher_of(recipe, labels), build_model(recipe, labels).eval()
    with torch.no_grad():
        pictures = torch.stack([pil_to_tensor(few.load_image(row)) / 255 for row in range(16)])
        said, learnt, before = teacher(pictures), result.model(pictures), untrained(pictures)
    to_prob = (lambda logits: logits.softmax(1)) if changes else torch.sigmoid
    distance, far = ((to_prob(each) - to_prob(said)).abs().mean() for each in (learnt, before))
    # The weights are those of the epoch that is best by the labels.
    assert distance < 0.5 * far, (distance, far)


def test_a_run_with_a_teacher_goes_on_to_the_bit(tiny_recipe, one_label, tmp_path):
    recipe = tiny_recipe.override({
        **FLAT, **MIXED, **TEACHER, 'ema_decay': '0.5', 'checkpoint_steps': '1', 'keep_checkpoints': '9',
        'model.args.drop_rate': '0.2'})
    whole = train(recipe, one_label, output=tmp_path / 'whole')
    folder = shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    newest_first = list_checkpoints(folder / 'checkpoints')
    assert len(newest_first) == 4
    again = train(recipe, one_label, output=folder, resume=newest_first[3])
    assert again.epochs == whole.epochs and same_weights(again.model, whole.model)
    [newest, *_] = list_checkpoints(tmp_path / 'whole' / 'checkpoints')
    state = torch.load(newest, weights_only=True)
    assert state['model'].keys() == whole.model.state_dict().keys() == state['ema'].keys()
    for changes in ({'teacher.temperature': '2'}, {'teacher': 'none'}, {'teacher.cache': str(tmp_path / 'cache')}):
        with pytest.raises(ValueError, match='is of another run: teacher'):
            train(recipe.override(changes), one_label, output=folder, resume='auto')


def test_a_tree_is_not_taught_by_a_few_classes(tiny_recipe, one_label, tmp_path):
    recipe = tiny_recipe.override({
        **SEMANTIC, **TEACHER, 'teacher.cache': str(tmp_path / 'few'), 'teacher.cache_topk': '32'})
    with pytest.raises(ValueError, match="teacher.cache_topk must be all 33 labels with task 'semantic', .* got 32;"):
        train(recipe, one_label)
    assert not (tmp_path / 'few').exists()  # whose settings would stand in the way of the right ones


@pytest.mark.parametrize('changes', [{**FLAT, **MIXED}, {}], ids=['single_label', 'multi_label'])
def test_a_second_run_is_answered_from_the_cache(tiny_recipe, one_label, tmp_path, changes, monkeypatch):
    caches = []

    def spy(*args, **kwargs):
        caches.append(TeacherCache(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(teaching_module, 'TeacherCache', spy)
    recipe = tiny_recipe.override({**changes, **TEACHER, 'teacher.cache': str(tmp_path / 'answers')})
    first = train(recipe, one_label)
    caches[0].flush()
    second = train(recipe, one_label)
    assert (caches[0].num_found, caches[0].num_asked) == (0, 64)
    assert (caches[1].num_found, caches[1].num_asked) == (64, 0)
    assert second.epochs == first.epochs and same_weights(second.model, first.model)
    assert caches[0].tail == ('softmax' if changes else 'sigmoid') and caches[0].topk == 33
    # Another student draws the same pictures.
    train(recipe.override({'model.args.drop_rate': '0.2'}), one_label)
    assert (caches[2].num_found, caches[2].num_asked) == (64, 0)
    with pytest.raises(ValueError, match='teacher'):
        train(recipe.override({'teacher.image_size': '40'}), one_label)


class InMemory(ImageStream):
    def __init__(self, source):
        super().__init__(source.label_names, len(source))
        self.source = source

    def iterate(self, *, seed, epoch, process, num_processes):
        for row in range(process, len(self.source), num_processes):
            yield self.source.load_image(row), self.source.labels.row(row), self.source.image_name(row)


def test_a_stream_is_learnt_with_a_teacher(tiny_recipe, one_label):
    recipe = tiny_recipe.override({**SEMANTIC, **TEACHER, 'epochs': '1'})
    splits = Splits(InMemory(one_label.train), InMemory(one_label.val), tree=one_label.tree)
    assert set(train(recipe, splits).val_metrics) == {'top1', 'top5', 'loss', 'semantic_top1'}


@pytest.mark.gpu
# What the compiler warns of is of its own code, and that float32 products could be in TF32.
@pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning', r'ignore::UserWarning:torch\._inductor')
@pytest.mark.parametrize('changes', [FLAT | MIXED, {}, SEMANTIC], ids=['single_label', 'multi_label', 'semantic'])
def test_on_an_accelerator_in_half_precision_and_compiled(tiny_recipe, one_label, changes):
    recipe = tiny_recipe.override({
        **TEACHER, **changes, 'precision': 'bf16', 'teacher.precision': 'bf16', 'torchcompile': 'true'})
    compiled = train(recipe, one_label, device='cuda')
    plain = train(recipe.override({'torchcompile': 'false'}), one_label, device='cuda')
    for one, other in zip(compiled.epochs, plain.epochs):
        assert one.train_loss == pytest.approx(other.train_loss, rel=0.1)
