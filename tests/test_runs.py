"""Runs: lanes, places, deadlines, fallbacks, what is told and what is stored."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import runs as module
from runs import CANCELLED, Run, RunError, Runs, failure, joined, settled, undoubled

SECONDS = 10  # a bound, never waited for
ITEMS = ("delta", "reasoning", "tool", "tool_calls", "logprobs")
QUEUED = ("accepted", "start")  # these are told to observers
TIMEOUT = ("error", {"kind": "timeout", "message": "The agent took too long.", "retry_after": None, "taken": True})
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
Item = str | dict[str, Any]
Provider = Callable[[dict[str, Any]], AsyncIterator[Item]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def says(*items: Item | BaseException) -> Provider:
    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        for item in items:
            if isinstance(item, BaseException):
                raise item
            yield item

    return provider


class Waits:
    """A provider that says a word, and the rest once it may."""

    def __init__(self, *first: Item) -> None:
        self.first = first
        self.begun, self.go_on, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, turn: dict[str, Any]) -> AsyncIterator[Item]:
        try:
            for item in self.first:
                yield item
            self.begun.set()
            await self.go_on.wait()
            yield turn["message"]
        finally:
            self.closed.set()


def make(*providers: Provider, key: str = "k", agent: str = "a", stored: bool = False, text: str = "hi") -> Run:
    named = [(f"p{n}", f"m{n}", provider) for n, provider in enumerate(providers, 1)]
    return Run(agent, key, text, [user(text)], named, timeout=600, stored=stored)


class Desk(Runs):
    """Runs with a store in a dict, an observer, and tasks that take events."""

    def __init__(self, max_concurrent: int = 64) -> None:
        super().__init__(max_concurrent, self.load, self.save, self.check)
        self.told: list[tuple[Run, str, Any]] = []
        self.observers.append(lambda run, event: self.told.append((run, *event)))
        self.transcript: list[dict[str, Any]] = []
        self.saved: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()

    async def load(self, agent: str, key: str) -> tuple[str, list[dict[str, Any]]]:
        if "load" in self.broken:
            raise OSError("disk gone")
        return f"session of {agent} {key}", list(self.transcript)

    async def save(self, agent: str, key: str, session: str, messages: Any, *, model: str, usage: Any) -> None:
        await asyncio.sleep(0)
        if "save" in self.broken:
            raise OSError("disk full")
        self.saved.append((agent, key, session, messages, model, usage))

    def check(self, item: object) -> Item | None:
        if isinstance(item, str | dict):
            return item
        raise RunError("internal", "what is this?", taken=True)

    async def take(self, run: Run) -> list[tuple[str, Any]]:
        taken: list[tuple[str, Any]] = []
        last = await self.drive(run, lambda kind, data: taken.append((kind, data)) or False)  # type: ignore[func-returns-value]
        events = [(kind, data) for who, kind, data in self.told if who is run and kind not in QUEUED]
        assert events[-1] == last
        assert taken == [event for event in events if event[0] in ITEMS]
        return events

    async def take_all(self, run: Run) -> list[tuple[str, Any]]:
        self.accept(run)
        return await self.take(run)

    def begin(self, run: Run) -> asyncio.Task[list[tuple[str, Any]]]:
        self.accept(run)
        return asyncio.create_task(self.take(run))

    def told_of(self, run: Run) -> list[str]:
        return [kind for who, kind, _ in self.told if who is run]

    def expire(self, run: Run) -> None:
        run.deadline = 0.0
        self.sweep()

    def check_empty(self) -> None:
        assert (self.active, self._lanes, list(self._waiting), self._placed) == (set(), {}, [], 0)


def play(work: Callable[[Desk], Awaitable[None]], max_concurrent: int = 64) -> None:
    async def main() -> None:
        desk = Desk(max_concurrent)
        async with asyncio.timeout(SECONDS):
            await work(desk)
        desk.check_empty()

    asyncio.run(main())


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# One run


def test_events_in_order() -> None:
    async def work(desk: Desk) -> None:
        tool = {"name": "look"}
        run = make(says("a", {"tool": tool}, {"usage": USAGE}, "b", {"finish_reason": "length"}))
        more: list[Any] = []
        desk.observers.append(lambda run, event: more.append(event))
        before = time.time()
        events = await desk.begin(run)
        assert events == [("delta", "a"), ("tool", tool), ("delta", "b"), ("usage", USAGE), ("end", "length")]
        assert [event for event in more if event[0] not in QUEUED] == events
        assert desk.told == [(run, *event) for event in more]
        assert desk.told_of(run) == ["accepted", "start", "delta", "tool", "delta", "usage", "end"]
        assert run.started_at is not None
        assert run.ended_at is not None
        assert before <= run.started_at <= run.ended_at <= time.time()
        assert (run.answer, run.usage, run.finish_reason, run.provider) == (["a", "b"], USAGE, "length", "p1")

    play(work)


def test_nothing_measured_is_not_told() -> None:
    async def work(desk: Desk) -> None:
        assert await desk.begin(make(says())) == [("end", "stop")]
        assert await desk.begin(make(says("", "x"))) == [("delta", "x"), ("end", "stop")]

    play(work)


def test_the_turn() -> None:
    turns: list[dict[str, Any]] = []

    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        turns.append(dict(turn))
        yield turn["message"]

    async def work(desk: Desk) -> None:
        named = [("p", "m", provider)]
        run = Run("a", "k", "hi", [user("hi")], named, system="s", params={"seed": 1}, timeout=9, stored=False)
        assert 8 < run.deadline - time.monotonic() <= 9
        await desk.begin(run)
        (turn,) = turns
        assert turn.pop("session_id") not in ("", run.id)
        assert turn == {
            "run_id": run.id, "agent_id": "a", "session_key": "k", "message": "hi", "messages": [user("hi")],
            "system": "s", "params": {"seed": 1}, "model": "m", "deadline": run.deadline,
        }  # fmt: skip

    play(work)


def test_ids() -> None:
    assert make().id != make().id
    assert Run("a", "k", "", [], [], timeout=1, stored=False, run_id="mine").id == "mine"


def test_a_provider_that_cannot_be_closed() -> None:
    class Words:
        def __init__(self) -> None:
            self.words = iter("ab")

        def __aiter__(self) -> Words:
            return self

        async def __anext__(self) -> str:
            for word in self.words:
                return word
            raise StopAsyncIteration

    async def work(desk: Desk) -> None:
        assert await desk.begin(make(lambda turn: Words())) == [("delta", "a"), ("delta", "b"), ("end", "stop")]

    play(work)


def test_an_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER", 10)

    async def work(desk: Desk) -> None:
        expected = [("delta", "xxxx"), ("delta", "yyyyyy"), ("end", "stop")]
        assert await desk.begin(make(says("x" * 4, "y" * 6))) == expected
        *words, (kind, error) = await desk.begin(make(says("x" * 4, "y" * 7)))
        assert words == [("delta", "xxxx")]
        assert (kind, error["kind"], error["taken"]) == ("error", "upstream", True)
        assert "too long" in error["message"]

    play(work)


# Lanes and places


def test_one_at_a_time_in_a_lane() -> None:
    async def work(desk: Desk) -> None:
        waits = [Waits() for _ in range(4)]
        all_runs = [make(provider, text=str(n)) for n, provider in enumerate(waits)]
        tasks = [desk.begin(run) for run in all_runs]
        for n, provider in enumerate(waits):
            await provider.begun.wait()
            await settle()
            assert [w.begun.is_set() for w in waits] == [True] * (n + 1) + [False] * (3 - n)
            assert [run.placed for run in all_runs[n:]] == [True] + [False] * (3 - n)
            provider.go_on.set()
            assert await tasks[n] == [("delta", str(n)), ("end", "stop")]
        starts = [run for run, kind, _ in desk.told if kind == "start"]
        assert starts == all_runs

    play(work)


def test_another_agent_or_session_is_another_lane() -> None:
    async def work(desk: Desk) -> None:
        waits = [Waits() for _ in range(3)]
        tasks = [
            desk.begin(make(provider, agent=agent, key=key))
            for provider, agent, key in zip(waits, "aab", ("k", "l", "k"), strict=True)
        ]
        for provider in reversed(waits):
            await provider.begun.wait()
        for provider, task in zip(reversed(waits), reversed(tasks), strict=True):
            provider.go_on.set()
            await task

    play(work)


def test_no_more_at_once_than_may() -> None:
    async def work(desk: Desk) -> None:
        waits = [Waits() for _ in range(5)]
        tasks = [desk.begin(make(provider, key=str(n))) for n, provider in enumerate(waits)]
        for n in range(5):
            await waits[n].begun.wait()
            await settle()
            assert sum(w.begun.is_set() for w in waits) == min(n + 2, 5)
            waits[n].go_on.set()
            await tasks[n]

    play(work, max_concurrent=2)


def test_more_places_by_reload() -> None:
    async def work(desk: Desk) -> None:
        waits = [Waits() for _ in range(4)]
        tasks = [desk.begin(make(provider, key=str(n))) for n, provider in enumerate(waits)]
        await waits[0].begun.wait()
        desk.max_concurrent = 3
        waits[0].go_on.set()
        await tasks[0]
        for provider in waits[1:]:
            await provider.begun.wait()
            provider.go_on.set()
        await asyncio.gather(*tasks)

    play(work, max_concurrent=1)


def test_a_busy_session_does_not_starve_the_others() -> None:
    async def work(desk: Desk) -> None:
        order: list[str] = []
        desk.observers.append(lambda run, event: order.append(run.session_key) if event[0] == "start" else None)
        first = Waits()
        tasks = [desk.begin(make(first, key="busy")), desk.begin(make(says("x"), key="other"))]
        tasks += [desk.begin(make(says("x"), key="busy")) for _ in range(3)]
        await first.begun.wait()
        first.go_on.set()
        await asyncio.gather(*tasks)
        assert order == ["busy", "other", "busy", "busy", "busy"]

    play(work, max_concurrent=1)


def test_a_full_lane() -> None:
    async def work(desk: Desk) -> None:
        lane = [make() for _ in range(module.MAX_LANE + 1)]  # one runs
        for run in lane:
            desk.accept(run)
        with pytest.raises(RunError, match="32 messages already wait") as error:
            desk.accept(make())
        assert (error.value.kind, error.value.taken) == ("overloaded", False)
        other = make(key="other")
        desk.accept(other)
        desk.release(lane[5])  # who leaves frees a place
        again = make()
        desk.accept(again)
        for run in (*lane, other, again):
            desk.release(run)

    play(work)


def test_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def work(desk: Desk) -> None:
        accepted = [make(key=str(n)) for n in range(3)]
        for run in accepted:
            desk.accept(run)
        for key in ("0", "3"):
            with pytest.raises(RunError, match="busy") as error:
                desk.accept(make(key=key))
            assert error.value.kind == "overloaded"
        desk.release(accepted[1])
        last = make(key="3")
        desk.accept(last)
        for run in (*accepted, last):
            desk.release(run)

    play(work, max_concurrent=1)


def test_release_again_and_in_any_order() -> None:
    async def work(desk: Desk) -> None:
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
            four = [make(key=key) for key in "aabb"]
            for run in four:
                desk.accept(run)
            for n in order:
                for _ in range(2):
                    desk.release(four[n])
                assert desk._placed == min(1, len(desk.active))
            assert all(run.ended_at is not None for run in four)
            desk.check_empty()

    play(work, max_concurrent=1)


# Cancelling


@pytest.mark.parametrize("key", ["k", "other"])  # it waits in its lane, or for a place
def test_cancel_while_queued(key: str) -> None:
    async def work(desk: Desk) -> None:
        first, never, last = Waits(), Waits(), Waits()
        middle = make(never, key=key)
        tasks = [desk.begin(make(first)), desk.begin(middle), desk.begin(make(last, key=key))]
        await first.begun.wait()
        await cancel(tasks[1])
        assert middle not in desk.active
        assert desk.told_of(middle) == ["accepted", "error"]
        assert desk.told[-1] == (middle, *CANCELLED)
        first.go_on.set()
        await tasks[0]
        await last.begun.wait()
        last.go_on.set()
        await tasks[2]
        assert not never.begun.is_set()

    play(work, max_concurrent=1)


def test_cancel_in_the_tick_of_its_turn() -> None:
    async def work(desk: Desk) -> None:
        first, second, third = make(says()), make(says("x")), make(says("y"))
        desk.accept(first)
        tasks = [desk.begin(second), desk.begin(third)]
        await settle()
        desk.release(first)
        assert second.placed
        await cancel(tasks[0])
        assert await tasks[1] == [("delta", "y"), ("end", "stop")]

    play(work)


def test_cancel_while_running() -> None:
    async def work(desk: Desk) -> None:
        provider = Waits("word")
        run = make(provider, stored=True)
        task = desk.begin(run)
        await provider.begun.wait()
        await cancel(task)
        assert provider.closed.is_set()
        assert desk.told_of(run) == ["accepted", "start", "delta", "error"]
        assert desk.told[-1][2]["kind"] == "cancelled"
        assert not desk.saved
        assert run.ended_at is not None

    play(work)


class Reader:
    """What takes a run's words and is slow at the first one, until it may go on, or breaks."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.words = error, list[Any]()
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    def take(self, kind: str, data: Any) -> bool:
        self.words.append(data)
        return len(self.words) == 1

    async def drain(self) -> None:
        self.reached.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error


