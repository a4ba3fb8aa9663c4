"""Runs by idempotency key: what is remembered of them, for how long, and what is said at their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import jobs
from jobs import Job, Jobs, final, told
from live import run
from runs import Run

FAILED = {"kind": "upstream", "message": "it broke", "retry_after": None, "taken": True}
ABORTED = {"kind": "cancelled", "message": "The run was aborted."}


def made(id: str = "k", *words: str, usage: dict[str, int] | None = None, owner: str = "") -> Run:
    made_ = Run("main", "s", "hi", [], [], timeout=1, stored=False, run_id=id, session_id="its id", owner=owner)
    made_.begin("p", "m")
    made_.answer, made_.usage = list(words), usage or {}
    made_.started_at, made_.ended_at = 100.0, 100.25
    return made_


def driver(*outcomes: dict[str, Any] | None) -> Callable[[Any], Coroutine[Any, Any, dict[str, Any] | None]]:
    left = list(outcomes)

    async def drive(run: Any) -> dict[str, Any] | None:
        return left.pop(0)

    return drive


async def ended(jobs_: Jobs) -> None:
    while jobs_.tasks:
        await asyncio.wait(jobs_.tasks)


def test_final() -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 15}
    assert final(made("k", "Hel", "lo", usage=usage)) == {
        "runId": "k",
        "status": "ok",
        "summary": "completed",
        "result": {
            "payloads": [{"text": "Hello", "mediaUrl": None}],
            "meta": {
                "durationMs": 250,
                "agentMeta": {
                    "sessionId": "its id",
                    "provider": "p",
                    "model": "m",
                    "usage": {"input": 11, "output": 3, "cacheRead": 0, "cacheWrite": 0, "total": 15},
                },
                "aborted": False,
            },
        },
    }
    assert final(made(), FAILED) == {"runId": "k", "status": "error", "summary": "it broke"}


@pytest.mark.parametrize(("words", "payloads"), [((), []), (("a", "b"), [{"text": "ab", "mediaUrl": None}])])
def test_final_of_an_aborted_run(words: tuple[str, ...], payloads: list[Any]) -> None:
    payload = final(made("k", *words), ABORTED)
    assert (payload["status"], payload["summary"]) == ("ok", "aborted")
    assert payload["result"]["payloads"] == payloads
    assert payload["result"]["meta"]["aborted"] is True


@pytest.mark.parametrize(
    ("kind", "retry_after", "code", "more"),
    [
        ("upstream", None, "UNAVAILABLE", {}),
        ("timeout", None, "AGENT_TIMEOUT", {}),
        ("overloaded", None, "UNAVAILABLE", {"retryable": True, "retryAfterMs": 1000}),
        ("rate_limited", 7, "UNAVAILABLE", {"retryable": True, "retryAfterMs": 7000}),
    ],
)
def test_told(kind: str, retry_after: int | None, code: str, more: dict[str, Any]) -> None:
    assert told(kind, "why", retry_after) == {"code": code, "message": "why", **more}
    assert told(kind, "why", retry_after, taken=True) == {"code": code, "message": "why"}  # it must not be repeated


def test_a_run_is_driven_and_remembered() -> None:
    async def main() -> None:
        jobs_, heard = Jobs(driver(None, FAILED), []), []
        for id in ("good", "bad"):
            job = jobs_.add(made(id, "word"))
            assert jobs_.get("", id) is job
            assert job.payload is None
            job.then.append(heard.append)
        await ended(jobs_)
        good, bad = heard
        assert jobs_.get("", "good") is good
        assert good.waited == {"runId": "good", "status": "ok", "startedAt": 100_000, "endedAt": 100_250}
        assert bad.error == {"code": "UNAVAILABLE", "message": "it broke"}
        assert (bad.waited["status"], bad.waited["error"]) == ("error", "it broke")

    run(main())


def test_a_cancelled_task_is_an_aborted_run() -> None:
    async def main() -> None:
        jobs_ = Jobs(lambda run: asyncio.sleep(60, None), [])
        job = jobs_.add(made())
        await asyncio.sleep(0)
        for task in jobs_.tasks:
            task.cancel()
        await ended(jobs_)
        assert job.payload is not None
        assert job.payload["summary"] == "aborted"

    run(main())


def test_wait() -> None:
    async def main() -> None:
        observers: list[Any] = []
        jobs_, heard = Jobs(driver(None), observers), []
        jobs_.wait("", "k", 10, lambda job: heard.append(("first", job)))
        leave = jobs_.wait("", "k", 10, lambda job: heard.append(("second", job)))
        leave()
        leave()
        late = asyncio.get_running_loop().create_future()
        jobs_.wait("", "another", 0, late.set_result)
        assert await late is None
        job = jobs_.add(made())
        await ended(jobs_)
        assert heard == [("first", job)]
        jobs_.wait("", "http", 10, heard.append)
        (see,) = observers
        for event in (("delta", "word"), ("error", FAILED), ("error", FAILED)):  # of a run of another front
            see(made("http"), event)
        assert heard.pop().waited["error"] == "it broke"
        assert len(heard) == 1
        assert (jobs_._waits, observers) == ({}, [])

    run(main())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(jobs, "MAX_ENDED", 3)
        monkeypatch.setattr(jobs, "MAX_REMEMBERED", 10)
        jobs_ = Jobs(driver(*[None] * 6), [])

        async def end(id: str, *words: str) -> Job:
            job = jobs_.add(made(id, *words))
            await ended(jobs_)
            return job

        def there() -> str:
            return "".join(id for id in "abcdef" if jobs_.get("", id))

        for id in "abcd":
            await end(id, "word")
        assert there() == "cd"  # three have more than ten characters
        last = await end("e", "much longer than all")
        assert there() == ""
        assert last.payload is not None  # who asked was told
        await end("f")
        jobs_.sweep(0)
        assert there() == "f"
        jobs_.sweep(float("1e12"))
        assert there() == ""

    run(main())


def test_two_owners_of_one_id() -> None:
    """Each finds and waits for its own; an operator, who has no name, anyone's, but its own first."""

    async def main() -> None:
        observers: list[Any] = []
        jobs_, heard = Jobs(driver(None, None, FAILED), observers), list[tuple[str, Any]]()

        def wait(owner: str, id: str = "k") -> None:
            jobs_.wait(owner, id, 10, lambda job: heard.append((owner, job)))

        for owner in ("", "bob", "eve"):
            wait(owner)
        job = jobs_.add(made(owner="bob"))
        assert job.place == ("main", "s")
        await ended(jobs_)
        assert sorted(heard, key=lambda entry: entry[0]) == [("", job), ("bob", job)]
        assert [jobs_.get(owner, "k") for owner in ("", "bob", "eve")] == [None, job, None]
        assert [jobs_.seen(owner, "k") for owner in ("", "bob", "eve")] == [job, job, None]
        heard.clear()
        wait("")
        own = jobs_.add(made())
        (see,) = observers
        see(made(owner="zoe"), ("end", "stop"))  # another front's, while the operator's own is on
        assert heard == []
        await ended(jobs_)
        assert heard == [("", own)]
        assert jobs_.seen("", "k") is own
        wait("", "http")
        wait("zoe", "http")
        see(made("http", owner="zoe"), ("end", "stop"))
        assert [owner for owner, _ in heard[1:]] == ["zoe", ""]
        jobs_.add(made(owner="eve"))
        await ended(jobs_)
        assert heard[-1][0] == "eve"
        assert (jobs_._waits, observers) == ({}, [])

    run(main())
