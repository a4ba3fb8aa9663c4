"""HTTP/1.1 over asyncio streams, both halves: RFC 9110 (semantics) and RFC 9112 (messages).

The server's half reads requests and writes answers; the client's half writes a request and reads its answer.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import NamedTuple

MAX_HEAD = 32 * 1024  # bytes of request line and fields; node 16 KiB, nginx 4 x 8 KiB
MAX_FIELDS = 100  # Apache's LimitRequestFields
MAX_TARGET = 8 * 1024  # RFC 9112 section 3 asks for 8,000 at least
MAX_EMPTY_LINES = 16  # before a request line; RFC 9112 section 2.2 asks for one at least
MAX_REPEATED = 1024  # bytes of fields whose lines are remembered
MAX_CHUNK_LINE = 256  # a chunk size and its extensions
MAX_CHUNK_EXTENSIONS = 16 * 1024  # of one body together; node's
MAX_TRAILER = 8 * 1024
CHUNKS_AT_ONCE = 256  # read before the loop turns to the others: a millisecond or so of it
MAX_EVENT = 1024 * 1024  # one server-sent event of an upstream server
PIECE = 64 * 1024

LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_TCHAR = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 5.6.2: tchar
# RFC 9112 3: method SP request-target SP HTTP-version; a target has RFC 3986's characters, never a fragment
_REQUEST_LINE = re.compile(rf"({_TCHAR}{{1,64}}) ([A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+) HTTP/([0-9])\.([0-9])\r\n")
# RFC 9112 5: field-name ":" OWS field-value OWS; the value has RFC 9110 5.5's VCHAR, obs-text, SP and HTAB
_FIELD_LINE = re.compile(rf"({_TCHAR}+):([\t\x20-\x7e\x80-\xff]*)")
# RFC 9110 7.2: uri-host [ ":" port ]; of RFC 3986's reg-name the characters that a name in use can have
_HOST = re.compile(r"((?:[A-Za-z0-9\-._~]|%[0-9A-Fa-f]{2})*|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{0,5}))?")
# RFC 9112 3.2.2: absolute-form
_ABSOLUTE = re.compile(r"(https?)://([^/?]*)(/[^?]*)?(?:\?(.*))?", re.IGNORECASE)
# RFC 9112 7.1: chunk-size [ chunk-ext ] CRLF
_QUOTED = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_CHUNK_LINE = re.compile(
    rf"([0-9A-Fa-f]{{1,16}})((?:[ \t]*;[ \t]*{_TCHAR}+(?:[ \t]*=[ \t]*(?:{_TCHAR}+|{_QUOTED}))?)*)\r\n"
)
_NEXT_CHUNK = re.compile(b"\r\n" + _CHUNK_LINE.pattern.encode())  # behind the CRLF that ends the chunk before it
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
_LINE_END = re.compile(rb"\r*\n")  # in the head of an answer (RFC 9112 2.2: LF alone may end a line)
_HEAD_END = re.compile(rb"\n\r?\n")

_REASONS = {
    101: "Switching Protocols", 200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed", 426: "Upgrade Required", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class HTTPError(Exception):
    """The message cannot be accepted: answer `status` and `message`, then end the connection (RFC 9112 section 9.6)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.bodiless = False  # it is of a HEAD, whose answer has no body


class Request(NamedTuple):
    """The head of one request."""

    method: str
    target: str  # as sent
    path: str
    query: str
    minor: int  # of HTTP/1.x
    host: str  # Host, or the authority of an absolute-form target; "" in HTTP/1.0 without one
    fields: dict[str, str]  # by lower-case name, Latin-1; several lines of one name joined by ", "
    length: int | None  # of the body in bytes; None: chunked
    keep_alive: bool
    expects_continue: bool


