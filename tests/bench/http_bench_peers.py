"""The servers that the gateway is measured against: `python http_bench_peers.py NAME PORT`.

Each checks the bearer token, reads the JSON, and answers with the agent's words in OpenAI's shape, streamed or not;
`bare` alone checks nothing and writes canned bytes: what asyncio streams can do at most.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from http_bench_agent import WORD, reply

TOKEN = "a-token-for-the-bench-alone"  # noqa: S105  # that of http_bench.json
HIGH_WATER = 64 * 1024


def allowed(authorization: str) -> bool:
    scheme, _, token = authorization.partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(token, TOKEN)


def completion(model: str, text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl_{uuid.uuid4()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


async def events(model: str, text: str) -> AsyncIterator[bytes]:
    chunk: dict[str, Any] = {
        "id": f"chatcmpl_{uuid.uuid4()}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }

    def event(delta: dict[str, str], reason: str | None) -> bytes:
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return f"data: {json.dumps(chunk)}\n\n".encode()

    yield event({"role": "assistant", "content": ""}, None)
    async for word in reply(text):
        yield event({"content": word}, None)
    yield event({}, "stop")
    yield b"data: [DONE]\n\n"


def serve_fastapi(port: int) -> None:
    import fastapi
    import uvicorn
    from fastapi.responses import StreamingResponse
    from pydantic import BaseModel

    class Message(BaseModel):
        role: str
        content: str

    class Call(BaseModel):
        model: str
        messages: list[Message]
        stream: bool = False

    app = fastapi.FastAPI()

    async def chat(call: Call, request: fastapi.Request) -> Any:
        if not allowed(request.headers.get("authorization", "")):
            raise fastapi.HTTPException(401)
        text = call.messages[-1].content
        if call.stream:
            return StreamingResponse(events(call.model, text), media_type="text/event-stream")
        return completion(call.model, "".join([word async for word in reply(text)]))

    chat.__annotations__ = {"call": Call, "request": fastapi.Request}  # the names above are this function's own
    Call.model_rebuild(_types_namespace={"Message": Message})
    app.post("/v1/chat/completions")(chat)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def serve_aiohttp(port: int) -> None:
    from aiohttp import web

    async def chat(request: web.Request) -> web.StreamResponse:
        if not allowed(request.headers.get("Authorization", "")):
            raise web.HTTPUnauthorized
        call = await request.json()
        model, text = call["model"], call["messages"][-1]["content"]
        if not call.get("stream"):
            return web.json_response(completion(model, "".join([word async for word in reply(text)])))
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async for event in events(model, text):
            await answer.write(event)
        await answer.write_eof()
        return answer

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def serve_bare(port: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    body = json.dumps(completion("copepod", WORD)).encode()
    answer = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    start = head.replace(b"application/json", b"text/event-stream") + b"Transfer-Encoding: chunked\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head[head.rindex(b" ") : -4]))  # Content-Length comes last
                if b'"stream":true' not in body:
                    writer.write(answer)
                    continue
                writer.write(start + pieces[0])
                for _ in range(int(json.loads(body)["messages"][-1]["content"])):
                    writer.write(pieces[1])
                    if writer.transport.get_write_buffer_size() > HIGH_WATER:
                        await writer.drain()
                writer.write(pieces[2] + pieces[3] + b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        pieces.extend([b"%x\r\n%b\r\n" % (len(event), event) async for event in events("copepod", "1")])
        server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()

    pieces: list[bytes] = []
    asyncio.run(main())


if __name__ == "__main__":
    {"fastapi": serve_fastapi, "aiohttp": serve_aiohttp, "bare": serve_bare}[sys.argv[1]](int(sys.argv[2]))
