from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import auth
import config
import settings

HOME = {"HOME": "/home/someone"}
KEY = {"openai": {"api": "openai-completions", "baseUrl": "http://127.0.0.1:1/v1"}}


def built(raw: Any, environ: dict[str, str] | None = None, *overrides: str) -> config.Config:
    pairs = [(path, value) for path, _, value in (text.partition("=") for text in overrides)]
    reading = settings.Settings({**HOME, **(environ or {})}, [brand.prefix for brand in config.BRANDS])
    return config.build(reading.take(raw, pairs), reading, auth.callers)


def loaded(file: Path | str) -> config.Config:
    reading = settings.Settings(HOME, [brand.prefix for brand in config.BRANDS])
    return config.build(reading.read(str(file)), reading, auth.callers)


def shown(got: config.Config) -> Any:
    return settings.mask(got.tree)


def problems(raw: Any, environ: dict[str, str] | None = None, *overrides: str) -> list[str]:
    with pytest.raises(config.ConfigError) as caught:
        built(raw, environ, *overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def gateway(**keys: Any) -> dict[str, Any]:
    return {"gateway": keys}


def chats(**keys: Any) -> dict[str, Any]:
    return gateway(http={"endpoints": {"chatCompletions": keys}})


def agents(*entries: Any, **defaults: Any) -> dict[str, Any]:
    return {"agents": {"list": list(entries), "defaults": defaults}}


def provider(**keys: Any) -> dict[str, Any]:
    return {"models": {"providers": {"x": keys}}}


def command(*args: str, **keys: Any) -> dict[str, Any]:
    return provider(**{"api": "command", "command": "tool", "args": list(args), **keys})


def at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


UNUSED = dict.fromkeys(("modelArg", "sessionArg", "systemPromptArg", "cwd", "timeoutSeconds"))


# --- values


def test_the_built_in_default() -> None:
    got = built({})
    assert got.path is None
    assert got.warnings == ()
    assert (got.bind, got.port, got.auth.mode, got.auth.secret) == ("127.0.0.1", 18789, "none", "")
    assert got.auth.rate_limit == config.RateLimit(10, 60000, 300000, True)
    assert (got.max_connections, got.drain_seconds) == (1024, 30)
    assert (got.keep_alive_seconds, got.write_timeout_seconds) == (30, 30)
    assert (got.chat_completions, got.session_headers, got.session_from) == (False, (), "user")
    assert (got.webchat, got.tls, got.max_concurrent) == (False, None, 64)
    assert got.agents == {"main": config.Agent("main", "main", ("echo/echo",), "", {}, 570, False, False)}
    assert got.default_agent == "main"
    assert got.providers == {"echo": config.Provider("echo", "echo", {})}
    assert got.state_dir == "/home/someone/.copepod"
    assert (got.store, got.max_messages) == ("/home/someone/.copepod/sessions.sqlite3", 200)
    assert (got.log_level, got.log_format) == ("info", "text")
    assert got.brands == ("copepod", "fased", "opensoul", "epiloop", "edwin", "moltbot", "clawdbot", "openclaw")
    assert {"COPEPOD_GATEWAY_TOKEN", "CLAWDBOT_GATEWAY_PASSWORD"} <= got.used_variables
    assert (got.trusted_proxies, got.allowed_origins, got.allowed_hosts) == ((), (), ())


TOKEN = {"COPEPOD_GATEWAY_TOKEN": "t"}


@pytest.mark.parametrize(
    ("raw", "environ", "path", "expected"),
    [
        # the port and where it listens
        (gateway(port=0), {}, "port", 0),
        (gateway(port=1), {"COPEPOD_GATEWAY_PORT": "2"}, "port", 1),
        ({}, {"FASED_GATEWAY_PORT": " 2 "}, "port", 2),
        ({}, {"FASED_GATEWAY_PORT": "2", "EDWIN_GATEWAY_PORT": "2"}, "port", 2),
        (gateway(brands=["mine"]), {"MINE_GATEWAY_PORT": "3"}, "port", 3),
        (gateway(brands=["my-own", "fased", "my-own"]), {"MY_OWN_GATEWAY_PORT": "4"}, "port", 4),
        (gateway(brands=["my-own", "fased"]), {}, "brands", (*(b.name for b in config.BRANDS), "my-own")),
        ({}, {"MINE_GATEWAY_PORT": "3"}, "port", 18789),
        (gateway(bind="loopback"), {}, "bind", "127.0.0.1"),
        (gateway(bind="auto"), {}, "bind", "127.0.0.1"),
        (gateway(bind="::1"), {}, "bind", "::1"),
        (gateway(bind="127.0.0.2"), {}, "bind", "127.0.0.2"),
        (gateway(bind="lan"), TOKEN, "bind", "0.0.0.0"),  # noqa: S104
        (gateway(bind="192.0.2.7"), TOKEN, "bind", "192.0.2.7"),
        (gateway(trustedProxies=["10.1.0.0/8", "::1"]), {}, "trusted_proxies", ("10.1.0.0/8", "::1")),
        # auth
        ({}, TOKEN, "auth.mode", "token"),
        ({}, {"CLAWDBOT_GATEWAY_TOKEN": "a", "FASED_GATEWAY_TOKEN": "a"}, "auth.secret", "a"),
        ({}, {**TOKEN, "EDWIN_GATEWAY_PASSWORD": "p"}, "auth.secret", "p"),
        ({}, {**TOKEN, "EDWIN_GATEWAY_PASSWORD": "p"}, "auth.mode", "password"),
        ({}, {"COPEPOD_GATEWAY_TOKEN": "  "}, "auth.mode", "none"),
        (gateway(auth={"token": "f"}), {**TOKEN, "EDWIN_GATEWAY_PASSWORD": "p"}, "auth.secret", "f"),
        (gateway(auth={"token": "f"}), {"FASED_GATEWAY_TOKEN": "a", "EDWIN_GATEWAY_TOKEN": "b"}, "auth.secret", "f"),
        (gateway(auth={"token": "f", "password": "g"}), {}, "auth.secret", "g"),
        (gateway(auth={"token": ""}), {}, "auth.mode", "none"),
        (gateway(auth={"mode": "token"}), TOKEN, "auth.secret", "t"),
        (gateway(auth={"mode": "token", "password": "g"}), TOKEN, "auth.secret", "t"),
        (gateway(auth={"mode": "none", "token": "f"}), {"A": "b"}, "auth.secret", ""),
        (gateway(auth={"mode": "none"}), {"FASED_GATEWAY_TOKEN": "a", "EDWIN_GATEWAY_TOKEN": "b"}, "auth.mode", "none"),
        (gateway(auth={"rateLimit": {"maxAttempts": 3}}), {}, "auth.rate_limit.max_attempts", 3),
        # HTTP
        (gateway(http={"endpoints": {"chatCompletions": {"enabled": True}}}), {}, "chat_completions", True),
        (chats(sessionHeaders=["X-Chat", "~1"]), {}, "session_headers", ("X-Chat", "~1")),
        (chats(sessionFrom="header"), {}, "session_from", "header"),
        ({}, {}, "metrics", False),
        ({}, {}, "metrics_auth", True),
        (gateway(http={"endpoints": {"metrics": {"enabled": True}}}), {}, "metrics", True),
        (gateway(http={"endpoints": {"metrics": {"auth": False}}}), {}, "metrics_auth", False),
        (gateway(http={"endpoints": {"webchat": {"enabled": True}}}), {}, "webchat", True),
        (gateway(http={"allowedOrigins": ["https://a.example"]}), {}, "allowed_origins", ("https://a.example",)),
        (gateway(http={"allowedHosts": ("a",)}), {}, "allowed_hosts", ("a",)),
        (gateway(http={"keepAliveSeconds": 0.2}), {}, "keep_alive_seconds", 0.2),
        (gateway(tls={"enabled": False, "cert": "/nowhere"}), {}, "tls", None),
        # agents
        (agents({"id": "a"}, {"id": "B-2"}), {}, "default_agent", "a"),
        (agents({"id": "a"}, {"id": "B-2", "default": True}), {}, "default_agent", "b-2"),
        (agents({"id": "B-2"}), {}, "agents.b-2.name", "b-2"),
        (agents({"id": "a", "name": "Ada"}), {}, "agents.a.name", "Ada"),
        (agents(model="echo/x"), {}, "agents.main.models", ("echo/x",)),
        (agents(model={"primary": "echo/1", "fallbacks": ["e/2"]}), {}, "agents.main.models", ("echo/1", "e/2")),
        (agents({"id": "a", "model": {"primary": "echo/1"}}), {}, "agents.a.models", ("echo/1",)),
        (agents({"id": "a", "params": {"x": 1}}, params={"x": 2, "y": 3}), {}, "agents.a.params", {"x": 1, "y": 3}),
        (agents({"id": "a", "timeoutSeconds": 5}), {}, "agents.a.timeout_seconds", 5),
        (agents({"id": "a"}, timeoutSeconds=6), {}, "agents.a.timeout_seconds", 6),
        (agents({"id": "a"}, systemPrompt="S"), {}, "agents.a.system_prompt", "S"),
        (agents({"id": "a", "systemPrompt": ""}, systemPrompt="S"), {}, "agents.a.system_prompt", ""),
        # the state, the sessions, the log
        ({}, {"OPENSOUL_STATE_DIR": "~/s"}, "store", "/home/someone/s/sessions.sqlite3"),
        ({}, {"OPENSOUL_STATE_DIR": "/s"}, "state_dir", "/s"),
        ({"session": {"store": "~/x.db"}}, {}, "store", "/home/someone/x.db"),
        ({"session": {"store": "x.db"}}, {}, "store", os.path.abspath("x.db")),
        ({"logging": {"level": "trace"}}, {}, "log_level", "debug"),
        ({"logging": {"level": "warn", "format": "json"}}, {}, "log_format", "json"),
        # variables
        (agents(systemPrompt="a ${X} $${X} ${x} $X"), {"X": "1"}, "agents.main.system_prompt", "a 1 ${X} ${x} $X"),
        (agents(systemPrompt="$${X}"), {}, "agents.main.system_prompt", "${X}"),
        (gateway(auth={"token": "${X}"}), {"X": "s"}, "auth.secret", "s"),
        # providers
        (provider(api="echo"), {}, "providers.x.api", "echo"),
        (provider(baseUrl="https://a.example/v1"), {}, "providers.x.api", "openai-completions"),
        ({"session": {"store": ":memory:"}}, {}, "store", ":memory:"),
        (provider(api="python", entry="a.b:c"), {}, "providers.x.options", {"entry": "a.b:c", "folder": os.getcwd()}),
        (
            command("{message}", "-v", cwd="~/w", command="~/bin/tool"),
            {},
            "providers.x.options",
            {
                **UNUSED,
                "command": "/home/someone/bin/tool",
                "args": ["{message}", "-v"],
                "input": "stdin",
                "output": "text",
                "env": {},
                "clearEnv": [],
                "cwd": "/home/someone/w",
            },
        ),
        (
            provider(**KEY["openai"], apiKey="k", headers={"A": "b"}, models=[{"id": "m"}], timeoutSeconds=9),
            {},
            "providers.x.options",
            {
                "baseUrl": "http://127.0.0.1:1/v1",
                "apiKey": "k",
                "headers": {"A": "b"},
                "models": [{"id": "m"}],
                "retry": {"tries": 2, "seconds": 10},
                "timeoutSeconds": 9,
            },
        ),
        (
            agents(cliBackends={"c": {"command": "c", "modelArg": "-m", "timeoutMs": 1500, "systemPromptArg": "-s"}}),
            {},
            "providers.c",
            config.Provider(
                "c",
                "command",
                {
                    **UNUSED,
                    "command": "c",
                    "args": [],
                    "input": "arg",
                    "output": "json",
                    "modelArg": "-m",
                    "systemPromptArg": "-s",
                    "env": {},
                    "clearEnv": [],
                    "timeoutSeconds": 1.5,
                },
            ),
        ),
    ],
)
def test_values(raw: Any, environ: dict[str, str], path: str, expected: object) -> None:
    assert at(built(raw, environ), path) == expected


def test_a_cli_backend_of_the_family() -> None:
    backend = {
        "command": "c",
        "sessionArg": "--session",
        "sessionMode": "none",
        "systemPromptArg": "--system",
        "systemPromptWhen": "never",
        "clearEnv": ["SECRET"],
        "modelAliases": {},
        "sessionArgs": [],
        "serialize": True,
    }
    got = built(agents(cliBackends={"c": backend}, model="c/m"))
    assert got.providers["c"].options == {
        **UNUSED,
        "command": "c",
        "args": [],
        "input": "arg",
        "output": "json",
        "env": {},
        "clearEnv": ["SECRET"],
    }
    assert "SECRET" not in got.used_variables, "other backends keep it"
    where = "agents.defaults.cliBackends.c."
    assert got.warnings == (f"ignored, not known here: {where}modelAliases, {where}sessionArgs, {where}serialize",)


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["gateway.port=0"], "port", 0),
        (["gateway.port=5", "gateway.port=6"], "port", 6),
        (["agents.list.0.id=zoe"], "agents.zoe.name", "Ada"),
        (["agents.list[0].name='Zoe'"], "agents.a.name", "Zoe"),
        (["agents.list.1.id=b"], "agents.b.name", "b"),
        (["agents.list=[{id: 'q'}]"], "agents.q.name", "q"),
        (["models.providers.x={api: 'echo'}"], "providers.x.api", "echo"),
        (["agents.defaults.systemPrompt=a = b"], "agents.a.system_prompt", "a = b"),
        (['gateway.auth.token="12"'], "auth.secret", "12"),
        (["gateway.http.allowedOrigins.0=http://a"], "allowed_origins", ("http://a",)),
    ],
)
def test_overrides_win(overrides: list[str], path: str, expected: object) -> None:
    raw = {"gateway": {"port": 1}, "agents": {"list": [{"id": "a", "name": "Ada"}]}}
    before = json.dumps(raw)
    assert at(built(raw, {"COPEPOD_GATEWAY_PORT": "2"}, *overrides), path) == expected
    assert json.dumps(raw) == before, "the caller's dict is not written to"


