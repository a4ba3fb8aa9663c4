"""What the command line accepts and how it prints; the hub hands it the callables."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

PROGRAM = "copepod"
MAX_STDIN_BYTES = 1 << 20  # a message is no longer than the body of a request
MAX_SECONDS = 604800  # a week, as in the configuration
LOG_SECONDS = 0.1  # how long a line of the access log may wait for others
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


class Option(NamedTuple):
    flag: str
    settings: dict[str, Any]  # as argparse's add_argument takes them


class Command(NamedTuple):
    name: str  # one word or two
    does: str
    example: str
    options: tuple[Option, ...] = ()


EVERYWHERE = (
    Option("--config", {"metavar": "FILE", "help": "else ./copepod.json5, ~/.copepod/copepod.json5"}),
    Option("--set", {"metavar": "PATH=VALUE", "action": "append", "default": [], "help": "set a key; may be repeated"}),
)
# A flag here is short for a key of the configuration, or for two.
KEYS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "port": (("gateway.port", None),),
    "bind": (("gateway.bind", None),),
    "token": (("gateway.auth.mode", "token"), ("gateway.auth.token", None)),
}
COMMANDS = (
    Command(
        "gateway",
        "serve (also without any command)",
        "copepod gateway --config copepod.json5 --port 18789",
        (
            Option("--port", {"metavar": "N", "type": int, "help": "the port; 0 picks a free one"}),
            Option("--bind", {"metavar": "WHERE", "help": "loopback, lan or an address"}),
            Option("--token", {"metavar": "T", "help": "the token that callers must have"}),
        ),
    ),
    Command(
        "agent",
        "run one turn and print its answer",
        'copepod agent --local --message "What is a copepod?"',
        (
            Option("--message", {"metavar": "TEXT", "required": True, "help": "what to say; - reads it from stdin"}),
            Option("--agent", {"metavar": "ID", "help": "who answers (else the default agent)"}),
            Option("--session-key", {"metavar": "KEY", "help": "the conversation to go on with"}),
            Option("--timeout", {"metavar": "S", "type": float, "help": "seconds until the run is ended"}),
            Option("--json", {"action": "store_true", "help": "print the final payload as JSON"}),
            Option("--local", {"action": "store_true", "required": True, "help": "in this process, without a gateway"}),
        ),
    ),
    Command("config check", "say every mistake of the configuration", "copepod config check --config copepod.json5"),
    Command("config show", "print what is in effect, secrets as ***", "copepod config show --set gateway.port=0"),
)


class UsageError(Exception):
    """The command line is not one of ours; its text is one line that says what to do."""


def run(
    argv: Sequence[str],
    commands: Mapping[str, Callable[[Namespace], int]],
    version: str,
    expected: tuple[type[Exception], ...] = (OSError,),
) -> int:
    """Runs the command of this line through `commands` (by its name, "config check") and returns the exit status.

    The callable gets a Namespace with the command's flags, `config` (a path or None) and `overrides` (pairs of path and
    text). An exception of `expected` is printed line by line as an error (1), any other passes; wrong usage is 2.
    """
    try:
        options = _parse(argv, version)
        status = commands[options.command](options)
        sys.stdout.flush()
        return status
    except SystemExit as done:  # argparse has printed --help or --version
        return int(done.code or 0)
    except UsageError as error:
        fail(str(error))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except expected as error:
        fail(str(error))
        return 1


def fail(text: str) -> None:
    """Prints each line of it on stderr as an error."""
    for line in text.splitlines() or ["failed"]:
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)


def say_ready(url: str, chat_completions: bool, mode: str) -> None:
    """Prints that the gateway listens, and a line to paste where it answers curl; never the secret itself."""
    print(f"{PROGRAM} listening on {url}")
    if chat_completions:
        auth = f'-H "Authorization: Bearer $COPEPOD_GATEWAY_{mode.upper()}" ' if mode != "none" else ""
        body = '{"model": "copepod", "messages": [{"role": "user", "content": "hi"}]}'
        print(f"curl -sS {url}/v1/chat/completions {auth}-H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()


async def print_run(
    events: AsyncIterator[tuple[str, Any]], final: Callable[[], dict[str, Any]], as_json: bool
) -> int:
    """Prints a run's text as it comes, or its last payload as JSON; returns the exit status."""
    last = "\n"
    error = None
    async for kind, value in events:
        if kind == "delta" and not as_json:
            print(value, end="", flush=True)
            last = value
        elif kind == "error":
            error = value["message"]
    if not last.endswith("\n"):
        print(flush=True)
    if error is not None:
        fail(error)
        return 1
    if as_json:
        print(json.dumps(final(), indent=2, ensure_ascii=False))
    return 0


