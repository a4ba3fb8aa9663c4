"""OpenAI's Chat Completions, the request: bytes to a call, which agent and which session it means, what is refused.

Fields and shapes are those of https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from math import isinf
from typing import Any, NamedTuple, NoReturn

MAX_DEPTH = 128  # nesting of the request's JSON; the parser itself ends near the interpreter's recursion limit
MAX_VALUES = 65_536  # in it: some 5 ms of the loop, which waits meanwhile; 10,000 messages have 30,000
MAX_KEY = 512  # bytes of a session key, of `user`, and of a conversation's id

# How a run fails -> status, `type`, `code`.
ERRORS: dict[str, tuple[int, str, str | None]] = {
    "rejected": (400, "invalid_request_error", None),
    "rate_limited": (429, "rate_limit_error", None),
    "internal": (500, "server_error", None),
    "upstream": (502, "upstream_error", None),
    "upstream_auth": (502, "upstream_auth_error", None),
    "overloaded": (503, "overloaded_error", None),
    "timeout": (504, "timeout_error", None),
    "cancelled": (500, "server_error", "run_aborted"),  # by an operator
    "limited": (429, "rate_limit_error", "rate_limit_exceeded"),  # by the token's own rate
    "revoked": (401, "authentication_error", "invalid_api_key"),  # the token, while its run was on
}

_AGENT_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNPRINTABLE = re.compile(rb"[^\x20-\x24\x26-\x7e]")  # `%` too, so that it can be decoded
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE = re.compile(rf"{_HIGH}(?!{_LOW})|{_LOW}(?<!{_HIGH}{_LOW})")  # half of a pair of surrogates, the other not there
_CONTAINERS = frozenset((dict, list))
_NO_BOUND = bytes(set(range(256)) - set(b'",[{'))  # all that neither begins or parts values nor is a quote

_NUMBER, _TEXT = (int, float), (str,)
# Optional fields -> their JSON type. Ranges are the provider's to know.
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "frequency_penalty": (_NUMBER, "a number"),
    "function_call": ((str, dict), "a string or an object"),
    "functions": ((list,), "an array"),
    "logit_bias": ((dict,), "an object"),
    "logprobs": ((bool,), "a boolean"),
    "max_completion_tokens": ((int,), "an integer"),
    "max_tokens": ((int,), "an integer"),
    "metadata": ((dict,), "an object"),
    "model": (_TEXT, "a string"),
    "parallel_tool_calls": ((bool,), "a boolean"),
    "presence_penalty": (_NUMBER, "a number"),
    "reasoning_effort": (_TEXT, "a string"),
    "response_format": ((dict,), "an object"),
    "seed": ((int,), "an integer"),
    "service_tier": (_TEXT, "a string"),
    "stop": ((str, list), "a string or an array of strings"),
    "stream": ((bool,), "a boolean"),
    "stream_options": ((dict,), "an object"),
    "temperature": (_NUMBER, "a number"),
    "tool_choice": ((str, dict), "a string or an object"),
    "tools": ((list,), "an array of objects"),
    "top_logprobs": ((int,), "an integer"),
    "top_p": (_NUMBER, "a number"),
    "verbosity": (_TEXT, "a string"),
}
# What tells the agent of the client's own tools.
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_NO_TOOLS: Mapping[str, Any] = {}
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens"})  # two names for one bound: both are refused
# Of these, what the gateway itself answers to, does not hand on, or not to every agent.
_OURS = {
    "function_call", "functions", "metadata", "model", "stream", "stream_options", *_TOOLS,
}  # fmt: skip
ROLES = ("user", "assistant", "tool", "function")  # of a conversation's messages
_CLOSER = frozenset({"n", "stop", "stream_options", "tools", "user"})  # of these, a type does not say enough
_JSON = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}


class APIError(Exception):
    """The request is answered with `status` and OpenAI's error object; `fields` go into the answer's head."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.fields = fields

    def body(self) -> bytes:
        """Return `{"error": {message, type, param, code}}` as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")


class ChatRequest(NamedTuple):
    """One call, checked."""

    model: str  # as sent; "" when absent
    user: str  # "" when absent
    stream: bool
    include_usage: bool
    include_events: bool  # the agent's doings are told in the stream, too
    system: str  # system and developer messages, joined by a blank line
    messages: list[dict[str, Any]]  # the conversation: role, content (text), and tool_calls, tool_call_id, name
    message: str  # the text of the last user or tool message; "" where that is an image alone
    params: dict[str, Any]  # sampling fields, as sent
    tools: Mapping[str, Any]  # `tools`, with `tool_choice` and `parallel_tool_calls`, as sent; {} without tools
    images: bool  # the content of a user's message with images is its parts, as sent


class Target(NamedTuple):
    """Who answers, and where the conversation is kept."""

    agent_id: str
    session_key: str
    stored: bool


def as_uuid(text: str) -> str:
    """Return 32 random hexadecimal digits as a UUID (RFC 9562 section 5.4)."""
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"


def run_error(kind: str, message: str, retry_after: int | None = None, taken: bool = False) -> APIError:
    """Return the answer to a run that failed. A turn that may have acted must not be repeated by an SDK."""
    status, type_, code = ERRORS[kind]
    fields: list[tuple[str, str]] = []
    if status in (429, 503):
        fields.append(("Retry-After", str(retry_after or 1)))
    if kind in ("timeout", "upstream_auth", "cancelled") or (taken and status >= 429):
        fields.append(("x-should-retry", "false"))
    return APIError(status, message, type=type_, code=code, fields=fields)


def credential_error(mode: str, retry_after: int, missing: bool, expired: str = "") -> APIError:
    """Return the answer to a caller without the right credentials; `retry_after` in seconds when it is locked out.

    `expired` is the moment until which they were right.
    """
    if retry_after:
        return APIError(
            429,
            f"Too many wrong credentials; try again in {retry_after} seconds.",
            type="rate_limit_error",
            code="too_many_auth_failures",
            fields=[("Retry-After", str(retry_after)), ("x-should-retry", "false")],
        )
    wrong = f"{'No' if missing else 'Wrong'} credentials; send `Authorization: Bearer <{mode}>`."
    return APIError(
        401,
        f"This token has expired, at {expired}; ask for another." if expired else wrong,
        type="authentication_error",
        code="invalid_api_key",
        fields=[("WWW-Authenticate", "Bearer")],
    )


def parse_request(body: bytes) -> ChatRequest:
    """Return the call that `body` is. APIError: 400 names the field that is wrong."""
    fields = parse_json(body)
    params = {}
    for name, value in fields.items():
        known = _FIELDS.get(name)
        if known is not None and value is not None:  # null counts as absent
            if type(value) not in known[0]:
                _must(name, known[1])
            if name not in _OURS:
                params[name] = value
    user, usage, events, tools = ("", False, False, _NO_TOOLS) if _CLOSER.isdisjoint(fields) else _look_closer(fields)
    system, messages, message, images = parse_messages(fields.get("messages"))
    stream = fields.get("stream") is True
    model = fields.get("model") or ""
    return ChatRequest(model, user, stream, usage, events, system, messages, message, params, tools, images)


def with_tools(call: ChatRequest, agent_id: str, takes: bool) -> ChatRequest:
    """Return the call with its tools among its parameters, where the agent takes them.

    APIError: 400, it does not, and the client counts on them.
    """
    if call.tools and takes:
        return call._replace(params={**call.params, **call.tools})
    if call.tools and call.tools.get("tool_choice") != "none":
        said = f"Agent `{agent_id}` takes no tools of its clients: leave `tools` out, send `tool_choice` as `none`,"
        _refuse("tools", f"{said} or ask for an agent that has `clientTools: true`.")
    return call


def over(own: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of a run: an agent's own, and those of the request over them."""
    bounded = not _LENGTHS.isdisjoint(asked)
    return {**{name: own[name] for name in own if not (bounded and name in _LENGTHS)}, **asked}


