"""HTTP/1.1, the server's half, as a table of bytes: each row whole, byte by byte, and in sevens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

import http1
from http1 import HTTPError, Request

LIMIT = 100  # bytes of a body, in this table
NEXT = b"NEXT"  # what follows a message stays unread
SPLITS = {"whole": 1 << 20, "bytes": 1, "sevens": 7}
END = "the end of the stream"
Good = dict[str, Any]  # attributes of the Request, and "body"
Bad = tuple[int, str]  # status, a piece of the message
Row = tuple[str, bytes, Any]


def head(*fields: bytes, line: bytes = b"GET / HTTP/1.1", host: bool = True) -> bytes:
    lines = [line, *([b"Host: h"] if host else []), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return head(*fields, line=b"POST / HTTP/1.1") + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


def target(value: bytes, **expected: Any) -> Row:
    return f"9112 3.2 target {value[:30]!r}", head(line=b"GET " + value + b" HTTP/1.1"), expected


def big_head(size: int) -> bytes:
    fields = [b"X-%d: " % n + b"v" * 4000 for n in range(8)]
    return head(*fields, b"X-Last: " + b"v" * (size - len(head(*fields, b"X-Last: "))))


def many_fields(count: int) -> bytes:
    return head(*(b"X-%d: v" % n for n in range(count - 1)))  # and Host


def long_target(size: int) -> bytes:
    return head(line=b"GET /" + b"a" * (size - 1) + b" HTTP/1.1")


LINE = (400, "request line")
TARGET = (400, "The request-target")
HOST = (400, "The Host field")
FIELD = (400, "Field line 2")
SIZE = (400, "A chunk must begin with its size")
TRAILER = (400, "A trailer line")
CUT_HEAD = (400, "ended inside the head")
CUT_CHUNK = (400, "ended inside a chunked body")

REQUEST_LINES: list[Row] = [
    ("9112 3 plain", head(), {"method": "GET", "target": "/", "path": "/", "query": "", "minor": 1, "body": b""}),
    ("9110 9.1 any token", head(line=b"M-SEARCH!#$%&'*+.^_`|~ / HTTP/1.1"), {"method": "M-SEARCH!#$%&'*+.^_`|~"}),
    ("9110 9.1 methods keep their case", head(line=b"get / HTTP/1.1"), {"method": "get"}),
    ("longest method", head(line=b"M" * 64 + b" / HTTP/1.1"), {"method": "M" * 64}),
    ("method too long", head(line=b"M" * 65 + b" / HTTP/1.1"), LINE),
    ("9112 2.3 1.0 closes", head(line=b"GET / HTTP/1.0"), {"minor": 0, "keep_alive": False}),
    ("9110 2.5 a later minor", head(line=b"GET / HTTP/1.2"), {"minor": 2, "keep_alive": True}),
    ("9110 2.5 major 2", head(line=b"GET / HTTP/2.0"), (505, "HTTP/2.0 is not spoken")),
    ("9113 3.4 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505, "HTTP/2.0")),
    ("9110 2.5 major 0", head(line=b"GET / HTTP/0.9"), (505, "HTTP/0.9")),
    *(
        (f"9112 3 {line!r}", head(line=line), LINE)
        for line in (
            b"GET /",
            b"GET",
            b"GET  / HTTP/1.1",
            b"GET /  HTTP/1.1",
            b"GET / HTTP/1.1 ",
            b" GET / HTTP/1.1",
            b"GET\t/\tHTTP/1.1",
            b"GET / http/1.1",
            b"GET / HTTP/1.10",
            b"GET / HTTP/11",
            b"GET / HTTP/1",
            b"GET / HTTP/1,1",
            b"GET / HTTP/ 1.1",
            b"GET / HTTPS/1.1",
            b"GET  HTTP/1.1",
            b"G@T / HTTP/1.1",
            b"G\x80T / HTTP/1.1",
            b"GET / HTTP/\xb2.1",
            b"GET /\r HTTP/1.1",
            b"GET / HTTP/1.1\r",
            b"GET /\0 HTTP/1.1",
            b"\0GET / HTTP/1.1",
            b"GET /a b HTTP/1.1",
            b"GET /#x HTTP/1.1",
            b"GET /\x80 HTTP/1.1",
            b'GET /"x" HTTP/1.1',
            b"GET /<x> HTTP/1.1",
            b"GET /\\x HTTP/1.1",
            b"GET /{x} HTTP/1.1",
            b"GET /^x HTTP/1.1",
            b"GET /\x7f HTTP/1.1",
        )
    ),
    ("9112 2.2 bare LF", b"GET / HTTP/1.1\nHost: h\n\n", (400, "must end with CRLF")),
    ("9112 2.2 LF alone", b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", (400, "must end with CRLF")),
    ("no HTTP: TLS", b"\x16\x03\x01\x02\x00\x01\n\r\n\r\n", (400, "must end with CRLF")),
    ("9112 2.2 an empty line", b"\r\n" + head(), {"method": "GET"}),
    ("9112 2.2 as many as may be", b"\r\n" * (http1.MAX_EMPTY_LINES - 1) + head(), {"method": "GET"}),
    ("9112 2.2 too many", b"\r\n" * http1.MAX_EMPTY_LINES + head(), LINE),
    ("end", b"", END),
    ("end behind an empty line", b"\r\n", END),
    ("cut in the first byte", b"G", CUT_HEAD),
    ("cut in an empty line", b"\r", CUT_HEAD),
    ("cut in the line", b"GET / HT", CUT_HEAD),
    ("cut behind the line", b"GET / HTTP/1.1\r\n", CUT_HEAD),
    ("cut in the last CRLF", b"GET / HTTP/1.1\r\n\r", CUT_HEAD),
    ("cut in a field", b"GET / HTTP/1.1\r\nHo", CUT_HEAD),
    ("cut before the empty line", b"GET / HTTP/1.1\r\nHost: h\r\n", CUT_HEAD),
]

TARGETS: list[Row] = [
    target(b"/a/b?c=d?e&f", target="/a/b?c=d?e&f", path="/a/b", query="c=d?e&f", host="h"),
    target(b"/?", path="/", query=""),
    target(b"//evil/x", path="//evil/x", host="h"),
    target(b"/%2e%2E/%zz", path="/%2e%2E/%zz"),
    target(b"/a:b@c;d,e!$&'()*+=~_-.[]", path="/a:b@c;d,e!$&'()*+=~_-.[]"),
    target(b"http://other:8080/x?y", path="/x", query="y", host="other:8080"),
    target(b"HTTPS://[::1]:1/x", path="/x", host="[::1]:1"),
    target(b"http://other", path="/", query="", host="other"),
    target(b"http://other?q", path="/", query="q", host="other"),
    target(b"http://other/http://third/", path="/http://third/", host="other"),
    ("9112 3.2.4 asterisk", head(line=b"OPTIONS * HTTP/1.1"), {"path": "*", "query": "", "host": "h"}),
    ("9112 3.2.4 only OPTIONS", head(line=b"GET * HTTP/1.1"), TARGET),
    *(
        (f"9112 3.2 {value!r}", head(line=b"GET " + value + b" HTTP/1.1"), TARGET)
        for value in (
            b"x",
            b"h:80",
            b"?x",
            b"*/",
            b"ftp://h/",
            b"http:/h/",
            b"http:h",
            b"http://",
            b"http:///x",
            b"http://user@h/",
            b"http://h:99999/",
            b"http://h:x/",
            b"http://[::1/",
            b"http://a,b/",
            b"ws://h/",
        )
    ),
    ("9112 3.2.3 authority", head(line=b"CONNECT h:80 HTTP/1.1"), TARGET),
    ("9112 3.2.2 Host is needed all the same", head(line=b"GET http://h/ HTTP/1.1", host=False), (400, "needs a Host")),
    ("longest target", long_target(http1.MAX_TARGET), {"method": "GET"}),
    ("target too long", long_target(http1.MAX_TARGET + 1), (414, "8192 bytes")),
    ("line far too long", long_target(http1.MAX_HEAD + 9), (414, "longer than")),
    ("line without an end", b"GET /" + b"a" * (http1.MAX_HEAD + 9), (414, "longer than")),
    ("no request line, and long", head(line=b"\x80" * (http1.MAX_TARGET + 1)), (414, "longer than")),
]

HOSTS: list[Row] = [
    *(
        (f"9110 7.2 {value!r}", head(b"Host: " + value, host=False), {"host": value.decode()})
        for value in (
            b"h",
            b"",
            b"h:",
            b"h:0",
            b"h:65535",
            b"127.0.0.1:80",
            b"[::1]",
            b"[::1]:80",
            b"[::ffff:1.2.3.4]",
            b"a_b-c.D~",
            b"a%41b",
            b"xn--bcher-kva.example",
        )
    ),
    *(
        (f"9110 7.2 {value!r}", head(b"Host: " + value, host=False), HOST)
        for value in (
            b"a b",
            b"a, b",
            b"a,b",
            b"host:abc",
            b"host:80:80",
            b"host:99999",
            b"host:65536",
            b"host:000080",
            b"host:-1",
            b"host:+80",
            b"host: 80",
            b"host:\xb2",
            b"host?x",
            b"host#x",
            b"host/x",
            b"host\\x",
            b"user@host",
            b"@host",
            b"[::1",
            b"::1",
            b"[::g]",
            b"[]",
            b"[::1]x",
            b"[1.2.3.4]",
            b"[1:2:3]",
            b"[fe80::1%25eth0]",
            b"[v1.x]",
            b"x[::1]",
            b"a\tb",
            b"h\x80",
            b"h%4",
            b"h%zz",
            b"<h>",
            b'"h"',
        )
    ),
    ("9112 3.2 control character", head(b"Host: a\x01b", host=False), (400, "Field line 1")),
    ("9112 3.2 DEL", head(b"Host: a\x7f", host=False), (400, "Field line 1")),
    ("9112 3.2 twice", head(b"Host: other"), HOST),
    ("9112 3.2 twice the same", head(b"Host: h"), HOST),
    ("9112 3.2 twice, in other words", head(b"hOST: h"), HOST),
    ("9112 3.2 twice, both empty", head(b"Host:", b"Host:", host=False), HOST),
    ("9112 3.2 none", head(host=False), (400, "needs a Host")),
    ("9112 3.2 none, but others", head(b"X: y", host=False), (400, "needs a Host")),
    ("1.0 without", head(line=b"GET / HTTP/1.0", host=False), {"host": "", "fields": {}}),
    ("1.0 with a bad one", head(b"Host: a b", line=b"GET / HTTP/1.0", host=False), HOST),
    ("OWS around", head(b"Host:\t h \t", host=False), {"host": "h"}),
]

FIELDS: list[Row] = [
    ("9110 5.1 case", head(b"X-A: Y"), {"fields": {"host": "h", "x-a": "Y"}}),
    ("9110 5.5 OWS", head(b"a:b", b"c:\t d \t", b"e: "), {"fields": {"host": "h", "a": "b", "c": "d", "e": ""}}),
    ("9110 5.3 lines are joined", head(b"a: 1", b"b: 2", b"A: 3"), {"fields": {"host": "h", "a": "1, 3", "b": "2"}}),
    ("9110 5.5 obs-text", head(b"a: \xc3\xa9\xff"), {"fields": {"host": "h", "a": "\xc3\xa9\xff"}}),
    ("9110 5.5 inside", head(b"a: x\t y: z"), {"fields": {"host": "h", "a": "x\t y: z"}}),
    ("shortest", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", {"fields": {"host": ""}}),
    ("a name of one letter first", b"GET / HTTP/1.1\r\na:\r\nHost:h\r\n\r\n", {"fields": {"a": "", "host": "h"}}),
    *(
        (f"9112 5 {line!r}", head(line), FIELD)
        for line in (
            b"x",
            b": x",
            b"a b: c",
            b"a : b",
            b"a\t: b",
            b" a: b",
            b"\ta: b",
            b"a: b\0",
            b"a: \0",
            b"a\0: b",
            b"a: b\rc",
            b"a: b\r",
            b"a: b\nc: d",
            b"a\n: b",
            b"a: b\x0b",
            b"a: b\x1b[0m",
            b"a: b\x7f",
            b"\xe9: b",
            b"a(: b",
            b'"a": b',
            b"a@b: c",
        )
    ),
    ("9112 5.2 obs-fold", head(b"a: b", b" c"), (400, "Field line 3")),
    ("9112 5.2 obs-fold, tab", head(b"a: b", b"\tc"), (400, "Field line 3")),
    ("9112 2.2 whitespace before the first", head(b" X: y", host=False), (400, "Field line 1")),
    ("9112 5 LF ends no line", b"GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n", (400, "Field line 1")),
    ("9112 5 LF ends no head", b"GET / HTTP/1.1\r\n\nHost: h\r\n\r\n", (400, "Field line 1")),
    ("9112 5 CR CR LF", b"GET / HTTP/1.1\r\n\r\r\nHost: h\r\n\r\n", (400, "Field line 1")),
    ("9112 5 a CR too many", b"GET / HTTP/1.1\r\nHost: h\r\r\n\r\n", (400, "Field line 1")),
    ("9112 5 one letter and CR", b"GET / HTTP/1.1\r\na\r\n\r\n", (400, "Field line 1")),
    ("most fields", many_fields(http1.MAX_FIELDS), {"method": "GET"}),
    ("one field more", many_fields(http1.MAX_FIELDS + 1), (431, "100 fields")),
    ("the same field too often", head(*[b"a: b"] * http1.MAX_FIELDS), (431, "100 fields")),
    ("longest head", big_head(http1.MAX_HEAD), {"method": "GET"}),
    ("one byte more", big_head(http1.MAX_HEAD + 1), (431, "The head is longer")),
    ("far more", big_head(2 * http1.MAX_HEAD), (431, "The head is longer")),
    ("head without an end", head()[:-2] + b"a: " + b"b" * http1.MAX_HEAD, (431, "The head is longer")),
]

FRAMING: list[Row] = [
    ("9112 6.3 no length: no body", post(), {"length": 0, "body": b""}),
    ("9110 8.6", post(b"Content-Length: 5", body=b"hello"), {"length": 5, "body": b"hello"}),
    ("9110 8.6 zeros", post(b"Content-Length: 005", body=b"hello"), {"length": 5, "body": b"hello"}),
    ("9110 8.6 OWS", post(b"Content-Length:\t 5 ", body=b"hello"), {"length": 5, "body": b"hello"}),
    ("9110 8.6 none", post(b"Content-Length: 0"), {"length": 0, "body": b""}),
    ("a body of GET", head(b"Content-Length: 2") + b"hi", {"method": "GET", "body": b"hi"}),
    ("a body of 1.0", head(b"Content-Length: 2", line=b"POST / HTTP/1.0") + b"hi", {"body": b"hi"}),
    *(
        (f"9110 8.6 {value!r}", post(b"Content-Length: " + value, body=b"hello"), (400, "Content-Length"))
        for value in (
            b"",
            b"+5",
            b"-5",
            b"-0",
            b"5,5",
            b"5, 5",
            b"5, 6",
            b"5 5",
            b"5;",
            b"0x5",
            b"5_0",
            b"5.0",
            b"1e1",
            b"five",
            b"\xb2",
            b"\xd9\xa5",
            b'"5"',
            b"1" * 19,
        )
    ),
    ("9112 6.3 two equal", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), (400, "Content-Length")),
    ("9112 6.3 two unequal", post(b"Content-Length: 5", b"content-length: 6", body=b"hello!"), (400, "Content-Length")),
    ("9112 6.3 cut", post(b"Content-Length: 5", body=b"hel"), (400, "3 of 5")),
    ("largest", post(b"Content-Length: 100", body=b"x" * 100), {"body": b"x" * 100}),
    ("one more, declared", post(b"Content-Length: 101"), (413, "larger than 100")),
    ("far more, declared", post(b"Content-Length: " + b"9" * 18), (413, "larger than 100")),
    ("9112 7.1", chunked(b"5\r\nhello\r\n0\r\n\r\n"), {"length": None, "body": b"hello"}),
    ("9112 7 case", post(b"Transfer-Encoding: CHUNKED", body=b"0\r\n\r\n"), {"length": None, "body": b""}),
    *(
        (f"9112 6.1 {value!r}", post(b"Transfer-Encoding: " + value, body=b"0\r\n\r\n"), (400, "Transfer-Encoding"))
        for value in (
            b"",
            b",",
            b"identity",
            b"gzip",
            b"chunked, gzip",
            b"chunked, chunked",
            b"gzip, chunked, chunked",
            b"chunked,",
            b", chunked",
            b"chunked;q=1",
            b"xchunked",
            b'"chunked"',
            b"chunked identity",
            b"chunked\xa0",
        )
    ),
    ("9112 6.1 another first", post(b"Transfer-Encoding: gzip, chunked"), (501, "chunked")),
    ("9112 6.1 in two lines", post(b"Transfer-Encoding: gzip", b"transfer-encoding: chunked"), (501, "chunked")),
    ("9112 6.1 both", post(b"Content-Length: 5", b"Transfer-Encoding: chunked"), (400, "exclude each other")),
    ("9112 6.1 both, other way", post(b"Transfer-Encoding: x", b"Content-Length: 0"), (400, "exclude each other")),
    ("9112 6.1 1.0", head(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0"), (400, "HTTP/1.0")),
]

CHUNKS: list[Row] = [
    *(
        (f"9112 7.1 {body[:30]!r}", chunked(body), {"body": data})
        for body, data in (
            (b"0\r\n\r\n", b""),
            (b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", b"hello!"),
            (b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
            (b"A\r\n0123456789\r\n000\r\n\r\n", b"0123456789"),
            (b"0000000000000002\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
            (b"5;a\r\nhello\r\n0;b\r\n\r\n", b"hello"),
            (b"5;a=b;c=d\r\nhello\r\n0\r\n\r\n", b"hello"),
            (b"5 ; a = b\r\nhello\r\n0\r\n\r\n", b"hello"),
            (b'5;a="x;\\"\ty\xe9"\r\nhello\r\n0\r\n\r\n', b"hello"),
            (b"5;" + b"a" * 252 + b"\r\nhello\r\n0\r\n\r\n", b"hello"),
            (b"0\r\nX: y\r\nZ:\r\n\r\n", b""),
            (b"0\r\nHost: z\r\nContent-Length: 5\r\n\r\n", b""),
            (b"0\r\n" + (b"a: " + b"b" * 1019 + b"\r\n") * 8 + b"\r\n", b""),
            (b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n", b"x" * 100),
            (b"1\r\nx\r\n" * 100 + b"0\r\n\r\n", b"x" * 100),
        )
    ),
    *(
        (f"9112 7.1 {line!r}", chunked(line + b"\r\nhello\r\n0\r\n\r\n"), SIZE)
        for line in (
            b"",
            b"g",
            b"0x5",
            b"-5",
            b"+5",
            b" 5",
            b"5 ",
            b"\t5",
            b"5_0",
            b"5,",
            b"5.",
            b"5h",
            b"\xb2",
            b"5\0",
            b"5\r",
            b"5;",
            b"5;;a",
            b"5; ;a",
            b"5;a=",
            b"5;a =",
            b"5;a b",
            b"5;a=b c",
            b'5;a="b',
            b'5;a="b"c',
            b'5;a="b\\',
            b"5;\0",
            b"5;a=\x7f",
            b"5;a\rb",
            b"5;=b",
            b"0" * 17,
        )
    ),
    ("9112 7.1 LF", chunked(b"5\nhello\r\n0\r\n\r\n"), SIZE),
    ("9112 7.1.1 LF in an extension", chunked(b"5;a\nhello\r\n0\r\n\r\n"), SIZE),
    ("9112 7.1 no CRLF behind the data", chunked(b"5\r\nhello0\r\n\r\n"), (400, "end with CRLF")),
    ("9112 7.1 LF behind the data", chunked(b"5\r\nhello\n0\r\n\r\n"), (400, "end with CRLF")),
    ("9112 7.1 CR LF swapped", chunked(b"5\r\nhello\n\r0\r\n\r\n"), (400, "end with CRLF")),
    ("9112 7.1 more data than said", chunked(b"5\r\nhello!\r\n0\r\n\r\n"), (400, "end with CRLF")),
    ("line too long", chunked(b"5;" + b"a" * 253 + b"\r\nhello\r\n0\r\n\r\n"), (400, "256 bytes")),
    ("line far too long", chunked(b"5;" + b"a" * (http1.MAX_HEAD + 9)), (400, "256 bytes")),
    ("one byte more, one chunk", chunked(b"65\r\n"), (413, "larger than")),
    ("one byte more, many chunks", chunked(b"1\r\nx\r\n" * 101), (413, "larger than")),
    ("largest number", chunked(b"F" * 16 + b"\r\n"), (413, "larger than")),
    ("extensions, all", chunked((b"1;" + b"a" * 240 + b"\r\nx\r\n") * 69), (413, "extensions")),
    ("cut in the size", chunked(b"5"), CUT_CHUNK),
    ("cut before the size", chunked(b""), CUT_CHUNK),
    ("cut in the data", chunked(b"5\r\nhel"), CUT_CHUNK),
    ("cut in the CRLF", chunked(b"5\r\nhello\r"), CUT_CHUNK),
    ("cut before the last chunk", chunked(b"5\r\nhello\r\n"), CUT_CHUNK),
    ("cut before the last CRLF", chunked(b"0\r\n"), CUT_CHUNK),
    ("cut in the trailer", chunked(b"0\r\nX: y\r\n"), CUT_CHUNK),
    *(
        (f"9112 7.1.2 {line!r}", chunked(b"0\r\n" + line + b"\r\n\r\n"), TRAILER)
        for line in (b"x", b": x", b"a : b", b" a: b", b"a: b\r\n c", b"a: b\0", b"a: b\nc: d", b"a: b\rc", b"\n")
    ),
    ("9112 7.1.2 LF ends it not", chunked(b"0\r\n\n"), TRAILER),
    ("trailer line too long", chunked(b"0\r\na: " + b"b" * http1.MAX_TRAILER + b"\r\n\r\n"), (400, "8192 bytes")),
    ("trailer too long", chunked(b"0\r\n" + (b"a: " + b"b" * 1019 + b"\r\n") * 9 + b"\r\n"), (431, "The trailer")),
]

MEANING: list[Row] = [
    ("9110 10.1.1", post(b"Expect: 100-continue", b"Content-Length: 1", body=b"x"), {"expects_continue": True}),
    ("9110 10.1.1 case", post(b"Expect: 100-Continue", b"Content-Length: 1", body=b"x"), {"expects_continue": True}),
    (
        "9110 10.1.1 chunked",
        post(b"Expect: 100-continue", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        {"expects_continue": True},
    ),
    ("9110 10.1.1 nothing to wait for", head(b"Expect: 100-continue"), {"expects_continue": False}),
    (
        "9110 10.1.1 not in 1.0",
        head(b"Expect: x, y", b"Content-Length: 1", line=b"POST / HTTP/1.0") + b"x",
        {"expects_continue": False},
    ),
    ("9110 10.1.1 another", post(b"Expect: the-unexpected"), (417, "100-continue")),
    ("9110 10.1.1 empty", post(b"Expect:"), {"expects_continue": False}),
    ("9110 10.1.1 a list", post(b"Expect: 100-continue,", b"Content-Length: 1", body=b"x"), {"expects_continue": True}),
    ("9110 10.1.1 and more", post(b"Expect: 100-continue, x"), (417, "100-continue")),
    *(
        (f"9112 9.3 {value!r}", head(b"Connection: " + value), {"keep_alive": keep})
        for value, keep in (
            (b"close", False),
            (b"Close", False),
            (b"keep-alive, CLOSE", False),
            (b" close ,x", False),
            (b"x,,close", False),
            (b"keep-alive", True),
            (b"closed", True),
            (b"", True),
            (b"close;x", True),
        )
    ),
    ("9112 9.3 in two lines", head(b"Connection: x", b"connection: close"), {"keep_alive": False}),
    ("9112 9.3 1.0", head(b"Connection: keep-alive", line=b"GET / HTTP/1.0"), {"keep_alive": False}),
]

TABLE = REQUEST_LINES + TARGETS + HOSTS + FIELDS + FRAMING + CHUNKS + MEANING


async def read_message(reader: asyncio.StreamReader) -> tuple[Request, bytes] | None:
    request = await http1.read_head(reader)
    return None if request is None else (request, await http1.read_body(reader, request.length, LIMIT))


async def feed(data: bytes, size: int) -> tuple[object, bytes]:
    """Read a message while `data` comes in pieces of `size`; return what it was (or its error), and what is left."""
    reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
    task = asyncio.create_task(read_message(reader))
    for start in range(0, len(data), size):
        if start % 64 < size or not 512 < start < len(data) - 512:  # in the middle of a long row, not at each byte
            await asyncio.sleep(0)  # the reader waits, or has made use of what there is
        reader.feed_data(data[start : start + size])
    await asyncio.sleep(0)
    reader.feed_eof()
    try:
        result: object = await task
    except HTTPError as e:
        result = e
    return result, await reader.read()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("data", "expected"), [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_message(data: bytes, expected: Any, split: str) -> None:
    good = isinstance(expected, dict)
    result, rest = asyncio.run(feed(data + NEXT if good else data, SPLITS[split]))
    if expected is END:
        assert result is None
    elif isinstance(expected, tuple):
        assert isinstance(result, HTTPError), result
        assert (result.status, str(result)) == (expected[0], result.message)
        assert expected[1] in result.message
    else:
        assert isinstance(result, tuple), result
        request, body = result
        assert {"body": body, **request._asdict()}.items() >= expected.items()
        assert rest == NEXT


def test_an_absolute_target_names_a_host() -> None:
    with pytest.raises(HTTPError, match="no valid host"):  # RFC 9110 4.2.1: an empty host is invalid
        http1.parse_target("GET", "http://:80/", "h")


def test_messages_follow_each_other() -> None:
    async def main() -> None:
        reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
        reader.feed_data(post(b"Content-Length: 2", body=b"hi") + chunked(b"2\r\nyo\r\n0\r\n\r\n") + b"\r\n" + head())
        reader.feed_eof()
        messages = [await read_message(reader) for _ in range(4)]
        assert [m and (m[0].method, m[1]) for m in messages] == [("POST", b"hi"), ("POST", b"yo"), ("GET", b""), None]

    asyncio.run(main())


def test_what_is_no_http_is_refused_at_its_first_line() -> None:
    async def main() -> None:
        reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
        reader.feed_data(b"hello\r\n")  # and nothing more, nor the end
        with pytest.raises(HTTPError):
            await asyncio.wait_for(http1.read_head(reader), 5)

    asyncio.run(main())


def test_a_body_over_its_limit_is_refused_before_it_comes() -> None:
    async def main() -> None:
        for length, data in ((LIMIT + 1, b""), (None, b"65\r\n")):
            reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
            reader.feed_data(data)
            with pytest.raises(HTTPError) as error:
                await asyncio.wait_for(http1.read_body(reader, length, LIMIT), 5)
            assert error.value.status == 413

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("Example.COM:080", ("example.com", 80)),
        ("h", ("h", None)),
        ("h:", ("h", None)),
        ("[::1]:443", ("[::1]", 443)),
        ("[FE80::A]", ("[fe80::a]", None)),
        ("", ("", None)),
        ("h\n", None),
        ("h:80\n", None),
        ("h:\u0668\u0660", None),
        ("\u212a", None),
    ],
)
def test_split_host(host: str, expected: object) -> None:
    assert http1.split_host(host) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", []), (",", []), ("A", ["a"]), (" a ,\tB\t,,c d", ["a", "b", "c d"]), ("close", ["close"])],
)
def test_tokens(value: str, expected: list[str]) -> None:
    assert http1.tokens(value) == expected


# What is written


def test_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 784111777.9)
    date = b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"  # RFC 9110 5.6.7's example
    assert http1.head(200, []) == b"HTTP/1.1 200 OK\r\n" + date + b"\r\n"
    assert http1.head(404, [("A", "b"), ("C", "")]) == b"HTTP/1.1 404 Not Found\r\n" + date + b"A: b\r\nC: \r\n\r\n"
    assert http1.head(299, iter([("A", "\xe9")])) == b"HTTP/1.1 299 \r\n" + date + b"A: \xe9\r\n\r\n"


@pytest.mark.parametrize("status", sorted(http1._REASONS))
def test_head_is_what_read_head_takes(status: int) -> None:
    line, _, rest = http1.head(status, [("X-A", "b")]).partition(b"\r\n")
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert set(http1.parse_fields(rest[:-2])) == {"date", "x-a"}


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", "\r\n", "\n\r", "\r\n ", "\r\nX: y", "\u0100", "\ud800"])
@pytest.mark.parametrize("where", ["{}", "a{}", "{}b", "a{}b"])
def test_head_refuses(bad: str, where: str) -> None:
    text = where.format(bad)
    for field in ((text, "v"), ("n", text)):
        with pytest.raises(ValueError, match=r"field|latin-1"):
            http1.head(200, [("ok", "fine"), field, ("ok", "fine")])


def test_chunk_is_what_read_body_takes() -> None:
    async def main() -> None:
        pieces = [bytes([n % 256]) * n for n in (1, 9, 10, 15, 16, 17, 255, 256, 4096)]
        reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
        reader.feed_data(b"".join(map(http1.chunk, pieces)) + http1.LAST_CHUNK + NEXT)
        reader.feed_eof()
        assert await http1.read_body(reader, None, 1 << 20) == b"".join(pieces)
        assert await reader.read() == NEXT

    asyncio.run(main())
    assert http1.chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_a_body_of_many_chunks_lets_the_others_have_their_turn() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        reader = asyncio.StreamReader(limit=http1.MAX_HEAD)
        reader.feed_data(http1.chunk(b"a") * 10_000 + http1.LAST_CHUNK)
        task = asyncio.create_task(others())
        assert await http1.read_body(reader, None, 1 << 20) == b"a" * 10_000
        task.cancel()

    asyncio.run(main())
    assert turns >= 10_000 // http1.CHUNKS_AT_ONCE


def moments() -> Iterator[float]:
    yield from range(0, 4 * 365 * 86400, 86400 * 13 + 3607)  # 1970 to 1973
    yield from (951782399, 951782400, 951868800, 1709164800, 4107542399, 4107542400, 253402300799)  # leap days, ends
    yield from (1e9 + n / 4 for n in range(40))  # the same second, again and again


def test_http_date() -> None:
    for moment in moments():
        assert http1.http_date(moment) == formatdate(int(moment), usegmt=True)


# Time


def seconds(work: Callable[[bytes], object], data: bytes) -> float:
    best = 1e9
    for _ in range(3):
        start = time.process_time()
        with contextlib.suppress(HTTPError):
            work(data)
        best = min(best, time.process_time() - start)
    return best


def text_of(work: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: work(data.decode("latin-1"))


def read_all(data: bytes) -> object:
    return asyncio.run(feed(data, 1 << 20))[0]


SIZE_32K = 32 * 1024
FIELDS_32K = b"".join(b"name-%02d: " % n + b"v" * 314 + b"\r\n" for n in range(100))


@pytest.mark.parametrize(
    ("work", "benign", "hostile"),
    [
        (http1.parse_fields, FIELDS_32K, b"a" * SIZE_32K),
        (http1.parse_fields, FIELDS_32K, b"a:" + b" " * SIZE_32K + b"\r\n"),
        (http1.parse_fields, FIELDS_32K, b"a:" + b" \t" * (SIZE_32K // 2) + b"\0\r\n"),
        (http1.parse_fields, FIELDS_32K, b"a:\r\n" * (SIZE_32K // 4) + b"b\r\n"),
        (http1.parse_fields, FIELDS_32K, b"a:\r" * (SIZE_32K // 3)),
        (http1.parse_fields, FIELDS_32K, b"\r\n" * (SIZE_32K // 2)),
        (http1.parse_fields, FIELDS_32K, b":" * SIZE_32K),
        (http1.parse_request_line, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\n", b"A" * SIZE_32K),
        (http1.parse_request_line, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\n", b"GET " + b"/" * SIZE_32K),
        (http1.parse_request_line, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\n", b"GET " + b"/ " * (SIZE_32K // 2)),
        (text_of(http1.split_host), b"a" * SIZE_32K, b"a" * SIZE_32K + b"!"),
        (text_of(http1.split_host), b"a" * SIZE_32K, b"%41" * (SIZE_32K // 3) + b"%"),
        (text_of(http1.split_host), b"a" * SIZE_32K, b"[" + b":" * SIZE_32K),
        (text_of(http1.tokens), b"a" * SIZE_32K, b" " * SIZE_32K + b"a"),
        (text_of(lambda t: http1.parse_target("GET", t, "h")), b"/" * SIZE_32K, b"http://" + b"?" * SIZE_32K + b"\n"),
        (text_of(lambda t: http1.parse_length(1, {"content-length": t})), b"1" * SIZE_32K, b"1" * SIZE_32K + b"x"),
        (read_all, head(b"a: " + b"b" * 32000), head(b"a: " + b"\r" * 32000)),
        (read_all, head(b"a: " + b"b" * 32000), b"GET / HTTP/1.1\r\n" + b"\n" * 32000),
        (read_all, head(b"a: " + b"b" * 32000), chunked((b"1;" + b"a" * 240 + b"\r\nx\r\n") * 130)),
        (read_all, head(b"a: " + b"b" * 32000), chunked(b'1;a="' + b"\\" * 249 + b"\r\n")),
        (read_all, head(b"a: " + b"b" * 32000), chunked(b"1" + b" ;a " * 60 + b"=\r\n")),
        (read_all, head(b"a: " + b"b" * 32000), chunked(b"1;" + b"a= " * 80 + b"\r\n")),
    ],
)
def test_time_is_linear(work: Callable[[bytes], object], benign: bytes, hostile: bytes) -> None:
    # What is quadratic takes thousands of times as long at this size; the constant is for a busy machine.
    assert seconds(work, hostile) < 100 * seconds(work, benign) + 0.02
