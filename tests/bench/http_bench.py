"""The whole gateway against FastAPI, aiohttp and bare asyncio streams: `python tests/bench/http_bench.py [--quick]`.

The servers run in alternation, each in a process of its own on one core, and the load comes from another core: only
the ratios of one run mean something. `--setup` makes the peers' virtual environments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENVS = ROOT / ".venv-bench"
PEERS = ("fastapi", "aiohttp")  # with what they need in requirements-*.txt
CORES = sorted(os.sched_getaffinity(0))
LOADERS = max(1, min(2, len(CORES) - 2))  # processes, each on a core of its own; one core is left to the machine
TOKEN = json.loads((HERE / "http_bench.json").read_text())["gateway"]["auth"]["token"]
WORD = "A copepod is small. "  # the agent's
CONNECTIONS = 64
STREAMS, WORDS = 16, 500
IDLE = 1000  # connections
WARM_SECONDS = 0.2
LAST_CHUNK = b"0\r\n\r\n"
HARD_LIMIT = 290  # seconds for everything


class Plan(NamedTuple):
    turns: int
    seconds: float  # of one load
    starts: int


class Rate(NamedTuple):
    per_second: float
    cpu: float  # microseconds of the server for one
    busy: float  # share of its core that the server had
    load: float  # share of its time that the busiest load generator worked


class Size(NamedTuple):
    start: float  # ms from the start of the process to the first answer
    rss: float  # MiB
    pss: float
    connection: float  # KiB


class Server:
    """A server in a process of its own, on the last core."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.port = free_port()
        python = VENVS / name / "bin" / "python" if name in PEERS else Path(sys.executable)
        command = [str(python), str(HERE / "http_bench_peers.py"), name, str(self.port)]
        if name == "copepod":
            options = ["--config", str(HERE / "http_bench.json"), "--port", str(self.port)]
            command = [str(python), str(ROOT / "gateway.py"), "gateway", *options]
        self.log = open(Path(folder) / f"{name}.log", "wb")  # noqa: SIM115
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            env={"HOME": folder, "PATH": os.defpath},
            preexec_fn=lambda: pin(-1),
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def cpu(self) -> float:
        """Return the seconds of CPU that all its threads have had."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> tuple[float, float]:
        """Return RSS and PSS in KiB."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
        return float(values["Rss"]), float(values["Pss"])

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def free_port() -> int:
    """Return a free port below those that the system gives out: with one of these, a client can meet itself."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port")


def pin(core: int) -> None:
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def request(words: int, stream: bool, token: str = TOKEN) -> bytes:
    call = {"model": "copepod", "messages": [{"role": "user", "content": str(words)}], "stream": stream}
    body = json.dumps(call, separators=(",", ":")).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def exchange(connection: socket.socket, message: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer, its chunks joined."""
    connection.sendall(message)
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if b"content-length" in fields:
        while len(body) < int(fields[b"content-length"]):
            body += receive(connection)
        return status, body
    while not body.endswith(LAST_CHUNK):
        body += receive(connection)
    whole = b""
    while not body.startswith(b"0\r\n"):
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return status, whole


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 20)
    if not data:
        raise SystemExit("a server ended a connection in the middle of an answer")
    return data


def check(server: Server) -> None:
    """Refuse to measure a server that does not keep the contract."""
    with server.connect() as connection:
        status, body = exchange(connection, request(1, False))
        answer = json.loads(body)
        assert (status, answer["object"]) == (200, "chat.completion"), body
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": WORD}, body
        status, body = exchange(connection, request(WORDS, True))
        *chunks, done, end = body.decode().split("\n\n")
        assert (status, done, end) == (200, "data: [DONE]", ""), done
        deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
        assert [delta["content"] for delta in deltas if delta.get("content")] == [WORD] * WORDS, server.name
        assert server.name == "bare" or exchange(connection, request(1, False, "wrong"))[0] == 401, server.name


