"""Echo throughput of `rfc6455` against the `websockets` and `aiohttp` packages, those that can be imported.

`python tests/bench/websocket.py [TURNS]` starts each server in a process of its own, pinned to one core where that
is possible, and loads them in alternation; only the ratios of one run mean something.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rfc6455

ECHO = Path(__file__).resolve().parents[1] / "websocket_echo.py"
SIZES = (64, 4 * 1024, 64 * 1024)
CONNECTIONS = 8
PIPELINED = 4  # messages on the way in each connection
SECONDS = 1.0  # a turn
LIMIT = 16 * 1024 * 1024
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[core % len(cores)]})


async def serve_websockets() -> None:
    from websockets.asyncio.server import ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, max_size=LIMIT, compression=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await server.serve_forever()


async def serve_websockets_python() -> None:
    sys.modules["websockets.speedups"] = None  # type: ignore[assignment]  # its masks in Python, as ours are
    await serve_websockets()


async def serve_aiohttp() -> None:
    from aiohttp import WSMsgType, web

    async def echo(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse(max_msg_size=LIMIT, compress=False)
        await answer.prepare(request)
        async for message in answer:
            if message.type is WSMsgType.TEXT:
                await answer.send_str(message.data)
            elif message.type is WSMsgType.BINARY:
                await answer.send_bytes(message.data)
        return answer

    application = web.Application()
    application.router.add_get("/", echo)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


SERVERS = {"websockets": serve_websockets, "websockets-python": serve_websockets_python, "aiohttp": serve_aiohttp}


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(HANDSHAKE)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    if not head.startswith(b"HTTP/1.1 101"):
        raise SystemExit(head.decode())
    return connection


def cpu_seconds(pid: int) -> float:
    """What a process has used of its core; the time of day where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return time.perf_counter()


def load(port: int, size: int, pid: int) -> tuple[float, float]:
    """Text messages echoed in a second, and microseconds of the server for one."""
    text = (b"The quick brown fox jumps over the lazy dog, and then some more." * (size // 64 + 1))[:size]
    frame = rfc6455.encode(rfc6455.TEXT, text, mask=b"\x37\xfa\x21\x3d")
    answer_size = len(frame) - 4  # without the mask
    selector = selectors.DefaultSelector()
    partial, buffer = {}, bytearray(1 << 20)
    for _ in range(CONNECTIONS):
        connection = connect(port)
        selector.register(connection, selectors.EVENT_READ)
        partial[connection] = 0
        connection.sendall(frame * PIPELINED)
    count, start, used = 0, time.perf_counter(), cpu_seconds(pid)
    while (now := time.perf_counter()) < start + SECONDS:
        for ready, _ in selector.select(1):
            connection = ready.fileobj
            assert isinstance(connection, socket.socket)
            answers, partial[connection] = divmod(partial[connection] + connection.recv_into(buffer), answer_size)
            count += answers
            connection.sendall(frame * answers)
    used = cpu_seconds(pid) - used
    for connection in partial:
        connection.close()
    return count / (now - start), used / count * 1e6


def start(command: list[str]) -> subprocess.Popen[str]:
    """A server on the last core; what it says when its clients leave in the middle is not wanted."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=lambda: pin(-1)
    )


def main(turns: int) -> None:
    here = str(Path(__file__))
    commands = {"copepod": [sys.executable, str(ECHO), "0"]}
    for name in SERVERS:
        if importlib.util.find_spec(name.partition("-")[0]):
            commands[name] = [sys.executable, here, "serve", name]
    children = {name: start(command) for name, command in commands.items()}
    try:
        pin(-2)
        ports = {name: int(child.stdout.readline()) for name, child in children.items() if child.stdout}
        turns_of: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(turns):
            for size in SIZES:
                for name, port in ports.items():
                    turns_of.setdefault((name, size), []).append(load(port, size, children[name].pid))
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    print(f"Python {sys.version.split()[0]}, {turns} turns, {CONNECTIONS} connections, {PIPELINED} messages each")
    print("ours against each: the median ratio of messages in a second, and of messages in a second of the core")
    for (name, size), theirs in sorted(turns_of.items(), key=lambda item: item[0][1]):
        both = list(zip(turns_of["copepod", size], theirs, strict=True))
        rate = statistics.median(their[0] / our[0] for our, their in both) ** -1
        cost = statistics.median(their[1] / our[1] for our, their in both)
        per_second, micros = (statistics.median(values) for values in zip(*theirs, strict=True))
        print(f"{size:6} bytes  {name:18} {per_second:7.0f}/s {micros:6.1f} us   ours {rate:5.2f} {cost:5.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(SERVERS[sys.argv[2]]())
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 7)
