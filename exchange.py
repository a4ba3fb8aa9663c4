"""One request and its answer on a connection; how both look on the wire is handed over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

MAX_BODY = 1024 * 1024  # bytes; the family's own cap
MAX_DISCARD = 64 * 1024  # bytes of a refused request's body that are read so that its connection can stay
BODY_SECONDS = 30.0
JOIN_SECONDS = 0.001  # what comes this soon behind the last part of a stream may wait for the end of the loop's turn
JOIN_BYTES = 16 * 1024  # and no more than this; one TLS record

JSON = ("Content-Type", "application/json")
STREAM = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),  # nginx would hold the words back
)
EXPOSED = (
    "Access-Control-Expose-Headers",
    "x-request-id, x-copepod-session-key, x-copepod-agent-id, x-copepod-store, x-should-retry, retry-after",
)

now = time.monotonic

if TYPE_CHECKING:

    class Request(Protocol):
        """What is looked at of a request."""

        @property
        def method(self) -> str: ...
        @property
        def path(self) -> str: ...
        @property
        def fields(self) -> Mapping[str, str]: ...
        @property
        def minor(self) -> int: ...
        @property
        def length(self) -> int | None: ...  # bytes of its body; None: chunked
        @property
        def keep_alive(self) -> bool: ...
        @property
        def expects_continue(self) -> bool: ...

    class Wire(Protocol):
        """How it looks as bytes: the functions of HTTP/1.1."""

        CONTINUE: bytes
        LAST_CHUNK: bytes

        def head(self, status: int, fields: Any) -> bytes: ...
        def chunk(self, data: bytes) -> bytes: ...
        async def read_body(self, reader: Any, length: int | None, limit: int) -> bytes: ...


class Exchange:
    """One request and its answer. `wire` has HTTP/1.1's functions, which raise its errors."""

    __slots__ = (
        "agent", "bodiless", "caller", "client", "close", "connection", "fields", "id", "read", "request", "run",
        "sent", "started", "status", "wire",
    )  # fmt: skip

    def __init__(self, connection: Any, wire: Wire) -> None:
        self.connection, self.wire = connection, wire
        self.request: Request | None = None
        self.id = f"req_{os.urandom(16).hex()}"
        self.client = connection.peer
        self.agent = self.caller = "-"  # the second: the name of the caller's token
        self.fields: list[tuple[str, str]] = [("x-request-id", self.id)]
        self.run: Any = None  # that it asked for
        self.started = now()
        self.status = 0  # as answered; 0: not yet
        self.sent = 0  # bytes of the body
        self.read = False  # the request's body was read to its end
        self.bodiless = False  # it is a HEAD whose head could not be read
        self.close = False  # the connection ends with this answer

    def head(self, status: int, fields: Iterable[tuple[str, str]]) -> bytes:
        """Return the answer's head; from now on it counts as answered."""
        self.status = status
        request = self.request
        if request is not None and not self.read:  # a body that is left is read and dropped, if it is small
            self.close |= request.expects_continue or (request.length or 0) > MAX_DISCARD
        if self.close or request is None or not request.keep_alive:
            self.close = True
            if status != 101:
                self.fields.append(("Connection", "close"))
        fields, self.fields = (*fields, *self.fields), []  # a stream may be long
        return self.wire.head(status, fields)

    def send(
        self, status: int, body: bytes, fields: Iterable[tuple[str, str]] = (), type: tuple[str, str] = JSON
    ) -> bool:
        """Answer with `body`, left out for HEAD; `type` is its Content-Type. True: too much is unsent, drain first."""
        if status != 204:
            self.fields += (type, ("Content-Length", str(len(body))))
        head = self.head(status, fields)
        if self.bodiless or (self.request is not None and self.request.method == "HEAD"):
            body = b""
        self.sent = len(body)
        full: bool = self.connection.write(head + body)
        return full

    def open_to(self, origin: str, request: Request) -> bool:
        """Let pages of this origin read the answer (CORS, Fetch standard). True: it was a preflight, now answered."""
        self.fields += [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), EXPOSED]
        if request.method != "OPTIONS" or "access-control-request-method" not in request.fields:
            return False
        asked = request.fields.get("access-control-request-headers")
        self.fields += [("Access-Control-Allow-Headers", asked)] if asked else []
        self.send(204, b"", [("Access-Control-Allow-Methods", "GET, HEAD, POST"), ("Access-Control-Max-Age", "600")])
        return True

    async def body(self, request: Request) -> bytes:
        """Return the request's body. HTTPError: 400, 413."""
        c = self.connection
        c.deadline = now() + BODY_SECONDS
        if request.expects_continue and not c.buffered and (request.length or 0) <= MAX_BODY:
            c.write(self.wire.CONTINUE)
        body = await self.wire.read_body(c.reader, request.length, MAX_BODY)
        self.read = True
        return body

    async def discard(self) -> None:
        """Read what is left of an answered request, so that it is not taken for the next. HTTPError: it is too much."""
        if self.request is not None and not self.close:
            self.connection.deadline = now() + BODY_SECONDS
            await self.wire.read_body(self.connection.reader, self.request.length, MAX_DISCARD)


class Stream:
    """The answer of an exchange as an event stream. Parts that come in one turn of the loop are written together."""

    __slots__ = ("_chunked", "_joined", "_moment", "_room", "_x")

    def __init__(self, x: Exchange) -> None:
        self._x = x
        self._chunked = x.request is not None and x.request.minor > 0
        self._joined: list[bytes] = []
        self._room = JOIN_BYTES
        self._moment = 0.0  # of the last write

    def send(self, events: bytes, last: bool = False) -> bool:
        """Send a part, before the first one the head. True: too much is unsent, drain first."""
        x = self._x
        x.sent += len(events)
        if self._chunked:
            events = x.wire.chunk(events) + x.wire.LAST_CHUNK if last else x.wire.chunk(events)
        moment = now()
        if not last and moment < self._moment + JOIN_SECONDS and len(events) < self._room:
            if not self._joined:
                x.connection.soon(self._flush)
            self._joined.append(events)
            self._room -= len(events)
            return bool(x.connection.full)
        self._moment = moment
        if x.status and not self._joined:
            return bool(x.connection.write(events))
        if not x.status:
            x.close |= not self._chunked  # RFC 9112 6.3: in HTTP/1.0 the end of the connection ends the body
            self._joined.append(x.head(200, (*STREAM, ("Transfer-Encoding", "chunked")) if self._chunked else STREAM))
        self._joined.append(events)
        return self._flush()

    def _flush(self) -> bool:
        if not self._joined:
            return False
        events = b"".join(self._joined)
        self._joined.clear()
        self._room = JOIN_BYTES
        full: bool = self._x.connection.write(events)
        return full
