"""ASGI: `python asgi.py fastapi|starlette PORT` serves by uvicorn; hypercorn and granian are given `plain`."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from answers import allowed, completion, events

PATH = "/v1/chat/completions"

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def plain(scope: Message, receive: Receive, send: Send) -> None:
    """The application without a framework."""
    if scope["type"] == "lifespan":
        for done in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            await receive()
            await send({"type": done})
        return
    body, more = b"", True
    while more:
        part = await receive()
        body, more = body + part.get("body", b""), part.get("more_body", False)
    fields = dict(scope["headers"])
    if scope["path"] != PATH or not allowed(fields.get(b"authorization", b"").decode()):
        await whole(send, 401, b'{"error":{}}')
        return
    call = json.loads(body)
    model, text = call["model"], call["messages"][-1]["content"]
    if not call.get("stream"):
        await whole(send, 200, json.dumps(await completion(model, text)).encode())
        return
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events(model, text):
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def whole(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make_fastapi() -> Any:
    import fastapi
    from fastapi.responses import StreamingResponse
    from pydantic import BaseModel

    class Said(BaseModel):
        role: str
        content: str

    class Call(BaseModel):
        model: str
        messages: list[Said]
        stream: bool = False

    app = fastapi.FastAPI()

    async def chat(call: Call, request: fastapi.Request) -> Any:
        if not allowed(request.headers.get("authorization", "")):
            raise fastapi.HTTPException(401)
        text = call.messages[-1].content
        if call.stream:
            return StreamingResponse(events(call.model, text), media_type="text/event-stream")
        return await completion(call.model, text)

    chat.__annotations__ = {"call": Call, "request": fastapi.Request}  # the names above are this function's own
    Call.model_rebuild(_types_namespace={"Said": Said})
    app.post(PATH)(chat)
    return app


def make_starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def chat(request: Request) -> Response:
        if not allowed(request.headers.get("authorization", "")):
            return JSONResponse({"error": {}}, 401)
        call = await request.json()
        model, text = call["model"], call["messages"][-1]["content"]
        if call.get("stream"):
            return StreamingResponse(events(model, text), media_type="text/event-stream")
        return JSONResponse(await completion(model, text))

    return Starlette(routes=[Route(PATH, chat, methods=["POST"])])


if __name__ == "__main__":
    import uvicorn

    made = {"fastapi": make_fastapi, "starlette": make_starlette}[sys.argv[1]]()
    uvicorn.run(made, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
