"""The chat page over HTTP: who gets it, and the policy that comes with it. tests/browser looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

import webchat
from live import Answer, Client, run, serving

PAGE = (Path(__file__).resolve().parent.parent / "webchat.html").read_bytes()
ON = {"gateway.http.endpoints.webchat.enabled": True}
TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": "t"}


def asked(changes: dict[str, Any], method: str = "GET", target: str = "/", **fields: str) -> Answer:
    """The answer to one request."""

    async def main() -> Answer:
        async with serving(changes) as hub, await Client.open(hub.port) as client:
            named = {name.replace("_", "-"): value for name, value in fields.items()}
            answer = await client.ask(method, target, fields=named)
            assert await client.usable()
            return answer

    return run(main())


@pytest.mark.parametrize("auth", [{}, TOKEN], ids=["without auth", "with a token"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_page(auth: dict[str, str], method: str) -> None:
    answer = asked({**ON, **auth}, method)
    assert answer.status == 200
    assert answer.body == (PAGE if method == "GET" else b"")
    expected = {
        "content-type": "text/html; charset=utf-8",
        "content-length": str(len(PAGE)),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    assert expected.items() <= answer.fields.items()
    policy = dict(part.split(" ", 1) for part in answer.fields["content-security-policy"].split("; "))
    (script,), (style,) = (re.findall(rf"<{tag}>(.*)</{tag}>".encode(), PAGE, re.DOTALL) for tag in ("script", "style"))
    assert policy == {
        "default-src": "'none'",
        "script-src": f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'",
        "style-src": f"'sha256-{base64.b64encode(hashlib.sha256(style).digest()).decode()}'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


@pytest.mark.parametrize(
    ("changes", "method", "target", "fields", "status"),
    [
        ({}, "GET", "/", {}, 404),
        (ON, "GET", "/?a", {}, 200),
        (ON, "GET", "/index.html", {}, 404),
        (ON, "POST", "/", {}, 405),
        (ON, "GET", "/", {"origin": "https://elsewhere.example"}, 403),
        (ON, "GET", "/", {"x_forwarded_for": "192.0.2.1"}, 403),  # without auth only this machine is let in
        ({**ON, **TOKEN}, "GET", "/", {"x_forwarded_for": "192.0.2.1"}, 200),
    ],
)
def test_who_gets_it(changes: dict[str, Any], method: str, target: str, fields: dict[str, str], status: int) -> None:
    answer = asked(changes, method, target, **fields)
    assert answer.status == status
    if status != 200:
        assert answer.error["message"]
    assert answer.fields.get("allow") == ("GET, HEAD" if status == 405 else None)


def test_a_page_that_was_left_behind(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(webchat, "FILE", "no.html")
    webchat.page.cache_clear()

    async def main() -> Answer:
        async with serving(ON) as hub, await Client.open(hub.port) as client:
            return await client.ask("GET", "/")

    answer = run(main())
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "no.html has to lie beside webchat.py" in caplog.text
    caplog.clear()


def test_the_page_is_one_file() -> None:
    assert b"://" not in PAGE
    assert not re.findall(rb"(?i)\b(?:src|style|on[a-z]+|srcset|action)\s*=\s*[\"']|@import|\burl\(", PAGE)
    assert {href[:19] for href in re.findall(rb'href="([^"]*)"', PAGE)} == {b"#pod", b"data:image/svg+xml,"}


def test_what_comes_from_the_gateway_is_text() -> None:
    assert not re.findall(rb"innerHTML =|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", PAGE)


def test_the_policy_has_every_script_and_style() -> None:
    policy = webchat.policy(b"<style>a</style><script>b</script><script>c\n</script>")
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in (b"b", b"c\n", b"a")]
    assert f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src 'sha256-{hashes[2]}';" in policy
