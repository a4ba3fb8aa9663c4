"""A client that leaves takes its run with it: the upstream connection, the processes, the generator, within 0.1 s."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import gateway
import runs
from live import BOUND, CHAT, Client, ask, chat, run, serving, text_of, within
from upstream import Call, Upstream, says

TRIES = 5
SECONDS = 0.1  # from the moment the client leaves; the median, as a neighbour may be noisy
HALF_CLOSE = 0.05  # what a half-closed client's quick answer may take

# A program that holds a connection to the test, as does its own child: it ends when nobody of them is left.
PROGRAM = """
import os, signal, socket, sys
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
link = socket.create_connection(("127.0.0.1", {port}))
os.fork()
print("word", flush=True)
link.sendall(b"up")
link.recv(1)
"""


class Watched:
    """An agent at work: `started` has an entry once it is, `ended` the loop's time when nothing of it is left."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[None] = asyncio.Queue()
        self.ended: asyncio.Queue[float] = asyncio.Queue()

    def end(self) -> None:
        self.ended.put_nowait(asyncio.get_running_loop().time())


@asynccontextmanager
async def upstream_agent(watched: Watched) -> AsyncIterator[gateway.Gateway]:
    async def script(call: Call) -> None:
        call.begin()
        call.word("word")
        watched.started.put_nowait(None)
        await call.left.wait()
        watched.ended.put_nowait(call.left_at)

    async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
        yield hub


@asynccontextmanager
async def silent_upstream_agent(watched: Watched) -> AsyncIterator[gateway.Gateway]:
    async def script(call: Call) -> None:
        watched.started.put_nowait(None)
        await call.left.wait()
        watched.ended.put_nowait(call.left_at)

    async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
        yield hub


def command_agent(stubborn: bool) -> Callable[[Watched], Any]:
    @asynccontextmanager
    async def agent(watched: Watched) -> AsyncIterator[gateway.Gateway]:
        async def linked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await within(reader.readexactly(4))  # of both
                watched.started.put_nowait(None)
                await within(reader.read())
            except ConnectionError:  # a process that is killed resets what it did not read
                pass
            watched.end()
            writer.close()

        async with await asyncio.start_server(linked, "127.0.0.1", 0) as server:
            script = PROGRAM.format(stubborn=stubborn, port=server.sockets[0].getsockname()[1])
            provider = {"api": "command", "command": sys.executable, "args": ["-I", "-S", "-c", script]}
            async with serving({"models.providers.tool": provider, "agents.defaults.model": "tool/x"}) as hub:
                yield hub

    return agent


@asynccontextmanager
async def python_agent(watched: Watched) -> AsyncIterator[gateway.Gateway]:
    async def agent(message: str) -> AsyncIterator[str]:
        try:
            yield "word"
            watched.started.put_nowait(None)
            await asyncio.Event().wait()
        finally:
            watched.end()

    async with serving(agents={"main": agent}) as hub:
        yield hub


AGENTS = {
    "upstream": upstream_agent,
    "silent upstream": silent_upstream_agent,
    "command": command_agent(stubborn=False),
    "stubborn command": command_agent(stubborn=True),
    "python": python_agent,
}


