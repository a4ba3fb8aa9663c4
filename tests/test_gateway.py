"""The gateway whole: many at once, sessions, fallbacks, who may call, what stays open, embedding, reload."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

import chat_answers
import config
import connection
import gateway
import sessions
from live import (
    BOUND,
    CHAT,
    KEY,
    Client,
    ask,
    chat,
    chunked,
    data_of,
    run,
    serving,
    settings,
    stream,
    text_of,
    until,
    within,
)
from upstream import Call, Upstream, answers, says

TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": "secret"}
BEARER = {"Authorization": "Bearer secret"}


# Many at once, and one after the other


def test_sixty_four_sessions_at_once() -> None:
    """The upstream answers none before all have come."""

    async def main() -> None:
        together = asyncio.Event()

        async def script(call: Call) -> None:
            if upstream.active == 64:
                together.set()
            await within(together.wait())
            await says(call.json["messages"][-1]["content"])(call)

        async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
            calls = [(stream if n % 2 else ask)(hub, f"words of {n}", user=f"user {n}") for n in range(64)]
            for n, answer in enumerate(await asyncio.gather(*calls)):
                said = text_of(answer[1]) if isinstance(answer, tuple) and len(answer) == 2 else answer.text
                assert said == f"words of {n}"
            assert upstream.peak == 64

    run(main())


def test_places() -> None:
    """No more than `maxConcurrent` run; the others wait, and all are answered."""

    async def main() -> None:
        async with (
            Upstream(says("hi")) as upstream,
            serving({**upstream.settings(), "agents.defaults.maxConcurrent": 3}) as hub,
        ):
            answers_ = await asyncio.gather(*(ask(hub) for _ in range(20)))
            assert [answer.text for answer in answers_] == ["hi"] * 20
            assert upstream.peak <= 3
            assert upstream.connections <= 3  # each used again

    run(main())


def test_one_session_in_order() -> None:
    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            accepted = asyncio.Semaphore(0)
            hub.runs.observers.append(lambda run, event: accepted.release() if event[0] == "accepted" else None)
            calls = []
            for n in range(4):
                calls.append(asyncio.ensure_future(ask(hub, f"turn {n}", user="ann")))
                await within(accepted.acquire())
            for n in range(4):
                call = await upstream.call()
                said = [message["content"] for message in call.json["messages"]]
                assert said == [text for m in range(n) for text in (f"turn {m}", f"answer {m}")] + [f"turn {n}"]
                await says(f"answer {n}")(call)
                call.done.set()
                assert (await calls[n]).text == f"answer {n}"
            assert upstream.peak == 1

    run(main())


# Sessions


def said(*pairs: str) -> list[dict[str, str]]:
    """A conversation: "u:hello" is a user's message, "a:hi" the assistant's."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[pair[0]], "content": pair[2:]} for pair in pairs]


NO_DOUBLING = [  # what a second request with the transcript [u:one a:yes] sends -> what the upstream gets
    (["u:two"], ["u:one", "a:yes", "u:two"]),
    (["u:one", "a:yes", "u:two"], ["u:one", "a:yes", "u:two"]),  # a client that sends its whole history
    (["a:yes", "u:two"], ["u:one", "a:yes", "u:two"]),
    (["s:Be brief.", "u:one", "a:yes", "u:two"], ["s:Be brief.", "u:one", "a:yes", "u:two"]),
    (["u:one"], ["u:one", "a:yes", "u:one"]),  # the turn's message is never dropped
    (["u:one", "a:no", "u:two"], ["u:one", "a:yes", "u:one", "a:no", "u:two"]),
    (["u:zero", "a:yes", "u:two"], ["u:one", "a:yes", "u:zero", "a:yes", "u:two"]),
]


@pytest.mark.parametrize(("sent", "expected"), NO_DOUBLING)
def test_no_doubling(sent: list[str], expected: list[str]) -> None:
    async def main() -> None:
        async with Upstream(says("y", "es")) as upstream, serving(upstream.settings()) as hub:
            await ask(hub, messages=said("u:one"), user="ann")
            await ask(hub, messages=said(*sent), user="ann")
            assert upstream.calls[1].json["messages"] == said(*expected)
            _, kept = await hub.store.history("main", "agent:main:openai-user:ann")
            stored = [text for text in (*expected, "a:yes") if not text.startswith("s:")]
            assert [{"role": entry["role"], "content": entry["content"]} for entry in kept] == said(*stored)
            await ask(hub, messages=said("u:other"), user="bob")
            assert upstream.calls[2].json["messages"] == said("u:other")

    run(main())


def test_stateless_calls_are_not_stored() -> None:
    async def main() -> None:
        async with serving() as hub:
            await ask(hub)
            await stream(hub, user="")
            assert await hub.store.list() == []
            await ask(hub, user="ann")
            await ask(hub, "hi", {"x-copepod-session-key": "desk"})
            assert {entry["key"] for entry in await hub.store.list()} == {"desk", "agent:main:openai-user:ann"}

    run(main())


