"""Whether a gateway runs well here, and who can reach it: findings of one line, each with what to type."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

YEARS = range(2025, 2100)  # a clock without a battery begins in 1970 or 2000
SKEW_SECONDS = 60  # the least that services allow whose signed requests carry a time is some minutes
SHORT = 16  # characters: as hexadecimal digits 64 bits, which nobody guesses through a rate limit
SAMPLES = ("secret", "password", "change", "example", "sample", "your-", "your_", "12345", "s3cr3t")
WIDE = {4: 8, 6: 32}  # a shorter prefix is no one's own network
SECONDS = 3.0  # for a gateway that runs to say how it is
LOCAL = ("localhost", "127.0.0.1", "::1")
MEMORY = ":memory:"  # a session store without a file
FRESH = "(`openssl rand -hex 32` makes one)"


class Finding(NamedTuple):
    """One line."""

    level: str  # "ok", "warning" or "error"
    about: str  # what was looked at
    said: str
    do: str = ""  # what to type, where it is not "ok"


def mistakes(problems: Iterable[str]) -> list[Finding]:
    """The findings of a configuration that is wrong; each problem says itself what to do."""
    return [Finding("error", "configuration", problem) for problem in problems]


def configuration(path: str | None, warnings: Iterable[str]) -> list[Finding]:
    """Those of one that is good: its file, None for the built-in default."""
    good = Finding("ok", "configuration", f"{path or 'the built-in default'} is good")
    return [good, *(Finding("warning", "configuration", warning) for warning in warnings)]


def permissions(path: str, mode: int, secret: str) -> Finding:
    """Whether all users may write or read this file; `secret` is what it holds, "" for nothing of value."""
    import shlex

    do = f"chmod 600 {shlex.quote(path)}"
    if mode & 0o002:
        return Finding("error", "file", f"every user may write {path}, and so choose what the gateway does", do)
    if mode & 0o004 and secret:
        return Finding("warning", "file", f"every user may read {path}, which holds {secret}", do)
    return Finding("ok", "file", f"{path} {'holds no secret' if mode & 0o004 else 'is closed to other users'}")


def unbound(bind: str, port: int) -> OSError | None:
    """What is in the way of listening there, None for nothing."""
    import socket

    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        socket.create_server((bind, port), family=family).close()
    except OSError as error:
        return error
    return None


def in_the_way(bind: str, port: int, number: int | None) -> tuple[str, str]:
    """What this errno of `bind` or `listen` means there, and what to type."""
    where = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
    if number == errno.EADDRINUSE:
        said = f"{where} is in use, perhaps by a gateway that is running already"
        return said, f"stop what listens there, or type --port {port % 65535 + 1}"
    if number in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on {where}", "type --port 18789, or any above 1023"
    if number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or (number or 0) < 0:  # getaddrinfo's: no such interface
        return f"this machine has no address {bind}", "type --bind loopback, or one that `ip address` lists"
    return f"nothing can listen on {where} ({os.strerror(number or 0)})", "type another --port or --bind"


def port(bind: str, number: int, error: OSError | None, version: str) -> Finding:
    """Whether the port is free; `version` is that of our gateway, where it answers on it."""
    if version:
        return Finding("ok", "port", f"on {number} this gateway is running, version {version}")
    if error is not None:
        return Finding("error", "port", *in_the_way(bind, number, error.errno))
    return Finding("ok", "port", f"{number} is free" if number else "any free one is taken")


def state(store: str, trouble: str, running: bool) -> Finding:
    """Whether sessions can be kept; `trouble` is why the store could not be opened."""
    if store == MEMORY:
        return Finding("ok", "state", "sessions are kept in memory, until the gateway ends")
    if trouble:
        return Finding("error", "state", trouble, "see the log of the running gateway" if running else "")
    if running:
        return Finding("ok", "state", f"{store} is held by the running gateway")
    if os.path.exists(store):
        return Finding("ok", "state", f"{store} can be opened")
    folder = os.path.dirname(store)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
        return Finding("ok", "state", f"{store} can be made")
    do = "set session.store, or COPEPOD_STATE_DIR, to a place that this user may write"
    return Finding("error", "state", f"{store} cannot be made, as {folder} is no folder that this user may write", do)


def provider(name: str, options: Mapping[str, Any], found: Any) -> Finding:
    """What a probe has found of a provider: `ok`, `what` in words, and the models that are `missing`."""
    said, where = f"{name}: {found.what}", f"models.providers.{name}"
    if not found.ok:
        do = "correct command or cwd" if "command" in options else "start it, or correct baseUrl or apiKey"
        return Finding("error", "provider", said, f"{do} of {where}")
    if found.missing:
        ollama = ":11434" in (options.get("baseUrl") or "")
        pull = "; ".join(f"ollama pull {model}" for model in found.missing)
        do = pull if ollama else "load it there, or name another in agents.list"
        return Finding("warning", "provider", said, do)
    return Finding("ok", "provider", said)


def clock(now: float, dates: Iterable[tuple[str, float]]) -> Finding:
    """Whether it is right: by the year, and by the Date of servers' answers, each with our time as it came."""
    from email.utils import parsedate_to_datetime

    do = "set the clock, such as with `timedatectl set-ntp true`"
    year, skews = time.gmtime(now).tm_year, [0.0]
    if year not in YEARS:
        return Finding("error", "clock", f"it is the year {year} by this machine's clock", do)
    for text, ours in dates:
        try:
            skews.append(parsedate_to_datetime(text).timestamp() - ours)
        except (ValueError, OverflowError):
            continue
    worst = max(skews, key=abs)
    if abs(worst) > SKEW_SECONDS:
        return Finding("warning", "clock", f"a server's clock is {worst:+.0f} seconds from this machine's", do)
    return Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def open_files(room: int, wanted: int) -> Finding:
    """Whether the system allows the files for as many connections as are wanted; `room` is how many it allows."""
    if room >= wanted:
        return Finding("ok", "open files", f"enough for {wanted} connections")
    need = 2 * wanted + 64
    do = f"raise the hard limit (LimitNOFILE={need} in systemd, `ulimit -Hn {need}` as root), or lower the key"
    return Finding("warning", "open files", f"enough for {room} of gateway.maxConnections {wanted}", do)


