"""Tools, images and retries through a whole gateway, whose model server is odd, hostile, or busy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

import runs
from live import CHAT, Answer, Client, ask, data_of, run, serving, stream, within
from upstream import Call, Script, Upstream, answers, says

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
BUSY = answers(503, b"{}")


def calls(*fragments: Any, finish: str = "tool_calls") -> Script:
    """Answers with these parts of tool calls, each in a chunk of its own."""

    async def script(call: Call) -> None:
        call.begin()
        for fragment in fragments:
            call.event({"choices": [{"index": 0, "delta": {"tool_calls": [fragment]}}]})
        call.finish(finish)
        call.end()

    return script


def each(*scripts: Script) -> Script:
    """Answers the first request with the first of these, and so on."""
    left = iter(scripts)

    async def script(call: Call) -> None:
        await next(left)(call)

    return script


def asked(name: str = "", arguments: Any = None, **more: Any) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value}
    return {**more, "function": function}


def put_together(events: Iterable[str]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call, as OpenAI's clients do it: what comes again is put behind."""
    found: dict[int, list[str]] = {}
    for chunk in data_of(events):
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            texts = (part.get("id", ""), part["function"].get("name", ""), part["function"].get("arguments", ""))
            found[part["index"]] = [a + b for a, b in zip(found.get(part["index"], [""] * 3), texts, strict=True)]
    return [(id, name, arguments) for id, name, arguments in found.values()]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (calls(asked("look", '{"a":', index=0, id="1"), asked("look", "1}", index=0, id="1")),
         [("1", "look", '{"a":1}')]),
        (calls(asked("a", "{}", index=0, id="1"), asked("b", "{}", index=0, id="2"), finish="stop"),
         [("1", "a", "{}"), ("2", "b", "{}")]),
        (calls(asked("a", "{", id="1"), asked(arguments="}"), asked("b", id="2")),
         [("1", "a", "{}"), ("2", "b", "{}")]),
        (calls(asked("a", {"b": 1}, index=3, id="1")), [("1", "a", '{"b":1}')]),
    ],
)  # fmt: skip
def test_odd_calls_are_the_same_whole_and_streamed(script: Script, expected: list[tuple[str, str, str]]) -> None:
    async def main() -> None:
        async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
            choice = (await ask(hub, tools=TOOLS)).json["choices"][0]
            functions = [(call["id"], *call["function"].values()) for call in choice["message"]["tool_calls"]]
            assert functions == expected
            assert choice["finish_reason"] == "tool_calls"
            _, events = await stream(hub, tools=TOOLS)
            assert put_together(events) == expected
            assert data_of(events)[-1]["choices"][0]["finish_reason"] == "tool_calls"

    run(main())


def test_arguments_without_an_end() -> None:
    async def main() -> None:
        async def endless(call: Call) -> None:
            call.begin()
            while not call.left.is_set():
                call.event({"choices": [{"delta": {"tool_calls": [asked(arguments="x" * 500_000, index=0)]}}]})
                await call.writer.drain()

        async with Upstream(endless) as upstream, serving(upstream.settings()) as hub:
            answer = await ask(hub, tools=TOOLS)
            assert (answer.status, answer.error["message"]) == (502, "The agent's answer is too long.")
            assert answer.fields["x-should-retry"] == "false"
            _, events = await stream(hub, tools=TOOLS)
            assert sum(len(arguments) for _, _, arguments in put_together(events[:-2])) <= runs.MAX_ANSWER
            assert json.loads(events[-2][6:])["error"]["message"] == "The agent's answer is too long."
            for call in upstream.calls:
                await within(call.left.wait())

    run(main())


def test_a_client_that_leaves_while_a_retry_is_waited_for() -> None:
    async def main() -> None:
        busy = answers(503, b"{}", "Retry-After: 9")
        async with Upstream(busy) as upstream, serving(upstream.settings(retry={"tries": 3, "seconds": 60})) as hub:
            async with await Client.open(hub.port) as client:
                client.say()
                await upstream.call()
                (active,) = hub.runs.active
                client.reset()
            assert active.task is not None
            await within(active.task)
            assert not hub.runs.active
            assert len(upstream.calls) == 1

    run(main())