@pytest.mark.parametrize(
    ("session_from", "keys"),
    [
        ("user", {"agent:main:openai-chat:c", "agent:main:openai-user:ann", "desk"}),
        ("header", {"agent:main:openai-chat:c", "desk"}),
        ("none", {"desk"}),
    ],
)
def test_what_makes_a_session(session_from: str, keys: set[str]) -> None:
    async def main() -> None:
        where = "gateway.http.endpoints.chatCompletions"
        async with serving({f"{where}.sessionHeaders": ["X-Chat"], f"{where}.sessionFrom": session_from}) as hub:
            fields = ({"x-chat": "c"}, {}, {"x-chat": "c", "x-copepod-session-key": "desk"})
            told = [(await ask(hub, "hi", each, user="ann")).fields["x-copepod-session-key"] for each in fields]
            assert {key for key in told if not key.startswith("agent:main:openai:")} == keys
            assert {entry["key"] for entry in await hub.store.list()} == keys
            refused = await ask(hub, "hi", {"x-chat": "c" * 513})
            assert refused.status == (200 if session_from == "none" else 400)

    run(main())


def test_what_fails_is_not_stored_and_what_ends_is() -> None:
    async def main() -> None:
        async with Upstream(answers(500, b"")) as upstream, serving(upstream.settings()) as hub:
            assert (await ask(hub, "first", user="ann")).status == 502
            assert await hub.store.list() == []
            upstream.script = says("yes")
            async with await Client.open(hub.port) as client:
                client.say("second", stream=True, user="ann")
                await client.head()
                async for event in client.events():
                    if '"finish_reason":"stop"' in event:  # on the disk before it is said to be done
                        _, kept = await hub.store.history("main", "agent:main:openai-user:ann")
                        assert [entry["content"] for entry in kept] == ["second", "yes"]

    run(main())


def test_max_messages() -> None:
    async def main() -> None:
        async with Upstream(says("yes")) as upstream:
            async with serving({**upstream.settings(), "session.maxMessages": 4}) as hub:
                for n in range(5):
                    await ask(hub, f"turn {n}", user="ann")
            expected = said("u:turn 2", "a:yes", "u:turn 3", "a:yes", "u:turn 4")
            assert upstream.calls[-1].json["messages"] == expected

    run(main())


def test_sessions_outlive_the_gateway(tmp_path: Any) -> None:
    async def main() -> None:
        async with Upstream(says("yes")) as upstream:
            changes = {**upstream.settings(), "session.store": str(tmp_path / "sessions.sqlite3")}
            for _ in range(2):
                async with serving(changes) as hub:
                    await ask(hub, "hi", user="ann")
            assert upstream.calls[1].json["messages"] == said("u:hi", "a:yes", "u:hi")

    run(main())


def test_what_the_upstream_is_asked() -> None:
    async def main() -> None:
        async with Upstream(says("yes")) as upstream:
            agent = {"id": "main", "systemPrompt": "You are Ann.", "params": {"temperature": 0.2, "top_p": 1}}
            async with serving({**upstream.settings(headers={"X-Team": "a"}), "agents.list": [agent]}) as hub:
                sent = [*said("s:One."), {"role": "developer", "content": "Two."}, *said("u:hi")]
                fields = {"Authorization": "Bearer of-the-client"}
                await ask(hub, "", fields, messages=sent, temperature=0.7, x_unknown=1, **more)
        call = upstream.calls[0]
        assert (call.method, call.path) == ("POST", "/v1/chat/completions")
        assert call.fields["authorization"] == f"Bearer {KEY}"
        assert call.fields["x-team"] == "a"
        assert call.json == {
            "model": "large",
            "messages": [{"role": "system", "content": "You are Ann.\n\nOne.\n\nTwo."}, *said("u:hi")],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.7,
            "top_p": 1,
            **more,
        }

    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    more = {"response_format": schema, "seed": 7, "logprobs": True, "top_logprobs": 3}
    run(main())


# Fallbacks


def test_fallbacks() -> None:
    async def main() -> None:
        async def script(call: Call) -> None:
            model = call.json["model"]
            if model == "late":
                call.begin()
                call.word("first")
                call.close = True
            elif model == "good":
                await says("from good")(call)
            else:
                call.answer(int(model), b"{}")

        async with Upstream(script) as upstream:
            for primary, fallbacks, expected, asked in (
                ("up/500", ["up/good"], "from good", ["500", "good"]),
                ("up/401", ["up/429", "up/good"], "from good", ["401", "429", "good"]),
                ("none/x", ["up/good"], "from good", ["good"]),
                ("up/good", ["up/500"], "from good", ["good"]),
                ("up/500", ["up/429"], 429, ["500", "429"]),
                ("up/late", ["up/good"], 502, ["late"]),  # it has spoken: no other may begin anew
            ):
                model = {"primary": primary, "fallbacks": fallbacks}
                async with serving({**upstream.settings(), "agents.defaults.model": model}) as hub:
                    del upstream.calls[:]
                    answer = await ask(hub)
                    assert (answer.text if answer.status == 200 else answer.status) == expected
                    assert [call.json["model"] for call in upstream.calls] == asked

    run(main())


