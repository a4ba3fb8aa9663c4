"""WebSocket frames, handshake and connection against tables of bytes, and over real sockets (RFC 6455)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

import rfc6455
from rfc6455 import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, WebSocket, encode

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # 1.3
MASK = bytes.fromhex("37fa213d")  # 5.7
SPLITS = pytest.mark.parametrize("step", [1 << 30, 1, 7], ids=["whole", "bytes", "sevens"])


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


# --- the handshake

GOOD = {
    "host": "localhost",
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-key": KEY,
    "sec-websocket-version": "13",
}
ACCEPTED = [
    ("RFC 1.3", {}),
    ("any case", {"upgrade": "WebSocket", "connection": "UPGRADE"}),
    ("Firefox", {"connection": "keep-alive, Upgrade"}),
    ("lists", {"connection": "keep-alive,\tupgrade ,", "upgrade": "h2c, websocket"}),
    ("empty body", {"content-length": "0"}),
    ("extensions are declined", {"sec-websocket-extensions": "permessage-deflate"}),
    ("subprotocols are declined", {"sec-websocket-protocol": "chat, superchat"}),
]
REFUSED: list[tuple[str, str, dict[str, str | None], int]] = [
    ("POST", "POST", {}, 405),
    ("a body", "GET", {"content-length": "5"}, 400),
    ("a chunked body", "GET", {"transfer-encoding": "chunked"}, 400),
    ("no Connection", "GET", {"connection": None}, 400),
    ("Connection without it", "GET", {"connection": "keep-alive, upgraded"}, 400),
    ("no Upgrade", "GET", {"upgrade": None}, 400),
    ("another Upgrade", "GET", {"upgrade": "h2c"}, 400),
    ("no version", "GET", {"sec-websocket-version": None}, 426),
    ("version 8", "GET", {"sec-websocket-version": "8"}, 426),
    ("version in words", "GET", {"sec-websocket-version": "thirteen"}, 426),
    ("version +13", "GET", {"sec-websocket-version": "+13"}, 426),
    ("two versions", "GET", {"sec-websocket-version": "13, 8"}, 426),
    ("no key", "GET", {"sec-websocket-key": None}, 400),
    ("empty key", "GET", {"sec-websocket-key": ""}, 400),
    ("short key", "GET", {"sec-websocket-key": "YWJj"}, 400),
    ("long key", "GET", {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQAA"}, 400),
    ("key not base64", "GET", {"sec-websocket-key": "!" * 22 + "=="}, 400),
    ("key and a line end", "GET", {"sec-websocket-key": KEY + "\n"}, 400),
    ("two keys", "GET", {"sec-websocket-key": f"{KEY}, {KEY}"}, 400),
]
ANSWER = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}
BAD_ANSWERS: list[tuple[str, int, dict[str, str | None]]] = [
    ("refused", 401, {}),
    ("no Upgrade", 101, {"upgrade": None}),
    ("no Connection", 101, {"connection": "close"}),
    ("no accept", 101, {"sec-websocket-accept": None}),
    ("another accept", 101, {"sec-websocket-accept": "S3pPLMBiTxaQ9kYGzzhZRbK+xOo="}),
    ("an extension", 101, {"sec-websocket-extensions": "permessage-deflate"}),
    ("a subprotocol", 101, {"sec-websocket-protocol": "chat"}),
]


def changed(fields: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


@pytest.mark.parametrize(("about", "changes"), ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_accept(about: str, changes: dict[str, str | None]) -> None:
    answer = rfc6455.accept("GET", changed(GOOD, changes))
    assert {name.lower(): value for name, value in answer} == ANSWER


@pytest.mark.parametrize(
    ("method", "minor", "upgrade", "expected"),
    [
        ("GET", 1, "websocket", True),
        ("GET", 1, "h2c, WebSocket", True),
        ("GET", 0, "websocket", False),
        ("POST", 1, "websocket", False),
        ("GET", 1, "h2c", False),
        ("GET", 1, "", False),
    ],
)
def test_wanted(method: str, minor: int, upgrade: str, expected: bool) -> None:
    assert rfc6455.wanted(method, minor, {"upgrade": upgrade}) is expected


@pytest.mark.parametrize(("about", "method", "changes", "status"), REFUSED, ids=[row[0] for row in REFUSED])
def test_accept_refuses(about: str, method: str, changes: dict[str, str | None], status: int) -> None:
    with pytest.raises(rfc6455.HandshakeError) as caught:
        rfc6455.accept(method, changed(GOOD, changes))
    assert caught.value.status == status
    assert caught.value.message == str(caught.value)
    assert (("Sec-WebSocket-Version", "13") in caught.value.fields) is (status == 426)
    assert (("Allow", "GET") in caught.value.fields) is (status == 405)


def test_client_handshake_is_accepted() -> None:
    key = rfc6455.client_key()
    assert key != rfc6455.client_key()
    answer = rfc6455.accept("GET", {name.lower(): value for name, value in rfc6455.request_fields(key)})
    rfc6455.check_accept(key, 101, {name.lower(): value for name, value in answer})


@pytest.mark.parametrize(("about", "status", "changes"), BAD_ANSWERS, ids=[row[0] for row in BAD_ANSWERS])
def test_check_accept_refuses(about: str, status: int, changes: dict[str, str | None]) -> None:
    with pytest.raises(rfc6455.HandshakeError) as caught:
        rfc6455.check_accept(KEY, status, changed(ANSWER, changes))
    assert caught.value.status == status


# --- a connection on a wire in memory: bytes in, in any split, and bytes out


class Wire(asyncio.Transport):
    """Keeps what is written; ends as a socket's transport does."""

    def __init__(self, protocol: asyncio.StreamReaderProtocol, half_close: bool) -> None:
        super().__init__()
        self.protocol, self.half_close = protocol, half_close
        self.written, self.ended, self.closing = bytearray(), False, False

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return self.half_close

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


