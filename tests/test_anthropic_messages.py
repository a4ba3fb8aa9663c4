"""Anthropic's Messages API: OpenAI's words into its own, and its events back."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import anthropic_messages as module
import http1
import model_server
import providers
from scripted import CLOSE, OK, Pool, Server, serve

KEY = "sk-ant-secret"
HELLO = [{"role": "user", "content": "hello"}]


def turn(*messages: dict[str, Any], system: str = "", **params: Any) -> dict[str, Any]:
    return {"run_id": "run_1", "message": "hello", "system": system, "messages": list(messages) or HELLO,
            "model": "claude", "params": params, "deadline": math.inf}  # fmt: skip


class Response:
    def __init__(
        self, events: Any = (), status: int = 200, fields: Any = None, body: bytes | OSError = b"", hang: bool = False
    ) -> None:
        self.script, self.status, self.fields, self.body, self.hang = events, status, fields or {}, body, hang
        self.over = asyncio.Event()
        self.closed = self.ended = self.finalized = False

    async def read(self, limit: int) -> bytes:
        if self.hang:
            await asyncio.Event().wait()
        if isinstance(self.body, OSError):
            raise self.body
        if len(self.body) > limit:
            raise OSError("too long")
        return self.body

    async def events(self) -> AsyncIterator[str]:
        try:
            for event in self.script:
                if isinstance(event, OSError):
                    raise event
                yield event if isinstance(event, str) else json.dumps(event)
            if self.hang:
                await self.over.wait()
                raise OSError("closed")
            self.ended = True
        finally:
            self.finalized = True

    def close(self) -> None:  # as the real one, which ends the connection that is read from
        self.closed = True
        self.over.set()


def asking(answer: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The provider, and the list of the requests made."""
    requests: list[Any] = []

    async def request(method: str, url: str, fields: Any, body: bytes) -> Response:
        requests.append((method, url, dict(fields), json.loads(body)))
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, OSError):
            raise answer
        return answer

    return model_server.provider({"apiKey": KEY} | options, request, module), requests


async def take(provider: Any, a_turn: dict[str, Any]) -> list[Any]:
    """The items, then the error as (kind, message, taken, retry_after)."""
    items: list[Any] = []
    try:
        async for item in provider(a_turn):
            items.append(providers.checked(item))  # noqa: PERF401 (the items before an error count)
    except model_server.ProviderError as error:
        items.append((error.kind, str(error), error.taken, error.retry_after))
    return items


def run(provider: Any, a_turn: dict[str, Any] | None = None) -> list[Any]:
    return asyncio.run(asyncio.wait_for(take(provider, a_turn or turn()), 20))


def sent(a_turn: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(module.body_of(a_turn))
    return body


# What is asked


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(each) if isinstance(each, str) else each for each in blocks]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return user(*blocks) | {"role": "assistant"}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str = "look", arguments: Any = '{"at": 1}', id: Any = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def use(name: str = "look", arguments: Any = None, id: str = "call_1") -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": {"at": 1} if arguments is None else arguments}


def result(*blocks: Any, id: str = "call_1") -> dict[str, Any]:
    content = {"content": user(*blocks)["content"]} if blocks else {}
    return {"type": "tool_result", "tool_use_id": id, **content}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}
