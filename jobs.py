"""Runs that were asked for by an idempotency key: started once, told to all who ask, remembered for a while."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

MAX_ENDED = 1000  # ended runs that are remembered, as in the family
ENDED_SECONDS = 300.0  # and how long
MAX_REMEMBERED = 32 * 1024 * 1024  # characters of their answers

Dict = dict[str, Any]
Key = tuple[str, str]  # a run's owner and its id, which two owners may both have chosen
CUT: Dict = {"kind": "cancelled", "message": "The run was cut.", "retry_after": None}


if TYPE_CHECKING:

    class Run(Protocol):
        """What is looked at of a run."""

        id: str
        owner: str  # the name of the token that it was asked for with
        agent_id: str
        session_key: str  # as its owner knows it
        turn: Dict
        usage: dict[str, int]
        provider: str
        answer: list[str]
        started_at: float | None
        ended_at: float | None


class Job:
    """A run under its idempotency key, which is the run's id."""

    def __init__(self, run: Run) -> None:
        self.id, self.place = run.id, (run.agent_id, run.session_key)
        self.accepted_at = _now_ms()
        self.payload: Dict | None = None  # of the last answer, once the run has ended
        self.error: Dict | None = None  # of the last answer; None: it went well
        self.then: list[Callable[[Job], None]] = []  # who is told of the end
        self.waited: Dict = {}  # what `agent.wait` says, likewise
        self.size = 0  # characters of the answer
        self.forget_at = float("inf")

    def end(self, run: Run, error: Dict | None) -> None:
        """Keep what is answered last, and not the run, which holds its whole conversation; `error` as its event's."""
        self.payload, self.size = final(run, error), sum(map(len, run.answer))
        if error is not None and self.payload["status"] == "error":
            self.error = told(**error)
        times = (("startedAt", run.started_at), ("endedAt", run.ended_at or time.time()))
        self.waited = {"runId": run.id, "status": "ok" if self.error is None else "error"}
        self.waited |= {name: int(at * 1000) for name, at in times if at is not None}
        self.waited |= {} if self.error is None else {"error": self.error["message"]}


def _now_ms() -> int:
    return int(time.time() * 1000)


def final(run: Run, error: Dict | None = None) -> Dict:
    """Return the payload that a run ends with: what `agent` answers last. Times in ms."""
    aborted = error is not None and error["kind"] == "cancelled"
    if error is not None and not aborted:
        return {"runId": run.id, "status": "error", "summary": error["message"]}
    usage = run.usage
    tokens = {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}
    total = usage.get("total_tokens", sum(tokens.values()))
    agent = {
        "sessionId": run.turn["session_id"],
        "provider": run.provider,
        "model": run.turn["model"],
        "usage": {**tokens, "cacheRead": 0, "cacheWrite": 0, "total": total},
    }
    duration = round(((run.ended_at or time.time()) - (run.started_at or time.time())) * 1000)
    text = "".join(run.answer)
    result = {
        "payloads": [{"text": text, "mediaUrl": None}] if text or not aborted else [],
        "meta": {"durationMs": duration, "agentMeta": agent, "aborted": aborted},
    }
    return {"runId": run.id, "status": "ok", "summary": "aborted" if aborted else "completed", "result": result}


def told(kind: str, message: str, retry_after: int | None, taken: bool = False) -> Dict:
    """Return a run's failure as the protocol's error; `retry_after` in seconds. One that is `taken` may have acted."""
    error: Dict = {"code": "AGENT_TIMEOUT" if kind == "timeout" else "UNAVAILABLE", "message": message}
    if kind in ("overloaded", "rate_limited", "limited") and not taken:
        error |= {"retryable": True, "retryAfterMs": (retry_after or 1) * 1000}
    return error


