"""Secrets stay inside, and guessing them does not pay: what comes out is searched, the limiter counted and timed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from clients import finished, until
from run import Row

import auth
import config as configuration
import gateway
import rfc6455
from live import CHAT, Client, chat, serving, settings, within
from peer import opened, params_of
from upstream import Call, Upstream

PROGRAM = str(Path(gateway.__file__))
# What must be seen nowhere, and where else the others may be seen: the texts that come out are of these kinds.
#   answer, frame: to a caller who is let in; refusal: to one who is not; history: what tells transcripts;
#   show: what shows the configuration; log: stderr of the gateway; problem: what is said of a wrong configuration;
#   command: the answer of a program that prints its environment
MARKS = {name: f"{name}Mark{os.urandom(8).hex()}" for name in (
    "secret", "friend", "late", "guess", "key", "header", "env", "prompt", "system", "session", "path",
)}  # fmt: skip
ALLOWED = {
    "prompt": {"history"},
    "system": {"show"},
    "session": {"answer", "frame", "history", "command"},
    "path": {"log", "show", "problem", "command"},
    "env": {"command"},  # it is for this program
}
KINDS = {"answer", "refusal", "frame", "history", "show", "log", "problem", "command"}
SECRET, GUESS, PROMPT = MARKS["secret"], MARKS["guess"], MARKS["prompt"]
FRIEND, LATE = MARKS["friend"], MARKS["late"]  # tokens of their own, of which one has expired
AGENTS = """
def good(message): return "words"
def bad(message): raise RuntimeError("it broke")
def file(message): open(__file__ + ".none")
async def later(message):
    yield "words"
    raise RuntimeError("it broke")
"""


class Out:
    """All that came out, by its kind."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, str]] = []  # kind, of what, text

    def add(self, kind: str, of: str, text: str | bytes) -> None:
        assert kind in KINDS
        self.texts.append((kind, of, text if isinstance(text, str) else text.decode("utf-8", "replace")))

    def seen(self, name: str, kind: str) -> bool:
        return any(MARKS[name] in text for which, _, text in self.texts if which == kind)

    def leaks(self) -> list[str]:
        """Return where marks were found that must not be there."""
        found: Counter[str] = Counter()
        for kind, of, text in self.texts:
            for name, mark in MARKS.items():
                if mark in text and kind not in ALLOWED.get(name, ()):
                    found[f"the {name} in a {kind} ({of})"] += 1
        return [f"{where}, {count} times" for where, count in found.items()]


def found(out: Out, tried: int) -> Row:
    """Return the row of a search."""
    leaks = out.leaks()
    assert not leaks, "; ".join(leaks)
    size = sum(len(text) for _, _, text in out.texts)
    return Row("", tried, 0, "none of them", f"none in {len(out.texts)} texts of {size // 1024} KiB in all")


# The gateway's own words


def _config(folder: Path, port: int, mode: str, level: str, form: str, own: bool) -> dict[str, Any]:
    """Return a configuration full of marks; `own`: the gateway's secret is in it, else in its environment."""
    (folder / "torture_agents.py").write_text(AGENTS)
    up = {"api": "openai-completions", "baseUrl": f"http://127.0.0.1:{port}/v1", "apiKey": "${TORTURE_KEY}"}
    program = {"api": "command", "command": "/bin/sh", "env": {"TORTURE_ENV": MARKS["env"]}}
    providers: dict[str, Any] = {
        "up": {**up, "headers": {"X-Secret": MARKS["header"]}},
        "down": {**up, "baseUrl": "http://127.0.0.1:1/v1"},
        "tool": {**program, "args": ["-c", "echo words; echo of stderr >&2"]},
        "fails": {**program, "args": ["-c", "exit 3"]},
        "environment": {**program, "args": ["-c", "env"]},
        "missing": {**program, "command": str(folder / "missing")},
    }
    for name in ("good", "bad", "file", "later"):
        providers[name] = {"api": "python", "entry": f"torture_agents:{name}"}
    models = [f"up/{name}" for name in UPSTREAM] + [f"{name}/x" for name in providers if name != "up"] + ["nobody/x"]
    agents = [{"id": re.sub("/x$|^up/", "", model), "model": model} for model in models]
    named = [{"name": "friend", "token": FRIEND}, {"name": "late", "token": LATE, "expires": "2001-01-01"}]
    changes = {
        "gateway.auth": {"mode": mode, "tokens": named, **({mode: SECRET} if own else {})},
        "gateway.auth.mode": mode,
        "agents.defaults.systemPrompt": MARKS["system"],
        "agents.list": [{**agent, "default": agent["id"] == "good"} for agent in agents],
        "models.providers": providers,
        "session.store": str(folder / "sessions.sqlite3"),
        "logging": {"level": level, "format": form},
    }
    return settings(changes)


