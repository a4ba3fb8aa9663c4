"""Fuzz what reads frames, of a client and of a server: the same messages in any pieces, and then one close code."""

from __future__ import annotations

from fuzzing import fuzz, instrumented

with instrumented():
    from by_hand import any_split, messages


def target(data: bytes) -> None:
    """The first byte says whose frames the others are."""
    client = data[:1] > b"\x7f"
    *_, (code, _, _, _) = any_split(lambda pieces: messages(pieces, client), data[1:], [len(data) % 40 + 2])
    assert 1000 <= code < 5000


if __name__ == "__main__":
    fuzz("frames", target)
