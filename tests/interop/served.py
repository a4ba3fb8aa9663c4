"""A gateway in a thread of its own, for clients that block or are other programs, and the agents that they call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gateway
import live

TOKEN = "a-token"  # noqa: S105
BOUND = 20  # seconds that a gateway's start, its stop, or a client's one answer may take

left = threading.Event()  # the endless agent was ended


async def words(message: str) -> AsyncIterator[str | dict[str, Any]]:
    for word in message.split():
        yield f"{word} "
        await asyncio.sleep(0)
    yield {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


async def endless(message: str) -> AsyncIterator[str]:
    left.clear()
    try:
        while True:
            yield "more "
            await asyncio.sleep(0.001)
    finally:
        left.set()


async def ended(message: str) -> str:
    """Say whether the endless agent has been ended, so that a client can ask while it is still there."""
    return "it ended" if await asyncio.to_thread(left.wait, BOUND) else "it goes on"


AGENTS: Mapping[str, Callable[..., Any]] = {"main": words, "endless": endless, "ended": ended}


@contextmanager
def served(
    agents: Mapping[str, Callable[..., Any]] = AGENTS, changes: Mapping[str, Any] | None = None
) -> Iterator[gateway.Gateway]:
    """A gateway that listens and wants TOKEN; `changes` are dotted paths of its configuration."""
    auth = {"gateway.auth.mode": "token", "gateway.auth.token": TOKEN}
    config = live.settings({**auth, **(changes or {})})
    ready, done = threading.Event(), asyncio.Event()
    seen: list[tuple[gateway.Gateway, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        async with gateway.Gateway(config, agents=agents) as hub:
            seen.append((hub, asyncio.get_running_loop()))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(BOUND)
        yield seen[0][0]
    finally:
        for _, loop in seen:
            loop.call_soon_threadsafe(done.set)
        thread.join(BOUND)
    assert not thread.is_alive()
