"""What the gateway tells of itself and of its sessions, in the shapes of the gateway protocol."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

MAX_HISTORY = 1024 * 1024  # bytes of messages in one answer, below what a client may leave unread
LISTED = 200  # sessions or messages, where no limit is given
RECENT = 5  # sessions that health and status name, as in the family
PREVIEWED, PREVIEW_CHARS = 12, 240  # messages and characters of a preview, as in the family

Dict = dict[str, Any]
Dicts = list[Dict]  # Store has a method named list
Place = tuple[str, str]  # agent id and session key

NO_HEARTBEAT = {"enabled": False, "every": "disabled", "everyMs": None}
NO_LIMIT = {"abortedLastRun": False, "contextTokens": None, "remainingTokens": None, "percentUsed": None}

log = logging.getLogger("copepod")
encode: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode


if TYPE_CHECKING:

    class Run(Protocol):
        """What is looked at of a run."""

        agent_id: str
        placed: bool

    class Agent(Protocol):
        """An agent of the configuration."""

        @property
        def name(self) -> str: ...  # its id where it has none
        @property
        def models(self) -> Sequence[str]: ...  # "provider/model", the primary first

    class Config(Protocol):
        """The configuration, of it what the one who asks may see."""

        @property
        def default_agent(self) -> str: ...
        @property
        def agents(self) -> Mapping[str, Agent]: ...  # by id
        @property
        def providers(self) -> Mapping[str, Any]: ...  # by name; the `models` of their options are listed
        @property
        def warnings(self) -> Collection[str]: ...
        @property
        def tree(self) -> Dict: ...  # as the file would say it, secrets too

    class Store(Protocol):
        """The transcripts."""

        async def list(
            self,
            limit: int | None = None,
            agents: Collection[str] | None = None,
            since: int = 0,  # ms since the epoch
            keep: Callable[[Dict], bool] | None = None,  # called in another thread
        ) -> Dicts: ...
        async def counts(self) -> dict[str, int]: ...
        async def history(self, agent: str, key: str, limit: int | None = None) -> tuple[str | None, Dicts]: ...
        async def reset(self, agent: str, key: str) -> str: ...
        async def delete(self, agent: str, key: str) -> bool: ...
        async def patch(self, agent: str, key: str, fields: Dict) -> Dict: ...

    class Hub(Protocol):
        """What the gateway gives, of what the one who asks may see."""

        @property
        def version(self) -> str: ...
        @property
        def config(self) -> Config: ...  # as it is now
        @property
        def functions(self) -> Collection[str]: ...  # agents that ask no model
        @property
        def uptime_ms(self) -> int: ...
        @property
        def store(self) -> Store: ...
        @property
        def store_name(self) -> str: ...  # for people; no path of the host
        def stop(self, run: Any, reason: str) -> bool: ...
        def active(self) -> Collection[Run]: ...
        def key(self, run: Any) -> str: ...  # of its session
        @property
        def refusals(self) -> Mapping[str, int]: ...  # how many of which kind
        async def probe(self) -> Dict: ...  # by provider: ok, what, missing
        def troubles(self) -> list[str]: ...  # what keeps the gateway from being well


def shown(messages: list[Dict]) -> list[Dict]:
    """Return stored messages in the protocol's shape, older ones left out beyond MAX_HISTORY bytes, never the last."""
    room, kept = MAX_HISTORY, Dicts()
    for message in reversed(messages):
        content = [{"type": "text", "text": message["content"] or ""}]
        entry = {"role": message["role"], "content": content, "timestamp": message["timestamp"]}
        room -= len(encode(entry))
        if room < 0 and kept:
            break
        kept.append(entry)
    return kept[::-1]


def models(config: Config) -> Dicts:
    """Return what there is to choose from: `id`, `name` and `provider` of each model, those that agents use first."""
    names = {model: model for agent in config.agents.values() for model in agent.models}
    for provider, each in config.providers.items():
        listed = each.options.get("models") or ()
        names |= {f"{provider}/{model['id']}": model.get("name") or model["id"] for model in listed if "id" in model}
    parts = ((model.partition("/"), name) for model, name in names.items())
    return [{"id": rest or first, "name": name, "provider": first} for (first, _, rest), name in parts]


def _named(agents: Mapping[str, Agent]) -> dict[str, Dict]:
    """Return by its id what is told of each agent's name: nothing where it has none of its own."""
    return {id_: {"name": agent.name} if agent.name != id_ else {} for id_, agent in agents.items()}


