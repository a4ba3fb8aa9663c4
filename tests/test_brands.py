"""The pages of the family, line by line: its models, headers, variables and curl commands work here as they stand."""

from __future__ import annotations

import asyncio
import re
import shutil

import pytest

import config
from live import CHAT, Answer, Client, ask, chat, data_of, run, serving, text_of, within

# system, prefix of its model and headers, prefix of its variables
SYSTEMS = [
    ("Copepod", "copepod", "COPEPOD"),
    ("Fased", "fased", "FASED"),
    ("OpenSoul", "opensoul", "OPENSOUL"),
    ("Epiloop", "epiloop", "EPILOOP"),
    ("Edwin", "edwin", "EDWIN"),
    ("Moltbot", "moltbot", "CLAWDBOT"),
    ("Clawdbot", "clawdbot", "CLAWDBOT"),
    ("OpenClaw", "openclaw", "OPENCLAW"),
]
BRANDS = [name for _, name, _ in SYSTEMS]
TWO = {"agents.list": [{"id": "alpha", "default": True}, {"id": "beta"}]}

# The examples of the pages: what differs between them is the system's name.
EXAMPLES = """
curl -sS http://127.0.0.1:18789/v1/chat/completions \\
  -H 'Authorization: Bearer YOUR_TOKEN' \\
  -H 'Content-Type: application/json' \\
  -H 'x-edwin-agent-id: main' \\
  -d '{
    "model": "edwin",
    "messages": [{"role":"user","content":"hi"}]
  }'

curl -N http://127.0.0.1:18789/v1/chat/completions \\
  -H 'Authorization: Bearer YOUR_TOKEN' \\
  -H 'Content-Type: application/json' \\
  -H 'x-edwin-agent-id: main' \\
  -d '{
    "model": "edwin",
    "stream": true,
    "messages": [{"role":"user","content":"hi"}]
  }'
"""
# The one page without line breaks of its own indents nothing.
FLAT = re.sub(r"\n +", "\n", EXAMPLES)


def test_the_table_has_every_brand() -> None:
    assert [(brand.name, brand.prefix) for brand in config.BRANDS] == [row[1:] for row in SYSTEMS]


async def named(port: int, model: object, fields: dict[str, str] | None = None) -> Answer:
    async with await Client.open(port) as client:
        more = {} if model is None else {"model": model}
        body = chat(**more) if more else chat().replace(b'"model": "copepod", ', b"")
        return await client.ask("POST", CHAT, body, fields)


MODELS = [  # what stands in `model`, who answers
    ("{brand}:beta", "beta"),
    ("{brand}/beta", "beta"),
    ("{BRAND}:Beta", "beta"),
    (" {brand}:beta ", "beta"),
    ("{brand}:alpha", "alpha"),
    ("{brand}:main", "alpha"),  # the pages all send `main`: where there is none it is the default agent
    ("{brand}", "alpha"),
    ("{brand}/default", "alpha"),
    ("agent:beta", "beta"),
    ("Agent:main", "alpha"),
    ("gpt-4o", "alpha"),
    ("{brand}-large", "alpha"),
    ("", "alpha"),
    (None, "alpha"),
    ("{brand}:gamma", 404),
    ("{brand}/gamma", 404),
    ("agent:gamma", 404),
    ("{brand}:", 404),
    ("{brand}:be ta", 404),
    ("{brand}:-beta", 404),
    ("agent:" + "b" * 65, 404),
]


@pytest.mark.parametrize("brand", BRANDS)
def test_models(brand: str) -> None:
    async def main() -> None:
        async with serving(TWO) as hub:
            for form, expected in MODELS:
                model = form and form.format(brand=brand, BRAND=brand.upper())
                answer = await named(hub.port, model)
                if expected == 404:
                    assert answer.status == 404, model
                    assert answer.error["code"] == "model_not_found"
                    assert answer.error["type"] == "invalid_request_error"
                    assert "`alpha`, `beta`" in answer.error["message"]
                else:
                    assert answer.text == "hi"
                    assert answer.json["model"] == (model or "copepod")
                    assert answer.fields["x-copepod-agent-id"] == expected, model

    run(main())


HEADERS = [  # header, its value, model, who answers (or the status)
    ("x-{brand}-agent-id", "beta", "{brand}", "beta"),
    ("x-{brand}-agent", "beta", "{brand}", "beta"),
    ("X-{BRAND}-Agent-Id", "BETA", "{brand}", "beta"),
    ("x-{brand}-agent-id", "main", "{brand}", "alpha"),
    ("x-{brand}-agent-id", "beta", "{brand}:alpha", "beta"),  # the header wins
    ("x-{brand}-agent-id", "", "{brand}:beta", "beta"),
    ("x-{brand}-agent-id", "gamma", "{brand}", 404),
    ("x-{brand}-agent-id", "no id", "{brand}", 404),
    ("x-{brand}-session-key", "agent:beta:x", "{brand}", "beta"),
    ("x-{brand}-session-key", "anything", "{brand}:beta", "beta"),
    ("x-{brand}-session-key", "agent:gamma:x", "{brand}", 404),
    ("x-{brand}-session-key", "agent:alpha:x", "{brand}:beta", 400),
    ("x-{brand}-session-key", "k" * 513, "{brand}", 400),
]


