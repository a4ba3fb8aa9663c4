"""TLS on the port: what the contexts refuse, and connections before, in and behind their handshake."""

from __future__ import annotations

import asyncio
import ssl
import struct
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest

import connection
import gateway
import tls
from live import Client, run, serving, until, within


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text("not a certificate", encoding="ascii")
    with pytest.raises(OSError, match=rf"gateway\.tls: {other} and {other} cannot be used \(.+\): name a certificate"):
        tls.server_context(str(other), str(other))
    with pytest.raises(ssl.SSLError):
        tls.client_context(str(other))
    with pytest.raises(FileNotFoundError):
        tls.client_context(str(tmp_path / "missing.pem"))


# The port


def behind(certificate: tuple[Path, Path]) -> dict[str, Any]:
    """The configuration of a port with it."""
    return {"gateway.tls": dict(zip(("cert", "key"), map(str, certificate), strict=True)), "gateway.bind": "loopback"}


def counts() -> bool:
    """Whether connections count before their handshake: asyncio's loop makes them TLS ones when it is asked to."""
    return isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)


def test_a_request_that_comes_with_the_handshake_is_answered(certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))

    async def main() -> None:
        async with serving(behind(certificate)) as hub:
            for minor, times in ((1, 3), (0, 1)):
                reader, writer = await within(asyncio.open_connection("localhost", hub.port, ssl=context))
                for _ in range(times):
                    writer.write(b"GET /healthz HTTP/1.%d\r\nHost: localhost\r\n\r\n" % minor)
                    assert await within(reader.readline()) == b"HTTP/1.1 200 OK\r\n"
                    await within(reader.readuntil(b'{"status":"ok"}'))
                writer.close()
            await until(lambda: not hub.connections)

    run(main())


@pytest.mark.parametrize("how", ["plain", "nonsense", "nothing", "left", "reset"])
def test_what_is_no_handshake_is_let_go(
    how: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "nothing":
        monkeypatch.setattr(gateway, "HEAD_SECONDS", 0.1)
        monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        async with serving(behind(certificate)) as hub, await Client.open(hub.port) as client:
            if counts():
                await until(lambda: len(hub.connections) == 1)
            client.writer.write({"plain": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "nonsense": b"\0" * 99}.get(how, b""))
            if how == "left":
                client.writer.close()
            if how == "reset":
                client.writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                client.writer.transport.abort()
            if how not in ("left", "reset"):
                assert await client.ended()
            await until(lambda: not hub.connections)

    run(main())


def test_connections_count_before_their_handshake(certificate: tuple[Path, Path]) -> None:
    """Each takes 300 KiB in it: who begins many could fill the memory, without a credential."""
    context = ssl.create_default_context(cafile=str(certificate[0]))
    most = 2 + connection.SPARE

    async def main() -> None:
        if not counts():
            pytest.skip("uvloop counts none before its handshake")
        async with serving(behind(certificate) | {"gateway.maxConnections": 2}) as hub:
            first = await Client.open(hub.port)
            others = [await Client.open(hub.port) for _ in range(most - 1)]
            await until(lambda: len(hub.connections) == most)
            async with await Client.open(hub.port) as beyond:
                assert await beyond.ended()
            assert len(hub.connections) == most
            for client in [first, *others]:
                client.writer.close()
            await until(lambda: not hub.connections)
            reader, writer = await within(asyncio.open_connection("localhost", hub.port, ssl=context))
            writer.write(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert await within(reader.readline()) == b"HTTP/1.1 200 OK\r\n"
            writer.close()

    run(main())


def test_going_down_waits_for_no_handshake(certificate: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with serving(behind(certificate)) as hub, await Client.open(hub.port) as client:
            if counts():
                await until(lambda: len(hub.connections) == 1)
            await within(hub.stop(3600))
            if counts():
                assert await client.ended()

    run(main())
