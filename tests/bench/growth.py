"""What grows with what: connections, streams, stored turns, sessions, and one body's size. `python3 growth.py` (Linux).

The gateway is a process of its own on one core, with its defaults but for the keys that are printed; the load comes
from other cores. CPU time is the gateway's, from the system's count for each of its threads, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORES = sorted(os.sched_getaffinity(0))
CONNECTIONS = (1, 10, 100, 1000, 5000)
STORED = (10, 1000, 100_000)  # turns in a session; sessions in a store
SECONDS = 2.0  # of one load
ROUNDS = 3
CHUNKS = 2000  # a second, of all streams together
TURNS = 50  # of a session in one go
BODY = 900_000  # bytes
PROBE_SECONDS = 0.002  # between two small requests
TOKEN = "a-token-for-the-bench-alone"  # noqa: S105
AGENT = """
import asyncio

async def reply(message):
    if not message.startswith("stream "):
        yield "A copepod is small."
        return
    while True:
        yield "A copepod is small. "
        await asyncio.sleep(float(message[7:]))
"""

Row = tuple[str, dict[str, float]]


# The gateway


class Server:
    """A gateway on the last core. `keys` are set beside its defaults."""

    def __init__(self, checkout: Path, folder: Path, **keys: Any) -> None:
        (folder / "growth_agent.py").write_text(AGENT)
        config = {
            "gateway": {
                "port": 0,
                "auth": {"mode": "token", "token": TOKEN},
                "http": {"endpoints": {"chatCompletions": {"enabled": True}}},
                "maxConnections": keys.pop("maxConnections", 1024),
            },
            "agents": {
                "list": [{"id": "bench", "default": True, "model": "bench/bench"}],
                "defaults": {"maxConcurrent": keys.pop("maxConcurrent", 64)},
            },
            "models": {"providers": {"bench": {"api": "python", "entry": "growth_agent:reply"}}},
            "session": {"store": str(folder / "sessions.sqlite3"), **keys},
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.log = folder / "log"
        command = [sys.executable, str(checkout / "gateway.py"), "gateway", "--config", str(folder / "config.json")]
        with self.log.open("wb") as log:
            self.began = time.perf_counter()
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={"HOME": str(folder), "PATH": os.defpath},
                preexec_fn=lambda: pin(-1),
            )
        self.port = self._port()

    def _port(self) -> int:
        """Return the port that it says it listens on."""
        while time.perf_counter() < self.began + 60 and self.process.poll() is None:
            for word in self.log.read_text().replace('"', " ").split():
                if word.startswith("http://127.0.0.1:"):
                    return int(word.split(":")[2].split("/")[0])
            time.sleep(0.001)
        raise SystemExit(f"the gateway does not start: {self.log.read_text()[-2000:]}")

    def cpu(self, thread: int | None = None) -> float:
        """Return the microseconds that all its threads have had, or this one."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob(f"{thread or '*'}/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e3

    def loop(self) -> float:
        """Return those of the thread that has the event loop."""
        return self.cpu(self.process.pid)

    def connect(self) -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(checkout: Path, sessions: int = 0, turns: int = 1, **keys: Any) -> Iterator[Server]:
    """A gateway whose store has `sessions` with `turns` each."""
    with tempfile.TemporaryDirectory() as folder:
        if sessions:
            fill(checkout, Path(folder) / "sessions.sqlite3", sessions, turns)
        server = Server(checkout, Path(folder), **keys)
        try:
            yield server
        finally:
            server.stop()


def fill(checkout: Path, path: Path, sessions: int, turns: int) -> None:
    """Make the store as the gateway does, then write to its tables."""
    import sqlite3

    code = "import asyncio, sessions, sys\ns = sessions.Store(sys.argv[1], 200)\nasyncio.run(s.open())"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=checkout, check=True)
    said = [(role, f'{{"role": "{role}", "content": "How small?"}}') for role in ("user", "assistant")]
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO sessions (id, agent, key, session_id, updated_at) VALUES (?, 'bench', ?, ?, ?)",
            ((n, f"session-{n}", f"id-{n}", 1_700_000_000_000 + n) for n in range(1, sessions + 1)),
        )
        db.executemany(
            "INSERT INTO messages (session, seq, role, timestamp, json) VALUES (?, ?, ?, 1700000000000, ?)",
            ((n, 2 * turn + i + 1, *said[i]) for n in range(1, sessions + 1) for turn in range(turns) for i in (0, 1)),
        )


