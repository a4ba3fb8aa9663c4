"""What the requests of the gateway protocol may say: their parameters, judged in the words of the family's gateways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

MAX_ID = 64  # characters of a client's id
MAX_LABEL = 100  # characters of what is shown of a client to the others
MAX_KEY = 512  # characters of a session key, as over HTTP
MAX_SECONDS = 604_800  # a week, as in the configuration
MAX_LISTED = 1000  # sessions or messages in one answer
MAX_SAID = 8  # problems in one answer

# A schema is a dict of properties, those with a * required, or what says what is wrong with a value ("" for nothing).
Check: TypeAlias = "Callable[[Any], str]"
Schema: TypeAlias = "dict[str, Schema | Check]"


def _text(least: int = 0, most: int | None = None) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            return "must be string"
        if len(value) < least:
            return f"must NOT have fewer than {least} characters"
        return f"must NOT have more than {most} characters" if most is not None and len(value) > most else ""

    return check


def _number(low: int, high: int, *, whole: bool = True) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "must be integer" if whole else "must be number"
        if whole and value != int(value):  # 5.0 is one
            return "must be integer"
        return f"must be >= {low}" if value < low else f"must be <= {high}" if value > high else ""

    return check


def _list(item: Check | None = None, most: int | None = None) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, list):
            return "must be array"
        if most is not None and len(value) > most:
            return f"must NOT have more than {most} items"
        return next((f"items {said}" for each in value if item and (said := item(each))), "")

    return check


def _boolean(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be boolean"


def _object(value: Any) -> str:
    return "" if isinstance(value, dict) else "must be object"


def _anything(value: Any) -> str:
    return ""


def _constant(constant: str) -> Check:
    return lambda value: "" if value == constant else "must be equal to constant"


def _printable(most: int) -> Check:
    check = _text(1, most)
    return lambda value: check(value) or ("" if value.isprintable() else "must NOT have control characters")


def _empty(what: str) -> Check:
    """An empty list: this gateway has none of `what`, and nothing that a client sends is lost in silence."""
    return lambda value: "must be array" if not isinstance(value, list) else f"{what} are not taken" if value else ""


def _not_true(why: str) -> Check:
    return lambda value: _boolean(value) or (why if value else "")


def _or_null(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


TEXT, NAME, TEXTS = _text(), _text(1), _list(_text())
LABEL, KEY = _printable(MAX_LABEL), _printable(MAX_KEY)
COUNT = _number(1, MAX_LISTED)
MILLISECONDS = _number(0, MAX_SECONDS * 1000)
DELIVER = _not_true("must be false: this gateway has no channels to deliver to")
ATTACHMENTS = _empty("attachments")

CONNECT: Schema = {
    "minProtocol*": _number(1, 2**31),
    "maxProtocol*": _number(1, 2**31),
    "client*": {
        "id*": _printable(MAX_ID),
        "displayName": LABEL,
        "version*": LABEL,
        "platform*": LABEL,
        "deviceFamily": LABEL,
        "modelIdentifier": LABEL,
        "mode*": LABEL,
        "instanceId": LABEL,
    },
    "caps": TEXTS,
    "commands": TEXTS,
    "permissions": _object,
    "pathEnv": TEXT,
    "role": NAME,
    "scopes": _list(_text(1, MAX_ID), 32),
    "device": {
        "id*": LABEL,
        "publicKey*": NAME,
        "signature*": NAME,
        "signedAt*": _number(0, 2**53),
        "nonce": NAME,
    },
    "auth": {"token": TEXT, "password": TEXT},
    "locale": TEXT,
    "userAgent": TEXT,
}
SCHEMAS: dict[str, Schema | Check] = {
    "request frame": {"type*": _constant("req"), "id*": _text(1, MAX_KEY), "method*": NAME, "params": _anything},
    "connect": CONNECT,
    "agent": {
        "message*": NAME,
        "idempotencyKey*": KEY,
        "agentId": NAME,
        "sessionKey": KEY,
        "sessionId": KEY,
        "to": KEY,
        "thinking": TEXT,
        "deliver": DELIVER,
        "channel": TEXT,
        "timeout": _number(0, MAX_SECONDS, whole=False),
        "lane": TEXT,
        "extraSystemPrompt": TEXT,
        "label": TEXT,
        "attachments": ATTACHMENTS,
        **dict.fromkeys(("replyTo", "replyChannel", "accountId", "replyAccountId", "threadId"), TEXT),
        **dict.fromkeys(("groupId", "groupChannel", "groupSpace", "spawnedBy"), TEXT),
    },
    "agent.wait": {"runId*": KEY, "timeoutMs": MILLISECONDS},
    "agent.identity.get": {"agentId": NAME, "sessionKey": KEY},
    "chat.send": {
        "sessionKey*": KEY,
        "message*": NAME,
        "idempotencyKey*": KEY,
        "thinking": TEXT,
        "deliver": DELIVER,
        "attachments": ATTACHMENTS,
        "timeoutMs": MILLISECONDS,
    },
    "chat.abort": {"sessionKey*": KEY, "runId": KEY},
    "chat.history": {"sessionKey*": KEY, "agentId": NAME, "limit": COUNT},
    "sessions.list": {
        "limit": COUNT,
        "activeMinutes": _number(1, MAX_SECONDS),
        "agentId": NAME,
        "label": NAME,
        "search": TEXT,
        "spawnedBy": TEXT,
        **dict.fromkeys(("includeGlobal", "includeUnknown", "includeDerivedTitles", "includeLastMessage"), _boolean),
    },
    "sessions.preview": {"keys*": _list(KEY, 64), "limit": COUNT, "maxChars": _number(20, 100_000)},
    "sessions.reset": {"key*": KEY, "agentId": NAME},
    "sessions.delete": {"key*": KEY, "agentId": NAME, "deleteTranscript": _boolean},
    "sessions.patch": {
        "key*": KEY,
        "agentId": NAME,
        **dict.fromkeys(("label", "thinkingLevel", "verboseLevel", "reasoningLevel"), _or_null(_text(1, MAX_ID))),
    },
    "health": {"probe": _anything, "timeoutMs": MILLISECONDS},  # the family's takes any probe, here and below
    "status": {"probe": _anything, "timeoutMs": MILLISECONDS},
    "channels.status": {"probe": _boolean, "timeoutMs": MILLISECONDS},
    "agents.list": {},
    "models.list": {},
    "system-presence": {},
    "node.list": {},
    "cron.status": {},
    "last-heartbeat": {},
    "config.get": {},
}


def problem(name: str, value: Any) -> str:
    """Return what is wrong with `value` as a "request frame" or as the parameters of the method `name`, or ""."""
    return "; ".join(_problems("", SCHEMAS[name], value)[:MAX_SAID])


def _problems(path: str, schema: Schema | Check, value: Any) -> list[str]:
    at = f"at {path}: " if path else ""
    if not isinstance(schema, dict):
        wrong = schema(value)
        return [f"{at}{wrong}"] if wrong else []
    if not isinstance(value, dict):
        return [f"{at}must be object"]
    rules = {name.removesuffix("*"): (name[-1] == "*", rule) for name, rule in schema.items()}
    missing = [name for name, (required, _) in rules.items() if required and name not in value]
    said = [f"{at}must have required property '{name}'" for name in missing]
    said += [f"{at or 'at root: '}unexpected property '{name[:MAX_ID]}'" for name in value if name not in rules]
    for name, (_, rule) in rules.items():
        if name in value:
            said += _problems(f"{path}/{name}", rule, value[name])
    return said
