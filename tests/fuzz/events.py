"""Fuzz what reads an answer and its server-sent events: the same ones in any pieces, or an OSError."""

from __future__ import annotations

from fuzzing import fuzz, instrumented

with instrumented():
    from by_hand import answer, any_split

    import http1


def target(data: bytes) -> None:
    assert any_split(lambda pieces: answer(pieces, events=True), data, [len(data) % 40 + 2])[-1] != ""
    http1._remembered.clear()


if __name__ == "__main__":
    fuzz("events", target)
