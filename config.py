"""What a configuration may say, and what it means: one frozen Config; every mistake is said with its path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

STATE_DIR = "~/.copepod"
DEFAULT_PORT = 18789  # the family's
ADDRESSES = {"loopback": "127.0.0.1", "auto": "127.0.0.1", "localhost": "127.0.0.1", "lan": "0.0.0.0"}  # noqa: S104
LEVELS = {"silent": "error", "fatal": "error", "trace": "debug"}  # the family's, told by ours
MEMORY = ":memory:"  # SQLite's name for no file at all
MESSAGE = "{message}"
# Shells and interpreters take their first operand for a program (text after -c or -e, else a file; where there is none
# stdin). By name, each with its options whose next word is no operand.
INTERPRETERS = {
    r"(?:a|ba|c|da|fi|k|mk|tc|z)?sh": r"[-+]\w*[oO]\w*|-C|--(?:rcfile|init-file|init-command)",
    r"python|pypy": r"-\w*[WX]",
    r"node|nodejs|bun": r"-[rC]|--(?:require|import|loader|experimental-loader|conditions)",
    r"perl|php": r"-[Id]",
    r"ruby": r"-[ICEr]",
}
# Words that NUL parts, the message straight after such a program and its options. Further on a name is more likely a
# text (`tool --language python {message}`), unless options follow it.
PROGRAM = "|".join(
    rf"(?:{name})[0-9.]*(?>\0(?:{own})\0(?!\{{message)[^\0]*|\0[-+][^\0]*)*" for name, own in INTERPRETERS.items()
)
SCRIPT = rf"(?:^|\0(?=[^\0]*\0[-+]))(?:[^\0]*/)?(?:{PROGRAM})\0\{{message\}}(?:\0|$)"
REMOTE = r"(?s)(?:^|\0)(?:[^\0]*/)?(?:ssh|su|runuser)\0(?:.*\0)?\{message\}"  # these hand all their words to a shell


class Brand(NamedTuple):
    name: str
    prefix: str  # of its environment variables


BRANDS = (
    Brand("copepod", "COPEPOD"), Brand("fased", "FASED"), Brand("opensoul", "OPENSOUL"), Brand("epiloop", "EPILOOP"),
    Brand("edwin", "EDWIN"), Brand("moltbot", "CLAWDBOT"), Brand("clawdbot", "CLAWDBOT"), Brand("openclaw", "OPENCLAW"),
)  # fmt: skip

# The tables mirror the file: a dict is an object, [x] a list of x, {"*": x} any names of x, and None is a key of the
# family's that looks like one of ours.


class Rule(NamedTuple):
    wants: str  # completes "must be ..."
    fits: Callable[[Any], object]
    default: Any = None
    choices: tuple[str, ...] = ()
    secret: bool = False


Table: TypeAlias = "Rule | dict[str, Table] | list[Table] | None"


def _number(default: float | None, low: float, high: float, whole: bool = False) -> Rule:
    kinds = (int,) if whole else (int, float)
    wants = f"a {'whole ' if whole else ''}number from {low} to {high}"
    return Rule(wants, lambda v: type(v) in kinds and low <= v <= high, default)


def _text(default: Any = None, wants: str = "text", form: str = r"[^\0]*", secret: bool = False) -> Rule:
    return Rule(wants, lambda v: isinstance(v, str) and re.fullmatch(form, v, re.DOTALL), default, (), secret)


def _choice(default: str | None, *choices: str) -> Rule:
    said = ", ".join(f'"{choice}"' for choice in choices)
    return Rule(" or ".join(said.rsplit(", ", 1)), lambda v: v in choices, default, choices)


def _is_model(value: Any) -> bool:
    return all(isinstance(model, str) and model for model in _models(value))


def _is_network(value: Any) -> bool:
    import ipaddress

    try:
        return isinstance(value, str) and ipaddress.ip_network(value, strict=False) is not None
    except ValueError:
        return False


TEXT = _text()
SECRET = _text("", "text without control characters", r"[^\x00-\x1f\x7f]*", secret=True)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
ANY = Rule("anything", lambda v: True)
PORT = _number(None, 0, 65535, whole=True)
NETWORK = Rule('an address or a network such as "10.0.0.0/8"', _is_network)
BIND = Rule(
    '"loopback", "lan" or an address (for "tailnet" and "custom" write the address itself)',
    lambda v: isinstance(v, str) and (v in ADDRESSES or ("/" not in v and _is_network(v))),
    "loopback",
    ("loopback", "lan"),
)
API = _choice(None, "echo", "python", "command", "openai-completions", "anthropic-messages")
MODEL = Rule('"provider/model" or { primary: "...", fallbacks: ["..."] }', _is_model)
TIMEOUT = _number(None, 0.01, 604800)  # a week, for agents that work on their own
INPUTS = ("text", "image")
INPUT = Rule(
    '["text"] or ["text", "image"]', lambda v: isinstance(v, list) and "text" in v and all(x in INPUTS for x in v)
)
NAMES = Rule("a list of a name or more", lambda v: isinstance(v, list) and v and all(isinstance(x, str) for x in v))
# RFC 9110 5.1: field-name = token. What has a secret would be in the store, and in the answer's head.
FIELD = _text(
    None,
    'the name of a field such as "x-openwebui-chat-id", not of one with a secret',
    r"(?!(?i:(?:proxy-)?authorization|cookie)$)[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}",
)
HEADER = _text("", "text in Latin-1 without control characters", r"[\t\x20-\x7e\x80-\xff]*", secret=True)
URL = _text(
    ...,
    "an http:// or https:// address in ASCII without user or query",
    r"(?a)https?://([\w.~-]+|\[[\da-fA-F:.]+\])(:[1-6]?\d{0,4})?(/[!\"$->A-~]*)?",
)

PROVIDERS: dict[str, dict[str, Table]] = {
    "echo": {},
    "python": {"entry": _text(..., '"module:function"', r"[\w.]+:[\w.]+")},
    "command": {
        "command": _text(..., "a program", r"[^\0]+"),
        "args": [TEXT],
        "input": _choice("stdin", "stdin", "arg"),
        "output": _choice("text", "text", "json", "jsonl"),
        "modelArg": TEXT,
        "sessionArg": TEXT,
        "systemPromptArg": TEXT,
        "env": {"*": _text(secret=True)},
        "cwd": TEXT,
        "clearEnv": [TEXT],
        "timeoutSeconds": TIMEOUT,
    },
    "openai-completions": {
        "baseUrl": URL,
        "apiKey": HEADER,
        "headers": {"*": HEADER},
        "models": [{"*": ANY}],
        "retry": {"tries": _number(2, 1, 100, whole=True), "seconds": _number(10, 0, 3600)},
        "timeoutSeconds": TIMEOUT,
    },
}
PROVIDERS["anthropic-messages"] = PROVIDERS["openai-completions"] | {"baseUrl": URL._replace(default=None)}
SERVERS = {"openai-completions", "anthropic-messages"}  # they take what their clients send besides text
CLI_BACKEND: dict[str, Table] = {
    **PROVIDERS["command"],
    "input": _choice("arg", "arg", "stdin"),
    "output": _choice("json", "json", "text", "jsonl"),
    "sessionMode": _choice(None, "always", "existing", "none"),
    "systemPromptWhen": _choice(None, "first", "always", "never"),
    "timeoutMs": _number(None, 10, 604800000),
    **dict.fromkeys(("sessionArgs", "systemPromptFileArg", "systemPromptFileConfigArg", "systemPromptMode")),
}
AGENT: dict[str, Table] = {
    "model": MODEL,
    "systemPrompt": TEXT,
    "params": {"*": ANY},
    "clientTools": FLAG,
    "input": INPUT,
    "timeoutSeconds": TIMEOUT,
    **dict.fromkeys(("models", "pdfModel", "systemPromptOverride")),
}
LISTED: dict[str, Table] = {
    **AGENT,
    "id": _text(..., 'letters, digits, "_" and "-", at most 64', r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"),
    "default": FLAG._replace(default=False),
    "name": TEXT,
}
TOKEN: dict[str, Table] = {
    "name": _text(..., 'lower-case letters, digits, "_" and "-", at most 32', r"[a-z0-9][a-z0-9_-]{0,31}"),
    "token": SECRET._replace(default=None),
    "tokenSha256": _text(None, "64 hexadecimal digits", r"[0-9A-Fa-f]{64}", secret=True),
    "agents": NAMES,  # none at all is no way to say "all"
    "scopes": NAMES,
    "expires": TEXT,
    "rateLimit": {"requestsPerMinute": _number(None, 1, 1000000, whole=True)},
}
ROOT: dict[str, Table] = {
    "gateway": {
        "port": PORT,
        "bind": BIND,
        "brands": [_text(None, 'a name such as "mine"', r"[a-z][a-z0-9-]*")],
        "trustedProxies": [NETWORK],
        "maxConnections": _number(1024, 1, 1000000, whole=True),
        "drainSeconds": _number(30, 0, 3600),
        "auth": {
            "mode": _choice(None, "none", "token", "password"),
            "token": SECRET,
            "password": SECRET,
            "tokens": [TOKEN],
            "rateLimit": {
                "maxAttempts": _number(10, 1, 1000000, whole=True),
                "windowMs": _number(60000, 1, 86400000, whole=True),
                "lockoutMs": _number(300000, 1, 86400000, whole=True),
                "exemptLoopback": FLAG._replace(default=True),
            },
        },
        "http": {
            "allowedOrigins": [TEXT],
            "allowedHosts": [TEXT],
            "keepAliveSeconds": _number(30, 0.01, 3600),
            "writeTimeoutSeconds": _number(30, 0.01, 3600),
            "endpoints": {
                "chatCompletions": {
                    "enabled": FLAG._replace(default=False),
                    "sessionHeaders": [FIELD],
                    "sessionFrom": _choice("user", "user", "header", "none"),
                },
                "metrics": {"enabled": FLAG._replace(default=False), "auth": FLAG._replace(default=True)},
                "webchat": {"enabled": FLAG._replace(default=False)},
            },
        },
        "tls": {"enabled": FLAG, "cert": TEXT, "key": TEXT, "certPath": TEXT, "keyPath": TEXT},
        "tools": None,
    },
    "agents": {
        "defaults": {
            **AGENT,
            "timeoutSeconds": _number(570, 0.01, 604800),  # below the 600 s of the OpenAI SDKs
            "maxConcurrent": _number(64, 1, 10000, whole=True),
            "cliBackends": {"*": CLI_BACKEND},
        },
        "list": [LISTED],
    },
    "models": {"providers": {"*": Rule("an object", lambda v: isinstance(v, dict))}},  # then by PROVIDERS
    "session": {"store": TEXT, "maxMessages": _number(200, 1, 100000, whole=True)},
    "logging": {
        "level": _choice("info", "silent", "fatal", "error", "warn", "info", "debug", "trace"),
        "format": _choice("text", "text", "json"),
    },
}


class ConfigError(Exception):
    """What is wrong with the configuration: `problems`, one line each, and all of them as its text."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Agent(NamedTuple):
    id: str
    name: str
    models: tuple[str, ...]  # "<provider>/<model>", the primary first, then its fallbacks
    system_prompt: str
    params: dict[str, object]
    timeout_seconds: float
    client_tools: bool  # its models may call tools of the client's
    images: bool  # they see those of its messages


