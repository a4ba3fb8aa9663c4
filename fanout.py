"""The events of runs to those who may watch: encoded once for each kind of them, joined in time, no work for nobody."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

TEXT_RATE = 200_000  # characters a second of a run's text so far, which each of its events has whole
AGENT_SECONDS = 0.05  # between two `assistant` events of a run; the words of the meantime are joined
CHAT_SECONDS = 0.15  # between two `chat` deltas of a run, as in the family
MAX_TEXT = 256 * 1024  # bytes of an answer so far that are sent again with each delta

encode: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode


if TYPE_CHECKING:

    class Run(Protocol):
        """What is looked at of a run."""

        id: str
        owner: str  # the name of the token that it was asked for with
        session_key: str  # as its owner knows it
        lane: tuple[str, str]  # agent id, and the key as the operators know it
        answer: list[str]


class _Watch:
    """What was told of one run."""

    __slots__ = ("agent_next", "chat", "chat_at", "long", "own", "run", "seq", "timer", "words")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seq = self.own = 0  # events to the operators; to its owner, who must not see by them who else listens
        self.words: list[str] = []  # not told yet
        self.chat = ""  # the text that `chat` was not told yet
        self.agent_next = self.chat_at = float("-inf")  # when they were told of words
        self.timer: asyncio.TimerHandle | None = None
        self.long = False  # the answer so far is beyond MAX_TEXT

    def text(self) -> str:
        """Return the answer so far, "" where it is too long."""
        text = "" if self.long else "".join(self.run.answer)
        self.long |= len(text if text.isascii() else text.encode("utf-8", "replace")) > MAX_TEXT
        return "" if self.long else text


class Fanout:
    """Tells its members of the runs' events, as JSON of `{"type":"event",...` without its closing brace.

    A member is a function that must return at once; it adds what is its own (`seq`) and sends. One without an owner's
    name, an operator, is told of all runs, any other of its owner's. `observers` is the runs' list of them: we are on
    it only while there are members.
    """

    def __init__(
        self, observers: list[Callable[[Any, tuple[str, Any]], None]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._observers, self._clock = observers, clock
        # By their owner's name, in the order in which they came; no owner is there without a member.
        self._members: dict[str, dict[Callable[[bytes], None], None]] = {}
        self._watches: dict[Run, _Watch] = {}  # not by their ids, which two owners may both have chosen

    def join(self, member: Callable[[bytes], None], owner: str = "") -> None:
        """Tell `member` too, from now on."""
        if not self._members:
            self._observers.append(self._take)
        self._members.setdefault(owner, {})[member] = None

    def leave(self, member: Callable[[bytes], None], owner: str = "") -> None:
        """Tell `member` no more. Safe to call again."""
        members = self._members.get(owner, {})
        if member not in members:
            return
        del members[member]
        if not members:
            del self._members[owner]
            for watch in self._watches.values():
                if watch.run.owner == owner:
                    watch.own = 0
        if self._members:
            return
        self._observers.remove(self._take)
        for watch in self._watches.values():
            if watch.timer is not None:
                watch.timer.cancel()
        self._watches.clear()

    def tell(self, event: str, payload: Any, owner: str = "", **more: Any) -> None:
        """Tell this owner's members, or the operators, of `event`."""
        if members := self._members.get(owner):
            data = encode({"type": "event", "event": event, "payload": payload, **more})[:-1].encode()
            for member in list(members):
                member(data)

    def _take(self, run: Run, event: tuple[str, Any]) -> None:
        kind, data = event
        watch = self._watches.get(run)
        if watch is None:
            if "" not in self._members and run.owner not in self._members:
                return
            watch = self._watches[run] = _Watch(run)
        if kind == "delta":
            watch.words.append(data)
            if watch.timer is None:
                self._tell_words(watch)
        elif kind == "start":
            self._agent(watch, "lifecycle", {"phase": "start", "startedAt": _ms()})
        elif kind == "tool":
            watch.agent_next = float("-inf")  # the words that came before it are told before it
            self._tell_words(watch)
            self._agent(watch, "tool", data)
        elif kind in ("end", "error"):
            self._tell_words(watch, last=True)
            self._end(watch, None if kind == "end" else data)
            del self._watches[run]
        # The rest (thoughts, calls of a client's tools, logprobs) is for that client: the protocol has no stream of it.

    def _tell_words(self, watch: _Watch, last: bool = False) -> None:
        """Tell of the words that wait, each where it is time for it; the rest by a timer. `last`: all, and no timer."""
        if watch.timer is not None:
            watch.timer.cancel()
            watch.timer = None
        now = self._clock()
        if watch.words and (last or now >= watch.agent_next):
            data = {"delta": "".join(watch.words)}
            watch.words.clear()
            text = watch.chat = watch.text()
            watch.agent_next = now + max(AGENT_SECONDS, len(watch.chat) / TEXT_RATE)
            self._agent(watch, "assistant", {"text": text, **data} if text else data)
        if watch.chat and not last and now >= watch.chat_at + CHAT_SECONDS:
            watch.chat_at = now
            self._chat(watch, "delta", {"message": message(watch.chat)})
            watch.chat = ""
        if not last and (watch.words or watch.chat):
            at = watch.agent_next if watch.words else watch.chat_at + CHAT_SECONDS
            watch.timer = asyncio.get_running_loop().call_later(at - now, self._tell_words, watch)

    def _end(self, watch: _Watch, error: dict[str, Any] | None) -> None:
        text = watch.text()
        said = {"message": message(text)} if text else {}  # chat.history has the long ones
        if error is None:
            self._agent(watch, "lifecycle", {"phase": "end", "endedAt": _ms()})
            self._chat(watch, "final", said)
        elif error["kind"] == "cancelled":
            self._agent(watch, "lifecycle", {"phase": "end", "endedAt": _ms(), "aborted": True})
            self._chat(watch, "aborted", {"stopReason": "rpc", **said})
        else:
            self._agent(watch, "lifecycle", {"phase": "error", "error": error["message"], "endedAt": _ms()})
            self._chat(watch, "error", {"errorMessage": error["message"], **said})

    def _agent(self, watch: _Watch, stream: str, data: dict[str, Any]) -> None:
        watch.seq += 1
        watch.own += watch.run.owner in self._members
        payload = {"runId": watch.run.id, "stream": stream, "data": data, "seq": watch.seq, "ts": _ms()}
        self._tell(watch, "agent", payload)

    def _chat(self, watch: _Watch, state: str, more: dict[str, Any]) -> None:
        self._tell(watch, "chat", {"runId": watch.run.id, "seq": watch.seq, "state": state, **more})

    def _tell(self, watch: _Watch, event: str, payload: dict[str, Any]) -> None:
        """Tell the operators, and whose run it is: each by the key that they know its session by."""
        run = watch.run
        payload["sessionKey"] = run.lane[1]
        self.tell(event, payload)
        if run.owner:
            payload["sessionKey"], payload["seq"] = run.session_key, watch.own
            self.tell(event, payload, run.owner)


def message(text: str) -> dict[str, Any]:
    """Return the message of an assistant who said `text` now."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "timestamp": _ms()}


def _ms() -> int:
    return int(time.time() * 1000)
