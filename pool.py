"""Connections to other servers, kept for a moment between two requests; what is said on them is not known here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import ssl

READ_SIZE = 64 * 1024  # bytes that one read takes at most; some allocators map and unmap asyncio's 256 KiB at each
MAX_IDLE = 32  # connections kept for reuse, per origin
IDLE_SECONDS = 4.0  # below the five after which uvicorn and node close theirs
CONNECT_SECONDS = 10.0

Origin = tuple[str, str, int]  # scheme, host and port
Answer = TypeVar("Answer")


class _Link(NamedTuple):
    origin: Origin
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def usable(self, since: float) -> bool:
        """Whether it, idle `since` then, may be written to: not idle for long, and silent since its last answer.

        One that the server has ended, or soon will, is not written to: a turn may act, so it is never sent twice.
        """
        return time.monotonic() - since < IDLE_SECONDS and self.silent()

    def silent(self) -> bool:
        """Whether the server has said nothing since its last answer, not even that it ends."""
        buffered = self.reader._buffer  # type: ignore[attr-defined]  # no public name tells it
        return not buffered and not self.reader.at_eof() and not self.writer.is_closing()


class Pool(Generic[Answer]):
    """The connections of one event loop.

    `form(method, url, fields, body)` gives a request's origin and bytes; `read(reader, method, release)` gives its
    answer, which calls `release(reusable)` when it is done with the connection.
    """

    def __init__(
        self,
        form: Callable[[str, str, Iterable[tuple[str, str]], bytes], tuple[Origin, bytes]],
        read: Callable[[asyncio.StreamReader, str, Callable[[bool], None]], Awaitable[Answer]],
    ) -> None:
        self._form, self._read = form, read
        self._idle: dict[Origin, list[tuple[float, _Link]]] = {}
        self._busy: set[_Link] = set()
        self._tls: ssl.SSLContext | None = None

    async def request(self, method: str, url: str, fields: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """Send one request and return its answer. OSError: no connection, or no answer. ValueError: as of `form`."""
        origin, data = self._form(method, url, fields, body)
        link = await self._connect(origin)
        try:
            if link.writer.is_closing():  # lost since; asyncio would drop what is written, uvloop raise RuntimeError
                raise ConnectionResetError("the connection was lost before the request")
            link.writer.write(data)
            await link.writer.drain()
            return await self._read(link.reader, method, lambda reusable: self._release(link, reusable))
        except BaseException:  # a cancelled call must not leave its connection behind
            self._release(link, reusable=False)
            raise

    async def _connect(self, origin: Origin) -> _Link:
        idle = self._idle.get(origin, [])
        while idle:
            since, link = idle.pop()
            if link.usable(since):
                self._busy.add(link)
                return link
            link.writer.transport.abort()
        scheme, host, port = origin
        tls = await self._tls_context() if scheme == "https" else None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(host, port, ssl=tls)
        except TimeoutError:
            raise ConnectionRefusedError("connecting took too long") from None  # nothing was sent
        if hasattr(writer.transport, "max_size"):  # of one read
            writer.transport.max_size = READ_SIZE
        link = _Link(origin, reader, writer)
        self._busy.add(link)
        return link

    async def _tls_context(self) -> ssl.SSLContext:
        import ssl

        if self._tls is None:  # reading the system's certificates takes tens of milliseconds
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return self._tls

    def _release(self, link: _Link, reusable: bool) -> None:
        """Take back a connection of this pool: keep it for the next request, or drop it. Safe to call again."""
        if link not in self._busy:
            return
        self._busy.remove(link)
        idle = self._idle.setdefault(link.origin, [])
        if reusable and len(idle) < MAX_IDLE and link.silent():
            idle.append((time.monotonic(), link))
        else:
            link.writer.transport.abort()

    def sweep(self) -> None:
        """Drop what was idle too long, or was ended by its server."""
        for origin, idle in list(self._idle.items()):
            del self._idle[origin]
            for since, link in idle:
                if link.usable(since):
                    self._idle.setdefault(origin, []).append((since, link))
                else:
                    link.writer.transport.abort()

    def close(self) -> None:
        """Drop every connection, those in use too."""
        for link in [*self._busy, *(link for idle in self._idle.values() for _, link in idle)]:
            link.writer.transport.abort()
        self._busy.clear()
        self._idle.clear()
