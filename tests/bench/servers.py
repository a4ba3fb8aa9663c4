"""A server of the bench: a process on one core, its CPU time, its memory, its start."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import contract

import environments
from environments import HERE

PEERS = HERE / "peers"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
SERVER, LOADER, UPSTREAM = -1, -2, -3  # the core of each; the bench itself has the first
PATIENCE = 90  # seconds for a start: LiteLLM's proxy takes ten on a machine that does nothing else
PORTKEY = "x-portkey-provider: openai\r\nx-portkey-custom-host: {}\r\n"


def pin(core: int) -> None:
    """Keep this process, and those that it starts, on one core."""
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def free_port() -> int:
    """Return a free port below those that the system gives out: with one of these, a client can meet itself."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port")


def command(name: str, port: int, upstream: str) -> list[str]:
    """Return the command that serves on `port`, as one process or thread of work."""
    python = environments.python_of(name)
    here = str(python.parent)
    number = str(port)
    if name in environments.OWN:
        config = PEERS / ("relay.json" if upstream else "copepod.json")
        return [f"{here}/copepod", "gateway", "--config", str(config), "--port", number]
    if name in ("fastapi", "starlette"):
        return [str(python), str(PEERS / "asgi.py"), name, number]
    if name == "hypercorn":
        options = ["--workers", "0", "--worker-class", "uvloop", "--backlog", "1024", "--log-level", "warning"]
        return [f"{here}/hypercorn", *options, "--bind", f"127.0.0.1:{number}", "asgi:plain"]
    if name == "granian":
        options = ["--interface", "asgi", "--workers", "1", "--runtime-threads", "1", "--loop", "uvloop", "--no-ws"]
        return [f"{here}/granian", *options, "--no-access-log", "--log-level", "error", "--port", number, "asgi:plain"]
    if name == "node":
        return [environments.node() or "node", str(PEERS / "node.js"), number]
    if name == "litellm":
        models = str(PEERS / "litellm.yaml")
        return [f"{here}/litellm", "--config", models, "--host", "127.0.0.1", "--port", number, "--num_workers", "1"]
    if name == "portkey":
        script = environments.PORTKEY / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        return [environments.node() or "node", str(script), f"--port={number}", "--headless"]
    script = PEERS / ("limits.py" if name in environments.LIMITS else "frameworks.py")
    return [str(python), str(script), name, number]


class Server:
    """A server in a process of its own, on one core, with a home of its own."""

    def __init__(self, name: str, folder: str, arguments: list[str], port: int, core: int, upstream: str = "") -> None:
        self.name, self.port = name, port
        self.fields = PORTKEY.format(upstream) if name == "portkey" else ""
        self.events = 0  # of a stream, once it is checked
        home = Path(folder) / f"{name}-{port}"
        home.mkdir()
        self.log = open(home / "log", "w+b")  # noqa: SIM115
        environment = {
            "HOME": str(home),
            "PATH": os.pathsep.join(filter(None, (os.defpath, os.path.dirname(shutil.which("node") or "")))),
            "PYTHONPATH": str(PEERS) if name in ("hypercorn", "granian") else "",  # they look for asgi.py there
            "BENCH_UPSTREAM": upstream,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would fetch a list of prices otherwise
            "LITELLM_LOG": "ERROR",
            "REPEATED_STREAMING_CHUNK_LIMIT": "1000000",  # it would end a stream of equal words
            "NODE_ENV": "production",
        }
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            arguments,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            cwd=home,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: pin(core),
        )

    def stop(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def processes(self) -> list[int]:
        """Return the ids of the process and of all below it."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found.extend(map(int, children.read_text().split()))
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU that all its threads have had."""
        tasks = (task for pid in self.processes() for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> tuple[float, float]:
        """Return RSS and PSS in KiB."""
        rss = pss = 0.0
        for pid in self.processes():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            values = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
            rss, pss = rss + float(values["Rss"]), pss + float(values["Pss"])
        return rss, pss

    def said(self) -> str:
        """Return the end of what it has printed."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-2000:]


def start(
    name: str, folder: str, *, core: int = SERVER, upstream: str = "", arguments: list[str] | None = None
) -> tuple[Server, float]:
    """Return a server that has given its first answer, and how many ms that took from its start."""
    port = free_port()
    whole = command(name, port, upstream) if arguments is None else [*arguments, str(port)]
    server = Server(name, folder, whole, port, core, upstream)
    message = contract.request(1, False, fields=server.fields)
    while time.perf_counter() < server.began + PATIENCE and server.process.poll() is None:
        with contextlib.suppress(OSError):
            answer = contract.ask(port, message)
            if answer.status == 200:
                return server, (time.perf_counter() - server.began) * 1e3
        time.sleep(0.001)
    said = server.said()
    server.stop()
    raise SystemExit(f"{name} does not start: {said}")