def test_an_override_stands_in_for_a_variable_that_is_not_set() -> None:
    got = built(gateway(auth={"token": "${NO}"}), {}, "gateway.auth.token=yes")
    assert got.auth.secret == "yes"  # noqa: S105
    assert "NO" not in got.used_variables


# --- mistakes

NEEDS = "type --token TOKEN, or set gateway.auth.token or COPEPOD_GATEWAY_TOKEN"
PLAIN = "must be text without control characters"
SENT = "must be text in Latin-1 without control characters"
UNSET = "is not set: set it in the environment, or write $${} for the text itself"
RANGE = "must be a whole number from 0 to 65535"
MODES = 'must be "none", "token" or "password"'
SCRIPT = "{message} would be a shell's script, so anyone could run anything"
CHATS = "gateway.http.endpoints.chatCompletions"
NAMED = 'must be the name of a field such as "x-openwebui-chat-id", not of one with a secret'
OBJECT = '{ primary: "...", fallbacks: ["..."] }'
ADDRESS = "must be an http:// or https:// address in ASCII without user or query"
ID = 'letters, digits, "_" and "-", at most 64'
APIS = 'must be "echo", "python", "command", "openai-completions" or "anthropic-messages"'


@pytest.mark.parametrize(
    ("raw", "environ", "expected"),
    [
        # shapes
        ([], {}, ["the configuration: must be an object, not a list"]),
        ("x", {}, ['the configuration: must be an object, not this text']),
        ({"gateway": None}, {}, ["gateway: must be an object, not null"]),
        ({"agents": {"list": {}}}, {}, ["agents.list: must be a list, not an object"]),
        (agents(3), {}, ["agents.list[0]: must be an object, not 3"]),
        ({"models": {"providers": []}}, {}, ["models.providers: must be an object, not a list"]),
        # numbers, flags, texts
        (gateway(port="x"), {}, ['gateway.port: must be a whole number from 0 to 65535, not "x"']),
        (gateway(port=65536), {}, ["gateway.port: must be a whole number from 0 to 65535, not 65536"]),
        (gateway(port=1.5), {}, ["gateway.port: must be a whole number from 0 to 65535, not 1.5"]),
        (gateway(port=True), {}, ["gateway.port: must be a whole number from 0 to 65535, not true"]),
        (gateway(drainSeconds=float("nan")), {}, ["gateway.drainSeconds: must be a number from 0 to 3600, not NaN"]),
        (gateway(drainSeconds=None), {}, ["gateway.drainSeconds: must be a number from 0 to 3600, not null"]),
        (
            gateway(http={"endpoints": {"chatCompletions": {"enabled": "yes"}}}),
            {},
            ['gateway.http.endpoints.chatCompletions.enabled: must be true or false, not "yes"'],
        ),
        *(
            (chats(sessionHeaders=["x-a", name]), {}, [f'{CHATS}.sessionHeaders[1]: {NAMED}, not "{shown}"'])
            for name in ("", "a b", "x:", "x\n", "\u212aey", "authorization", "Proxy-Authorization", "COOKIE")
            for shown in (name.replace("\n", "\\n"),)
        ),
        (
            chats(sessionHeaders=["x" * 65], sessionFrom="chat"),
            {},
            [
                f'{CHATS}.sessionHeaders[0]: {NAMED}, not "{"x" * 56}..."',
                f'{CHATS}.sessionFrom: must be "user", "header" or "none", not "chat"',
            ],
        ),
        (chats(sessionHeader=[]), {}, [f'{CHATS}.sessionHeader: unknown key. Did you mean "sessionHeaders"?']),
        (
            gateway(http={"endpoints": {"metrics": {"enable": True, "auth": "no"}}}),
            {},
            [
                'gateway.http.endpoints.metrics.enable: unknown key. Did you mean "enabled"?',
                'gateway.http.endpoints.metrics.auth: must be true or false, not "no"',
            ],
        ),
        (gateway(http={"allowedHosts": ["a", 2]}), {}, ["gateway.http.allowedHosts[1]: must be text, not 2"]),
        (agents(systemPrompt="a\0"), {}, ['agents.defaults.systemPrompt: must be text, not "a\\u0000"']),
        (agents(systemPrompt=["x"]), {}, ["agents.defaults.systemPrompt: must be text, not a list"]),
        (
            {"logging": {"format": "y" * 99}},
            {},
            ['logging.format: must be "text" or "json", not "' + "y" * 56 + '..."'],
        ),
        # names
        (gateway(prot=1), {}, ['gateway.prot: unknown key. Did you mean "port"?']),
        ({"agent": {}}, {}, ['agent: unknown key. Did you mean "agents"?']),
        (gateway(drain_seconds=1), {}, ['gateway.drain_seconds: unknown key. Did you mean "drainSeconds"?']),
        (agents({"id": "a", "modle": "x"}), {}, ['agents.list[0].modle: unknown key. Did you mean "model"?']),
        (command(comand="x"), {}, ['models.providers.x.comand: unknown key. Did you mean "command"?']),
        (gateway(auth={"mode": "tokn"}), {}, [f'gateway.auth.mode: {MODES}, not "tokn". Did you mean "token"?']),
        (gateway(auth={"mode": "x"}), {}, [f'gateway.auth.mode: {MODES}, not "x"']),
        (gateway(brands=["Mine"]), {}, ['gateway.brands[0]: must be a name such as "mine", not "Mine"']),
        # secrets are not repeated
        (gateway(auth={"token": 1234}), {}, [f"gateway.auth.token: {PLAIN}, not a number"]),
        (gateway(auth={"token": "a\nb"}), {}, [f"gateway.auth.token: {PLAIN}, not this text"]),
        (
            provider(**KEY["openai"], headers={"A": "a\r\nb"}, apiKey=None),
            {},
            [
                f"models.providers.x.apiKey: {SENT}, not null",
                f"models.providers.x.headers.A: {SENT}, not this text",
            ],
        ),
        (
            provider(**KEY["openai"], headers={"A": "caf\u00e9", "B": "\u201cb\u201d"}, apiKey="k\u200b"),
            {},
            [
                f"models.providers.x.apiKey: {SENT}, not this text",
                f"models.providers.x.headers.B: {SENT}, not this text",
            ],
        ),
        # auth
        (gateway(auth={"mode": "token"}), {}, [f'gateway.auth.token: is missing, and the mode is "token": {NEEDS}']),
        (
            gateway(auth={"mode": "password", "token": "t"}),
            {},
            [
                'gateway.auth.password: is missing, and the mode is "password": '
                "set gateway.auth.password or COPEPOD_GATEWAY_PASSWORD"
            ],
        ),
        (
            {},
            {"FASED_GATEWAY_TOKEN": "a", "EDWIN_GATEWAY_TOKEN": "b"},
            ["FASED_GATEWAY_TOKEN and EDWIN_GATEWAY_TOKEN: set to different values: unset all but one"],
        ),
        (
            gateway(brands=["mine"]),
            {"FASED_STATE_DIR": "a", "MINE_STATE_DIR": "b"},
            ["FASED_STATE_DIR and MINE_STATE_DIR: set to different values: unset all but one"],
        ),
        (gateway(bind="lan"), {}, [f'gateway.bind: "lan" lets other machines in, so it needs auth: {NEEDS}']),
        (gateway(bind="::"), {}, [f'gateway.bind: "::" lets other machines in, so it needs auth: {NEEDS}']),
        *(
            (
                gateway(bind=bind),
                {},
                [
                    'gateway.bind: must be "loopback", "lan" or an address '
                    f'(for "tailnet" and "custom" write the address itself), not {said}'
                ],
            )
            for bind, said in [
                ("tailnet", '"tailnet"'),
                ("custom", '"custom"'),
                ("a.example", '"a.example"'),
                ("10.0.0.0/8", '"10.0.0.0/8"'),
                ({}, "an object"),
                ("loopbak", '"loopbak". Did you mean "loopback"?'),
            ]
        ),
        (
            gateway(trustedProxies=["10.0.0.1", "x"]),
            {},
            ['gateway.trustedProxies[1]: must be an address or a network such as "10.0.0.0/8", not "x"'],
        ),
        ({}, {"COPEPOD_GATEWAY_PORT": "x"}, [f'COPEPOD_GATEWAY_PORT: {RANGE}, not "x"']),
        ({}, {"EDWIN_GATEWAY_PORT": "65536"}, [f"EDWIN_GATEWAY_PORT: {RANGE}, not 65536"]),
        # TLS
        (gateway(tls={"enabled": True}), {}, [
            "gateway.tls.cert: is missing: TLS needs both cert and key",
            "gateway.tls.key: is missing: TLS needs both cert and key",
        ]),
        (gateway(tls={"certPath": "/no/cert", "keyPath": "/no/key"}), {}, [
            "gateway.tls.cert: there is no file /no/cert",
            "gateway.tls.key: there is no file /no/key",
        ]),
        # variables
        (
            agents(systemPrompt="${NO}"),
            {"NO": ""},
            [f"agents.defaults.systemPrompt: ${{NO}} {UNSET}"],
        ),
        (
            {"channels": [{"token": "${NO}"}]},
            {},
            [f"channels[0].token: ${{NO}} {UNSET}"],
        ),
        (
            gateway(bind="${NO}"),
            {},
            [f"gateway.bind: ${{NO}} {UNSET}"],
        ),
        (gateway(port="${P}"), {"P": "1"}, [f"gateway.port: {RANGE}, not this text"]),
        # agents
        (agents({"id": "a b"}), {}, [f'agents.list[0].id: must be {ID}, not "a b"']),
        (agents({"id": "a" * 65}), {}, [f'agents.list[0].id: must be {ID}, not "{"a" * 56}..."']),
        (agents({"name": "a"}, {}), {}, [
            f"agents.list[0].id: is missing: it must be {ID}",
            f"agents.list[1].id: is missing: it must be {ID}",
        ]),
        (agents({"id": "a"}, {"id": "A"}), {}, ['agents.list[1].id: "a" is there already: give each agent its own']),
        (
            agents({"id": "a", "default": True}, {"id": "b", "default": True}),
            {},
            ["agents.list: only one agent may be the default, not a, b"],
        ),
        *(
            (
                agents(model=model),
                {},
                [f'agents.defaults.model: must be "provider/model" or {OBJECT}, not {said}'],
            )
            for model, said in [
                (7, "7"),
                ("", '""'),
                ({}, "an object"),
                ({"primary": "a", "fallbacks": "b"}, "an object"),
                ({"primary": "a", "fallbacks": [1]}, "an object"),
            ]
        ),
        # providers
        (provider(), {}, [f"models.providers.x.api: {APIS}, not null"]),
        (provider(api="comand"), {}, [f'models.providers.x.api: {APIS}, not "comand". Did you mean "command"?']),
        (provider(api=3), {}, [f"models.providers.x.api: {APIS}, not 3"]),
        ({"models": {"providers": {"x": 3}}}, {}, ["models.providers.x: must be an object, not 3"]),
        ({"models": {"providers": {"a/b": {"api": "echo"}}}}, {}, ['models.providers.a/b: a name must be without "/"']),
        (provider(api="python"), {}, ['models.providers.x.entry: is missing: it must be "module:function"']),
        (provider(api="python", entry="a.py"), {}, ['models.providers.x.entry: must be "module:function", not "a.py"']),
        (provider(api="command"), {}, ["models.providers.x.command: is missing: it must be a program"]),
        *(
            (
                provider(api="openai-completions", baseUrl=url),
                {},
                [f'models.providers.x.baseUrl: {ADDRESS}, not "{url}"'],
            )
            for url in (
                "ftp://a", "a.example", "http://u:p@a/v1", "http://a/?b", "http://", "http:///v1", "http://a:b/v1",
                "http://a:123456/v1", "http://[::1/v1", "http://b\u00fcch.example/v1", "http://a/\u00e9",
                "http://a b/v1",
            )
        ),
        (
            provider(**KEY["openai"], models=["m"]),
            {},
            ['models.providers.x.models[0]: must be an object, not this text'],
        ),
        (
            {**agents(cliBackends={"x": {"command": "c"}}), **provider(api="echo")},
            {},
            ["agents.defaults.cliBackends.x: models.providers has the same name: give each its own"],
        ),
        (
            command("--text={message}", "a"),
            {},
            ["models.providers.x.args[0]: {message} must be an argument of its own, not part of one"],
        ),
    ],
)
def test_mistakes(raw: Any, environ: dict[str, str], expected: list[str]) -> None:
    assert problems(raw, environ) == expected


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        # text
        (["bash", "-c", "{message}"], True),
        (["/bin/sh", "-ec", "{message}"], True),
        (["bash", "-c", "-x", "{message}"], True),
        (["bash", "-c", "-o", "pipefail", "{message}"], True),
        (["bash", "-eco", "pipefail", "{message}"], True),
        (["bash", "+o", "pipefail", "--rcfile", "x", "-c", "{message}"], True),
        (["bash", "-x", "-lc", "--", "{message}"], True),
        (["env", "A=b", "bash", "-c", "{message}"], True),
        (["env", "-i", "/usr/bin/python3", "-Ic", "{message}"], True),
        (["busybox", "sh", "-c", "{message}"], True),
        (["fish", "--command", "{message}"], True),
        (["su", "me", "-c", "{message}"], True),
        (["python3", "-c", "{message}"], True),
        (["/opt/python3.12", "-W", "ignore", "-X", "dev", "-c", "{message}"], True),
        (["node", "-e", "{message}"], True),
        (["nodejs", "-r", "x", "--eval", "{message}"], True),
        (["perl", "-I", "lib", "-ne", "{message}"], True),
        (["perl5.36", "-E", "{message}"], True),
        (["ruby", "-r", "json", "-e", "{message}"], True),
        (["php", "-r", "{message}"], True),
        (["timeout", "5", "bash", "-c", "{message}"], True),
        # a file
        (["bash", "{message}"], True),
        (["python3", "-u", "{message}"], True),
        (["python3", "-m", "{message}"], True),
        # a text, a file, a module of the user's own
        (["bash", "-c", 'tool "$1"', "_", "{message}"], False),
        (["bash", "run.sh", "{message}"], False),
        (["bash", "run.sh", "-c", "{message}"], False),
        (["bash", "-o", "pipefail", "run.sh", "-c", "{message}"], False),
        (["env", "A=b", "bash", "-e", "run.sh", "-c", "{message}"], False),
        (["python3", "-u", "agent.py", "-c", "{message}"], False),
        (["python3", "-I", "-m", "agent", "-e", "{message}"], False),
        (["python3", "-c", "import agent", "{message}"], False),
        (["node", "--no-warnings", "agent.js", "-p", "{message}"], False),
        (["perl", "-l", "agent.pl", "{message}"], False),
        # no interpreter
        (["tool", "-c", "{message}"], False),
        (["tool", "{message}"], False),
        (["tool", "--language", "python", "{message}"], False),
        (["push", "-c", "{message}"], False),
        (["tool", "{message}", "sh"], False),
    ],
)
def test_a_message_is_never_a_script(words: list[str], refused: bool) -> None:
    ways = [(words[1:], "stdin")]
    if words[-1] == "{message}":
        ways.append((words[1:-1], "arg"))
    for args, how in ways:
        raw = command(*args, command=words[0], input=how)
        if refused:
            assert problems(raw) == [f"models.providers.x.args: {SCRIPT}"]
        else:
            assert built(raw).providers["x"].options["args"] == args


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["bash"], True),
        (["bash", "-s"], True),
        (["docker", "exec", "-i", "box", "sh", "-x"], True),
        (["python3", "-"], True),
        (["node", "-i"], True),
        (["python3", "agent.py"], False),
        (["bash", "-c", "cat"], False),
        (["ssh", "host", "agent"], False),
        (["su", "me", "-c", "agent"], False),
        (["tool"], False),
    ],
)
def test_a_message_on_stdin_is_never_a_script(words: list[str], refused: bool) -> None:
    raw = command(*words[1:], command=words[0])
    if refused:
        assert problems(raw) == [f"models.providers.x.args: {SCRIPT}"]
    else:
        assert built(raw).providers["x"].options["args"] == words[1:]


