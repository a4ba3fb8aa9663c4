from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
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
        (("config", "check", "--config", "x"), {"command": "config check", "config": "x"}),
        (("config", "show", "--set", "a.b=1"), {"command": "config show", "overrides": [("a.b", "1")]}),
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
        (("agent",), "required: --message, --local (see copepod agent --help)"),
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
def test_wrong_usage_is_one_line_and_2(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(argv, {}, "1.2.3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("copepod: error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("words", [(), ("gateway",), ("agent",), ("config",), ("config", "check"), ("config", "show")])
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
    cli.say_ready(url, chat_completions, mode)
    assert capsys.readouterr().out == expected


START: list[tuple[str, Any]] = [("accepted", None), ("start", None)]
ERROR: tuple[str, Any] = ("error", {"message": "it broke"})


@pytest.mark.parametrize(
    ("events", "as_json", "status", "out", "err"),
    [
        ([*START, ("delta", "a "), ("delta", "b"), ("usage", {}), ("end", "stop")], False, 0, "a b\n", ""),
        ([*START, ("delta", "a\n"), ("end", "stop")], False, 0, "a\n", ""),
        ([*START, ("end", "stop")], False, 0, "", ""),
        ([*START, ("delta", "a"), ("end", "stop")], True, 0, '{\n  "ü": 1\n}\n', ""),
        ([*START, ERROR], False, 1, "", "copepod: error: it broke\n"),
        ([*START, ("delta", "a"), ERROR], False, 1, "a\n", "copepod: error: it broke\n"),
        ([*START, ("delta", "a"), ERROR], True, 1, "", "copepod: error: it broke\n"),
    ],
)
def test_what_a_run_prints(
    events: list[tuple[str, Any]], as_json: bool, status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def come() -> AsyncIterator[tuple[str, Any]]:
        for event in events:
            yield event

    assert asyncio.run(cli.print_run(come(), lambda: {"ü": 1}, as_json)) == status
    assert capsys.readouterr() == (out, err)


def test_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("copepod")
    before = logger.handlers, logger.level, logger.propagate
    try:
        cli.set_logging("error", "text")
        cli.set_logging("warn", "text")
        logging.getLogger("copepod.access").info("not seen")
        logger.warning("seen %d", 1)
        cli.set_logging("info", "json")
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


def test_importing_it_is_cheap() -> None:
    import subprocess

    code = "import sys; sys.path.insert(0, sys.argv[1]); import cli; print('argparse' in sys.modules)"
    folder = os.path.dirname(os.path.abspath(cli.__file__))
    done = subprocess.run([sys.executable, "-S", "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
