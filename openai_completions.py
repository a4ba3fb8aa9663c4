"""A dialect for model servers: OpenAI's Chat Completions, as OpenAI, Ollama, vLLM and many others speak it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MAX_FRAMES = 5  # words of an answer around which one is looked for; some servers have another in each chunk
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # RFC 8259, 7: unescaped; in a JSON string it stands for itself

Turn = dict[str, Any]
Item = str | dict[str, Any]


def url_of(base: str) -> str:
    """Where the server at `base` is asked."""
    return base.rstrip("/") + "/chat/completions"


def fields_of(key: str) -> dict[str, str]:
    """The request's own fields."""
    return {"authorization": f"Bearer {key}"} if key else {}


def body_of(turn: Turn) -> bytes:
    """The request's body."""
    system = [{"role": "system", "content": turn["system"]}] if turn["system"] else []
    value = {
        "model": turn["model"],
        "messages": system + turn["messages"],
        "stream": True,
        "stream_options": {"include_usage": True},
        **turn["params"],
    }
    return ENCODER.encode(value).encode(errors="replace")  # a lone surrogate in an agent's own words


class Answer:
    """What the chunks of an answer, or the whole of it, told so far; `told` makes an exception of an error in it."""

    def __init__(self, told: Callable[[object], Exception]) -> None:
        self.told = told
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.frame, self.missed = ("", ""), 0
        self.calls = 0  # those that came without an index

    def take(self, data: str) -> str | list[Item]:
        """What `read` gives: where only the word is new, all the rest is known to tell nothing."""
        before, after = self.frame
        if before and data.startswith(before) and data.endswith(after):
            plain = PLAIN.fullmatch(data, len(before), len(data) - len(after))
            if plain is not None:
                return plain[0]
        if data == "[DONE]":
            self.done = True
            return ""
        items = self.read(data)
        if items and isinstance(items, str):
            self.missed += 1
            if 1 < self.missed <= MAX_FRAMES:  # an answer of one word has no use for it
                self.frame = frame_of(data, items) or self.frame
        return items

    def read(self, data: str) -> str | list[Item]:
        """The text of a chunk, often "", or of a whole answer; a list of items where there is more."""
        value = json.loads(data)
        if error := value if value.get("object") == "error" else value.get("error"):
            raise self.told(error)
        if usage := value.get("usage"):
            self.usage = usage if is_usage(usage) else self.usage
        if not value.get("choices"):  # a heartbeat, or usage alone
            return ""
        choice = value["choices"][0]
        if reason := choice.get("finish_reason"):
            if reason == "error":
                raise self.told("the model server failed")
            self.finish_reason = reason if reason in FINISH_REASONS else "stop"
        part = choice.get("delta", choice.get("message")) or {}
        text, calls = part.get("content") or "", part.get("tool_calls")
        thought = part.get("reasoning_content") or part.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError
        logprobs = choice.get("logprobs")
        if not thought and not calls and not logprobs:
            return text
        items: list[Item] = [{"reasoning": thought}] if thought else []
        items += [text] if text else []
        items += [{"logprobs": logprobs}] if logprobs else []
        return [*items, {"tool_calls": [self.fragment(call) for call in calls]}] if calls else items

    def fragment(self, call: dict[str, Any]) -> dict[str, Any]:
        """A tool call, or a part of one; `index` says of which."""
        index = call.get("index")
        if not isinstance(index, int):  # whole answers have none, and some servers send whole calls one by one
            self.calls += bool(call.get("id")) or not self.calls
            index = self.calls - 1
        return {"index": index, "id": call.get("id"), "function": call.get("function") or {}}

    def end(self) -> list[Item]:
        """The last items."""
        items: list[Item] = [{"usage": self.usage}] if self.usage else []
        return [*items, {"finish_reason": self.finish_reason}] if self.finish_reason else items


def is_usage(usage: object) -> bool:
    """Whether these are measured tokens."""
    if not isinstance(usage, dict):
        return False
    return isinstance(usage.get("prompt_tokens"), int) and isinstance(usage.get("completion_tokens", 0), int)


def frame_of(chunk: str, text: str) -> tuple[str, str] | None:
    """What stands before and behind the text in a chunk that tells nothing else, None when that is not sure."""
    before, _, after = chunk.partition(f'"{text}"')
    frame, other = (f'{before}"', f'"{after}'), "any other word"
    with suppress(ValueError, RecursionError, LookupError):
        value = json.loads(chunk)
        choice = value["choices"][0]
        choice["delta"]["content"] = other
        # If this alone changes, the text is one whole string of the JSON: any that is plain may stand in its place.
        if not choice.get("finish_reason") and not value.get("usage") and json.loads(other.join(frame)) == value:
            return frame
    return None
