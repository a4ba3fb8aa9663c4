"""A client of the gateway protocol for tests: it reads when asked, and checks the form of all that it reads."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import rfc6455
from live import INSIDE, Serving, within

SESAME = "open sesame"
TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": SESAME}
PASSWORD = {"gateway.auth.mode": "password", "gateway.auth.password": SESAME}
CLIENT = {"id": "test", "version": "1", "platform": "linux", "mode": "test"}
CODES = {"INVALID_REQUEST", "NOT_PAIRED", "NOT_LINKED", "AGENT_TIMEOUT", "UNAVAILABLE"}
MAX_MESSAGE = 64 * 1024 * 1024  # bytes that a test's client takes; a long answer comes whole
SMALL = 4_096  # bytes of a receive buffer that is soon full

Frame = dict[str, Any]


def checked(message: str | bytes) -> Frame:
    """A frame of the gateway's: of one of two forms, with nothing of the inside in it."""
    assert isinstance(message, str), "the gateway sends text"
    frame: Frame = json.loads(message)
    if frame["type"] == "event":
        assert {"type", "event", "payload"} <= set(frame) <= {"type", "event", "payload", "seq", "stateVersion"}, frame
        return frame
    assert frame["type"] == "res", frame
    assert {"type", "id", "ok"} <= set(frame) <= {"type", "id", "ok", "payload", "error"}, frame
    assert frame["id"] is None or isinstance(frame["id"], str)
    assert ("error" in frame) is not frame["ok"], frame
    if frame["ok"]:
        assert "payload" in frame, frame
    else:
        error = frame["error"]
        assert {"code", "message"} <= set(error) <= {"code", "message", "details", "retryable", "retryAfterMs"}, error
        assert error["code"] in CODES
        assert error["message"]
        assert not [word for word in INSIDE if word in json.dumps(error)], error
    return frame


def params_of(**changes: Any) -> dict[str, Any]:
    """The params of a `connect` that is welcome where no secret is asked for; None takes one away."""
    params = {"minProtocol": 3, "maxProtocol": 3, "client": CLIENT, **changes}
    return {name: value for name, value in params.items() if value is not None}


