"""The `command` provider: one program per run, its words streamed from its stdout."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any, cast

MAX_ARGUMENT = 128_000  # bytes; Linux allows 131,072 for one argument, its end included (MAX_ARG_STRLEN)
MAX_OUTPUT = 8 * 1024 * 1024  # bytes of stdout in one run
MAX_LINE = 1024 * 1024  # bytes of one line of JSON
HIGH_WATER = 64 * 1024  # bytes read ahead of a slow reader: a Linux pipe holds as many again
LOG_BYTES = 64 * 1024  # of stderr in one run
LOG_LINE_COST = 64  # what the shortest line counts of these, so that a flood of tiny lines is bounded too
GRACE = 0.04  # seconds between SIGTERM and SIGKILL
LINGER = 0.1  # seconds for more output after the exit, when a process that left the group holds the pipe
TEXT_KEYS = ("result", "text", "response", "message", "content")
# What would let a program draw on the terminal of whoever reads the log: C0, C1, line separators, directions.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

log = logging.getLogger("copepod")

Item = str | dict[str, Any]
Parser = Callable[[bytes, bool], Iterator[Item]]  # the bytes, and whether they are the last


class CommandError(Exception):
    """A run that failed: `kind` says whose fault it was, `taken` whether the program had been started."""

    retry_after: int | None = None

    def __init__(self, kind: str, message: str, *, taken: bool = True) -> None:
        super().__init__(message)
        self.kind = kind
        self.taken = taken


def command(options: dict[str, Any], hidden: Collection[str]) -> Callable[[dict[str, Any]], AsyncIterator[Item]]:
    """The provider for `options`; the variables named in `hidden` are taken out of the program's environment."""
    hidden = {*hidden, *options.get("clearEnv", ())}

    async def provider(turn: dict[str, Any]) -> AsyncIterator[Item]:
        argv, stdin = arguments(options, turn)
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | options["env"]
        parse = text_parser() if options["output"] == "text" else json_parser(options["output"] == "jsonl")
        child = Child(turn["run_id"], stdin)
        total = 0
        silent = True
        try:
            await start(child, argv, environment, options["cwd"], options["timeoutSeconds"])
            while data := await child.read():
                total += len(data)
                if total > MAX_OUTPUT:
                    raise CommandError("upstream", "the agent's command printed more than 8 MiB")
                for item in parse(data, False):
                    silent = False
                    yield item
            await child.exited.wait()
            child.check()
            for item in parse(b"", True):
                silent = silent and isinstance(item, dict)
                yield item
            if silent:
                raise CommandError("upstream", "the agent's command printed nothing")
        finally:
            child.end()
            await child.closed.wait()

    return provider


def arguments(options: dict[str, Any], turn: dict[str, Any]) -> tuple[list[str], bytes | None]:
    """The program with its arguments, and the bytes for its stdin, None when the message is an argument."""
    argv = [options["command"]]
    by_argument = options["input"] == "arg" or "{message}" in options["args"]
    argv += [argument(turn["message"]) if text == "{message}" else text for text in options["args"]]
    for name, value in (
        ("sessionArg", turn["session_id"]),
        ("modelArg", turn["model"]),
        ("systemPromptArg", argument(turn["system"]) if options["systemPromptArg"] else ""),
    ):
        if options[name] and value:
            argv += [options[name], value]
    if not by_argument:
        return argv, turn["message"].encode()
    if "{message}" not in options["args"]:
        argv.append(argument(turn["message"]))
    return argv, None


def argument(text: str) -> str:
    """A stranger's text as one argument: it can be neither an option nor a reason for the start to fail."""
    if "\0" in text:
        raise CommandError("rejected", "the text holds a NUL character, which this agent cannot take", taken=False)
    if len(text.encode()) > MAX_ARGUMENT:
        raise CommandError("rejected", f"the text is over the {MAX_ARGUMENT} bytes this agent can take", taken=False)
    return " " + text if text.startswith("-") else text