JPEG = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/"}}
ANYWHERE = {"type": "image", "source": {"type": "url", "url": "HTTPS://a.example/B,c.png"}}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("user", "a"), said("assistant", "b"), said("user", "c")], [user("a"), assistant("b"), user("c")]),
        ([said("user", "a"), said("user", "b"), said("assistant", "c"), said("assistant", "d")],
         [user("a", "b"), assistant("c", "d")]),
        ([said("assistant", "hi"), said("user", "a")], [user(module.BEGINNING), assistant("hi"), user("a")]),
        ([said("user", "a"), said("assistant", " \n"), said("user", "b")], [user("a", "b")]),
        ([said("user", ""), said("user", None), said("user", [])], []),
        ([said("user", [text("a"), image("data:image/png;base64,iVBO"), text(" "), {"type": "input_audio"}])],
         [user("a", PNG)]),
        ([said("user", [image("DATA:image/JPG;charset=x;Base64,/9j/"), image(ANYWHERE["source"]["url"])])],
         [user(JPEG, ANYWHERE)]),
        ([said("user", "a"), said("assistant", "see", tool_calls=[call()]),
          said("tool", "found", tool_call_id="call_1"), said("user", "so?")],
         [user("a"), assistant("see", use()), user(result("found"), "so?")]),
        ([said("user", "a"), said("assistant", None, tool_calls=[call(), call("go", "", "b:2.x")]),
          said("tool", "", tool_call_id="call_1"), said("tool", [text("x"), text("y")], tool_call_id="b:2.x")],
         [user("a"), assistant(use(), use("go", {}, "b_2_x")), user(result(), result("x", "y", id="b_2_x"))]),
        ([said("user", "a"), said("assistant", "", tool_calls=[{"id": "c", "type": "custom"}, call(name=None)])],
         [user("a")]),
        ([said("user", "a"), said("tool", "as of old", name="look")], [user("a", "as of old")]),
    ],
)  # fmt: skip
def test_messages_in_turns(messages: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    before = json.dumps(messages)
    assert module.messages_of(messages) == expected
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": {"b": [1]}}', {"a": {"b": [1]}}), ("{}", {}), ("", {}), (None, {}), ("[1]", {}), ("null", {}),
        ("{", {}), ("[" * 100_000, {}), (5, {}), ({"a": 1}, {"a": 1}),
        ('{"a": ' + "1" * 5000 + "}", {}), ('{"a": "\\ud83d"}', {"a": "?"}),
    ],
)  # fmt: skip
def test_a_calls_arguments_become_an_object(arguments: Any, expected: Any) -> None:
    messages = sent(turn(said("user", "a"), said("assistant", "", tool_calls=[call("look", arguments)])))["messages"]
    assert messages == [user("a"), assistant(use("look", expected))]


LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "strict": True, "parameters": {
    "type": "object", "properties": {"at": {"type": "integer"}}}}}  # fmt: skip
