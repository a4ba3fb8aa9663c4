"""The page `docs/performance.md` and its picture, of the results of one or more runs: `python report.py [FILE...]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import picture

from environments import ROOT, VENVS

PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
BY_HAND = "<!-- What follows is written by hand, and kept. -->"
PYTHON_PEERS = ("fastapi", "starlette", "aiohttp", "sanic", "microdot", "hypercorn", "granian")
TITLES = {
    "copepod[fast]": "copepod[fast], with uvloop",
    "streams": "*bare asyncio streams*",
    "protocol": "*bare asyncio.Protocol*",
    "fastapi": "FastAPI, uvicorn[standard]",
    "starlette": "Starlette, uvicorn[standard]",
    "hypercorn": "hypercorn, uvloop, no framework",
    "granian": "granian, uvloop, no framework",
    "node": "node:http",
    "litellm": "LiteLLM proxy",
    "portkey": "Portkey gateway",
}
SLOW = 0.85  # of the pace, below which a server has fallen behind; a timer that is late by a millisecond makes 0.95

Run = dict[str, Any]


class Ratio(NamedTuple):
    """Of copepod's figure to another's, over the turns: the median and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self == (1, 1, 1):
            return "1"
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


class Goal(NamedTuple):
    what: str
    levels: tuple[float | None, float, float]  # floor, target, moonshot
    value: Callable[[Run], float | None]
    at_most: bool = False

    def reached(self, value: float) -> str:
        """Return the highest level that `value` keeps."""
        names = ("floor", "target", "moonshot")
        kept = [
            name
            for name, level in zip(names, self.levels, strict=True)
            if level is not None and (value <= level if self.at_most else value >= level)
        ]
        return kept[-1] if kept else "none"


def number(value: float | None) -> str:
    """Return three digits that count."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def values(runs: Iterable[Run], part: str, name: str, key: str, field: str = "") -> list[float]:
    """Return a figure of all turns of all runs."""
    found = [value for run in runs for value in run[part].get(name, {}).get(key, ())]
    found = [value[field] if field else value for value in found]
    return [value for value in found if value is not None]


def middle(runs: Iterable[Run], part: str, name: str, key: str, field: str = "") -> float | None:
    found = values(runs, part, name, key, field)
    return statistics.median(found) if found else None


def ratio(runs: Iterable[Run], part: str, name: str, key: str, field: str = "", ours: str = "copepod") -> Ratio | None:
    """Return that of our figure to that of `name`, turn by turn."""
    pairs: list[float] = []
    for run in runs:
        both = values([run], part, ours, key, field), values([run], part, name, key, field)
        pairs += [our / their for our, their in zip(*both, strict=False) if their]
    if not pairs:
        return None
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(statistics.median(pairs), low, high)


def against(name: str, key: str, field: str = "", part: str = "servers") -> Callable[[Run], float | None]:
    """Return what takes from a run the ratio of copepod's figure to that of `name`."""

    def value(run: Run) -> float | None:
        found = ratio([run], part, name, key, field)
        return found.median if found else None

    return value


def own(key: str) -> Callable[[Run], float | None]:
    return lambda run: middle([run], "servers", "copepod", key)


def against_litellm(key: str) -> Callable[[Run], float | None]:
    return against("litellm", key, "per_second", "gateways")


def against_best_python(run: Run) -> float | None:
    rates = {name: middle([run], "servers", name, "chunks", "per_second") or 0.0 for name in PYTHON_PEERS}
    return against(max(rates, key=lambda name: rates[name]), "chunks", "per_second")(run)


GOALS = (
    Goal("answers a second, 64 connections, against FastAPI", (3, 4.5, 6), against("fastapi", "answers", "per_second")),
    Goal("... against Sanic", (1.3, 2.2, 3), against("sanic", "answers", "per_second")),
    Goal("... against node:http", (0.8, 1.2, 1.6), against("node", "answers", "per_second")),
    Goal("... against bare asyncio streams", (0.25, 0.4, 0.55), against("streams", "answers", "per_second")),
    Goal("SSE chunks a second, 16 streams, against the best Python peer", (1.2, 1.7, 2.2), against_best_python),
    Goal("... against bare asyncio.Protocol", (0.55, 0.75, 0.9), against("protocol", "chunks", "per_second")),
    Goal("first byte of a stream, against Sanic", (0.9, 0.55, 0.4), against("sanic", "first", "first"), True),
    Goal("500 paced streams: CPU a chunk against FastAPI", (0.8, 0.6, 0.45), against("fastapi", "paced", "cpu"), True),
    Goal("... against node:http", (None, 1.0, 0.8), against("node", "paced", "cpu"), True),
    Goal("idle memory (RSS) against microdot", (1.25, 1.1, 1.03), against("microdot", "rss"), True),
    Goal("KiB for an idle connection", (7.7, 4, 3.4), own("connection"), True),
    Goal("KiB for an open SSE stream", (12, 10, 7), own("stream"), True),
    Goal("start to first answer against microdot", (2, 1.3, 1.1), against("microdot", "start"), True),
    Goal("as a gateway, against LiteLLM: answers a second, 1 at a time", (20, 50, 100), against_litellm("one")),
    Goal("... 16 at a time", (20, 50, 100), against_litellm("sixteen")),
    Goal("... chunks a second", (10, 25, 35), against_litellm("chunks")),
)  # fmt: skip


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def title(name: str) -> str:
    return TITLES.get(name, name)


