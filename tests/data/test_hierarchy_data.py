"""The tree over classes: its forms on disk, its classes in another order, and labels with their ancestors."""
import json
import random
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil._errors import CheckpointError
from timm_miil.data import (
    TREE_FILE, ClassTree, ImageStream, MultiLabelRecords, SparseTargets, hierarchy, open_split, read_class_tree,
    read_shards, with_ancestors, write_class_tree, write_shards)
from timm_miil.losses import SemanticHierarchy

#   0 animal   1 plant
#   2 dog < 0  3 cat < 0  4 oak < 1
#   5 poodle < 2
TREE = ClassTree(
    ('animal', 'plant', 'dog', 'cat', 'oak', 'poodle'), (-1, -1, 0, 0, 1, 2),
    ('it moves', 'it grows', 'it barks', 'it purrs', 'it is tall', 'it is curly'))


@st.composite
def trees(draw):
    """Any tree of up to 12 classes, whose parents need not come first."""
    num_classes = draw(st.integers(1, 12))
    order = draw(st.permutations(range(num_classes)))
    parents = [-1] * num_classes
    for place, index in enumerate(order):
        parents[index] = draw(st.sampled_from([-1, *order[:place]]))
    return ClassTree(tuple(f'c{index}' for index in range(num_classes)), tuple(parents))


# ---- the tree


def test_ancestors_go_from_the_parent_to_a_root():
    assert [TREE.ancestors(index) for index in range(6)] == [(), (), (0,), (0,), (1,), (2, 0)]
    for index in (-1, 6):
        with pytest.raises(IndexError, match=re.escape(f'class must be in [0, 6), got {index}')):
            TREE.ancestors(index)


@pytest.mark.parametrize(('names', 'parents', 'descriptions', 'error', 'message'), [
    ((), (), None, ValueError, 'a hierarchy needs classes'),
    (('a', 'a'), (-1, 0), None, ValueError, "got 'a' twice"),
    (('a', 'b'), (-1,), None, ValueError, 'class_names must be one for each of 1 parents, got 2'),
    (('a', 'b'), (-1, 0), ('x',), ValueError, 'descriptions must be one for each of 2 parents, got 1'),
    (('a', 'b'), (-1, 2), None, ValueError, r'the parent of class 1 must be a class in \[0, 2\).* got 2'),
    (('a', 'b', 'c'), (-1, 2, 1), None, ValueError, 'a tree has no cycle'),
    (('a', 'b'), (-1, '0'), None, TypeError, "the parent of class 1 must be an int, or None for a root, got '0'"),
    (('a', 7), (-1, 0), None, TypeError, 'class_names must be a string, got int 7'),
    ('ab', (-1, 0), None, TypeError, "class_names must be a list of strings, got the string 'ab'"),
])
def test_what_is_no_tree_is_refused(names, parents, descriptions, error, message):
    with pytest.raises(error, match=message):
        ClassTree(names, parents, descriptions)


def test_is_a_leads_to_the_nearest_class_above():
    pairs = [
        ('poodle', 'dog'), ('dog', 'pet'), ('dog', 'canine'), ('canine', 'animal'), ('pet', 'thing'), ('oak', 'plant')]
    tree = ClassTree.from_is_a(pairs, ['animal', 'plant', 'poodle', 'oak'])
    assert tree.parents == (-1, -1, 0, 1)
    # Two ways up from dog, of two and of three steps: the nearest class, unless that shall be an error.
    pairs.append(('thing', 'entity'))
    names = ['entity', 'animal', 'dog']
    assert ClassTree.from_is_a(pairs, names).parents == (-1, -1, 1)
    with pytest.raises(ValueError, match="got 'animal' and 'entity' for 'dog'"):
        ClassTree.from_is_a(pairs, names, two_parents='error')
    with pytest.raises(ValueError, match="two_parents must be one of 'error', 'nearest', got 'both'"):
        ClassTree.from_is_a(pairs, names, two_parents='both')
    with pytest.raises(ValueError, match="got none with 'wolf'"):
        ClassTree.from_is_a(pairs, ['wolf'])


