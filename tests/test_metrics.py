"""What is counted, as Prometheus' own parser reads it; who may read it; and that strangers cannot make it grow."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import chat_completions
import gateway
import metrics
import runs
from live import CHAT, Client, ask, run, serving, settings, stream, within
from peer import connected
from upstream import Upstream, answers, says

parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")

ON = {"gateway.http.endpoints.metrics.enabled": True}
SESAME = {"gateway.auth.mode": "token", "gateway.auth.token": "sesame"}
UNITS = ("_total", "_seconds", "_bytes", "_info", "_connections", "_active", "_queued", "_fds")


def read(text: bytes) -> dict[tuple[str, ...], float]:
    """Each sample's value, by its name and the values of its labels; every family is as the conventions want it."""
    found, names = {}, set()
    for family in parser.text_string_to_metric_families(text.decode()):
        assert family.name not in names  # OpenMetrics knows a counter without its _total
        names.add(family.name)
        assert family.documentation.endswith("."), family
        assert family.type in ("counter", "gauge", "histogram"), family
        assert re.fullmatch("(copepod|process)_[a-z_]+", family.name), family
        for sample in family.samples:
            assert sample.name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count").endswith(UNITS)
            assert (family.type == "counter") is sample.name.endswith("_total"), sample
            key = (sample.name, *sample.labels.values())
            assert key not in found
            found[key] = sample.value
    return found


