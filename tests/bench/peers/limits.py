"""What asyncio can do at most: `python limits.py streams|protocol PORT`.

Neither checks anything; both answer with bytes that were made before, an SSE chunk a write. `streams` is the limit of
what is written over asyncio streams, `protocol` that of what is written on an `asyncio.Protocol`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

from words import WORD

HIGH_WATER = 64 * 1024
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
CONTENT = re.compile(rb'"content": *"(\d+)(?: (\d+))?"')


def make_answer() -> bytes:
    body = {
        "id": "chatcmpl_00000000-0000-0000-0000-000000000000",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "copepod",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": WORD}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def make_event(delta: dict[str, str], reason: str | None) -> bytes:
    body = {
        "id": "chatcmpl_00000000-0000-0000-0000-000000000000",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": "copepod",
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
    }
    event = f"data: {json.dumps(body)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


ANSWER = make_answer()
FIRST = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + make_event(
    {"role": "assistant", "content": ""}, None
)
CHUNK = make_event({"content": WORD}, None)
LAST = make_event({}, "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def streamed(body: bytes) -> tuple[int, float] | None:
    """Return how many words are asked for and the seconds before each; None when not as a stream."""
    if b'"stream":true' not in body and b'"stream": true' not in body:
        return None
    *_, found = CONTENT.finditer(body)
    return int(found[1]), int(found[2] or 0) / 1000


async def serve_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            asked = streamed(await reader.readexactly(int(length[1]) if length else 0))
            if asked is None:
                writer.write(ANSWER)
                continue
            writer.write(FIRST)
            for _ in range(asked[0]):
                if asked[1]:
                    await asyncio.sleep(asked[1])
                writer.write(CHUNK)
                if writer.transport.get_write_buffer_size() > HIGH_WATER:
                    await writer.drain()
            writer.write(LAST)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


class Canned(asyncio.Protocol):
    """One connection; it takes a request that comes in one piece, as all of the bench do."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        asked = streamed(data)
        if asked is None:
            self.transport.write(ANSWER)
            return
        self.transport.write(FIRST)
        count, pause = asked
        if pause:
            self.later(count, pause)
            return
        for _ in range(count):
            self.transport.write(CHUNK)
        self.transport.write(LAST)

    def later(self, count: int, pause: float) -> None:
        if not count:
            self.transport.write(LAST)
        elif not self.transport.is_closing():
            asyncio.get_running_loop().call_later(pause, self.word, count - 1, pause)

    def word(self, count: int, pause: float) -> None:
        self.transport.write(CHUNK)
        self.later(count, pause)


async def main(name: str, port: int) -> None:
    if name == "streams":
        server = await asyncio.start_server(serve_streams, "127.0.0.1", port, backlog=1024)
    else:
        server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
