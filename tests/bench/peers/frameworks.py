"""Frameworks that bring their own server: `python frameworks.py aiohttp|sanic|microdot PORT`."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from answers import allowed, completion, events

PATH = "/v1/chat/completions"


def serve_aiohttp(port: int) -> None:
    from aiohttp import web

    async def chat(request: web.Request) -> web.StreamResponse:
        if not allowed(request.headers.get("Authorization", "")):
            raise web.HTTPUnauthorized
        call = await request.json()
        model, text = call["model"], call["messages"][-1]["content"]
        if not call.get("stream"):
            return web.json_response(await completion(model, text))
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async for event in events(model, text):
            await answer.write(event)
        await answer.write_eof()
        return answer

    app = web.Application()
    app.router.add_post(PATH, chat)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, backlog=1024)


def serve_sanic(port: int) -> None:
    from sanic import Request, Sanic
    from sanic import json as answer

    app = Sanic("bench", configure_logging=False)

    async def chat(request: Request) -> Any:
        if not allowed(request.headers.get("authorization", "")):
            return answer({"error": {}}, 401)
        call = request.json
        model, text = call["model"], call["messages"][-1]["content"]
        if not call.get("stream"):
            return answer(await completion(model, text))
        response = await request.respond(content_type="text/event-stream")
        async for event in events(model, text):
            await response.send(event)
        await response.eof()
        return None

    app.add_route(chat, PATH, methods=["POST"])
    app.run("127.0.0.1", port, single_process=True, access_log=False, motd=False, backlog=1024)


def serve_microdot(port: int) -> None:
    import microdot

    app = microdot.Microdot()

    async def chat(request: microdot.Request) -> Any:
        if not allowed(request.headers.get("Authorization", "")):
            return {"error": {}}, 401
        call = json.loads(request.body)
        model, text = call["model"], call["messages"][-1]["content"]
        if call.get("stream"):
            return words(model, text), 200, {"Content-Type": "text/event-stream"}
        return await completion(model, text)

    async def words(model: str, text: str) -> AsyncIterator[bytes]:
        async for event in events(model, text):
            yield event

    app.post(PATH)(chat)
    app.run("127.0.0.1", port)


if __name__ == "__main__":
    {"aiohttp": serve_aiohttp, "sanic": serve_sanic, "microdot": serve_microdot}[sys.argv[1]](int(sys.argv[2]))
