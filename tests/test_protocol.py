"""The gateway protocol as a client meets it: opening, requests that are refused, every method, events of all runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import control
import gateway
import rfc6455
from live import BOUND, KEY, Client, ask, data_of, run, serving, stream, text_of, within
from peer import CLIENT, PASSWORD, SESAME, SMALL, TOKEN, Peer, connected, opened, params_of
from upstream import Upstream, answers, says

ADMIN = ["operator.admin"]
READ = ["operator.read"]
DEVICE = {"id": "0" * 64, "publicKey": "A" * 43, "signature": "A" * 86, "signedAt": 1795217461347, "nonce": "n"}
BETA = {"agents.list": [{"id": "main", "default": True}, {"id": "beta", "name": "Beta"}]}
BEARER = {"Authorization": f"Bearer {SESAME}"}
TOO_BIG = 512 * 1024 + 1
HERE = Path(__file__).parent.parent
MAIN = "agent:main:main"
DESK = "agent:main:desk"
LANE = 32  # that wait behind the running one of a session


class Told:
    """An agent that says what it is told to, when it is told to; None ends a turn."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []
        self.words: asyncio.Queue[str | None] = asyncio.Queue()
        self.began: asyncio.Queue[None] = asyncio.Queue()
        self.left: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, message: str, turn: dict[str, Any]) -> AsyncIterator[str]:
        self.turns.append(turn)
        self.began.put_nowait(None)
        try:
            while (word := await self.words.get()) is not None:
                yield word
        finally:
            self.left.put_nowait(None)

    def say(self, *words: str | None) -> None:
        for word in words:
            self.words.put_nowait(word)

    @property
    def messages(self) -> list[str]:
        return [turn["message"] for turn in self.turns]


async def parrot(message: str) -> AsyncIterator[str]:
    """Says the message, word by word."""
    for word in re.findall(r"\S+\s*", message):
        yield word


async def broken(message: str) -> AsyncIterator[str]:
    raise RuntimeError("a word of the inside")
    yield ""


def is_time(value: Any) -> bool:
    """Whether it is a moment of these minutes, in milliseconds."""
    return isinstance(value, int) and abs(value / 1000 - time.time()) < 120


# Opening

UNAUTHORIZED = ("INVALID_REQUEST", "unauthorized: gateway token mismatch", 1008)
NOT_PAIRED = ("NOT_PAIRED", "device identity required", 1008)
MISMATCH = ("INVALID_REQUEST", "protocol mismatch", 1002)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str, int]]] = [
    (TOKEN, {"auth": {"token": "wrong"}}, UNAUTHORIZED),
    (TOKEN, {"auth": {"token": SESAME + " "}}, UNAUTHORIZED),
    (TOKEN, {"auth": {"token": "\u00e9"}}, UNAUTHORIZED),
    (TOKEN, {"auth": {"token": "wrong"}, "device": DEVICE}, UNAUTHORIZED),
    (
        PASSWORD,
        {"auth": {"password": "wrong"}},
        ("INVALID_REQUEST", "unauthorized: gateway password mismatch", 1008),
    ),
    (TOKEN, {}, NOT_PAIRED),
    (TOKEN, {"auth": {}}, NOT_PAIRED),
    (TOKEN, {"device": DEVICE}, NOT_PAIRED),
    (PASSWORD, {}, NOT_PAIRED),
    (PASSWORD, {"device": DEVICE}, NOT_PAIRED),
    ({}, {"minProtocol": 1, "maxProtocol": 2}, MISMATCH),
    ({}, {"minProtocol": 4, "maxProtocol": 9}, MISMATCH),
    (TOKEN, {"minProtocol": 1, "maxProtocol": 1, "auth": {"token": SESAME}}, MISMATCH),
]


@pytest.mark.parametrize(("changes", "params", "expected"), REFUSED)
def test_refused(changes: dict[str, Any], params: dict[str, Any], expected: tuple[str, str, int]) -> None:
    async def main() -> None:
        code, message, close = expected
        async with serving(changes) as hub, opened(hub) as peer:
            await peer.challenge()
            frame = await peer.connect(**params)
            assert not frame["ok"]
            error = frame["error"]
            assert error["code"] == code
            assert error["message"].startswith(message)
            assert error.get("details") == ({"expectedProtocol": 3} if close == 1002 else None)
            assert await peer.closed() == (close, error["message"])

    run(main())


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLIENT.items() if key != name}


INVALID: list[tuple[dict[str, Any], str]] = [  # params of `connect` -> what is said of them
    ({"bogus": 1}, "at root: unexpected property 'bogus'"),
    ({"client": {**CLIENT, "bogus": 1}}, "at /client: unexpected property 'bogus'"),
    ({"auth": {"bogus": 1}}, "at /auth: unexpected property 'bogus'"),
    ({"device": {**DEVICE, "bogus": 1}}, "at /device: unexpected property 'bogus'"),
    ({"\u00e9" * 200: 1}, "at root: unexpected property '\u00e9"),
    ({"client": None}, "must have required property 'client'"),
    ({"minProtocol": None}, "must have required property 'minProtocol'"),
    ({"maxProtocol": None}, "must have required property 'maxProtocol'"),
    ({"minProtocol": None, "maxProtocol": None}, "'minProtocol'; must have required property 'maxProtocol'"),
    *(({"client": without(name)}, f"must have required property '{name}'") for name in CLIENT),
    ({"client": {**CLIENT, "id": ""}}, "at /client/id: "),
    ({"client": {**CLIENT, "id": "x" * 65}}, "at /client/id: "),
    ({"client": {**CLIENT, "id": "a\nb"}}, "at /client/id: "),
    ({"client": {**CLIENT, "id": 5}}, "at /client/id: "),
    ({"client": {**CLIENT, "version": 5}}, "at /client/version: "),
    ({"client": {**CLIENT, "mode": ["x"]}}, "at /client/mode: "),
    ({"client": {**CLIENT, "instanceId": 5}}, "at /client/instanceId: "),
    ({"client": "x"}, "at /client: "),
    ({"minProtocol": "3"}, "at /minProtocol: "),
    ({"minProtocol": 0}, "at /minProtocol: "),
    ({"maxProtocol": 3.5}, "at /maxProtocol: "),
    ({"maxProtocol": True}, "at /maxProtocol: "),
    ({"auth": "x"}, "at /auth: "),
    ({"auth": {"token": 5}}, "at /auth/token: "),
    ({"device": "x"}, "at /device: "),
    ({"device": {"id": "x"}}, "must have required property 'publicKey'"),
    ({"role": 5}, "at /role: "),
    ({"scopes": "operator.admin"}, "at /scopes: "),
    ({"scopes": [5]}, "at /scopes"),
    ({"caps": {}}, "at /caps: "),
    ({"locale": 5}, "at /locale: "),
]


@pytest.mark.parametrize(("params", "said"), INVALID)
def test_invalid_connect_params(params: dict[str, Any], said: str) -> None:
    async def main() -> None:
        async with serving() as hub, opened(hub) as peer:
            await peer.challenge()
            error = (await peer.connect(**params))["error"]
            assert error["code"] == "INVALID_REQUEST"
            assert error["message"].startswith("invalid connect params: ")
            assert said in error["message"]
            code, reason = await peer.closed()
            assert code == 1008
            assert error["message"].startswith(reason.removesuffix("..."))  # a reason has 123 bytes at most
            assert len(reason.encode()) > 100 or reason == error["message"]

    run(main())


@pytest.mark.parametrize("params", [None, [], "x", 5, {}])
def test_connect_without_params(params: Any) -> None:
    async def main() -> None:
        async with serving() as hub, opened(hub) as peer:
            await peer.challenge()
            error = (await peer.request("connect", params))["error"]
            assert error["code"] == "INVALID_REQUEST"
            assert error["message"].startswith("invalid connect params: ")
            assert (await peer.closed())[0] == 1008

    run(main())