BARE = {"type": "function", "function": {"name": "go"}}
LOOK_TOOL = {"name": "look", "description": "Looks.", "input_schema": LOOK["function"]["parameters"]}  # type: ignore[index]
BARE_TOOL = {"name": "go", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {"max_tokens": 4096}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8, "max_tokens": 7}, {"max_tokens": 8}),
        ({"max_completion_tokens": None, "max_tokens": None}, {"max_tokens": 4096}),
        ({"temperature": 0, "top_p": 0.5, "top_k": 5}, {"temperature": 0, "top_p": 0.5, "top_k": 5}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
         {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["\n", "END", ""]}, {"stop_sequences": ["END"]}),
        ({"stop": "\n"}, {}),
        ({"user": "ann", "seed": 1, "logprobs": True, "presence_penalty": 1, "response_format": {"type": "text"},
          "reasoning_effort": "low", "temperature": None}, {}),
        ({"tools": [LOOK, BARE]}, {"tools": [LOOK_TOOL, BARE_TOOL]}),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}, {}),
        ({"tools": [{"type": "web_search"}, 5], "tool_choice": "required"}, {}),
        ({"tool_choice": "required"}, {}),
        ({"tools": [BARE], "tool_choice": "auto"}, {"tools": [BARE_TOOL], "tool_choice": {"type": "auto"}}),
        ({"tools": [BARE], "tool_choice": "required"}, {"tools": [BARE_TOOL], "tool_choice": {"type": "any"}}),
        ({"tools": [BARE], "tool_choice": {"type": "function", "function": {"name": "go"}}},
         {"tools": [BARE_TOOL], "tool_choice": {"type": "tool", "name": "go"}}),
        ({"tools": [BARE], "tool_choice": {"type": "allowed_tools"}}, {"tools": [BARE_TOOL]}),
        ({"tools": [BARE], "tool_choice": "whatever", "parallel_tool_calls": True}, {"tools": [BARE_TOOL]}),
        ({"tools": [BARE], "parallel_tool_calls": False},
         {"tools": [BARE_TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
        ({"tools": [BARE], "tool_choice": "required", "parallel_tool_calls": False},
         {"tools": [BARE_TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
        ({"tools": [BARE], "tool_choice": "none", "parallel_tool_calls": False},
         {"tools": [BARE_TOOL], "tool_choice": {"type": "none"}}),
    ],
)  # fmt: skip
def test_parameters(params: dict[str, Any], expected: dict[str, Any]) -> None:
    always = {"model": "claude", "messages": [user("hello")], "max_tokens": 4096, "stream": True}
    assert sent(turn(**params)) == always | expected


@pytest.mark.parametrize("url", ["data:image/png,plain", "data:image/png;base64", "file:///etc/passwd", "", "x" * 9])
def test_an_image_from_elsewhere_is_the_callers_mistake(url: str) -> None:
    provider, requests = asking(Response())
    items = run(provider, turn(said("user", [image(url)])))
    ((kind, message, taken, _),) = items
    assert (kind, taken, requests) == ("rejected", False, [])
    assert message.startswith("the model takes an image from")


DEEP: dict[str, Any] = {}
DEEP["itself"] = DEEP


@pytest.mark.parametrize("parameters", [DEEP, [1], "{}"])
def test_parameters_without_a_form_are_the_callers_mistake(parameters: Any) -> None:
    provider, requests = asking(Response())
    ((kind, _, taken, _),) = run(provider, turn(tools=[{"function": {"name": "go", "parameters": parameters}}]))
    assert (kind, taken, requests) == ("rejected", False, [])


THINKING = {"type": "enabled", "budget_tokens": 1024}
CALLED = [said("user", "a"), said("assistant", "", tool_calls=[call()]), said("tool", "b", tool_call_id="call_1")]


@pytest.mark.parametrize(
    ("messages", "thinking", "thinks"),
    [
        ([said("user", "a")], THINKING, True),
        (CALLED, THINKING, False),
        (CALLED, {"type": "adaptive"}, True),
        (CALLED, "hard", True),
        ([*CALLED, said("user", "so?")], THINKING, False),  # beside the result
        ([*CALLED, said("assistant", "b"), said("user", "so?")], THINKING, True),
        ([said("user", " ")], THINKING, True),
    ],
)
def test_it_thinks_unless_its_thoughts_are_missing(messages: Any, thinking: Any, thinks: bool) -> None:
    body = sent(turn(*messages, thinking=thinking))
    assert body.get("thinking") == (thinking if thinks else None)


@pytest.mark.parametrize(
    ("base", "url"),
    [
        (None, "https://api.anthropic.com/v1/messages"),
        ("", "https://api.anthropic.com/v1/messages"),
        ("http://up:1", "http://up:1/v1/messages"),
        ("http://up/", "http://up/v1/messages"),
        ("http://up/v1", "http://up/v1/messages"),
        ("http://up/v1/", "http://up/v1/messages"),
        ("http://up/anthropic", "http://up/anthropic/v1/messages"),
    ],
)
def test_where_it_asks(base: str | None, url: str) -> None:
    provider, requests = asking(Response(), baseUrl=base)
    run(provider)
    assert requests[0][:2] == ("POST", url)


def test_the_fields_and_the_system() -> None:
    provider, requests = asking(Response(), headers={"Anthropic-Beta": "x", "Anthropic-Version": "2030-01-01"})
    run(provider, turn(system="Be kind.\u00e9"))
    ((_, _, fields, body),) = requests
    assert fields == {
        "content-type": "application/json",
        "accept": "text/event-stream, application/json",
        "user-agent": "copepod",
        "x-api-key": KEY,
        "anthropic-version": "2030-01-01",
        "anthropic-beta": "x",
    }
    assert body["system"] == "Be kind.\u00e9"
    provider, requests = asking(Response(), apiKey=None)
    run(provider, turn(system=" "))
    assert "x-api-key" not in requests[0][2]
    assert requests[0][2]["anthropic-version"] == "2023-06-01"
    assert "system" not in requests[0][3]


# What is answered


def start(**usage: Any) -> dict[str, Any]:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "stop_reason": None}
    return {"type": "message_start", "message": message | ({"usage": usage} if usage else {})}


def begin(block: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(kind: str, value: Any, index: int = 0) -> dict[str, Any]:
    name = {"input_json": "partial_json"}.get(kind, kind)
    return {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", name: value}}


def stop(index: int = 0) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def ends(reason: Any, **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}


def failed(kind: str, message: str = "why") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def word(value: str) -> dict[str, Any]:
    return delta("text", value)


def called(index: int, name: str, id: str, arguments: str = "") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}


def argued(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def counted(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"usage": usage}


def reason(value: str) -> dict[str, Any]:
    return {"finish_reason": value}


DONE = {"type": "message_stop"}
STOP = reason("stop")
TEXT = {"type": "text", "text": ""}
NONSENSE = ("upstream", "the model server's answer makes no sense", True, None)
BROKE_OFF = ("upstream", "the model server's answer broke off", True, None)
LOST = ("upstream", "the connection to the model server broke", True, None)
DENIED = ("upstream_auth", "the model server refused the gateway's credentials", False, None)
LIMITED = ("rate_limited", "the model server's rate limit is reached", False, None)
LATE = ("timeout", "the model server took too long", True, None)


def overloaded(taken: bool, retry_after: int | None = None) -> tuple[Any, ...]:
    return "upstream", "the model server is overloaded", taken, retry_after


def answered(events: list[Any], expected: list[Any]) -> None:
    response = Response(events, fields={"content-type": "text/event-stream"})
    assert run(asking(response)[0]) == expected
    assert response.closed
    assert response.finalized
    if DONE in events and not isinstance(expected[-1], tuple):
        assert response.ended  # read to its end, so that its connection is used again


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([start(input_tokens=3, output_tokens=1), begin(TEXT), {"type": "ping"}, word("a"), word("b"), stop(),
          ends("end_turn", output_tokens=9), DONE], ["a", "b", counted(3, 9), STOP]),
        ([start(input_tokens=3, cache_creation_input_tokens=20, cache_read_input_tokens=100), word("a"),
          ends("end_turn", output_tokens=9), DONE], ["a", counted(123, 9), STOP]),
        ([start(input_tokens=3, cache_read_input_tokens=None), ends("end_turn", output_tokens=4),
          ends("end_turn", input_tokens=5, output_tokens=6), DONE], [counted(5, 6), STOP]),
        ([start(input_tokens=0, output_tokens=0), word("a"), ends("end_turn"), DONE], ["a", STOP]),
        ([start(), ends("end_turn", output_tokens="many"), DONE], [STOP]),
        ([start(input_tokens=3), word("a"), DONE], ["a", counted(3, 0)]),
        ([start(), begin({"type": "text", "text": "a"}), word(""), word("b"), stop(), ends(None), ends("end_turn")],
         ["a", "b", STOP]),
        ([start(), begin({"type": "thinking", "thinking": ""}), delta("thinking", "hm"),
          delta("signature", "Eq"), stop(), begin({"type": "redacted_thinking", "data": "x"}, 1), stop(1),
          begin(TEXT, 2), delta("text", "a", 2), delta("citations", {}, 2), ends("end_turn"), DONE],
         [{"reasoning": "hm"}, "a", STOP]),
        ([start(), begin({"type": "thinking", "thinking": "h"}), ends("end_turn"), DONE], [{"reasoning": "h"}, STOP]),
        ([start(), {"type": "of_tomorrow", "x": 1}, {}, begin({"type": "new"}), delta("new", 1), word("a"), DONE,
          word("behind the end")], ["a"]),
        ([word("\ud83d"), word("a\u2028\U0001f600"), ends("end_turn"), DONE], ["\ufffd", "a\u2028\U0001f600", STOP]),
    ],
)  # fmt: skip
def test_a_streamed_answer(events: list[Any], expected: list[Any]) -> None:
    answered(events, expected)


@pytest.mark.parametrize(
    ("stop_reason", "expected"),
    [
        ("end_turn", "stop"), ("stop_sequence", "stop"), ("pause_turn", "stop"), ("of_tomorrow", "stop"),
        ("max_tokens", "length"), ("model_context_window_exceeded", "length"), ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
    ],
)  # fmt: skip
def test_why_it_ended(stop_reason: str, expected: str) -> None:
    answered([start(), word("a"), ends(stop_reason), DONE], ["a", reason(expected)])
    answered([start(), word("a"), ends(stop_reason)], ["a", reason(expected)])


def tool(name: str, id: str, **input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


TOOL_USE = [ends("tool_use"), DONE]
TOOL_CALLS = reason("tool_calls")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([begin(TEXT), word("a"), stop(), begin(tool("look", "toolu_1"), 1), delta("input_json", "", 1),
          delta("input_json", '{"at"', 1), delta("input_json", ":1}", 1), stop(1)],
         ["a", called(0, "look", "toolu_1"), argued(0, '{"at"'), argued(0, ":1}")]),
        ([begin(tool("look", "a"), 1), delta("input_json", "{}", 1), stop(1), begin(tool("go", "b"), 2),
          delta("input_json", '{"x":2}', 2), stop(2)],
         [called(0, "look", "a"), argued(0, "{}"), called(1, "go", "b"), argued(1, '{"x":2}')]),
        ([begin(tool("look", "a"), 1), begin(tool("go", "b"), 2), delta("input_json", "[1]", 2),
          delta("input_json", "[2]", 1), stop(1), stop(2)],
         [called(0, "look", "a"), called(1, "go", "b"), argued(1, "[1]"), argued(0, "[2]")]),
        ([begin(tool("look", "a")), delta("input_json", ""), stop()], [called(0, "look", "a"), argued(0, "{}")]),
        ([begin(tool("look", "a", at=1)), stop()], [called(0, "look", "a", '{"at": 1}')]),
        ([begin({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}),
          delta("input_json", '{"query":"x"}'), stop(), begin({"type": "web_search_tool_result", "content": []}, 1),
          stop(1), begin(tool("look", "a"), 2), delta("input_json", "{}", 2), stop(2)],
         [called(0, "look", "a"), argued(0, "{}")]),
    ],
    ids=["text first", "two", "interleaved", "no arguments", "whole arguments", "the server's own"],
)  # fmt: skip
def test_calls_of_the_clients_tools(events: list[Any], expected: list[Any]) -> None:
    answered([start(), *events, *TOOL_USE], [*expected, TOOL_CALLS])


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], [BROKE_OFF]),
        ([start(input_tokens=1), word("a")], ["a", BROKE_OFF]),
        ([start(), word("a"), ends(None)], ["a", BROKE_OFF]),
        ([start(), word("a"), OSError("reset")], ["a", LOST]),
        ([word("a"), ConnectionRefusedError()], ["a", LOST]),
        ([word("a"), "{"], ["a", NONSENSE]),
        (["[" * 200_000], [NONSENSE]),
        (["[]"], [NONSENSE]),
        (["null"], [NONSENSE]),
        (["5"], [NONSENSE]),
        ([{"type": "message_start"}], [NONSENSE]),
        ([{"type": "content_block_start", "index": 0}], [NONSENSE]),
        ([begin({})], [NONSENSE]),
        ([begin({"type": "tool_use", "name": "look"})], [NONSENSE]),
        ([begin({"type": "tool_use", "name": "look", "id": 5})], [NONSENSE]),
        ([begin(tool("look", "a"), [])], [NONSENSE]),  # type: ignore[arg-type]
        ([begin(tool("look", "a")), delta("input_json", {})], [called(0, "look", "a"), BROKE_OFF]),
        ([begin(tool("look", "a")), delta("input_json", {"a": 1})], [called(0, "look", "a"), NONSENSE]),
        ([{"type": "content_block_delta", "delta": "a"}], [NONSENSE]),
        ([word(["a"])], [NONSENSE]),  # type: ignore[arg-type]
        ([{"type": "message_delta"}], [NONSENSE]),
        ([ends({"a": 1})], [NONSENSE]),
        ([failed("overloaded_error")], [overloaded(False)]),
        ([start(input_tokens=1), {"type": "ping"}, failed("overloaded_error")], [overloaded(False)]),
        ([word("a"), failed("overloaded_error")], ["a", overloaded(True)]),
        ([failed("rate_limit_error")], [LIMITED]),
        ([failed("authentication_error", KEY)], [DENIED]),
        ([failed("permission_error", KEY)], [DENIED]),
        ([failed("billing_error", "credit is low")], [DENIED]),
        ([failed("invalid_request_error", f"no  {KEY}")], [("rejected", "no ***", False, None)]),
        ([failed("not_found_error")], [("rejected", "why", False, None)]),
        ([failed("api_error", f"in\n{KEY}")], [("upstream", "in ***", True, None)]),
        ([word("a"), failed("timeout_error")], ["a", ("upstream", "why", True, None)]),
        ([{"type": "error"}], [("upstream", "the model server failed", True, None)]),
        ([{"error": "plain words"}], [("upstream", "plain words", True, None)]),
    ],
)  # fmt: skip
def test_a_stream_that_fails(events: list[Any], expected: list[Any]) -> None:
    answered(events, expected)


