"""Clients that are slow, deaf, silent, rude or too many: those that behave are served as if nothing were."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar
from unittest.mock import patch

from run import Row

import connection
import control
import exchange
import gateway
import rfc6455
from live import CHAT, Client, chat, serving, text_of, within
from peer import SMALL, connected, opened

BOUND = 55.0  # seconds for a scenario
MAX = 524_288  # bytes of a WebSocket message
T = TypeVar("T")


# What the scenarios share


def descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/dev/fd"))


def finished(main: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, which comes in time; no error that nobody took, no task, descriptor or child is left."""
    errors: list[str] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(_told(context)))
        async with asyncio.timeout(BOUND):
            result = await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"
        return result

    gc.collect()
    before = descriptors()
    logger = logging.getLogger("copepod")
    logger.disabled = True  # it is not about its log
    try:
        result = asyncio.run(bounded())
    finally:
        logger.disabled = False
    gc.collect()
    assert not errors, f"{len(errors)} errors that nobody took, the first: {errors[0]}"
    assert descriptors() <= before, f"{descriptors() - before} descriptors are left"
    with suppress(ChildProcessError):
        raise AssertionError(f"a child is left: {os.waitpid(-1, os.WNOHANG)}")
    return result


def _told(context: dict[str, Any]) -> str:
    return f"{context['message']}: {context.get('exception')!r}"


async def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> float:
    """Wait for a state that has no event; return after how many seconds it came."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


@contextmanager
def hurried(times: float = 20) -> Iterator[None]:
    """Let the gateway's clocks run faster: its limits are shorter, their order the same."""
    with (
        patch.multiple(gateway, HEAD_SECONDS=10 / times, SWEEP_SECONDS=1 / times),
        patch.multiple(exchange, BODY_SECONDS=30 / times),
        patch.multiple(control, TICK_SECONDS=30 / times, SILENCE_SECONDS=65 / times, HANDSHAKE_SECONDS=10 / times),
        patch.multiple(connection, LINGER_SECONDS=2 / times),
        patch.multiple(rfc6455, CLOSE_SECONDS=10 / times),
    ):
        yield


