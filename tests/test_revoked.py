"""What a friend could still do or learn at the edges: while a reload revokes, while it reads slowly, by numbers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

import auth
import gateway
import sessions
from config import Config, ConfigError
from live import CHAT, Client, ask, chat, run, serving, settings, within
from peer import SESAME, connected
from test_friends import AGENTS, ALICE, BEARER, BOB, FRIENDS, House, bearer


def configured(tokens: Any, **changes: Any) -> Config:
    return gateway.Gateway(settings({**FRIENDS, "gateway.auth.tokens": tokens, **changes})).house.config


def test_a_greeting_does_not_count_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the state of presence is the operators'; it told friends that they came and went."""
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)  # between two words of presence

    async def main() -> None:
        async with House().open() as hub:
            numbers = []
            for _ in range(2):
                async with connected(hub, auth={"token": "of bob"}) as bob:
                    numbers.append(bob.hello["snapshot"]["stateVersion"]["presence"])
                async with connected(hub, auth={"token": SESAME}) as desk:
                    await desk.event("presence")
            assert numbers == [1, 1]

    run(main())


@pytest.mark.parametrize(
    "tokens",
    [
        "hunter22",
        ["hunter22"],
        [["hunter22"]],
        {"alice": "hunter22"},
        [{"name": "a", "token": ["hunter22"]}],
        [{"name": "a", "tokenSha256": "hunter22"}],
        [{"name": "a", "tokn": "hunter22"}],
    ],
)
def test_a_token_that_stands_wrong_is_not_quoted(tokens: Any) -> None:
    """A broken configuration is told to the log, at a SIGHUP too."""
    with pytest.raises(ConfigError) as caught:
        configured(tokens)
    assert caught.value.problems
    assert "hunter22" not in str(caught.value.problems)


def test_a_date_that_a_reload_moves_into_the_past_revokes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was let in before and has not asked yet, and what is on."""

    async def main() -> None:
        house, entry = House(), {**ALICE, "expires": "2999-01-01"}
        async with (
            house.open(**{"gateway.auth.tokens": [entry, BOB]}) as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            await Client.open(hub.port) as slow,
        ):
            admitted, admit, body = asyncio.Event(), hub.house.gate.admit, chat()

            def seen(*call: Any) -> auth.Verdict:
                admitted.set()
                return admit(*call)

            held = asyncio.ensure_future(ask(hub, "hold", bearer("alice")))
            await within(house.held.acquire())
            monkeypatch.setattr(hub.house.gate, "admit", seen)
            slow.send("POST", CHAT, body[:5], {**bearer("alice"), "Content-Length": str(len(body))})
            await within(admitted.wait())
            hub.reload(configured([{**entry, "expires": "2001-01-01"}, BOB]))
            slow.write(body[5:])
            assert (await slow.answer()).status == 401
            assert (await held).status == 401
            assert (await alice.ended())[0] == 1008
            assert house.of("beta") == ["hold"]

    run(main())


def test_no_run_begins_once_a_token_has_expired() -> None:
    """Though its connection is looked at only once a second."""
    clock = [0.0]
    caller = auth.Caller("a", frozenset({auth.CHAT}), expires=10.0, digest=b"d")
    gate = auth.Gate("token", "", named=[caller], wall=lambda: clock[0])
    assert gate.now(caller) == caller
    clock[0] = 10.0
    assert gate.now(caller) is None


def test_whoever_reads_slowly_does_not_keep_a_place() -> None:
    """A revoked run that waits for its reader ends with its connection, and not when the reader likes."""

    async def speak(message: str, turn: dict[str, Any]) -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    async def main() -> None:
        async with serving(FRIENDS, {entry["id"]: speak for entry in AGENTS}) as hub:
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", hub.port))
                body = chat(stream=True)
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer of alice\r\n"
                sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

                async def until(waits: bool) -> None:
                    while [run.outside for run in hub.runs.active] != [True] * waits:
                        await asyncio.sleep(0)

                await within(until(True))
                hub.reload(configured([BOB]))
                await within(until(False))

    run(main())


def test_a_lookup_does_not_outlast_its_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is looked for by its id while the shared secret changes: no run comes of it."""

    async def main() -> None:
        house = House()
        async with house.open() as hub, connected(hub, auth={"token": SESAME}) as desk:
            looking, go = asyncio.Event(), asyncio.Event()

            async def find(session_id: str) -> None:
                looking.set()
                await go.wait()

            monkeypatch.setattr(hub.store, "find", find)
            await desk.post("agent", {"message": "hi", "idempotencyKey": "k", "sessionId": "x"})
            await within(looking.wait())
            hub.reload(configured([BOB], **{"gateway.auth.token": "another"}))
            go.set()
            assert (await desk.ended())[0] == 1008
            assert (hub.runs.active, house.turns) == (set(), [])

    run(main())


