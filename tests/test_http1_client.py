"""HTTP/1.1, the client's half, against a server that says what it is told to."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest

import http1
from http1 import ProtocolError
from scripted import CLOSE, HI, OK, Pool, Server, events_of, fetch, new_pool, serve

# Answers


@pytest.mark.parametrize("pieces", [1 << 20, 1, 7])
@pytest.mark.parametrize(
    ("answer", "method", "status", "body"),
    [
        pytest.param(HI, "POST", 200, b"hi", id="length"),
        pytest.param(OK + b"content-length:0\r\n\r\n", "POST", 200, b"", id="no body"),
        pytest.param(b"HTTP/1.1 404\r\nContent-Length: 2\r\n\r\nno", "GET", 404, b"no", id="no reason, no space"),
        pytest.param(b"HTTP/1.1 500 \r\nContent-Length: 2\r\n\r\nno", "GET", 500, b"no", id="no reason"),
        pytest.param(b"HTTP/1.1 599 \xe9\xff\r\nContent-Length: 2\r\n\r\nno", "GET", 599, b"no", id="reason obs-text"),
        pytest.param(
            OK + b"Transfer-Encoding: Chunked\r\n\r\n1\r\nh\r\n1;x=y\r\ni\r\n0\r\nT: v\r\n\r\n",
            "POST",
            200,
            b"hi",
            id="chunked",
        ),
        pytest.param((OK + b"\r\nto the end", CLOSE), "GET", 200, b"to the end", id="to the end"),
        pytest.param((b"HTTP/1.0 200 OK\r\n\r\nold", CLOSE), "GET", 200, b"old", id="1.0 to the end"),
        pytest.param((b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", CLOSE), "GET", 200, b"hi", id="1.0"),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", "GET", 200, b"hi", id="LF"),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HI,
            "POST",
            200,
            b"hi",
            id="1xx",
        ),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", "POST", 204, b"", id="204"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "GET", 304, b"", id="304"),
        pytest.param(OK + b"Content-Length: 99\r\n\r\n", "HEAD", 200, b"", id="HEAD"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n", "HEAD", 200, b"", id="HEAD chunked"),
    ],
)
def test_answer(answer: Any, method: str, status: int, body: bytes, pieces: int) -> None:
    async def work(server: Server, pool: Pool) -> None:
        assert await fetch(server, pool, method) == (status, body)

    serve([answer], work, pieces)


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("pieces", [1 << 20, 1, 7])
@pytest.mark.parametrize(
    ("chunks", "body"),
    [
        pytest.param(b"0\r\n\r\n", b"", id="none"),
        pytest.param(b"1\r\na\r\n009\r\n0\r\n\r\n2\r\n\n\r\n000\r\n\r\n", b"a0\r\n\r\n2\r\n\n", id="like framing"),
        pytest.param(b'1\r\na\r\n1 ; x="a;b" ; y\r\nb\r\n0;z\r\n\r\n', b"ab", id="extensions"),
        pytest.param(b"1;" + b"x" * 252 + b"\r\na\r\n0\r\n\r\n", b"a", id="the longest line"),
        pytest.param(b"0\r\nA: b\r\nC:\r\n\r\n", b"", id="trailer"),
        pytest.param(b"0\r\nA: " + b"b" * 8000 + b"\r\n\r\n", b"", id="long trailer"),
        pytest.param(b"0000000000000001\r\na\r\n0000000000000000\r\n\r\n", b"a", id="16 digits"),
    ],
)
def test_chunks(chunks: bytes, body: bytes, pieces: int) -> None:
    async def work(server: Server, pool: Pool) -> None:
        for _ in range(2):
            assert await fetch(server, pool) == (200, body)
        assert server.connections == 1

    serve([CHUNKED + chunks] * 2, work, pieces)


@pytest.mark.parametrize("pieces", [1 << 20, 1, 7])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(b"\r\n1\r\na\r\n0\r\n\r\n", id="an empty line first"),
        pytest.param(b"1\r\na0\r\n\r\n", id="no CRLF"),
        pytest.param(b"1\r\na\n0\r\n\r\n", id="LF behind the data"),
        pytest.param(b"1\r\na\r\n\r\n", id="an empty line for a size"),
        pytest.param(b"1\na\r\n0\r\n\r\n", id="LF behind the size"),
        pytest.param(b"-1\r\na\r\n0\r\n\r\n", id="sign"),
        pytest.param(b" 1\r\na\r\n0\r\n\r\n", id="space"),
        pytest.param(b"00000000000000001\r\na\r\n0\r\n\r\n", id="17 digits"),
        pytest.param(b"1;" + b"x" * 253 + b"\r\na\r\n0\r\n\r\n", id="line too long"),
        pytest.param(b"0\r\nA: " + b"b" * 9000 + b"\r\n\r\n", id="trailer too long"),
        pytest.param(b"0\r\nA: b\nC: d\r\n\r\n", id="LF in the trailer"),
        pytest.param(b"0\r\nA : b\r\n\r\n", id="trailer malformed"),
    ],
)
def test_broken_chunks_are_known_at_once(chunks: bytes, pieces: int) -> None:
    async def work(server: Server, pool: Pool) -> None:
        with pytest.raises(ProtocolError, match="malformed"):
            await fetch(server, pool)

    serve([CHUNKED + chunks], work, pieces)


def test_part_of_a_chunk_is_handed_on_as_it_comes() -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("POST", server.url, [], b"")
        async with aclosing(response.events()) as events:
            assert await anext(events) == "a"  # its chunk goes on
        response.close()

    serve([CHUNKED + b"fff\r\ndata: a\n\nda"], work)


@pytest.mark.parametrize("framing", [b"Content-Length: 999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"\r\n"])
def test_closing_ends_what_is_being_read(framing: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("POST", server.url, [], b"")
        asyncio.get_running_loop().call_later(0.01, response.close)
        if framing == b"\r\n":  # the end of the connection is the body's
            assert await response.read(9) == b""
        else:
            with pytest.raises(ProtocolError, match="broke off"):
                await response.read(9)
        assert not pool._busy
        assert not any(pool._idle.values())

    serve([OK + framing], work)


@pytest.mark.parametrize(
    "answer",
    [HI + b"x", CHUNKED + b"2\r\nhi\r\n0\r\n\r\n\r\n", OK + b"Content-Length: 0\r\n\r\n" + HI],
    ids=["length", "chunked", "a second answer"],
)
def test_what_comes_with_an_answer_is_not_taken_for_the_next(answer: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        await fetch(server, pool)
        assert await fetch(server, pool) == (200, b"hi")
        assert server.connections == 2

    serve([answer, HI], work)


def test_large_bodies() -> None:
    large = bytes(range(256)) * 800  # more than three pieces
    script = [
        OK + b"Content-Length: %d\r\n\r\n" % len(large) + large,
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + http1.chunk(large) + http1.chunk(b"x") + http1.LAST_CHUNK,
        (OK + b"\r\n" + large, CLOSE),
    ]

    async def work(server: Server, pool: Pool) -> None:
        for expected in (large, large + b"x", large):
            assert await fetch(server, pool, body=large) == (200, expected)

    server = serve(script, work)
    assert [request.endswith(b"\r\n\r\n" + large) for request in server.requests] == [True] * 3


def test_the_answers_fields() -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("GET", server.url, [], b"")
        assert response.fields == {"retry-after": "7", "x": "1, 2", "content-length": "0"}
        response.close()
        response.close()  # harmless

    serve([b"HTTP/1.1 429 x\r\nRetry-After: 7\r\nX: 1\r\nx:2 \r\nContent-Length: 0\r\n\r\n"], work)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", id="cut in the head"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="only 1xx"),
        pytest.param(b"hello\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/2.0 200 OK\r\n\r\n", id="HTTP/2"),
        pytest.param(b"HTTP/1.1 20 OK\r\n\r\n", id="short status"),
        pytest.param(b"HTTP/1.1 2000 OK\r\n\r\n", id="long status"),
        pytest.param(b"HTTP/1.1 600 OK\r\n\r\n", id="status beyond 599"),
        pytest.param(b"HTTP/1.1 200 a\rb\r\n\r\n", id="bare CR in the reason"),
        pytest.param(b" HTTP/1.1 200 OK\r\n\r\n", id="space"),
        pytest.param(b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", id="status line too long"),
        pytest.param(OK + b"no colon\r\n\r\n", id="no field"),
        pytest.param(OK + b"a : b\r\n\r\n", id="space before the colon"),
        pytest.param(OK + b"a: b\r\n c\r\n\r\n", id="obs-fold"),
        pytest.param(OK + b"a: b\0\r\n\r\n", id="NUL"),
        pytest.param(OK + b"a: b\rc: d\r\n\r\n", id="bare CR"),
        pytest.param(OK + b"a: " + b"b" * 70_000 + b"\r\n\r\n", id="field too long"),
        pytest.param(OK + (b"a: " + b"b" * 1000 + b"\r\n") * 40 + b"\r\n", id="head too long"),
        pytest.param(OK + b"a: b\r\n" * 101 + b"\r\n", id="too many fields"),
        pytest.param(OK + b"Content-Length: x\r\n\r\nhi", id="bad length"),
        pytest.param(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", id="two lengths"),
        pytest.param(OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi", id="both"),
        pytest.param(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="gzip"),
        pytest.param(OK + b"Content-Length: 5\r\n\r\nhi", id="cut body"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhi", id="cut chunk"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", id="no last chunk"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n", id="no end of trailer"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n20000\r\n" + b"x" * 0x10001, id="cut large chunk"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", id="bad size"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi!\r\n0\r\n\r\n", id="chunk longer than said"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 70_000, id="chunk line too long"),
        pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nno colon\r\n\r\n", id="bad trailer"),
        pytest.param(OK + b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000, id="longer than the limit"),
        pytest.param(OK + b"\r\n" + b"x" * 2_000_000, id="endless"),
    ],
)
def test_broken_answer(answer: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        with pytest.raises(OSError, match=r".") as error:
            await fetch(server, pool)
        assert not isinstance(error.value, TimeoutError)
        assert not pool._busy
        assert not any(pool._idle.values())

    serve([(answer, CLOSE)], work)


# Requests


@pytest.mark.parametrize(
    ("path", "line"),
    [("", b"/"), ("/", b"/"), ("/a/b?c=d?e", b"/a/b?c=d?e"), ("?q", b"/?q"), ("/%20", b"/%20")],
)
def test_request_bytes(path: str, line: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("POST", server.url + path, [("X-A", "b\xe9")], b"body")
        assert await response.read(10) == b"hi"
        response.close()

    server = serve([HI], work)
    host = server.url.removeprefix("http://").encode()
    fields = b"Host: " + host + b"\r\nContent-Length: 4\r\nX-A: b\xe9\r\n\r\n"
    assert server.requests == [b"POST " + line + b" HTTP/1.1\r\n" + fields + b"body"]


@pytest.mark.parametrize(
    "url",
    ["", "x", "/x", "ftp://h/", "http:/h/", "http://", "http:///x", "http://u@h/", "http://h:x/", "http://h:99999/",
     "http://a b/", "http://:80/", "http://[::1/", "ws://h/"],
)  # fmt: skip
def test_bad_url(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        asyncio.run(new_pool().request("GET", url, [], b""))


@pytest.mark.parametrize("bad", ["\r\nX: y", "\r", "\n", "\0"])
def test_injection_is_refused(bad: str) -> None:
    async def work(server: Server, pool: Pool) -> None:
        for method, path, field in (
            (f"GET{bad}", "", ("a", "b")),
            ("GET", f"/x{bad}", ("a", "b")),
            ("GET", f"/x?y{bad}", ("a", "b")),
            ("GET", "/", (f"a{bad}", "b")),
            ("GET", "/", ("a", f"b{bad}")),
            ("GET", "/", ("a", f"{bad}b")),
        ):
            with pytest.raises(ValueError, match=r"field|URL"):
                await pool.request(method, server.url + path, [field], b"")

    assert serve([], work).connections == 0


# Events


EVENTS: list[tuple[str, bytes, list[str]]] = [
    ("none", b"", []),
    ("two", b"data: a\n\ndata: b\n\n", ["a", "b"]),
    ("CRLF", b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    ("mixed", b"data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
    ("no space", b"data:a\n\n", ["a"]),
    ("one space is dropped, no more", b"data:  a \n\n", [" a "]),
    ("empty data", b"data:\n\ndata: \n\n", ["", ""]),
    ("two lines", b"data: a\ndata: b\n\n", ["a\nb"]),
    ("comments", b": hello\n\n:\ndata: a\n: in between\ndata: b\n\n: bye\n\n", ["a\nb"]),
    ("other fields", b"event: x\nid: 7\nretry: 10\ndata: a\ndatum: b\nxdata: c\n\nevent: y\n\n", ["a"]),
    ("empty lines", b"\n\n\r\n\ndata: a\n\n\n\n", ["a"]),
    ("BOM", b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    ("BOM once", b"\xef\xbb\xbfdata: a\n\ndata: \xef\xbb\xbfb\n\n", ["a", "\ufeffb"]),
    ("UTF-8", "data: é€😀\n\n".encode(), ["é€😀"]),
    ("no line ends but CR and LF", "data: a\u2028b\x0bc\x85d\n\n".encode(), ["a\u2028b\x0bc\x85d"]),
    ("not UTF-8", b"data: a\xffb\n\n", ["a\ufffdb"]),
    ("no empty line at the end", b"data: a\n\ndata: b\n", ["a", "b"]),
    ("no end of line at the end", b"data: a\n\ndata: b", ["a", "b"]),
    ("CR at the end", b"data: a\n\ndata: b\r", ["a", "b"]),
    ("a comment at the end", b"data: a\n\n: b", ["a"]),
    ("colons", b'data: {"a": 1}\n\n', ['{"a": 1}']),
]


@pytest.mark.parametrize("pieces", [1 << 20, 1, 7])
@pytest.mark.parametrize("framing", ["length", "chunked", "small chunks", "end"])
@pytest.mark.parametrize(("body", "expected"), [pytest.param(*row[1:], id=row[0]) for row in EVENTS])
def test_events(body: bytes, expected: list[str], framing: str, pieces: int) -> None:
    answer: Any
    if framing == "length":
        answer = OK + b"Content-Length: %d\r\n\r\n" % len(body) + body
    elif framing == "end":
        answer = (OK + b"\r\n" + body, CLOSE)
    else:
        size = 1 if framing == "small chunks" else 1 << 20
        chunks = b"".join(http1.chunk(body[n : n + size]) for n in range(0, len(body), size))
        answer = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + http1.LAST_CHUNK

    async def work(server: Server, pool: Pool) -> None:
        assert await events_of(server, pool) == expected

    serve([answer], work, pieces)


def test_events_come_at_once() -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("POST", server.url, [], b"")
        async with aclosing(response.events()) as events:
            async for event in events:
                assert event == "a"  # and the answer goes on
                break
        response.close()
        await server.ended.wait()

    serve([OK + b"Transfer-Encoding: chunked\r\n\r\n" + http1.chunk(b"data: a\n\n")], work)


def test_events_break_off() -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("POST", server.url, [], b"")
        taken: list[str] = []
        events = response.events()
        taken.append(await anext(events))
        with pytest.raises(ProtocolError, match="broke off"):
            await anext(events)
        assert taken == ["a"]
        response.close()

    serve([(OK + b"Transfer-Encoding: chunked\r\n\r\n" + http1.chunk(b"data: a\n\ndata: b"), CLOSE)], work)


@pytest.mark.parametrize("size", [http1.MAX_EVENT - 100, http1.MAX_EVENT + http1.PIECE])
def test_a_line_of_events_has_a_limit(size: int) -> None:
    async def work(server: Server, pool: Pool) -> None:
        if size > http1.MAX_EVENT:
            with pytest.raises(ProtocolError, match="longer than"):
                await events_of(server, pool)
        else:
            assert await events_of(server, pool) == ["x" * size]

    serve([(OK + b"\r\ndata: " + b"x" * size, CLOSE)], work)


def test_an_event_has_a_limit() -> None:
    async def work(server: Server, pool: Pool) -> None:
        with pytest.raises(ProtocolError, match="longer than"):
            await events_of(server, pool)

    serve([(OK + b"\r\n" + (b"data: " + b"x" * 1000 + b"\n") * 3000, CLOSE)], work)


def test_an_event_of_many_lines_takes_linear_time() -> None:
    async def work(server: Server, pool: Pool) -> None:
        spent = []
        for _ in range(2):
            start = time.process_time()
            await events_of(server, pool)
            spent.append(time.process_time() - start)
        assert spent[1] < 10 * spent[0] + 0.1

    line, count = b"data: x\n", 10_000
    serve([(OK + b"\r\n" + end * count, CLOSE) for end in (line + b"\n", line)], work)