@contextmanager
def room_for_files(wanted: int) -> Iterator[int]:
    """Raise the file limit for a while; gives how many connections fit, both ends of each in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 2 * wanted + 1_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, 2 * wanted + 1_000)), hard))
    try:
        yield min(wanted, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 400) // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Others:
    """Clients that behave: what each of their answers took, in seconds, alone and then beside the trouble."""

    def __init__(self) -> None:
        self.alone: list[float] = []
        self.took: list[float] = []

    async def _ask(self, client: Client, took: list[float], text: str) -> None:
        began = time.perf_counter()
        client.say(text, stream=bool(len(took) % 2))
        if len(took) % 2:
            assert (await client.head())[0] == 200
            said = text_of([event async for event in client.events()])
        else:
            said = (await client.answer()).text
        assert said == text, f"another client was told {said[:80]!r} for {text!r}"
        took.append(time.perf_counter() - began)

    @asynccontextmanager
    async def beside(self, hub: gateway.Gateway, clients: int = 4, pause: float = 0.002) -> AsyncIterator[None]:
        over = asyncio.Event()

        async def go_on(client: Client, number: int) -> None:
            count = 0
            while not over.is_set():
                await self._ask(client, self.took, f"words of {number}, call {count}")
                count += 1
                await asyncio.sleep(pause)

        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(await Client.open(hub.port)) for _ in range(clients)]
            for count in range(20):
                await asyncio.gather(*(self._ask(c, self.alone, f"{n}, alone {count}") for n, c in enumerate(opened)))
            async with asyncio.TaskGroup() as tasks:
                for number, client in enumerate(opened):
                    tasks.create_task(go_on(client, number))
                yield
                over.set()

    def seen(self) -> str:
        """Return what was seen of them, who were served at normal speed."""
        alone, now = statistics.median(self.alone), statistics.median(self.took)
        longest = max(self.took)
        assert now <= 5 * alone + 0.5, f"others waited {now * 1e3:.0f} ms, alone {alone * 1e3:.0f}"
        assert longest < 3, f"another client waited {longest:.1f} s"
        return f"{len(self.took)} other answers, median {now * 1e3:.1f} ms (longest {longest * 1e3:.0f})"


def said(text: str, **more: Any) -> bytes:
    """Return the bytes of a chat call."""
    body = chat(text, **more)
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body


def _upgrade() -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in rfc6455.request_fields(rfc6455.client_key()))
    return f"GET / HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()


CONNECT = rfc6455.encode(
    rfc6455.TEXT,
    b'{"type":"req","id":"c","method":"connect","params":{"minProtocol":3,"maxProtocol":3,'
    b'"client":{"id":"test","version":"1","platform":"linux","mode":"test"}}}',
    mask=b"mask",
)
HALF_FRAME = rfc6455.encode(rfc6455.TEXT, b"x" * 100_000, mask=b"mask")[:500]
PING = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()

# How far a client comes before it falls silent, or leaves: the bytes it sends.
STAGES: dict[str, bytes] = {
    "nothing": b"",
    "half a head": HEAD[:-9],
    "no body": HEAD + b"Content-Length: 100\r\n\r\n",
    "half a body": said("half")[:-9],
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
    "an answer": PING,
    "a long answer": said("hi", model="agent:long"),
    "a stream": said("hi", model="agent:firehose", stream=True),
    "a refused body": b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n{",
    "an upgrade": _upgrade(),
    "a hello": _upgrade() + CONNECT,
    "half a frame": _upgrade() + CONNECT + HALF_FRAME,
    "a wrong frame": _upgrade() + CONNECT + b"\xff\xff",
}


async def deaf(port: int, data: bytes) -> socket.socket:
    """Return a peer that has sent this, and never reads."""
    loop, sock = asyncio.get_running_loop(), socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, data)
    return sock


class Talkers:
    """Agents that talk; what became of their runs."""

    def __init__(self) -> None:
        self.running = self.ran = 0
        self.silences: list[float] = []  # seconds from a firehose's last word to its end
        self.most = 0  # bytes that one of them said

    def agents(self) -> dict[str, Callable[..., Any]]:
        return {"main": self.echo, "firehose": self.firehose, "long": self.long, "slow": self.slow}

    async def echo(self, message: str) -> AsyncIterator[str]:
        yield message

    async def long(self, message: str) -> AsyncIterator[str]:
        yield "x" * (7 * MAX)

    async def slow(self, message: str) -> AsyncIterator[str]:
        self.running += 1
        self.ran += 1
        try:
            for word in message.split(" "):
                yield word + " "
                await asyncio.sleep(0.002)
        finally:
            self.running -= 1

    async def firehose(self, message: str) -> AsyncIterator[str]:
        self.running += 1
        self.ran += 1
        size, last = 0, time.monotonic()
        try:
            while True:
                last = time.monotonic()
                yield "water " * 700
                size += 4_200
                await asyncio.sleep(0)
        finally:
            self.running -= 1
            self.most = max(self.most, size)
            self.silences.append(time.monotonic() - last)


def unsent(connections: Iterable[connection.Connection]) -> int:
    """Return the most bytes that wait for one of these clients."""
    return max((c.transport.get_write_buffer_size() for c in connections), default=0)


# The scenarios


async def _dribble(hub: gateway.Gateway, where: str, pace: float) -> float:
    """Send a byte at a time until the gateway has had enough; return when that was, in seconds."""

    async def bytewise(write: Callable[[bytes], object], data: bytes) -> None:
        for byte in data:
            write(bytes([byte]))
            await asyncio.sleep(pace)

    began = time.monotonic()
    if where == "frame":
        async with opened(hub) as peer:
            await peer.challenge()
            assert (await peer.connect(scopes=["operator.write"]))["ok"]  # so that it hears of no runs
            data = rfc6455.encode(rfc6455.BINARY, b"x" * 10_000, mask=b"mask")  # our pongs fall into it
            task = asyncio.create_task(bytewise(peer.websocket._transport.write, data))
            code, _ = await peer.ended()
            assert code in (1006, 1008), code
            task.cancel()
    else:
        async with await Client.open(hub.port) as client:
            head, data = (b"", HEAD) if where == "head" else (HEAD + b"Content-Length: 9999\r\n\r\n", b"")
            client.write(head)
            task = asyncio.create_task(bytewise(client.write, data + b"x" * 9_000))
            answer = await client.answer()
            assert answer.status == 408, answer
            task.cancel()
            assert await client.ended()
    await asyncio.wait([task])
    return time.monotonic() - began


def dribbling_clients(n: int) -> Row:
    """A byte every second: a third in the head, a third in the body, a third in a WebSocket frame"""
    took: dict[str, list[float]] = {"head": [], "body": [], "frame": []}
    others, times = Others(), 5 if n > 300 else 40  # this process is their end, too

    async def one(hub: gateway.Gateway, where: str) -> None:
        took[where].append(await _dribble(hub, where, 1 / times) * times)

    async def main() -> None:
        async with serving({"gateway.maxConnections": 2_000}) as hub, others.beside(hub):
            async with asyncio.TaskGroup() as tasks:
                for where in list(took) * (n // 3):
                    tasks.create_task(one(hub, where))

    with room_for_files(n + 50) as room, hurried(times):
        n = min(n, room - 50)
        finished(main())
    for where, limit in (("head", 10), ("body", 30), ("frame", 30 + 65)):
        longest = max(took[where])
        assert longest < limit + 40, f"a byte at a time in the {where} held a connection for {longest:.0f} s"
    real = ", ".join(f"{where} {statistics.median(all_):.0f} s" for where, all_ in took.items())
    asked = "each dropped (408 where HTTP) at the limit of 10, 30 or 65 s; others at normal speed"
    tried, dropped = n // 3 * 3, sum(map(len, took.values()))
    return Row("", tried, tried - dropped, asked, f"dropped after: {real}; {others.seen()}")


def streams_never_read(n: int) -> Row:
    """A client that never reads its stream (HTTP)"""
    talkers, others, patience, peak = Talkers(), Others(), 1.0, 0

    async def main() -> None:
        nonlocal peak
        config = {"gateway.http.writeTimeoutSeconds": patience, "agents.defaults.maxConcurrent": n + 10}
        async with serving(config, talkers.agents()) as hub, others.beside(hub):
            socks = [await deaf(hub.port, STAGES["a stream"]) for _ in range(n)]
            await until(lambda: talkers.running == n, "all streams run")

            def over() -> bool:
                nonlocal peak
                peak = max(peak, unsent(hub.connections))
                return not talkers.running

            await until(over, "every run is cancelled")
            await until(lambda: len(hub.connections) == 4, "every connection is dropped")
            assert not [run for run in hub.runs.active if run.agent_id == "firehose"]
            for sock in socks:
                sock.close()

    with hurried():
        finished(main())
    longest = max(talkers.silences)
    assert patience * 0.9 < min(talkers.silences), "dropped too early"
    assert longest < patience + 2, f"its run went on for {longest:.1f} s"
    assert peak < 128 * 1024, f"{peak} bytes waited for one client"
    assert talkers.most < 8_000_000, f"an agent said {talkers.most} bytes to nobody"
    seen = f"dropped after {longest:.2f} s, at most {peak // 1024} KiB unsent; {others.seen()}"
    lost = n - len(talkers.silences)
    return Row("", n, lost, "dropped and its run cancelled within writeTimeoutSeconds (1), memory bounded", seen)


def websockets_never_read(n: int) -> Row:
    """A client that never reads its WebSocket"""
    peak, biggest, lost, size = 0, 0, 0, 6 * 1024 * 1024

    async def agent(message: str) -> AsyncIterator[str]:
        if message == "short":
            yield "a short answer"
            return
        for _ in range(size // 16_384):
            yield "words " * 2_730 + "and "
            await asyncio.sleep(0.003)

    async def main() -> str:
        nonlocal peak, biggest, lost
        async with serving({"gateway.maxConnections": 2_000}, {"main": agent}) as hub, AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connected(hub, buffer=SMALL)) for _ in range(n)]
            ears = set(hub.connections)
            watcher = await stack.enter_async_context(connected(hub))
            for number, peer in enumerate(peers):  # each has asked for a run, and hears of all the others
                params = {"message": "short", "idempotencyKey": f"d{number}", "sessionKey": f"s{number}"}
                await peer.post("agent", params)
            reading = asyncio.create_task(watcher.agent("long"))
            while not reading.done() or len(hub.connections) > 1:
                peak = max(peak, unsent(ears))
                await asyncio.sleep(0.005)
            answer = await reading
            assert answer["payload"]["result"]["payloads"][0]["text"] == watcher.text("k1")
            assert len(watcher.text("k1")) == size // 16_384 * 16_384
            biggest = max(len(json.dumps(frame)) for frame in watcher.frames if frame["type"] == "event")
            ended = [hub.jobs.get("", f"d{number}") for number in range(n)]
            lost = sum(job is None or job.payload is None or job.error is not None for job in ended)
            for peer in peers:
                peer.drop()
        return f"the reader got {len(watcher.text('k1')) >> 20} MiB whole"

    with room_for_files(n), hurried(10):
        seen = finished(main())
    assert peak <= control.MAX_BUFFERED + biggest, f"{peak} bytes waited for one client, an event has {biggest}"
    asked = "each dropped beyond 1.5 MiB and an event unread, its run goes to its end, who reads gets every word"
    return Row("", n, lost, asked, f"at most {peak / 1024 / 1024:.1f} MiB unsent for one; {seen}")


def idle_connections(n: int) -> Row:
    """Idle connections on one process while others are served"""
    others, lost = Others(), 0

    async def main(count: int) -> str:
        nonlocal lost
        config = {"gateway.maxConnections": count + 50, "gateway.http.keepAliveSeconds": 300}
        async with serving(config) as hub:
            clients: list[Client] = []
            for _ in range(0, count, 100):
                clients += await asyncio.gather(*(Client.open(hub.port) for _ in range(min(100, count - len(clients)))))
                assert all(await asyncio.gather(*(client.usable() for client in clients[-100:])))
            tasks = len(asyncio.all_tasks())
            assert tasks == 1, f"{tasks} tasks while all are idle"
            assert len(hub.connections) == count
            async with others.beside(hub):
                await until(lambda: len(others.took) > 500, "others are served", 30)
            for at in range(0, count, 100):
                good = await asyncio.gather(*(client.usable() for client in clients[at : at + 100]))
                lost += good.count(False)
            for client in clients:
                client.writer.close()
            await until(lambda: not hub.connections, "every connection is gone")
        return f"each is answered afterwards, they take {tasks} task; {others.seen()}"

    with room_for_files(n + 50) as room:
        n = min(n, room - 50)
        seen = finished(main(n))
    return Row("", n, lost, "none is dropped, others at normal speed", seen)


def flood_beyond_the_limit(n: int) -> Row:
    """A flood of connections beyond maxConnections"""
    inside, refused, dropped, others = 60, 0, 0, Others()

    async def outsider(port: int) -> None:
        nonlocal refused, dropped
        data = b""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            dropped += 1
            return
        with suppress(OSError):
            writer.write(PING)
            data = await within(reader.read())
        writer.transport.abort()
        assert not data or data.startswith(b"HTTP/1.1 503 "), data
        assert not data or b"\r\nRetry-After: 1\r\n" in data, data
        refused, dropped = refused + bool(data), dropped + (not data)

    async def main() -> None:
        async with serving({"gateway.maxConnections": inside}) as hub:
            async with AsyncExitStack() as stack:
                stay = [await stack.enter_async_context(await Client.open(hub.port)) for _ in range(inside - 4)]
                for client in stay:
                    assert await client.usable()
                async with others.beside(hub):
                    for _ in range(0, n, 200):
                        await asyncio.gather(*(outsider(hub.port) for _ in range(min(n, 200))))
                    for client in stay:
                        assert await client.usable(), "one inside is not served any more"
            await until(lambda: not hub.connections, "every connection is gone")
            async with await Client.open(hub.port) as client:
                assert (await client.ask("POST", CHAT, chat("afterwards"))).text == "afterwards"

    with room_for_files(1_000):
        finished(main())
    assert refused, "nobody was told"
    seen = f"{refused} got 503, {dropped} were dropped, none was let in; {others.seen()}; afterwards all is normal"
    return Row("", n, 0, "503 or dropped; those inside stay served", seen)


def opened_and_reset(n: int) -> Row:
    """Connections opened and reset, at every stage of a request, a stream and a WebSocket"""
    talkers, others = Talkers(), Others()

    async def one(port: int, data: bytes, waits: bool) -> None:
        client = await Client.open(port)
        client.write(data)
        with suppress(OSError):
            if waits and data.endswith((b"}", b"\r\n\r\n", CONNECT)):
                async with asyncio.timeout(0.05):
                    await client.reader.read(1)
        client.reset()

    async def main() -> None:
        async with serving({"gateway.maxConnections": 5_000}, talkers.agents()) as hub:
            stages = list(STAGES.values())
            tasks = len(asyncio.all_tasks())
            async with others.beside(hub):
                for at in range(0, n, 50):
                    async with asyncio.TaskGroup() as group:
                        for i in range(at, min(n, at + 50)):
                            group.create_task(suppressed(one(hub.port, stages[i % len(stages)], i // 50 % 2 > 0)))
            await until(lambda: not hub.connections and not talkers.running, "nothing is left")
            await until(lambda: len(asyncio.all_tasks()) <= tasks, "no task is left")
            assert not hub.runs.active
            assert not hub.upgraded

    async def suppressed(work: Coroutine[Any, Any, None]) -> None:
        with suppress(TimeoutError):
            await work

    with room_for_files(1_000):
        finished(main())
    seen = f"no connection, run ({talkers.ran} were on), task or descriptor; {others.seen()}"
    return Row("", n, 0, "nothing is left of them", seen)


def silent_peers(n: int) -> Row:
    """Half-open peers: at each of 12 stages they stop reading and writing, and never close"""
    talkers, others, took, times = Talkers(), Others(), 0.0, 20 if n > 100 else 40

    async def main() -> None:
        nonlocal took
        limits = {"keepAliveSeconds": 30 / times, "writeTimeoutSeconds": 30 / times}
        config = {f"gateway.http.{name}": value for name, value in limits.items()}
        config |= {"gateway.maxConnections": n + 50, "agents.defaults.maxConcurrent": n + 10}
        # Without streams and with few others: their events would drop the WebSockets before the silence does.
        async with serving(config, talkers.agents()) as hub, others.beside(hub, pause=0.05):
            stages = [data for stage, data in STAGES.items() if stage != "a stream"]
            socks = [await deaf(hub.port, stages[i % len(stages)]) for i in range(n)]
            await until(lambda: len(hub.connections) > 4, "they are there")
            took = times * await until(lambda: len(hub.connections) <= 4, "the gateway drops them all")
            assert not talkers.running
            for sock in socks:
                sock.close()

    with room_for_files(n + 50) as room, hurried(times):
        n = min(n, room - 50)
        finished(main())
    assert 60 < took < 250, f"the last was dropped after {took:.0f} s"
    seen = f"the last after {took:.0f} s of the gateway's time (its clocks run {times} times as fast); "
    return Row("", n, 0, "each is dropped in time, with its run", seen + others.seen())


async def _behind(hub: gateway.Gateway, number: int, during: bool) -> int:
    """Send a stream's request and seven behind it, at once or `during` the stream; return how many answers are lost."""
    words = " ".join(f"{number}-{n}" for n in range(20)) + " "
    requests = [said(f"answer {i} of {number}", stream=i % 3 == 0) for i in range(6)] + [PING]
    async with await Client.open(hub.port) as client:
        client.write(said(words, model="agent:slow", stream=True) + (b"" if during else b"".join(requests)))
        assert (await client.head())[0] == 200
        events = []
        async for event in client.events():
            events.append(event)
            if during and len(events) <= len(requests):
                client.write(requests[len(events) - 1])
        lost = int(text_of(events) != words + " " or events[-1] != "data: [DONE]")
        for i in range(6):
            if i % 3 == 0:
                assert (await client.head())[0] == 200
                text = text_of([event async for event in client.events()])
            else:
                text = (await client.answer()).text
            lost += text != f"answer {i} of {number}"
        return lost + ((await client.answer()).status != 200)