def set_logging(level: str, form: str) -> None:
    """Sends the log from this level ("error", "warn", "info", "debug") on to stderr, as lines of "text" or "json"."""
    import logging

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            if form == "text":
                return text
            fields = {"time": record.created, "level": record.levelname.lower(), "logger": record.name, "message": text}
            return json.dumps(fields, ensure_ascii=False)

    handler = logging.StreamHandler()
    handler.setFormatter(Line("%(asctime)s %(levelname)s %(message)s" if form == "text" else None))
    logger = logging.getLogger(PROGRAM)
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def access_log(form: str) -> Callable[..., None]:
    """Returns what writes a line of "text" or "json" to stderr for each answered request.

    The lines of a moment are written at once, since a write for each would cost a tenth of what an answer does.
    """
    import asyncio
    import atexit

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
        request_id: str, client: str, method: str, path: str, status: int, sent: int, ms: float, agent: str
    ) -> None:
        nonlocal second, clock
        if not lines:
            asyncio.get_running_loop().call_later(LOG_SECONDS, flush)
        if form == "json":
            fields = {"time": time.time(), "id": request_id, "client": client, "method": method, "path": path}
            fields |= {"status": status, "bytes": sent, "ms": round(ms, 1), "agent": agent}
            lines.append(json.dumps(fields) + "\n")
            return
        if second != (now := int(time.time())):
            second, clock = now, time.strftime("%Y-%m-%d %H:%M:%S")
        lines.append(f"{clock} {request_id} {client} {method} {path} {status} {sent} {ms:.1f} {agent}\n")

    return write


def _parse(argv: Sequence[str], version: str) -> Namespace:
    words = list(argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "gateway")
    options = _parser(version).parse_args(words)
    options.overrides = [_pair(text) for text in options.set]
    for flag, keys in KEYS.items():
        given = getattr(options, flag, None)
        if given is not None:
            # As JSON, so that a token of digits stays a text.
            options.overrides += [(path, json.dumps(given if fixed is None else fixed)) for path, fixed in keys]
    if getattr(options, "message", None) == "-":
        options.message = _stdin()
    if not getattr(options, "message", PROGRAM).strip():
        raise UsageError("the message is empty: say something with --message TEXT")
    timeout = getattr(options, "timeout", None)
    if timeout is not None and not 0 < timeout <= MAX_SECONDS:
        raise UsageError(f"--timeout: must be a number of seconds from 0 to {MAX_SECONDS}")
    return options


def _pair(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise UsageError(f"--set {text}: must be PATH=VALUE, such as --set gateway.port=0")
    return path, value


def _stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(f"the message on stdin is over {MAX_STDIN_BYTES} bytes: send less")
    return data.decode("utf-8", "replace").rstrip("\r\n")


def _parser(version: str) -> ArgumentParser:
    """The parser of all COMMANDS; `command` in its Namespace is the name of the one that was given."""
    import argparse  # 10 ms, which an import of this module need not pay

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(f"{message} (see {self.prog} --help)")

    def parser(command: str, does: str, example: str) -> dict[str, Any]:
        return {
            "prog": f"{PROGRAM} {command}".strip(),
            "description": does,
            "epilog": f"example:\n  {example}",
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }

    does = "A small gateway: WebSocket and OpenAI clients in, agents behind."
    root = Parser(**parser("", does, "copepod gateway --help"))
    root.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    groups = {"": root.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)}
    for command in COMMANDS:
        group, _, word = command.name.rpartition(" ")
        if group not in groups:
            does = " or ".join(c.name.split()[1] for c in COMMANDS if c.name.startswith(f"{group} "))
            inner = groups[""].add_parser(group, help=does, **parser(group, does, command.example))
            groups[group] = inner.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
        details = parser(command.name, command.does, command.example)
        leaf = groups[group].add_parser(word, help=command.does, **details)
        leaf.set_defaults(command=command.name)
        for flag, settings in (*command.options, *EVERYWHERE):
            leaf.add_argument(flag, **settings)
    return root
