"""Fuzz what reads requests: the same ones in any pieces, and then one HTTPError or the end."""

from __future__ import annotations

from fuzzing import fuzz, instrumented

with instrumented():
    from by_hand import any_split, requests

    import http1


def target(data: bytes) -> None:
    *_, end = any_split(requests, data, [len(data) % 40 + 2])
    assert end is None or 400 <= end[0] < 600
    http1._remembered.clear()  # what is remembered would hide branches


if __name__ == "__main__":
    fuzz("head", target)
