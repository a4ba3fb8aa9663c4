"""OpenAI's requests as tables: what is taken for one, who it means, and how it is refused."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

import pytest

import chat_completions as chat
from chat_completions import APIError, ChatRequest, Directory, Target

USER = {"role": "user", "content": "hi"}


def parse(**fields: Any) -> ChatRequest:
    return chat.parse_request(json.dumps({"messages": [USER], **fields}).encode())


def refused(body: bytes) -> APIError:
    with pytest.raises(APIError) as error:
        chat.parse_request(body)
    assert (error.value.status, error.value.type, error.value.code) == (400, "invalid_request_error", None)
    assert list(error.value.fields) == []
    return error.value


# JSON


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", {}),
        (b"\xef\xbb\xbf{}", {}),
        (b" \t\r\n{} \n", {}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"}', {"a": "é€😀"}),
        (rb'{"a": "\u00e9\ud83d\ude00\uD83D\uDE00"}', {"a": "é😀😀"}),
        (rb'{"a": "\ud83d"}', {"a": "\ufffd"}),
        (rb'{"a": "\uDe00"}', {"a": "\ufffd"}),
        (rb'{"a": "\ude00\ud83d"}', {"a": "\ufffd\ufffd"}),
        (rb'{"a": "\ud83d\ud83d\ude00"}', {"a": "\ufffd😀"}),
        (rb'{"a": "\ud83d\ude00\ude00"}', {"a": "😀\ufffd"}),
        (rb'{"a": "\ud83dx\ude00"}', {"a": "\ufffdx\ufffd"}),
        (rb'{"a": "\ud83d\n\u0041"}', {"a": "\ufffd\nA"}),
        (rb'{"a": "\\ud83d"}', {"a": r"\ud83d"}),
        (rb'{"a": "\\\ud83d"}', {"a": "\\\ufffd"}),
        (rb'{"a": "\\\\ud83d"}', {"a": r"\\ud83d"}),
        (rb'{"a": "\\\\\ud83d\\"}', {"a": "\\\\\ufffd\\"}),
        (rb'{"a": "\ud83d\\ude00"}', {"a": "\ufffd\\ude00"}),
        (rb'{"\ud83d": "\u0000"}', {"\ufffd": "\0"}),
        (b'{"a": 1e308, "b": -0.0, "c": 1E-999}', {"a": 1e308, "b": 0.0, "c": 0.0}),
        (b'{"a": ' + b"9" * 1000 + b"}", {"a": 10**1000 - 1}),
        (b'{"a": "' + b"[{" * 5000 + b'"}', {"a": "[{" * 5000}),
        (b'{"a": [' + b"[]," * 5000 + b"[]]}", {"a": [[]] * 5001}),
        (b'{"a": ' + b"[" * 127 + b"1" + b"]" * 127 + b"}", None),
        (b'{"a":' * 127 + b"{}" + b"}" * 127, None),
    ],
)
def test_json(body: bytes, expected: object) -> None:
    value = chat.parse_json(body)
    assert expected is None or value == expected
    json.dumps(value).encode("utf-8")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # no lone surrogate is left


DEPTH = 30_000  # as values these are not too many


@pytest.mark.parametrize(
    ("body", "piece"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
        (b"\xff", "not UTF-8 (at byte 0)"),
        (b'{"a": "\xc3"}', "not UTF-8 (at byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"null", "not null"),
        (b"true", "not a boolean"),
        (b"1", "not a number"),
        (b"1.5", "not a number"),
        (b'"x"', "not a string"),
        (b"[]", "not an array"),
        (b"{", "not JSON"),
        (b"{}{}", "line 1, column 3"),
        (b"{\n'a': 1}", "line 2, column 1"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (rb'{"a": "\x"}', "not JSON"),
        (rb'{"a": "\ud8"}', "not JSON"),
        (rb'{"a": "\ud83d', "not JSON"),
        (b'{"a": "\\', "not JSON"),
        (b"\0", "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": [-1e999]}', "-1e999 is too large"),
        (b'{"a": ' + b"9" * 400 + b".0}", "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "1000000 digits"),
        (b'{"a": ' + b"[" * 130 + b"]" * 130 + b"}", "nested deeper than 128"),
        (b'{"a": ' + b"[" * 128 + b"1" + b"]" * 128 + b"}", "nested deeper than 128"),
        (b'{"a": ' + b"[" * 127 + b"{}" + b"]" * 127 + b"}", "nested deeper than 128"),
        (b'{"a":' * 130 + b"{}" + b"}" * 130, "nested deeper than 128"),
        (b"[" * DEPTH + b"]" * DEPTH, "nested"),
        (b'{"a":' * DEPTH + b"1" + b"}" * DEPTH, "nested"),
        (b'{"a": ' + b'[{"a":' * DEPTH, "nested"),
    ],
)
def test_bad_json(body: bytes, piece: str) -> None:
    error = refused(body)
    assert piece in error.message
    assert error.param is None
    assert len(error.message) < 200


LIMIT = chat.MAX_VALUES - 2  # commas and brackets, less those of the object and of its array


def array(item: str, count: int, after: str = "") -> bytes:
    return f'{{"a":[{",".join([item] * count)}]{after}}}'.encode()


@pytest.mark.parametrize(
    ("item", "bounds"),  # how many commas and opening brackets it has, with the comma behind it
    [
        ("0", 1),
        ("[]", 2),
        ('{"a":{}}', 3),
        ('"a"', 1),
        (r'"\"[,\\"', 1),
        (r'"\\"', 1),
        (r'"\\\","', 1),
        ('{",":"[","":0}', 3),
        ('"é"', 1),
    ],
)
def test_values_are_counted_where_they_stand_outside_strings(item: str, bounds: int) -> None:
    count = (LIMIT + 1) // bounds
    spare = LIMIT + 1 - count * bounds  # of those that make the limit
    values = chat.parse_json(array(item, count, ',"b":0' * spare))
    assert len(values["a"]) == count
    more = refused(array(item, count, ',"b":0' * (spare + 1)))
    assert more.message == f"The body has more than {chat.MAX_VALUES} values."
    assert (more.status, more.param) == (400, None)
    with pytest.raises(chat.APIError, match="The frame has more than"):
        chat.parse_json(array(item, count + 1), "frame")


@pytest.mark.parametrize("text", ["1,2,3;", "[{,", r"\",\"", r"\\,", '[{\\"a\\": 1},'])
def test_what_stands_in_a_string_is_one_value(text: str) -> None:
    body = b'{"a":"%b"}' % (text * (900_000 // len(text))).encode()
    assert chat.parse_json(body) == json.loads(body)


def test_a_long_conversation_with_many_tools_has_fewer_values_than_may_be() -> None:
    said = [
        {"role": "user", "content": "How small, [roughly, is {it}?"},
        {"role": "assistant", "content": "1 mm, or 2."},
    ]
    field = {"type": "string", "description": "A copepod's name", "enum": ["Calanus", "Cyclops"]}
    properties = {f"field_{n}": field for n in range(28)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    body = json.dumps({"messages": said * 5000, "tools": [tool] * 128}, separators=(",", ":")).encode()
    assert 850_000 < len(body) <= 1024 * 1024
    assert len(chat.parse_request(body).messages) == 10_000


def test_escapes_take_linear_time() -> None:
    def seconds(body: bytes) -> float:
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            chat.parse_json(body)
            best = min(best, time.process_time() - start)
        return best

    size = 1_000_000
    benign = seconds(b'{"a": "' + b"x" * size + b'"}')
    for hostile in (rb"\\" * (size // 2) + rb"\ud800", rb"\ud800" * (size // 6), rb"\ud83d\ude00" * (size // 12)):
        assert seconds(b'{"a": "' + hostile + b'"}') < 500 * benign + 0.5


# Fields

WRONG: dict[str, list[Any]] = {
    "a number": [True, "1", [], {}],
    "an integer": [True, 1.5, "1", [], {}],
    "a boolean": [0, 1, "true", [], {}],
    "a string": [0, True, [], {}],
    "an object": [0, True, "x", []],
    "an array": [0, True, "x", {}],
    "an array of objects": [0, True, "x", {}, [1], [{}, "x"], [None]],
    "a string or an object": [0, True, []],
    "a string or an array of strings": [0, True, {}, [1], ["x", None], [[]]],
}
RIGHT: dict[str, list[Any]] = {
    "a number": [0, 1.5, -3],
    "an integer": [0, -1, 10**30],
    "a boolean": [True, False],
    "a string": ["", "x"],
    "an object": [{}, {"type": "json_object"}],
    "an array": [[], [1, {}]],
    "an array of objects": [[], [{"type": "function"}]],
    "a string or an object": ["auto", {"type": "function"}],
    "a string or an array of strings": ["x", [], ["x", "y"]],
}
KINDS = [(name, kind) for name, (_, kind) in chat._FIELDS.items()]


def test_the_fields_are_those_of_the_contract() -> None:
    expected = (
        "model stream stream_options temperature top_p max_tokens max_completion_tokens stop seed presence_penalty "
        "frequency_penalty response_format reasoning_effort tools tool_choice parallel_tool_calls"
    )
    assert set(expected.split()) <= set(chat._FIELDS)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_wrong_type_is_named(name: str, kind: str) -> None:
    for value in WRONG[kind]:
        error = refused(json.dumps({"messages": [USER], name: value}).encode())
        assert error.param == name, value
        assert error.message == f"`{name}` must be {kind}."


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_right_type_is_taken(name: str, kind: str) -> None:
    assert parse(**{name: None}) == parse()
    for value in RIGHT[kind]:
        call = parse(**{name: value})
        assert call.params == ({} if name in chat._OURS else {name: value})
        if name == "model":
            assert call.model == value
        if name == "stream":
            assert call.stream is value


def test_defaults() -> None:
    assert parse() == ChatRequest("", "", False, False, False, "", [USER], "hi", {}, {}, False)
    assert parse(unknown=[1, {"x": None}], store=True) == parse()


TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "functions": [{}]},
         {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
        ({"tools": [TOOL], "tool_choice": None}, {"tools": [TOOL]}),
        ({"tools": [], "tool_choice": "required"}, {}),
        ({"tools": None, "tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ],
)  # fmt: skip
def test_tools(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    call = parse(**fields)
    assert call.tools == expected
    assert call == parse()._replace(tools=expected)
    if not expected:
        assert chat.with_tools(call, "main", True) == chat.with_tools(call, "main", False) == call
        return
    assert chat.with_tools(call, "main", True) == call._replace(params={**call.params, **expected})
    unused = parse(**{**fields, "tool_choice": "none"})
    assert chat.with_tools(unused, "main", False) == unused
    with pytest.raises(APIError, match="Agent `main` takes no tools") as error:
        chat.with_tools(call, "main", False)
    assert (error.value.status, error.value.param) == (400, "tools")
    assert "clientTools: true" in error.value.message


@pytest.mark.parametrize("value", [None, 1, 1.0])
def test_n(value: Any) -> None:
    assert parse(n=value) == parse()


@pytest.mark.parametrize("value", [0, 2, -1, 1.5, True, False, "1", [], [1], {}])
def test_bad_n(value: Any) -> None:
    error = refused(json.dumps({"messages": [USER], "n": value}).encode())
    assert error.param == "n"
    assert "`n` must be 1" in error.message


@pytest.mark.parametrize("name", ["include_usage", "include_events"])
def test_stream_options(name: str) -> None:
    others = parse(stream=True)
    for value, expected in (({}, False), ({name: None}, False), ({name: False}, False), ({name: True, "x": 1}, True)):
        assert parse(stream=True, stream_options=value) == others._replace(**{name: expected})
    for bad in (0, 1, "true", [], {}):
        error = refused(json.dumps({"messages": [USER], "stream_options": {name: bad}}).encode())
        assert error.param == f"stream_options.{name}"
        assert f"`stream_options.{name}` must be a boolean" in error.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), ("", ""), ("Bob", "Bob"), ("é😀 x", "é😀 x"), ("x" * 512, "x" * 512), ("é" * 256, "é" * 256)]
    + [(other, "") for other in (7, True, ["x"], {"name": "x", "id": 1})],
)
def test_user(value: Any, expected: str) -> None:
    assert parse(user=value).user == expected


@pytest.mark.parametrize("value", ["x" * 513, "é" * 257, "a\nb", "\0", "\x7f", "\x85", "\t"])
def test_bad_user(value: str) -> None:
    error = refused(json.dumps({"messages": [USER], "user": value}).encode())
    assert error.param == "user"
    assert "`user`" in error.message


# Messages

IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def text(value: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": value}


def said(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "system", "conversation", "message"),
    [
        ([said("user")], "", [said("user")], "x"),
        ([said("system", "a"), said("user"), said("developer", "b")], "a\n\nb", [said("user")], "x"),
        ([said("system", ""), said("system", None), {"role": "system"}, said("user")], "", [said("user")], "x"),
        (
            [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")],
            "",
            [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")],
            "c",
        ),
        (
            [said("user", "a"), said("assistant", None, tool_calls=[CALL]), said("tool", "r", tool_call_id="c1")],
            "",
            [said("user", "a"), said("assistant", "", tool_calls=[CALL]), said("tool", "r", tool_call_id="c1")],
            "r",
        ),
        ([said("function", "r", name="f")], "", [said("tool", "r", name="f")], "r"),
        ([said("tool", "r", name=7, tool_call_id=None)], "", [said("tool", "r")], "r"),
        ([said("user", "a", name="Ann", extra=1)], "", [said("user", "a", name="Ann")], "a"),
        ([said("user", [text("a"), text("b", "input_text")])], "", [said("user", "a\nb")], "a\nb"),
        ([said("system", [text("a"), text("b")]), said("user")], "a\nb", [said("user")], "x"),
        (
            [said("user", [{"type": "input_audio"}, text("a"), {}, {"type": 7}])],
            "",
            [said("user", "a")],
            "a",
        ),
        ([said("user", [IMAGE, text("a"), {}]), said("assistant", [IMAGE, text("b")])], "",
         [said("user", [IMAGE, text("a"), {}]), said("assistant", "b")], "a"),
        ([said("system", [IMAGE, text("s")]), said("user"), said("user", [IMAGE])], "s",
         [said("user"), said("user", [IMAGE])], ""),
        ([said("wizard", "z"), said("user"), said("User", "z")], "", [said("user")], "x"),
        ([said("user"), said("user", ""), said("user", []), said("assistant", ""), {"role": "tool"}], "",
         [said("user")], "x"),
        ([said("user", tool_calls=None), said("assistant", "b", tool_calls=[])], "",
         [said("user"), said("assistant", "b")], "x"),
        ([said("user", "a"), said("assistant", "", tool_calls=[CALL]), said("tool", "", tool_call_id="c1")], "",
         [said("user", "a"), said("assistant", "", tool_calls=[CALL]), said("tool", "", tool_call_id="c1")], "a"),
        ([said("user", " ")], "", [said("user", " ")], " "),
        ([said("user", "é\u2028\0")], "", [said("user", "é\u2028\0")], "é\u2028\0"),
    ],
)  # fmt: skip
def test_messages(messages: Any, system: str, conversation: Any, message: str) -> None:
    assert chat.parse_messages(messages)[:3] == (system, conversation, message)


@pytest.mark.parametrize(
    ("content", "expected"), [("image_url", False), ([text("image_url")], False), ([IMAGE], True), ([], False)]
)
def test_images_are_noticed(content: Any, expected: bool) -> None:
    body = json.dumps({"messages": [USER, said("user", content)]}).encode()
    assert chat.parse_request(body).images is expected
    assert chat.parse_request(body.replace(b"image_", rb"imag\u0065_")).images is expected


@pytest.mark.parametrize(
    ("messages", "param", "piece"),
    [
        (None, "messages", "non-empty array"),
        ([], "messages", "non-empty array"),
        ({}, "messages", "non-empty array"),
        ("hi", "messages", "non-empty array"),
        (["hi"], "messages[0]", "must be an object"),
        ([said("user"), None], "messages[1]", "must be an object"),
        ([{}], "messages[0].role", "must be a string"),
        ([said("user"), {"role": 7, "content": "x"}], "messages[1].role", "must be a string"),
        ([said("user", 7)], "messages[0].content", "a string or an array of parts"),
        ([said("user", {})], "messages[0].content", "a string or an array of parts"),
        ([said("user", ["x"])], "messages[0].content[0]", "must be an object"),
        ([said("user", [text("x"), text(7)])], "messages[0].content[1].text", "must be a string"),  # type: ignore[arg-type]
        ([said("user", [{"type": "text"}])], "messages[0].content[0].text", "must be a string"),
        ([said("assistant", tool_calls={"id": 1})], "messages[0].tool_calls", "array of objects"),
        ([said("assistant", tool_calls=["x"])], "messages[0].tool_calls", "array of objects"),
        ([said("system")], "messages", "Missing user message in `messages`."),
        ([said("assistant")], "messages", "Missing user message in `messages`."),
        ([said("user", "")], "messages", "Missing user message in `messages`."),
        ([said("wizard")], "messages", "Missing user message in `messages`."),
    ],
)
def test_bad_messages(messages: Any, param: str, piece: str) -> None:
    error = refused(json.dumps({"messages": messages}).encode())
    assert error.param == param
    assert piece in error.message
    assert f"`{param}`" in error.message


def test_no_messages() -> None:
    assert refused(b"{}").param == "messages"


# Who is meant

BRANDS = ("copepod", "fased", "opensoul", "epiloop", "edwin", "moltbot", "clawdbot", "openclaw", "mine")
DIRECTORY = Directory({"helper": 1, "coder": 2, "a_b-9": 3}, "helper", BRANDS)


@pytest.mark.parametrize("brand", BRANDS)
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("{}:coder", "coder"),
        ("{}/coder", "coder"),
        (" {}:CODER\n", "coder"),
        ("{}:a_b-9", "a_b-9"),
        ("{}:main", "helper"),
        ("{}/Main", "helper"),
        ("{}", None),
        ("{}/default", None),
        ("{}/DEFAULT", None),
        ("{}x", None),
        ("x{}:coder", None),
        ("x/{}/coder", None),
        ("{}-coder", None),
    ],
)
def test_model(brand: str, form: str, expected: str | None) -> None:
    for name in (brand, brand.upper()):
        assert DIRECTORY.by_model(form.format(name)) == expected
    target = DIRECTORY.resolve(form.format(brand), "", {}, "u-1")
    assert target == Target(expected or "helper", f"agent:{expected or 'helper'}:openai:u-1", False)


@pytest.mark.parametrize("model", ["", " ", "gpt-4o", "anthropic/claude", "agent", "agent/coder", "agents:coder", "é"])
def test_another_model_means_the_default(model: str) -> None:
    assert DIRECTORY.by_model(model) is None
    assert DIRECTORY.resolve(model, "", {}, "u").agent_id == "helper"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("copepod:coder", "coder"),
        (" FASED/Coder ", "coder"),
        ("agent:main", "helper"),
        ("copepod", "helper"),
        ("Mine/default", "helper"),
        ("gpt-4o", None),
        ("coder", None),
        ("", None),
        ("copepod:nobody", None),
        ("copepod/", None),
        ("copepod%2Fcoder", "coder"),
        ("copepod%2F%63oder%20", "coder"),
    ],
)
def test_alias(model: str, expected: str | None) -> None:
    if expected is not None:
        assert DIRECTORY.by_alias(model) == expected
        return
    with pytest.raises(APIError) as error:
        DIRECTORY.by_alias(model)
    e = error.value
    assert (e.status, e.type, e.param, e.code) == (404, "invalid_request_error", "model", "model_not_found")


@pytest.mark.parametrize("model", ["agent:coder", "AGENT:Coder", " agent:coder "])
def test_agent_prefix(model: str) -> None:
    assert DIRECTORY.by_model(model) == "coder"


@pytest.mark.parametrize(
    "name",
    ["nobody", "", "coder/x", "coder:x", "-x", "_x", "x y", "x" * 65, "é", "co\nder", "../x", "*", "c\0", "\u212ax"],
)
@pytest.mark.parametrize("prefix", ["copepod:", "fased/", "agent:"])
def test_no_such_agent(prefix: str, name: str) -> None:
    with pytest.raises(APIError) as error:
        DIRECTORY.resolve(prefix + name, "", {}, "u")
    e = error.value
    assert (e.status, e.type, e.param, e.code) == (404, "invalid_request_error", "model", "model_not_found")
    assert "`helper`, `coder`, `a_b-9`" in e.message
    assert len(e.message) < 200
    assert e.message.isprintable()


def test_main_where_there_is_one() -> None:
    directory = Directory(["first", "main"], "first", BRANDS)
    assert directory.agent("main") == "main"
    assert directory.resolve("", "", {}, "u").agent_id == "first"


@pytest.mark.parametrize("brand", BRANDS)
@pytest.mark.parametrize("name", ["x-{}-agent-id", "x-{}-agent"])
@pytest.mark.parametrize(
    ("value", "expected"), [("coder", "coder"), (" CODER ", "coder"), ("main", "helper"), ("", "a_b-9")]
)
def test_agent_field(brand: str, name: str, value: str, expected: str) -> None:
    target = DIRECTORY.resolve("copepod:a_b-9", "", {name.format(brand): value}, "u")
    assert target.agent_id == expected


@pytest.mark.parametrize("value", ["nobody", "default", "a b", "coder, coder", "\xc3\xa9"])
def test_no_such_agent_in_a_field(value: str) -> None:
    with pytest.raises(APIError) as error:
        DIRECTORY.resolve("", "", {"x-copepod-agent": value}, "u")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_the_field_wins_over_a_bad_model() -> None:
    assert DIRECTORY.resolve("copepod:nobody", "", {"x-mine-agent": "coder"}, "u").agent_id == "coder"


@pytest.mark.parametrize(
    ("fields", "piece"),
    [
        ({"x-copepod-agent-id": "coder", "x-copepod-agent": "helper"}, "x-copepod-agent, x-copepod-agent-id disagree"),
        ({"x-copepod-agent-id": "coder", "x-fased-agent-id": "helper"}, "disagree"),
        ({"x-copepod-session-key": "a", "x-fased-session-key": "b"}, "disagree"),
        ({"x-copepod-session-key": "a", "x-fased-session-key": "A"}, "disagree"),
        ({"x-copepod-session-key": "agent:coder:x", "x-mine-agent": "helper"}, "is of agent `coder`, but `helper`"),
        ({"x-copepod-session-key": "k" * 513}, "512 bytes"),
        ({"x-copepod-session-key": "\xc3\xa9" * 257}, "512 bytes"),
        ({"x-copepod-session-key": "a\tb"}, "control characters"),
        ({"x-copepod-session-key": "a\xc2\x85b"}, "control characters"),
        ({"x-copepod-session-key": "a\x85b"}, "control characters"),
    ],
)
def test_contradictions(fields: Mapping[str, str], piece: str) -> None:
    with pytest.raises(APIError) as error:
        DIRECTORY.resolve("", "", fields, "u")
    assert (error.value.status, error.value.type) == (400, "invalid_request_error")
    assert piece in error.value.message


@pytest.mark.parametrize(
    ("fields", "agent_id"),
    [
        ({"x-copepod-agent-id": "coder", "x-fased-agent": " CODER"}, "coder"),
        ({"x-unknown-agent": "coder", "y-copepod-agent": "coder"}, "helper"),
    ],
)
def test_fields_that_agree(fields: Mapping[str, str], agent_id: str) -> None:
    assert DIRECTORY.resolve("", "", fields, "u").agent_id == agent_id


@pytest.mark.parametrize(
    ("model", "user", "key", "expected"),
    [
        ("", "", "My Key", Target("helper", "My Key", True)),
        ("copepod:coder", "", "k", Target("coder", "k", True)),
        ("", "Bob", "k", Target("helper", "k", True)),
        ("", "Bob", "", Target("helper", "agent:helper:openai-user:Bob", True)),
        ("copepod/coder", "BOB é", "", Target("coder", "agent:coder:openai-user:BOB é", True)),
        ("", "", "agent:coder:x:y", Target("coder", "agent:coder:x:y", True)),
        ("", "", "agent:CODER:x", Target("coder", "agent:CODER:x", True)),
        ("agent:coder", "", "agent:coder:x", Target("coder", "agent:coder:x", True)),
        ("", "", "agent:main:x", Target("helper", "agent:main:x", True)),
        ("copepod:main", "", "agent:helper:", Target("helper", "agent:helper:", True)),
        ("copepod:coder", "", "agent:helper", Target("coder", "agent:helper", True)),
        ("copepod:coder", "", "agents:helper:x", Target("coder", "agents:helper:x", True)),
        ("", "", "caf\xc3\xa9", Target("helper", "café", True)),
        ("", "", "caf\xe9", Target("helper", "café", True)),
        ("", "", "k" * 512, Target("helper", "k" * 512, True)),
    ],
)
def test_session(model: str, user: str, key: str, expected: Target) -> None:
    for brand in BRANDS:
        assert DIRECTORY.resolve(model, user, {f"x-{brand}-session-key": key}, "u") == expected


@pytest.mark.parametrize(
    ("model", "key", "status"),
    [("copepod:coder", "agent:helper:x", 400), ("", "agent:nobody:x", 404), ("", "agent::x", 404)],
)
def test_session_of_another_agent(model: str, key: str, status: int) -> None:
    with pytest.raises(APIError) as error:
        DIRECTORY.resolve(model, "", {"x-copepod-session-key": key}, "u")
    assert error.value.status == status


CHATS = ("X-OpenWebUI-Chat-Id", "x-chat")  # as they may be configured
BOTH = {"x-openwebui-chat-id": "1", "x-chat": "2"}


@pytest.mark.parametrize(
    ("session_from", "user", "fields", "key"),
    [
        ("user", "", {"x-openwebui-chat-id": "c-1"}, "agent:helper:openai-chat:c-1"),
        ("user", "Bob", {"x-chat": "C 1"}, "agent:helper:openai-chat:C 1"),
        ("user", "Bob", {"x-chat": ""}, "agent:helper:openai-user:Bob"),
        ("user", "Bob", {"x-other": "c"}, "agent:helper:openai-user:Bob"),
        ("user", "", BOTH, "agent:helper:openai-chat:1"),  # the first that is configured
        ("user", "", {**BOTH, "x-openwebui-chat-id": ""}, "agent:helper:openai-chat:2"),
        ("user", "", {**BOTH, "x-chat": "k" * 513}, "agent:helper:openai-chat:1"),
        ("user", "", {"x-chat": "k" * 512}, "agent:helper:openai-chat:" + "k" * 512),
        ("user", "", {"x-chat": "caf\xc3\xa9"}, "agent:helper:openai-chat:caf\xe9"),
        ("user", "", {"x-chat": "1", "x-mine-agent": "coder"}, "agent:coder:openai-chat:1"),
        ("user", "", {"x-chat": "agent:coder:x"}, "agent:helper:openai-chat:agent:coder:x"),  # no key, only an id
        ("user", "", {"x-chat": "1", "x-copepod-session-key": "k"}, "k"),
        ("header", "Bob", {}, None),
        ("header", "Bob", {"x-chat": "1"}, "agent:helper:openai-chat:1"),
        ("header", "Bob", {"x-fased-session-key": "k"}, "k"),
        ("none", "Bob", {"x-chat": "1"}, None),
        ("none", "Bob", {"x-chat": "\t"}, None),
        ("none", "Bob", {"x-chat": "1", "x-copepod-session-key": "agent:coder:x"}, "agent:coder:x"),
    ],
)
def test_session_of_a_conversation(session_from: str, user: str, fields: Mapping[str, str], key: str | None) -> None:
    directory = Directory(["helper", "coder"], "helper", BRANDS, CHATS, session_from)
    target = directory.resolve("", user, fields, "u")
    assert (target.session_key, target.stored) == (key or "agent:helper:openai:u", key is not None)


def test_no_field_names_a_conversation_where_none_is_configured() -> None:
    target = DIRECTORY.resolve("", "Bob", BOTH, "u")
    assert target.session_key == "agent:helper:openai-user:Bob"


@pytest.mark.parametrize("value", ["k" * 513, "\xc3\xa9" * 257, "a\tb", "\x7f", "a\xc2\x85b"])
def test_bad_id_of_a_conversation(value: str) -> None:
    directory = Directory(["helper"], "helper", BRANDS, CHATS)
    with pytest.raises(APIError, match="The field x-openwebui-chat-id must have at most 512 bytes and no") as error:
        directory.resolve("", "Bob", {"x-openwebui-chat-id": value, "x-chat": "1"}, "u")
    assert (error.value.status, error.value.type) == (400, "invalid_request_error")


# What is printed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ""),
        ("agent:main:openai-user:Bob B", "agent:main:openai-user:Bob B"),
        ("100%", "100%25"),
        ("é😀", "%C3%A9%F0%9F%98%80"),
        ("a\r\nb\0\x7f\t", "a%0D%0Ab%00%7F%09"),
        ("\x85\u2028", "%C2%85%E2%80%A8"),
        ("\ud800", "?"),
    ],
)
def test_printable(value: str, expected: str) -> None:
    assert chat.printable(value) == expected


@pytest.mark.parametrize(("value", "expected"), [("a", "a"), ("\xc3\xa9", "é"), ("\xe9", "é"), ("\xff", "ÿ")])
def test_text_of(value: str, expected: str) -> None:
    assert chat.text_of(value) == expected


def test_as_uuid() -> None:
    text = chat.as_uuid("0123456789abcdef0123456789abcdef")
    assert text == "01234567-89ab-4def-8123-456789abcdef"
    assert (uuid.UUID(text).version, uuid.UUID(text).variant) == (4, uuid.RFC_4122)


# Errors

RETRY, NEVER = ("Retry-After", "1"), ("x-should-retry", "false")


def failed(kind: str, retry_after: int | None = None, taken: bool = False) -> dict[str, Any]:
    return {"kind": kind, "message": 'It "failed" é\u2028.', "retry_after": retry_after, "taken": taken}


@pytest.mark.parametrize(
    ("kind", "retry_after", "taken", "status", "type_", "fields"),
    [
        ("rejected", None, False, 400, "invalid_request_error", []),
        ("rejected", None, True, 400, "invalid_request_error", []),
        ("rate_limited", None, True, 429, "rate_limit_error", [RETRY, NEVER]),
        ("rate_limited", 7, False, 429, "rate_limit_error", [("Retry-After", "7")]),
        ("rate_limited", 0, False, 429, "rate_limit_error", [RETRY]),
        ("internal", None, False, 500, "server_error", []),
        ("internal", None, True, 500, "server_error", [NEVER]),
        ("upstream", None, False, 502, "upstream_error", []),
        ("upstream", 7, True, 502, "upstream_error", [NEVER]),
        ("upstream_auth", None, False, 502, "upstream_auth_error", [NEVER]),
        ("upstream_auth", None, True, 502, "upstream_auth_error", [NEVER]),
        ("overloaded", None, False, 503, "overloaded_error", [RETRY]),
        ("overloaded", None, True, 503, "overloaded_error", [RETRY, NEVER]),
        ("overloaded", 3, False, 503, "overloaded_error", [("Retry-After", "3")]),
        ("timeout", None, False, 504, "timeout_error", [NEVER]),
        ("timeout", None, True, 504, "timeout_error", [NEVER]),
        ("cancelled", None, False, 500, "server_error", [NEVER]),
        ("cancelled", None, True, 500, "server_error", [NEVER]),
        ("limited", 20, False, 429, "rate_limit_error", [("Retry-After", "20")]),
        ("revoked", None, True, 401, "authentication_error", []),
    ],
)  # fmt: skip
def test_run_error(kind: str, retry_after: int | None, taken: bool, status: int, type_: str, fields: Any) -> None:
    error = chat.run_error(**failed(kind, retry_after, taken))
    codes = {"cancelled": "run_aborted", "limited": "rate_limit_exceeded", "revoked": "invalid_api_key"}
    code = codes.get(kind)
    assert (error.status, error.type, error.code, list(error.fields)) == (status, type_, code, fields)
    body = error.body()
    assert body.isascii()
    assert json.loads(body) == {"error": {"message": str(error), "type": type_, "param": None, "code": code}}


def test_every_kind_has_its_row() -> None:
    kinds = {"rejected", "upstream_auth", "rate_limited", "upstream", "timeout", "overloaded", "internal", "cancelled"}
    assert set(chat.ERRORS) == {*kinds, "limited", "revoked"}


def test_credential_error() -> None:
    missing, wrong = chat.credential_error("token", 0, True), chat.credential_error("password", 0, False)
    for error, piece in ((missing, "No credentials"), (wrong, "Wrong credentials")):
        assert (error.status, error.type, error.code) == (401, "authentication_error", "invalid_api_key")
        assert list(error.fields) == [("WWW-Authenticate", "Bearer")]
        assert piece in error.message
    expired = chat.credential_error("token", 0, False, "2027-01-01T00:00:00Z")
    assert (expired.status, expired.code) == (401, "invalid_api_key")
    assert expired.message == "This token has expired, at 2027-01-01T00:00:00Z; ask for another."
    locked = chat.credential_error("token", 300, False)
    assert (locked.status, locked.type, locked.code) == (429, "rate_limit_error", "too_many_auth_failures")
    assert list(locked.fields) == [("Retry-After", "300"), NEVER]


def test_error_has_its_four_keys() -> None:
    body = APIError(404, "No é.", type="not_found_error", param="p", code="c").body()
    assert json.loads(body) == {"error": {"message": "No é.", "type": "not_found_error", "param": "p", "code": "c"}}
    assert list(json.loads(APIError(400, "x").body())["error"]) == ["message", "type", "param", "code"]
