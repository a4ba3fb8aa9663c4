"""Tokens for friends, live: what one for `beta` tries against the others, and that nothing is seen or reached."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import auth
import control
import gateway
import schema
from live import CHAT, Client, ask, chat, data_of, run, serving, settings, stream, text_of, within
from peer import SESAME, Frame, Peer, connected, opened
from test_program import program
from upstream import Upstream, says

ALICE = {"name": "alice", "token": "of alice", "agents": ["beta"], "scopes": ["chat", "operator.read"]}
BOB = {"name": "bob", "token": "of bob", "agents": ["beta"]}
EVE = {"name": "eve", "token": "of eve"}  # may use them all
AGENTS = [{"id": "main", "default": True, "name": "Mainframe"}, {"id": "beta"}, {"id": "gamma", "name": "Gammaray"}]
FRIENDS = {
    "gateway.auth.mode": "token",
    "gateway.auth.token": SESAME,
    "gateway.auth.tokens": [ALICE, BOB, EVE],
    "agents.list": AGENTS,
}
CHATS = "gateway.http.endpoints.chatCompletions"
BEARER = {"Authorization": f"Bearer {SESAME}"}
ERRORS = {400: "invalid_request_error", 404: "invalid_request_error"}


def bearer(name: str, **fields: str) -> dict[str, str]:
    return {"Authorization": f"Bearer of {name}", **{key.replace("_", "-"): text for key, text in fields.items()}}


class House:
    """A gateway of three agents, each of which repeats all that it was told; "hold" makes it wait to be let go."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []
        self.held, self.go = asyncio.Semaphore(0), asyncio.Event()

    async def speak(self, message: str, turn: dict[str, Any]) -> AsyncIterator[str]:
        self.turns.append(turn)
        yield f"{turn['agent_id']}:"
        if message.startswith("hold"):
            self.held.release()
            await self.go.wait()
        yield "|".join(said["content"] for said in turn["messages"] if said["role"] == "user")

    @asynccontextmanager
    async def open(self, **changes: Any) -> AsyncIterator[gateway.Gateway]:
        agents = {entry["id"]: self.speak for entry in AGENTS}
        async with serving({**FRIENDS, **changes}, agents) as hub:
            yield hub

    def of(self, agent: str) -> list[str]:
        return [turn["message"] for turn in self.turns if turn["agent_id"] == agent]


# What nobody but the operators may see: words of their sessions and runs, and of the other agents.
HIDDEN = re.compile(r"SECRET|diary|gamma(?!\d)|Gammaray|Mainframe|op-run|chatcmpl_op", re.IGNORECASE)
DIARIES = [("main", "agent:main:diary"), ("beta", "agent:beta:diary"), ("gamma", "agent:gamma:diary")]


async def furnish(hub: gateway.Gateway) -> list[str]:
    """Let the operators have a session of each agent; return the sessions' ids."""
    for _, key in DIARIES:
        await ask(hub, "my SECRET", {**BEARER, "x-copepod-session-key": key})
    return [session["sessionId"] for session in await hub.store.list()]


def clean(text: str, sent: str, ids: list[str]) -> None:
    """Nothing hidden is in an answer but what was sent."""
    left = [word for word in HIDDEN.findall(text) if word.lower() not in sent.lower()]
    assert not left, (left, text)
    assert not [id for id in ids if id in text and id not in sent]


# HTTP

MODELS = [
    "main", "copepod", "copepod/default", "", "gpt-4o", "copepod:main", "copepod/main", "agent:main", "AGENT:Main",
    " openclaw:main ", "moltbot/main", "clawdbot:main", "edwin/main", "agent:beta", "fased:beta", "copepod:gamma",
    "opensoul/gamma", "agent:GAMMA", "epiloop:gamma", "gamma", "agent:nobody",
]  # fmt: skip
FIELDS: list[dict[str, str]] = [
    {},
    {"x-copepod-agent-id": "main"},
    {"x-copepod-agent-id": "gamma"},
    {"x-openclaw-agent": "GAMMA"},
    {"x-moltbot-agent-id": "main", "x-copepod-session-key": "agent:main:diary"},
    {"x-copepod-session-key": "agent:main:diary"},
    {"x-fased-session-key": "agent:gamma:diary"},
    {"x-copepod-session-key": "agent:beta:diary"},
    {"x-copepod-session-key": "token:bob:agent:beta:diary"},
    {"x-copepod-session-key": "token:alice:agent:main:diary"},
    {"x-copepod-session-key": "::"},
    {"x-copepod-session-key": "main"},
    {"x-chat-id": "diary"},
    {"x-chat-id": "agent:main:diary"},
    {"x-chat-id": "token:bob:agent:beta:diary", "x-copepod-agent-id": "gamma"},
    {"x-chat-id": "diary", "x-epiloop-session-key": "agent:main:diary"},
]