@lru_cache(64)  # clients repeat themselves
def parse_request_line(line: bytes) -> tuple[str, str, int]:
    """Return method, request-target and minor version of `line`, its CRLF included. HTTPError: 400, 414, 505."""
    text = line.decode("latin-1")
    match = _REQUEST_LINE.fullmatch(text)
    if match is None:
        if len(text) > MAX_TARGET:
            raise HTTPError(414, f"The request-target is longer than {MAX_TARGET} bytes.")
        if not text.endswith("\r\n"):
            raise HTTPError(400, "The request line must end with CRLF.")
        raise HTTPError(400, "The request line must read `method SP request-target SP HTTP/1.1`.")
    method, target, major, minor = match.groups()
    if len(target) > MAX_TARGET:
        raise HTTPError(414, f"The request-target is longer than {MAX_TARGET} bytes.")
    if major != "1":
        raise HTTPError(505, f"HTTP/{major}.{minor} is not spoken here: use HTTP/1.1.")
    return method, target, int(minor)


def parse_fields(block: bytes) -> dict[str, str]:
    """Return the fields of `block` (field lines, each with its CRLF). HTTPError: 400 names the line, 431."""
    *lines, end = block.decode("latin-1").split("\r\n")
    if end:
        raise _broken_line(len(lines) + 1)
    if len(lines) > MAX_FIELDS:
        raise HTTPError(431, f"The request has more than {MAX_FIELDS} fields.")
    parse = _remembered.__getitem__ if len(block) <= MAX_REPEATED else parse_field
    fields = dict(map(parse, lines))
    if len(fields) == len(lines) and "" not in fields:
        return fields
    fields.clear()
    for n, (name, value) in enumerate(map(parse, lines), 1):
        if not name:
            raise _broken_line(n)
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def parse_field(line: str) -> tuple[str, str]:
    """Return the lower-case name and the value of a field line without its CRLF, two empty texts when it is broken."""
    match = _FIELD_LINE.fullmatch(line)
    return (match[1].lower(), match[2].strip(" \t")) if match else ("", "")


class _Remembered(dict[str, tuple[str, str]]):
    """Field lines and what `parse_field` says of them: clients repeat themselves. A third of an lru_cache's time."""

    def __missing__(self, line: str) -> tuple[str, str]:
        if len(self) >= 512:
            self.clear()
        field = self[line] = parse_field(line)
        return field


_remembered = _Remembered()


def _broken_line(n: int) -> HTTPError:
    return HTTPError(400, f"Field line {n} must read `field-name: value` and CRLF, without fold or control characters.")


def tokens(value: str) -> list[str]:
    """Return the elements of a comma-separated list, lower-case, without empty ones (RFC 9110 section 5.6.1)."""
    return [element for element in (part.strip(" \t").lower() for part in value.split(",")) if element]


