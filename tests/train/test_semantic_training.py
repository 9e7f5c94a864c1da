"""Training on labels that form a tree: what is learnt and measured, how the tree is found, and counting at scale."""
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import timm_miil.train._scoring as scoring_module
from timm_miil._errors import CheckpointError, RecipeError
from timm_miil.data import ClassTree, read_class_tree, write_class_tree, write_shards
from timm_miil.losses import SemanticHierarchy, SemanticSoftmaxLoss
from timm_miil.train import Splits, evaluate, measure, read_splits, train
from timm_miil.train.build import build_loss
from timm_miil.train.recipe import DataSettings
from timm_miil.train.splits import prepare_splits
from timm_miil.train.teaching import build_hierarchy

SEMANTIC = {'task': 'semantic', 'loss.name': 'semantic_softmax', 'loss.args': '{include_deepest = true}'}
FLAT = {'task': 'single_label', 'loss.name': 'cross_entropy', 'loss.args': '{}'}
# animal > (cat, dog), dog > (poodle, pug); plant > tree
PETS = ClassTree(('animal', 'cat', 'dog', 'plant', 'poodle', 'pug', 'tree'), (-1, 0, 0, -1, 2, 2, 3))


@pytest.fixture(scope='module')
def splits(tiny_tree):
    found = read_splits(tiny_tree)
    return Splits(found.train.select(range(0, 100, 2)), found.val.select(range(0, 100, 3)),
                  found.test.select(range(1, 100, 5)), found.tree)


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.override(SEMANTIC)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- what is measured


def by_hand(logits, labels, tree, levels):
    """Percent of right answers: at each level a picture reaches, the best class of the level is its own or above it."""
    right = answers = 0
    for scores, label in zip(logits.tolist(), labels.tolist()):
        line = [label, *tree.ancestors(label)][::-1]
        for depth in levels:
            if depth < len(line):
                classes = [index for index in range(len(tree)) if len(tree.ancestors(index)) == depth]
                right += max(classes, key=lambda index: scores[index]) == line[depth]
                answers += 1
    return 100 * right / answers


@pytest.mark.parametrize(('args', 'levels'), [({}, (0, 1)), ({'include_deepest': True}, (0, 1, 2))])
def test_semantic_accuracy_is_counted_level_by_level(args, levels):
    draws = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 7, generator=draws), torch.randint(7, (50,), generator=draws)
    hierarchy = SemanticHierarchy(PETS.parents, **args)
    found = measure(logits, F.one_hot(labels, 7), 'semantic', hierarchy=hierarchy)
    assert found['semantic_top1'] == pytest.approx(by_hand(logits, labels, PETS, levels))
    flat = measure(logits, F.one_hot(labels, 7), 'single_label')
    assert {key: found[key] for key in flat} == flat and set(found) == {*flat, 'semantic_top1'}


def test_without_a_tree_it_is_not_measured():
    with pytest.raises(ValueError, match="hierarchy must be given to measure the task 'semantic', got None"):
        measure(torch.zeros(1, 2), torch.eye(2)[:1], 'semantic')


def test_the_best_epoch_is_chosen_by_it(recipe, splits, tmp_path):
    result = train(recipe.override({'epochs': '3'}), splits, output=tmp_path / 'run')
    scores = [record.metrics['semantic_top1'] for record in result.epochs]
    assert result.metric == 'semantic_top1' and result.best_epoch == 1 + scores.index(max(scores))
    tree = read_class_tree(splits.tree).ordered_as(splits.label_names)
    labels = result.val_targets.argmax(1)
    assert max(scores) == pytest.approx(by_hand(result.val_logits, labels, tree, (0, 1, 2)))
    hierarchy = build_hierarchy(recipe, tree)
    found = evaluate(result.model, splits.test, task='semantic', hierarchy=hierarchy)
    assert found == pytest.approx(dict(result.test_metrics), abs=1e-6)
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['metric'] == 'semantic_top1'


