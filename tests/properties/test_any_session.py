"""A session against a list: what is kept, trimmed and told of it, whatever happens to it in whatever order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from strategies import OBJECTS, tries

import runs
import sessions

LIMIT = 5  # messages of a session
T = TypeVar("T")
Message = dict[str, Any]

said = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "tool"]), "content": st.sampled_from(["a", "b", "", None])},
    optional={"tool_call_id": st.sampled_from(["1", "2"]), "tool_calls": st.sampled_from([[], [{"id": "1"}], [{}]])},
)
conversations = st.lists(said, max_size=8)


@tries(500)
@given(conversations, st.lists(said, min_size=1, max_size=8))
def test_undoubled(transcript: list[Message], messages: list[Message]) -> None:
    new = runs.undoubled(transcript, messages)
    dropped = len(messages) - len(new)
    assert new == messages[dropped:]
    turn = max((i for i, m in enumerate(messages) if m["role"] in ("user", "tool")), default=0)
    assert dropped <= turn
    told = [runs._identity(m) for m in messages]
    kept = [runs._identity(m) for m in transcript]
    if kept and dropped > len(kept):  # the transcript was trimmed
        assert kept == told[dropped - len(kept) : dropped]
        assert kept not in (told[n : n + len(kept)] for n in range(dropped - len(kept) + 1, turn - len(kept) + 1))
        return
    assert not dropped or kept[-dropped:] == told[:dropped]
    for more in range(dropped + 1, min(turn, len(kept)) + 1):
        assert kept[-more:] != told[:more], "it was not the longest"


@given(conversations, st.lists(said, max_size=3))
def test_a_client_that_tells_all_of_it_again_adds_its_turn_alone(old: list[Message], rest: list[Message]) -> None:
    turn = [*rest, {"role": "user", "content": "a new one"}]
    assert runs.undoubled(old, [*old, *turn]) == turn


agents, keys = st.sampled_from(["main", "work"]), st.sampled_from(["k", "agent:main:é", ""])
usages = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), st.integers(-5, 2**70))
)


class Sessions(RuleBasedStateMachine):
    """The store, and beside it a dict of (agent, key) to [session id, messages, extra]."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = sessions.Store(sessions.MEMORY, LIMIT)
        self.model: dict[tuple[str, str], list[Any]] = {}

    def wait(self, awaitable: Awaitable[T]) -> T:
        async def main() -> T:
            return await awaitable

        return self.runner.run(main())

    @initialize()
    def open(self) -> None:
        self.wait(self.store.open())

    @rule(agent=agents, key=keys, messages=st.lists(said, min_size=1, max_size=7), usage=usages)
    def append(self, agent: str, key: str, messages: list[Message], usage: dict[str, int]) -> None:
        session_id, _ = self.wait(self.store.load(agent, key))
        self.wait(self.store.append(agent, key, session_id, messages, model="m", usage=usage))
        session = self.model.setdefault((agent, key), [session_id, [], {}])
        assert session[0] == session_id
        kept = (session[1] + messages)[-LIMIT:]
        if len(session[1] + messages) > LIMIT:
            users = [n for n, message in enumerate(kept) if message["role"] == "user"]
            kept = kept[users[0] :] if users else kept
        session[1] = kept

    @rule(agent=agents, key=keys)
    def delete(self, agent: str, key: str) -> None:
        assert self.wait(self.store.delete(agent, key)) is (self.model.pop((agent, key), None) is not None)

    @rule(agent=agents, key=keys)
    def reset(self, agent: str, key: str) -> None:
        fresh = self.wait(self.store.reset(agent, key))
        old = self.model.get((agent, key), ["", [], {}])
        assert fresh != old[0]
        self.model[agent, key] = [fresh, [], old[2]]

    @rule(agent=agents, key=keys, fields=st.dictionaries(st.sampled_from("ab"), st.none() | st.text()) | OBJECTS)
    def patch(self, agent: str, key: str, fields: Message) -> None:
        told = self.wait(self.store.patch(agent, key, fields))
        session = self.model.setdefault((agent, key), [told["sessionId"], [], {}])
        session[2] = {name: value for name, value in (session[2] | fields).items() if value is not None}
        assert {**session[2], "sessionId": session[0], "updatedAt": told["updatedAt"]} == told

    @rule(agent=agents, key=keys, messages=st.just([{"role": "user", "content": object()}]))
    def fail(self, agent: str, key: str, messages: list[Message]) -> None:
        with pytest.raises(TypeError):  # it is no JSON: nothing of the turn may stay
            self.wait(self.store.append(agent, key, "x", messages, model="", usage={}))

    @rule(agent=agents, key=keys, limit=st.none() | st.integers(1, 7))
    def read(self, agent: str, key: str, limit: int | None) -> None:
        session_id, messages, _ = self.model.get((agent, key), [None, [], {}])
        found_id, found = self.wait(self.store.history(agent, key, limit))
        assert found_id == session_id
        shown = [(m["role"], m["content"]) for m in messages]
        assert [(m["role"], m["content"]) for m in found] == (shown if limit is None else shown[-limit:])
        loaded_id, loaded = self.wait(self.store.load(agent, key))
        assert loaded == messages[len(messages) - len(loaded) :]
        assert all(m["role"] == "tool" for m in messages[: len(messages) - len(loaded)])
        assert not loaded or loaded[0]["role"] != "tool"
        assert session_id in (None, loaded_id)

    @invariant()
    def listed(self) -> None:
        found = self.wait(self.store.list())
        assert {(e["agentId"], e["key"]): e["sessionId"] for e in found} == {at: s[0] for at, s in self.model.items()}
        assert [e["updatedAt"] for e in found] == sorted((e["updatedAt"] for e in found), reverse=True)
        assert all(min(e["inputTokens"], e["outputTokens"]) >= 0 for e in found)
        assert sum(self.wait(self.store.counts()).values()) == len(self.model)
        for at, (session_id, _, _) in self.model.items():
            assert self.wait(self.store.find(session_id)) == at

    def teardown(self) -> None:
        self.wait(self.store.close())
        self.runner.close()


TestSessions = Sessions.TestCase
TestSessions.settings = tries(40, stateful_step_count=15)