def message(*content: Any, stop_reason: str | None = "end_turn", **more: Any) -> bytes:
    value = {"type": "message", "role": "assistant", "content": content, "stop_reason": stop_reason}
    return json.dumps(value | more).encode()


COUNTS = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (message(text("hi "), text("there"), usage=COUNTS), ["hi ", "there", counted(7, 5), STOP]),
        (b"\xef\xbb\xbf" + message({"type": "thinking", "thinking": "hm", "signature": "x"}, text("a")),
         [{"reasoning": "hm"}, "a", STOP]),
        (message(text("a"), tool("look", "b", at=1), tool("go", "c"), stop_reason="tool_use"),
         ["a", called(0, "look", "b", '{"at": 1}'), called(1, "go", "c"), argued(1, "{}"), TOOL_CALLS]),
        (message(stop_reason="refusal"), [reason("content_filter")]),
        (message(stop_reason=None), []),
        (message(None), [NONSENSE]),
        (b"{}", [BROKE_OFF]),
        (b"", [NONSENSE]),
        (b"\xff\xfe", [NONSENSE]),
        (json.dumps(failed("rate_limit_error")).encode(), [LIMITED]),
        (b" " * (model_server.MAX_ANSWER + 1), [LOST]),
    ],
)  # fmt: skip
def test_a_whole_answer(body: bytes, expected: list[Any]) -> None:
    response = Response(fields={"content-type": "Application/JSON; charset=utf-8"}, body=body)
    assert run(asking(response)[0]) == expected
    assert response.closed


