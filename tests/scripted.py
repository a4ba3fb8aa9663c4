"""A server that says what it is told to, and what asks it through a pool."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import http1
import pool as module

Pool = module.Pool[http1.Response]

SECONDS = 10  # a bound, never waited for
OK = b"HTTP/1.1 200 OK\r\n"
HI = OK + b"Content-Length: 2\r\n\r\nhi"
CLOSE = object()  # in a script: end the connection behind the answer
Work = Callable[["Server", Pool], Awaitable[Any]]


class Server:
    """Answers the n-th request, over all connections, with the n-th entry of its script."""

    def __init__(self, script: Sequence[Any], pieces: int = 1 << 20) -> None:
        self.script, self.pieces = list(script), pieces
        self.requests: list[bytes] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.ended = asyncio.Event()  # a connection is over, from the client's side or ours
        self.asked = asyncio.Event()
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                answer = self.script.pop(0) if self.script else b""
                close = isinstance(answer, tuple)
                data = answer[0] if isinstance(answer, tuple) else answer
                for start in range(0, len(data), self.pieces):
                    writer.write(data[start : start + self.pieces])
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    return
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.ended.set()


def new_pool() -> Pool:
    return Pool(http1.format_request, http1.read_answer)


def serve(script: Sequence[Any], work: Work, pieces: int = 1 << 20, tls: ssl.SSLContext | None = None) -> Server:
    """Run `work` against a server; afterwards nothing is open."""

    async def main() -> Server:
        server = Server(script, pieces)
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=tls)
        port = listener.sockets[0].getsockname()[1]
        server.url = f"http{'s' if tls else ''}://{'localhost' if tls else '127.0.0.1'}:{port}"
        pool = new_pool()
        try:
            await asyncio.wait_for(work(server, pool), SECONDS)
        finally:
            pool.close()
            assert not pool._busy
            assert not pool._idle
            listener.close()
            for writer in server.writers:
                writer.transport.abort()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=SECONDS)
            await asyncio.sleep(0)
        return server

    return asyncio.run(main())


async def fetch(server: Server, pool: Pool, method: str = "POST", body: bytes = b"{}") -> tuple[int, bytes]:
    response = await pool.request(method, server.url + "/x", [], body)
    try:
        return response.status, await response.read(1 << 20)
    finally:
        response.close()


async def events_of(server: Server, pool: Pool) -> list[str]:
    response = await pool.request("POST", server.url, [], b"")
    try:
        return [event async for event in response.events()]
    finally:
        response.close()