def test_a_friends_run_has_the_agents_time_at_most() -> None:
    """It has one of the places that all share; operators may give their own runs a week."""

    async def main() -> None:
        house = House()
        async with (
            house.open(**{"agents.defaults.timeoutSeconds": 20}) as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            connected(hub, auth={"token": SESAME}) as desk,
        ):
            now = asyncio.get_running_loop().time()
            for peer, seconds, most in ((alice, 600_000, 30), (alice, 5, 15), (desk, 600_000, 700_000)):
                key = f"k{seconds}{most}"
                await peer.post(
                    "agent", {"message": "hold", "idempotencyKey": key, "sessionKey": key, "timeout": seconds}
                )
                await within(house.held.acquire())
                (begun,) = [run for run in hub.runs.active if run.id == key]
                assert most / 10 < begun.deadline - now < most
            house.go.set()
            for peer, count in ((alice, 2), (desk, 3)):
                for _ in range(count):
                    await peer.event("chat", state="final")

    run(main())


def test_those_that_wait_are_revoked_too() -> None:
    """For a place, behind their session's run, and on the line of one connection; the others' turn comes."""

    async def main() -> None:
        house = House()
        one = {"agents.defaults.maxConcurrent": 1}
        async with (
            house.open(**one) as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            await Client.open(hub.port) as line,
        ):
            bobs = asyncio.ensure_future(ask(hub, "hold", bearer("bob")))
            await within(house.held.acquire())
            for who in ("alice", "alice", "bob"):
                line.say("hi", bearer(who))
            for key in ("k1", "k2"):
                id = await alice.post("agent", {"message": "hi", "idempotencyKey": key, "sessionKey": "s"})
                await alice.answer(id)
            await alice.post("agent.wait", {"runId": "k2"})
            hub.reload(configured([BOB], **one))
            assert (await alice.ended())[0] == 1008
            assert [(await line.answer()).status for _ in range(2)] == [401, 401]
            house.go.set()
            assert (await bobs).status == (await line.answer()).status == (await ask(hub, "hi", BEARER)).status == 200
            assert {turn["session_key"].split(":")[1] for turn in house.turns} == {"bob", "main"}

    run(main())


def test_whoever_is_cut_off_at_the_end_has_a_name_in_the_log() -> None:
    """A client that answers no close is cancelled."""

    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        async with House().open() as hub:
            hub.access_log = lambda *fields: lines.append(fields)
            async with connected(hub, auth={"token": "of bob"}):
                hub.hurry()
                await hub.stop(0)
        assert [(line[4], line[8]) for line in lines] == [(101, "bob")]

    run(main())


@pytest.mark.parametrize("key", ["plain", "agent:main:x", "agent:beta:x", "main"])
def test_operators_reach_a_friends_session_by_its_key(key: str) -> None:
    """By the key alone, though to her `main` and no agent at all mean `beta`, and to them `main`."""

    async def main() -> None:
        house = House()
        async with (
            house.open() as hub,
            connected(hub, auth={"token": "of alice"}) as alice,
            connected(hub, auth={"token": SESAME}) as desk,
        ):
            await alice.agent("hi", "k", sessionKey=key)
            (listed,) = (await desk.ask("sessions.list"))["sessions"]
            theirs = listed["key"]
            assert len((await desk.ask("chat.history", sessionKey=theirs))["messages"]) == 2
            (preview,) = (await desk.ask("sessions.preview", keys=[theirs]))["previews"]
            assert preview["status"] == "ok"
            await alice.post("agent", {"message": "hold", "idempotencyKey": "k2", "sessionKey": key})
            await within(house.held.acquire())
            assert (await desk.ask("chat.abort", sessionKey=theirs))["runIds"] == ["k2"]
            await alice.event("chat", runId="k2", state="aborted")
            assert (await desk.ask("sessions.delete", key=theirs))["deleted"]
            assert await hub.store.list() == []

    run(main())


@pytest.mark.parametrize("others", [[], [SESAME], ["of bob", SESAME]])
def test_the_number_of_an_event_does_not_tell_who_else_listens(others: list[str]) -> None:
    """A friend who comes in the middle of its run gets the first number, also when it comes again."""

    async def main() -> None:
        house = House()
        async with house.open() as hub, AsyncExitStack() as stack:
            for token in others:
                await stack.enter_async_context(connected(hub, auth={"token": token}))
            held = asyncio.ensure_future(ask(hub, "hold", bearer("alice")))
            await within(house.held.acquire())
            async with connected(hub, auth={"token": "of alice"}) as alice:
                house.go.set()
                assert (await alice.event("agent"))["seq"] == 1
                assert (await alice.event("chat", state="final"))["seq"] == 2
            await held

    run(main())


def test_a_friends_list_does_not_read_everybodys_sessions() -> None:
    """By the index of agents and keys, not by that of times: all others' answers wait for the one thread meanwhile."""

    async def main() -> None:
        store = sessions.Store(sessions.MEMORY, 10)
        steps = [0]

        def count() -> int:
            steps[0] += 1
            return 0

        async def work(prefix: str) -> int:
            steps[0] = 0
            await store.list(5, ["beta"], prefix=prefix)
            return steps[0]

        def fill(db: Any) -> None:
            rows = [("beta", key, key, at) for at, key in enumerate(["token:alice:x", *(f"k{n}" for n in range(5000))])]
            db.executemany("INSERT INTO sessions (agent, key, session_id, updated_at) VALUES (?, ?, ?, ?)", rows)
            db.set_progress_handler(count, 100)

        await store._run(fill)
        assert [session["key"] for session in await store.list(5, ["beta"], prefix="token:alice:")] == ["x"]
        assert await work("token:alice:") <= 2
        await store.close()

    run(main())