def refused(kind: str, words: str = "why") -> bytes:
    return json.dumps(failed(kind, words)).encode()


@pytest.mark.parametrize(
    ("status", "fields", "body", "expected"),
    [
        (400, {}, refused("invalid_request_error", f"{KEY}: bad"), ("rejected", "***: bad", False, None)),
        (404, {}, refused("not_found_error", "model: x"), ("rejected", "model: x", False, None)),
        (413, {}, b"<html>", ("rejected", "the model server refused the request with status 413", False, None)),
        (401, {}, refused("authentication_error", KEY), DENIED),
        (402, {}, refused("billing_error"), DENIED),
        (403, {}, refused("permission_error"), DENIED),
        (429, {"retry-after": "7"}, refused("rate_limit_error"), (*LIMITED[:3], 7)),
        (500, {}, refused("api_error"), ("upstream", "the model server failed with status 500", True, None)),
        (503, {}, b"", ("upstream", "the model server failed with status 503", False, None)),
        (529, {}, refused("overloaded_error"), overloaded(False)),
        (529, {"retry-after": "3"}, OSError("broke"), overloaded(False, 3)),
    ],
)
def test_a_status_that_is_no_success(
    status: int, fields: dict[str, str], body: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    response = Response(status=status, fields=fields, body=body)
    assert run(asking(response)[0]) == [expected]
    assert response.closed
    assert f"run run_1: the model server answered with status {status}" in caplog.text
    assert KEY not in caplog.text


def test_what_configured_fields_carry_is_never_said(caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Authorization": "Bearer of-some-length", "X-Title": "a"}
    words = f"Bearer of-some-length or {KEY} is wrong, a"
    for response in (
        Response(status=400, body=refused("x", words)),
        Response([failed("invalid_request_error", words)]),
    ):
        items = run(asking(response, headers=headers)[0])
        assert items == [("rejected", "Bearer *** or *** is wrong, a", False, None)]
    assert "of-some-length" not in caplog.text
    assert run(asking(Response(status=400, body=refused("x", "short")), apiKey="short")[0])[0][1] == "short"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(111, "refused"), ("upstream", model_server.UNREACHED, False, None)),
        (socket.gaierror(-2, "unknown"), ("upstream", model_server.UNREACHED, False, None)),
        (ConnectionResetError(), LOST),
        (TimeoutError(), LOST),
    ],
)
def test_a_connection_that_fails(error: OSError, expected: Any) -> None:
    assert run(asking(error, timeoutSeconds=10)[0]) == [expected]


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        (None, []),
        (Response([start(), word("a")], hang=True), ["a"]),
        (Response(fields={"content-type": "application/json"}, hang=True), []),
        (Response(status=500, hang=True), []),
    ],
    ids=["no head", "a stream", "a whole", "a refusal"],
)
def test_the_time_an_answer_may_take(answer: Any, items: list[Any]) -> None:
    assert run(asking(answer, timeoutSeconds=0.05)[0]) == [*items, LATE]
    assert answer is None or answer.closed


