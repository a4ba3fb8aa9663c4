"""A dialect for model servers: Anthropic's Messages API."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

BASE_URL = "https://api.anthropic.com"
VERSION = "2023-06-01"  # of the API; the last one that takes `temperature`, and the one that other servers speak
MAX_TOKENS = 4096  # the API requires a number; each of its models can write as many
BEGINNING = "(continued)"  # the API wants the user to begin, and a conversation that was cut may begin otherwise
AS_THEY_ARE = ("temperature", "top_p", "top_k", "thinking", "output_config")  # the last three: an agent's own `params`
TOOL_CHOICES = {"auto": "auto", "none": "none", "required": "any"}
FINISH_REASONS = {  # by stop_reason; of every other one it is "stop"
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
PROMPT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")  # they do not overlap

Turn = dict[str, Any]
Item = str | dict[str, Any]


# The request


def url_of(base: str) -> str:
    """Where the server at `base` is asked, Anthropic's own when there is none."""
    return (base or BASE_URL).rstrip("/").removesuffix("/v1") + "/v1/messages"


def models_url_of(base: str) -> str:
    """Where it lists its models, as many at once as the API gives."""
    return (base or BASE_URL).rstrip("/").removesuffix("/v1") + "/v1/models?limit=1000"


def fields_of(key: str) -> dict[str, str]:
    """The request's own fields."""
    return {"anthropic-version": VERSION} | ({"x-api-key": key} if key else {})


def body_of(turn: Turn) -> bytes:
    """The request's body. ValueError, RecursionError: the API has no form for what the turn holds."""
    params = {name: value for name, value in turn["params"].items() if value is not None}
    value = {
        "model": turn["model"],
        "messages": messages_of(turn["messages"]),
        "max_tokens": params.get("max_completion_tokens", params.get("max_tokens", MAX_TOKENS)),
        "stream": True,
        **{name: params[name] for name in AS_THEY_ARE if name in params},
        **tools_of(params),
    }
    if turn["system"].strip():
        value["system"] = turn["system"]
    stop = params.get("stop", [])
    if stop := [text for text in ([stop] if isinstance(stop, str) else stop) if text.strip()]:
        value["stop_sequences"] = stop  # those of white space alone are refused
    if must_not_think(value):
        del value["thinking"]
    # A tool call's arguments may hold a lone surrogate, which UTF-8 cannot carry.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def must_not_think(value: dict[str, Any]) -> bool:
    """Whether the body brings results of calls without the thoughts before them, which OpenAI's messages do not carry.

    The API refuses to think on then, unless thinking is adaptive.
    """
    thinking = value.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") != "enabled":
        return False
    return any(block["type"] == "tool_result" for message in value["messages"][-1:] for block in message["content"])


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as the API wants them: user and assistant in turns, beginning with the user."""
    found: list[dict[str, Any]] = []
    for message in messages:
        role, blocks = "user", list(blocks_of(message.get("content")))
        if message["role"] == "assistant":
            role = "assistant"
            blocks += [tool_use(call) for call in message.get("tool_calls") or () if named(call)]
        elif called := message.get("tool_call_id"):
            result = {"type": "tool_result", "tool_use_id": identifier(called)}
            blocks = [result | {"content": blocks} if blocks else result]
        if blocks and found and found[-1]["role"] == role:
            found[-1]["content"] += blocks  # results of calls side by side must be in one message
        elif blocks:
            found.append({"role": role, "content": blocks})
    if found and found[0]["role"] == "assistant":
        found.insert(0, {"role": "user", "content": [{"type": "text", "text": BEGINNING}]})
    return found


def blocks_of(content: object) -> Iterator[dict[str, Any]]:
    """The blocks of a message's content, a text or parts; a text of white space alone is refused, so it is none."""
    parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts:
        if part.get("type") == "text" and part["text"].strip():
            yield {"type": "text", "text": part["text"]}
        elif part.get("type") == "image_url":
            yield {"type": "image", "source": source_of(part["image_url"]["url"])}


def source_of(url: str) -> dict[str, str]:
    """Where an image is. ValueError: the API cannot take it from there."""
    head, comma, data = url.partition(",")
    media_type, *parameters = head.lower().split(";")
    if media_type.startswith("data:") and parameters[-1:] == ["base64"] and comma:
        media_type = media_type.removeprefix("data:").replace("image/jpg", "image/jpeg")  # only the real name is taken
        return {"type": "base64", "media_type": media_type, "data": data}
    if head.lower().startswith(("http://", "https://")):
        return {"type": "url", "url": url}
    raise ValueError("the model takes an image from an http:// or https:// address, or from a data: URL in base64")