class Provider(NamedTuple):
    """Where models come from. Keys may be in its options, so its repr has none."""

    name: str
    api: str
    options: dict[str, Any]

    def __repr__(self) -> str:
        return f"Provider({self.name!r}, {self.api!r})"


class RateLimit(NamedTuple):
    max_attempts: int
    window_ms: int
    lockout_ms: int
    exempt_loopback: bool


class Auth(NamedTuple):
    """Who may call."""

    mode: str  # "none", "token" or "password"
    secret: str  # "" where only those of `tokens` are let in
    rate_limit: RateLimit
    tokens: tuple[Any, ...]  # as `build` was given them

    def __repr__(self) -> str:
        return f"Auth({self.mode!r})"


class Config(NamedTuple):
    """All of it, with secrets, so its repr tells the file alone."""

    path: str | None
    warnings: tuple[str, ...]
    port: int
    bind: str
    brands: tuple[str, ...]
    trusted_proxies: tuple[str, ...]
    max_connections: int
    drain_seconds: float
    keep_alive_seconds: float
    write_timeout_seconds: float
    auth: Auth
    allowed_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    chat_completions: bool
    session_headers: tuple[str, ...]
    session_from: str  # "user", "header" or "none"
    metrics: bool
    metrics_auth: bool
    webchat: bool
    tls: tuple[str, str] | None
    agents: dict[str, Agent]
    default_agent: str
    max_concurrent: int
    providers: dict[str, Provider]
    store: str
    max_messages: int
    state_dir: str
    log_level: str  # "error", "warn", "info" or "debug"
    log_format: str
    used_variables: frozenset[str]
    tree: dict[str, Any]  # all of it as the file would say it, secrets too

    def __repr__(self) -> str:
        return f"Config({self.path!r})"

    def within(self, ids: Collection[str] | None) -> Config:
        """Return what those see of it who may use these agents alone, the first their default if need be; None: all."""
        if ids is None:
            return self
        agents = {name: agent for name, agent in self.agents.items() if name in ids}
        default = self.default_agent if self.default_agent in agents else next(iter(agents), "")
        return self._replace(agents=agents, default_agent=default, providers={})


