"""LiteLLM as a client: `with_litellm.py URL TOKEN` prints what it saw, as JSON."""

import asyncio
import json
import sys

import litellm

litellm.suppress_debug_info = True  # it would print it among the answers
url, token = sys.argv[1:]


def ask(agent="main", key=token, **more):
    messages = [{"role": "user", "content": "one two three"}]
    return {"model": f"openai/copepod:{agent}", "api_base": url, "api_key": key, "messages": messages, **more}


def error(agent="main", key=token):
    try:
        return litellm.completion(**ask(agent, key, max_retries=0)).choices[0].message.content
    except Exception as e:
        return f"{type(e).__name__} {e.status_code}"


def usage(counts):
    return [counts.prompt_tokens, counts.completion_tokens, counts.total_tokens]


async def leave():
    stream = await litellm.acompletion(**ask("endless", stream=True))
    await anext(stream)
    await stream.aclose()
    return (await litellm.acompletion(**ask("ended"))).choices[0].message.content


answer = litellm.completion(**ask())
chunks = list(litellm.completion(**ask(stream=True, stream_options={"include_usage": True})))
texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
print(
    json.dumps(
        {
            "answer": answer.choices[0].message.content,
            "usage": usage(answer.usage),
            "finish": answer.choices[0].finish_reason,
            "stream": [text for text in texts if text],
            "usage of the stream": usage(next(chunk.usage for chunk in chunks if getattr(chunk, "usage", None))),
            "wrong key": error(key="wrong"),
            "unknown agent": error("nobody"),
            "left": asyncio.run(leave()),
        }
    )
)