FIRST_FRAMES: list[tuple[Any, int, str]] = [  # what comes instead of `connect` -> close
    ("no json", 1008, "invalid request frame"),
    ("", 1008, "invalid request frame"),
    (b"\xff\xfe", 1008, "invalid request frame"),
    ("[" * 100_000, 1008, "invalid request frame"),
    ([], 1008, "invalid request frame"),
    ({"hello": 1}, 1008, "invalid request frame"),
    ({"type": "event", "event": "x"}, 1008, "invalid request frame"),
    ({"type": "req", "id": "x"}, 1008, "invalid request frame"),
    ({"type": "req", "method": "connect", "params": params_of()}, 1008, "invalid request frame"),
    ("x" * TOO_BIG, 1009, ""),
]


@pytest.mark.parametrize(("frame", "code", "reason"), FIRST_FRAMES, ids=range(len(FIRST_FRAMES)))
def test_first_frame(frame: Any, code: int, reason: str) -> None:
    async def main() -> None:
        async with serving() as hub, opened(hub) as peer:
            await peer.challenge()
            await peer.send(frame)
            closed = await peer.closed()
            assert closed[0] == code
            assert closed[1].startswith(reason)

    run(main())


@pytest.mark.parametrize("changes", [{}, TOKEN], ids=["none", "token"])
@pytest.mark.parametrize("method", ["health", "agent", "config.get", "no.such"])
def test_first_request_is_not_connect(method: str, changes: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(changes) as hub, opened(hub) as peer:
            await peer.challenge()
            error = (await peer.request(method))["error"]
            assert error["code"] == "INVALID_REQUEST"
            assert error["message"] == "invalid handshake: first request must be connect"
            assert await peer.closed() == (1008, error["message"])

    run(main())


WELCOME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"auth": {"token": "of another gateway"}}),  # nothing is asked for, nothing is refused
    ({}, {"device": DEVICE}),
    (TOKEN, {"auth": {"token": SESAME}}),
    (TOKEN, {"auth": {"token": SESAME}, "device": DEVICE}),
    (PASSWORD, {"auth": {"password": SESAME}}),
    (PASSWORD, {"auth": {"password": SESAME}, "device": DEVICE}),
    ({"gateway.auth.mode": "token", "gateway.auth.token": "\u00e9t\u00e9"}, {"auth": {"token": "\u00e9t\u00e9"}}),
    ({}, {"client": {**CLIENT, "id": "x"}}),
    ({}, {"client": {**CLIENT, "id": "x" * 64}}),
    ({}, {"client": {**CLIENT, "id": "My own client, 2.0!"}}),
    ({}, {"minProtocol": 1, "maxProtocol": 99}),
    ({}, {"minProtocol": 1, "maxProtocol": 3}),
    ({}, {"minProtocol": 3, "maxProtocol": 4}),
    ({}, {"role": "operator", "scopes": ["operator.admin", "operator.approvals", "operator.pairing"]}),
    (
        {},
        {
            "client": {**CLIENT, "displayName": "d", "deviceFamily": "f", "modelIdentifier": "m", "instanceId": "i"},
            "caps": ["x"],
            "commands": ["x"],
            "permissions": {"x": True},
            "pathEnv": "/bin",
            "locale": "de",
            "userAgent": "u",
        },
    ),
]


