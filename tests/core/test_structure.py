"""Nested containers: every leaf is seen once, and structures come back as they were."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lnp.contract.trees import children, leaves, map_leaves

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Record:
    left: Any
    right: Any
    derived: int = field(default=3, init=False)


def containers(inner):
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
    )


trees = st.recursive(st.integers() | st.none() | st.text(max_size=2), containers, max_leaves=12)


@given(trees)
def test_identity_rebuilds_the_structure(tree):
    again = map_leaves(lambda leaf: leaf, tree)
    assert again == tree
    assert type(again) is type(tree)
    assert repr(again) == repr(tree)


@given(trees)
def test_leaves_are_those_that_are_mapped(tree):
    seen = []
    map_leaves(seen.append, tree)
    fixed = [leaf for leaf in leaves(tree) if leaf != 3]  # a field that is not set by the constructor is not mapped
    assert [leaf for leaf in seen if leaf != 3] == fixed


@given(trees)
def test_mapping_composes(tree):
    wrap, double = (lambda leaf: f"<{leaf}>"), (lambda leaf: leaf * 2)
    assert map_leaves(double, map_leaves(wrap, tree)) == map_leaves(lambda leaf: double(wrap(leaf)), tree)


def test_children_by_name():
    assert children({1: "a", "b": 2}) == {"1": "a", "b": 2}
    assert children([5, 6]) == {"0": 5, "1": 6}
    assert children(Record(1, 2)) == {"left": 1, "right": 2, "derived": 3}
    assert children(Record) is children("text") is children(1) is None


def test_own_mappings():
    assert type(map_leaves(str, UserDict(a=1))) is UserDict

    class Strict(UserDict):
        def __init__(self, *, size):
            super().__init__()
            self.size = size

    tree = Strict(size=1)
    tree["a"] = 1
    assert map_leaves(str, tree) == {"a": "1"}
