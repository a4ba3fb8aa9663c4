"""The chat page: `webchat.html`, which lies beside this file, and the policy that it may do nothing but talk to us."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any, NamedTuple

FILE = "webchat.html"
TYPE = ("Content-Type", "text/html; charset=utf-8")


class Page(NamedTuple):
    """What `GET /` is answered with."""

    body: bytes
    fields: tuple[tuple[str, str], ...]
    type: tuple[str, str] = TYPE


def policy(html: bytes) -> str:
    """Return the Content-Security-Policy (CSP3) of a page: its own inline script, style and icon, and its own gateway.

    'self' of connect-src is the WebSocket too. What comes over it cannot become HTML or a script.
    """
    from base64 import b64encode
    from hashlib import sha256  # here: it brings OpenSSL with it

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(text).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )


@cache
def page() -> Page:
    """Return the page, read once, by whatever has loaded this module: from a folder, or out of an archive.

    RuntimeError: it is not there. An OSError would be taken for the client's connection.
    """
    loader: Any = __spec__.loader
    try:
        html = loader.get_data(os.path.join(os.path.dirname(__file__), FILE))
    except OSError as error:
        raise RuntimeError(f"{FILE} has to lie beside webchat.py ({error.strerror})") from None
    fields = (
        ("Content-Security-Policy", policy(html)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-cache"),
    )
    return Page(html, fields)