def test_the_agent_rests_while_its_reader_is_slow() -> None:
    async def work(desk: Desk) -> None:
        said: list[str] = []

        async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
            for word in "abc":
                said.append(word)
                yield word

        reader, run = Reader(), make(provider)
        desk.accept(run)
        task = asyncio.create_task(desk.drive(run, reader.take, reader.drain))
        await reader.reached.wait()
        await settle()
        assert said == ["a"]
        reader.go_on.set()
        assert await task == ("end", "stop")
        assert reader.words == said == ["a", "b", "c"]

    play(work)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("how", ["cancel", "break", "broken take"])
def test_left_while_its_reader_is_slow(how: str, stopped: bool) -> None:
    async def work(desk: Desk) -> None:
        def broken(kind: str, data: Any) -> bool:
            reader.reached.set()
            raise BrokenPipeError

        provider, reader = Waits("word"), Reader(ConnectionResetError())
        run = make(provider, says("never"))
        desk.accept(run)
        task = asyncio.create_task(desk.drive(run, broken if how == "broken take" else reader.take, reader.drain))
        await reader.reached.wait()
        if stopped:
            desk.stop(run, ABORTED)
        if how == "cancel":
            await cancel(task)
        else:
            reader.go_on.set()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                await task
        assert provider.closed.is_set()
        assert run not in desk.active
        assert desk.told_of(run) == ["accepted", "start", "delta", "error"]
        assert desk.told[-1] == (run, *CANCELLED)

    play(work)