def _look_closer(fields: Mapping[str, Any]) -> tuple[str, bool, bool, Mapping[str, Any]]:
    """Return `user`, `include_usage` and `include_events` of `stream_options`, and the fields about tools.

    APIError: 400, also for what else a type alone does not say.
    """
    if isinstance(stop := fields.get("stop"), list) and any(not isinstance(item, str) for item in stop):
        _must("stop", "a string or an array of strings")
    if (tools := fields.get("tools")) and any(not isinstance(tool, dict) for tool in tools):
        _must("tools", "an array of objects")
    if "n" in fields and (fields["n"] not in (None, 1) or fields["n"] is True):
        _refuse("n", "`n` must be 1: one answer is given.")
    options = fields.get("stream_options") or {}
    for name in ("include_usage", "include_events") if options else ():
        if not isinstance(options.get(name), bool | None):
            _must(f"stream_options.{name}", "a boolean")
    user = fields.get("user")
    user = user if isinstance(user, str) else ""  # Open WebUI sends an object
    _check_key(user, "`user`", "user")
    chosen = {name: value for name in _TOOLS if (value := fields.get(name)) is not None} if tools else _NO_TOOLS
    return user, options.get("include_usage") is True, options.get("include_events") is True, chosen


def _check_key(key: str, what: str, param: str | None = None) -> None:
    """Let a text pass that is to be a session's key, or the end of one. APIError: 400 says what it is."""
    if len(key.encode()) > MAX_KEY or _CONTROL.search(key):
        _refuse(param, f"{what} must have at most {MAX_KEY} bytes and no control characters.")