class Line:
    """A WebSocket on a Wire, and a task that receives all its messages."""

    def __init__(self, *, half_close: bool = True, **options: Any) -> None:
        reader = asyncio.StreamReader()
        self.protocol = asyncio.StreamReaderProtocol(reader)
        self.wire = Wire(self.protocol, half_close)
        self.protocol.connection_made(self.wire)
        self.writer = asyncio.StreamWriter(self.wire, self.protocol, reader, asyncio.get_running_loop())
        self.websocket = WebSocket(reader, self.writer, **options)
        self.messages: list[str | bytes] = []
        self.task = asyncio.create_task(self.listen())

    async def listen(self) -> None:
        while (message := await self.websocket.receive()) is not None:
            assert type(message) in (str, bytes)
            self.messages.append(message)

    async def feed(self, data: bytes, step: int = 1 << 30) -> None:
        for at in range(0, len(data), step):
            if not self.wire.closing:
                self.protocol.data_received(data[at : at + step])
            for _ in range(3):  # the task takes it
                await asyncio.sleep(0)

    async def end(self) -> None:
        if not self.wire.closing:
            self.protocol.eof_received()
        async with asyncio.timeout(10):
            await self.task


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Opcode and payload of each short frame in `data`, unmasked."""
    found = []
    while data:
        size, masked = data[1] & 0x7F, data[1] >= 0x80
        assert data[0] & 0x80
        assert size < 126
        mask, data, opcode = data[2:6] if masked else bytes(4), data[6 if masked else 2 :], data[0] & 0x0F
        found.append((opcode, bytes(byte ^ mask[i % 4] for i, byte in enumerate(data[:size]))))
        data = data[size:]
    return found


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20), debug=True)


# --- frames

EXAMPLES = [  # 5.7, then the edges of the three lengths of 5.2
    ("text", TEXT, True, b"Hello", None, hexed("8105") + b"Hello"),
    ("masked text", TEXT, True, b"Hello", MASK, hexed("8185 37fa213d 7f9f4d5158")),
    ("first fragment", TEXT, False, b"Hel", None, hexed("0103") + b"Hel"),
    ("last fragment", CONTINUATION, True, b"lo", None, hexed("8002") + b"lo"),
    ("ping", PING, True, b"Hello", None, hexed("8905") + b"Hello"),
    ("masked pong", PONG, True, b"Hello", MASK, hexed("8a85 37fa213d 7f9f4d5158")),
    ("256 bytes", BINARY, True, bytes(256), None, hexed("827e0100") + bytes(256)),
    ("64 KiB", BINARY, True, bytes(65536), None, hexed("827f0000000000010000") + bytes(65536)),
    ("empty", BINARY, True, b"", MASK, hexed("8280 37fa213d")),
    ("125", BINARY, True, bytes(125), None, hexed("827d") + bytes(125)),
    ("126", BINARY, True, bytes(126), None, hexed("827e007e") + bytes(126)),
    ("126 masked", BINARY, True, bytes(126), MASK, hexed("82fe007e 37fa213d") + MASK * 31 + MASK[:2]),
    ("65535", BINARY, True, bytes(65535), None, hexed("827effff") + bytes(65535)),
    ("65537 masked", BINARY, True, bytes(65537), MASK, hexed("82ff0000000000010001 37fa213d") + MASK * 16384 + b"\x37"),
]


@pytest.mark.parametrize(
    ("about", "opcode", "fin", "payload", "mask", "wire"), EXAMPLES, ids=[row[0] for row in EXAMPLES]
)
def test_frame(about: str, opcode: int, fin: bool, payload: bytes, mask: bytes | None, wire: bytes) -> None:
    """One row both ways: encoded to its bytes, and its bytes received in every split."""
    assert encode(opcode, payload, fin=fin, mask=mask) == wire

    async def decode() -> None:
        for step in (len(wire), 1 if len(wire) < 1000 else 1001, 7 if len(wire) < 1000 else 4099):
            line = Line(client=mask is None)
            before = encode(BINARY, b"", fin=False, mask=mask) if opcode == CONTINUATION else b""
            after = encode(CONTINUATION, b"", mask=mask) if not fin else b""
            await line.feed(before + wire + after, step)
            expected: list[str | bytes] = [payload.decode() if opcode == TEXT else payload]
            assert line.messages == ([] if opcode in (PING, PONG) else expected)
            assert frames(bytes(line.wire.written)) == ([(PONG, payload)] if opcode == PING else [])
            await line.end()

    run(decode)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 63, 2047, 2048, 2049, 2050, 2051, 10007])
def test_xor(size: int) -> None:
    data, mask = os.urandom(size), os.urandom(4)
    masked = rfc6455.xor(data, mask)
    assert masked == bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    assert rfc6455.xor(masked, mask) == data


EURO = "\u20ac".encode()
FACE = "\U0001f600".encode()
CONVERSATIONS: list[tuple[str, list[tuple[int, bool, bytes]], list[str | bytes], list[tuple[int, bytes]]]] = [
    ("5.4 fragments", [(TEXT, False, b"Hel"), (CONTINUATION, True, b"lo")], ["Hello"], []),
    ("5.4 empty fragments", [(BINARY, False, b""), (CONTINUATION, False, b""), (CONTINUATION, True, b"")], [b""], []),
    (
        "5.4 a ping between fragments",
        [(TEXT, False, b"Hel"), (PING, True, b"?"), (CONTINUATION, True, b"lo")],
        ["Hello"],
        [(PONG, b"?")],
    ),
    ("5.5.2 pings in order", [(PING, True, b"1"), (PING, True, b""), (PING, True, bytes(125))], [],
     [(PONG, b"1"), (PONG, b""), (PONG, bytes(125))]),
    ("5.5.3 an unasked pong", [(PONG, True, b"x"), (TEXT, True, b"a")], ["a"], []),
    ("5.6 text and binary", [(TEXT, True, EURO), (BINARY, True, b"\xff"), (TEXT, True, b"")],
     ["\u20ac", b"\xff", ""], []),
    ("5.6 a character in two frames", [(TEXT, False, EURO[:1]), (CONTINUATION, True, EURO[1:])], ["\u20ac"], []),
    (
        "8.1 a character in four frames",
        [(TEXT, False, FACE[:1]), *[(CONTINUATION, i == 3, FACE[i : i + 1]) for i in (1, 2, 3)]],
        ["\U0001f600"],
        [],
    ),
    ("8.1 the last of Unicode", [(TEXT, True, b"\xf4\x8f\xbf\xbf")], ["\U0010ffff"], []),
    ("5.5.1 a close frame without a code", [(CLOSE, True, b"")], [], [(CLOSE, b"")]),
    ("5.5.1 nothing counts after it", [(CLOSE, True, b"\x03\xe8"), (TEXT, True, b"x"), (PING, True, b"")], [],
     [(CLOSE, b"\x03\xe8")]),
]  # fmt: skip


@SPLITS
@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
@pytest.mark.parametrize(
    ("about", "sent", "messages", "answers"), CONVERSATIONS, ids=[row[0] for row in CONVERSATIONS]
)
def test_conversation(
    about: str,
    sent: list[tuple[int, bool, bytes]],
    messages: list[str | bytes],
    answers: list[tuple[int, bytes]],
    client: bool,
    step: int,
) -> None:
    async def talk() -> None:
        active: list[int] = []
        line = Line(client=client, on_activity=lambda: active.append(1))
        mask = None if client else MASK
        await line.feed(b"".join(encode(opcode, payload, fin=fin, mask=mask) for opcode, fin, payload in sent), step)
        assert line.messages == messages
        assert frames(bytes(line.wire.written)) == answers
        closing = [opcode for opcode, _, _ in sent].index(CLOSE) + 1 if answers and answers[-1][0] == CLOSE else None
        assert len(active) == (closing or len(sent))
        await line.end()

    run(talk)


# --- every rule a peer can break: RFC section, what it sends (unmasked here, masked on the way), our close code

ERRORS = [
    ("5.2 RSV1", hexed("c100"), 1002),
    ("5.2 RSV2", hexed("a100"), 1002),
    ("5.2 RSV3 on a ping", hexed("9900"), 1002),
    *[(f"5.2 reserved opcode {code:x}", bytes((0x80 | code, 0)), 1002) for code in (*range(3, 8), *range(11, 16))],
    ("5.2 126 for a short length", hexed("817e007d"), 1002),
    ("5.2 127 for a medium length", hexed("817f000000000000ffff"), 1002),
    ("5.2 127 for a short length", hexed("827f0000000000000001"), 1002),
    ("5.2 length over 63 bits", hexed("827f8000000000000000"), 1002),
    ("5.4 nothing to continue", hexed("8000"), 1002),
    ("5.4 nothing to continue, more to come", hexed("0000"), 1002),
    ("5.4 text within a message", hexed("0100 8100"), 1002),
    ("5.4 binary within a message", hexed("0200 8200"), 1002),
    ("5.4 continued after its end", hexed("0100 8000 8000"), 1002),
    ("5.5 ping in fragments", hexed("0900"), 1002),
    ("5.5 close in fragments", hexed("0800"), 1002),
    ("5.5 ping over 125 bytes", hexed("897e007e"), 1002),
    ("5.5 close over 125 bytes", hexed("887f0000000000010000"), 1002),
    ("5.5.1 close payload of one byte", hexed("880103"), 1002),
    ("5.5.1 reason not UTF-8", hexed("880403e8 c328"), 1007),
    ("5.5.1 reason cut in a character", hexed("880403e8 e282"), 1007),
    *[
        (f"7.4 close code {code}", hexed("8802") + struct.pack("!H", code), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ],
    ("8.1 not UTF-8", hexed("8102 c328"), 1007),
    ("8.1 a character that does not end", hexed("8103 61e282"), 1007),
    ("8.1 a surrogate", hexed("8103 eda080"), 1007),
    ("8.1 overlong", hexed("8102 c0af"), 1007),
    ("8.1 beyond Unicode", hexed("8104 f4908080"), 1007),
    ("8.1 seen in a frame that has not ended", hexed("8164 6162ff"), 1007),
    ("8.1 seen at the second of four bytes", hexed("8164 61f490"), 1007),
    ("8.1 seen in a fragment", hexed("0103 61f490"), 1007),
    ("8.1 seen in a continuation", hexed("0101 f4 0001 90"), 1007),
    ("8.1 a character that does not end with the last fragment", hexed("0101 e2 8001 82"), 1007),
    ("10.4 one frame over the limit", hexed("827e0bb9"), 1009),
    ("10.4 one huge frame", hexed("827f7fffffffffffffff"), 1009),
    ("10.4 fragments over the limit", hexed("027e0bb8") + bytes(3000) + hexed("8001"), 1009),
]


def as_client(data: bytes) -> bytes:
    """The same frames, whole or cut, as a client sends them: masked."""
    masked = b""
    while data:
        at = {126: 4, 127: 10}.get(data[1], 2)
        size = data[1] if at == 2 else int.from_bytes(data[2:at], "big")
        masked += bytes((data[0], data[1] | 0x80)) + data[2:at] + MASK + rfc6455.xor(data[at : at + size], MASK)
        data = data[at + size :]
    return masked


@SPLITS
@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
@pytest.mark.parametrize(("about", "data", "code"), ERRORS, ids=[row[0] for row in ERRORS])
def test_error(about: str, data: bytes, code: int, client: bool, step: int) -> None:
    """The close frame goes out at the last byte of the row, no later; no byte after it counts."""

    async def fail() -> None:
        line = Line(client=client, max_message=3000)
        await line.feed(data if client else as_client(data), step)
        sent = bytes(line.wire.written)
        ((opcode, payload),) = frames(sent)
        assert opcode == CLOSE
        assert int.from_bytes(payload[:2], "big") == line.websocket.sent_code == code
        assert payload[2:].decode()
        assert line.wire.ended
        assert not line.wire.closing  # lingers, or the close frame could be lost to a reset
        await line.feed(encode(TEXT, b"x", mask=None if client else MASK))
        await line.end()
        assert line.messages == ([""] if "continued after" in about else [])
        assert line.wire.written == sent
        assert line.wire.closing
        assert (line.websocket.close_code, line.websocket.closed) == (1006, True)
        assert await line.websocket.receive() is None

    run(fail)


@SPLITS
@pytest.mark.parametrize(("client", "data"), [(False, b"\x81\x00"), (True, b"\x81\x80")], ids=["server", "client"])
def test_only_a_client_masks(client: bool, data: bytes, step: int) -> None:
    async def fail() -> None:  # 5.1
        line = Line(client=client)
        await line.feed(data, step)
        assert line.websocket.sent_code == 1002
        await line.end()

    run(fail)


def test_limits_are_inclusive() -> None:
    async def talk() -> None:
        line = Line(max_message=3000)
        await line.feed(encode(BINARY, bytes(3000), mask=MASK))
        await line.feed(encode(TEXT, b"a" * 2999, fin=False, mask=MASK) + encode(CONTINUATION, b"b", mask=MASK))
        assert [len(message) for message in line.messages] == [3000, 3000]
        await line.end()

    run(talk)


# --- closing

CODES = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]


@pytest.mark.parametrize("code", CODES)
def test_close_is_answered_with_its_code(code: int) -> None:
    async def close() -> None:
        line = Line()
        await line.feed(encode(CLOSE, rfc6455.close_payload(code, "bye \u20ac"), mask=MASK))
        await asyncio.wait_for(line.task, 5)  # a server ends the connection without waiting
        assert line.wire.written == hexed("8802") + struct.pack("!H", code)
        assert (line.websocket.close_code, line.websocket.close_reason) == (code, "bye \u20ac")
        assert line.wire.closing

    run(close)


def test_close_sends_once_and_discards_until_the_answer() -> None:
    async def close() -> None:
        line = Line()
        line.websocket.close(4000, "enough")
        line.websocket.close(4001)
        await line.websocket.send("late")
        line.websocket.send_frame(encode(TEXT, b"late"))
        line.websocket.ping()
        await line.feed(encode(TEXT, b"x", mask=MASK) + encode(PING, b"", mask=MASK))
        assert not line.wire.closing
        await line.feed(encode(CLOSE, b"\x0f\xa0", mask=MASK))
        await asyncio.wait_for(line.task, 5)
        assert line.messages == []
        assert line.wire.written == hexed("8808 0fa0") + b"enough"
        assert (line.websocket.sent_code, line.websocket.close_code) == (4000, 4000)
        assert line.websocket._dropper is not None
        assert line.websocket._dropper.cancelled()

    run(close)


def test_client_waits_for_the_server_to_end() -> None:
    async def close() -> None:  # 7.1.1
        line = Line(client=True)
        await line.feed(encode(CLOSE, b"\x03\xe9"))
        assert frames(bytes(line.wire.written)) == [(CLOSE, b"\x03\xe9")]
        assert not line.task.done()
        await line.end()
        assert line.websocket.close_code == 1001

    run(close)


@pytest.mark.parametrize("data", [b"", hexed("81"), hexed("8185 37fa213d 7f"), hexed("0185 37fa213d 7f9f4d5158")])
def test_end_without_close_is_1006(data: bytes) -> None:
    async def leave() -> None:
        line = Line()
        await line.feed(data)
        await line.end()
        assert (line.messages, line.websocket.close_code, line.websocket.sent_code) == ([], 1006, None)
        assert line.websocket.closed
        line.websocket.close()
        assert line.wire.written == b""

    run(leave)


def test_failure_without_half_close() -> None:
    async def fail() -> None:  # TLS: the connection is closed at once
        line = Line(half_close=False)
        await line.feed(hexed("ff00"))
        await asyncio.wait_for(line.task, 5)
        assert line.websocket.sent_code == 1002
        assert line.wire.closing

    run(fail)


@pytest.mark.parametrize(
    ("code", "reason", "payload"),
    [
        (1005, "", b""),
        (1000, "", b"\x03\xe8"),
        (1008, "slow", b"\x03\xf0slow"),
        (1000, "x" * 200, b"\x03\xe8" + b"x" * 123),
        (1000, "x" * 122 + "\u20ac", b"\x03\xe8" + b"x" * 122),
        (1000, "a lone \ud800", b"\x03\xe8a lone ?"),
    ],
)
def test_close_payload(code: int, reason: str, payload: bytes) -> None:
    assert rfc6455.close_payload(code, reason) == payload
    assert rfc6455.parse_close(payload)[0] == code


# --- real sockets


async def pair(**options: Any) -> tuple[WebSocket, socket.socket]:
    """A server's WebSocket on one end of a socket pair with small buffers, and the other end, bare."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    theirs.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    return WebSocket(reader, writer, **options), theirs