@given(tree=trees(), data=st.data())
def test_in_another_order_each_class_keeps_its_ancestors(tree, data):
    names = data.draw(st.lists(st.sampled_from(tree.class_names), unique=True, min_size=1))
    other = tree.ordered_as(names)
    assert other.class_names == tuple(names)
    for index, name in enumerate(names):
        above = [tree.class_names[ancestor] for ancestor in tree.ancestors(tree.class_names.index(name))]
        assert [names[ancestor] for ancestor in other.ancestors(index)] == [kept for kept in above if kept in names]


def test_order_moves_descriptions_and_names_what_is_unknown():
    assert TREE.ordered_as(['poodle', 'animal']).descriptions == ('it is curly', 'it moves')
    assert TREE.ordered_as(TREE.class_names) == TREE
    with pytest.raises(ValueError, match="got 'poodel', 'x', 'y' and 1 more; did you mean 'poodle'"):
        TREE.ordered_as(['poodel', 'x', 'y', 'z'])
    with pytest.raises(ValueError, match="got 'dog' twice"):
        TREE.ordered_as(['dog', 'dog'])


# ---- on disk


@pytest.mark.parametrize('name', [TREE_FILE, 'tree.pth'])
@pytest.mark.parametrize('tree', [TREE, ClassTree(TREE.class_names, TREE.parents)], ids=['described', 'bare'])
def test_a_written_tree_is_read_back_here_and_by_the_loss(tmp_path, name, tree):
    write_class_tree(tree, tmp_path / name)
    assert read_class_tree(tmp_path / name) == tree
    loss_tree = SemanticHierarchy.from_tree_file(tmp_path / name, include_deepest=True)
    assert (loss_tree.parents, loss_tree.class_names, loss_tree.descriptions) == (
        tree.parents, tree.class_names, tree.descriptions)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_published_form_is_read(tmp_path):
    torch.save({
        'class_tree_list': [[0], [1], [2, 0]], 'class_list': ['n1', 'n2', 'n3'],
        'class_description': {'n3': 'third', 'n2': 'second', 'n1': 'first'}}, tmp_path / 'published.pth')
    assert read_class_tree(tmp_path / 'published.pth') == ClassTree(
        ('n1', 'n2', 'n3'), (-1, -1, 0), ('first', 'second', 'third'))


def test_descriptions_stand_in_for_names(tmp_path):
    (tmp_path / 'tree.json').write_text(json.dumps({
        'class_tree_list': [[0], [1, 0]], 'class_description': {'b': 'B', 'a': 'A'}}))
    assert read_class_tree(tmp_path / 'tree.json') == ClassTree(('b', 'a'), (-1, 0), ('B', 'A'))


@pytest.mark.parametrize(('content', 'message'), [
    ('{', 'cannot be read as a tree'),
    ('[]', "must hold a dict with 'class_tree_list', got list"),
    ('{"class_tree_list": [[0]]}', "has no class names; it needs 'class_list'"),
    ('{"class_tree_list": [[1]], "class_list": ["a"]}', r'holds no class tree: class_tree\[0\] must begin with'),
    ('{"class_tree_list": 3, "class_list": ["a"]}', 'holds no class tree'),
    ('{"class_tree_list": [[0]], "class_list": [3]}', 'holds no class tree: class_names must be a string, got int 3'),
    ('{"class_tree_list": [[0]], "class_list": ["a"], "class_description": {}}', "has no class_description of the"),
    ('{"class_tree_list": [[0]], "class_list": ["a", "b"]}', 'must be one for each of 1 parents, got 2'),
])
def test_a_file_that_is_no_tree_is_refused(tmp_path, content, message):
    (tmp_path / 'tree.json').write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_class_tree(tmp_path / 'tree.json')
    with pytest.raises(FileNotFoundError):
        read_class_tree(tmp_path / 'none.json')