async def _upstream(call: Call) -> None:
    """Answer as the model says: the worst of them quote what they were given."""
    quoted = f"not with {call.fields['authorization']} and {call.fields['x-secret']}"
    name = call.json["model"]
    if name in ("quotes", "quotes-key", "fails-quoting"):
        status = {"quotes": 400, "quotes-key": 401, "fails-quoting": 500}[name]
        call.answer(status, json.dumps({"error": {"message": quoted}}).encode())
        return
    call.begin()
    call.word("words")
    if name == "quotes-later":
        call.event({"error": {"message": quoted, "code": 400}})
    call.finish()
    call.end()


UPSTREAM = ("quotes", "quotes-key", "fails-quoting", "quotes-later", "says")
LET_IN = f"Authorization: Bearer {SECRET}\r\n"


def _requests() -> Iterator[tuple[str, str, bytes]]:
    """Yield requests of every kind: what of, the kind of the answer, the bytes."""

    def request(line: str, fields: str = "", body: bytes = b"") -> bytes:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}{fields}\r\n".encode() + body

    post = f"POST {CHAT}"
    session = f"x-copepod-session-key: {MARKS['session']}\r\n"
    good = chat(PROMPT)
    for name in UPSTREAM + AGENT_NAMES:
        for streamed in (False, True):
            kind = "command" if name == "environment" else "answer"
            body = chat(PROMPT, stream=streamed, model=f"agent:{name}")
            yield f"agent {name}", kind, request(post, LET_IN + session, body)
    wrong: dict[str, Any] = {
        "stream": PROMPT, "n": PROMPT, "temperature": PROMPT, "max_tokens": PROMPT, "stop": {"a": PROMPT},
        "tools": PROMPT, "stream_options": PROMPT, "response_format": PROMPT, "user": f"\0{PROMPT}", "messages": PROMPT,
    }  # fmt: skip
    for name, value in wrong.items():
        yield f"wrong {name}", "answer", request(post, LET_IN + session, chat(PROMPT, **{name: value}))
    messages: list[Any] = [PROMPT, [PROMPT], [{"role": "user", "content": {"a": PROMPT}}], [{"role": PROMPT}], {}, []]
    for value in messages:
        body = json.dumps({"messages": value, "user": PROMPT}).encode()
        yield "wrong messages", "answer", request(post, LET_IN, body)
    for body in (good[:-9], b"\xff" + good, good + good, b'"' + PROMPT.encode() + b'"', b"[" * 100_000, b"1" * 5_000):
        yield "broken body", "answer", request(post, LET_IN, body)
    chunked = f"{LET_IN}Transfer-Encoding: chunked\r\n"
    yield "broken chunk", "answer", request(post, chunked) + PROMPT.encode() + b"\r\n"
    yield "long body", "answer", request(post, LET_IN, good + b" " * 1_100_000)
    for line in ("GET /v1/models", "GET /v1/models/nobody", "POST /v1/models", "GET /healthz", "HEAD /readyz", "PUT /"):
        yield line, "answer", request(line, LET_IN)
    for line, body in ((post, good), ("GET /v1/models", b""), (f"GET /v1/models?{FRIEND}", b"")):
        yield "a friend's", "answer", request(line, f"Authorization: Bearer {FRIEND}\r\n", body)
    places = {
        "expired": f"Authorization: Bearer {LATE}\r\n",
        "none": "", "a wrong one": f"Authorization: Bearer {GUESS}\r\n", "basic": f"Authorization: Basic {SECRET}\r\n",
        "no scheme": f"Authorization: {SECRET}\r\n", "a cookie": f"Cookie: token={SECRET}\r\n",
        "forwarded": f"X-Forwarded-For: {SECRET}\r\n", "space": f"Authorization : Bearer {SECRET}\r\n",
        "folded": f"Authorization: Bearer\r\n {SECRET}\r\n", "no field": f"{SECRET}\r\n", "nul": f"A: {SECRET}\0\r\n",
        "twice": LET_IN + f"Authorization: Bearer {GUESS}\r\n", "origin": f"Origin: http://{SECRET}.example\r\n",
        "long": f"X-Long: {SECRET * 2_000}\r\n", "length": f"Content-Length: {SECRET}\r\n",
        "coding": f"Transfer-Encoding: {SECRET}\r\n", "expect": f"Expect: {SECRET}\r\n",
        "a host": f"Host: {SECRET}\r\n",
    }  # fmt: skip
    for name, fields in places.items():
        yield f"secret as {name}", "refusal", request(post, fields + session, good)
    for target in (f"/?token={SECRET}", f"http://user:{SECRET}@localhost/", f"*?{SECRET}", f"/v1/models?{SECRET}"):
        yield f"secret in {target.partition(SECRET)[0]}", "refusal", request(f"GET {target}")
    handshake = "".join(f"{name}: {value}\r\n" for name, value in rfc6455.request_fields(rfc6455.client_key()))
    for fields in ("Sec-WebSocket-Version: 7\r\n", f"Origin: http://evil.example\r\nCookie: {SECRET}\r\n"):
        yield "handshake", "refusal", request(f"GET /?token={SECRET}", handshake + fields)
    yield "no request", "refusal", f"{SECRET} {SECRET}\r\n\r\n".encode()
    yield "no version", "refusal", f"GET /?{SECRET} HTTP/9.9\r\nHost: localhost\r\n\r\n".encode()


