"""What is measured on a server that runs: loads, its memory, its paced streams."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import contract
from servers import CORES, LOADER, Server

import environments

WARM = 0.2  # seconds of a load before it is measured
IDLE = 1000  # connections, of which each has had an answer
PACED, PAUSE = 500, 20  # streams, and ms between two words
OPENING = 1.2  # seconds: a stream is opened every millisecond


class Rate(NamedTuple):
    per_second: float
    cpu: float  # microseconds of the server for one
    busy: float  # share of its core that the server had
    load: float  # share of its time that the load generator worked
    first: float = 0.0  # median microseconds to the first event of a stream
    first_p99: float = 0.0


def load(
    server: Server, connections: int, message: bytes, seconds: float, *, warm: float = WARM, again: bool = True
) -> tuple[dict[str, Any], float, tuple[float, float]]:
    """Return what the load generator says, the share of its core that the server had, and its memory at the end."""
    file = Path(server.log.name).parent / "request"
    file.write_bytes(message)
    mode, core = "again" if again else "once", str(CORES[LOADER % len(CORES)])
    numbers = (server.port, connections, warm, seconds)
    process = subprocess.Popen(
        [str(environments.LOAD), mode, *map(str, numbers), core, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    times = []
    for _ in ("begin", "end"):
        process.stdout.readline()
        times.append((server.cpu(), time.perf_counter()))
    said = process.stdout.readline()
    memory = server.memory()
    _, error = process.communicate()  # which ends it
    if process.returncode:
        raise SystemExit(f"{server.name}: {error}{server.said()}")
    (cpu, start), (cpu_end, end) = times
    return json.loads(said), (cpu_end - cpu) / (end - start), memory


def answers(server: Server, connections: int, seconds: float) -> Rate:
    """Return the rate of answers that are not streamed."""
    message = contract.request(1, False, fields=server.fields)
    said, busy, _ = load(server, connections, message, seconds)
    rate = said["answers"] / said["seconds"]
    return Rate(rate, busy / rate * 1e6 if rate else 0.0, busy, said["load"])


def chunks(server: Server, connections: int, seconds: float) -> Rate:
    """Return the rate of words of long streams, by the events that came."""
    message = contract.request(contract.WORDS, True, fields=server.fields)
    said, busy, _ = load(server, connections, message, seconds)
    rate = said["events"] / said["seconds"] * contract.WORDS / server.events
    return Rate(rate, busy / rate * 1e6 if rate else 0.0, busy, said["load"])


def first(server: Server, connections: int, seconds: float) -> Rate:
    """Return the rate of streams of one word, and how long their first event takes."""
    message = contract.request(1, True, fields=server.fields)
    said, busy, _ = load(server, connections, message, seconds)
    rate = said["answers"] / said["seconds"]
    return Rate(rate, busy / rate * 1e6 if rate else 0.0, busy, said["load"], said["first"], said["first_p99"])


def paced(server: Server, seconds: float) -> tuple[Rate, float]:
    """Return the rate of events of PACED open streams, each a word every PAUSE ms, and the KiB that one takes."""
    load(server, 16, contract.request(5, True), 0.3)  # what a server makes once is no stream's
    before = server.memory()[0]
    words = int((OPENING + seconds + 5) * 1000 / PAUSE)
    said, busy, memory = load(
        server, PACED, contract.request(f"{words} {PAUSE}", True), seconds, warm=OPENING, again=False
    )
    rate = said["events"] / said["seconds"]
    return Rate(rate, busy / rate * 1e6, busy, said["load"]), (memory[0] - before) / PACED


def idle_connection(server: Server) -> float | None:
    """Return the KiB that a connection takes which has had an answer and waits; None when the server closes it."""
    message = contract.request(1, False)
    load(server, 64, message, 0.3)  # what a server makes once is no connection's
    before = server.memory()[0]
    links = [contract.connect(server.port) for _ in range(IDLE)]
    try:
        contract.exchange(links[0], message)
        for link in links:
            contract.exchange(link, message)
    except ConnectionError:
        return None
    finally:
        after = server.memory()[0]
        for link in links:
            link.close()
    return (after - before) / IDLE
