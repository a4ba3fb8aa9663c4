"""Every row of the error table, provoked for real: what the client gets, and what becomes of its connection."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

import chat_answers
import chat_completions
import exchange
import gateway
import runs
from live import (
    CHAT,
    KEY,
    Answer,
    Client,
    ask,
    chat,
    checked_error,
    chunked,
    data_of,
    run,
    serving,
    stream,
    text_of,
    within,
)
from upstream import Call, Script, Upstream, answers, says, sends

MIB = 1_048_576


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)


class Row(NamedTuple):
    """An answer that is an error."""

    status: int
    type: str
    code: str | None = None
    says: str = ""  # stands in the message
    retry_after: str | None = None
    repeat: bool = True  # False: x-should-retry says so
    param: str | None = None


def check(answer: Answer, row: Row) -> None:
    assert answer.status == row.status, answer
    error = answer.error
    assert (error["type"], error["code"], error["param"]) == (row.type, row.code, row.param), answer
    assert row.says in error["message"], error
    assert answer.fields.get("retry-after") == row.retry_after
    assert answer.fields.get("x-should-retry") == (None if row.repeat else "false")


# The upstream


def refusal(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "some_error", "param": None, "code": None}}).encode()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
AUTH = Row(502, "upstream_auth_error", repeat=False)
TAKEN = Row(502, "upstream_error", repeat=False)
UPSTREAM: list[tuple[str, Script, Row]] = [
    ("400", answers(400, refusal("too long a context")), Row(400, "invalid_request_error", says="too long a context")),
    ("400 text", answers(400, b"/srv/x.py: no", type="text/plain"), Row(400, "invalid_request_error", says="400")),
    ("400 with key", answers(400, refusal(f"bad {KEY}")), Row(400, "invalid_request_error", says="bad ***")),
    ("401", answers(401, refusal("who?")), AUTH),
    ("402", answers(402, refusal("pay")), AUTH),
    ("403", answers(403, refusal("no")), AUTH),
    ("404", answers(404, refusal("no such model")), Row(400, "invalid_request_error", says="no such model")),
    ("422", answers(422, refusal("bad tools")), Row(400, "invalid_request_error", says="bad tools")),
    ("429", answers(429, refusal("slow"), "Retry-After: 7"), Row(429, "rate_limit_error", retry_after="7")),
    ("429 at once", answers(429, b"", "Retry-After: 0"), Row(429, "rate_limit_error", retry_after="1")),
    ("500", answers(500, refusal("trace of /srv/app.py")), TAKEN),
    ("503", answers(503, refusal("busy"), "Retry-After: 9"), Row(502, "upstream_error")),
    ("301", answers(301, b"", "Location: http://127.0.0.1:1/"), AUTH),
    ("307", answers(307, b"", "Location: /elsewhere"), AUTH),
    ("reset", sends(b"", reset=True), TAKEN),
    ("closed", sends(b""), TAKEN),
    ("half a head", sends(b"HTTP/1.1 200 OK\r\nContent-Ty"), TAKEN),
    ("no HTTP", sends(b"SSH-2.0-OpenSSH_9.6\r\n"), TAKEN),
    ("bad framing", sends(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), TAKEN),
    ("half a chunk", sends(HEAD + b"20\r\ndata: {"), TAKEN),
    ("no chunks", sends(HEAD + b"hello\r\n"), TAKEN),
    ("nothing said", sends(HEAD + b"0\r\n\r\n"), TAKEN),
    ("no JSON", sends(HEAD + chunked(b"data: words\n\n")), TAKEN),
    ("no object", sends(HEAD + chunked(b"data: 7\n\n")), TAKEN),
    ("strange JSON", sends(HEAD + chunked(b'data: {"choices":[{"delta":{"content":7}}]}\n\n')), TAKEN),
    ("deep JSON", sends(HEAD + chunked(b"data: " + b"[" * 100_000 + b"\n\n")), TAKEN),
    ("HTML", answers(200, b"<html>Sign in to the hotel</html>", type="text/html"), TAKEN),
    ("empty JSON", answers(200, b"{}"), TAKEN),
    ("error in a stream", sends(HEAD + chunked(b"data: " + refusal("it broke") + b"\n\n")), TAKEN),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("script", "row"), [row[1:] for row in UPSTREAM], ids=[row[0] for row in UPSTREAM])
def test_upstream(script: Script, row: Row, streamed: bool) -> None:
    async def main() -> None:
        async with (
            Upstream(script) as upstream,
            serving(upstream.settings()) as hub,
            await Client.open(hub.port) as client,
        ):
            client.say("hi", stream=streamed)
            check(await client.answer(), row)
            assert await client.usable()
            assert len(upstream.calls) == 1  # neither repeated nor followed

    run(main())


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_upstream_that_is_not_there(streamed: bool) -> None:
    async def main() -> None:
        with socket.socket() as closed:  # bound and not listening: refused
            closed.bind(("127.0.0.1", 0))
            upstream = Upstream()
            upstream.port = closed.getsockname()[1]
            async with serving(upstream.settings()) as hub:
                check(await ask(hub, stream=streamed), Row(502, "upstream_error", says="could not be reached"))

    run(main())


def test_upstream_date_in_retry_after() -> None:
    async def main() -> None:
        script = answers(429, b"", "Retry-After: Wed, 21 Oct 2037 07:28:00 GMT")
        async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
            check(await ask(hub), Row(429, "rate_limit_error", retry_after="86400"))

    run(main())


async def breaks(call: Call) -> None:
    call.begin()
    call.word("first")
    await call.writer.drain()
    call.close = True


@pytest.mark.parametrize("ending", ["closed", "reset", "nonsense", "error"])
def test_upstream_that_dies_behind_its_first_word(ending: str) -> None:
    """The head has gone out with 200: an error event and [DONE] tell of it, and the connection stays."""

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub, await Client.open(hub.port) as client:
            client.say("hi", stream=True)
            call = await upstream.call()
            call.begin()
            call.word("first")
            assert (await client.head())[0] == 200
            events = client.events()
            while '"first"' not in await within(anext(events)):
                pass
            if ending == "reset":
                call.reset()
            elif ending == "nonsense":
                call.event("}{")
            elif ending == "error":
                call.event({"error": {"message": "it broke", "code": 500}})
            call.close = True
            call.done.set()
            error, done = [event async for event in events]
            assert done == "data: [DONE]"
            told = checked_error(json.loads(error[6:]))
            assert (told["type"], told["code"], told["param"]) == ("upstream_error", None, None)
            assert await client.usable()
        async with Upstream(breaks) as upstream, serving(upstream.settings()) as hub:
            check(await ask(hub), TAKEN)

    run(main())


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("whose", ["agent", "provider"])
def test_upstream_that_hangs(whose: str, streamed: bool) -> None:
    async def main() -> None:
        limit = {"agents.defaults.timeoutSeconds": 0.5} if whose == "agent" else {}
        more = {"timeoutSeconds": 0.5} if whose == "provider" else {}
        async with (
            Upstream() as upstream,
            serving({**upstream.settings(**more), **limit}) as hub,
            await Client.open(hub.port) as client,
        ):
            client.say("hi", stream=streamed)
            call = await upstream.call()
            check(await client.answer(), Row(504, "timeout_error", repeat=False))
            await within(call.left.wait())
            assert await client.usable()

    run(main())


def test_upstream_that_hangs_behind_its_first_word() -> None:
    async def main() -> None:
        async with (
            Upstream() as upstream,
            serving({**upstream.settings(), "agents.defaults.timeoutSeconds": 0.5}) as hub,
            await Client.open(hub.port) as client,
        ):
            client.say("hi", stream=True)
            call = await upstream.call()
            call.begin()
            call.word("first")
            assert (await client.head())[0] == 200
            *_, error, done = [event async for event in client.events()]
            assert checked_error(json.loads(error[6:]))["type"] == "timeout_error"
            assert done == "data: [DONE]"
            await within(call.left.wait())

    run(main())


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_run_that_an_operator_aborts(streamed: bool, behind: bool) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def agent(message: str) -> AsyncIterator[str]:
            if behind:
                yield "first"
            begun.set()
            await asyncio.Event().wait()

        async with serving(agents={"main": agent}) as hub, await Client.open(hub.port) as client:
            client.say(stream=streamed)
            await within(begun.wait())
            (active,) = hub.runs.active
            hub.runs.stop(active, runs.RunError("cancelled", "The run was aborted."))
            if streamed and behind:
                assert (await client.head())[0] == 200
                *_, error, done = [event async for event in client.events()]
                assert checked_error(json.loads(error[6:]))["code"] == "run_aborted"
                assert done == "data: [DONE]"
            else:
                row = Row(500, "server_error", "run_aborted", "The run was aborted.", repeat=False)
                check(await client.answer(), row)
            client.say(stream=streamed)  # the connection can go on
            begun.clear()
            await within(begun.wait())

    run(main())


MEASURED = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
NOTHING = dict.fromkeys(MEASURED, 0)


async def usage_first(call: Call) -> None:
    call.begin()
    call.word("hi")
    call.usage(3, 1)
    call.finish("length")
    call.end()


async def no_usage(call: Call) -> None:
    call.begin()
    call.word("hi")
    call.finish("content_filter")
    call.end()


WHOLE = json.dumps(
    {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}], "usage": MEASURED}
).encode()


@pytest.mark.parametrize(
    ("script", "finish", "usage"),
    [
        (says("h", "i"), "stop", MEASURED),
        (usage_first, "length", MEASURED),
        (no_usage, "content_filter", NOTHING),
        (answers(200, WHOLE), "stop", MEASURED),
        (sends(HEAD + chunked(b'data: {"choices":[{"delta":{"content":"hi"}}]}\r\n\r\ndata: [DONE]')), "stop", NOTHING),
    ],
    ids=["usage behind", "usage before", "no usage", "JSON", "no finish"],
)
def test_upstream_that_answers_in_its_own_way(script: Script, finish: str, usage: dict[str, int]) -> None:
    async def main() -> None:
        async with Upstream(script) as upstream, serving(upstream.settings()) as hub:
            whole = await ask(hub)
            assert whole.text == "hi"
            assert whole.json["choices"][0]["finish_reason"] == finish
            assert whole.json["usage"] == usage
            _, events = await stream(hub, stream_options={"include_usage": True})
            assert text_of(events) == "hi"
            assert events[-1] == "data: [DONE]"
            *_, last, measured = data_of(events)
            assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": finish}]
            assert (measured["choices"], measured["usage"]) == ([], usage)

    run(main())


# Commands


def program(script: str, **more: Any) -> dict[str, Any]:
    provider = {"api": "command", "command": sys.executable, "args": ["-I", "-S", "-c", script], **more}
    return {"models.providers.tool": provider, "agents.defaults.model": "tool/x"}


NO_PROGRAM = {
    "models.providers.tool": {"api": "command", "command": "no-such-program"},
    "agents.defaults.model": "tool/x",
}
COMMANDS = [
    ("missing", NO_PROGRAM, Row(502, "upstream_error", says="not found")),
    ("exits 3", program("import sys; sys.exit(3)"), TAKEN._replace(says="code 3")),
    ("raises", program("raise ValueError('/etc/secret')"), TAKEN._replace(says="code 1")),
    ("killed", program("import os; os.kill(os.getpid(), 9)"), TAKEN._replace(says="SIGKILL")),
    ("prints nothing", program("pass"), TAKEN._replace(says="nothing")),
    ("too late", program("import time; time.sleep(99)", timeoutSeconds=0.2), Row(504, "timeout_error", repeat=False)),
    (
        "ignores SIGTERM",
        {
            **program("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"),
            "agents.defaults.timeoutSeconds": 0.3,
        },
        Row(504, "timeout_error", repeat=False),
    ),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("config", "row"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS])
def test_command(config: dict[str, Any], row: Row, streamed: bool) -> None:
    async def main() -> None:
        async with serving(config) as hub, await Client.open(hub.port) as client:
            client.say("hi", stream=streamed)
            check(await client.answer(), row)
            assert await client.usable()

    run(main())


def test_command_that_fails_behind_its_first_word() -> None:
    async def main() -> None:
        async with serving(program("import sys; print('first', flush=True); sys.exit(3)")) as hub:
            check(await ask(hub), TAKEN._replace(says="code 3"))
            answer, events = await stream(hub)
            assert answer.status == 200
            assert text_of(events[:-2]) == "first\n"
            assert "code 3" in checked_error(json.loads(events[-2][6:]))["message"]
            assert events[-1] == "data: [DONE]"

    run(main())


def test_command_that_floods_stderr() -> None:
    async def main() -> None:
        script = "import sys; sys.stderr.write('x' * 99 + '\\n' * 4_000_000); print(sys.stdin.read())"
        async with serving(program(script)) as hub:
            assert (await ask(hub, "hello")).text == "hello\n"

    run(main())


@pytest.mark.parametrize("text", ["a\0b", "x" * 128_001], ids=["NUL", "long"])
def test_command_argument_that_cannot_be(text: str) -> None:
    async def main() -> None:
        config = {
            "models.providers.tool": {"api": "command", "command": "echo", "args": ["{message}"]},
            "agents.defaults.model": "tool/x",
        }
        async with serving(config) as hub:
            check(await ask(hub, text), Row(400, "invalid_request_error"))

    run(main())


# Python agents, lanes, places


async def raises(message: str) -> AsyncIterator[str]:
    if message == "late":
        yield "first"
    raise RuntimeError("a secret of the inside")


def test_python_agent_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(agents={"main": raises}) as hub:
            for streamed in (False, True):
                answer = await ask(hub, stream=streamed)
                check(answer, Row(500, "server_error", repeat=False))
                assert b"secret" not in answer.body
            _, events = await stream(hub, "late")
            assert "secret" not in events[-2]
            assert checked_error(json.loads(events[-2][6:]))["type"] == "server_error"

    run(main())
    assert "a secret of the inside" in caplog.text  # for the operator


def test_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyError("a secret of the inside")

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            monkeypatch.setattr(chat_completions, "parse_request", fail)
            client.say()
            answer = await client.answer()
            check(answer, Row(500, "server_error"))
            assert b"secret" not in answer.body
            assert await client.ended()

    run(main())


@pytest.mark.parametrize("where", ["take", "end"])
def test_bug_of_ours_behind_the_first_word(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an answer does not look like a whole one."""
    right = getattr(chat_answers.EventStream, where)

    def fail(self: Any, *event: Any) -> bool:
        if where == "take":
            right(self, *event)
        raise KeyError("a secret of the inside")

    async def main() -> None:
        monkeypatch.setattr(chat_answers.EventStream, where, fail)
        async with serving() as hub, await Client.open(hub.port) as client:
            client.say(stream=True)
            assert (await client.head())[0] == 200
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                [event async for event in client.events()]

    run(main())


