"""The words of errors: what was got, what was expected, what to do."""
import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_miil import _errors
from timm_miil._checks import (
    check_choice, check_folder, check_labels, check_multiple, check_not_negative, check_paths, check_positive,
    check_range, check_same_length, check_same_shape, check_shape, check_text, nearest)
from timm_miil._extras import EXTRA_OF_IMPORT, require


def words(text):
    return f'^{re.escape(text)}$'


# ---- nearest


def test_nearest_names_a_close_name_and_lists_a_few():
    assert nearest('resnet5', ['resnet50', 'vit']) == "did you mean 'resnet50'? Known: resnet50, vit."


def test_nearest_counts_many_names_and_makes_no_far_guess():
    assert nearest('zzz', map(str, range(31))) == 'Known: 31 names.'
    assert nearest('zzz', map(str, range(3))) == 'Known: 0, 1, 2.'


# ---- choices, ranges, whole numbers


def test_a_count_may_be_zero_and_no_less():
    check_not_negative(num_layers=0, other=2)
    with pytest.raises(ValueError, match=words('num_layers must be at least 0, got -1.')):
        check_not_negative(other=0, num_layers=-1)
    with pytest.raises(TypeError, match='num_layers must be an int, got float 0.0'):
        check_not_negative(num_layers=0.0)


def test_a_string_passes_and_what_is_none_is_refused():
    check_text(name='a', other='')
    with pytest.raises(TypeError, match=words('name must be a string, got int 3.')):
        check_text(other='a', name=3)
    with pytest.raises(TypeError, match=words("name must be a string, got bytes b'a'.")):
        check_text(name=b'a')


def test_a_choice_among_the_choices_passes():
    check_choice(choices=iter(['sum', 'mean']), reduction='mean', other='sum')


def test_another_choice_is_named_with_the_choices():
    with pytest.raises(ValueError, match=words("reduction must be one of 'sum', 'mean', got 'max'.")):
        check_choice(choices=['sum', 'mean'], clipping='sum', reduction='max')


def test_a_range_above_zero():
    check_range(low=math.ulp(0.0), high=math.inf, lr=1e-300)
    for value in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=words(f'lr must be in (0, inf), got {value}.')):
            check_range(low=math.ulp(0.0), high=math.inf, lr=value)


@given(value=st.floats(), low=st.integers(-5, 5), width=st.integers(1, 5), closed=st.booleans())
def test_a_range_holds_its_low_end_and_its_high_end_when_closed(value, low, width, closed):
    high = low + width
    inside = low <= value < high or (closed and value == high)
    if inside:
        check_range(low=low, high=high, closed=closed, clip=value)
    else:
        end = ']' if closed else ')'
        with pytest.raises(ValueError, match=words(f'clip must be in [{low}, {high}{end}, got {value!r}.')):
            check_range(low=low, high=high, closed=closed, clip=value)


@pytest.mark.parametrize('value, closed, passes', [
    (0.0, False, True), (1.0, False, False), (1.0, True, True), (-1e-9, True, False), (math.nan, True, False),
    (math.inf, True, False),
])
def test_the_ends_of_a_range(value, closed, passes):
    if passes:
        check_range(low=0.0, high=1.0, closed=closed, clip=value)
    else:
        with pytest.raises(ValueError, match=words(
                f'clip must be in [0, 1{"]" if closed else ")"}, got {value!r}.')):
            check_range(low=0.0, high=1.0, closed=closed, clip=value)


def test_positive_whole_numbers_pass():
    check_positive(num_classes=1, num_groups=10**9)


@pytest.mark.parametrize('value', [0, -1])
def test_a_number_below_one_is_refused(value):
    with pytest.raises(ValueError, match=words(f'num_classes must be at least 1, got {value}.')):
        check_positive(num_groups=1, num_classes=value)


@pytest.mark.parametrize('value, kind', [(1.0, 'float'), ('1', 'str'), (True, 'bool'), (None, 'NoneType')])
def test_what_is_no_int_is_refused(value, kind):
    with pytest.raises(TypeError, match=words(f'num_classes must be an int, got {kind} {value!r}.')):
        check_positive(num_classes=value)


@given(value=st.integers(1, 1000), of=st.integers(1, 50))
def test_a_multiple_passes_and_the_nearest_are_offered(value, of):
    if value % of == 0:
        check_multiple(of=of, embed_dim=value)
        return
    with pytest.raises(ValueError, match=f'^embed_dim must be a multiple of {of}, got {value}; ') as raised:
        check_multiple(of=of, embed_dim=value)
    offered = [int(number) for number in str(raised.value).partition('nearest are ')[2].rstrip('.').split(' or ')]
    assert offered == [multiple for multiple in range(of, value + of, of) if abs(multiple - value) < of]


# ---- tensors and paths


