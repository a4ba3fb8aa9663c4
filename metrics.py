"""What is counted of a gateway, and that as text: Prometheus' exposition format 0.0.4."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TOKENS = 1 << 32  # of one run; a server that tells more tells nonsense

# What a stranger sends never becomes a label: it is one of these, or "other".
ROUTES = {"/", "/v1/chat/completions", "/v1/models", "/healthz", "/readyz", "/metrics"}
METHODS = {"GET", "HEAD", "POST", "OPTIONS"}
OTHER = "other"

BATCH = 256  # runs of an agent that are counted together, which is cheaper than one by one

# Upper bounds of the histograms' buckets, in seconds: a local model's first word to a slow one's last.
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[str, ...]
Counts = defaultdict[Labels, int]

now = time.monotonic

if TYPE_CHECKING:

    class Run(Protocol):
        """What is looked at of a run; its times are of `time.monotonic()`."""

        agent_id: str
        placed: bool  # it has one of the places, and does not wait for it
        usage: dict[str, int]
        begun: float
        spoken_at: float  # 0.0: it has not

    Ended = tuple[str, float, float, dict[str, int]]  # outcome, seconds, those to its first word, tokens


class Histogram:
    """How many values are at most each of the bounds, for each value of one label."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts: dict[str, list[int]] = {}  # for each bound, and at last of all
        self.sums: dict[str, float] = {}

    def add(self, label: str, values: list[float]) -> None:
        """Count values, which are sorted."""
        from bisect import bisect_right  # here: most gateways count nothing

        counts = self.counts.get(label, [0] * (len(self.bounds) + 1))
        found = (*(bisect_right(values, bound) for bound in self.bounds), len(values))
        self.counts[label] = [count + more for count, more in zip(counts, found, strict=True)]
        self.sums[label] = self.sums.get(label, 0.0) + sum(values)

    def samples(self, name: str, label: str) -> list[str]:
        """Return its lines."""
        lines = []
        for value, counts in self.counts.items():
            known = _labels((label,), (value,))[:-1]
            lines += [
                f'{name}_bucket{known},le="{bound}"}} {count}'
                for bound, count in zip((*self.bounds, "+Inf"), counts, strict=True)
            ]
            lines += [f"{name}_sum{known}}} {self.sums[value]!r}", f"{name}_count{known}}} {counts[-1]}"]
        return lines