def test_http_reaches_its_own_agents_alone() -> None:
    """By every form of a model, a header, a session key and a conversation's id."""

    async def main() -> None:
        house = House()
        fields = {f"{CHATS}.sessionHeaders": ["X-Chat-Id"]}
        async with house.open(**fields) as hub, await Client.open(hub.port) as client:
            ids = await furnish(hub)
            statuses = set()
            for model, fields, user in product(MODELS, FIELDS, ("", "diary")):
                client.say("hi", {**bearer("alice"), **fields}, model=model, **({"user": user} if user else {}))
                answer = await client.answer()
                statuses.add(answer.status)
                clean(answer.body.decode() + str(answer.fields), f"{model} {fields} {user}", ids)
                if answer.status == 200:
                    assert answer.fields["x-copepod-agent-id"] == "beta"
                    assert answer.text.startswith("beta:")
                else:
                    assert answer.error["type"] == ERRORS[answer.status]
                    if answer.status == 404:
                        assert re.fullmatch(
                            r"There is no agent `\w+`; the agents are `beta`\.", answer.error["message"]
                        )
            assert statuses == {200, 404}
            assert (house.of("main"), house.of("gamma")) == (["my SECRET"], ["my SECRET"])
            for agent, key in DIARIES:
                assert len((await hub.store.history(agent, key))[1]) == 2
            keys = {session["key"] for session in await hub.store.list()} - {key for _, key in DIARIES}
            assert all(key.startswith("token:alice:") for key in keys)
            assert "token:alice:agent:beta:openai-chat:diary" in keys

    run(main())


def test_models_of_a_token() -> None:
    async def main() -> None:
        async with House().open() as hub, await Client.open(hub.port) as client:

            async def seen(path: str, who: dict[str, str]) -> Any:
                answer = await client.ask("GET", path, None, who)
                if answer.status == 200:
                    return [model["id"] for model in answer.json.get("data", [answer.json])]
                clean(answer.body.decode(), path, [])
                return answer.status

            assert await seen("/v1/models", bearer("alice")) == ["copepod:beta"]
            assert await seen("/v1/models", bearer("eve")) == ["copepod:main", "copepod:beta", "copepod:gamma"]
            assert await seen("/v1/models", BEARER) == ["copepod:main", "copepod:beta", "copepod:gamma"]
            for model in filter(None, MODELS):
                path = f"/v1/models/{model.strip().replace('/', '%2F')}"
                expected: Any = 404 if model == "gpt-4o" or re.search("gamma|nobody|^main", model, re.I) else None
                assert await seen(path, bearer("alice")) == (expected or ["copepod:beta"]), path

    run(main())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/copepod:beta", CHAT])
