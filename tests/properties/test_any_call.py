"""Any body, model and session that a caller may send: a ChatRequest and a Target, or an APIError."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import JSON, KEYS, OBJECTS, SCALARS, mutated, tries

import chat_answers
import chat_completions as chat
import http1

some = JSON | st.sampled_from(["auto", "stop", 1, True, 0.5, [], {}, ["x"], [{}]])
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": st.text()})
contents = (
    st.text(min_size=1) | st.just("\ud800") | st.lists(parts | st.just({"type": "image_url"}), max_size=3) | st.none()
)
entries = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]), "content": contents},
    optional={"tool_calls": st.lists(OBJECTS, max_size=2), "tool_call_id": st.text() | some, "name": st.text() | some},
)
odd_entries = st.builds(
    lambda entry, name, value: {**entry, name: value},
    entries,
    st.sampled_from(["role", "content", "tool_calls"]),
    some | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": some}) | some),
)
VALUES = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(0, 2),
    str: st.text(),
    list: st.just([]),
    dict: OBJECTS,
}
sound = st.fixed_dictionaries(
    {"messages": st.lists(entries, max_size=3).map(lambda entries: [*entries, {"role": "user", "content": "hi"}])},
    optional={
        **{name: st.none() | st.one_of([VALUES[kind] for kind in kinds]) for name, (kinds, _) in chat._FIELDS.items()},
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans(), "include_events": st.booleans()}),
        "user": st.text(max_size=9) | OBJECTS,
        "n": st.sampled_from([1, 1.0, None]),
    },
)
wrong = st.fixed_dictionaries({"messages": st.lists(entries | odd_entries | some)}) | st.dictionaries(
    st.sampled_from([*chat._FIELDS, "user", "n", "messages"]), some, min_size=1, max_size=2
)
calls = st.builds(lambda call, more: {**call, **more}, sound, st.just({}) | wrong)
TOKENS = [
    b"[" * 130, b'{"a":' * 130, b'"\\ud800"', b"\\u", b"NaN", b"-Infinity", b"1e999", b"9" * 1100, b"\xef\xbb\xbf",
    b"\xff", b"\xc0", b"\0", b'"', b"\\", b",", b"}", b"]", b"null", b"// x", b"'",
]  # fmt: skip
ids = st.sampled_from(["main", "Work", "nobody", ""])
models = st.text(max_size=20) | st.builds(
    "{}{}{}".format, st.sampled_from(["copepod", "openclaw", "agent", ""]), st.sampled_from([":", "/", "", " "]), ids
)
WHAT = ("agent-id", "agent", "session-key", "session-id")
FIELDS = ["x-chat", *(f"x-{brand}-{what}" for brand in ("copepod", "openclaw") for what in WHAT)]
latin = st.text(st.characters(max_codepoint=0xFF), max_size=12)
utf8 = st.text(max_size=600).map(lambda text: text.encode().decode("latin-1"))
keys = latin | st.builds("agent:{}:{}".format, ids, latin) | utf8


def told(error: chat.APIError, *statuses: int) -> None:
    assert error.status in statuses
    body = json.loads(error.body())["error"]
    assert body["message"] == error.message
    assert body["type"] == "invalid_request_error"


def judged(body: bytes) -> None:
    try:
        call = chat.parse_request(body)
    except chat.APIError as e:
        told(e, 400)
        return
    assert isinstance(call, chat.ChatRequest)
    assert call.message or call.images
    assert call.messages
    for text in (call.model, call.user, call.system, call.message):
        text.encode()  # no lone surrogate comes through
    assert call.messages == json.loads(json.dumps(call.messages, allow_nan=False))
    assert {message["role"] for message in call.messages} <= {"user", "assistant", "tool"}
    contents = [message["content"] for message in call.messages if message["role"] != "assistant"]
    assert call.message in contents or call.images
    assert call.images is any(isinstance(content, list) for content in contents)


@given(st.binary(max_size=100))
def test_any_bytes(body: bytes) -> None:
    judged(body)


@given(JSON)
def test_any_json(value: Any) -> None:
    judged(json.dumps(value).encode())


@tries(300)
@given(calls)
def test_nearly_calls(call: dict[str, Any]) -> None:
    judged(json.dumps(call).encode())


@given(mutated(calls.map(lambda call: json.dumps(call, ensure_ascii=False).encode(errors="replace")), TOKENS))
def test_broken_calls(body: bytes) -> None:
    judged(body)


clean = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
small = st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    small | clean, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(clean, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(clean, values, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_json_is_parsed_as_it_was_written(value: dict[str, Any], ascii: bool, indent: int | None) -> None:
    assert chat.parse_json(json.dumps(value, ensure_ascii=ascii, indent=indent).encode()) == value


@given(st.integers(1, 400), st.booleans())
@example(chat.MAX_DEPTH, True)
@example(chat.MAX_DEPTH + 1, True)
def test_depth_has_a_bound(depth: int, lists: bool) -> None:
    opened, closed = ("[", "]") if lists else ('{"a":', "}")
    body = f'{{"x":{opened * (depth - 1)}1{closed * (depth - 1)}}}'
    if depth <= chat.MAX_DEPTH:
        chat.parse_json(body.encode())
    else:
        with pytest.raises(chat.APIError, match="nested deeper"):
            chat.parse_json(body.encode())


@given(models, KEYS, st.dictionaries(st.sampled_from(FIELDS), ids | keys, max_size=2))
def test_any_caller_is_sent_somewhere(model: str, user: str, fields: dict[str, str]) -> None:
    agents = {"main": SimpleNamespace(id="main"), "work": SimpleNamespace(id="work")}
    directory = chat.Directory(agents, "main", ["copepod", "openclaw"], ["x-chat"])
    user = "" if any("\ud800" <= c <= "\udfff" for c in user) else user  # parse_request has none
    try:
        target = directory.resolve(model, user, fields, "0" * 32)
    except chat.APIError as e:
        told(e, 400, 404)
        return
    assert target.agent_id in agents
    shown = chat.printable(target.session_key)
    assert http1.head(200, [("x-copepod-session-key", shown)]).isascii()
    with contextlib.suppress(chat.APIError):
        assert directory.by_alias(model) in agents


@given(st.text(max_size=20), st.lists(SCALARS, max_size=2))
def test_any_text_is_told_in_ascii(text: str, rest: list[Any]) -> None:
    sent: list[bytes] = []
    send = lambda data, last: bool(sent.append(data))  # noqa: E731
    stream = chat_answers.EventStream("id", text, True, True, send, lambda: 0, lambda: 0.0)
    stream.take("delta", text)
    stream.take("tool", {text: text})
    stream.end("stop", {})
    events = b"".join(sent).decode("ascii").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == text
    told = [event for c in chunks if c["choices"] for event in c["choices"][0]["delta"].get("copepod_events", ())]
    assert told == [{"index": 0, "tool": {text: text}}]
    whole = json.loads(chat_answers.completion("id", text, text, "stop", {}))
    assert whole["choices"][0]["message"]["content"] == text
