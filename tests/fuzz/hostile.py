"""Values that code seldom expects, as recipes write them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

LARGE: list[Any] = [
    {"$raw": [["[", 300], ["]", 300]]},
    {"$raw": [["[", 10_000], ["]", 10_000]]},
    {"$raw": [['{"a":', 10_000], ["1", 1], ["}", 10_000]]},
    {"$repeated": ["a", 100_000]},
    {"$repeated": ["\u00e9 ", 50_000]},
    {"$repeated": ["{{", 2_000]},
    {"$listed": [0, 100_000]},
    {"$listed": [{}, 20_000]},
    {"$listed": ["", 100_000]},
    {"$wide": 50_000},
]
SMALL: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308),
    *("", "\0", "\ud800", "a", "../../x", "x/file", "derived-a", "\u202e", "%s%n", "toy@", "toy@common"),
    *([], {}, [[]], [None], [{}], {"": ""}, {"type": "text"}, {"type": None}),
    {"$raw": [["NaN", 1]]},
    {"$raw": [["Infinity", 1]]},
    {"$raw": [["1" * 5000, 1]]},
    {"$raw": [["", 1]]},
    {"$raw": [['{"a":1,"a":2}', 1]]},
]


def values() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from(SMALL),
        st.sampled_from(LARGE),
        st.integers(),
        st.text(max_size=20),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