AGENT_NAMES = ("good", "bad", "file", "later", "down", "tool", "fails", "environment", "missing", "nobody")


async def _over_http(port: int, out: Out) -> int:
    count = 0
    for count, (of, kind, data) in enumerate(_requests(), 1):  # noqa: B007  the last is their number
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError):
            writer.write(data)
            if b"agent:" not in data:  # a half-closed client's run is ended soon
                writer.write_eof()
            answer = await within(reader.read())
            assert answer, f"{of}: no answer"
            out.add(kind, of, answer)
        writer.close()
    return count


async def _refused(port: int, out: Out, mode: str) -> int:
    """Say hello in every wrong way."""
    wrong: list[Any] = [
        {"auth": {mode: GUESS}}, {"auth": {mode: [SECRET]}}, {"auth": SECRET}, {"auth": {"key": SECRET}},
        {"auth": {mode: GUESS}, "role": SECRET}, {"token": SECRET}, {"client": SECRET}, {"scopes": SECRET},
        {"auth": {mode: SECRET}, "minProtocol": SECRET}, {"auth": {mode: SECRET}, "minProtocol": 9, "maxProtocol": 9},
        {"auth": {mode: SECRET}, "client": {"id": f"\n{SECRET}", "version": 5}}, {"device": {"signature": SECRET}},
        {"auth": {"token": LATE}}, {"auth": {"token": FRIEND}, "role": "nobody"}, {"auth": {"token": FRIEND, "a": 1}},
        {"auth": {mode: SECRET}, "role": "nobody"}, {"auth": {mode: SECRET}, "locale": {"a": SECRET}},
    ]  # fmt: skip
    frames = [json.dumps({"type": "req", "id": "c", "method": "connect", "params": params_of(**w)}) for w in wrong]
    frames += [SECRET, f'"{SECRET}"', f'{{"{SECRET}', json.dumps({"type": "req", "id": "1", "method": "agent"})]
    frames += [json.dumps({"type": SECRET, "id": SECRET}), json.dumps({"type": "req", "id": {"a": SECRET}})]
    for frame in frames:
        websocket = await within(rfc6455.connect("127.0.0.1", port, f"/?token={SECRET}"))
        await websocket.send(frame)
        while (text := await within(websocket.receive())) is not None:
            out.add("refusal", f"to {frame[:60]}", text)
        out.add("refusal", "close", websocket.close_reason)
        websocket.abort()
    return len(frames)


HISTORY = ("chat.history", "sessions.preview")