# Where the fields stand in the file that stand there as they are.
FIELDS = {
    "port": "gateway.port", "bind": "gateway.bind", "trusted_proxies": "gateway.trustedProxies",
    "max_connections": "gateway.maxConnections", "drain_seconds": "gateway.drainSeconds",
    "keep_alive_seconds": "gateway.http.keepAliveSeconds", "write_timeout_seconds": "gateway.http.writeTimeoutSeconds",
    "allowed_origins": "gateway.http.allowedOrigins", "allowed_hosts": "gateway.http.allowedHosts",
    "chat_completions": "gateway.http.endpoints.chatCompletions.enabled",
    "session_headers": "gateway.http.endpoints.chatCompletions.sessionHeaders",
    "session_from": "gateway.http.endpoints.chatCompletions.sessionFrom",
    "metrics": "gateway.http.endpoints.metrics.enabled", "metrics_auth": "gateway.http.endpoints.metrics.auth",
    "webchat": "gateway.http.endpoints.webchat.enabled",
    "max_concurrent": "agents.defaults.maxConcurrent",
    "store": "session.store", "max_messages": "session.maxMessages",
    "log_level": "logging.level", "log_format": "logging.format",
}  # fmt: skip


if TYPE_CHECKING:

    class Reading(Protocol):
        """What is used of the reading (settings.Settings) that a tree comes from."""

        prefixes: list[str]
        folder: str
        file: str | None
        problems: list[str]
        warnings: list[str]
        ignored: list[str]
        variables: set[str]

        def path(self, text: str, folder: str = "") -> str: ...
        def argument(self, text: str) -> str: ...
        def variable(self, suffix: str) -> tuple[str, str]: ...
        def check(self, value: Any, table: Any, path: str = "") -> Any: ...
        def near(self, word: str, words: Iterable[str]) -> str: ...


