"""An echo server on `rfc6455` for the conformance suite and the benchmark: `websocket_echo.py PORT` (0: any)."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rfc6455

MAX_MESSAGE = 16 * 1024 * 1024  # the suite's performance cases send 16 MiB


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    answer = rfc6455.accept(request_line.split()[0], fields)
    head = "".join(f"{name}: {value}\r\n" for name, value in answer)
    writer.write(f"HTTP/1.1 101 Switching Protocols\r\n{head}\r\n".encode())
    websocket = rfc6455.WebSocket(reader, writer, max_message=MAX_MESSAGE)
    while (message := await websocket.receive()) is not None:
        await websocket.send(message)


async def main(port: int) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
