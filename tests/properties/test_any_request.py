"""Any bytes that a client may send, in any pieces: requests, one HTTPError, or the end."""

from __future__ import annotations

import re
from itertools import zip_longest

from by_hand import LIMIT, Outcome, answer, any_split, requests
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SIZES, mutated, now_and_then, tries

import http1

STATUSES = {400, 413, 414, 417, 431, 501, 505}
LINES = [
    b"GET / HTTP/1.1", b"POST /v1/chat/completions?x=%20 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"HEAD //a HTTP/1.0",
    b"GET http://h:80/x?y HTTP/1.1", b"GET HTTP://[::1]? HTTP/1.1", b"get / HTTP/1.9", b"\r\nGET / HTTP/1.1",
]  # fmt: skip
FIELDS = [
    b"Connection: close, keep-alive", b"Connection: Upgrade", b"Expect: 100-continue", b"X: \xff\t", b"X:", b"x: a",
    b"X" * 300 + b":",
]  # fmt: skip
ODD_LINES = [
    b"GET /#f HTTP/1.1", b"GET http:///x HTTP/1.1", b"PRI * HTTP/2.0", b"M" * 65 + b" / HTTP/1.1", b"GET / HTTP/1.1 ",
    b"GET * HTTP/1.1", b"GET h:80 HTTP/1.1", b"GET /", b"",
]  # fmt: skip
ODD_FIELDS = [
    b"Host: a, b", b"Host: ", b"Host: h", b"Host: h:99999", b"Expect: tea", b"Content-Length: 05", b"Content-Length: 5",
    b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length: 101", b"Content-Length: \xb25",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b" folded", b"A : b", b": b", b"",
]  # fmt: skip
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"5", b"f", b"-1", b"x", b"\x85",
    b"\xa0", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"GET / HTTP/1.1\r\n", b"Host: h\r\n\r\n",
]  # fmt: skip
CHUNK_LINES = [b"5", b"05", b"5;a=b", b'5 ; a="\\"q" ;c']
ODD_CHUNK_LINES = [b"0", b"ffffffffffffffff", b"11111111111111111", b"5;", b"+5", b"0x5", b""]
chunks = st.builds(
    b"%b\r\nhello%b".__mod__,
    st.tuples(now_and_then(ODD_CHUNK_LINES, CHUNK_LINES), now_and_then([b"", b"\n", b"XX"], [b"\r\n"])),
)
chunked = st.builds(
    lambda chunks, trailer: b"".join(chunks) + b"0\r\n%b\r\n" % trailer,
    st.lists(chunks, max_size=3),
    st.sampled_from([b"", b"T: v\r\n"]),
)
framed = st.one_of(
    st.just((b"Host: h", b"")),
    st.binary(max_size=LIMIT).map(lambda body: (b"Host: h\r\nContent-Length: %d" % len(body), body)),
    chunked.map(lambda body: (b"host:[::1]:80\r\ntransfer-encoding:\tCHUNKED ", body)),
)
near = mutated(
    st.builds(
        lambda line, fields, frame: b"\r\n".join([line, frame[0], *fields, b"", frame[1]]),
        now_and_then(ODD_LINES, LINES),
        st.lists(now_and_then(ODD_FIELDS, FIELDS), max_size=3),
        framed,
    ),
    TOKENS,
)
names = st.text("abcXYZ019-_!~", min_size=1, max_size=8).map(lambda name: f"X-{name}")
values = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=20)
fields = st.dictionaries(names.map(str.lower), values.map(lambda value: value.strip(" ")), max_size=5)


def ended(seen: Outcome) -> None:
    assert seen[-1] is None or (seen[-1][0] in STATUSES and seen[-1][1])
    for request, body in zip_longest(seen[:-1:2], seen[1:-1:2]):
        fields = request.fields
        assert re.fullmatch(r"[^\x00-\x20\x7f-\xff#]+", request.target)
        assert all(re.fullmatch("[!-~]+", name) and not re.search(r"[\0\r\n]", fields[name]) for name in fields)
        assert request.minor == 0 or "host" in fields
        assert not {"content-length", "transfer-encoding"} <= fields.keys()
        assert request.length is not None or fields["transfer-encoding"].lower() == "chunked"
        assert body is None or len(body) == (len(body) if request.length is None else request.length) <= LIMIT


