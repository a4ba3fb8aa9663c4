"""What the command line accepts and how it prints; the hub hands it the callables."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from asyncio import TimerHandle

PROGRAM = "copepod"
MAX_STDIN_BYTES = 1 << 20  # a message is no longer than the body of a request
MAX_SECONDS = 604800  # a week, as in the configuration
QUIET_SECONDS = 2.0  # without a word, then the seconds are shown
MAX_NOTE = 200  # characters of what an agent tells of its doing, in a line
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and line feed
FINDING = ("level", "about", "said", "do")
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


class Option(NamedTuple):
    flag: str
    settings: dict[str, Any]  # as argparse's add_argument takes them


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


class Command(NamedTuple):
    name: str  # one word or two
    does: str
    example: str
    options: tuple[Option, ...] = ()


EVERYWHERE = (
    Option("--config", {"metavar": "FILE", "help": "else ./copepod.json5, ~/.copepod/copepod.json5"}),
    Option("--set", {"metavar": "PATH=VALUE", "action": "append", "default": [], "help": "set a key; may be repeated"}),
)
CALLING = (
    Option("--url", {"metavar": "URL", "help": "the gateway (else the configuration's)"}),
    Option("--token", {"metavar": "T", "help": "the token or password to call it with"}),
)
WAITING = (
    Option("--timeout", {"metavar": "S", "type": float, "default": 35.0, "help": "seconds to wait (35)"}),
    *CALLING,
)
AS_JSON = Option("--json", {"action": "store_true", "help": "print the payload as JSON"})
# A flag of `gateway` is short for a key of the configuration, or for two.
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
        'copepod agent --message "What is a copepod?"',
        (
            Option("--message", {"metavar": "TEXT", "required": True, "help": "what to say; - reads it from stdin"}),
            Option("--agent", {"metavar": "ID", "help": "who answers (else the default agent)"}),
            Option("--session-key", {"metavar": "KEY", "help": "the conversation to go on with"}),
            Option("--session-id", {"metavar": "ID", "help": "the same, by its id"}),
            Option("--timeout", {"metavar": "S", "type": float, "help": "seconds until the run is ended"}),
            AS_JSON,
            Option("--local", {"action": "store_true", "help": "in this process, without a gateway"}),
            *CALLING,
        ),
    ),
    Command(
        "call",
        "call a method of the gateway and print what it answers",
        "copepod call sessions.list --params '{\"limit\": 5}'",
        (
            Option("method", {"metavar": "METHOD", "help": "such as health, agents.list, chat.history"}),
            Option("--params", {"metavar": "JSON", "help": "what it gets, an object"}),
            *WAITING,
        ),
    ),
    Command("health", "say whether the gateway is well", "copepod health --json", (AS_JSON, *WAITING)),
    Command("status", "say what the gateway does", "copepod status", (AS_JSON, *WAITING)),
    Command("doctor", "look for what is wrong here, and say what to type", "copepod doctor", (AS_JSON,)),
    Command(
        "init",
        "make a first configuration of what can answer here",
        "copepod init --yes",
        (Option("--yes", {"action": "store_true", "help": "take the best that is found, without a question"}),),
    ),
    Command("config check", "say every mistake of the configuration", "copepod config check --config copepod.json5"),
    Command(
        "token new",
        "make a token for a friend, and the line that lets it in",
        "copepod token new alice --agents beta --expires 2027-01-01",
        (
            Option("name", {"metavar": "NAME", "help": "whose it is, as the log will say"}),
            Option("--agents", {"metavar": "A,B", "type": _words, "help": "the agents it may use (else all)"}),
            Option("--scopes", {"metavar": "S,T", "type": _words, "help": "chat (so it is), operator.read, .write"}),
            Option("--expires", {"metavar": "DATE", "help": "a date, or a date and time (UTC where it does not say)"}),
        ),
    ),
    Command("config show", "print what is in effect, secrets as ***", "copepod config show --set gateway.port=0"),
)


class UsageError(Exception):
    """The command line is not one of ours; its text is one line that says what to do."""


def run(
    argv: Sequence[str],
    commands: Mapping[str, Callable[[Namespace], int | None]],
    version: str,
    expected: tuple[type[Exception], ...] = (OSError,),
) -> int:
    """Runs the command of this line through `commands` (by its name, "config check") and returns the exit status.

    The callable gets a Namespace with the command's flags, `config` (a path or None) and `overrides` (pairs of path and
    text), and returns the status, None for 0. An exception of `expected` is printed line by line as an error (1), any
    other passes; wrong usage is 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.open(os.devnull, os.O_WRONLY), "w", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal cannot show must not end the answer
        sys.stdout.reconfigure(errors="replace")
    try:
        options = _parse(argv, version)
        status = commands[options.command](options)
        sys.stdout.flush()
        return status or 0
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