FULL = Row(503, "overloaded_error", retry_after="1")


def test_full_lane() -> None:
    """One runs, 32 wait, the next is refused; and another session is not."""

    async def main() -> None:
        async with Upstream() as upstream, serving(upstream.settings()) as hub:
            lane = [asyncio.ensure_future(ask(hub, user="ann"))]
            first = await upstream.call()
            accepted = asyncio.Semaphore(0)
            hub.runs.observers.append(lambda run, event: accepted.release() if event[0] == "accepted" else None)
            lane += [asyncio.ensure_future(ask(hub, user="ann")) for _ in range(32)]
            for _ in range(32):
                await within(accepted.acquire())
            for streamed in (False, True):
                check(await ask(hub, user="ann", stream=streamed), FULL)
            upstream.script = says("hi")
            assert (await ask(hub, user="bob")).text == "hi"
            await says("first")(first)
            first.done.set()
            assert [(await answer).status for answer in lane] == [200] * 33

    run(main())


def test_full_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_WAITING", 2)

    async def main() -> None:
        async with Upstream() as upstream, serving({**upstream.settings(), "agents.defaults.maxConcurrent": 1}) as hub:
            calls = [asyncio.ensure_future(ask(hub))]
            first = await upstream.call()
            accepted = asyncio.Semaphore(0)
            hub.runs.observers.append(lambda run, event: accepted.release() if event[0] == "accepted" else None)
            calls += [asyncio.ensure_future(ask(hub)) for _ in range(2)]
            for _ in range(2):
                await within(accepted.acquire())
            check(await ask(hub), FULL)
            upstream.script = says("hi")
            await says("first")(first)
            first.done.set()
            assert [(await call).status for call in calls] == [200] * 3

    run(main())