def build(raw: Any, settings: Reading, callers: Callable[..., tuple[Any, ...]]) -> Config:
    """Return the Config of a tree that `settings` took. ConfigError: every problem, those of the reading too.

    `callers(entries, secret, agents, settings)` makes of gateway.auth.tokens what `Auth.tokens` is.
    """
    if raw is None and settings.problems:  # it could not be read: what follows would be guesswork
        raise ConfigError(settings.problems)
    tree = settings.check(raw, ROOT)
    gateway, session, logging = tree["gateway"], tree["session"], tree["logging"]
    ours = [brand.name for brand in BRANDS]
    gateway["brands"] = [name for name in dict.fromkeys(gateway["brands"]) if name not in ours]
    settings.prefixes += [name.upper().replace("-", "_") for name in gateway["brands"]]
    if gateway["port"] is None:
        name, port = settings.variable("GATEWAY_PORT")
        number = int(port) if re.fullmatch("[0-9]{1,5}", port) else port or DEFAULT_PORT
        gateway["port"] = settings.check(number, PORT, name)
    auth = _auth(gateway["auth"], settings)
    gateway["bind"] = _bind(gateway["bind"], auth.mode, settings)
    tls = _tls(gateway["tls"], settings)
    gateway["tls"] = {"cert": tls[0], "key": tls[1]} if tls else {}
    state_dir = settings.path(settings.variable("STATE_DIR")[1] or STATE_DIR, os.getcwd())
    if (session["store"] or "").endswith(".json"):  # the family keeps its JSON there, and we SQLite
        settings.ignored.append("session.store")
        session["store"] = None
    if session["store"] != MEMORY:
        session["store"] = settings.path(session["store"] or os.path.join(state_dir, "sessions.sqlite3"))
    logging["level"] = LEVELS.get(logging["level"], logging["level"])
    providers = _providers(tree, settings)
    agents = _agents(tree["agents"], providers, settings)
    if listed := gateway["auth"]["tokens"]:
        auth = auth._replace(tokens=callers(listed, auth.secret, agents, settings))
    secrets = {f"{prefix}_GATEWAY_{kind}" for prefix in settings.prefixes for kind in ("TOKEN", "PASSWORD")}
    if settings.ignored:
        settings.warnings.append(f"ignored, not known here: {', '.join(settings.ignored)}")
    if settings.problems:
        raise ConfigError(settings.problems)
    return Config(
        path=settings.file,
        warnings=tuple(settings.warnings),
        brands=(*ours, *gateway["brands"]),
        auth=auth,
        tls=tls,
        agents=agents,
        default_agent=next((entry["id"] for entry in tree["agents"]["list"] if entry["default"]), ""),
        providers=providers,
        state_dir=state_dir,
        used_variables=frozenset(settings.variables | secrets),
        tree=tree,
        **{name: _at(tree, where) for name, where in FIELDS.items()},
    )


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tuple(tree) if isinstance(tree, list) else tree


