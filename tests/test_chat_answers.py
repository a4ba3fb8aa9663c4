"""OpenAI's answers: what is printed of a run, whole and in a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

import chat_answers
from chat_answers import EventStream
from chat_completions import APIError, run_error

TEXTS = ["", "hi", 'a "b" \\ /', "é€😀", "line\nand\r\n\ttab", "\u2028\u2029\x85\x0b\x0c\x1c", "\0\x7f", "\ud800"]
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 9}
ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
RUN_ID = "chatcmpl_1"


@pytest.mark.parametrize("value", TEXTS)
def test_completion(value: str) -> None:
    before = int(time.time())
    body = chat_answers.completion(RUN_ID, value, value, "length", USAGE)
    assert body.isascii()
    answer = json.loads(body)
    assert before <= answer.pop("created") <= time.time()
    assert answer == {
        "id": RUN_ID,
        "object": "chat.completion",
        "model": value or "copepod",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": value}, "finish_reason": "length"}],
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({}, ZERO),
        (USAGE, USAGE),
        (
            {"prompt_tokens": 1, "completion_tokens": 2},
            {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        ),
        ({"total_tokens": 5}, {**ZERO, "total_tokens": 5}),
    ],
)  # fmt: skip
def test_usage(usage: Mapping[str, int], expected: Mapping[str, int]) -> None:
    assert json.loads(chat_answers.completion(RUN_ID, "", "x", "stop", usage))["usage"] == expected
    out = Output(include_usage=True)
    out.stream.end("stop", usage)
    assert out.chunks()[-1]["usage"] == expected


class Output:
    """A stream and what it sent."""

    def __init__(
        self, model: str = "gpt-4o", include_usage: bool = False, slow: bool = False, include_events: bool = False
    ) -> None:
        self.sent: list[tuple[bytes, bool]] = []
        self.slow, self.now, self.unsent = slow, 100.0, 0
        unsent, clock = lambda: self.unsent, lambda: self.now
        self.stream = EventStream(RUN_ID, model, include_usage, include_events, self.send, unsent, clock)

    def send(self, data: bytes, last: bool) -> bool:
        self.sent.append((data, last))
        return self.slow

    def data(self) -> list[str]:
        """Return the data of each event; each is one line and an empty line, or a comment."""
        text = b"".join(data for data, _ in self.sent).decode("ascii")
        *events, rest = text.split("\n\n")
        assert rest == ""
        assert all(event.startswith(("data: ", ": ")) and len(event.splitlines()) == 1 for event in events)
        return [event.removeprefix("data: ") for event in events if event.startswith("data: ")]

    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.data() if data != "[DONE]"]


ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}


def word(value: str) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": value}, "finish_reason": None}


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("value", TEXTS)
def test_stream(value: str, include_usage: bool) -> None:
    out = Output(value, include_usage)
    assert not out.stream.take("delta", value)
    assert not out.stream.take("delta", "more")
    assert not out.stream.end("tool_calls", USAGE)
    assert [last for _, last in out.sent] == [False, False, True]
    assert out.data()[-1] == "[DONE]"
    chunks = out.chunks()
    heads = [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in chunks]
    assert heads == [heads[0]] * len(chunks)
    assert heads[0]["id"] == RUN_ID
    assert heads[0]["object"] == "chat.completion.chunk"
    assert heads[0]["model"] == (value or "copepod")
    finish = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
    expected = [[ROLE], [word(value)], [word("more")], [finish]] + ([[]] if include_usage else [])
    assert [chunk["choices"] for chunk in chunks] == expected
    assert ["usage" in chunk for chunk in chunks] == [False] * 4 + [True] * include_usage


FRAGMENTS = [{"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "\u2028'}}]
CALLED = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("text", "calls", "reasoning", "expected"),
    [
        ("", CALLED, "", {"content": None, "tool_calls": CALLED}),
        ("a", CALLED, "", {"content": "a", "tool_calls": CALLED}),
        ("a", (), "h\u2028m", {"content": "a", "reasoning_content": "h\u2028m"}),
        ("", (), "hm", {"content": "", "reasoning_content": "hm"}),
        ("", CALLED, "hm", {"content": None, "tool_calls": CALLED, "reasoning_content": "hm"}),
    ],
)
def test_completion_with_more_than_text(text: str, calls: Any, reasoning: str, expected: dict[str, Any]) -> None:
    body = chat_answers.completion(RUN_ID, "", text, "stop", USAGE, {"tool_calls": calls, "reasoning": [*reasoning]})
    assert body.isascii()
    assert json.loads(body)["choices"][0]["message"] == {"role": "assistant", **expected}


def test_logprobs() -> None:
    parts = [{"content": [{"token": "a", "logprob": -1.5}]}, {"content": [{"token": "\u2028"}], "refusal": [1]}]
    body = chat_answers.completion(RUN_ID, "", "x", "stop", USAGE, {"logprobs": parts})
    assert body.isascii()
    (choice,) = json.loads(body)["choices"]
    assert choice["logprobs"] == {"content": [{"token": "a", "logprob": -1.5}, {"token": "\u2028"}], "refusal": [1]}
    out = Output()
    out.stream.take("delta", "a")
    out.stream.take("logprobs", parts[0])
    expected = [[ROLE], [word("a")], [{"index": 0, "delta": {}, "logprobs": parts[0], "finish_reason": None}]]
    assert [chunk["choices"] for chunk in out.chunks()] == expected


def test_stream_with_more_than_text() -> None:
    out = Output()
    out.stream.take("reasoning", "h\u2028m")
    out.stream.take("tool_calls", FRAGMENTS)
    out.stream.end("tool_calls", {})
    deltas = [chunk["choices"][0]["delta"] for chunk in out.chunks()]
    assert deltas == [ROLE["delta"], {"reasoning_content": "h\u2028m"}, {"tool_calls": FRAGMENTS}, {}]


def test_stream_without_a_word() -> None:
    out = Output()
    out.stream.end("stop", {})
    assert len(out.sent) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in out.chunks()] == [None, "stop"]


def test_stream_begins_with_a_tool() -> None:
    out = Output()
    out.stream.take("tool", {"name": "look"})
    out.stream.take("tool", {"name": "look"})
    assert [chunk["choices"] for chunk in out.chunks()] == [[ROLE]]
    assert len(out.sent) == 1


def test_stream_with_events() -> None:
    out = Output(include_events=True)
    out.stream.take("tool", {"name": "look", "at": ["\u2028", {"index": 7}]})
    out.stream.take("delta", "x")
    out.stream.take("tool", {})
    out.stream.end("stop", {})
    told = [{"index": 0, "tool": {"name": "look", "at": ["\u2028", {"index": 7}]}}]
    deltas = [ROLE["delta"], {"copepod_events": told}, {"content": "x"}, {"copepod_events": [{"index": 1, "tool": {}}]}]
    assert [chunk["choices"][0]["delta"] for chunk in out.chunks()] == [*deltas, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in out.chunks()] == [None] * 4 + ["stop"]
    assert len(out.sent) == 4  # the head goes out with the first


def test_stream_tells_of_a_slow_reader() -> None:
    out = Output(slow=True, include_events=True)
    assert out.stream.take("delta", "x")
    assert out.stream.take("tool", {})
    assert out.stream.end("stop", {})


def test_stream_that_is_silent() -> None:
    out = Output()
    out.stream.tick(104.9)
    assert not out.sent
    out.now = 105.0
    out.stream.tick(105.0)  # no word for 5 s: the head goes out
    assert [chunk["choices"] for chunk in out.chunks()] == [[ROLE]]
    out.stream.tick(119.9)
    assert len(out.sent) == 1
    out.now = 120.0
    out.unsent = 1
    out.stream.tick(120.0)  # a slow reader has enough to read
    assert len(out.sent) == 1
    out.unsent = 0
    out.stream.tick(120.0)
    assert out.sent[1:] == [(b": keep-alive\n\n", False)]
    out.stream.tick(134.9)
    assert len(out.sent) == 2
    out.now = 134.0
    out.stream.take("delta", "x")
    out.stream.tick(140.0)
    assert len(out.sent) == 3


FAILED = 'It "failed" é\u2028.'


def test_stream_that_fails_before_a_word() -> None:
    out = Output()
    with pytest.raises(APIError) as error:
        out.stream.fail(run_error("overloaded", FAILED, None, False))
    assert error.value.status == 503
    assert not out.sent


def test_stream_that_fails_behind_a_word() -> None:
    out = Output(include_usage=True)
    out.stream.take("delta", "x")
    assert not out.stream.fail(run_error("timeout", FAILED, None, False))
    assert [last for _, last in out.sent] == [False, True]
    *_, error, done = out.data()
    assert done == "[DONE]"
    assert json.loads(error) == {"error": {"message": FAILED, "type": "timeout_error", "param": None, "code": None}}


def test_models() -> None:
    model = {"id": "copepod:coder", "object": "model", "created": 7, "owned_by": "copepod"}
    assert json.loads(chat_answers.model_object("coder", 7)) == model
    assert json.loads(chat_answers.model_list(["coder"], 7)) == {"object": "list", "data": [model]}
    assert json.loads(chat_answers.model_list([], 7)) == {"object": "list", "data": []}
