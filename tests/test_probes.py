"""What is found where a provider points: model servers that list, refuse, hang; programs that are there or not."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import probes
from gateway import DIALECTS
from probes import Finding, probe, probe_all, shared

KEY = "sk-very-secret-key"
BASE = {"baseUrl": "http://model.example/v1/", "apiKey": KEY, "headers": {}}
LIST = json.dumps({"object": "list", "data": [{"id": "llama3.2:latest"}, {"id": "models/gem"}, {"id": "a/b"}]})
THERE = Finding(True, "reachable", ())
UNLISTED = Finding(True, "reachable, without a list of its models", ())
NOT = "not reachable: "
ERRORS = {  # what the connection ends with, and what is told
    socket.gaierror(-2, "secret.example"): f"{NOT}there is no host of this name",
    ConnectionRefusedError(111, "refused"): f"{NOT}nothing listens there",
    OSError("Multiple exceptions: [Errno 111] Connect call failed"): f"{NOT}nothing listens there",
    ConnectionResetError("reset"): f"{NOT}the connection broke, or what answers is no HTTP server",
    ssl.SSLCertVerificationError("self-signed"): f"{NOT}its certificate could not be verified",
    ValueError("not an http or https URL"): f"{NOT}its address is none",
}


class Server:
    """A model server that answers each request with this status and body, or raises this error."""

    def __init__(self, status: int = 200, body: str | Exception = LIST) -> None:
        self.status, self.body = status, body
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.open = 0

    async def request(self, method, url, fields, body):
        assert body == b""
        self.asked.append((method, url, dict(fields)))
        if isinstance(self.body, Exception):
            raise self.body
        self.open += 1
        return self

    async def read(self, limit):
        return self.body.encode()

    def close(self):
        self.open -= 1


def found(server, models=(), api="openai-completions", options=BASE):
    finding = asyncio.run(probe(DIALECTS, api, options, models, server.request))
    assert server.open == 0
    assert KEY not in finding.what
    return finding


@pytest.mark.parametrize(
    ("status", "body", "models", "expected"),
    [
        (200, LIST, (), THERE),
        (200, LIST, ("llama3.2", "llama3.2:latest", "gem", "a/b", ""), THERE),
        (200, LIST, ("qwen", "b", "qwen"), Finding(True, "reachable, but it lists no qwen, b", ("qwen", "b"))),
        (200, '{"data": [{"id": "x"}], "has_more": true}', ("y",), UNLISTED),
        (200, '{"data": []}', ("y",), Finding(True, "reachable, but it lists no y", ("y",))),
        *((200, body, ("y",), UNLISTED) for body in ("", "<html>", "[]", "{}", '{"data": [3]}', '{"data": null}')),
        (200, '{"data": [{"id": 3}]}', ("y",), Finding(True, "reachable, but it lists no y", ("y",))),
        (200, "[" * 100_000, ("y",), UNLISTED),
        (401, LIST, ("y",), Finding(False, "refuses the gateway's key", ())),
        (403, LIST, ("y",), UNLISTED),
        (404, "", ("y",), UNLISTED),
        (302, "", ("y",), Finding(False, "answers with a redirect, which is never followed", ())),
        (503, "", ("y",), Finding(False, "fails with status 503", ())),
    ],
)
def test_what_a_server_says(status, body, models, expected):
    assert found(Server(status, body), models) == expected


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_server_that_is_not_there(error):
    assert found(Server(body=error)) == Finding(False, ERRORS[error], ())


def test_a_server_that_says_nothing_has_its_time():
    async def request(*args):
        await asyncio.get_running_loop().create_future()

    finding = asyncio.run(probe(DIALECTS, "openai-completions", BASE, (), request, seconds=0.01))
    assert finding == Finding(False, "gives no answer within 0.01 seconds", ())


@pytest.mark.parametrize(
    ("api", "options", "url", "fields"),
    [
        ("openai-completions", BASE, "http://model.example/v1/models", {"authorization": f"Bearer {KEY}"}),
        ("openai-completions", {"baseUrl": "http://h/v1"}, "http://h/v1/models", {}),
        (
            "openai-completions",
            {"baseUrl": "http://h/v1", "apiKey": "k", "headers": {"Authorization": "Basic x"}},
            "http://h/v1/models",
            {"authorization": "Basic x"},
        ),
        (
            "anthropic-messages",
            {"baseUrl": None, "apiKey": KEY},
            "https://api.anthropic.com/v1/models?limit=1000",
            {"anthropic-version": "2023-06-01", "x-api-key": KEY},
        ),
        (
            "anthropic-messages",
            {"baseUrl": "http://h/v1"},
            "http://h/v1/models?limit=1000",
            {"anthropic-version": "2023-06-01"},
        ),
    ],
)
def test_how_a_server_is_asked(api, options, url, fields):
    server = Server()
    assert found(server, api=api, options=options) == THERE
    assert server.asked == [("GET", url, {"accept": "application/json", "user-agent": "copepod"} | fields)]


def test_programs(tmp_path):
    command = {"command": sys.executable, "cwd": None, "env": {}}
    (tmp_path / "plain").write_text("")
    (tmp_path / "tool").write_text("")
    (tmp_path / "tool").chmod(0o755)
    gone, folder = "its program is not found, or not executable", "its folder (cwd) is not there"
    for options, expected in (
        (command, Finding(True, "its program is there", ())),
        (command | {"command": "no-such-program"}, Finding(False, gone, ())),
        (command | {"command": str(tmp_path / "plain")}, Finding(False, gone, ())),
        (command | {"command": "tool"}, Finding(False, gone, ())),
        (command | {"command": "tool", "env": {"PATH": str(tmp_path)}}, Finding(True, "its program is there", ())),
        (command | {"cwd": str(tmp_path / "gone")}, Finding(False, folder, ())),
    ):
        assert asyncio.run(probe(DIALECTS, "command", options, ("x",), Server().request)) == expected, options


@pytest.mark.parametrize("api", ["echo", "python"])
def test_what_is_part_of_the_gateway_is_there(api):
    server = Server()
    assert found(server, api=api, options={}) == Finding(True, "part of the gateway", ())
    assert not server.asked


class Provider(NamedTuple):
    api: str
    options: dict[str, Any]


def test_all_are_asked_at_once():
    """One that hangs keeps nobody waiting but itself, and then not for long."""
    providers = {
        "hangs": Provider("openai-completions", {"baseUrl": "http://hangs/v1"}),
        "there": Provider("openai-completions", {"baseUrl": "http://there/v1"}),
        "echo": Provider("echo", {}),
        "unused": Provider("command", {"command": "no-such-program"}),
    }
    models = ["there/a/b", "hangs/x", "there/qwen", "echo/", "gone/x", "there/a/b"]

    async def main():
        server, asked = Server(), asyncio.Event()

        async def request(method, url, fields, body):
            if "hangs" not in url:
                asked.set()
                return await server.request(method, url, fields, body)
            await asked.wait()
            return await asyncio.get_running_loop().create_future()

        async with asyncio.timeout(10):
            return await probe_all(DIALECTS, providers, models, request, seconds=0.05)

    assert asyncio.run(main()) == {
        "there": Finding(True, "reachable, but it lists no qwen", ("qwen",)),
        "hangs": Finding(False, "gives no answer within 0.05 seconds", ()),
        "echo": Finding(True, "part of the gateway", ()),
        "gone": Finding(False, "not configured", ()),
    }


def test_of_many_who_ask_a_provider_sees_one(monkeypatch):
    """One who leaves keeps nobody from an answer, and what is old is not told."""
    looks, clock = [], [1.0]
    monkeypatch.setattr(probes, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def main():
        go = asyncio.Event()

        async def look():
            looks.append(None)
            await go.wait()
            return {"up": THERE}

        ask = shared(look)
        asked = [asyncio.create_task(ask()) for _ in range(9)]
        while not looks:
            await asyncio.sleep(0)
        asked[0].cancel()
        go.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [asyncio.CancelledError, *[dict] * 8]
        assert len(looks) == 2
        clock[0] += probes.FRESH_SECONDS
        assert await ask() == {"up": THERE}
        assert len(looks) == 3

    asyncio.run(main())
