"""What the Python peers have in common: the token, and the agent's words in OpenAI's shape."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from words import reply

TOKEN = "a-token-for-the-bench-alone"  # noqa: S105  # that of copepod.json


def allowed(authorization: str) -> bool:
    """Return whether the header's bearer token is the right one."""
    scheme, _, token = authorization.partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(token, TOKEN)


async def completion(model: str, text: str) -> dict[str, Any]:
    """Return the whole answer to `text`."""
    message = {"role": "assistant", "content": "".join([word async for word in reply(text)])}
    return {
        "id": f"chatcmpl_{uuid.uuid4()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


async def events(model: str, text: str) -> AsyncIterator[bytes]:
    """Yield the answer to `text` as server-sent events, one for each word."""
    chunk: dict[str, Any] = {
        "id": f"chatcmpl_{uuid.uuid4()}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }

    def event(delta: dict[str, str], reason: str | None) -> bytes:
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return f"data: {json.dumps(chunk)}\n\n".encode()

    yield event({"role": "assistant", "content": ""}, None)
    async for word in reply(text):
        yield event({"content": word}, None)
    yield event({}, "stop")
    yield b"data: [DONE]\n\n"
