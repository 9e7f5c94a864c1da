"""Classes of a picture are selected as a sort of all of them would."""
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_miil.inference import Tagger
from timm_miil.inference._selection import select_classes

# Few values, so that many are equal to each other and to thresholds.
CONFIDENCES = st.sampled_from([0.0, 0.1, 0.5, math.nextafter(0.5, 1), 0.9, 1.0, math.nan])
THRESHOLDS = st.sampled_from([0, 0.1, 0.5, 0.9, 1.0])


@st.composite
def cases(draw):
    num_classes = draw(st.integers(1, 6))
    row = st.lists(CONFIDENCES, min_size=num_classes, max_size=num_classes)
    one = st.lists(THRESHOLDS, min_size=num_classes, max_size=num_classes)
    return draw(st.lists(row, max_size=4)), draw(one | THRESHOLDS.map(lambda value: [value] * num_classes)), num_classes


@given(cases(), st.none() | st.integers(1, 8))
def test_it_is_a_sort_of_all_classes(case, topk):
    rows, thresholds, num_classes = case
    want = [
        sorted(((value, index) for index, value in enumerate(row) if value >= thresholds[index]),
               key=lambda one: (-one[0], one[1]))[:topk]
        for row in rows]
    confidence = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), num_classes)
    assert select_classes(confidence, torch.tensor(thresholds, dtype=torch.float64), topk) == want


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('topk', [None, 3, 5000])
def test_the_tags_of_many_classes_are_those_of_a_sort_to_the_bit(activation, topk):
    num_classes, generator = 3000, torch.Generator().manual_seed(0)
    thresholds = torch.rand(num_classes, generator=generator, dtype=torch.float64).tolist()
    model = timm.create_model('test_resnet', num_classes=num_classes)
    tagger = Tagger(model, activation=activation, threshold=thresholds, topk=topk)
    scores = torch.randn(3, num_classes, generator=generator).mul(8).round()  # many equal ones
    scores[1, 7] = math.nan
    logits = scores.double()
    confidence = logits.sigmoid() if activation == 'sigmoid' else logits.softmax(dim=1)
    values, order = confidence.sort(dim=1, descending=True, stable=True)
    first, second, third = tagger.tags_of(scores)
    assert second is None
    for tags, row, classes in (first, values[0], order[0]), (third, values[2], order[2]):
        assert [(tag.confidence, tag.index) for tag in tags] == [
            (value, index) for value, index in zip(row.tolist(), classes.tolist()) if value >= thresholds[index]][:topk]
