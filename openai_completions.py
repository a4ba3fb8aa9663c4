"""A dialect for model servers: OpenAI's Chat Completions, as OpenAI, Ollama, vLLM and many others speak it."""

from __future__ import annotations

import json
import os
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


def models_url_of(base: str) -> str:
    """Where it lists its models."""
    return base.rstrip("/") + "/models"


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
        self.calls: Calls | None = None  # most answers have none

    def take(self, data: str) -> str | list[Item]:
        """What `read` gives: where only the word is new, all the rest is known to tell nothing."""
        before, after = self.frame
        if before and data.startswith(before) and data.endswith(after):
            plain = PLAIN.fullmatch(data, len(before), len(data) - len(after))
            if plain is not None:
                return plain[0]
        if data.startswith("[DONE]"):
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
        text: Any = part.get("content") or part.get("refusal") or ""  # which comes in place of what was asked for
        calls, logprobs = part.get("tool_calls"), choice.get("logprobs")
        thought = part.get("reasoning_content") or part.get("reasoning") or ""
        if isinstance(text, list):  # Mistral's
            text, thought = text_of(text, "text"), thought or text_of(text, "thinking")
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError
        if not thought and not calls and not logprobs:
            return text
        items: list[Item] = [{"reasoning": thought}] if thought else []
        items += [text] if text else []
        items += [{"logprobs": logprobs}] if isinstance(logprobs, dict) else []
        if calls:
            self.calls = self.calls or Calls()
            items.append({"tool_calls": [self.calls.fragment(call) for call in calls]})
        return items

    def end(self) -> list[Item]:
        """The last items."""
        items: list[Item] = [{"usage": self.usage}] if self.usage else []
        if self.calls is not None and (bare := self.calls.bare()):
            items.append({"tool_calls": bare})
        return [*items, {"finish_reason": self.finish_reason}] if self.finish_reason else items


class Calls:
    """The tool calls of one answer, as far as they have come."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}  # by a call's id, and by the index that it came with
        self.begun: list[list[str]] = []  # of each its id, its name and its arguments, as soon as any came

    def fragment(self, call: dict[str, Any]) -> dict[str, Any]:
        """A tool call, or a part of one. Its id and its name are told once: clients put together what comes again."""
        function = call.get("function") or {}
        id_, name, arguments = call.get("id") or "", function.get("name") or "", function.get("arguments")
        if not isinstance(id_ + name, str):
            raise TypeError
        number = self.number(id_, name, call.get("index"))
        begun = self.begun[number]
        first, told = {}, {}
        if name and not begun[1]:
            begun[1] = told["name"] = name
            id_ = id_ or f"call_{os.urandom(12).hex()}"  # the client's result needs one
        if id_ and not begun[0]:
            begun[0] = first["id"] = id_
        if arguments is not None:  # some servers give the object itself
            told["arguments"] = ENCODER.encode(arguments) if isinstance(arguments, dict) else arguments
            begun[2] = begun[2] or told["arguments"]
        return {"index": number, **first, "function": told}

    def number(self, id_: str, name: str, index: Any) -> int:
        """Of which call that is, in the order in which they began.

        Some servers count every call 0, or none of them; others give each part of a call an id of its own.
        """
        number = self.numbers.get(id_) if id_ else None
        if number is None:
            number = self.numbers.get(index)
            named = number is not None and self.begun[number][1]
            if number is None or (id_ and index is None) or (named and name and (id_ or index is None)):
                number = self.numbers[index] = len(self.begun)
                self.begun.append(["", "", ""])
            if id_:
                self.numbers[id_] = number
        return number

    def bare(self) -> list[dict[str, Any]]:
        """The last fragments, of the calls without arguments: clients parse them, and "" is no JSON."""
        bare = [number for number, begun in enumerate(self.begun) if not begun[2]]
        return [{"index": number, "function": {"arguments": "{}"}} for number in bare]


def text_of(parts: list[dict[str, Any]], kind: str) -> str:
    """What the parts of that kind say; a thought has parts of its own."""
    said = [part[kind] for part in parts if part["type"] == kind]
    return "".join(each if isinstance(each, str) else text_of(each, "text") for each in said)


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
