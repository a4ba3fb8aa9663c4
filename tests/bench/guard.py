"""Has the gateway become much slower? Its CPU time for an answer, and for an SSE chunk, as a multiple of bare streams'.

`python guard.py` gives both servers the same work in many short turns and ends with 1 when a median is beyond its
limit, twice in a row. The margin is wide: it sees a halving of the speed, and not another machine, another Python or
a busy neighbour. When the gateway gets faster, lower the limits.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import sys
import tempfile
from pathlib import Path

import contract
import servers
from servers import Server

# Times the CPU time of bare streams, and the bytes of the request, and how often each connection asks in a turn.
LIMITS = {"answer": 5.2, "SSE chunk": 1.1}  # measured were 3.6 and 0.65, and twice that with half the speed
MESSAGES = {
    "answer": (contract.request(1, stream=False), 80),
    "SSE chunk": (contract.request(contract.WORDS, stream=True), 1),
}
TURNS = 31
CONNECTIONS = 16


class Work:
    """Connections to a server, over which each turn asks the same."""

    def __init__(self, server: Server, message: bytes, times: int) -> None:
        self.server, self.message, self.times = server, message, times
        self.streamed = b'"stream":true' in message
        self.length = contract.ask(server.port, message).length
        self.poll = select.epoll()
        self.links: dict[int, socket.socket] = {}
        for _ in range(CONNECTIONS):
            link = contract.connect(server.port)
            self.links[link.fileno()] = link
            self.poll.register(link.fileno(), select.EPOLLIN)

    def close(self) -> None:
        self.poll.close()
        for link in self.links.values():
            link.close()

    def turn(self) -> float:
        """Return the seconds of CPU that the server takes for all the answers."""
        start = self.server.cpu()
        left = dict.fromkeys(self.links, self.times)
        missing = dict.fromkeys(self.links, self.length)  # bytes of the answer that is on its way
        for link in self.links.values():
            link.sendall(self.message)
        while left:
            for descriptor, _ in self.poll.poll():
                data = self.links[descriptor].recv(1 << 18)
                if not data:
                    raise SystemExit(f"{self.server.name} has ended a connection: {self.server.said()}")
                missing[descriptor] -= len(data)
                if not (data.endswith(contract.LAST_CHUNK) if self.streamed else missing[descriptor] == 0):
                    continue
                missing[descriptor] = self.length
                left[descriptor] -= 1
                if left[descriptor]:
                    self.links[descriptor].sendall(self.message)
                else:
                    del left[descriptor]
        return self.server.cpu() - start


def share_core(live: list[Server]) -> None:
    """Let client and server run one after the other, on one core, and neither break into the other's time.

    So the server always finds as many requests at once. On two cores it finds the fewer the slower the client is, and
    what it costs to wake it up for one would be the most of an answer of bare streams.
    """
    servers.pin(servers.SERVER)
    for process in (0, *(server.process.pid for server in live)):
        os.sched_setscheduler(process, os.SCHED_BATCH, os.sched_param(0))


def measure(live: list[Server]) -> dict[str, list[float]]:
    """Return the ratios of the turns: the gateway's CPU time to that of bare streams, for each kind of answer."""
    found: dict[str, list[float]] = {what: [] for what in MESSAGES}
    work = {what: [Work(server, *MESSAGES[what]) for server in live] for what in MESSAGES}
    for _ in range(TURNS):
        for what, (ours, bare) in work.items():
            found[what].append(ours.turn() / bare.turn())
    for pair in work.values():
        for one in pair:
            one.close()
    return found


def check(found: dict[str, list[float]]) -> list[str]:
    """Print what was found, and return what is beyond its limit."""
    failures = []
    for what, ratios in found.items():
        seen, limit = statistics.median(ratios), LIMITS[what]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"CPU for an {what}: {seen:.2f} times bare streams' (quartiles {low:.2f}, {high:.2f}); at most {limit:g}")
        if seen > limit:
            failures.append(f"the gateway has become slower: {seen:.2f} times for an {what}, at most {limit:g}")
    return failures


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
            share_core(live)
            failures = check(measure(live)) and check(measure(live))  # noise is not there twice
        finally:
            for server in live:
                server.stop()
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
