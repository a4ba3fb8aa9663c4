"""What is said of wrong requests of the gateway protocol, word for word."""

from __future__ import annotations

from typing import Any

import pytest

import schema

CONNECT = {"minProtocol": 3, "maxProtocol": 3, "client": {"id": "x", "version": "1", "platform": "p", "mode": "m"}}
TURN = {"message": "hi", "idempotencyKey": "k"}
CASES: list[tuple[str, Any, str]] = [
    ("request frame", {"type": "req", "id": "1", "method": "x", "params": 5}, ""),
    (
        "request frame",
        {"type": "event", "event": "x"},
        "must have required property 'id'; must have required property 'method'; at root: unexpected property 'event'; "
        "at /type: must be equal to constant",
    ),
    ("request frame", {"type": "req", "id": "", "method": "x"}, "at /id: must NOT have fewer than 1 characters"),
    ("request frame", {"type": "req", "id": 1, "method": "x"}, "at /id: must be string"),
    ("connect", CONNECT, ""),
    ("connect", {**CONNECT, "bogus": 1}, "at root: unexpected property 'bogus'"),
    ("connect", {**CONNECT, "minProtocol": 0}, "at /minProtocol: must be >= 1"),
    ("connect", {**CONNECT, "minProtocol": 2**32}, "at /minProtocol: must be <= 2147483648"),
    ("connect", {**CONNECT, "minProtocol": True}, "at /minProtocol: must be integer"),
    ("connect", {**CONNECT, "minProtocol": 3.5}, "at /minProtocol: must be integer"),
    ("connect", {**CONNECT, "minProtocol": 3.0}, ""),
    ("connect", {**CONNECT, "client": "x"}, "at /client: must be object"),
    ("connect", {**CONNECT, "client": {**CONNECT["client"], "x": 1}}, "at /client: unexpected property 'x'"),
    ("connect", {**CONNECT, "client": {**CONNECT["client"], "id": "x" * 64}}, ""),
    (
        "connect",
        {**CONNECT, "client": {**CONNECT["client"], "id": "x" * 65}},
        "at /client/id: must NOT have more than 64 characters",
    ),
    (
        "connect",
        {**CONNECT, "client": {**CONNECT["client"], "id": "a\n"}},
        "at /client/id: must NOT have control characters",
    ),
    ("connect", {**CONNECT, "caps": "x"}, "at /caps: must be array"),
    ("connect", {**CONNECT, "caps": [1]}, "at /caps: items must be string"),
    ("connect", {**CONNECT, "permissions": []}, "at /permissions: must be object"),
    ("connect", {**CONNECT, "auth": {"token": 5}}, "at /auth/token: must be string"),
    ("agent", TURN, ""),
    ("agent", {}, "must have required property 'message'; must have required property 'idempotencyKey'"),
    ("agent", {**TURN, "message": ""}, "at /message: must NOT have fewer than 1 characters"),
    ("agent", {**TURN, "timeout": 0.5}, ""),
    ("agent", {**TURN, "timeout": "1"}, "at /timeout: must be number"),
    ("agent", {**TURN, "deliver": False, "attachments": []}, ""),
    ("agent", {**TURN, "deliver": 1}, "at /deliver: must be boolean"),
    ("agent", {**TURN, "deliver": True}, "at /deliver: must be false: this gateway has no channels to deliver to"),
    ("agent", {**TURN, "attachments": [{}]}, "at /attachments: attachments are not taken"),
    ("agent", {**TURN, "attachments": {}}, "at /attachments: must be array"),
    ("agent", {**TURN, "sessionKey": "a\tb"}, "at /sessionKey: must NOT have control characters"),
    ("agent", {**TURN, "idempotencyKey": "k\nforged"}, "at /idempotencyKey: must NOT have control characters"),
    ("agent", [], "must be object"),
    ("chat.history", {"sessionKey": "k", "limit": 1001}, "at /limit: must be <= 1000"),
    ("sessions.preview", {"keys": ["k"] * 65}, "at /keys: must NOT have more than 64 items"),
    ("sessions.patch", {"key": "k", "label": None}, ""),
    ("sessions.list", {"includeGlobal": "x"}, "at /includeGlobal: must be boolean"),
    ("health", {"probe": "bad"}, ""),
]


@pytest.mark.parametrize(("name", "value", "said"), CASES)
def test_problem(name: str, value: Any, said: str) -> None:
    assert schema.problem(name, value) == said


def test_not_all_of_many_problems_are_said() -> None:
    said = schema.problem("agent.wait", {"x" * 100 + str(n): n for n in range(1000)})
    assert len(said.split("; ")) == schema.MAX_SAID
    assert len(said) < 1000
