"""nginx and Caddy before the gateway, by the lines of docs/hosting.md; only addresses and files are others."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import ssl
import subprocess
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import chat_answers
import control
import gateway
import rfc6455
from live import CHAT, Client, chat, run, text_of, within
from peer import MAX_MESSAGE, Peer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosting.md"
SITE = "gateway.example.org"
TOKEN = "a-token"  # noqa: S105
AUTH = {"Authorization": f"Bearer {TOKEN}"}
OWN, OTHER = "127.0.0.77", "127.0.0.78"  # two clients' addresses; the proxy's own is 127.0.0.1
MIB = 1024 * 1024
SENT = {"nginx": MIB // 16, "caddy": MIB}  # bytes of a stranger's body until it is refused; Caddy takes it whole

# What stands around the page's lines, so that it runs in a folder, in the foreground, as whoever runs the tests.
AROUND_NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {site}
}}
"""
AROUND_CADDY = """
{{
    admin off
    auto_https disable_redirects
    skip_install_trust
    servers {{
        protocols h1
    }}
}}
{site}
"""


def block(start: str) -> str:
    """The block of the page that starts with this."""
    found = re.findall(r"^    .+(?:\n+    .+)*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (text,) = (textwrap.dedent(text) for text in found if text.strip().startswith(start))
    return text


def replaced(text: str, *pairs: tuple[str, object]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, str(new))
    return text


def nginx(folder: Path, port: int, upstream: int) -> list[str]:
    site = replaced(
        block("# /etc/nginx"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        (f"/etc/ssl/{SITE}", folder / "site"),
        ("127.0.0.1:18789", f"127.0.0.1:{upstream}"),
    )
    (folder / "nginx.conf").write_text(AROUND_NGINX.format(folder=folder, site=site), encoding="utf-8")
    return ["-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]


def caddy(folder: Path, port: int, upstream: int) -> list[str]:
    certificate = f"https://localhost:{port} {{\n    bind 127.0.0.1\n    tls {folder}/site.pem {folder}/site.key"
    site = replaced(block("# /etc/caddy"), (f"{SITE} {{", certificate), ("127.0.0.1:18789", f"127.0.0.1:{upstream}"))
    (folder / "Caddyfile").write_text(AROUND_CADDY.format(site=site), encoding="utf-8")
    return ["run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


PROXIES: dict[str, Callable[[Path, int, int], list[str]]] = {"nginx": nginx, "caddy": caddy}
proxies = pytest.mark.parametrize("name", PROXIES)


class Runs:
    """An agent that a test steps, and what it sees of it."""

    def __init__(self) -> None:
        self.said = asyncio.Event()  # it waits
        self.go = asyncio.Event()  # for this
        self.left = asyncio.Event()  # a run was cut

    async def stepped(self, message: str) -> AsyncIterator[str]:
        try:
            if message != "silent":
                yield "one "
            self.said.set()
            await self.go.wait()
            yield "two"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise


class Front(NamedTuple):
    """A proxy that listens, and what it stands before."""

    hub: gateway.Gateway
    port: int
    tls: ssl.SSLContext
    logged: list[tuple[Any, ...]]  # the access log's lines
    runs: Runs

    @asynccontextmanager
    async def client(self, address: str = OWN) -> AsyncIterator[Client]:
        """A client of this address; fields and answers as the gateway's own are, but what the proxy puts in."""
        connecting = asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls, local_addr=(address, 0))
        reader, writer = await within(connecting)
        client = Client(reader, writer)
        try:
            yield client
        finally:
            writer.transport.abort()  # at once, without TLS's goodbye, as a program that ends leaves
            with suppress(OSError):
                await writer.wait_closed()


def program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")  # not on everyone's path
    if path is None:
        pytest.skip(f"needs {name} (apt-get install {name})")
    return path


def certificate(folder: Path) -> ssl.SSLContext:
    """Make site.pem and site.key, and return a context that trusts them."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {folder}/site.key -out {folder}/site.pem"
    subprocess.run([program("openssl"), *words.split(), *names.split()], check=True, capture_output=True)
    return ssl.create_default_context(cafile=str(folder / "site.pem"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def listens(process: asyncio.subprocess.Process, port: int, errors: Path) -> None:
    """Wait until something listens there, or say what the program said when it ended instead."""
    while True:
        assert process.returncode is None, await asyncio.to_thread(errors.read_text)
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return await writer.wait_closed()


@asynccontextmanager
async def fronted(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]
) -> AsyncIterator[Front]:
    """The gateway by the page's configuration and these changes, and the proxy by the page's before it."""
    path, tls, port = program(name), certificate(folder), free_port()
    monkeypatch.setenv("COPEPOD_GATEWAY_TOKEN", TOKEN)
    (folder / "copepod.json5").write_text(block("{"), encoding="utf-8")
    agents = ("agents.list", '[{"id": "main"}, {"id": "stepped"}]')
    overrides = [("gateway.port", "0"), ("session.store", ":memory:"), agents, *changes]
    config = gateway.load_config(str(folder / "copepod.json5"), os.environ, overrides)
    runs, logged = Runs(), []
    async with gateway.Gateway(config, agents={"stepped": runs.stepped}) as hub:
        hub.access_log = lambda *line: logged.append(line)
        errors, home = folder / "errors", dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(folder))
        with errors.open("wb") as out:
            argv = [path, *PROXIES[name](folder, port, hub.port)]
            process = await asyncio.create_subprocess_exec(*argv, stdout=out, stderr=out, cwd=folder, env=home)
        try:
            await within(listens(process, port, errors))
            yield Front(hub, port, tls, logged, runs)
        finally:
            if process.returncode is None:
                process.terminate()
            await within(process.wait())
            await asyncio.sleep(0)
    assert not hub.runs.active


@proxies
def test_words_come_as_they_are_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front, front.client() as client:
            client.say("hi", AUTH, model="copepod:stepped", stream=True)
            status, fields = await client.head()
            assert (status, fields["content-type"]) == (200, "text/event-stream; charset=utf-8")
            seen = []
            async for event in client.events():
                seen.append(event)
                if "one " in event:
                    front.runs.go.set()
            assert text_of(seen) == "one two"
            assert seen[-1] == "data: [DONE]"
            assert await client.usable()

    run(main())


@proxies
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_run(
    name: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front:
            async with front.client() as client:
                client.say("hi", AUTH, model="copepod:stepped", stream=stream)
                await within(front.runs.said.wait())
            await within(front.runs.left.wait())
            async with front.client() as client:
                assert await client.usable()

    run(main())


@proxies
def test_a_silent_stream_is_heard(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comments come one by one, so that neither end takes it for dead."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(chat_answers, "HOLD_SECONDS", 0.02)
    monkeypatch.setattr(chat_answers, "SILENCE_SECONDS", 0.05)

    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front, front.client() as client:
            client.say("silent", AUTH, model="copepod:stepped", stream=True)
            assert (await client.head())[0] == 200
            seen = []
            async for event in client.events():
                seen.append(event)
                if seen.count(": keep-alive") == 10:
                    front.runs.go.set()
            assert text_of(seen) == "two"

    run(main())


def test_nginx_waits_longer_than_a_run_may_be_silent() -> None:
    (seconds,) = re.findall(r"proxy_read_timeout ([0-9]+)s;", block("# /etc/nginx"))
    config = gateway.load_config(None, {}, [("session.store", ":memory:")])
    assert int(seconds) > max(agent.timeout_seconds for agent in config.agents.values())
    assert int(seconds) > control.TICK_SECONDS


def test_caddy_forgets_a_connection_before_the_gateway_does() -> None:
    (seconds,) = re.findall(r"keepalive ([0-9]+)s", block("# /etc/caddy"))
    assert int(seconds) < gateway.load_config(None, {}, [("session.store", ":memory:")]).keep_alive_seconds


@proxies
def test_websocket(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by a page of the site, through a slow run, until it is closed."""

    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front:
            origin = [("Origin", f"https://{SITE}")]
            opening = rfc6455.connect("localhost", front.port, fields=origin, tls=front.tls, max_message=MAX_MESSAGE)
            peer = Peer(await within(opening))
            await peer.challenge()
            assert (await peer.connect(auth={"token": TOKEN}))["ok"]
            asked = await peer.post("agent", {"message": "hi", "agentId": "stepped", "idempotencyKey": "k"})
            await peer.event("agent", stream="assistant", delta="one ")
            front.runs.go.set()
            await peer.until(lambda frame: frame.get("id") == asked and frame["payload"]["status"] == "ok")
            assert peer.text("k") == "one two"
            peer.websocket.close()
            assert await peer.ended() == (1000, "")
            peer.drop()
            while front.hub.upgraded:
                await asyncio.sleep(0.01)

    run(main())


@proxies
def test_a_websockets_ping_is_answered(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front:
            async with front.client() as client:
                client.send("GET", "/", None, dict(rfc6455.request_fields(rfc6455.client_key())))
                assert (await within(client.reader.readuntil(b"\r\n\r\n"))).startswith(b"HTTP/1.1 101 ")
                client.write(rfc6455.encode(rfc6455.PING, b"still there?", mask=b"mask"))
                await within(client.reader.readuntil(rfc6455.encode(rfc6455.PONG, b"still there?")))
                assert front.hub.upgraded
            while front.hub.upgraded:  # a client that is gone is seen to be
                await asyncio.sleep(0.01)

    run(main())


@proxies
def test_the_client_and_not_the_proxy_is_counted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log and in the count of failures, whatever address a client says that it has."""

    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch, ("gateway.auth.rateLimit.maxAttempts", "2")) as front:

            async def status(address: str, token: str) -> int:
                async with front.client(address) as client:
                    fields = {"Authorization": f"Bearer {token}", "X-Forwarded-For": OTHER}
                    return (await client.ask("POST", CHAT, chat(), fields)).status

            assert [await status(OWN, token) for token in ("wrong", "too", TOKEN)] == [401, 401, 429]
            assert await status(OTHER, TOKEN) == 200
            assert [(line[1], line[4]) for line in front.logged] == [(OWN, 401), (OWN, 401), (OWN, 429), (OTHER, 200)]

    run(main())


@proxies
def test_a_body_that_is_too_long(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by the gateway, not by the proxy; and a stranger's is, whatever it has."""

    async def main() -> None:
        async with fronted(name, tmp_path, monkeypatch) as front:
            async with front.client() as client:
                answer = await client.ask("POST", CHAT, bytes(MIB * 3 // 2), AUTH)
                assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
            async with front.client() as client:
                client.send("POST", CHAT, bytes(SENT[name]), {"Content-Length": str(MIB)})
                answer = await client.answer()
                assert (answer.status, answer.error["type"]) == (401, "authentication_error")

    run(main())


@proxies
def test_without_auth_all_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with (
            fronted(name, tmp_path, monkeypatch, ("gateway.auth.mode", "none")) as front,
            front.client() as client,
        ):
            answer = await client.ask("POST", CHAT, chat())
            assert (answer.status, answer.error["type"]) == (403, "permission_error")
            assert "forward" in answer.error["message"]

    run(main())