def text_parser() -> Parser:
    """Bytes as they come to text; a character split between two reads is kept for the second."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def parse(data: bytes, final: bool) -> Iterator[Item]:
        if text := decode(data, final):
            yield text

    return parse


def json_parser(by_line: bool) -> Parser:
    """Bytes to the texts of JSON objects, one a line or one in all; the usage they told last comes at the end."""
    pending = bytearray()
    usage: dict[str, int] | None = None

    def parse(data: bytes, final: bool) -> Iterator[Item]:
        nonlocal usage
        pending.extend(data)
        documents: list[bytearray] = []
        if by_line and b"\n" in data:
            *documents, rest = pending.split(b"\n")
            pending[:] = rest
        if final or (by_line and len(pending) > MAX_LINE):
            documents.append(pending)
        for document in documents:
            if by_line and len(document) > MAX_LINE:
                raise CommandError("upstream", "the agent's command printed a line over 1 MiB")
            if document.strip():
                value = parse_object(document)
                usage = usage_of(value) or usage
                if text := text_of(value):
                    yield text
        if final and usage:
            yield {"usage": usage}

    return parse


def parse_object(document: bytes | bytearray) -> dict[str, Any]:
    """One JSON object, else CommandError."""
    try:
        value = json.loads(document.decode(errors="replace"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CommandError("upstream", "the agent's command printed something that is no JSON object")
    return value


def text_of(value: dict[str, Any]) -> str:
    """The text of an object, "" when it has none; a lone surrogate becomes U+FFFD."""
    for key in TEXT_KEYS:
        found = value.get(key)
        if isinstance(found, dict):
            found = found.get("content")
        if isinstance(found, list):
            texts = [part.get("text") for part in found if isinstance(part, dict)]
            found = "".join(text for text in texts if isinstance(text, str))
        if isinstance(found, str) and found:
            return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return ""


def usage_of(value: dict[str, Any]) -> dict[str, int] | None:
    """The usage of an object in OpenAI's names, None when it tells none."""
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def start(
    child: Child, argv: list[str], environment: dict[str, str], folder: str | None, seconds: float | None
) -> None:
    """Starts the program as the leader of a process group of its own."""
    pipe = asyncio.subprocess.PIPE
    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(
        loop.subprocess_exec(
            lambda: child,
            *argv,
            stdin=asyncio.subprocess.DEVNULL if child.stdin is None else pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    )
    try:
        # asyncio would kill the leader of a start that is cancelled, and forget its group. A start takes a few
        # turns of the loop, so it is seen through.
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            raise
    except OSError as error:
        # uvloop's error names no file.
        log.error("run %s: %s could not be started in %s: %s", child.run_id, argv[0], folder or ".", error.strerror)
        reasons = {FileNotFoundError: "was not found", PermissionError: "is not executable"}
        reason = reasons.get(type(error), "could not be started")
        raise CommandError("upstream", f"the agent's command {reason}", taken=False) from None
    if seconds is not None:
        child.deadline = loop.call_later(seconds, child.expire)


class Child(asyncio.SubprocessProtocol):
    """One program with its process group and its pipes, from its start until nothing of it is left.

    A protocol, as a stream's `wait()` comes back only when the pipes are closed, which a child of the child may
    hold open for ever. And callbacks, as they do their work also when the run that waits is cancelled once more.
    """

    transport: asyncio.SubprocessTransport

    def __init__(self, run_id: str, stdin: bytes | None) -> None:
        self.run_id = run_id
        self.stdin = stdin
        self.pid = 0  # until it has started; its group has the same number
        self.output = bytearray()
        self.eof = False  # of stdout
        self.wake = asyncio.Event()  # there is output, or its end, or the exit
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()  # reaped, the group gone, every pipe closed
        self.closed.set()  # until there is something to close
        self.over = False  # the run wants no more of it
        self.killed = False  # the group: it is gone, or SIGKILL was sent
        self.lost = False  # the last pipe closed, the leader reaped
        self.late = False
        self.deadline: asyncio.TimerHandle | None = None
        self.killer: asyncio.TimerHandle | None = None
        self.log_room = LOG_BYTES
        self.log_line = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.closed.clear()
        self.transport = cast(asyncio.SubprocessTransport, transport)
        self.pid = self.transport.get_pid()
        if self.over:  # cancelled twice while it started
            self.end()
        if self.stdin is not None:
            pipe = cast(asyncio.WriteTransport, self.transport.get_pipe_transport(0))
            if not pipe.is_closing():  # uvloop knows already that the program has ended, and would raise RuntimeError
                pipe.write(self.stdin)  # what does not fit is written as the child reads; a broken pipe is ignored
                pipe.write_eof()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.log_stderr(data)
            return
        self.output += data
        self.wake.set()
        if len(self.output) > HIGH_WATER:
            self.stdout().pause_reading()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self.eof = True
            self.wake.set()
        elif fd == 2:
            self.log_stderr(b"\n")

    def process_exited(self) -> None:
        self.exited.set()
        self.wake.set()
        if self.killer is None or self.killed or not self.send(0):
            self.kill()
        # else the rest of the group has what is left of its time

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.close()

    def stdout(self) -> asyncio.ReadTransport:
        return cast(asyncio.ReadTransport, self.transport.get_pipe_transport(1))

    async def read(self) -> bytes:
        """What was printed since the last call, as soon as there is something; b"" at the end."""
        while not self.output and not self.eof:
            self.wake.clear()
            try:
                async with asyncio.timeout(LINGER if self.exited.is_set() else None):
                    await self.wake.wait()
            except TimeoutError:
                break
        data = bytes(self.output)
        self.output.clear()
        if not self.eof:
            self.stdout().resume_reading()
        return data

    def check(self) -> None:
        """Raises CommandError unless the program ended in time and well."""
        code = self.transport.get_returncode() or 0
        if self.late:
            raise CommandError("timeout", "the agent's command took too long")
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:  # a real-time signal
                name = str(-code)
            raise CommandError("upstream", f"the agent's command was ended by signal {name}")
        if code:
            raise CommandError("upstream", f"the agent's command exited with code {code}")

    def log_stderr(self, data: bytes) -> None:
        if self.log_room <= 0:
            return
        *lines, self.log_line = (self.log_line + data).split(b"\n")
        if len(self.log_line) > self.log_room:
            lines.append(self.log_line)
        for line in lines:
            text = line[: self.log_room].decode(errors="backslashreplace").strip()
            if text:
                log.info("run %s stderr: %s", self.run_id, CONTROLS.sub(lambda found: repr(found[0])[1:-1], text))
            self.log_room -= max(len(line), LOG_LINE_COST)
            if self.log_room <= 0:
                log.info("run %s stderr: the rest is left out", self.run_id)
                return

    def send(self, number: int) -> bool:
        """Signals the whole group; False when nobody is left in it."""
        try:
            # The leader may be reaped by now: while anyone is in its group the kernel gives its number to nobody.
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # someone in it has become another user
            pass
        return True

    def stop(self) -> None:
        """SIGTERM now, SIGKILL a moment later unless all is gone."""
        if self.killer is None and not self.exited.is_set():
            self.send(signal.SIGTERM)
            self.killer = asyncio.get_running_loop().call_later(GRACE, self.kill)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.killed = True
        if self.killer is not None:
            self.killer.cancel()
        self.close()

    def expire(self) -> None:
        self.late = not self.exited.is_set()
        self.stop()

    def end(self) -> None:
        """The run is over: stops what still runs; `closed` is set when nothing is left."""
        self.over = True
        if self.deadline is not None:
            self.deadline.cancel()
        if self.pid:
            self.stop()
            self.close()

    def close(self) -> None:
        """Closes the pipes, but not under a program that is not reaped: asyncio would race for its exit code."""
        if not (self.over and self.killed and self.exited.is_set()):
            return
        stdin = cast(asyncio.WriteTransport | None, self.transport.get_pipe_transport(0))
        if stdin is not None and stdin.get_write_buffer_size():
            stdin.abort()  # a mere close waits until a process that left the group has read it all
        self.transport.close()
        if self.lost:
            self.closed.set()
