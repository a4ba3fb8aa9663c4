from __future__ import annotations

import errno
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import settings

HOME = {"HOME": "/home/someone"}
PREFIXES = ["COPEPOD", "EDWIN", "CLAWDBOT", "CLAWDBOT"]


class Rule(NamedTuple):
    wants: str
    fits: Any
    default: Any = None
    choices: tuple[str, ...] = ()
    secret: bool = False


NUMBER = Rule("a number", lambda value: isinstance(value, int), 1)
NEEDED = Rule("text", lambda value: isinstance(value, str), ...)
COLOUR = Rule('"red" or "blue"', lambda value: value in ("red", "blue"), "red", ("red", "blue"))
KEY = Rule("text", lambda value: isinstance(value, str), "", secret=True)
TABLE = {
    "port": NUMBER,
    "paint": {"colour": COLOUR, "key": KEY, "model": None},
    "items": [{"name": NEEDED, "sizes": [NUMBER]}],
    "any": {"*": NUMBER},
}
FULL = {"port": 1, "paint": {"colour": "red", "key": ""}, "items": [], "any": {}}


def reading(environ: dict[str, str] | None = None) -> settings.Settings:
    return settings.Settings({**HOME, **(environ or {})}, list(PREFIXES))


# --- the table


@pytest.mark.parametrize(
    ("value", "changed", "problems", "ignored"),
    [
        ({}, {}, [], []),
        ({"port": 2, "any": {"x": 3}}, {"port": 2, "any": {"x": 3}}, [], []),
        ({"paint": {"colour": "blue"}}, {"paint": {"colour": "blue", "key": ""}}, [], []),
        ({"items": [{"name": "a", "sizes": [4]}]}, {"items": [{"name": "a", "sizes": [4]}]}, [], []),
        # what is wrong gives way to the default
        ([], {}, ["the configuration: must be an object, not a list"], []),
        ({"port": "x"}, {}, ['port: must be a number, not "x"'], []),
        ({"any": {"x": None}}, {"any": {"x": 1}}, ["any.x: must be a number, not null"], []),
        ({"port": "y" * 99}, {}, ['port: must be a number, not "' + "y" * 56 + '..."'], []),
        ({"paint": 3}, {}, ["paint: must be an object, not 3"], []),
        ({"paint": "s3cret"}, {}, ["paint: must be an object, not this text"], []),
        ({"items": {}}, {}, ["items: must be a list, not an object"], []),
        (
            {"items": [{}, {"name": 5}, 7]},
            {"items": [{"name": "", "sizes": []}] * 3},
            [
                "items[0].name: is missing: it must be text",
                "items[1].name: must be text, not 5",
                "items[2]: must be an object, not 7",
            ],
            [],
        ),
        # secrets are not repeated
        ({"paint": {"key": 1234}}, {}, ["paint.key: must be text, not a number"], []),
        # slips, and what others may know
        (
            {"paint": {"colour": "bleu"}},
            {},
            ['paint.colour: must be "red" or "blue", not "bleu". Did you mean "blue"?'],
            [],
        ),
        ({"prot": 2}, {}, ['prot: unknown key. Did you mean "port"?'], []),
        ({"paint": {"Colour": "red"}}, {}, ['paint.Colour: unknown key. Did you mean "colour"?'], []),
        ({"paint": {"model": 1, "brush": 2}, "wall": 3}, {}, [], ["wall", "paint.model", "paint.brush"]),
    ],
)
def test_a_tree_is_held_against_the_table(
    value: Any, changed: dict[str, Any], problems: list[str], ignored: list[str]
) -> None:
    found = reading()
    assert found.check(value, TABLE) == {**FULL, **changed}
    assert (found.problems, found.ignored) == (problems, ignored)


def test_near() -> None:
    near = settings.Settings.near
    assert near("DRAIN_seconds", ["drainSeconds", "port"]) == '. Did you mean "drainSeconds"?'
    assert near("x", ["port"]) == ""
    assert near("x", []) == ""


# --- overrides, variables