async def _over_websocket(port: int, out: Out, mode: str) -> int:
    """Ask for every method, rightly and wrongly, as an administrator."""
    websocket = await within(rfc6455.connect("127.0.0.1", port, max_message=64 * 1024 * 1024))
    kinds: dict[str | None, str] = {}
    runs = iter(range(10**6))

    async def request(method: str, params: Any) -> None:
        id = f"r{len(kinds)}"
        kinds[id] = "history" if method in HISTORY else "show" if method == "config.get" else "frame"
        await within(websocket.send(json.dumps({"type": "req", "id": id, "method": method, "params": params})))
        while (text := await within(websocket.receive())) is not None:
            frame = json.loads(text)
            of, kind = frame.get("event", method), kinds.get(frame.get("id"), "frame")
            if "agent:environment:" not in text or "assistant" not in text:  # an agent's own words
                out.add(kind, of, text)
            payload = frame.get("payload")
            if frame.get("id") == id and not (isinstance(payload, dict) and payload.get("status") == "accepted"):
                return
        raise AssertionError(f"{method}: closed {websocket.close_code} {websocket.close_reason}")

    auth_ = {mode: SECRET}
    await request("connect", params_of(auth=auth_, role="operator", scopes=["operator.admin"]))
    hello = json.loads(out.texts[-1][2])["payload"]
    key = {"sessionKey": f"agent:good:{MARKS['session']}"}
    for name in (*UPSTREAM, *(name for name in AGENT_NAMES if name != "environment")):
        params = {"message": PROMPT, "agentId": name, "idempotencyKey": f"k{next(runs)}", "extraSystemPrompt": PROMPT}
        await request("agent", params)
    await request("agent", {"message": PROMPT, "idempotencyKey": "kept", **key})
    right: dict[str, Any] = {
        "agent.wait": {"runId": "kept"}, "chat.history": key, "chat.abort": key, "agent.identity.get": key,
        "sessions.preview": {"keys": list(key.values())}, "sessions.patch": {"key": key["sessionKey"], "label": "a"},
    }  # fmt: skip
    for method in [*right, *(name for name in hello["features"]["methods"] if name not in right)]:
        if method in ("agent", "chat.send", "connect"):
            continue
        last = method in ("sessions.reset", "sessions.delete")
        await request(method, {"key": key["sessionKey"]} if last else right.get(method, {}))
        lists = {name: [SECRET] for name in ("sessionKey", "key", "keys", "runId")}
        for wrong in ({"x": SECRET}, SECRET, [SECRET], lists):
            await request(method, wrong)
    for method in ("agent", "chat.send"):
        base: dict[str, Any] = {"message": PROMPT, "idempotencyKey": "w", **(key if method == "chat.send" else {})}
        values = {"message": [PROMPT], "x": SECRET, "sessionKey": [SECRET], "agentId": [SECRET], "timeout": SECRET}
        for name, value in values.items():
            await request(method, {**base, name: value})
        await request(method, {**base, "attachments": [SECRET]})
    await request("chat.send", {"message": PROMPT, "idempotencyKey": "chat", **key})
    websocket.close()
    while (text := await within(websocket.receive())) is not None:
        out.add("frame", "the last", text)
    websocket.abort()
    return len(kinds)


@asynccontextmanager
async def _program(folder: Path, config: dict[str, Any], mode: str, own: bool) -> AsyncIterator[tuple[Any, int]]:
    """The gateway as a program of its own, which logs to a file; its process and port."""
    file, log = folder / "copepod.json5", folder / "log"
    file.write_text(json.dumps(config))
    environ = {**os.environ, "HOME": str(folder), "TORTURE_KEY": MARKS["key"]}
    environ |= {} if own else {f"COPEPOD_GATEWAY_{mode.upper()}": SECRET}
    with log.open("wb") as errors:
        words = [sys.executable, PROGRAM, "gateway", "--config", str(file)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=errors, env=environ, cwd=folder)
    assert process.stdout is not None
    try:
        ready = (await within(process.stdout.readline())).decode()
        assert ready.startswith("copepod listening on "), ready + log.read_text()
        yield process, int(ready.rpartition(":")[2])
    finally:
        if process.returncode is None:
            process.kill()
        await within(process.communicate())
        await asyncio.sleep(0)  # for the transport to close