def is_weak(secret: str) -> bool:
    """Whether it could be guessed: short, of few characters, or with a word in it that samples have."""
    lower = secret.lower()
    return len(secret) < SHORT or len(set(secret)) < SHORT // 2 or any(word in lower for word in SAMPLES)


def exposure(config: Any) -> list[Finding]:
    """Who can reach the gateway of this Config, and what stops those who should not."""
    import ipaddress

    mode, secure = config.auth.mode, config.tls is not None
    beyond = not ipaddress.ip_address(config.bind).is_loopback
    let_in = f"with a {mode}" if mode != "none" else "without auth"
    if not beyond:
        found = [Finding("ok", "reach", f"only programs of this machine can connect ({config.bind}), {let_in}")]
    elif secure:
        found = [Finding("ok", "reach", f"other machines can connect ({config.bind}), over TLS and {let_in}")]
    else:
        said = f"other machines can connect ({config.bind}), and what they send can be read on the way"
        do = 'set gateway.tls, or gateway.bind to "loopback" behind a proxy that has TLS'
        found = [Finding("warning", "reach", said, do)]
    level = "error" if beyond or config.trusted_proxies else "warning"
    secrets = {f"gateway.auth.{mode}": config.auth.secret}
    entries = config.tree["gateway"]["auth"]["tokens"] or ()
    secrets |= {f"gateway.auth.tokens ({entry['name']})": entry["token"] for entry in entries}
    for where, secret in secrets.items():
        if secret and is_weak(secret):
            said = f"{where} can be guessed: it is short, or like one of a sample"
            found.append(Finding(level, "secret", said, f"set another {FRESH}"))
    if any(secrets.values()) and len(found) == 1:
        found.append(Finding("ok", "secret", "long enough"))
    return found + _origins(config.allowed_origins, mode) + _proxies(config.trusted_proxies)


