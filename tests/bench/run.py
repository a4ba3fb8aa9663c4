"""The whole gateway against its peers and its limits: `python run.py [--quick] [--only NAME...]`; Linux only.

Only the ratios of one run mean something. What it measures goes to `.venv-bench/results-*.json`, the page
`docs/performance.md` is made of all of these that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import contract
import measures
import report
import servers
from servers import Server

import environments
from environments import ROOT, VENVS, say

SERVERS = (
    *environments.OWN,
    *("streams", "protocol"),
    *("fastapi", "starlette", "aiohttp", "sanic", "microdot", "hypercorn", "granian", "node"),
)
GATEWAYS = (*environments.OWN, "litellm", "portkey")
PYTHONS = ("3.11", "3.12", "3.13")
HARD_LIMIT = 15 * 60  # seconds for everything


class Plan(NamedTuple):
    """How much is measured: turns of the servers in alternation, and the seconds of one load."""

    turns: int
    seconds: float
    fresh: int  # starts with nothing but idle connections, and as many with paced streams
    paced: float  # seconds
    relays: int  # turns of the gateways
    relay_seconds: float
    pythons: int  # turns on each Python


FULL = Plan(turns=7, seconds=0.8, fresh=3, paced=3.0, relays=5, relay_seconds=1.2, pythons=5)
QUICK = Plan(turns=2, seconds=0.3, fresh=1, paced=1.0, relays=2, relay_seconds=0.5, pythons=2)

Found = dict[str, dict[str, Any]]


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is measured, and how long it took."""
    start = time.monotonic()
    print(f"{what:40}", end="", file=sys.stderr, flush=True)
    yield
    say(f"{time.monotonic() - start:6.1f} s")


def measure_fresh(names: list[str], plan: Plan, folder: str, found: Found) -> None:
    """Start, size, idle connections and paced streams: each on a server that has done nothing else before."""
    for turn in range(plan.fresh):
        with step(f"start and memory, turn {turn + 1} of {plan.fresh}"):
            for name in names:
                for paced in (False, True):
                    measure_one_start(name, plan, folder, found[name], paced)


def measure_one_start(name: str, plan: Plan, folder: str, into: dict[str, Any], paced: bool) -> None:
    server, took = servers.start(name, folder)
    try:
        rss, pss = server.memory()
        for key, value in (("start", took), ("rss", rss / 1024), ("pss", pss / 1024)):
            into.setdefault(key, []).append(value)
        if paced:
            rate, stream = measures.paced(server, plan.paced)
            into.setdefault("paced", []).append(rate._asdict())
            into.setdefault("stream", []).append(stream)
        else:
            into.setdefault("connection", []).append(measures.idle_connection(server))
    finally:
        server.stop()


Measure = tuple[str, Callable[[Server], measures.Rate]]


def alternate(live: dict[str, Server], turns: int, loads: list[Measure], found: Found, what: str) -> None:
    """Each turn gives each server each load: what disturbs the machine for a while disturbs them all."""
    for turn in range(turns):
        with step(f"{what}, turn {turn + 1} of {turns}"):
            for key, load in loads:
                for name, server in live.items():
                    found[name].setdefault(key, []).append(load(server)._asdict())


def measure_loads(names: list[str], plan: Plan, folder: str, found: Found) -> None:
    loads: list[Measure] = [
        ("answers", lambda server: measures.answers(server, 64, plan.seconds)),
        ("chunks", lambda server: measures.chunks(server, 16, plan.seconds)),
        ("first", lambda server: measures.first(server, 1, plan.seconds / 2)),
        ("first16", lambda server: measures.first(server, 16, plan.seconds / 2)),
    ]
    live: dict[str, Server] = {}
    try:
        for name in names:
            live[name], _ = servers.start(name, folder)
            live[name].events = contract.check(name, live[name].port)
        alternate(live, plan.turns, loads, found, "answers and streams")
    finally:
        for server in live.values():
            server.stop()