def parse_messages(messages: object) -> tuple[str, list[dict[str, Any]], str, bool]:
    """Return the system text, the conversation, the text of its last user or tool message, and whether it has images.

    APIError: 400.
    """
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "`messages` must be a non-empty array.")
    system: list[str] = []
    conversation: list[dict[str, Any]] = []
    message: str | None = None
    shown = False
    for n, entry in enumerate(messages):
        if not isinstance(entry, dict):
            _must(f"messages[{n}]", "an object")
        role, content, calls = entry.get("role"), entry.get("content"), entry.get("tool_calls") or []
        if not isinstance(role, str):
            _must(f"messages[{n}].role", "a string")
        text = content if isinstance(content, str) else parse_content(content, f"messages[{n}].content")
        if calls and (not isinstance(calls, list) or any(not isinstance(call, dict) for call in calls)):
            _must(f"messages[{n}].tool_calls", "an array of objects")
        if role in ("system", "developer"):
            system += [text] if text else []
            continue
        images = text is not content and role == "user" and _has_images(content)
        if role in ROLES and (text or calls or images or (role == "tool" and entry.get("tool_call_id"))):
            kept: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": text}
            if images:
                kept["content"], shown = content, True
            if len(entry) > 2:
                kept |= {key: entry[key] for key in ("name", "tool_call_id") if isinstance(entry.get(key), str)}
            if calls and role == "assistant":
                kept["tool_calls"] = calls
            conversation.append(kept)
            if role != "assistant" and (text or images):
                message = text
    if message is None:
        _refuse("messages", "Missing user message in `messages`.")
    return "\n\n".join(system), conversation, message, shown


def parse_content(content: object, name: str) -> str:
    """Return the text of a message's content that is no string: of an array of parts those of text. APIError: 400."""
    if content is None:
        return ""
    if not isinstance(content, list):
        _must(name, "a string or an array of parts")
    texts: list[str] = []
    for n, part in enumerate(content):
        if not isinstance(part, dict):
            _must(f"{name}[{n}]", "an object")
        if part.get("type") in ("text", "input_text"):
            text = part.get("text")
            if not isinstance(text, str):
                _must(f"{name}[{n}].text", "a string")
            texts.append(text)
    return "\n".join(texts)


