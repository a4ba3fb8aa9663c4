"""What clients of the gateway protocol cannot do to the gateway, to each other, or to themselves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

import reports
from live import ask, run, serving, within
from peer import connected

TWO = {"agents.list": [{"id": "main"}, {"id": "b"}]}


async def parrot(message: str) -> AsyncIterator[str]:
    yield message


class Held:
    """An agent that says its word when it may."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, message: str) -> AsyncIterator[str]:
        self.begun.set()
        await self.go_on.wait()
        yield message


def test_a_large_answer_is_not_held_against_a_client_that_reads() -> None:
    """Six megabytes in one frame, and the events of another run behind it."""
    both = asyncio.Event()

    async def agent(message: str) -> AsyncIterator[str]:
        if message == "big":
            for _ in range(12):
                yield "w" * 500_000
            both.set()
            return
        await both.wait()
        for n in range(20):
            yield f"{n} "
            await asyncio.sleep(0.005)

    async def main() -> None:
        async with serving({}, {"main": agent}) as hub, connected(hub, buffer=65_536) as peer:
            ids = [
                await peer.post("agent", {"message": text, "idempotencyKey": text, "sessionKey": text})
                for text in ("small", "big")
            ]
            for id in ids:
                await peer.answer(id)
            lengths = [len((await peer.answer(id))["payload"]["result"]["payloads"][0]["text"]) for id in ids]
            assert lengths == [50, 6_000_000]

    run(main())


def test_an_ended_run_is_not_kept() -> None:
    """What is remembered of it is its answer, and not the conversation that it was given."""

    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            await peer.agent("x" * 100_000, "k")
            job = hub.jobs.get("", "k")
            assert job is not None
            assert set(vars(job)) == {
                "accepted_at", "error", "forget_at", "id", "payload", "place", "size", "then", "waited",
            }  # fmt: skip

    run(main())


def test_many_requests_with_one_key() -> None:
    async def main() -> None:
        held = Held()
        async with serving({}, {"main": held}) as hub:
            async with connected(hub) as peer:
                for n in range(70):
                    await peer.post("agent", {"message": "hi", "idempotencyKey": "k"}, id=str(n))
                firsts = [await peer.answer(str(n)) for n in range(70)]
                assert [frame["ok"] for frame in firsts] == [True] * 64 + [False] * 6
                assert firsts[-1]["error"]["retryable"]
                job = hub.jobs.get("", "k")
                assert job is not None
                assert len(job.then) == 64
            async with connected(hub) as other:
                await other.ask("health")
                assert job.then == []  # of those that have left
                held.go_on.set()
                assert (await other.ask("agent.wait", runId="k"))["status"] == "ok"

    run(main())


def test_a_preview_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_HISTORY", 1000)

    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            for key in ("a", "b"):
                await peer.agent("x" * 400, key, sessionKey=key)
            asked = {"keys": ["a", "b", "a", "agent:ghost:x"], "maxChars": 500}
            previews = (await peer.ask("sessions.preview", **asked))["previews"]
            assert [(each["key"], each["status"], len(each["items"])) for each in previews] == [
                ("a", "ok", 2),
                ("b", "ok", 0),
                ("agent:ghost:x", "missing", 0),
            ]
            assert len(json.dumps(previews)) < 1500

    run(main())