def named(value: object) -> bool:
    """Whether a tool, a call or a choice is one of a function with a name."""
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def identifier(text: object) -> str:
    """A call's id in the letters that the API takes; another server may have given it."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", str(text))


def tool_use(call: dict[str, Any]) -> dict[str, Any]:
    """The block of a call; its arguments are {} when their text is no JSON object."""
    function = call["function"]
    arguments = function.get("arguments")
    with suppress(TypeError, ValueError, RecursionError):  # some clients send the object itself
        arguments = json.loads(arguments)
    arguments = arguments if isinstance(arguments, dict) else {}
    return {"type": "tool_use", "id": identifier(call.get("id")), "name": function["name"], "input": arguments}


def tools_of(params: dict[str, Any]) -> dict[str, Any]:
    """The fields `tools` and `tool_choice`; neither without a function: the API refuses a choice of nothing."""
    tools = []
    for function in (tool["function"] for tool in params.get("tools", []) if named(tool)):
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError("the `parameters` of a tool must be an object")
        schema = {"type": "object"} | parameters
        tool = {"name": function["name"], "description": function.get("description"), "input_schema": schema}
        tools.append({name: value for name, value in tool.items() if value})
    if not tools:
        return {}
    wanted = params.get("tool_choice")
    choice: dict[str, Any] = {}
    if isinstance(wanted, str) and wanted in TOOL_CHOICES:
        choice = {"type": TOOL_CHOICES[wanted]}
    elif wanted is not None and named(wanted):
        choice = {"type": "tool", "name": wanted["function"]["name"]}
    if params.get("parallel_tool_calls") is False and wanted != "none":
        choice = {"type": "auto"} | choice | {"disable_parallel_tool_use": True}
    return {"tools": tools, "tool_choice": choice} if choice else {"tools": tools}


# The answer


class Answer:
    """What the events of an answer told so far; `told` makes an exception of an error in it."""

    def __init__(self, told: Callable[[object], Exception]) -> None:
        self.told = told
        self.counts: dict[str, int] = {}
        self.finish_reason: str | None = None
        self.done = False
        self.calls = 0
        self.open: dict[object, int] = {}  # the tool calls that are being told, by their block's index
        self.argued: set[int] = set()  # those that have arguments

    def take(self, data: str) -> list[Item]:
        """The items of an event, often none, or of a whole message."""
        value = json.loads(data)
        events = unrolled(value) if "content" in value else (value,)
        return [item for event in events for item in self._event(event)]

    def end(self) -> list[Item]:
        """The last items."""
        items: list[Item] = []
        if self.counts:
            prompt, completion = sum(self.counts.get(name, 0) for name in PROMPT), self.counts.get("output_tokens", 0)
            total = prompt + completion
            items = [{"usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}}]
        return [*items, {"finish_reason": self.finish_reason}] if self.finish_reason else items

    def _event(self, event: dict[str, Any]) -> Iterator[Item]:
        kind, index = event.get("type"), event.get("index")
        if kind == "error" or event.get("error"):
            raise self.told(event.get("error"))
        if kind == "message_start":
            self._count(event["message"].get("usage"))
        elif kind == "content_block_start":
            yield from self._block(index, event["content_block"])
        elif kind == "content_block_delta":
            yield from self._delta(index, event["delta"])
        elif kind == "content_block_stop":
            call = self.open.pop(index, None)
            if call is not None and call not in self.argued:  # clients parse them: "" is no JSON
                yield {"tool_calls": [{"index": call, "function": {"arguments": "{}"}}]}
        elif kind == "message_delta":
            self._count(event.get("usage"))
            if reason := event["delta"].get("stop_reason"):
                self.finish_reason = FINISH_REASONS.get(reason, "stop")
        elif kind == "message_stop":
            self.done = True

    def _block(self, index: object, block: dict[str, Any]) -> Iterator[Item]:
        if block["type"] != "tool_use":
            yield from self._words(block["type"], block)
            return
        call = self.open[index] = self.calls
        self.calls += 1
        if block.get("input"):  # most often it is empty here, and comes in deltas
            self.argued.add(call)
        arguments = json.dumps(block["input"]) if call in self.argued else ""
        function = {"name": text_of(block["name"]), "arguments": arguments}
        yield {"tool_calls": [{"index": call, "id": text_of(block["id"]), "type": "function", "function": function}]}

    def _delta(self, index: object, delta: dict[str, Any]) -> Iterator[Item]:
        if delta["type"] != "input_json_delta":
            yield from self._words(delta["type"].removesuffix("_delta"), delta)
        elif index in self.open and delta["partial_json"]:  # the server's own tools have such deltas too
            self.argued.add(self.open[index])
            function = {"arguments": text_of(delta["partial_json"])}
            yield {"tool_calls": [{"index": self.open[index], "function": function}]}

    def _words(self, kind: str, value: dict[str, Any]) -> Iterator[Item]:
        """The words of a block or of a delta of text or thinking; of other kinds none."""
        if kind in ("text", "thinking") and value.get(kind):
            text = text_of(value[kind])
            yield text if kind == "text" else {"reasoning": text}

    def _count(self, usage: object) -> None:
        """Take the counts of tokens: they are those of the whole answer, so the last ones hold."""
        if isinstance(usage, dict):
            counts = {name: usage.get(name) for name in (*PROMPT, "output_tokens")}
            self.counts |= {name: count for name, count in counts.items() if isinstance(count, int) and count > 0}


def text_of(value: object) -> str:
    """The value; TypeError when it is no text."""
    if not isinstance(value, str):
        raise TypeError
    return value


def unrolled(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that a whole message would have come in."""
    yield {"type": "message_start", "message": message}
    for index, block in enumerate(message["content"]):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": message}
    yield {"type": "message_stop"}