@pytest.mark.parametrize(("changes", "params"), WELCOME)
def test_welcome(changes: dict[str, Any], params: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(changes) as hub, connected(hub, **params) as peer:
            assert "auth" not in peer.hello
            assert (await peer.ask("health"))["ok"] is True

    run(main())


def test_hello() -> None:
    async def main() -> None:
        changes = {**TOKEN, **BETA, "agents.list": [{"id": "beta"}, {"id": "main", "default": True}]}
        async with serving(changes) as hub, opened(hub, "/any/path?at=all") as peer:
            challenge = await peer.challenge()
            assert set(challenge) == {"nonce", "ts"}
            assert is_time(challenge["ts"])
            assert len(challenge["nonce"]) >= 16
            frame = await peer.connect(auth={"token": SESAME})
            hello = frame["payload"]
            assert set(hello) == {"type", "protocol", "server", "features", "snapshot", "policy"}
            assert (hello["type"], hello["protocol"]) == ("hello-ok", 3)
            assert set(hello["server"]) == {"version", "host", "connId"}
            assert set(hello["features"]) == {"methods", "events"}
            assert set(hello["features"]["methods"]) >= set(VALID)
            assert set(hello["features"]["events"]) >= {"connect.challenge", "agent", "chat", "tick", "shutdown"}
            snapshot = hello["snapshot"]
            assert set(snapshot) == {"presence", "health", "stateVersion", "uptimeMs", "sessionDefaults"}
            assert set(snapshot["stateVersion"]) == {"presence", "health"}
            assert snapshot["health"]["ok"] is True
            assert 0 <= snapshot["uptimeMs"] < 60_000
            defaults = {"defaultAgentId": "main", "mainKey": "main", "mainSessionKey": MAIN, "scope": "per-sender"}
            assert snapshot["sessionDefaults"] == defaults
            assert hello["policy"] == {"maxPayload": 524288, "maxBufferedBytes": 1572864, "tickIntervalMs": 30000}
            async with connected(hub, auth={"token": SESAME}) as other:
                assert other.hello["server"]["connId"] != hello["server"]["connId"]
                async with opened(hub) as third:
                    assert (await third.challenge())["nonce"] != challenge["nonce"]

    run(main())


def test_connect_before_the_challenge_is_read_and_again() -> None:
    async def main() -> None:
        async with serving() as hub, opened(hub) as peer:
            assert (await peer.connect())["ok"]
            assert peer.frames[0]["event"] == "connect.challenge"
            for params in (params_of(), {}):
                error = (await peer.request("connect", params))["error"]
                assert error["code"] == "INVALID_REQUEST"
                assert error["message"] == "connect is only valid as the first request"
            assert (await peer.ask("health"))["ok"] is True

    run(main())


def test_nobody_swells_what_others_are_told() -> None:
    """What a client says of itself is shown to all: their frames stay below what they announce to take."""

    async def main() -> None:
        for name in ("displayName", "version", "platform", "mode", "instanceId"):
            async with serving() as hub, opened(hub) as peer:
                answer = await peer.connect(client={**CLIENT, name: "x" * 400_000})
                assert answer["ok"] or (await peer.ended())[0] == 1008
                async with connected(hub) as other:
                    assert len(json.dumps(other.hello)) < 100_000, name

    run(main())


def test_silence_before_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(control, "HANDSHAKE_SECONDS", 0.1)

    async def main() -> None:
        async with serving() as hub, opened(hub) as peer, connected(hub) as other:
            await peer.challenge()
            assert await peer.closed() == (1008, "handshake timeout")
            assert (await other.ask("health"))["ok"] is True

    run(main())


def test_ticks_and_who_does_not_answer_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(control, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(control, "SILENCE_SECONDS", 0.5)

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        async with serving() as hub, connected(hub) as peer, connected(hub) as silent:
            began = clock()
            while len(hub.connections) > 1:
                payload = await peer.event("tick")
                assert set(payload) == {"ts"}
                assert is_time(payload["ts"])
            assert clock() - began > 0.4
            assert len(peer.events("tick")) > 3
            assert (await silent.ended())[0] == 1006
            for _ in range(10):  # who reads stays
                await peer.event("tick")
            assert (await peer.ask("health"))["ok"] is True

    run(main())


def test_who_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:

            async def listed(id: str) -> bool:
                presence = (await peer.event("presence"))["presence"]
                return id in [entry.get("instanceId") for entry in presence]

            async with connected(hub, client={**CLIENT, "instanceId": "of the other"}) as other:
                while not await listed("of the other"):
                    pass
                presence = other.hello["snapshot"]["presence"]
                assert [entry["mode"] for entry in presence if entry["reason"] == "self"] == ["gateway"]
            while await listed("of the other"):
                pass

    run(main())


def test_origin() -> None:
    async def main() -> None:
        async with serving({"gateway.http.allowedOrigins": ["https://mine.example"]}) as hub:
            for origin in ("https://evil.example", "null", f"http://127.0.0.1:{hub.port + 1}"):
                with pytest.raises(rfc6455.HandshakeError) as refused:
                    async with opened(hub, fields=[("Origin", origin)]):
                        pass
                assert refused.value.status == 403
            for origin in ("https://mine.example", f"http://127.0.0.1:{hub.port}"):
                async with opened(hub, fields=[("Origin", origin)]) as peer:
                    assert (await peer.connect())["ok"]

    run(main())


LIMIT = {"maxAttempts": 2, "windowMs": 60_000, "lockoutMs": 90_000, "exemptLoopback": False}


async def tried(hub: gateway.Gateway, token: str | None) -> dict[str, Any]:
    """The answer to a `connect` with this token."""
    async with opened(hub) as peer:
        frame = await peer.connect(auth=None if token is None else {"token": token})
        assert frame["ok"] or (await peer.ended())[0] == 1008
        return frame


async def asked(hub: gateway.Gateway, token: str) -> int:
    return (await ask(hub, "hi", {"Authorization": f"Bearer {token}"})).status


def test_too_many_failures() -> None:
    """They are counted together, over HTTP and here; the right secret does not help then."""

    async def main() -> None:
        changes = {**TOKEN, "gateway.auth.rateLimit": LIMIT}
        for over_http in (0, 1, 2):
            async with serving(changes) as hub:
                for n in range(2):
                    if n < over_http:
                        assert await asked(hub, "wrong") == 401
                    else:
                        assert (await tried(hub, "wrong"))["error"]["code"] == "INVALID_REQUEST"
                for token in ("wrong", SESAME):
                    error = (await tried(hub, token))["error"]
                    assert error["code"] == "UNAVAILABLE"
                    assert error["retryable"] is True
                    assert 80_000 < error["retryAfterMs"] <= 90_000
                assert await asked(hub, SESAME) == 429

    run(main())


def test_failures_that_do_not_count() -> None:
    async def main() -> None:
        async with serving({**TOKEN, "gateway.auth.rateLimit": LIMIT}) as hub:
            for token in ("wrong", SESAME, "wrong", None, None, SESAME, "wrong"):  # a success clears the count
                assert (await tried(hub, token))["ok"] is (token == SESAME)
            assert await asked(hub, SESAME) == 200

    run(main())


# Requests that are refused, on a connection that stays

NO_REQUEST: list[Any] = [
    "no json",
    "",
    b"\xff\xfe",
    "[" * 100_000,
    [],
    "null",
    5,
    {"a": 1},
    {"type": "event", "event": "x"},
    {"type": "req", "method": "health"},
    {"type": "req", "id": 5, "method": "health"},
    {"type": "req", "id": None, "method": "health"},
]
HALF_A_REQUEST: list[Any] = [
    {"type": "res", "id": "x", "ok": True},
    {"type": "req", "id": "", "method": "health"},
    {"type": "req", "id": "x"},
    {"type": "req", "id": "x", "method": 5},
    {"type": "req", "id": "x", "method": ""},
    {"id": "x", "method": "health"},
]


@pytest.mark.parametrize("frame", NO_REQUEST + HALF_A_REQUEST, ids=range(len(NO_REQUEST + HALF_A_REQUEST)))
def test_no_request(frame: Any) -> None:
    """An id that could be read may be said again; one that could not is null."""

    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            await peer.send(frame)
            answer = await peer.until(lambda read: read["type"] == "res")
            assert answer["id"] in ((None, frame["id"]) if frame in HALF_A_REQUEST else (None,))
            assert answer["error"]["code"] == "INVALID_REQUEST"
            assert answer["error"]["message"]
            assert (await peer.ask("health"))["ok"] is True

    run(main())


def test_frames_that_are_taken() -> None:
    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            request = {"type": "req", "id": "b", "method": "last-heartbeat"}
            await peer.send(json.dumps(request).encode())
            assert (await peer.answer("b"))["payload"] is None
            await peer.send(json.dumps(request).ljust(TOO_BIG - 1))
            assert (await peer.answer("b"))["ok"]
            await peer.send({**request, "id": "\u00e9 " * 100})
            assert (await peer.answer("\u00e9 " * 100))["ok"]
            assert (await peer.ask("health", probe=True))["ok"] is True

    run(main())


@pytest.mark.parametrize("pieces", [1, 3])
def test_too_big(pieces: int) -> None:
    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            for n in range(pieces):
                payload = b" " * (TOO_BIG // pieces + 1)
                opcode = rfc6455.CONTINUATION if n else rfc6455.TEXT
                frame = rfc6455.encode(opcode, payload, fin=n == pieces - 1, mask=b"mask")
                peer.websocket._transport.write(frame)
            assert (await peer.ended())[0] == 1009

    run(main())


@pytest.mark.parametrize("method", ["no.such.method", "Health", "tick", "connect.challenge", "__init__", "\u00e9"])
def test_unknown_method(method: str) -> None:
    async def main() -> None:
        async with serving() as hub, connected(hub, scopes=ADMIN) as peer:
            error = await peer.error(method)
            assert (error["code"], error["message"]) == ("INVALID_REQUEST", f"unknown method: {method}")
            assert (await peer.ask("health"))["ok"] is True

    run(main())


VALID: dict[str, dict[str, Any]] = {  # methods, each with params that will do
    "agent": {"message": "hi", "idempotencyKey": "k"},
    "agent.wait": {"runId": "none", "timeoutMs": 1},
    "agent.identity.get": {},
    "chat.send": {"sessionKey": MAIN, "message": "hi", "idempotencyKey": "k"},
    "chat.abort": {"sessionKey": MAIN},
    "chat.history": {"sessionKey": MAIN},
    "sessions.list": {},
    "sessions.preview": {"keys": [MAIN]},
    "sessions.reset": {"key": MAIN},
    "sessions.delete": {"key": DESK},
    "sessions.patch": {"key": MAIN},
    "agents.list": {},
    "models.list": {},
    "health": {},
    "status": {},
    "system-presence": {},
    "channels.status": {},
    "node.list": {},
    "cron.status": {},
    "last-heartbeat": {},
    "config.get": {},
}
WRITES = {"agent", "chat.send", "chat.abort", "sessions.reset", "sessions.delete", "sessions.patch"}
OPTIONAL = {("sessions.patch", "label"), ("agent.wait", "timeoutMs")}
REQUIRED = [
    (method, name) for method, params in VALID.items() for name in params if (method, name) not in OPTIONAL
]  # fmt: skip
WRONG: list[tuple[str, str, Any]] = [  # method, property, a value that it cannot have
    ("agent", "message", 5),
    ("agent", "message", ""),
    ("agent", "idempotencyKey", 5),
    ("agent", "idempotencyKey", ""),
    ("agent", "agentId", 5),
    ("agent", "sessionKey", 5),
    ("agent", "to", 5),
    ("agent", "timeout", "x"),
    ("agent", "timeout", -1),
    ("agent", "deliver", "x"),
    ("agent", "attachments", "x"),
    ("agent", "extraSystemPrompt", 5),
    ("agent.wait", "runId", 5),
    ("agent.wait", "runId", ""),
    ("agent.wait", "timeoutMs", "x"),
    ("agent.wait", "timeoutMs", -1),
    ("agent.identity.get", "agentId", 5),
    ("chat.send", "sessionKey", 5),
    ("chat.send", "message", 5),
    ("chat.send", "idempotencyKey", 5),
    ("chat.abort", "runId", 5),
    ("chat.history", "sessionKey", ""),
    ("chat.history", "limit", "x"),
    ("chat.history", "limit", 0),
    ("chat.history", "limit", -1),
    ("sessions.list", "limit", "x"),
    ("sessions.list", "limit", 0),
    ("sessions.preview", "keys", "x"),
    ("sessions.preview", "keys", [5]),
    ("sessions.reset", "key", 5),
    ("sessions.delete", "key", ""),
    ("sessions.patch", "label", 5),
]


def test_unknown_and_missing_and_wrong_params() -> None:
    """Each is told by its name, and nothing runs."""

    async def main() -> None:
        told = Told()
        cases: list[tuple[str, Any, str]] = []
        for method, params in VALID.items():
            if method not in ("health", "status"):  # which take whatever comes, in the family too
                cases.append((method, {**params, "bogus": 1}, "at root: unexpected property 'bogus'"))
                cases += [(method, value, "") for value in ([], "x", 5)]
        for method, name in REQUIRED:
            rest = {key: value for key, value in VALID[method].items() if key != name}
            cases.append((method, rest, f"must have required property '{name}'"))
        for method, name, value in WRONG:
            cases.append((method, {**VALID[method], name: value}, f"at /{name}"))
        found = []
        async with serving({}, {"main": told}) as hub, connected(hub, scopes=ADMIN) as peer:
            for method, params, said in cases:
                frame = await peer.request(method, params)
                message = frame.get("error", {}).get("message", "")
                right = frame.get("error", {}).get("code") == "INVALID_REQUEST"
                if not right or not message.startswith(f"invalid {method} params: {said}"):
                    found.append((method, params, said, frame))
            assert not hub.runs.active
            assert not told.turns
        assert not found, "\n".join(map(str, found))

    run(main())


@pytest.mark.parametrize(
    ("scopes", "reads", "writes", "admin"),
    [
        (None, True, True, False),
        (READ, True, False, False),
        (["operator.read", "operator.write"], True, True, False),
        (["operator.read", "operator.pairing"], True, False, False),
        (["operator.read", "operator.nonsense"], True, False, False),
        (ADMIN, True, True, True),
    ],
)
def test_scopes(scopes: list[str] | None, reads: bool, writes: bool, admin: bool) -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub, scopes=scopes) as peer:
            found = []
            for method, params in VALID.items():
                needs = "admin" if method == "config.get" else "write" if method in WRITES else "read"
                frame = await peer.request(method, params)
                error = {"code": "INVALID_REQUEST", "message": f"missing scope: operator.{needs}"}
                allowed = {"read": reads, "write": writes, "admin": admin}[needs]
                if frame.get("error") != (None if allowed else error):
                    found.append((method, frame))
            assert not found, "\n".join(map(str, found))
            if writes:
                assert (await peer.ask("agent.wait", runId="k"))["status"] == "ok"

    run(main())


def test_role_node() -> None:
    async def main() -> None:
        async with serving() as hub, connected(hub, role="node", scopes=ADMIN) as peer:
            for method, params in VALID.items():
                error = await peer.error(method, **params)
                assert error == {"code": "INVALID_REQUEST", "message": "unauthorized role: node"}
            assert not hub.runs.active

    run(main())


AGENT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"agentId": "ghost"}, 'unknown agent id "ghost"'),
    ({"agentId": "beta", "sessionKey": MAIN}, 'agent "beta" does not match session key agent "main"'),
    ({"channel": "zzz"}, "unknown channel: zzz"),
    ({"deliver": True}, "deliver"),
    ({"attachments": [{"type": "image"}]}, "attachments"),
    ({"sessionKey": "agent:ghost:main"}, "ghost"),
    ({"sessionKey": "x" * 513}, "sessionKey"),
    ({"sessionKey": "a\nb"}, "sessionKey"),
]