def test_upstream_that_ends_each_connection() -> None:
    """One that it has closed is not used again: a turn is sent once."""

    async def main() -> None:
        async def script(call: Call) -> None:
            await says("hi")(call)
            call.close = True

        async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
            for n in range(1, 6):
                assert (await ask(hub)).text == "hi"
                assert upstream.connections == len(upstream.calls) == n

    run(main())


# Who may call: mode none, origins


NONE = [  # fields, allowed hosts, status
    ({}, [], 200),
    ({"Host": "127.0.0.1:18789"}, [], 200),
    ({"Host": "[::1]:80"}, [], 200),
    ({"Host": "LOCALHOST"}, [], 200),
    ({"Host": "evil.example"}, [], 403),  # DNS rebinding
    ({"Host": "127.0.0.1.evil.example"}, [], 403),
    ({"Host": "192.168.1.1"}, [], 403),
    ({"Host": ""}, [], 403),
    ({"Host": "box.lan:18789"}, ["box.lan"], 200),
    ({"Host": "box.lan"}, ["other.lan"], 403),
    ({"X-Forwarded-For": "127.0.0.1"}, [], 403),
    ({"X-Forwarded-For": ""}, [], 403),
    ({"X-Forwarded-Proto": "https"}, [], 403),
    ({"Forwarded": "for=127.0.0.1"}, [], 403),
    ({"Via": "1.1 proxy"}, [], 403),
    ({"X-Real-IP": "127.0.0.1"}, [], 403),
]


@pytest.mark.parametrize(("fields", "hosts", "status"), NONE)
def test_mode_none(fields: dict[str, str], hosts: list[str], status: int) -> None:
    async def main() -> None:
        async with serving({"gateway.http.allowedHosts": hosts}) as hub, await Client.open(hub.port) as client:
            for method, path, body in (("POST", CHAT, chat()), ("GET", "/healthz", None), ("GET", "/nowhere", None)):
                answer = await client.ask(method, path, body, fields)
                if status == 403:
                    assert answer.status == 403
                    assert answer.error["type"] == "permission_error"
                else:
                    assert answer.status == (404 if path == "/nowhere" else 200)
            assert await client.usable()
        async with serving(TOKEN) as hub, await Client.open(hub.port) as client:  # these rules are mode none's alone
            assert (await client.ask("POST", CHAT, chat(), {**fields, **BEARER})).status == 200

    run(main())


ORIGINS = [  # origin, allowed ones, Host, whether it may call
    ("http://localhost:18789", [], "localhost:18789", True),
    ("http://localhost", [], "localhost:80", True),
    ("http://localhost", [], "localhost", True),
    ("http://localhost:1", [], "localhost:2", False),
    ("http://evil.example", [], "localhost", False),
    ("null", [], "localhost", False),
    ("null", ["null", "*"], "localhost", False),
    ("http://evil.example", ["*"], "localhost", False),
    ("https://app.example", ["https://app.example"], "localhost", True),
    ("https://app.example:443", ["https://app.example"], "localhost", False),  # as an exact string
    ("https://app.example.evil", ["https://app.example"], "localhost", False),
    ("", [], "localhost", False),
]


