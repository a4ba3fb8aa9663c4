"""What must come back to where it was after many requests of all kinds: files, tasks, runs, sessions, memory."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the child: see `serve`
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]
else:
    from run import Row
    from talk import SEED, answer_to, configured, home

    from live import BOUND, CHAT, Client, chat, chunked, text_of, within
    from peer import CLIENT, SESAME, TOKEN, connected, opened

import exchange
import gateway

WORKERS = 32
SESSIONS = 20
MIB = 1024 * 1024
AGENTS = [
    {"id": "main", "model": "echo/echo"},
    {"id": "slow", "model": "paced/-"},
    {"id": "short", "model": "paced/-", "timeoutSeconds": 0.05},
    {"id": "tool", "model": "cat/-"},
    {"id": "broken", "model": "nobody/-"},
]


# The child: a gateway that tells on SIGUSR1 what it has


def figures(hub: gateway.Gateway) -> dict[str, int]:
    """Return how many there are of all that may leak, and `memory` in bytes."""
    gc.collect()
    with suppress(AttributeError):  # glibc: pieces that are free, and no leak, are given back
        ctypes.CDLL(None).malloc_trim(0)
    loop: Any = asyncio.get_running_loop()
    fanout = hub.control._events
    counted: dict[str, Any] = {
        "files": os.listdir("/proc/self/fd"),
        "threads": threading.enumerate(),
        "tasks": asyncio.all_tasks(),
        "timers": [timer for timer in loop._scheduled if not timer.cancelled()],
        "connections": hub.connections,
        "upgraded": hub.upgraded,
        "runs": hub.runs.active,
        "lanes": hub.runs._lanes,
        "waiting runs": hub.runs._waiting,
        "places": range(hub.runs._placed),
        "observers": hub.runs.observers,
        "clients": hub.control._clients,
        "jobs": hub.jobs._running,
        "jobs' tasks": hub.jobs.tasks,
        "waits": hub.jobs._waits,
        "members": fanout._members,  # type: ignore[attr-defined]
        "watches": fanout._watches,  # type: ignore[attr-defined]
        "failures": hub.house.gate._limiter,
    }
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {name: len(things) for name, things in counted.items()} | {"memory": memory}


async def serve(path: str) -> None:
    """Serve with this configuration, and shorter times, until stdin ends."""
    gateway.HEAD_SECONDS = exchange.BODY_SECONDS = 1.0
    gateway.SWEEP_SECONDS = 0.1
    gateway.jobs.MAX_ENDED = 100  # what is remembered of ended runs is soon all there
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(0, ended.set)
    async with gateway.Gateway(gateway.load_config(path, {})) as hub:
        loop.add_signal_handler(signal.SIGUSR1, lambda: print(json.dumps(figures(hub)), flush=True))
        print(hub.port, flush=True)
        await ended.wait()
        loop.remove_reader(0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
    sys.exit()


# The clients


class Caller:
    """Asks one thing after the other, where it can on one connection."""

    def __init__(self, port: int, dice: random.Random) -> None:
        self.port, self.dice = port, dice
        self.kept: Client | None = None

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """The kept connection, or a new one; it is kept if all goes well."""
        client, self.kept = self.kept or await Client.open(self.port), None
        try:
            yield client
        except BaseException:
            await client.close()
            raise
        self.kept = client

    async def ask(self, status: int, body: bytes, *, path: str = "", method: str = "POST", secret: str = SESAME) -> Any:
        """Ask, and return the answer's JSON."""
        fields = {"Authorization": f"Bearer {secret}"}
        async with self.client() as client:
            answer = await client.ask(method, path or CHAT, body, fields)
            assert answer.status == status, (status, answer)
        return answer.json

    def say(self, client: Client, agent: str, text: str, **more: Any) -> None:
        body = chat(text, model=f"copepod:{agent}", **more)
        client.send("POST", CHAT, body, {"Authorization": f"Bearer {SESAME}"})


