"""Any configuration is a Config or a ConfigError that says what is wrong; no secret of it is ever shown."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON, KEYS, OBJECTS, tries

import auth
import config
import settings as reading
from config import Rule

SECRET = "s3cr3t"  # noqa: S105
WORDS = [
    "", "main", "Main", "127.0.0.1", "::1", "10.0.0.0/8", "lan", "token", "sh", "-c", "{message}", "a{message}", "x:y",
    "echo/echo", "p/m", "a/b/c", "command", "python", "openai-completions", "http://h/v1", "~", "a.json", ":memory:",
    "\0", "$${MARK}", "${UNSET}", "on\nline", "debug",
]  # fmt: skip
words = st.sampled_from(WORDS) | st.text(max_size=4)
junk = st.none() | st.booleans() | st.integers(-2, 70000) | st.floats() | words | st.lists(words, max_size=3) | JSON
hidden = st.just(SECRET) | st.sampled_from(["${MARK}", f"x{SECRET}", SECRET + "\n"]) | words


def shaped(table: Any, secret: bool = False) -> st.SearchStrategy[Any]:
    """What this table of rules might be given: right, nearly, and not at all."""
    if isinstance(table, dict) and "*" in table:
        right: st.SearchStrategy[Any] = st.dictionaries(words, shaped(table["*"], secret), max_size=2)
    elif isinstance(table, dict):
        optional = {key: shaped(inner, key in reading.SECRET_MAPS) for key, inner in table.items() if inner is not None}
        right = st.fixed_dictionaries({}, optional=optional)
        right = st.builds(
            lambda some, more: {**some, **more}, right, st.just({}) | st.dictionaries(KEYS, JSON, max_size=1)
        )
    elif isinstance(table, list):
        right = st.lists(shaped(table[0]), max_size=2)
    elif isinstance(table, Rule) and (secret or table.secret):
        return hidden
    elif isinstance(table, Rule):
        right = st.sampled_from(table.choices) if table.choices else words | st.integers(0, 100) | st.booleans()
    return st.integers(0, 9).flatmap(lambda n: junk if n == 0 else right)


PROVIDERS = st.dictionaries(
    st.sampled_from(["p", "echo", "a/b", "c"]),
    st.sampled_from(sorted(config.PROVIDERS)).flatmap(
        lambda api: shaped(config.PROVIDERS[api]).map(lambda it: {"api": api, **it} if isinstance(it, dict) else it)
    ),
    max_size=2,
)
TREES = st.builds(
    lambda tree, named: {**tree, "models": {"providers": named}} if isinstance(tree, dict) and named else tree,
    shaped(config.ROOT),
    st.none() | PROVIDERS,
)


def settings_of(environ: dict[str, str]) -> reading.Settings:
    return reading.Settings(environ, ["COPEPOD", "FASED"])


def told(error: config.ConfigError) -> None:
    assert error.problems
    assert all(isinstance(problem, str) and problem for problem in error.problems)
    assert SECRET not in str(error)


def built(tree: Any, found: reading.Settings) -> config.Config | None:
    try:
        made = config.build(tree, found, auth.callers)
    except config.ConfigError as e:
        told(e)
        return None
    assert isinstance(made, config.Config)
    assert made.default_agent in made.agents
    shown = json.dumps(reading.mask(made.tree), default=str)
    assert SECRET not in shown + repr(made) + "".join(made.warnings)
    return made


@tries(300)
@given(TREES, st.booleans())
def test_any_tree(tree: Any, embed: bool) -> None:
    found = settings_of({"MARK": SECRET, "COPEPOD_GATEWAY_TOKEN": SECRET})
    if embed and isinstance(tree, dict):
        tree = reading.embedded(tree, ["main", "Extra"])
    built(found.take(tree), found)


@given(JSON)
def test_any_json(tree: Any) -> None:
    found = settings_of({})
    built(found.take(tree), found)


@given(
    st.dictionaries(
        st.sampled_from(["GATEWAY_PORT", "GATEWAY_TOKEN", "GATEWAY_PASSWORD", "STATE_DIR"]),
        words.filter(lambda w: "\0" not in w),
    ),
    st.sampled_from([{}, {"gateway": {"auth": {"mode": "token"}}}]),
)
def test_any_environment(environ: dict[str, str], tree: dict[str, Any]) -> None:
    found = settings_of({f"{brand}_{name}": value for name, value in environ.items() for brand in ("COPEPOD", "FASED")})
    built(found.take(tree), found)


@tries(200)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["gateway", "auth", "agents", "list", "0", "1", ""]) | KEYS).map(".".join)
            | st.sampled_from(["agents.list[0].id", "agents.list[9]", "gateway[0]", "a[²]", "agents.list.²"]),
            st.sampled_from(["{", "[1", "{a:1}", "'x'", "null", "NaN", "1e999", "9" * 5000, "-", "[]", "{}"])
            | st.text(max_size=5),
        ),
        max_size=3,
    )
)
def test_any_override(overrides: list[tuple[str, str]]) -> None:
    found = settings_of({})
    built(found.take({"agents": {"list": [{"id": "main"}]}}, overrides), found)


TOKENS = [
    "{", "}", "[", "]", ":", ",", "a", "'x'", '"y"', "//c\n", "/*", "*/", "\\", "0x1F", "+1", ".5", "NaN", "-Infinity",
    "null", "\u2028", "\ufeff", "'\\\n'", "$_", "\\u0061", "1e999", "\0", " ", "\n", '"\\ud800"', "true",
    "[" * 300, "9" * 5000,
]  # fmt: skip
pieces = st.lists(st.sampled_from(TOKENS), max_size=8).map("".join)
wrapped = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "{a:", "[", '{"gateway":{', "{'a':1,"]),
    pieces,
    st.sampled_from(["", "}", "]", "}}"]),
)


@tries(400)
@given(wrapped | st.text(max_size=20))
def test_any_text(text: str) -> None:
    with contextlib.suppress(ValueError):
        reading.parse(text)


@given(OBJECTS, st.sampled_from([None, 2]))
def test_json_is_read_as_it_was_written(value: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert reading.parse(text) == value
    assert reading.parse(f"// what it says\n{text} /* all */") == value


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "copepod.json5"


@given(st.binary(max_size=30) | (wrapped | st.text(max_size=20)).map(lambda text: text.encode(errors="replace")))
def test_any_file(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    found = settings_of({})
    built(found.read(str(file)), found)


deep = st.recursive(
    st.just(SECRET), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4
)
MARKED = st.recursive(
    st.text("abc", max_size=3)
    | st.just(reading.Filled(SECRET))
    | st.dictionaries(st.sampled_from(reading.SECRETS), deep, max_size=2)
    | st.dictionaries(st.sampled_from(reading.SECRET_MAPS), st.dictionaries(KEYS, deep, max_size=2), max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)


@given(MARKED)
def test_a_marked_secret_is_never_shown(tree: Any) -> None:
    assert SECRET not in json.dumps(reading.mask(tree))
