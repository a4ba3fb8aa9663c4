"""Any frame of a client of the gateway protocol is answered, or its connection closed with a code that says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON, KEYS, OBJECTS, mutated, tries

import gateway
import schema
from live import settings as settings_of
from peer import Frame, Peer, connected, opened, params_of

FAILED = "the gateway failed; its log says why"
name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
key = st.sampled_from(["main", "agent:main:main", "k", "agent:main:é"]) | st.text("ab:é ", min_size=1, max_size=8)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
count, ms = st.integers(1, 1000) | st.just(5.0), st.integers(0, 50)
label = st.none() | st.text("abc", min_size=1, max_size=64)
KEY = {"key": key}
ABOUT = {"sessionKey": key}
TURN = {"message": name, "idempotencyKey": key}
IGNORED = ("replyTo", "replyChannel", "accountId", "replyAccountId", "threadId", "groupId", "groupChannel")
# Sound parameters of every method: those that must be there, and those that may.
SOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "connect": ({name: st.just(value) for name, value in params_of().items()}, {"locale": text, "pathEnv": text}),
    "agent": (
        TURN,
        {
            **dict.fromkeys(("sessionKey", "sessionId", "to"), key),
            **dict.fromkeys((*IGNORED, "spawnedBy", "lane", "label", "thinking", "extraSystemPrompt"), text),
            "agentId": st.sampled_from(["main", "MAIN", "work"]),
            "timeout": st.floats(0, 604_800) | st.integers(0, 9),
            "deliver": st.just(False),
            "attachments": st.just([]),
            "channel": st.sampled_from(["last", "webchat", ""]) | text,
        },
    ),
    "agent.wait": ({"runId": key}, {"timeoutMs": ms}),
    "agent.identity.get": ({}, {"agentId": name, "sessionKey": key}),
    "chat.send": ({**TURN, **ABOUT}, {"thinking": text, "attachments": st.just([]), "timeoutMs": ms}),
    "chat.abort": (ABOUT, {"runId": key}),
    "chat.history": (ABOUT, {"limit": count}),
    "sessions.list": (
        {},
        {
            "limit": count,
            "activeMinutes": st.integers(1, 604_800),
            "search": text,
            **dict.fromkeys(("agentId", "label"), name),
            **dict.fromkeys(("includeGlobal", "includeUnknown", "includeLastMessage"), st.booleans()),
        },
    ),
    "sessions.preview": ({"keys": st.lists(key, max_size=4)}, {"limit": count, "maxChars": st.integers(20, 100_000)}),
    "sessions.reset": (KEY, {}),
    "sessions.delete": (KEY, {"deleteTranscript": st.booleans()}),
    "sessions.patch": (KEY, dict.fromkeys(("label", "thinkingLevel", "verboseLevel", "reasoningLevel"), label)),
    "health": ({}, {"probe": JSON, "timeoutMs": ms}),
    "status": ({}, {"probe": JSON, "timeoutMs": ms}),
    "channels.status": ({}, {"probe": st.booleans(), "timeoutMs": ms}),
    **dict.fromkeys(("agents.list", "models.list", "system-presence", "node.list", "cron.status"), ({}, {})),
    **dict.fromkeys(("last-heartbeat", "config.get"), ({}, {})),
}
methods = st.sampled_from(sorted(SOUND))


def sound(method: str) -> st.SearchStrategy[dict[str, Any]]:
    required, optional = SOUND[method]
    return st.fixed_dictionaries(required, optional={name: it for name, it in optional.items() if name not in required})


def odd(params: dict[str, Any], at: int, value: Any) -> dict[str, Any]:
    """Those parameters, one of them another value."""
    names = sorted(params) or ["x"]
    return {**params, names[at % len(names)]: value}


nearly = methods.flatmap(
    lambda it: st.tuples(st.just(it), sound(it) | st.builds(odd, sound(it), st.integers(0, 9), JSON) | JSON)
)
frames = st.builds(
    lambda pair, id, more: {"type": "req", "id": id, "method": pair[0], "params": pair[1], **more},
    nearly,
    st.sampled_from(["1", "2", ""]) | JSON,
    st.just({}) | st.dictionaries(st.sampled_from(["type", "id", "method", "params", "x"]), JSON, max_size=1),
)
TOKENS = [b"[" * 200, b"\\ud800", b"NaN", b"1e999", b"9" * 1200, b"\xff", b"\0", b'"', b"{", b"}", b"\xef\xbb\xbf"]
sent = (
    frames.map(json.dumps)
    | mutated(frames.map(lambda frame: json.dumps(frame, ensure_ascii=False).encode(errors="replace")), TOKENS)
    | JSON.map(json.dumps)
    | text
    | st.binary(max_size=20)
)


def test_every_method_has_its_sound_parameters_here() -> None:
    assert {*SOUND, "request frame"} == set(schema.SCHEMAS)
    for method, properties in schema.SCHEMAS.items():
        if method not in ("request frame", "connect"):
            assert isinstance(properties, dict)
            required, optional = SOUND[method]
            assert {name[:-1] for name in properties if name.endswith("*")} == required.keys(), method
            assert {*required, *optional} <= {name.rstrip("*") for name in properties}, method


@given(st.sampled_from(sorted(schema.SCHEMAS)), JSON | OBJECTS | nearly.map(lambda pair: pair[1]))
def test_any_value_is_judged(method: str, value: Any) -> None:
    said = schema.problem(method, value)
    assert isinstance(said, str)
    assert said or isinstance(value, dict)
    assert len(said) < 2000


@given(methods.flatmap(lambda method: st.tuples(st.just(method), sound(method))), KEYS, JSON)
def test_sound_parameters_are_taken(pair: tuple[str, dict[str, Any]], name: str, value: Any) -> None:
    method, params = pair
    assert schema.problem(method, params) == ""
    assert schema.problem("request frame", {"type": "req", "id": "1", "method": method, "params": params}) == ""
    if name not in {known.rstrip("*") for known in schema.SCHEMAS[method]}:  # type: ignore[union-attr]
        assert "unexpected property" in schema.problem(method, {**params, name: value})


@given(methods.flatmap(lambda method: st.tuples(st.just(method), sound(method))))
def test_a_parameter_of_another_type_is_not(pair: tuple[str, dict[str, Any]]) -> None:
    method, params = pair
    others = {int: True, float: True, str: 1, bool: 0, list: {}, dict: []}
    for name, value in params.items():
        if value is not None and name != "probe":  # of which any is taken
            assert f"at /{name}: must be " in schema.problem(method, {name: others[type(value)]}), (method, name)


class House:
    """A gateway that stays for all examples, and the loop that it is in."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.hub = gateway.Gateway(settings_of({"agents.list": [{"id": "main"}, {"id": "work", "name": "Work"}]}))
        self.run(self.hub.start())

    def run(self, main: Coroutine[Any, Any, Any]) -> None:
        self.runner.run(main)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House()
    yield house
    house.run(house.hub.stop(0))
    house.runner.close()


