"""Pydantic AI: `with_pydantic_ai.py URL TOKEN` prints what it saw, as JSON."""

import asyncio
import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, token = sys.argv[1:]


def agent(name="main", key=token):
    return Agent(OpenAIChatModel(f"copepod:{name}", provider=OpenAIProvider(base_url=url, api_key=key)))


async def error(name="main", key=token):
    try:
        return (await agent(name, key).run("one two three")).output
    except Exception as e:
        return f"{type(e).__name__} {e.status_code}"


def usage(result):
    counts = result.usage() if callable(result.usage) else result.usage
    return [counts.input_tokens, counts.output_tokens, counts.total_tokens]


async def main():
    answer = await agent().run("one two three")
    async with agent().run_stream("one two three") as stream:
        texts = [text async for text in stream.stream_text(delta=True, debounce_by=None)]
    async with agent("endless").run_stream("go") as endless:
        await anext(endless.stream_text(delta=True, debounce_by=None))
        await endless.cancel()
    return {
        "answer": answer.output,
        "usage": usage(answer),
        "finish": answer.all_messages()[-1].finish_reason,
        "stream": texts,
        "usage of the stream": usage(stream),
        "wrong key": await error(key="wrong"),
        "unknown agent": await error("nobody"),
        "left": (await agent("ended").run("has it?")).output,
    }


print(json.dumps(asyncio.run(main())))