def test_release_before_the_first_event() -> None:
    async def work(desk: Desk) -> None:
        run = make(says("x"))
        desk.accept(run)
        desk.release(run)
        assert run not in desk.active

    play(work)


# Stopping


ABORTED = RunError("cancelled", "The run was aborted.")
ABORT = ("error", {"kind": "cancelled", "message": "The run was aborted.", "retry_after": None, "taken": False})


@pytest.mark.parametrize("key", ["k", "other"])  # it waits in its lane, or for a place
@pytest.mark.parametrize("driven", [True, False])
def test_stop_while_queued(key: str, driven: bool) -> None:
    async def work(desk: Desk) -> None:
        first, run = Waits(), make(says("never"), key=key)
        before = desk.begin(make(first))
        await first.begun.wait()
        task = desk.begin(run)
        if driven:
            await settle()
        desk.stop(run, ABORTED)
        assert await task == [ABORT]
        assert desk.told_of(run) == ["accepted", "error"]
        assert run not in desk.active
        first.go_on.set()
        await before

    play(work, max_concurrent=1)


def test_stop_in_the_tick_of_its_turn() -> None:
    async def work(desk: Desk) -> None:
        first, run = make(says()), make(says("never"))
        desk.accept(first)
        task = desk.begin(run)
        await settle()
        desk.release(first)
        desk.stop(run, ABORTED)
        assert await task == [ABORT]
        assert desk.told_of(run) == ["accepted", "error"]

    play(work)


