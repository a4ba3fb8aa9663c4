"""Everything at once on one port: WebSocket clients, streams and plain requests, each with words of its own."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import live
import peer
from live import BOUND, Serving, ask, run, settings, stream, text_of, within
from peer import Peer, connected
from test_program import program

EACH = 200  # clients of each of the three kinds
ALL = 3 * EACH
FILES = 4 * ALL  # a connection has two ends here, and the gateway leaves half of the files free

Frame = dict[str, Any]


@pytest.fixture
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"needs {FILES} open files, the system allows {hard}")
    if soft != resource.RLIM_INFINITY and soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for all together, not for each: a busy machine may have them wait for each other."""
    monkeypatch.setattr(live, "BOUND", 2 * BOUND)
    for module in (live, peer):
        monkeypatch.setattr(module, "within", lambda awaitable: within(awaitable, 6 * BOUND))


class Watcher:
    """A client of the protocol that is quick: the events are the same for all, so each is parsed once for all."""

    def __init__(self, client: Peer, parsed: dict[bytes, Frame]) -> None:
        self.parsed = parsed  # by what is common to all clients
        self.reader = client.websocket._reader
        self.unread = bytes(client.websocket._unread)  # what came behind the hello
        self.number = client._seq or 0  # of the last event
        self.told: list[Frame] = []  # the payloads of the events of runs
        self.ended = 0  # runs
        self.answers: list[Frame] = []

    async def until_all_have_ended(self) -> None:
        """Read the events of all runs and the two answers to our own request."""
        while True:
            self.take()
            if self.ended == ALL and len(self.answers) == 2:
                return
            data = await self.reader.read(1 << 18)
            assert data, "the gateway has left"
            self.unread += data

    def take(self) -> None:
        """Take the frames that have come whole. Their numbers tell that none is left out and none comes twice."""
        data, at = self.unread, 0
        while len(data) - at >= 4:
            assert data[at] == 0x81, "a whole text"
            begin, size = at + 2, data[at + 1]
            assert size < 127, "one of less than 64 KiB"
            if size == 126:
                begin, size = at + 4, int.from_bytes(data[at + 2 : at + 4], "big")
            if len(data) < begin + size:
                break
            at = begin + size
            number = b',"seq":%d}' % (self.number + 1)
            if not data.endswith(number, begin, at):
                self.answers.append(json.loads(data[begin:at]))
                assert self.answers[-1]["type"] == "res"
                continue
            self.number += 1
            common = data[begin : at - len(number)]
            event = self.parsed.get(common)
            if event is None:
                event = self.parsed[common] = json.loads(common + b"}")
            if event["event"] == "agent":
                self.told.append(event["payload"])
                self.ended += event["payload"]["data"].get("phase") == "end"
        self.unread = data[at:]


def heard(told: Sequence[Frame]) -> dict[str, str]:
    """What each run said, as its events told it: in order, none twice, nothing behind the end."""
    said: dict[str, str] = {}
    steps: dict[str, int] = {}
    for event in told:
        run_id, data = event["runId"], event["data"]
        assert event["seq"] == steps.get(run_id, 0) + 1
        steps[run_id] = event["seq"]
        if event["stream"] == "assistant":
            said[run_id] = said.get(run_id, "") + data["delta"]
            assert data["text"] == said[run_id]
        elif data["phase"] == "start":
            assert event["seq"] == 1
        else:
            assert data["phase"] == "end"
            steps[run_id] = ALL * ALL  # what came now would not be the next
    return said


def words_of(kind: str, n: int) -> str:
    return f"{kind} {n}: " + " ".join(f"{kind[0]}{n}.{word}" for word in range(n % 7 + 1))


async def speak(hub: Serving, n: int, parsed: dict[bytes, Frame], ready: asyncio.Barrier) -> Watcher:
    """A WebSocket client that has said something, and has heard everybody."""
    async with connected(hub) as client:
        await ready.wait()  # whoever has not connected yet would not hear of all
        params = {"message": words_of("spoken", n), "idempotencyKey": f"spoken-{n}", "sessionKey": f"agent:main:s{n}"}
        await client.post("agent", params)
        watcher = Watcher(client, parsed)
        await watcher.until_all_have_ended()
    accepted, done = watcher.answers
    assert accepted["payload"]["status"] == "accepted"
    assert accepted["payload"]["runId"] == done["payload"]["runId"] == f"spoken-{n}"
    assert [payload["text"] for payload in done["payload"]["result"]["payloads"]] == [words_of("spoken", n)]
    return watcher


async def streamed(hub: Serving, n: int, ready: asyncio.Barrier) -> str:
    """A stream; its run's id."""
    await ready.wait()
    answer, events = await stream(hub, words_of("streamed", n))
    assert answer.status == 200
    assert text_of(events) == words_of("streamed", n)
    assert events[-1] == "data: [DONE]"
    return str(json.loads(events[0][6:])["id"])


async def plain(hub: Serving, n: int, ready: asyncio.Barrier) -> str:
    """A plain request; its run's id."""
    await ready.wait()
    answer = await ask(hub, words_of("plain", n))
    assert answer.text == words_of("plain", n)
    return str(answer.json["id"])


AGENT = f"""
import asyncio

begun, together = 0, asyncio.Event()


async def reply(message):
    global begun
    first, *rest = message.split(" ")
    yield first
    begun += 1
    if begun == {ALL}:
        together.set()
    await together.wait()  # no run ends before all have begun
    yield "".join(f" {{word}}" for word in rest)
"""


@pytest.mark.usefixtures("_many_files", "_patience")
def test_six_hundred_at_once(tmp_path: Path) -> None:
    """Nothing is lost or mixed up, and every WebSocket client hears of all the others' runs too."""
    (tmp_path / "together.py").write_text(AGENT)
    config = {
        "gateway.maxConnections": ALL + 8,
        "agents.defaults": {"model": "mine/words", "maxConcurrent": ALL},
        "models.providers.mine": {"api": "python", "entry": "together:reply"},
        "logging.level": "error",
    }

    async def main() -> None:
        # With asyncio's debug mode it would take longer than all other tests.
        asyncio.get_running_loop().set_debug(False)
        async with program(settings(config), tmp_path, PYTHONASYNCIODEBUG="") as hub:
            ready, parsed = asyncio.Barrier(ALL), {}
            async with asyncio.TaskGroup() as tasks:
                spoken = [tasks.create_task(speak(hub, n, parsed, ready)) for n in range(EACH)]
                streams = [tasks.create_task(streamed(hub, n, ready)) for n in range(EACH)]
                plains = [tasks.create_task(plain(hub, n, ready)) for n in range(EACH)]
            expected = {f"spoken-{n}": words_of("spoken", n) for n in range(EACH)}
            expected |= {task.result(): words_of("streamed", n) for n, task in enumerate(streams)}
            expected |= {task.result(): words_of("plain", n) for n, task in enumerate(plains)}
            assert len(expected) == ALL
            told = {tuple(map(id, task.result().told)): task.result().told for task in spoken}  # most are told alike
            for events in told.values():
                assert heard(events) == expected
            hub.process.terminate()
            assert await hub.ended() == 0

    run(main())
