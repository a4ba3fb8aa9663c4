"""OpenAI's own client with tools of its own, and images: through a gateway whose model server is another gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

import environments
from served import BOUND, TOKEN, served
from test_clients import SCRIPTS, seen_by

openai = pytest.importorskip("openai")

WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
QUESTION: Any = {"role": "user", "content": "How is the weather in Oslo and in Rome?"}
ASKED: Any = {"model": "copepod", "tools": [WEATHER], "parallel_tool_calls": True}

seen: list[dict[str, Any]] = []  # the turns of the model


def fragment(index: int, arguments: str, id: str = "") -> dict[str, Any]:
    first = {"id": id, "function": {"name": "weather", "arguments": arguments}}
    return {"tool_calls": [{"index": index, **(first if id else {"function": {"arguments": arguments}})}]}


async def model(message: str, turn: dict[str, Any]) -> AsyncIterator[str | dict[str, Any]]:
    """Asks for two calls, then tells what they gave."""
    seen.append(turn)
    results = [each["content"] for each in turn["messages"] if each["role"] == "tool"]
    if results:
        yield " ".join(results)
        return
    yield {"reasoning": "Two calls, "}
    yield {"reasoning": "I think."}
    yield fragment(0, "", "call_oslo")
    yield fragment(0, '{"at": "Os')
    yield fragment(0, 'lo"}')
    yield fragment(1, '{"at": "Rome"}', "call_rome")
    yield {"finish_reason": "tool_calls"}


@contextmanager
def relayed(agents: Mapping[str, Callable[..., Any]], **agent: Any) -> Iterator[Any]:
    """A client of a gateway that asks another one, where these functions answer."""
    entries = [{"id": name, **agent} for name in agents]
    with served(agents, {"agents.list": entries}) as far:
        provider = {"api": "openai-completions", "baseUrl": f"{far.url}/v1", "apiKey": TOKEN}
        changes = {"models.providers.far": provider, "agents.defaults.model": "far/copepod", "agents.list": None}
        near_agent = {key: value for key, value in agent.items() if key != "clientTools"}
        changes["agents.list"] = [{"id": "main", **near_agent}, {"id": "deaf", "clientTools": False, "input": ["text"]}]
        with served({}, changes) as near:
            url = f"{near.url}/v1"
            with openai.OpenAI(base_url=url, api_key=TOKEN, timeout=BOUND, max_retries=0) as client:
                yield client


@pytest.fixture
def client() -> Iterator[Any]:
    seen.clear()
    with relayed({"main": model}, clientTools=True) as client:
        yield client


def results(message: Any) -> list[Any]:
    """The client's part: its tools are called, with the arguments that the model gave."""
    found = []
    for call in message.tool_calls:
        assert (call.type, call.function.name) == ("function", "weather")
        text = f"{json.loads(call.function.arguments)['at']}: sun."
        found.append({"role": "tool", "tool_call_id": call.id, "content": text})
    return found


