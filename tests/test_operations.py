"""What whoever runs a gateway sees of it: the log's line of each run."""

from __future__ import annotations

import asyncio
from typing import Any

import cli
from live import Client, ask, run, serving, stream
from peer import SESAME, TOKEN, connected
from upstream import Upstream, says

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
        assert asked[1].lane == asked[2].lane != asked[0].lane
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
        assert len({cli.session_digest(line[9].lane) for line in ran}) == 3  # bob's `main` is his own
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
