"""A client of the gateway protocol, version 3: one request at a time, a run and its words as they come."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

PROTOCOL = 3
OPEN_SECONDS = 10.0  # to connect and be greeted; a gateway waits as long for the first request
SILENT_SECONDS = 65.0  # a gateway ticks every 30: two are missing
ABORT_SECONDS = 1.0  # for a gateway to hear that a run is not wanted any more
LEAVE_SECONDS = 1.0  # for a gateway to answer our close
MAX_MESSAGE = 64 * 1024 * 1024  # bytes; an answer of 8 MiB, each of its characters escaped
SCHEMES = {"ws": 80, "http": 80, "wss": 443, "https": 443}


class Address(NamedTuple):
    """Where a gateway listens; as text, and as `url`, without the target."""

    host: str
    port: int
    target: str
    tls: bool

    def __str__(self) -> str:
        return self._said("ws")

    @property
    def url(self) -> str:
        return self._said("http")

    def _said(self, scheme: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.tls else ''}://{host}:{self.port}"


class RemoteError(Exception):
    """A call has failed; the text is a line that says why and what to do."""


if TYPE_CHECKING:

    class WebSocket(Protocol):
        """An open connection. `receive` gives None at its end; then `close_code` and `close_reason` are the peer's."""

        close_code: int | None
        close_reason: str

        async def send(self, message: str) -> None: ...
        async def receive(self) -> str | bytes | None: ...
        def close(self) -> None: ...
        def abort(self) -> None: ...


def parse_url(url: str) -> Address:
    """Return where a ws, wss, http or https address leads. ValueError: it is none, or has a user in it."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("an address is of printable ASCII")
    if parts.scheme not in SCHEMES or not parts.hostname or "@" in parts.netloc:
        raise ValueError("an address has a scheme and a host, and no user")
    port = SCHEMES[parts.scheme] if parts.port is None else parts.port
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.hostname, port, target, parts.scheme in ("wss", "https"))


def local(bind: str, port: int, tls: bool) -> Address:
    """Return where this machine calls what listens on `bind`."""
    return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind), port, "/", tls)  # noqa: S104


def chosen(own: Address, secrets: dict[str, str], url: str | None, token: str | None) -> tuple[Address, dict[str, str]]:
    """Return the gateway to call, of `url` or our `own`, and with what: the `token`, else `secrets`, if it is ours.

    ValueError: what is wrong with the command line.
    """
    address = own
    if url is not None:
        try:
            address = parse_url(url)
        except ValueError:
            raise ValueError(f"--url {url}: must be an address such as ws://127.0.0.1:18789") from None
    elif not own.port:
        raise ValueError("gateway.port is 0, so where it listens is not known: give --url")
    if token:
        return address, {"token": token, "password": token}
    return address, secrets if address[:2] == own[:2] else {}  # ours never to a stranger


def turn(
    message: str, agent: str | None, session_key: str | None, session_id: str | None, timeout: float | None
) -> dict[str, Any]:
    """Return what `Remote.run` takes: the parameters of `agent`, without what is not given."""
    given = {"agentId": agent, "sessionKey": session_key, "sessionId": session_id, "timeout": timeout}
    return {"message": message, **{name: value for name, value in given.items() if value is not None}}


def _at(value: Any, *keys: str) -> Any:
    """What stands under these keys, one within the other; None where the gateway has not sent it."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _unopened(address: Address, error: Exception) -> RemoteError:
    """What a failure to open the connection means: an OSError, or the handshake's with the answer's `status`."""
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the certificate of {address} is not trusted ({error.verify_message})"
        return RemoteError(f"{why}: it must be that of gateway.tls.cert, or its issuer be named by SSL_CERT_FILE")
    if isinstance(error, ssl.SSLError):
        return RemoteError(f"what listens at {address} does not speak TLS: give a ws:// address with --url")
    if isinstance(error, OSError):
        return RemoteError(f"no gateway answers at {address}: start one with `copepod gateway`, or give --url")
    hints = {403: "gateway.http of its configuration says who may call", 503: "it is full or going down, try again"}
    hint = hints.get(getattr(error, "status", 0), "give the address of a gateway with --url, wss:// where it has TLS")
    return RemoteError(f"{address}: {error}: {hint}")