def _auth(section: dict[str, Any], settings: Reading) -> Auth:
    mode = section["mode"]
    kinds = [kind for kind in ("password", "token") if mode in (None, kind)]
    secrets = {kind: section[kind] for kind in kinds if section[kind]}
    if not secrets:  # those of the file decide alone
        secrets = {kind: secret for kind in kinds if (secret := settings.variable(f"GATEWAY_{kind.upper()}")[1])}
    tokens = section["tokens"]
    if mode is None:
        mode = next(iter(secrets), "token" if tokens else "none")
    elif mode == "none" and tokens:
        said = 'the mode is "none", which lets everyone in: leave one of the two out'
        settings.problems.append(f"gateway.auth.tokens: {said}")
    elif kinds and not secrets and not (mode == "token" and tokens):
        said = "type --token TOKEN, or set" if mode == "token" else "set"
        said += f" gateway.auth.{mode} or COPEPOD_GATEWAY_{mode.upper()}"
        settings.problems.append(f'gateway.auth.{mode}: is missing, and the mode is "{mode}": {said}')
    secret = str(secrets.get(mode, ""))
    section |= {"mode": mode, "password": None, "token": None, "tokens": tokens or None}
    section |= {mode: secret} if secret else {}
    return Auth(mode, secret, RateLimit(*section["rateLimit"].values()), ())