def _has_images(content: object) -> bool:
    return isinstance(content, list) and any(part.get("type") == "image_url" for part in content)


def parse_json(body: bytes, what: str = "body") -> dict[str, Any]:
    """Return the JSON object that `body` is; `what` it is called in the error. APIError: 400."""
    try:
        text = body.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        _refuse(None, f"The {what} is not UTF-8 (at byte {e.start}).")
    text = text.strip(" \t\r\n")  # RFC 8259 2: its white space
    if not text:
        _refuse(None, f"The {what} is empty; send a JSON object.")
    if len(body) > MAX_VALUES and _values(body) > MAX_VALUES:
        _refuse(None, f"The {what} has more than {MAX_VALUES} values.")
    if "\\u" in text and "\0" not in text:  # a lone surrogate is no character: RFC 8259 8.2; NUL is refused anyway
        # While NULs stand for escaped backslashes, each backslash begins an escape.
        text = _LONE.sub(r"\\ufffd", text.replace(r"\\", "\0\0")).replace("\0\0", r"\\")
    try:
        value, end = _decoder.raw_decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except json.JSONDecodeError as e:
        _refuse(None, f"The {what} is not JSON: {e.msg} at line {e.lineno}, column {e.colno}.")
    except RecursionError:
        _refuse(None, f"The JSON is nested deeper than {MAX_DEPTH} levels.")
    except ValueError as e:  # NaN, Infinity, an integer of thousands of digits
        _refuse(None, f"The {what} is not JSON: {e}.")
    if not isinstance(value, dict):
        _refuse(None, f"The {what} must be a JSON object, not {_JSON[type(value)]}.")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return number


_decoder = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float)


def _values(body: bytes) -> int:
    """Return the number of commas and opening brackets outside strings, or a larger one that is within MAX_VALUES."""
    if (most := body.count(b",") + body.count(b"[") + body.count(b"{")) <= MAX_VALUES:
        return most
    bounds = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_BOUND)
    # Without two quotes side by side, what stands in strings still does: most strings are gone before the split.
    return sum(map(len, bounds.replace(b'""', b"").split(b'"')[::2]))


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [i for v in level for i in (v.values() if v.__class__ is dict else v) if i.__class__ in _CONTAINERS]
        if not level:
            return
    raise RecursionError


def _refuse(param: str | None, message: str) -> NoReturn:
    raise APIError(400, message, param=param)


def _must(name: str, be: str) -> NoReturn:
    _refuse(name, f"`{name}` must be {be}.")