@pytest.mark.parametrize(
    ("where", "text", "expected"),
    [
        ("port", "2", {"port": 2, "list": ["a"]}),
        ("port", "two", {"port": "two", "list": ["a"]}),
        ("port", '"2"', {"port": "2", "list": ["a"]}),
        ("port", "'2'", {"port": "2", "list": ["a"]}),
        ("port", "{a: [1,]}", {"port": {"a": [1]}, "list": ["a"]}),
        ("new.deep.0", "x", {"port": 1, "list": ["a"], "new": {"deep": ["x"]}}),
        ("list[0]", "b", {"port": 1, "list": ["b"]}),
        ("list.1.name", "b", {"port": 1, "list": ["a", {"name": "b"}]}),
    ],
)
def test_overrides(where: str, text: str, expected: object) -> None:
    raw = {"port": 1, "list": ["a"]}
    found = reading()
    assert found.take(raw, [(where, text)]) == expected
    assert found.problems == []
    assert raw == {"port": 1, "list": ["a"]}, "the caller's dict is not written to"


@pytest.mark.parametrize(
    ("where", "text", "problem"),
    [
        ("port.x", "1", "there is no x to set there"),
        ("list.2", "1", "there is no 2 to set there"),
        ("list.x", "1", "there is no x to set there"),
        ("a..b", "1", "there is no  to set there"),
        ("port", "{port", "line 1, column 6: Unexpected end of input"),
        ("port", "[" * 100_000, "is nested too deep"),
    ],
)
def test_wrong_overrides(where: str, text: str, problem: str) -> None:
    found = reading()
    assert found.take({"port": 1, "list": ["a"]}, [(where, text), ("port", "2")]) == {"port": 2, "list": ["a"]}
    assert found.problems == [f"--set {where}: {problem}"]


def test_a_path_can_be_too_deep() -> None:
    found = reading()
    assert found.take({}, [("a." * 5_000 + "a", "1")]) is None
    assert found.problems == ["the configuration: is nested too deep"]


def test_variables_are_filled_in_and_never_shown() -> None:
    found = reading({"A": "s3cret", "EMPTY": ""})
    raw = {"a": "${A} $${A} ${a} $A", "b": ("${A}",), "c": [{"d": "${NO}${EMPTY}${A}"}], 7: "$${A}", "e": 1}
    tree = found.take(raw)
    assert tree == {"a": "s3cret ${A} ${a} $A", "b": ["s3cret"], "c": [{"d": "s3cret"}], "7": "${A}", "e": 1}
    said = "is not set: set it in the environment, or write $${} for the text itself"
    assert found.problems == [f"c[0].d: ${{EMPTY}} {said}", f"c[0].d: ${{NO}} {said}"]
    assert found.variables == {"A", "NO", "EMPTY"}
    assert "s3cret" not in repr(tree)
    assert settings.mask(tree) == {"a": "***", "b": ["***"], "c": [{"d": "***"}], "7": "***", "e": 1}
    found.problems.clear()
    for value in (tree["a"], tree["c"][0]["d"]):
        assert found.check(value, NUMBER, "x") == 1
    assert found.problems == ["x: must be a number, not this text"], "that one is not set has been said"


def test_what_is_shown_has_no_secret() -> None:
    tree = {
        "token": "s",
        "auth": {"password": "s", "mode": "token", "key": "k"},
        "apiKey": "",
        "list": ({"env": {"A": "s"}, "headers": {"B": "s"}}, None, 3),
        "nothing": None,
    }
    assert settings.mask(tree) == {
        "token": "***",
        "auth": {"password": "***", "mode": "token", "key": "k"},
        "apiKey": "",
        "list": [{"env": {"A": "***"}, "headers": {"B": "***"}}, None, 3],
    }


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("", "")),
        ({"EDWIN_X": " 1 "}, ("EDWIN_X", "1")),
        ({"EDWIN_X": "1", "COPEPOD_X": "  "}, ("EDWIN_X", "1")),
        ({"EDWIN_X": "1", "COPEPOD_X": "1"}, ("COPEPOD_X", "1")),
        ({"FOREIGN_X": "1"}, ("", "")),
    ],
)
def test_variables_of_the_brands(environ: dict[str, str], expected: tuple[str, str]) -> None:
    found = reading(environ)
    assert found.variable("X") == expected
    assert found.problems == []


def test_brands_that_disagree() -> None:
    found = reading({"EDWIN_X": "1", "CLAWDBOT_X": "2"})
    assert found.variable("X") == ("EDWIN_X", "1")
    assert found.problems == ["EDWIN_X and CLAWDBOT_X: set to different values: unset all but one"]


# --- paths