def _bind(bind: str, mode: str, settings: Reading) -> str:
    address = ADDRESSES.get(bind, bind)
    if mode == "none" and address != "127.0.0.1":
        import ipaddress

        if not ipaddress.ip_address(address).is_loopback:
            said = "type --token TOKEN, or set gateway.auth.token or COPEPOD_GATEWAY_TOKEN"
            settings.problems.append(f'gateway.bind: "{bind}" lets other machines in, so it needs auth: {said}')
    return address


def _tls(section: dict[str, Any], settings: Reading) -> tuple[str, str] | None:
    if section["enabled"] is False or not any(section.values()):
        return None
    files = []
    for kind in ("cert", "key"):
        named = section[kind] or section[f"{kind}Path"]
        path = settings.path(named) if named else ""
        if not os.path.isfile(path):
            said = f"there is no file {path}" if named else "is missing: TLS needs both cert and key"
            settings.problems.append(f"gateway.tls.{kind}: {said}")
        files.append(path)
    return files[0], files[1]


def _agents(section: dict[str, Any], providers: dict[str, Provider], settings: Reading) -> dict[str, Agent]:
    defaults, agents = section["defaults"], dict[str, Agent]()
    entries = section["list"] = section["list"] or [settings.check({"id": "main"}, LISTED)]
    users: dict[str, list[str]] = {}
    for index, entry in enumerate(entries):
        name = entry["id"] = entry["id"].lower()
        if name and name in agents:
            settings.problems.append(f'agents.list[{index}].id: "{name}" is there already: give each agent its own')
        models = _models(entry["model"] or defaults["model"] or "echo/echo")
        for model in models:
            users.setdefault(model, []).append(name)
        entry["model"] = {"primary": models[0], "fallbacks": models[1:]}
        entry["name"] = entry["name"] or name
        entry["params"] = {**defaults["params"], **entry["params"]}
        for key in ("systemPrompt", "timeoutSeconds", "clientTools", "input"):
            entry[key] = defaults[key] if entry[key] is None else entry[key]
        if entry["clientTools"] is None:
            entry["clientTools"] = _apis(models, providers) <= SERVERS
        if entry["input"] is None:
            entry["input"] = ["text", "image"] if _sees(models[0], providers) else ["text"]
        agents[name] = Agent(
            name,
            entry["name"],
            models,
            entry["systemPrompt"] or "",
            entry["params"],
            entry["timeoutSeconds"],
            entry["clientTools"],
            "image" in entry["input"],
        )
    chosen = [entry["id"] for entry in entries if entry["default"]]
    if len(chosen) > 1:
        settings.problems.append(f"agents.list: only one agent may be the default, not {', '.join(chosen)}")
    entries[0]["default"] |= not chosen
    for model, ids in users.items():
        provider = model.partition("/")[0]
        if provider not in providers:
            said = f'model "{model}" ({", ".join(ids)}): models.providers has no "{provider}", so its runs fail'
            settings.warnings.append(said + settings.near(provider, providers))
    return agents


def _apis(models: Iterable[str], providers: dict[str, Provider]) -> set[str]:
    """What the providers of these models speak; "" for those that are not there."""
    found = (providers.get(model.partition("/")[0]) for model in models)
    return {provider.api if provider else "" for provider in found}


def _sees(model: str, providers: dict[str, Provider]) -> bool:
    """Whether the family's list of this model server's models has "image" in the `input` of this one."""
    name, _, rest = model.partition("/")
    listed = (providers[name].options.get("models") or ()) if name in providers else ()
    given = next((entry.get("input") for entry in listed if entry.get("id") == rest), None)
    return isinstance(given, list) and "image" in given


