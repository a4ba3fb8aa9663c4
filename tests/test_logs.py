"""The log's lines: as text and as JSON, none with a conversation's key, those of a moment written together."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

import logs


def test_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("copepod")
    before = logger.handlers, logger.level, logger.propagate
    try:
        logs.set_logging("error", "text")
        logs.set_logging("warn", "text")
        logging.getLogger("copepod.access").info("not seen")
        logger.warning("seen %d", 1)
        logs.set_logging("info", "json")
        logging.getLogger("copepod.access").info('a "quote"\n')
    finally:
        logger.handlers, logger.level, logger.propagate = before
    out, err = capsys.readouterr()
    assert out == ""
    text, line = err.splitlines()
    assert text.endswith(" WARNING seen 1")
    got = json.loads(line)
    assert got.pop("time") > 1e9
    assert got == {"level": "info", "logger": "copepod.access", "message": 'a "quote"\n'}


def ran(stored: bool, usage: dict[str, int], provider: str = "up", lost: bool = False) -> Any:
    turn = {"session_id": "5be1f0a2-0000-4000-8000-000000000000"}
    return SimpleNamespace(stored=stored, usage=usage, provider=provider, lost=lost, turn=turn)


# How a line ends, and what its JSON has besides: by the conversation and the tokens.
ENDS: list[tuple[tuple[Any, ...], str, dict[str, Any]]] = [
    ((), "- -", {"session": "-"}),
    ((ran(False, {}),), "- -", {"session": "-"}),
    ((ran(True, {}, provider=""),), "- -", {"session": "-"}),
    ((ran(True, {}, lost=True),), "- -", {"session": "-"}),
    ((ran(True, {}),), "5be1f0a2 -", {"session": "5be1f0a2"}),
    (
        (ran(True, {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}),),
        "5be1f0a2 5/7",
        {"session": "5be1f0a2", "promptTokens": 5, "completionTokens": 7},
    ),
]


@pytest.mark.parametrize(("more", "end", "fields"), ENDS)
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_access_log(
    form: str,
    more: tuple[Any, ...],
    end: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lines of a moment are written together, the first ones of the next moment later; no line has a key."""
    flushes: list[Any] = []
    monkeypatch.setattr(atexit, "register", flushes.append)

    async def main() -> None:
        write = logs.access_log(form)
        for _ in range(2):
            write("req_1", "127.0.0.1", "GET", "/a", 200, 12, 1.25, "main", "bob", *more)
        assert capsys.readouterr().err == ""
        flushes[0]()  # as the loop's timer does, and the end of the program

    asyncio.run(main())
    first, second = capsys.readouterr().err.splitlines()
    if form == "text":
        assert first == second
        assert first.endswith(f" req_1 127.0.0.1 GET /a 200 12 1.2 main bob {end}")
    else:
        got = json.loads(first)
        assert got.pop("time") > 1e9
        assert got == {
            "id": "req_1",
            "client": "127.0.0.1",
            "method": "GET",
            "path": "/a",
            "status": 200,
            "bytes": 12,
            "ms": 1.2,
            "agent": "main",
            "token": "bob",
            **fields,
        }
