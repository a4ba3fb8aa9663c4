"""What the properties draw from: JSON values, cuts, and messages that are nearly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)  # of the pieces in which bytes come
KEYS = st.text(max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31, 2**1100)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.just("\ud800")  # what JSON can say and UTF-8 cannot
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
OBJECTS = st.dictionaries(KEYS, JSON, max_size=5)

WHERE = st.floats(0, 1, exclude_max=True)


def tries(count: int, **more: Any) -> settings:
    """So many examples, and thirty times as many where there is time."""
    return settings(max_examples=count if settings().derandomize else 30 * count, **more)


def now_and_then(odd: Sequence[bytes], right: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(right if n else odd))


def mutated(messages: st.SearchStrategy[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Some of these messages, one behind the other, with a few pieces cut out, put in or written over."""
    edits = st.lists(st.tuples(WHERE, st.integers(0, 4), st.sampled_from(tokens) | st.binary(max_size=2)), max_size=3)

    def apply(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
        for where, cut, new in edits:
            at = int(where * (len(data) + 1))
            data = data[:at] + new + data[at + cut :]
        return data

    return st.builds(apply, st.lists(messages, min_size=1, max_size=3).map(b"".join), st.just([]) | edits)