def called() -> str:
    """Returns what to type in a shell for this program, as it was called."""
    import shlex
    import shutil

    if sys.argv[0].endswith((".py", ".pyz")):  # the second may not be executable, nor in a folder of the PATH
        return shlex.join([os.path.basename(sys.executable), sys.argv[0]])
    return PROGRAM if shutil.which(PROGRAM) == os.path.abspath(sys.argv[0]) else shlex.quote(sys.argv[0])


def fail(text: str) -> None:
    """Prints each line of it on stderr as an error; a command in it is named as this one was called."""
    if f"`{PROGRAM} " in text:
        text = text.replace(f"`{PROGRAM} ", f"`{called()} ")
    for line in text.splitlines() or ["failed"]:
        print(f"{PROGRAM}: error: {_plain(line, sys.stderr)}", file=sys.stderr)


def _plain(text: str, stream: TextIO) -> str:
    """The text without what would command a terminal, where the stream is one; a model's words may be a stranger's."""
    return CONTROLS.sub("\ufffd", text) if stream.isatty() else text


def say_ready(url: str, chat_completions: bool, mode: str, webchat: bool) -> None:
    """Prints that the gateway listens, a line to paste where it answers curl (never the secret), and where it chats."""
    print(f"{PROGRAM} listening on {url}")
    if chat_completions:
        auth = f'-H "Authorization: Bearer $COPEPOD_GATEWAY_{mode.upper()}" ' if mode != "none" else ""
        body = '{"model": "copepod", "messages": [{"role": "user", "content": "hi"}]}'
        print(f"curl -sS {url}/v1/chat/completions {auth}-H 'Content-Type: application/json' -d '{body}'")
    if webchat:
        print(f"chat in a browser at {url}/")
    print(end="", flush=True)


