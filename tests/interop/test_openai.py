"""OpenAI's own client for Python, against a gateway on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest

from served import BOUND, TOKEN, endless, left, served, words

openai = pytest.importorskip("openai")

HELLO: Any = [{"role": "user", "content": "one two three"}]


async def breaks(message: str) -> AsyncIterator[str]:
    yield "half an "
    raise RuntimeError("secret of the inside")


async def fails(message: str) -> AsyncIterator[str]:
    raise RuntimeError("secret of the inside")
    yield ""


async def looks(message: str) -> AsyncIterator[str | dict[str, Any]]:
    """Tell of what it does, in values that would be one text, one sum and one list if they were put together."""
    for phase in ("start", "end"):
        yield {"tool": {"name": "look", "phase": phase, "seconds": 1, "found": [{"at": phase}]}}
    yield "seen"


TOLD = [
    {"index": n, "tool": {"name": "look", "phase": phase, "seconds": 1, "found": [{"at": phase}]}}
    for n, phase in enumerate(("start", "end"))
]
AGENTS = {"main": words, "looks": looks, "breaks": breaks, "fails": fails, "endless": endless}


@pytest.fixture
def url() -> Iterator[str]:
    with served(AGENTS) as hub:
        yield f"{hub.url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=TOKEN, timeout=BOUND, max_retries=0) as client:
        yield client


def texts(chunks: Iterable[Any]) -> Iterator[str]:
    return (chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content)


def test_a_whole_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="copepod:main", messages=HELLO)
    assert answer.choices[0].message.content == "one two three "
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "copepod:main"
    assert answer.usage.total_tokens == 7
    assert answer._request_id.startswith("req_")


def test_a_stream(client: Any) -> None:
    with client.chat.completions.create(model="copepod:main", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    assert list(texts(chunks)) == ["one ", "two ", "three "]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_a_stream_with_its_usage(client: Any) -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.create(model="copepod:main", messages=HELLO, **asked) as stream:
        last = list(stream)[-1]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 4, 7)


def test_the_stream_helper(client: Any) -> None:
    with client.chat.completions.stream(model="copepod:main", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == "one two three "


def test_what_an_agent_does(client: Any) -> None:
    asked = {"model": "copepod:looks", "messages": HELLO, "stream_options": {"include_events": True}}
    with client.chat.completions.create(**asked, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    told = [event for delta in deltas for event in (delta.model_extra or {}).get("copepod_events", ())]
    assert told == TOLD
    assert "".join(delta.content or "" for delta in deltas) == "seen"
    with client.chat.completions.stream(**asked) as stream:  # it puts the deltas together
        message = stream.get_final_completion().choices[0].message
    assert (message.content, message.copepod_events) == ("seen", TOLD)
    with client.chat.completions.create(model="copepod:looks", messages=HELLO, stream=True) as stream:
        assert not [chunk for chunk in stream if chunk.choices[0].delta.model_extra]


def test_a_wrong_key(client: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").chat.completions.create(model="copepod:main", messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id.startswith("req_")


def test_a_body_over_the_cap(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="copepod:main", messages=[{"role": "user", "content": "x" * (3 << 19)}])
    assert caught.value.status_code == 413


def test_an_unknown_agent(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="copepod:nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_a_request_that_is_wrong_names_the_field(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="copepod:main", messages=[])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_word_is_a_status(client: Any, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="copepod:fails", messages=HELLO, stream=stream)
    assert "secret" not in str(caught.value)


def test_a_failure_amid_a_stream_is_raised(client: Any) -> None:
    got: list[str] = []
    stream = client.chat.completions.create(model="copepod:breaks", messages=HELLO, stream=True)
    with closing(stream), pytest.raises(openai.APIError) as caught:
        got.extend(texts(stream))
    assert got == ["half an "]
    assert "secret" not in str(caught.value)


def test_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [f"copepod:{agent}" for agent in AGENTS]
    model = client.models.retrieve("copepod:main")
    assert (model.id, model.object, model.owned_by) == ("copepod:main", "model", "copepod")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("copepod:nobody")


def test_a_client_that_leaves_a_stream_gets_its_next_answer(client: Any) -> None:
    stream = client.chat.completions.create(model="copepod:endless", messages=HELLO, stream=True)
    with closing(stream):
        next(iter(stream))
    assert left.wait(BOUND)
    assert client.chat.completions.create(model="copepod:main", messages=HELLO).choices[0].message.content


def test_the_client_for_asyncio(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=TOKEN, timeout=BOUND, max_retries=0) as client:
            create = client.chat.completions.create
            answers = await asyncio.gather(*(create(model="copepod:main", messages=HELLO) for _ in range(20)))
            assert {answer.choices[0].message.content for answer in answers} == {"one two three "}
            stream = await create(model="copepod:main", messages=HELLO, stream=True)
            assert list(texts([chunk async for chunk in stream])) == ["one ", "two ", "three "]
            async with await create(model="copepod:endless", messages=HELLO, stream=True) as stream:
                await anext(aiter(stream))
            assert await asyncio.to_thread(left.wait, BOUND)
            assert (await create(model="copepod:main", messages=HELLO)).choices[0].finish_reason == "stop"

    asyncio.run(main())
