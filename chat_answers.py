"""OpenAI's Chat Completions, the answer: a run's outcome as JSON, its events as event-stream bytes, the list of models.

Fields and shapes are those of https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from json.encoder import encode_basestring_ascii
from typing import Any

HOLD_SECONDS = 5.0  # how long the head of a stream waits for the first word
SILENCE_SECONDS = 15.0  # between two comments of a silent stream
DEFAULT_MODEL = "copepod"  # what is answered to a call that names none
NOTHING: Mapping[str, Sequence[Any]] = {}

WORD = '{"index":0,"delta":{"content":'
WORD_END = '},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def completion(
    run_id: str,
    model: str,
    text: str,
    finish_reason: str,
    usage: Mapping[str, int],
    more: Mapping[str, Sequence[Any]] = NOTHING,
) -> bytes:
    """Return the whole answer, a `chat.completion` object with the run's id, as JSON.

    `more` is what came besides the text: the deltas of "reasoning" and of "logprobs", and whole "tool_calls".
    """
    content, besides, logprobs = encode_basestring_ascii(text), "", ""
    if more:
        logprobs = _logprobs(more.get("logprobs", ()))
        if reasoning := "".join(more.get("reasoning", ())):
            besides = f',"reasoning_content":{encode_basestring_ascii(reasoning)}'
        if calls := more.get("tool_calls"):
            besides += f',"tool_calls":{json.dumps(calls)}'
            content = content if text else "null"
    return (
        f'{{"id":"{run_id}","object":"chat.completion","created":{int(time.time())},'
        f'"model":{encode_basestring_ascii(model or DEFAULT_MODEL)},"choices":[{{"index":0,"message":'
        f'{{"role":"assistant","content":{content}{besides}}},{logprobs}"finish_reason":"{finish_reason}"}}],'
        f'"usage":{_usage(usage)}}}'
    ).encode("ascii")


def _logprobs(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return `logprobs` of a choice, with those of its deltas one behind the other, and a comma; "" without any."""
    if not parts:
        return ""
    names = dict.fromkeys(name for part in parts for name in part)
    whole = {name: [token for part in parts for token in part.get(name, ())] for name in names}
    return f'"logprobs":{json.dumps(whole)},'


def _usage(usage: Mapping[str, int]) -> str:
    if not usage:
        return '{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
    prompt, answer = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    total = usage.get("total_tokens", prompt + answer)
    return f'{{"prompt_tokens":{prompt},"completion_tokens":{answer},"total_tokens":{total}}}'


class EventStream:
    """The answer as `chat.completion.chunk` events; what is the same in all of them is encoded once.

    `send(events, last)` writes some bytes, before the first ones the head; it returns True when the reader is slow.
    The first ones wait for the first word, so that a run that fails before it is answered with a real status.
    """

    __slots__ = ("_begun", "_clock", "_events", "_include_usage", "_last", "_send", "_unsent", "_word")

    def __init__(
        self,
        run_id: str,
        model: str,
        include_usage: bool,
        include_events: bool,
        send: Callable[[bytes, bool], bool],
        unsent: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._send, self._unsent, self._clock, self._include_usage = send, unsent, clock, include_usage
        self._word = (  # what stands before a word
            f'data: {{"id":"{run_id}","object":"chat.completion.chunk","created":{int(time.time())},'
            f'"model":{encode_basestring_ascii(model or DEFAULT_MODEL)},"choices":[{WORD}'
        )
        self._events = count() if include_events else None
        self._begun = False
        self._last = clock()  # when something was sent

    @property
    def _start(self) -> str:
        """What all chunks begin with."""
        return self._word.removesuffix(WORD)

    def tick(self, now: float) -> None:
        """Begin at last, or say that we are still here. To be called once a second."""
        if not self._begun:
            if now - self._last >= HOLD_SECONDS:
                self._write(b"")
        elif now - self._last >= SILENCE_SECONDS and not self._unsent():
            self._write(KEEP_ALIVE)

    def take(self, kind: str, data: Any) -> bool:
        """Send what an event of the run is here: a delta, or that it has begun. True: the reader is slow."""
        if kind == "delta":  # ASCII, since some clients split lines at U+2028 and its like
            return self._write(f"{self._word}{encode_basestring_ascii(data)}{WORD_END}".encode())
        more = ""
        if kind == "reasoning":  # DeepSeek's word for it; OpenAI has none
            delta = f'"reasoning_content":{encode_basestring_ascii(data)}'
        elif kind == "tool_calls":
            delta = f'"tool_calls":{json.dumps(data)}'
        elif kind == "logprobs":  # those of the words before it
            delta, more = "", _logprobs([data])
        elif kind == "tool" and self._events is not None:  # numbered, as SDKs put the lists of deltas together by it
            delta = f'"copepod_events":[{{"index":{next(self._events)},"tool":{json.dumps(data)}}}]'
        else:
            return not self._begun and self._write(b"")
        chunk = f'{self._start}{{"index":0,"delta":{{{delta}}},{more}"finish_reason":null}}]}}\n\n'
        return self._write(chunk.encode())

    def end(self, finish_reason: str, usage: Mapping[str, int]) -> bool:
        """Send that the run has ended. True: the reader is slow."""
        finish = f'{self._start}{{"index":0,"delta":{{}},"finish_reason":"{finish_reason}"}}]}}\n\n'
        if self._include_usage:
            finish += f'{self._start}],"usage":{_usage(usage)}}}\n\n'
        return self._write(finish.encode() + DONE, last=True)

    def fail(self, error: Any) -> bool:
        """Send how the run failed, an exception with a `body()`; raised before a word. True: the reader is slow."""
        if not self._begun:
            raise error
        return self._write(b"data: " + error.body() + b"\n\n" + DONE, last=True)

    def _write(self, events: bytes, last: bool = False) -> bool:
        self._last = self._clock()
        if not self._begun:
            self._begun = True
            role = '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
            events = (self._start + role).encode() + events
        return self._send(events, last)


def model_list(agents: Sequence[str], created: int) -> bytes:
    """Return the answer of `GET /v1/models`: one model per agent."""
    return json.dumps({"object": "list", "data": [_model(agent, created) for agent in agents]}).encode("ascii")


def model_object(agent: str, created: int) -> bytes:
    """Return the answer of `GET /v1/models/{id}`."""
    return json.dumps(_model(agent, created)).encode("ascii")


def _model(agent: str, created: int) -> dict[str, object]:
    return {"id": f"copepod:{agent}", "object": "model", "created": created, "owned_by": "copepod"}
