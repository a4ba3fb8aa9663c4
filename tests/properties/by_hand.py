"""Readers fed by hand: what they make of bytes that come in pieces. No loop, no socket, no time, so it is quick."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import http1
import rfc6455

LIMIT = 100  # bytes of a body
MAX_MESSAGE = 300  # bytes of a WebSocket message
Outcome = list[Any]  # what was read, in order; an error, as plain values, is the last


class Loop:
    """As much of an event loop as they ask for. Nothing is ever scheduled: who waits is fed, and called again."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def call_later(self, delay: float, callback: Callable[[], object]) -> asyncio.Handle:
        return asyncio.Handle(callback, (), self)  # type: ignore[arg-type]

    def get_debug(self) -> bool:
        return False


class Wire:
    """A StreamWriter and its transport in one; it keeps what is written."""

    def __init__(self) -> None:
        self.transport = self
        self.sent = bytearray()
        self.over = False

    def write(self, data: bytes) -> None:
        if not self.over:
            self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.over

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def close(self) -> None:
        self.over = True

    abort = close

    async def drain(self) -> None: ...

    wait_closed = drain


def feed(
    read: Callable[[asyncio.StreamReader], Coroutine[Any, Any, Outcome]], pieces: Iterable[bytes], limit: int
) -> Outcome:
    """Return what `read` returns. The first piece is there; each time it waits it gets the next, and last the end."""
    loop: Any = Loop()
    reader = asyncio.StreamReader(limit, loop)
    left = iter(pieces)
    reader.feed_data(next(left, b""))
    reading = read(reader)
    asyncio._set_running_loop(loop)
    try:
        while True:
            reading.send(None)
            piece = next(left, None)
            if piece is not None:
                reader.feed_data(piece)
            else:
                assert not reader._eof, "it waits for ever"  # type: ignore[attr-defined]
                reader.feed_eof()
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome
    finally:
        asyncio._set_running_loop(None)
        reading.close()


def cut(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """Yield the data in pieces of these sizes, again and again."""
    at = 0
    for size in cycle(sizes):
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size


def any_split(read: Callable[[Iterable[bytes]], Outcome], data: bytes, sizes: Sequence[int]) -> Outcome:
    """Return what is read of the data, which must not depend on the pieces in which it comes."""
    whole = read([data])
    for pieces in ([1], sizes):
        parts = read(cut(data, pieces))
        assert parts == whole, f"{data!r} in {pieces}:\n{parts}\nwhole:\n{whole}"
    return whole


def requests(pieces: Iterable[bytes]) -> Outcome:
    """What a server reads: requests and bodies in turn; last an error's status and message, or the end (None)."""

    async def read(reader: asyncio.StreamReader) -> Outcome:
        seen: Outcome = []
        try:
            while True:
                request = await http1.read_head(reader)
                seen.append(request)
                if request is None:
                    return seen
                seen.append(await http1.read_body(reader, request.length, LIMIT))
        except http1.HTTPError as e:
            return [*seen, (e.status, e.message)]

    return feed(read, pieces, http1.MAX_HEAD)


def answer(pieces: Iterable[bytes], method: str = "GET", events: bool = False) -> Outcome:
    """What a client reads: status, fields, the body (or its events, one by one), whether the connection can go on.

    An error, by its text, is the last.
    """

    async def read(reader: asyncio.StreamReader) -> Outcome:
        seen: Outcome = []
        released: list[bool] = []
        try:
            response = await http1.read_answer(reader, method, released.append)
            seen += [response.status, response.fields]
            if events:
                async for event in response.events():
                    seen.append(event)
            else:
                seen.append(await response.read(LIMIT))
            response.close()
            behind = await reader.read(1)  # a pool does not use a connection again on which anything is unread
            return [*seen, released == [True] and not behind]
        except OSError as e:
            return [*seen, str(e)]

    return feed(read, pieces, 64 * 1024)


def messages(pieces: Iterable[bytes], client: bool = False) -> Outcome:
    """What a WebSocket reads: messages; last the codes of both close frames, a reason, and what a server has sent."""

    async def read(reader: asyncio.StreamReader) -> Outcome:
        wire: Any = Wire()
        websocket = rfc6455.WebSocket(reader, wire, client=client, max_message=MAX_MESSAGE)
        seen: Outcome = []
        while (message := await websocket.receive()) is not None:
            seen.append(message)
        assert websocket.closed
        sent = b"" if client else bytes(wire.sent)  # a client's masks are random
        return [*seen, (websocket.close_code, websocket.close_reason, websocket.sent_code, sent)]

    return feed(read, pieces, rfc6455.CHUNK)
