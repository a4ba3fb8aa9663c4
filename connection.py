"""One client's connection over asyncio streams: who serves it, when its time is up, whether it is still there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

HIGH_WATER = 64 * 1024  # bytes unsent before a writer waits; asyncio's own default
READ_SIZE = 64 * 1024  # bytes that one read takes at most
MAX_BEHIND = 64 * 1024  # bytes that a client may send behind a running request
MAX_BUFFERED = 512 * 1024  # bytes of them and of what came before it, unread
SPARE = 32  # connections beyond the room for them, so that they can be told
MAX_LINGER = 4 * 1024 * 1024  # bytes read and dropped so that the client reads its answer instead of a reset
LINGER_SECONDS = 2.0  # nginx lingers for 5 s a read and 30 s in all
HALF_CLOSE_SECONDS = 0.045  # what a quick answer to a half-closed client may take; with a child's grace below 0.1
FOREVER = float("inf")

now = time.monotonic  # the clock of every deadline, in seconds


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def room_for(wanted: int) -> int:
    """Return how many of the `wanted` connections the open-file limit allows: each may need a second file to answer."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - 64) // 2))


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's loop, where it is installed (copepod[fast]), else None: asyncio's own will do."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def stop_listening(server: asyncio.Server) -> None:
    """Close the server once what it has accepted is made: asyncio attaches no transport to a closed one.

    Else the connection is left to the collector, with a traceback in the log (python/cpython#109564).
    """
    loop = asyncio.get_running_loop()
    for sock in server.sockets:
        loop.remove_reader(sock)
    for _ in ("its transport is made", "and tells its protocol"):
        await asyncio.sleep(0)
    server.close()


Secure = Callable[[asyncio.Transport, asyncio.BaseProtocol], Awaitable[asyncio.Transport | None]]


