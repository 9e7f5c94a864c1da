"""Sparse labels are the dense table in every way they can be asked, and small."""
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.data import SparseTargets
from timm_miil.data._labels import with_unknown


@st.composite
def tables(draw):
    rows, columns = draw(st.integers(0, 7)), draw(st.integers(0, 6))
    labels = draw(st.lists(st.sampled_from([1, 0, -1]), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(labels, dtype=torch.int8).reshape(rows, columns)


def some(data, count, **options):
    return data.draw(st.lists(st.integers(0, count - 1), **options)) if count else []


@settings(max_examples=50, deadline=None)
@given(dense=tables(), fill=st.sampled_from([None, 0, -1]), data=st.data())
def test_it_is_the_dense_table(dense, fill, data):
    sparse = SparseTargets.from_dense(dense, fill=fill)
    assert sparse.shape == tuple(dense.shape) and len(sparse) == len(dense)
    assert sparse.dense().dtype == torch.int8 and torch.equal(sparse.dense(), dense)
    assert not (sparse.values == sparse.fill).any()
    for row in range(-len(dense), len(dense)):
        assert sparse.row(row).dtype == torch.int8 and torch.equal(sparse.row(row), dense[row])
    rows = some(data, len(dense), max_size=9)
    assert torch.equal(sparse.rows(rows), dense[rows])
    assert torch.equal(sparse.select_rows(torch.tensor(rows, dtype=torch.int64)).dense(), dense[rows])
    columns = some(data, dense.shape[1], unique=True)
    assert torch.equal(sparse.select_columns(np.array(columns)).dense(), dense[:, columns])
    for count, label in zip(sparse.counts(), (1, 0, -1)):
        assert count.dtype == torch.int64 and torch.equal(count, (dense == label).sum(0))
    assert torch.equal(pickle.loads(pickle.dumps(sparse)).dense(), dense)
    cut = data.draw(st.integers(0, len(dense)))
    parts = [SparseTargets.from_dense(part, fill=sparse.fill) for part in (dense[:cut], dense[cut:])]
    assert torch.equal(SparseTargets.concatenate(parts).dense(), dense)


@settings(max_examples=50, deadline=None)
@given(dense=tables(), fill=st.sampled_from([0, -1]), data=st.data())
def test_entries_in_any_order_and_repeated_make_the_table(dense, fill, data):
    entries = [(row, column, int(dense[row, column])) for row, column in np.ndindex(*dense.shape)
               if dense[row, column] != fill or data.draw(st.booleans())]
    entries = data.draw(st.permutations(entries + entries[:data.draw(st.integers(0, 5))]))
    rows, columns, values = zip(*entries) if entries else ((), (), ())
    sparse = SparseTargets.from_entries(rows, columns, values, shape=tuple(dense.shape), fill=fill)
    assert torch.equal(sparse.dense(), dense) and sparse.fill == fill
    assert len(sparse.values) == (dense != fill).sum()  # each once


@settings(max_examples=50, deadline=None)
@given(dense=tables(), fill=st.sampled_from([0, -1]), data=st.data())
def test_columns_nobody_annotated_become_unknown(dense, fill, data):
    columns = some(data, dense.shape[1], unique=True)
    want = dense.clone()
    want[:, columns] = -1
    before = dense.clone()
    before[:, columns] = fill
    assert torch.equal(with_unknown(SparseTargets.from_dense(before, fill=fill), columns).dense(), want)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_any_dtype_is_taken(dtype):
    assert SparseTargets.from_dense(torch.eye(3, dtype=dtype)).dense().tolist() == torch.eye(3).tolist()


def test_the_commoner_of_absent_and_unknown_is_not_listed():
    assert SparseTargets.from_dense(torch.tensor([[-1, -1, 0, 1]])).fill == -1
    assert SparseTargets.from_dense(torch.tensor([[-1, 0, 0, 1]])).fill == 0


def test_it_is_small_where_the_table_is_large():
    count = 50_000
    sparse = SparseTargets.from_entries(np.arange(count), np.arange(count) % 9600, 1, shape=(count, 9600), fill=-1)
    assert len(pickle.dumps(sparse)) < 14 * count  # of 480 MB
    assert sparse.row(7).tolist().count(1) == 1 and sparse.counts()[2][0] == count - 6


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')  # Python 3.12, where torch has threads
def test_a_forked_process_reads_it():
    sparse = SparseTargets.from_dense(torch.eye(4, dtype=torch.int8))
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(sparse.row(2).tolist()))
    process.start()
    assert receiver.recv() == [0, 0, 1, 0]
    process.join()


@pytest.mark.parametrize('make, kind, words', [
    (lambda: SparseTargets.from_dense(torch.zeros(3)), ValueError, 'targets must have 2 dimensions'),
    (lambda: SparseTargets.from_dense(torch.full((1, 1), 2)), ValueError, 'targets must be 1, 0 or -1, got 2'),
    (lambda: SparseTargets.from_dense(torch.full((1, 1), 255, dtype=torch.uint8)), ValueError, 'got 255'),
    (lambda: SparseTargets.from_dense(torch.zeros(1, 1), fill=1), ValueError, 'fill must be 0 or -1, got 1'),
    (lambda: SparseTargets.from_entries([0], [0], [2], shape=(1, 1)), ValueError, 'values must be 1, 0 or -1, got 2'),
    (lambda: SparseTargets.from_entries([0], [0], 1, shape=(1, 1), fill=2), ValueError,
     'fill must be 0 or -1, got 2'),
    (lambda: SparseTargets.from_entries([0, 0], [0], 1, shape=(1, 1)), ValueError,
     'rows, columns and values must be equally many, got 2, 1 and 2'),
    (lambda: SparseTargets.from_entries([1], [0], 1, shape=(1, 1)), IndexError, r'rows must be in \[0, 1\), got 1'),
    (lambda: SparseTargets.from_entries([0], [-1], 1, shape=(1, 1)), IndexError,
     r'columns must be in \[0, 1\), got -1'),
    (lambda: SparseTargets.from_entries([0, 0], [1, 1], [1, 0], shape=(1, 2)), ValueError,
     'entries must agree, got both 1 and 0 for row 0, column 1'),
    (lambda: SparseTargets.from_entries([0.5], [0], 1, shape=(1, 1)), ValueError,
     'rows must be a list of whole numbers'),
    (lambda: SparseTargets.concatenate([]), ValueError,
     r'parts must have one number of classes and one fill, got \[\]'),
    (lambda: SparseTargets.from_dense(torch.zeros(2, 2)).row(2), IndexError, r'row must be in \[-2, 2\), got 2'),
    (lambda: SparseTargets.from_dense(torch.zeros(2, 2)).rows([-1]), IndexError,
     r'rows must be in \[0, 2\), got -1'),
    (lambda: SparseTargets.from_dense(torch.zeros(2, 2)).select_columns([1, 1]), ValueError,
     r'columns must be distinct, got \[1, 1\]'),
    (lambda: SparseTargets.from_dense(torch.zeros(2, 2)).select_columns([2]), IndexError,
     r'columns must be in \[0, 2\)'),
])
def test_wrong_arguments_are_refused(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