def test_stop_before_it_is_driven() -> None:
    async def work(desk: Desk) -> None:
        run = make(says("never"))
        desk.accept(run)
        assert run.placed
        desk.stop(run, ABORTED)
        assert await desk.take(run) == [ABORT]

    play(work)


@pytest.mark.parametrize("first", [(), ("word",), ("one", "two"), ({"tool": {}},)])
def test_stop_while_running(first: tuple[Item, ...]) -> None:
    async def work(desk: Desk) -> None:
        provider = Waits(*first)
        run = make(provider, says("never"), stored=True)
        task = desk.begin(run)
        await provider.begun.wait()
        desk.stop(run, ABORTED)
        desk.stop(run, RunError("timeout", "the first one counts"))
        assert (await task)[len(first) :] == [ABORT]
        assert provider.closed.is_set()
        assert desk.told_of(run).count("error") == 1
        assert desk.told_of(run)[-1] == "error"
        assert task.cancelling() == 0
        assert not desk.saved
        desk.stop(run, ABORTED)  # it has ended
        assert desk.told_of(run).count("error") == 1

    play(work)


def test_stop_while_its_reader_is_slow() -> None:
    async def work(desk: Desk) -> None:
        closed = asyncio.Event()

        async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
            try:
                yield "a"
                yield "b"
            finally:
                closed.set()

        for error, expected in ((ABORTED, ABORT), (None, TIMEOUT)):
            closed.clear()
            reader, run = Reader(), make(provider)
            desk.accept(run)
            task = asyncio.create_task(desk.drive(run, reader.take, reader.drain))
            await reader.reached.wait()
            if error is not None:
                desk.stop(run, error)
            else:
                desk.expire(run)
            await settle()
            assert not task.cancelling()  # its slow reader has a deadline of its own
            assert not closed.is_set()
            reader.go_on.set()
            assert await task == expected
            assert reader.words == ["a"]
            assert closed.is_set()

    play(work)


def test_stop_what_then_ends_by_itself() -> None:
    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        yield "a"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async def work(desk: Desk) -> None:
        run = make(provider, stored=True)
        task = desk.begin(run)
        await settle()
        desk.stop(run, ABORTED)
        assert await task == [("delta", "a"), ABORT]
        assert not desk.saved

    play(work)


def test_stop_while_storing() -> None:
    async def work(desk: Desk) -> None:
        saving = asyncio.Event()

        async def save(*_: Any, **__: Any) -> None:
            saving.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if swallows:
                    return  # it was written after all
                raise

        desk._save = save
        for swallows in (False, True):
            saving.clear()
            task = desk.begin(make(says("x"), stored=True))
            await saving.wait()
            (run,) = desk.active
            assert not desk.stop(run, ABORTED)  # all is said
            run.deadline = 0
            assert desk.stop(run, ABORTED)
            assert await task == [("delta", "x"), ("end", "stop") if swallows else ABORT]
            assert task.cancelling() == 0

    play(work)


def test_stop_what_has_ended() -> None:
    async def work(desk: Desk) -> None:
        run = make(says("x"))
        desk.stop(run, ABORTED)  # it was never accepted
        desk.accept(run)
        assert await desk.take(run) == [("delta", "x"), ("end", "stop")]
        desk.stop(run, ABORTED)
        assert run.stopping is None
        assert desk.told_of(run) == ["accepted", "start", "delta", "end"]

    play(work)


def test_stop_from_within() -> None:
    async def work(desk: Desk) -> None:
        run = make(says("a", "b"))
        desk.observers.append(lambda run, event: desk.stop(run, ABORTED) if event[0] == "delta" else None)
        task = desk.begin(run)
        assert await task == [("delta", "a"), ABORT]
        assert task.cancelling() == 0

    play(work)


# Deadlines


@pytest.mark.parametrize("first", [(), ("word",), ({"tool": {}},)])
def test_timeout_while_running(first: tuple[Item, ...]) -> None:
    async def work(desk: Desk) -> None:
        provider = Waits(*first)
        run = make(provider, says("never"), stored=True)
        task = desk.begin(run)
        await provider.begun.wait()
        desk.sweep()
        assert run.stopping is None
        desk.expire(run)
        assert (await task)[len(first) :] == [TIMEOUT]
        assert provider.closed.is_set()
        assert desk.told_of(run)[-1] == "error"
        assert task.cancelling() == 0
        assert not desk.saved

    play(work)