def test_agent_refused() -> None:
    async def main() -> None:
        told = Told()
        async with serving(BETA, {"main": told, "beta": told}) as hub, connected(hub) as peer:
            for params, said in AGENT_REFUSED:
                error = await peer.error("agent", message="hi", idempotencyKey="k", **params)
                assert error["code"] == "INVALID_REQUEST"
                assert said in error["message"], error
            assert not hub.runs.active
            assert not told.turns

    run(main())


# What there is to be told


def test_lists() -> None:
    async def main() -> None:
        async with serving(BETA) as hub, connected(hub) as peer:
            agents = await peer.ask("agents.list")
            main, beta = agents.pop("agents")
            assert (main["id"], beta) == ("main", {"id": "beta", "name": "Beta"})
            assert agents == {"defaultId": "main", "mainKey": "main", "scope": "per-sender"}
            assert (await peer.request("agents.list"))["ok"]  # no params at all
            nodes = await peer.ask("node.list")
            assert is_time(nodes.pop("ts"))
            assert nodes == {"nodes": []}
            cron = await peer.ask("cron.status")
            assert cron == {"enabled": False, "jobs": 0, "nextWakeAtMs": None}
            assert await peer.ask("last-heartbeat") is None
            channels = await peer.ask("channels.status")
            assert is_time(channels.pop("ts"))
            empty = {"channelOrder", "channelLabels", "channelDetailLabels", "channelSystemImages", "channelMeta"}
            empty |= {"channels", "channelAccounts", "channelDefaultAccountId"}
            assert {name for name, value in channels.items() if value in ({}, [])} == empty == set(channels)

    run(main())


def test_identity() -> None:
    async def main() -> None:
        async with serving(BETA) as hub, connected(hub) as peer:
            for params, id in (
                ({}, "main"),
                ({"agentId": "beta"}, "beta"),
                ({"sessionKey": "agent:beta:desk"}, "beta"),
                ({"sessionKey": "desk"}, "main"),
            ):
                identity = await peer.ask("agent.identity.get", **params)
                assert identity["agentId"] == id
                assert identity["name"]
                assert id == "main" or identity["name"] == "Beta"
            assert (await peer.error("agent.identity.get", agentId="ghost"))["code"] == "INVALID_REQUEST"

    run(main())


def test_models() -> None:
    async def main() -> None:
        models = [{"id": "large", "name": "Large One"}, {"id": "small"}]
        async with Upstream() as upstream, serving(upstream.settings(models=models)) as hub, connected(hub) as peer:
            listed = {
                (model["provider"], model["id"]): model["name"] for model in (await peer.ask("models.list"))["models"]
            }
            assert listed["up", "large"] == "Large One"
            assert listed["up", "small"]

    run(main())


def test_health_status_and_presence() -> None:
    async def main() -> None:
        client = {**CLIENT, "instanceId": "of the test"}
        async with serving(BETA) as hub, connected(hub, client=client) as peer:
            await peer.agent(sessionKey=DESK)
            health = await peer.ask("health")
            assert health["ok"] is True
            assert is_time(health["ts"])
            assert health["defaultAgentId"] == "main"
            assert (health["channels"], health["channelOrder"], health["channelLabels"]) == ({}, [], {})
            assert [(agent["agentId"], agent["isDefault"]) for agent in health["agents"]] == [
                ("main", True),
                ("beta", False),
            ]
            assert health["agents"][1]["name"] == "Beta"
            assert health["agents"][1]["sessions"]["count"] == 0
            for sessions in (health["agents"][0]["sessions"], health["sessions"]):
                assert sessions["count"] == 1
                assert [entry["key"] for entry in sessions["recent"]] == [DESK]
                assert is_time(sessions["recent"][0]["updatedAt"])
                assert 0 <= sessions["recent"][0]["age"] < 60_000
            status = await peer.ask("status")
            assert status["sessions"]["count"] == 1
            assert status["sessions"]["recent"][0]["key"] == DESK
            assert status["channelSummary"] == []
            presence = await peer.ask("system-presence")
            assert [entry["mode"] for entry in presence if entry["reason"] == "self"] == ["gateway"]
            assert all(is_time(entry["ts"]) and entry["text"] for entry in presence)

    run(main())