def _now_ms() -> int:
    return int(time.time() * 1000)


class Reports:
    """The methods that only tell, or change what is stored. `mask` leaves the secrets out of a configuration's tree."""

    def __init__(self, hub: Hub, mask: Callable[[Any], Any]) -> None:
        self._hub, self._mask = hub, mask
        self.methods: dict[str, Callable[..., Awaitable[Any]]] = {
            "health": self._health,
            "status": self._status,
            "agents.list": self._agents,
            "models.list": self._models,
            "sessions.list": self._sessions,
            "sessions.preview": self._preview,
            "sessions.reset": self._reset,
            "sessions.delete": self._delete,
            "sessions.patch": self._patch,
            "chat.history": self._history,
            "config.get": self._config,
            "channels.status": self._channels,
            "node.list": self._nodes,
            "cron.status": self._cron,
            "last-heartbeat": self._heartbeat,
        }

    async def _health(self, params: Dict) -> Dict:
        begun, hub, config = time.monotonic(), self._hub, self._hub.config
        default, troubles = config.default_agent, hub.troubles()
        counts, agents = dict[str, int](), []
        try:
            counts = await hub.store.counts()
            recents = {agent: await self._recent([agent]) for agent in config.agents}
        except Exception:
            log.exception("the sessions cannot be read")
            troubles, recents = [*troubles, "the sessions cannot be read"], {}
        for agent, name in _named(config.agents).items():
            entry = {"agentId": agent, **name, "isDefault": agent == default}
            recent = recents.get(agent, [])
            short = [{key: session[key] for key in ("key", "updatedAt", "age")} for session in recent]
            sessions = {"path": hub.store_name, "count": counts.get(agent, 0), "recent": short}
            agents.append({**entry, "heartbeat": NO_HEARTBEAT, "sessions": sessions})
        return {
            "ok": not troubles,
            **({"troubles": troubles} if troubles else {}),
            "ts": _now_ms(),
            "durationMs": int((time.monotonic() - begun) * 1000),
            "channels": {},
            "channelOrder": [],
            "channelLabels": {},
            "heartbeatSeconds": 0,
            "defaultAgentId": default,
            "agents": agents,
            "sessions": next(agent["sessions"] for agent in agents if agent["agentId"] == default),
        }

    async def _status(self, params: Dict) -> Dict:
        hub, config = self._hub, self._hub.config
        found = {"providers": await hub.probe()} if params.get("probe") is True else {}
        counts, active, default = await hub.store.counts(), hub.active(), config.default_agent
        asked = {id_: () if id_ in hub.functions else agent.models for id_, agent in config.agents.items()}
        agents = [{"agentId": id_, "isDefault": id_ == default, "models": list(each)} for id_, each in asked.items()]
        heartbeats = [{"agentId": agent, **NO_HEARTBEAT} for agent in asked]
        return {
            "version": hub.version,
            "uptimeMs": hub.uptime_ms,
            "runs": {
                "active": sum(run.placed for run in active),
                "queued": sum(not run.placed for run in active),
            },
            "agents": agents,
            **found,
            "refusals": dict(hub.refusals),
            "warnings": list(config.warnings),
            "heartbeat": {"defaultAgentId": default, "agents": heartbeats},
            "channelSummary": [],
            "queuedSystemEvents": [],
            "sessions": {
                "paths": [hub.store_name],
                "count": sum(counts.values()),
                "defaults": self._defaults(),
                "recent": await self._recent(None),
                "byAgent": [{"agentId": agent, "count": counts.get(agent, 0)} for agent in asked],
            },
        }

    async def _recent(self, agents: Collection[str] | None) -> list[Dict]:
        now = _now_ms()
        return [
            {**session, **NO_LIMIT, "age": now - session["updatedAt"], "flags": [f"id:{session['sessionId']}"]}
            for session in await self._hub.store.list(RECENT, agents)
        ]

    def _defaults(self) -> Dict:
        first = next(iter(models(self._hub.config)), {})
        return {"modelProvider": first.get("provider"), "model": first.get("id"), "contextTokens": None}

    async def _agents(self, params: Dict) -> Dict:
        config = self._hub.config
        agents = [{"id": agent, **name} for agent, name in _named(config.agents).items()]
        return {"defaultId": config.default_agent, "mainKey": "main", "scope": "per-sender", "agents": agents}

    async def _models(self, params: Dict) -> Dict:
        return {"models": models(self._hub.config)}

    async def _sessions(self, params: Dict) -> Dict:
        agents = [params["agentId"]] if "agentId" in params else list(self._hub.config.agents)
        named = [name for name in ("label", "spawnedBy") if name in params]
        search, now = params.get("search", "").lower(), _now_ms()

        def keep(session: Dict) -> bool:
            return all(session.get(name) == params[name] for name in named) and (
                search in f"{session['key']} {session.get('label', '')} {session['sessionId']}".lower()
            )

        since = int(now - params["activeMinutes"] * 60_000) if "activeMinutes" in params else 0
        limit, wanted = params.get("limit", LISTED), keep if named or search else None
        found = await self._hub.store.list(limit, agents, since, wanted)
        kept = [{**session, "abortedLastRun": False, "contextTokens": None} for session in found]
        about = {"ts": now, "path": self._hub.store_name, "count": len(kept), "defaults": self._defaults()}
        return {**about, "sessions": kept}

    async def _preview(self, params: Dict, places: Mapping[str, Place]) -> Dict:
        limit, chars = params.get("limit", PREVIEWED), params.get("maxChars", PREVIEW_CHARS)
        previews, room = [], MAX_HISTORY
        for key in dict.fromkeys(params["keys"]):
            session_id, messages = await self._hub.store.history(*places[key], limit) if key in places else (None, [])
            items = []
            for message in messages:
                item = {"role": message["role"], "text": (message["content"] or "")[:chars]}
                room -= len(encode(item))
                if room < 0:
                    break
                items.append(item)
            status = "missing" if session_id is None else "ok" if messages else "empty"
            previews.append({"key": key, "status": status, "items": items})
        return {"ts": _now_ms(), "previews": previews}

    async def _history(self, params: Dict, place: Place) -> Dict:
        session_id, messages = await self._hub.store.history(*place, params.get("limit", LISTED))
        found = {} if session_id is None else {"sessionId": session_id}
        return {"sessionKey": params["sessionKey"], **found, "messages": shown(messages), "thinkingLevel": "off"}

    async def _reset(self, params: Dict, place: Place) -> Dict:
        self._end(place, "The session was reset.")
        session_id = await self._hub.store.reset(*place)
        entry = {"sessionId": session_id, "updatedAt": _now_ms(), "systemSent": False, "abortedLastRun": False}
        tokens = {"inputTokens": 0, "outputTokens": 0, "totalTokens": 0}
        return {"ok": True, "key": place[1], "entry": {**entry, **tokens}}

    async def _delete(self, params: Dict, place: Place) -> Dict:
        self._end(place, "The session was deleted.")
        return {"ok": True, "key": place[1], "deleted": await self._hub.store.delete(*place), "archived": []}

    def _end(self, place: Place, reason: str) -> None:
        """End the session's runs: what they say would be the first words of the next one."""
        for run in [run for run in self._hub.active() if (run.agent_id, self._hub.key(run)) == place]:
            self._hub.stop(run, reason)

    async def _patch(self, params: Dict, place: Place) -> Dict:
        fields = {name: value for name, value in params.items() if name not in ("key", "agentId")}
        entry = await self._hub.store.patch(*place, fields)
        return {"ok": True, "path": self._hub.store_name, "key": place[1], "entry": entry}

    async def _config(self, params: Dict) -> Dict:
        from hashlib import sha256  # here: it brings OpenSSL with it

        config = self._mask(self._hub.config.tree)
        issues: Dict = {"issues": [], "warnings": [], "legacyIssues": []}
        number = sha256(encode(config).encode()).hexdigest()
        return {"exists": True, "valid": True, "config": config, "hash": number, **issues}

    # What this gateway has none of

    async def _channels(self, params: Dict) -> Dict:
        maps = ("channelLabels", "channelDetailLabels", "channelSystemImages", "channels", "channelAccounts")
        none: Dict = {"channelOrder": [], "channelMeta": [], "channelDefaultAccountId": {}}
        return {"ts": _now_ms(), **none, **{name: {} for name in maps}}

    async def _nodes(self, params: Dict) -> Dict:
        return {"ts": _now_ms(), "nodes": []}

    async def _cron(self, params: Dict) -> Dict:
        return {"enabled": False, "jobs": 0, "nextWakeAtMs": None}

    async def _heartbeat(self, params: Dict) -> None:
        return None