async def read_to_end(end: socket.socket) -> bytes:
    received = bytearray()
    while data := await asyncio.get_running_loop().sock_recv(end, 1 << 20):
        received += data
    return bytes(received)


def test_two_sides() -> None:
    messages: list[str | bytes] = ["", "Hello", b"", b"\x00\xff", "\U0001f600" * 30000, os.urandom(300000)]

    async def talk() -> None:
        served: asyncio.Future[WebSocket] = asyncio.get_running_loop().create_future()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server = WebSocket(reader, writer)
            server.ping()
            while (message := await server.receive()) is not None:
                await server.send(message)
            served.set_result(server)

        listener = await asyncio.start_server(echo, "127.0.0.1", 0)
        client = WebSocket(*await asyncio.open_connection(*listener.sockets[0].getsockname()), client=True)
        for message in messages:
            await client.send(message)
            assert await client.receive() == message
        client.close(3001, "done")
        assert await client.receive() is None
        server = await served
        assert (client.sent_code, client.close_code, client.close_reason) == (3001, 3001, "")
        assert (server.sent_code, server.close_code, server.close_reason) == (3001, 3001, "done")
        listener.close()
        await listener.wait_closed()

    run(talk)


def test_slow_consumer_is_closed_1008() -> None:
    async def fan_out() -> None:
        frame = encode(BINARY, bytes(65536))
        (slow, theirs), (quick, others) = await pair(), await pair()
        reading = asyncio.create_task(read_to_end(others))
        count = 0
        while not slow.closed:  # one frame, encoded once, for all
            slow.send_frame(frame)
            quick.send_frame(frame)
            count += not slow.closed
            await asyncio.sleep(0)
        assert rfc6455.MAX_BUFFERED < slow._transport.get_write_buffer_size() < rfc6455.MAX_BUFFERED + 2 * len(frame)
        assert not quick.closed
        slow.send_frame(frame)
        ended = asyncio.create_task(slow.receive())
        received = await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
        close = encode(CLOSE, rfc6455.close_payload(1008, "slow consumer"))
        while len(received) < count * len(frame) + len(close):
            received += await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
        assert received == frame * count + close
        assert not ended.done()
        theirs.close()
        assert await ended is None
        quick.close()
        others.shutdown(socket.SHUT_WR)
        assert await quick.receive() is None
        assert (await reading).startswith(frame * count)
        others.close()

    run(fan_out)