class Jobs:
    """The runs of all clients of the protocol. `drive(run)` takes a run to its end and returns its error or None.

    `observers` of all runs: we are among them while somebody waits, maybe for a run that was not asked for here.
    """

    def __init__(
        self,
        drive: Callable[[Any], Coroutine[Any, Any, Dict | None]],
        observers: list[Callable[[Any, tuple[str, Any]], None]],
    ) -> None:
        self._drive, self._observers = drive, observers
        self._running: dict[Key, Job] = {}
        self._ended: OrderedDict[Key, Job] = OrderedDict()  # those to forget first come first
        self._remembered = 0  # characters of their answers
        # By who waits, and the id of a run that has not ended, or not begun.
        self._waits: dict[Key, list[Callable[[Job], None]]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def get(self, owner: str, key: str) -> Job | None:
        """Return the owner's run of this key, running or remembered."""
        return self._running.get((owner, key)) or self._ended.get((owner, key))

    def seen(self, owner: str, run_id: str) -> Job | None:
        """Return the run that `owner` means by this id: its own; without an owner's name, an operator, anyone's."""
        job = self.get(owner, run_id)
        if job is None and not owner:
            known = (*self._running.items(), *self._ended.items())
            job = next((job for (_, id), job in known if id == run_id), None)
        return job

    def add(self, run: Run) -> Job:
        """Take an accepted run to its end, whoever stays to hear of it."""
        job = self._running[run.owner, run.id] = Job(run)
        task = asyncio.get_running_loop().create_task(self._work(job, run))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return job

    async def _work(self, job: Job, run: Run) -> None:
        error: Dict | None = CUT  # unless it ends by itself
        try:
            error = await self._drive(run)
        finally:
            self._end(job, run, error)

    def _end(self, job: Job, run: Run, error: Dict | None) -> None:
        job.end(run, error)
        job.forget_at = time.monotonic() + ENDED_SECONDS
        self._ended[run.owner, run.id] = self._running.pop((run.owner, run.id))
        self._remembered += job.size
        for then in [*job.then, *self._waiting(run)]:
            then(job)
        job.then.clear()
        while len(self._ended) > MAX_ENDED or self._remembered > MAX_REMEMBERED:
            self._forget()

    def wait(self, owner: str, run_id: str, seconds: float, then: Callable[[Job | None], None]) -> Callable[[], None]:
        """Call `then` once with the run, when it has ended, or None when the time is up. Returns what calls it off."""
        if not self._waits:
            self._observers.append(self._see)
        key = (owner, run_id)
        waits = self._waits.setdefault(key, [])

        def leave() -> None:
            timer.cancel()
            if end in waits:
                waits.remove(end)
            if not waits and self._waits.get(key) is waits:
                del self._waits[key]
                if not self._waits:
                    self._observers.remove(self._see)

        def end(job: Job | None) -> None:
            leave()
            then(job)

        timer = asyncio.get_running_loop().call_later(seconds, end, None)
        waits.append(end)
        return leave

    def _see(self, run: Run, event: tuple[str, Any]) -> None:
        """Tell those who wait for a run that another front has asked for."""
        kind, data = event
        if kind in ("end", "error") and (run.owner, run.id) not in self._running and (waiting := self._waiting(run)):
            job = Job(run)
            job.end(run, data if kind == "error" else None)
            for then in waiting:
                then(job)

    def _waiting(self, run: Run) -> list[Callable[[Job], None]]:
        """Return who is told of the run's end: its owner, and the operators where they have no run of this id."""
        waiting = list(self._waits.get((run.owner, run.id), ()))
        if run.owner and ("", run.id) not in self._running:
            waiting += self._waits.get(("", run.id), ())
        return waiting

    def sweep(self, now: float) -> None:
        """Forget what is old. To be called once a second or so, with `time.monotonic()`."""
        while self._ended and next(iter(self._ended.values())).forget_at < now:
            self._forget()

    def _forget(self) -> None:
        _, job = self._ended.popitem(last=False)
        self._remembered -= job.size