def test_a_history_has_its_last_message_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `chat` event has had it: without it, the whole conversation would seem to be gone."""
    monkeypatch.setattr(reports, "MAX_HISTORY", 1000)

    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            for key, message in (("a", "short"), ("b", "x" * 2000), ("c", "y" * 200)):
                await peer.agent(message, key, sessionKey="main")
                messages = (await peer.ask("chat.history", sessionKey="main"))["messages"]
                assert messages[-1]["content"][0]["text"] == message
            assert len(messages) == 2

    run(main())


def test_a_store_that_fails_keeps_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub:
            await hub.store.close()
            async with connected(hub) as peer:
                health = await peer.ask("health")
                assert (health["ok"], health["troubles"]) == (False, ["the sessions cannot be read"])
                error = await peer.error("sessions.list")
                assert error == {"code": "UNAVAILABLE", "message": "the gateway failed; its log says why"}
                done = await peer.agent("still here")
                assert done["payload"]["result"]["payloads"][0]["text"] == "still here"

    with caplog.at_level(logging.ERROR, "copepod"):
        run(main())
    assert "the session store is closed" in caplog.text


def test_sessions_of_an_agent_that_is_gone() -> None:
    async def main() -> None:
        async with serving(TWO, {"main": parrot, "b": parrot}) as hub, connected(hub) as peer:
            await peer.agent("one", "1", agentId="b", sessionKey="plain")
            (session,) = (await peer.ask("sessions.list"))["sessions"]
            found = await peer.ask("chat.history", sessionKey="plain", agentId="b")
            assert len(found["messages"]) == 2
            assert (await peer.ask("chat.history", sessionKey="plain"))["messages"] == []  # the default agent's
            del hub.house.config.agents["b"]  # as a reload does
            assert (await peer.ask("sessions.list"))["sessions"] == []
            error = await peer.error("agent", message="hi", idempotencyKey="2", sessionId=session["sessionId"])
            assert error["message"] == 'invalid agent params: unknown agent id "b"; the agents are main'

    run(main())


def test_a_key_means_one_run() -> None:
    async def main() -> None:
        held = Held()
        async with serving(TWO, {"main": parrot, "b": held}) as hub, connected(hub) as peer:
            await peer.agent("one", "k", sessionKey="a")
            message = "this idempotencyKey is of a run in another session: use a fresh one"
            params = {"message": "one", "idempotencyKey": "k", "sessionKey": "other"}
            assert (await peer.error("agent", **params))["message"] == message
            over_http = asyncio.create_task(ask(hub, "slow", {"x-copepod-agent-id": "b"}))
            await within(held.begun.wait())
            (active,) = hub.runs.active
            assert (await peer.error("chat.send", **{**params, "idempotencyKey": active.id}))["message"] == message
            held.go_on.set()
            assert (await over_http).text == "slow"

    run(main())


def test_who_may_not_read_is_told_nothing_but_the_end() -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub, scopes=["nothing"]) as peer:
            assert peer.hello["snapshot"]["health"] == {}
            assert peer.hello["snapshot"]["presence"] == []
            await ask(hub, "a word", user="u")
            stopping = asyncio.create_task(hub.stop(1))
            assert (await peer.ended())[0] == 1012
            assert [frame.get("event") for frame in peer.frames] == ["connect.challenge", None, "shutdown"]
            await stopping

    run(main())


def test_who_may_write_may_read() -> None:
    async def main() -> None:
        async with serving({}, {"main": parrot}) as hub, connected(hub, scopes=["operator.write"]) as peer:
            assert (await peer.ask("health"))["ok"]
            await peer.agent("hi")
            assert peer.text("k1") == "hi"
            assert "operator.admin" in (await peer.error("config.get"))["message"]

    run(main())


def test_an_abort_comes_too_late_for_a_turn_that_is_being_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        saving, go_on = asyncio.Event(), asyncio.Event()
        async with serving({}, {"main": parrot}) as hub, connected(hub) as peer:
            save = hub.runs._save

            async def slowly(*args: Any, **more: Any) -> None:
                saving.set()
                await go_on.wait()
                await save(*args, **more)

            monkeypatch.setattr(hub.runs, "_save", slowly)
            id = await peer.post("agent", {"message": "hi", "idempotencyKey": "k"})
            await peer.answer(id)
            await within(saving.wait())
            assert (await peer.ask("chat.abort", sessionKey="main"))["aborted"] is False
            go_on.set()
            assert (await peer.answer(id))["payload"]["summary"] == "completed"

    run(main())


def test_a_reload_with_more_places_fills_them() -> None:
    async def main() -> None:
        held = Held()
        async with serving({"agents.defaults.maxConcurrent": 1}, {"main": held}) as hub, connected(hub) as peer:
            for key in "abc":
                await peer.ask("agent", message=key, idempotencyKey=key, sessionKey=key)
            await peer.event("agent", phase="start")
            hub.runs.max_concurrent = 3
            hub.runs.fill()
            for _ in range(2):
                await peer.event("agent", phase="start")
            held.go_on.set()
            for key in "abc":
                assert (await peer.ask("agent.wait", runId=key))["status"] == "ok"

    run(main())