def test_config_and_what_is_never_told(tmp_path: Any) -> None:
    async def main() -> None:
        store = {"session.store": str(tmp_path / "sessions.sqlite3")}
        async with Upstream() as upstream, serving({**TOKEN, **store, **upstream.settings()}) as hub:
            async with connected(hub, scopes=ADMIN, auth={"token": SESAME}) as peer:
                answer = await peer.ask("config.get")
                assert answer["config"]["gateway"]["auth"] == {
                    **answer["config"]["gateway"]["auth"],
                    "mode": "token",
                    "token": "***",
                }
                assert answer["config"]["models"]["providers"]["up"]["apiKey"] == "***"
                assert answer["valid"] is True
                assert (answer["issues"], answer["warnings"]) == ([], [])
                for method, params in VALID.items():
                    if method not in WRITES and method != "config.get":
                        await peer.request(method, params)
                told = json.dumps(peer.frames, ensure_ascii=False)
                assert SESAME not in told
                assert KEY not in told
                public = json.dumps([frame for frame in peer.frames if frame.get("payload") != answer])
                for path in (str(tmp_path), os.environ["HOME"], str(HERE)):
                    assert path not in public

    run(main())


# Sessions


def texts(history: dict[str, Any]) -> list[tuple[str, str]]:
    for message in history["messages"]:
        assert is_time(message["timestamp"])
        assert [part["type"] for part in message["content"]] == ["text"]
    return [(message["role"], message["content"][0]["text"]) for message in history["messages"]]


def test_a_session_from_its_first_word_to_its_last() -> None:
    async def main() -> None:
        async with serving(BETA, {"main": parrot, "beta": parrot}) as hub, connected(hub) as peer:
            empty = await peer.ask("chat.history", sessionKey=DESK)
            assert empty == {"sessionKey": DESK, "messages": [], "thinkingLevel": "off"}
            assert (await peer.ask("sessions.list"))["sessions"] == []

            final = (await peer.agent("one two", "k1", sessionKey=DESK))["payload"]
            await peer.agent("three", "k2", sessionKey=DESK)
            await peer.agent("other", "k3", agentId="beta")
            id = final["result"]["meta"]["agentMeta"]["sessionId"]

            history = await peer.ask("chat.history", sessionKey=DESK)
            assert set(history) == {"sessionKey", "sessionId", "messages", "thinkingLevel"}
            assert (history["sessionKey"], history["sessionId"]) == (DESK, id)
            said = [("user", "one two"), ("assistant", "one two"), ("user", "three"), ("assistant", "three")]
            assert texts(history) == said
            for limit in (1, 2, 3, 4, 1000):
                assert texts(await peer.ask("chat.history", sessionKey=DESK, limit=limit)) == said[-limit:]

            listed = await peer.ask("sessions.list")
            assert is_time(listed["ts"])
            assert listed["count"] == 2
            assert [entry["key"] for entry in listed["sessions"]] == ["agent:beta:main", DESK]  # the newest first
            entry = listed["sessions"][1]
            names = {"key", "kind", "updatedAt", "sessionId", "inputTokens", "outputTokens", "totalTokens", "model"}
            assert set(entry) >= names
            assert (entry["kind"], entry["sessionId"]) == ("direct", id)
            assert is_time(entry["updatedAt"])
            assert [entry["key"] for entry in (await peer.ask("sessions.list", limit=1))["sessions"]] == [
                "agent:beta:main"
            ]

            preview = await peer.ask("sessions.preview", keys=[DESK, "agent:main:none"])
            assert is_time(preview["ts"])
            assert preview["previews"][0] == {
                "key": DESK,
                "status": "ok",
                "items": [{"role": role, "text": text} for role, text in said],
            }
            assert preview["previews"][1]["key"] == "agent:main:none"
            assert preview["previews"][1]["items"] == []

            patched = await peer.ask("sessions.patch", key=DESK, label="L1")
            assert (patched["ok"], patched["key"]) == (True, DESK)
            assert patched["entry"]["label"] == "L1"
            assert patched["entry"]["sessionId"] == id
            assert texts(await peer.ask("chat.history", sessionKey=DESK)) == said
            labels = {entry["key"]: entry.get("label") for entry in (await peer.ask("sessions.list"))["sessions"]}
            assert labels == {DESK: "L1", "agent:beta:main": None}

            reset = await peer.ask("sessions.reset", key=DESK)
            assert (reset["ok"], reset["key"]) == (True, DESK)
            assert reset["entry"]["sessionId"] != id
            assert reset["entry"]["totalTokens"] == 0
            assert (await peer.ask("chat.history", sessionKey=DESK))["messages"] == []
            await peer.agent("four", "k4", sessionKey=DESK)
            history = await peer.ask("chat.history", sessionKey=DESK)
            assert texts(history) == [("user", "four"), ("assistant", "four")]
            assert history["sessionId"] == reset["entry"]["sessionId"]

            deleted = await peer.ask("sessions.delete", key=DESK)
            assert (deleted["ok"], deleted["key"], deleted["deleted"]) == (True, DESK, True)
            assert deleted["archived"] == []
            assert [entry["key"] for entry in (await peer.ask("sessions.list"))["sessions"]] == ["agent:beta:main"]
            assert (await peer.ask("chat.history", sessionKey=DESK))["messages"] == []
            assert (await peer.ask("sessions.delete", key=DESK))["deleted"] is False

    run(main())


@pytest.mark.parametrize("method", ["sessions.reset", "sessions.delete"])
def test_a_session_that_is_taken_away_from_its_run(method: str) -> None:
    """The run ends; nothing of it comes back."""

    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k", "sessionKey": DESK})
            await peer.answer(id)
            told.say("word")
            await peer.event("agent", stream="assistant")
            assert (await peer.ask(method, key=DESK))["ok"] is True
            told.say(None)
            await peer.answer(id)
            assert (await peer.ask("chat.history", sessionKey=DESK))["messages"] == []

    run(main())


def test_the_main_session_has_a_short_name() -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            await peer.ask("chat.send", sessionKey="main", message="hi", idempotencyKey="k")
            await peer.event("chat", runId="k", state="final", sessionKey=MAIN)
            assert texts(await peer.ask("chat.history", sessionKey=MAIN)) == [("user", "hi"), ("assistant", "hi")]
            assert len((await peer.ask("chat.history", sessionKey="main"))["messages"]) == 2

    run(main())


def test_sessions_are_shared_with_http() -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            key = "agent:main:openai-user:ann"
            await ask(hub, "over http", user="ann")
            await peer.agent("over this", sessionKey=key)
            said = [text for _, text in texts(await peer.ask("chat.history", sessionKey=key))]
            assert said == ["over http", "over http", "over this", "over this"]

    run(main())


# Runs

WHICH: list[tuple[dict[str, Any], str, str]] = [  # params of `agent` -> agent, session
    ({}, "main", MAIN),
    ({"agentId": "main"}, "main", MAIN),
    ({"agentId": "beta"}, "beta", "agent:beta:main"),
    ({"sessionKey": "main"}, "main", MAIN),
    ({"sessionKey": "agent:beta:x"}, "beta", "agent:beta:x"),
    ({"sessionKey": "agent:beta:x", "agentId": "beta"}, "beta", "agent:beta:x"),
    ({"to": "+1"}, "main", "agent:main:direct:+1"),
    ({"to": "+1", "agentId": "beta"}, "beta", "agent:beta:direct:+1"),
    ({"sessionId": "s1"}, "main", "agent:main:session:s1"),
    ({"sessionId": "s1", "agentId": "beta"}, "beta", "agent:beta:session:s1"),
]


