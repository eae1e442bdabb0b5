"""TOML as written is TOML as read: everything but None comes back equal."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from glmplan.facts.toml import toml_text

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
SCALAR = st.one_of(TEXT, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(allow_nan=False))
TREE = st.recursive(
    st.dictionaries(TEXT, st.one_of(SCALAR, st.lists(SCALAR, max_size=3)), max_size=4),
    lambda inner: st.dictionaries(TEXT, st.one_of(SCALAR, inner, st.lists(inner, min_size=1, max_size=3)), max_size=4),
    max_leaves=8,
)


@given(TREE)
def test_a_tree_comes_back_equal(tree):
    assert tomllib.loads(toml_text(tree)) == tree


def test_none_is_left_out_at_every_depth():
    tree = {"a": None, "b": {"c": None, "d": 1}, "e": [{"f": None}, {"g": 2}]}
    assert tomllib.loads(toml_text(tree)) == {"b": {"d": 1}, "e": [{}, {"g": 2}]}


def test_tables_of_tables_keep_their_order():
    tree = {"hosts": [{"name": "a", "gpus": [{"index": 0}, {"index": 1}]}, {"name": "b", "gpus": [{"index": 0}]}]}
    text = toml_text(tree)
    assert text.index('"a"') < text.index('"b"')
    assert tomllib.loads(text) == tree


def test_a_name_with_dots_and_quotes_is_a_key_of_its_own():
    assert toml_text({'a."b': {"c": 1}}) == '["a.\\"b"]\nc = 1\n'
