"""One agent run: accepted, queued on its session's lane, started, its events, its end. Nothing of HTTP or WebSocket."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

MAX_LANE = 32  # runs that wait behind the running one of their session
MAX_WAITING = 1024  # runs that wait for a free place, all sessions together
MAX_ANSWER = 8 * 1024 * 1024  # characters of one answer, thoughts and calls included; far beyond any model's
FRAGMENT = 64  # characters that a fragment of a call counts for at least; an empty one takes room, too
CANCEL_SECONDS = 1.0  # until a run that outlives its cancellation is cancelled again

IMAGE = "[image]"  # in a transcript, in place of one

Message = dict[str, Any]  # role, content (text, or parts), and tool_calls, tool_call_id, name where they are
Event = tuple[str, Any]
# What observers are told of a run, in this order; after "end" or "error" comes nothing:
#   ("accepted", None) ("start", None) ("delta", text) ("reasoning", text) ("tool", dict) ("tool_calls", fragments)
#   ("logprobs", dict) ("usage", dict) ("end", finish_reason)
#   ("error", {"kind", "message", "retry_after", "taken"})
BESIDES = ("reasoning", "tool_calls", "logprobs")  # what an answer may have besides text
ACCEPTED: Event = ("accepted", None)
START: Event = ("start", None)
CANCELLED: Event = ("error", {"kind": "cancelled", "message": "The run was cancelled."})
Item = str | dict[str, Any]  # of a provider: a delta; tool, tool_calls, reasoning, logprobs, usage or finish_reason
Provider = Callable[[dict[str, Any]], AsyncIterator[Any]]
Take = Callable[[str, Any], bool]  # (kind, data) of an event; True: the reader is slow

log = logging.getLogger("copepod")
now = time.monotonic


class RunError(Exception):
    """The run fails: `kind` says how (see chat_completions.ERRORS), the text may be shown to a stranger."""

    def __init__(self, kind: str, message: str, *, retry_after: int | None = None, taken: bool = False) -> None:
        super().__init__(message)
        self.kind, self.retry_after, self.taken = kind, retry_after, taken


def _new_id() -> str:
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"  # RFC 9562 5.4


def namespace(owner: str) -> str:
    """Return what the stored keys of the sessions of a token's owner begin with, and nobody else's."""
    return f"token:{owner}:"


class Run:
    """One turn of one agent in one session. `session_key` is its key as its owner knows it, `lane` as it is stored.

    `asked` is there where the gateway protocol asked for it: by which method, and from which address.
    """

    __slots__ = (
        "acted", "agent_id", "answer", "asked", "begun", "cancels", "deadline", "ended_at", "finish_reason", "gate",
        "gone", "id", "lane", "lost", "more", "outside", "owner", "placed", "provider", "providers", "room", "said",
        "session_key", "spoken_at", "started_at", "stopping", "stored", "task", "turn", "usage",
    )  # fmt: skip

    def __init__(
        self,
        agent_id: str,
        session_key: str,
        message: str,
        messages: list[Message],
        providers: Sequence[tuple[str, str, Provider]],
        *,
        system: str = "",
        params: Mapping[str, Any] | None = None,
        timeout: float,
        stored: bool,
        run_id: str = "",
        session_id: str = "",
        owner: str = "",
    ) -> None:
        self.id = run_id or _new_id()
        self.asked: tuple[str, str]
        self.agent_id, self.session_key, self.providers, self.stored = agent_id, session_key, providers, stored
        self.owner = owner  # the name of the token that it was asked for with
        stored_key = namespace(owner) + session_key if owner else session_key
        self.begun = now()
        self.deadline = self.begun + timeout
        self.turn: dict[str, Any] = {  # what a provider is given
            "run_id": self.id,
            "agent_id": agent_id,
            "session_key": stored_key,  # an agent that remembers something by it must not mix two owners' either
            "session_id": session_id or _new_id(),  # a stored session has its own
            "message": message,  # the text of the turn
            "messages": messages,  # the whole conversation, with it
            "system": system,
            "params": params or {},
            "model": "",
            "deadline": self.deadline,  # of time.monotonic(): then it is ended
        }
        self.lane = (agent_id, stored_key)
        self.usage: dict[str, int] = {}  # OpenAI's names; empty where nothing was measured
        self.finish_reason = "stop"
        self.provider = ""  # the name of the one that answers
        self.answer: list[str] = []  # the deltas so far
        self.more: dict[str, list[Any]] = {}  # likewise, of each of BESIDES that came
        self.started_at: float | None = None  # seconds since the epoch
        self.ended_at: float | None = None
        self.task: asyncio.Task[Any] | None = None  # the one that drives it
        self.gate: asyncio.Future[None] | None = None  # what it waits for in the queue
        self.placed = False  # it has one of the gateway's places
        self.spoken_at = 0.0  # when a word or a tool's doing first went out: since then no other model may begin anew
        self.stopping: RunError | None = None  # why it is ended from outside
        self.cancels = 0  # of such an end, not yet taken back
        self.outside = False  # it waits for its reader, not for its agent
        self.acted = False  # a model that failed before the one that answers may have
        self.said = False  # all its words, which are not taken back
        self.lost = False  # its session could not be read, or the turn not be written
        self.gone = False  # the one that drives it has left
        self.room = MAX_ANSWER

    def begin(self, provider: str, model: str) -> None:
        """Let a provider answer, the first or the next one."""
        self.provider, self.turn["model"] = provider, model
        self.usage, self.finish_reason = {}, "stop"

    def take(self, item: Item) -> Event | None:
        """Return the event that an item of a provider is, None for what only the end tells."""
        if isinstance(item, str):
            event, size = ("delta", item), len(item)
            self.answer.append(item)
        elif "tool" in item:
            event, size = ("tool", item["tool"]), 0
        elif kind := next((kind for kind in BESIDES if item.get(kind)), ""):
            event, size = (kind, item[kind]), _size(kind, item[kind])
            self.more.setdefault(kind, []).append(item[kind])
        else:
            self.usage = item.get("usage", self.usage)
            self.finish_reason = item.get("finish_reason", self.finish_reason)
            return None
        self.room -= size
        if self.room < 0:
            raise RunError("upstream", "The agent's answer is too long.", taken=True)
        if not self.spoken_at:
            self.spoken_at = now()
        return event

    @property
    def message(self) -> Message:
        """The assistant's message, as far as it has come."""
        message: Message = {"role": "assistant", "content": "".join(self.answer)}
        return message | {"tool_calls": joined(self.more["tool_calls"])} if "tool_calls" in self.more else message

    def left(self, error: BaseException) -> bool:
        """Whether `error` is of the one that drives it: a cancel that is not `stop`'s, or its reader that is gone."""
        others = self.uncancel()
        self.gone |= self.outside or (others and isinstance(error, asyncio.CancelledError))
        self.gone |= isinstance(error, KeyboardInterrupt)
        self.outside = False
        return self.gone

    def uncancel(self) -> bool:
        """Take back the cancels of `stop`. True: the task has others."""
        while self.task is not None and self.cancels:
            self.cancels -= 1
            self.task.uncancel()
        return self.task is not None and self.task.cancelling() > 0


