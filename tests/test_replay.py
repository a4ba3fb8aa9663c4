"""What the family's own command line says, said again: the answers have the shape of those it was given.

`captured_frames.jsonl` holds what went over the wire, without what belongs to one machine: lists are shortened, ids and
secrets replaced, "(cut)" stands for any value.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from live import run, serving, within
from peer import Peer, connected, opened

FRAMES = [json.loads(line) for line in Path(__file__).with_name("captured_frames.jsonl").read_text().splitlines()]
CASES = list(dict.fromkeys(frame["case"] for frame in FRAMES))
AGENTS = [{"id": "main", "default": True}, {"id": "beta", "name": "Beta"}]
GATEWAY = {"gateway.auth.mode": "token", "gateway.auth.token": "SECRET", "agents.list": AGENTS}
CUT = "(cut)"

ABSENT = {  # captured, and not ours: by the request that is answered
    "connect": {
        "payload.auth": "a device's token is never handed out",
        "payload.snapshot.configPath": "a path of the host",
        "payload.snapshot.stateDir": "a path of the host",
        "payload.snapshot.presence[].ip": "an address of the host",
    },
    "agent": {"payload.result.meta.systemPromptReport": "about the family's workspace files"},
    "health": {
        "payload.sessions.path": "a path of the host",
        "payload.agents[].sessions.path": "a path of the host",
        "payload.agents[].heartbeat.prompt": "no heartbeat",
        "payload.agents[].heartbeat.target": "no heartbeat",
        "payload.agents[].heartbeat.ackMaxChars": "no heartbeat",
    },
    "status": {
        "payload.sessions.paths": "paths of the host",
        "payload.sessions.defaults.contextTokens": "a model's window is not known",
        "payload.sessions.recent[].contextTokens": "a model's window is not known",
        "payload.sessions.recent[].remainingTokens": "a model's window is not known",
        "payload.sessions.recent[].percentUsed": "a model's window is not known",
    },
    "system-presence": {"payload[].ip": "an address of the host"},
    "config.get": {
        "payload.path": "a path of the host",
        "payload.raw": "it may hold secrets",
        "payload.parsed": "it may hold secrets",
        "payload.config": "our own keys; only that it is an object matters",
    },
}
ADDED = {  # ours, and not captured
    "health": {"payload.sessions": "one captured answer is cut"},
    "status": {"payload": "the captured answer is cut"},
    "config.get": {"payload.config": "our own keys"},
}


def shape(value: Any, at: str = "") -> set[tuple[str, str]]:
    """Every path in a value with the type that stands there; the items of a list are one."""
    if value == CUT:
        return {(at, "any")}
    if isinstance(value, dict):
        parts = [shape(item, f"{at}.{name}".lstrip(".")) for name, item in value.items()]
        return {(at, "object")}.union(*parts)
    if isinstance(value, list):
        return {(at, "list")}.union(*(shape(item, f"{at}[]") for item in value))
    names = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return {(at, names[type(value)])}


def under(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith((f"{root}.", f"{root}[")) for root in roots)


def differences(captured: Any, ours: Any, request: str) -> list[str]:
    """What is missing in ours, or of another type, or added to it."""
    old, new = shape(captured), shape(ours)
    cut = {path for path, kind in old if kind == "any"}
    absent, added = ABSENT.get(request, {}), ADDED.get(request, {})
    paths = {path for path, _ in new}
    missing = [f"missing {path}" for path in cut - paths if not under(path, absent)]
    missing += [f"missing {path}: {kind}" for path, kind in old - new if not under(path, {*absent, *cut})]
    extra = [f"added {path}: {kind}" for path, kind in new - old if not under(path, {*added, *cut})]
    return sorted(missing + extra)


def test_shapes() -> None:
    old = {"a": 1, "b": [{"c": "x"}, {"d": None}], "e": CUT}
    assert differences(old, {"a": 1.5, "b": [{"c": "y", "d": None}], "e": {"f": 1}}, "") == []
    assert differences(old, {"a": "1", "b": [], "g": True}, "") == [
        "added a: string",
        "added g: boolean",
        "missing a: number",
        "missing b[].c: string",
        "missing b[].d: null",
        "missing b[]: object",
        "missing e",
    ]


async def same_event(peer: Peer, captured: dict[str, Any]) -> dict[str, Any]:
    """The next event of ours of the captured one's kind."""
    payload = captured["payload"]
    kind = {name: payload[name] for name in ("stream", "state") if name in payload}
    if "phase" in payload.get("data", {}):
        kind["phase"] = payload["data"]["phase"]
    return await peer.event_frame(captured["event"], **kind)


@pytest.mark.parametrize("case", CASES)
def test_replay(case: str) -> None:
    async def main() -> list[str]:
        heard = asyncio.Event()
        found: list[str] = []

        async def agent(message: str) -> AsyncIterator[str]:
            yield "Hello"
            await within(heard.wait())
            yield " there"

        async with serving(GATEWAY, {"main": agent, "beta": agent}) as hub:
            async with connected(hub, auth={"token": "SECRET"}) as peer:  # so that there are sessions to be told of
                heard.set()
                for id in ("main", "beta"):
                    assert (await peer.agent(key=id, agentId=id))["ok"]
                heard.clear()
            asked = {}
            async with opened(hub) as peer:
                for frame in (line["frame"] for line in FRAMES if line["case"] == case):
                    if frame["type"] == "req":
                        asked[frame["id"]] = frame["method"]
                        await peer.send(frame)
                        continue
                    if frame["type"] == "event":
                        name, ours = frame["event"], await same_event(peer, frame)
                        if ours["payload"].get("state") == "delta":
                            heard.set()
                    else:
                        name, ours = asked[frame["id"]], await peer.answer(frame["id"])
                    found += [f"{name}: {difference}" for difference in differences(frame, ours, name)]
        return found

    found = run(main())
    assert not found, "\n".join(found)
