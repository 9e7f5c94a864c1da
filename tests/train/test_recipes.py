"""The recipes that come with the package: they can be built, name their sources, and differ as they say."""
import dataclasses

import pytest
import torch
from torch import nn

from timm_miil import catalog
from timm_miil.data import ClassTree, list_formats
from timm_miil.train import list_recipes, load_recipe
from timm_miil.train.build import build_loss, build_model, build_optimizer, build_scheduler
from timm_miil.train.teaching import build_hierarchy

NAMES = [f'thing {number}' for number in range(20)]
TREE = ClassTree(tuple(NAMES), (-1,) * 5 + tuple(range(5)) * 3)
SCENES = [name for name in list_recipes() if name.startswith('scenes_')]
# They have networks and settings of their own.
TAUGHT = (
    'scenes_kd', 'scenes_no_teacher', 'scenes_no_teacher_multi_label', 'scenes_sharing_teacher', 'scenes_shkd',
    'scenes_thkd', 'scenes_usi', 'scenes_usi_multi_label', 'scenes_usi_teacher')
# They have parts beside the network.
BESIDE = ('scenes_dhkd', 'scenes_dho', 'scenes_same_head', 'scenes_sla', 'scenes_sla_sd')
# They learn without labels first, or do without that.
INJECTED = ('scenes_injection', 'scenes_injection_supervised', 'scenes_rotation', 'scenes_simsiam')
# Pictures of one digit, of tree scenes.
ONE_DIGIT = (
    *BESIDE, *INJECTED, 'scenes_kd', 'scenes_no_teacher', 'scenes_sharing_teacher', 'scenes_shkd', 'scenes_thkd',
    'scenes_usi', 'scenes_usi_teacher')
PAPERS = ('asl_', 'csl_', 'in21k_semantic', 'in21k_transfer', 'mldecoder_', 'usi_imagenet')
SUMMARY_CHARS = 110

# What a twin changes of `scenes_asl`, besides its summary.
TWINS = {
    'scenes_asl': set(),
    'scenes_bce': {'loss'},
    'scenes_focal': {'loss'},
    'scenes_gap': {'model'},
    'scenes_csl_fpc': {'loss', 'partial', 'prior'},
    'scenes_ignore_fpc': {'loss', 'partial'},
    'scenes_negative_fpc': {'loss', 'partial'},
    'scenes_csl': {'loss', 'partial', 'prior'},
    'scenes_ignore': {'loss', 'partial'},
    'scenes_negative': {'loss', 'partial'},
    'scenes_long_tail_asl': {'loss', 'partial', 'scenes'},
    'scenes_long_tail_negative': {'loss', 'partial', 'scenes'},
    'scenes_comic': {'balanced', 'loss', 'partial', 'scenes'},
    'scenes_pu': {'loss', 'partial', 'positive_unlabeled', 'scenes'},
    'scenes_sdl': {'epochs', 'loss', 'model', 'scenes', 'task', 'unseen_labels'},
    'scenes_sdl_single': {'epochs', 'loss', 'model', 'scenes', 'task', 'unseen_labels'},
    'scenes_single_label': {'loss', 'scenes', 'task'},
    'scenes_zero_shot': {'epochs', 'model', 'scenes', 'task', 'unseen_labels'},
}


def changes(recipe, other):
    return {field.name for field in dataclasses.fields(recipe)
            if getattr(recipe, field.name) != getattr(other, field.name)} - {'summary'}


@pytest.fixture(scope='module')
def small():
    return nn.Linear(2, 2)


@pytest.fixture(scope='module')
def built():
    """Networks by what they are made of: recipes that differ in the size of pictures share one."""
    made = {}

    def build(recipe):
        if 'pretrained_backbone' in recipe.model.args:
            recipe = recipe.override({'model.args.pretrained_backbone': 'false'})
        key = recipe.task == 'zero_shot', recipe.embeds, recipe.model.name, str(recipe.model.args)
        if key not in made:
            # Words cannot be embedded without memory.
            with torch.device('cpu' if recipe.task == 'zero_shot' else 'meta'):
                made[key] = build_model(recipe, NAMES, pretrained=False)
        return made[key]

    return build


@pytest.mark.parametrize('name', list_recipes())
def test_every_recipe_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.summary.endswith('.') and recipe.summary.count('. ') == 0 and len(recipe.summary) <= SUMMARY_CHARS
    assert (recipe.made_pictures is not None) == name.startswith(('identities_', 'scenes_', 'tree_'))
    assert (recipe.tree_scenes is not None) == (name in (*ONE_DIGIT, 'tree_flat', 'tree_semantic'))
    if name.startswith(PAPERS):
        assert recipe.paper is not None and catalog.paper(recipe.paper.id)
        assert recipe.paper.metric == {'semantic': 'semantic_top1', 'single_label': 'top1'}.get(recipe.task, 'mAP')
        assert recipe.data.format in (*list_formats(), *(['auto'] if name.startswith('in21k_') else []))
    else:
        assert recipe.paper is None


