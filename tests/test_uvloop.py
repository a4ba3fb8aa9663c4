"""On uvloop, which the program takes where it is installed: all that a client can do, and the end of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from live import Client, Serving, ask, serving, settings, stream, text_of, within
from peer import connected
from test_program import program
from upstream import Upstream, says, waits

uvloop = pytest.importorskip("uvloop")


async def works(hub: Serving, upstream: Upstream) -> None:
    """A short answer, a stream, a WebSocket; then a client that leaves, and its run with it."""
    upstream.script = says("one ", "two")
    assert (await ask(hub)).text == "one two"
    head, events = await stream(hub)
    assert (head.status, text_of(events), events[-1]) == (200, "one two", "data: [DONE]")
    async with connected(hub) as peer:
        done = await peer.agent()
        assert done["payload"]["result"]["payloads"][0]["text"] == "one two"
    for _ in range(3):
        await upstream.call()
    upstream.script = waits
    for streamed in (False, True):
        async with await Client.open(hub.port) as client:
            client.say(stream=streamed)
            call = await upstream.call()
        await within(call.left.wait())


@pytest.mark.parametrize("level", ["info", "error"])
def test_the_program(tmp_path: Path, level: str) -> None:
    async def main() -> None:
        async with Upstream() as upstream:
            config = settings({**upstream.settings(), "logging.level": level})
            async with program(config, tmp_path) as hub, await Client.open(hub.port) as busy:
                await works(hub, upstream)
                busy.say(stream=True)
                call = await upstream.call()
                call.begin()
                call.word("to the ")
                assert (await busy.head())[0] == 200
                hub.process.terminate()
                call.word("end")
                call.finish()
                call.end()
                call.done.set()
                assert text_of([event async for event in busy.events()]) == "to the end"
                assert await hub.ended() == 0
                log = (await within(hub.stderr.read())).decode()
                assert ("uvloop" in log) == (level == "info")

    asyncio.run(main())


def on_uvloop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_an_application_that_runs_on_it() -> None:
    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            assert type(asyncio.get_running_loop()) is uvloop.Loop
            await works(hub, upstream)

    on_uvloop(main)


def test_a_command_that_does_not_read_its_stdin() -> None:
    command = {"api": "command", "command": "/bin/sh", "args": ["-c", "exit 3", "agent"]}

    async def main() -> None:
        async with serving({"models.providers.sh": command, "agents.defaults.model": "sh/-"}) as hub:
            answers = await asyncio.gather(*(ask(hub) for _ in range(20)))
        assert {answer.status for answer in answers} == {502}

    on_uvloop(main)


def test_what_is_written_to_a_client_that_has_left() -> None:
    async def main() -> None:
        async with serving() as hub:
            async with await Client.open(hub.port) as client:
                assert await client.usable()
                (connection,) = hub.connections
            while hub.connections:
                await asyncio.sleep(0)
            assert not connection.write(b"late")

    on_uvloop(main)