def test_which_agent_and_session() -> None:
    async def main() -> None:
        turns: list[dict[str, Any]] = []

        async def agent(message: str, turn: dict[str, Any]) -> AsyncIterator[str]:
            turns.append(turn)
            yield "yes"

        async with serving(BETA, {"main": agent, "beta": agent}) as hub, connected(hub) as peer:
            for n, (params, id, key) in enumerate(WHICH):
                await peer.agent(key=f"k{n}", **params)
                assert (turns[-1]["agent_id"], turns[-1]["session_key"]) == (id, key), params
                assert peer.events("agent", runId=f"k{n}", phase="start")[0]["sessionKey"] == key
            meta = (await peer.agent("first", "a", sessionKey=DESK))["payload"]["result"]["meta"]
            again = await peer.agent("second", "b", sessionId=meta["agentMeta"]["sessionId"])
            assert turns[-1]["session_key"] == DESK
            assert [message["content"] for message in turns[-1]["messages"]] == ["first", "yes", "second"]
            assert again["payload"]["result"]["meta"]["agentMeta"]["sessionId"] == meta["agentMeta"]["sessionId"]
            await peer.agent("more", "c", sessionId="s1")
            assert [message["content"] for message in turns[-1]["messages"]] == ["hi", "yes", "more"]

    run(main())


def test_extra_system_prompt_and_all_params() -> None:
    async def main() -> None:
        told = Told()
        told.say(None)
        agents = [{"id": "main", "systemPrompt": "Be kind."}]
        async with serving({"agents.list": agents}, {"main": told}) as hub, connected(hub) as peer:
            names = ("lane", "label", "replyTo", "accountId", "replyAccountId", "threadId")
            names += ("groupId", "groupChannel", "groupSpace", "spawnedBy")
            final = await peer.agent(
                thinking="low",
                deliver=False,
                channel="whatsapp",
                replyChannel="telegram",
                timeout=600,
                attachments=[],
                extraSystemPrompt="Be brief.",
                **dict.fromkeys(names, "x"),
            )
            assert final["ok"]
            assert "Be kind." in told.turns[0]["system"]
            assert "Be brief." in told.turns[0]["system"]

    run(main())


def test_a_run() -> None:
    async def main() -> None:
        async with Upstream(says("one ", "two ", "three")) as upstream, serving(upstream.settings()) as hub:
            async with connected(hub) as peer, connected(hub, scopes=READ) as other:
                id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k1"}, "mine")
                first, second = await peer.answer(id), await peer.answer(id)
                assert set(first["payload"]) == {"runId", "status", "acceptedAt"}
                assert (first["payload"]["runId"], first["payload"]["status"]) == ("k1", "accepted")
                assert is_time(first["payload"]["acceptedAt"])
                final = second["payload"]
                meta = final["result"].pop("meta")
                assert final == {
                    "runId": "k1",
                    "status": "ok",
                    "summary": "completed",
                    "result": {"payloads": [{"text": "one two three", "mediaUrl": None}]},
                }
                assert set(meta) == {"durationMs", "agentMeta", "aborted"}
                assert meta["aborted"] is False
                assert 0 <= meta["durationMs"] < 10_000
                assert meta["agentMeta"].pop("sessionId")
                usage = {"input": 3, "output": 1, "cacheRead": 0, "cacheWrite": 0, "total": 4}
                assert meta["agentMeta"] == {"provider": "up", "model": "large", "usage": usage}
                for watcher in (peer, other):
                    await watcher.event("chat", runId="k1", state="final")
                    await watcher.ask("health")
                    check_events(watcher, "k1", MAIN, "one two three")
                assert peer.frames.index(first) < min(
                    n for n, frame in enumerate(peer.frames) if frame.get("event") == "agent"
                )
                ends = [
                    n for n, frame in enumerate(peer.frames) if frame.get("payload", {}).get("stream") == "lifecycle"
                ]
                assert peer.frames.index(second) > ends[-1]
                assert not [frame for frame in other.frames if frame.get("id") == id]

    run(main())


def check_events(peer: Peer, id: str, key: str, text: str) -> None:
    """The events of a run that ended well: all there, in order, and no more."""
    events = peer.events("agent", runId=id)
    for event in events:
        assert set(event) == {"runId", "sessionKey", "seq", "ts", "stream", "data"}, event
        assert event["sessionKey"] == key
        assert is_time(event["ts"])
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    start, *said, end = events
    assert (start["stream"], start["data"]["phase"]) == ("lifecycle", "start")
    assert (end["stream"], end["data"]["phase"]) == ("lifecycle", "end")
    assert start["data"]["startedAt"] <= end["data"]["endedAt"]
    assert is_time(start["data"]["startedAt"])
    assert "aborted" not in end["data"] or end["data"]["aborted"] is False
    so_far = ""
    for event in said:
        assert event["stream"] == "assistant"
        assert event["data"]["delta"]
        so_far += event["data"]["delta"]
        assert event["data"]["text"] == so_far
    assert so_far == text
    *deltas, final = peer.events("chat", runId=id)
    for event in (*deltas, final):
        assert event["sessionKey"] == key
        assert event["message"]["role"] == "assistant"
        assert is_time(event["message"]["timestamp"])
    assert {event["state"] for event in deltas} <= {"delta"}
    assert all(text.startswith(event["message"]["content"][0]["text"]) for event in deltas)
    assert final["state"] == "final"
    assert final["message"]["content"] == [{"type": "text", "text": text}]


def test_words_come_when_they_are_said() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            id = await peer.post("chat.send", VALID["chat.send"])
            started = (await peer.answer(id))["payload"]
            assert started == {"runId": "k", "status": "started"}
            told.say("Hello")
            assert (await peer.event("agent", stream="assistant"))["data"] == {"text": "Hello", "delta": "Hello"}
            message = (await peer.event("chat", state="delta"))["message"]
            assert message["content"] == [{"type": "text", "text": "Hello"}]
            again = await peer.ask("chat.send", **VALID["chat.send"])
            assert again == {"runId": "k", "status": "in_flight"}
            told.say(" there")
            data = (await peer.event("agent", stream="assistant"))["data"]
            assert data == {"text": "Hello there", "delta": " there"}
            told.say(None)
            await peer.event("chat", state="final")
            ended = await peer.ask("chat.send", **VALID["chat.send"])
            assert (ended["runId"], ended["status"]) == ("k", "ok")
            assert len([frame for frame in peer.frames if frame.get("id") == id]) == 1
            assert told.messages == ["hi"]

    run(main())


def test_a_chat_is_not_left_behind() -> None:
    """An agent that says two words and thinks: both are in the chat, whatever is said next, and when."""

    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            await peer.ask("chat.send", **VALID["chat.send"])
            told.say("Hello")
            await peer.event("chat", state="delta")
            told.say(" there")
            message = (await peer.event("chat", state="delta"))["message"]
            assert message["content"] == [{"type": "text", "text": "Hello there"}]
            told.say(None)
            await peer.event("chat", state="final")

    run(main())


async def failed(peer: Peer, code: str, **params: Any) -> dict[str, Any]:
    """A turn that fails: what all tell of it."""
    final = await peer.agent("hi", "bad", **params)
    assert not final["ok"]
    assert final["error"]["code"] == code
    payload = final["payload"]
    assert set(payload) == {"runId", "status", "summary"}
    assert (payload["runId"], payload["status"]) == ("bad", "error")
    assert payload["summary"]
    lifecycle = await peer.event("agent", runId="bad", phase="error")
    assert lifecycle["data"]["error"]
    assert is_time(lifecycle["data"]["endedAt"])
    assert (await peer.event("chat", runId="bad", state="error"))["errorMessage"]
    waited = await peer.ask("agent.wait", runId="bad")
    assert waited["status"] in ("error", "timeout")
    assert waited["status"] == "timeout" or waited["error"]
    assert not peer.events("agent", runId="bad", phase="end")
    assert not peer.events("chat", runId="bad", state="final")
    return final


