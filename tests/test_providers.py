from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading

import pytest

import providers


def turn(message="hello", **more):
    return {
        "run_id": "run_1", "agent_id": "main", "session_key": "k", "session_id": "sid", "message": message,
        "system": "", "messages": [{"role": "user", "content": message}], "model": "m", "params": {},
        "deadline": math.inf,
    } | more  # fmt: skip


async def take(provider, a_turn):
    """The items, then the error as (kind, message, taken, retry_after)."""
    items = []
    given = provider(a_turn)
    try:
        async for item in given:
            if checked := providers.checked(item):  # as the runs do
                items.append(checked)  # noqa: PERF401 (the items before an error count)
    except Exception as error:
        if not hasattr(error, "kind"):
            raise
        items.append((error.kind, str(error), error.taken, error.retry_after))
    finally:
        if hasattr(given, "aclose"):
            await given.aclose()
    return items


def run(provider, a_turn=None):
    return asyncio.run(asyncio.wait_for(take(provider, a_turn or turn()), 20))


def test_one_that_is_not_configured_fails_and_says_where():
    said = "The model provider `gone` is not configured (models.providers.gone)."
    assert run(providers.missing("gone")) == [("upstream", said, False, None)]


# The echo


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ("hello", 1), ("hello\n", 1), ("one two three", 3), ("  led", 2), (" \t\n ", 1),
        ("a\u00a0b\r\n\r\nc  d ", 4), ("\u4f60\u597d \U0001f600\n", 2), ("w " * 5000, 5000),
    ],
)  # fmt: skip
def test_the_echo_gives_the_message_back_word_by_word(message, count):
    items = run(providers.echo(), turn(message))
    assert "".join(items) == message
    assert len(items) == count


def test_a_long_echo_gives_way():
    async def main():
        count = 0

        async def other():
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        items = await take(providers.echo(), turn("word " * (providers.ECHO_SLICE * 10)))
        task.cancel()
        return len(items), count

    length, count = asyncio.run(main())
    assert length == providers.ECHO_SLICE * 10
    assert count >= 10


# What a provider gives

CIRCLE: dict = {}
CIRCLE["itself"] = CIRCLE


@pytest.mark.parametrize(
    "tool", [{"a": float("nan")}, {"a": object()}, {("a", 1): 2}, CIRCLE, {"a": "x" * 300_000}],
    ids=["nan", "object", "key", "circle", "long"],
)  # fmt: skip
def test_a_tools_doing_is_json_that_can_be_told(tool):
    with pytest.raises(providers.ProviderError, match="neither text nor an event"):
        providers.checked({"tool": tool})


LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"reasoning": "hm"}, {"reasoning": "hm"}),
        ({"reasoning": "\ud83d"}, {"reasoning": "\ufffd"}),
        ({"reasoning": ""}, None),
        ({"logprobs": LOGPROBS}, {"logprobs": LOGPROBS}),
        ({"logprobs": LOGPROBS | {"refusal": None, "text_offset": 5}}, {"logprobs": LOGPROBS}),
        ({"logprobs": {"content": [], "refusal": None}}, None),
        ({"logprobs": {"content": [float("-inf")]}}, None),
        ({"tool_calls": [CALL]}, {"tool_calls": [CALL]}),
        ({"tool_calls": [CALL | {"x": 1, "type": "y"}]}, {"tool_calls": [CALL]}),
        ({"tool_calls": [{"index": 1, "id": "", "function": {"name": None, "arguments": "\ud83d"}}]},
         {"tool_calls": [{"index": 1, "function": {"arguments": "\ufffd"}}]}),
    ],
)  # fmt: skip
def test_calls_and_thoughts(item, expected):
    assert providers.checked(item) == expected


@pytest.mark.parametrize(
    ("prompt", "completion", "written"),
    [(5, 7, [5, 7, 12]), (True, False, [1, 0, 1]), (10**5000, -3, [2**53 - 1, 0, 2**53 - 1])],
    ids=["numbers", "truths", "odd ones"],
)
def test_tokens_can_be_written(prompt, completion, written):
    usage = providers.checked({"usage": {"prompt_tokens": prompt, "completion_tokens": completion}})["usage"]
    assert str(list(usage.values())) == str(written)


@pytest.mark.parametrize(
    "item",
    [
        {"reasoning": 5}, {"logprobs": 5}, {"tool_calls": []}, {"tool_calls": None}, {"tool_calls": {"index": 0}},
        {"tool_calls": [{"index": True, "function": {}}]}, {"tool_calls": [CALL, {"index": 1}]},
        {"tool_calls": [CALL, "x"]}, {"tool_calls": [CALL], "reasoning": "hm"},
    ],
)  # fmt: skip
def test_what_is_neither_a_call_nor_a_thought(item):
    with pytest.raises(providers.ProviderError, match="neither text nor an event"):
        providers.checked(item)


def test_nothing_is_left(caplog):
    caplog.set_level(logging.ERROR)
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "copepod-agent" and thread.is_alive()]