def test_large_frames_that_nobody_reads_are_bounded() -> None:
    async def post() -> None:
        websocket, theirs = await pair()
        large = bytes(2 * rfc6455.MAX_BUFFERED)
        for _ in range(rfc6455.MAX_LARGE):
            websocket.post(large)
        websocket.post(b"an event")
        assert not websocket.closed
        for _ in range(4):
            websocket.post(large)
        assert websocket.sent_code == 1008
        assert websocket._transport.get_write_buffer_size() < (rfc6455.MAX_LARGE + 2) * len(large)
        theirs.close()
        assert await websocket.receive() is None

    run(post)


def test_send_waits_for_a_slow_reader() -> None:
    async def send() -> None:
        websocket, theirs = await pair()
        sending = asyncio.create_task(websocket.send(bytes(1 << 20)))
        await asyncio.sleep(0)
        assert not sending.done()
        size = 0
        while not sending.done():
            size += len(await asyncio.get_running_loop().sock_recv(theirs, 65536))
        assert size > 1 << 19
        waiting = asyncio.create_task(websocket.send(bytes(1 << 20)))
        await asyncio.sleep(0)
        theirs.close()
        assert await websocket.receive() is None
        await waiting  # the end is no error here: `receive` tells of it
        await websocket.send("late")

    run(send)