async def plain(caller: Caller) -> None:
    words = f"hello {caller.dice.random()} " + "word " * caller.dice.randrange(100)
    user = f"u{caller.dice.randrange(SESSIONS)}" if caller.dice.random() < 0.3 else ""
    answer = await caller.ask(200, chat(words, user=user))
    assert answer["choices"][0]["message"]["content"] == words


async def streamed(caller: Caller) -> None:
    text = f"0 hello {caller.dice.random()}"
    async with caller.client() as client:
        caller.say(client, "slow", text, stream=True)
        assert (await client.head())[0] == 200
        assert text_of([event async for event in client.events()]) == answer_to(text)


async def malformed(caller: Caller) -> None:
    bad = (b"{", b"[]", b'{"messages": 1}', b'{"messages": []}', b"\xff", b"[" * 10_000, chat("x", n=3), chat(""))
    await caller.ask(400, caller.dice.choice(bad))


async def no_request(caller: Caller) -> None:
    """What is no HTTP: answered 400 and closed."""
    async with await Client.open(caller.port) as client:
        client.write(caller.dice.choice((b"\x16\x03\x01", b"GET /", b"GET / HTTP/1.1\r\nA : b")) + b"\r\n\r\n")
        assert (await client.answer()).status in (400, 505)


async def unauthorized(caller: Caller) -> None:
    await caller.ask(401, chat(), secret="wrong")  # noqa: S106


async def not_found(caller: Caller) -> None:
    if caller.dice.random() < 0.5:
        await caller.ask(404, b"", path=f"/nothing/{caller.dice.random()}", method="GET")
    else:
        await caller.ask(404, chat(model=f"copepod:nobody{caller.dice.randrange(10**6)}"))


async def too_large(caller: Caller) -> None:
    async with await Client.open(caller.port) as client:
        fields = {"Authorization": f"Bearer {SESAME}"}
        if caller.dice.random() < 0.9:
            client.send("POST", CHAT, None, {**fields, "Content-Length": str(MIB + 1)})
        else:
            client.send("POST", CHAT, None, {**fields, "Transfer-Encoding": "chunked"})
            client.write(chunked(b"x" * (MIB + 1)))
        assert (await client.answer()).status == 413


async def failed(caller: Caller) -> None:
    await caller.ask(502, chat(model="copepod:broken"))


async def left(caller: Caller) -> None:
    """Ask something long, wait for its head or not, and leave."""
    client = await Client.open(caller.port)
    streams = caller.dice.random() < 0.6
    user = f"u{caller.dice.randrange(SESSIONS)}" if caller.dice.random() < 0.3 else ""
    caller.say(client, "slow", "0.05 " + "word " * 100, stream=streams, user=user)
    if streams and caller.dice.random() < 0.5:
        await client.head()
    if caller.dice.random() < 0.5:
        client.reset()
    await client.close()