@pytest.mark.parametrize('name', list_recipes())
def test_every_recipe_can_be_built(name, small, built):
    recipe = load_recipe(name)
    embed_dim = 0 if recipe.verification is None else recipe.verification.embed_dim
    assert built(recipe).num_classes == (embed_dim if recipe.embeds else len(NAMES))
    assert isinstance(build_loss(
        recipe.loss, recipe.task, prior=torch.full((20,), 0.5), class_counts=torch.ones(20),
        hierarchy=build_hierarchy(recipe, TREE)), nn.Module)
    if recipe.prior is not None:
        assert isinstance(build_loss(recipe.prior.loss, recipe.task), nn.Module)
    optimizer = build_optimizer(recipe, small)
    scheduler = build_scheduler(recipe, optimizer, steps_per_epoch=2)
    rates = []
    for step in range(2 * recipe.epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step_update(step + 1)
    assert max(rates) == pytest.approx(recipe.optimizer.lr, rel=0.1) and rates[-1] < 0.1 * recipe.optimizer.lr


def test_every_twin_is_known():
    assert sorted((*TWINS, *TAUGHT, *BESIDE, *INJECTED)) == SCENES


@pytest.mark.parametrize('name', TWINS)
def test_a_twin_changes_what_it_says_and_nothing_else(name):
    assert changes(load_recipe(name), load_recipe('scenes_asl')) == TWINS[name]


def test_injection_has_a_start_that_its_twin_lacks():
    recipe, without = load_recipe('scenes_injection'), load_recipe('scenes_injection_supervised')
    assert changes(recipe, without) == {'injection'} and without.injection is None
    start = load_recipe(recipe.injection.start)
    assert (start.model, start.tree_scenes) == (recipe.model, recipe.tree_scenes)


@pytest.mark.parametrize('kind', ['', '_multi_label'])
def test_a_teacher_is_all_that_its_twin_lacks(kind):
    recipe, without = load_recipe(f'scenes_usi{kind}'), load_recipe(f'scenes_no_teacher{kind}')
    assert changes(recipe, without) == {'teacher'} and without.teacher is None


def test_a_single_vector_is_all_that_its_twin_lacks():
    recipe, single = load_recipe('scenes_sdl'), load_recipe('scenes_sdl_single')
    assert recipe.model.args['num_rows'] > 1 and recipe.override({'model.args.num_rows': '1'}).model == single.model
    assert changes(recipe, single) == {'model'}
    assert recipe.unseen_labels == load_recipe('scenes_zero_shot').unseen_labels


@pytest.mark.parametrize(('name', 'optimizer', 'course', 'image_size'), [
    ('sdl_coco', ('adam', 2.5e-5, 3e-4), (10, 32, 0.0, 0.1), 224),
    ('sdl_nuswide', ('adam', 2.5e-5, 3e-4), (10, 32, 0.0, 0.1), 224),
    ('mldecoder_nuswide_zsl', ('adam', 1e-4, 1e-2), (40, 56, 0.9997, 0.2), 448)])
def test_the_zero_shot_recipes_are_the_published_scripts(name, optimizer, course, image_size):
    recipe = load_recipe(name)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == optimizer
    assert recipe.schedule.name == 'onecycle' and recipe.augment.image_size == image_size
    assert (recipe.epochs, recipe.batch_size, recipe.ema_decay, recipe.schedule.args['pct_start']) == course
    if name == 'mldecoder_nuswide_zsl':
        assert recipe.loss == load_recipe('mldecoder_coco_448').loss
    else:
        assert recipe.loss.args == {'diversity_weight': 0.01}
        assert recipe.model.args['num_rows'] == {'sdl_coco': 2, 'sdl_nuswide': 7}[name]
    assert len(recipe.zero_shot.unseen_labels()) == {'sdl_coco': 17}.get(name, 81)


def test_the_complete_recipe_of_usi():
    recipe = load_recipe('usi_imagenet')
    teacher = recipe.teacher
    assert (teacher.task_loss_weight, teacher.distill_loss_weight, teacher.temperature) == (1, 5, 1)
    other = recipe.override({'model.name': 'mobilenetv3_large_100'})
    assert changes(recipe, other) == {'model'}
    # Its command, by the words of the published script.
    assert (recipe.epochs, recipe.num_epochs, recipe.batch_size, recipe.seed, recipe.precision) == (
        300, 310, 1024, 42, 'fp16')
    assert (recipe.ema_decay, recipe.ema_warmup, recipe.clip_grad) == (0.99996, False, 0.0)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ('adamw', 2e-3, 2e-2)
    schedule, augment = recipe.schedule, recipe.augment
    assert (schedule.name, schedule.warmup_epochs, schedule.min_lr) == ('cosine', 5.0, 1e-6)
    assert schedule.args == {'warmup_lr': 1e-4, 'cooldown_epochs': 10}
    assert (augment.scale, augment.hflip, augment.crop_pct) == ((0.08, 1.0), 0.5, 0.95)
    assert augment.args == {
        'auto_augment': 'rand-m7-mstd0.5-inc1', 'aug_repeats': 3, 'interpolation': 'bicubic',
        'mixup': {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0, 'prob': 1.0, 'switch_prob': 0.5, 'label_smoothing': 0.0}}


@pytest.mark.parametrize(('name', 'epochs', 'optimizer'), [
    ('in21k_semantic', 80, ('adam', 3e-4, {})), ('in21k_single_label', 80, ('adam', 3e-4, {})),
    ('in21k_multi_label', 80, ('adam', 3e-4, {})), ('in21k_from_scratch', 140, ('momentum', 1e-2, {'momentum': 0.0}))])
def test_the_recipes_of_imagenet21k_are_the_published_scripts(name, epochs, optimizer):
    recipe = load_recipe(name)
    assert (recipe.epochs, recipe.batch_size, recipe.ema_decay, recipe.precision) == (epochs, 8 * 64, 0.0, 'fp16')
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.args) == optimizer
    assert recipe.optimizer.weight_decay == 1e-4 and recipe.schedule.name == 'onecycle'
    assert recipe.schedule.args == {'pct_start': 0.1, 'div_factor': 20.0, 'cycle_momentum': False}
    assert (recipe.augment.name, recipe.augment.image_size, recipe.augment.args) == ('paper', 224, {})
    assert recipe.model.name == ('tresnet_m' if name == 'in21k_from_scratch' else 'tresnet_m.miil_in1k')
    assert recipe.model.pretrained == (name != 'in21k_from_scratch')
    assert name == 'in21k_multi_label' or recipe.loss.args == {'smoothing': 0.2}