def test_pings_without_reading_fill_no_memory() -> None:
    async def flood() -> None:
        websocket, theirs = await pair()
        receiving = asyncio.create_task(websocket.receive())
        pings = encode(PING, bytes(125), mask=MASK) * 16000
        transport: Any = websocket._transport
        while transport.is_reading():
            with suppress(BlockingIOError):
                pings = pings[theirs.send(pings) :]
            assert pings
            await asyncio.sleep(0)
        assert websocket.sent_code is None
        assert transport.get_write_buffer_size() < 1 << 17
        theirs.close()
        assert await receiving is None

    run(flood)


@pytest.mark.parametrize(
    "frame",
    [encode(PING, b"", mask=MASK), encode(CONTINUATION, b"a", fin=False, mask=MASK), encode(TEXT, b"a", mask=MASK)],
)
def test_many_frames_at_once_let_the_others_have_their_turn(frame: bytes) -> None:
    async def flood() -> None:
        line = Line()
        first = encode(TEXT, b"a", fin=False, mask=MASK) if frame[0] == CONTINUATION else b""
        line.protocol.data_received(first + frame * 1000 + encode(CLOSE, b"", mask=MASK))
        turns = 0
        while line.websocket.close_code is None:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 1000 // rfc6455.AT_ONCE
        await line.end()

    run(flood)