def test_the_loss_is_semantic_softmax_over_the_tree(recipe):
    args = '{smoothing = 0.1, include_deepest = true, max_factor = 2}'
    changed = recipe.override({'loss.args': args})
    hierarchy = build_hierarchy(changed, PETS)
    loss = build_loss(changed.loss, 'semantic', hierarchy=hierarchy)
    draws = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(5, 7, generator=draws), torch.tensor([0, 6, 4, 2, 5])
    want = SemanticSoftmaxLoss(SemanticHierarchy(PETS.parents, include_deepest=True, max_factor=2.0), smoothing=0.1)
    assert torch.equal(loss(logits, labels), want(logits, labels)) and hierarchy.class_names == PETS.class_names


def test_training_raises_what_it_is_chosen_by(recipe, splits):
    few = splits.train.select(range(24))
    still = {'augment.scale': '[1.0, 1.0]', 'augment.ratio': '[1.0, 1.0]', 'batch_size': '8', 'optimizer.lr': '0.02'}
    result = train(recipe.override({**still, 'epochs': '12'}), Splits(few, few, tree=splits.tree))
    losses = [record.train_loss for record in result.epochs]
    assert losses[-1] < 0.8 * losses[0] and result.val_metrics['semantic_top1'] > 40, (losses, result.val_metrics)


# ---- counting instead of keeping


@pytest.mark.parametrize('changes', [FLAT, SEMANTIC], ids=['single_label', 'semantic'])
def test_counted_figures_are_those_of_a_table(tiny_recipe, splits, monkeypatch, changes):
    recipe = tiny_recipe.override({**changes, 'epochs': '2', 'batch_size': '12'})
    kept = train(recipe, splits)
    monkeypatch.setattr(scoring_module, 'MOST_SCORES', len(splits.val) * 33 - 1)
    counted = train(recipe, splits)
    assert kept.val_logits.shape == (len(splits.val), 33)
    assert counted.val_logits is None and counted.val_targets is None
    for one, other in zip(counted.epochs, kept.epochs):
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-9)
    assert counted.test_metrics == pytest.approx(dict(kept.test_metrics), rel=1e-9)
    assert counted.best_epoch == kept.best_epoch and same_weights(counted.model, kept.model)


def test_several_labels_are_never_counted(tiny_recipe, tiny_scenes, monkeypatch):
    monkeypatch.setattr(scoring_module, 'MOST_SCORES', 0)
    assert train(tiny_recipe.override({'epochs': '1'}), tiny_scenes).val_logits.shape == (24, 20)


# ---- the tree


def test_the_tree_is_matched_to_the_labels_by_name(recipe, splits, tiny_tree, tmp_path):
    tree = read_class_tree(tiny_tree / 'tree.json')
    assert splits.tree == tiny_tree / 'tree.json'
    # Another order, and a class of no picture, between a group and its digits.
    names = ('even', *reversed(tree.class_names))
    place = {name: index for index, name in enumerate(names)}
    parents = [-1] + [-1 if parent < 0 else place[tree.class_names[parent]] for parent in reversed(tree.parents)]
    group = parents[place['digit 4']]
    parents[place['digit 4']], parents[0] = 0, group
    write_class_tree(ClassTree(names, tuple(parents)), tmp_path / 'other.json')
    found = prepare_splits(recipe, dataclasses.replace(splits, tree=tmp_path / 'other.json')).tree
    assert found.class_names == splits.label_names and found == tree.ordered_as(splits.label_names)
    assert read_splits(tiny_tree, DataSettings(tree=str(tmp_path / 'other.json'))).tree == tmp_path / 'other.json'


def test_a_tree_that_is_missing_or_lacks_labels(recipe, splits, tmp_path):
    with pytest.raises(ValueError, match="task 'semantic' needs a tree over the labels: put a file tree.json into"):
        train(recipe, dataclasses.replace(splits, tree=None))
    words = "names must be classes of the tree, got 'bent digit', 'digit 0', 'digit 1' and 30 more"
    with pytest.raises(ValueError, match=words):
        train(recipe, dataclasses.replace(splits, tree=PETS))
    write_class_tree(PETS, tmp_path / 'pets.json')
    with pytest.raises(ValueError, match=f'pets.json must be a tree over the labels of the data: {words}'):
        train(recipe, dataclasses.replace(splits, tree=tmp_path / 'pets.json'))
    with pytest.raises(FileNotFoundError, match="no file '.*none.json' of the tree that task 'semantic' needs"):
        train(recipe, dataclasses.replace(splits, tree=tmp_path / 'none.json'))
    (tmp_path / 'tree.json').write_text('{}')
    with pytest.raises(CheckpointError, match='tree.json'):
        train(recipe, dataclasses.replace(splits, tree=tmp_path / 'tree.json'))
    # A task that needs none reads none.
    train(recipe.override({**FLAT, 'epochs': '1'}), dataclasses.replace(splits, tree=tmp_path / 'tree.json'))


