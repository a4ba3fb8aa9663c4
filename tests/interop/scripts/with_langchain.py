"""LangChain's ChatOpenAI: `with_langchain.py URL TOKEN` prints what it saw, as JSON."""

import json
import sys
from contextlib import closing

from langchain_openai import ChatOpenAI

url, token = sys.argv[1:]


def chat(agent="main", key=token):
    return ChatOpenAI(model=f"copepod:{agent}", base_url=url, api_key=key, max_retries=0, timeout=20)


def error(agent="main", key=token):
    try:
        return chat(agent, key).invoke("one two three").content
    except Exception as e:
        return f"{type(e).__name__} {e.code}"


def usage(message):
    counts = message.usage_metadata
    return counts and [counts["input_tokens"], counts["output_tokens"], counts["total_tokens"]]


answer = chat().invoke("one two three")
chunks = list(chat().stream("one two three", stream_usage=True))
with closing(chat("endless").stream("go")) as stream:
    next(stream)
print(
    json.dumps(
        {
            "answer": answer.content,
            "usage": usage(answer),
            "finish": answer.response_metadata["finish_reason"],
            "stream": [chunk.content for chunk in chunks if chunk.content],
            "usage of the stream": next(filter(None, map(usage, chunks))),
            "wrong key": error(key="wrong"),
            "unknown agent": error("nobody"),
            "left": chat("ended").invoke("has it?").content,
        }
    )
)