def test_paths(tmp_path: Path) -> None:
    found = reading()
    assert found.folder == os.getcwd()
    found.folder = str(tmp_path)
    (tmp_path / "run").touch()
    assert found.path("a/../b") == f"{tmp_path}/b"
    assert found.path("b", "/else") == "/else/b"
    assert found.path("/b", "/else") == "/b"
    assert found.path("~/b") == "/home/someone/b"
    assert found.path("~") == "/home/someone"
    assert found.path("~b") == f"{tmp_path}/~b"
    assert settings.Settings({}, []).path("~/b") == os.path.expanduser("~/b")
    assert found.argument("./run") == f"{tmp_path}/run"
    for text in ("run", "./no", "-./run", "."):
        assert found.argument(text) == text


# --- files


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Empty strings are not legal JSON5"),
        (b"{a: 1,\n b: }", 'line 2, column 5: Unexpected "}"'),
        (b"\xff\xfe", "is not UTF-8 (at byte 0): save it as UTF-8"),
        (b" " * (settings.MAX_FILE_BYTES + 1), "is over 1048576 bytes: is it a configuration?"),
    ],
)
def test_bad_files(data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json5"
    file.write_bytes(data)
    found = reading()
    assert found.read(str(file), [("nothing.is", "said about flags")]) is None
    assert found.problems == [f"{file}: {said}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "Is a directory: name the file in it"),
        (
            "none.json5",
            "No such file or directory: name another with --config, or type `copepod init`, which makes one",
        ),
        ("none.json5/c.json5", "Not a directory"),
    ],
)
def test_files_that_cannot_be_read(name: str, said: str, tmp_path: Path) -> None:
    if name.startswith("none.json5/"):
        (tmp_path / "none.json5").touch()
    found = reading()
    assert found.read(str(tmp_path / name)) is None
    assert found.problems == [f"{tmp_path / name}: cannot be read: {said}"]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)  # root may read any
    found = reading()
    assert found.read("/c.json5") is None
    do = "let this user read it (chown, chmod), or name another with --config"
    assert found.problems == [f"/c.json5: cannot be read: Permission denied: {do}"]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (None, ""),
        ({}, ""),
        ({"token": ""}, ""),
        ({"token": 5, "tokenSha256": "ab", "mode": "token"}, ""),
        ({"gateway": {"auth": {"token": "s"}}}, "gateway.auth.token"),
        ({"gateway": {"auth": {"token": "${MINE}", "password": "p"}}}, "gateway.auth.password"),
        ({"gateway": {"auth": {"token": "${MINE}"}}}, ""),
        ({"tokens": [{"name": "a"}, {"token": "s"}]}, "tokens[1].token"),
        ({"providers": {"up": {"headers": {"x-key": "${MINE}", "x-title": "t"}}}}, "providers.up.headers.x-title"),
        ({"providers": {"up": {"env": {"A": "a"}, "apiKey": "k"}}}, "providers.up.env.A"),
    ],
)
def test_secrets_that_stand_in_the_file(tree: Any, path: str) -> None:
    assert settings.written(reading({"MINE": "m"}).take(tree)) == path


def test_a_file_of_nothing_is_no_problem_of_reading(tmp_path: Path) -> None:
    (tmp_path / "c.json5").write_text("null")
    found = reading()
    assert found.read(str(tmp_path / "c.json5")) is None
    assert found.problems == []
    assert (found.file, found.folder) == (str(tmp_path / "c.json5"), str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "\ufeff{a: 2}",
        "{a: 1, a: 2,}",
        "{a: 'x', b: \"//\", c: '\"'}",
        "/* { */ {a: [1, 2, /* , */ ], // ]\n }",
        '{a: "x: /* y */, ]", $b_1: "\\"", c: "//"}',
        "{a: 0x10, b: +1, c: .5, d: Infinity}",
        "{a: 'it\\\n goes on', \u00fc: 1}",
        "{a /* x */: 1}",
        "{true: null, null: true}",
        "{a: 'b: c', d: \"'\"}",
        '[{"a":1,},]',
    ],
)
def test_what_json5_reads_is_read_the_same(text: str) -> None:
    import json5

    text = text.removeprefix("\ufeff")
    assert settings.parse(text) == json5.loads(text)


PIECES = [
    *"{}[],:\"'\\/*.-# \n\r\t\v\xa0\ufeff\x1c\u2028",
    *("a", "$x", "a:", '"b":', "'c':", "1:", "\\u0061:", "\xfc:", "a\xb2:", "true", "null", "undefined"),
    *('"a"', "'a'", '"\'"', "'\"'", "'\\''", '"\\""', '"\\n"', '"\\x41"', '"\\u0041"', '"\\\n"', '"\u2028"', '"\t"'),
    *("'//'", '"/*"', '"*/"', '",]"', "/**/", "/*", "*/", "//", '/*"*/', "//'", "/*,*/"),
    *(".5", "5.", "+1", "-1", "0x1", "01", "-0", "1e5", "Infinity", "-Infinity", "+Infinity", "NaN"),
]


