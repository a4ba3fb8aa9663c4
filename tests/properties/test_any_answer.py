"""Any bytes that an upstream server may answer, in any pieces: the same answer and events, or an OSError."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from by_hand import LIMIT, Outcome, answer, any_split
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, mutated, now_and_then, tries

import http1

STARTS = [b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 100 x\r\n\r\nHTTP/1.1 599 x"]
ODD_STARTS = [b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 x", b"HTTP/2 200", b"HTTP/1.1 20 x", b"HTTP/1.1 101 x", b""]
FIELDS = [b"Connection: close", b"X:\xff", b"X: y"]
ODD_FIELDS = [
    b"Content-Length: 5", b"Content-Length: 05", b"Content-Length: x", b"Content-Length: 100", b" x", b"A : b",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: gzip, chunked",
]  # fmt: skip
BODIES = [
    b"hello", b"data: a\n\n", b"\xef\xbb\xbfdata:a\ndata: b\n\n:c\nevent: x\n\ndata", b"data: \xc3\xa9\r\n\r\n",
    b"data: x\r", b"x" * LIMIT, b"",
]  # fmt: skip
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\n\n", b"data:", b"data: x\n", b":", b"\0", b"\xef\xbb\xbf", b"\xc3", b"\xff",
    b"0\r\n\r\n", b"5\r\n", b"HTTP/1.1 200 OK\r\n", b"Content-Length: 0\r\n", b"\xe2\x80\xa8", b"\x85",
]  # fmt: skip
streams = mutated(st.sampled_from(BODIES) | st.lists(st.sampled_from(TOKENS)).map(b"".join), TOKENS)
FRAMES: dict[str, Callable[[bytes, int], bytes]] = {
    "Content-Length: %d\r\n": lambda body, size: body,
    "Transfer-Encoding: chunked\r\n": lambda body, size: (
        b"".join(http1.chunk(body[at : at + size]) for at in range(0, len(body), size)) + http1.LAST_CHUNK
    ),
    "Connection: close\r\n": lambda body, size: body,
}


def framed(frame: str, body: bytes, size: int) -> bytes:
    head = "HTTP/1.1 200 OK\r\n" + (frame % len(body) if "%" in frame else frame)
    return f"{head}\r\n".encode() + FRAMES[frame](body, size)


near = mutated(
    st.builds(
        lambda start, fields, end, frame, body: end.join([start, *fields, framed(frame, body, 9).split(b"\r\n", 1)[1]]),
        now_and_then(ODD_STARTS, STARTS),
        st.lists(now_and_then(ODD_FIELDS, FIELDS), max_size=2),
        st.sampled_from([b"\r\n", b"\r\n", b"\n"]),
        st.sampled_from(list(FRAMES)),
        st.sampled_from(BODIES),
    ),
    TOKENS,
)


def events_of(stream: str) -> Iterator[str]:
    """The events of a stream, simply; one that its end cuts off counts, too."""
    data: list[str] = []
    for line in [*stream.split("\n"), ""]:
        line = line.removesuffix("\r")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def read(seen: Outcome) -> None:
    if isinstance(seen[-1], bool):
        assert len(seen) > 2
    else:
        assert seen[-1], "an error says something"


@given(st.binary(max_size=200), SIZES, st.booleans())
def test_any_bytes(data: bytes, sizes: list[int], events: bool) -> None:
    read(any_split(partial(answer, events=events), data, sizes))


@tries(700)
@given(near, SIZES, st.sampled_from(["GET", "POST", "HEAD"]), st.booleans())
def test_nearly_answers(data: bytes, sizes: list[int], method: str, events: bool) -> None:
    read(any_split(partial(answer, method=method, events=events), data, sizes))


@given(st.sampled_from(list(FRAMES)), st.binary(max_size=LIMIT), st.integers(1, 50), SIZES)
def test_a_body_is_the_same_in_every_frame(frame: str, body: bytes, size: int, sizes: list[int]) -> None:
    _, _, read, reusable = any_split(answer, framed(frame, body, size), sizes)
    assert read == body
    assert reusable is ("close" not in frame)


@tries(500)
@given(st.sampled_from(list(FRAMES)), streams, st.integers(1, 50), SIZES)
def test_any_stream_has_the_same_events_in_every_frame(frame: str, stream: bytes, size: int, sizes: list[int]) -> None:
    seen = any_split(partial(answer, events=True), framed(frame, stream, size), sizes)[2:-1]
    assert seen == list(events_of(stream.decode("utf-8-sig", "replace")))


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12), max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["data: ", "data:"]),
    st.sampled_from(["", ": comment{0}", "event: x{0}id: 1{0}", "{0}", "retry: 5{0}{0}"]),
    st.sampled_from(list(FRAMES)),
    SIZES,
)
def test_events_are_read_as_they_were_written(
    events: list[str], end: str, name: str, between: str, frame: str, sizes: list[int]
) -> None:
    if name == "data:":  # one space behind the colon is not of the value
        events = [event.replace(" ", "_") for event in events]
    stream = "".join(
        between.format(end) + "".join(f"{name}{line}{end}" for line in event.split("\n")) + end for event in events
    )
    assert any_split(partial(answer, events=True), framed(frame, stream.encode(), 9), sizes)[2:-1] == events
