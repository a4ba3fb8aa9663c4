"""Any bytes on a WebSocket, in any pieces: messages, and then a close code (RFC 6455)."""

from __future__ import annotations

from functools import partial

import pytest
from by_hand import MAX_MESSAGE, Outcome, any_split, messages
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, mutated, tries

import rfc6455
from rfc6455 import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, encode

CODES = {1000, 1001, 1002, 1003, 1005, 1006, 1007, 1009}
PAYLOADS = [b"", b"hi", "né€😀".encode(), b"\xff", b"\xc3", b"\xa9", b"\xed\xa0\x80", b"x" * 126, b"x" * 301]
CLOSES = [b"", b"\x03\xe8", b"\x03\xe9bye", b"\x03", b"\x03\xed", b"\x0f\xa0\xff", b"\xff\xff"]
TOKENS = [b"\x81\x80abcd", b"\x01\x80abcd", b"\x80\x80abcd", b"\x89\x80\0\0\0\0", b"\xff", b"\x00", b"\x7e", b"\x7f"]
masks = st.binary(min_size=4, max_size=4)
parts = st.tuples(st.sampled_from([TEXT, TEXT, BINARY, CONTINUATION]), st.sampled_from(PAYLOADS), st.booleans())
controls = st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=8), st.just(True))
closes = st.tuples(st.just(CLOSE), st.sampled_from(CLOSES), st.just(True))
odd = st.tuples(st.integers(0, 15), st.binary(max_size=MAX_MESSAGE), st.booleans())


def frames(client: bool) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda frame, mask: encode(frame[0], frame[1], fin=frame[2], mask=mask),
        st.integers(0, 9).flatmap(lambda n: (odd, closes, controls, controls)[n] if n < 4 else parts),
        st.none() if client else masks,
    )


near = st.booleans().flatmap(lambda client: st.tuples(mutated(frames(client), TOKENS), st.just(client)))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def closed(seen: Outcome) -> None:
    *read, (code, reason, sent_code, _) = seen
    assert all(isinstance(message, str | bytes) and len(message) <= MAX_MESSAGE for message in read)
    assert code in CODES or 1007 <= code <= 1014 or 3000 <= code <= 4999
    assert isinstance(reason, str)
    assert sent_code in {None, code, 1002, 1007, 1009}