def marks_in_what_comes_out(n: int) -> Row:
    """Marked secrets, prompts and paths in every kind of request, error and method, at each log level and format"""
    out, tried = Out(), 0
    levels, secrets = ("debug", "info", "warn", "error"), ("token", "password")
    turns = itertools.islice(itertools.product(levels, ("text", "json"), secrets, (True, False)), n)

    async def turn(level: str, form: str, mode: str, own: bool) -> None:
        nonlocal tried
        with tempfile.TemporaryDirectory(suffix=MARKS["path"]) as name:
            folder = Path(name)
            async with Upstream(_upstream) as upstream:
                config = _config(folder, upstream.port, mode, level, form, own)
                async with _program(folder, config, mode, own) as (process, port):
                    tried += await _over_http(port, out)
                    tried += await _refused(port, out, mode)
                    tried += await _over_websocket(port, out, mode)
                    broken = {**config, "gateway": {**config["gateway"], "auth": {"mode": "token", "token": [SECRET]}}}
                    (folder / "copepod.json5").write_text(json.dumps(broken))
                    process.send_signal(signal.SIGHUP)
                    await until(lambda: "the old configuration stays" in (folder / "log").read_text(), "it was read")
                    process.terminate()
                    out.add("log", "stdout", (await within(process.communicate()))[0])
                    assert process.returncode == 0
            log = (folder / "log").read_text()
            assert level in ("warn", "error") or "/v1/chat/completions" in log
            for line in log.splitlines():
                out.add("log", re.sub("[0-9a-f-]{8,}|[0-9]+", "#", line)[:60], line)

    for each in turns:
        finished(turn(*each))
    for name, kind in (("prompt", "history"), ("system", "show"), ("session", "frame"), ("env", "command")):
        assert out.seen(name, kind), f"the {name} is not even in a {kind}"  # else the search would prove nothing
    return found(out, tried)


# The configuration


def _wrong_configs() -> Iterator[tuple[str, str]]:
    """Yield texts of files that are wrong near a secret, or in it; what of, the text."""
    provider = {"api": "openai-completions", "baseUrl": "http://x"}
    tool = {"api": "command", "command": "true"}
    places: dict[str, Callable[[Any], dict[str, Any]]] = {
        "token": lambda v: {"gateway": {"auth": {"mode": "token", "token": v}}},
        "password": lambda v: {"gateway": {"auth": {"mode": "password", "password": v}}},
        "auth": lambda v: {"gateway": {"auth": v}},
        "apiKey": lambda v: {"models": {"providers": {"a": {**provider, "apiKey": v}}}},
        "header": lambda v: {"models": {"providers": {"a": {**provider, "headers": {"X-Key": v}}}}},
        "headers": lambda v: {"models": {"providers": {"a": {**provider, "headers": v}}}},
        "env": lambda v: {"models": {"providers": {"a": {**tool, "env": {"A": v}}}}},
        "envs": lambda v: {"models": {"providers": {"a": {**tool, "env": v}}}},
        "backend": lambda v: {"agents": {"defaults": {"cliBackends": {"a": {"command": "true", "env": {"A": v}}}}}},
    }
    for place, tree in places.items():
        for value in ([SECRET], {"a": {"b": SECRET}}, f"{SECRET}\n", f"\0{SECRET}", [[SECRET, 5]], SECRET, 5, None):
            config = {**tree(value), "logging": {"level": "wrong"}}  # so that there is a problem in any case
            yield f"{place} {type(value).__name__}", json.dumps(config)
    for near in ("tokn", "Token", "pasword", "secret"):
        yield f"auth.{near}", json.dumps({"gateway": {"auth": {near: SECRET, "mode": "tokn"}}})
    for near in ("apikey", "api_key", "apiKeys", "header"):
        yield near, json.dumps({"models": {"providers": {"a": {**provider, near: SECRET, "apii": 5}}}})
    whole = json.dumps(places["token"](SECRET), indent=2).replace('"token"', "token")
    for at in range(len(whole)):
        yield "cut off", whole[:at]
    for at in range(0, len(whole), 3):
        yield "a stray sign", f"{whole[:at]}%{whole[at:]}"