class Connection(asyncio.StreamReaderProtocol):
    """A StreamReader and a transport, without a task while idle: the first byte of a request starts `serve`.

    `serve` returns True when the connection is idle, with nothing left to read, and False when it has to end.
    Its owner calls `expire` once `deadline` has passed. RFC 9112 section 9.
    """

    __slots__ = (  # ten thousand of them may be idle
        "_behind", "_connections", "_eof", "_leaving", "_loop_", "_lost", "_opening", "_room", "_secure", "_serve",
        "_unsent", "_watching", "_write_seconds", "_writer", "deadline", "expired", "full", "gone", "on_tick", "peer",
        "reader", "surplus", "task", "transport",
    )  # fmt: skip

    def __init__(
        self,
        serve: Callable[[Connection], Coroutine[Any, Any, bool]],
        connections: set[Connection],
        *,
        limit: int,
        first_seconds: float,
        write_seconds: float,
        room: int,
        secure: Secure | None = None,
    ) -> None:
        self._loop_ = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit, self._loop_)
        super().__init__(self.reader, loop=self._loop_)
        self._drain_waiters: list[Any] = []  # asyncio's deque takes 700 bytes, also of an idle connection
        self.deadline = now() + first_seconds
        self.gone = False  # the client has left: nobody reads an answer
        self.full = False  # too much is unsent: `drain` before the next
        self.expired = False  # the deadline has cancelled the task that serves
        self.on_tick: Callable[[float], None] | None = None  # called once a second while a stream is on
        self.task: asyncio.Task[None] | None = None
        self._serve, self._connections, self._write_seconds = serve, connections, write_seconds
        self._secure = secure  # what makes it a TLS one, until that is done
        self._opening: asyncio.Task[None] | None = None  # which does it
        self._room = room  # for how many connections there is
        self.surplus = False  # this one is beyond: it is served nothing but a refusal
        self._eof = self._lost = self._watching = False
        self._behind = 0  # bytes that came while a run was on
        self._unsent: int | None = None  # bytes, while a writer waits for a slow reader
        self._leaving: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def writer(self) -> asyncio.StreamWriter:
        """The writer of this connection; most never need one."""
        if self._writer is None:
            self._writer = asyncio.StreamWriter(self.transport, self, self.reader, self._loop_)
        return self._writer

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else ""  # the address of the other end, without its port
        self._connections.add(self)
        self.surplus = len(self._connections) > self._room
        if len(self._connections) > self._room + SPARE:
            self.transport.abort()
        elif self._secure is not None:
            self.transport.pause_reading()  # what comes is not for us
            self._opening = asyncio.Task(self._handshake(self._secure), loop=self._loop_)
            return
        self._open(self.transport)

    async def _handshake(self, secure: Secure) -> None:
        """Make it a TLS connection. asyncio would count none before that, and keep them beyond any number."""
        transport = None
        with contextlib.suppress(OSError):  # no TLS, or too late: asyncio has closed the connection
            transport = await secure(self.transport, self)
        self._secure = self._opening = None
        if transport is not None:
            self._open(transport)
            if self.buffered:
                self._begin()
        elif not self._lost:  # asyncio says nothing of one that is lost inside the handshake
            self.connection_lost(None)

    def _open(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER)
        if hasattr(transport, "max_size"):  # of one read; asyncio's 256 KiB some allocators map and unmap at each
            transport.max_size = READ_SIZE

    def data_received(self, data: bytes) -> None:
        if self._watching:
            self._behind += len(data)
            if self._behind > MAX_BEHIND or self.buffered > MAX_BUFFERED:
                self._leave()  # a paused reader would never see the client's end
                return
            self.reader.feed_data(data)
            self._see()
            return
        self.reader.feed_data(data)
        if self.task is None and self._secure is None:
            self._begin()

    def _begin(self) -> None:
        if not self.transport.is_closing():
            self.deadline = FOREVER  # until it has begun: a task that is cancelled before that ends without a word
            self.task = asyncio.Task(self._run(), loop=self._loop_)

    def eof_received(self) -> bool:
        self._eof = True
        stay = super().eof_received()
        if self._watching:
            self._leave_soon()
        return bool(stay) and self.task is not None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if exc is not None:  # else the collector, which may look at this before us, would say that nobody took it
            self._closed.exception()  # type: ignore[attr-defined]
        self._lost = True
        self._leave()
        if self.task is None:
            self._connections.discard(self)  # else when its task has ended

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.full = False

    # the server's side

    @property
    def buffered(self) -> int:
        """The number of bytes that have come and were not read."""
        return len(self.reader._buffer)  # type: ignore[attr-defined]  # no public name tells it

    @property
    def flushing(self) -> asyncio.Future[None] | None:
        """What is done when all is sent that was answered; None where nothing of it is left here."""
        return self._closed if self.task is None and self.transport.get_write_buffer_size() else None  # type: ignore[attr-defined]

    async def _run(self) -> None:
        keep = False
        try:
            keep = await self._serve(self)
        except OSError:  # the client has left while it was written to or read from
            pass
        finally:
            self.task = None
            if self._lost:
                self._connections.discard(self)
            if not keep or self._eof:
                self.transport.close()

    def watch(self) -> None:
        """From now on the client's leaving cancels the task that serves: at once, or soon after its end of stream."""
        self._watching, self._behind = True, 0
        self.deadline = FOREVER
        self._see()
        if self._eof:
            self._leave_soon()

    def unwatch(self) -> None:
        """The run is over: what the client sends is its next request."""
        self._watching = False
        self.deadline = now() + self._write_seconds
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self.buffered > MAX_BEHIND and not self.transport.is_closing():  # `_see` has overruled the reader
            self.reader._paused = True  # type: ignore[attr-defined]
            self.transport.pause_reading()

    def _see(self) -> None:
        """Go on reading: a StreamReader that has paused its transport would be blind to the client's end."""
        if self.reader._paused:  # type: ignore[attr-defined]
            self.reader._paused = False  # type: ignore[attr-defined]  # else it would never pause again
            self.transport.resume_reading()

    def _leave_soon(self) -> None:
        if self._leaving is None:
            self._leaving = self._loop_.call_later(HALF_CLOSE_SECONDS, self._leave)

    def _leave(self) -> None:
        if not self.gone:
            self.gone = True
            if self._watching and self.task is not None:
                self.task.cancel()

    def write(self, data: bytes) -> bool:
        """Send `data`, and return whether the connection is full."""
        if not self._lost:  # asyncio would drop it, uvloop raise RuntimeError
            self.transport.write(data)
        return self.full

    def soon(self, callback: Callable[[], Any]) -> None:
        """Call `callback` at the end of this turn of the loop."""
        self._loop_.call_soon(callback)

    async def drain(self) -> None:
        """Wait until the client has read what was sent. One that reads nothing for a while is dropped. OSError."""
        before, self.deadline = self.deadline, now() + self._write_seconds
        self._unsent = self.transport.get_write_buffer_size()
        try:
            await self.writer.drain()
        finally:
            self._unsent, self.deadline = None, before

    async def linger(self) -> None:
        """End our half, then read and drop what the client still sends, within bounds (RFC 9112 section 9.6)."""
        if self.transport.is_closing():
            return
        self.deadline = now() + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        room = MAX_LINGER
        while room > 0 and (data := await self.reader.read(HIGH_WATER)):
            room -= len(data)

    def expire(self) -> None:
        """The deadline has passed: cancel the task that serves (it sees `expired`), or end what waits for nobody."""
        self.deadline = now() + self._write_seconds
        unsent = self.transport.get_write_buffer_size()
        if self._unsent is not None and unsent < self._unsent:
            self._unsent = unsent  # slow, but it reads
        elif self._unsent is not None or self.expired or self.transport.is_closing():
            self.transport.abort()
        elif self.task is None:
            self.transport.close()
        else:
            self.expired = True
            self.task.cancel()
