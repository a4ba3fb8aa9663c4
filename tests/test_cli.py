from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from contextlib import suppress
from typing import Any

import pytest

import cli


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def parsed(*argv: str) -> dict[str, Any]:
    """What the callable of the command gets, as a dict."""
    got: list[dict[str, Any]] = []

    def take(options: Any) -> int:
        got.append(vars(options))
        return 7

    assert cli.run(argv, {command.name: take for command in cli.COMMANDS}, "1.2.3") == 7
    return got[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), {"command": "gateway", "config": None, "overrides": []}),
        (("gateway",), {"command": "gateway", "config": None, "overrides": []}),
        (("--config", "a.json5"), {"command": "gateway", "config": "a.json5"}),
        (("--port", "0"), {"command": "gateway", "overrides": [("gateway.port", "0")]}),
        (
            ("gateway", "--bind", "lan", "--token", "123", "--set", "a.b=c=d", "--set", "e="),
            {
                "overrides": [
                    ("a.b", "c=d"),
                    ("e", ""),
                    ("gateway.bind", '"lan"'),
                    ("gateway.auth.mode", '"token"'),
                    ("gateway.auth.token", '"123"'),
                ]
            },
        ),
        (
            ("agent", "--local", "--message=hi", "--agent=beta", "--session-key=k", "--timeout=2.5", "--json"),
            {
                "command": "agent",
                "message": "hi",
                "agent": "beta",
                "session_key": "k",
                "timeout": 2.5,
                "json": True,
                "local": True,
                "overrides": [],
            },
        ),
        (("agent", "--local", "--message", "hi"), {"agent": None, "session_key": None, "timeout": None, "json": False}),
        (
            ("agent", "--message", "hi", "--session-id", "s", "--url", "ws://h", "--token", "t"),
            {"local": False, "session_id": "s", "url": "ws://h", "token": "t", "overrides": []},
        ),
        (("call", "m"), {"command": "call", "method": "m", "params": {}, "timeout": 35, "url": None, "token": None}),
        (("call", "m", "--params", '{"a": "ü"}', "--timeout", "1"), {"params": {"a": "ü"}, "timeout": 1}),
        (("health", "--token", "t"), {"command": "health", "json": False, "token": "t", "timeout": 35}),
        (("health", "--token", "t"), {"overrides": []}),  # it is not the one to demand
        (("status", "--json", "--set", "a=b"), {"command": "status", "json": True, "overrides": [("a", "b")]}),
        (("config", "check", "--config", "x"), {"command": "config check", "config": "x"}),
        (("config", "show", "--set", "a.b=1"), {"command": "config show", "overrides": [("a.b", "1")]}),
        (("doctor", "--json"), {"command": "doctor", "json": True, "config": None, "overrides": []}),
        (("init",), {"command": "init", "yes": False, "config": None}),
        (("init", "--yes", "--config", "x"), {"yes": True, "config": "x"}),
        (("token", "new", "bob"), {"command": "token new", "name": "bob", "agents": None, "expires": None}),
        (("token", "new", "bob", "--agents", "a, b,"), {"agents": ["a", "b"], "scopes": None}),
    ],
)
def test_what_the_commands_get(argv: tuple[str, ...], expected: dict[str, Any]) -> None:
    got = parsed(*argv)
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("foo",), "invalid choice: 'foo'"),
        (("config",), "COMMAND (see copepod config --help)"),
        (("config", "chek"), "invalid choice: 'chek'"),
        (("agent",), "required: --message (see copepod agent --help)"),
        (("agent", "--local", "--message", "a", "--url", "ws://h"), "a running gateway: leave --local out"),
        (("agent", "--local", "--message", "a", "--token", "t"), "a running gateway: leave --local out"),
        (("agent", "--local", "--message", "a", "--session-id", "s"), "a running gateway: leave --local out"),
        (("call",), "required: METHOD (see copepod call --help)"),
        (
            ("agent", "--message", "x", "--session-key", "a", "--session-id", "b"),
            "--session-key and --session-id both name a conversation",
        ),
        (("call", "m", "--params", "[1]"), "--params: must be a JSON object, such as '{\"limit\": 5}'"),
        (("call", "m", "--params", "{"), "--params: must be a JSON object"),
        (("call", "m", "--params", "[" * 100_000), "--params: must be a JSON object"),
        (("health", "--timeout", "-1"), "--timeout: must be a number of seconds"),
        (("agent", "--local", "--message"), "--message: expected one argument"),
        (("agent", "--local", "--message", " "), "the message is empty: say something with --message TEXT"),
        (("agent", "--local", "--message", "a", "--timeout", "0"), "--timeout: must be a number of seconds"),
        (("agent", "--local", "--message", "a", "--timeout", "nan"), "--timeout: must be a number of seconds"),
        (("gateway", "--port", "x"), "--port: invalid int value: 'x' (see copepod gateway --help)"),
        (("gateway", "--por", "1"), "unrecognized arguments: --por 1"),
        (("--set", "a"), "--set a: must be PATH=VALUE, such as --set gateway.port=0"),
        (("--set", "=1"), "--set =1: must be PATH=VALUE"),
    ],
)
def test_wrong_usage_is_one_line_and_2(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv, {}, "1.2.3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("copepod: error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("words", [(), ("config",), *(tuple(command.name.split()) for command in cli.COMMANDS)])
def test_help_fits_a_screen_and_has_one_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([*words, "--help"], {}, "1.2.3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(" ".join(("usage: copepod", *words)))
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("example:\n  copepod ") == 1


def test_the_examples_are_valid() -> None:
    import shlex

    for command in cli.COMMANDS:
        program, *argv = shlex.split(command.example)
        assert program == "copepod"
        assert parsed(*argv)["command"] == command.name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"], {}, "1.2.3") == 0
    assert capsys.readouterr().out == "copepod 1.2.3\n"


@pytest.mark.parametrize(
    ("data", "message"), [(b"hi\n", "hi"), (b"a\n\nb\r\n", "a\n\nb"), ("Grüße".encode(), "Grüße"), (b"\xff", "\ufffd")]
)
def test_message_from_stdin(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert parsed("agent", "--local", "--message", "-")["message"] == message


@pytest.mark.parametrize(("data", "said"), [(b"\n", "is empty"), (b"a" * (cli.MAX_STDIN_BYTES + 1), "is over 1048576")])
def test_bad_message_from_stdin(
    data: bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert cli.run(["agent", "--local", "--message", "-"], {}, "1.2.3") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "err"),
    [
        (LookupError("one\ntwo"), 1, "copepod: error: one\ncopepod: error: two\n"),
        (LookupError(), 1, "copepod: error: failed\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_expected_errors_are_lines(
    error: BaseException, status: int, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    assert cli.run([], {"gateway": fail}, "1.2.3", (LookupError,)) == status
    assert capsys.readouterr() == ("", err)


def test_a_bug_is_not_hidden() -> None:
    def fail(options: object) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run([], {"gateway": fail}, "1.2.3", (LookupError,))


def test_a_reader_that_has_gone_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)

    def speak(options: object) -> int:
        print(json.dumps("x" * 100_000))
        return 0

    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run([], {"gateway": speak}, "1.2.3") == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("url", "chat_completions", "mode", "expected"),
    [
        ("http://127.0.0.1:5", False, "token", "copepod listening on http://127.0.0.1:5\n"),
        (
            "http://127.0.0.1:5",
            True,
            "none",
            "copepod listening on http://127.0.0.1:5\n"
            "curl -sS http://127.0.0.1:5/v1/chat/completions -H 'Content-Type: application/json' "
            '-d \'{"model": "copepod", "messages": [{"role": "user", "content": "hi"}]}\'\n',
        ),
        (
            "https://[::1]:5",
            True,
            "password",
            "copepod listening on https://[::1]:5\n"
            'curl -sS https://[::1]:5/v1/chat/completions -H "Authorization: Bearer $COPEPOD_GATEWAY_PASSWORD" '
            "-H 'Content-Type: application/json' "
            '-d \'{"model": "copepod", "messages": [{"role": "user", "content": "hi"}]}\'\n',
        ),
    ],
)
def test_what_is_said_when_it_listens(
    url: str, chat_completions: bool, mode: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.say_ready(url, chat_completions, mode, False)
    assert capsys.readouterr().out == expected
    cli.say_ready(url, chat_completions, mode, True)
    assert capsys.readouterr().out == f"{expected}chat in a browser at {url}/\n"


def payload(*texts: str, **meta: Any) -> dict[str, Any]:
    return {"result": {"payloads": [{"text": text, "mediaUrl": None} for text in texts], "meta": meta}}


ABORTED = "copepod: error: the run was aborted\n"


@pytest.mark.parametrize(
    ("words", "final", "status", "out", "err"),
    [
        (["a ", "b"], payload("a b"), 0, "a b\n", ""),
        (["a ", "b"], payload("a b c"), 0, "a b c\n", ""),  # the last words came with the end alone
        ([], payload("a\n"), 0, "a\n", ""),
        (["a\n"], payload("a\n"), 0, "a\n", ""),
        (["a \n"], payload("a"), 0, "a \n", ""),
        (["a c"], payload("a b c"), 0, "a c\na b c\n", ""),  # words were lost on the way
        (["a"], payload("a", "b"), 0, "a\nb\n", ""),
        ([], payload(), 0, "", ""),
        ([], {}, 0, "", ""),
        (["a"], payload("a", aborted=True), 1, "a\n", ABORTED),
        ([], payload(aborted=True), 1, "", ABORTED),
    ],
)
def test_what_an_answer_prints(
    words: list[str], final: dict[str, Any], status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli.Answer(as_json=False) as answer:
        assert not answer.take("tool", {})
        for word in words:
            assert not answer.take("delta", word)
        assert answer.end(final) == status
    assert capsys.readouterr() == (out, err)


@pytest.mark.parametrize(("aborted", "err"), [(False, ""), (True, ABORTED)])
def test_an_answer_as_json(aborted: bool, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    final = payload("ü", aborted=aborted)
    with cli.Answer(as_json=True) as answer:
        answer.take("delta", "ü")
        assert answer.end(final) == aborted
    out, said = capsys.readouterr()
    assert "ü" in out
    assert (json.loads(out), said) == (final, err)


def test_the_line_ends_when_the_answer_breaks_off(capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(LookupError), cli.Answer(as_json=False) as answer:
        answer.take("delta", "half")
        raise LookupError
    assert capsys.readouterr() == ("half\n", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_commanded_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "a\x1b]0;owned\x07b\tc\x9b2J\n"
    for terminal, shown in ((Terminal(), "a\ufffd]0;owned\ufffdb\tc\ufffd2J\n"), (io.StringIO(), words)):
        monkeypatch.setattr(sys, "stdout", terminal)
        cli.Answer(False).take("delta", words)
        assert terminal.getvalue() == shown


DOING = {"name": "look", "args": {"at": ["ü", 7]}, "phase": "start"}


@pytest.mark.parametrize(
    ("doing", "shown"),
    [
        (DOING, '[name: look, args: {"at": ["ü", 7]}, phase: start]'),
        ({"status": "one\r\ntwo\u2028\tthree"}, "[status: one\ufffd two three]"),
        ({"a\x1b[2J": "\x9b2J\x07", "b": ["\x1b", "\x9b"]}, '[a\ufffd[2J: \ufffd2J\ufffd, b: ["\\u001b", "\ufffd"]]'),
        ({"text": "x" * 194}, f"[text: {'x' * 194}]"),
        ({"text": "x" * 195}, f"[text: {'x' * 194}...]"),
        ({}, "[]"),
    ],
)
def test_what_an_agent_does_is_a_line_on_the_terminal(
    doing: dict[str, Any], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    cli.Answer(False).take("tool", doing)
    assert terminal.getvalue() == f"{shown}\n"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("as_json", "shown", "both"),
    [
        (False, "[n: 1]\n[n: 2]\n[n: 3]\n[n: 4]\n", "[n: 1]\na\n[n: 2]\n[n: 3]\nb\n[n: 4]\nc\n"),
        (True, "[n: 1]\n[n: 2]\n[n: 3]\n[n: 4]\n", "[n: 1]\n[n: 2]\n[n: 3]\n[n: 4]\n"),
    ],
)
def test_what_an_agent_does_is_never_in_its_answer(
    as_json: bool, shown: str, both: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Terminal()
    for out, err in ((io.StringIO(), Terminal()), (io.StringIO(), io.StringIO()), (one, one)):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        answer = cli.Answer(as_json)
        for kind, data in (("tool", 1), ("delta", "a"), ("tool", 2), ("tool", 3), ("delta", "b\n"), ("tool", 4)):
            answer.take(kind, {"n": data} if kind == "tool" else data)
        answer.take("delta", "c\n")
        if out is one:
            assert one.getvalue() == both
        else:
            assert out.getvalue() == ("" if as_json else "ab\nc\n")
            assert err.getvalue() == (shown if err.isatty() else "")


class Screen(io.StringIO):
    """A terminal of one line, which keeps what it has shown."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.at = "", 0
        self.seen: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for character in text:
            if character == "\b":
                self.at -= 1
            else:
                self.line = self.line[: self.at] + character + self.line[self.at + 1 :]
                self.at += 1
        self.seen.append(self.line.rstrip(" "))
        return len(text)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_seconds_are_shown_behind_the_words_and_erased(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    clock = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    timers: list[Any] = []

    class Loop:
        def call_later(self, seconds: float, callback: Any) -> Any:
            timers.append(callback)
            return self

        def cancel(self) -> None:
            timers.clear()

    monkeypatch.setattr(asyncio, "get_running_loop", Loop)
    shown = []
    with cli.Answer(as_json) as answer:
        for at, word in ((1, ""), (2, ""), (3, ""), (10, "Hi"), (11, ""), (12.4, ""), (112, "!"), (113, "")):
            clock[0] = at
            timers.pop()()
            shown.append(screen.line.rstrip(" "))
            if word:
                answer.take("delta", word)
                shown.append(screen.line.rstrip(" "))
    hi, hi_ = ("", "") if as_json else ("Hi", "Hi!")
    expected = ["", "[2 s]", "[3 s]", "[10 s]", hi, hi, f"{hi}[12 s]", f"{hi}[112 s]", hi_, hi_]
    assert shown == expected
    assert screen.line.rstrip() == hi_
    assert not timers


AGENTS = [{"agentId": "main", "sessions": {"count": 2}}, {"agentId": "beta", "sessions": {"count": 3}}]
ABOUT = "version   1.2, up for 1 h 2 min\ndefault   beta\n"


def greeting(**health: Any) -> dict[str, Any]:
    snapshot = {"health": health, "uptimeMs": 3_720_000, "sessionDefaults": {"defaultAgentId": "beta"}}
    return {"server": {"version": "1.2"}, "snapshot": snapshot}


@pytest.mark.parametrize(
    ("hello", "answered", "status", "out"),
    [
        (
            greeting(),
            {"ok": True, "agents": AGENTS, "sessions": {"count": 2}},
            0,
            f"gateway   ws://h:1 is well\n{ABOUT}agents    main, beta\nsessions  5\n",
        ),
        (
            greeting(ok=True),
            {"ok": False, "troubles": ["the store is full", "it rains"], "agents": []},
            1,
            f"gateway   ws://h:1 is not well\ntrouble   the store is full; it rains\n{ABOUT}",
        ),
        (
            greeting(ok=True, agents=AGENTS),
            {"sessions": {"count": 5}, "runs": {"active": 2, "queued": 0}},
            0,
            f"gateway   ws://h:1 is well\n{ABOUT}agents    main, beta\nsessions  5\nruns      2 active, 0 queued\n",
        ),
        (
            greeting(ok=False, troubles=["it rains"]),
            {"runs": {"active": 0}},
            1,
            f"gateway   ws://h:1 is not well\ntrouble   it rains\n{ABOUT}runs      0 active\n",
        ),
        ({}, None, 0, "gateway   ws://h:1 is well\nversion   unknown, up for 0 h 0 min\n"),
        (
            greeting(ok=True, agents=AGENTS),
            {
                "agents": [
                    {"agentId": "main", "models": ["up/a", "down/b"]},
                    {"agentId": "beta", "models": []},
                ],
                "providers": {"up": {"ok": True, "what": "reachable"}, "down": {"ok": False, "what": "not reachable"}},
                "runs": {"active": 2, "queued": 0},
                "refusals": {"invalid_api_key": 3, "not_found_error": 1},
                "warnings": ["one", "another"],
            },
            1,
            f"gateway   ws://h:1 is well\n{ABOUT}"
            "agents    main: up/a, then down/b\n          beta: a Python function\n"
            "providers up: reachable\n          down: not reachable\n"
            "sessions  5\nruns      2 active, 0 queued\nrefusals  3 invalid_api_key, 1 not_found_error\n"
            "warnings  one\n          another\n",
        ),
        (
            greeting(ok=True, agents=AGENTS),
            {
                "agents": [{"agentId": "main", "models": ["echo/echo"]}],
                "providers": {"echo": {"ok": True, "what": "part of the gateway"}},
                "refusals": {},
                "warnings": [],
            },
            0,
            f"gateway   ws://h:1 is well\n{ABOUT}agents    main: echo/echo\n"
            "providers echo: part of the gateway\nsessions  5\n",
        ),
    ],
)
def test_health_for_people_and_for_scripts(
    hello: Any, answered: Any, status: int, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.print_health("ws://h:1", hello, answered, as_json=False) == status
    assert capsys.readouterr() == (out, "")
    assert cli.print_health("ws://h:1", hello, answered, as_json=True) == status
    assert json.loads(capsys.readouterr().out) == answered


@pytest.mark.parametrize(
    ("findings", "status", "out"),
    [
        ([], 0, ""),
        (
            [("ok", "clock", "noon", ""), ("warning", "open files", "few", "more")],
            0,
            "ok       clock          noon\nwarning  open files     few: more\n",
        ),
        ([("ok", "clock", "noon", ""), ("error", "port", "a\nb", "c")], 1, None),
    ],
)
def test_findings(
    findings: list[tuple[str, str, str, str]], status: int, out: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.print_findings(findings, as_json=False) == status
    said = capsys.readouterr().out
    assert out in (said, None)
    assert said.count("\n") == len(findings)
    assert cli.print_findings(findings, as_json=True) == status
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (status == 0)
    assert [tuple(finding.values()) for finding in told["findings"]] == findings
    assert all(list(finding) == ["level", "about", "said", "do"] for finding in told["findings"])


def test_a_good_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_good("/a/b.json5", ["one", "two"])
    cli.print_good(None, ())
    assert capsys.readouterr().out == "warning: one\nwarning: two\n/a/b.json5: good\nthe built-in default: good\n"


def test_what_the_terminal_cannot_show_does_not_end_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))

    def speak(options: object) -> int:
        print("a \u00fc b \udcff")
        return 0

    assert cli.run([], {"gateway": speak}, "1.2.3") == 0
    assert shown.getvalue() == b"a ? b ?\n"


def test_importing_it_is_cheap() -> None:
    import subprocess

    code = "import sys; sys.path.insert(0, sys.argv[1]); import cli; print('argparse' in sys.modules)"
    folder = os.path.dirname(os.path.abspath(cli.__file__))
    done = subprocess.run([sys.executable, "-S", "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