def _note(doing: Mapping[str, Any]) -> str:
    """One line of what an agent tells of its doing, for a terminal."""
    told = ", ".join(f"{k}: {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in doing.items())
    line = " ".join(CONTROLS.sub("\ufffd", told).split())
    return f"[{line[:MAX_NOTE]}{'...' * (len(line) > MAX_NOTE)}]"


class Answer:
    """Prints an answer's words as they come, or its last payload as JSON; for `with`, in a running loop.

    A terminal's stderr shows what the agent does, a line for each of its events, and while nothing comes, the seconds
    since the start, behind the words, where they are erased again.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._said: list[str] = []
        self._amid = False  # a line of the terminal
        self._shown = ""
        self._timer: TimerHandle | None = None
        self._started = self._heard = time.monotonic()

    def __enter__(self) -> Answer:
        if sys.stderr.isatty():
            self._tick()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._show("")
        self._end_line()

    def take(self, kind: str, data: Any) -> bool:
        """Print the words of a "delta", and of a "tool" what it tells, for who looks; never slow (False)."""
        if kind == "delta" and data:
            self._heard = time.monotonic()
            self._show("")
            if not self._as_json:
                self._said.append(data)
                self._amid = not data.endswith("\n") and sys.stdout.isatty()
                print(_plain(data, sys.stdout), end="", flush=True)
        elif kind == "tool" and sys.stderr.isatty():
            self._heard = time.monotonic()
            self._show("")
            print("\n" * self._amid + _note(data), file=sys.stderr, flush=True)
            self._amid = False
        return False

    def end(self, payload: Any) -> int:
        """Print what is still missing of the last payload's text, or the payload; returns the exit status."""
        self._show("")
        if self._as_json:
            print_payload(payload)
        else:
            said, parts = "".join(self._said), _at(payload, "result", "payloads") or []
            text = "\n".join(filter(None, (_at(part, "text") for part in parts)))
            if text.startswith(said):
                self.take("delta", text[len(said) :])
            elif text.rstrip() != said.rstrip():  # words were lost on the way
                self.take("delta", f"\n{text}")
            self._end_line()
        if _at(payload, "result", "meta", "aborted"):
            fail("the run was aborted")
            return 1
        return 0

    def _end_line(self) -> None:
        if self._said and not self._said[-1].endswith("\n"):
            self._said.append("\n")
            print(flush=True)

    def _tick(self) -> None:
        import asyncio

        self._timer = asyncio.get_running_loop().call_later(1.0, self._tick)
        now = time.monotonic()
        if now - self._heard >= QUIET_SECONDS:
            self._show(f"[{now - self._started:.0f} s]")

    def _show(self, text: str) -> None:
        """Write this over what is shown, and leave the cursor where it was."""
        if text or self._shown:
            over = text.ljust(len(self._shown))
            print(over + "\b" * len(over), end="", file=sys.stderr, flush=True)
            self._shown = text


def print_health(address: str, hello: Any, payload: Any, as_json: bool) -> int:
    """Prints what a gateway's greeting and its answer to `health` or `status` tell; returns the exit status.

    1: something is wrong, or a provider that was looked for is not there.
    """
    health = _at(hello, "snapshot", "health") if _at(payload, "ok") is None else payload
    well = _at(health, "ok") is not False
    found = (_at(payload, "providers") or {}).items()
    if as_json:
        print_payload(payload)
    else:
        minutes = (_at(hello, "snapshot", "uptimeMs") or 0) // 60_000
        agents = _at(health, "agents") or []
        models = {
            _at(agent, "agentId"): each
            for agent in _at(payload, "agents") or ()
            if isinstance(each := _at(agent, "models"), list)
        }
        facts: dict[str, Any] = {
            "gateway": f"{address} is {'well' if well else 'not well'}",
            "trouble": "; ".join(_at(health, "troubles") or []),
            "version": f"{_at(hello, 'server', 'version') or 'unknown'}, up for {minutes // 60} h {minutes % 60} min",
            "default": _at(hello, "snapshot", "sessionDefaults", "defaultAgentId"),
            "agents": [f"{agent}: {', then '.join(each) or 'a Python function'}" for agent, each in models.items()]
            if any(models.values())
            else ", ".join(str(_at(agent, "agentId")) for agent in agents),
            "providers": [f"{name}: {_at(finding, 'what')}" for name, finding in found],
            "sessions": sum(_at(agent, "sessions", "count") or 0 for agent in agents) if agents else "",
            "runs": _counted(_at(payload, "runs")),
            "refusals": _counted(_at(payload, "refusals")),
            "warnings": _at(payload, "warnings"),
        }
        print_page(facts)
    return 0 if well and all(_at(finding, "ok") is not False for _, finding in found) else 1


def _counted(numbers: Any) -> str:
    return ", ".join(f"{number} {what}" for what, number in numbers.items()) if isinstance(numbers, dict) else ""


def print_page(facts: Mapping[str, Any]) -> None:
    """Prints a line for each fact, and one below the other where it is a list; none for what is empty."""
    for name, fact in facts.items():
        lines = [each for each in (fact if isinstance(fact, list) else [fact]) if each not in ("", None)]
        for n, each in enumerate(lines):
            print(_plain(f"{'' if n else name:<10}{each}", sys.stdout))


def print_good(path: str | None, warnings: Sequence[str]) -> None:
    """Prints that a configuration is good, its file (None: the built-in default), and what is odd in it."""
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{path or 'the built-in default'}: good")


def print_payload(payload: Any) -> None:
    """Prints it as JSON."""
    print(json.dumps(payload, indent=2, ensure_ascii=False))


def print_token(token: str, entry: Mapping[str, Any]) -> None:
    """Prints a fresh token and the entry of `gateway.auth.tokens` that lets it in."""
    said = f"the token of {entry['name']}, shown this once, and the line to paste into gateway.auth.tokens"
    print(f"{PROGRAM}: {said}", file=sys.stderr)
    print(token)
    print(f"{{ {', '.join(f'{key}: {json.dumps(value)}' for key, value in entry.items())} }},")


def print_findings(findings: Sequence[tuple[str, str, str, str]], as_json: bool) -> int:
    """Prints findings, each its level ("ok", "warning" or "error"), about what, what is, and what to type.

    Returns the exit status: 1 where one is an error.
    """
    failed = any(level == "error" for level, *_ in findings)
    if as_json:
        print_payload({"ok": not failed, "findings": [dict(zip(FINDING, it, strict=True)) for it in findings]})
    for level, about, said, do in () if as_json else findings:
        line = f"{level:<9}{about:<15}{said}{f': {do}' if do else ''}"
        print(_plain(line.replace("\n", " "), sys.stdout))
    return int(failed)


def choose(question: str, choices: Sequence[object]) -> int:
    """Asks on the terminal which one it shall be, the first where none is said; returns its index. UsageError."""
    if sys.stdin is None or not sys.stdin.isatty():  # the first: it was closed
        raise UsageError("there is no terminal to ask on: type --yes to take the best that is found")
    print(question)
    for number, choice in enumerate(choices, 1):
        print(f"  {number}  {choice}")
    while True:
        try:
            said = input("number [1]: ").strip() or "1"
        except (EOFError, UnicodeDecodeError):
            raise UsageError("nothing was chosen, and nothing is written") from None
        if said.isdecimal() and 0 < int(said) <= len(choices):
            return int(said) - 1


def say_next(path: str, what: object, flags: Sequence[str]) -> None:
    """Prints that the configuration was written, and the two lines to type next; `flags` name it where they have to."""
    import shlex

    print(f"wrote {path}, with a fresh token in it, for which the chat page will ask")
    print(f"its agent is {what}; type, each in a terminal of its own:")
    for words in (["gateway"], ["agent", "--message", "Hello"]):
        print(f"  {called()} {shlex.join([*words, *flags])}")


def _parse(argv: Sequence[str], version: str) -> Namespace:
    words = list(argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "gateway")
    options = _parser(words, version).parse_args(words)
    options.overrides = [_pair(text) for text in options.set]
    for flag, keys in KEYS.items():
        given = getattr(options, flag) if options.command == "gateway" else None
        if given is not None:
            # As JSON, so that a token of digits stays a text.
            options.overrides += [(path, json.dumps(given if fixed is None else fixed)) for path, fixed in keys]
    if getattr(options, "message", None) == "-":
        options.message = _stdin()
    if not getattr(options, "message", PROGRAM).strip():
        raise UsageError("the message is empty: say something with --message TEXT")
    if options.command == "agent" and options.local and (options.url or options.token or options.session_id):
        raise UsageError("--url, --token and --session-id are for a running gateway: leave --local out")
    if options.command == "agent" and options.session_key and options.session_id:
        raise UsageError("--session-key and --session-id both name a conversation: give one of them")
    if options.command == "call":
        options.params = _object(options.params or "{}")
    timeout = getattr(options, "timeout", None)
    if timeout is not None and not 0 < timeout <= MAX_SECONDS:
        raise UsageError(f"--timeout: must be a number of seconds above 0, at most {MAX_SECONDS}")
    return options


def _pair(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise UsageError(f"--set {text}: must be PATH=VALUE, such as --set gateway.port=0")
    return path, value


def _object(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise UsageError("--params: must be a JSON object, such as '{\"limit\": 5}'")


def _at(value: Any, *keys: str) -> Any:
    """What stands under these keys, one within the other, None where there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1) if sys.stdin is not None else b""
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(f"the message on stdin is over {MAX_STDIN_BYTES} bytes: send less")
    return data.decode("utf-8", "replace").rstrip("\r\n")


def _parser(words: Sequence[str], version: str) -> ArgumentParser:
    """The parser of the command that these words begin with, else of all; `command` in its Namespace is its name."""
    import argparse  # 2 ms, which an import of this module need not pay

    given = [c for c in COMMANDS if c.name.split() == list(words[: len(c.name.split())])]
    # Where no help is printed, no terminal's width is asked for: argparse imports shutil for it, 3 ms and half a MiB.
    width = None if {"-h", "--help"} & set(words) else 80

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(f"{message} (see {self.prog} --help)")

    def parser(command: str, does: str, example: str) -> dict[str, Any]:
        return {
            "prog": f"{PROGRAM} {command}".strip(),
            "description": does,
            "epilog": f"example:\n  {example}",
            "formatter_class": partial(argparse.RawDescriptionHelpFormatter, width=width),
            "allow_abbrev": False,
        }

    does = "A small gateway: WebSocket and OpenAI clients in, agents behind."
    root = Parser(**parser("", does, "copepod gateway --help"))
    root.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    groups = {"": root.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)}
    for command in given or COMMANDS:
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
