"""The client of the gateway protocol against scripted gateways, and the commands that use it against a real one."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import gateway
import remote
import rfc6455
from live import Serving, run, serving, settings, within
from remote import Address, Remote, RemoteError
from test_program import PROGRAM, finished, program

HELLO = {
    "type": "hello-ok",
    "server": {"version": "9"},
    "snapshot": {"sessionDefaults": {"defaultAgentId": "x"}},
    "policy": {"maxPayload": 1000},
}


class Host:
    """The gateway's side of a connection, as a test plays it."""

    def __init__(self, websocket: rfc6455.WebSocket) -> None:
        self.websocket = websocket
        self.asked: list[dict[str, Any]] = []  # the requests that came

    async def send(self, frame: Any) -> None:
        await self.websocket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def event(self, event: str, **payload: Any) -> None:
        await self.send({"type": "event", "event": event, "payload": payload})

    async def words(self, *words: str, **payload: Any) -> None:
        for word in words:
            run_id = self.asked[1]["params"]["idempotencyKey"]  # asked[0] is connect
            await self.event("agent", **{"runId": run_id, "stream": "assistant", "data": {"delta": word}, **payload})

    async def request(self) -> dict[str, Any]:
        """The next request."""
        message = await self.websocket.receive()
        assert message is not None, "the client has left"
        self.asked.append(json.loads(message))
        return self.asked[-1]

    async def answer(self, payload: Any) -> None:
        await self.send({"type": "res", "id": self.asked[-1]["id"], "ok": True, "payload": payload})

    async def refuse(self, message: str, code: str = "INVALID_REQUEST", **more: Any) -> None:
        error = {"code": code, "message": message, **more}
        await self.send({"type": "res", "id": self.asked[-1]["id"], "ok": False, "error": error})

    async def greet(self) -> None:
        await self.event("connect.challenge", nonce="n", ts=1)
        await self.request()
        await self.answer(HELLO)

    async def left(self) -> None:
        """Wait until the client has gone."""
        while await self.websocket.receive() is not None:
            pass