@pytest.mark.parametrize("key", ["k", "other"])
def test_timeout_while_queued(key: str) -> None:
    async def work(desk: Desk) -> None:
        first = Waits()
        run = make(says("never"), key=key)
        tasks = [desk.begin(make(first)), desk.begin(run)]
        await first.begun.wait()
        desk.expire(run)
        ((kind, error),) = await tasks[1]
        assert (kind, error["kind"], error["taken"]) == ("error", "timeout", False)
        first.go_on.set()
        await tasks[0]

    play(work, max_concurrent=1)


def test_timeout_of_what_nobody_takes() -> None:
    async def work(desk: Desk) -> None:
        run = make(says("x"))
        desk.accept(run)
        desk.expire(run)
        assert run.stopping is not None
        assert run.deadline > time.monotonic()
        desk.expire(run)
        desk.release(run)

    play(work)


def test_an_error_behind_the_deadline_is_a_timeout() -> None:
    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RunError("upstream", "broken by its cancellation") from None
        yield ""

    async def work(desk: Desk) -> None:
        run = make(provider, says("never"))
        task = desk.begin(run)
        await settle()
        desk.expire(run)
        assert await task == [TIMEOUT]

    play(work)


class Stubborn:
    """A provider that does not let itself be cancelled the first time."""

    def __init__(self, *after: Item) -> None:
        self.after, self.swallowed = after, asyncio.Event()

    async def __call__(self, turn: dict[str, Any]) -> AsyncIterator[Item]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.swallowed.set()
        for item in self.after:
            yield item
        await asyncio.Event().wait()


def test_a_cancel_that_is_swallowed_before_a_word() -> None:
    async def work(desk: Desk) -> None:
        provider = Stubborn("late")
        run = make(provider, says("never"))
        task = desk.begin(run)
        await settle()
        desk.expire(run)
        assert await task == [("delta", "late"), TIMEOUT]

    play(work)


def test_a_cancel_that_is_swallowed_is_repeated() -> None:
    async def work(desk: Desk) -> None:
        provider = Stubborn()
        run = make(provider)
        task = desk.begin(run)
        await settle()
        desk.expire(run)
        await provider.swallowed.wait()
        desk.expire(run)
        assert await task == [TIMEOUT]

    play(work)


@pytest.mark.parametrize("after", [("late",), ({"usage": USAGE},)])
def test_a_cancel_that_is_swallowed_leaves_nothing(after: tuple[Item, ...]) -> None:
    async def work(desk: Desk) -> None:
        run = make(Stubborn(*after))

        async def taker() -> int:
            assert (await desk.take(run))[-1] == TIMEOUT
            task = asyncio.current_task()
            assert task is not None
            return task.cancelling()

        desk.accept(run)
        task = asyncio.create_task(taker())
        await settle()
        desk.expire(run)
        assert await task == 0

    play(work)


def test_the_callers_cancel_counts_beside_the_deadlines() -> None:
    async def work(desk: Desk) -> None:
        provider = Waits("word")
        run = make(provider)
        task = desk.begin(run)
        await provider.begun.wait()
        desk.expire(run)
        await cancel(task)  # in the same tick
        assert desk.told[-1] == (run, *CANCELLED)
        assert provider.closed.is_set()

    play(work)


# Fallbacks and errors

BROKEN = RunError("upstream", "no server")


@pytest.mark.parametrize(
    ("providers", "expected", "name"),
    [
        ([says(BROKEN), says("x")], [("delta", "x"), ("end", "stop")], "p2"),
        ([says(BROKEN), says(ValueError()), says("x")], [("delta", "x"), ("end", "stop")], "p3"),
        ([says("x"), says("y")], [("delta", "x"), ("end", "stop")], "p1"),
        ([says(), says("y")], [("end", "stop")], "p1"),
    ],
)
def test_fallback(providers: list[Provider], expected: Any, name: str) -> None:
    async def work(desk: Desk) -> None:
        run = make(*providers, stored=True)
        assert await desk.begin(run) == expected
        assert run.provider == name
        assert desk.saved[0][4] == run.turn["model"] == name.replace("p", "m")

    play(work)


@pytest.mark.parametrize("first", ["word", {"tool": {"name": "look"}}])
def test_no_fallback_behind_a_word(first: Item) -> None:
    async def work(desk: Desk) -> None:
        event, (kind, error) = await desk.begin(make(says(first, BROKEN), says("never")))
        assert event[0] in ("delta", "tool")
        assert (kind, error["kind"], error["message"]) == ("error", "upstream", "no server")

    play(work)


def test_the_last_error_is_told() -> None:
    async def work(desk: Desk) -> None:
        last = RunError("rate_limited", "slow down", retry_after=7, taken=True)
        ((kind, error),) = await desk.begin(make(says(BROKEN), says(last)))
        assert (kind, error) == (
            "error", {"kind": "rate_limited", "message": "slow down", "retry_after": 7, "taken": True}
        )  # fmt: skip

    play(work)


def test_a_fallback_begins_anew() -> None:
    async def work(desk: Desk) -> None:
        run = make(says({"usage": USAGE}, {"finish_reason": "length"}, BROKEN), says("x"))
        assert await desk.begin(run) == [("delta", "x"), ("end", "stop")]

    play(work)