def test_a_round_trip(client: Any) -> None:
    first = client.chat.completions.create(messages=[QUESTION], **ASKED).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert first.message.reasoning_content == "Two calls, I think."
    assert [call.id for call in first.message.tool_calls] == ["call_oslo", "call_rome"]
    said = [QUESTION, first.message.to_dict(), *results(first.message)]
    second = client.chat.completions.create(messages=said, **ASKED).choices[0]
    assert (second.message.content, second.finish_reason) == ("Oslo: sun. Rome: sun.", "stop")
    assert second.message.tool_calls is None
    assert seen[0]["params"] == {"tools": [WEATHER], "parallel_tool_calls": True}
    assert [each["role"] for each in seen[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert seen[1]["messages"][1]["tool_calls"] == [call.to_dict() for call in first.message.tool_calls]


def test_a_streamed_round_trip_in_a_session(client: Any) -> None:
    asked = {**ASKED, "user": "ann", "stream": True}
    with client.chat.completions.create(messages=[QUESTION], **asked) as stream:
        deltas = [chunk.choices[0] for chunk in stream]
    parts = [part for each in deltas for part in each.delta.tool_calls or ()]
    assert [(part.index, part.id, part.function.name, part.function.arguments) for part in parts] == [
        (0, "call_oslo", "weather", ""),
        (0, None, None, '{"at": "Os'),
        (0, None, None, 'lo"}'),
        (1, "call_rome", "weather", '{"at": "Rome"}'),
    ]
    thoughts = [each.delta.reasoning_content for each in deltas if getattr(each.delta, "reasoning_content", None)]
    assert thoughts == ["Two calls, ", "I think."]
    assert deltas[-1].finish_reason == "tool_calls"
    # What has been said is kept: the results alone are enough, and with the whole conversation nothing is doubled.
    given = [{"role": "tool", "tool_call_id": part.id, "content": f"{part.id}."} for part in parts if part.id]
    with client.chat.completions.create(messages=given, **asked) as stream:
        words = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert words == "call_oslo. call_rome."
    assert [each["role"] for each in seen[1]["messages"]] == ["user", "assistant", "tool", "tool"]


def test_the_stream_helper_puts_them_together(client: Any) -> None:
    with client.chat.completions.stream(messages=[QUESTION], **ASKED) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [each["content"] for each in results(message)] == ["Oslo: sun.", "Rome: sun."]


def test_tools_for_an_agent_that_takes_none(client: Any) -> None:
    asked = {**ASKED, "model": "copepod:deaf"}
    with pytest.raises(openai.BadRequestError, match="clientTools") as caught:
        client.chat.completions.create(messages=[QUESTION], **asked)
    assert caught.value.param == "tools"
    answer = client.chat.completions.create(messages=[QUESTION], tool_choice="none", **asked)
    assert answer.choices[0].finish_reason == "tool_calls"  # the model's own idea
    assert seen[-1]["params"] == {}


async def describes(message: str, turn: dict[str, Any]) -> str:
    seen.append(turn)
    return "It is a dot."


PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
LOOK: Any = [
    {"type": "text", "text": "What is it?"},
    {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
    {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}},
]


@pytest.mark.parametrize("stream", [False, True])
def test_images(stream: bool) -> None:
    seen.clear()
    with relayed({"main": describes}, input=["text", "image"]) as client:
        for content in (LOOK, LOOK[1:]):
            asked: Any = {"model": "copepod", "messages": [{"role": "user", "content": content}], "user": "ann"}
            answer = client.chat.completions.create(stream=stream, **asked)
            chunks = list(answer) if stream else [answer]
            parts = [each.choices[0].delta if stream else each.choices[0].message for each in chunks]
            assert "".join(part.content or "" for part in parts) == "It is a dot."
            assert seen[-1]["messages"][-1] == {"role": "user", "content": content}
        assert [turn["message"] for turn in seen] == ["What is it?", ""]
        assert seen[-1]["messages"][0] == {"role": "user", "content": "What is it?\n[image]\n[image]"}
        # An agent without eyes gets the text, and is asked nothing where there is none.
        asked = {"model": "copepod:deaf", "messages": [{"role": "user", "content": LOOK}]}
        client.chat.completions.create(**asked)
        assert seen[-1]["messages"] == [{"role": "user", "content": "What is it?"}]
        asked["messages"][0]["content"] = LOOK[1:]
        with pytest.raises(openai.BadRequestError, match="takes no images"):
            client.chat.completions.create(**asked)
        wrong: Any = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
        with pytest.raises(openai.BadRequestError, match="must be a data:"):
            client.chat.completions.create(model="copepod", messages=[{"role": "user", "content": wrong}])


async def both(message: str, turn: dict[str, Any]) -> AsyncIterator[str | dict[str, Any]]:
    """The model, which names the images that it is shown."""
    content = turn["messages"][-1]["content"]
    if isinstance(content, list):
        yield " ".join(part["image_url"]["url"] for part in content)
    else:
        async for item in model(message, turn):
            yield item


NODE_SAW = {"answers": ["Oslo: sun. Rome: sun."] * 2, "seen": ["https://a.example/b.png"] * 2}  # whole, and streamed


def seen_by_node(url: str) -> Any:
    folder = environments.environment(environments.NODE)
    with (SCRIPTS / "tools_with_openai.mjs").open() as script:
        return seen_by([environments.node(), "--input-type=module", "-"], url, folder, script)


@pytest.mark.network
def test_the_client_for_node() -> None:
    with relayed({"main": both}, clientTools=True, input=["text", "image"]) as client:
        assert seen_by_node(str(client.base_url)) == NODE_SAW


async def unsure(message: str, turn: dict[str, Any]) -> AsyncIterator[str | dict[str, Any]]:
    for word, logprob in (("It ", -0.1), ("may.", -2.5)):
        yield word
        token = {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}
        yield {"logprobs": {"content": [token]}}


def test_logprobs() -> None:
    with relayed({"main": unsure}) as client:
        asked: Any = {"model": "copepod", "messages": [QUESTION], "logprobs": True}
        answer = client.chat.completions.create(**asked)
        assert [each.logprob for each in answer.choices[0].logprobs.content] == [-0.1, -2.5]
        with client.chat.completions.stream(**asked) as stream:
            answer = stream.get_final_completion()
        assert [each.token for each in answer.choices[0].logprobs.content] == ["It ", "may."]
        assert answer.choices[0].message.content == "It may."