Script = Callable[[Host], Awaitable[None]]


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    """A port on which `serve` has each connection; what it raises fails the test."""
    tasks: list[asyncio.Task[None]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.get_running_loop().create_task(connected(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
        await within(asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        server.close()


async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the handshake."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    answer = "".join(f"{name}: {value}\r\n" for name, value in rfc6455.accept("GET", fields))
    writer.write(f"HTTP/1.1 101 Switching Protocols\r\n{answer}\r\n".encode())


@asynccontextmanager
async def playing(script: Script) -> AsyncIterator[Address]:
    """The address of a gateway that does what the script says on a connection, and then waits for the client to go."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        host = Host(rfc6455.WebSocket(reader, writer))
        await script(host)
        await host.left()

    async with listening(serve) as port:
        yield Address("127.0.0.1", port, "/", False)


def calling(address: Address, auth: dict[str, str] | None = None, tls: ssl.SSLContext | None = None) -> Remote:
    async def open_(heard: Callable[[], None]) -> rfc6455.WebSocket:
        return await rfc6455.connect(*address[:3], tls=tls, on_activity=heard)

    return Remote(address, open_, rfc6455.HandshakeError, "1.2.3", auth or {})


async def why(there: Remote, use: Callable[[Remote], Awaitable[Any]] | None = None) -> str:
    """The text of the RemoteError that opening fails with, or `use` of it when it is open."""
    try:
        async with there:
            assert use is not None, "it was opened"
            await use(there)
    except RemoteError as error:
        return str(error)
    raise AssertionError("nothing failed")


def error_of(script: Script, use: Callable[[Remote], Awaitable[Any]] | None = None) -> str:
    """Why a call of a scripted gateway fails, its address left out."""

    async def main() -> str:
        async with playing(script) as address:
            return (await why(calling(address), use)).replace(str(address), "ADDRESS")

    return run(main())


@pytest.mark.parametrize(
    ("url", "expected", "said"),
    [
        ("ws://127.0.0.1:18789", ("127.0.0.1", 18789, "/", False), "ws://127.0.0.1:18789"),
        ("http://Host/", ("host", 80, "/", False), "ws://host:80"),
        ("wss://host/a/b?c=d#e", ("host", 443, "/a/b?c=d", True), "wss://host:443"),
        ("https://[::1]:5", ("::1", 5, "/", True), "wss://[::1]:5"),
        ("ws://host:0", ("host", 0, "/", False), "ws://host:0"),
    ],
)
def test_where_an_address_leads(url: str, expected: tuple[Any, ...], said: str) -> None:
    assert remote.parse_url(url) == expected
    assert str(remote.parse_url(url)) == said
    assert remote.parse_url(url).url == said.replace("ws", "http", 1)


@pytest.mark.parametrize(
    ("bind", "tls", "said"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:5"), ("0.0.0.0", True, "https://127.0.0.1:5"),  # noqa: S104
        ("::", False, "http://[::1]:5"), ("192.168.1.2", False, "http://192.168.1.2:5"),
    ],
)  # fmt: skip
def test_where_this_machine_calls(bind: str, tls: bool, said: str) -> None:
    assert remote.local(bind, 5, tls).url == said


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("hi", None, None, None, None), {"message": "hi"}),
        (("hi", "a", "k", None, 2.5), {"message": "hi", "agentId": "a", "sessionKey": "k", "timeout": 2.5}),
        (("hi", None, None, "s", None), {"message": "hi", "sessionId": "s"}),
    ],
)
def test_a_turn_says_what_is_given(args: tuple[Any, ...], expected: dict[str, Any]) -> None:
    assert remote.turn(*args) == expected


@pytest.mark.parametrize(
    "url",
    [
        *("", "host:1", "host", "ftp://host", "ws://", "ws:///x", "ws://u:p@host", "ws://@host", "ws://host:x"),
        *("ws://host:99999", "ws://[::1", "ws://host/a b", "ws://host/\r\n", "ws://höst", "ws://host/\u2028"),
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        remote.parse_url(url)


@pytest.mark.parametrize("auth", [{}, {"token": "t", "password": "t"}])
def test_the_opening(auth: dict[str, str]) -> None:
    host: Host | None = None

    async def script(it: Host) -> None:
        nonlocal host
        host = it
        await it.greet()

    async def main() -> None:
        async with playing(script) as address, calling(address, auth) as there:
            assert there.hello == HELLO
        assert host is not None
        (asked,) = host.asked
        assert (asked["type"], asked["method"]) == ("req", "connect")
        params = asked["params"]
        assert params.pop("auth", {}) == auth
        assert params == {
            "minProtocol": 3,
            "maxProtocol": 3,
            "client": {"id": "copepod", "version": "1.2.3", "platform": sys.platform, "mode": "cli"},
            "role": "operator",
            "scopes": ["operator.admin"],
        }
        assert host.websocket.close_code == 1000  # it left with a word

    run(main())


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"message": "unauthorized: gateway token mismatch"},
        "refuses the token or password (unauthorized: gateway token mismatch): give the right one with --token, or in",
    ),
    (
        {"message": "device identity required", "code": "NOT_PAIRED"},
        "asks for a token or password: give it with --token, or in COPEPOD_GATEWAY_TOKEN",
    ),
    (
        {"message": "protocol mismatch", "details": {"expectedProtocol": 4}},
        "speaks protocol 4, not 3: use the program that came with it",
    ),
    (
        {"message": "too many failed attempts: try again in 7 seconds", "code": "UNAVAILABLE", "retryAfterMs": 7000},
        "refuses: too many failed attempts: try again in 7 seconds",
    ),
    ({"message": None}, "refuses: the gateway refuses, and does not say why"),
]


@pytest.mark.parametrize(("error", "said"), REFUSED, ids=[said[:12] for _, said in REFUSED])
def test_a_refused_opening(error: dict[str, Any], said: str) -> None:
    async def script(host: Host) -> None:
        await host.request()
        await host.refuse(**error)
        host.websocket.close(1008, str(error["message"]))

    assert f"the gateway at ADDRESS {said}" in error_of(script)


async def nothing(host: Host) -> None: ...


async def request_only(host: Host) -> None:
    await host.request()


@pytest.mark.parametrize("script", [nothing, request_only])
def test_no_greeting(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OPEN_SECONDS", 0.2)
    assert error_of(script).startswith("ADDRESS says nothing within 0.2 s: ")


@pytest.mark.parametrize("greets", [True, False])
def test_a_gateway_that_hangs_is_left(greets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its close is answered, or not even its handshake."""
    monkeypatch.setattr(remote, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(remote, "LEAVE_SECONDS", 0.2)
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if greets:
            await upgrade(reader, writer)
        await within(left.wait())

    async def main() -> None:
        async with listening(serve) as port:
            assert "says nothing within 0.2 s: " in await why(calling(Address("127.0.0.1", port, "/", False)))
            left.set()

    run(main())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", " answered 404 instead of opening a WebSocket: give the address"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", " answered 403 instead of opening a WebSocket: gateway.http of its config"),
        (b"HTTP/1.1 503 Unavailable\r\n\r\n", " answered 503 instead of opening a WebSocket: it is full or going down"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "'s answer is not HTTP: give the address of a gateway with --url"),
        (b"", "'s answer is not HTTP: give the address"),
    ],
)
def test_what_is_no_gateway(answer: bytes, said: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async def main() -> str:
        async with listening(serve) as port:
            error = await why(calling(Address("127.0.0.1", port, "/", False)))
        return error.replace(str(port), "PORT")

    assert run(main()).startswith(f"ws://127.0.0.1:PORT: the server{said}")


def test_nobody_listens() -> None:
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            said = f"no gateway answers at ws://127.0.0.1:{port}: start one with `copepod gateway`, or give --url"
            assert await why(calling(Address("127.0.0.1", port, "/", False))) == said

    run(main())


def test_no_tls_where_it_is_asked_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main() -> None:
        async with listening(serve) as port:
            there = calling(Address("127.0.0.1", port, "/", True), tls=ssl.create_default_context())
            assert "does not speak TLS: give a ws:// address" in await why(there)

    run(main())


def test_a_certificate_that_is_not_trusted() -> None:
    async def open_(heard: Callable[[], None]) -> rfc6455.WebSocket:
        error = ssl.SSLCertVerificationError(1, "long words of OpenSSL")
        error.verify_message = "self-signed certificate"
        raise error

    there = Remote(Address("h", 1, "/", True), open_, rfc6455.HandshakeError, "1", {})
    said = "the certificate of wss://h:1 is not trusted (self-signed certificate): it must be that of gateway.tls.cert"
    assert run(why(there)).startswith(said)


def test_a_request_and_what_comes_meanwhile() -> None:
    async def script(host: Host) -> None:
        await host.greet()
        await host.request()
        await host.event("tick", ts=1)
        await host.send({"type": "res", "id": "another", "ok": True, "payload": "not this"})
        await host.send({"type": "of a later version"})
        await host.send(json.dumps({"type": "event", "event": "health"}).encode())  # in a binary frame
        await host.answer({"status": "accepted"})
        await host.answer({"ü": 1})
        assert (await host.request())["params"] == {"text": "?"}  # a lone surrogate is no text
        await host.answer(None)

    async def main() -> None:
        events: list[tuple[str, Any]] = []
        async with playing(script) as address, calling(address) as there:
            assert await there.request("m", {}, on_event=lambda *event: events.append(event)) == {"ü": 1}
            assert events == [("tick", {"ts": 1}), ("health", None)]
            assert await there.request("m", {"text": "\udcff"}) is None
            with pytest.raises(RemoteError, match=r"has 10[0-9]{2} bytes, and the gateway takes 1000 at most"):
                await there.request("m", {"text": "ü" * 500})

    run(main())


Deed = Callable[[Host], Awaitable[None]]


async def closes(host: Host) -> None:
    host.websocket.close(1012, "service restart")


async def closes_without_a_word(host: Host) -> None:
    host.websocket.close(rfc6455.NO_CODE)


async def refuses(host: Host) -> None:
    await host.refuse("unknown method: m")


async def cannot_read(host: Host) -> None:
    await host.send({"type": "res", "id": None, "ok": False, "error": {"message": "invalid request frame"}})


def sending(message: str) -> Deed:
    async def deed(host: Host) -> None:
        await host.send(message)

    return deed


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        (closes, "the connection to ADDRESS was lost (1012 service restart): try again"),
        (closes_without_a_word, "the connection to ADDRESS was lost: try again"),
        (refuses, "unknown method: m"),
        (cannot_read, "invalid request frame"),
        (sending("{"), "ADDRESS does not speak the gateway protocol: give another address with --url"),
        (sending("[1]"), "ADDRESS does not speak the gateway protocol: give another address with --url"),
        (sending("[" * 200_000), "ADDRESS does not speak the gateway protocol: give another address with --url"),
        (nothing, "no answer to m within 0.3 s: wait longer with --timeout"),
    ],
)
def test_how_a_request_fails(deed: Deed, said: str) -> None:
    async def script(host: Host) -> None:
        await host.greet()
        await host.request()
        await deed(host)

    assert error_of(script, lambda there: there.request("m", {}, seconds=0.3 if deed is nothing else 10)) == said


def test_a_silent_gateway_is_lost_and_one_that_pings_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", 1.0)

    async def script(host: Host) -> None:
        await host.greet()
        await host.request()
        for _ in range(12):
            host.websocket.ping()
            await asyncio.sleep(0.1)
        await host.answer("late, and there")
        await host.request()

    async def use(there: Remote) -> None:
        assert await there.request("m", {}) == "late, and there"
        await there.request("m", {})

    assert error_of(script, use) == "ADDRESS has gone silent for 1 s: try again"


def test_a_run() -> None:
    async def script(host: Host) -> None:
        await host.greet()
        asked = await host.request()
        params = asked["params"]
        assert asked["method"] == "agent"
        assert params == {"message": "hi", "deliver": False, "idempotencyKey": params["idempotencyKey"]}
        await host.answer({"runId": params["idempotencyKey"], "status": "accepted"})
        await host.words("of another", runId="another")
        await host.words("a ", "b")
        await host.words("no words", stream="lifecycle")
        await host.words("no text", data={"text": "a b"})
        await host.words("a doing", stream="tool", data={"name": "look", "delta": 1})
        await host.words("no object", stream="tool", data=["x"])
        await host.event("chat", runId=params["idempotencyKey"], state="delta")
        await host.answer({"status": "ok", "n": 1})

    async def main() -> None:
        told: list[tuple[str, Any]] = []
        async with playing(script) as address, calling(address) as there:
            payload = await there.run({"message": "hi"}, lambda *event: told.append(event))
        assert payload == {"status": "ok", "n": 1}
        assert told == [("delta", "a "), ("delta", "b"), ("tool", {"name": "look", "delta": 1})]

    run(main())


@pytest.mark.parametrize(
    ("params", "told", "session"),
    [
        ({}, {}, "agent:x:main"),
        ({"agentId": "beta"}, {}, "agent:beta:main"),
        ({"sessionId": "s"}, {}, "agent:x:session:s"),
        ({"sessionId": "s"}, {"sessionKey": "agent:x:stored"}, "agent:x:stored"),
        ({"agentId": "beta", "sessionKey": "k"}, {}, "k"),
        ({}, {"sessionKey": "agent:y:z"}, "agent:y:z"),
    ],
)
@pytest.mark.parametrize("answered", [True, False])
def test_a_run_that_is_not_wanted_any_more_is_ended(
    params: dict[str, str], told: dict[str, str], session: str, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ABORT_SECONDS", 5 if answered else 0.1)
    asked: dict[str, Any] = {}

    async def script(host: Host) -> None:
        await host.greet()
        run_id = (await host.request())["params"]["idempotencyKey"]
        await host.words("a", **told)
        asked.update(await host.request())
        assert asked["params"].pop("runId") == run_id
        if answered:
            await host.words("b", runId=run_id)
            await host.answer({"ok": True})

    async def main() -> None:
        heard = asyncio.Event()
        async with playing(script) as address:

            async def use() -> None:
                async with calling(address) as there:
                    await there.run(params, lambda *word: heard.set())

            task = asyncio.get_running_loop().create_task(use())
            await within(heard.wait())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await within(task)
        assert (asked["method"], asked["params"]) == ("chat.abort", {"sessionKey": session})

    run(main())


def test_a_run_whose_words_nobody_reads_is_ended() -> None:
    methods: list[str] = []

    async def script(host: Host) -> None:
        await host.greet()
        await host.request()
        await host.words("a")
        methods.append((await host.request())["method"])
        await host.answer({"ok": True})

    def take(kind: str, text: str) -> None:
        raise BrokenPipeError

    async def main() -> None:
        async with playing(script) as address:
            async with calling(address) as there:
                with pytest.raises(BrokenPipeError):
                    await there.run({}, take)

    run(main())
    assert methods == ["chat.abort"]


# --- the commands, as programs, with a real gateway


async def words(message: str) -> AsyncIterator[str]:
    for word in ("first\n", "second ", "", message):
        yield word


async def fails(message: str) -> AsyncIterator[str]:
    yield "half"
    raise RuntimeError("secret of the inside")


async def waits(message: str) -> AsyncIterator[str]:
    yield "begun "
    await asyncio.Event().wait()


AGENTS = {"main": words, "fails": fails, "waits": waits}
QUIET = {"PYTHONASYNCIODEBUG": ""}  # which would have its own words on stderr


async def command(hub: Serving, cwd: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that calls this gateway, run to its end."""
    environ = {"COPEPOD_GATEWAY_PORT": str(hub.port), **QUIET, **environment}
    done = await asyncio.to_thread(finished, *argv, cwd=cwd, **environ)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_commands(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(agents=AGENTS) as hub:
            url = f"http://127.0.0.1:{hub.port}/any/path"
            for argv, status, stdout, stderr in (
                (["agent", "--message", "hi"], 0, "first\nsecond hi\n", ""),
                (["agent", "--message", "hi", "--agent", "MAIN", "--session-id", "s"], 0, "first\nsecond hi\n", ""),
                (["agent", "--message", "hi", "--agent", "fails"], 1, "half\n", "copepod: error: "),
                (["agent", "--message", "hi", "--agent", "ghost"], 1, "", 'unknown agent id "ghost"'),
                (["agent", "--message", "x", "--session-key", "main", "--url", url], 0, "first\nsecond x\n", ""),
                (["agent", "--message", "x", "--agent", "waits", "--timeout", "0.5"], 1, "begun \n", "too long"),
                (["agent", "--message", "x" * 99_000, "--json"], 0, "", ""),
                (["call", "chat.abort", "--params", '{"sessionKey": "main"}'], 0, "", ""),
                (["call", "no.such"], 1, "", "copepod: error: unknown method: no.such\n"),
                (["call", "sessions.list", "--params", '{"x": 1}'], 1, "", "unexpected property 'x'"),
                (["call", "health", "--params", "[]"], 2, "", "--params: must be a JSON object"),
                (["call", "health", "--timeout", "0"], 2, "", "--timeout: must be"),
                (["health", "--url", "nonsense"], 2, "", "--url nonsense: must be an address such as ws://"),
                (["health", "--set", "gateway.port=0"], 2, "", "give --url"),
                (["health", "--url", "ws://127.0.0.1:1"], 1, "", "no gateway answers at ws://127.0.0.1:1: start one"),
                (["health", "--url", f"wss://127.0.0.1:{hub.port}"], 1, "", "does not speak TLS"),
            ):
                done = await command(hub, tmp_path, *argv)
                assert done.returncode == status, (argv, done)
                assert done.stdout == stdout if stdout or status else done.stdout
                assert stderr in done.stderr if stderr else done.stderr == ""
                assert done.stderr.count("\n") == (status != 0)
            run_of = json.dumps({"message": "hi", "idempotencyKey": "k"})
            shown = await command(hub, tmp_path, "call", "agent", "--params", run_of)
            assert json.loads(shown.stdout)["result"]["payloads"][0]["text"] == "first\nsecond hi"
            final = json.loads((await command(hub, tmp_path, "agent", "--message", "hi", "--json")).stdout)
            assert (final["status"], final["result"]["meta"]["aborted"]) == ("ok", False)

    run(main())


def test_health_and_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(agents=AGENTS) as hub:
            for name in ("health", "status"):
                said = await command(hub, tmp_path, name)
                assert (said.returncode, said.stderr) == (0, "")
                for fact in (f"ws://127.0.0.1:{hub.port} is well", f"{gateway.VERSION}, up for 0 h", "main, fails"):
                    assert fact in said.stdout
                payload = json.loads((await command(hub, tmp_path, name, "--json")).stdout)
                called = await command(hub, tmp_path, "call", name, "--params", '{"probe": true}')
                assert payload == json.loads(called.stdout) | {
                    key: payload[key] for key in ("ts", "durationMs", "uptimeMs") if key in payload
                }
            assert "runs      0 active" in said.stdout

    run(main())


@pytest.mark.parametrize("mode", ["token", "password"])
def test_the_secret(mode: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving({"gateway.auth.mode": mode, f"gateway.auth.{mode}": "s3cret"}) as hub:
            variable = f"COPEPOD_GATEWAY_{mode.upper()}"
            mine = f"gateway.auth.{mode}=s3cret"
            for argv, environment, said in (
                (["--token", "s3cret"], {}, ""),
                (["--token", "s3cret"], {variable: "wrong"}, ""),
                ([], {variable: "s3cret"}, ""),
                (["--set", mine], {variable: "wrong"}, ""),
                ([], {}, "asks for a token or password: give it with --token, or in COPEPOD_GATEWAY_TOKEN"),
                (["--token", "wrong"], {}, f"(unauthorized: gateway {mode} mismatch): give the right one with --token"),
                ([], {variable: "wrong"}, "refuses the token or password"),
            ):
                done = await command(hub, tmp_path, "health", *argv, **environment)
                assert done.returncode == (1 if said else 0), done
                assert said in done.stderr
                assert done.stderr.count("\n") == (1 if said else 0)
                assert "s3cret" not in done.stdout + done.stderr

    run(main())


@asynccontextmanager
async def started(
    hub: Serving, cwd: Path, *argv: str, stdin: int = asyncio.subprocess.DEVNULL, stderr: int = -1
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command that calls this gateway, while it runs."""
    environ = {**os.environ, **QUIET, "HOME": str(cwd), "COPEPOD_GATEWAY_PORT": str(hub.port)}
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *argv,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        env=environ,
        cwd=cwd,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await within(process.communicate())
        await asyncio.sleep(0)


async def none_runs(hub: gateway.Gateway) -> None:
    while hub.runs.active:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("way", [["--agent", "waits"], ["--agent", "waits", "--session-id", "s"]])
def test_ctrl_c_ends_the_run(way: list[str], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(agents=AGENTS) as hub:
            async with started(hub, tmp_path, "agent", "--message", "x", *way) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                assert await within(process.stdout.readexactly(6)) == b"begun "
                process.send_signal(signal.SIGINT)
                await within(none_runs(hub))
                assert await within(process.wait()) == 130
                assert (await process.stdout.read(), await process.stderr.read()) == (b"\n", b"")

    run(main())


def test_a_reader_that_leaves_ends_the_run(tmp_path: Path) -> None:
    async def talks(message: str) -> AsyncIterator[str]:
        while True:
            yield "word\n"
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with serving(agents={"main": talks}) as hub:
            environ = {**os.environ, **QUIET, "HOME": str(tmp_path), "COPEPOD_GATEWAY_PORT": str(hub.port)}
            line = f'{" ".join(PROGRAM)} agent --message x | head -1'
            shell = await asyncio.create_subprocess_exec("sh", "-c", line, stdout=-1, stderr=-1, env=environ)
            assert await within(shell.communicate()) == (b"word\n", b"")
            await within(none_runs(hub))
            await asyncio.sleep(0)

    run(main())


def test_a_message_from_stdin(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as hub:
            async with started(hub, tmp_path, "agent", "--message", "-", stdin=asyncio.subprocess.PIPE) as process:
                assert await within(process.communicate("zwei Wörter\n".encode())) == ("zwei Wörter\n".encode(), b"")
                assert process.returncode == 0

    run(main())


def test_a_long_run_shows_life_on_a_terminal(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def slow(message: str) -> AsyncIterator[str]:
        yield "begun"
        await go_on.wait()
        yield " and done"

    async def main() -> None:
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        try:
            async with serving(agents={"main": slow}) as hub:
                async with started(hub, tmp_path, "agent", "--message", "x", stderr=theirs) as process:
                    shown = b""
                    loop, readable = asyncio.get_running_loop(), asyncio.Event()
                    loop.add_reader(ours, readable.set)
                    while b" s]" not in shown:
                        await within(readable.wait())
                        readable.clear()
                        shown += os.read(ours, 1000)
                    go_on.set()
                    output, _ = await within(process.communicate())
                    loop.remove_reader(ours)
                    with suppress(BlockingIOError):
                        shown += os.read(ours, 1000)
                    assert output == b"begun and done\n"
                    assert shown.startswith((b"[2 s]\b\b\b\b\b", b"[3 s]\b\b\b\b\b"))
                    assert shown.endswith(b"     \b\b\b\b\b")
        finally:
            os.close(ours)
            os.close(theirs)

    run(main())


LOOKS = """
async def looks(message):
    yield {"tool": {"name": "look", "at": message}}
    yield "seen"
"""


@pytest.mark.parametrize("way", ["there", "here"])
def test_what_an_agent_does_is_told_on_a_terminal(way: str, tmp_path: Path) -> None:
    (tmp_path / "looking.py").write_text(LOOKS)
    made: dict[str, Any] = {}
    exec(LOOKS, made)  # noqa: S102
    entry = ["models.providers.mine.api=python", "models.providers.mine.entry=looking:looks"]
    local = ["--local", *(word for each in [*entry, "agents.defaults.model=mine/"] for word in ("--set", each))]

    async def main() -> None:
        ours, theirs = pty.openpty()
        try:
            async with serving(agents={"main": made["looks"]}) as hub:
                argv = ["agent", "--message", "sea", *(local if way == "here" else [])]
                async with started(hub, tmp_path, *argv, stderr=theirs) as process:
                    assert (await within(process.communicate()))[0] == b"seen\n"
                    assert os.read(ours, 1000) == b"[name: look, at: sea]\r\n"
        finally:
            os.close(ours)
            os.close(theirs)

    run(main())


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the connection to URL was lost: try again"),
        (signal.SIGTERM, "The gateway is going down."),
    ],
)
def test_a_gateway_that_goes_down_in_the_middle(number: signal.Signals, said: str, tmp_path: Path) -> None:
    code = "import asyncio\nasync def reply(message):\n    yield 'begun '\n    await asyncio.Event().wait()\n"
    (tmp_path / "slow.py").write_text(code)
    (tmp_path / "client").mkdir()
    slow = {"models.providers.s": {"api": "python", "entry": "slow:reply"}, "agents.defaults.model": "s/x"}

    async def main() -> None:
        async with program(settings({**slow, "gateway.drainSeconds": 0.1}), tmp_path) as host:
            async with started(host, tmp_path / "client", "agent", "--message", "x") as process:
                assert process.stdout is not None
                assert await within(process.stdout.readexactly(6)) == b"begun "
                host.process.send_signal(number)
                output, error = await within(process.communicate())
                assert (process.returncode, output) == (1, b"\n")
                assert error.decode().replace(f"ws://127.0.0.1:{host.port}", "URL") == f"copepod: error: {said}\n"
            await host.ended()

    run(main())


def test_over_tls(tmp_path: Path) -> None:
    """Our own certificate is trusted where the address is the configuration's, and nowhere else."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    for name in ("mine", "other"):
        make = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"]
        make += ["/CN=somewhere.else", "-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run(make, check=True, capture_output=True)

    def tls(name: str) -> list[str]:
        return ["--set", f"gateway.tls.cert={tmp_path}/{name}.pem", "--set", f"gateway.tls.key={tmp_path}/{name}.key"]

    async def main() -> None:
        files = {"gateway.tls.cert": f"{tmp_path}/mine.pem", "gateway.tls.key": f"{tmp_path}/mine.key"}
        async with serving(files) as hub:
            url = ["--url", f"wss://localhost:{hub.port}"]
            mine = {"SSL_CERT_FILE": f"{tmp_path}/mine.pem"}
            for argv, environment, said in (
                (tls("mine"), {}, ""),
                (tls("other"), {}, " is not trusted ("),
                (url, {}, " is not trusted ("),
                ([*tls("mine"), *url], {}, " is not trusted ("),
                (url, mine, "localhost"),  # it is of another name
                ([], {}, "the server's answer is not HTTP"),
            ):
                done = await command(hub, tmp_path, "agent", "--message", "hi", *argv, **environment)
                assert (done.returncode, done.stdout) == ((1, "") if said else (0, "hi\n")), done
                assert said in done.stderr
                assert done.stderr.count("\n") == (1 if said else 0)

    run(main())


@pytest.mark.parametrize(
    ("url", "token", "sent"),
    [
        (None, None, {"token": "sesame"}),
        ("ws://127.0.0.1:18789/any", None, {"token": "sesame"}),
        ("ws://127.0.0.1:18790", None, {}),
        ("ws://example.com:18789", None, {}),
        ("ws://example.com:18789", "theirs", {"token": "theirs", "password": "theirs"}),
    ],
)
def test_the_configured_secret_is_for_the_configured_gateway(
    url: str | None, token: str | None, sent: dict[str, str]
) -> None:
    own = remote.local("127.0.0.1", 18789, False)
    address, secrets = remote.chosen(own, {"token": "sesame"}, url, token)
    assert secrets == sent
    assert address == (own if url is None else remote.parse_url(url))