def measure_gateways(names: list[str], plan: Plan, folder: str, found: Found) -> None:
    """Each in front of the same server, the bare streams one, which has a core of its own."""
    loads: list[Measure] = [
        ("one", lambda server: measures.answers(server, 1, plan.relay_seconds)),
        ("sixteen", lambda server: measures.answers(server, 16, plan.relay_seconds)),
        ("chunks", lambda server: measures.chunks(server, 16, plan.relay_seconds)),
    ]
    upstream, _ = servers.start("streams", folder, core=servers.UPSTREAM)
    live: dict[str, Server] = {}
    try:
        with step("gateways: start"):
            for name in names:
                address = f"http://127.0.0.1:{upstream.port}/v1"
                live[name], took = servers.start(name, folder, upstream=address)
                live[name].events = contract.check(name, live[name].port, live[name].fields)
                rss, pss = live[name].memory()
                found[name].update({"start": [took], "rss": [rss / 1024], "pss": [pss / 1024]})
        alternate(live, plan.relays, loads, found, "gateways")
        for name, server in live.items():
            found[name]["rss_after"] = [server.memory()[0] / 1024]
    finally:
        for server in (*live.values(), upstream):
            server.stop()


def find_pythons() -> dict[str, str]:
    """Return the Pythons that are here, by their version."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for wanted in PYTHONS:
        for python in [*map(str, sorted(pyenv.glob(f"{wanted}.*/bin/python"), reverse=True)), f"python{wanted}"]:
            try:
                asked = [python, "-c", "import platform; print(platform.python_version())"]
                version = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
            except OSError:
                continue
            if version.startswith(wanted):
                found[version] = python
                break
    return found


def measure_pythons(plan: Plan, folder: str, found: Found) -> None:
    """The checkout and the bare streams on each Python, so that each is compared on its own."""
    loads: list[Measure] = [
        ("answers", lambda server: measures.answers(server, 64, plan.seconds)),
        ("chunks", lambda server: measures.chunks(server, 16, plan.seconds)),
    ]
    config = str(servers.PEERS / "copepod.json")
    live: dict[str, Server] = {}
    try:
        for version, python in find_pythons().items():
            ours = [python, str(ROOT / "gateway.py"), "gateway", "--config", config, "--port"]
            bare = [python, str(servers.PEERS / "limits.py"), "streams"]
            for name, arguments in (("copepod", ours), ("streams", bare)):
                key = f"{name} {version}"
                live[key], _ = servers.start(name, folder, arguments=arguments)
                live[key].events = contract.check(name, live[key].port)
                found[key] = {}
        alternate(live, plan.pythons, loads, found, "Pythons")
    finally:
        for server in live.values():
            server.stop()


def about(plan: Plan, quick: bool) -> dict[str, Any]:
    head = [shutil.which("git") or "git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "node": environments.version("node") if environments.node() else "",
        "cores": len(servers.CORES),
        "quick": quick,
        "plan": plan._asdict(),
    }


def here(names: tuple[str, ...], only: list[str]) -> list[str]:
    """Return those of `names` that can be measured, and say of the others why not."""
    wanted = [name for name in names if not only or name in only or name == "copepod"]
    for name in wanted:
        if why := environments.missing(name):
            say(f"without {name}: {why}")
    return [name for name in wanted if not environments.missing(name)]


def installed(names: list[str]) -> Found:
    """Return of each what there is on the disk."""
    found: Found = {}
    for name in names:
        mib, packages = environments.size(name)
        found[name] = {"mib": mib, "packages": packages, "version": environments.version(name)}
    return found


def give_up(number: int, _: object) -> NoReturn:
    raise SystemExit(f"ended by {signal.Signals(number).name}")


def prepare() -> None:
    if not environments.LOAD.exists():
        raise SystemExit("nothing is installed to measure against: make bench-setup")
    if not environments.is_current():
        say("copepod is installed anew from this checkout")
        environments.install_own()
    if len(servers.CORES) < 3:
        say(
            f"{len(servers.CORES)} cores: the load or the upstream takes time from the servers, no figure is worth much"
        )
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, give_up)  # so that the servers are stopped
    signal.alarm(HARD_LIMIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three minutes, and rougher: nothing is kept of it")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="copepod and these alone")
    options = parser.parse_args()
    prepare()
    plan = QUICK if options.quick else FULL
    names, gateways = here(SERVERS, options.only), here(GATEWAYS, options.only)
    result: dict[str, Any] = {"about": about(plan, options.quick)}
    result["servers"], result["gateways"] = installed(names), installed(gateways)
    result["pythons"] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        servers.pin(0)
        measure_fresh(names, plan, folder, result["servers"])
        measure_loads(names, plan, folder, result["servers"])
        measure_gateways(gateways, plan, folder, result["gateways"])
        measure_pythons(plan, folder, result["pythons"])
    say(f"{(time.monotonic() - start) / 60:.1f} minutes")
    kind = "quick" if options.quick or options.only else "results"
    file = VENVS / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(result, indent=1))
    print(report.text([file]))
    if kind == "results":
        report.write()


if __name__ == "__main__":
    main()