@pytest.mark.parametrize(("origin", "allowed", "host", "welcome"), ORIGINS)
def test_origin(origin: str, allowed: list[str], host: str, welcome: bool) -> None:
    async def main() -> None:
        async with (
            serving({**TOKEN, "gateway.http.allowedOrigins": allowed}) as hub,
            await Client.open(hub.port) as client,
        ):
            fields = {"Host": host, "Origin": origin}
            ask_first = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, x-a",
            }
            preflight = await client.ask("OPTIONS", CHAT, None, {**fields, **ask_first})
            good = await client.ask("POST", CHAT, chat(), {**fields, **BEARER})
            denied = await client.ask("POST", CHAT, chat(), fields)
            missing = await client.ask("GET", "/nowhere", None, fields)
            health = await client.ask("GET", "/healthz", None, fields)
            if not welcome:
                for answer in (preflight, good, denied, missing, health):
                    assert answer.status == 403
                    assert answer.error["type"] == "permission_error"
                    assert not [name for name in answer.fields if name.startswith("access-control")]
                return
            assert [a.status for a in (preflight, good, denied, missing, health)] == [204, 200, 401, 404, 200]
            for answer in (preflight, good, denied, missing, health):
                assert answer.fields["access-control-allow-origin"] == origin
                assert answer.fields["vary"] == "Origin"
                assert "access-control-allow-credentials" not in answer.fields
            exposed = good.fields["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "x-copepod-session-key", "x-copepod-agent-id", "retry-after"} <= set(exposed)
            assert "content-length" not in preflight.fields
            assert "POST" in preflight.fields["access-control-allow-methods"]
            assert preflight.fields["access-control-allow-headers"] == "authorization, x-a"

    run(main())


def test_trusted_proxies() -> None:
    """Only their X-Forwarded-For is believed: each client behind them is locked out for itself."""

    async def main() -> None:
        limit = {"maxAttempts": 1, "windowMs": 60000, "lockoutMs": 60000, "exemptLoopback": True}
        for trusted, statuses in ((["127.0.0.0/8"], [401, 429, 200]), ([], [401, 429, 429])):
            async with serving({**TOKEN, "gateway.auth.rateLimit": limit, "gateway.trustedProxies": trusted}) as hub:
                found = []
                for client, credential in (("192.0.2.1", "wrong"), ("192.0.2.1", "secret"), ("192.0.2.2", "secret")):
                    fields = {"X-Forwarded-For": f"127.0.0.1, {client}", "Authorization": f"Bearer {credential}"}
                    found.append((await ask(hub, "hi", fields)).status)
                assert found == statuses

    run(main())


# What stays open and what does not


def test_early_refusals_and_their_bodies() -> None:
    refused = "DENIED " * 1000

    async def main() -> None:
        async with serving(TOKEN) as hub:
            for method, path, body, status, stays in (
                ("POST", CHAT, b"", 401, True),
                ("POST", CHAT, refused.encode(), 401, True),
                ("POST", CHAT, b"x" * 65_536, 401, True),
                ("POST", CHAT, b"x" * 65_537, 401, False),
                ("POST", CHAT, b"x" * 2_000_000, 401, False),
                ("PUT", CHAT, b"x" * 65_536, 405, True),
                ("POST", "/nowhere", b"x" * 65_536, 404, True),
                ("POST", "/nowhere", b"x" * 65_537, 404, False),
            ):
                async with await Client.open(hub.port) as client:
                    answer = await client.ask(method, path, body)
                    assert answer.status == status
                    assert answer.fields.get("connection") == (None if stays else "close")
                    if stays:
                        assert (await client.ask("POST", CHAT, chat(), BEARER)).text == "hi"
                    else:
                        assert await client.ended()

    run(main())


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/healthz", {}, 200),
        ("HEAD", "/readyz", {}, 200),
        ("GET", "/v1/models", BEARER, 200),
        ("OPTIONS", "*", {}, 204),
        ("OPTIONS", CHAT, {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}, 204),
    ],
)
def test_a_body_that_nobody_asked_for_is_no_request(
    method: str, path: str, fields: dict[str, str], status: int
) -> None:
    """RFC 9112 6.3: what Content-Length and chunked frame is body, whatever it reads like."""
    hidden = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def main() -> None:
        async with serving({**TOKEN, "gateway.http.allowedOrigins": ["http://localhost"]}) as hub:
            for size, stays in ((1, True), (2000, False)):
                async with await Client.open(hub.port) as client:
                    answer = await client.ask(method, path, hidden * size, fields)
                    assert answer.status == status
                    assert answer.fields.get("connection") == (None if stays else "close")
                    assert await client.usable() if stays else await client.ended()
                async with await Client.open(hub.port) as client:
                    client.send(method, path, None, {**fields, "Transfer-Encoding": "chunked"})
                    client.write(chunked(hidden * size))
                    assert (await client.answer()).status == status
                    assert await client.usable() if stays else await client.ended()

    run(main())


def test_early_refusals_of_chunked_bodies() -> None:
    async def main() -> None:
        async with serving(TOKEN) as hub:
            for size, stays in ((60_000, True), (70_000, False)):
                async with await Client.open(hub.port) as client:
                    client.send("POST", CHAT, None, {"Transfer-Encoding": "chunked"})
                    client.write(chunked(b"x" * size))
                    assert (await client.answer()).status == 401
                    if stays:
                        assert (await client.ask("POST", CHAT, chat(), BEARER)).text == "hi"
                    else:
                        assert await client.ended()

    run(main())


def test_expectations() -> None:
    """The 100 comes after route, auth and the declared length have passed, and not when the body is already here."""

    async def main() -> None:
        body, expect = chat(), {"Expect": "100-continue"}
        length = {"Content-Length": str(len(body))}
        async with serving(TOKEN) as hub:
            async with await Client.open(hub.port) as client:
                for _ in range(2):
                    client.send("POST", CHAT, None, {**expect, **length, **BEARER})
                    assert (await client.head())[0] == 100
                    client.write(body)
                    assert (await client.answer()).text == "hi"
                client.send("POST", CHAT, body, {**expect, **BEARER})
                assert (await client.answer()).status == 200
            for path, more, status in (
                (CHAT, length, 401),
                ("/nowhere", {**length, **BEARER}, 404),
                (CHAT, {"Content-Length": "1048577", **BEARER}, 413),
            ):
                async with await Client.open(hub.port) as client:
                    client.send("POST", path, None, {**expect, **more})
                    assert (await client.answer()).status == status
                    client.writer.write_eof()
                    assert await client.ended()

    run(main())