async def told(hub: Any, fields: dict[str, str] | None = None) -> dict[tuple[str, ...], float]:
    async with await Client.open(hub.port) as client:
        answer = await client.ask("GET", "/metrics", None, fields)
    assert (answer.status, answer.fields["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return read(answer.body)


def fresh() -> metrics.Metrics:
    return metrics.Metrics("1.2", 1.7e9, chat_completions.ERRORS)


def text_of(measured: metrics.Metrics, **refusals: int) -> bytes:
    return measured.text([], {"http": 0}, refusals)


def ended(agent: str = "main", **changes: Any) -> runs.Run:
    value = runs.Run(agent, "k", "hi", [], [], timeout=1, stored=False)
    for name, changed in changes.items():
        setattr(value, name, changed)
    return value


# The text


def test_labels_are_escaped() -> None:
    measured, name = fresh(), 'a\\b"c\nd\u00e4'
    measured.ended(ended(name), ("end", "stop"))
    measured.failed("\ud800", "upstream")
    found = read(text_of(measured))
    assert found["copepod_runs_total", name, "ok"] == 1
    assert found["copepod_run_duration_seconds_count", name] == 1
    assert found["copepod_provider_errors_total", "?", "upstream"] == 1


def test_a_bound_is_in_its_bucket() -> None:
    histogram = metrics.Histogram((0.5, 1.0))
    histogram.add("x", [0.0, 0.75, 1.5])
    histogram.add("x", [0.5, 1.0])
    buckets = [f'h_bucket{{l="x",le="{bound}"}} {count}' for bound, count in (("0.5", 2), ("1.0", 4), ("+Inf", 5))]
    assert histogram.samples("h", "l") == [*buckets, 'h_sum{l="x"} 3.75', 'h_count{l="x"} 5']


def test_the_times_of_runs() -> None:
    measured, begun = fresh(), time.monotonic() - 700
    for after in (0.005, 0.02, 59.0, 61.0):
        measured.ended(ended(begun=begun, spoken_at=begun + after), ("end", "stop"))
    measured.ended(ended(), ("error", {"kind": "upstream"}))  # it said nothing
    found = read(text_of(measured))
    for name, buckets in (
        ("copepod_run_first_token_seconds", {"0.01": 1, "0.025": 2, "30.0": 2, "60.0": 3, "+Inf": 4}),
        ("copepod_run_duration_seconds", {"10.0": 1, "600.0": 1, "+Inf": 5}),
    ):
        assert {bound: found[f"{name}_bucket", "main", bound] for bound in buckets} == buckets
    assert found["copepod_run_first_token_seconds_sum", "main"] == pytest.approx(120.025)


@pytest.mark.parametrize(
    ("told", "counted"),
    [((3, 4), (3, 4)), ((0, 0), (0, 0)), ((-5, 7), (0, 7)), ((10**400, 1), (metrics.MAX_TOKENS, 1))],
)
def test_tokens(told: tuple[int, int], counted: tuple[int, int]) -> None:
    measured = fresh()
    measured.ended(ended(usage={"prompt_tokens": told[0], "completion_tokens": told[1]}), ("end", "stop"))
    found = read(text_of(measured))
    assert tuple(found["copepod_tokens_total", "main", kind] for kind in ("prompt", "completion")) == counted


def test_what_strangers_and_agents_make_up_is_no_label() -> None:
    measured = fresh()
    for n in range(1000):
        measured.request(f"/path{n}", f"M{n}", 404)
        measured.request(f"/v1/models/{n}", "GET", 200)
        measured.request(f"/ws{n}", "GET", 101)
        measured.failed("up", f"kind{n}")
        measured.ended(ended(), ("error", {"kind": [n]}))
    measured.request("/readyz", "GET", 0)
    found = {key: n for key, n in read(text_of(measured)).items() if n == 1000 and "duration" not in key[0]}
    assert found == {
        ("copepod_http_requests_total", "other", "other", "4xx"): 1000,
        ("copepod_http_requests_total", "/v1/models/{id}", "GET", "2xx"): 1000,
        ("copepod_http_requests_total", "websocket", "GET", "1xx"): 1000,
        ("copepod_provider_errors_total", "up", "other"): 1000,
        ("copepod_runs_total", "main", "other"): 1000,
    }
    assert read(text_of(measured))["copepod_http_requests_total", "/readyz", "GET", "none"] == 1


def test_the_process() -> None:
    found = read(text_of(fresh()))
    assert found["process_start_time_seconds",] == 1.7e9
    assert found["copepod_build_info", "1.2"] == 1
    if ("process_open_fds",) in found:  # Linux
        assert found["process_open_fds",] > 2
        assert 1e6 < found["process_resident_memory_bytes",] < 1e10


# The gateway's counts


def test_a_day_of_a_gateway() -> None:
    """Answers, errors, a fallback, a client that leaves, WebSocket clients: each is counted where it belongs."""

    async def main() -> None:
        async with Upstream(says("hi ", "there")) as upstream, Upstream(answers(503, b"{}")) as down:
            changes = {
                **ON,
                **upstream.settings(),
                "models.providers.down": down.settings()["models.providers.up"],
                "agents.list": [
                    {"id": "main", "model": "up/large"},
                    {"id": "spare", "model": {"primary": "down/x", "fallbacks": ["up/large"]}},
                    {"id": "lost", "model": "down/x"},
                ],
            }
            async with serving(changes) as hub:
                assert (await ask(hub)).text == "hi there"
                await stream(hub, model="copepod:spare")
                assert (await ask(hub, model="copepod:lost")).status == 502
                assert (await ask(hub, model="copepod:nobody")).status == 404
                async with connected(hub) as peer:
                    await peer.agent("hi", "k")
                    during = await told(hub)
                found = await told(hub)
        assert during["copepod_connections", "websocket"] == 1
        assert ("copepod_http_requests_total", "websocket", "GET", "1xx") not in during
        expected = {
            ("copepod_connections", "http"): 1,
            ("copepod_connections", "websocket"): 0,
            ("copepod_http_requests_total", CHAT, "POST", "2xx"): 2,
            ("copepod_http_requests_total", CHAT, "POST", "4xx"): 1,
            ("copepod_http_requests_total", CHAT, "POST", "5xx"): 1,
            ("copepod_http_requests_total", "/metrics", "GET", "2xx"): 1,
            ("copepod_http_requests_total", "websocket", "GET", "1xx"): 1,
            ("copepod_runs_total", "main", "ok"): 2,
            ("copepod_runs_total", "spare", "ok"): 1,
            ("copepod_runs_total", "lost", "upstream"): 1,
            ("copepod_provider_errors_total", "down", "upstream"): 2,
            ("copepod_refusals_total", "upstream_error"): 1,
            ("copepod_refusals_total", "model_not_found"): 1,
            ("copepod_tokens_total", "main", "prompt"): 6,
            ("copepod_tokens_total", "main", "completion"): 2,
            ("copepod_tokens_total", "spare", "prompt"): 3,
            ("copepod_tokens_total", "spare", "completion"): 1,
            ("copepod_runs_active",): 0,
            ("copepod_runs_queued",): 0,
            ("copepod_run_first_token_seconds_count", "main"): 2,
            ("copepod_run_first_token_seconds_count", "lost"): 0,
            ("copepod_run_duration_seconds_count", "lost"): 1,
        }
        assert {key: value for key, value in found.items() if key in expected} == expected
        kinds = ("copepod_http_requests_total", "copepod_runs_total", "copepod_provider_errors_total")
        assert {key for key in found if key[0] in kinds} <= set(expected)

    run(main())


def test_what_is_on_and_what_waits() -> None:
    """A client that leaves is a run that was cancelled, and no failure of its provider."""
    held, go = asyncio.Event(), asyncio.Event()

    async def speak(message: str) -> AsyncIterator[str]:
        held.set()
        await go.wait()
        yield "done"

    async def main() -> None:
        async with serving({**ON, "agents.defaults.maxConcurrent": 1}, {"main": speak}) as hub:
            async with await Client.open(hub.port) as one, await Client.open(hub.port) as two:
                one.say("hi")
                await within(held.wait())
                two.say("hi")
                while len(hub.runs.active) < 2:
                    await asyncio.sleep(0)
                found = await told(hub)
                assert (found["copepod_runs_active",], found["copepod_runs_queued",]) == (1, 1)
                assert ("copepod_run_duration_seconds_count", "main") not in found
            while hub.connections:
                await asyncio.sleep(0)
            go.set()
            found = await told(hub)
        assert found["copepod_runs_total", "main", "cancelled"] == 2
        assert found["copepod_http_requests_total", CHAT, "POST", "none"] == 2
        assert not [key for key in found if key[0] == "copepod_provider_errors_total"]

    run(main())


def test_who_is_refused_by_websocket_is_counted() -> None:
    async def main() -> None:
        async with serving({**ON, **SESAME, "gateway.http.endpoints.metrics.auth": False}) as hub:
            for auth in ({"token": "wrong"}, {}):
                with pytest.raises(AssertionError):
                    async with connected(hub, auth=auth):
                        pass
            assert (await ask(hub)).status == 401
            assert (await told(hub))["copepod_refusals_total", "invalid_api_key"] == 3

    run(main())


def test_a_run_that_is_refused_by_websocket_is_counted() -> None:
    async def main() -> None:
        tokens = [{"name": "bob", "token": "of bob", "scopes": ["chat"], "rateLimit": {"requestsPerMinute": 1}}]
        async with serving({**ON, **SESAME, "gateway.auth.tokens": tokens}) as hub:
            async with connected(hub, auth={"token": "of bob"}) as peer:
                await peer.agent("hi", "one")
                await peer.error("agent", message="hi", idempotencyKey="two")
            bearer = {"Authorization": "Bearer sesame"}
            assert (await told(hub, bearer))["copepod_refusals_total", "rate_limit_exceeded"] == 1

    run(main())


# Who may read it


@pytest.mark.parametrize(
    ("changes", "token", "method", "status"),
    [
        ({}, "sesame", "GET", 200),
        ({}, "sesame", "HEAD", 200),
        ({}, "sesame", "POST", 405),
        ({}, "wrong", "GET", 401),
        ({}, None, "GET", 401),
        ({}, "of reader", "GET", 200),
        ({}, "of writer", "GET", 200),
        ({}, "of chatter", "GET", 403),
        ({}, "of friend", "GET", 403),
        ({"auth": False}, None, "GET", 200),
        ({"auth": False}, "wrong", "GET", 200),
        ({"auth": True}, None, "GET", 401),
        ({"enabled": False}, "sesame", "GET", 404),
        ({"enabled": None}, "sesame", "GET", 404),
    ],
)
def test_who_may_read_it(changes: dict[str, Any], token: str | None, method: str, status: int) -> None:
    scopes = {"reader": ["operator.read"], "writer": ["operator.write"], "chatter": ["chat"]}
    tokens = [{"name": name, "token": f"of {name}", "scopes": given} for name, given in scopes.items()]
    tokens.append({"name": "friend", "token": "of friend", "scopes": ["operator.read"], "agents": ["main"]})

    async def main() -> None:
        more = {f"gateway.http.endpoints.metrics.{key}": value for key, value in changes.items()}
        async with serving({**ON, **SESAME, "gateway.auth.tokens": tokens, **more}) as hub:
            async with await Client.open(hub.port) as client:
                fields = {"Authorization": f"Bearer {token}"} if token else None
                answer = await client.ask(method, "/metrics", None, fields)
                assert answer.status == status
                assert status == 200 or answer.body == b"" or answer.error["message"]
                why = "all agents" if "friend" in str(token) else "operator.read"
                assert status != 403 or why in answer.error["message"]

    run(main())


def test_a_reload_keeps_the_counts_and_switches_them() -> None:
    def config(**more: Any) -> Any:
        return gateway.Gateway(settings({**ON, **more})).house.config

    async def main() -> None:
        off = {"gateway.http.endpoints.metrics.enabled": False}
        async with serving(off) as hub, await Client.open(hub.port) as client:
            await ask(hub)
            assert (hub.metrics, hub.runs.meter) == (None, None)  # what is off costs nothing
            hub.reload(config())
            await ask(hub)
            hub.reload(config(**{"agents.list": [{"id": "main"}, {"id": "late"}]}))
            await ask(hub, model="copepod:late")
            found = await told(hub)
            assert found["copepod_runs_total", "main", "ok"] == found["copepod_runs_total", "late", "ok"] == 1
            hub.reload(config(**off))
            assert (hub.metrics, hub.runs.meter) == (None, None)
            refused = await client.ask("GET", "/metrics")
            assert refused.status == 404
            assert "set gateway.http.endpoints.metrics.enabled to true" in refused.error["message"]

    run(main())


def test_the_page_of_operations_names_each_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `copepod_") or "`process_" in line)
    families = parser.text_string_to_metric_families(text_of(fresh()).decode())
    kinds = {"counter": "_total"}
    names = {family.name.removesuffix("_total") + kinds.get(family.type, "") for family in families}
    assert set(re.findall(r"`((?:copepod|process)_\w+)`", rows)) == names