async def half(caller: Caller) -> None:
    """Leave in the middle of a request."""
    client = await Client.open(caller.port)
    client.write(caller.dice.choice((b"", b"GET", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")))
    if caller.dice.random() < 0.5:
        client.reset()
    await client.close()


async def timed_out(caller: Caller) -> None:
    """An agent that takes too long, or a client that does."""
    which = caller.dice.randrange(3)
    async with await Client.open(caller.port) as client:
        if which == 0:
            caller.say(client, "short", "60 word")
        elif which == 1:
            client.write(b"GET / HTTP/1.1\r\n")
        else:
            fields = {"Authorization": f"Bearer {SESAME}", "Content-Length": "100"}
            client.send("POST", CHAT, b"{", fields)
        assert (await client.answer()).status == (408 if which else 504)


async def program(caller: Caller) -> None:
    """A turn that a program answers, and one that is left."""
    if caller.dice.random() < 0.5:
        answer = await caller.ask(200, chat("meow", model="copepod:tool"))
        assert answer["choices"][0]["message"]["content"] == "meow"
        return
    client = await Client.open(caller.port)
    caller.say(client, "tool", "meow", stream=True)
    client.reset()
    await client.close()


async def spoken(caller: Caller) -> None:
    """A WebSocket client: a turn in a session, a wait, a turn that is aborted or left behind, an unknown method."""
    name = f"{caller.dice.random()}"
    async with connected(caller, auth={"token": SESAME}) as peer:
        key = f"agent:main:ws{caller.dice.randrange(SESSIONS)}"
        await peer.agent(f"hello {name}", name, sessionKey=key)
        assert (await peer.ask("agent.wait", runId=name))["status"] == "ok"
        await peer.error("nothing.here")
        await peer.post("agent.wait", {"runId": f"never-{name}", "timeoutMs": 60_000})
        slow = {"message": "0.1 a b c", "sessionKey": f"agent:slow:{key}", "idempotencyKey": f"slow-{name}"}
        await peer.answer(await peer.post("agent", slow))
        if caller.dice.random() < 0.7:
            await peer.ask("chat.abort", sessionKey=slow["sessionKey"], runId=slow["idempotencyKey"])
        if caller.dice.random() < 0.5:
            peer.drop()


async def refused(caller: Caller) -> None:
    """A WebSocket client with a wrong secret, or none."""
    async with opened(caller) as peer:
        await peer.challenge()
        answer = await peer.connect(**({"auth": {"token": "wrong"}} if caller.dice.random() < 0.5 else {}))
        assert not answer["ok"]
        assert (await peer.ended())[0] == 1008


async def broken(caller: Caller) -> None:
    """A WebSocket client that sends what is no frame, or no request, and may leave half-way."""
    hello = {"type": "req", "id": "1", "method": "connect"}
    params = {"minProtocol": 3, "maxProtocol": 3, "client": CLIENT, "auth": {"token": SESAME}}
    frames = ("no JSON", [1], {**hello, "params": {}}, {**hello, "params": params, "more": 1})
    bytes_ = (
        b"\x81\x05hello", b"\xf1\x80\0\0\0\0", b"\x83\x80\0\0\0\0", b"\x09\x80\0\0\0\0", b"\x81\xff" + b"\x7f" * 12,
        b"\x81\x82\0\0\0\0\xff\xff", b"\x81\xfe", b"\x80\x80\0\0\0\0", b"\x88\x81\0\0\0\0\x03",
    )  # fmt: skip
    async with opened(caller) as peer:
        if caller.dice.random() < 0.5:
            await peer.send({**hello, "params": params})
            await peer.answer("1")
        if caller.dice.random() < 0.3:
            await peer.send(caller.dice.choice(frames))
        else:
            peer.websocket._transport.write(caller.dice.choice(bytes_))
        if caller.dice.random() < 0.5:
            peer.drop()


KINDS: dict[Callable[[Caller], Awaitable[None]], float] = {
    plain: 35, streamed: 15, malformed: 6, no_request: 4, unauthorized: 5, not_found: 5, too_large: 4, failed: 3,
    left: 8, half: 4, timed_out: 1, program: 0.5, spoken: 4, refused: 2, broken: 4,
}  # fmt: skip


class Served:
    """The child."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.port = process, port

    async def figures(self) -> dict[str, int]:
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGUSR1)
        counted: dict[str, int] = json.loads(await within(self.process.stdout.readline()))
        return counted

    async def settled(self, start: dict[str, int]) -> dict[str, int]:
        """The figures once nothing is more than at the start, memory apart, or when that does not come about."""
        until = time.monotonic() + BOUND
        while grown(start, now := await self.figures()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return now


def grown(start: dict[str, int], now: dict[str, int]) -> dict[str, str]:
    """What is more than at the start, memory apart."""
    return {name: f"{start[name]} to {now[name]}" for name in start if name != "memory" and now[name] > start[name]}


@asynccontextmanager
async def served(file: Path) -> AsyncIterator[Served]:
    """The child, once it listens."""
    pipe = asyncio.subprocess.PIPE
    with open(file.parent / "log", "wb") as log:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(file), stdin=pipe, stdout=pipe, stderr=log, cwd=file.parent,
            env={"HOME": str(file.parent), "PATH": os.environ["PATH"]},
        )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Served(process, int(await within(process.stdout.readline())))
        process.stdin.close()
        assert await within(process.wait()) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await within(process.wait())
        process._transport.close()  # type: ignore[attr-defined]  # now, and not in the loop's next turn
        await asyncio.sleep(0)


async def load(port: int, numbers: Iterator[int], dice: random.Random, tally: Counter[str]) -> None:
    """Requests of all kinds, many at once, one for each of the numbers."""
    kinds, weights = list(KINDS), list(KINDS.values())

    async def work() -> None:
        caller = Caller(port, dice)
        for _ in numbers:
            kind = dice.choices(kinds, weights)[0]
            try:
                await kind(caller)
            except Exception as error:
                raise AssertionError(f"{kind.__name__}: {error!r}") from error
            tally[kind.__name__] += 1
        if caller.kept is not None:
            await caller.kept.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(WORKERS):
            tasks.create_task(work())


async def _leaks(n: int, file: Path) -> Row:
    dice, tally = random.Random(SEED), Counter[str]()  # noqa: S311
    began, warm = time.monotonic(), max(n // 10, 1_000)
    async with served(file) as child:
        start = await child.figures()
        await load(child.port, iter(range(warm)), dice, tally)
        early = await child.settled(start)
        await load(child.port, iter(range(n - warm)), dice, tally)
        late = await child.settled(start)
        async with connected(child, auth={"token": SESAME}) as peer:
            for session in (await peer.ask("sessions.list"))["sessions"]:
                await peer.ask("sessions.delete", key=session["key"])
            sessions = (await peer.ask("sessions.list"))["count"]
        late = await child.settled(start) | {"memory": late["memory"]}
    took = time.monotonic() - began
    more = grown(start, late) | ({"sessions": f"0 to {sessions}"} if sessions else {})
    limit = early["memory"] * 1.1 + MIB
    if late["memory"] > limit:
        more["memory"] = f"{early['memory'] / MIB:.1f} to {late['memory'] / MIB:.1f} MiB"
    assert len(tally) == len(KINDS), tally
    log = (file.parent / "log").read_text()
    if "Traceback" in log:
        more["log"] = log[log.index("Traceback") :][:600]
    memory = f"memory {early['memory'] / MIB:.1f} to {late['memory'] / MIB:.1f} MiB"
    if more:
        return Row("", n, len(more), "all as at the start", f"{more}; seed {SEED}")
    counts = ", ".join(f"{name} {late[name]}" for name in ("files", "tasks", "timers", "runs"))
    return Row("", n, 0, "all as at the start, memory at most 10 % + 1 MiB over that after a tenth of them",
               f"{counts} as at the start, {memory}, {n / took:,.0f} a second; seed {SEED}")  # fmt: skip


def leaks(n: int) -> Row:
    """Requests of all kinds: answered, streamed, refused, failed, left, timed out, WebSocket turns, broken frames"""
    print(f"leaks: TORTURE_SEED={SEED}", flush=True)
    with home() as folder:
        (folder / "begun").symlink_to("/dev/null")
        cat = {"api": "command", "command": "cat"}
        changes = {
            **TOKEN, "agents.list": AGENTS, "models.providers.cat": cat, "logging.level": "error",
            "session": {"store": str(folder / "store" / "db"), "maxMessages": 20},
        }  # fmt: skip
        return asyncio.run(_leaks(n, configured(folder, **changes)))


SCENARIOS = ((leaks, 100_000, 2_000),)
