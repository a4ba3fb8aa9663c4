"""On uvloop, which the program takes where it is installed: all that a client can do, and the end of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

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


def test_an_application_that_runs_on_it() -> None:
    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            assert type(asyncio.get_running_loop()) is uvloop.Loop
            await works(hub, upstream)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