@lru_cache(64)
def split_host(host: str) -> tuple[str, int | None] | None:
    """Return the lower-case name and the port (None: not given) of a Host field, None when it is malformed."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    name, ipv6, port = match.groups()
    if ipv6 is not None:
        try:
            socket.inet_pton(socket.AF_INET6, ipv6)
        except OSError:
            return None
    if port and int(port) > 65535:
        return None
    return name.lower(), int(port) if port else None


def parse_target(method: str, target: str, host: str | None) -> tuple[str, str, str]:
    """Return host, path and query of a request-target (RFC 9112 section 3.2). HTTPError: 400."""
    if target.startswith("/"):
        path, _, query = target.partition("?")
        return host or "", path, query
    if target == "*" and method == "OPTIONS":
        return host or "", "*", ""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise HTTPError(400, "The request-target must be a path that begins with `/`, or a whole http URL.")
    _, authority, path, query = match.groups()
    split = split_host(authority)
    if split is None or not split[0]:  # RFC 9110 4.2.1: no http URL has an empty host
        raise HTTPError(400, "The request-target names no valid host.")
    # RFC 9112 3.2.2: the authority of the target replaces what the Host field says.
    return authority, path or "/", query or ""


def parse_length(minor: int, fields: Mapping[str, str]) -> int | None:
    """Return the length of the body in bytes, None when it is chunked (RFC 9112 section 6.3). HTTPError: 400, 501."""
    coding = fields.get("transfer-encoding")
    length = fields.get("content-length")
    if coding is not None:
        if length is not None:
            # RFC 9112 6.1: both together may be an attempt at smuggling.
            raise HTTPError(400, "Content-Length and Transfer-Encoding exclude each other.")
        if minor == 0:
            raise HTTPError(400, "HTTP/1.0 has no Transfer-Encoding.")
        if coding.lower() == "chunked":
            return None
        codings = tokens(coding)
        if codings.count("chunked") == 1 and codings[-1] == "chunked" and len(codings) > 1:
            raise HTTPError(501, "No transfer-coding but chunked is understood.")
        raise HTTPError(400, "Transfer-Encoding must be `chunked`, once.")
    if length is None:
        return 0
    if not (length.isascii() and length.isdecimal() and len(length) < 19):  # more than anyone accepts
        raise HTTPError(400, "Content-Length must be one number of bytes.")
    return int(length)


def parse_head(start: tuple[str, str, int], block: bytes) -> Request:
    """Return the request that a parsed request line and field lines stand for. HTTPError: 400, 417, 431, 501."""
    method, target, minor = start
    fields = parse_fields(block)
    host = fields.get("host")
    if host is None:
        if minor > 0:
            raise HTTPError(400, "An HTTP/1.1 request needs a Host field.")  # RFC 9112 3.2
    elif split_host(host) is None:
        raise HTTPError(400, "The Host field must name one host and at most a port.")
    host, path, query = parse_target(method, target, host)
    length = parse_length(minor, fields)
    keep_alive = minor > 0 and not ("connection" in fields and "close" in tokens(fields["connection"]))
    expects = False
    if "expect" in fields and minor > 0:  # RFC 9110 10.1.1
        expectations = tokens(fields["expect"])
        if any(expectation != "100-continue" for expectation in expectations):
            raise HTTPError(417, "The only expectation that can be met is `100-continue`.")
        expects = length != 0 and "100-continue" in expectations
    return Request(method, target, path, query, minor, host, fields, length, keep_alive, expects)


def http_date(now: float) -> str:
    """Return `now` (seconds since the epoch) as an IMF-fixdate (RFC 9110 section 5.6.7)."""
    t = time.gmtime(now)
    clock = f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}"
    return f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {_MONTHS[t.tm_mon - 1]} {t.tm_year:04} {clock} GMT"


@lru_cache(32)  # the statuses of a second
def _start(status: int, second: int) -> tuple[str, str]:
    return f"HTTP/1.1 {status} {_REASONS.get(status, '')}", f"Date: {http_date(second)}"


def head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the head of an answer: status line, Date and `fields`. ValueError: a field with CR, LF or NUL."""
    return _join(_start(status, int(time.time())), fields)