@pytest.mark.parametrize(
    "kind", ["rejected", "upstream_auth", "rate_limited", "upstream", "timeout", "overloaded", "internal"]
)
def test_kinds(kind: str) -> None:
    class Other(Exception):
        """Any error that has what RunError has is taken as it is."""

        retry_after, taken = 3, True

    other = Other("plain words")
    other.kind = kind  # type: ignore[attr-defined]
    for error in (RunError(kind, "plain words", retry_after=3, taken=True), other):
        assert failure(make(), error) == {"kind": kind, "message": "plain words", "retry_after": 3, "taken": True}


class Odd(Exception):
    """An error of somebody's own, with a kind of its own."""

    kind = "odd"


class Foreign(BaseException):
    """What some libraries raise, past every `except Exception`."""


@pytest.mark.parametrize(
    "error",
    [KeyError("/secret"), Odd("/secret"), SystemExit("/secret"), asyncio.CancelledError(), Foreign(), GeneratorExit()],
)
@pytest.mark.parametrize("first", [(), ("x",)])
def test_an_agents_own_error_is_logged_and_not_told(
    caplog: pytest.LogCaptureFixture, error: BaseException, first: tuple[Item, ...]
) -> None:
    async def work(desk: Desk) -> None:
        def at_once(turn: dict[str, Any]) -> AsyncIterator[Item]:
            raise error

        for provider in (says(*first, error), at_once):
            caplog.clear()
            run = make(provider)
            *_, (kind, told) = await desk.begin(run)
            expected = {"kind": "internal", "message": "the agent failed", "retry_after": None, "taken": True}
            assert (kind, told) == ("error", expected)
            (record,) = caplog.records
            assert record.getMessage() == f"run {run.id}: the agent failed"
            assert record.exc_info is not None
            assert record.exc_info[1] is error
        if not first:
            assert await desk.begin(make(at_once, says("y"))) == [("delta", "y"), ("end", "stop")]

    with caplog.at_level(logging.ERROR, "copepod"):
        play(work)


def test_what_is_no_plain_text_is_checked() -> None:
    async def work(desk: Desk) -> None:
        assert await desk.begin(make(says("ä", ""))) == [("delta", "ä"), ("end", "stop")]
        word, (kind, error) = await desk.begin(make(says("ä", 5), says("never")))  # type: ignore[arg-type]
        assert word == ("delta", "ä")
        assert (kind, error["message"]) == ("error", "what is this?")

    play(work)


def test_a_close_that_breaks_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        try:
            yield "x" * 11
        finally:
            raise RuntimeError("close broke")

    async def work(desk: Desk) -> None:
        run = make(provider)
        run.room = 10
        ((_, error),) = await desk.begin(run)
        assert "too long" in error["message"]

    play(work)
    (record,) = caplog.records
    assert "while it was closed" in record.getMessage()


def test_a_close_that_breaks_is_an_error() -> None:
    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            raise RunError("upstream", "close broke")

    async def work(desk: Desk) -> None:
        run = make(provider)
        task = desk.begin(run)
        await settle()
        desk.expire(run)
        assert await task == [("delta", "x"), TIMEOUT]

    play(work)


# What is stored

U, A = user, assistant
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f"}}]}
PICTURE = {
    "role": "user",
    "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}],
}
OTHER_CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c2", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("transcript", "messages", "kept"),
    [
        pytest.param([], [U("a")], 1, id="no past"),
        pytest.param([U("a"), A("b")], [U("c")], 1, id="only the new message"),
        pytest.param([U("a"), A("b")], [U("a"), A("b"), U("c")], 1, id="the whole past sent again"),
        pytest.param([U("x"), A("y"), U("a"), A("b")], [U("a"), A("b"), U("c")], 1, id="the end of the past"),
        pytest.param([U("a"), A("b")], [A("b"), U("c")], 1, id="the last answer"),
        pytest.param([U("a"), A("b")], [U("a"), U("c")], 2, id="not the past's end"),
        pytest.param([U("a"), A("b"), U("c")], [U("a"), A("b"), U("d")], 3, id="only the past's beginning"),
        pytest.param([U("a"), A("b")], [U("a"), A("B"), U("c")], 3, id="another answer"),
        pytest.param([U("b")], [A("b"), U("c")], 2, id="another role"),
        pytest.param([U("a")], [U("a")], 1, id="never the turn's message"),
        pytest.param([U("a"), A("b"), U("a")], [U("a"), A("b"), U("a")], 2, id="the past's last message again"),
        pytest.param([U("a"), U("a")], [U("a"), U("a"), U("a")], 1, id="the longest run"),
        pytest.param([U("a"), A("b")], [U("a"), A("b"), U("c"), A("d")], 2, id="what stands behind the message"),
        pytest.param([U("a"), A("b")], [U("a"), A("b")], 2, id="an answer at the end"),
        pytest.param([U("a"), CALL], [U("a"), CALL, RESULT], 1, id="tool calls"),
        pytest.param([U("a"), OTHER_CALL], [U("a"), CALL, RESULT], 3, id="other tool calls"),
        pytest.param([CALL, RESULT, A("b")], [CALL, RESULT, A("b"), U("c")], 1, id="tool results"),
        pytest.param(
            [CALL, {**RESULT, "tool_call_id": "c9"}, A("b")], [CALL, RESULT, A("b"), U("c")], 4, id="other tool results"
        ),
        pytest.param([CALL], [{**CALL, "content": None}, RESULT], 1, id="no content is empty content"),
        pytest.param([U("x\n[image]"), A("b")], [PICTURE, A("b"), U("c")], 1, id="an image"),
        pytest.param([U("x"), A("b")], [PICTURE, A("b"), U("c")], 3, id="a text without the image"),
        pytest.param([U("b"), A("c")], [U("a"), U("b"), A("c"), U("d")], 1, id="more than the past"),
        pytest.param([U("b"), A("c")], [U("b"), A("c"), U("b"), A("c"), U("d"), U("e")], 4, id="the past first"),
        pytest.param([U("b"), A("c")], [A("c"), U("b"), A("c"), U("b"), A("c"), U("d"), U("e")], 2, id="the past last"),
        pytest.param([U("b"), A("c")], [A("c"), U("b"), A("x"), U("d")], 3, id="more, but not the past"),
        pytest.param([U("a")], [], 0, id="nothing"),
        pytest.param([A("a")], [A("a")], 1, id="no message"),
    ],
)
def test_undoubled(transcript: Any, messages: Any, kept: int) -> None:
    assert list(undoubled(transcript, messages)) == messages[len(messages) - kept :]