class Peer:
    """One connection. Frames that came before what is waited for are kept, for whoever asks for them."""

    def __init__(self, websocket: rfc6455.WebSocket) -> None:
        self.websocket = websocket
        self.hello: dict[str, Any] = {}  # the payload of the answer to `connect`
        self.frames: list[Frame] = []  # all that were read, in order
        self._kept: list[Frame] = []
        self._seq: int | None = None
        self._ids = 0

    async def send(self, frame: Any) -> None:
        """Send a frame; text and bytes go out as they are."""
        message = frame if isinstance(frame, str | bytes) else json.dumps(frame)
        await within(self.websocket.send(message))

    async def post(self, method: str, params: Any = None, id: str | None = None) -> str:
        """Send a request and return its id; its answers are for `answer`."""
        self._ids += 1
        id = id or f"r{self._ids}"
        await self.send({"type": "req", "id": id, "method": method, **({} if params is None else {"params": params})})
        return id

    async def read(self) -> Frame | None:
        """The next frame of the connection, None at its end."""
        message = await within(self.websocket.receive())
        if message is None:
            return None
        frame = checked(message)
        if "seq" in frame:
            assert self._seq is None or frame["seq"] == self._seq + 1, (self._seq, frame)
            self._seq = frame["seq"]
        self.frames.append(frame)
        return frame

    async def until(self, wanted: Callable[[Frame], bool]) -> Frame:
        """The first frame, of those that nobody has asked for yet and of those to come, that is wanted."""
        for frame in self._kept:
            if wanted(frame):
                self._kept.remove(frame)
                return frame
        while (frame := await self.read()) is not None:  # type: ignore[assignment]
            if wanted(frame):
                return frame
            self._kept.append(frame)
        raise AssertionError(f"closed {self.websocket.close_code} {self.websocket.close_reason!r}")

    async def answer(self, id: str | None) -> Frame:
        """The next answer to the request of this id."""
        return await self.until(lambda frame: frame["type"] == "res" and frame["id"] == id)

    async def request(self, method: str, params: Any = None) -> Frame:
        """Send a request and return the first answer."""
        return await self.answer(await self.post(method, params))

    async def ask(self, method: str, **params: Any) -> Any:
        """The payload of a request that succeeds."""
        frame = await self.request(method, params)
        assert frame["ok"], frame
        return frame["payload"]

    async def error(self, method: str, **params: Any) -> dict[str, Any]:
        """The error of a request that fails."""
        frame = await self.request(method, params)
        assert not frame["ok"], frame
        error: dict[str, Any] = frame["error"]
        return error

    async def event(self, name: str, **values: Any) -> Any:
        """The payload of the next event of this name, and with these values in its payload."""
        return (await self.event_frame(name, **values))["payload"]

    async def event_frame(self, name: str, **values: Any) -> Frame:
        """The same event, whole."""

        def wanted(frame: Frame) -> bool:
            return frame.get("event") == name and values.items() <= _flat(frame["payload"])

        return await self.until(wanted)

    async def challenge(self) -> dict[str, Any]:
        """The first event of every connection."""
        payload: dict[str, Any] = await self.event("connect.challenge")
        return payload

    async def connect(self, **changes: Any) -> Frame:
        """Send `connect` and return the answer."""
        frame = await self.request("connect", params_of(**changes))
        self.hello = frame.get("payload") or {}
        return frame

    async def agent(self, message: str = "hi", key: str = "k1", **params: Any) -> Frame:
        """Run a turn by the method `agent`, and return the second answer."""
        id = await self.post("agent", {"message": message, "idempotencyKey": key, **params})
        first = await self.answer(id)
        assert first["ok"], first
        assert first["payload"]["status"] == "accepted", first
        return await self.answer(id)

    async def ended(self) -> tuple[int | None, str]:
        """The gateway's close code and reason, once it has closed the connection."""
        while await self.read() is not None:
            pass
        return self.websocket.close_code, self.websocket.close_reason

    async def closed(self) -> tuple[int | None, str]:
        """The same, and nothing else came before."""
        assert await self.read() is None
        return self.websocket.close_code, self.websocket.close_reason

    def events(self, name: str, **values: Any) -> list[Any]:
        """The payloads of the events of this name, with these values, that were read so far."""
        events = [frame["payload"] for frame in self.frames if frame.get("event") == name]
        return [payload for payload in events if values.items() <= _flat(payload)]

    def text(self, run_id: str) -> str:
        """What a run's agent said so far."""
        return "".join(said["data"]["delta"] for said in self.events("agent", runId=run_id, stream="assistant"))

    def drop(self) -> None:
        """Leave without a word."""
        self.websocket._transport.abort()


def _flat(payload: Any) -> Any:
    """What values may be asked for: those of the payload, and of its `data`."""
    return {**payload.get("data", {}), **payload}.items() if isinstance(payload, dict) else {}.items()


async def _connection(port: int, buffer: int) -> rfc6455.WebSocket:
    """A connection whose receive buffer is soon full."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=buffer)
    except BaseException:
        sock.close()
        raise
    lines = "".join(f"{name}: {value}\r\n" for name, value in rfc6455.request_fields(rfc6455.client_key()))
    writer.write(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{lines}\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return rfc6455.WebSocket(reader, writer, client=True, max_message=MAX_MESSAGE)


@asynccontextmanager
async def opened(
    hub: Serving, target: str = "/", *, fields: Iterable[tuple[str, str]] = (), buffer: int = 0
) -> AsyncIterator[Peer]:
    """A connection on which nothing was said yet; HandshakeError: refused."""
    if buffer:
        websocket = await within(_connection(hub.port, buffer))
    else:
        connecting = rfc6455.connect("127.0.0.1", hub.port, target, fields=list(fields), max_message=MAX_MESSAGE)
        websocket = await within(connecting)
    peer = Peer(websocket)
    try:
        yield peer
    except BaseException:
        peer.drop()
        raise
    finally:
        websocket.close()
        with suppress(TimeoutError):  # one that never reads may not be answered
            async with asyncio.timeout(1):
                while await websocket.receive() is not None:
                    pass
        peer.drop()
        await asyncio.sleep(0)  # for the transport to close its socket


@asynccontextmanager
async def connected(hub: Serving, *, buffer: int = 0, **params: Any) -> AsyncIterator[Peer]:
    """A connection that has said hello, with these params of `connect` besides the needed ones."""
    async with opened(hub, buffer=buffer) as peer:
        await peer.challenge()
        answer = await peer.connect(**params)
        assert answer["ok"], answer
        yield peer
