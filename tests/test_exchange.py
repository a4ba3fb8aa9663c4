"""The parts of an event stream: none waits longer than a turn of the loop, many of one turn are one write."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import exchange
import http1

BLOCK = b"Host: a\r\n"


class Connection:
    """What an exchange sees of a connection; `turn` ends a turn of the loop."""

    def __init__(self) -> None:
        self.peer, self.full = "127.0.0.1", False
        self.written: list[bytes] = []
        self._soon: list[Callable[[], Any]] = []

    def write(self, data: bytes) -> bool:
        self.written.append(data)
        return self.full

    def soon(self, callback: Callable[[], Any]) -> None:
        self._soon.append(callback)

    def turn(self) -> None:
        callbacks, self._soon = self._soon, []
        for callback in callbacks:
            callback()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(exchange, "now", lambda: clock.at)
    return clock


def begun(minor: int = 1) -> tuple[Connection, exchange.Exchange, exchange.Stream]:
    connection = Connection()
    x = exchange.Exchange(connection, http1)
    x.request = http1.parse_head(("POST", "/", minor), BLOCK)
    x.read = True
    return connection, x, exchange.Stream(x)


def test_the_first_part_goes_out_at_once_with_the_head(clock: SimpleNamespace) -> None:
    connection, x, stream = begun()
    assert not stream.send(b"one")
    head, _, body = connection.written[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nTransfer-Encoding: chunked" in head
    assert (body, x.status, x.sent) == (b"3\r\none\r\n", 200, 3)
    connection.turn()
    assert len(connection.written) == 1


def test_parts_of_one_turn_are_one_write_and_each_a_chunk(clock: SimpleNamespace) -> None:
    connection, x, stream = begun()
    for part in (b"a", b"b", b"c"):
        stream.send(part)
    assert len(connection.written) == 1
    connection.turn()
    assert connection.written[1:] == [b"1\r\nb\r\n1\r\nc\r\n"]
    stream.send(b"d")  # the next turn's
    connection.turn()
    assert connection.written[2:] == [b"1\r\nd\r\n"]
    assert x.sent == 4


def test_a_part_that_comes_later_goes_out_at_once_behind_what_waits(clock: SimpleNamespace) -> None:
    connection, _, stream = begun()
    stream.send(b"a")
    stream.send(b"b")
    clock.at += exchange.JOIN_SECONDS  # the agent keeps the loop: its turn does not end
    stream.send(b"c")
    assert connection.written[1:] == [b"1\r\nb\r\n1\r\nc\r\n"]
    connection.turn()
    assert len(connection.written) == 2


def test_what_waits_has_a_bound(clock: SimpleNamespace) -> None:
    connection, _, stream = begun()
    stream.send(b"a")
    part = b"x" * 1000
    sent = 0
    while len(connection.written) == 1:
        stream.send(part)
        sent += len(http1.chunk(part))
    assert exchange.JOIN_BYTES <= sent < exchange.JOIN_BYTES + len(http1.chunk(part))
    assert len(connection.written[1]) == sent


def test_the_last_part_takes_all_with_it(clock: SimpleNamespace) -> None:
    connection, x, stream = begun()
    stream.send(b"a")
    stream.send(b"b")
    stream.send(b"c", last=True)
    assert connection.written[1:] == [b"1\r\nb\r\n1\r\nc\r\n0\r\n\r\n"]
    connection.turn()
    assert len(connection.written) == 2
    assert not x.close


def test_a_full_connection_is_told_of_with_each_part(clock: SimpleNamespace) -> None:
    connection, _, stream = begun()
    assert not stream.send(b"a")
    connection.full = True
    assert stream.send(b"waits for the turn")
    clock.at += 1
    assert stream.send(b"goes at once")


def test_http_1_0_has_no_chunks_and_ends_with_the_connection(clock: SimpleNamespace) -> None:
    connection, x, stream = begun(minor=0)
    stream.send(b"a")
    stream.send(b"b", last=True)
    head, _, body = b"".join(connection.written).partition(b"\r\n\r\n")
    assert body == b"ab"
    assert b"Transfer-Encoding" not in head
    assert b"\r\nConnection: close" in head
    assert x.close