def pin(core: int) -> None:
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


# What a client says


def request(message: str = "How small?", session: str = "", **fields: Any) -> bytes:
    call = {"model": "copepod", "messages": [{"role": "user", "content": message}], **fields}
    return post(json.dumps(call).encode(), session)


def post(body: bytes, session: str = "") -> bytes:
    key = f"x-copepod-session-key: {session}\r\n" if session else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask(link: socket.socket, message: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer, which is not streamed."""
    link.sendall(message)
    data = link.recv(1 << 18)
    while b"\r\n\r\n" not in data:
        data += link.recv(1 << 18)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += link.recv(1 << 18)
    return int(head.split()[1]), body


# Connections and streams


def connections(checkout: Path) -> Iterator[Row]:
    """CPU for one answer, every connection waiting for one at any time."""
    for wanted, row in in_turns(checkout, lambda wanted: (b"HTTP/1.1 200", request(), True)):
        yield f"{wanted:,} connections", row


def streams(checkout: Path) -> Iterator[Row]:
    """CPU for one chunk; the streams together have as many a second."""
    for wanted, row in in_turns(checkout, lambda n: (b"data: ", request(f"stream {n / CHUNKS}", stream=True), False)):
        yield f"{wanted:,} streams", row


def in_turns(checkout: Path, ask: Callable[[int], tuple[bytes, bytes, bool]]) -> Iterator[tuple[int, dict[str, float]]]:
    """The CPU for each mark in what comes, for each number of connections, taken in alternation."""
    found: dict[int, list[tuple[float, float]]] = {wanted: [] for wanted in CONNECTIONS}
    with serving(checkout, maxConnections=6000, maxConcurrent=6000) as server:
        for _ in range(ROUNDS):
            for wanted in CONNECTIONS:
                mark, message, again = ask(wanted)
                with links(server, wanted, message) as linked:
                    cpu, marks = load(server, linked, mark, message if again else b"")
                found[wanted].append((cpu / marks, marks / SECONDS))
    for wanted, pairs in found.items():
        used, rates = zip(*pairs, strict=True)
        yield wanted, {**spread(used), "a second": statistics.median(rates)}


def spread(used: Collection[float]) -> dict[str, float]:
    return {"us CPU": statistics.median(used), "least": min(used), "most": max(used)}


@contextlib.contextmanager
def links(server: Server, wanted: int, message: bytes) -> Iterator[tuple[Any, dict[int, socket.socket]]]:
    """Connections that have sent `message`."""
    poll, opened = select.epoll(), {}
    try:
        for _ in range(wanted):
            link = server.connect()
            opened[link.fileno()] = link
            poll.register(link.fileno(), select.EPOLLIN)
        for link in opened.values():
            link.sendall(message)
        yield poll, opened
    finally:
        for link in opened.values():
            link.close()
        poll.close()


def load(server: Server, linked: tuple[Any, dict[int, socket.socket]], mark: bytes, again: bytes) -> tuple[float, int]:
    """Return CPU, and the marks that came meanwhile. `again` is sent for each answer."""
    poll, opened = linked
    silent = set(opened)
    marks, used, until = 0, 0.0, float("inf")
    while time.perf_counter() < until:
        if not silent and until == float("inf"):  # from now on each is at work
            marks, used, until = 0, server.cpu(), time.perf_counter() + SECONDS
        for descriptor, _ in poll.poll(0.01):
            data = opened[descriptor].recv(1 << 18)
            assert data, "the gateway has ended a connection"
            marks += data.count(mark)
            silent.discard(descriptor)
            if again and b"HTTP/1.1 " in data:
                assert mark in data, data[:300]
                opened[descriptor].sendall(again)
    return server.cpu() - used, marks


# The store


def turns(checkout: Path) -> Iterator[Row]:
    """CPU and time for a turn of a session, taken in alternation."""
    few, _, many = STORED
    plans: list[tuple[str, str, dict[str, int]]] = [
        *((f"{n:,} turns stored", "session-1", {"sessions": 1, "turns": n}) for n in STORED),
        *((f"{n:,}, and all told", "session-1", {"sessions": 1, "turns": n, "maxMessages": 10**5}) for n in STORED[:2]),
        *((f"beside {n:,} sessions", "session-1", {"sessions": n}) for n in (few, many)),
        *((f"beside {n:,}, each a new one", "new", {"sessions": n}) for n in (few, many)),
    ]
    number = count()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(checkout, **keys)) for _, _, keys in plans]
        links = [stack.enter_context(server.connect()) for server in servers]
        rows: list[list[tuple[float, ...]]] = [[] for _ in plans]
        for _ in range(2 * ROUNDS):
            for (_, key, _), server, link, row in zip(plans, servers, links, rows, strict=True):
                keys = [f"{key}-{next(number)}" if key == "new" else key for _ in range(TURNS)]
                row.append(several(server, link, keys))
    for (label, _, _), row in zip(plans, rows, strict=True):
        cpus, loops, times, _ = zip(*row[1:], strict=True)
        ends = {
            "us of the loop": statistics.median(loops),
            "ms": statistics.median(times),
            "ms of the first": row[0][3],
        }
        yield label, {**spread(cpus), **ends}


def several(server: Server, link: socket.socket, keys: list[str]) -> tuple[float, ...]:
    """Return the CPU for a turn, that of the loop's thread, and the ms for a turn, and for the first."""
    cpu, loop, times = server.cpu(), server.loop(), []
    for key in keys:
        before = time.perf_counter()
        assert ask(link, request(session=key))[0] == 200
        times.append((time.perf_counter() - before) * 1e3)
    cpu, loop = server.cpu() - cpu, server.loop() - loop
    return cpu / len(keys), loop / len(keys), statistics.median(times), times[0]


def starts(checkout: Path) -> Iterator[Row]:
    """Time from the start of the process to its first answer."""
    took: dict[int, list[float]] = {stored: [] for stored in STORED}
    for _ in range(ROUNDS):
        for stored in STORED:
            with serving(checkout, sessions=stored) as server, server.connect() as link:
                ask(link, request())
                took[stored].append((time.perf_counter() - server.began) * 1e3)
    for stored, times in took.items():
        yield f"{stored:,} sessions", {"ms": statistics.median(times), "least": min(times), "most": max(times)}


def reports(checkout: Path) -> Iterator[Row]:
    """CPU for a call of what tells of sessions."""
    for stored in STORED:
        with serving(checkout, sessions=stored) as server:
            for name, row in asyncio.run(tell(server)).items():
                yield f"{stored:,} sessions: {name}", row


async def tell(server: Server) -> dict[str, dict[str, float]]:
    """Return what each method takes."""
    import rfc6455

    link = await rfc6455.connect("127.0.0.1", server.port, max_message=1 << 24)
    told: dict[str, dict[str, float]] = {}
    numbers = count()

    async def call(method: str, params: dict[str, Any]) -> None:
        number = str(next(numbers))
        await link.send(json.dumps({"type": "req", "id": number, "method": method, "params": params}))
        while (answer := json.loads(await link.receive() or "{}")).get("id") != number:
            assert answer, f"{method} was not answered"
        assert answer["ok"], answer

    client = {"id": "cli", "version": "1", "platform": "linux", "mode": "cli"}
    await call("connect", {"minProtocol": 3, "maxProtocol": 3, "client": client, "auth": {"token": TOKEN}})
    for name, method, params in (
        ("status", "status", {}),
        ("health", "health", {}),
        ("sessions.list", "sessions.list", {}),
        ("those active", "sessions.list", {"activeMinutes": 5}),
        ("a search", "sessions.list", {"search": "session-7"}),
        ("a search in vain", "sessions.list", {"search": "none has this"}),
    ):
        used, loops = [], []
        for _ in range(5):
            cpu, loop = server.cpu(), server.loop()
            await call(method, params)
            used.append(server.cpu() - cpu)
            loops.append(server.loop() - loop)
        told[name] = {**spread(used), "us of the loop": statistics.median(loops)}
    link.close()
    return told


# A large body


def bodies() -> dict[str, bytes]:
    """Bodies of BODY bytes: of honest people, of others as full as they may be, and fuller."""
    made = {
        "one long string": call('{"role":"user","content":"' + "How small? " * (BODY // 11 - 20) + '"}'),
        "the same in \\u escapes": call('{"role":"user","content":"' + r"\u8a9e" * (BODY // 6 - 30) + '"}'),
        "10,000 messages": call(repeated('{"role":"user","content":"How small is it, if one looks closely?"}', 10_000)),
    }
    nested = {
        "numbers": "1", "floats": "5e-324", "arrays": "[]", "objects": '{"":{}}', "names": '{"a":0}', "strings": '""',
        "arrays, 120 deep": "[" * 120 + "]" * 120, "objects, 100 deep": '{"":' * 100 + "0" + "}" * 100,
    }  # fmt: skip
    hi = '{"role":"user","content":"hi"}'
    for name, item in nested.items():
        bounds = item.count(",") + item.count("[") + item.count("{") + 1
        many = min(65_500 // bounds, (BODY - 200) // (len(item) + 1))
        made[f"{name}, at the limit"] = call(hi, f'"x":[{repeated(item, many)}]', r"\ud800")
        made[f"{name}, beyond it"] = call(hi, f'"x":[{repeated(item, (BODY - 200) // (len(item) + 1))}]')
    made["halves of surrogates"] = call(hi, '"x":0', r"\ud800")
    made["commas in strings"] = call(hi, f'"x":[{repeated(chr(34) + ",," + chr(34), 60_000)}]', ",")
    return made


def repeated(item: str, times: int) -> str:
    return ",".join([item] * times)


def call(messages: str, more: str = '"x":0', padding: str = "a") -> bytes:
    text = f'{{"model":"copepod","messages":[{messages}],{more},"padding":"'
    return (text + padding * ((BODY - len(text) - 2) // len(padding)) + '"}').encode()


def tiny() -> bytes:
    """A request whose body comes in chunks of one byte."""
    head, _, body = post(call('{"role":"user","content":"hi"}')[: BODY // 6]).partition(b"\r\n\r\n")
    head = head.rpartition(b"Content-Length")[0] + b"Transfer-Encoding: chunked"
    return head + b"\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def parsing(checkout: Path) -> Iterator[Row]:
    """The loop's own work for one body, in this process."""
    import chat_completions as chat

    for name, body in bodies().items():
        best = float("inf")
        for _ in range(5):
            begun = time.thread_time()
            with contextlib.suppress(chat.APIError):
                chat.parse_request(body)
            best = min(best, time.thread_time() - begun)
        yield name, {"ms": best * 1e3}


def waiting(checkout: Path) -> Iterator[Row]:
    """How long a small request waits while another client sends large bodies back to back."""
    with serving(checkout) as server:
        yield "nobody else", probe(server)
        for name, message in {**{name: post(body) for name, body in bodies().items()}, "1-byte chunks": tiny()}.items():
            sender = multiprocessing.get_context("fork").Process(target=send, args=(server, message), daemon=True)
            sender.start()
            time.sleep(0.2)
            yield name, probe(server)
            assert sender.is_alive(), "the sender has failed"
            sender.terminate()
            sender.join()


def send(server: Server, message: bytes) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pin(-3)
    with server.connect() as link:
        while True:
            ask(link, message)


def probe(server: Server) -> dict[str, float]:
    """Return the milliseconds for one small request of many."""
    took = []
    with server.connect() as link:
        until = time.perf_counter() + 1
        while (begun := time.perf_counter()) < until:
            assert ask(link, request())[0] == 200
            took.append((time.perf_counter() - begun) * 1e3)
            time.sleep(max(0.0, begun + PROBE_SECONDS - time.perf_counter()))
    took.sort()
    return {"p50 ms": took[len(took) // 2], "p99 ms": took[len(took) * 99 // 100], "max ms": took[-1]}


# The tables

SECTIONS: dict[str, Callable[[Path], Iterator[Row]]] = {
    function.__name__: function for function in (connections, streams, turns, starts, reports, parsing, waiting)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all where none is named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="of the gateway that is measured")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 2 * 6000 + 64:
        raise SystemExit(f"{hard} open files are too few for {CONNECTIONS[-1]} connections, each counted twice")
    sys.path.insert(0, str(options.checkout))
    pin(-2)
    print(f"Python {sys.version.split()[0]}; gateway.maxConnections and agents.defaults.maxConcurrent are 6,000 for")
    print("connections and streams (1,024 and 64 by default), session.maxMessages is 200 (its default) or 100,000.")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.sections or SECTIONS:
        print(f"\n{name}: {SECTIONS[name].__doc__}")
        figures[name] = {}
        for label, row in SECTIONS[name](options.checkout.resolve()):
            if not figures[name]:
                print(" " * 40 + "".join(f"{title:>{max(11, len(title) + 2)}}" for title in row))
            print(f"{label:40}" + "".join(f"{row[title]:{max(11, len(title) + 2)},.2f}" for title in row), flush=True)
            figures[name][label] = row
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