def test_a_fallback_comes_after_the_retries() -> None:
    async def main() -> None:
        async with Upstream(each(BUSY, BUSY)) as first, Upstream(says("here")) as second:
            changes = first.settings(retry={"tries": 2, "seconds": 10})
            changes["models.providers.other"] = second.settings()["models.providers.up"]
            changes["agents.list"] = [{"id": "main", "model": {"primary": "up/a", "fallbacks": ["other/b"]}}]
            async with serving(changes) as hub:
                assert (await ask(hub)).text == "here"
            assert (len(first.calls), len(second.calls)) == (2, 1)

    run(main())


@pytest.mark.parametrize(
    ("own", "asked_for", "sent"),
    [
        ({"max_tokens": 9, "seed": 1}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5, "seed": 1}),
        ({"max_completion_tokens": 9}, {"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 9}, {"seed": 2}, {"max_tokens": 9, "seed": 2}),
    ],
)
def test_the_request_bounds_an_answer_by_either_name(
    own: dict[str, int], asked_for: dict[str, int], sent: dict[str, int]
) -> None:
    async def main() -> None:
        async with Upstream(says("a")) as upstream:
            changes = upstream.settings() | {"agents.list": [{"id": "main", "params": own}]}
            async with serving(changes) as hub:
                assert (await ask(hub, **asked_for)).text == "a"
            (call,) = upstream.calls
            assert {name: call.json[name] for name in call.json if name.startswith(("max", "seed"))} == sent

    run(main())


def test_who_asks_is_told_at_once_what_the_agents_time_is_too_short_to_wait_for() -> None:
    async def main() -> None:
        async with Upstream(answers(429, b"{}", "Retry-After: 7")) as upstream:
            changes = upstream.settings(retry={"tries": 2, "seconds": 10}) | {"agents.defaults.timeoutSeconds": 6}
            async with serving(changes) as hub:
                answer = await within(ask(hub), 5)
                assert (answer.status, answer.fields["retry-after"]) == (429, "7")

    run(main())


def test_what_the_first_model_may_have_done_is_not_done_again_for_the_fallbacks_failure() -> None:
    async def main() -> None:
        async with Upstream(answers(500, b"{}")) as first, Upstream(BUSY) as second:
            changes = first.settings()
            changes["models.providers.other"] = second.settings()["models.providers.up"]
            changes["agents.list"] = [{"id": "main", "model": {"primary": "up/a", "fallbacks": ["other/b"]}}]
            async with serving(changes) as hub:
                answer = await ask(hub)
            assert answer.error["message"] == "the model server failed with status 503"
            assert answer.fields["x-should-retry"] == "false"

    run(main())


def test_a_large_image_is_handed_on_and_not_kept() -> None:
    async def main() -> None:
        url = "data:image/png;base64," + "A" * 900_000
        picture = [{"type": "image_url", "image_url": {"url": url}}]
        agent = {"id": "main", "input": ["text", "image"]}
        async with Upstream(says("seen")) as upstream:
            async with serving({**upstream.settings(), "agents.list": [agent]}) as hub:
                said: list[Any] = [{"role": "user", "content": picture}]
                assert (await ask(hub, messages=said, user="ann")).text == "seen"
                assert (await ask(hub, "and now?", user="ann")).text == "seen"
            assert upstream.calls[0].json["messages"] == said
            assert upstream.calls[1].json["messages"][0] == {"role": "user", "content": "[image]"}

    run(main())


def test_a_friends_tools_reach_the_agents_that_take_them() -> None:
    async def asks(port: int, agent: str) -> Answer:
        body = {"model": f"copepod:{agent}", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
        async with await Client.open(port) as client:
            return await client.ask("POST", CHAT, json.dumps(body).encode(), {"Authorization": f"Bearer {'t' * 32}"})

    async def main() -> None:
        async with Upstream(calls(asked("look", "{}", index=0, id="1"))) as upstream:
            friend = {"name": "ann", "token": "t" * 32, "agents": ["deaf", "able"], "scopes": ["chat"]}
            agents = [{"id": "main"}, {"id": "deaf", "clientTools": False}, {"id": "able"}]
            auth = {"gateway.auth.mode": "token", "gateway.auth.token": "s" * 32, "gateway.auth.tokens": [friend]}
            async with serving({**upstream.settings(), **auth, "agents.list": agents}) as hub:
                assert (await asks(hub.port, "able")).json["choices"][0]["finish_reason"] == "tool_calls"
                assert (await asks(hub.port, "deaf")).error["param"] == "tools"
            assert len(upstream.calls) == 1

    run(main())
