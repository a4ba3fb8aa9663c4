"""Whether what agents ask is there: a model server asked for its list of models, a program looked for."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

MAX_LIST = 4 * 1024 * 1024  # bytes of a list of models; the longest ones known are below one
SECONDS = 2.0  # for connection and answer
FRESH_SECONDS = 1.0  # for which an answer is given to who else asks


if TYPE_CHECKING:

    class Response(Protocol):
        """What `request` gives back; every failure of its connection is an OSError."""

        status: int

        async def read(self, limit: int) -> bytes: ...

        def close(self) -> None: ...

    class Provider(Protocol):
        """A provider of the configuration."""

        @property
        def api(self) -> str: ...
        @property
        def options(self) -> dict[str, Any]: ...

    class Dialect(Protocol):
        """How a model server's API looks."""

        def models_url_of(self, base: str) -> str: ...

        def fields_of(self, key: str) -> dict[str, str]: ...

    Request = Callable[[str, str, list[tuple[str, str]], bytes], Awaitable[Response]]


class Finding(NamedTuple):
    ok: bool  # a turn would come to an answer there, as far as can be told without one
    what: str  # in plain words, without addresses and secrets
    missing: tuple[str, ...]  # models of ours that the server has a list without


async def probe(
    dialects: Mapping[str, Dialect],
    api: str,
    options: dict[str, Any],
    models: Sequence[str],
    request: Request,
    *,
    seconds: float = SECONDS,
) -> Finding:
    """Return what is found where a provider of the configuration points; `models` are those that agents use of it.

    No prompt is sent: a model server is asked for its list of models. `request(method, url, fields, body)` does that,
    and `dialects`, by the `api` of a model server, say how it is asked.
    """
    if api == "command":
        return _program(options)
    if api not in dialects:
        return Finding(True, "part of the gateway", ())
    url, fields = _question(dialects[api], options)
    try:
        async with asyncio.timeout(seconds):
            response = await request("GET", url, fields, b"")
            try:
                status = response.status
                listed = _ids(await response.read(MAX_LIST)) if status == 200 else None
            finally:
                response.close()
    except TimeoutError:
        return Finding(False, f"gives no answer within {seconds:g} seconds", ())
    except (OSError, ValueError) as error:  # the second: an address that only a request finds wrong
        return Finding(False, _trouble(error), ())
    return _told(status, listed, models)


async def probe_all(
    dialects: Mapping[str, Dialect],
    providers: Mapping[str, Provider],
    models: Iterable[str],
    request: Request,
    *,
    seconds: float = SECONDS,
) -> dict[str, Finding]:
    """Return what is found, by name, of the providers of these models ("provider/model"), all asked at once."""
    used: dict[str, list[str]] = {}
    for name, _, model in (model.partition("/") for model in models):
        used.setdefault(name, []).append(model)
    known = {name: providers[name] for name in used if name in providers}
    each = (probe(dialects, it.api, it.options, used[name], request, seconds=seconds) for name, it in known.items())
    found = dict(zip(known, await asyncio.gather(*each), strict=True))
    return {name: found.get(name, Finding(False, "not configured", ())) for name in used}


def shared(look: Callable[[], Awaitable[dict[str, Finding]]]) -> Callable[[], Awaitable[dict[str, Finding]]]:
    """Return what looks, but one look at a time, and tells what it found for a moment: many would flood a server."""
    lock, until, found = asyncio.Lock(), 0.0, dict[str, Finding]()

    async def asked() -> dict[str, Finding]:
        nonlocal until, found
        async with lock:
            if time.monotonic() >= until:
                found = await look()
                until = time.monotonic() + FRESH_SECONDS
        return found

    return asked


def _question(dialect: Dialect, options: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The address that lists the models, and the request's fields; those of the configuration win."""
    fields = {"accept": "application/json", "user-agent": "copepod"} | dialect.fields_of(options.get("apiKey") or "")
    fields |= {name.lower(): value for name, value in (options.get("headers") or {}).items()}
    return dialect.models_url_of(options.get("baseUrl") or ""), list(fields.items())


def _ids(body: bytes) -> set[str] | None:
    """The models of a list, None where it is none, or goes on elsewhere."""
    try:
        value = json.loads(body)
        return None if value.get("has_more") else {str(entry["id"]) for entry in value["data"]}
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return None


def _told(status: int, listed: set[str] | None, models: Sequence[str]) -> Finding:
    if status == 401:
        return Finding(False, "refuses the gateway's key", ())
    if 300 <= status < 400:
        return Finding(False, "answers with a redirect, which is never followed", ())
    if status >= 500:
        return Finding(False, f"fails with status {status}", ())
    if listed is None:  # a key may have no right to see the list, and some servers have none
        return Finding(True, "reachable, without a list of its models", ())
    # Ollama leaves its tag `latest` out, Gemini writes `models/` before each.
    known = listed | {id_.removesuffix(":latest").removeprefix("models/") for id_ in listed}
    missing = tuple(dict.fromkeys(model for model in models if model and model not in known))
    return Finding(True, f"reachable, but it lists no {', '.join(missing)}" if missing else "reachable", missing)


def _trouble(error: Exception) -> str:
    import socket

    if isinstance(error, socket.gaierror):
        return "not reachable: there is no host of this name"
    if isinstance(error, OSError) and isinstance(error, ValueError):  # ssl.SSLCertVerificationError is both
        return "not reachable: its certificate could not be verified"
    if isinstance(error, ValueError):
        return "not reachable: its address is none"
    # asyncio joins the failures of several addresses in one text, without an errno
    if isinstance(error, ConnectionRefusedError) or str(error).startswith("Multiple exceptions"):
        return "not reachable: nothing listens there"
    return "not reachable: the connection broke, or what answers is no HTTP server"


def _program(options: dict[str, Any]) -> Finding:
    import shutil

    folder = options.get("cwd")
    if folder and not os.path.isdir(folder):
        return Finding(False, "its folder (cwd) is not there", ())
    if shutil.which(options["command"], path=(options.get("env") or {}).get("PATH")) is None:
        return Finding(False, "its program is not found, or not executable", ())
    return Finding(True, "its program is there", ())
