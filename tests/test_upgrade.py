"""From HTTP to WebSocket on one port: who is let in, what passes, and how a connection ends. RFC 6455."""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import connection
import gateway
import rfc6455
from live import BOUND, CHAT, Client, ask, chat, run, serving, settings, within
from peer import TOKEN, Peer, connected, opened, params_of
from rfc6455 import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from test_program import program

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",  # of RFC 6455 1.3, and its answer
}
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
MASK = b"\x01\x02\x03\x04"
MAX = 524_288  # bytes of a message
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
OFF = {"gateway.http.endpoints.chatCompletions.enabled": False}


def request(method: str, id: str = "r", size: int = 0, **params: Any) -> bytes:
    """A request of the protocol, of at least `size` bytes."""
    frame: dict[str, Any] = {"type": "req", "id": id, "method": method}
    return json.dumps({**frame, "params": params} if params else frame).encode().ljust(size)


def masked(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    return rfc6455.encode(opcode, payload, fin=fin, mask=MASK)


def header(opcode: int, size: int, fin: bool = True) -> bytes:
    """The begin of a frame whose payload is long."""
    return struct.pack("!BBQ4s", opcode | 0x80 * fin, 0xFF, size, MASK)


CONNECT = masked(TEXT, request("connect", "c", **params_of()))


class Wire(Client):
    """A connection on which every byte is the test's."""

    async def upgrade(self, path: str = "/", **changes: str | None) -> dict[str, str]:
        """Open a WebSocket; the fields of the answer."""
        self.send("GET", path, None, {**HANDSHAKE, **changes})
        status, fields = await self.head()
        assert status == 101
        return fields

    async def connect(self) -> None:
        """Open a WebSocket, and say hello."""
        await self.upgrade()
        self.write(CONNECT)
        await self.challenged()
        assert (await self.answered("c"))["ok"]

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: unmasked, whole, and of the shortest form."""
        first, size = await within(self.reader.readexactly(2))
        assert first & 0xF0 == 0x80
        if size >= 126:
            wide, least = (2, 126) if size == 126 else (8, 65_536)
            size = int.from_bytes(await within(self.reader.readexactly(wide)), "big")
            assert size >= least
        return first & 0x0F, await within(self.reader.readexactly(size))

    async def until(self, wanted: int) -> bytes:
        """The payload of the next frame of an opcode."""
        while True:
            opcode, payload = await self.frame()
            if opcode == wanted:
                return payload
            assert opcode in (TEXT, PING, PONG), (opcode, payload)

    async def challenged(self) -> None:
        assert json.loads(await self.until(TEXT))["event"] == "connect.challenge"

    async def answered(self, id: str) -> dict[str, Any]:
        """The answer to a request."""
        while (frame := json.loads(await self.until(TEXT))).get("id") != id:
            assert frame["type"] == "event", frame
        return dict(frame)

    async def closed(self) -> bytes:
        """What the gateway's close frame says; nothing comes behind it."""
        payload = await self.until(CLOSE)
        assert await self.ended()
        return payload


async def judged(client: Client, path: str = "/", **changes: str | None) -> int:
    """The status of a handshake. One that is refused is answered in words, and the connection is as it says."""
    client.send("GET", path, None, {**HANDSHAKE, **changes})
    status, fields = await client.head()
    if status != 101:
        assert fields["content-type"] == "application/json"
        body = json.loads(await within(client.reader.readexactly(int(fields["content-length"]))))
        assert set(body["error"]) == {"message", "type", "param", "code"}
        await goes_on(client, fields)
    return status


async def goes_on(client: Client, fields: dict[str, str]) -> None:
    """Whether the connection ends as told; else the next answer is the next request's."""
    if "close" in fields.get("connection", "").lower():
        assert await client.ended()
    else:
        assert (await client.ask("GET", "/nowhere")).status == 404


async def left(hub: gateway.Gateway, before: set[asyncio.Task[Any]]) -> None:
    """Wait until the gateway has no connection, and no task of one."""
    async with asyncio.timeout(BOUND):
        while hub.connections or hub.upgraded or not asyncio.all_tasks() <= before:
            await asyncio.sleep(0.002)


# The handshake


@pytest.mark.parametrize("path", ["/", "/ws", "/a/b?c=d", "/healthz", CHAT])
@pytest.mark.parametrize("config", [{}, OFF])
def test_any_path(path: str, config: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(config) as hub, await Wire.open(hub.port) as client:
            extensions = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
            offered = {**extensions, "Sec-WebSocket-Protocol": "chat, v3"}
            fields = await client.upgrade(path, **offered)
            assert fields.pop("sec-websocket-accept") == ACCEPT
            assert fields.pop("upgrade").lower() == "websocket"
            assert fields.pop("connection").lower() == "upgrade"
            assert fields.pop("x-request-id").startswith("req_")
            assert set(fields) <= {"date"}, "no extension, no subprotocol, no length"
            client.write(CONNECT)
            await client.challenged()
            assert (await client.answered("c"))["payload"]["type"] == "hello-ok"
            client.write(masked(CLOSE, rfc6455.close_payload(1000)))
            assert await client.closed() == rfc6455.close_payload(1000)

    run(main())


WELCOME: list[dict[str, str | None]] = [
    {"Upgrade": "WebSocket"},
    {"Upgrade": "h2c, websocket"},
    {"Connection": "keep-alive, Upgrade"},  # Firefox
    {"Connection": "UPGRADE"},
    {"Content-Length": "0"},
    {"Sec-WebSocket-Protocol": "a", "Authorization": "Bearer whatever", "Cookie": "a=b"},
]


@pytest.mark.parametrize("changes", WELCOME)
def test_handshake_that_is_welcome(changes: dict[str, str | None]) -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            assert await judged(client, **changes) == 101

    run(main())


BAD: list[tuple[dict[str, str | None], int]] = [
    ({"Sec-WebSocket-Version": "8"}, 426),
    ({"Sec-WebSocket-Version": "13, 8"}, 426),
    ({"Sec-WebSocket-Version": None}, 426),
    ({"Sec-WebSocket-Key": None}, 400),
    ({"Sec-WebSocket-Key": ""}, 400),
    ({"Sec-WebSocket-Key": "c2hvcnQ="}, 400),
    ({"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ"}, 400),
    ({"Connection": "keep-alive"}, 400),
    ({"Connection": None}, 400),
]


@pytest.mark.parametrize(("changes", "status"), BAD)
def test_handshake_that_is_wrong(changes: dict[str, str | None], status: int) -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            answer = await client.ask("GET", "/", None, {**HANDSHAKE, **changes})
            assert answer.status == status
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["code"] is None
            if status == 426:
                assert answer.fields["sec-websocket-version"] == "13"
                assert answer.fields["upgrade"] == "websocket"
                assert "upgrade" in answer.fields["connection"].lower()
            await goes_on(client, answer.fields)

    run(main())


@pytest.mark.parametrize("framing", ["length", "chunked", "large"])
def test_handshake_with_a_body(framing: str) -> None:
    """It is refused, and the body is never taken for a request."""

    async def main() -> None:
        body = SMUGGLED if framing != "large" else SMUGGLED * 4_000
        length = {"Content-Length": str(len(body))} if framing != "chunked" else {"Transfer-Encoding": "chunked"}
        async with serving() as hub, await Client.open(hub.port) as client:
            client.send("GET", "/", None, {**HANDSHAKE, **length})
            client.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if framing == "chunked" else body)
            answer = await client.answer()
            assert answer.status == 400
            assert answer.error["type"] == "invalid_request_error"
            await goes_on(client, answer.fields)

    run(main())


PLAIN: list[tuple[str, str, bytes | None, dict[str, str | None], int]] = [
    ("GET", "/healthz", None, {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AA"}, 200),
    ("GET", "/healthz", None, {"Upgrade": None}, 200),
    ("GET", "/nowhere", None, {"Upgrade": "h2c"}, 404),
    ("HEAD", "/healthz", None, {}, 200),
    ("POST", CHAT, chat("hello"), {}, 200),
    ("POST", "/", b"", {}, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "changes", "status"), PLAIN)
def test_plain_request_beside(method: str, path: str, body: bytes | None, changes: dict[str, Any], status: int) -> None:
    """What is no GET for a WebSocket is answered as if nothing had been said of an upgrade."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            length = {} if body is None else {"Content-Length": str(len(body))}
            answer = await client.ask(method, path, body, {**HANDSHAKE, **length, **changes})
            assert answer.status == status
            assert "upgrade" not in answer.fields
            if path == CHAT:
                assert answer.text == "hello"
            assert await client.usable()

    run(main())


def test_the_old_version_knows_no_upgrade() -> None:
    """RFC 9110 7.8: a server must ignore the Upgrade of an HTTP/1.0 request."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            answer = await client.ask("GET", "/healthz", None, HANDSHAKE, minor=0)
            assert answer.status == 200
            assert await client.ended()

    run(main())


# Who is let in


ORIGINS: list[tuple[dict[str, str | None], list[str], int]] = [
    ({"Origin": "http://localhost:18789", "Host": "localhost:18789"}, [], 101),
    ({"Origin": "http://localhost", "Host": "localhost:80"}, [], 101),
    ({"Origin": "http://localhost:1", "Host": "localhost:2"}, [], 403),
    ({"Origin": "https://localhost:18789", "Host": "localhost:18789"}, [], 101),  # behind a proxy that speaks TLS
    ({"Origin": "http://evil.example"}, [], 403),
    ({"Origin": "http://evil.example"}, ["*"], 403),
    ({"Origin": "https://app.example"}, ["https://app.example"], 101),
    ({"Origin": "https://app.example.evil"}, ["https://app.example"], 403),
    ({"Origin": "null"}, [], 403),
    ({"Origin": "null"}, ["null", "*"], 403),
    ({"Origin": ""}, [], 403),
    ({"Origin": "http://evil.example", "Sec-WebSocket-Key": None}, [], 403),  # before all else
    ({"Origin": "http://evil.example", "Sec-WebSocket-Version": "8"}, [], 403),
]


@pytest.mark.parametrize("mode", [{}, TOKEN])
@pytest.mark.parametrize(("changes", "allowed", "status"), ORIGINS)
def test_origin(changes: dict[str, str | None], allowed: list[str], status: int, mode: dict[str, Any]) -> None:
    """A web page must not drive a local gateway: it is refused before the upgrade."""

    async def main() -> None:
        config = {**mode, "gateway.http.allowedOrigins": allowed}
        async with serving(config) as hub, await Client.open(hub.port) as client:
            assert await judged(client, **changes) == status

    run(main())


HOSTS: list[tuple[dict[str, str | None], list[str], int]] = [  # as judged in mode none
    ({"Host": "127.0.0.1:18789"}, [], 101),
    ({"Host": "[::1]:18789"}, [], 101),
    ({"Host": "LOCALHOST"}, [], 101),
    ({"Host": "evil.example"}, [], 403),  # DNS rebinding
    ({"Host": "evil.example:18789", "Origin": "http://evil.example:18789"}, [], 403),  # of its own origin, too
    ({"Host": "127.0.0.1.evil.example"}, [], 403),
    ({"Host": "192.168.1.1"}, [], 403),
    ({"Host": ""}, [], 403),
    ({"Host": "box.lan"}, ["box.lan"], 101),
    ({"Host": "box.lan"}, ["other.lan"], 403),
    ({"X-Forwarded-For": "127.0.0.1"}, [], 403),
    ({"X-Forwarded-For": ""}, [], 403),
    ({"X-Forwarded-Proto": "https"}, [], 403),
    ({"Forwarded": "for=127.0.0.1"}, [], 403),
    ({"Via": "1.1 proxy"}, [], 403),
    ({"X-Real-IP": "127.0.0.1"}, [], 403),
]


@pytest.mark.parametrize(("changes", "hosts", "status"), HOSTS)
def test_host(changes: dict[str, str | None], hosts: list[str], status: int) -> None:
    async def main() -> None:
        async with serving({"gateway.http.allowedHosts": hosts}) as hub, await Client.open(hub.port) as client:
            assert await judged(client, **changes) == status
        async with serving(TOKEN) as hub, await Client.open(hub.port) as client:  # these rules are mode none's alone
            assert await judged(client, **changes) == 101

    run(main())


def test_no_secret_is_asked_for_before_the_upgrade() -> None:
    """Whoever has none is told by the protocol, as all clients of the family expect it."""

    async def main() -> None:
        async with serving(TOKEN) as hub:
            async with opened(hub) as peer:
                await peer.challenge()
                assert not (await peer.connect())["ok"]
                assert (await peer.ended())[0] == 1008
            fields = [("Authorization", "Bearer wrong")]
            async with opened(hub, "/", fields=fields) as peer:
                assert (await peer.connect(auth={"token": TOKEN["gateway.auth.token"]}))["ok"]

    run(main())


# Bytes that come early


@pytest.mark.parametrize("cut", [0, 1, 7, len(CONNECT)])
def test_frame_behind_the_handshake(cut: int) -> None:
    """A client may speak before it has read the answer; its frame may come in parts."""

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            client.send("GET", "/", None, HANDSHAKE)
            client.write(CONNECT[:cut])
            assert (await client.head())[0] == 101
            await client.challenged()
            client.write(CONNECT[cut:] + masked(TEXT, request("health", "h")) + masked(PING, b"?"))
            assert (await client.answered("c"))["ok"]
            assert (await client.answered("h"))["ok"]
            assert await client.until(PONG) == b"?"

    run(main())


def test_many_frames_behind_the_handshake() -> None:
    """More than a StreamReader takes before it pauses, all in one go."""

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            large = masked(TEXT, request("health", "h", MAX))
            client.send("GET", "/", None, HANDSHAKE)
            client.write(CONNECT + large * 3 + masked(PING, b"?"))
            assert (await client.head())[0] == 101
            for id in "chhh":
                assert (await client.answered(id))["ok"]
            assert await client.until(PONG) == b"?"

    run(main())


def test_requests_before_the_handshake() -> None:
    """A request is answered, then the same connection is upgraded, be it in one packet."""

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            assert await client.usable()
            client.send("GET", "/healthz")
            client.say("before")
            client.send("GET", "/", None, HANDSHAKE)
            client.write(CONNECT + masked(CLOSE, rfc6455.close_payload(1000)))
            client.method = "POST"
            assert (await client.answer()).status == 200
            assert (await client.answer()).text == "before"
            assert (await client.head())[0] == 101
            await client.challenged()
            assert (await client.answered("c"))["ok"]
            assert await client.closed() == rfc6455.close_payload(1000)

    run(main())


# Messages


Send = Callable[[Wire], None]


def in_one(size: int) -> Send:
    return lambda client: client.write(masked(TEXT, request("health", "h", size)))


def in_parts(size: int, *sizes: int) -> Send:
    """Frames of these sizes, and one of the rest."""

    def send(client: Wire) -> None:
        message, opcode = request("health", "h", size), TEXT
        for part in sizes:
            client.write(masked(opcode, message[:part], fin=False))
            message, opcode = message[part:], CONTINUATION
        client.write(masked(opcode, message))

    return send


WHOLE = {
    "one": in_one(MAX),
    "two": in_parts(MAX, MAX - 1),
    "equal": in_parts(MAX, *[8_192] * 63),
    "small": in_parts(MAX, *[1] * 1_000, *[0] * 1_000),
    "empty end": in_parts(MAX, MAX),
    "binary": lambda client: client.write(masked(BINARY, request("health", "h", MAX))),
    "with pings": lambda client: client.write(
        masked(TEXT, request("health", "h", MAX)[:9], fin=False)
        + masked(PING)
        + masked(CONTINUATION, request("health", "h", MAX)[9:])
    ),
}
TOO_BIG = {
    "one": in_one(MAX + 1),
    "two": in_parts(MAX + 1, MAX),
    "equal": in_parts(MAX + 8_192, *[8_192] * 64),
    "only the header": lambda client: client.write(header(TEXT, 600_000)),
    "only the header, huge": lambda client: client.write(header(BINARY, 1 << 62)),
    "only the header of a part": lambda client: client.write(
        masked(TEXT, b" " * 400_000, fin=False) + header(CONTINUATION, 200_000)
    ),
    "only the header of a part that is not the last": lambda client: client.write(
        masked(TEXT, b" " * 400_000, fin=False) + header(CONTINUATION, 200_000, fin=False)
    ),
}


@pytest.mark.parametrize("how", WHOLE)
def test_message_that_is_just_not_too_large(how: str) -> None:
    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            await client.connect()
            WHOLE[how](client)
            assert (await client.answered("h"))["ok"]
            client.write(masked(CLOSE, rfc6455.close_payload(1000)))
            assert await client.closed() == rfc6455.close_payload(1000)

    run(main())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", TOO_BIG)
def test_message_that_is_too_large(how: str, known: bool) -> None:
    """It is refused by its header, before its bytes have come."""

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            await (client.connect() if known else client.upgrade())
            TOO_BIG[how](client)
            assert (await client.closed())[:2] == struct.pack("!H", 1009)

    run(main())


FAILED: dict[str, tuple[bytes, int]] = {
    "no mask": (rfc6455.encode(TEXT, b"{}"), 1002),
    "no mask on a ping": (rfc6455.encode(PING, b""), 1002),
    "a reserved bit": (bytes([0xC1]) + masked(TEXT, b"{}")[1:], 1002),
    "a reserved opcode": (masked(0x3, b"{}"), 1002),
    "nothing to continue": (masked(CONTINUATION, b"{}"), 1002),
    "a message within a message": (masked(TEXT, b"{", fin=False) + masked(TEXT, b"}"), 1002),
    "a ping in parts": (masked(PING, b"", fin=False), 1002),
    "a ping of 126 bytes": (masked(PING, b"x" * 126), 1002),
    "no UTF-8": (masked(TEXT, b'{"\xff"}'), 1007),
    "no UTF-8 in a part": (masked(TEXT, b"\xed\xa0\x80", fin=False), 1007),
    "half a character": (masked(TEXT, b"\xc3"), 1007),
    "a close of one byte": (masked(CLOSE, b"\x03"), 1002),
    "a close with 1005": (masked(CLOSE, struct.pack("!H", 1005)), 1002),
    "a close with 999": (masked(CLOSE, struct.pack("!H", 999)), 1002),
    "a close whose reason is no UTF-8": (masked(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", FAILED)
def test_frame_that_is_wrong(how: str, known: bool) -> None:
    data, code = FAILED[how]

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            await (client.connect() if known else client.upgrade())
            client.write(data)
            assert (await client.closed())[:2] == struct.pack("!H", code)

    run(main())


# The end


@pytest.mark.parametrize("payload", [b"", *(struct.pack("!H", n) for n in (1000, 1001, 1008, 1011, 3000, 4000, 4999))])
def test_close_is_answered(payload: bytes) -> None:
    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            before = asyncio.all_tasks()
            await client.connect()
            client.write(masked(CLOSE, payload + b"bye" if payload else b"") + masked(TEXT, request("health")))
            assert (await client.closed())[:2] == payload
            await left(hub, before)

    run(main())


STAGES = ("head", "handshake", "challenge", "hello", "header", "frame", "fragments", "request", "run")


@pytest.mark.parametrize("how", ["reset", "half-close"])
@pytest.mark.parametrize("stage", STAGES)
def test_leaving_leaves_nothing(stage: str, how: str) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            yield "first"
            await go.wait()
            yield "last"

        async with serving(agents={"main": agent}) as hub:
            assert (await ask_health(hub)) == 200
            before = asyncio.all_tasks()
            async with await Wire.open(hub.port) as client:
                await reach(client, stage)
                if how == "reset":
                    client.reset()
                else:
                    client.writer.write_eof()
                    while await within(client.reader.read(65_536)):
                        pass  # what was on its way; then the end
                if stage == "run":  # it outlives its client
                    await within(connections_gone(hub))
                    assert len(hub.runs.active) == 1
                    go.set()
                await left(hub, before)
                assert not hub.runs.active
            assert (await ask_health(hub)) == 200

    run(main())


async def reach(client: Wire, stage: str) -> None:
    """Bring a connection to a point at which it may be left."""
    if stage == "head":
        client.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n")
    elif stage == "handshake":
        client.send("GET", "/", None, HANDSHAKE)
    elif stage == "challenge":
        await client.upgrade()
        await client.challenged()
    else:
        await client.connect()
        words = {
            "hello": b"",
            "header": header(TEXT, 70_000)[:5],
            "frame": header(TEXT, 70_000) + b"half",
            "fragments": masked(TEXT, request("health")[:9], fin=False),
            "request": masked(TEXT, request("health")),
            "run": masked(TEXT, request("agent", "a", message="hi", idempotencyKey="k")),
        }
        client.write(words[stage])
        if stage == "run":
            assert (await client.answered("a"))["payload"]["status"] == "accepted"
            while json.loads(await client.until(TEXT)).get("payload", {}).get("stream") != "assistant":
                pass


async def connections_gone(hub: gateway.Gateway) -> None:
    while hub.connections:
        await asyncio.sleep(0.002)


async def ask_health(hub: gateway.Gateway) -> int:
    async with await Client.open(hub.port) as client:
        return (await client.ask("GET", "/healthz")).status


def test_too_many_connections() -> None:
    """WebSockets count; who is beyond is told so, and there is room again when one leaves."""

    async def main() -> None:
        async with serving({"gateway.maxConnections": 2}) as hub:
            async with connected(hub) as first:
                async with connected(hub) as second:
                    async with await Client.open(hub.port) as refused:
                        answer = await refused.ask("GET", "/", None, HANDSHAKE)
                        assert answer.status == 503
                        assert answer.error["type"] == "overloaded_error"
                        assert await refused.ended()
                    assert await second.ask("health")
                assert await first.ask("health")
                async with asyncio.timeout(BOUND):
                    while len(hub.connections) > 1:
                        await asyncio.sleep(0.002)
                async with connected(hub) as third:
                    assert await third.ask("health")

    run(main())


def test_going_down() -> None:
    """All are told, what runs ends whole, newcomers are refused, and then each is closed with 1012."""

    async def main() -> None:
        go = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            yield "first "
            await go.wait()
            yield "last"

        async with serving(agents={"main": agent}) as hub, connected(hub) as busy, connected(hub) as idle:
            async with opened(hub) as silent:
                await silent.challenge()
                id = await busy.post("agent", {"message": "hi", "idempotencyKey": "k"})
                assert (await busy.answer(id))["payload"]["status"] == "accepted"
                await busy.event("agent", stream="assistant")
                stopping = asyncio.create_task(hub.stop(BOUND))
                for peer in (busy, idle):
                    assert (await peer.event("shutdown"))["reason"]
                async with await Client.open(hub.port) as late:
                    answer = await late.ask("GET", "/", None, HANDSHAKE)
                    assert answer.status == 503
                    assert answer.error["type"] == "overloaded_error"
                    assert answer.fields["connection"] == "close"
                    assert await late.ended()
                refused = await busy.error("agent", message="more", idempotencyKey="k2")
                assert refused["code"] == "UNAVAILABLE"
                go.set()
                done = await busy.answer(id)
                assert done["payload"]["result"]["payloads"][0]["text"] == "first last"
                for peer in (busy, idle, silent):
                    assert (await peer.ended())[0] == 1012
                assert busy.text("k") == "first last"
                await within(stopping)
            with pytest.raises(ConnectionError):
                await Client.open(hub.port)

    run(main())


def test_going_down_waits_for_no_run_for_ever() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            try:
                yield "first "
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with serving(agents={"main": agent}) as hub, connected(hub) as peer:
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k"})
            await peer.event("agent", stream="assistant")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(within(hub.stop(0.05)))
                assert (await peer.event("shutdown"))["reason"]
                assert (await peer.answer(id))["payload"]["status"] == "accepted"
                assert (await peer.ended())[0] == 1012
            assert ended.is_set()

    run(main())


@pytest.mark.parametrize("stage", ["handshake", "challenge", "hello", "frame"])
def test_going_down_waits_for_no_client_for_ever(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers no close frame is dropped."""
    monkeypatch.setattr(rfc6455, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(gateway, "GOODBYE_SECONDS", 2 * BOUND)  # nothing else ends it within the bound

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            await reach(client, stage)
            await within(hub.stop(0.1))

    run(main())


@pytest.mark.parametrize("answers", [True, False])
def test_sigterm(answers: bool, tmp_path: Path) -> None:
    """The program ends well with a client attached, even one that is not there any more to hear of it."""

    async def main() -> None:
        async with program(settings(OFF), tmp_path) as started, await Wire.open(started.port) as client:
            await client.connect()
            started.process.terminate()
            while json.loads(await client.until(TEXT))["event"] != "shutdown":
                pass
            assert (await client.until(CLOSE))[:2] == struct.pack("!H", 1012)
            if answers:
                client.write(masked(CLOSE, struct.pack("!H", 1012)))
            else:
                client.reset()
            assert await started.ended() == 0

    run(main())


# Time


class Clock:
    """The gateway's clock, which a test may put ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return time.monotonic() + self.ahead

    async def passes(self, seconds: float) -> None:
        """Let time pass, and the gateway see it: it sweeps twice and more."""
        self.ahead += seconds
        looks = self.looks + 4
        async with asyncio.timeout(BOUND):
            while self.looks < looks:
                await asyncio.sleep(0.002)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.003)
    for module in (gateway, connection):
        monkeypatch.setattr(module, "now", clock)
    return clock


@pytest.mark.parametrize("how", ["silent", "dribbling"])
def test_peer_that_says_nothing_is_asked_and_then_dropped(how: str, clock: Clock) -> None:
    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            before = asyncio.all_tasks()
            await client.connect()
            asked = asyncio.create_task(client.until(PING))  # now: a reset takes what has come and was not read
            rest, passed = iter(header(TEXT, 100_000) + b"x" * 100), 0
            while hub.connections and passed < 200:
                if how == "dribbling":  # bytes that end no frame are no sign of life
                    client.write(bytes([next(rest)]))
                await clock.passes(10)
                passed += 10
            assert 30 < passed <= 100, passed
            assert await asked is not None
            await left(hub, before)

    run(main())


def test_peer_that_answers_pings_stays(clock: Clock) -> None:
    """HTTP's rules for idle connections are behind it."""

    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            ended = asyncio.create_task(peer.ended())
            for _ in range(60):
                await clock.passes(10)
            assert not ended.done()
            assert len(hub.connections) == 1
            peer.websocket.close()
            assert (await ended)[0] == 1000

    run(main())


@pytest.mark.parametrize("how", ["silent", "pinging", "half a frame"])
def test_handshake_timeout(how: str, clock: Clock) -> None:
    """Ten seconds for `connect`, whatever else comes."""

    async def main() -> None:
        async with serving() as hub, await Wire.open(hub.port) as client:
            await client.upgrade()
            await client.challenged()
            client.write({"silent": b"", "pinging": b"", "half a frame": CONNECT[:20]}[how])
            for _ in range(3):
                if how == "pinging":
                    client.write(masked(PING, b"?"))
                    assert await client.until(PONG) == b"?"
                await clock.passes(3)
                assert hub.connections
            await clock.passes(3)
            assert await client.until(CLOSE) == rfc6455.close_payload(1008, "handshake timeout")
            client.write(masked(CLOSE, struct.pack("!H", 1008)))
            assert await client.ended()

    run(main())


# Besides


def test_access_log() -> None:
    """A line for each upgrade and each refusal, with the id of the answer, and no query: secrets travel there."""

    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        async with serving() as hub:
            hub.access_log = lambda *fields: lines.append(fields)
            async with await Wire.open(hub.port) as client:
                fields = await client.upgrade("/some/path?token=secret")
                client.write(masked(CLOSE))
                assert await client.until(CLOSE) == b""
            async with await Client.open(hub.port) as client:
                refused = await client.ask("GET", "/", None, {**HANDSHAKE, "Sec-WebSocket-Key": None})
            await within(connections_gone(hub))
        seen = {line[0]: line for line in lines}
        assert len(lines) == len(seen) == 2
        _, who, method, path, status, sent, ms, *_ = seen[fields["x-request-id"]]
        assert (who, method, path, status) == ("127.0.0.1", "GET", "/some/path", 101)
        assert sent >= 0
        assert 0 <= ms < 1000 * BOUND
        assert seen[refused.fields["x-request-id"]][4] == 400

    run(main())


def test_http_goes_on_beside() -> None:
    """A WebSocket that is held and busy takes nothing from a plain request on the same port."""

    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            answers = await asyncio.gather(*(ask(hub, f"words of {n}") for n in range(20)))
            assert [answer.text for answer in answers] == [f"words of {n}" for n in range(20)]
            done = await peer.agent("and mine")
            assert done["payload"]["result"]["payloads"][0]["text"] == "and mine"

    run(main())


def test_over_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)

    @asynccontextmanager
    async def dialled(hub: gateway.Gateway) -> AsyncIterator[Peer]:
        websocket = await within(rfc6455.connect("localhost", hub.port, tls=context))
        try:
            yield Peer(websocket)
        finally:
            websocket.close()
            while await within(websocket.receive()) is not None:
                pass

    async def main() -> None:
        config = {"gateway.tls": {"cert": str(cert), "key": str(key)}, "gateway.bind": "loopback"}
        async with serving(config) as hub:
            async with dialled(hub) as peer:
                assert (await peer.connect())["ok"]
                done = await peer.agent("over TLS")
                assert done["payload"]["result"]["payloads"][0]["text"] == "over TLS"
                peer.websocket.close(1000)
                assert (await peer.ended())[0] == 1000
            async with dialled(hub) as peer:
                assert (await peer.connect())["ok"]
                await peer.send(b" " * (MAX + 1))
                assert (await peer.ended())[0] == 1009
            async with dialled(hub) as peer:
                assert (await peer.connect())["ok"]
                stopping = asyncio.create_task(hub.stop(1))
                assert (await peer.ended())[0] == 1012
                await within(stopping)

    run(main())


def test_hurry_waits_for_no_answer_to_a_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal ends the goodbye of a client that never reads the close frame."""
    monkeypatch.setattr(gateway, "GOODBYE_SECONDS", 3600.0)

    async def main() -> None:
        async with serving() as hub, connected(hub):
            stopping = asyncio.create_task(hub.stop(1))
            while not hub.control.closing:
                await asyncio.sleep(0)
            hub.hurry()
            await within(stopping)

    run(main())


def test_a_run_that_has_only_been_accepted_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "GOODBYE_SECONDS", 0.1)  # the client does not answer before the gateway has stopped

    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            job = hub.jobs.add(
                gateway.Desk(hub).accept("main", "k", "hi", system="", run_id="r", timeout=1, asked=("agent", ""))
            )
            await hub.stop(0)  # its task has not had a turn yet
            assert job.payload is not None
            assert job.payload["summary"] == "The gateway is going down."
            assert (await peer.ended())[0] == 1012

    run(main())