def _origins(origins: Sequence[str], mode: str) -> list[Finding]:
    if not origins:
        return []
    from urllib.parse import urlsplit

    said = f"pages of {', '.join(origins)} may call"
    parts = [urlsplit(origin) for origin in origins]
    if mode == "none":
        do = f"set gateway.auth.token {FRESH}"
        return [Finding("warning", "origins", f"{said}, and no secret is asked of them", do)]
    if any(it.scheme == "http" and it.hostname not in LOCAL for it in parts):
        do = "name https:// ones in gateway.http.allowedOrigins"
        return [Finding("warning", "origins", f"{said}, and what comes over plain http can be changed on the way", do)]
    return [Finding("ok", "origins", said)]


def _proxies(networks: Sequence[str]) -> list[Finding]:
    import ipaddress

    if not networks:
        return []
    nets = [ipaddress.ip_network(text, strict=False) for text in networks]
    if wide := [str(net) for net in nets if net.prefixlen < WIDE[net.version]]:
        said = f"{', '.join(wide)} may say where a request is from, and so guess secrets as ever new clients"
        do = "name the proxy's own address in gateway.trustedProxies"
        return [Finding("error", "proxies", said, do)]
    return [Finding("ok", "proxies", f"X-Forwarded-For is believed of {', '.join(networks)}")]


async def _greeted(greet: Callable[[], Awaitable[tuple[str, Any, Any]]]) -> tuple[str, str]:
    """The version and the troubles of our gateway, "" where what answers is not ours."""
    try:
        async with asyncio.timeout(SECONDS):
            _, hello, health = await greet()
        return str(hello["server"]["version"]), "; ".join(health.get("troubles") or ())
    except Exception:  # it may be anything
        return "", ""


async def _opened(store: Any) -> str:
    """Why the store cannot be opened, "" where it can."""
    try:
        await store.open()
    except Exception as error:
        return str(error)
    finally:
        await store.close()
    return ""


async def _asked(
    config: Any, probe_all: Callable[..., Awaitable[Mapping[str, Any]]], request: Callable[..., Awaitable[Any]]
) -> tuple[list[Finding], list[tuple[str, float]]]:
    """The findings of the providers that agents use, and what `clock` takes."""
    dates: list[tuple[str, float]] = []

    async def noted(*args: Any) -> Any:
        response = await request(*args)
        dates.append((response.fields.get("date", ""), time.time()))
        return response

    known, models = config.providers, [model for agent in config.agents.values() for model in agent.models]
    probed = await probe_all(known, models, noted)  # those that are not known have a warning
    return [provider(name, known[name].options, found) for name, found in probed.items() if name in known], dates


async def examine(
    config: Any,
    secret: str,
    room: int,
    greet: Callable[[], Awaitable[tuple[str, Any, Any]]],
    store: Any,
    probe_all: Callable[..., Awaitable[Mapping[str, Any]]],
    request: Callable[..., Awaitable[Any]],
) -> list[Finding]:
    """The findings of a Config, which is a good configuration.

    `secret` names one that stands in its file, "" for none; `room` is how many connections the system allows; `greet`
    returns the address, greeting and health of the gateway that runs by it; `store`, its sessions, is opened and closed
    again, and both may raise why not; `probe_all(providers, models, request)` looks at the providers of these models.
    """
    error, version, trouble = unbound(config.bind, config.port), "", ""
    if error is not None and error.errno == errno.EADDRINUSE:
        version, trouble = await _greeted(greet)
    if not version and os.path.exists(config.store):  # noqa: ASYNC240 (nobody else waits)
        trouble = await _opened(store)
    files = [(config.path, secret)] if config.path else []
    files += [(config.tls[1], "a key")] if config.tls else []
    asked, dates = await _asked(config, probe_all, request)
    return [
        *configuration(config.path, config.warnings),
        *(permissions(path, os.stat(path).st_mode, held) for path, held in files),
        port(config.bind, config.port, error, version),
        state(config.store, trouble, bool(version)),
        *asked,
        clock(time.time(), dates),
        open_files(room, config.max_connections),
        *exposure(config),
    ]