class Remote:
    """A connection to the gateway at `address`, for `async with`. RemoteError: whatever goes wrong on it.

    `open_` opens the WebSocket, or raises OSError or one of `errors`; it gets what is to be called for each frame that
    comes. `auth` is the secret, under the names "token" and "password". Inside, `hello` is the gateway's greeting.
    """

    def __init__(
        self,
        address: Address,
        open_: Callable[[Callable[[], None]], Awaitable[WebSocket]],
        errors: type[Exception],
        version: str,
        auth: Mapping[str, str],
    ) -> None:
        self.address, self.hello = address, dict[str, Any]()
        self._open, self._errors, self._version, self._auth = open_, (OSError, errors), version, auth
        self._requests = 0
        self._silence: asyncio.Timeout | None = None

    async def __aenter__(self) -> Remote:
        params = {
            "minProtocol": PROTOCOL,
            "maxProtocol": PROTOCOL,
            "client": {"id": "copepod", "version": self._version, "platform": sys.platform, "mode": "cli"},
            "role": "operator",
            "scopes": ["operator.admin"],
            **({"auth": self._auth} if self._auth else {}),
        }
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                try:
                    self._socket = await self._open(self._heard)
                except self._errors as e:
                    raise _unopened(self.address, e) from None
                try:
                    self.hello = await self.request("connect", params)
                except BaseException:
                    await self._leave()
                    raise
        except TimeoutError:
            said = f"{self.address} says nothing within {OPEN_SECONDS:g} s"
            raise RemoteError(f"{said}: see the gateway's log, or give another address with --url") from None
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._leave()

    async def request(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        seconds: float | None = None,
        on_event: Callable[[str, Any], None] = lambda event, payload: None,
    ) -> Any:
        """Return the payload of the answer, the last one where a run is `accepted` first; meanwhile, tell events."""
        self._requests += 1
        id = str(self._requests)
        request = json.dumps({"type": "req", "id": id, "method": method, "params": params}, ensure_ascii=False)
        data = request.encode(errors="replace")  # a lone surrogate is no text
        limit = _at(self.hello, "policy", "maxPayload")
        if isinstance(limit, int) and len(data) > limit:
            raise RemoteError(f"the request has {len(data)} bytes, and the gateway takes {limit} at most: send less")
        try:
            async with asyncio.timeout(seconds):
                await self._socket.send(data.decode())
                while True:
                    frame = await self._frame()
                    if frame.get("type") == "event":
                        on_event(str(frame.get("event")), frame.get("payload"))
                    elif frame.get("type") != "res" or frame.get("id") not in (id, None):  # None: it was not understood
                        continue
                    elif not frame.get("ok"):
                        raise self._refusal(method, frame.get("error"))
                    elif _at(frame, "payload", "status") != "accepted":
                        return frame.get("payload")
        except TimeoutError:
            raise RemoteError(f"no answer to {method} within {seconds:g} s: wait longer with --timeout") from None

    async def run(self, params: Mapping[str, Any], take: Callable[[str, Any], object]) -> Any:
        """Run a turn with these parameters of `agent`, hand over "delta", its words, and "tool", the agent's doings.

        Returns the last payload.

        Where the caller is cancelled, or nobody reads the words any more (OSError of `take`), the run is ended.
        """
        from uuid import uuid4

        run_id = str(uuid4())
        agent = params.get("agentId") or _at(self.hello, "snapshot", "sessionDefaults", "defaultAgentId")
        place = f"session:{params['sessionId']}" if "sessionId" in params else "main"
        session = params.get("sessionKey") or f"agent:{agent}:{place}"  # until the run's events tell it

        def on_event(event: str, payload: Any) -> None:
            nonlocal session
            if event == "agent" and _at(payload, "runId") == run_id:
                session = _at(payload, "sessionKey") or session
                stream, data = _at(payload, "stream"), _at(payload, "data")
                if stream == "assistant" and isinstance(delta := _at(data, "delta"), str):
                    take("delta", delta)
                elif stream == "tool" and isinstance(data, dict):
                    take("tool", data)

        params = {**params, "idempotencyKey": run_id, "deliver": False}
        try:
            return await self.request("agent", params, on_event=on_event)
        except (asyncio.CancelledError, OSError):
            with suppress(RemoteError):
                await self.request("chat.abort", {"sessionKey": session, "runId": run_id}, seconds=ABORT_SECONDS)
            raise

    def _heard(self) -> None:
        if self._silence is not None and not self._silence.expired():
            self._silence.reschedule(asyncio.get_running_loop().time() + SILENT_SECONDS)

    async def _frame(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(SILENT_SECONDS) as self._silence:
                message = await self._socket.receive()
        except TimeoutError:
            raise RemoteError(f"{self.address} has gone silent for {SILENT_SECONDS:g} s: try again") from None
        finally:
            self._silence = None
        if message is None:
            code, reason = self._socket.close_code, self._socket.close_reason
            said = f" ({f'{code} {reason}'.strip()})" if code not in (1005, 1006) else ""
            raise RemoteError(f"the connection to {self.address} was lost{said}: try again")
        with suppress(ValueError, RecursionError):
            frame = json.loads(message)
            if isinstance(frame, dict):
                return frame
        raise RemoteError(f"{self.address} does not speak the gateway protocol: give another address with --url")

    def _refusal(self, method: str, error: Any) -> RemoteError:
        said = str(_at(error, "message") or "the gateway refuses, and does not say why")
        who, how = f"the gateway at {self.address}", "with --token, or in COPEPOD_GATEWAY_TOKEN"
        if method != "connect":
            return RemoteError(said)
        if _at(error, "code") == "NOT_PAIRED":
            return RemoteError(f"{who} asks for a token or password: give it {how}")
        if said.startswith("unauthorized"):
            return RemoteError(f"{who} refuses the token or password ({said}): give the right one {how}")
        if (expected := _at(error, "details", "expectedProtocol")) is not None:
            return RemoteError(f"{who} speaks protocol {expected}, not {PROTOCOL}: use the program that came with it")
        return RemoteError(f"{who} refuses: {said}")

    async def _leave(self) -> None:
        self._socket.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                while await self._socket.receive() is not None:
                    pass
        self._socket.abort()