def test_the_old_version() -> None:
    """HTTP/1.0: the answer is never chunked, and ends the connection."""

    async def main() -> None:
        async with serving() as hub:
            for fields in ({}, {"Connection": "keep-alive"}, {"Host": "localhost"}):
                async with await Client.open(hub.port) as client:
                    answer = await client.ask("GET", "/healthz", None, {"Host": "localhost", **fields}, minor=0)
                    assert (answer.status, answer.json) == (200, {"status": "ok"})
                    assert await client.ended()
            async with await Client.open(hub.port) as client:
                answer = await client.ask("POST", CHAT, chat("hello there", stream=True), minor=0)
                assert answer.status == 200
                assert "transfer-encoding" not in answer.fields
                assert "content-length" not in answer.fields
                events = answer.body.decode().removesuffix("\n\n").split("\n\n")
                assert text_of(events) == "hello there"
                assert events[-1] == "data: [DONE]"

    run(main())


def test_connection_close() -> None:
    async def main() -> None:
        async with serving() as hub:
            for stream_ in (False, True):
                async with await Client.open(hub.port) as client:
                    answer = await client.ask("POST", CHAT, chat(stream=stream_), {"Connection": "close"})
                    assert answer.status == 200
                    assert answer.fields["connection"] == "close"
                    assert await client.ended()
            async with await Client.open(hub.port) as client:
                for host, status in (("localhost", 200), ("evil.example", 403)):  # absolute-form: it replaces the Host
                    assert (await client.ask("GET", f"http://{host}:{hub.port}/healthz")).status == status

    run(main())


# The other routes


def test_models() -> None:
    async def main() -> None:
        async with (
            serving({**TOKEN, "agents.list": [{"id": "alpha"}, {"id": "beta"}]}) as hub,
            await Client.open(hub.port) as client,
        ):
            listed = (await client.ask("GET", "/v1/models", None, BEARER)).json
            assert listed["object"] == "list"
            assert [model["id"] for model in listed["data"]] == ["copepod:alpha", "copepod:beta"]
            for model in listed["data"]:
                assert model == {**model, "object": "model", "owned_by": "copepod"}
                assert type(model["created"]) is int
            for name, agent in (
                ("copepod:beta", "beta"),
                ("copepod%3Abeta", "beta"),
                ("copepod/beta", "beta"),
                ("copepod%2Fbeta", "beta"),
                ("agent:beta", "beta"),
                ("moltbot:Beta", "beta"),
                ("fased:main", "alpha"),
                ("openclaw", "alpha"),
                ("edwin/default", "alpha"),
                ("copepod:gamma", None),
                ("gpt-4o", None),
                ("copepod%253Abeta", None),  # decoded once
                ("%FF", None),
                ("copepod:beta/", None),
            ):
                answer = await client.ask("GET", f"/v1/models/{name}", None, BEARER)
                if agent is None:
                    assert (answer.status, answer.error["code"]) == (404, "model_not_found"), name
                else:
                    assert answer.status == 200, name
                    assert answer.json["id"] == f"copepod:{agent}"
            assert (await client.ask("GET", "/v1/models")).status == 401

    run(main())


def test_health_head_and_options() -> None:
    async def main() -> None:
        async with serving(TOKEN) as hub, await Client.open(hub.port) as client:
            for path in ("/healthz", "/readyz", "/v1/models", "/healthz?x=1"):
                got = await client.ask("GET", path, None, BEARER)
                assert got.status == 200
                head = await client.ask("HEAD", path, None, BEARER)
                assert (head.status, head.body) == (200, b"")
                assert head.fields["content-length"] == str(len(got.body))
            assert (await client.ask("GET", "/healthz")).body == b'{"status":"ok"}'
            for other in ({"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"}, {"Upgrade": "TLS/1.0"}):
                assert (await client.ask("GET", "/healthz", None, other)).status == 200
            refused = await client.ask("HEAD", CHAT)
            assert (refused.status, refused.body, refused.fields["allow"]) == (405, b"", "POST")
            star = await client.ask("OPTIONS", "*")
            assert star.status == 204
            assert "content-length" not in star.fields
            assert await client.usable()

    run(main())


def test_a_turn_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered, and the loss is said: in the answer's head, and by readyz until the next one is kept."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            await hub.store.close()
            answer = await ask(hub, user="u")
            assert (answer.text, answer.fields["x-copepod-store"]) == ("hi", "failed")
            ready = await client.ask("GET", "/readyz")
            assert ready.json == {"status": "degraded", "listening": "ok", "store": "a session could not be kept"}
            assert (await client.ask("GET", "/healthz")).json == {"status": "ok"}
            hub.store._closed = False
            assert "x-copepod-store" not in (await ask(hub, user="u")).fields
            assert (await client.ask("GET", "/readyz")).json == {"status": "ok", "listening": "ok", "store": "ok"}

    run(main())


def test_going_down() -> None:
    """Idle connections end, new runs are refused, what runs is answered whole; then nobody listens."""

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            async with await Client.open(hub.port) as busy, await Client.open(hub.port) as idle:
                assert await idle.usable()
                busy.say("hi", stream=True)
                call = await upstream.call()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(hub.stop(10))
                    assert await idle.ended()
                    for method, path, body, status in (
                        ("GET", "/readyz", None, 503),
                        ("GET", "/healthz", None, 200),
                        ("POST", CHAT, chat(), 503),
                        ("POST", CHAT, chat(stream=True), 503),
                    ):
                        async with await Client.open(hub.port) as client:
                            answer = await client.ask(method, path, body)
                            assert answer.status == status
                            assert answer.fields["connection"] == "close"
                            assert await client.ended()
                    await says("to", " the", " end")(call)
                    call.done.set()
                    assert (await busy.head())[0] == 200
                    assert text_of([event async for event in busy.events()]) == "to the end"
            with pytest.raises(ConnectionError):
                await Client.open(hub.port)

    run(main())


