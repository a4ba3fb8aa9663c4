"""The agent that every server of the bench answers with."""

from __future__ import annotations

from collections.abc import AsyncIterator

WORD = "A copepod is small. "


async def reply(message: str) -> AsyncIterator[str]:
    """Yield as many words as the message says, without waiting."""
    for _ in range(int(message)):
        yield WORD