@pytest.mark.parametrize('content', [b'', b'hello', b'<html>404</html>', b'n00000001 n00000002\n', bytes(range(256))])
def test_any_other_file_is_refused_whatever_torch_makes_of_it(tmp_path, content):
    (tmp_path / 'tree.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='tree.pth cannot be read as a tree of plain lists and strings'):
        read_class_tree(tmp_path / 'tree.pth')


# ---- labels with their ancestors


def naive(dense, tree):
    extended = dense.clone()
    for row, column in (dense == 1).nonzero().tolist():
        extended[row, list(tree.ancestors(column))] = 1
    return extended


@settings(max_examples=60)
@given(tree=trees(), data=st.data())
def test_each_present_label_brings_its_ancestors(tree, data):
    num_images = data.draw(st.integers(1, 6))
    values = data.draw(st.lists(
        st.sampled_from([1, 0, -1]), min_size=num_images * len(tree), max_size=num_images * len(tree)))
    dense = torch.tensor(values, dtype=torch.int8).reshape(num_images, -1)
    labels = SparseTargets.from_dense(dense, fill=data.draw(st.sampled_from([0, -1])))
    source = MultiLabelRecords([f'{index}.jpg' for index in range(num_images)], labels, tree.class_names)
    extended = with_ancestors(source, tree)
    assert torch.equal(extended.targets, naive(dense, tree))
    assert torch.equal(source.targets, dense)
    assert (extended.labels.values != extended.labels.fill).all()


def test_columns_are_matched_by_name_and_stay():
    source = MultiLabelRecords(['a.jpg', 'b.jpg'], torch.eye(2, dtype=torch.int8), ['poodle', 'animal'])
    extended = with_ancestors(source, TREE)
    assert extended.label_names == ('poodle', 'animal')
    assert extended.targets.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(ValueError, match="classes of the tree, got 'puppy'"):
        with_ancestors(MultiLabelRecords(['a.jpg'], torch.ones(1, 1, dtype=torch.int8), ['puppy']), TREE)
    with pytest.raises(TypeError, match='source must be LabelledImages or an ImageStream, got list'):
        with_ancestors([], TREE)


def test_nothing_is_extended_in_nothing():
    empty = MultiLabelRecords([], torch.zeros(0, 6, dtype=torch.int8), TREE.class_names)
    assert len(with_ancestors(empty, TREE)) == 0
    absent = MultiLabelRecords(['a.jpg'], torch.zeros(1, 6, dtype=torch.int8), TREE.class_names)
    assert not with_ancestors(absent, TREE).targets.any()


def test_parts_are_whole_pictures(monkeypatch):
    dense = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (50, 6), dtype=np.int8))
    source = MultiLabelRecords([f'{index}.jpg' for index in range(50)], dense, TREE.class_names)
    monkeypatch.setattr(hierarchy, 'ENTRIES_AT_ONCE', 7)
    assert torch.equal(with_ancestors(source, TREE).targets, naive(dense, TREE))


def test_it_takes_the_memory_of_what_is_present():
    """50 000 pictures with 11 221 labels: 561 MB as a table of bytes."""
    generator = random.Random(0)
    parents = [-1, *(generator.randrange(index) for index in range(1, 11_221))]
    tree = ClassTree(tuple(map(str, range(11_221))), tuple(parents))
    num_images = 50_000
    columns = np.random.default_rng(0).integers(0, 11_221, num_images)
    labels = SparseTargets.from_entries(np.arange(num_images), columns, 1, shape=(num_images, 11_221))
    source = MultiLabelRecords(['a.jpg'] * num_images, labels, tree.class_names)
    tracemalloc.start()
    extended = with_ancestors(source, tree)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert extended.labels.row(7).nonzero().flatten().tolist() == sorted([columns[7], *tree.ancestors(columns[7])])
    assert peak < 150e6


def test_a_stream_is_extended_as_it_is_read(tmp_path, add_pictures):
    folder = add_pictures(*(f'data/train/{name}/{number}.jpg' for name in TREE.class_names for number in range(2)))
    source = open_split(folder / 'data', 'train', labels=TREE.class_names)
    write_shards(source, tmp_path / 'shards', split='train', images_per_shard=5, workers=0)
    stream = with_ancestors(read_shards(tmp_path / 'shards', 'train'), TREE)
    assert isinstance(stream, ImageStream)
    assert (stream.num_images, stream.label_names, stream.label_counts()) == (12, TREE.class_names, None)
    met = [
        row for process in range(2)
        for _, row, _ in stream.iterate(seed=3, epoch=0, process=process, num_processes=2)]
    want = with_ancestors(source, TREE).targets
    assert sorted(row.tolist() for row in met) == sorted(want.tolist())
    assert not torch.equal(want, source.targets)
    with pytest.raises(ValueError, match='process must be below num_processes, got 2 of 2'):
        stream.iterate_unread(seed=3, epoch=0, process=2, num_processes=2)