def test_words_and_tools_keep_their_order() -> None:
    async def main() -> None:
        async def agent(message: str) -> AsyncIterator[str | dict[str, Any]]:
            for word in ("a ", "b ", {"tool": {"name": "look"}}, "c ", {"tool": {"name": "again"}}, "d"):
                yield word

        async with serving({}, {"main": agent}) as hub, connected(hub) as peer:
            await peer.agent()
            said = ""
            for event in peer.events("agent"):
                if event["stream"] == "tool":
                    said += f"<{event['data']['name']}>"
                elif event["stream"] == "assistant":
                    said += event["data"]["delta"]
            assert said == "a b <look>c <again>d"

    run(main())


def test_an_agent_that_raises() -> None:
    async def main() -> None:
        async with serving({}, {"main": broken}) as hub, connected(hub) as peer:
            final = await failed(peer, "UNAVAILABLE")
            again = await peer.request("agent", {"message": "hi", "idempotencyKey": "bad"})
            assert (again["payload"], again["error"]) == (final["payload"], final["error"])
            assert "a word of the inside" not in json.dumps(peer.frames)

    run(main())


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_an_upstream_that_fails(status: int) -> None:
    async def main() -> None:
        async with Upstream(answers(status, b'{"error": {"message": "no"}}')) as upstream:
            async with serving(upstream.settings()) as hub, connected(hub) as peer:
                await failed(peer, "UNAVAILABLE")
                assert KEY not in json.dumps(peer.frames)
                upstream.script = says("well")
                final = await peer.agent(key="good")
                assert final["payload"]["result"]["payloads"][0]["text"] == "well"

    run(main())


def test_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        told = Told()
        told.say("partial")
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            await failed(peer, "AGENT_TIMEOUT", timeout=1)
            await within(told.left.get())

    run(main())


def test_a_full_lane_and_abort_of_all_of_a_session() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, connected(hub) as other:
            ids = [await peer.post("agent", {"message": "hi", "idempotencyKey": f"k{n}"}) for n in range(LANE + 1)]
            for id in ids:
                assert (await peer.answer(id))["payload"]["status"] == "accepted"
            await within(told.began.get())
            error = await other.error("agent", message="hi", idempotencyKey="too many")
            assert error["code"] == "UNAVAILABLE"
            assert error["retryable"] is True
            aside = await other.post("agent", {"message": "hi", "idempotencyKey": "aside", "sessionKey": DESK})
            assert (await other.answer(aside))["ok"]
            aborted = await other.ask("chat.abort", sessionKey=MAIN)
            assert aborted["aborted"] is True
            assert set(aborted["runIds"]) == {f"k{n}" for n in range(LANE + 1)}
            for id in ids:
                assert (await peer.answer(id))["payload"]["summary"] == "aborted"
            await within(told.began.get())
            assert told.messages == ["hi"] * 2  # the others had only waited
            told.say(None, None)
            assert (await other.answer(aside))["payload"]["summary"] == "completed"
            retried = await other.request("agent", {"message": "hi", "idempotencyKey": "too many"})
            assert retried["ok"], "what was refused for its time is not remembered"
            await other.ask("agent.wait", runId="too many")

    run(main())


def test_the_same_key_runs_once() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, connected(hub) as other:
            request = {"message": "hi", "idempotencyKey": "same"}
            ids = [await peer.post("agent", request), await other.post("agent", request)]
            acks = [(await peer.answer(ids[0]))["payload"], (await other.answer(ids[1]))["payload"]]
            assert [(ack["runId"], ack["status"]) for ack in acks] == [("same", "accepted")] * 2
            told.say("once", None)
            final = await peer.answer(ids[0])
            assert final["payload"]["result"]["payloads"] == [{"text": "once", "mediaUrl": None}]
            assert (await other.answer(ids[1]))["payload"] == final["payload"]
            for method in ("agent", "chat.send"):
                for asker in (peer, other):
                    params = {**request, **({"sessionKey": MAIN} if method == "chat.send" else {})}
                    assert (await asker.ask(method, **params)) == final["payload"]
            assert (await other.ask("agent", message="another", idempotencyKey="same")) == final["payload"]
            assert told.messages == ["hi"]
            assert not hub.runs.active

    run(main())


def test_wait() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, connected(hub) as other:
            assert await other.ask("agent.wait", runId="none", timeoutMs=20) == {"runId": "none", "status": "timeout"}
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k"})
            await peer.answer(id)
            waited = await other.ask("agent.wait", runId="k", timeoutMs=20)
            assert (waited["runId"], waited["status"]) == ("k", "timeout")
            assert len(hub.runs.active) == 1
            waiting = await other.post("agent.wait", {"runId": "k"})
            assert (await other.ask("health"))["ok"] is True  # a wait holds up nothing else
            told.say("word", None)
            waited = (await other.answer(waiting))["payload"]
            assert set(waited) == {"runId", "status", "startedAt", "endedAt"}
            assert (waited["runId"], waited["status"]) == ("k", "ok")
            assert waited["startedAt"] <= waited["endedAt"]
            assert is_time(waited["startedAt"])
            assert (await peer.answer(id))["ok"]
            assert await other.ask("agent.wait", runId="k") == waited

    run(main())


def test_who_leaves_does_not_end_the_run() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as other:
            for n, leave in enumerate(("close", "drop")):
                key = f"k{n}"
                async with connected(hub) as peer:
                    await peer.answer(await peer.post("agent", {"message": "hi", "idempotencyKey": key}))
                    waiting = await peer.post("agent.wait", {"runId": key})
                    assert waiting
                    await within(told.began.get())
                    if leave == "drop":
                        peer.drop()
                told.say("all ", "there", None)
                assert (await other.ask("agent.wait", runId=key))["status"] == "ok"
                await other.event("chat", runId=key, state="final")
                assert other.text(key) == "all there"
            assert len((await other.ask("chat.history", sessionKey=MAIN))["messages"]) == 4

    run(main())


# Abort


async def is_aborted(peer: Peer, id: str) -> None:
    event = await peer.event("chat", runId=id, state="aborted")
    assert event["stopReason"] == "rpc"
    assert not peer.events("chat", runId=id, state="final")


@pytest.mark.parametrize("method", ["agent", "chat.send"])
def test_abort(method: str) -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, connected(hub) as other:
            id = await peer.post(method, {**VALID["chat.send"], "sessionKey": DESK})
            await peer.answer(id)
            told.say("partial")
            await other.event("agent", stream="assistant")
            for params in ({"sessionKey": DESK, "runId": "x"}, {"sessionKey": MAIN}):
                nothing = await other.ask("chat.abort", **params)
                assert nothing == {"ok": True, "aborted": False, "runIds": []}
            aborted = await other.ask("chat.abort", sessionKey=DESK, runId="k")
            assert aborted == {"ok": True, "aborted": True, "runIds": ["k"]}
            await within(told.left.get())
            for watcher in (peer, other):
                await is_aborted(watcher, "k")
                assert (await watcher.event("agent", phase="end"))["data"]["aborted"] is True
            if method == "agent":
                final = await peer.answer(id)
                assert final["ok"]
                assert final["payload"]["summary"] == "aborted"
                assert final["payload"]["result"]["meta"]["aborted"] is True
            again = await other.ask("chat.abort", sessionKey=DESK, runId="k")
            assert again == {"ok": True, "aborted": False, "runIds": []}
            told.say("well", None)
            assert (await peer.agent(key="next", sessionKey=DESK))["payload"]["summary"] == "completed"

    run(main())


