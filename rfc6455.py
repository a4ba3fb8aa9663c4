"""WebSocket: frames, the handshake, and one connection, either side, over asyncio streams (RFC 6455)."""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import struct
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl import SSLContext

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

# 7.4: close codes we send, and the two that never stand in a frame (7.1.5).
NORMAL, PROTOCOL_ERROR, INVALID_DATA, POLICY, TOO_BIG = 1000, 1002, 1007, 1008, 1009
NO_CODE, ABNORMAL = 1005, 1006

MAX_MESSAGE = 512 * 1024  # bytes in one message; the family's gateways announce the same
MAX_BUFFERED = 3 * MAX_MESSAGE  # bytes a slow reader may leave with us; the family's, too
MAX_LARGE = 4  # messages beyond it that may wait as well: a long answer is told in its words, and whole at its end
CLOSE_SECONDS = 5.0  # how long a peer may take to answer our close; the `websockets` package takes 10
CHUNK = 64 * 1024  # bytes taken from the stream at once; asyncio's own default limit
AT_ONCE = 64  # frames read before the loop turns to the others: a millisecond or so of it, where each is a request

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # base64 (RFC 4648) of 16 bytes
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)")  # RFC 9112 4

# 5.2: FIN and opcode. A reserved bit, a reserved opcode or a control frame in fragments is in none of these.
_FIRST_BYTES = frozenset([0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A])
_BYTES = bytes(range(256))