@given(message=sent)
def test_any_first_frame(house: House, message: str | bytes) -> None:
    async def main() -> None:
        async with opened(house.hub) as peer:
            await peer.challenge()
            await peer.send(message)
            frame = await peer.read()
            if frame is not None and frame["ok"]:
                assert frame["payload"]["type"] == "hello-ok"
                return
            code, reason = await peer.closed() if frame else (peer.websocket.close_code, peer.websocket.close_reason)
            assert code in {1002, 1008}
            assert reason  # as much of the error as there is room for in a close frame
            assert (frame["error"]["message"] if frame else "invalid request frame").startswith(reason)

    house.run(main())


@tries(200)
@given(messages=st.lists(sent, min_size=1, max_size=4))
def test_any_later_frame(house: House, messages: list[str | bytes]) -> None:
    async def main() -> None:
        async with connected(house.hub, scopes=["operator.admin"]) as peer:
            for message in messages:
                answers = await answers_to(peer, message)
                assert answers or waits(message), message
                assert all(frame["ok"] or frame["error"]["message"] != FAILED for frame in answers), (message, answers)

    house.run(main())


async def answers_to(peer: Peer, message: str | bytes) -> list[Frame]:
    """The answers that came before that to a request sent after it, which says that the connection is in order."""
    before = len(peer.frames)
    await peer.send(message)
    assert (await peer.request("agents.list"))["ok"]
    return [frame for frame in peer.frames[before:-1] if frame["type"] == "res"]


def waits(message: str | bytes) -> bool:
    """Whether it is a wait for a run, which is answered when that has ended."""
    return b'"agent.wait"' in (message.encode() if isinstance(message, str) else message)
