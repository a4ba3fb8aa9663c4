"""Tokens for friends as a configuration has them: who they are, what is wrong with them, what is shown of them."""

from __future__ import annotations

from typing import Any

import pytest

import auth
import gateway
import settings
from test_config import built, problems, shown

SHA = auth.digest("of bob").hex()
AT = "gateway.auth.tokens"
NAME = 'must be lower-case letters, digits, "_" and "-", at most 32'
DATE = 'must be a date such as "2027-01-01", or a date and time'
SCOPE = 'must be "chat", "operator.read" or "operator.write"'


def tokens(*entries: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A configuration of two agents with these tokens, and these other keys of its auth."""
    agents = {"list": [{"id": "main"}, {"id": "beta"}]}
    return {"agents": agents, "gateway": {"auth": {"tokens": list(entries), **keys}}}


def test_tokens() -> None:
    limit = {"requestsPerMinute": 5}
    got = built(
        tokens(
            {"name": "alice", "token": "${OF_ALICE}", "agents": ["Beta"], "scopes": ["chat", "operator.read"]},
            {"name": "bob", "tokenSha256": SHA.upper(), "expires": "2999-01-01", "rateLimit": limit},
        ),
        {"OF_ALICE": "S3CRET"},
    )
    assert (got.auth.mode, got.auth.secret) == ("token", "")
    scopes = frozenset({"chat", "operator.read"})
    assert got.auth.tokens == (
        auth.Caller("alice", scopes, frozenset({"beta"}), digest=auth.digest("S3CRET")),
        auth.Caller("bob", frozenset({"chat"}), None, 32472144000.0, 5, auth.digest("of bob")),
    )
    assert "OF_ALICE" in got.used_variables
    assert "S3CRET" not in repr(got)
    alice, bob = shown(got)["gateway"]["auth"]["tokens"]
    assert alice.pop("rateLimit") == {}
    assert alice == {"name": "alice", "token": "***", "agents": ["Beta"], "scopes": ["chat", "operator.read"]}
    assert bob == {"name": "bob", "tokenSha256": SHA.upper(), "expires": "2999-01-01", "rateLimit": limit}


@pytest.mark.parametrize(
    ("keys", "environ", "expected"),
    [
        ({}, {}, ("token", "")),
        ({"mode": "token"}, {}, ("token", "")),
        ({"token": "x"}, {}, ("token", "x")),
        ({"password": "x"}, {}, ("password", "x")),
        ({}, {"FASED_GATEWAY_TOKEN": "x"}, ("token", "x")),
        ({}, {"FASED_GATEWAY_PASSWORD": "x"}, ("password", "x")),
    ],
)
def test_the_mode_beside_tokens(keys: dict[str, Any], environ: dict[str, str], expected: tuple[str, str]) -> None:
    got = built(tokens({"name": "bob", "tokenSha256": SHA}, **keys), environ)
    assert (got.auth.mode, got.auth.secret) == expected
    assert [caller.name for caller in got.auth.tokens] == ["bob"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": None}, [f".name: is missing: it {NAME}"]),
        ({"name": "Bob"}, [f'.name: {NAME}, not "Bob"']),
        ({"name": "b" * 33}, [f'.name: {NAME}, not "{"b" * 33}"']),
        ({"token": None}, [": must have a token or a tokenSha256, and not both"]),
        ({"token": ""}, [": must have a token or a tokenSha256, and not both"]),
        ({"tokenSha256": SHA}, [": must have a token or a tokenSha256, and not both"]),
        ({"token": None, "tokenSha256": "S3CRET"}, [".tokenSha256: must be 64 hexadecimal digits, not this text"]),
        ({"token": "a\nb"}, [".token: must be text without control characters, not this text"]),
        (
            {"agents": ["beat", "Zoe", "BETA"]},
            ['.agents[0]: there is no agent "beat". Did you mean "beta"?', '.agents[1]: there is no agent "Zoe"'],
        ),
        ({"agents": []}, [".agents: must be a list of a name or more, not a list"]),
        ({"agents": "beta"}, ['.agents: must be a list of a name or more, not "beta"']),
        ({"scopes": [5]}, [".scopes: must be a list of a name or more, not a list"]),
        ({"scopes": ["operator.admin"]}, ['.scopes[0]: "operator.admin" is for the shared secret alone']),
        (
            {"scopes": ["chat", "operator.reed"]},
            [f'.scopes[1]: {SCOPE}, not "operator.reed". Did you mean "operator.read"?'],
        ),
        ({"expires": "soon"}, [f'.expires: {DATE}, not "soon"']),
        ({"expires": ""}, [f'.expires: {DATE}, not ""']),
        ({"expires": 2027}, [".expires: must be text, not 2027"]),
        (
            {"rateLimit": {"requestsPerMinute": 0}},
            [".rateLimit.requestsPerMinute: must be a whole number from 1 to 1000000, not 0"],
        ),
        ({"agent": ["beta"]}, ['.agent: unknown key. Did you mean "agents"?']),
    ],
)
def test_a_wrong_entry(changes: dict[str, Any], expected: list[str]) -> None:
    entry = {"name": "bob", "token": "x", **changes}
    entry = {key: value for key, value in entry.items() if value is not None}
    assert problems(tokens({"name": "zoe", "token": "z"}, entry)) == [f"{AT}[1]{said}" for said in expected]


@pytest.mark.parametrize(
    ("second", "keys", "expected"),
    [
        ({"name": "bob", "token": "y"}, {}, f'{AT}[1].name: "bob" is there already: give each token its own'),
        ({"name": "eve", "token": "of bob"}, {}, f"{AT}[1]: its secret is also that of bob: give each its own"),
        ({"name": "eve", "tokenSha256": SHA}, {}, f"{AT}[1]: its secret is also that of bob: give each its own"),
        ({"name": "e", "token": "x"}, {"token": "x"}, f"{AT}[1]: its secret is also the shared one: give each its own"),
        (
            {"name": "eve", "token": "x"},
            {"mode": "none"},
            f'{AT}: the mode is "none", which lets everyone in: leave one of the two out',
        ),
        (
            {"name": "eve", "token": "x"},
            {"mode": "password"},
            'gateway.auth.password: is missing, and the mode is "password": '
            "set gateway.auth.password or COPEPOD_GATEWAY_PASSWORD",
        ),
    ],
)  # fmt: skip
def test_entries_that_do_not_go_together(second: dict[str, Any], keys: dict[str, Any], expected: str) -> None:
    assert problems(tokens({"name": "bob", "token": "of bob"}, second, **keys)) == [expected]


@pytest.mark.parametrize("moment", ["2001-01-01", "0001-01-01T00:00+23:59"])
def test_what_has_expired_is_no_mistake(moment: str) -> None:
    """A gateway must start again, and read its configuration again, whatever time has done."""
    got = built(tokens({"name": "bob", "token": "x", "expires": moment}))
    assert got.warnings == (f'{AT}[0]: "bob" has expired, and lets nobody in',)
    assert [caller.name for caller in got.auth.tokens] == ["bob"]


# A new one


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ([], {}),
        (["--agents", "beta,main"], {"agents": ["beta", "main"]}),
        (
            ["--agents", "beta", "--scopes", "chat,operator.read", "--expires", "2999-01-01"],
            {"agents": ["beta"], "scopes": ["chat", "operator.read"], "expires": "2999-01-01"},
        ),
    ],
)
def test_a_new_token(flags: list[str], more: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is a token, once, and a line that lets it in, which says its digest alone."""
    assert gateway.main(["token", "new", "alice", *flags]) == 0
    out, err = capsys.readouterr()
    token, line = out.splitlines()
    assert "alice" in err
    assert token not in err + line
    assert line.endswith(" },")
    entry = settings.parse(line[:-1])
    assert entry == {"name": "alice", "tokenSha256": auth.digest(token).hex(), **more}
    (caller,) = built(tokens(entry)).auth.tokens
    door = auth.Gate("token", "", named=[caller])
    assert door.admit(token, "1.2.3.4", {}).caller == caller
    assert caller.agents == (frozenset(more["agents"]) if "agents" in more else None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["Alice"], f"name: {NAME}, not"),
        (["alice", "--scopes", "operator.admin"], 'scopes[0]: "operator.admin" is for the shared secret alone'),
        (["alice", "--expires", "soon"], f"expires: {DATE}"),
        (["alice", "--agents", ","], "agents: must be a list of a name or more"),
        ([], "required: NAME"),
    ],
)
def test_a_wrong_new_token(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway.main(["token", "new", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
