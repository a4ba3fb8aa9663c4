"""A scripted OpenAI-compatible server, to stand behind a gateway under test."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from live import KEY, chunked, reset, within


class Call:
    """One request that came, and the means to answer it."""

    def __init__(self, start: str, fields: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        self.method, self.path = start.split(" ")[:2]
        self.fields, self.body, self.writer = fields, body, writer
        self.left = asyncio.Event()  # the client has closed or reset the connection
        self.left_at = 0.0  # when, by the loop's clock
        self.done = (
            asyncio.Event()
        )  # no more is to come: set by a test that answers by itself, and when the client left
        self.close = False  # the connection ends with this answer

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def answer(self, status: int, body: bytes, *fields: str, type: str = "application/json") -> None:
        lines = "".join(f"{line}\r\n" for line in (f"Content-Type: {type}", f"Content-Length: {len(body)}", *fields))
        self.writer.write(f"HTTP/1.1 {status} As Told\r\n{lines}\r\n".encode() + body)

    def begin(self) -> None:
        """Send the head of a stream."""
        self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        self.writer.write(chunked(f"data: {text}\n\n".encode())[:-5])

    def word(self, text: str) -> None:
        self.event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    def finish(self, reason: str = "stop") -> None:
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})

    def usage(self, prompt: int, completion: int) -> None:
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        self.event({"choices": [], "usage": usage})

    def end(self) -> None:
        self.event("[DONE]")
        self.writer.write(b"0\r\n\r\n")

    def reset(self) -> None:
        reset(self.writer)


Script = Callable[[Call], Awaitable[None]]


def says(*words: str) -> Script:
    """Answers with these words, and four tokens of usage after the finish."""

    async def script(call: Call) -> None:
        call.begin()
        for word in words:
            call.word(word)
        call.finish()
        call.usage(3, 1)
        call.end()

    return script


def answers(status: int, body: bytes, *fields: str, type: str = "application/json") -> Script:
    async def script(call: Call) -> None:
        call.answer(status, body, *fields, type=type)

    return script


def sends(data: bytes, *, reset: bool = False) -> Script:
    """Sends these bytes, whatever they are, and ends the connection."""

    async def script(call: Call) -> None:
        call.writer.write(data)
        call.close = True
        if reset:
            call.reset()

    return script


async def waits(call: Call) -> None:
    """Leaves the answer to the test, until that is done or the gateway has left."""
    await call.done.wait()


class Upstream:
    """The server, for `async with`; each of its requests is answered by `script`."""

    def __init__(self, script: Script = waits) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.active = self.peak = self.connections = 0
        self.port = 0
        self._arrived: asyncio.Queue[Call] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()

    def settings(self, **more: Any) -> dict[str, Any]:
        """What a configuration needs so that its agents are answered from here."""
        provider: dict[str, Any] = {
            "api": "openai-completions",
            "baseUrl": f"http://127.0.0.1:{self.port}/v1",
            "apiKey": KEY,
        }
        provider |= {"retry": {"tries": 1}, **more}
        return {"models.providers.up": provider, "agents.defaults.model": "up/large"}

    async def call(self) -> Call:
        """The next request that comes, or came."""
        call: Call = await within(self._arrived.get())
        return call

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                call = Call(start, fields, await reader.readexactly(int(fields["content-length"])), writer)
                await self._answer(call, reader)
                if call.close or call.left.is_set():
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the gateway has left, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, call: Call, reader: asyncio.StreamReader) -> None:
        self.calls.append(call)
        self.active += 1
        self.peak = max(self.peak, self.active)
        self._arrived.put_nowait(call)
        watch = asyncio.ensure_future(self._watch(call, reader))
        try:
            await self.script(call)
        finally:
            self.active -= 1
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, call: Call, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            assert await reader.read(1) == b"", "the gateway wrote behind a request that is not answered"
        call.left_at = asyncio.get_running_loop().time()
        call.left.set()
        call.done.set()
