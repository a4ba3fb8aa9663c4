"""The agent that every Python server of the bench answers with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

WORD = "A copepod is small. "


async def reply(message: str) -> AsyncIterator[str]:
    """Yield as many words as `message` says; with "N MS" it sleeps MS milliseconds before each."""
    count, _, pause = message.partition(" ")
    for _ in range(int(count)):
        if pause:
            await asyncio.sleep(int(pause) / 1000)
        yield WORD