def test_what_a_token_needs_for_http(path: str) -> None:
    async def main() -> None:
        scopes = {"read": ["operator.read"], "write": ["operator.write"], "chat": ["chat"]}
        tokens = [{"name": name, "token": f"of {name}", "scopes": list_} for name, list_ in scopes.items()]
        async with House().open(**{"gateway.auth.tokens": tokens}) as hub, await Client.open(hub.port) as client:
            for name in scopes:
                body = chat() if path == CHAT else None
                answer = await client.ask("POST" if body else "GET", path, body, bearer(name))
                assert answer.status == (403 if name == "read" else 200)
                if name == "read":
                    assert answer.error == {
                        "message": "This token lacks the scope `chat`.",
                        "type": "permission_error",
                        "param": None,
                        "code": None,
                    }

    run(main())


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [
        ("x-copepod-session-key", "agent:beta:ours", "agent:beta:ours"),
        ("x-chat-id", "ours", "agent:beta:openai-chat:ours"),
    ],
)
def test_two_friends_with_one_key_do_not_meet(field: str, value: str, own: str) -> None:
    """Neither in what is stored, nor in the lane, nor in an agent that remembers by its session's key."""

    async def main() -> None:
        house = House()
        key = {field: value, "x-copepod-agent-id": "beta"}
        async with house.open(**{f"{CHATS}.sessionHeaders": ["x-chat-id"]}) as hub:
            holding = asyncio.ensure_future(ask(hub, "hold of alice", {**bearer("alice"), **key}))
            await within(house.held.acquire())
            answer = await ask(hub, "of bob", {**bearer("bob"), **key})  # not behind hers
            assert answer.text == "beta:of bob"
            assert answer.fields["x-copepod-session-key"] == own
            assert (await ask(hub, "of the house", {**BEARER, **key})).text == "beta:of the house"
            house.go.set()
            assert (await holding).text == "beta:hold of alice"
            said = (await ask(hub, "again", {**bearer("bob"), **key})).text
            assert said == "beta:of bob|again"
            keys = [f"token:alice:{own}", f"token:bob:{own}", own]
            assert {turn["session_key"] for turn in house.turns} == set(keys)
            assert {session["key"] for session in await hub.store.list()} == set(keys)
            assert len({turn["session_id"] for turn in house.turns}) == 3

    run(main())


def test_what_an_agent_is_called_by_its_first_or_by_the_default() -> None:
    async def main() -> None:
        entry = {"name": "a", "token": "of a", "agents": ["gamma", "beta"]}
        tokens = [entry, {"name": "b", "token": "of b", "agents": ["gamma", "MAIN"]}]
        async with House().open(**{"gateway.auth.tokens": tokens}) as hub:
            for name, agent in (("a", "beta"), ("b", "main"), ("a", "beta")):
                for model in ("copepod", "agent:main", "gpt-4o"):
                    assert (await ask(hub, "hi", bearer(name), model=model)).text == f"{agent}:hi"
                    async with connected(hub, auth={"token": f"of {name}"}) as peer:
                        assert (await peer.ask("agents.list"))["defaultId"] == agent

    run(main())


def test_the_access_log_says_whose_token_it_was() -> None:
    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        async with House().open() as hub:
            hub.access_log = lambda *fields: lines.append(fields)
            for who in (bearer("alice"), bearer("nobody"), BEARER, {}):
                await ask(hub, "hi", who)
            async with connected(hub, auth={"token": "of bob"}):
                pass
            while len(lines) < 5:
                await asyncio.sleep(0)
        seen = [(line[4], *line[7:9]) for line in lines]
        assert seen == [(200, "beta", "alice"), (401, "-", "-"), (200, "main", "-"), (401, "-", "-"), (101, "-", "bob")]

    run(main())


# WebSocket

OF_OTHERS = ["agent:main:diary", "agent:gamma:diary", "agent:beta:diary", "token:bob:agent:beta:ours", "main", "::x"]
RUN = {"message": "hi"}
# Method -> params: {key} is each of OF_OTHERS, {id} each of the operators' session ids, {agent} each agent, {n} fresh.
TRIES: dict[str, list[dict[str, Any]]] = {
    "agent": [
        {**RUN, "idempotencyKey": "{n}", "agentId": "{agent}"},
        {**RUN, "idempotencyKey": "{n}", "sessionKey": "{key}"},
        {**RUN, "idempotencyKey": "{n}", "sessionKey": "{key}", "agentId": "{agent}"},
        {**RUN, "idempotencyKey": "{n}", "sessionId": "{id}"},
        {**RUN, "idempotencyKey": "{n}", "sessionId": "{id}", "agentId": "{agent}"},
        {**RUN, "idempotencyKey": "{n}", "to": "diary", "agentId": "{agent}"},
        {**RUN, "idempotencyKey": "op-run"},
    ],
    "agent.wait": [{"runId": "op-run", "timeoutMs": 1}, {"runId": "op-ended", "timeoutMs": 1}],
    "agent.identity.get": [{}, {"agentId": "{agent}"}, {"sessionKey": "{key}"}],
    "chat.send": [{**RUN, "idempotencyKey": "{n}", "sessionKey": "{key}"}],
    "chat.abort": [{"sessionKey": "{key}"}, {"sessionKey": "{key}", "runId": "op-run"}],
    "chat.history": [{"sessionKey": "{key}"}, {"sessionKey": "{key}", "agentId": "{agent}"}],
    "sessions.list": [{}, {"agentId": "{agent}"}, {"search": "diary"}, {"limit": 1000, "label": "mine"}],
    "sessions.preview": [{"keys": OF_OTHERS}],
    "sessions.reset": [{"key": "{key}"}, {"key": "{key}", "agentId": "{agent}"}],
    "sessions.delete": [{"key": "{key}"}, {"key": "{key}", "agentId": "{agent}"}],
    "sessions.patch": [{"key": "{key}", "label": "hers"}, {"key": "{key}", "agentId": "{agent}", "label": "hers"}],
    **{method: [{}] for method in ("health", "status", "agents.list", "models.list", "system-presence", "config.get")},
    **{method: [{}] for method in ("channels.status", "node.list", "cron.status", "last-heartbeat")},
}


