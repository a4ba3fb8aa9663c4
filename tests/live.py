"""Helpers: a gateway inside the test's own loop, and a client that speaks plain bytes to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import gateway

BOUND = 10.0  # seconds that anything here may take; a wait is for an event, and ends with it
CHAT = "/v1/chat/completions"
KEY = "sk-of-the-upstream"  # never to be seen by a client
INSIDE = ("Traceback", ".py", KEY, os.path.dirname(os.path.dirname(__file__)), "Errno", "object at 0x")
BASE = {
    "gateway.port": 0,
    "gateway.auth.mode": "none",
    "gateway.http.endpoints.chatCompletions.enabled": True,
}
T = TypeVar("T")


async def within(awaitable: Any, seconds: float = BOUND) -> Any:
    """Wait, but not for ever."""
    async with asyncio.timeout(seconds):
        return await awaitable


async def until(true: Callable[[], object]) -> None:
    """Wait for what no event tells of, but not for ever."""
    async with asyncio.timeout(BOUND):
        while not true():
            await asyncio.sleep(0.001)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine to its end, which comes in time and leaves no task behind."""

    async def bounded() -> T:
        async with asyncio.timeout(3 * BOUND):
            result = await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return result

    return asyncio.run(bounded())


def settings(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration from dotted paths, on top of BASE; None takes a path away."""
    root: dict[str, Any] = {}
    for path, value in {**BASE, **(changes or {})}.items():
        if value is not None:
            node = root
            *parents, last = path.split(".")
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
    return root


@asynccontextmanager
async def serving(
    changes: Mapping[str, Any] | None = None, agents: Mapping[str, Callable[..., Any]] | None = None
) -> AsyncIterator[gateway.Gateway]:
    """A gateway that listens; when it stops, nothing of it is left."""
    async with gateway.Gateway(settings(changes), agents=agents) as hub:
        yield hub
    assert not hub.connections
    assert not hub.runs.active


def chat(content: str = "hi", **fields: Any) -> bytes:
    """The body of a call that says `content`."""
    return json.dumps({"model": "copepod", "messages": [{"role": "user", "content": content}], **fields}).encode()


def chunked(*pieces: bytes) -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def data_of(events: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON of a stream's events, comments and [DONE] apart."""
    return [json.loads(event[6:]) for event in events if event.startswith("data: {")]


def text_of(events: Iterable[str]) -> str:
    """The words of a stream's events."""
    chunks = [chunk for chunk in data_of(events) if chunk.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection at once, with a RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]  # by lower-case name
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """What the agent said."""
        assert self.status == 200, self
        said: str = self.json["choices"][0]["message"]["content"]
        return said

    @property
    def error(self) -> dict[str, Any]:
        """The error object: of the one shape, with nothing of the inside in it."""
        assert self.fields["content-type"] == "application/json"
        return checked_error(self.json)


def checked_error(value: dict[str, Any]) -> dict[str, Any]:
    assert list(value) == ["error"], value
    error: dict[str, Any] = value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert not [word for word in INSIDE if word in json.dumps(error)], error
    return error


class Client:
    """One connection. Every answer it reads has what every answer must have."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.method = "GET"

    @classmethod
    async def open(cls, port: int, host: str = "127.0.0.1") -> Client:
        return cls(*await within(asyncio.open_connection(host, port)))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def send(
        self, method: str, path: str, body: bytes | None = None, fields: Mapping[str, str] | None = None, minor: int = 1
    ) -> None:
        """Send a request with a Host and, where there is a body, a Content-Length; `fields` may replace both."""
        self.method = method
        named = {"Host": "localhost", **({} if body is None else {"Content-Length": str(len(body))}), **(fields or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value is not None)
        self.write(f"{method} {path} HTTP/1.{minor}\r\n{lines}\r\n".encode() + (body or b""))

    def say(self, content: str = "hi", fields: Mapping[str, str] | None = None, **more: Any) -> None:
        """Send a chat call."""
        self.send("POST", CHAT, chat(content, **more), fields)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of an answer, and check what each must have."""
        start, *lines = (await within(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")[:-2]
        match = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) .*", start)
        assert match, start
        status = int(match[1])
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            assert name.lower() not in fields, line
            fields[name.lower()] = value
        if status >= 200:
            assert re.fullmatch(r"req_[0-9a-f]{32}", fields["x-request-id"])
            assert fields["date"].endswith(" GMT")
            assert ("retry-after" in fields) or status != 503
        return status, fields

    async def answer(self) -> Answer:
        """Read a whole answer."""
        status, fields = await self.head()
        body = b""
        if fields.get("transfer-encoding") == "chunked":
            body = b"".join([piece async for piece in self.pieces()])
        elif self.method == "HEAD" or status in (100, 204):
            pass
        elif "content-length" in fields:
            body = await within(self.reader.readexactly(int(fields["content-length"])))
        else:
            body = await within(self.reader.read())
        return Answer(status, fields, body)

    async def ask(
        self, method: str, path: str, body: bytes | None = None, fields: Mapping[str, str] | None = None, minor: int = 1
    ) -> Answer:
        self.send(method, path, body, fields, minor)
        return await self.answer()

    async def pieces(self) -> AsyncIterator[bytes]:
        while size := int(await within(self.reader.readuntil(b"\r\n")), 16):
            yield (await within(self.reader.readexactly(size + 2)))[:-2]
        assert await within(self.reader.readexactly(2)) == b"\r\n"

    async def events(self) -> AsyncIterator[str]:
        """The events of a stream as they come, each without its empty line; comments too."""
        rest = ""
        async for piece in self.pieces():
            *whole, rest = (rest + piece.decode("ascii")).split("\n\n")
            for event in whole:
                assert "\n" not in event
                yield event
        assert rest == ""

    async def ended(self) -> bool:
        """Whether the gateway closes the connection now, without another byte."""
        try:
            return bool(await within(self.reader.read(1)) == b"")
        except ConnectionError:
            return True

    async def usable(self) -> bool:
        """Whether another request on this connection is answered."""
        return (await self.ask("GET", "/healthz")).status == 200

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        reset(self.writer)


class Serving(Protocol):
    """What listens on a port: a Gateway, or the program."""

    port: int


async def ask(hub: Serving, content: str = "hi", fields: Mapping[str, str] | None = None, **more: Any) -> Answer:
    """One chat call on a connection of its own."""
    async with await Client.open(hub.port) as client:
        client.say(content, fields, **more)
        return await client.answer()


async def stream(
    hub: Serving, content: str = "hi", fields: Mapping[str, str] | None = None, **more: Any
) -> tuple[Answer, list[str]]:
    """One streamed call: the head (with a body where it was no stream), and the events."""
    async with await Client.open(hub.port) as client:
        client.say(content, fields, stream=True, **more)
        status, named = await client.head()
        if named["content-type"] == "application/json":
            return Answer(status, named, await within(client.reader.readexactly(int(named["content-length"])))), []
        return Answer(status, named, b""), [event async for event in client.events()]
