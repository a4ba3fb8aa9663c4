"""What an agent may give, and the agent that gives the message back: the echo."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

ECHO_SLICE = 256  # words between two turns of the loop: about a tenth of a millisecond
MAX_TOOL = 256 * 1024  # characters of a tool event, or of one word's logprobs, as JSON
MAX_TOKENS = 2**53 - 1  # the largest integer that every reader of JSON holds exactly (RFC 8259 6)
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
WORD = re.compile(r"\S+\s*|\s+")

Turn = dict[str, Any]
Item = str | dict[str, Any]
Provider = Callable[[Turn], AsyncIterator[Any]]  # of Items, or of what `checked` makes Items of


class ProviderError(Exception):
    """A turn that failed: `kind` says whose fault it was, `taken` whether the agent may have acted."""

    def __init__(self, kind: str, message: str, *, taken: bool = False, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.taken = taken
        self.retry_after = retry_after


def well_formed(text: str) -> str:
    """The text; a lone surrogate, which UTF-8 cannot carry, becomes U+FFFD."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def usage_of(usage: object) -> dict[str, int] | None:
    """Measured tokens in OpenAI's three names, None when these are no numbers."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    # A number of thousands of digits could not be written, True would be no JSON.
    prompt, completion = (int(min(max(tokens, 0), MAX_TOKENS)) for tokens in (prompt, completion))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# The echo


def echo() -> Provider:
    """The provider that answers with the message unchanged, word by word."""

    async def provider(turn: Turn) -> AsyncIterator[Item]:
        for count, word in enumerate(WORD.finditer(turn["message"]), 1):
            yield word[0]
            if count % ECHO_SLICE == 0:
                await asyncio.sleep(0)  # nothing here waits, so a long message would keep the loop from all others

    return provider


def missing(name: str) -> Provider:
    """The provider in place of one that no configuration names: its turns fail, so that a fallback may take them."""

    async def provider(turn: Turn) -> AsyncIterator[Item]:
        raise ProviderError("upstream", f"The model provider `{name}` is not configured (models.providers.{name}).")
        yield ""  # makes this a generator

    return provider


# What a provider gives


def checked(item: object) -> Item | None:
    """What an agent gave, None for an empty text; ProviderError for what no run knows."""
    if isinstance(item, str):
        return well_formed(item) if item else None
    if isinstance(item, dict) and len(item) == 1:
        if item.get("finish_reason") in FINISH_REASONS:
            return item
        if isinstance(tool := item.get("tool"), dict) and fits(tool):
            return item
        if usage := usage_of(item.get("usage")):
            return {"usage": usage}
        if isinstance(thought := item.get("reasoning"), str):
            return {"reasoning": well_formed(thought)} if thought else None
        if isinstance(logprobs := item.get("logprobs"), dict):  # servers have forms of their own: no reason to fail
            tokens = {name: value for name, value in logprobs.items() if isinstance(value, list) and value}
            return {"logprobs": tokens} if tokens and fits(tokens) else None
        if calls := fragments(item.get("tool_calls")):
            return {"tool_calls": calls}
    name = type(item).__name__
    raise ProviderError("internal", f"the agent gave a {name} that is neither text nor an event", taken=True)


def fits(told: dict[str, Any]) -> bool:
    """Whether a tool's doing, or the like, is JSON, and short enough to be told to all who watch."""
    try:
        return len(json.dumps(told, allow_nan=False)) <= MAX_TOOL
    except (TypeError, ValueError, RecursionError, RuntimeError):  # the last: it is changed by a thread meanwhile
        return False


def fragments(calls: object) -> list[dict[str, Any]]:
    """Parts of tool calls as in OpenAI's `delta.tool_calls`, with nothing else in them; [] when these are none."""
    found: list[dict[str, Any]] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or type(call.get("index")) is not int:
            return []
        texts = {key: well_formed(it) for key in ("name", "arguments") if isinstance(it := function.get(key), str)}
        first = {"id": well_formed(id_), "type": "function"} if isinstance(id_ := call.get("id"), str) and id_ else {}
        found.append({"index": call["index"], **first, "function": texts})
    return found