def test_peer_that_never_answers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rfc6455, "CLOSE_SECONDS", 0.05)

    async def close() -> None:
        websocket, theirs = await pair()
        websocket.close(1001, "going away")
        assert await websocket.receive() is None
        assert (websocket.sent_code, websocket.close_code) == (1001, 1006)
        assert await read_to_end(theirs) == hexed("880c03e9") + b"going away"
        theirs.close()

        websocket, theirs = await pair()  # one that has broken a rule and goes on sending
        await asyncio.get_running_loop().sock_sendall(theirs, hexed("ff00"))
        assert await websocket.receive() is None
        assert websocket.sent_code == 1002
        theirs.close()

        websocket, theirs = await pair()  # one that has said goodbye and never reads what it asked for
        websocket.send_frame(encode(BINARY, bytes(1 << 20)))
        await asyncio.get_running_loop().sock_sendall(theirs, encode(CLOSE, b"", mask=MASK))
        assert await websocket.receive() is None
        assert websocket.close_code == 1005
        theirs.close()

        websocket, theirs = await pair()  # one that ends without a goodbye and never reads
        websocket.send_frame(encode(BINARY, bytes(1 << 20)))
        theirs.shutdown(socket.SHUT_WR)
        assert await websocket.receive() is None
        assert websocket.close_code == 1006
        theirs.close()

    run(close)