def test_abort_of_a_run_that_waits() -> None:
    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            ids = []
            for name in ("first", "second", "third"):
                ids.append(await peer.post("agent", {"message": name, "idempotencyKey": name}))
                await peer.answer(ids[-1])
            aborted = await peer.ask("chat.abort", sessionKey="main", runId="second")
            assert aborted["runIds"] == ["second"]
            await is_aborted(peer, "second")
            assert (await peer.answer(ids[1]))["payload"]["summary"] == "aborted"
            told.say(None, None)
            assert (await peer.answer(ids[0]))["payload"]["summary"] == "completed"
            assert (await peer.answer(ids[2]))["payload"]["summary"] == "completed"
            assert told.messages == ["first", "third"]

    run(main())


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_abort_of_a_run_that_came_over_http(streamed: bool) -> None:
    async def main() -> None:
        told = Told()
        key = "agent:main:openai-user:ann"
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, await Client.open(hub.port) as client:
            client.say("hi", user="ann", stream=streamed)
            told.say("partial")
            id = (await peer.event("agent", stream="assistant"))["runId"]
            aborted = await peer.ask("chat.abort", sessionKey=key, runId=id)
            assert aborted["runIds"] == [id]
            if streamed:
                assert (await client.head())[0] == 200
                *_, error, done = [event async for event in client.events()]
                assert json.loads(error.removeprefix("data: "))["error"]["message"]
                assert done == "data: [DONE]"
            else:
                answer = await client.answer()
                assert answer.status >= 400
                assert answer.error["message"]
            await is_aborted(peer, id)
            await within(told.left.get())
            assert (await peer.ask("chat.history", sessionKey=key))["messages"] == []

    run(main())


# Events of all runs


@pytest.mark.parametrize("user", ["", "ann"], ids=["stateless", "stored"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_http_runs_are_seen(streamed: bool, user: str) -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer, connected(hub, scopes=READ) as other:
            if streamed:
                _, events = await stream(hub, "one two three", user=user)
                assert text_of(events) == "one two three"
                id = json.loads(events[0].removeprefix("data: "))["id"]
            else:
                id = (await ask(hub, "one two three", user=user)).json["id"]
            for watcher in (peer, other):
                key = (await watcher.event("chat", runId=id, state="final"))["sessionKey"]
                assert key == "agent:main:openai-user:ann" if user else key.startswith("agent:main:openai:")
                await watcher.ask("health")
                check_events(watcher, id, key, "one two three")

    run(main())


def test_what_an_agent_does_is_seen_by_all() -> None:
    """By who asked, in its stream, and by who watches, in one order with the words."""
    told = [{"name": "look", "phase": phase} for phase in ("start", "end")]

    async def looks(message: str) -> AsyncIterator[str | dict[str, Any]]:
        yield "I look. "
        yield "Now. "
        for doing in told:
            yield {"tool": doing}
        yield "I saw."

    async def main() -> None:
        async with serving({}, {"main": looks}) as hub, connected(hub) as peer:
            _, events = await stream(hub, stream_options={"include_events": True})
            deltas = [chunk["choices"][0]["delta"] for chunk in data_of(events)]
            words = [{"content": text} for text in ("I look. ", "Now. ", "I saw.")]
            doings = [{"copepod_events": [{"index": n, "tool": doing}]} for n, doing in enumerate(told)]
            assert deltas == [{"role": "assistant", "content": ""}, *words[:2], *doings, words[2], {}]
            await peer.event("chat", state="final")
            seen = [(each["stream"], each["data"]) for each in peer.events("agent")]
            assert [data for name, data in seen if name == "tool"] == told
            before = [data["delta"] for name, data in seen[: seen.index(("tool", told[0]))] if name == "assistant"]
            assert "".join(before) == "I look. Now. "

    run(main())


def test_http_runs_that_do_not_end_well_are_seen() -> None:
    async def main() -> None:
        told = Told()
        async with serving(BETA, {"main": told, "beta": broken}) as hub, connected(hub) as peer:
            async with await Client.open(hub.port) as client:
                client.say()
                told.say("partial")
                id = (await peer.event("agent", stream="assistant"))["runId"]
            lifecycle = await peer.until(
                lambda frame: (
                    frame.get("event") == "agent" and frame["payload"]["data"].get("phase") in ("end", "error")
                )
            )
            assert lifecycle["payload"]["runId"] == id
            assert lifecycle["payload"]["data"].get("aborted") or lifecycle["payload"]["data"].get("error")
            assert (await ask(hub, "hi", {"x-copepod-agent-id": "beta"})).status == 500
            await peer.event("agent", phase="error")
            await peer.event("chat", state="error")
            assert "a word of the inside" not in json.dumps(peer.frames)

    run(main())


def test_many_words_at_once_are_few_events() -> None:
    async def main() -> None:
        words = [f"word{n} " for n in range(1000)]

        async def agent(message: str) -> AsyncIterator[str]:
            for n, word in enumerate(words):
                yield word
                if n % 100 == 0:
                    await asyncio.sleep(0)

        async with serving({}, {"main": agent}) as hub, connected(hub) as peer, connected(hub) as other:
            clock = asyncio.get_running_loop().time
            began = clock()
            final = await peer.agent()
            for watcher in (peer, other):
                await watcher.event("chat", state="final")
                took = clock() - began
                assert watcher.text("k1") == "".join(words) == final["payload"]["result"]["payloads"][0]["text"]
                assert len(watcher.events("agent", stream="assistant")) <= 2 + took / 0.05
                assert len(watcher.events("chat", state="delta")) <= 2 + took / 0.15
                check_events(watcher, "k1", MAIN, "".join(words))

    run(main())


def test_a_long_text_is_told_once() -> None:
    """Beyond 256 KiB only what is new is told."""

    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer:
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k"})
            pieces = [letter * 100_000 for letter in "abcd"]
            for n, piece in enumerate(pieces):
                told.say(piece)
                data = (await peer.event("agent", stream="assistant"))["data"]
                assert data["delta"] == piece
                assert data.get("text") == ("".join(pieces[: n + 1]) if n < 2 else None)
            told.say(None)
            await peer.answer(id)
            final = await peer.answer(id)
            assert final["payload"]["result"]["payloads"][0]["text"] == "".join(pieces)

    run(main())


def test_a_client_that_never_reads() -> None:
    """It is closed; neither the run nor another client has to wait for it."""

    async def main() -> None:
        async def agent(message: str) -> AsyncIterator[str]:
            for n in range(20):
                yield str(n % 10) * 300_000
                await asyncio.sleep(0.01)

        async with serving({}, {"main": agent}) as hub, connected(hub) as peer, connected(hub, buffer=SMALL) as slow:
            clock = asyncio.get_running_loop().time
            began = clock()
            final = await peer.agent()
            text = final["payload"]["result"]["payloads"][0]["text"]
            assert len(text) == 6_000_000
            assert peer.text("k1") == text
            assert clock() - began < 5
            await peer.agent(key="k2")
            code, _ = await slow.ended()
            assert code in (1008, 1006)
            assert len(slow.text("k1")) < 6_000_000
            assert (await peer.ask("health"))["ok"] is True

    run(main())


def test_shutdown() -> None:
    """Clients are told, what runs ends, then the connections."""

    async def main() -> None:
        told = Told()
        async with serving({}, {"main": told}) as hub, connected(hub) as peer, connected(hub) as other:
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k"})
            await peer.answer(id)
            await within(told.began.get())
            stopping = asyncio.ensure_future(hub.stop(BOUND))
            for watcher in (peer, other):
                assert (await watcher.event("shutdown"))["reason"]
            error = await other.error("agent", message="hi", idempotencyKey="late")
            assert error["code"] == "UNAVAILABLE"
            told.say("to the end", None)
            final = await peer.answer(id)
            assert final["payload"]["result"]["payloads"][0]["text"] == "to the end"
            for watcher in (peer, other):
                assert (await watcher.ended())[0] == 1012
            await within(stopping)

    run(main())