def dechunked(data: bytes) -> bytes | None:
    """The chunked body that the data begins with, simply; None where it is none."""
    body = b""
    while match := re.match(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n", data):
        size, data = int(match[1], 16), data[match.end() :]
        if not size:
            return body
        body, end, data = body + data[:size], data[size : size + 2], data[size + 2 :]
        if end != b"\r\n":
            return None
    return None


@given(st.binary(max_size=200), SIZES)
@example(b"", [1])
@example(b"\r\n" * 20, [3])
@example(b"G" * (http1.MAX_HEAD + 2), [4096])
@example(b"GET / HTTP/1.1\r\n" + b"X" * http1.MAX_HEAD + b"\r\n\r\n", [4096])
@example(b"GET / HTTP/1.1\r\nHost: h\r\nX:" + b"y" * (http1.MAX_HEAD - 31) + b"\r\n\r\n", [16384, 1])
@example(b"GET / HTTP/1.1\r\nHost: h\r\nX:" + b"y" * (http1.MAX_HEAD - 32) + b"\r\n\r\n", [16384, 1])
@example(b"GET /" + b"x" * http1.MAX_TARGET + b" HTTP/1.1\r\n\r\n", [1000])
@example(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a:\r\n" * 101 + b"\r\n", [7])
def test_any_bytes(data: bytes, sizes: list[int]) -> None:
    ended(any_split(requests, data, sizes))


@tries(1000)
@given(near, SIZES)
def test_nearly_requests(data: bytes, sizes: list[int]) -> None:
    seen = any_split(requests, data, sizes)
    ended(seen)
    request, body, *_ = [*seen, None]
    if isinstance(request, http1.Request) and isinstance(body, bytes):
        rest = data[data.index(b"\r\n\r\n", data.index(request.target.encode())) + 4 :]
        assert body == (dechunked(rest) if request.length is None else rest[: request.length])


@given(
    st.sampled_from(["GET", "POST", "M-SEARCH!"]),
    st.sampled_from([("h", "h"), ("h:8080", "h"), ("127.0.0.1", "127.0.0.1"), ("[::1]:9", "::1")]),
    st.text("abcXYZ019-_/.~%", max_size=12),
    st.text("abc=&?/%2F", max_size=8),
    fields,
    st.binary(max_size=LIMIT),
    SIZES,
)
def test_a_request_is_read_as_it_was_written(
    method: str, host: tuple[str, str], path: str, query: str, fields: dict[str, str], body: bytes, sizes: list[int]
) -> None:
    url = f"http://{host[0]}/{path}" + (f"?{query}" if query else "")
    origin, data = http1.format_request(method, url, fields.items(), body)
    assert origin[1] == host[1]
    request, read, end = any_split(requests, data, sizes)
    assert (request.method, request.host, request.path, request.query) == (method, host[0], f"/{path}", query)
    assert request.fields == {"host": host[0], "content-length": str(len(body)), **fields}
    assert (read, request.keep_alive, end) == (body, True, None)


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), SIZES)
def test_chunks_are_read_as_they_were_written(chunks: list[bytes], sizes: list[int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"".join(map(http1.chunk, chunks)) + http1.LAST_CHUNK
    assert any_split(requests, data, sizes)[1:] == [b"".join(chunks), None]


@given(st.sampled_from([200, 404, 503, 599]), fields, st.binary(max_size=LIMIT), SIZES)
def test_an_answer_is_read_as_it_was_written(
    status: int, fields: dict[str, str], body: bytes, sizes: list[int]
) -> None:
    data = http1.head(status, [*fields.items(), ("Content-Length", str(len(body)))]) + body
    code, named, read, reusable = any_split(answer, data, sizes)
    assert (code, read, reusable) == (status, body, True)
    del named["date"], named["content-length"]
    assert named == fields


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_field_ends_its_line(name: str, value: str) -> None:
    try:
        data = http1.head(200, [(name, value)])
    except (ValueError, UnicodeEncodeError):
        return
    assert data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r") == 4