def names_of(runs: list[Run], part: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run[part]))


def goals(runs: list[Run]) -> str:
    rows = []
    for goal in GOALS:
        found = [goal.value(run) for run in runs]
        order = ("none", "floor", "target", "moonshot")
        kept = [goal.reached(value) for value in found if value is not None]
        worst = min(kept, key=order.index) if kept else "not measured"
        sign = "≤ " if goal.at_most else "≥ "
        levels = ["" if level is None else f"{sign}{level:g}" for level in goal.levels]
        rows.append([goal.what, *levels, *map(number, found), worst])
    return table(["", "floor", "target", "moonshot", *(f"run {n + 1}" for n in range(len(runs))), "kept in all"], rows)


def rates(runs: list[Run], key: str, what: str) -> str:
    rows = []
    for name in names_of(runs, "servers"):
        seen = [middle(runs, "servers", name, key, field) for field in ("per_second", "cpu")]
        multiples = [ratio(runs, "servers", name, key, field) for field in ("per_second", "cpu")]
        limit = " (the load was the limit)" if (middle(runs, "servers", name, key, "load") or 0) > 0.9 else ""
        rows.append([title(name) + limit, *map(number, seen), *(str(one or "") for one in multiples)])
    return table(["", f"{what} a second", "µs CPU", "copepod's rate, as a multiple", "copepod's CPU"], rows)


def firsts(runs: list[Run]) -> str:
    rows = []
    for name in names_of(runs, "servers"):
        keys = (("first", "first"), ("first", "first_p99"), ("first16", "first"))
        seen = [number(middle(runs, "servers", name, *key)) for key in keys]
        rows.append([title(name), *seen, str(ratio(runs, "servers", name, "first", "first") or "")])
    return table(["µs", "one at a time", "p99", "16 at a time", "copepod's, as a multiple of it"], rows)


def paced(runs: list[Run]) -> str:
    rows = []
    for name in names_of(runs, "servers"):
        rate, busy, cpu = (middle(runs, "servers", name, "paced", key) or 0 for key in ("per_second", "busy", "cpu"))
        behind = " (falls behind)" if rate < SLOW * 25_000 or busy > 0.97 else ""
        multiple = str(ratio(runs, "servers", name, "paced", "cpu") or "")
        rows.append([title(name) + behind, number(rate / 500), f"{busy:.0%}", number(cpu), multiple])
    head = ["", "chunks a second, of each stream", "of its core", "µs CPU for a chunk", "copepod's CPU, as a multiple"]
    return table(head, rows)


def sizes(runs: list[Run], part: str) -> str:
    memory = {"rss": "RSS, MiB", "pss": "PSS, MiB"}
    memory |= (
        {"rss_after": "RSS afterwards"}
        if part == "gateways"
        else {"connection": "KiB a connection", "stream": "KiB a stream"}
    )
    rows = []
    for name in names_of(runs, part):
        seen = [number(middle(runs, part, name, key)) for key in memory]
        if part == "servers" and seen[2] == "":
            seen[2] = "closes"
        last = next(run[part][name] for run in reversed(runs) if name in run[part])
        disk = [number(last["mib"]), str(last["packages"])] if last["packages"] else ["", ""]
        rows.append(
            [f"{title(name)} {last['version']}".strip(), *seen, number(middle(runs, part, name, "start")), *disk]
        )
    return table(["", *memory.values(), "start, ms", "MiB on disk", "packages"], rows)


def gateways(runs: list[Run]) -> str:
    rows = []
    for name in names_of(runs, "gateways"):
        cells = []
        for key in ("one", "sixteen", "chunks"):
            cells.append(number(middle(runs, "gateways", name, key, "per_second")))
            cells.append(str(ratio(runs, "gateways", name, key, "per_second") or ""))
        cells.append(number(middle(runs, "gateways", name, "sixteen", "cpu")))
        rows.append([title(name), *cells])
    head = ["", "answers a second, 1 at a time", "copepod's, as a multiple", "16 at a time", "copepod's"]
    return table([*head, "chunks a second", "copepod's", "µs CPU an answer"], rows)