@pytest.mark.parametrize("hurried", [False, True])
def test_going_down_takes_nothing_back_from_who_reads_slowly(hurried: bool) -> None:
    """An answer that is ours no longer, but of which a part still waits here to be sent."""
    text = "x" * 60_000

    async def reply(message: str) -> AsyncIterator[str]:
        yield text

    async def main() -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        async with serving(agents={"main": reply}) as hub:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", hub.port))
            client = Client(*await asyncio.open_connection(sock=sock))
            assert await client.usable()
            (c,) = hub.connections
            c.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.say("hi")
            await until(lambda: c.flushing)
            stopping = asyncio.create_task(hub.stop(10 * BOUND))
            await until(c.transport.is_closing)
            if hurried:
                hub.hurry()
            else:
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                assert (await client.answer()).text == text
            await within(stopping)
            await client.close()

    run(main())


# Streams


def test_the_events_of_a_stream() -> None:
    async def main() -> None:
        async with serving() as hub:
            answer, events = await stream(
                hub, "hello there", model="Fased:main", stream_options={"include_usage": True}
            )
            assert answer.fields["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.fields["cache-control"] == "no-cache"
            assert answer.fields["x-accel-buffering"] == "no"
            assert answer.fields["transfer-encoding"] == "chunked"
            assert "content-length" not in answer.fields
            assert events[-1] == "data: [DONE]"
            chunks = data_of(events)
            assert len(chunks) == len(events) - 1
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
            assert all(chunk["model"] == "Fased:main" for chunk in chunks)
            assert [chunk["choices"] for chunk in chunks] == [
                [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
                [{"index": 0, "delta": {"content": "hello "}, "finish_reason": None}],
                [{"index": 0, "delta": {"content": "there"}, "finish_reason": None}],
                [{"index": 0, "delta": {}, "finish_reason": "stop"}],
                [],
            ]
            assert set(chunks[-1]["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
            assert all("usage" not in chunk for chunk in chunks[:-1])
            _, plain = await stream(hub, "hello there")
            assert len(plain) == len(events) - 1

    run(main())


def test_every_character_arrives() -> None:
    text = 'h\u00e9llo \U0001f990\u2028 \x01 "q" \\ </script> \ufeff a\r\nb '

    async def main() -> None:
        async with serving() as hub:
            assert (await ask(hub, text)).text == text
            assert text_of((await stream(hub, text))[1]) == text

    run(main())


def test_a_word_goes_out_when_it_comes() -> None:
    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub, await Client.open(hub.port) as client:
            client.say("hi", stream=True)
            call = await upstream.call()
            call.begin()
            call.word("word 0")
            assert (await client.head())[0] == 200
            events = client.events()
            await within(anext(events))
            for n in range(5):
                assert f'"word {n}"' in await within(anext(events))
                call.word(f"word {n + 1}")  # not before the one before it has arrived
            call.finish()
            call.end()
            call.done.set()
            assert [event async for event in events][-1] == "data: [DONE]"

    run(main())


def test_the_head_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before its first word is a real status, unless that takes too long: then 200, and an error event."""
    monkeypatch.setattr(chat_answers, "HOLD_SECONDS", 0.05)
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub, await Client.open(hub.port) as client:
            client.say("hi", stream=True)
            call = await upstream.call()
            assert (await client.head())[0] == 200  # by the clock: nothing was answered yet
            events = client.events()
            assert '"role"' in await within(anext(events))
            call.answer(503, b"")
            call.done.set()
            error, done = [event async for event in events]
            assert json.loads(error[6:])["error"]["type"] == "upstream_error"
            assert done == "data: [DONE]"
            assert await client.usable()

    run(main())


def test_comments_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_answers, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub, await Client.open(hub.port) as client:
            client.say("hi", stream=True)
            call = await upstream.call()
            call.begin()
            call.word("a")
            assert (await client.head())[0] == 200
            comments = 0
            async for event in client.events():
                if event == ": keep-alive":
                    comments += 1
                    if comments == 3:
                        call.word("b")
                        call.finish()
                        call.end()
                        call.done.set()
                else:
                    assert event.startswith("data: ")
            assert comments >= 3
            assert await client.usable()

    run(main())


# Bounds


def test_too_many_connections() -> None:
    async def main() -> None:
        async with serving({"gateway.maxConnections": 2}) as hub:
            clients = [await Client.open(hub.port) for _ in range(2)]
            for client in clients:
                assert await client.usable()
            async with await Client.open(hub.port) as refused:
                answer = await refused.ask("GET", "/healthz")
                assert answer.status == 503
                assert answer.error["type"] == "overloaded_error"
                assert answer.fields["retry-after"] == "1"
                assert answer.fields["connection"] == "close"
                assert await refused.ended()
            for client in clients:
                assert await client.usable()
                await client.close()
            status = 503  # until it has seen them go
            while status == 503:
                async with await Client.open(hub.port) as client:
                    status = (await client.ask("GET", "/healthz")).status
            assert status == 200

    run(main())


def test_too_many_connections_at_once() -> None:
    """They are counted also when all of them are accepted in the same turn of the loop."""

    async def main() -> None:
        async with serving({"gateway.maxConnections": 2}) as hub, asyncio.TaskGroup() as tasks:
            clients = [tasks.create_task(Client.open(hub.port)) for _ in range(20)]
            await asyncio.wait(clients)
            answers = [await (await client).ask("GET", "/healthz") for client in clients]
            for client in clients:
                await (await client).close()
            assert sorted(answer.status for answer in answers) == [200] * 2 + [503] * 18

    run(main())


def test_connections_beyond_those_that_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SPARE", 1)

    async def main() -> None:
        async with serving({"gateway.maxConnections": 1}) as hub:
            async with await Client.open(hub.port) as first, await Client.open(hub.port) as told:
                assert await first.usable()
                async with await Client.open(hub.port) as dropped:
                    assert await dropped.ended()
                assert (await told.ask("GET", "/healthz")).status == 503
                assert await first.usable()

    run(main())


# In another program


def test_two_gateways_in_one_process() -> None:
    async def main() -> None:
        async def one(message: str) -> AsyncIterator[str]:
            yield "one"

        def two(message: str, turn: dict[str, Any]) -> str:
            return f"two {turn['agent_id']}"

        async with serving(TOKEN, {"main": one}) as first, serving({}, {"main": one, "other": two}) as second:
            assert first.port != second.port
            assert (await ask(first, "hi", BEARER)).text == "one"
            assert (await ask(first)).status == 401
            assert (await ask(second)).text == "one"
            assert (await ask(second, model="copepod:other", user="ann")).text == "two other"
            assert await first.store.list() == []
            assert len(await second.store.list()) == 1
            async with await Client.open(second.port) as client:
                listed = (await client.ask("GET", "/v1/models")).json["data"]
                assert [model["id"] for model in listed] == ["copepod:main", "copepod:other"]
            assert first.url == f"http://127.0.0.1:{first.port}"

    run(main())


def test_start_that_fails_leaves_nothing(tmp_path: Any) -> None:
    async def main() -> None:
        store = {"session.store": str(tmp_path / "sessions.sqlite3")}
        async with serving() as hub:
            with pytest.raises(OSError, match="in use"):
                async with serving({"gateway.port": hub.port, **store}):
                    pass
        async with serving(store) as hub:  # nobody holds it
            assert (await ask(hub, user="ann")).text == "hi"
            with socket.socket() as free:
                free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # bound, so that nobody else takes it
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
                with pytest.raises(sessions.StoreError, match="in use"):
                    async with serving({"gateway.port": port, **store}):
                        pass
                with pytest.raises(ConnectionError):
                    await Client.open(port)
        with pytest.raises(config.ConfigError, match=r"gateway\.port"):
            async with serving({"gateway.port": "x"}):
                pass

    run(main())


@pytest.mark.parametrize("turns", range(8))
def test_start_that_is_cancelled_leaves_nothing(turns: int, tmp_path: Any) -> None:
    async def main() -> None:
        config = settings({"session.store": str(tmp_path / "sessions.sqlite3")})
        first = gateway.Gateway(config)
        starting = asyncio.ensure_future(first.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
            await first.stop(0)  # it was quicker
        async with gateway.Gateway(config) as hub:  # nobody holds the store
            assert (await ask(hub, user="ann")).text == "hi"

    run(main())


def test_reload(caplog: pytest.LogCaptureFixture) -> None:
    """The next request is served by the new configuration; what runs goes on by the old one."""

    async def main() -> None:
        async with Upstream() as upstream, serving({**upstream.settings(), **TOKEN}) as hub:
            async with await Client.open(hub.port) as client:
                client.say("hi", BEARER)
                call = await upstream.call()
                changed = {"gateway.auth.mode": "token", "gateway.auth.token": "new", "agents.list": [{"id": "zeta"}]}
                origins = {"gateway.http.allowedOrigins": ["https://a.example"]}
                loaded = gateway.Gateway(settings({**changed, **origins})).house.config
                for _ in range(2):
                    caplog.clear()
                    hub.reload(loaded._replace(tls=("cert.pem", "key.pem"), max_connections=1))
                    assert caplog.messages == ["another tls and max connections holds from the next start on"]
                await says("of old")(call)
                call.done.set()
                answer = await client.answer()
                assert answer.text == "of old"
                assert answer.fields["x-copepod-agent-id"] == "main"
                assert (await client.ask("POST", CHAT, chat(), BEARER)).status == 401
                fields = {"Authorization": "Bearer new", "Origin": "https://a.example"}
                answer = await client.ask("POST", CHAT, chat(), fields)
                assert answer.text == "hi"
                assert answer.fields["x-copepod-agent-id"] == "zeta"
                own = {"Authorization": "Bearer new", "Origin": "http://localhost", "Host": "localhost"}
                assert (await client.ask("POST", CHAT, chat(), own)).text == "hi"
            assert len(upstream.calls) == 1

    run(main())


@pytest.mark.parametrize("line", [b"HEAD /healthz HTTP/1.1\r\n\r\n", b"HEAD /healthz HTTP/1.1\r\nHost: a b\r\n\r\n"])
def test_a_refused_head_has_no_body(line: bytes) -> None:
    """RFC 9110 9.3.2, also where the head itself is refused."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            client.write(line)
            status, fields = await client.head()
            assert (status, fields["connection"]) == (400, "close")
            assert int(fields["content-length"]) > 0
            assert await client.ended()

    run(main())


def test_a_coded_body_is_refused() -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            answer = await client.ask("POST", CHAT, chat(), {"Content-Encoding": "gzip"})
            assert (answer.status, answer.fields["accept-encoding"]) == (415, "identity")
            assert answer.error["message"] == "The body's Content-Encoding is not understood; send plain JSON."
            answer = await client.ask("POST", CHAT, chat(), {"Content-Encoding": "Identity"})
            assert answer.text == "hi"

    run(main())


def test_who_reads_no_answers_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without end, whose answers are not read: it is dropped, and no more than a part of them is answered."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.05)

    async def main() -> None:
        async with serving({"gateway.http.writeTimeoutSeconds": 0.2}) as hub, await Client.open(hub.port) as client:
            most, dropped = 0, False
            request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
            client.writer.transport.pause_reading()
            while not hub.connections:
                await asyncio.sleep(0)
            for c in hub.connections:  # else the kernel takes megabytes of answers first
                c.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
            until = asyncio.get_running_loop().time() + BOUND
            while not dropped and asyncio.get_running_loop().time() < until:
                if client.writer.transport.get_write_buffer_size() < len(request):
                    client.write(request)
                await asyncio.sleep(0.001)  # what is sent before the gateway reads no more is told by no event
                unsent = [c.transport.get_write_buffer_size() for c in hub.connections]
                most, dropped = max([most, *unsent]), not unsent and most > 0
            assert dropped
            assert most < 512 * 1024
            client.writer.transport.abort()

    run(main())


def test_who_sends_much_behind_runs_costs_no_memory() -> None:
    """Calls pipelined faster than they are answered: what is not read yet waits with the client."""

    async def slow(message: str) -> AsyncIterator[str]:
        await asyncio.sleep(0.001)
        yield message

    async def main() -> None:
        async with serving({}, {"main": slow}) as hub, await Client.open(hub.port) as client:
            body = chat("x" * 10_000)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            most = 0
            with suppress(asyncio.IncompleteReadError, ConnectionError):  # it may be ended
                for n in range(150):
                    client.write((head.encode() + body) * 3)
                    if n > 2:
                        _, fields = await client.head()
                        await within(client.reader.readexactly(int(fields["content-length"])))
                    most = max([most, *(c.buffered for c in hub.connections)])
            assert most < 1024 * 1024
            client.reset()

    run(main())


def test_one_that_pipelines_leaves_time_for_others() -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as busy, await Client.open(hub.port) as other:
            assert await other.usable()
            busy.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
            other.send("GET", "/healthz")
            assert (await other.answer()).status == 200
            assert busy.reader._buffer.count(b"HTTP/1.1 200") < 1000  # type: ignore[attr-defined]
            for _ in range(1000):
                assert (await busy.answer()).status == 200

    run(main())


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({"clientTools": True}, "clientTools is true, but its models of echo"),
        ({"input": ["text", "image"]}, "see none"),
    ],
)
def test_an_echo_has_neither_tools_nor_eyes(agent: dict[str, Any], said: str) -> None:
    changes = {"agents.list": [{"id": "main", **agent}]}
    with pytest.raises(config.ConfigError, match=said):
        gateway.Gateway(settings(changes))

    async def main() -> None:
        async with serving(changes, {"main": str.upper}):  # a function may have what it likes
            pass

    run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_that_comes_as_nobody_listens_any_more(turns: int) -> None:
    """asyncio attaches it to the server in a later turn of the loop than the one that accepts it: not to a closed one.

    Else it logs a traceback, and the connection is left to the collector (python/cpython#109564).
    """
    wrong: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        async with serving() as hub:
            with socket.create_connection(("127.0.0.1", hub.port)):
                for _ in range(turns):
                    await asyncio.sleep(0)
                await hub.stop(0)

    run(main())
    gc.collect()
    assert not wrong


def test_a_request_that_comes_as_all_is_cut_is_told() -> None:
    """Its task has not begun: cancelled at once, it would end without a word."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            (connection,) = hub.connections
            body = chat()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            hub.draining = True
            connection.data_received(head + body)
            hub._cut()
            assert (await client.answer()).status == 503

    run(main())