def test_equal_shapes_pass_whatever_the_dtypes():
    check_same_shape(logits=torch.zeros(2, 3), targets=torch.zeros(2, 3, dtype=torch.int64))


def test_different_shapes_are_all_named():
    with pytest.raises(ValueError, match=words(
            'shapes must be equal, got logits (2, 3), targets (3, 2), weight (2, 3).')):
        check_same_shape(logits=torch.zeros(2, 3), targets=torch.zeros(3, 2), weight=torch.zeros(2, 3))


def test_class_indices_are_told_what_to_become():
    with pytest.raises(ValueError, match=words(
            'shapes must be equal, got logits (2, 3), targets (2,); class indices become multi-hot by '
            'torch.nn.functional.one_hot(targets, 3), or take AsymmetricLossSingleLabel for one label each.')):
        check_same_shape(logits=torch.zeros(2, 3), targets=torch.zeros(2))


def test_the_shape_that_is_expected_passes():
    check_shape(shape=(2,), targets=torch.zeros(2, dtype=torch.int64))


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=words('targets must have shape (2,), got (2, 1).')):
        check_shape(shape=(2,), targets=torch.zeros(2, 1))


def test_equal_lengths_pass_whatever_the_other_dimensions():
    check_same_length(logits=torch.zeros(2, 3), targets=torch.zeros(2))


def test_different_lengths_are_all_named():
    with pytest.raises(ValueError, match=words('first dimensions must be equal, got logits (2, 3), targets (3,).')):
        check_same_length(logits=torch.zeros(2, 3), targets=torch.zeros(3))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64, torch.int8, torch.int64])
def test_labels_pass_in_any_signed_dtype(dtype):
    check_labels(targets=torch.tensor([[1, 0], [-1, 1]], dtype=dtype), more=torch.tensor([True, False]))
    check_labels(targets=torch.zeros(0, 3, dtype=dtype))


@pytest.mark.parametrize('value, dtype, shown', [
    (0.5, torch.float32, '0.5'), (2, torch.int64, '2'), (255, torch.uint8, '255'), (-2, torch.int8, '-2'),
    (math.nan, torch.float32, 'nan'), (-math.inf, torch.float64, '-inf'),
])
def test_what_is_no_label_is_refused(value, dtype, shown):
    targets = torch.tensor([[1, value]], dtype=dtype)
    with pytest.raises(ValueError, match=words(f'targets must be 1, 0 or -1, got {shown}; round them.')):
        check_labels(targets=targets, hint='round them')
    with pytest.raises(ValueError, match=words(f'targets must be 1, 0 or -1, got {shown}.')):
        check_labels(targets=targets)


def test_a_folder_may_be_made_and_must_not_be_in_a_file(tmp_path):
    check_folder(output=tmp_path / 'a' / 'b', other=str(tmp_path))
    (tmp_path / 'a').write_text('')
    for path in (tmp_path / 'a', tmp_path / 'a' / 'b'):
        with pytest.raises(NotADirectoryError, match=f"^output must be a folder, got '{path}', where .*/a is a "):
            check_folder(output=path)


def test_lists_of_paths_pass():
    check_paths(paths=['a.png'], folders=(Path('a'), Path('b')))


@pytest.mark.parametrize('path', ['a.png', b'a.png', Path('a.png')])
def test_a_single_path_is_refused(path):
    with pytest.raises(TypeError, match=words(f'paths must be a list of paths, got the single path {path!r}.')):
        check_paths(paths=path)


# ---- optional packages and error types


@pytest.mark.parametrize('import_name, extra', EXTRA_OF_IMPORT.items())
def test_a_missing_package_is_named_with_its_extra(monkeypatch, import_name, extra):
    monkeypatch.setitem(sys.modules, import_name, None)  # Python's own way to say that a module is not there
    with pytest.raises(ImportError, match=words(
            f'{import_name} is needed here and is not installed; run: pip install "timm-miil[{extra}]".')) as raised:
        require(import_name)
    assert isinstance(raised.value.__cause__, ImportError)


def test_a_missing_submodule_names_the_extra_of_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    monkeypatch.delitem(sys.modules, 'sklearn.datasets', raising=False)  # other tests import it
    with pytest.raises(ImportError, match=re.escape('sklearn.datasets is needed here and is not installed; run: '
                                                    'pip install "timm-miil[train]".')):
        require('sklearn.datasets')


def test_a_package_that_is_there_is_returned():
    assert require('sklearn.datasets') is importlib.import_module('sklearn.datasets')


@pytest.mark.parametrize('name, base', [
    ('CatalogError', ValueError), ('CheckpointError', RuntimeError), ('PredictionError', RuntimeError),
    ('RecipeError', ValueError),
])
def test_an_error_is_caught_as_its_standard_kind(name, base):
    with pytest.raises(base, match='^planted$'):
        raise getattr(_errors, name)('planted')