@pytest.mark.parametrize('kind', ['', '_fpc'])
@pytest.mark.parametrize('mode', ['ignore', 'negative'])
def test_partial_twins_differ_in_the_mode_alone(kind, mode):
    csl, other = load_recipe(f'scenes_csl{kind}'), load_recipe(f'scenes_{mode}{kind}')
    assert changes(csl, other) == {'loss', 'prior'}
    selective = dict(csl.loss.args)
    del selective['likelihood_topk'], selective['prior_threshold']
    assert csl.loss.name == other.loss.name and other.loss.args == {**selective, 'mode': mode}


@pytest.mark.parametrize(('twin', 'paper'), [('scenes_csl_fpc', 'csl_coco_fpc'), ('scenes_csl', 'csl_coco_rps')])
def test_a_twin_has_the_loss_of_the_papers_recipe(twin, paper):
    twin, paper = load_recipe(twin), load_recipe(paper)
    assert twin.loss == paper.loss and twin.prior.loss == paper.prior.loss


@pytest.mark.parametrize(('name', 'other', 'changed'), [
    ('scenes_comic', 'scenes_long_tail_asl', {'balanced', 'loss'}),
    ('scenes_pu', 'scenes_long_tail_negative', {'loss', 'positive_unlabeled'})])
def test_arms_of_a_long_tail_differ_in_the_method_alone(name, other, changed):
    assert changes(load_recipe(name), load_recipe(other)) == changed


def test_comic_weighs_by_counts_what_it_is_compared_with():
    logits, targets = torch.linspace(-3, 3, 12).view(2, 6), torch.tensor([[1., 0, -1, 1, 0, -1]] * 2)
    with_counts = build_loss(load_recipe('scenes_comic').loss, 'multi_label', class_counts=torch.full((6,), 9))
    other = build_loss(load_recipe('scenes_long_tail_asl').loss, 'multi_label')
    torch.testing.assert_close(with_counts(logits, targets.clamp(min=0)), other(logits, targets), rtol=1e-6, atol=0)


def test_plain_losses_are_what_their_names_say():
    logits = torch.linspace(-4, 4, 40).view(8, 5)
    targets = torch.eye(5)[[0, 3, 1, 4, 2, 2, 0, 4]]
    bce = build_loss(load_recipe('scenes_bce').loss, 'multi_label')(logits, targets)
    want = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction='sum')
    torch.testing.assert_close(bce, want, rtol=1e-5, atol=1e-6)
    prob = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
    focal = build_loss(load_recipe('scenes_focal').loss, 'multi_label')(logits, targets)
    torch.testing.assert_close(focal, -((1 - prob) ** 2 * prob.log()).sum(), rtol=1e-5, atol=1e-6)


def test_open_images_takes_an_unannotated_label_as_absent():
    logits = torch.linspace(-3, 3, 12).view(2, 6)
    targets = torch.tensor([[1., 0, -1, 1, 0, -1]] * 2)
    loss = build_loss(load_recipe('asl_openimages').loss, 'multi_label')(logits, targets)
    want = build_loss(load_recipe('asl_coco').loss, 'multi_label')(logits, targets.clamp(min=0))
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
