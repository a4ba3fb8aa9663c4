"""All that an agent can do wrong, while a hundred other runs go on: each gets its error, the others every word."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from clients import finished, until
from run import Row

import gateway
import pool
import rfc6455
import runs
from live import BOUND, Answer, Client, ask, data_of, serving, stream, text_of, within
from peer import params_of
from upstream import Call, Upstream, answers, sends

OTHERS = 100  # runs that go on meanwhile
TIMEOUT = 0.4  # seconds for an agent that hangs
MARK = f"torture-{os.getpid()}"  # an argument of each program that is started, to find those that are left


class Asked(NamedTuple):
    """What a fault must come to: the status and type of the error, whole and as a stream (after its first words)."""

    status: int
    type: str = ""  # "" where it is no error
    words: str | None = None  # what the agent said before; None: whatever it said
    fields: Mapping[str, str] = {}


ANY = Asked(0, "error")  # any error will do
INTERNAL, UPSTREAM, TIMED_OUT = Asked(500, "server_error"), Asked(502, "upstream_error"), Asked(504, "timeout_error")


class Others:
    """Runs that go on: each is a stream whose text must come whole."""

    def __init__(self) -> None:
        self.whole = 0

    async def agent(self, message: str) -> AsyncIterator[str]:
        for word in message.split(" "):
            yield word + " "
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def beside(self, hub: gateway.Gateway) -> AsyncIterator[None]:
        over, begun = asyncio.Event(), 0

        async def go_on(number: int) -> None:
            nonlocal begun
            async with await Client.open(hub.port) as client:
                while not over.is_set():
                    begun += 1
                    text = " ".join(f"{number}.{self.whole}.{n}" for n in range(20))
                    client.say(text, stream=True, model="agent:steady")
                    assert (await client.head())[0] == 200
                    events = [event async for event in client.events()]
                    assert text_of(events) == text + " ", "another run has lost words"
                    assert events[-1] == "data: [DONE]"
                    self.whole += 1

        async with asyncio.TaskGroup() as tasks:
            for number in range(OTHERS):
                tasks.create_task(go_on(number))
            await until(lambda: begun >= OTHERS, "the others run")
            yield
            over.set()
        assert self.whole == begun


@asynccontextmanager
async def watching(hub: gateway.Gateway) -> AsyncIterator[None]:
    """A WebSocket hears of all runs, each frame is JSON, and each run that it hears begin it hears end."""
    started: set[str] = set()
    there, gone, over = asyncio.Event(), False, False
    websocket = None

    async def listen() -> None:
        nonlocal gone, websocket
        while not over:  # in a flood it may be too slow, as this process has much to do: then it comes again
            websocket = await within(rfc6455.connect("127.0.0.1", hub.port, max_message=64 * 1024 * 1024))
            if over:  # while it came again
                websocket.close()
            await websocket.send(json.dumps({"type": "req", "id": "c", "method": "connect", "params": params_of()}))
            while (text := await websocket.receive()) is not None:
                payload = json.loads(text, parse_constant=_no_json).get("payload", {})
                if payload.get("type") == "hello-ok":
                    there.set()
                phase = payload["data"].get("phase") if payload.get("stream") == "lifecycle" else None
                if phase == "start":
                    started.add(payload["runId"])
                elif phase is not None:
                    started.discard(payload["runId"])
            gone |= websocket.close_reason == "slow consumer"
            assert over or gone, f"the WebSocket was closed: {websocket.close_code} {websocket.close_reason}"

    listening = asyncio.create_task(listen())
    await within(there.wait())
    try:
        yield
        left = "a run's end is told"
        await until(lambda: gone or listening.done() or started <= {run.id for run in hub.runs.active}, left, 3)
    finally:
        over = True
        assert websocket is not None
        websocket.close()
        await within(asyncio.wait([listening]), 3 * BOUND)
        websocket.abort()
    listening.result()


def _no_json(text: str) -> None:
    raise AssertionError(f"{text} in a frame is no JSON")


def _judge(asked: Asked, answer: Answer, events: list[str]) -> str:
    """Return what is wrong with an answer, "" when it is as asked."""
    if events and asked.type:  # it has begun, so that the error comes in the stream
        last = data_of(events)[-1]
        if events[-1] != "data: [DONE]":
            return f"the stream ends with {events[-1][:80]}"
        if "error" not in last or asked not in (ANY, asked._replace(type=last["error"]["type"])):
            return f"the stream ends with {json.dumps(last)[:80]}, not with {asked.type}"
        words = text_of(events)
    elif asked is ANY:
        return "" if answer.status >= 400 else f"{answer.status}, not an error"
    elif asked.type:
        if answer.status == 200:
            return f"200, not {asked.status}"
        if (answer.status, answer.error["type"]) != (asked.status, asked.type):
            return f"{answer.status} {answer.error['type']}, not {asked.status} {asked.type}"
        if wrong := {k: answer.fields.get(k) for k, v in asked.fields.items() if answer.fields.get(k) != v}:
            return f"its fields have {wrong}"
        return ""
    elif answer.status != 200:
        return f"{answer.status} {answer.body[:80]!r}, not 200"
    else:
        words = text_of(events) if events else answer.text
    return "" if asked.words in (None, words) else f"it said {words[:40]!r} and not {asked.words[:40]!r}"


async def _all(hub: gateway.Gateway, faults: Mapping[str, Asked], message: str = "hi") -> dict[str, str]:
    """Commit every fault at once, whole and streamed; return what is wrong with the answers."""
    wrong: dict[str, str] = {}

    async def one(name: str, streamed: bool) -> None:
        try:
            if streamed:
                found = _judge(faults[name], *await stream(hub, message, model=f"agent:{name}"))
            else:
                found = _judge(faults[name], await ask(hub, message, model=f"agent:{name}"), [])
        except (AssertionError, OSError, EOFError, TimeoutError) as error:
            found = f"{type(error).__name__} {str(error)[:150]}"
        if found:
            wrong[f"{name}{' (stream)' if streamed else ''}"] = found

    await asyncio.gather(*(one(name, streamed) for name in faults for streamed in (False, True)))
    return wrong


@asynccontextmanager
async def no_servers() -> AsyncIterator[dict[str, Any]]:
    yield {}


def _torture(
    n: int,
    faults: Mapping[str, Asked],
    servers: Callable[[], AbstractAsyncContextManager[dict[str, Any]]] = no_servers,
    agents: Mapping[str, Callable[..., Any]] | None = None,
) -> Row:
    """Commit all faults n times, and look at what is left. `servers` are what they need, and give the configuration."""
    others, wrong = Others(), dict[str, str]()

    async def main() -> None:
        async with servers() as changes:
            config = {"agents.defaults.maxConcurrent": 1_000, "agents.defaults.timeoutSeconds": 30, **changes}
            own = [{"id": n, "timeoutSeconds": TIMEOUT if a.status == 504 else 10} for n, a in faults.items()]
            config["agents.list"] = [{"id": "steady"}, *config.get("agents.list", own)]
            async with serving(config, {**(agents or {}), "steady": others.agent}) as hub:
                tasks = len(asyncio.all_tasks())
                async with watching(hub), others.beside(hub):
                    for _ in range(n):
                        wrong.update(await _all(hub, faults))
                assert not wrong, "; ".join(f"{name}: {what}" for name, what in sorted(wrong.items()))
                await until(lambda: not hub.runs.active, "every run has ended")
                await until(lambda: len(asyncio.all_tasks()) <= tasks, "every task has ended")

    with (
        patch.multiple(runs, CANCEL_SECONDS=0.1),
        patch.multiple(gateway, SWEEP_SECONDS=0.05),
        patch.multiple(pool, IDLE_SECONDS=0.5),
    ):
        finished(main())
    seen = f"{len(faults)} faults, whole and streamed; {others.whole} runs of {OTHERS} others whole; nothing is left"
    asked = "each its status and shape; the others' texts exact; no task, child, descriptor left"
    return Row("", n * len(faults) * 2, 0, asked, seen)


# Python agents


class Foreign(BaseException):
    """What a library may raise that is no Exception."""


class Evil:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def python_agents() -> tuple[dict[str, Callable[..., Any]], dict[str, Asked], threading.Event]:
    """Return agents that fail, what must come of each, and what ends those that wait in a thread."""
    agents: dict[str, Callable[..., Any]] = {}
    faults: dict[str, Asked] = {}
    over = threading.Event()

    def fault(asked: Asked) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(agent: Callable[..., Any]) -> Callable[..., Any]:
            agents[agent.__name__] = agent
            faults[agent.__name__] = asked
            return agent

        return keep

    def raising(name: str, error: Callable[[], BaseException], asked: Asked = INTERNAL) -> None:
        async def before(message: str) -> AsyncIterator[str]:
            raise error()
            yield ""

        async def between(message: str) -> AsyncIterator[str]:
            yield "one "
            await asyncio.sleep(0.01)
            yield "two "
            raise error()

        def thread(message: str) -> str:
            raise error()

        async def no_generator(message: str) -> str:
            raise error()

        words = asked._replace(words="one two ")
        agents.update({f"{name}-{how.__name__}": how for how in (before, between, thread, no_generator)})
        faults.update({f"{name}-{how}": words if how == "between" else asked for how in agents_of})

    agents_of = ("before", "between", "thread", "no_generator")
    raising("error", lambda: RuntimeError("of the inside"))
    raising("leaves", lambda: SystemExit(3))
    raising("cancelled", asyncio.CancelledError)
    raising("evil", lambda: ValueError(Evil()))
    raising("oserror", lambda: ConnectionResetError(104, "of the inside"))
    raising("end", lambda: EOFError("of the inside"))
    raising("timeout", lambda: TimeoutError("of the inside"))

    @fault(TIMED_OUT)
    async def hangs(message: str) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    @fault(TIMED_OUT._replace(words="words "))
    async def hangs_later(message: str) -> AsyncIterator[str]:
        yield "words "
        await asyncio.Event().wait()

    @fault(TIMED_OUT)
    async def ignores_cancel(message: str) -> AsyncIterator[str]:
        for _ in range(4):
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        yield "late"

    @fault(TIMED_OUT)
    def hangs_in_thread(message: str) -> str:
        over.wait(20)
        return "late"

    @fault(INTERNAL._replace(words="a"))
    async def breaks_in_close(message: str) -> AsyncIterator[str]:
        try:
            yield "a"
            raise RuntimeError("of the inside")
        finally:
            raise KeyError("of the close")

    @fault(Asked(200, words=""))
    async def nothing(message: str) -> None:
        return None

    @fault(UPSTREAM)
    async def too_long(message: str) -> AsyncIterator[str]:
        yield "x" * 100 * 1024 * 1024

    @fault(UPSTREAM)
    async def too_long_by_and_by(message: str) -> AsyncIterator[str]:
        for _ in range(100):
            yield "x" * 1024 * 1024
            await asyncio.sleep(0)

    nonsense: dict[str, Any] = {
        "number": 5, "none": None, "bytes": b"words", "list": ["words"], "dict": {}, "two": {"usage": {}, "tool": {}},
        "reason": {"finish_reason": "error"}, "tool": {"tool": "no dict"}, "usage": {"usage": {"prompt_tokens": "1"}},
        "unhashable": {"finish_reason": ["stop"]}, "object": Evil(), "class": str,
    }  # fmt: skip
    for name, item in nonsense.items():
        agents[f"gives-{name}"] = _giving(item)
        faults[f"gives-{name}"] = INTERNAL
    agents["gives-surrogate"] = _giving("a\ud800b")
    faults["gives-surrogate"] = Asked(200, words="a\ufffdb")
    return agents, faults, over


def _giving(*items: Any) -> Callable[[str], AsyncIterator[Any]]:
    async def agent(message: str) -> AsyncIterator[Any]:
        for item in items:
            yield item

    return agent


def python_faults(n: int) -> Row:
    """Python agents that raise, exit, hang, ignore a cancel, give nonsense, 100 MB or nothing"""
    agents, faults, over = python_agents()
    try:
        return _torture(n, faults, agents=agents)
    finally:
        over.set()
        for thread in threading.enumerate():
            if thread.name == "copepod-agent":
                thread.join(10)


def base_exceptions(n: int) -> Row:
    """Python agents that raise what is no Exception (a library's own BaseException)"""

    async def before(message: str) -> AsyncIterator[str]:
        raise Foreign("of the inside")
        yield ""

    async def between(message: str) -> AsyncIterator[str]:
        yield "words"
        raise Foreign("of the inside")

    def thread(message: str) -> str:
        raise Foreign("of the inside")

    faults = {"before": INTERNAL, "between": INTERNAL._replace(words="words"), "thread": INTERNAL}
    return _torture(n, faults, agents={"before": before, "between": between, "thread": thread})


def wrong_tool_events(n: int) -> Row:
    """Python agents whose tool events are no JSON, too deep, or 50 MB"""
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(200_000):
        inner["a"] = inner = {}
    circle: dict[str, Any] = {}
    circle["a"] = circle
    tools = {"object": Evil(), "nan": float("nan"), "deep": deep, "circle": circle, "key": {("a", 1): 2}}
    agents = {f"tool-{name}": _giving({"tool": {"a": tool}}, "words") for name, tool in tools.items()}
    faults = dict.fromkeys(agents, INTERNAL)
    agents["tool-long"] = _giving({"tool": {"a": "x" * 50 * 1024 * 1024}}, "words")
    faults["tool-long"] = ANY
    agents["tool-surrogate"] = _giving({"tool": {"a": "\ud800"}}, "words")
    faults["tool-surrogate"] = Asked(200, words="words")
    return _torture(n, faults, agents=agents)


# Commands

# Each is a script of sh, which gets the message on stdin and MARK as $1.
PROGRAMS: dict[str, tuple[str, Asked]] = {
    "crashes": ("exit 3", UPSTREAM._replace(fields={"x-should-retry": "false"})),
    "crashes-later": ("echo words; exit 3", UPSTREAM._replace(words="words\n")),
    "segv": ("kill -SEGV $$", UPSTREAM),
    "killed": ("echo words; kill -KILL $$", UPSTREAM._replace(words="words\n")),
    "hangs": ("sleep 600", TIMED_OUT),
    "stubborn": ("trap '' TERM; sleep 600 & wait; sleep 600", TIMED_OUT),
    "stopped": ("kill -STOP $$", TIMED_OUT),
    "closes": ("echo words; exec >&- 2>&-; sleep 600", TIMED_OUT._replace(words="words\n")),
    "floods-stdout": ("yes", UPSTREAM),
    "floods-stderr": ("yes | head -c 2000000 >&2; echo words", Asked(200, words="words\n")),
    "floods-both": ("yes >&2 & yes", UPSTREAM),
    "grandchild": ("sleep 600 & echo words", Asked(200, words="words\n")),
    "stubborn-grandchild": ("(trap '' TERM; sleep 600) & echo words", Asked(200, words="words\n")),
    "daemon": ("setsid sleep 3 & echo words", Asked(200, words="words\n")),
    "silent": ("exit 0", UPSTREAM),
    "deaf": ("exec 0<&-; echo words", Asked(200, words="words\n")),
    "no-utf8": (r"printf 'a\377b'", Asked(200, words="a\ufffdb")),
}


def _left() -> list[int]:
    """Return the numbers of the processes that are left of ours: those that have MARK among their variables."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if MARK.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def command_faults(n: int) -> Row:
    """Commands that crash, hang, ignore SIGTERM, flood, leave grandchildren, cannot be started"""
    providers: dict[str, Any] = {}
    for name, (script, _) in PROGRAMS.items():
        providers[name] = {"api": "command", "command": "/bin/sh", "args": ["-c", script, "agent"]}
    providers["missing"] = {"api": "command", "command": "/nowhere/no-such-program"}
    providers["not-a-program"] = {"api": "command", "command": "/etc/passwd"}
    providers["not-json"] = {**providers["no-utf8"], "output": "json"}
    for provider in providers.values():
        provider["env"] = {"TORTURE": MARK}
    faults = {name: asked for name, (_, asked) in PROGRAMS.items()}
    faults |= dict.fromkeys(("missing", "not-a-program", "not-json"), UPSTREAM)
    agents = [{"id": f, "model": f"{f}/x", "timeoutSeconds": 1 if a.status == 504 else 20} for f, a in faults.items()]

    @asynccontextmanager
    async def programs() -> AsyncIterator[dict[str, Any]]:
        yield {"models.providers": providers, "agents.list": agents}

    try:
        row = _torture(n, faults, programs)
        daemons = [pid for pid in _left() if b"sleep\x003\x00" not in _words_of(pid)]  # those have left the group
        assert not daemons, f"left: {[_words_of(pid) for pid in daemons]}"
    finally:
        for pid in _left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return row


def _words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b"sleep\x003\x00"


# Upstreams


def _begun(then: Callable[[Call], Any]) -> Callable[[Call], Any]:
    async def script(call: Call) -> None:
        call.begin()
        call.word("words")
        await then(call)

    return script


async def _hangs(call: Call) -> None:
    await call.left.wait()


async def _resets(call: Call) -> None:
    call.reset()


async def _ends(call: Call) -> None:
    call.writer.write(b"0\r\n\r\n")


async def _breaks(call: Call) -> None:
    call.writer.write(b"ff\r\n{")
    call.close = True


async def _bad_chunk(call: Call) -> None:
    call.writer.write(b"zz\r\n\r\n")
    call.close = True


async def _bad_json(call: Call) -> None:
    call.event('{"choices": [{"delta": ')


async def _says_error(call: Call) -> None:
    call.event({"error": {"message": "it broke", "type": "server_error", "code": None}})


async def _floods(call: Call) -> None:
    with suppress(OSError):
        while not call.left.is_set():
            call.word("flood " * 10_000)
            await call.writer.drain()
            await asyncio.sleep(0)


async def _long_event(call: Call) -> None:
    call.word("x" * 2 * 1024 * 1024)


def _refuses(status: int, *fields: str) -> Callable[[Call], Any]:
    return answers(status, b'{"error": {"message": "because", "type": "x"}}', *fields)


BEGUN = UPSTREAM._replace(words="words")
UPSTREAMS: dict[str, tuple[Callable[[Call], Any], Asked]] = {
    "resets": (_resets, UPSTREAM),
    "resets-later": (_begun(_resets), BEGUN),
    "hangs": (_hangs, TIMED_OUT),
    "hangs-later": (_begun(_hangs), TIMED_OUT._replace(words="words")),
    "garbage": (sends(b"\x00\xffgarbage\r\n\r\n"), UPSTREAM),
    "empty": (sends(b""), UPSTREAM),
    "half-head": (sends(b"HTTP/1.1 200 OK\r\nContent-Ty"), UPSTREAM),
    "endless-head": (sends(b"HTTP/1.1 200 OK\r\n" + b"X-Long: x\r\n" * 20_000), UPSTREAM),
    "endless-line": (sends(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 500_000), UPSTREAM),
    "html": (answers(200, b"<html>hello", type="text/html"), UPSTREAM),
    "no-json": (answers(200, b"{"), UPSTREAM),
    "no-answer": (answers(200, b'{"choices": [5]}'), UPSTREAM),
    "short": (sends(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"), UPSTREAM),
    "half-a-stream": (_begun(_ends), BEGUN),
    "half-a-chunk": (_begun(_breaks), BEGUN),
    "bad-chunk": (_begun(_bad_chunk), BEGUN),
    "bad-event": (_begun(_bad_json), BEGUN),
    "error-event": (_begun(_says_error), BEGUN),
    "long-event": (_begun(_long_event), BEGUN),
    "floods": (_begun(_floods), UPSTREAM),
    "busy": (_refuses(429, "Retry-After: 7"), Asked(429, "rate_limit_error", None, {"retry-after": "7"})),
    "unauthorized": (_refuses(401), Asked(502, "upstream_auth_error", None, {"x-should-retry": "false"})),
    "forbidden": (_refuses(403), Asked(502, "upstream_auth_error", None, {"x-should-retry": "false"})),
    "moved": (_refuses(307, "Location: http://127.0.0.1:1/"), Asked(502, "upstream_auth_error")),
    "refused": (_refuses(400), Asked(400, "invalid_request_error")),
    "broken": (_refuses(500), UPSTREAM._replace(fields={"x-should-retry": "false"})),
    "overloaded": (_refuses(503, "Retry-After: 3"), UPSTREAM),
}


def upstream_faults(n: int) -> Row:
    """Upstream servers that refuse, reset, hang, answer garbage, half a stream, 429, wrong TLS"""
    faults = {name: asked for name, (_, asked) in UPSTREAMS.items()}
    faults |= dict.fromkeys(("nobody", "no-tls", "no-name"), UPSTREAM)

    async def script(call: Call) -> None:
        await UPSTREAMS[call.json["model"]][0](call)

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    def config(port: int, plain_port: int, tls_port: int, closed: int) -> dict[str, Any]:
        def provider(name: str) -> dict[str, Any]:
            seconds = 2 * TIMEOUT if faults[name].status == 504 else 10
            at = {"api": "openai-completions", "baseUrl": urls[name], "apiKey": "k"}
            return {**at, "timeoutSeconds": seconds, "retry": {"seconds": 1}}

        urls = dict.fromkeys(UPSTREAMS, f"http://127.0.0.1:{port}")
        urls |= {"nobody": f"http://127.0.0.1:{closed}", "no-tls": f"https://127.0.0.1:{plain_port}"}
        urls |= {"no-name": "http://no.such.name.invalid", "bad-tls": f"https://localhost:{tls_port}"}
        agents = [{"id": name, "model": f"{name}/{name}", "timeoutSeconds": 10} for name in faults]
        return {"models.providers": {name: provider(name) for name in faults}, "agents.list": agents}

    @asynccontextmanager
    async def servers() -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            upstream = await stack.enter_async_context(Upstream(script))
            ports = []
            for tls in (None, context):
                server = await asyncio.start_server(plain, "127.0.0.1", 0, ssl=tls)
                stack.callback(server.close)
                ports.append(server.sockets[0].getsockname()[1])
            nobody = stack.enter_context(socket.socket())  # bound and not listening: refused
            nobody.bind(("127.0.0.1", 0))
            ports.append(nobody.getsockname()[1])
            yield config(upstream.port, *ports)
            await until(lambda: not upstream.active, "the gateway has left every upstream")

    with tempfile.TemporaryDirectory() as folder:
        context = _self_signed(folder)
        faults |= {"bad-tls": UPSTREAM} if context is not None else {}
        return _torture(n, faults, servers)


def _self_signed(folder: str) -> ssl.SSLContext | None:
    """Return the context of a server whom nobody trusts; None where there is no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days"]
    command += ["2", "-subj", "/CN=localhost", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    return context


SCENARIOS: tuple[tuple[Callable[[int], Row], int, int], ...] = (
    (python_faults, 20, 1),
    (base_exceptions, 20, 1),
    (wrong_tool_events, 10, 1),
    (command_faults, 10, 1),
    (upstream_faults, 20, 1),
)
