"""The hub: the port, the loop of a connection, the routes, the wiring of the leaves, and the program itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from argparse import Namespace

if sys.version_info < (3, 11):  # noqa: UP036 (here, before the leaves, which older ones cannot read)
    sys.exit(f"copepod: error: this is Python {sys.version.split()[0]}: start it with Python 3.11 or newer")

if TYPE_CHECKING or not __package__:  # a checkout: the files lie beside this one
    import anthropic_messages
    import auth
    import chat_answers
    import chat_completions as chat
    import cli
    import commands
    import config as configuration
    import control
    import doctor
    import fanout
    import http1
    import image_parts
    import jobs
    import logs
    import metrics
    import model_server
    import openai_completions
    import pool
    import probes
    import providers
    import python_agents
    import remote
    import reports
    import rfc6455
    import runs
    import schema
    import sessions
    import settings
    import starter
    import tls
    import webchat
    from chat_completions import APIError
    from config import Config, ConfigError
    from connection import FOREVER, Connection, fast_loop, now, raise_file_limit, room_for, stop_listening
    from exchange import Exchange, Stream
    from http1 import HTTPError
else:  # installed or vendored: they are modules of this package
    from . import (
        anthropic_messages,
        auth,
        chat_answers,
        cli,
        commands,
        control,
        doctor,
        fanout,
        http1,
        image_parts,
        jobs,
        logs,
        metrics,
        model_server,
        openai_completions,
        pool,
        probes,
        providers,
        python_agents,
        remote,
        reports,
        rfc6455,
        runs,
        schema,
        sessions,
        settings,
        starter,
        tls,
        webchat,
    )
    from . import chat_completions as chat
    from . import config as configuration
    from .chat_completions import APIError
    from .config import Config, ConfigError
    from .connection import FOREVER, Connection, fast_loop, now, raise_file_limit, room_for, stop_listening
    from .exchange import Exchange, Stream
    from .http1 import HTTPError

VERSION = "0.1.0"
HEAD_SECONDS = 10.0
SWEEP_SECONDS = 1.0
STOP_SECONDS = 5.0  # for what was cancelled to end
GOODBYE_SECONDS = 2.0  # for WebSocket clients to answer a close

ENDPOINTS = {"/v1/chat/completions": "chatCompletions", "/v1/models": "chatCompletions", "/metrics": "metrics"}
DIALECTS = {"openai-completions": openai_completions, "anthropic-messages": anthropic_messages}
GOING_DOWN = "The gateway is going down."
REVOKED = "This token is no longer valid, or its rights have changed."

log = logging.getLogger("copepod")
Result = TypeVar("Result")


class House:
    """What one configuration means: who may call, who answers. A reload builds another."""

    def __init__(self, config: Config, agents: Mapping[str, Callable[..., Any]], request: Any) -> None:
        self.config = config
        mode, secret, limit, named = config.auth
        self.gate = auth.Gate(mode, secret, named=named, trusted=config.trusted_proxies, **limit._asdict())
        self.directories: dict[str, chat.Directory] = {}  # by the name of the caller's token
        for caller in (auth.ANYONE, *named):
            own = config.within(caller.agents)
            found = (own.agents, own.default_agent, own.brands, own.session_headers, own.session_from)
            self.directories[caller.name] = chat.Directory(*found)
        made: dict[str, runs.Provider] = {}
        self.providers: dict[str, list[tuple[str, str, runs.Provider]]] = {}
        for agent in config.agents.values():
            if agent.id in agents:
                self.providers[agent.id] = [("python", "", python_agents.python_function(agents[agent.id]))]
                continue
            if problems := configuration.misfits(agent, config.providers):
                raise ConfigError(problems)
            self.providers[agent.id] = []
            for model in agent.models:
                name, _, rest = model.partition("/")
                if name not in made:
                    made[name] = self._provider(name, request)
                self.providers[agent.id].append((name, rest, made[name]))
        models = [model for agent in config.agents.values() if agent.id not in agents for model in agent.models]
        self.probe = probes.shared(partial(probes.probe_all, DIALECTS, config.providers, models, request))

    def _provider(self, name: str, request: Any) -> runs.Provider:
        provider = self.config.providers.get(name)
        if provider is None:
            return providers.missing(name)
        options = provider.options
        try:
            if provider.api == "python":
                return python_agents.python_entry(options["entry"], options["folder"])
        except ValueError as e:
            raise ConfigError([f"models.providers.{name}.entry: {e}"]) from e
        if provider.api == "command":
            return commands.command(options, self.config.used_variables)
        if provider.api in DIALECTS:
            return model_server.provider(options, request, DIALECTS[provider.api])
        return providers.echo()


def _fitted(call: chat.ChatRequest, agent: configuration.Agent) -> chat.ChatRequest:
    """Return the call as its agent can take it. APIError: 400, it cannot."""
    call = chat.with_tools(call, agent.id, agent.client_tools)
    if not call.images:
        return call
    try:
        if agent.images:
            return call._replace(messages=image_parts.kept(call.messages))
        messages, message = image_parts.left_out(call.messages)
    except ValueError as e:
        raise APIError(400, str(e), param="messages") from None
    return call._replace(messages=messages, message=message)


class Desk:
    """What the gateway protocol's side sees of the gateway: its configuration as it is now, and its runs.

    A named token's owner sees of both what is its own.
    """

    version = VERSION

    def __init__(self, gateway: Gateway, caller: auth.Caller = auth.ANYONE) -> None:
        self._gateway, self._caller, self._owner = gateway, caller, caller.name
        self.store: Any = gateway.store
        if self._owner:
            self.store = sessions.Shelf(gateway.store, runs.namespace(self._owner), caller.agents)
        self.reports, self.functions = reports.Reports(self, settings.mask).methods, gateway._agents.keys()
        self.refusals = {} if self._owner else gateway.refusals
        self.store_name = os.path.basename(gateway.house.config.store)

    @property
    def config(self) -> Config:
        config = self._gateway.house.config.within(self._caller.agents)
        return config._replace(warnings=()) if self._owner else config

    @property
    def uptime_ms(self) -> int:
        return int((now() - self._gateway.begun) * 1000)

    def admit(self, given: Mapping[str, str], client: str, fields: Mapping[str, str]) -> auth.Verdict:
        gate = self._gateway.house.gate
        secret = given.get(gate.mode) or (given.get("token") if gate.named else None)
        verdict = gate.admit(secret, client, fields)
        if verdict.caller is None:
            self._gateway.count_refusal(chat.credential_error(gate.mode, verdict.retry_after, verdict.missing))
        return verdict

    def of(self, caller: auth.Caller) -> Desk:
        return Desk(self._gateway, caller) if caller.name else self

    def key(self, run: runs.Run) -> str:
        return run.session_key if self._owner else run.lane[1]

    def bare(self, key: str) -> tuple[Desk, str]:
        parts = key.split(":", 2)
        if self._owner or len(parts) < 3 or parts[0] != "token":
            return self, key
        named = (caller for caller in self.config.auth.tokens if caller.name == parts[1])
        return self.of(next(named, self._caller)), parts[2]

    def parse(self, message: str | bytes) -> dict[str, Any]:
        try:
            return chat.parse_json(message.encode() if isinstance(message, str) else message, "frame")
        except APIError as e:
            raise control.Refusal(control.INVALID, f"invalid request frame. {e.message}") from None

    def accept(
        self, agent: str, key: str, message: str, *, system: str, run_id: str, timeout: float, asked: control.Asked
    ) -> runs.Run:
        gateway, target = self._gateway, chat.Target(agent, key, True)
        messages = [{"role": "user", "content": message}]
        try:
            ids, house = (run_id, ""), gateway.house
            run = gateway.accept(house, target, message, messages, system, None, ids, timeout or None, self._caller)
        except runs.RunError as e:
            gateway.count_refusal(chat.run_error(e.kind, str(e), e.retry_after, e.taken))
            raise control.Refusal(**jobs.told(e.kind, str(e), e.retry_after)) from None
        run.asked = asked
        return run

    async def drive(self, run: runs.Run) -> dict[str, Any] | None:
        kind, data = runs.CANCELLED  # unless it ends by itself
        try:
            kind, data = await self._gateway.runs.drive(run)
        finally:
            self._gateway.log_run(run, "" if kind == "end" else str(data["kind"]))
        return data if kind == "error" else None

    def stop(self, run: runs.Run, reason: str) -> bool:
        return self._gateway.runs.stop(run, runs.RunError("cancelled", reason))

    def active(self) -> list[runs.Run]:
        return [run for run in self._gateway.runs.active if self._owner in ("", run.owner)]

    def troubles(self) -> list[str]:
        draining = ["the gateway is going down"] if self._gateway.draining else []
        return draining + (["a session could not be stored"] if self._gateway.runs.store_error else [])

    async def probe(self) -> dict[str, dict[str, Any]]:
        found = {} if self._owner else await self._gateway.house.probe()
        return {name: finding._asdict() for name, finding in found.items()}


class Gateway:
    """A gateway of one configuration, for `async with`: it listens inside, on `port` (the real one).

    `config` is a Config, a dict of the file's shape, or None for the built-in default; `agents` maps ids to functions
    (see python_agents.python_function) that answer instead of a model. ConfigError: something is wrong with either.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | None = None,
        agents: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        if not isinstance(config, Config):
            # Another program's files are its own: without a word about it, sessions are kept in memory.
            reading = _reading(os.environ)
            tree = settings.embedded(config or {}, agents or {})
            config = configuration.build(reading.take(tree), reading, auth.callers)
        self._agents = {name.lower(): function for name, function in (agents or {}).items()}
        self._pool = pool.Pool(http1.format_request, http1.read_answer)
        self.house = House(config, self._agents, self._pool.request)
        self.store = sessions.Store(config.store, config.max_messages)
        self.runs = runs.Runs(config.max_concurrent, self.store.load, self.store.append, providers.checked)
        self.begun = now()
        self.refusals: dict[str, int] = {}  # how many of which code or type
        desk = Desk(self)
        self.jobs = jobs.Jobs(desk.drive, self.runs.observers)
        self.control = control.Control(desk, self.jobs, fanout.Fanout(self.runs.observers), schema.problem)
        self.created = int(time.time())
        self.draining = self.ready = self._hurried = False
        self.connections: set[Connection] = set()
        self.upgraded: set[Connection] = set()  # those of them that are WebSockets
        self.port = 0
        self.access_log: Callable[..., None] | None = None  # see logs.access_log
        self.metrics: metrics.Metrics | None = None
        self._measure()
        self._server: asyncio.Server | None = None
        self._secure: Callable[..., Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._max_connections = config.max_connections

    @property
    def url(self) -> str:
        """The address to call, without a path."""
        config = self.house.config
        return remote.local(config.bind, self.port, config.tls is not None).url

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop(0)

    async def start(self) -> None:
        """Open the store and listen. OSError, sessions.StoreError, ConfigError: what is in the way."""
        config = self.house.config
        self._max_connections = room_for(config.max_connections)
        loop = asyncio.get_running_loop()
        options = tls.listening(*config.tls, HEAD_SECONDS) if config.tls else {}
        if options and isinstance(loop, asyncio.BaseEventLoop):  # uvloop would read on, what is not for us
            self._secure = partial(loop.start_tls, sslcontext=options.pop("ssl"), server_side=True, **options)
            options = {}

        async def listen() -> None:
            self._server = await loop.create_server(
                self._connection, config.bind, config.port, backlog=1024, start_serving=False, **options
            )

        opening = self.store.open()  # in its thread, while the socket is made in this one
        try:
            for failure in await asyncio.gather(listen(), opening, return_exceptions=True):
                if failure is not None:
                    raise failure
            server = cast(asyncio.Server, self._server)
            await server.start_serving()
        except BaseException:  # a start that is cancelled leaves nothing, either
            await self.stop(0)
            raise
        self.port = server.sockets[0].getsockname()[1]
        self._sweep()
        self.ready = True

    async def stop(self, seconds: float) -> None:
        """Refuse new runs, let those that are on finish for `seconds`, then close everything."""
        self.draining = True
        self.control.announce("gateway stopping")
        for c in [c for c in self.connections if c.task is None]:
            c.transport.close()
        until = now() + seconds
        while (left := until - now()) > 0:
            busy: list[asyncio.Future[Any]] = [*self._busy(), *(f for c in self.connections if (f := c.flushing))]
            if not busy:
                break
            await asyncio.wait(busy, timeout=left)
        if self._server is not None:
            await stop_listening(self._server)
        self._cut()
        if left_over := self._busy():
            await asyncio.wait(left_over, timeout=STOP_SECONDS)
        self.control.close()
        for patience in (0 if self._hurried else GOODBYE_SECONDS, STOP_SECONDS):
            if tasks := [c.task for c in self.upgraded if c.task is not None]:
                await asyncio.wait(tasks, timeout=patience)
            for task in tasks:
                task.cancel()
        connections = list(self.connections)
        for c in connections:
            c.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        self._pool.close()
        await self.store.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(*(c.writer.wait_closed() for c in connections), return_exceptions=True)

    def _busy(self) -> list[asyncio.Task[None]]:
        """Return the tasks that answer a request or take a run to its end."""
        requests = (c.task for c in self.connections - self.upgraded if c.task is not None)
        return [*requests, *self.jobs.tasks]

    def _cut(self) -> None:
        """End every run, which its client is told of, and every request that has not come whole."""
        left = {c.task for c in self.connections if c.gone}  # these were cancelled then, and may be at their last work
        running = [run for run in self.runs.active if run.task not in left]
        for run in running:
            self.runs.stop(run, runs.RunError("overloaded", GOING_DOWN, taken=run.placed))
        tasks = {c.task for c in self.connections - self.upgraded} - {run.task for run in running} - left
        for task in tasks:
            if task is not None:  # one that has not begun yet would end without a word
                task.get_loop().call_soon(task.cancel)

    def hurry(self) -> None:
        """End what `stop` still waits for."""
        self._hurried = True
        self._cut()
        for c in [c for c in self.connections if c.flushing]:
            c.transport.abort()
        for c in self.upgraded if self.control.closing else ():
            if c.task is not None:
                c.task.cancel()

    def reload(self, config: Config) -> None:
        """Serve by another configuration from the next request on. Address, TLS, store and room stay. ConfigError."""
        names = ("bind", "port", "tls", "store", "max_connections")
        stays = {name: getattr(self.house.config, name) for name in names}
        if late := [name for name, value in stays.items() if getattr(config, name) != value]:
            log.warning("another %s holds from the next start on", " and ".join(late).replace("_", " "))
        config = config._replace(**stays)
        house = House(config, self._agents, self._pool.request)
        if (config.auth, config.trusted_proxies) == (self.house.config.auth, self.house.config.trusted_proxies):
            house.gate = self.house.gate  # with the failures that it remembers
        old, self.house = self.house.gate, house
        if house.gate is not old:
            self._revoke(old, house.gate)
        self.runs.max_concurrent = config.max_concurrent
        self.runs.fill()
        self._measure()

    def _measure(self) -> None:
        """Begin to count, or go on, or stop, as the configuration says."""
        wanted = self.house.config.metrics
        meter = (self.metrics or metrics.Metrics(VERSION, self.created, chat.ERRORS)) if wanted else None
        self.metrics = self.runs.meter = meter

    def _revoke(self, old: auth.Gate, gate: auth.Gate) -> None:
        """End what those do who may no longer what they could: their WebSockets, and the runs of named tokens."""
        gate.follow(old)
        # The shared secret is another one in another mode; who has a named token does not care.
        self.control.recheck(lambda caller: gate.now(caller) if caller.name or gate.mode == old.mode else None)
        gone = {caller.name for caller in old.named.values() if not caller.same_as(gate.now(caller))}
        for run in [run for run in self.runs.active if run.owner in gone]:
            self.runs.stop(run, runs.RunError("revoked", REVOKED, taken=run.placed))
            for c in self.connections if run.outside else ():  # its reader could keep it for a minute
                if c.task is run.task:
                    c.transport.abort()

    def _connection(self) -> Connection:
        return Connection(
            self._serve,
            self.connections,
            limit=http1.MAX_HEAD,
            first_seconds=HEAD_SECONDS,
            write_seconds=self.house.config.write_timeout_seconds,
            room=self._max_connections,
            secure=self._secure,
        )

    def _sweep(self) -> None:
        """Look at every deadline, once a second: cheaper than a timer for each wait."""
        self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
        at = now()
        for c in list(self.connections):
            if c.deadline < at:
                c.expire()
            if c.on_tick is not None:
                c.on_tick(at)
        self.runs.sweep()
        self.jobs.sweep(at)
        self.control.tick(at)
        self._pool.sweep()

    async def _serve(self, c: Connection) -> bool:
        """Serve the requests of a connection until it is idle (True) or has to end (False)."""
        while True:
            x = Exchange(c, http1)
            x.close = self.draining or c.surplus
            try:
                c.deadline = now() + HEAD_SECONDS
                x.request = await http1.read_head(c.reader)
                if x.request is None:
                    return False
                try:
                    await self._answer(x, x.request)
                except APIError as e:
                    self._refuse(x, e)
                if not x.read:
                    await x.discard()
                # Of many requests at once, neither our memory nor the other connections shall pay.
                if c.full:
                    await c.drain()
                elif c.buffered:
                    await asyncio.sleep(0)
            except HTTPError as e:
                if not x.status:
                    self._refuse(x, e)
                x.close = True
            except asyncio.CancelledError:
                if c.gone:  # nobody is left to answer
                    return False
                task = asyncio.current_task()
                if not c.expired or (task is not None and task.uncancel() > 0):
                    if self.draining and x.request is not None and not x.status:
                        x.close = True
                        self._refuse(x, chat.run_error("overloaded", GOING_DOWN))
                    raise
                if not x.status:
                    self._refuse(x, HTTPError(408, "The request took too long to arrive."))
                x.close = True
            except OSError:
                return False
            except Exception:
                log.exception("%s failed", x.id)
                if x.status:  # half an answer must not look like a whole one
                    c.transport.abort()
                    return False
                x.close = True
                self._refuse(x, APIError(500, "The gateway failed.", type="server_error"))
            finally:
                self._log(x)
            if c.gone or c.transport.is_closing() or (self.draining and not c.buffered):
                return False
            if x.close:
                c.expired = False
                await c.linger()
                return False
            if not c.buffered:
                c.deadline = now() + self.house.config.keep_alive_seconds
                return True

    def _refuse(self, x: Exchange, error: APIError | HTTPError) -> None:
        """Answer with an error: the one place where errors become bytes."""
        if isinstance(error, HTTPError):  # the bytes that follow cannot be told apart from a request
            x.close = True
            type_ = "server_error" if error.status == 501 else "invalid_request_error"
            x.bodiless = error.bodiless
            error = APIError(error.status, error.message, type=type_)
        self.count_refusal(error)
        x.send(error.status, error.body(), error.fields)

    def count_refusal(self, error: APIError) -> None:
        """Count an answer that is an error, by its code or type."""
        reason = error.code or error.type
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    async def _answer(self, x: Exchange, request: http1.Request) -> None:
        """Judge in the order of the contract, and answer. APIError, HTTPError: the refusal."""
        house = self.house
        if x.connection.surplus:
            raise chat.run_error("overloaded", "Too many connections; try again later.")
        if self._check_sender(x, request, house):
            return
        fields = request.fields
        if "upgrade" in fields and rfc6455.wanted(request.method, request.minor, fields):
            await self._upgrade(x, request)
            return
        path = request.path
        if path == "/v1/chat/completions" and house.config.chat_completions:
            self._check_method(request, "POST")
            caller = self._admit(x, request, house)
            await self._chat(x, request, house, caller)
        elif (path == "/v1/models" or path.startswith("/v1/models/")) and house.config.chat_completions:
            self._check_method(request, "GET", "HEAD")
            caller = self._admit(x, request, house)
            self._models(x, path, house.directories[caller.name])
        elif path in ("/healthz", "/readyz"):
            self._check_method(request, "GET", "HEAD")
            self._health(x, path)
        elif path == "/metrics" and (meter := self.metrics) is not None:
            self._check_method(request, "GET", "HEAD")
            if house.config.metrics_auth and self._admit(x, request, house, auth.READ).agents is not None:
                raise APIError(403, "This tells of all agents, and the token has `agents`.", type="permission_error")
            kinds = {"http": len(self.connections) - len(self.upgraded), "websocket": len(self.upgraded)}
            x.send(200, meter.text(self.runs.active, kinds, self.refusals), type=("Content-Type", metrics.MEDIA_TYPE))
        elif path == "/" and house.config.webchat:
            self._check_method(request, "GET", "HEAD")
            x.send(200, *webchat.page())
        elif path == "*":
            x.send(204, b"", [("Allow", "GET, HEAD, POST, OPTIONS")])
        else:
            off = f": set gateway.http.endpoints.{ENDPOINTS[path]}.enabled to true" if path in ENDPOINTS else ""
            raise APIError(404, f"There is nothing at {path[:200]}{off}.", type="not_found_error")

    def _check_sender(self, x: Exchange, request: http1.Request, house: House) -> bool:
        """Refuse a web page that may not call, and without auth all but this machine. True: a preflight, answered."""
        fields, config, peer = request.fields, house.config, x.connection.peer
        x.client = house.gate.client(peer, fields.get("x-forwarded-for"))
        if config.auth.mode == "none" and (why := auth.stranger(peer, fields, request.host, config.allowed_hosts)):
            raise APIError(403, why, type="permission_error")
        if (origin := fields.get("origin")) is None:
            return False
        if not auth.check_origin(origin, request.host, config.tls is not None, config.allowed_origins):
            message = "Pages of this origin may not call (see gateway.http.allowedOrigins)."
            raise APIError(403, message, type="permission_error")
        return x.open_to(origin, request)

    async def _upgrade(self, x: Exchange, request: http1.Request) -> None:
        """Make the connection a WebSocket, and serve its client to the end. APIError."""
        if self.draining:
            raise chat.run_error("overloaded", GOING_DOWN)
        try:
            fields = rfc6455.accept(request.method, request.fields)
        except rfc6455.HandshakeError as e:
            raise APIError(e.status, f"{e.message}.", fields=e.fields) from None
        c = x.connection
        x.read = True
        c.write(x.head(101, fields))
        c.deadline = FOREVER  # from now on control.tick looks after it
        longest, unread = control.MAX_PAYLOAD, control.MAX_BUFFERED
        websocket = rfc6455.WebSocket(c.reader, c.writer, max_message=longest, max_buffered=unread)
        self.upgraded.add(c)

        def named(name: str) -> None:
            x.caller = name or x.caller

        try:
            await self.control.serve(websocket, x.client, request.fields, named)
        finally:
            self.upgraded.discard(c)
            x.close = True

    def _check_method(self, request: http1.Request, *allowed: str) -> None:
        if request.method not in allowed:
            names = ", ".join(allowed)
            raise APIError(405, f"{request.path} answers {names} only.", fields=[("Allow", names)])

    def _admit(self, x: Exchange, request: http1.Request, house: House, scope: str = auth.CHAT) -> auth.Caller:
        """Return who asks, and may do what needs this scope. APIError: 401, 403, 429."""
        fields = request.fields
        verdict = house.gate.admit(auth.bearer(fields.get("authorization")), x.client, fields)
        caller = verdict.caller
        if caller is None:
            raise chat.credential_error(house.gate.mode, verdict.retry_after, verdict.missing, verdict.expired)
        if caller.name:
            x.caller = caller.name
            if not (caller.may_chat() if scope == auth.CHAT else caller.may_read()):
                raise APIError(403, f"This token lacks the scope `{scope}`.", type="permission_error")
        return caller

    def _health(self, x: Exchange, path: str) -> None:
        if path == "/healthz":
            x.send(200, b'{"status":"ok"}')
            return
        if self.draining or not self.ready:
            raise chat.run_error("overloaded", GOING_DOWN if self.draining else "The gateway is starting.")
        store, status = (b"a session could not be kept", b"degraded") if self.runs.store_error else (b"ok", b"ok")
        x.send(200, b'{"status":"%b","listening":"ok","store":"%b"}' % (status, store))

    def _models(self, x: Exchange, path: str, directory: chat.Directory) -> None:
        if path == "/v1/models":
            x.send(200, chat_answers.model_list(list(directory.agents), self.created))
        else:
            agent = directory.by_alias(path.removeprefix("/v1/models/"))
            x.send(200, chat_answers.model_object(agent, self.created))

    async def _chat(self, x: Exchange, request: http1.Request, house: House, caller: auth.Caller) -> None:
        if request.fields.get("content-encoding", "identity").lower() not in ("", "identity"):
            fields = [("Accept-Encoding", "identity")]  # RFC 9110 12.5.3
            raise APIError(415, "The body's Content-Encoding is not understood; send plain JSON.", fields=fields)
        call = chat.parse_request(await x.body(request))  # without a name: the run would keep it
        c = x.connection
        c.watch()
        try:
            run = self._asked(x, request, house, caller, call)
            if call.stream:
                send, unsent = Stream(x).send, c.transport.get_write_buffer_size
                stream = chat_answers.EventStream(
                    run.id, call.model, call.include_usage, call.include_events, send, unsent, now
                )
                c.on_tick = stream.tick
                kind, data = await self.runs.drive(run, stream.take, c.drain)
                full = stream.fail(chat.run_error(**data)) if kind == "error" else stream.end(data, run.usage)
            else:
                kind, data = await self.runs.drive(run)
                full = self._complete(x, call, run, kind, data)
            if full:
                await c.drain()
        except runs.RunError as e:
            raise chat.run_error(e.kind, str(e), e.retry_after, e.taken) from None
        finally:
            c.unwatch()
            c.on_tick = None

    def _asked(
        self, x: Exchange, request: http1.Request, house: House, caller: auth.Caller, call: chat.ChatRequest
    ) -> runs.Run:
        """Queue the run that a call asks for, and say which it is. APIError, RunError."""
        uuid = chat.as_uuid(x.id[4:])  # so that the log's request and the client's completion have one number
        target = house.directories[caller.name].resolve(call.model, call.user, request.fields, uuid)
        x.agent = target.agent_id
        key = ("x-copepod-session-key", chat.printable(target.session_key))
        x.fields += [key, ("x-copepod-agent-id", target.agent_id)]
        if call.tools or call.images:
            call = _fitted(call, house.config.agents[target.agent_id])
        ids = (f"chatcmpl_{uuid}", uuid)
        run = self.accept(house, target, call.message, call.messages, call.system, call.params, ids, caller=caller)
        x.run = run
        return run

    def _complete(self, x: Exchange, call: chat.ChatRequest, run: runs.Run, kind: str, data: Any) -> bool:
        """Answer with the run's whole outcome. True: too much is unsent. APIError: it failed."""
        if kind == "error":
            raise chat.run_error(**data)
        if run.lost:
            x.fields.append(("x-copepod-store", "failed"))
        more = run.more and {**run.more, "tool_calls": runs.joined(run.more.get("tool_calls", ()))}
        return x.send(200, chat_answers.completion(run.id, call.model, "".join(run.answer), data, run.usage, more))

    def accept(
        self,
        house: House,
        target: chat.Target,
        message: str,
        messages: list[dict[str, Any]],
        system: str = "",
        params: Mapping[str, Any] | None = None,
        ids: tuple[str, str] = ("", ""),
        timeout: float | None = None,
        caller: auth.Caller = auth.ANYONE,
    ) -> runs.Run:
        """Queue a turn: the one way into an agent, for every front. RunError: overloaded, limited, revoked.

        `ids` are the run's and that of a session that is not kept; where they are empty, new ones are made.
        """
        if self.draining:
            raise runs.RunError("overloaded", GOING_DOWN)
        if caller.name:
            self._permit(caller)
        agent = house.config.agents[target.agent_id]
        longest = agent.timeout_seconds
        if timeout and (timeout < longest or not caller.name):  # a friend must not keep one of all places for a week
            longest = timeout
        prompt = agent.system_prompt
        run = runs.Run(
            agent.id,
            target.session_key,
            message,
            messages,
            house.providers[agent.id],
            system=f"{prompt}\n\n{system}" if prompt and system else prompt or system,
            params=chat.over(agent.params, params) if params else agent.params,
            timeout=longest,
            stored=target.stored,
            run_id=ids[0],
            session_id=ids[1],
            owner=caller.name,
        )
        self.runs.accept(run)
        return run

    def _permit(self, caller: auth.Caller) -> None:
        """Count a run of a named token. RunError: it may have none, any more or for the moment."""
        gate = self.house.gate  # as it is now: the request may have come before a reload
        current = gate.now(caller)
        if current is None or not caller.same_as(current):
            raise runs.RunError("revoked", REVOKED)
        if left := gate.spend(current):
            message = f"This token may ask for {current.per_minute} runs a minute; try again in {left} seconds."
            raise runs.RunError("limited", message, retry_after=left)

    def _log(self, x: Exchange) -> None:
        if x.request is None and not x.status:
            return
        method, path = (x.request.method, x.request.path[:100]) if x.request is not None else ("-", "-")
        if self.metrics is not None:
            self.metrics.request(path, method, x.status)
        if self.access_log is not None:
            ms = (now() - x.started) * 1000
            self.access_log(x.id, x.client, method, path, x.status, x.sent, ms, x.agent, x.caller, x.run)

    def log_run(self, run: runs.Run, failed: str) -> None:
        """Log a run that the gateway protocol asked for, and the kind of its failure as HTTP's status for it."""
        if self.access_log is None:
            return
        (method, client), ms = run.asked, (now() - run.begun) * 1000
        status = chat.ERRORS.get(failed, chat.ERRORS["internal"])[0] if failed else 200
        about = ("WS", method, status, len("".join(run.answer).encode()), ms, run.agent_id, run.owner or "-")
        self.access_log(chat.printable(run.id).replace(" ", "%20"), client, *about, run)


# The program


def load_config(path: str | None, environ: Mapping[str, str], overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Return the Config of this file; None: of the one that is found, or the built-in default. ConfigError."""
    reading = _reading(environ)
    return configuration.build(reading.read(path, overrides), reading, auth.callers)


def _reading(environ: Mapping[str, str]) -> settings.Settings:
    return settings.Settings(environ, [brand.prefix for brand in configuration.BRANDS])


def _load(options: Namespace) -> Config:
    reading = _reading(os.environ)
    tree = reading.read(options.config, options.overrides)
    try:
        return configuration.build(tree, reading, auth.callers)
    except ConfigError as e:
        if tree is None or options.overrides or not reading.file:  # the file is named, or it may not be the file
            raise
        raise ConfigError([f"{reading.file}: {problem}" for problem in e.problems]) from None


def _command_gateway(options: Namespace) -> None:
    config = _load(options)
    raise_file_limit()
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_serve(config, options))


async def _serve(config: Config, options: Namespace) -> None:
    access_log = lru_cache(logs.access_log)  # one of each form, however often the configuration is read

    def tell(config: Config) -> None:
        logs.set_logging(config.log_level, config.log_format)
        for warning in config.warnings:
            log.warning("%s", warning)
        gateway.access_log = access_log(config.log_format) if config.log_level in ("info", "debug") else None

    gateway = Gateway(config)
    tell(config)
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if signalled.is_set():  # the second one: no more patience
            gateway.hurry()
        signalled.set()

    def reload() -> None:
        try:
            config = _load(options)
            gateway.reload(config)
            tell(config)
            log.info("the configuration was read again")
        except ConfigError as e:
            for problem in e.problems:
                log.error("the old configuration stays: %s", problem)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        await gateway.start()
    except OSError:
        if (error := doctor.unbound(config.bind, config.port)) is None:  # it was not the port
            raise
        raise OSError(": ".join(doctor.in_the_way(config.bind, config.port, error.errno))) from None
    cli.say_ready(gateway.url, config.chat_completions, config.auth.mode, config.webchat)
    if (loops := type(loop).__module__.partition(".")[0]) != "asyncio":
        log.info("on the event loop of %s", loops)
    await signalled.wait()
    patience = gateway.house.config.drain_seconds
    log.info("going down; what runs has %g seconds", patience)
    await gateway.stop(patience)
    if gateway.runs.active:
        log.error("%d runs outlive every cancellation of their agents: they are left", len(gateway.runs.active))
        await asyncio.sleep(2 * logs.LOG_SECONDS)  # the last lines of the access log
        os._exit(0)  # the loop's end would wait for them for ever


def _command_agent(options: Namespace) -> int:
    config = _load(options)
    logs.set_logging("error", config.log_format)
    return asyncio.run((_run_here if options.local else _run_there)(config, options))


async def _run_here(config: Config, options: Namespace) -> int:
    """Run one turn in this process and print its words as they come."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: a program that the turn has begun must end with it
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's is another
            signal.signal(number, signal.default_int_handler)
    gateway = Gateway(config)
    house, directory = gateway.house, gateway.house.directories[""]
    try:
        await gateway.store.open()
        gateway._sweep()  # the run's time is looked at; `stop` ends it
        agent = directory.agent(options.agent or config.default_agent)
        key = (options.session_key or f"agent:{agent}:main").encode(errors="surrogateescape")
        fields = {"x-copepod-session-key": key.decode("latin-1")}  # as a field comes
        target = directory.resolve(f"agent:{agent}" if options.agent else "", "", fields, "")
        message = options.message
        run = gateway.accept(house, target, message, [{"role": "user", "content": message}], timeout=options.timeout)
        with cli.Answer(options.json) as answer:
            kind, data = await gateway.runs.drive(run, answer.take)
            if kind == "error":
                raise runs.RunError(data["kind"], data["message"])
            return answer.end(jobs.final(run))
    finally:
        await gateway.stop(0)


async def _run_there(config: Config, options: Namespace) -> int:
    """Run one turn in the running gateway and print its words as they come."""
    turn = remote.turn(options.message, options.agent, options.session_key, options.session_id, options.timeout)
    with cli.Answer(options.json) as answer:
        async with _remote(config, options) as there:
            return answer.end(await there.run(turn, answer.take))


def _remote(config: Config, options: Namespace) -> remote.Remote:
    """Return what calls the gateway of --url, else that of the configuration."""
    own = remote.local(config.bind, config.port, config.tls is not None)
    secrets = {config.auth.mode: config.auth.secret} if config.auth.secret else {}
    try:
        address, secrets = remote.chosen(own, secrets, options.url, options.token)
    except ValueError as e:
        raise cli.UsageError(str(e)) from None
    trusted = config.tls[0] if config.tls and options.url is None else None

    async def open_(heard: Callable[[], None]) -> rfc6455.WebSocket:
        context = tls.client_context(trusted) if address.tls else None
        return await rfc6455.connect(*address[:3], tls=context, max_message=remote.MAX_MESSAGE, on_activity=heard)

    return remote.Remote(address, open_, rfc6455.HandshakeError, VERSION, secrets)


async def _ask(options: Namespace, method: str, params: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Return where the gateway is, its greeting, and what it answers."""
    async with _remote(_load(options), options) as there:
        return str(there.address), there.hello, await there.request(method, params, seconds=options.timeout)


def _command_call(options: Namespace) -> None:
    *_, payload = asyncio.run(_ask(options, options.method, options.params))
    cli.print_payload(payload)


def _command_health(options: Namespace) -> int:
    params = {"probe": True} if options.command == "status" else {}
    return cli.print_health(*asyncio.run(_ask(options, options.command, params)), options.json)


def _checked(options: Namespace) -> Config:
    """Return the configuration, of which all that can be tried was tried. ConfigError, OSError."""
    config = _load(options)
    House(config, {}, None)  # entries of python providers are imported
    if config.tls:
        tls.server_context(*config.tls)
    return config


def _command_check(options: Namespace) -> None:
    config = _checked(options)
    cli.print_good(config.path, config.warnings)


def _command_show(options: Namespace) -> None:
    cli.print_payload(settings.mask(_load(options).tree))


def _command_doctor(options: Namespace) -> int:
    try:
        config = _checked(options)
    except (ConfigError, OSError) as e:
        return cli.print_findings(doctor.mistakes(str(e).splitlines()), options.json)
    secret = settings.written(_reading(os.environ).read(config.path)) if config.path else ""
    vars(options).update(url=None, token=None, timeout=doctor.SECONDS)  # of the configuration's own gateway
    raise_file_limit()
    room, store = room_for(config.max_connections), sessions.Store(config.store, 1)
    greet = partial(_ask, options, "health", {})
    probe_all = partial(probes.probe_all, DIALECTS)
    found = asyncio.run(_asking(partial(doctor.examine, config, secret, room, greet, store, probe_all)))
    return cli.print_findings(found, options.json)


def _command_init(options: Namespace) -> None:
    reading = _reading(os.environ)
    path = reading.vacant(options.config)
    reading.problems += starter.problems(os.environ)
    if reading.problems:
        raise ConfigError(reading.problems)
    offers = asyncio.run(_asking(partial(starter.offers, DIALECTS, os.environ)))
    offer = offers[0 if options.yes else cli.choose("What shall answer?", offers)]
    port = next((port for port in starter.PORTS if not doctor.unbound("127.0.0.1", port)), configuration.DEFAULT_PORT)
    starter.write(path, starter.text(offer, auth.new_token(), port))
    cli.say_next(path, offer, ["--config", options.config] if options.config else [])


async def _asking(work: Callable[..., Awaitable[Result]]) -> Result:
    """Return what `work` does with what sends requests."""
    with contextlib.closing(pool.Pool(http1.format_request, http1.read_answer)) as asking:
        return await work(asking.request)


def _command_token(options: Namespace) -> None:
    token, reading = auth.new_token(), _reading({})
    entry = {"name": options.name, "tokenSha256": auth.digest(token).hex()}
    entry |= {key: given for key in ("agents", "scopes", "expires") if (given := getattr(options, key)) is not None}
    at, agents = "gateway.auth.tokens[0]", [agent.lower() for agent in options.agents or ()]
    auth.callers([reading.check(entry, configuration.TOKEN, at)], "", agents, reading)
    if reading.problems:
        raise cli.UsageError("; ".join(problem.removeprefix(f"{at}.") for problem in reading.problems))
    cli.print_token(token, entry)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: the process's own). Returns the exit status."""
    commands_: dict[str, Callable[[Namespace], int | None]] = {
        "gateway": _command_gateway,
        "agent": _command_agent,
        "call": _command_call,
        "health": _command_health,
        "status": _command_health,
        "config check": _command_check,
        "config show": _command_show,
        "token new": _command_token,
        "doctor": _command_doctor,
        "init": _command_init,
    }
    expected = (OSError, ConfigError, sessions.StoreError, runs.RunError, APIError, remote.RemoteError)
    return cli.run(sys.argv[1:] if argv is None else argv, commands_, VERSION, expected)


if __name__ == "__main__":
    sys.exit(main())