async def _too_much_behind(hub: gateway.Gateway) -> int:
    """Send more than is kept behind a running stream: it is cancelled and the connection ends. Returns what is lost."""
    async with await Client.open(hub.port) as client:
        client.write(STAGES["a stream"])
        await within(client.reader.readuntil(b"water"))
        client.write(PING * 3_000)
        with suppress(OSError):
            while data := await within(client.reader.read(65_536)):
                if b"[DONE]" in data:
                    return 1
        return 0


def _pipelined(n: int, during: bool) -> Row:
    talkers, lost = Talkers(), 0

    async def main() -> None:
        nonlocal lost
        async with serving({"agents.defaults.maxConcurrent": n + 10}, talkers.agents()) as hub:
            work = (_too_much_behind(hub) if i % 4 == 3 else _behind(hub, i, during) for i in range(n))
            lost = sum(await asyncio.gather(*work))
            await until(lambda: not talkers.running, "every run has ended")

    with room_for_files(n + 50) as room:
        n = min(n, room - 50)
        finished(main())
    asked = "answered in order after it; beyond 64 KiB the stream is cancelled and the connection ends"
    seen = f"{(n - n // 4) * 7} answers in order behind {n - n // 4} streams, {n // 4} floods ended"
    return Row("", n, lost, asked, seen)


def pipelined_behind_a_stream(n: int) -> Row:
    """Requests sent at once with that of a stream, seven behind each"""
    return _pipelined(n, during=False)


def requests_during_a_stream(n: int) -> Row:
    """Requests sent while a stream runs, one at each of its words"""
    return _pipelined(n, during=True)


SCENARIOS: tuple[tuple[Callable[[int], Row], int, int], ...] = (
    (dribbling_clients, 900, 45),
    (streams_never_read, 100, 20),
    (websockets_never_read, 60, 10),
    (idle_connections, 5_000, 300),
    (flood_beyond_the_limit, 5_000, 400),
    (opened_and_reset, 10_000, 500),
    (silent_peers, 600, 60),
    (pipelined_behind_a_stream, 400, 40),
    (requests_during_a_stream, 400, 40),
)
