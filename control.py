"""The gateway's WebSocket protocol, version 3: connect, requests, answers, what a client may do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

PROTOCOL = 3
MAX_PAYLOAD = 512 * 1024  # bytes of a message, as the family's
MAX_BUFFERED = 3 * MAX_PAYLOAD  # bytes that a slow client may leave with us, as the family's
HEALTH_SECONDS = 60.0  # between two events of health, as in the family
TICK_SECONDS = 30.0  # between two ticks, and two pings; the family's command line gives up after two that are missing
HANDSHAKE_SECONDS = 10.0
SILENCE_SECONDS = 65.0  # of a client that does not even answer pings
MAX_WAITS = 64  # `agent.wait`s of one connection at once, and requests with one idempotency key
WAIT_MS = 30_000  # of an `agent.wait` that says nothing
SHOWN = 100  # clients in a list of presence

READ, WRITE, ADMIN = "operator.read", "operator.write", "operator.admin"
CHAT = "chat"  # of a named token: the methods of its own runs and sessions
CHATTING = ("agent", "agent.wait", "agent.identity.get", "agents.list")  # those; and chat.*, sessions.*
EVENTS = ("connect.challenge", "agent", "chat", "presence", "tick", "health", "shutdown")
CHANNELS = {  # the family's: its command line names one even when nothing is delivered
    "", "last", "webchat", "whatsapp", "telegram", "discord", "slack", "signal", "imessage", "msteams", "matrix",
    "line", "googlechat", "mattermost", "zalo",
}  # fmt: skip

REVOKED = "the credential is no longer valid, or its rights have changed"
INVALID, UNAVAILABLE = "INVALID_REQUEST", "UNAVAILABLE"
POLICY, PROTOCOL_ERROR, RESTART = 1008, 1002, 1012  # close codes, RFC 6455 7.4.1 and the registry

Dict = dict[str, Any]
Asked = tuple[str, str]  # by which method, and from which address
Answer = dict[str, Any] | list[Any] | None  # a payload
LATER: Dict = {}  # of a method that answers by itself
Handler = Callable[["Client", str, Dict], Awaitable[Answer]]

log = logging.getLogger("copepod")
encode: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode


if TYPE_CHECKING:

    class Run(Protocol):
        """What is looked at of a run."""

        id: str
        owner: str  # the name of the token that it was asked for with
        agent_id: str

    class Job(Protocol):
        """A run that was asked for by an idempotency key."""

        id: str
        place: tuple[str, str]  # agent id and session key
        accepted_at: int  # ms since the epoch
        payload: Dict | None  # of the last answer, once the run has ended
        error: Dict | None  # of the last answer; None: it went well
        waited: Dict  # what `agent.wait` says, likewise
        then: list[Callable[[Any], None]]  # who is told of the end

    class Jobs(Protocol):
        """Those runs."""

        def get(self, owner: str, key: str) -> Any: ...  # Job | None
        def seen(self, owner: str, run_id: str) -> Any: ...  # Job | None; without an owner's name anyone's
        def add(self, run: Any) -> Any: ...  # Job
        def wait(self, owner: str, run_id: str, seconds: float, then: Callable[[Any], None]) -> Callable[[], None]: ...

    class Caller(Protocol):
        """Who was let in. Without a name, an operator: who has the shared secret."""

        @property
        def name(self) -> str: ...  # of its token
        @property
        def scopes(self) -> Collection[str]: ...
        @property
        def expires(self) -> float | None: ...  # seconds since the epoch
        def same_as(self, other: Any) -> bool: ...  # it may do the same

    class Verdict(Protocol):
        """Whether a caller is let in."""

        @property
        def retry_after(self) -> int: ...
        @property
        def missing(self) -> bool: ...
        @property
        def caller(self) -> Caller | None: ...
        @property
        def expired(self) -> str: ...  # when

    class Socket(Protocol):
        """A WebSocket. `post` sends at once, and closes a peer that leaves too much unread."""

        on_activity: Callable[[], None] | None

        async def receive(self) -> str | bytes | None: ...
        def post(self, text: bytes) -> None: ...
        def ping(self) -> None: ...
        def close(self, code: int, reason: str) -> None: ...
        def abort(self) -> None: ...

    class Hub(Protocol):
        """What the gateway gives, of what the one who asks may see; and the one way into an agent."""

        @property
        def version(self) -> str: ...
        @property
        def config(self) -> Any: ...  # the Config as it is now: `auth.mode`, `agents` by id, `default_agent`
        @property
        def uptime_ms(self) -> int: ...
        @property
        def store(self) -> Any: ...  # its `find(session_id)` returns a session's agent and key, or None
        @property
        def reports(self) -> Mapping[str, Callable[..., Awaitable[Any]]]: ...

        def admit(self, given: Mapping[str, str], client: str, fields: Mapping[str, str]) -> Verdict: ...
        def of(self, caller: Any) -> Any: ...  # the Hub of this caller
        def key(self, run: Any) -> str: ...  # of its session
        def bare(self, key: str) -> tuple[Hub, str]: ...  # its owner's Hub, and as it is known there
        def parse(self, message: str | bytes) -> Dict: ...
        def accept(
            self,
            agent: str,
            key: str,
            message: str,
            *,
            system: str,
            run_id: str,
            timeout: float,
            asked: tuple[str, str],
        ) -> Any: ...  # `asked`: by which method, and from which address
        def stop(self, run: Any, reason: str) -> bool: ...  # False: it has ended, or is being stored
        def active(self) -> Collection[Run]: ...

    class Events(Protocol):
        """Who hears what happens."""

        def join(self, member: Callable[[bytes], None], owner: str) -> None: ...
        def leave(self, member: Callable[[bytes], None], owner: str) -> None: ...
        def tell(self, event: str, payload: Any, **more: Any) -> None: ...


class Refusal(Exception):
    """A request is answered with this error; `more` is its `details`, `retryable` or `retryAfterMs`.

    A refused `connect` also ends the connection, with the close code `close`.
    """

    def __init__(self, code: str, message: str, *, close: int = POLICY, **more: Any) -> None:
        super().__init__(message)
        self.close, self.error = close, {"code": code, "message": message, **more}


class Client:
    """One connection."""

    def __init__(self, hub: Hub, socket: Socket, address: str, fields: Mapping[str, str], now: float) -> None:
        self.hub, self.socket, self.address, self.fields = hub, socket, address, fields
        self.id = _new_id()
        self.opened = self.pinged = now
        self.alive = True  # something has come since the last ping
        self.silent_since = now
        self.connected = False
        self.seq = 0
        self.role = "operator"
        self.caller: Caller | None = None  # until it is let in
        self.scopes: frozenset[str] = frozenset()  # that it has asked for
        self.revoked = False  # its credential, by a reload
        self.about: Dict = {}  # for the list of presence
        self.asked: set[Callable[[], None]] = set()  # what takes it off the list of those who hear of a run's end
        self.waits: set[Callable[[], None]] = set()  # the same of its `agent.wait`s

    def hear(self) -> None:
        self.alive = True

    @property
    def listed(self) -> bool:
        """Whether it is present to the others; a command of the command line is gone before anyone has read of it."""
        return self.connected and self.about["mode"] != "cli"

    @property
    def owner(self) -> str:
        """The name of its token, "" for an operator's."""
        return "" if self.caller is None else self.caller.name

    def has(self, scope: str, method: str = "") -> bool:
        """Whether its credential has the scope (for this method)."""
        return self.caller is not None and _within(self.caller.scopes, scope, method)

    def may(self, scope: str, method: str = "") -> bool:
        """Whether it may do what needs `scope` (by this method): it has asked for it, and its credential has it."""
        return self.role == "operator" and _within(self.scopes, scope, method) and self.has(scope, method)

    def push(self, event: bytes) -> None:
        """Send an event, JSON that lacks its number and its closing brace."""
        self.seq += 1
        self.socket.post(b'%b,"seq":%d}' % (event, self.seq))

    def event(self, event: str, payload: Dict) -> None:
        self.push(encode({"type": "event", "event": event, "payload": payload})[:-1].encode())

    def send(self, frame: Dict) -> None:
        self.socket.post(encode(frame).encode())

    def answer(self, id: str, payload: Answer) -> None:
        self.send({"type": "res", "id": id, "ok": True, "payload": payload})

    def refuse(self, id: str | None, error: Dict, payload: Dict | None = None) -> None:
        told = {} if payload is None else {"payload": payload}
        self.send({"type": "res", "id": id, "ok": False, **told, "error": error})

    def end(self, id: str, job: Job) -> None:
        """Send the last answer to a request for a run."""
        if job.error is None:
            self.answer(id, job.payload)
        else:
            self.refuse(id, job.error, job.payload)