@pytest.mark.parametrize("brand", BRANDS)
def test_headers(brand: str) -> None:
    async def main() -> None:
        async with serving(TWO) as hub:
            for header, value, model, expected in HEADERS:
                name = header.format(brand=brand, BRAND=brand.upper())
                answer = await named(hub.port, model.format(brand=brand), {name: value})
                if isinstance(expected, int):
                    assert answer.status == expected, (name, value)
                    assert answer.error["type"] == "invalid_request_error"
                    assert answer.error["code"] == ("model_not_found" if expected == 404 else None)
                    continue
                assert answer.fields["x-copepod-agent-id"] == expected, (name, value)
                if "session" in name:
                    assert answer.fields["x-copepod-session-key"] == value
            other = "fased" if brand != "fased" else "edwin"
            for second, status in (("alpha", 400), ("beta", 200), ("Beta", 200)):
                fields = {f"x-{brand}-agent-id": "beta", f"x-{other}-agent": second}
                assert (await named(hub.port, brand, fields)).status == status

    run(main())


def test_session_keys() -> None:
    async def main() -> None:
        async with serving(TWO) as hub:
            for fields, user, expected in (
                ({}, "Ann", "agent:alpha:openai-user:Ann"),  # case kept: Ann and ann are two people
                ({}, "Zoë 100%", "agent:alpha:openai-user:Zo%C3%AB 100%25"),
                ({"x-edwin-agent": "beta"}, "ann", "agent:beta:openai-user:ann"),
                ({"x-edwin-session-key": "desk"}, "ann", "desk"),
            ):
                assert (await ask(hub, "hi", fields, user=user)).fields["x-copepod-session-key"] == expected
            fresh = [(await ask(hub, **more)).fields["x-copepod-session-key"] for more in ({}, {}, {"user": {"id": 1}})]
            assert len(set(fresh)) == 3
            assert all(re.fullmatch(r"agent:alpha:openai:[0-9a-f-]{36}", key) for key in fresh)
            for user in ("u" * 513, "a\nb"):
                assert (await ask(hub, user=user)).error["param"] == "user"

    run(main())


@pytest.mark.parametrize("kind", ["TOKEN", "PASSWORD"])
@pytest.mark.parametrize(("brand", "prefix"), [row[1:] for row in SYSTEMS])
def test_variables(brand: str, prefix: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{prefix}_GATEWAY_{kind}", "the secret")

    async def main() -> None:
        for mode in (None, kind.lower()):
            async with serving({"gateway.auth.mode": mode}) as hub:
                for credential, status in (("Bearer the", 401), (None, 401), ("Bearer secret", 401)):
                    fields = {} if credential is None else {"Authorization": credential}
                    assert (await named(hub.port, brand, fields)).status == status
        monkeypatch.setenv(f"{prefix}_GATEWAY_{kind}", "secret")
        async with serving({"gateway.auth.mode": None}) as hub:
            for credential, status in (("Bearer secret", 200), ("bearer secret", 200), ("Basic secret", 401)):
                assert (await named(hub.port, brand, {"Authorization": credential})).status == status

    run(main())


def test_variables_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDWIN_GATEWAY_TOKEN", "one")
    monkeypatch.setenv("FASED_GATEWAY_TOKEN", "two")

    async def main() -> None:
        with pytest.raises(config.ConfigError, match="FASED_GATEWAY_TOKEN and EDWIN_GATEWAY_TOKEN"):
            async with serving({"gateway.auth.mode": None}):
                pass
        async with serving({"gateway.auth.mode": "token", "gateway.auth.token": "three"}) as hub:  # the file decides
            assert (await named(hub.port, "edwin", {"Authorization": "Bearer three"})).status == 200
            assert (await named(hub.port, "edwin", {"Authorization": "Bearer one"})).status == 401

    run(main())


def test_another_brand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE_GATEWAY_TOKEN", "secret")

    async def main() -> None:
        async with serving({**TWO, "gateway.auth.mode": None, "gateway.brands": ["mine"]}) as hub:
            bearer = {"Authorization": "Bearer secret"}
            for model, fields in (
                ("mine:beta", {}),
                ("mine/beta", {}),
                ("edwin:beta", {}),
                ("mine", {"x-mine-agent-id": "beta"}),
                ("mine", {"x-mine-agent": "beta"}),
                ("mine", {"x-mine-session-key": "agent:beta:x"}),
            ):
                answer = await named(hub.port, model, {**bearer, **fields})
                assert answer.fields["x-copepod-agent-id"] == "beta", (model, fields)
            assert (await named(hub.port, "mine", {"Authorization": "Bearer other"})).status == 401

    run(main())


def pasted(brand: str, text: str, port: int) -> list[str]:
    """The curl commands of a page; nothing but port and token is changed."""
    page = text.replace("edwin", brand).replace("18789", str(port)).replace("YOUR_TOKEN", "secret")
    return ["curl " + part for part in re.split(r"^curl ", page, flags=re.MULTILINE)[1:]]


async def shell(command: str) -> str:
    """What a command prints."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("sh", "-c", command, stdout=pipe, stderr=pipe)
    output, said = await within(process.communicate())
    assert process.returncode == 0, said
    return str(output.decode())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("text", [EXAMPLES, FLAT], ids=["indented", "flat"])
@pytest.mark.parametrize("brand", BRANDS)
def test_the_pages_curl(brand: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")

    async def main() -> None:
        async with serving({"gateway.auth.mode": "token", "gateway.auth.token": "secret"}) as hub:
            whole, streamed = [await shell(command) for command in pasted(brand, text, hub.port)]
            assert '"content":"hi"' in whole
            assert f'"model":"{brand}"' in whole
            events = streamed.removesuffix("\n\n").split("\n\n")
            assert all(event.startswith("data: ") for event in events)
            assert events[-1] == "data: [DONE]"
            assert text_of(events) == "hi"
            assert {chunk["model"] for chunk in data_of(events)} == {brand}

    run(main())