def test_time_runs_out_in_the_queue() -> None:
    async def main() -> None:
        agents = [{"id": "slow"}, {"id": "quick", "timeoutSeconds": 0.1}]
        config = {"agents.list": agents, "agents.defaults.maxConcurrent": 1}
        async with Upstream() as upstream, serving({**upstream.settings(), **config}) as hub:
            running = asyncio.ensure_future(ask(hub, model="agent:slow"))
            call = await upstream.call()
            for streamed in (False, True):
                check(await ask(hub, model="agent:quick", stream=streamed), Row(504, "timeout_error", repeat=False))
            await says("hi")(call)
            call.done.set()
            assert (await running).text == "hi"
            assert len(upstream.calls) == 1

    run(main())


# What the caller did wrong


def message(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def messages(*entries: Any) -> bytes:
    return json.dumps({"messages": entries}).encode()


BODIES: list[tuple[bytes, str | None, str]] = [  # body, param, a piece of the message
    (b"", None, "empty"),
    (b" \r\n", None, "empty"),
    (b"{", None, "JSON"),
    (b"{'messages': []}", None, "JSON"),
    (b'{"messages": [],}', None, "JSON"),
    (message() + b"x", None, "JSON"),
    (message() + message(), None, "JSON"),
    (b"[]", None, "an array"),
    (b'"hi"', None, "a string"),
    (b"null", None, "null"),
    (b"true", None, "a boolean"),
    (b"7", None, "a number"),
    (b'{"messages": "\xff"}', None, "UTF-8"),
    (message().decode().encode("utf-16"), None, "UTF-8"),
    (b'{"temperature": NaN}', None, "NaN"),
    (b'{"temperature": -Infinity}', None, "Infinity"),
    (b'{"seed": ' + b"9" * 5000 + b"}", None, "digits"),
    (b'{"temperature": 1e999}', None, "too large"),
    (b"[" * 60_000, None, "nested"),
    (b'{"a":' * 60_000 + b"1" + b"}" * 60_000, None, "nested"),
    (b'{"a": [' + b"[]," * 40_000 + b"0]}", None, "more than 65536 values"),
    (b'{"messages": "a\nb"}', None, "JSON"),
    (b"{}", "messages", "`messages`"),
    (b'{"messages": null}', "messages", "`messages`"),
    (b'{"messages": "hi"}', "messages", "`messages`"),
    (messages(), "messages", "non-empty"),
    (messages("hi"), "messages[0]", "object"),
    (messages({"content": "hi"}), "messages[0].role", "role"),
    (messages({"role": "user", "content": 7}), "messages[0].content", "content"),
    (messages({"role": "user", "content": ["hi"]}), "messages[0].content[0]", "object"),
    (messages({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text", "string"),
    (messages({"role": "user", "content": ""}), "messages", "Missing user message in `messages`."),
    (messages({"role": "system", "content": "hi"}), "messages", "Missing user message in `messages`."),
    (messages({"role": "assistant", "content": "hi"}), "messages", "Missing user message in `messages`."),
    (messages({"role": "wizard", "content": "hi"}), "messages", "Missing user message in `messages`."),
    (message(model=7), "model", "`model`"),
    (message(stream="yes"), "stream", "`stream`"),
    (message(stream=1), "stream", "`stream`"),
    (message(stream_options=[]), "stream_options", "`stream_options`"),
    (message(stream_options={"include_usage": "x"}), "stream_options.include_usage", "include_usage"),
    (message(n=2), "n", "`n`"),
    (message(n=True), "n", "`n`"),
    (message(temperature="hot"), "temperature", "`temperature`"),
    (message(temperature=True), "temperature", "`temperature`"),
    (message(max_tokens=1.5), "max_tokens", "`max_tokens`"),
    (message(stop=[1]), "stop", "`stop`"),
    (message(tools=["x"]), "tools", "`tools`"),
    (message(response_format="json"), "response_format", "`response_format`"),
]


def test_bodies() -> None:
    """All on one connection, which outlives each."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            for body, param, says in BODIES:
                answer = await client.ask("POST", CHAT, body)
                check(answer, Row(400, "invalid_request_error", says=says, param=param))
            for body in (
                b"\xef\xbb\xbf" + message(),
                message(model=None, stream=None, n=None, temperature=None, stop=None, tools=None, messages_=7),
                message(n=1, user=None, x_unknown={"a": [1]}),
                b'{"messages": 7, ' + message()[1:],  # the last of two wins
            ):
                assert (await client.ask("POST", CHAT, body)).text == "hi"
            lone = await client.ask("POST", CHAT, b'{"messages":[{"role":"user","content":"a\\ud800b"}]}')
            assert lone.text == "a\ufffdb"

    run(main())


def sized(size: int) -> bytes:
    return chat("x" * (size - len(chat(""))))


@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_size(framing: str) -> None:
    async def main() -> None:
        async with serving() as hub:
            for size, status in ((MIB, 200), (MIB + 1, 413)):
                async with await Client.open(hub.port) as client:
                    body = sized(size)
                    assert len(body) == size
                    if framing == "declared":
                        answer = await client.ask("POST", CHAT, body)
                    else:
                        pieces = [body[at : at + 50_000] for at in range(0, size, 50_000)]
                        fields = {"Transfer-Encoding": "chunked"}
                        client.send("POST", CHAT, None, fields)
                        client.write(chunked(*pieces))
                        answer = await client.answer()
                    if status == 200:
                        assert len(answer.text) == size - len(chat(""))
                        assert await client.usable()
                    else:
                        check(answer, Row(413, "invalid_request_error", says="larger"))
                        assert answer.fields["connection"] == "close"
                        assert await client.ended()

    run(main())


TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": "secret"}
DENIED = Row(401, "authentication_error", "invalid_api_key")


def test_credentials() -> None:
    async def main() -> None:
        async with serving(TOKEN) as hub, await Client.open(hub.port) as client:
            wrong = ("", "Bearer", "Bearer ", "Bearer Secret", "Bearer secret x", "Basic secret", "secret")
            for credential in (None, *wrong):
                fields = {} if credential is None else {"Authorization": credential}
                for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("HEAD", "/v1/models")):
                    answer = await client.ask(method, path, chat() if method == "POST" else None, fields)
                    if method == "HEAD":
                        assert (answer.status, answer.body) == (401, b"")
                    else:
                        check(answer, DENIED)
                    assert answer.fields["www-authenticate"] == "Bearer"
            for credential in ("Bearer secret", "bearer  secret "):
                assert (await client.ask("POST", CHAT, chat(), {"Authorization": credential})).status == 200

    run(main())


LOCKED = Row(429, "rate_limit_error", "too_many_auth_failures", retry_after="120", repeat=False)


def test_lockout() -> None:
    async def main() -> None:
        limit = {"maxAttempts": 2, "windowMs": 60000, "lockoutMs": 120000, "exemptLoopback": False}
        async with serving({**TOKEN, "gateway.auth.rateLimit": limit}) as hub, await Client.open(hub.port) as client:
            for credential, row in (
                (None, DENIED),  # a missing one does not count
                ("Bearer wrong", DENIED),
                ("Bearer secret", None),  # clears the count
                ("Bearer wrong", DENIED),
                ("Bearer wrong", DENIED),  # the last that is allowed is still a 401
                ("Bearer wrong", LOCKED),
                ("Bearer secret", LOCKED),
            ):
                fields = {} if credential is None else {"Authorization": credential}
                answer = await client.ask("POST", CHAT, chat(), fields)
                if row is None:
                    assert answer.status == 200
                else:
                    check(answer, row)
            assert await client.usable()

    run(main())


@pytest.mark.parametrize(
    ("method", "path", "row", "allow"),
    [
        ("GET", "/", Row(404, "not_found_error"), None),
        ("POST", "/v1/chat/completions/", Row(404, "not_found_error"), None),
        ("POST", "/v1/completions", Row(404, "not_found_error"), None),
        ("GET", "/v1/modelsX", Row(404, "not_found_error"), None),
        ("GET", "/V1/models", Row(404, "not_found_error"), None),
        ("GET", "/v1/models/gpt-4o", Row(404, "invalid_request_error", "model_not_found", param="model"), None),
        ("GET", "/v1/models/copepod:x", Row(404, "invalid_request_error", "model_not_found", param="model"), None),
        ("GET", CHAT, Row(405, "invalid_request_error"), "POST"),
        ("PUT", CHAT, Row(405, "invalid_request_error"), "POST"),
        ("OPTIONS", CHAT, Row(405, "invalid_request_error"), "POST"),
        ("POST", "/v1/models", Row(405, "invalid_request_error"), "GET, HEAD"),
        ("DELETE", "/v1/models/copepod:main", Row(405, "invalid_request_error"), "GET, HEAD"),
        ("POST", "/healthz", Row(405, "invalid_request_error"), "GET, HEAD"),
        ("BREW", "/readyz", Row(405, "invalid_request_error"), "GET, HEAD"),
    ],
)
def test_routes_and_methods(method: str, path: str, row: Row, allow: str | None) -> None:
    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            answer = await client.ask(method, path, b"{}" if method in ("POST", "PUT") else None)
            check(answer, row)
            assert answer.fields.get("allow") == allow
            assert await client.usable()

    run(main())


def test_endpoint_that_is_off() -> None:
    async def main() -> None:
        async with (
            serving({"gateway.http.endpoints.chatCompletions.enabled": None, **TOKEN}) as hub,
            await Client.open(hub.port) as client,
        ):
            for method, path in (("POST", CHAT), ("GET", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/x")):
                check(await client.ask(method, path, b""), Row(404, "not_found_error"))

    run(main())


def test_unknown_agent() -> None:
    async def main() -> None:
        async with serving({"agents.list": [{"id": "alpha"}, {"id": "beta"}]}) as hub:
            row = Row(404, "invalid_request_error", "model_not_found", says="`alpha`, `beta`", param="model")
            check(await ask(hub, model="copepod:gamma"), row)
            check(await ask(hub, "hi", {"x-copepod-agent-id": "gamma"}), row)
            check(await ask(hub, model="copepod:gamma", stream=True), row)

    run(main())


WIRE: list[tuple[bytes, Row]] = [
    (b"hello\r\n\r\n", Row(400, "invalid_request_error")),
    (b"GET / HTTP/1.1\r\n\r\n", Row(400, "invalid_request_error", says="Host")),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", Row(400, "invalid_request_error", says="Host")),
    (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", Row(400, "invalid_request_error", says="line 1")),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n", Row(400, "invalid_request_error", says="line 2")),
    (b"GET / HTTP/1.1\nHost: localhost\n\n", Row(400, "invalid_request_error", says="CRLF")),
    (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", Row(505, "invalid_request_error")),
    (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", Row(414, "invalid_request_error")),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 33_000 + b"\r\n\r\n", Row(431, "invalid_request_error")),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: a\r\n" * 100 + b"\r\n", Row(431, "invalid_request_error")),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: cake\r\n\r\n", Row(417, "invalid_request_error")),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Row(501, "server_error")),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 1\r\n\r\nx", Row(400, "invalid_request_error")),
    (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        Row(400, "invalid_request_error", says="exclude"),
    ),
    (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        Row(400, "invalid_request_error", says="chunk"),
    ),
]


@pytest.mark.parametrize(("data", "row"), WIRE)
def test_wire(data: bytes, row: Row) -> None:
    """After each the connection ends, and what is left of it is taken for nothing."""

    async def main() -> None:
        async with serving() as hub, await Client.open(hub.port) as client:
            client.write(data + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await client.answer()
            check(answer, row)
            assert answer.fields["connection"] == "close"
            assert await client.ended()

    run(main())


def test_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.1)
    late = Row(408, "invalid_request_error")

    async def main() -> None:
        async with serving({"gateway.http.keepAliveSeconds": 0.1}) as hub:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n".encode()
            for data in (b"P", head, head + b"\r\n", head + b"\r\n{"):
                async with await Client.open(hub.port) as client:
                    client.write(data)
                    answer = await client.answer()
                    check(answer, late)
                    assert answer.fields["connection"] == "close"
                    assert await client.ended()
            async with await Client.open(hub.port) as client:  # nothing at all: nothing is answered
                assert await client.ended()
            async with await Client.open(hub.port) as client:  # nor to an idle one
                assert await client.usable()
                assert await client.ended()

    run(main())