def _within(scopes: Collection[str], scope: str, method: str) -> bool:
    if scope in scopes or ADMIN in scopes or (scope == READ and WRITE in scopes):  # who may write may read
        return True
    return CHAT in scopes and (method in CHATTING or method.startswith(("chat.", "sessions.")))


def _new_id() -> str:
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"  # RFC 9562 5.4


def _now_ms() -> int:
    return int(time.time() * 1000)


class Control:
    """Serves the clients of the protocol. `hub` is that of the operators.

    `problem(name, value)` says what is wrong with a method's parameters, or "". A hub's `reports` are the methods that
    only tell or change what is stored: called with the parameters, and with (agent, key) where a session is meant.
    """

    def __init__(self, hub: Hub, jobs: Jobs, events: Events, problem: Callable[[str, Any], str]) -> None:
        self._hub, self._jobs, self._events, self._problem = hub, jobs, events, problem
        self._clients: set[Client] = set()
        self._presence, self._changed = 1, False  # the number of its state, and whether it must be told
        self._health_told = time.monotonic()
        self.closing = False
        self._telling: asyncio.Task[None] | None = None  # of the health
        self._methods: dict[str, tuple[str, Handler]] = {
            "agent": (WRITE, self._agent),
            "agent.wait": (READ, self._agent_wait),
            "agent.identity.get": (READ, self._identity),
            "chat.send": (WRITE, self._chat_send),
            "chat.abort": (WRITE, self._chat_abort),
            "chat.history": (READ, self._report("chat.history", of="sessionKey")),
            "sessions.preview": (READ, self._report("sessions.preview", of="keys")),
            "sessions.reset": (WRITE, self._report("sessions.reset", of="key")),
            "sessions.delete": (WRITE, self._report("sessions.delete", of="key")),
            "sessions.patch": (WRITE, self._report("sessions.patch", of="key")),
            "system-presence": (READ, self._system_presence),
            "config.get": (ADMIN, self._report("config.get")),
        }
        for name in hub.reports:
            self._methods.setdefault(name, (READ, self._report(name)))

    # A connection

    async def serve(
        self, socket: Socket, address: str, fields: Mapping[str, str], named: Callable[[str], None]
    ) -> None:
        """Serve one open connection of a client at `address` until it has ended; `named` is told whose token it had."""
        client = Client(self._hub, socket, address, fields, time.monotonic())
        socket.on_activity = client.hear
        self._clients.add(client)
        try:
            payload = {"nonce": _new_id(), "ts": _now_ms()}
            client.send({"type": "event", "event": "connect.challenge", "payload": payload})
            while (message := await socket.receive()) is not None:
                if client.connected:
                    await self._take(client, message)
                else:
                    await self._open(client, message)
        finally:
            self._clients.discard(client)
            self._events.leave(client.push, client.owner)
            self._changed |= client.listed
            for leave in (*client.asked, *client.waits):
                leave()
            named(client.owner)

    def tick(self, now: float) -> None:
        """Ping, tick, drop who is silent. To be called once a second with `time.monotonic()`."""
        wall = time.time()
        for client in list(self._clients):
            if client.caller is not None and client.caller.expires is not None and client.caller.expires <= wall:
                client.socket.close(POLICY, "the token has expired")
            if client.alive:
                client.alive, client.silent_since = False, now
            if now - client.silent_since > SILENCE_SECONDS:
                client.socket.abort()
            elif not client.connected and now - client.opened > HANDSHAKE_SECONDS:
                client.socket.close(POLICY, "handshake timeout")
            elif now - client.pinged >= TICK_SECONDS:
                client.pinged = now
                client.socket.ping()
                if client.connected:
                    client.event("tick", {"ts": _now_ms()})
        if self._changed:
            self._changed = False
            self._presence += 1
            payload = {"presence": self._present("")}
            self._events.tell("presence", payload, stateVersion={"presence": self._presence, "health": 1})
        if self._clients and not self.closing and now - self._health_told >= HEALTH_SECONDS:
            self._health_told = now
            self._telling = asyncio.get_running_loop().create_task(self._tell_health())

    async def _tell_health(self) -> None:
        try:
            self._events.tell("health", await self._hub.reports["health"]({}))
        except Exception:
            log.exception("the health cannot be told")

    def recheck(self, now: Callable[[Any], Caller | None]) -> None:
        """End the connections of those who may no longer what they could; `now(caller)` is who it is after a reload."""
        for client in list(self._clients):
            if client.caller is not None:
                current = now(client.caller)
                if current is None or not client.caller.same_as(current):
                    client.revoked = True
                    client.socket.close(POLICY, REVOKED)
                else:
                    client.caller = current

    def announce(self, reason: str) -> None:
        """Tell every client that the gateway goes down."""
        for client in [client for client in self._clients if client.connected]:
            client.event("shutdown", {"reason": reason})

    def close(self) -> None:
        """Close every connection."""
        self.closing = True
        if self._telling is not None:
            self._telling.cancel()
        for client in list(self._clients):
            client.socket.close(RESTART, "service restart")

    async def _open(self, client: Client, message: str | bytes) -> None:
        """Take the first request, which must be `connect`."""
        try:
            frame = self._hub.parse(message)
        except Refusal:
            frame = {}
        if self._problem("request frame", frame):
            client.socket.close(POLICY, "invalid request frame")
            return
        id = frame["id"]
        try:
            if frame["method"] != "connect":
                raise Refusal(INVALID, "invalid handshake: first request must be connect")
            params = self._params("connect", frame)
            if not params["minProtocol"] <= PROTOCOL <= params["maxProtocol"]:
                details = {"expectedProtocol": PROTOCOL}
                raise Refusal(INVALID, "protocol mismatch", close=PROTOCOL_ERROR, details=details)
            role = params.get("role", "operator")
            if role not in ("operator", "node"):
                raise Refusal(INVALID, "invalid role")
            self._admit(client, params.get("auth") or {})
        except Refusal as refusal:
            client.refuse(id, refusal.error)
            client.socket.close(refusal.close, str(refusal))
            return
        client.role = role
        client.scopes = frozenset(params.get("scopes") or (READ, WRITE))
        client.about = params["client"]
        if "device" in params:
            client.about["deviceId"] = params["device"]["id"]
        health = await client.hub.reports["health"]({}) if client.may(READ) else {}
        client.connected = True
        self._changed |= client.listed
        client.answer(id, self._hello(client, health))
        if client.may(READ, "chat.history"):  # events are of conversations
            self._events.join(client.push, client.owner)

    def _admit(self, client: Client, auth: Dict) -> None:
        verdict = self._hub.admit(auth, client.address, client.fields)
        if verdict.caller is not None:
            client.caller, client.hub = verdict.caller, self._hub.of(verdict.caller)
            return
        log.warning("%s: a WebSocket client without the right secret", client.address)
        if verdict.retry_after:
            message = f"too many failed attempts: try again in {verdict.retry_after} seconds"
            raise Refusal(UNAVAILABLE, message, retryable=True, retryAfterMs=verdict.retry_after * 1000)
        if verdict.missing:
            raise Refusal("NOT_PAIRED", "device identity required")
        if verdict.expired:
            raise Refusal(INVALID, f"unauthorized: the token has expired, at {verdict.expired}")
        raise Refusal(INVALID, f"unauthorized: gateway {self._hub.config.auth.mode} mismatch")

    def _hello(self, client: Client, health: Dict) -> Dict:
        default = client.hub.config.default_agent
        methods = [name for name, (scope, _) in self._methods.items() if not client.owner or client.may(scope, name)]
        return {
            "type": "hello-ok",
            "protocol": PROTOCOL,
            "server": {"version": client.hub.version, "host": os.uname().nodename, "connId": client.id},
            "features": {"methods": methods, "events": list(EVENTS)},
            "snapshot": {
                "presence": self._present(client.owner) if client.may(READ) else [],
                "health": health,
                # a friend, who is told of its own alone, must not see the operators come and go by the number
                "stateVersion": {"presence": 1 if client.owner else self._presence, "health": 1},
                "uptimeMs": client.hub.uptime_ms,
                "sessionDefaults": {
                    "defaultAgentId": default,
                    "mainKey": "main",
                    "mainSessionKey": f"agent:{default}:main",
                    "scope": "per-sender",
                },
            },
            "policy": {
                "maxPayload": MAX_PAYLOAD,
                "maxBufferedBytes": MAX_BUFFERED,
                "tickIntervalMs": int(TICK_SECONDS * 1000),
            },
        }

    async def _take(self, client: Client, message: str | bytes) -> None:
        """Answer one request. Here, and in `_open`, refusals become frames."""
        id = None
        try:
            frame = self._hub.parse(message)
            wrong = self._problem("request frame", frame)
            if isinstance(frame.get("id"), str):
                id = frame["id"] or None
            if wrong:
                raise Refusal(INVALID, f"invalid request frame: {wrong}")
            payload = await self._call(client, frame)
            if payload is not LATER:
                client.answer(frame["id"], payload)
        except Refusal as refusal:
            client.refuse(id, refusal.error)
        except Exception:
            log.exception("a request of the gateway protocol failed")
            client.refuse(id, {"code": UNAVAILABLE, "message": "the gateway failed; its log says why"})

    async def _call(self, client: Client, frame: Dict) -> Answer:
        method = frame["method"]
        if method == "connect":
            raise Refusal(INVALID, "connect is only valid as the first request")
        if method not in self._methods:
            raise Refusal(INVALID, f"unknown method: {method[:100]}")
        scope, function = self._methods[method]
        if client.role != "operator":
            raise Refusal(INVALID, f"unauthorized role: {client.role}")
        if not client.may(scope, method):
            raise Refusal(INVALID, f"missing scope: {scope}")
        return await function(client, frame["id"], self._params(method, frame))

    def _params(self, method: str, frame: Dict) -> Dict:
        params = frame.get("params")
        params = {} if params is None else params
        if wrong := self._problem(method, params):
            raise Refusal(INVALID, f"invalid {method} params: {wrong}")
        return {
            name: int(value) if value.__class__ is float and value == int(value) else value  # 5.0 is an integer
            for name, value in params.items()
        }

    def _session(self, hub: Hub, method: str, key: str, agent: str = "") -> tuple[str, str]:
        """Return the agent and the session that a key means; `main` is the default agent's main one. Refusal."""
        if key == "main":
            key = f"agent:{agent or hub.config.default_agent}:main"
        whose, bare = hub.bare(key)  # to a friend, `main` and no agent at all may mean another one than to operators
        parts = bare.split(":", 2)
        if len(parts) == 3 and parts[0] == "agent":
            named = self._known(whose, method, parts[1])
            if agent not in ("", named):
                message = f'invalid {method} params: agent "{agent}" does not match session key agent "{named}"'
                raise Refusal(INVALID, message)
            agent = named
        return agent or whose.config.default_agent, key

    def _known(self, hub: Hub, method: str, agent: str) -> str:
        wanted = agent.strip().lower()
        if wanted in hub.config.agents:
            return wanted
        if wanted == "main":  # the family's clients all send it
            return str(hub.config.default_agent)
        there = ", ".join(hub.config.agents)
        raise Refusal(INVALID, f'invalid {method} params: unknown agent id "{agent[:100]}"; the agents are {there}')

    # Runs

    async def _agent(self, client: Client, id: str, params: Dict) -> Answer:
        if (channel := params.get("channel", "last")) not in CHANNELS:
            raise Refusal(INVALID, f"invalid agent params: unknown channel: {channel[:100]}")
        hub = client.hub
        agent = self._known(hub, "agent", params["agentId"]) if "agentId" in params else ""
        key = params.get("sessionKey", "")
        if not key and "sessionId" in params:
            found = await hub.store.find(params["sessionId"])
            if client.revoked:  # meanwhile
                raise Refusal(INVALID, REVOKED)
            if found is not None and agent in ("", found[0]):
                agent, key = self._known(hub, "agent", found[0]), found[1]
            else:
                key = f"agent:{agent or hub.config.default_agent}:session:{params['sessionId']}"
        elif not key:
            to = f"direct:{params['to']}" if "to" in params else "main"
            key = f"agent:{agent or hub.config.default_agent}:{to}"
        place = self._session(hub, "agent", key, agent)
        system, timeout = params.get("extraSystemPrompt", ""), params.get("timeout", 0)
        job, _ = self._job(client, "agent", params, place, system, timeout)
        if job.payload is None:
            if len(job.then) >= MAX_WAITS:
                raise Refusal(UNAVAILABLE, f"{MAX_WAITS} requests of this idempotencyKey are open", retryable=True)
            client.answer(id, {"runId": job.id, "status": "accepted", "acceptedAt": job.accepted_at})

            def tell(job: Job) -> None:
                client.asked.discard(leave)
                client.end(id, job)

            def leave() -> None:
                job.then.remove(tell)

            job.then.append(tell)
            client.asked.add(leave)
        else:
            client.end(id, job)
        return LATER

    async def _chat_send(self, client: Client, id: str, params: Dict) -> Answer:
        place = self._session(client.hub, "chat.send", params["sessionKey"])
        job, new = self._job(client, "chat.send", params, place, "", params.get("timeoutMs", 0) / 1000)
        if job.payload is None:
            return {"runId": job.id, "status": "started" if new else "in_flight"}
        client.end(id, job)
        return LATER

    def _job(
        self, client: Client, method: str, params: Dict, place: tuple[str, str], system: str, timeout: float
    ) -> tuple[Job, bool]:
        """Return the run of this idempotency key of this owner, and whether it is new. Refusal.

        Nothing is awaited between the look and the start, so that of two requests at once only one starts it.
        """
        key, owner, hub = params["idempotencyKey"], client.owner, client.hub
        job: Job | None = self._jobs.get(owner, key)
        if job is not None and job.place == place:
            return job, False
        if job is not None or any(run.id == key and run.owner == owner for run in hub.active()):
            raise Refusal(INVALID, "this idempotencyKey is of a run in another session: use a fresh one")
        asked = (method, client.address)
        run = hub.accept(*place, params["message"], system=system, run_id=key, timeout=timeout, asked=asked)
        return self._jobs.add(run), True

    async def _agent_wait(self, client: Client, id: str, params: Dict) -> Answer:
        run_id = params["runId"]
        job: Job | None = self._jobs.seen(client.owner, run_id)
        if job is not None and job.payload is not None:
            return job.waited
        if len(client.waits) >= MAX_WAITS:
            raise Refusal(UNAVAILABLE, f"{MAX_WAITS} waits of this connection are open; let one end", retryable=True)

        def end(job: Job | None) -> None:
            client.waits.discard(leave)
            client.answer(id, {"runId": run_id, "status": "timeout"} if job is None else job.waited)

        leave = self._jobs.wait(client.owner, run_id, params.get("timeoutMs", WAIT_MS) / 1000, end)
        client.waits.add(leave)
        return LATER

    async def _chat_abort(self, client: Client, id: str, params: Dict) -> Answer:
        hub, wanted = client.hub, params.get("runId")
        agent, key = self._session(hub, "chat.abort", params["sessionKey"])
        found = [
            run
            for run in hub.active()
            if hub.key(run) == key and (run.id == wanted if wanted else run.agent_id == agent)
        ]
        ended = [run.id for run in found if hub.stop(run, "The run was aborted.")]
        return {"ok": True, "aborted": bool(ended), "runIds": ended}

    # What is told of the gateway and its sessions

    def _report(self, name: str, of: str = "") -> Handler:
        """Return what answers the method `name`, about the session or the sessions that the parameter `of` names."""

        async def handler(client: Client, id: str, params: Dict) -> Answer:
            hub = client.hub
            report: Callable[..., Awaitable[Answer]] = hub.reports[name]
            if not of:
                return await report(params)
            agent = self._known(hub, name, params["agentId"]) if "agentId" in params else ""
            if isinstance(params[of], str):
                return await report(params, self._session(hub, name, params[of], agent))
            places = {}
            for key in params[of]:
                with suppress(Refusal):  # of an agent that there is no more: missing, and no reason to tell nothing
                    places[key] = self._session(hub, name, key)
            return await report(params, places)

        return handler

    async def _identity(self, client: Client, id: str, params: Dict) -> Answer:
        hub = client.hub
        agent = self._known(hub, "agent.identity.get", params["agentId"]) if "agentId" in params else ""
        if "sessionKey" in params:
            agent, _ = self._session(hub, "agent.identity.get", params["sessionKey"], agent)
        agent = agent or hub.config.default_agent
        return {"agentId": agent, "name": hub.config.agents[agent].name}

    async def _system_presence(self, client: Client, id: str, params: Dict) -> Answer:
        return self._present(client.owner)

    def _present(self, owner: str) -> list[Dict]:
        """Return the gateway and its clients, SHOWN of them; for a token's owner, its own."""
        host, now = os.uname(), _now_ms()
        about: Dict = {"host": host.nodename, "version": self._hub.version, "deviceFamily": host.sysname}
        about |= {"platform": f"{host.sysname} {host.release}".lower(), "modelIdentifier": host.machine}
        text = f"Gateway: {host.nodename} · app {self._hub.version}"
        entries = [{**about, "mode": "gateway", "reason": "self", "text": text, "ts": now}]
        there = [client for client in self._clients if client.listed and owner in ("", client.owner)]
        for client in there[:SHOWN]:
            about = {key: value for key, value in client.about.items() if key not in ("id", "displayName")}
            name = client.about.get("displayName", client.about["id"])
            scopes = [scope for scope in (ADMIN, READ, WRITE) if scope in client.scopes and client.has(scope)]
            about |= {"host": name, "roles": [client.role], "scopes": scopes}
            entries.append({**about, "reason": "connect", "text": f"Client: {name}", "ts": now})
        return entries