def fragment(index: int, name: str = "", arguments: str = "", id: str = "") -> dict[str, Any]:
    first = {"id": id, "type": "function"} if id else {}
    return {
        "index": index,
        **first,
        "function": {key: text for key, text in (("name", name), ("arguments", arguments)) if text},
    }


def call(id: str, name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([], []),
        ([[fragment(0, "f", "{}", "a")]], [call("a")]),
        ([[fragment(0, "f", "", "a")], [fragment(0, "", "{")], [fragment(0, "", "}")]], [call("a")]),
        ([[fragment(0, "f", "{", "a"), fragment(1, "g", "{}", "b")], [fragment(0, "f", "}", "a")]],
         [call("a"), call("b", "g")]),
        ([[fragment(7)]], [call("", "", "")]),
    ],
)  # fmt: skip
def test_joined(deltas: Any, expected: Any) -> None:
    assert joined(deltas) == expected


def calls(*ids: Any, text: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [{"id": id, "function": {"name": "f"}} for id in ids]}


def result(id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "r", "tool_call_id": id}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([U("a"), calls("1"), result("1"), A("b")], None),
        ([U("a"), calls("1", "2"), result("2"), result("1"), calls("3"), result("3")], None),
        ([U("a"), calls("1"), U("b")], [U("a"), U("b")]),
        ([U("a"), calls("1", text="t"), U("b")], [U("a"), A("t"), U("b")]),
        ([U("a"), calls("1", "2"), result("2"), U("b")], [U("a"), calls("2"), result("2"), U("b")]),
        ([U("a"), calls("1"), U("b"), result("1")], [U("a"), U("b"), result("1")]),
        ([U("a"), calls("1"), U("b"), result("1"), A("c")], [U("a"), U("b"), A("c")]),
        ([result("0"), calls("1"), result("1"), result("2"), A("b")], [calls("1"), result("1"), A("b")]),
        ([U("a"), {"role": "tool", "content": "as of old"}, A("b"), calls("1"), result("1")], None),
        ([U("a"), calls(None, {})], [U("a")]),
    ],
)
def test_calls_and_results_without_each_other_are_no_burden(messages: Any, expected: Any) -> None:
    before = repr(messages)
    assert settled(messages) == (messages if expected is None else expected)
    assert repr(messages) == before


def test_calls_and_thoughts() -> None:
    first, more = [fragment(0, "f", "{", "a")], [fragment(0, "", "}")]

    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        yield {"reasoning": "hm"}
        yield {"logprobs": {"content": []}}
        yield {"tool_calls": first}
        yield {"tool_calls": more}
        yield {"finish_reason": "stop"}

    async def work(desk: Desk) -> None:
        desk.transcript = [U("x"), calls("9")]
        run = make(provider, stored=True)
        events = [("reasoning", "hm"), ("logprobs", {"content": []}), ("tool_calls", first), ("tool_calls", more)]
        events += [("end", "tool_calls")]
        assert await desk.take_all(run) == events
        assert (run.more["reasoning"], run.more["logprobs"]) == (["hm"], [{"content": []}])
        assert run.turn["messages"] == [U("x"), user("hi")]
        assert desk.saved[0][3] == [user("hi"), {"role": "assistant", "content": "", "tool_calls": [call("a")]}]

    asyncio.run(work(Desk()))


def test_an_image_is_seen_while_the_client_sends_it_and_stored_as_a_word() -> None:
    seen: list[Any] = []

    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        seen.append(turn["messages"])
        yield "b"

    async def work(desk: Desk) -> None:
        for messages in ([U("z"), PICTURE], [PICTURE, A("b"), U("c")], [U("d")]):
            run = Run("a", "k", "", messages, [("p", "m", provider)], timeout=9, stored=True)
            await desk.take_all(run)
            desk.transcript += desk.saved[-1][3]
        past = [U("z"), U("x\n[image]"), A("b"), U("c"), A("b")]
        assert seen == [[U("z"), PICTURE], [U("z"), PICTURE, A("b"), U("c")], [*past, U("d")]]
        assert desk.transcript == [*past, U("d"), A("b")]

    asyncio.run(work(Desk()))