def json5_value(text: str) -> str | None:
    import json5

    try:
        return repr(json5.loads(text))
    except ValueError:
        return None


@pytest.mark.parametrize("seed", range(4))
def test_the_short_way_says_what_json5_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)  # noqa: S311
    taken = 0
    for _ in range(1500):
        some = chance.choices(PIECES, k=chance.randrange(1, 9))
        text = "".join(some if chance.random() < 0.5 else ["[", *some, "]"] if "[" not in some else ["{a:", *some, "}"])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "json5", None)
            try:
                value = repr(settings.parse(text))
            except ValueError:
                continue
        taken += 1
        # json5 refuses a comma after nothing, which says no more than the same without it
        assert value in (json5_value(text), json5_value(text.replace(",", " "))), text
    assert taken > 50


def test_comments_do_not_take_for_ever() -> None:
    text = "{a: 1," + "/**/" * 50_000 + " // \n" * 10_000 + "}"
    assert settings.parse(text) == {"a": 1}


def test_without_the_package_json5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json5", None)
    assert settings.parse("{a: 1,}") == {"a": 1}
    with pytest.raises(ValueError, match="is not plain JSON: pip install json5, or write plain JSON"):
        settings.parse("{a: 'b'}")


def test_which_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    (home / ".copepod").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    environ = {"HOME": str(home)}

    def found(**more: str) -> tuple[str | None, Any]:
        one = reading({**environ, **more})
        file = one.find()
        tree = one.read(None)
        assert one.file == file
        return file, tree

    assert found() == (None, {})
    at_home = home / ".copepod" / "copepod.json5"
    at_home.symlink_to("nowhere")  # not the default, which asks nobody for a secret
    assert found() == (str(at_home), None)
    at_home.unlink()
    at_home.write_text("{port: 1}")
    assert found() == (str(at_home), {"port": 1})
    local = here / "copepod.json5"
    local.write_text("{port: 2}")
    local.chmod(0o664)
    assert found() == (str(local), {"port": 2})
    local.chmod(0o666)
    assert found() == (str(at_home), {"port": 1})
    one = reading(environ)
    one.read(None)
    assert one.warnings == ["./copepod.json5 is not read, as others may write it: name it with --config"]
    assert reading(environ).read(str(local)) == {"port": 2}
    named = tmp_path / "named.json5"
    named.write_text("{port: 3}")
    for path in ("~/../named.json5", "../named.json5"):
        assert found(EDWIN_CONFIG_PATH=path) == (str(named), {"port": 3})
    one = reading({"EDWIN_CONFIG_PATH": "a", "CLAWDBOT_CONFIG_PATH": "b"})
    assert one.read(None) is None
    assert one.problems == ["EDWIN_CONFIG_PATH and CLAWDBOT_CONFIG_PATH: set to different values: unset all but one"]


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that was made anew leaves terminals, and gateways that get SIGHUP, where nothing is."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for path in (None, "copepod.json5", str(tmp_path / "copepod.json5")):
        one = reading()
        assert one.read(path) is None
        assert one.problems == ["the current folder is gone: change to one that is there (cd)"]


def test_where_a_first_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = reading({"HOME": str(tmp_path)})
    at_home = str(tmp_path / ".copepod" / "copepod.json5")
    assert (one.vacant(None), one.vacant("mine"), one.problems) == (at_home, str(tmp_path / "mine"), [])
    (tmp_path / "copepod.json5").write_text("{}")
    here = str(tmp_path / "copepod.json5")
    assert one.vacant(None) == one.vacant("copepod.json5") == here
    assert one.problems == [f"{here} is there, and left as it is: change it, or name another with --config"] * 2


def test_a_file_of_somebody_else_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copepod.json5").write_text("{}")
    assert reading().find() == str(tmp_path / "copepod.json5")
    me = (tmp_path / "copepod.json5").stat().st_uid
    real = os.stat

    def stranger(path: str) -> os.stat_result:
        fields = list(real(path))
        fields[4] = me + 1000
        return os.stat_result(fields)

    for name in ("stat", "lstat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, stranger)
            assert reading().find() is None