def test_a_server_that_stays_after_the_end() -> None:
    response = Response([word("a"), ends("end_turn"), DONE], hang=True)
    assert run(asking(response, timeoutSeconds=10)[0]) == ["a", STOP]
    assert response.closed
    assert not response.ended


@pytest.mark.parametrize("cancel", [True, False])
def test_a_cancel_closes_the_connection(cancel: bool) -> None:
    response = Response([word("a")], hang=True)

    async def main() -> None:
        items = asking(response)[0](turn())
        assert await anext(items) == "a"
        if cancel:
            task = asyncio.ensure_future(anext(items))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await items.aclose()
        assert response.closed
        assert response.finalized

    asyncio.run(main())


# Through the real client


def stream(*events: dict[str, Any], line: str = "\n") -> bytes:
    """A response, its events named as the API names them."""
    each = (
        f"event: {event['type']}{line}data: {json.dumps(event, ensure_ascii=False)}{line}{line}" for event in events
    )
    body = "".join(each).encode()
    chunks = b"".join(http1.chunk(body[at : at + 50]) for at in range(0, len(body), 50))
    return OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + http1.LAST_CHUNK


SPOKEN = [
    start(input_tokens=3), begin(TEXT), {"type": "ping"}, word("caf\u00e9 "), word("\U0001f600"), stop(),
    begin(tool("look", "toolu_1"), 1), delta("input_json", '{"at":', 1), delta("input_json", '"\u4f60"}', 1), stop(1),
    ends("tool_use", output_tokens=9), DONE,
]  # fmt: skip
TAKEN = [
    "caf\u00e9 ", "\U0001f600", called(0, "look", "toolu_1"), argued(0, '{"at":'), argued(0, '"\u4f60"}'),
    counted(3, 9), TOOL_CALLS,
]  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
def test_through_the_pool(pieces: int) -> None:
    whole = message(text("whole"), usage=COUNTS)
    script = [
        stream(*SPOKEN),
        stream(*SPOKEN, line="\r\n"),
        OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole,
        b"HTTP/1.1 529 Busy\r\nRetry-After: 2\r\nContent-Length: 2\r\n\r\n{}",
        (stream(start(), word("cut")).removesuffix(http1.LAST_CHUNK), CLOSE),
    ]

    async def work(server: Server, pool: Pool) -> None:
        options = {"baseUrl": server.url, "apiKey": KEY, "timeoutSeconds": 9}
        provider = model_server.provider(options, pool.request, module)
        assert await take(provider, turn()) == TAKEN
        assert await take(provider, turn()) == TAKEN
        assert await take(provider, turn()) == ["whole", counted(7, 5), STOP]
        assert await take(provider, turn()) == [overloaded(False, 2)]
        assert await take(provider, turn()) == ["cut", LOST]

    server = serve(script, work, pieces)
    assert server.connections == 1  # each answer was read to its end
    assert len(server.requests) == 5
    for request in server.requests:
        head, _, body = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/messages HTTP/1.1\r\n")
        assert f"x-api-key: {KEY}".encode() in head.lower()
        assert json.loads(body)["messages"] == [user("hello")]
