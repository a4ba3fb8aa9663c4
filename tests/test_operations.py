"""What whoever runs a gateway sees of it: the log's line of each run, readyz's parts, the page of `status`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import logs
from live import CHAT, Client, ask, run, serving, settings, stream
from peer import SESAME, TOKEN, connected
from test_program import finished, program
from upstream import Call, Upstream, answers, says

LIST = json.dumps({"data": [{"id": "large"}]}).encode()


async def lists(call: Call) -> None:
    """Tells its models, and answers whoever asks."""
    if call.path == "/v1/models":
        call.answer(200, LIST)
    else:
        await says("hi")(call)


# The log


def test_a_line_says_which_conversation_and_how_many_tokens() -> None:
    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        async with Upstream(says("hi")) as upstream, serving(upstream.settings()) as hub:
            hub.access_log = lambda *fields: lines.append(fields)
            await ask(hub)
            await ask(hub, user="carol")
            await stream(hub, user="carol")
            async with await Client.open(hub.port) as client:
                await client.ask("GET", "/healthz")
            while len(lines) < 4:
                await asyncio.sleep(0)
        *asked, health = [line[9] for line in lines]
        assert health is None
        assert [each.stored for each in asked] == [False, True, True]
        assert logs.session_name(asked[0]) == "-" != logs.session_name(asked[1]) == logs.session_name(asked[2])
        assert {tuple(each.usage.items())[:2] for each in asked} == {(("prompt_tokens", 3), ("completion_tokens", 1))}

    run(main())


def test_a_run_over_websocket_leaves_a_line() -> None:
    """With who asked for it, by which method; its status is what an HTTP client would have seen."""

    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        tokens = [{"name": "bob", "token": "of bob"}]
        agents = [{"id": "main", "model": "up/large"}, {"id": "down", "model": "nowhere/x"}]
        async with Upstream(says("g\u00fc", "t")) as upstream:
            more = {**TOKEN, **upstream.settings(), "gateway.auth.tokens": tokens, "agents.list": agents}
            async with serving(more) as hub:
                hub.access_log = lambda *fields: lines.append(fields)
                async with connected(hub, auth={"token": SESAME}) as peer:
                    await peer.agent("hi", "a key of 100%")
                    await peer.agent("hi", "k2", agentId="down")
                async with connected(hub, auth={"token": "of bob"}) as peer:
                    await peer.ask("chat.send", sessionKey="main", message="hi", idempotencyKey="k3")
                    await peer.ask("agent.wait", runId="k3")
                while len(lines) < 5:
                    await asyncio.sleep(0)
        ran = [line for line in lines if line[2] == "WS"]
        assert [(*line[:6], *line[7:9]) for line in ran] == [
            ("a%20key%20of%20100%25", "127.0.0.1", "WS", "agent", 200, 4, "main", "-"),
            ("k2", "127.0.0.1", "WS", "agent", 502, 0, "down", "-"),
            ("k3", "127.0.0.1", "WS", "chat.send", 200, 4, "main", "bob"),
        ]
        assert all(0 <= line[6] < 30_000 for line in ran)
        assert [line[9].usage.get("completion_tokens") for line in ran] == [1, None, 1]
        assert len({logs.session_name(line[9]) for line in ran}) == 3  # bob's `main` is his own
        assert [line[4] for line in lines if line[2] != "WS"] == [101, 101]

    run(main())


def test_a_run_that_is_cut_leaves_a_line() -> None:
    async def main() -> None:
        lines: list[tuple[Any, ...]] = []
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            hub.access_log = lambda *fields: lines.append(fields)
            async with connected(hub) as peer:
                await peer.ask("chat.send", sessionKey="main", message="hi", idempotencyKey="k")
                await upstream.call()
                assert (await peer.ask("chat.abort", sessionKey="main"))["aborted"] is True
                await peer.ask("agent.wait", runId="k")
        assert [(line[0], line[4]) for line in lines if line[2] == "WS"] == [("k", 500)]

    run(main())


# status


def places(up: Upstream, hangs: Upstream) -> dict[str, Any]:
    """A configuration with a provider of each kind, and one that is not there."""
    provider = up.settings()["models.providers.up"]
    return {
        "models.providers": {
            "up": provider,
            "other": hangs.settings()["models.providers.up"],
            "tool": {"api": "command", "command": sys.executable, "args": ["-c", "print(1)"]},
            "unused": {"api": "command", "command": "no-such-program"},
        },
        "agents.list": [
            {"id": "main", "model": {"primary": "up/large", "fallbacks": ["up/small", "other/x"]}},
            {"id": "tool", "model": "tool/-"},
            {"id": "echo"},
            {"id": "lost", "model": "nowhere/x"},
            {"id": "mine", "model": "nowhere/y"},
        ],
    }


async def speak(message: str) -> str:
    return message


def test_status_asks_the_providers_where_it_is_told_to() -> None:
    async def main() -> None:
        async with Upstream(lists) as up, Upstream(answers(401, b"{}")) as other:
            async with serving({**TOKEN, **places(up, other)}, {"mine": speak}) as hub:
                async with connected(hub, auth={"token": SESAME}) as peer:
                    for params in ({}, {"probe": False}, {"probe": "deep"}):
                        assert "providers" not in await peer.ask("status", **params)
                    assert not up.calls
                    status = await peer.ask("status", probe=True)
                assert [call.path for call in (*up.calls, *other.calls)] == ["/v1/models", "/v1/models"]
        assert status["providers"] == {
            "up": {"ok": True, "what": "reachable, but it lists no small", "missing": ["small"]},
            "other": {"ok": False, "what": "refuses the gateway's key", "missing": []},
            "tool": {"ok": True, "what": "its program is there", "missing": []},
            "echo": {"ok": True, "what": "part of the gateway", "missing": []},
            "nowhere": {"ok": False, "what": "not configured", "missing": []},
        }
        assert [(agent["agentId"], agent["isDefault"], agent["models"]) for agent in status["agents"]] == [
            ("main", True, ["up/large", "up/small", "other/x"]),
            ("tool", False, ["tool/-"]),
            ("echo", False, ["echo/echo"]),
            ("lost", False, ["nowhere/x"]),
            ("mine", False, []),
        ]
        assert [warning for warning in status["warnings"] if "nowhere/x" in warning]
        assert status["refusals"] == {}

    run(main())


def test_a_friend_asks_no_provider_and_sees_its_own_agents() -> None:
    async def main() -> None:
        tokens = [{"name": "bob", "token": "of bob", "agents": ["echo"], "scopes": ["operator.read"]}]
        async with Upstream(lists) as up, Upstream(lists) as other:
            more = {**TOKEN, **places(up, other), "gateway.auth.tokens": tokens}
            async with serving(more, {"mine": speak}) as hub:
                assert (await ask(hub)).status == 401
                async with connected(hub, auth={"token": "of bob"}) as peer:
                    status = await peer.ask("status", probe=True)
                assert not [*up.calls, *other.calls]
        told = [status[name] for name in ("providers", "refusals", "warnings")]
        assert told == [{}, {}, []]
        assert status["agents"] == [{"agentId": "echo", "isDefault": True, "models": ["echo/echo"]}]

    run(main())


def test_the_page_and_its_exit_status(tmp_path: Path) -> None:
    """What the command says of a gateway that is well, and of one whose model server is gone."""

    async def main() -> None:
        async with Upstream(lists) as upstream:
            async with program(settings(upstream.settings()), tmp_path) as gateway:
                url = f"ws://127.0.0.1:{gateway.port}"
                async with await Client.open(gateway.port) as client:
                    assert (await client.ask("GET", "/nowhere")).status == 404
                    assert (await client.ask("POST", CHAT, b"{")).status == 400

                async def page(*flags: str) -> tuple[int, str]:
                    done = await asyncio.to_thread(finished, "status", "--url", url, *flags, cwd=tmp_path)
                    assert done.stderr == ""
                    return done.returncode, done.stdout

                status, text = await page()
                assert status == 0
                assert text.startswith(f"gateway   {url} is well\nversion   ")
                assert text.endswith(
                    "agents    main: up/large\nproviders up: reachable\nsessions  0\nruns      0 active, 0 queued\n"
                    "refusals  1 not_found_error, 1 invalid_request_error\n"
                )
                upstream.script = answers(503, b"")
                while status == 0:  # what was found is told for a second
                    status, text = await page()
                assert status == 1
                assert "\nproviders up: fails with status 503\n" in text
                status, text = await page("--json")
                assert (status, json.loads(text)["providers"]["up"]["ok"]) == (1, False)

    run(main())