def marks_in_configuration(n: int) -> Row:
    """Secrets in files that are wrong, cut off, or shown: errors, reprs, `config show`"""
    out, tried, environ = Out(), 0, {"TORTURE": SECRET, "HOME": "/nowhere", "EDWIN_GATEWAY_TOKEN": GUESS}
    with tempfile.TemporaryDirectory() as name:
        file = str(Path(name, "copepod.json5"))
        texts = list(_wrong_configs())
        texts += [(f"{of}, filled", text.replace(SECRET, "${TORTURE}")) for of, text in texts]
        for of, text in texts[:: max(1, len(texts) // n)]:
            Path(file).write_text(text)
            tried += 1
            try:
                config = gateway.load_config(file, environ)
            except configuration.ConfigError as error:
                out.add("problem", of, f"{error} {error!r} {error.problems}")
            else:
                out.add("problem", of, f"{config!r} {config.warnings!r} {gateway.House(config, {}, None).gate!r}")
        up = {"api": "openai-completions", "baseUrl": "http://x", "apiKey": MARKS["key"]}
        tool = {"api": "command", "command": "true", "env": {"A": MARKS["env"]}}
        providers = {"a": {**up, "headers": {"A": MARKS["header"]}}, "b": tool}
        good = {"gateway": {"auth": {"token": SECRET}}, "models": {"providers": providers}}
        Path(file).write_text(json.dumps(good))
        for words in (
            ["config", "show"], ["config", "check"], ["config", "show", "--set", f"gateway.auth.password={GUESS}"],
            ["config", "check", "--set", f"gateway.auth.token.a={GUESS}"], ["gateway", "--port", "x", "--token", GUESS],
            ["config", "check", "--set", f"gateway.auth.tokn={GUESS}"], ["health", "--url", "ws://127.0.0.1:1"],
        ):  # fmt: skip
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                gateway.main([*words, "--config", file])
            out.add("show", " ".join(words[:3]), said.getvalue())
            tried += 1
    return found(out, tried)


# Guessing

STRICT = {
    "gateway.auth": {"token": SECRET, "rateLimit": {"maxAttempts": 10, "exemptLoopback": False}},
    "gateway.auth.mode": "token",
}


async def _guess(hub: gateway.Gateway, number: int, fields: dict[str, str] | None = None, given: str = "") -> str:
    """Return how a guess is judged, over HTTP or WebSocket: "wrong", "locked" or "right"."""
    given = given or f"{GUESS}{number}"
    if number % 2:
        async with await Client.open(hub.port) as client:
            answer = await client.ask("GET", "/v1/models", None, {"Authorization": f"Bearer {given}", **(fields or {})})
            return {200: "right", 401: "wrong", 429: "locked"}[answer.status]
    async with opened(hub, fields=list((fields or {}).items())) as peer:
        answer = await peer.connect(auth={"token": given})
        if answer["ok"]:
            return "right"
        code = answer["error"]["code"]
        assert (await peer.ended())[0] == 1008
        return {"INVALID_REQUEST": "wrong", "UNAVAILABLE": "locked"}[code]


def parallel_guesses(n: int) -> Row:
    """A hundred wrong guesses at once, over HTTP and WebSocket, and then the right one"""
    seen: Counter[str] = Counter()

    async def main() -> None:
        async with serving(STRICT) as hub:
            judged = Counter(await asyncio.gather(*(_guess(hub, number) for number in range(100))))
            judged.update([f"{await _guess(hub, number, given=SECRET)} secret" for number in (0, 1)])
            assert judged == {"wrong": 10, "locked": 90, "locked secret": 2}, judged
            seen.update(judged)

    for _ in range(n):
        finished(main())
    return Row("", n * 100, 0, "10 of each hundred are judged, the others locked out", str(dict(seen)))


def spoofed_addresses(n: int) -> Row:
    """Guesses with X-Forwarded-For, Forwarded, X-Real-IP of ever new addresses"""
    names = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "Via")

    async def main(trusted: bool) -> str:
        # Behind a trusted proxy, what it has added itself counts, and what stands left of that does not.
        config = {**STRICT, "gateway.trustedProxies": ["127.0.0.0/8"] if trusted else ["192.0.2.0/24"]}
        judged: Counter[str] = Counter()
        async with serving(config) as hub:
            for number in range(n):
                spoofed = f"198.51.{number % 256}.{number // 256 % 256}"
                fields = {names[number % 5]: f"for={spoofed}" if number % 5 == 1 else spoofed}
                if trusted:
                    fields["X-Forwarded-For"] = f"{spoofed}, 203.0.113.{number % 2}"
                judged[await _guess(hub, number, fields)] += 1
            own = await _guess(hub, 1, {"X-Forwarded-For": "203.0.113.9"} if trusted else {}, SECRET)
        wanted = 20 if trusted else 10  # two addresses, or one
        assert judged == {"wrong": wanted, "locked": n - wanted}, judged
        assert own == ("right" if trusted else "locked"), own
        return f"{judged['wrong']} of {n} judged"

    seen = f"untrusted: {finished(main(False))}; a trusted proxy's two clients: {finished(main(True))}"
    return Row("", 2 * n, 0, "10 for each true address are judged", seen)


def limiter_memory(n: int) -> Row:
    """Failures of ever new addresses, IPv4 and IPv6"""
    clock = itertools.count()
    limiters = [auth.Limiter(attempts, 10**9, 10**9, lambda: next(clock) / 1000) for attempts in (1, 10)]
    tracemalloc.start()
    most = 0
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(n):
            packed = number.to_bytes(4, "big")
            if number % 4 > 1:
                text = f"{packed[0]}.{packed[1]}.{packed[2]}.{packed[3]}"
            else:
                text = f"2001:db8:{packed[:2].hex()}:{packed[2:].hex()}::1"
            limiter = limiters[number % 2]
            limiter.failed(auth.limiter_key(text))
            most = max(most, len(limiter))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert most <= auth.MAX_CLIENTS, f"{most} clients are remembered"
    assert peak < 16 * 1024 * 1024, f"{peak} bytes"
    seen = f"{most} clients remembered at most, {peak / 1024 / 1024:.1f} MiB for two limiters"
    return Row("", n, 0, f"at most {auth.MAX_CLIENTS} remembered, some MiB", seen)


# Time


def _naive(given: str, expected: str) -> bool:
    return all(a == b for a, b in zip(given, expected, strict=True))


def _difference(compare: Callable[[str], object], texts: tuple[str, str], rounds: int) -> tuple[float, float]:
    """Return by how much the second takes longer, of the time that one takes, and how uncertain that is.

    Each round times both, in changing order; a median does not see what else the machine does now and then.
    """
    took: tuple[list[int], list[int]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            text = texts[which]
            begun = time.perf_counter_ns()
            for _ in range(50):
                compare(text)
            took[which].append(time.perf_counter_ns() - begun)
    whole = statistics.median(took[0])
    differences = sorted((b - a) / whole for a, b in zip(*took, strict=True))
    middle = statistics.median(differences)
    spread = statistics.median(abs(difference - middle) for difference in differences)
    return middle, 1.86 * spread / rounds**0.5  # the standard error of a median, from the spread around it


def timing_of_the_secret(n: int) -> Row:
    """Whether the time of auth.same tells where a guess differs"""
    if not n:
        return Row("", 0, 0, "", "skipped: it takes a while")
    secret = "s" * 64
    first, last, expected = "x" + secret[1:], secret[:-1] + "x", auth.digest(secret)
    power, _ = _difference(lambda text: _naive(text, secret), (first, last), n // 10)
    assert power > 0.5, f"the method does not see a comparison that stops early ({power:.0%})"
    clear = 0
    for _ in range(3):  # a clear difference is there each time
        middle, error = _difference(lambda text: auth.same(auth.digest(text), expected), (first, last), n)
        clear += abs(middle) > max(0.02, 5 * error)
    seen = f"first or last character: {middle:+.2%} ± {error:.2%} (a naive comparison: {power:+.0%})"
    assert clear < 3, seen
    return Row("", 3 * n * 100, 0, "no clear difference (2 %)", seen)


SCENARIOS: tuple[tuple[Callable[[int], Row], int, int], ...] = (
    (marks_in_what_comes_out, 32, 1),
    (marks_in_configuration, 500, 500),
    (parallel_guesses, 30, 1),
    (spoofed_addresses, 2_000, 60),
    (limiter_memory, 1_000_000, 30_000),
    (timing_of_the_secret, 20_000, 0),
)
