"""Connections to other servers: opened, used again, dropped; plain and TLS."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import http1
import pool as module
from scripted import CLOSE, HI, OK, Pool, Server, events_of, fetch, new_pool, serve


def test_nobody_listens() -> None:
    async def main() -> None:
        listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        pool = new_pool()
        with pytest.raises(OSError, match=r"."):
            await pool.request("GET", f"http://127.0.0.1:{port}/", [], b"")
        assert not pool._busy

    asyncio.run(main())


def test_connecting_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "open_connection", never)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.01)

    async def main() -> None:
        with pytest.raises(ConnectionError, match="too long"):
            await new_pool().request("GET", "http://127.0.0.1/", [], b"")

    asyncio.run(main())


# Connections


def test_a_connection_is_used_again() -> None:
    script = [
        HI,
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        HI,
    ]

    async def work(server: Server, pool: Pool) -> None:
        for expected in (b"hi", b"hi", b"", b"hi"):
            assert (await fetch(server, pool))[1] == expected
        assert server.connections == 1

    serve(script, work)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", "told so"),
        (OK + b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi", "told so, among others"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.0"),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.0"),
        ((OK + b"\r\nhi", CLOSE), "its end is the body's"),
    ],
)
def test_a_connection_is_not_used_again(answer: Any, why: str) -> None:
    async def work(server: Server, pool: Pool) -> None:
        for _ in range(2):
            assert await fetch(server, pool) == (200, b"hi")
        assert server.connections == 2, why

    serve([answer, HI], work)


def test_a_connection_that_the_server_ended_is_not_used_again() -> None:
    async def work(server: Server, pool: Pool) -> None:
        assert await fetch(server, pool) == (200, b"hi")
        await server.ended.wait()
        (idle,) = pool._idle.values()
        while not idle[0][1].reader.at_eof():
            await asyncio.sleep(0)
        assert await fetch(server, pool) == (200, b"hi")
        assert server.connections == 2

    serve([(HI, CLOSE), HI], work)


@pytest.mark.parametrize("read", [False, True])
def test_an_answer_that_was_not_read_ends_its_connection(read: bool) -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("GET", server.url, [], b"")
        if read:
            async with aclosing(response.pieces()) as pieces:
                async for piece in pieces:
                    assert piece == b"h"  # the rest is to come
                    break
        response.close()
        await server.ended.wait()
        assert await fetch(server, pool) == (200, b"hi")
        assert server.connections == 2

    serve([OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n", HI], work)


EXTRA = [
    pytest.param("HEAD", HI, id="HEAD with a body"),
    pytest.param("POST", b"HTTP/1.1 204 x\r\nContent-Length: 2\r\n\r\nhi", id="204 with a body"),
    pytest.param("POST", HI + b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", id="408 while idle"),
]


@pytest.mark.parametrize(("method", "answer"), EXTRA)
def test_a_connection_with_bytes_left_is_not_used_again(method: str, answer: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        await fetch(server, pool, method)
        assert await fetch(server, pool) == (200, b"hi")
        assert server.connections == 2

    serve([answer, HI], work)


def test_idle_connections_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: moment[0]))

    async def work(server: Server, pool: Pool) -> None:
        await fetch(server, pool)
        pool.sweep()
        assert len(pool._idle) == 1
        moment[0] += module.IDLE_SECONDS + 1
        await fetch(server, pool)
        assert server.connections == 2
        await server.ended.wait()
        server.ended.clear()
        moment[0] += module.IDLE_SECONDS + 1
        pool.sweep()
        assert not pool._idle
        await server.ended.wait()

    serve([HI, HI], work)


def test_sweep_drops_what_its_server_ended() -> None:
    async def work(server: Server, pool: Pool) -> None:
        await fetch(server, pool)
        (idle,) = pool._idle.values()
        while not idle[0][1].reader.at_eof():
            await asyncio.sleep(0)
        pool.sweep()
        assert not pool._idle

    serve([(HI, CLOSE)], work)


def test_one_read_takes_no_more_than_an_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"x" * 1_000_000
    sizes: list[int] = []
    take = asyncio.StreamReaderProtocol.data_received

    def seen(protocol: asyncio.StreamReaderProtocol, data: bytes) -> None:
        sizes.append(len(data))
        take(protocol, data)

    async def work(server: Server, pool: Pool) -> None:
        assert (await fetch(server, pool))[1] == body
        if not hasattr(server.writers[0].transport, "max_size"):
            pytest.skip("uvloop reads into a buffer of its own")
        assert max(sizes) <= module.READ_SIZE

    monkeypatch.setattr(asyncio.StreamReaderProtocol, "data_received", seen)
    serve([OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)], work)


def test_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDLE", 2)

    async def work(server: Server, pool: Pool) -> None:
        responses = await asyncio.gather(*(pool.request("GET", server.url, [], b"") for _ in range(5)))
        assert len(pool._busy) == server.connections == 5
        for response in responses:
            assert await response.read(9) == b"hi"
            response.close()
        assert [len(idle) for idle in pool._idle.values()] == [2]

    serve([HI] * 5, work)


def test_close_drops_what_is_in_use() -> None:
    async def work(server: Server, pool: Pool) -> None:
        response = await pool.request("GET", server.url, [], b"")
        pool.close()
        await server.ended.wait()
        with pytest.raises(OSError, match=r"."):
            await response.read(9)
        response.close()
        assert not pool._idle

    serve([OK + b"Content-Length: 5\r\n\r\n"], work)


@pytest.mark.parametrize("begun", [b"", OK, OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n"])
def test_cancel_ends_the_connection(begun: bytes) -> None:
    async def work(server: Server, pool: Pool) -> None:
        task = asyncio.create_task(fetch(server, pool))
        await server.asked.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.ended.wait()
        assert not pool._busy

    serve([begun], work)


# TLS


def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    script = [HI, OK + b"Transfer-Encoding: chunked\r\n\r\n" + http1.chunk(b"data: a\n\n") + http1.LAST_CHUNK]

    async def work(server: Server, pool: Pool) -> None:
        assert await fetch(server, pool) == (200, b"hi")
        assert await events_of(server, pool) == ["a"]
        assert server.connections == 1

    serve(script, work, tls=server_context(certificate))


@pytest.mark.parametrize("trusted", [False, True])
def test_tls_refuses(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    if trusted:  # but for another name
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def work(server: Server, pool: Pool) -> None:
        if trusted:
            server.url = server.url.replace("localhost", "127.0.0.1")
        with pytest.raises(ssl.SSLCertVerificationError) as error:
            await fetch(server, pool)
        assert isinstance(error.value, OSError)
        assert not pool._busy
        assert not server.requests

    serve([HI], work, tls=server_context(certificate))


def test_no_tls_where_it_is_asked_for() -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(HI)
            writer.close()

        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        pool = new_pool()
        with pytest.raises(ssl.SSLError):
            await pool.request("GET", f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/", [], b"")
        assert not pool._busy
        listener.close()
        await listener.wait_closed()

    asyncio.run(main())
