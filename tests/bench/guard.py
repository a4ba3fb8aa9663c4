"""Has the gateway become much slower? Its CPU time for an answer, and for an SSE chunk, as a multiple of bare streams'.

`python guard.py` measures both servers in alternation for about a quarter of a minute and ends with 1 when a median is
beyond its limit, twice in a row. The margin is wide: it sees a halving of the speed, and not another machine, another
Python or a busy neighbour. When the gateway gets faster, lower the limits.
"""

from __future__ import annotations

import select
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import contract
import servers
from servers import Server

LIMITS = {"answer": 4.5, "SSE chunk": 2.0}  # times the CPU time of bare streams; measured were 3.2 and 1.35
TURNS = 11
SECONDS = 0.25  # of one load
WARM = 0.05
CONNECTIONS = 16
MESSAGES = {
    "answer": contract.request(1, stream=False),
    "SSE chunk": contract.request(contract.WORDS, stream=True),
}
# A client that waits is woken by the server, at its cost: with a core of its own it does not wait.
WAIT = 0.0 if len(servers.CORES) > 1 else 0.01


def cost(server: Server, message: bytes, length: int) -> float:
    """Return the microseconds of the server for a byte that it sends, while it is asked again and again."""
    streamed = message == MESSAGES["SSE chunk"]
    poll = select.epoll()
    links: dict[int, socket.socket] = {}
    left: dict[int, int] = {}  # bytes of the answer that is on its way
    for _ in range(CONNECTIONS):
        link = contract.connect(server.port)
        links[link.fileno()] = link
        left[link.fileno()] = length
        poll.register(link.fileno(), select.EPOLLIN)
        link.sendall(message)
    got, cpu, end = 0, 0.0, 0.0
    warm = time.perf_counter() + WARM
    while not end or time.perf_counter() < end:
        if not end and time.perf_counter() >= warm:
            got, cpu, end = 0, server.cpu(), time.perf_counter() + SECONDS
        for descriptor, _ in poll.poll(WAIT):
            data = links[descriptor].recv(1 << 18)
            if not data:
                raise SystemExit(f"{server.name} has ended a connection: {server.said()}")
            got += len(data)
            left[descriptor] -= len(data)
            if data.endswith(contract.LAST_CHUNK) if streamed else not left[descriptor]:
                left[descriptor] = length
                links[descriptor].sendall(message)
    used = server.cpu() - cpu
    for link in links.values():
        link.close()
    poll.close()
    return used / got * 1e6


def measure(live: list[Server]) -> dict[str, list[float]]:
    """Return the ratios of the turns: the gateway's CPU time to that of bare streams, for each kind of answer."""
    found: dict[str, list[float]] = {what: [] for what in MESSAGES}
    lengths = {(s, what): contract.ask(s.port, message).length for s in live for what, message in MESSAGES.items()}
    for _ in range(TURNS):
        for what, message in MESSAGES.items():
            # Each in bytes that come, times the bytes of a whole answer: a turn may end in the middle of one.
            ours, bare = (cost(s, message, lengths[s, what]) * lengths[s, what] for s in live)
            found[what].append(ours / bare)
    return found


def main() -> None:
    if not Path("/proc/self/task").is_dir() or not Path("/proc/self/schedstat").exists():
        print("no guard: this system does not say what CPU time a thread has had")
        return
    ours = [str(servers.PEERS.parents[2] / "gateway.py"), "gateway", "--config", str(servers.PEERS / "copepod.json")]
    bare = [str(servers.PEERS / "limits.py"), "streams"]
    live: list[Server] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, arguments in (("copepod", [*ours, "--port"]), ("streams", bare)):
                live.append(servers.start(name, folder, arguments=[sys.executable, *arguments])[0])
                contract.check(name, live[-1].port)
            servers.pin(servers.LOADER)
            failures = check(measure(live)) and check(measure(live))  # noise is not there twice
        finally:
            for server in live:
                server.stop()
    if failures:
        raise SystemExit("\n".join(failures))


def check(found: dict[str, list[float]]) -> list[str]:
    """Print what was found, and return what is beyond its limit."""
    failures = []
    for what, ratios in found.items():
        seen, limit = statistics.median(ratios), LIMITS[what]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns"
        print(f"CPU for an {what}: {seen:.2f} times that of bare streams ({spread}); at most {limit:g}", flush=True)
        if seen > limit:
            failures.append(f"the gateway has become slower: {seen:.2f} times for an {what}, at most {limit:g}")
    return failures


if __name__ == "__main__":
    main()