def test_another_machine_has_a_shell_too() -> None:
    for args in (["host", "agent", "{message}"], ["{message}"]):
        assert problems(command(*args, command="ssh")) == [f"models.providers.x.args: {SCRIPT}"]
    assert problems(command("host", "agent", command="/usr/bin/ssh", input="arg"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("gateway.port=x", 'gateway.port: must be a whole number from 0 to 65535, not "x"'),
        ("gateway.port.x=1", "--set gateway.port.x: there is no x to set there"),
        ("agents.list.2.id=x", "--set agents.list.2.id: there is no 2 to set there"),
        ("agents.list.x=1", "--set agents.list.x: there is no x to set there"),
        ("gateway..port=1", "--set gateway..port: there is no  to set there"),
        ("gateway.prot=1", 'gateway.prot: unknown key. Did you mean "port"?'),
        ("gateway={port", "--set gateway: line 1, column 6: Unexpected end of input"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    assert problems({"gateway": {"port": 1}, "agents": {"list": [{"id": "a"}]}}, {}, override)[0] == expected


def test_all_mistakes_are_said_at_once() -> None:
    wrong = gateway(port="x", prot=1, auth={"mode": "tokn"}, bind="tailnet")
    raw = {**wrong, **agents({"id": "?"}), "sesion": {}}
    assert [line.partition(":")[0] for line in problems(raw)] == [
        "sesion",
        "gateway.prot",
        "gateway.port",
        "gateway.bind",
        "gateway.auth.mode",
        "agents.list[0].id",
    ]


def test_depth_is_no_crash(tmp_path: Path) -> None:
    raw: Any = {}
    for _ in range(100_000):
        raw = {"x": raw}
    assert problems(raw) == ["the configuration: is nested too deep"]
    while raw:  # taken apart by hand, as its own deletion would recurse
        raw = raw["x"]
    for text in ("[" * 100_000, "{a:" * 20_000):
        file = tmp_path / "c.json5"
        file.write_text(text)
        with pytest.raises(config.ConfigError, match="is nested too deep"):
            loaded(file)


# --- warnings

FAMILY = """
{
  // as the family writes it
  meta: { lastTouchedVersion: "2026.1.24" },
  gateway: { mode: "local", port: 18789, controlUi: { enabled: true }, auth: { mode: "token", token: "t" }, tools: {},
             tailscale: { mode: "off" }, },
  agents: {
    defaults: { model: { primary: "anthropic/claude", fallbacks: ["lokal/llama"] }, models: {}, workspace: "~/w" },
    list: [{ id: "main", default: true, identity: { name: 'Clawd' } }],
  },
  models: { mode: "merge", providers: {
    local: { baseUrl: "http://127.0.0.1:11434/v1", models: [{ id: "llama", name: "Llama", cost: { input: 0 } }] },
    anthropic: { baseUrl: "https://api.anthropic.com", api: "anthropic-messages", apiKey: "k", models: [] },
  } },
  session: { scope: "per-sender", store: "~/.clawdbot/sessions.json" },
  logging: { level: "info", file: "/tmp/x.log", consoleStyle: "pretty" },
  channels: { telegram: { botToken: "x" } }, browser: { enabled: true }, plugins: { enabled: false },
}
"""


def test_a_family_file_starts_with_one_line_of_what_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "clawdbot.json"
    file.write_text(FAMILY)
    got = loaded(file)
    assert got.warnings == (
        'model "lokal/llama" (main): models.providers has no "lokal", so its runs fail. Did you mean "local"?',
        "ignored, not known here: meta, channels, browser, plugins, gateway.mode, gateway.controlUi, gateway.tools, "
        "gateway.tailscale, agents.defaults.models, agents.defaults.workspace, agents.list[0].identity, models.mode, "
        "session.scope, logging.file, logging.consoleStyle, session.store",
    )
    assert got.store == "/home/someone/.copepod/sessions.sqlite3"
    assert got.agents["main"].models == ("anthropic/claude", "lokal/llama")
    assert got.providers["anthropic"].api == "anthropic-messages"


def test_only_foreign_sections_are_one_warning() -> None:
    got = built({"channels": {}, "browser": {"x": 1}, "plugins": []})
    assert got.warnings == ("ignored, not known here: channels, browser, plugins",)


SNIPPETS = {
    "trailing commas": (
        "{\n  gateway: {\n    http: {\n      endpoints: {\n        chatCompletions: { enabled: %s },\n"
        "      },\n    },\n  },\n}"
    ),
    "none": "{\n  gateway: {\n    http: {\n      endpoints: {\n        chatCompletions: { enabled: %s }\n  }}}}",
    "no indent": "{\ngateway: {\nhttp: {\nendpoints: {\nchatCompletions: { enabled: %s },\n},\n},\n},\n}",
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_the_snippets_of_the_family_pages(snippet: str, enabled: bool, tmp_path: Path) -> None:
    file = tmp_path / "c.json5"
    file.write_text(snippet % json.dumps(enabled))
    got = loaded(file)
    assert (got.chat_completions, got.warnings, got.path) == (enabled, (), str(file))


# --- files


def test_a_list_is_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.json5"
    file.write_text("[1]")
    with pytest.raises(config.ConfigError, match="the configuration: must be an object, not a list"):
        loaded(file)


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    for name in ("agent.py", "run", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    raw = {
        "gateway": {"tls": {"cert": "cert.pem", "keyPath": "./key.pem"}},
        "models": {
            "providers": {
                "tool": {
                    "api": "command",
                    "command": "./run",
                    "args": ["run", "agent.py", "no.py", "./run", "-.", "."],
                },
                "other": {"api": "command", "command": "tool", "cwd": "work"},
                "mine": {"api": "python", "entry": "agent:reply"},
            }
        },
        "session": {"store": "x.db"},
    }
    (tmp_path / "c.json5").write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path.parent)
    got = loaded(f"{tmp_path.name}/c.json5")
    folder = str(tmp_path)
    tool = got.providers["tool"].options
    assert tool["command"] == f"{folder}/run"
    assert tool["args"] == ["run", f"{folder}/agent.py", "no.py", f"{folder}/run", "-.", "."]
    assert got.providers["other"].options["cwd"] == f"{folder}/work"
    assert got.providers["mine"].options["folder"] == folder
    assert got.tls == (f"{folder}/cert.pem", f"{folder}/key.pem")
    assert got.store == f"{folder}/x.db"
    assert got.path == f"{folder}/c.json5"


FOREIGN = {
    "": """acp approvals audio auth bindings broadcast browser canvasHost channels cli commands cron diagnostics
        discovery env hooks mcp media memory messages meta nodeHost plugins proxy secrets skills talk tools ui update
        web wizard""",
    "gateway": """allowRealIpFallback channelHealthCheckMinutes controlUi customBindHost mode nodes push reload remote
        tailscale tools webchat""",
    "gateway.auth": "allowTailscale trustedProxy",
    "gateway.http": "securityHeaders",
    "gateway.http.endpoints": "responses",
    "gateway.tls": "autoGenerate caPath",
    "agents.defaults": """additionalSystemPrompt blockStreamingDefault bootstrapMaxChars compaction contextPruning
        contextTokens elevatedDefault embeddedPi heartbeat humanDelay imageGenerationModel imageModel mediaMaxMb
        memorySearch models pdfModel repoRoot sandbox skipBootstrap subagents systemPromptOverride thinkingDefault
        timeFormat typingIntervalSeconds typingMode userTimezone utilityModel verboseDefault workspace""",
    "models": "bedrockDiscovery mode pricing proxy",
    "session": """agentToAgent dmScope identityLinks idleMinutes mainKey maintenance parentForkMaxTokens reset
        resetByChannel resetByType resetTriggers scope sendPolicy threadBindings typingIntervalSeconds typingMode""",
    "logging": "consoleLevel consoleStyle file maxFileBytes redactPatterns redactSensitive",
}


@pytest.mark.parametrize("section", FOREIGN)
def test_no_key_of_the_family_is_taken_for_a_slip(section: str) -> None:
    raw: dict[str, Any] = dict.fromkeys(FOREIGN[section].split(), 1)
    for key in reversed(section.split(".") if section else []):
        raw = {key: raw}
    (warning,) = built(raw).warnings
    assert warning.count(",") == len(FOREIGN[section].split())


@pytest.mark.parametrize(
    "key",
    [
        "freshArgs", "imageArg", "imageMode", "jsonlDialect", "liveSession", "maxPromptArgChars",
        "modelAliases", "reliability", "resumeArgs", "resumeOutput", "serialize", "sessionArgs",
        "sessionIdFields", "systemPromptFileArg", "systemPromptFileConfigArg", "systemPromptMode",
    ],
)
def test_no_key_of_a_cli_backend_is_taken_for_a_slip(key: str) -> None:
    got = built(agents(cliBackends={"c": {"command": "c", key: 1}}))
    assert got.warnings == (f"ignored, not known here: agents.defaults.cliBackends.c.{key}",)


@pytest.mark.parametrize(
    "key", [
        "agentDir", "groupChat", "heartbeat", "humanDelay", "identity", "models", "sandbox", "skills",
        "subagents", "tools", "workspace",
    ]
)
def test_no_key_of_an_agent_is_taken_for_a_slip(key: str) -> None:
    assert built(agents({"id": "a", key: 1})).warnings == (f"ignored, not known here: agents.list[0].{key}",)


@pytest.mark.parametrize("key", ["auth", "authHeader", "injectNumCtxForOpenAICompat", "request"])
def test_no_key_of_a_provider_is_taken_for_a_slip(key: str) -> None:
    got = built(provider(**KEY["openai"], **{key: 1}))
    assert got.warnings == (f"ignored, not known here: models.providers.x.{key}",)


@pytest.mark.parametrize(
    "api",
    [
        "openai-responses", "openai-codex-responses", "azure-openai-responses",
        "google-generative-ai", "github-copilot", "bedrock-converse-stream", "ollama",
    ],
)
def test_an_api_of_the_family_starts_with_a_warning(api: str) -> None:
    got = built(provider(api=api, baseUrl="http://a"))
    assert got.warnings == (f'models.providers.x.api: "{api}" is not spoken here, so its runs fail',)
    assert "x" not in got.providers


TOOLS = {"up": {"api": "openai-completions", "baseUrl": "http://a"}, "claude": {"api": "anthropic-messages"},
         "mine": {"api": "python", "entry": "a:b"}, "tool": {"api": "command", "command": "x"}}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "said", "expected", "problem"),
    [
        ("up/a", {}, True, ""),
        ({"primary": "up/a", "fallbacks": ["claude/b"]}, {}, True, ""),
        ({"primary": "up/a", "fallbacks": ["mine/b"]}, {}, False, ""),
        ({"primary": "up/a", "fallbacks": ["nobody/b"]}, {}, False, ""),
        ("mine/a", {}, False, ""),
        ("mine/a", {"clientTools": True}, True, ""),
        ("up/a", {"clientTools": False}, False, ""),
        ("echo/a", {}, False, ""),
        ("echo/a", {"clientTools": True}, True, "of echo know nothing of a client's tools"),
        ({"primary": "tool/a", "fallbacks": ["up/a", "echo/a"]}, {"clientTools": True}, True, "of command and echo"),
    ],
)
def test_client_tools(model: Any, said: dict[str, Any], expected: bool, problem: str) -> None:
    raw = {"models": {"providers": TOOLS}, **agents({"id": "a", "model": model, **said})}
    got = built(raw)
    assert got.agents["a"].client_tools is expected
    problems = config.misfits(got.agents["a"], got.providers)
    assert [problem in each for each in problems] == [True] * bool(problem)
    if not said:
        raw |= agents({"id": "a", "model": model}, clientTools=False)
        assert built(raw).agents["a"].client_tools is False


@pytest.mark.parametrize(
    ("listed", "said", "expected"),
    [
        ([{"id": "a", "input": ["text", "image"]}], {}, True),
        ([{"id": "b", "input": ["text", "image"]}, {"id": "a", "input": ["text"]}, {"name": "x"}], {}, False),
        ([{"id": "a", "input": "image"}], {}, False),
        ([{"id": "a"}], {}, False),
        ([], {"input": ["text", "image"]}, True),
        ([{"id": "a", "input": ["text", "image"]}], {"input": ["text"]}, False),
    ],
)
def test_images(listed: Any, said: dict[str, Any], expected: bool) -> None:
    raw = provider(baseUrl="http://a", models=listed) | agents({"id": "a", "model": "x/a", **said})
    got = built(raw)
    assert got.agents["a"].images is expected
    assert config.misfits(got.agents["a"], got.providers) == []
    (entry,) = got.tree["agents"]["list"]
    assert entry["input"] == (["text", "image"] if expected else ["text"])


def test_images_for_who_sees_none() -> None:
    got = built(agents({"id": "a"}, input=["text", "image"], clientTools=True))
    tools, images = config.misfits(got.agents["a"], got.providers)
    assert "clientTools is true" in tools
    assert images == 'agents.list: "a": input has "image", but its models of echo see none: leave it out'


@pytest.mark.parametrize("value", ["image", ["image"], [], ["text", "sound"], ["text", []], None])
def test_a_wrong_input(value: Any) -> None:
    (problem,) = problems(agents({"id": "a", "input": value}))
    assert problem.startswith('agents.list[0].input: must be ["text"] or ["text", "image"], not ')


def test_anthropic_has_an_address_of_its_own() -> None:
    got = built(provider(api="anthropic-messages", apiKey="k")).providers["x"]
    assert (got.options["baseUrl"], got.options["apiKey"]) == (None, "k")


def test_the_home_folder_without_its_variable() -> None:
    assert built({}, {"HOME": ""}).state_dir == os.path.expanduser("~/.copepod")


# --- embedded


@pytest.mark.parametrize(
    ("raw", "functions", "expected"),
    [
        ({}, [], {"session": {"store": ":memory:"}, "agents": {"list": []}}),
        (
            {"session": {"maxMessages": 5}, "gateway": {"port": 0}},
            ["a"],
            {
                "session": {"store": ":memory:", "maxMessages": 5},
                "agents": {"list": [{"id": "a"}]},
                "gateway": {"port": 0},
            },
        ),
        (
            {"session": {"store": "x.db"}, **agents({"id": "A", "name": "Ada"}, 7, model="echo/x")},
            ["a", "b"],
            {
                "session": {"store": "x.db"},
                "agents": {"list": [{"id": "A", "name": "Ada"}, 7, {"id": "b"}], "defaults": {"model": "echo/x"}},
            },
        ),
        # what is wrong stays, so that it is said
        ({"session": None, "agents": []}, ["a"], {"session": None, "agents": []}),
        ({"agents": {"list": {}}}, ["a"], {"session": {"store": ":memory:"}, "agents": {"list": {}}}),
    ],
)
def test_embedded(raw: dict[str, Any], functions: list[str], expected: dict[str, Any]) -> None:
    before = json.dumps(raw)
    assert settings.embedded(raw, functions) == expected
    assert json.dumps(raw) == before, "the caller's dict is not written to"


def test_embedded_functions_become_agents() -> None:
    got = built(settings.embedded({}, {"zoe": print}))
    assert (got.store, list(got.agents), got.default_agent) == (":memory:", ["zoe"], "zoe")


# --- showing, secrets, the cost


SECRETS = {
    "gateway": {"auth": {"token": "S3CRET"}, "brands": ["mine"]},
    "agents": {"list": [{"id": "a", "systemPrompt": "be ${WORD}", "model": "x/m"}, {"id": "b", "default": True}]},
    "models": {
        "providers": {
            "x": {
                **KEY["openai"],
                "apiKey": "S3CRET",
                "headers": {"X-Key": "S3CRET"},
                "models": [{"id": "m", "headers": {"X-Key": "S3CRET"}}],
            },
            "y": {"api": "command", "command": "tool", "args": ["--key", "${WORD}"], "env": {"K": "S3CRET"}},
            "z": {"api": "python", "entry": "a:b"},
        }
    },
}


def test_what_is_shown_has_no_secret_and_loads_again() -> None:
    got = built(SECRETS, {"WORD": "S3CRET"})
    tree = shown(got)
    assert "S3CRET" not in json.dumps(tree)
    assert "S3CRET" not in repr(got)
    assert got.providers["y"].options["args"] == ["--key", "S3CRET"]
    assert tree["gateway"]["auth"] == {
        "mode": "token",
        "token": "***",
        "rateLimit": {"maxAttempts": 10, "windowMs": 60000, "lockoutMs": 300000, "exemptLoopback": True},
    }
    assert tree["models"]["providers"]["y"]["args"] == ["--key", "***"]
    assert tree["models"]["providers"]["z"] == {"api": "python", "entry": "a:b"}
    assert [agent["default"] for agent in tree["agents"]["list"]] == [False, True]
    again = built(tree)
    assert again.warnings == ()
    assert shown(again) == tree
    assert again.default_agent == "b"


@pytest.mark.parametrize(
    ("ids", "agents", "default"),
    [(None, ["a", "b", "c"], "b"), ({"c", "b"}, ["b", "c"], "b"), ({"c", "a"}, ["a", "c"], "a"), (set(), [], "")],
)
def test_within(ids: set[str] | None, agents: list[str], default: str) -> None:
    whole = built({"agents": {"list": [{"id": "a"}, {"id": "b", "default": True}, {"id": "c"}]}})
    got = whole.within(ids)
    assert (list(got.agents), got.default_agent, got.auth) == (agents, default, whole.auth)
    assert got.providers == (whole.providers if ids is None else {})


def test_what_is_shown_is_what_holds(tmp_path: Path) -> None:
    assert shown(built({}))["gateway"]["auth"]["mode"] == "none"
    assert built(shown(built({}))) == built({})
    for name in ("c", "k"):
        (tmp_path / name).touch()
    tls = {"cert": str(tmp_path / "c"), "key": str(tmp_path / "k")}
    assert shown(built(gateway(tls=tls)))["gateway"]["tls"] == tls
    tree = shown(built({"logging": {"level": "trace"}}, {"EDWIN_GATEWAY_PORT": "3", "EDWIN_GATEWAY_TOKEN": "t"}))
    assert tree["gateway"]["port"] == 3
    assert tree["gateway"]["auth"]["token"] == "***"  # noqa: S105
    assert tree["logging"]["level"] == "debug"
    assert tree["session"]["store"] == "/home/someone/.copepod/sessions.sqlite3"
    assert tree["models"]["providers"] == {"echo": {"api": "echo"}}


def test_a_config_is_frozen() -> None:
    got = built({})
    with pytest.raises(AttributeError):
        got.port = 1  # type: ignore[misc]


def test_a_usual_file_needs_nothing_heavy(tmp_path: Path) -> None:
    file = tmp_path / "c.json5"
    file.write_text(
        "{ // ours\n gateway: { port: 0, auth: { token: 'x' } },\n }".replace("'", '"')
        + "\n/* " + "a comment " * 200 + "*/"
    )
    code = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import config, settings
        reading = settings.Settings({}, [])
        config.build(reading.read(sys.argv[2]), reading, print)
        print([name for name in ("json5", "difflib", "ipaddress", "pathlib") if name in sys.modules])
        """
    )
    folder = os.path.dirname(os.path.abspath(config.__file__))
    argv = [sys.executable, "-I", "-S", "-c", code, folder, str(file)]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "[]\n"