class Directory:
    """Which agent and which session a request means, for the agents and brands of one configuration.

    `session_headers` are the fields that may carry a conversation's id; `session_from` says what else than a session
    key makes a session: "user" (these and `user`), "header" (these), or "none".
    """

    def __init__(
        self,
        agents: Collection[str],
        default: str,
        brands: Sequence[str],
        session_headers: Sequence[str] = (),
        session_from: str = "user",
    ) -> None:
        self.agents, self.default = agents, default
        self._by_user = session_from == "user"
        self._chat_fields = () if session_from == "none" else tuple(name.lower() for name in session_headers)
        self._brands = frozenset(brands)
        names = "|".join(brands)
        self._model = re.compile(rf"(?:({names})|(?:{names}|agent):(.*)|(?:{names})/(.*))", re.IGNORECASE | re.DOTALL)
        self._agent_fields = frozenset(f"x-{brand}-agent{end}" for brand in brands for end in ("-id", ""))
        self._key_fields = frozenset(f"x-{brand}-session-key" for brand in brands)
        self._fields = self._agent_fields | self._key_fields

    def agent(self, agent_id: str) -> str:
        """Return the id of the configured agent that `agent_id` names. APIError: 404 lists those there are."""
        wanted = agent_id.strip().lower()
        if wanted in self.agents:
            return wanted
        if wanted == "main":  # the family's examples all send it
            return self.default
        what = f"There is no agent `{wanted}`" if _AGENT_ID.fullmatch(wanted) else "That is no agent's id"
        there = ", ".join(f"`{agent}`" for agent in self.agents)
        raise APIError(404, f"{what}; the agents are {there}.", param="model", code="model_not_found")

    def by_model(self, model: str) -> str | None:
        """Return the agent that `model` names, None where it names none. APIError: 404."""
        if model in self._brands:
            return None
        match = self._model.fullmatch(model.strip())
        if match is None or match[1] is not None:
            return None
        agent_id = match[2] if match[2] is not None else match[3]
        if match[3] is not None and agent_id.lower() == "default":
            return None
        return self.agent(agent_id)

    def by_alias(self, model: str) -> str:
        """Return the agent that a path's `model` names, the default one under its several names too. APIError: 404."""
        from urllib.parse import unquote

        model = unquote(model)
        agent_id = self.by_model(model)
        if agent_id is None and self._model.fullmatch(model.strip()) is None:
            raise APIError(404, "There is no such model.", param="model", code="model_not_found")
        return agent_id or self.default

    def resolve(self, model: str, user: str, fields: Mapping[str, str], uuid: str) -> Target:
        """Return the agent and the session of a call; one that names no session gets its own, of `uuid`.

        APIError: 400 (what it says contradicts itself), 404.
        """
        key, agent_id = "", None
        if not self._fields.isdisjoint(fields):
            key = self._one(fields, self._key_fields)
            agent_id = self._by_field(fields)
        if agent_id is None:
            agent_id = self.by_model(model)
        if not key:
            agent_id = agent_id or self.default
            if self._chat_fields and (chat := self._chat(fields)):
                return Target(agent_id, f"agent:{agent_id}:openai-chat:{chat}", True)
            if user and self._by_user:
                return Target(agent_id, f"agent:{agent_id}:openai-user:{user}", True)
            return Target(agent_id, f"agent:{agent_id}:openai:{uuid}", False)
        _check_key(key, "A session key")
        parts = key.split(":", 2)
        if len(parts) == 3 and parts[0] == "agent":
            named = self.agent(parts[1])
            if agent_id not in (None, named):
                raise APIError(400, f"The session key is of agent `{named}`, but `{agent_id}` was asked for.")
            agent_id = named
        return Target(agent_id or self.default, key, True)

    def _chat(self, fields: Mapping[str, str]) -> str:
        """Return the conversation's id, of the first field that has one; "" where none has. APIError: 400."""
        for name in self._chat_fields:
            if chat := text_of(fields.get(name, "")):
                _check_key(chat, f"The field {name}")
                return chat
        return ""

    def _by_field(self, fields: Mapping[str, str]) -> str | None:
        agent_id = self._one(fields, self._agent_fields)
        return self.agent(agent_id) if agent_id else None

    def _one(self, fields: Mapping[str, str], names: frozenset[str]) -> str:
        """Return what those of the fields `names` that are there agree on. APIError: 400."""
        given = names & fields.keys()
        if not given:
            return ""
        values = {text_of(fields[name]) for name in given}
        if names is self._agent_fields:
            values = {value.strip().lower() for value in values}
        if len(values) > 1:
            raise APIError(400, f"The fields {', '.join(sorted(given))} disagree.")
        return values.pop()


def text_of(value: str) -> str:
    """Return a field's value, which came as Latin-1, as the UTF-8 that it is, if it is."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return value


def printable(value: str) -> str:
    """Return `value` for a field: bytes of its UTF-8 outside printable ASCII, and `%`, are percent-encoded."""
    if value.isascii() and value.isprintable() and "%" not in value:
        return value
    raw = value.encode("utf-8", "replace")
    return _UNPRINTABLE.sub(lambda m: b"%%%02X" % m[0][0], raw).decode("ascii")