def _join(start: Iterable[str], fields: Iterable[tuple[str, str]]) -> bytes:
    lines = [*start, *map(": ".join, fields), "\r\n"]
    text = "".join(lines[:-1])
    if "\r" in text or "\n" in text or "\0" in text:
        raise ValueError("a field with CR, LF or NUL is never written")  # it would end the line and begin another
    return "\r\n".join(lines).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """Return `data` (not empty) as one chunk of a chunked body (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole_head(buffer: bytearray) -> tuple[int, int] | None:
    """Return the length of the request line and of the head that has come whole, None where more is to be said."""
    line = buffer.find(b"\n") + 1
    if line < 3 or buffer[line - 2] != 13:
        return None
    end = buffer.find(b"\r\n\r\n", line - 2, MAX_HEAD) + 4
    return (line, end) if end > 3 else None


async def read_head(reader: asyncio.StreamReader) -> Request | None:
    """Return the next request's head, None at the end of the stream. HTTPError as parse_head.

    The reader's limit must be MAX_HEAD. The request line is read first, so that what is no HTTP is answered at once.
    """
    line = b"\r\n"
    try:
        whole = _whole_head(reader._buffer)  # type: ignore[attr-defined]  # no public name shows what has come
        if whole is not None:
            data = await reader.readexactly(whole[1])
            line = data[: whole[0]]
            return parse_head(parse_request_line(line), data[whole[0] : -2])
        try:
            for _ in range(MAX_EMPTY_LINES):
                line = await reader.readuntil(b"\n")
                if line != b"\r\n":  # RFC 9112 2.2: an empty line before the request line is ignored
                    break
            start = parse_request_line(line)
            block = await reader.readexactly(2)
            if block == b"\r\n":
                block = b""
            elif b"\r" in block or b"\n" in block:
                raise _broken_line(1)
            else:
                block += await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            if line == b"\r\n":
                raise HTTPError(414, f"The request line is longer than {MAX_HEAD} bytes.") from None
            raise HTTPError(431, f"The head is longer than {MAX_HEAD} bytes.") from None
        except asyncio.IncompleteReadError as e:
            if not e.partial and line == b"\r\n":
                return None
            raise HTTPError(400, "The connection ended inside the head of a request.") from None
        if len(line) + len(block) > MAX_HEAD:
            raise HTTPError(431, f"The head is longer than {MAX_HEAD} bytes.")
        return parse_head(start, block[:-2])
    except HTTPError as e:
        e.bodiless = line.startswith(b"HEAD ")  # RFC 9110 9.3.2
        raise


async def read_line(reader: asyncio.StreamReader, limit: int) -> str:
    """Return a line with its LF, at most `limit` bytes. HTTPError: 400 (too long, or the stream ended)."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError:
        line = b""
    except asyncio.IncompleteReadError:
        raise HTTPError(400, "The connection ended inside a chunked body.") from None
    if not 0 < len(line) <= limit:
        raise HTTPError(400, f"A line of the chunked body is longer than {limit} bytes.")
    return line.decode("latin-1")


