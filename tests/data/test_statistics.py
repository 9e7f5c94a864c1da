"""Counts of a data set's labels against sums over the dense table."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_miil.data import SparseTargets, label_statistics


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.integers(1, 8), columns=st.integers(1, 6))
def test_counts_are_those_of_the_table(data, rows, columns):
    labels = data.draw(st.lists(st.sampled_from([1, 0, -1]), min_size=rows * columns, max_size=rows * columns))
    dense = torch.tensor(labels, dtype=torch.int8).reshape(rows, columns)
    names = 'abcdef'[:columns]
    statistics = label_statistics(SparseTargets.from_dense(dense), names)
    shows = (dense == 1).long()
    assert statistics.num_images == rows and statistics.label_names == tuple(names)
    for count, label in ((statistics.present, 1), (statistics.absent, 0), (statistics.unknown, -1)):
        assert torch.equal(count, (dense == label).sum(0))
    torch.testing.assert_close(statistics.prevalence, shows.sum(0) / (dense >= 0).sum(0).double(), equal_nan=True)
    assert torch.equal(statistics.co_occurrence(), shows.T @ shows)
    some = data.draw(st.permutations(names))[:3]
    picked = [names.index(name) for name in some]
    assert torch.equal(statistics.co_occurrence(some), (shows.T @ shows)[picked][:, picked])
    assert statistics.mean_labels == pytest.approx(shows.sum().item() / rows)
    assert statistics.never_present == tuple(name for name, count in zip(names, shows.sum(0)) if not count)
    assert torch.equal(statistics.labels_per_image, torch.bincount(shows.sum(1)))
    assert statistics.pair_counts.tolist() == sorted(statistics.pair_counts.tolist(), reverse=True)


def test_the_report_has_the_commonest_and_rarest_labels_and_pairs():
    dense = torch.tensor([[1, 1, 0, -1], [1, 0, 0, -1], [1, 1, 0, 1], [1, -1, 0, -1]])
    statistics = label_statistics(SparseTargets.from_dense(dense), ['cat', 'dog', 'emu', 'x' * 50])
    assert statistics.to_text() == """4 pictures, 4 labels, 1.75 labels a picture, 75.0 % of all known
never present: emu

label                                       present     absent    unknown  prevalence
cat                                               4          0          0    100.00 %
dog                                               2          1          1     66.67 %
xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...          1          0          3    100.00 %
emu                                               0          4          0      0.00 %

most often together
        2  cat + dog
        1  cat + xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
        1  dog + xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
"""
    short = statistics.to_text(num_labels=2).splitlines()
    assert [line.split()[0] for line in short[4:7]] == ['cat', '...', 'emu'] and short[5] == '... 2 labels in between'


def test_a_label_of_which_nothing_is_known_has_no_prevalence():
    statistics = label_statistics(SparseTargets.from_dense(torch.tensor([[-1]])), ['a'])
    assert statistics.to_text().splitlines()[-1].split() == ['a', '0', '0', '1', '-']


def test_wrong_names_are_refused():
    labels = SparseTargets.from_dense(torch.eye(2))
    with pytest.raises(ValueError, match='label_names must have one name a column, got 1 names for 2 columns'):
        label_statistics(labels, ['a'])
    with pytest.raises(ValueError, match=r"unknown label 'c'; .*Known: a, b"):
        label_statistics(labels, ['a', 'b']).co_occurrence(['c'])
