"""One connection on real sockets: who serves it, when it is over, and what becomes of it then."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import pytest

import connection
from connection import FOREVER, Connection

SECONDS = 10  # a bound, never waited for
LIMIT = 32 * 1024
Serve = Callable[[Connection], Coroutine[Any, Any, bool]]


class House:
    """A listener of Connections, and clients of it."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.made: list[Connection] = []
        self.clients: list[socket.socket] = []
        self.address: tuple[str, int] = ("", 0)
        self.starts = 0

    async def client(self) -> tuple[socket.socket, Connection]:
        """Return a connected client and the server's end of it."""
        sock = socket.socket()
        sock.setblocking(False)
        self.clients.append(sock)
        count = len(self.made)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        await until(lambda: len(self.made) > count and hasattr(self.made[-1], "transport"))
        return sock, self.made[-1]


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.001)


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def receive(sock: socket.socket, count: int) -> bytes:
    """Return `count` bytes, fewer at the end of the stream."""
    data = b""
    async with asyncio.timeout(SECONDS):
        while len(data) < count and (piece := await asyncio.get_running_loop().sock_recv(sock, count - len(data))):
            data += piece
    return data


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def run(serve: Serve, work: Callable[[House], Awaitable[None]], **options: Any) -> House:
    """Run `work` against a listener; afterwards no connection and no task is left."""

    async def main() -> House:
        house = House()

        async def counted(c: Connection) -> bool:
            house.starts += 1
            return await serve(c)

        def factory() -> Connection:
            settings = {"limit": LIMIT, "first_seconds": 10.0, "write_seconds": 30.0, "room": 100, **options}
            house.made.append(Connection(counted, house.connections, **settings))
            return house.made[-1]

        loop = asyncio.get_running_loop()
        listener = await loop.create_server(factory, "127.0.0.1", 0)
        house.address = listener.sockets[0].getsockname()
        try:
            await asyncio.wait_for(work(house), 3 * SECONDS)
        finally:
            for sock in house.clients:
                sock.close()
            for c in list(house.connections):
                c.transport.abort()
            listener.close()
            await until(lambda: not house.connections and all(c.task is None for c in house.made))
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return house

    return asyncio.run(main())


async def echo(c: Connection) -> bool:
    """Answer each line with itself."""
    while line := await c.reader.readline():
        c.write(line)
        if not c.buffered:
            return True
    return False