def pythons(runs: list[Run]) -> str:
    rows = []
    for name in names_of(runs, "pythons"):
        kind, _, version = name.partition(" ")
        if kind != "copepod":
            continue
        cells = []
        for key in ("answers", "chunks"):
            cells += [number(middle(runs, "pythons", name, key, field)) for field in ("per_second", "cpu")]
            cells.append(str(ratio(runs, "pythons", f"streams {version}", key, "per_second", ours=name) or ""))
        rows.append([version, *cells])
    head = ["Python", "answers a second", "µs CPU", "of bare streams' rate"]
    return table([*head, "chunks a second", "µs CPU", "of bare streams' rate"], rows)


METHOD = """\
`make bench-setup` installs each peer in a clean virtual environment below `.venv-bench/`, `make bench` measures
(Linux, a C compiler, four cores that nobody else uses), and makes this page of all results that lie there.

* Every server keeps the same contract, and is checked before it is measured: bearer token, JSON body, the words of an
  async generator in OpenAI's shape, whole or as server-sent events. The bare ones check nothing and send canned bytes.
* Copepod is the whole gateway as `pip install` leaves it, with its defaults: token auth, limits, request ids, and an
  access log to a file. Only `maxConcurrent` is raised, for the 500 streams. The others write no access log.
* Each server is one process on one core. The load, `tests/bench/load.c`, has another and never sleeps; the server
  behind the gateways (the bare streams one) has a third.
* The servers take turns. A ratio is that of one turn's two figures; shown are the median and quartiles of all turns.
* `µs CPU` is what the server's threads and processes used for one answer or chunk: steadier than the rate.
* Memory, connections, paced streams and start are measured on servers that have just been started, nothing but a short
  load before them. A stream's KiB contain its connection's. `start` is from the process's to the first answer.
* The first byte is that of the first event: a head that is sent early does not count.
"""


def text(files: list[Path]) -> str:
    """Return the page, up to what is written by hand."""
    runs = [json.loads(file.read_text()) for file in files]
    last = runs[-1]["about"]
    count = f"{len(runs)} {'runs' if len(runs) > 1 else 'run'} of `make bench`"
    node = f", node {last['node'].removeprefix('v')}" if last["node"] else ""
    parts = [
        "# Performance\n",
        f"{count} on {last['cores']} cores, Python {last['python']}{node}, {last['date'][:10]}.",
        "Only ratios mean something: another machine has other figures.\n",
        "![Copepod's rates as multiples of its peers'](performance.svg)\n",
        "## The goals, and each run\n\nA floor is the least that may land, a moonshot is the next thing to try.\n",
        goals(runs),
        f"## Answers, 64 connections\n\n{rates(runs, 'answers', 'answers')}",
        f"## SSE chunks, 16 streams of 500 words\n\n{rates(runs, 'chunks', 'chunks')}",
        f"## First byte of a stream\n\n{firsts(runs)}",
        f"## 500 streams of 50 chunks a second\n\nA timer that is late by a millisecond makes 48.\n\n{paced(runs)}",
        f"## Size and start\n\n{sizes(runs, 'servers')}",
        f"## As a gateway in front of the same server\n\n{gateways(runs)}\n{sizes(runs, 'gateways')}",
        f"## Pythons\n\nThe checkout against the bare streams server of the same Python.\n\n{pythons(runs)}",
        f"## How it is measured\n\n{METHOD}",
    ]
    return "\n".join(parts)


def bars(files: list[Path]) -> str:
    """Return the picture: copepod's rates as multiples of the others', the median of all turns."""
    runs = [json.loads(file.read_text()) for file in files]
    panels = []
    for heading, part, key in (
        ("Answers a second, 64 connections", "servers", "answers"),
        ("SSE chunks a second, 16 streams", "servers", "chunks"),
        ("As a gateway: answers a second, 16 at a time", "gateways", "sixteen"),
        ("As a gateway: SSE chunks a second, 16 streams", "gateways", "chunks"),
    ):
        rows = []
        for name in names_of(runs, part):
            found = ratio(runs, part, name, key, "per_second")
            if found and not name.startswith("copepod"):
                rows.append(picture.Bar(title(name).strip("*"), found.median, found.low, found.high))
        if rows:
            panels.append(picture.Panel(heading, sorted(rows, key=lambda bar: bar.value)))
    return picture.draw("Copepod's rate as a multiple of others'", panels)


def write(files: list[Path] | None = None) -> None:
    """Make the page and the picture of `files`, or of all full runs; what is written by hand below stays."""
    files = files or sorted(VENVS.glob("results-*.json"))
    if not files:
        raise SystemExit("there are no results: make bench")
    before = PAGE.read_text() if PAGE.exists() else ""
    _, mark, by_hand = before.partition(BY_HAND)
    PAGE.write_text(f"{text(files)}\n{BY_HAND}{by_hand or chr(10)}" if mark else f"{text(files)}\n{BY_HAND}\n")
    PICTURE.write_text(bars(files))
    print(f"{PAGE} of {len(files)} runs", file=sys.stderr)


if __name__ == "__main__":
    write([Path(name) for name in sys.argv[1:]])