@pytest.mark.parametrize("leave", ["close", "reset", "half-close"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("agent", AGENTS)
def test_leaving(agent: str, streamed: bool, leave: str) -> None:
    async def main() -> list[float]:
        clock = asyncio.get_running_loop().time
        watched, took = Watched(), []
        async with AGENTS[agent](watched) as hub:
            for _ in range(TRIES):
                async with await Client.open(hub.port) as client:
                    client.say("hi", stream=streamed)
                    await within(watched.started.get())
                    if streamed and agent != "silent upstream":
                        await within(client.reader.readuntil(b'"word'))
                    left_at = clock()
                    if leave == "close":
                        client.writer.transport.close()
                    elif leave == "reset":
                        client.reset()
                    else:
                        client.writer.write_eof()
                    took.append(await within(watched.ended.get()) - left_at)
                    if leave == "half-close":
                        await within(client.reader.read())
        return took

    took = run(main())
    # Whether the end of a stream is a close or a half-close shows only in a write: both have the half-close's time.
    patience = HALF_CLOSE if leave == "half-close" or (leave == "close" and agent == "stubborn command") else 0
    assert statistics.median(took) <= SECONDS + patience, took


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("why", ["lane", "places"])
def test_leaving_the_queue(why: str, streamed: bool, leave: str) -> None:
    """Its place goes to the next, the agent never hears of it, and what runs goes on."""

    async def main() -> list[float]:
        clock = asyncio.get_running_loop().time
        took = []
        places = {"agents.defaults.maxConcurrent": 1} if why == "places" else {}
        user = {"user": "ann"} if why == "lane" else {}
        async with Upstream() as upstream, serving({**upstream.settings(), **places}) as hub:
            accepted: asyncio.Queue[None] = asyncio.Queue()
            gone: asyncio.Queue[float] = asyncio.Queue()

            def observe(_: object, event: tuple[str, Any]) -> None:
                if event[0] == "accepted":
                    accepted.put_nowait(None)
                elif event[0] == "error":
                    assert event[1]["kind"] == "cancelled"
                    gone.put_nowait(clock())

            hub.runs.observers.append(observe)
            running = asyncio.ensure_future(ask(hub, **user))
            call = await upstream.call()
            await within(accepted.get())
            for _ in range(TRIES):
                async with await Client.open(hub.port) as client:
                    client.say("gone", stream=streamed, **user)
                    await within(accepted.get())
                    assert len(hub.runs.active) == 2
                    left_at = clock()
                    if leave == "close":
                        client.writer.transport.close()
                    else:
                        client.reset()
                    took.append(await within(gone.get()) - left_at)
            upstream.script = says("next")
            waiting = asyncio.ensure_future(ask(hub, **user))
            await within(accepted.get())
            await says("first")(call)
            call.done.set()
            assert [(await running).text, (await waiting).text] == ["first", "next"]
            assert len(upstream.calls) == 2
        return took

    assert statistics.median(run(main())) <= SECONDS


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_half_closed_client_gets_a_quick_answer(streamed: bool) -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            client.say("hello there", stream=streamed)
            client.writer.write_eof()
            if streamed:
                assert (await client.head())[0] == 200
                events = [event async for event in client.events()]
                assert text_of(events) == "hello there"
                assert events[-1] == "data: [DONE]"
            else:
                assert (await client.answer()).text == "hello there"
            assert await client.ended()

    run(main())


def test_too_much_behind_a_running_request() -> None:
    """More than 64 KiB: cancelled and closed. Less: kept, and answered in its turn."""

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            async with await Client.open(hub.port) as client:
                client.say()
                call = await upstream.call()
                client.write(b"x" * 70_000)
                await within(call.left.wait())
                assert await client.ended()
            assert not hub.runs.active
            async with await Client.open(hub.port) as client:
                client.say()
                call = await upstream.call()
                upstream.script = says("second")
                client.say("x" * 40_000)
                await says("first")(call)
                call.done.set()
                assert (await client.answer()).text == "first"
                assert (await client.answer()).text == "second"
                assert await client.usable()

    run(main())


def test_leaving_with_bytes_behind() -> None:
    """A client that had sent more is seen to leave all the same."""

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub, await Client.open(hub.port) as client:
            client.say()
            call = await upstream.call()
            client.write(b"x" * 60_000)
            await within(client.writer.drain())
            client.reset()
            await within(call.left.wait())

    run(main())


def test_reader_that_stops_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        taken, told = 0, asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            nonlocal taken
            while True:
                yield "x" * 60_000
                taken += 60_000

        def observe(_: object, event: tuple[str, Any]) -> None:
            if event[0] == "error":
                assert event[1]["kind"] == "cancelled"
                told.set()

        async with serving({"gateway.http.writeTimeoutSeconds": 0.2}, {"main": agent}) as hub:
            hub.runs.observers.append(observe)
            with socket.socket() as small:
                small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                small.setblocking(False)
                await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", hub.port))
                body = chat(stream=True)
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                small.sendall(head.encode() + body)
                await within(told.wait())
            assert 0 < taken < runs.MAX_ANSWER  # it did not end by itself

    run(main())


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_leaving_while_the_gateway_waits_for_its_reader(leave: str) -> None:
    async def main() -> float:
        clock = asyncio.get_running_loop().time
        ended: asyncio.Queue[float] = asyncio.Queue()
        full = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            handle = None
            try:
                while True:
                    yield "x" * 60_000
                    if handle is not None:
                        handle.cancel()
                    handle = asyncio.get_running_loop().call_later(0.1, full.set)  # no more is taken
            finally:
                ended.put_nowait(clock())

        took = []
        async with serving({}, {"main": agent}) as hub:
            for _ in range(TRIES):
                full.clear()
                with socket.socket() as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                    client.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", hub.port))
                    body = chat(stream=True)
                    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                    client.sendall(head.encode() + body)
                    await within(full.wait())
                    if leave == "reset":
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    left_at = clock()
                took.append(await within(ended.get()) - left_at)
        return statistics.median(took)

    assert run(main()) <= SECONDS


@pytest.mark.parametrize("item", ["x" * 60_000, {"tool": {"seen": "x" * 60_000}}], ids=["words", "events"])
def test_half_closed_client_that_stops_reading(item: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would not take does not keep its connection open for ever, nor is it kept."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    def files() -> int:
        return len(os.listdir("/dev/fd"))

    async def main() -> None:
        ended = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[Any]:
            try:
                while True:
                    yield item
            finally:
                ended.set()

        async with serving({"gateway.http.writeTimeoutSeconds": 0.2}, {"main": agent}) as hub:
            with socket.socket() as client:
                before = files()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", hub.port))
                body = chat(stream=True, stream_options={"include_events": True})
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                client.shutdown(socket.SHUT_WR)
                await within(ended.wait())
                async with asyncio.timeout(BOUND):
                    while files() > before:
                        await asyncio.sleep(0.02)

    run(main())


def test_slow_reader_that_does_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the write timeout in all, and gets everything."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        async def agent(message: str) -> AsyncIterator[str]:
            for _ in range(130):
                yield "x" * 60_000

        async with (
            serving({"gateway.http.writeTimeoutSeconds": 0.5}, {"main": agent}) as hub,
            await Client.open(hub.port) as client,
        ):
            client.say(stream=True)
            assert (await client.head())[0] == 200
            loop, events = asyncio.get_running_loop(), []
            start = loop.time()
            async for event in client.events():
                events.append(event)
                pause = asyncio.Event()
                loop.call_later(0.008, pause.set)
                await pause.wait()
            assert loop.time() - start > 0.5
            assert events[-1] == "data: [DONE]"
            assert len(text_of(events)) == 7_800_000

    run(main())


def test_connection_lives_on_behind_a_watched_answer() -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            for _ in range(3):
                client.say("a", stream=True)
                assert (await client.head())[0] == 200
                assert text_of([event async for event in client.events()]) == "a"
                client.say("b")
                assert (await client.answer()).text == "b"
            client.say("1")
            client.say("2", stream=True)
            client.say("3")
            assert (await client.answer()).text == "1"  # in order
            assert (await client.head())[0] == 200
            assert text_of([event async for event in client.events()]) == "2"
            assert (await client.answer()).text == "3"

    run(main())


def test_stopping_ends_every_agent() -> None:
    """A gateway that is stopped leaves no process, no connection and no generator behind, whatever they do."""

    async def main() -> None:
        for agent in AGENTS.values():
            watched = Watched()
            async with agent(watched) as hub:
                client = await Client.open(hub.port)
                client.say("hi", stream=True)
                await within(watched.started.get())
                await within(hub.stop(0))
                await within(watched.ended.get())
                await client.close()

    run(main())


def test_stopping_waits_for_those_whose_client_has_left() -> None:
    """Their agents are still at their last work: that is over when the gateway has stopped."""

    async def main() -> None:
        started, last, over = asyncio.Event(), asyncio.Event(), []

        async def agent(message: str) -> AsyncIterator[str]:
            try:
                started.set()
                await asyncio.Event().wait()
                yield ""
            finally:
                last.set()
                await asyncio.sleep(0.05)
                over.append(True)

        async with serving(agents={"main": agent}) as hub:
            client = await Client.open(hub.port)
            client.say()
            await within(started.wait())
            client.reset()
            await within(last.wait())
        assert over

    run(main())