class HandshakeError(Exception):
    """The handshake failed: the HTTP `status` to answer with (at a client: the one that came) and `fields` for it."""

    def __init__(self, status: int, message: str, fields: list[tuple[str, str]] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.fields = status, message, fields or []


class WebSocketError(Exception):
    """The connection has failed (7.1.7): the close code that says why, and a reason for people."""

    def __init__(self, close_code: int, reason: str) -> None:
        super().__init__(reason)
        self.close_code, self.reason = close_code, reason


def wanted(method: str, minor: int, fields: Mapping[str, str]) -> bool:
    """Whether a request of HTTP/1.`minor` asks for a WebSocket; any other upgrade may be ignored (RFC 9110 7.8)."""
    return method == "GET" and minor > 0 and _names(fields, "upgrade", "websocket")


def accept(method: str, fields: Mapping[str, str]) -> list[tuple[str, str]]:
    """The fields of the 101 answer to a client's handshake (4.2); subprotocols and extensions are declined by silence.

    `fields` has lower-case names, several lines joined by ", ". Raises HandshakeError.
    """
    if method != "GET":
        raise HandshakeError(405, "a WebSocket handshake is a GET", [("Allow", "GET")])
    if "transfer-encoding" in fields or fields.get("content-length", "0") != "0":
        raise HandshakeError(400, "a WebSocket handshake has no body")
    if not _names(fields, "connection", "upgrade") or not _names(fields, "upgrade", "websocket"):
        raise HandshakeError(400, "a WebSocket handshake needs 'Connection: Upgrade' and 'Upgrade: websocket'")
    if fields.get("sec-websocket-version") != "13":
        # RFC 9110 15.5.22: a 426 must say which protocol; 4.4: and we which version.
        upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
        raise HandshakeError(426, "Sec-WebSocket-Version must be 13", upgrade)
    key = fields.get("sec-websocket-key", "")
    if not _KEY.fullmatch(key):
        raise HandshakeError(400, "Sec-WebSocket-Key must be one base64 value of 16 bytes")
    return [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", _accept_value(key))]


def client_key() -> str:
    """A fresh Sec-WebSocket-Key."""
    return binascii.b2a_base64(os.urandom(16), newline=False).decode()


def request_fields(key: str) -> list[tuple[str, str]]:
    """The fields that make a GET a WebSocket handshake (4.1)."""
    return [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", key),
        ("Sec-WebSocket-Version", "13"),
    ]


def check_accept(key: str, status: int, fields: Mapping[str, str]) -> None:
    """Raise HandshakeError unless the server's answer to `request_fields(key)` opens the connection (4.1)."""
    if status != 101:
        raise HandshakeError(status, f"the server answered {status} instead of opening a WebSocket")
    if not _names(fields, "connection", "upgrade") or not _names(fields, "upgrade", "websocket"):
        raise HandshakeError(status, "the server's answer is no upgrade to websocket")
    if fields.get("sec-websocket-accept") != _accept_value(key):
        raise HandshakeError(status, "the server's Sec-WebSocket-Accept is wrong")
    if "sec-websocket-extensions" in fields or "sec-websocket-protocol" in fields:
        raise HandshakeError(status, "the server chose an extension or subprotocol that was not offered")


def _names(fields: Mapping[str, str], name: str, token: str) -> bool:
    return token in (part.strip(" \t") for part in fields.get(name, "").lower().split(","))


def _accept_value(key: str) -> str:
    from hashlib import sha1  # here: it brings OpenSSL with it, which a gateway without WebSocket clients never needs

    digest = sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return binascii.b2a_base64(digest, newline=False).decode()


def encode(opcode: int, payload: bytes, *, fin: bool = True, mask: bytes | None = None) -> bytes:
    """One frame (5.2); `mask` is four unpredictable bytes at a client and None at a server."""
    size = len(payload)
    first = opcode | 0x80 if fin else opcode
    if mask is None:
        if size < 126:
            return bytes((first, size)) + payload
        if size < 65536:
            return struct.pack("!BBH", first, 126, size) + payload
        return struct.pack("!BBQ", first, 127, size) + payload
    if size < 126:
        return struct.pack("!BB4s", first, size | 0x80, mask) + xor(payload, mask)
    if size < 65536:
        return struct.pack("!BBH4s", first, 126 | 0x80, size, mask) + xor(payload, mask)
    return struct.pack("!BBQ4s", first, 127 | 0x80, size, mask) + xor(payload, mask)


def xor(data: bytes | bytearray, mask: bytes) -> bytes | bytearray:
    """`data` masked with four bytes, or unmasked (5.3)."""
    size = len(data)
    if size < 2048:  # measured: one large integer is quicker below, translation tables above
        pad = (mask * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")
    result = bytearray(data)
    for i in range(4):
        result[i::4] = data[i::4].translate(_xor_table(mask[i]))
    return result


@lru_cache(256)
def _xor_table(byte: int) -> bytes:
    return bytes(xor(_BYTES, bytes((byte,)) * 4))


def close_payload(code: int, reason: str = "") -> bytes:
    """What a close frame says (5.5.1); a reason that is too long is cut between two characters."""
    if code == NO_CODE:
        return b""
    text = reason.encode(errors="replace")[:123]
    return struct.pack("!H", code) + text.decode(errors="ignore").encode()


def parse_close(payload: bytes) -> tuple[int, str]:
    """The code and reason of a close frame, 1005 where it has none (7.1.5); raises WebSocketError."""
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")
    # 7.4.1 and the registry: 1004 to 1006 and 1015 never stand in a frame, 1016 to 2999 are not assigned.
    if len(payload) == 1 or not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise WebSocketError(PROTOCOL_ERROR, "invalid close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError(INVALID_DATA, "the close reason is not UTF-8") from None


def _utf8(data: bytes | bytearray, final: bool) -> tuple[str, int]:
    """The text of `data` and its size in bytes, without a character that has only begun unless `final` (8.1)."""
    try:
        return utf_8_decode(data, "strict", final)
    except UnicodeDecodeError:
        raise WebSocketError(INVALID_DATA, "text is not UTF-8") from None


async def connect(
    host: str,
    port: int,
    target: str = "/",
    *,
    fields: Sequence[tuple[str, str]] = (),
    tls: SSLContext | None = None,
    max_message: int = MAX_MESSAGE,
    on_activity: Callable[[], None] | None = None,
) -> WebSocket:
    """A connection opened as a client (4.1); the deadline is the caller's. Raises HandshakeError, OSError."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    try:
        key = client_key()
        named = f"[{host}]" if ":" in host else host
        lines = [f"{name}: {value}\r\n" for name, value in (("Host", f"{named}:{port}"), *request_fields(key), *fields)]
        writer.write(f"GET {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1"))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise HandshakeError(0, "the server's answer is not HTTP") from None
        check_accept(key, *_parse_answer(head.decode("latin-1")))
    except BaseException:
        writer.transport.abort()
        raise
    return WebSocket(reader, writer, client=True, max_message=max_message, on_activity=on_activity)


def _parse_answer(head: str) -> tuple[int, dict[str, str]]:
    """The status and the fields of the answer to a handshake; several lines of one field joined by ", "."""
    status_line, *lines = head.split("\r\n")
    match = _STATUS_LINE.match(status_line)
    if match is None:
        raise HandshakeError(0, "the server's answer is not HTTP")
    fields: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines if line):
        name, value = name.lower(), value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return int(match[1]), fields


class WebSocket:
    """One open connection. `on_activity` is called for every frame that arrives: its owner keeps the deadline.

    `close_code` and `close_reason` are the peer's once `receive` has returned None (1005: it gave none, 1006: it
    left without a close frame); `sent_code` is the code of our own close frame, None while none was sent.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        client: bool = False,
        max_message: int = MAX_MESSAGE,
        max_buffered: int = MAX_BUFFERED,
        on_activity: Callable[[], None] | None = None,
    ) -> None:
        self.client = client
        self.close_code: int | None = None
        self.close_reason = ""
        self.sent_code: int | None = None
        self._reader, self._writer, self._transport = reader, writer, writer.transport
        self._max_message, self._max_buffered = max_message, max_buffered
        self.on_activity = on_activity
        self._room = max_buffered  # with what large messages of ours take, which a peer may have had no time to read
        self._large = 0  # how many, since it had read nearly all
        self._unread = bytearray()
        self._frames = 0  # read so far
        self._dropper: asyncio.TimerHandle | None = None

    @property
    def closed(self) -> bool:
        """Nothing more can be sent: our close frame went out, or the connection is gone."""
        return self.sent_code is not None or self._transport.is_closing()

    async def receive(self) -> str | bytes | None:
        """The next whole message, text as str; None once the connection has ended, whoever ended it and why.

        Answers pings and the peer's close frame. For one task at a time, and cancelled only to give up the connection.
        """
        if self.close_code is not None:
            return None
        linger = self.client  # 7.1.1: the server ends the TCP connection first
        try:
            while (message := await self._read_message()) is not None:
                if self.sent_code is None:  # 1.4: what comes after our close frame is discarded
                    return message
        except WebSocketError as error:
            self.close(error.close_code, error.reason)
            linger = True  # unread bytes would turn our close frame into a reset
        except (EOFError, OSError):
            linger = False
        await self._end(linger)
        return None

    async def send(self, message: str | bytes) -> None:
        """Send one message and wait while more than the transport wants is buffered; dropped when closed."""
        if self.closed:
            return
        if isinstance(message, str):
            self._transport.write(encode(TEXT, message.encode(), mask=self._mask()))
        else:
            self._transport.write(encode(BINARY, message, mask=self._mask()))
        if self._transport.get_write_buffer_size():
            await self._drain()

    def post(self, text: bytes) -> None:
        """Send one text message, given in UTF-8, at once; a peer that leaves too much unread is closed with 1008."""
        self.send_frame(encode(TEXT, text, mask=self._mask()))

    def send_frame(self, frame: bytes) -> None:
        """Send one frame as `encode` gave it, likewise."""
        if self.closed:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._room:
            self.close(POLICY, "slow consumer")
            return
        if unsent <= self._max_buffered:
            self._room, self._large = self._max_buffered, 0
        if len(frame) > self._max_buffered and self._large < MAX_LARGE:
            self._room = unsent + len(frame) + self._max_buffered
            self._large += 1
        self._transport.write(frame)

    def ping(self) -> None:
        """Ask the peer for a sign of life; its pong is an activity."""
        self.send_frame(encode(PING, b"", mask=self._mask()))

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Send a close frame, once; `receive` waits for the peer's, and after CLOSE_SECONDS the peer is dropped."""
        if self.closed:
            return
        self._transport.write(encode(CLOSE, close_payload(code, reason), mask=self._mask()))
        self.sent_code = code
        self._drop_later()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._transport.abort()

    def _mask(self) -> bytes | None:
        return os.urandom(4) if self.client else None

    def _drop_later(self) -> asyncio.TimerHandle:
        if self._dropper is None:
            self._dropper = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)
        return self._dropper

    async def _drain(self) -> None:
        with suppress(OSError):  # `receive` tells of the end
            await self._writer.drain()

    async def _end(self, linger: bool) -> None:
        dropper = self._drop_later()
        if self.close_code is None:
            self.close_code = ABNORMAL
        with suppress(OSError):
            if linger and not self._transport.is_closing() and self._transport.can_write_eof():
                self._transport.write_eof()
                while await self._reader.read(CHUNK):
                    pass
            self._writer.close()
            await self._writer.wait_closed()
        dropper.cancel()

    async def _fill(self, size: int) -> None:
        """Wait until `size` bytes are unread; raises EOFError."""
        while len(self._unread) < size:
            self._unread += await self._read_some(CHUNK)

    def _take(self, size: int) -> bytearray:
        """`size` unread bytes, or as many as there are."""
        taken = self._unread[:size]
        del self._unread[:size]
        return taken

    async def _read_some(self, size: int) -> bytes:
        """What the stream has, at most `size` bytes; raises EOFError."""
        chunk = await self._reader.read(size)
        if not chunk:
            raise EOFError
        return chunk

    async def _read_message(self) -> str | bytes | None:
        """The next whole message, None for the peer's close frame."""
        kind, message, valid = 0, bytearray(), 0  # of a message in pieces; its first `valid` bytes are UTF-8
        while True:
            first, size, mask = await self._read_header()
            opcode = first & 0x0F
            if opcode >= CLOSE:
                if await self._read_control(opcode, size, mask) == CLOSE:
                    return None
                continue
            if (opcode == CONTINUATION) is (kind == 0):  # 5.4
                raise WebSocketError(PROTOCOL_ERROR, "message not finished" if kind else "nothing to continue")
            if len(message) + size > self._max_message:  # judged by the header, before the bytes are kept
                raise WebSocketError(TOO_BIG, f"message over {self._max_message} bytes")
            kind = kind or opcode
            fin = first >= 0x80
            while True:
                piece = self._take(size) if self._unread or not size else await self._read_some(size)
                message += xor(piece, mask) if mask else piece
                size -= len(piece)
                if kind == TEXT and (size or not fin):  # 8.1: fail at the first wrong byte
                    valid += _utf8(message[valid:], final=False)[1]
                if not size:
                    break
                if mask:
                    mask = mask[len(piece) % 4 :] + mask[: len(piece) % 4]
            if self.on_activity:
                self.on_activity()
            if fin:
                return _utf8(message, final=True)[0] if kind == TEXT else bytes(message)

    async def _read_header(self) -> tuple[int, int, bytes | None]:
        """The first byte, the payload's size and the mask of the next frame (5.2)."""
        self._frames += 1
        if self._frames % AT_ONCE == 0:  # what is there already is read without a wait
            await asyncio.sleep(0)
        unread = self._unread
        if len(unread) < 2:
            await self._fill(2)
        first, second = unread[0], unread[1]
        size = second & 0x7F
        if first not in _FIRST_BYTES:
            raise WebSocketError(PROTOCOL_ERROR, "reserved bit, reserved opcode or fragmented control frame")
        if (second < 0x80) is not self.client:  # 5.1
            raise WebSocketError(PROTOCOL_ERROR, "a client's frame is masked, a server's is not")
        if size > 125 and first & 0x08:  # 5.5
            raise WebSocketError(PROTOCOL_ERROR, "control frame over 125 bytes")
        at = 2 if size < 126 else 4 if size == 126 else 10
        end = at if self.client else at + 4
        if len(unread) < end:
            await self._fill(end)
        if at > 2:
            size = int.from_bytes(unread[2:at], "big")
            if size < (126 if at == 4 else 65536) or size >= 1 << 63:
                raise WebSocketError(PROTOCOL_ERROR, "length not in its shortest form, or over 63 bits")
        mask = None if self.client else bytes(unread[at:end])
        del unread[:end]
        return first, size, mask

    async def _read_control(self, opcode: int, size: int, mask: bytes | None) -> int:
        """Do what a control frame asks (5.5); the opcode again."""
        await self._fill(size)
        taken = self._take(size)
        payload = bytes(xor(taken, mask) if mask else taken)
        if self.on_activity:
            self.on_activity()
        if opcode == CLOSE:
            self.close_code, self.close_reason = parse_close(payload)
            self.close(self.close_code)
        elif opcode == PING and not self.closed:
            self._transport.write(encode(PONG, payload, mask=self._mask()))
            await self._drain()  # a peer that pings and never reads must not fill our memory
        return opcode