def misfits(agent: Agent, providers: dict[str, Provider]) -> list[str]:
    """Return what is wrong with an agent that no function answers for, [] for nothing."""
    deaf = " and ".join(sorted(_apis(agent.models, providers) & {"echo", "command"}))
    at = f'agents.list: "{agent.id}":'
    tools = f"{at} clientTools is true, but its models of {deaf} know nothing of a client's tools: leave it out"
    images = f'{at} input has "image", but its models of {deaf} see none: leave it out'
    return [said for said, wrong in ((tools, agent.client_tools), (images, agent.images)) if deaf and wrong]


def _models(value: Any) -> tuple[Any, ...]:
    """The primary model and its fallbacks, of either way to write them."""
    if not isinstance(value, dict):
        return (value,)
    fallbacks = value.get("fallbacks", [])
    return (value.get("primary"), *(fallbacks if isinstance(fallbacks, list) else [None]))


def _providers(tree: dict[str, Any], settings: Reading) -> dict[str, Provider]:
    providers = {"echo": Provider("echo", "echo", {})}
    named, backends = tree["models"]["providers"], tree["agents"]["defaults"].pop("cliBackends")
    for name, raw in named.items():
        path = f"models.providers.{name}"
        if raw is None:
            continue
        # The family leaves `api` out where there is a baseUrl.
        api = raw.get("api", "openai-completions" if "baseUrl" in raw else None)
        if isinstance(api, str) and api not in PROVIDERS and not settings.near(api, PROVIDERS):
            settings.warnings.append(f'{path}.api: "{api}" is not spoken here, so its runs fail')
        elif api := settings.check(api, API, f"{path}.api"):
            options = settings.check({key: raw[key] for key in raw if key != "api"}, PROVIDERS[api], path)
            providers[name] = Provider(name, api, options)
            if api == "command":
                _complete(options, path, settings)
    for name, options in backends.items():
        path = f"agents.defaults.cliBackends.{name}"
        milliseconds = options.pop("timeoutMs")
        options["timeoutSeconds"] = options["timeoutSeconds"] or (milliseconds and milliseconds / 1000)
        if options.pop("sessionMode") == "none":
            options["sessionArg"] = None
        if options.pop("systemPromptWhen") == "never":
            options["systemPromptArg"] = None
        if name in named:
            settings.problems.append(f"{path}: models.providers has the same name: give each its own")
        providers[name] = Provider(name, "command", options)
        _complete(options, path, settings)
    settings.problems += [f'models.providers.{name}: a name must be without "/"' for name in providers if "/" in name]
    tree["models"]["providers"] = {name: {"api": it.api, **it.options} for name, it in providers.items()}
    for it in providers.values():
        if it.api == "python":
            it.options["folder"] = settings.folder
    return providers


def _complete(options: dict[str, Any], path: str, settings: Reading) -> None:
    """Note what is wrong with a command, and make its paths absolute."""
    for index, word in enumerate(options["args"]):
        if MESSAGE in word and word != MESSAGE:
            said = f"{MESSAGE} must be an argument of its own, not part of one"
            settings.problems.append(f"{path}.args[{index}]: {said}")
    if _is_program([options["command"], *options["args"]], options["input"]):
        said = f"{MESSAGE} would be a shell's script, so anyone could run anything"
        settings.problems.append(f"{path}.args: {said}")
    options["args"] = [settings.argument(word) for word in options["args"]]
    if "/" in options["command"]:
        options["command"] = settings.path(options["command"])
    if options["cwd"]:
        options["cwd"] = settings.path(options["cwd"])


def _is_program(words: list[str], input_: str) -> bool:
    """Whether the message comes where a shell or an interpreter takes its program."""
    by_argument = MESSAGE in words or input_ == "arg"
    text = "\0".join(words if MESSAGE in words else [*words, MESSAGE])  # where it will stand, or on stdin
    return re.search(SCRIPT, text) is not None or (by_argument and re.search(REMOTE, text) is not None)
