"""The log on stderr, and in it a line for each answered request."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LOG_SECONDS = 0.1  # how long a line of the access log may wait for others


def set_logging(level: str, form: str) -> None:
    """Send the log from this level ("error", "warn", "info", "debug") on to stderr, as lines of "text" or "json"."""

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            if form == "text":
                return text
            fields = {"time": record.created, "level": record.levelname.lower(), "logger": record.name, "message": text}
            return json.dumps(fields, ensure_ascii=False)

    handler = logging.StreamHandler()
    handler.setFormatter(Line("%(asctime)s %(levelname)s %(message)s" if form == "text" else None))
    logger = logging.getLogger("copepod")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def session_name(run: Any) -> str:
    """Return the eight digits by which the log names a run's conversation, "-" where it is none that is kept.

    They are of its session's id, which is random: of its key, which may be a person's name, even a digest tells who
    guesses that he is right.
    """
    known = run is not None and run.stored and run.provider and not run.lost  # before its agent begins, it is not known
    return run.turn["session_id"][:8] if known else "-"


def access_log(form: str) -> Callable[..., None]:
    """Return what writes a line of "text" or "json" to stderr for each answered request.

    `run` is the one that was asked for, if any: its conversation is named, and of its `usage` the tokens. The lines of
    a moment are written at once, since a write for each would cost a tenth of what an answer does.
    """
    lines: list[str] = []
    second, clock = 0, ""

    def flush() -> None:
        text = "".join(lines)
        lines.clear()
        with suppress(OSError):  # whoever read the log has gone
            sys.stderr.write(text)
            sys.stderr.flush()

    atexit.register(flush)

    def write(
        request_id: str, client: str, method: str, path: str, status: int, sent: int, ms: float, agent: str, token: str,
        run: Any = None,
    ) -> None:  # fmt: skip
        nonlocal second, clock
        if not lines:
            asyncio.get_running_loop().call_later(LOG_SECONDS, flush)
        session, usage = session_name(run), run and run.usage
        if form == "json":
            fields = {"time": time.time(), "id": request_id, "client": client, "method": method, "path": path}
            fields |= {"status": status, "bytes": sent, "ms": round(ms, 1), "agent": agent, "token": token}
            fields["session"] = session
            if usage:
                fields |= {"promptTokens": usage["prompt_tokens"], "completionTokens": usage["completion_tokens"]}
            lines.append(json.dumps(fields) + "\n")
            return
        if second != (now := int(time.time())):
            second, clock = now, time.strftime("%Y-%m-%d %H:%M:%S")
        tokens = f"{usage['prompt_tokens']}/{usage['completion_tokens']}" if usage else "-"
        said = f"{status} {sent} {ms:.1f} {agent} {token} {session} {tokens}"
        lines.append(f"{clock} {request_id} {client} {method} {path} {said}\n")

    return write