def tries(ids: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Every method with all that it could be asked."""
    filled = []
    numbers = iter(range(10_000))
    for method, shapes in TRIES.items():
        for shape in shapes:
            text = json.dumps(shape)
            for key, agent, id in product(OF_OTHERS, ("main", "beta", "gamma", "MAIN"), ids):
                one = text.replace("{key}", key).replace("{agent}", agent).replace("{id}", id)
                if (method, one) not in filled:
                    filled.append((method, one))
    return [(method, json.loads(one.replace("{n}", f"k{next(numbers)}"))) for method, one in filled]


def test_every_method_is_tried() -> None:
    assert set(TRIES) == set(schema.SCHEMAS) - {"request frame", "connect"}


def test_websocket_sees_and_reaches_its_own_alone() -> None:
    """By every method; the operators' sessions, runs and events are as if they were not there."""

    async def main() -> None:
        house = House()
        async with house.open() as hub:
            ids = await furnish(hub)
            label = {"key": "agent:beta:diary", "label": "mine"}
            async with (
                connected(hub, auth={"token": SESAME}) as desk,
                connected(hub, auth={"token": "of alice"}, scopes=["operator.admin"]) as alice,
            ):
                await desk.ask("sessions.patch", **label)
                await desk.agent("my SECRET", "op-ended", sessionKey="agent:main:diary")
                for name, key in (("op-run", "agent:beta:diary"), ("op-run2", "agent:main:diary")):
                    await desk.post("agent", {"message": "hold", "idempotencyKey": name, "sessionKey": key})
                    await within(house.held.acquire())
                before = await look(hub)
                for method, params in tries(ids):
                    await attempt(alice, method, params, ids)
                assert await look(hub) == before
                assert {run.id for run in hub.runs.active} == {"op-run", "op-run2"}
                assert house.of("gamma") == ["my SECRET"]
                assert house.of("main") == ["my SECRET", "my SECRET", "hold"]
                house.go.set()
                for name in ("op-run", "op-run2"):
                    await desk.event("chat", runId=name, state="final")
                await alice.ask("agents.list")  # what came before it has been read
                own = {params.get("idempotencyKey") for _, params in tries(ids)}
                assert {frame["event"] for frame in alice.frames if frame["type"] == "event"} <= {
                    "connect.challenge", "agent", "chat", "tick",
                }  # fmt: skip
                for frame in alice.frames:
                    if frame.get("event") in ("agent", "chat"):
                        assert frame["payload"]["runId"] in own
                        clean(json.dumps(frame), f"op-run diary {' '.join(ids)}", ids)  # as her own are called
                        assert not frame["payload"]["sessionKey"].startswith("token:alice")
                assert not alice.events("agent", runId="op-run2")

    run(main())


async def look(hub: gateway.Gateway) -> Any:
    """All that the store has of the operators."""
    listed = [session for session in await hub.store.list() if not session["key"].startswith("token:alice:")]
    return [(session, await hub.store.history(session["agentId"], session["key"])) for session in listed]


async def attempt(alice: Peer, method: str, params: dict[str, Any], ids: list[str]) -> None:
    """Ask for it, and see that what comes is of her own alone."""
    id = await alice.post(method, params)
    frame = await alice.answer(id)
    frames: list[Frame] = [frame]
    if method == "agent" and frame["ok"]:
        frames.append(await alice.answer(id))
    if method == "chat.send" and frame["ok"]:
        await alice.event("chat", runId=params["idempotencyKey"], state="final")
    hers = ""
    if method in ("sessions.list", "health", "status"):  # she has called some of her sessions by the others' names
        hers = f"diary {' '.join(ids)}"
        assert not [id for id in ids if f'"sessionId": "{id}"' in json.dumps(frame)]
    clean(json.dumps(frames), json.dumps(params) + hers, ids)
    said = frames[-1].get("payload")
    if not frame["ok"]:
        message = frame["error"]["message"]
        assert re.search(r"unknown agent id|does not match session key|missing scope: operator\.admin", message), (
            message
        )
    elif method == "agent":
        assert said["result"]["payloads"][0]["text"].startswith("beta:")
    elif method == "agent.wait":
        # Her own run of that id, if she has one by now.
        assert said["status"] == ("ok" if params["runId"] == "op-run" else "timeout")
    elif method == "chat.abort":
        assert said == {"ok": True, "aborted": False, "runIds": []}
    elif method in ("agents.list", "health"):
        assert [entry.get("id") or entry["agentId"] for entry in said["agents"]] == ["beta"]
    elif method == "status":
        assert said["runs"] == {"active": 0, "queued": 0}
    elif method == "sessions.list":
        assert {session["agentId"] for session in said["sessions"]} <= {"beta"}


def test_what_is_greeted_with() -> None:
    async def main() -> None:
        async with House().open() as hub:
            await furnish(hub)
            async with connected(hub, auth={"token": SESAME}), connected(hub, auth={"token": "of bob"}) as bob:
                assert bob.hello["snapshot"]["sessionDefaults"]["defaultAgentId"] == "beta"
                assert (bob.hello["snapshot"]["presence"], bob.hello["snapshot"]["health"]) == ([], {})
                methods = set(bob.hello["features"]["methods"])
                assert methods == {name for name in TRIES if name.startswith(("agent", "chat.", "sessions."))}
                for method in set(TRIES) - methods:
                    error = await bob.error(method)
                    assert error["message"].startswith("missing scope: operator.")
                async with connected(hub, auth={"token": "of alice"}) as alice:
                    modes = [entry["mode"] for entry in alice.hello["snapshot"]["presence"]]
                    assert modes == ["gateway", "test"]  # itself
                    health = alice.hello["snapshot"]["health"]
                    assert (health["sessions"]["count"], health["defaultAgentId"]) == (0, "beta")
                    clean(json.dumps(alice.hello), "", [])

    run(main())


@pytest.mark.parametrize(
    ("has", "asks", "may", "may_not"),
    [
        (["chat"], None, ["agents.list", "sessions.reset"], ["health", "config.get"]),
        (["chat"], ["operator.read"], ["agents.list", "sessions.list"], ["sessions.reset", "health"]),
        (["chat"], ["chat"], ["sessions.reset", "agents.list"], ["health"]),
        (["operator.read"], None, ["health", "sessions.list"], ["sessions.reset", "agent"]),
        (["operator.read"], ["operator.admin"], ["health"], ["sessions.reset", "config.get"]),
        (["operator.write"], ["operator.admin"], ["health", "sessions.reset"], ["config.get"]),
        (["operator.write"], ["chat"], ["sessions.reset"], ["health"]),
        (["chat", "operator.read"], ["x"], [], ["sessions.list", "health"]),
    ],
)
def test_scopes(has: list[str], asks: list[str] | None, may: list[str], may_not: list[str]) -> None:
    async def main() -> None:
        token = {"name": "a", "token": "of a", "scopes": has}
        params = {"sessions.reset": {"key": "x"}, "agent": {"message": "hi", "idempotencyKey": "k"}}
        async with House().open(**{"gateway.auth.tokens": [token]}) as hub:
            async with connected(hub, auth={"token": "of a"}, scopes=asks) as peer:
                for method in may:
                    await peer.ask(method, **params.get(method, {}))
                for method in may_not:
                    assert (await peer.error(method, **params.get(method, {})))["message"].startswith("missing scope")

    run(main())


def test_two_friends_choose_one_run_id() -> None:
    """Both run, each hears of its own, and waits for its own; the operators hear of both, by their stored keys."""

    async def main() -> None:
        house = House()
        async with (
            house.open() as hub,
            connected(hub, auth={"token": SESAME}) as desk,
            connected(hub, auth={"token": "of alice"}) as alice,
            connected(hub, auth={"token": "of bob"}) as bob,
        ):
            params = {"idempotencyKey": "k", "sessionKey": "main"}
            for peer, message in ((alice, "hold a"), (bob, "hold b")):
                id = await peer.post("agent", {"message": message, **params})
                assert (await peer.answer(id))["payload"]["status"] == "accepted"
                await within(house.held.acquire())
            assert (await desk.ask("chat.send", message="c", **params))["status"] == "started"  # theirs is no obstacle
            await desk.event("chat", state="final", sessionKey="agent:main:main")
            await desk.ask("sessions.list")
            assert (await bob.ask("chat.abort", sessionKey="main", runId="k"))["runIds"] == ["k"]
            assert (await bob.event("chat", state="aborted"))["sessionKey"] == "agent:beta:main"
            waiting = await alice.post("agent.wait", {"runId": "k"})
            house.go.set()
            assert (await alice.answer(waiting))["payload"]["status"] == "ok"
            assert (await alice.event("chat", state="final"))["sessionKey"] == "agent:beta:main"
            assert alice.text("k") == "beta:hold a"
            assert bob.text("k") == "beta:"
            for name, state in (("alice", "final"), ("bob", "aborted")):
                await desk.event("chat", state=state, sessionKey=f"token:{name}:agent:beta:main")
            listed = (await desk.ask("sessions.list"))["sessions"]
            assert {entry["key"] for entry in listed} == {"token:alice:agent:beta:main", "agent:main:main"}
            history = await desk.ask("chat.history", sessionKey="token:alice:agent:beta:main")
            assert len(history["messages"]) == 2
            assert [entry["key"] for entry in (await alice.ask("sessions.list"))["sessions"]] == ["agent:beta:main"]

    run(main())


def test_an_operator_waits_for_and_ends_a_friends_run() -> None:
    async def main() -> None:
        house = House()
        async with (
            house.open() as hub,
            connected(hub, auth={"token": SESAME}) as desk,
            connected(hub, auth={"token": "of alice"}) as alice,
        ):
            id = await alice.post("agent", {"message": "hold", "idempotencyKey": "k"})
            await alice.answer(id)
            await within(house.held.acquire())
            waiting = await desk.post("agent.wait", {"runId": "k"})
            key = "token:alice:agent:beta:main"
            assert (await desk.ask("chat.abort", sessionKey=key))["runIds"] == ["k"]
            assert (await desk.answer(waiting))["payload"]["status"] == "ok"
            assert (await desk.ask("agent.wait", runId="k"))["status"] == "ok"  # it is remembered
            assert (await alice.answer(id))["payload"]["summary"] == "aborted"
            streamed = asyncio.ensure_future(stream(hub, "hold", bearer("alice")))  # over HTTP, the same
            await within(house.held.acquire())
            (over_http,) = hub.runs.active
            mine, theirs = [await p.post("agent.wait", {"runId": over_http.id}) for p in (desk, alice)]
            for peer in (desk, alice):
                await peer.ask("agents.list")  # so that what was sent before has come
            house.go.set()
            for peer, waiting in ((desk, mine), (alice, theirs)):
                assert (await peer.answer(waiting))["payload"]["status"] == "ok"
            await streamed

    run(main())


# Who is let in, how long, and how often


@pytest.mark.parametrize(("mode", "shared"), [("token", True), ("token", False), ("password", True)])
def test_where_a_token_may_stand(mode: str, shared: bool) -> None:
    async def main() -> None:
        own = {
            "gateway.auth.mode": mode,
            "gateway.auth.token": None,
            f"gateway.auth.{mode}": SESAME if shared else None,
        }
        async with House().open(**own) as hub:
            assert (await ask(hub, "hi", bearer("alice"))).status == 200
            assert (await ask(hub, "hi", BEARER)).status == (200 if shared else 401)
            for given, welcome in (
                ({"token": "of alice"}, True),
                ({"token": "of alice", "password": "of alice"}, True),  # as our own command line does
                ({"token": "of nobody"}, False),
                ({}, False),
            ):
                async with opened(hub) as peer:
                    await peer.challenge()
                    assert (await peer.connect(auth=given))["ok"] is welcome

    run(main())


def test_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        tokens = [{**ALICE, "expires": "2999-01-01"}, BOB]
        async with (
            House().open(**{"gateway.auth.tokens": tokens}) as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            connected(hub, auth={"token": "of bob"}) as bob,
        ):
            assert (await ask(hub, "hi", bearer("alice"))).status == 200
            later = SimpleNamespace(time=lambda: 32472144000.0, monotonic=time.monotonic)
            monkeypatch.setattr(control, "time", later)
            monkeypatch.setattr(hub.house.gate, "_wall", later.time)
            assert await alice.ended() == (1008, "the token has expired")
            for _ in range(12):  # more than guesses may be
                answer = await ask(hub, "hi", bearer("alice"))
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
                assert answer.error["message"] == "This token has expired, at 2999-01-01T00:00:00Z; ask for another."
            async with opened(hub) as peer:
                await peer.challenge()
                error = (await peer.connect(auth={"token": "of alice"}))["error"]
                assert error["message"] == "unauthorized: the token has expired, at 2999-01-01T00:00:00Z"
            await bob.ask("agents.list")

    run(main())


def test_rate_limit() -> None:
    async def main() -> None:
        tokens = [{**ALICE, "rateLimit": {"requestsPerMinute": 3}}, BOB]
        async with House().open(**{"gateway.auth.tokens": tokens}) as hub:
            async with await Client.open(hub.port) as client, connected(hub, auth={"token": "of alice"}) as alice:
                assert (await client.ask("POST", CHAT, b"{}", bearer("alice"))).status == 400  # asks for no run
                assert (await ask(hub, "hi", bearer("alice"))).status == 200
                assert (await stream(hub, "hi", bearer("alice")))[0].status == 200
                await alice.agent("hi", "k")
                await alice.request("agent", {"message": "hi", "idempotencyKey": "k"})  # is told again, not run again
                answer = await ask(hub, "hi", bearer("alice"))
                assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
                assert answer.error["type"] == "rate_limit_error"
                assert 18 <= int(answer.fields["retry-after"]) <= 20
                for method in ("agent", "chat.send"):
                    params = {"message": "hi", "idempotencyKey": "k2", "sessionKey": "main"}
                    error = await alice.error(method, **params)
                    assert (error["code"], error["retryable"]) == ("UNAVAILABLE", True)
                    assert 18_000 <= error["retryAfterMs"] <= 20_000
                assert {(await ask(hub, "hi", who)).status for who in [bearer("bob"), BEARER] * 4} == {200}
                changed = {**FRIENDS, "gateway.auth.tokens": [*tokens, EVE]}
                hub.reload(gateway.Gateway(settings(changed)).house.config)
                assert (await ask(hub, "hi", bearer("alice"))).status == 429
                await alice.ask("agents.list")  # a token that stays keeps its connections

    run(main())


CHANGES: dict[str, tuple[dict[str, Any], int]] = {  # of the entry of alice, and what the next request is answered with
    "gone": ({}, 401),
    "another secret": ({"token": "of another"}, 401),
    "another name": ({"name": "alicia"}, 200),
    "other agents": ({"agents": ["gamma"]}, 200),
    "fewer scopes": ({"scopes": ["operator.read"]}, 403),
}


@pytest.mark.parametrize(("changes", "status"), CHANGES.values(), ids=list(CHANGES))
def test_a_reload_revokes_at_once(changes: dict[str, Any], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections end, runs are stopped, also one whose request has not come whole; the others go on."""

    async def main() -> None:
        house = House()
        tokens = [*([{**ALICE, **changes}] if changes else []), {**BOB, "expires": "2999-01-01"}, EVE]
        async with (
            house.open() as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            connected(hub, auth={"token": "of bob"}) as bob,
            connected(hub, auth={"token": SESAME}) as desk,
            await Client.open(hub.port) as slow,
        ):
            calls = [asyncio.ensure_future(ask(hub, "hold", bearer(name))) for name in ("alice", "bob")]
            streamed = asyncio.ensure_future(stream(hub, "hold", bearer("alice")))
            for _ in range(3):
                await within(house.held.acquire())
            admitted, admit, body = asyncio.Event(), hub.house.gate.admit, chat()

            def seen(*call: Any) -> auth.Verdict:
                admitted.set()
                return admit(*call)

            monkeypatch.setattr(hub.house.gate, "admit", seen)
            slow.send("POST", CHAT, body[:5], {**bearer("alice"), "Content-Length": str(len(body))})
            await within(admitted.wait())
            hub.reload(gateway.Gateway(settings({**FRIENDS, "gateway.auth.tokens": tokens})).house.config)
            said = "the credential is no longer valid, or its rights have changed"
            assert await alice.ended() == (1008, said)
            answer = await calls[0]
            assert (answer.status, answer.error["type"]) == (401, "authentication_error")
            assert answer.error["message"] == gateway.REVOKED
            assert data_of((await streamed)[1])[-1]["error"]["message"] == gateway.REVOKED
            slow.write(body[5:])
            late = await slow.answer()
            assert late.status == 401
            house.go.set()
            assert (await calls[1]).text == "beta:hold"
            await bob.ask("agents.list")
            await desk.ask("health")
            assert (await ask(hub, "hi", bearer("alice"))).status == status

    run(main())


@pytest.mark.parametrize(
    "changes",
    [
        {"gateway.auth.token": "another"},
        {"gateway.auth.token": None},
        {"gateway.auth.mode": "password", "gateway.auth.token": None, "gateway.auth.password": SESAME},
        {"gateway.auth.mode": "none", "gateway.auth.token": None, "gateway.auth.tokens": None},
    ],
)
def test_a_reload_with_another_shared_secret(changes: dict[str, Any]) -> None:
    """Its WebSockets end; its requests may finish, and so may those of named tokens that stay."""

    async def main() -> None:
        house = House()
        async with (
            house.open() as hub,
            connected(hub, auth={"token": SESAME}) as desk,
            connected(hub, auth={"token": "of bob"}) as bob,
        ):
            call = asyncio.ensure_future(ask(hub, "hold", BEARER))
            await within(house.held.acquire())
            hub.reload(gateway.Gateway(settings({**FRIENDS, **changes})).house.config)
            assert (await desk.ended())[0] == 1008
            if "gateway.auth.tokens" in changes:
                assert (await bob.ended())[0] == 1008
            else:
                await bob.ask("agents.list")
            house.go.set()
            assert (await call).text == "main:hold"

    run(main())


def test_whoever_came_without_a_secret_leaves_when_there_is_one() -> None:
    async def main() -> None:
        async with serving() as hub, connected(hub) as peer:
            hub.reload(gateway.Gateway(settings({**FRIENDS, "gateway.auth.token": None})).house.config)
            assert (await peer.ended())[0] == 1008

    run(main())


def test_sighup_revokes(tmp_path: Path) -> None:
    """In a real process: a friend's WebSocket and stream end, then the shared secret's; the names are in the log."""

    async def main() -> None:
        async with Upstream() as upstream:
            old = {**upstream.settings(), **FRIENDS, "gateway.auth.tokens": [ALICE, BOB]}
            async with program(settings(old), tmp_path) as served:
                async with (
                    connected(served, auth={"token": "of alice"}) as alice,
                    connected(served, auth={"token": "of bob"}) as bob,
                    connected(served, auth={"token": SESAME}) as desk,
                ):
                    streamed = asyncio.ensure_future(stream(served, "hi", bearer("alice")))
                    call = await upstream.call()
                    call.begin()
                    call.word("a word")
                    await desk.event("agent", stream="assistant")

                    async def reload(**changes: Any) -> None:
                        changed = {**old, **{key.replace("_", "."): value for key, value in changes.items()}}
                        (tmp_path / "copepod.json5").write_text(json.dumps(settings(changed)))
                        served.process.send_signal(signal.SIGHUP)
                        await served.logged("read again")

                    await reload(gateway_auth_tokens=[BOB])
                    assert (await alice.ended())[0] == 1008
                    _, events = await streamed
                    assert text_of(events) == "a word"
                    assert data_of(events)[-1]["error"]["code"] == "invalid_api_key"
                    await within(call.left.wait())  # down to the upstream's connection
                    assert (await ask(served, "hi", bearer("alice"))).status == 401
                    await desk.ask("health")
                    late = asyncio.ensure_future(ask(served, "hi", BEARER))
                    call = await upstream.call()
                    await reload(gateway_auth_tokens=[BOB], gateway_auth_token="another")  # noqa: S106
                    assert (await desk.ended())[0] == 1008
                    await says("done")(call)
                    call.done.set()
                    assert (await late).text == "done"
                    await bob.ask("agents.list")
                assert " 101 " in (line := await served.logged(" bob - -\n"))
                assert line.endswith(" - bob - -\n")
                served.process.terminate()
                assert await served.ended() == 0

    run(main())
