"""Tools and images with OpenAI's own clients, through a gateway whose model server is another maker's, aimock."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest

import environments
from served import BOUND, TOKEN, served
from test_clients import SCRIPTS
from test_openai_tools import ASKED, LOOK, NODE_SAW, QUESTION, WEATHER, openai, results, seen_by_node

KEY = "sk-of-the-upstream"

pytestmark = pytest.mark.network


class Upstream:
    """The model server; `journal` has the bodies of the requests that came, as Chat Completions."""

    def __init__(self, url: str) -> None:
        self.url = url

    def journal(self) -> list[Any]:
        with closing(HTTPConnection(self.url.removeprefix("http://"), timeout=BOUND)) as connection:
            connection.request("GET", "/__aimock/journal")
            return [entry["body"] for entry in json.load(connection.getresponse())]


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    folder = environments.environment(environments.NODE)
    argv = [str(environments.node()), "--input-type=module", "-"]
    environ = {"HOME": str(folder), "PATH": os.defpath}
    with (
        (SCRIPTS / "upstream.mjs").open() as script,
        subprocess.Popen(argv, stdin=script, stdout=subprocess.PIPE, text=True, cwd=folder, env=environ) as process,
    ):
        try:
            assert process.stdout is not None
            yield Upstream(process.stdout.readline().strip())
        finally:
            process.kill()


@contextmanager
def gateway_url(upstream: Upstream, api: str) -> Iterator[str]:
    """The address of a gateway that asks the model server in the dialect `api`."""
    provider = {"api": api, "baseUrl": f"{upstream.url}/v1", "apiKey": KEY}
    agent = {"id": "main", "model": "up/large", "input": ["text", "image"]}
    with served({}, {"models.providers.up": provider, "agents.list": [agent]}) as hub:
        yield f"{hub.url}/v1"


def answered(url: str, stream: bool, *messages: Any, **asked: Any) -> Any:
    """The answer to these messages, a choice: whole, or put together by the client."""
    with openai.OpenAI(base_url=url, api_key=TOKEN, timeout=BOUND, max_retries=0) as client:
        asked = {"model": "copepod", "messages": messages, **asked}
        if not stream:
            return client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as events:
            return events.get_final_completion().choices[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("session", [{}, {"user": "ann"}])
@pytest.mark.parametrize("api", ["openai-completions", "anthropic-messages"])
def test_a_round_trip_of_tools(api: str, session: dict[str, str], stream: bool, upstream: Upstream) -> None:
    asked = {key: value for key, value in ASKED.items() if key != "model"} | session
    with gateway_url(upstream, api) as url:
        first = answered(url, stream, QUESTION, **asked)
        assert first.finish_reason == "tool_calls"
        assert not first.message.content
        assert first.message.reasoning_content == "Two calls, I think."
        assert [call.id for call in first.message.tool_calls] == ["call_oslo", "call_rome"]
        assert [json.loads(call.function.arguments) for call in first.message.tool_calls] == [
            {"at": "Oslo"},
            {"at": "Rome"},
        ]
        given = results(first.message)
        # A session knows what was asked and called: the results alone are enough.
        said = given if session else [QUESTION, first.message.to_dict(), *given]
        second = answered(url, stream, *said, **asked)
    assert (second.message.content, second.finish_reason) == ("Oslo: sun. Rome: sun.", "stop")
    for body in upstream.journal():
        assert [tool["function"]["name"] for tool in body["tools"]] == ["weather"]
    before, after = (body["messages"] for body in upstream.journal())
    assert before == [QUESTION]
    assert [each["role"] for each in after] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in after[1]["tool_calls"]] == ["weather", "weather"]
    assert [each["tool_call_id"] for each in after[2:]] == ["call_oslo", "call_rome"]


def test_what_arrives_is_what_was_sent(upstream: Upstream) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    with gateway_url(upstream, "openai-completions") as url:
        answered(url, False, QUESTION, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    (body,) = upstream.journal()
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == ([WEATHER], choice, False)


@pytest.mark.parametrize("stream", [False, True])
def test_images(stream: bool, upstream: Upstream) -> None:
    with gateway_url(upstream, "openai-completions") as url:
        for content in (LOOK, LOOK[1:]):
            shown = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            answer = answered(url, stream, {"role": "user", "content": content})
            assert answer.message.content.split() == shown
            assert upstream.journal()[-1]["messages"] == [{"role": "user", "content": content}]


def test_a_refusal_that_passes_is_not_seen(upstream: Upstream) -> None:
    with gateway_url(upstream, "openai-completions") as url:
        answer = answered(url, False, {"role": "user", "content": "Are you busy?"})
    assert answer.message.content == "Not any more."
    assert len(upstream.journal()) == 2


def test_the_client_for_node(upstream: Upstream) -> None:
    with gateway_url(upstream, "openai-completions") as url:
        assert seen_by_node(url) == NODE_SAW