class Watched:
    """A run behind each line: watched until `go_on`, then answered."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.at = 0.0

    async def __call__(self, c: Connection) -> bool:
        line = await c.reader.readline()
        c.watch()
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.at = time.monotonic()
            self.cancelled.set()
            raise
        finally:
            c.unwatch()
        c.write(line)
        return not c.buffered


# How many


@pytest.mark.parametrize(
    ("soft", "wanted", "expected"),
    [
        (256, 1024, 96),
        (65536, 1024, 1024),
        (2112, 1024, 1024),
        (2110, 1024, 1023),
        (64, 9, 1),
        (resource.RLIM_INFINITY, 1024, 1024),
    ],
)
def test_room_for(soft: int, wanted: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, resource.RLIM_INFINITY))
    assert connection.room_for(wanted) == expected


@pytest.mark.parametrize("error", [None, ValueError, OSError])
def test_raise_file_limit(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[object] = []

    def setrlimit(*arguments: object) -> None:
        limits.append(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    connection.raise_file_limit()
    assert limits == [(resource.RLIMIT_NOFILE, (4096, 4096))]


# Serving


def test_a_task_only_while_there_is_something_to_serve() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        assert house.connections == {c}
        assert (c.task, c.gone, c.expired, c.buffered, c.peer) == (None, False, False, 0, "127.0.0.1")
        assert 0 < c.deadline - connection.now() <= 10
        for n in range(1, 4):
            await send(sock, b"hi\n")
            assert await receive(sock, 3) == b"hi\n"
            await until(lambda: c.task is None)
            assert house.starts == n
        await send(sock, b"h")
        await until(lambda: c.buffered == 1)
        assert c.task is not None
        await send(sock, b"o\n")
        assert await receive(sock, 3) == b"ho\n"

    run(echo, work)


def test_pipelined_lines_are_one_task() -> None:
    async def work(house: House) -> None:
        sock, _ = await house.client()
        lines = b"".join(b"%d\n" % n for n in range(1000))
        await send(sock, lines)
        assert await receive(sock, len(lines)) == lines

    run(echo, work)


def test_two_clients_are_two() -> None:
    async def work(house: House) -> None:
        (a, _), (b, other) = await house.client(), await house.client()
        await send(b, b"b\n")
        assert await receive(b, 2) == b"b\n"
        b.close()
        await until(lambda: other not in house.connections)
        await send(a, b"a\n")
        assert await receive(a, 2) == b"a\n"

    run(echo, work)


def test_false_ends_the_connection() -> None:
    async def serve(c: Connection) -> bool:
        c.write(await c.reader.readline())
        return False

    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"hi\n")
        assert await receive(sock, 99) == b"hi\n"
        await until(lambda: not house.connections)

    run(serve, work)


def test_an_oserror_ends_the_connection() -> None:
    async def serve(c: Connection) -> bool:
        raise ConnectionResetError

    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"hi\n")
        assert await receive(sock, 99) == b""

    run(serve, work)


def test_what_comes_for_a_closing_connection_starts_nothing() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        c.write(b"x" * 10_000_000)  # more than the kernel takes, so that closing lasts
        c.transport.close()
        c.data_received(b"hi\n")
        assert c.task is None
        assert house.starts == 0
        reset(sock)

    run(echo, work)


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SPARE", 1)

    async def work(house: House) -> None:
        for surplus in (False, True):  # the second is to be refused in words
            sock, c = await house.client()
            assert c.surplus is surplus
            await send(sock, b"hi\n")
            assert await receive(sock, 3) == b"hi\n"
        sock, c = await house.client()  # and the third without
        assert await receive(sock, 1) == b""
        await until(lambda: c not in house.connections)
        assert len(house.connections) == 2
        assert c.gone

    run(echo, work, room=1)


def test_no_peer_on_a_local_socket() -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        with there:
            c = Connection(echo, set(), limit=LIMIT, first_seconds=1, write_seconds=1, room=1)
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: c, sock=here)
            assert c.peer == ""
            transport.abort()
            await until(lambda: c.gone)

    asyncio.run(main())


# The client leaves


def test_an_idle_client_leaves() -> None:
    async def work(house: House) -> None:
        for leave in (socket.socket.close, reset, lambda sock: sock.shutdown(socket.SHUT_WR)):
            sock, c = await house.client()
            await send(sock, b"hi\n")
            assert await receive(sock, 3) == b"hi\n"
            leave(sock)
            await until(lambda: not house.connections)
            assert c.gone
            assert c.task is None

    run(echo, work)


def test_a_half_closed_client_is_answered() -> None:
    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"a\nb\n")
        sock.shutdown(socket.SHUT_WR)
        assert await receive(sock, 99) == b"a\nb\n"
        await until(lambda: not house.connections)

    run(echo, work)


def test_a_half_closed_client_is_answered_when_its_run_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HALF_CLOSE_SECONDS", 60.0)

    async def main(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await watched.begun.wait()
        sock.shutdown(socket.SHUT_WR)
        await until(lambda: c._leaving is not None)
        assert not c.gone
        watched.go_on.set()
        assert await receive(sock, 99) == b"hi\n"
        assert not watched.cancelled.is_set()
        assert c._leaving is None

    watched = Watched()
    run(watched, main)


@pytest.mark.parametrize("early", [False, True])
def test_end_of_stream_cancels_a_moment_later(early: bool) -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        start = time.monotonic()
        await send(sock, b"hi\n")
        if not early:
            await watched.begun.wait()
            start = time.monotonic()
        sock.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(watched.cancelled.wait(), SECONDS)
        assert watched.at - start >= connection.HALF_CLOSE_SECONDS - 0.01
        assert c.gone
        await until(lambda: not house.connections)

    watched = Watched()
    run(watched, work)


def test_an_end_that_came_before_the_run() -> None:
    async def serve(c: Connection) -> bool:
        while not c._eof:
            await asyncio.sleep(0.001)
        return await watched(c)

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        sock.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(watched.cancelled.wait(), SECONDS)
        assert c.gone

    watched = Watched()
    run(serve, work)


def test_a_reset_cancels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HALF_CLOSE_SECONDS", 60.0)

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await watched.begun.wait()
        reset(sock)
        await asyncio.wait_for(watched.cancelled.wait(), SECONDS)
        assert c.gone
        assert not c.expired
        await until(lambda: not house.connections)

    watched = Watched()
    run(watched, work)


def test_a_reset_is_no_error_that_nobody_took() -> None:
    errors: list[object] = []

    async def work(house: House) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        closed = loop.create_future()  # older than its connection: the collector comes to it first
        sock, c = await house.client()
        c._closed, c.itself = closed, c  # type: ignore[attr-defined]  # a cycle, such as an error's traceback makes
        reset(sock)
        await until(lambda: not house.connections)
        assert "ConnectionResetError" in repr(closed)
        house.made.clear()

    run(echo, work)
    gc.collect()
    assert not errors


def test_nobody_is_cancelled_who_does_not_watch() -> None:
    go_on = asyncio.Event()

    async def serve(c: Connection) -> bool:
        await go_on.wait()
        assert c.gone
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await until(lambda: c.task is not None)
        reset(sock)
        await until(lambda: c.gone)
        task = c.task
        assert task is not None
        go_on.set()
        await task

    run(serve, work)


# Bytes behind a run


def test_what_comes_behind_a_run_is_the_next_request() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await watched.begun.wait()
        behind = b"x" * (connection.MAX_BEHIND - 1) + b"\n"
        await send(sock, behind)
        await until(lambda: c.buffered == len(behind))
        assert c.transport.is_reading()
        assert not c.gone
        watched.go_on.set()
        assert await receive(sock, 3) == b"hi\n"
        assert bytes(c.reader._buffer) == behind  # type: ignore[attr-defined]

    watched = Watched()
    run(watched, work)


def test_too_much_behind_a_run_ends_it() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await watched.begun.wait()
        await send(sock, b"x" * (connection.MAX_BEHIND + 1))
        await asyncio.wait_for(watched.cancelled.wait(), SECONDS)
        assert c.gone
        assert c.buffered <= connection.MAX_BEHIND
        await until(lambda: not house.connections)

    watched = Watched()
    run(watched, work)


def test_a_flood_behind_a_run_is_dropped() -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.watch()
        begun.set()
        try:
            await over.wait()
        except asyncio.CancelledError:
            await over.wait()  # one who takes long to end
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await begun.wait()
        await asyncio.wait_for(send(sock, b"x" * 20_000_000), SECONDS)  # all of it is read
        assert c.gone
        assert c.buffered <= connection.MAX_BEHIND
        over.set()

    run(serve, work)


def test_one_read_takes_no_more_than_an_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    take = Connection.data_received

    def seen(c: Connection, data: bytes) -> None:
        sizes.append(len(data))
        take(c, data)

    monkeypatch.setattr(Connection, "data_received", seen)

    async def work(house: House) -> None:
        sock, c = await house.client()
        if not hasattr(c.transport, "max_size"):
            pytest.skip("uvloop reads into a buffer of its own")
        data = b"x" * 300_000 + b"\n"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(data))
        await send(sock, data)
        assert await receive(sock, len(data)) == data

    run(echo, work, limit=400_000)
    assert max(sizes) <= connection.READ_SIZE


def test_a_reader_that_paused_is_not_blind() -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readexactly(3)
        while c.transport.is_reading():  # until as much waits as the reader takes
            await asyncio.sleep(0.001)
        return await watched(c)

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n" + b"\n" * (2 * LIMIT + 10))
        await watched.begun.wait()
        assert c.transport.is_reading()
        reset(sock)
        await asyncio.wait_for(watched.cancelled.wait(), SECONDS)

    watched = Watched()
    run(serve, work)


def test_a_reader_pauses_again_behind_a_run() -> None:
    ready, over = asyncio.Event(), asyncio.Event()

    async def serve(c: Connection) -> bool:
        await c.reader.readexactly(3)
        while c.transport.is_reading():
            await asyncio.sleep(0.001)
        c.watch()
        c.unwatch()
        ready.set()
        await over.wait()  # as one that drains an answer
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n" + b"\n" * (2 * LIMIT + 10))
        await ready.wait()
        flood = asyncio.create_task(send(sock, b"x" * 20_000_000))
        await until(lambda: flood.done() or not c.transport.is_reading())
        reading = c.transport.is_reading()
        flood.cancel()
        over.set()
        assert not reading
        assert c.buffered < 1_000_000

    run(serve, work)


# Deadlines


def test_idle_too_long() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        c.expire()
        assert await receive(sock, 1) == b""
        await until(lambda: not house.connections)
        assert not c.expired

    run(echo, work)


def test_bytes_that_come_as_the_deadline_passes_are_served() -> None:
    """Their task has not begun: cancelled now, it would leave the connection in the set for ever."""

    async def work(house: House) -> None:
        sock, c = await house.client()
        c.deadline = connection.now() - 1
        c.data_received(b"late\n")
        if c.deadline < connection.now():  # as the gateway's sweep
            c.expire()
        assert await receive(sock, 5) == b"late\n"

    run(echo, work)


def test_idle_too_long_with_bytes_unsent() -> None:
    async def work(house: House) -> None:
        _, c = await house.client()
        c.write(b"x" * 10_000_000)
        c.expire()  # closes, which waits for the reader
        assert c.transport.is_closing()
        assert 0 < c.deadline - connection.now() <= 30
        assert house.connections
        c.expire()
        await until(lambda: not house.connections)

    run(echo, work)


def test_serving_too_long() -> None:
    async def serve(c: Connection) -> bool:
        try:
            await c.reader.readline()
        except asyncio.CancelledError:
            assert c.expired
            task = asyncio.current_task()
            assert task is not None
            assert task.uncancel() == 0
            c.write(b"408")
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"no end of line")
        await until(lambda: c.task is not None)
        c.expire()
        assert await receive(sock, 99) == b"408"

    run(serve, work)


def test_serving_too_long_twice() -> None:
    over = asyncio.Event()

    async def serve(c: Connection) -> bool:
        try:
            await over.wait()
        except asyncio.CancelledError:
            await over.wait()
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await until(lambda: c.task is not None)
        c.expire()
        assert c.expired
        await asyncio.sleep(0)
        c.expire()
        assert await receive(sock, 1) == b""
        over.set()

    run(serve, work)


class Slow:
    """Writes much, and waits until it was read."""

    def __init__(self) -> None:
        self.draining, self.result = asyncio.Event(), ""
        self.before = self.after = 0.0

    async def __call__(self, c: Connection) -> bool:
        await c.reader.readline()
        self.before = c.deadline = connection.now() + 5
        assert not c.write(b"x")
        assert c.write(b"x" * 20_000_000)
        self.draining.set()
        try:
            await c.drain()
            self.result = "dropped" if c.gone else "read"
        except OSError:
            self.result = "dropped"
            raise
        finally:
            self.after = c.deadline
        return True


def test_a_slow_reader_that_reads() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)  # else the kernel may take 32 MB
        await send(sock, b"hi\n")
        await slow.draining.wait()
        for _ in range(3):
            await until(lambda: c._unsent is not None)
            unsent = c._unsent
            assert unsent is not None
            assert 20 < c.deadline - connection.now() <= 30
            await receive(sock, 2_000_000)
            await until(lambda unsent=unsent: c.transport.get_write_buffer_size() < unsent)
            c.expire()
            assert not c.transport.is_closing()
        await receive(sock, 20_000_001 - 6_000_000)
        await until(lambda: c.task is None)
        assert slow.result == "read"
        assert slow.before == slow.after == c.deadline
        assert not c.expired

    slow = Slow()
    run(slow, work)


def test_a_slow_reader_that_does_not_read() -> None:
    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await slow.draining.wait()
        size = -1
        while size != (size := c.transport.get_write_buffer_size()):  # the kernel has what it takes
            await asyncio.sleep(0.05)
        c.expire()
        c.expire()
        await until(lambda: not house.connections)
        assert slow.result == "dropped"
        assert not c.expired

    slow = Slow()
    run(slow, work)


def test_a_client_that_left_and_does_not_read_has_a_deadline() -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.watch()
        try:
            while True:
                if c.write(b"x" * 100_000):
                    await c.drain()
        except asyncio.CancelledError:
            assert c.gone
            return False
        finally:
            c.unwatch()

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        await until(lambda: c._unsent is not None)
        sock.shutdown(socket.SHUT_WR)  # gone, for the server; but it neither reads nor closes
        await until(lambda: c.transport.is_closing())
        assert house.connections == {c}
        assert c.deadline < FOREVER

    run(serve, work)


# Lingering


def test_a_client_that_still_sends_reads_its_answer() -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.write(b"413\n")
        await c.linger()
        lingered.append(c.deadline - connection.now())
        return False

    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"hi\n" + b"x" * 3_000_000)
        assert await receive(sock, 99) == b"413\n"
        sock.close()
        await until(lambda: not house.connections)
        assert 0 < lingered[0] <= connection.LINGER_SECONDS

    lingered: list[float] = []
    run(serve, work)


@pytest.mark.parametrize("why", ["bytes", "time"])
def test_lingering_has_its_bounds(why: str) -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.write(b"413\n")
        await c.linger()
        return False

    async def work(house: House) -> None:
        sock, c = await house.client()
        await send(sock, b"hi\n")
        assert await receive(sock, 99) == b"413\n"
        assert house.connections
        if why == "time":
            c.expire()
        else:
            with pytest.raises(OSError, match=r"."):
                await asyncio.wait_for(send(sock, b"x" * (connection.MAX_LINGER + 20_000_000)), SECONDS)
        await until(lambda: not house.connections)

    run(serve, work)


def test_nobody_lingers_on_what_is_closed() -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.transport.abort()
        before = c.deadline
        await c.linger()
        assert c.deadline == before
        return False

    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"hi\n")
        assert await receive(sock, 1) == b""

    run(serve, work)


class Whole:
    """A transport that ends in whole or not at all, as one of TLS."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def can_write_eof(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def test_lingering_without_half_close() -> None:
    async def serve(c: Connection) -> bool:
        await c.reader.readline()
        c.transport = cast(asyncio.Transport, Whole(c.transport))
        c.write(b"bye\n")
        await c.linger()
        return False

    async def work(house: House) -> None:
        sock, _ = await house.client()
        await send(sock, b"hi\n")
        assert await receive(sock, 4) == b"bye\n"
        sock.shutdown(socket.SHUT_WR)
        assert await receive(sock, 1) == b""

    run(serve, work)