def naive(data: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


@given(st.binary(max_size=200), SIZES, st.booleans())
def test_any_bytes(data: bytes, sizes: list[int], client: bool) -> None:
    closed(any_split(partial(messages, client=client), data, sizes))


@tries(700)
@given(near, SIZES)
def test_nearly_frames(near: tuple[bytes, bool], sizes: list[int]) -> None:
    data, client = near
    closed(any_split(partial(messages, client=client), data, sizes))


@tries(300)
@given(st.lists(texts | st.binary(max_size=MAX_MESSAGE), max_size=4), SIZES, SIZES, st.booleans(), st.data())
def test_messages_are_received_as_they_were_sent(
    sent: list[str | bytes], fragments: list[int], sizes: list[int], client: bool, data: st.DataObject
) -> None:
    """In any fragments, with pings and pongs between them, masked and not."""
    wire, pongs = b"", b""
    for message in sent:
        payload = message.encode() if isinstance(message, str) else message
        opcode = TEXT if isinstance(message, str) else BINARY
        at, fin = 0, False
        while not fin:
            mask = None if client else data.draw(masks)
            control = data.draw(st.sampled_from([None, None, PING, PONG]))
            if control is not None:
                said = data.draw(st.binary(max_size=8))
                wire += encode(control, said, mask=mask)
                pongs += encode(PONG, said) if control == PING else b""
            size = data.draw(st.sampled_from([len(payload), *fragments]))
            fin = at + size >= len(payload)
            wire += encode(opcode, payload[at : at + size], fin=fin, mask=mask)
            at, opcode = at + size, CONTINUATION
    wire += encode(CLOSE, rfc6455.close_payload(1001, "bye"), mask=None if client else b"mask")
    *seen, end = any_split(partial(messages, client=client), wire, sizes)
    assert seen == sent
    assert end == (1001, "bye", 1001, b"" if client else pongs + encode(CLOSE, rfc6455.close_payload(1001)))


FORBIDDEN = {  # what fails a connection behind any messages, and with which code
    "a message inside of another": (encode(TEXT, b"a", fin=False) + encode(TEXT, b"b"), 1002),
    "nothing to continue": (encode(CONTINUATION, b"a"), 1002),
    "a ping in fragments": (encode(PING, b"", fin=False), 1002),
    "a long ping": (encode(PING, bytes(126)), 1002),
    "a reserved bit": (b"\xc1\0", 1002),
    "a reserved opcode": (encode(3, b""), 1002),
    "a long length for a short one": (b"\x82\x7e\0\x05hello", 1002),
    "a length of 64 bits": (b"\x82\x7f" + b"\xff" * 8, 1002),
    "no UTF-8": (encode(TEXT, b"\xc3\x28"), 1007),
    "half a character": (encode(TEXT, b"\xc3", fin=False) + encode(CONTINUATION, b""), 1007),
    "a surrogate": (encode(TEXT, b"\xed\xa0\x80"), 1007),
    "too much": (encode(BINARY, bytes(MAX_MESSAGE), fin=False) + encode(CONTINUATION, b"a"), 1009),
    "a mask of a server": (encode(BINARY, b"a", mask=b"mask"), 1002),
}


@given(st.lists(texts, max_size=2), st.sampled_from(sorted(FORBIDDEN)), st.binary(max_size=20), SIZES)
def test_what_is_forbidden_fails_the_connection(sent: list[str], what: str, rest: bytes, sizes: list[int]) -> None:
    wrong, code = FORBIDDEN[what]
    wire = b"".join(encode(TEXT, message.encode()) for message in sent) + wrong + rest
    *seen, (_, _, sent_code, _) = any_split(partial(messages, client=True), wire, sizes)
    assert (seen, sent_code) == (sent, code)


@given(st.binary(max_size=100) | st.integers(2000, 2100).map(lambda size: bytes(range(256)) * 9 + bytes(size)), masks)
def test_xor(data: bytes, mask: bytes) -> None:
    masked = rfc6455.xor(data, mask)
    assert masked == naive(data, mask)
    assert rfc6455.xor(masked, mask) == data
    assert rfc6455.xor(bytearray(data), mask) == masked


@given(st.integers(0, 5000), st.text(max_size=140))
def test_a_close_frame_says_what_was_meant(code: int, reason: str) -> None:
    payload = rfc6455.close_payload(code, reason)
    assert len(payload) <= 125
    if code == rfc6455.NO_CODE:
        assert rfc6455.parse_close(payload) == (code, "")
    elif 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999:
        told = rfc6455.parse_close(payload)[1]
        assert reason.encode(errors="replace").decode().startswith(told)
    else:
        with pytest.raises(rfc6455.WebSocketError):
            rfc6455.parse_close(payload)


HANDSHAKE = {
    "connection": ["Upgrade", "keep-alive, upgrade", "close"],
    "upgrade": ["websocket", "h2c, WebSocket", ""],
    "sec-websocket-key": ["dGhlIHNhbXBsZSBub25jZQ==", "AAAA"],
    "sec-websocket-version": ["13", "8"],
    "content-length": ["0", "5"],
    "transfer-encoding": ["chunked"],
}
handshakes = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) | st.text(max_size=9) for name, values in HANDSHAKE.items()}
)


@given(st.sampled_from(["GET", "POST"]), handshakes)
def test_any_handshake_is_accepted_or_refused(method: str, fields: dict[str, str]) -> None:
    try:
        rfc6455.accept(method, fields)
    except rfc6455.HandshakeError as e:
        refused = e
    else:
        return
    assert refused.status in {400, 405, 426}
    assert refused.message
