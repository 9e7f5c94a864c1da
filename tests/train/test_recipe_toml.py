"""Recipes as files: what is written reads back as it was."""
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_miil._errors import RecipeError
from timm_miil.train import list_recipes, load_recipe
from timm_miil.train._toml import parse_value, write_toml

TINY = Path(__file__).with_name('tiny.toml')

TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=8)
SCALARS = st.booleans() | st.integers(-2 ** 63, 2 ** 63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8)


def read(tmp_path, text):
    file = tmp_path / 'recipe.toml'
    file.write_text(text, encoding='utf-8')
    return load_recipe(file)


@pytest.mark.parametrize('name', list_recipes())
def test_a_packaged_recipe_is_written_and_read_as_it_is(name, tmp_path):
    recipe = load_recipe(name)
    again = read(tmp_path, recipe.to_toml())
    assert again == recipe and again.to_toml() == recipe.to_toml()


@given(table=st.dictionaries(TEXTS, VALUES, max_size=4))
def test_any_table_of_plain_values_comes_back(table):
    assert tomllib.loads(write_toml(table)) == table


def test_numbers_keep_every_digit(tmp_path):
    recipe = load_recipe(TINY).override({'optimizer.lr': '1e-05', 'model.args': '{a = 0.1, b = 1e300, c = -0.0}'})
    again = read(tmp_path, recipe.to_toml())
    assert again.optimizer.lr == 1e-05 and again.model.args['b'] == 1e300
    assert math.copysign(1, again.model.args['c']) == -1


def test_a_table_that_is_left_out_stays_out(tmp_path):
    recipe = load_recipe('scenes_csl')
    assert recipe.partial is not None and '[partial]' in recipe.to_toml()
    without = recipe.override({'partial': 'none'})
    assert without.partial is None and '[partial]' not in without.to_toml()
    assert read(tmp_path, without.to_toml()) == without


def test_a_table_comes_into_being_by_its_keys():
    recipe = load_recipe(TINY).override({'partial.scheme': 'random_per_sample', 'partial.drop_prob': '0.5'})
    assert recipe.partial.drop_prob == 0.5 and recipe.partial.num_per_class == 0


def test_settings_are_not_shared_with_a_copy():
    recipe = load_recipe(TINY)
    copy = recipe.override({})
    copy.model.args['channels'].append(1)
    assert recipe.model.args['channels'] == [8, 8, 16, 16]


@pytest.mark.parametrize(('text', 'want'), [
    ('3', 3), ('1e-3', 0.001), ('true', True), ('"3"', '3'), ('adamw', 'adamw'), ('[1, 2]', [1, 2]),
    ('{a = 1}', {'a': 1}), ('', ''), ('a b', 'a b'), ('1\nother = 2', '1\nother = 2'),
])
def test_words_are_values(text, want):
    assert parse_value(text) == want


def test_what_nobody_means_is_refused():
    with pytest.raises(RecipeError, match=r"'model.args.a.b' must be true or false, a number, text, a list or a table, "
                                          r'got datetime.date\(2020, 1, 1\)'):
        load_recipe(TINY).override({'model.args.a': '{b = [2020-01-01]}'})