@pytest.mark.parametrize(
    "item",
    [
        {"reasoning": "x" * 11},
        {"logprobs": {"a": [12345]}},
        {"tool_calls": [fragment(0, "f", "x" * 11)]},
        {"tool_calls": [fragment(0)] * 11},
    ],
)
def test_calls_and_thoughts_have_a_bound(item: Item, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.MAX_ANSWER", 10)
    monkeypatch.setattr("runs.FRAGMENT", 1)

    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        yield item

    async def work(desk: Desk) -> None:
        assert (await desk.take_all(make(provider)))[-1][1]["message"] == "The agent's answer is too long."

    asyncio.run(work(Desk()))


class Counted(str):
    """A text that counts how often it is compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Counted.count += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("kept", ["the same", "another at the end", "another at the beginning", "every other one"])
def test_undoubled_compares_a_message_a_few_times_however_long_both_are(kept: str) -> None:
    def said(count: int) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "content": Counted("ab"[n % 2 if kept == "every other one" else 0])}
            for n in range(count)
        ]

    size = 2000
    transcript, other = said(size), {"role": "assistant", "content": Counted("c")}
    transcript[:] = {"another at the end": [*transcript, other], "another at the beginning": [other, *transcript]}.get(
        kept, transcript
    )
    Counted.count = 0
    undoubled(transcript, [*said(size), {"role": "user", "content": "b"}])
    assert Counted.count < 8 * size


def test_undoubled_looks_at_no_past_where_a_request_has_none() -> None:
    unread: list[Any] = [None]  # a look at it fails
    assert undoubled(unread, [{"role": "user", "content": "b"}]) == [{"role": "user", "content": "b"}]


def test_a_client_that_remembers_more_than_the_transcript_is_believed() -> None:
    async def work(desk: Desk) -> None:
        seen: list[Any] = []

        async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
            seen.extend(turn["messages"])
            yield "f"

        desk.transcript = [U("c"), A("d")]
        whole = [U("a"), A("b"), U("c"), A("d"), U("e")]
        run = Run("ag", "key", "e", whole, [("p", "m", provider)], timeout=9, stored=True)
        await desk.begin(run)
        assert seen == whole
        assert desk.saved[0][3] == [U("e"), A("f")]

    play(work)


def test_stored() -> None:
    async def work(desk: Desk) -> None:
        seen: list[Any] = []

        async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
            seen.append((turn["session_id"], list(turn["messages"])))
            yield {"usage": USAGE}
            yield "ans"
            yield "wer"

        desk.transcript = [U("a"), A("b")]
        run = Run("ag", "key", "c", [A("b"), U("c")], [("p", "m", provider)], timeout=9, stored=True)
        desk.observers.append(lambda run, event: seen.append(len(desk.saved)) if event[0] in ("usage", "end") else None)
        await desk.begin(run)
        assert seen == [("session of ag key", [U("a"), A("b"), U("c")]), 1, 1]  # committed before the end is told
        assert desk.saved == [("ag", "key", "session of ag key", [U("c"), A("answer")], "m", USAGE)]
        assert run.turn["session_id"] == "session of ag key"

    play(work)


def test_stateless() -> None:
    async def work(desk: Desk) -> None:
        desk.broken = {"load", "save"}  # neither is called
        await desk.begin(make(says("x")))
        assert desk.store_error == ""

    play(work)


def test_a_turn_that_failed_is_not_stored() -> None:
    async def work(desk: Desk) -> None:
        await desk.begin(make(says("x", BROKEN), stored=True))
        assert not desk.saved

    play(work)


@pytest.mark.parametrize(("broken", "piece"), [("load", "read: disk gone"), ("save", "written: disk full")])
def test_a_broken_store_is_told_and_the_turn_answered(
    broken: str, piece: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(desk: Desk) -> None:
        desk.transcript = [U("a")]
        desk.broken = {broken}
        run = make(says("x"), stored=True)
        with caplog.at_level(logging.ERROR, "copepod"):
            assert await desk.begin(run) == [("delta", "x"), ("end", "stop")]
        assert piece in caplog.text
        if broken == "load":
            assert run.turn["messages"] == [U("hi")]
        else:
            assert piece in desk.store_error
            desk.broken = set()
            await desk.begin(make(says("x"), stored=True))
            assert desk.store_error == ""

    play(work)


def test_a_store_that_cannot_be_read_stays_told() -> None:
    async def work(desk: Desk) -> None:
        desk.broken = {"load"}
        await desk.begin(make(says("x"), stored=True))
        assert "disk gone" in desk.store_error

    play(work)


def test_cancel_while_storing() -> None:
    async def work(desk: Desk) -> None:
        saving = asyncio.Event()

        async def save(*_: Any, **__: Any) -> None:
            saving.set()
            await asyncio.Event().wait()

        desk._save = save
        run = make(says("x"), stored=True)
        task = desk.begin(run)
        await saving.wait()
        await cancel(task)
        assert desk.told_of(run)[-1] == "error"

    play(work)