def _size(kind: str, value: Any) -> int:
    """Return how many characters of an answer an event of BESIDES counts for."""
    if kind == "reasoning":
        return len(value)
    if kind == "logprobs":
        return len(json.dumps(value))
    texts = (text for call in value for text in (call.get("id", ""), *call["function"].values()))
    return FRAGMENT * len(value) + sum(map(len, texts))


def joined(deltas: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the calls that these deltas tell of, in the form of OpenAI's `message.tool_calls`."""
    calls: dict[int, tuple[dict[str, Any], list[str]]] = {}
    for fragment in (fragment for delta in deltas for fragment in delta):
        call, arguments = calls.setdefault(fragment["index"], ({"id": "", "name": ""}, []))
        function = fragment["function"]
        call["id"] = call["id"] or fragment.get("id", "")
        call["name"] = call["name"] or function.get("name", "")
        arguments.append(function.get("arguments", ""))
    return [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": "".join(arguments)}}
        for call, arguments in calls.values()
    ]


def settled(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the calls that got no result, and without the results that nothing called for.

    Every server refuses them, for ever after. The last message stays in any case: it is the turn's own.
    """
    found: list[Message] = []
    answered: set[Any] = set()  # ids of the results that directly follow
    for message in reversed(messages):
        if message["role"] == "tool":
            answered.add(message.get("tool_call_id"))
        elif calls := message.get("tool_calls"):
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            if kept := [call for call in calls if isinstance(id_ := call.get("id"), str) and id_ in answered]:
                message["tool_calls"] = kept
        if message["role"] != "tool":
            answered = set()
        if message["role"] != "assistant" or message.get("content") or message.get("tool_calls"):
            found.append(message)
    paired: list[Message] = []
    called: set[Any] = {None}  # ids of the calls directly before; a function's result, as of old, has none
    for message in reversed(found):
        if message["role"] != "tool":
            called = {None, *(call["id"] for call in message.get("tool_calls", ()))}
        elif message is not messages[-1] and message.get("tool_call_id") not in called:
            continue
        paired.append(message)
    return paired


def undoubled(transcript: Sequence[Message], messages: Sequence[Message]) -> Sequence[Message]:
    """Return `messages` without its longest beginning that is the transcript's end, but with the turn's message.

    The turn's message is the last one of a user or a tool. Compared by role, text and tool ids. The client may remember
    more than the transcript, which is trimmed: then the beginning goes up to where the transcript ends in it.
    """
    turn = next((i for i in range(len(messages) - 1, 0, -1) if messages[i]["role"] in ("user", "tool")), 0)
    longest = min(len(transcript), turn)
    if not longest:
        return messages
    past, sent = [_identity(m) for m in transcript[-longest:]], [_identity(m) for m in messages[:turn]]
    known = _matched(sent[:longest], past)[-1]
    if known < len(transcript) < turn:
        known = max((i for i, n in enumerate(_matched(past, sent), 1) if n == len(transcript)), default=known)
    return messages[known:]


def _matched(wanted: Sequence[Any], items: Sequence[Any]) -> list[int]:
    """Return, for each of the items, how many of the last ones up to it are the beginning of what is wanted."""
    # Knuth, Morris and Pratt: each step goes one further or falls back to what went before. None, which is no message,
    # ends what could be longer.
    joint = [*wanted, None, *items]
    matched = [0]
    for item in joint[1:]:
        n = matched[-1]
        while n and item != joint[n]:
            n = matched[n - 1]
        matched.append(n + (item == joint[n]))
    return matched[len(wanted) + 1 :]


def _identity(message: Message) -> tuple[Any, ...]:
    calls = tuple(call.get("id") for call in message.get("tool_calls") or ())
    return message["role"], flat(message.get("content")), message.get("tool_call_id"), calls


def flat(content: Any) -> str:
    """Return a message's content as a transcript has it."""
    if isinstance(content, list):
        return "\n".join(part["text"] if part.get("type") == "text" else IMAGE for part in content)
    return content or ""


def failure(run: Run, error: BaseException) -> dict[str, Any]:
    """Return the payload of an "error" event. An error that is not meant for strangers is logged, and not shown."""
    try:
        kind, retry_after, taken = error.kind, error.retry_after, error.taken  # type: ignore[attr-defined]
    except AttributeError:
        log.error("run %s: the agent failed", run.id, exc_info=error)
        return {"kind": "internal", "message": "the agent failed", "retry_after": None, "taken": True}
    return {"kind": kind, "message": str(error), "retry_after": retry_after, "taken": taken or run.acted}


async def _close(words: AsyncIterator[Any] | None) -> None:
    if (close := getattr(words, "aclose", None)) is not None:
        try:
            await close()
        except Exception:
            log.exception("an agent's generator failed while it was closed")


class Runs:
    """The runs of a gateway: one at a time in a lane, `max_concurrent` in all.

    `load(agent, key)` gives a stored session's id and messages; `save(agent, key, session_id, messages,
    model=, usage=)` commits a turn; `check(item)` gives what a provider yielded as an Item, None for nothing, or
    raises. Every observer is called with (run, event); it must return at once.
    """

    def __init__(
        self,
        max_concurrent: int,
        load: Callable[[str, str], Awaitable[tuple[str, list[Message]]]],
        save: Callable[..., Awaitable[None]],
        check: Callable[[object], Item | None],
    ) -> None:
        self.max_concurrent = max_concurrent
        self.observers: list[Callable[[Run, Event], None]] = []
        self.active: set[Run] = set()  # accepted and not ended
        self.meter: Any = None  # `ended(run, event)` is called at each end, `failed(provider, kind)` where one fails
        self.store_error = ""  # why the last turn of a session could not be read or written
        self._load, self._save, self._check = load, save, check
        self._lanes: dict[tuple[str, str], list[Run]] = {}  # the first of a lane runs, or waits for a place
        self._waiting: deque[Run] = deque()
        self._placed = 0

    def accept(self, run: Run) -> None:
        """Queue `run`; whoever does so drives it, or releases it. RunError: overloaded."""
        if len(self._waiting) >= MAX_WAITING:
            raise RunError("overloaded", "The gateway is busy; try again later.")
        lane = self._lanes.setdefault(run.lane, [])
        if len(lane) > MAX_LANE:
            raise RunError("overloaded", f"{MAX_LANE} messages already wait in this session; try again later.")
        lane.append(run)
        self.active.add(run)
        if len(lane) == 1:
            self._place(run)

    def _place(self, run: Run) -> None:
        if self._placed >= self.max_concurrent:
            self._waiting.append(run)
            return
        self._placed += 1
        run.placed = True
        if run.gate is not None and not run.gate.done():
            run.gate.set_result(None)

    def release(self, run: Run) -> None:
        """Give the run's place to the next one. Safe to call again."""
        if run not in self.active:
            return
        self.active.remove(run)
        run.ended_at = run.ended_at or time.time()
        lane = self._lanes[run.lane]
        first = lane[0] is run
        lane.remove(run)
        if run.placed:
            self._placed -= 1
        elif first:
            self._waiting.remove(run)
        if not lane:
            del self._lanes[run.lane]
        elif first:
            self._waiting.append(lane[0])  # behind the other sessions, which a busy one must not starve
        self.fill()

    def fill(self) -> None:
        """Let those that wait take the free places."""
        while self._waiting and self._placed < self.max_concurrent:
            self._place(self._waiting.popleft())

    def sweep(self) -> None:
        """Stop what has passed its deadline. To be called once a second or so."""
        now = time.monotonic()
        for run in [run for run in self.active if run.deadline < now]:
            self.stop(run, RunError("timeout", "The agent took too long.", taken=run.placed))

    def stop(self, run: Run, error: RunError) -> bool:
        """End `run`, queued or on, with `error`, down to its last resource.

        False: nothing happens, since it has ended, or said its last word and is being stored, which has until its
        deadline.
        """
        if run not in self.active or (run.said and time.monotonic() < run.deadline):
            return False
        run.stopping = run.stopping or error
        run.deadline = time.monotonic() + CANCEL_SECONDS  # when it is tried again
        # One that waits for its slow reader, outside, or that stops itself finds `stopping` when it comes back.
        if run.task is not None and not run.outside and run.task is not asyncio.current_task():
            run.cancels += 1
            run.task.cancel()
        return True

    async def drive(
        self,
        run: Run,
        take: Take | None = None,
        drain: Callable[[], Awaitable[None]] | None = None,
    ) -> Event:
        """Let the agent of an accepted run work to its end, and return the last event: ("end", ...) or ("error", ...).

        `take(kind, data)` is called with each event from "delta" to "logprobs"; when it returns True, the agent rests
        until `drain()` is over. Cancelling the task that drives, or what these two raise, ends the run down to its last
        resource, and is raised again.
        """
        run.task = asyncio.current_task()
        event = CANCELLED
        try:
            self._tell(run, ACCEPTED)
            if run.stopping is not None:
                raise run.stopping
            if not run.placed:
                run.gate = asyncio.get_running_loop().create_future()
                await run.gate
            run.started_at = time.time()
            self._tell(run, START)
            new = await self._recall(run) if run.stored else None
            await self._answer(run, take, drain)
            if run.finish_reason == "stop" and "tool_calls" in run.more:  # some servers say so, and clients go by it
                run.finish_reason = "tool_calls"
            if run.stopping is not None:  # its agent ended instead of being cancelled
                raise run.stopping
            run.said = True
            if new is not None:
                await self._keep(run, [*new, run.message])
            if run.usage:
                self._tell(run, ("usage", run.usage))
            run.ended_at = time.time()
            event = ("end", run.finish_reason)
            return self._tell(run, event)
        except BaseException as e:  # an agent may raise anything, and make up a cancel or an exit
            if run.left(e):
                self._tell(run, CANCELLED)
                raise
            event = ("error", failure(run, run.stopping or e))
            return self._tell(run, event)
        finally:
            if self.meter is not None:
                self.meter.ended(run, event)
            if run.cancels:
                run.uncancel()
            self.release(run)

    async def _answer(self, run: Run, take: Take | None, drain: Callable[[], Awaitable[None]] | None) -> None:
        """Let the providers answer, one after the other, until one does."""
        for n, (name, model, provider) in enumerate(run.providers, 1):
            run.begin(name, model)
            words: AsyncIterator[Any] | None = None
            try:
                words = provider(run.turn)
                async for item in words:
                    if item.__class__ is not str or not item.isascii():  # nearly all are plain text
                        item = self._check(item)
                    event = run.take(item) if item else None
                    if event is not None:
                        self._tell(run, event)
                        if take is not None:
                            run.outside = True
                            if take(*event) and drain is not None:
                                await drain()
                            run.outside = False
                    if run.stopping is not None:
                        raise run.stopping
                return
            except BaseException as e:
                ended = run.left(e) or run.stopping is not None
                last = ended or run.spoken_at or n == len(run.providers)
                if self.meter is not None and not ended:
                    self.meter.failed(name, getattr(e, "kind", "internal"))
                await _close(words)
                if last:
                    raise
                failed = failure(run, e)
                run.acted = failed["taken"]
                log.warning("run %s: model %d failed, trying the next: %s", run.id, n, failed["message"])

    def _tell(self, run: Run, event: Event) -> Event:
        for observer in self.observers:
            observer(run, event)
        return event

    async def _recall(self, run: Run) -> Sequence[Message] | None:
        """Put the session's messages before the request's; return those of the request that are new, to be kept.

        None: the session cannot be read. An answer without its past is better than none; the loss is said.
        """
        try:
            run.turn["session_id"], transcript = await self._load(*run.lane)
        except Exception as e:
            self._lost(run, "read", e)
            return None
        sent = run.turn["messages"]
        new = undoubled(transcript, sent)
        before = max(len(transcript) + len(new) - len(sent), 0)
        messages = [*transcript[:before], *sent]  # what is sent again may still have its images
        run.turn["messages"] = settled(messages) if any("tool_calls" in message for message in messages) else messages
        return new

    async def _keep(self, run: Run, messages: list[Message]) -> None:
        try:
            turn = run.turn
            texts = [each | {"content": flat(each["content"])} if "content" in each else each for each in messages]
            await self._save(*run.lane, turn["session_id"], texts, model=turn["model"], usage=run.usage)
            self.store_error = ""
        except Exception as e:
            self._lost(run, "written", e)

    def _lost(self, run: Run, what: str, error: Exception) -> None:
        run.lost = True
        self.store_error = f"a session could not be {what}: {error}"
        log.error("%s", self.store_error)