def test_reset_is_1006() -> None:
    async def reset() -> None:
        accepted: asyncio.Future[WebSocket] = asyncio.get_running_loop().create_future()
        listener = await asyncio.start_server(
            lambda reader, writer: accepted.set_result(WebSocket(reader, writer)), "127.0.0.1", 0
        )
        client = socket.create_connection(listener.sockets[0].getsockname())
        websocket = await accepted
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert await websocket.receive() is None
        assert websocket.close_code == 1006
        listener.close()
        await listener.wait_closed()

    run(reset)


ANSWERS = [
    ("a refusal", b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 403, "answered 403"),
    ("another accept", b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 101, "is wrong"),
    ("not HTTP", b"SSH-2.0-x\r\n\r\n", 0, "not HTTP"),
    ("nothing", b"", 0, "not HTTP"),
    ("a head without end", b"HTTP/1.1 101 x\r\n" + b"a: b\r\n" * 20_000, 0, "not HTTP"),
]


@pytest.mark.parametrize(("about", "answer", "status", "message"), ANSWERS, ids=[row[0] for row in ANSWERS])
def test_connect_refused(about: str, answer: bytes, status: int, message: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def test() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            with pytest.raises(rfc6455.HandshakeError, match=message) as caught:
                await rfc6455.connect("127.0.0.1", server.sockets[0].getsockname()[1])
        assert caught.value.status == status

    run(test)


def test_connect() -> None:
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        heads.extend([request_line, *lines])
        named = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        fields = "".join(f"{name}: {value}\r\n" for name, value in rfc6455.accept("GET", named))
        writer.write(f"HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n".encode())
        websocket = WebSocket(reader, writer)
        while (message := await websocket.receive()) is not None:
            await websocket.send(message)

    async def test() -> None:
        async with await asyncio.start_server(serve, "::1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            websocket = await rfc6455.connect("::1", port, "/at", fields=[("Origin", "http://x")])
            assert heads[0] == "GET /at HTTP/1.1"
            assert {f"Host: [::1]:{port}", "Origin: http://x"} < set(heads)
            await websocket.send("hello")
            assert await websocket.receive() == "hello"
            websocket.close()
            assert await websocket.receive() is None
            assert websocket.close_code == 1000

    run(test)