class Metrics:
    """The counts of a gateway that began `since` then, in seconds since the epoch; `kinds` are of runs' failures."""

    def __init__(self, version: str, since: float, kinds: Collection[str]) -> None:
        self._version, self._since, self._kinds = version, since, kinds
        self._requests: dict[tuple[str, str, int], int] = {}  # by path, method and status, as far as they are known
        self._runs, self._tokens, self._errors = Counts(int), Counts(int), Counts(int)
        self._first, self._whole = Histogram(FIRST), Histogram(WHOLE)
        self._ended: defaultdict[str, list[Ended]] = defaultdict(list)  # by agent, not counted yet

    def request(self, path: str, method: str, status: int) -> None:
        """Count an answered request; `status` 0: its client was gone before."""
        try:
            self._requests[path, method, status] += 1
        except KeyError:  # the first of its kind, or a stranger's own
            if status == 101:  # on any path
                path = "websocket"
            elif path not in ROUTES:
                path = "/v1/models/{id}" if path.startswith("/v1/models/") else OTHER
            key = (path, method if method in METHODS else OTHER, status)
            self._requests[key] = self._requests.get(key, 0) + 1

    def failed(self, provider: str, kind: object) -> None:
        """Count a provider's failure."""
        self._errors[provider, self._kind(kind)] += 1

    def ended(self, run: Run, event: tuple[str, Any]) -> None:
        """Count a run, by its last event."""
        kind, data = event
        outcome = "ok" if kind == "end" else self._kind(data["kind"])
        begun, first, ended = run.begun, run.spoken_at, self._ended[run.agent_id]
        ended.append((outcome, now() - begun, first and first - begun, run.usage))
        if len(ended) >= BATCH:
            self._count(run.agent_id)

    def _count(self, agent: str) -> None:
        outcomes, whole, first, usages = zip(*self._ended.pop(agent), strict=True)
        for outcome in set(outcomes):
            self._runs[agent, outcome] += outcomes.count(outcome)
        self._whole.add(agent, sorted(whole))
        self._first.add(agent, sorted(filter(None, first)))
        for usage in filter(None, usages):
            for name in ("prompt", "completion"):
                self._tokens[agent, name] += min(max(usage[f"{name}_tokens"], 0), MAX_TOKENS)

    def _kind(self, kind: object) -> str:
        return kind if isinstance(kind, str) and kind in self._kinds else OTHER  # agents may raise what they like

    def text(self, runs: Collection[Run], connections: Mapping[str, int], refusals: Mapping[str, int]) -> bytes:
        """Return all of it: with the runs that there are now, how many connections of each kind, refusals so far."""
        active = sum(run.placed for run in runs)
        for agent in list(self._ended):
            self._count(agent)
        requests = Counts(int)
        for (path, method, status), count in self._requests.items():
            requests[path, method, f"{status // 100}xx" if status else "none"] += count
        lines = _family("copepod_build_info", "gauge", "What runs.", ("version",), {(self._version,): 1})
        lines += _family(
            "copepod_http_requests_total",
            "counter",
            "Requests, by route, method and class of status; a WebSocket when it has ended.",
            ("route", "method", "status"),
            requests,
        )
        told = "Requests that were answered with an error, and refused WebSocket clients and runs, by its code or type."
        lines += _family("copepod_refusals_total", "counter", told, ("reason",), _alone(refusals))
        lines += _family("copepod_connections", "gauge", "Open connections.", ("kind",), _alone(connections))
        lines += _family("copepod_runs_active", "gauge", "Runs that are on.", (), {(): active})
        lines += _family("copepod_runs_queued", "gauge", "Runs that wait for their turn.", (), {(): len(runs) - active})
        lines += _family("copepod_runs_total", "counter", "Ended runs.", ("agent", "outcome"), self._runs)
        told = "From a run's acceptance to its first word, thought or tool's doing."
        lines += _head("copepod_run_first_token_seconds", "histogram", told)
        lines += self._first.samples("copepod_run_first_token_seconds", "agent")
        lines += _head("copepod_run_duration_seconds", "histogram", "From a run's acceptance to its end.")
        lines += self._whole.samples("copepod_run_duration_seconds", "agent")
        told = "Tokens, as far as providers measure them."
        lines += _family("copepod_tokens_total", "counter", told, ("agent", "kind"), self._tokens)
        told = "Turns that a provider failed, those that a fallback took over too."
        lines += _family("copepod_provider_errors_total", "counter", told, ("provider", "kind"), self._errors)
        for name, told, value in (
            ("process_start_time_seconds", "When it started, in seconds since the epoch.", self._since),
            *_process(),
        ):
            lines += [*_head(name, "gauge", told), f"{name} {value!r}"]
        return ("\n".join(lines) + "\n").encode()


def _process() -> Iterable[tuple[str, str, float]]:
    """What Linux tells of this process without much work, elsewhere nothing."""
    try:
        with open("/proc/self/statm", "rb") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir("/proc/self/fd")) - 1  # the folder itself is open
    except OSError:
        return ()
    return (
        ("process_resident_memory_bytes", "Memory in use, in bytes.", resident),
        ("process_open_fds", "Open files.", files),
    )


def _alone(numbers: Mapping[str, int]) -> dict[Labels, int]:
    return {(name,): number for name, number in numbers.items()}


def _family(name: str, kind: str, told: str, labels: Labels, values: Mapping[Labels, int]) -> list[str]:
    return [*_head(name, kind, told), *(f"{name}{_labels(labels, each)} {n}" for each, n in values.items())]


def _head(name: str, kind: str, told: str) -> list[str]:
    return [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]


def _labels(names: Labels, values: Labels) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}" if names else ""


def _escaped(value: str) -> str:
    text = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return text.encode(errors="replace").decode()  # a lone surrogate in a name of the configuration