async def read_chunk_size(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Return a chunk's size and the length of its extensions, which are ignored, in bytes. HTTPError: 400."""
    match = _CHUNK_LINE.fullmatch(await read_line(reader, MAX_CHUNK_LINE))
    if match is None:
        raise HTTPError(400, "A chunk must begin with its size in hexadecimal digits and CRLF.")
    return int(match[1], 16), len(match[2])


async def read_trailer(reader: asyncio.StreamReader) -> None:
    """Read the trailer fields and drop them (RFC 9112 section 7.1.2 allows it). HTTPError: 400, 431."""
    room = MAX_TRAILER
    while (line := await read_line(reader, MAX_TRAILER)) != "\r\n":
        if not parse_field(line.removesuffix("\r\n"))[0]:
            raise HTTPError(400, "A trailer line must read `field-name: value`.")
        room -= len(line)
        if room < 0:
            raise HTTPError(431, f"The trailer is longer than {MAX_TRAILER} bytes.")


async def read_body(reader: asyncio.StreamReader, length: int | None, limit: int) -> bytes:
    """Return a body of `length` bytes, or chunked (None). HTTPError: 413 as soon as it exceeds `limit` bytes, 400."""
    if length == 0:
        return b""
    if length is not None:
        if length > limit:
            raise HTTPError(413, f"The body is larger than {limit} bytes.")
        try:
            return await reader.readexactly(length)
        except asyncio.IncompleteReadError as e:
            raise HTTPError(400, f"The body ended after {len(e.partial)} of {length} bytes.") from None
    chunks: list[bytes] = []
    extensions = 0
    while True:
        size, extension = await read_chunk_size(reader)
        extensions += extension
        if extensions > MAX_CHUNK_EXTENSIONS:
            raise HTTPError(413, f"The body's chunk extensions are longer than {MAX_CHUNK_EXTENSIONS} bytes.")
        if size == 0:
            await read_trailer(reader)
            return b"".join(chunks)
        limit -= size
        if limit < 0:
            raise HTTPError(413, "The chunked body is larger than it may be.")
        try:
            data = await reader.readexactly(size + 2)
        except asyncio.IncompleteReadError:
            raise HTTPError(400, "The connection ended inside a chunked body.") from None
        if not data.endswith(b"\r\n"):
            raise HTTPError(400, "A chunk's data must end with CRLF.")
        chunks.append(data[:-2])
        if len(chunks) % CHUNKS_AT_ONCE == 0:  # what is there already is read without a wait
            await asyncio.sleep(0)


# The client's half. What goes wrong is an OSError, so that a caller needs to know one family of errors.


class ProtocolError(ConnectionError):
    """The server's answer is no HTTP/1.1, or broke off."""


Origin = tuple[str, str, int]  # scheme, host and port


def format_request(method: str, url: str, fields: Iterable[tuple[str, str]], body: bytes) -> tuple[Origin, bytes]:
    """Return whom to ask, and the bytes of the request. ValueError: a bad `url`, or a field with CR, LF or NUL."""
    match = _ABSOLUTE.fullmatch(url)
    host = split_host(match[2]) if match else None
    if match is None or host is None or not host[0]:
        raise ValueError("not an http or https URL")
    scheme = match[1].lower()  # RFC 3986 3.1
    target = (match[3] or "/") + (f"?{match[4]}" if match[4] else "")
    ours = [("Host", match[2]), ("Content-Length", str(len(body)))]
    head = _join([f"{method} {target} HTTP/1.1"], [*ours, *fields])
    return (scheme, host[0].strip("[]"), host[1] or {"http": 80, "https": 443}[scheme]), head + body


def take_chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return what has come of the data of a chunked body, and the rest, which is read again with what comes next.

    `data` and the rest begin with the CRLF before a chunk's line (RFC 9112 section 7.1). Of a chunk that is not here
    whole, what is missing becomes one.
    """
    parts, at = [], 0
    while (match := _NEXT_CHUNK.match(data, at, at + 2 + MAX_CHUNK_LINE)) and (size := int(match[1], 16)):
        part = data[match.end() : match.end() + size]
        parts.append(part)
        at = match.end() + len(part)
        if len(part) < size:
            return b"".join(parts), b"\r\n%x\r\n" % (size - len(part))
    return b"".join(parts), data[at:]


def end_of_chunks(data: bytes) -> int:
    """Return where the body ends in what `take_chunks` has left, 0 while more has to come. HTTPError: 400."""
    match = _NEXT_CHUNK.match(data, 0, 2 + MAX_CHUNK_LINE)
    if match is not None:
        start, end = match.end(), data.find(b"\r\n\r\n", match.end() - 2, match.end() + MAX_TRAILER)
        parse_fields(data[start : max(start, end + 2)])  # the trailer, which is dropped
        broken = end < 0 and len(data) >= start + MAX_TRAILER
    else:
        end, broken = -1, data[:2] != b"\r\n" or b"\n" in data[2:] or len(data) >= 2 + MAX_CHUNK_LINE
    if broken:
        raise HTTPError(400, "a chunk, or the trailer, is malformed or too long")
    return end + 4 if end > 0 else 0


async def read_more(reader: asyncio.StreamReader) -> bytes:
    """Return all that has come, at most PIECE bytes. OSError: the end."""
    data = await reader.read(PIECE)
    if not data:
        raise ProtocolError("the answer broke off")
    return data


async def read_answer(reader: asyncio.StreamReader, method: str, release: Callable[[bool], None]) -> Response:
    """Return the answer to a request, its head read. OSError: it is no HTTP/1.1, or broke off.

    `release` is called when the answer is done with: with True when the connection can take another request.
    """
    data, seen, status = b"", 0, 0
    try:
        while status < 200:
            end = _HEAD_END.search(data, seen, MAX_HEAD)
            line = _STATUS_LINE.match(data)
            if line is None and b"\n" in data:
                raise ProtocolError("the answer is not HTTP/1.1")
            if line is not None and end is not None:
                status, fields = int(line[2]), parse_fields(_LINE_END.sub(b"\r\n", data[line.end() : end.start() + 1]))
                if line[1] == b"0":
                    fields["connection"] = "close"  # HTTP/1.0: not to be written to again
                data, seen = data[end.end() :], 0
            elif len(data) >= MAX_HEAD:
                raise ProtocolError("the answer's head is too long")
            else:
                seen = max(0, len(data) - 2)
                data += await read_more(reader)
        if method == "HEAD" or status in (204, 304):
            length: int | None = 0
        elif "transfer-encoding" in fields or "content-length" in fields:
            length = parse_length(1, fields)
        else:
            length = -1
    except HTTPError as e:
        raise ProtocolError("the answer's head is malformed") from e
    return Response(reader, data, release, status, fields, length)


class Response:
    """The answer to a request: its head; its body by `read`, `pieces` or `events`, once."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        data: bytes,
        release: Callable[[bool], None],
        status: int,
        fields: dict[str, str],
        length: int | None,
    ) -> None:
        self.status, self.fields = status, fields
        self._reader, self._release = reader, release
        self._data = data  # what has come behind the head
        self._length = length  # of the body in bytes; None: chunked; -1: to the end of the connection
        self._whole = length == 0 and not data
        self._persists = "connection" not in fields or "close" not in tokens(fields["connection"])

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body as it comes. OSError: it broke off, or its framing is broken."""
        reader, data, left = self._reader, self._data, self._length
        if left is None:
            data, end = b"\r\n" + data, 0
            while not end:
                piece, data = take_chunks(data)
                if piece:
                    yield piece
                try:
                    end = end_of_chunks(data) if len(data) > 2 else 0
                except HTTPError as e:
                    raise ProtocolError("the answer's chunks are malformed") from e
                if not end:
                    data += await read_more(reader)
            data = data[end:]
        elif left < 0:
            if data:
                yield data
            while data := await reader.read(PIECE):
                yield data
            return  # the connection has ended with the body
        else:
            while left:
                data = data or await read_more(reader)
                piece, data = data[:left], data[left:]
                left -= len(piece)
                yield piece
        self._whole = not data  # behind the body there is nothing: what else came is no answer to the next request

    async def read(self, limit: int) -> bytes:
        """Return the whole body. OSError: it is longer than `limit` bytes, or broke off."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise ProtocolError(f"the answer is longer than {limit} bytes")
        return bytes(body)

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the data of each server-sent event (WHATWG HTML 9.2.6). OSError: the body broke off."""
        decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        rest, data, size = "", [], 0
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + decode(piece)).split("\n")
                if len(rest) > MAX_EVENT:
                    raise ProtocolError(f"a line of the event stream is longer than {MAX_EVENT} characters")
                for line in lines:
                    if line.startswith("data:"):
                        data.append(line[5:].removesuffix("\r").removeprefix(" "))
                        size += len(line)
                        if size > MAX_EVENT:
                            raise ProtocolError(f"an event is longer than {MAX_EVENT} characters")
                    elif data and line in ("", "\r"):
                        yield "\n".join(data)
                        data, size = [], 0
        rest += decode(b"", True)
        if rest.startswith("data:"):  # servers exist that end right behind their last line
            data.append(rest[5:].removesuffix("\r").removeprefix(" "))
        if data:
            yield "\n".join(data)

    def close(self) -> None:
        """Give the connection back: to be used again when the body was read to its end. Safe to call again."""
        self._release(self._whole and self._persists)
