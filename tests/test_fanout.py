"""What is told of runs, when, to whom, by a clock of the test's own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import fanout
from fanout import Fanout
from live import run, within

END = ("end", "stop")


class Run:
    id = "r"

    def __init__(self) -> None:
        self.owner, self.session_key, self.lane = "", "s", ("main", "s")
        self.answer: list[str] = []


class Stage:
    """A fanout, a run, and what a member heard: (event, stream or state, what it says)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.observers: list[Any] = []
        self.fanout = Fanout(self.observers, lambda: self.now)
        self.heard: list[tuple[str, str, Any]] = []
        self.more = asyncio.Event()
        self.run = Run()

    def member(self, data: bytes) -> None:
        frame = json.loads(data + b"}")
        payload = frame["payload"]
        if frame["event"] == "agent":
            told = payload["data"]
            self.heard.append(("agent", payload["stream"], told.get("phase") or told.get("delta") or told))
        else:
            text = payload["message"]["content"][0]["text"] if "message" in payload else None
            self.heard.append(("chat", payload["state"], text))
        self.more.set()

    def tell(self, kind: str, data: Any = None) -> None:
        if kind == "delta":
            self.run.answer.append(data)
        for observer in list(self.observers):
            observer(self.run, (kind, data))

    def take(self) -> list[tuple[str, str, Any]]:
        heard, self.heard = self.heard, []
        return heard


def test_words_are_joined_in_time() -> None:
    async def main() -> None:
        stage = Stage()
        stage.fanout.join(stage.member)
        stage.tell("accepted")
        stage.tell("start")
        stage.tell("delta", "a")
        assert stage.take() == [
            ("agent", "lifecycle", "start"),
            ("agent", "assistant", "a"),
            ("chat", "delta", "a"),
        ]
        stage.tell("delta", "b")
        stage.tell("delta", "c")
        assert stage.take() == []
        stage.now = 0.06
        stage.more.clear()
        await within(stage.more.wait())  # by the timer
        assert stage.take() == [("agent", "assistant", "bc")]
        stage.now = 0.2
        stage.more.clear()
        await within(stage.more.wait())  # by its own: nobody said more
        assert stage.take() == [("chat", "delta", "abc")]
        stage.tell("delta", "d")
        stage.tell("tool", {"name": "t"})
        stage.tell("delta", "e")
        stage.tell("usage", {})
        stage.tell(*END)
        assert stage.take() == [
            ("agent", "assistant", "d"),
            ("agent", "tool", {"name": "t"}),
            ("agent", "assistant", "e"),
            ("agent", "lifecycle", "end"),
            ("chat", "final", "abcde"),
        ]
        assert not stage.fanout._watches

    run(main())


def test_words_before_a_tool_are_told_before_it() -> None:
    """And those that read `chat` alone need not wait for the words that come after it."""

    async def main() -> None:
        stage = Stage()
        stage.fanout.join(stage.member)
        stage.tell("tool", {"name": "t"})
        stage.tell("delta", "a")
        stage.tell("delta", "b")
        stage.take()
        stage.tell("tool", {"name": "t"})
        stage.tell("tool", {"name": "u"})
        assert stage.take() == [
            ("agent", "assistant", "b"),
            ("agent", "tool", {"name": "t"}),
            ("agent", "tool", {"name": "u"}),
        ]
        stage.now = 0.2
        stage.more.clear()
        await within(stage.more.wait())
        assert stage.take() == [("chat", "delta", "ab")]
        stage.tell(*END)

    run(main())


def test_what_is_for_the_client_alone() -> None:
    stage = Stage()
    stage.fanout.join(stage.member)
    stage.tell("start")
    stage.take()
    calls = [{"index": 0, "id": "c", "function": {"name": "look", "arguments": "{}"}}]
    for kind, data in (("reasoning", "hm"), ("tool_calls", calls), ("logprobs", {}), ("usage", {})):
        stage.tell(kind, data)
    assert stage.take() == []
    stage.tell("end", "tool_calls")
    assert stage.take() == [("agent", "lifecycle", "end"), ("chat", "final", None)]


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        ({"kind": "upstream", "message": "no"}, [("agent", "lifecycle", "error"), ("chat", "error", None)]),
        ({"kind": "cancelled", "message": "no"}, [("agent", "lifecycle", "end"), ("chat", "aborted", None)]),
    ],
)
def test_errors(error: dict[str, Any], heard: list[Any]) -> None:
    stage = Stage()
    stage.fanout.join(stage.member)
    stage.tell("error", error)
    assert stage.take() == heard


def test_a_long_text_is_not_sent_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_TEXT", 3)
    stage = Stage()
    stage.fanout.join(stage.member)
    stage.tell("delta", "long")
    stage.tell(*END)
    assert stage.take() == [
        ("agent", "assistant", "long"),
        ("agent", "lifecycle", "end"),
        ("chat", "final", None),
    ]


def test_nobody_no_work() -> None:
    async def main() -> None:
        stage = Stage()
        assert stage.observers == []
        stage.fanout.join(stage.member)
        stage.fanout.join(print)
        stage.fanout.leave(print)
        stage.fanout.leave(print)
        stage.tell("delta", "a")
        stage.tell("delta", "b")  # waits for its timer
        stage.take()
        stage.fanout.leave(stage.member)
        assert stage.observers == []
        assert not stage.fanout._watches
        stage.fanout.tell("tick", {})
        assert stage.take() == []
        stage.fanout.join(stage.member)  # in the middle of a run
        stage.tell("delta", "c")
        assert stage.take() == [("agent", "assistant", "c"), ("chat", "delta", "abc")]
        stage.fanout.leave(stage.member)

    run(main())


def test_two_audiences() -> None:
    """Operators hear of all runs, by the stored key; an owner of its own, by its own key; others cost nothing."""

    async def main() -> None:
        stage = Stage()
        stage.run.owner, stage.run.session_key, stage.run.lane = "bob", "k", ("main", "token:bob:k")
        heard: dict[str, list[str]] = {"": [], "bob": [], "eve": []}

        def member(name: str) -> Any:
            return lambda data: heard[name].append(json.loads(data + b"}")["payload"].get("sessionKey", "none"))

        members = {name: member(name) for name in heard}
        stage.fanout.join(members["eve"], "eve")
        stage.tell("delta", "a")
        assert not stage.fanout._watches  # nobody hears of it
        stage.fanout.join(members["bob"], "bob")
        stage.fanout.join(members[""])
        stage.tell("tool", {})
        stage.fanout.tell("presence", {})
        assert heard == {"": ["token:bob:k", "none"], "bob": ["k"], "eve": []}
        stage.fanout.leave(members["bob"], "bob")
        stage.fanout.leave(members["bob"], "bob")
        stage.fanout.leave(members[""])
        stage.tell(*END)  # what was begun is ended, though nobody hears
        assert not stage.fanout._watches
        assert len(stage.observers) == 1
        stage.fanout.leave(members["eve"], "eve")
        assert stage.observers == []
        assert heard["bob"] == ["k"]

    run(main())
