"""The request that the bench makes, and the answer that a server must give before it is measured."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import NamedTuple

PEERS = Path(__file__).resolve().parent / "peers"
TOKEN: str = json.loads((PEERS / "copepod.json").read_text())["gateway"]["auth"]["token"]
WORD = "A copepod is small. "  # the agent's, in peers/words.py
WORDS = 500  # of a stream
REFUSED = (401, 400)  # LiteLLM's for a wrong key, when it has no database of keys, is 400
LAST_CHUNK = b"0\r\n\r\n"
OPEN = ("streams", "protocol", "portkey")  # have no key of their own that could be wrong


class Answer(NamedTuple):
    status: int
    body: bytes  # its chunks joined
    length: int  # bytes that came


def request(words: int | str, stream: bool, token: str = TOKEN, fields: str = "") -> bytes:
    """Return the bytes of a request for so many words, with further header fields, each with its line's end."""
    call = {"model": "copepod", "messages": [{"role": "user", "content": str(words)}], "stream": stream}
    body = json.dumps(call, separators=(",", ":")).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n{fields}"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def connect(port: int) -> socket.socket:
    """Return a connection to a server of this machine."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(connection: socket.socket, message: bytes) -> Answer:
    """Return the answer to `message`; ConnectionError when the connection ends in it."""
    connection.sendall(message)
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    before = len(head) + 4
    if b"content-length" in fields:
        while len(body) < int(fields[b"content-length"]):
            body += receive(connection)
        return Answer(status, body, before + len(body))
    if b"chunked" not in fields.get(b"transfer-encoding", b""):
        while piece := connection.recv(1 << 20):
            body += piece
        return Answer(status, body, before + len(body))
    while not body.endswith(LAST_CHUNK):
        body += receive(connection)
    return Answer(status, join(body), before + len(body))


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 20)
    if not data:
        raise ConnectionError("a server ended a connection in the middle of an answer")
    return data


def join(body: bytes) -> bytes:
    """Return what the chunks of a chunked body hold."""
    whole = b""
    while not body.startswith(b"0\r\n"):
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole


def ask(port: int, message: bytes) -> Answer:
    """Return the answer on a connection of its own: some servers close theirs after each."""
    with connect(port) as connection:
        return exchange(connection, message)


def check(name: str, port: int, fields: str = "") -> int:
    """Return how many events a stream of WORDS words has; AssertionError when the server does not keep the contract."""
    status, body, _ = ask(port, request(1, False, fields=fields))
    answer = json.loads(body)
    assert (status, answer["object"]) == (200, "chat.completion"), (name, body)
    message = answer["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", WORD), (name, body)
    status, body, _ = ask(port, request(WORDS, True, fields=fields))
    *chunks, done, end = body.decode().split("\n\n")
    assert (status, done, end) == (200, "data: [DONE]", ""), (name, status, done)
    choices = [choice for chunk in chunks for choice in json.loads(chunk.removeprefix("data: "))["choices"]]
    assert [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")] == [WORD] * WORDS, name
    assert name in OPEN or ask(port, request(1, False, "wrong", fields)).status in REFUSED, name
    return len(chunks) + 1