def test_a_run_does_not_go_on_with_another_tree(recipe, splits, tmp_path):
    train(recipe.override({'stop_epoch': '1'}), splits, output=tmp_path / 'run')
    tree = read_class_tree(splits.tree)
    flat = ClassTree(tree.class_names, tuple(-1 for _ in tree.parents))
    with pytest.raises(ValueError, match='is of another run: tree was '):
        train(recipe, dataclasses.replace(splits, tree=flat), output=tmp_path / 'run', resume='auto')


@pytest.mark.parametrize(('changes', 'words'), [
    ({'loss.name': 'cross_entropy', 'loss.args': '{}'}, "logits and targets for task 'semantic', got 'cross_entropy'"),
    ({'loss.args': '{smooth = 0.1}'}, "SemanticSoftmaxLoss has no setting 'smooth'"),
    ({'augment.name': 'timm', 'augment.args.mixup': '{mixup_alpha = 0.1}'}, "is for task 'single_label', got 'sem"),
])
def test_what_does_not_suit_the_task(recipe, splits, changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        train(recipe.override(changes), splits)


def test_a_picture_of_several_labels_is_named_with_the_task(recipe, tiny_scenes):
    with pytest.raises(ValueError, match="task 'semantic' needs exactly one present label a picture"):
        train(recipe, tiny_scenes)


# ---- the form with several labels


def test_ancestors_become_labels(tiny_recipe, tiny_tree):
    plain, found = read_splits(tiny_tree), read_splits(tiny_tree, DataSettings(ancestors=True))
    tree = found.tree
    assert tree.class_names == plain.label_names == found.label_names
    for split in ('train', 'val', 'test'):
        labels = getattr(plain, split).targets.argmax(1).tolist()
        for label, row in zip(labels, getattr(found, split).targets, strict=True):
            assert row.nonzero().flatten().tolist() == sorted([label, *tree.ancestors(label)])
    few = Splits(found.train.select(range(32)), found.val.select(range(0, 100, 4)))
    assert train(tiny_recipe.override({'epochs': '1'}), few).val_targets.sum() > 25


def test_ancestors_are_for_several_labels(recipe, tmp_path, tiny_scenes):
    with pytest.raises(RecipeError, match="data.ancestors gives pictures several labels, which task 'semantic' does"):
        recipe.override({'data.ancestors': 'true'})
    with pytest.raises(ValueError, match='data.ancestors needs a tree over the labels: put a file tree.json'):
        read_splits(tiny_scenes, DataSettings(ancestors=True))


def test_so_many_pictures_validate_at_most(tiny_tree, tmp_path):
    whole = read_splits(tiny_tree, seed=4)
    names = [whole.val.image_name(row) for row in range(100)]
    found = [read_splits(tiny_tree, DataSettings(max_val=30), seed=seed) for seed in (4, 4, 5)]
    drawn = [[splits.val.image_name(row) for row in range(30)] for splits in found]
    assert drawn[0] == drawn[1] != drawn[2]
    for each in drawn:
        assert sorted(each, key=names.index) == each and len(set(each)) == 30
    assert len(found[0].train) == 100 and len(found[0].test) == 100
    assert len(read_splits(tiny_tree, DataSettings(max_val=100)).val) == 100
    for split in ('train', 'val'):
        write_shards(getattr(whole, split).select(range(8)), tmp_path, split=split, workers=0)
    with pytest.raises(ValueError, match='data.max_val is given, and .* is a stream, whose pictures cannot be chosen'):
        read_splits(tmp_path, DataSettings(max_val=4))