def load(server: Server, connections: int, message: bytes, seconds: float) -> Rate:
    """Ask again and again over `connections`; return the answers in a second."""
    chunked = b'"stream":true' in message
    length = 0 if chunked else answer_length(server, message)
    context = multiprocessing.get_context("fork")
    default = (signal.SIGTERM, signal.SIG_DFL)  # ours would make the pool wait for ever when it ends its children
    with context.Pool(LOADERS, signal.signal, default) as pool:
        tasks = [(n, server.port, connections // LOADERS, message, length, seconds) for n in range(LOADERS)]
        results = pool.starmap_async(drive, tasks, chunksize=1)
        time.sleep(WARM_SECONDS)
        start, cpu = time.perf_counter(), server.cpu()
        time.sleep(seconds)
        busy = (server.cpu() - cpu) / (time.perf_counter() - start)
        rates, loads = zip(*results.get(timeout=30), strict=True)
    return Rate(sum(rates), busy / sum(rates) * 1e6, busy, max(loads))


def drive(number: int, port: int, connections: int, message: bytes, length: int, seconds: float) -> tuple[float, float]:
    """Return answers in a second, by the bytes that came, and the share of the time that this took.

    It never sleeps: to wake it would be the server's work, several times that of an answer in a virtual machine.
    `length` is that of an answer in bytes, 0 when it ends with the last chunk.
    """
    pin(-2 - number)
    poll = select.epoll()
    links = {}
    for _ in range(connections):
        link = socket.create_connection(("127.0.0.1", port), timeout=10)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        links[link.fileno()] = link
        poll.register(link.fileno(), select.EPOLLIN)
        link.sendall(message)
    ends = dict.fromkeys(links, b"")
    lengths = dict.fromkeys(links, 0)
    whole = answers = got = 0
    idle = 0.0
    start = at = time.perf_counter() + WARM_SECONDS
    warm = True
    while at < start + seconds or (not answers and at < start + 10):
        ready = poll.poll(0)
        before, at = at, time.perf_counter()
        if warm and at >= start:
            warm, start, before, got, idle = False, at, at, 0, 0.0
        if not ready:
            idle += at - before
        for descriptor, _ in ready:
            link = links[descriptor]
            data = link.recv(1 << 18)
            if not data or (not lengths[descriptor] and not data.startswith(b"HTTP/1.1 200")):
                raise RuntimeError(f"under load came {data[:200]!r}")
            got += len(data)
            lengths[descriptor] += len(data)
            ends[descriptor] = (ends[descriptor] + data[-5:])[-5:]
            if lengths[descriptor] == length or (not length and ends[descriptor] == LAST_CHUNK):
                answers, whole = answers + 1, whole + lengths[descriptor]
                lengths[descriptor] = 0
                link.send(message)
    return got / (whole / answers) / (at - start), 1 - idle / (at - start)


def answer_length(server: Server, message: bytes) -> int:
    """Return the length of a whole answer that is not streamed, the same for all, in bytes."""
    with server.connect() as connection:
        connection.sendall(message)
        data = receive(connection)
        while b"}]" not in data or not data.rstrip().endswith(b"}"):
            data += receive(connection)
        return len(data)


def start(name: str, folder: str) -> tuple[Server, float]:
    """Return a server that has given its first answer, and how many ms that took from its start."""
    server = Server(name, folder)
    while time.perf_counter() < server.began + 20 and server.process.poll() is None:
        try:
            with server.connect() as connection:
                exchange(connection, request(1, False))
            return server, (time.perf_counter() - server.began) * 1e3
        except OSError:
            time.sleep(0.001)
    server.stop()
    raise SystemExit(f"{name} does not start: {Path(server.log.name).read_text()[-2000:]}")


def idle_connection(server: Server) -> float:
    """Return the KiB that a connection costs which has had an answer and waits."""
    before = server.memory()[0]
    links = [server.connect() for _ in range(IDLE)]
    for link in links:
        exchange(link, request(1, False))
    after = server.memory()[0]
    for link in links:
        link.close()
    return (after - before) / IDLE


def measure(names: list[str], plan: Plan, folder: str) -> None:
    servers: dict[str, Server] = {}
    sizes: dict[str, Size] = {}
    answers: dict[str, list[Rate]] = {name: [] for name in names}
    chunks: dict[str, list[Rate]] = {name: [] for name in names}
    try:
        starts: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(plan.starts):
            for name in names:
                servers[name], took = start(name, folder)
                starts[name].append(took)
                if turn < plan.starts - 1:
                    servers.pop(name).stop()
        for name, server in servers.items():
            rss, pss = server.memory()
            check(server)
            load(server, CONNECTIONS, request(1, False), 0.3)  # what a server makes once is no connection's
            connection = idle_connection(server)
            sizes[name] = Size(statistics.median(starts[name]), rss / 1024, pss / 1024, connection)
        for turn in range(plan.turns):
            for name, server in servers.items():
                print(f"\rturn {turn + 1} of {plan.turns}: {name:10}", end="", file=sys.stderr, flush=True)
                answers[name].append(load(server, CONNECTIONS, request(1, False), plan.seconds))
                stream = load(server, STREAMS, request(WORDS, True), plan.seconds)
                per_second, cpu = stream.per_second * WORDS, stream.cpu / WORDS
                chunks[name].append(stream._replace(per_second=per_second, cpu=cpu))
    finally:
        for server in servers.values():
            server.stop()
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    report(names, plan, sizes, answers, chunks)


def report(
    names: list[str], plan: Plan, sizes: dict[str, Size], answers: dict[str, list[Rate]], chunks: dict[str, list[Rate]]
) -> None:
    print(f"Python {sys.version.split()[0]}, median of {plan.turns} turns of {plan.seconds:g} s in alternation")
    for title, rates in (
        (f"answers, {CONNECTIONS} connections", answers),
        (f"SSE chunks, {STREAMS} streams of {WORDS}", chunks),
    ):
        print(f"\n{title:30}  per s   us CPU  busy  load  copepod's rate, and CPU, as a multiple")
        for name in names:
            rate, cpu, busy, own = (statistics.median(column) for column in zip(*rates[name], strict=True))
            pairs = list(zip(rates["copepod"], rates[name], strict=True))
            ratio = statistics.median(a.per_second / b.per_second for a, b in pairs)
            cost = statistics.median(a.cpu / b.cpu for a, b in pairs)
            limit = "  (the load generator was the limit)" if own > 0.9 else ""
            print(f"{name:27} {rate:9.0f} {cpu:8.2f} {busy:5.0%} {own:5.0%} {ratio:8.2f} {cost:8.2f}{limit}")
    print(f"\n{'idle':18} RSS MiB  PSS MiB  KiB per connection  ms to the first answer")
    for name in names:
        size = sizes[name]
        print(f"{name:18} {size.rss:7.1f} {size.pss:8.1f} {size.connection:19.1f} {size.start:23.0f}")


def setup() -> None:
    for name in PEERS:
        venv = [sys.executable, "-m", "venv", str(VENVS / name)]
        pip = [str(VENVS / name / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in (venv, [*pip, "-r", str(HERE / f"requirements-{name}.txt")]):
            subprocess.run(command, check=True)


def give_up(number: int, _: object) -> NoReturn:
    raise SystemExit(f"ended by {signal.Signals(number).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peers' virtual environments, then end")
    parser.add_argument("--quick", action="store_true", help="under a minute, and rougher")
    options = parser.parse_args()
    if options.setup:
        setup()
        return
    names = ["copepod", "bare", *(name for name in PEERS if (VENVS / name).exists())]
    for name in PEERS:
        if name not in names:
            print(f"without {name}: make its environment with --setup", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, give_up)  # so that the servers are stopped
    signal.alarm(HARD_LIMIT)
    if len(CORES) < 2:
        print("one core alone: the load takes it from the servers", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pin(-2)
        measure(names, Plan(3, 0.6, 2) if options.quick else Plan(7, 1.0, 5), folder)


if __name__ == "__main__":
    main()
