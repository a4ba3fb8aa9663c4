"""What the doctor finds: each check over plain values, and the whole through the program."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import doctor
import gateway
from live import run, settings
from test_program import finished, program
from upstream import Upstream

WEAK = "gu3ss"
STRONG = "kX2m9Qw7Rt4Vb8Nc1Ld5Zp3H"


class Probed(NamedTuple):
    ok: bool
    what: str
    missing: tuple[str, ...] = ()


def busy(number: int = errno.EADDRINUSE) -> OSError:
    return OSError(number, os.strerror(number))


# --- the checks


@pytest.mark.parametrize(
    ("mode", "secret", "level", "said"),
    [
        (0o600, "gateway.auth.token", "ok", "is closed to other users"),
        (0o640, "gateway.auth.token", "ok", "is closed to other users"),  # a group is chosen
        (0o644, "", "ok", "holds no secret"),
        (0o644, "gateway.auth.token", "warning", "every user may read /a f, which holds gateway.auth.token"),
        (0o602, "", "error", "every user may write /a f"),
        (0o666, "gateway.auth.token", "error", "every user may write /a f"),
    ],
)
def test_permissions(mode: int, secret: str, level: str, said: str) -> None:
    found = doctor.permissions("/a f", mode, secret)
    assert (found.level, found.do) == (level, "" if level == "ok" else "chmod 600 '/a f'")
    assert said in found.said


@pytest.mark.parametrize(
    ("bind", "number", "said", "do"),
    [
        ("127.0.0.1", errno.EADDRINUSE, "127.0.0.1:70 is in use", "stop what listens there, or type --port 71"),
        ("::1", errno.EADDRINUSE, "[::1]:70 is in use", "--port 71"),
        ("127.0.0.1", errno.EACCES, "this user may not listen on 127.0.0.1:70", "above 1023"),
        ("10.9.9.9", errno.EADDRNOTAVAIL, "this machine has no address 10.9.9.9", "--bind loopback"),
        ("fe80::1%no", socket.EAI_NONAME, "this machine has no address fe80::1%no", "--bind loopback"),
        ("127.0.0.1", errno.ENOBUFS, os.strerror(errno.ENOBUFS), "another --port"),
    ],
)
def test_what_is_in_the_way_of_listening(bind: str, number: int, said: str, do: str) -> None:
    what, type_ = doctor.in_the_way(bind, 70, number)
    assert said in what
    assert do in type_
    assert doctor.port(bind, 70, busy(number), "") == ("error", "port", what, type_)


def test_the_port_behind_the_last_is_the_first() -> None:
    assert doctor.in_the_way("::", 65535, errno.EADDRINUSE)[1].endswith("--port 1")


def test_whether_a_port_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        error = doctor.unbound("127.0.0.1", number)
        assert error is not None
        assert error.errno == errno.EADDRINUSE
    assert doctor.unbound("127.0.0.1", number) is None
    assert doctor.port("127.0.0.1", number, None, "") == ("ok", "port", f"{number} is free", "")
    assert doctor.port("127.0.0.1", 0, None, "").said == "any free one is taken"
    assert "version 1.2" in doctor.port("127.0.0.1", number, busy(), "1.2").said


def test_state(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    rows = [
        (":memory:", "", False, "ok", "in memory"),
        (str(file), "", True, "ok", "is held by the running gateway"),
        (str(file), "no room", True, "error", "no room"),
        (str(file), "it is locked", False, "error", "it is locked"),
        (str(file), "", False, "ok", "can be opened"),
        (str(tmp_path / "a" / "b" / "s"), "", False, "ok", "can be made"),
        (str(file / "a" / "s"), "", False, "error", f"{file} is no folder that this user may write"),
    ]
    for store, trouble, running, level, said in rows:
        found = doctor.state(store, trouble, running)
        assert (found.level, found.about) == (level, "state"), found
        assert said in found.said
    assert doctor.state(rows[-1][0], "", False).do.startswith("set session.store, or COPEPOD_STATE_DIR")


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for root it never is
    assert doctor.state(str(tmp_path / "s"), "", False).level == "error"


@pytest.mark.parametrize(
    ("options", "probed", "level", "said", "do"),
    [
        ({"baseUrl": "http://h/v1"}, Probed(True, "reachable"), "ok", "up: reachable", ""),
        ({"command": "x"}, Probed(True, "its program is there"), "ok", "up: its program is there", ""),
        ({"baseUrl": "http://h/v1"}, Probed(False, "not reachable"), "error", "up: not", "baseUrl or apiKey of models"),
        ({"command": "x"}, Probed(False, "not found"), "error", "up: not", "correct command or cwd of models"),
        ({}, Probed(False, "refuses the key"), "error", "up: refuses", "models.providers.up"),  # Anthropic's own
        ({"baseUrl": "http://h/v1"}, Probed(True, "lacks a", ("a",)), "warning", "up: lacks a", "in agents.list"),
        (
            {"baseUrl": "http://localhost:11434/v1"},
            Probed(True, "lacks", ("a", "b:7b")),
            "warning",
            "up: lacks",
            "ollama pull a; ollama pull b:7b",
        ),
    ],
)
def test_provider(options: dict[str, Any], probed: Probed, level: str, said: str, do: str) -> None:
    found = doctor.provider("up", options, probed)
    assert found.level == level
    assert found.said.startswith(said)
    assert (do in found.do) if do else not found.do


NOW = 1_800_000_000.0  # of 2027


@pytest.mark.parametrize(
    ("now", "dates", "level", "said"),
    [
        (NOW, [], "ok", "2027-01-15 08:00:00 UTC"),
        (0.0, [], "error", "the year 1970"),
        (5e9, [], "error", "the year 2128"),
        (NOW, [(formatdate(NOW + 3, usegmt=True), NOW), ("", NOW), ("soon", NOW)], "ok", "2027"),
        (NOW, [(f"Mon, {'9' * 30} Nov 2026 10:00:00 GMT", NOW)], "ok", "2027"),
        (NOW, [(formatdate(NOW - 100, usegmt=True), NOW), (formatdate(NOW, usegmt=True), NOW)], "warning", "-100 seco"),
        (NOW, [(formatdate(NOW + 4000, usegmt=True), NOW)], "warning", "+4000 seconds"),
    ],
)
def test_clock(now: float, dates: list[tuple[str, float]], level: str, said: str) -> None:
    found = doctor.clock(now, dates)
    assert (found.level, bool(found.do)) == (level, level != "ok")
    assert said in found.said


def test_open_files() -> None:
    assert doctor.open_files(10, 10).level == "ok"
    found = doctor.open_files(96, 1024)
    assert (found.level, found.said) == ("warning", "enough for 96 of gateway.maxConnections 1024")
    assert "LimitNOFILE=2112" in found.do


@pytest.mark.parametrize(
    ("secret", "weak"),
    [
        (STRONG, False),
        ("copepod_UeVPI4BLms_17lEtUbdGP7p9Uj2Om4kTauIuC5VHx6Q", False),
        ("f2a94c1b0d7e63859a41", False),
        (STRONG[:15], True),
        ("a" * 40, True),
        ("abababababababababab", True),
        ("change-me-please-0987", True),
        ("My-Super-Secret-Value-9", True),
        ("your-token-goes-here-xyz", True),
    ],
)
def test_secrets_that_can_be_guessed(secret: str, weak: bool) -> None:
    assert doctor.is_weak(secret) == weak


def config(
    bind: str = "127.0.0.1",
    mode: str = "token",
    secret: str = STRONG,
    tls: bool = False,
    origins: tuple[str, ...] = (),
    proxies: tuple[str, ...] = (),
    tokens: list[dict[str, Any]] | None = None,
) -> Any:
    """What `exposure` looks at of a Config."""
    return SimpleNamespace(
        bind=bind,
        auth=SimpleNamespace(mode=mode, secret=secret),
        tls=("c", "k") if tls else None,
        allowed_origins=origins,
        trusted_proxies=proxies,
        tree={"gateway": {"auth": {"tokens": tokens}}},
    )


GOOD = ("https://a.example", "http://localhost:3000", "http://[::1]:1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (config(), ["ok reach", "ok secret"]),
        (config(mode="none", secret=""), ["ok reach"]),
        (config("::1"), ["ok reach", "ok secret"]),
        (config("0.0.0.0", tls=True), ["ok reach", "ok secret"]),  # noqa: S104
        (config("0.0.0.0"), ["warning reach", "ok secret"]),  # noqa: S104
        (config("10.0.0.1"), ["warning reach", "ok secret"]),
        (config(secret=WEAK), ["ok reach", "warning secret"]),
        (config("::", secret=WEAK), ["warning reach", "error secret"]),
        (config(secret=WEAK, proxies=("10.0.0.1",)), ["ok reach", "error secret", "ok proxies"]),
        (config(mode="password", secret=WEAK), ["ok reach", "warning secret"]),
        (config(secret="", tokens=[{"name": "al", "token": WEAK}]), ["ok reach", "warning secret"]),
        (config(secret="", tokens=[{"name": "al", "token": None}]), ["ok reach"]),
        (config(tokens=[{"name": "al", "token": STRONG}]), ["ok reach", "ok secret"]),
        (config(origins=GOOD), ["ok reach", "ok secret", "ok origins"]),
        (config(origins=("http://a.example",)), ["ok reach", "ok secret", "warning origins"]),
        (config(mode="none", secret="", origins=GOOD), ["ok reach", "warning origins"]),
        (config(proxies=("10.0.0.0/8", "fd00::/32")), ["ok reach", "ok secret", "ok proxies"]),
        (config(proxies=("0.0.0.0/0",)), ["ok reach", "ok secret", "error proxies"]),
        (config(proxies=("10.0.0.1", "::/0")), ["ok reach", "ok secret", "error proxies"]),
    ],
)
def test_exposure(given: Any, expected: list[str]) -> None:
    found = doctor.exposure(given)
    assert [f"{it.level} {it.about}" for it in found] == expected
    assert all(bool(it.do) == (it.level != "ok") for it in found)
    assert not [it for it in found if WEAK in it.said or STRONG in it.said]


# --- the program


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "copepod.json5"
    path.touch(0o600)
    return path


def levels(out: str) -> dict[str, str]:
    """The worst level of each thing that was looked at."""
    found: dict[str, str] = {}
    for finding in json.loads(out)["findings"]:
        assert set(finding) == {"level", "about", "said", "do"}
        assert finding["level"] == "ok" or finding["do"] or finding["about"] in ("configuration", "state"), finding
        found[finding["about"]] = max(found.get(finding["about"], ""), finding["level"], key=RANK.index)
    return found


RANK = ["", "ok", "warning", "error"]
WELL = dict.fromkeys(["configuration", "file", "port", "state", "provider", "clock", "open files", "reach"], "ok")


def test_all_is_well(file: Path, tmp_path: Path) -> None:
    file.write_text(json.dumps(settings({"gateway.auth.mode": "token", "gateway.auth.token": STRONG})))
    done = finished("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 9
    assert f"ok       configuration  {file} is good" in lines
    assert levels(finished("doctor", "--json", cwd=tmp_path).stdout) == {**WELL, "secret": "ok"}
    assert not (tmp_path / ".copepod").exists()  # it looks and leaves nothing


def test_what_is_wrong(file: Path, tmp_path: Path) -> None:
    """A model server that is down, one without the model, a sample's token that all may read, a store in a file."""
    file.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        down = {"api": "openai-completions", "baseUrl": f"http://127.0.0.1:{closed.getsockname()[1]}/v1"}
        changes = {
            "gateway.port": taken.getsockname()[1],
            "gateway.auth": {"mode": "token", "token": "secret"},
            "session.store": str(file / "sessions"),
            "models.providers.down": down,
            "agents.list": [{"id": "main", "model": "down/x"}],
            "unknown": 1,
        }
        file.write_text(json.dumps(settings(changes)))
        done = finished("doctor", "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        wrong = {"configuration": "warning", "file": "warning", "port": "error", "state": "error", "provider": "error"}
        assert levels(done.stdout) == {**WELL, **wrong, "secret": "warning"}
        found = {it["about"]: it for it in json.loads(done.stdout)["findings"]}
        assert found["file"]["said"] == f"every user may read {file}, which holds gateway.auth.token"
        assert found["file"]["do"] == f"chmod 600 {file}"
        assert found["provider"]["said"] == "down: not reachable: nothing listens there"


def test_mistakes_of_the_configuration(file: Path, tmp_path: Path) -> None:
    file.write_text('{gateway: {prot: 1, bind: "here"}}')
    done = finished("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert [line[:24] for line in done.stdout.splitlines()] == ["error    configuration  "] * 2
    assert json.loads(finished("doctor", "--json", cwd=tmp_path).stdout)["ok"] is False


def test_a_certificate_that_is_none(file: Path, tmp_path: Path) -> None:
    file.write_text(json.dumps(settings({"gateway.tls": {"cert": file.name, "key": file.name}})))
    done = finished("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"error    configuration  gateway.tls: {file} and {file} cannot be used ")
    checked = finished("config", "check", cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (1, "")
    assert f"gateway.tls: {file} and {file} cannot be used " in checked.stderr
    assert done.stdout.count("\n") == 1


def test_the_gateway_is_running(tmp_path: Path) -> None:
    """Then the port and the store are taken, by it; with another secret, or another store, that is an error."""

    async def look(*flags: str) -> dict[str, str]:
        return levels((await asyncio.to_thread(finished, "doctor", "--json", *flags, cwd=tmp_path)).stdout)

    async def main() -> None:
        config = settings({"gateway.auth.mode": "token", "gateway.auth.token": STRONG})
        async with program(config, tmp_path) as running:
            (tmp_path / "copepod.json5").chmod(0o600)
            here = ("--set", f"gateway.port={running.port}")
            assert await look(*here) == {**WELL, "secret": "ok"}
            other = await look(*here, "--set", f"gateway.auth.token={STRONG}x")
            assert other == {**WELL, "secret": "ok", "port": "error", "state": "error"}
            assert await look() == {**WELL, "secret": "ok", "state": "error"}  # on another port, with its store

    run(main())


def test_the_models_and_the_clock_of_a_server(file: Path, tmp_path: Path) -> None:
    async def listed(call: Any) -> None:
        date = f"Date: {formatdate(time.time() + 7200, usegmt=True)}"
        call.answer(200, json.dumps({"data": [{"id": "there"}]}).encode(), date)

    models = [{"id": "main", "model": {"primary": "up/there", "fallbacks": ["up/gone"]}}]

    async def main() -> None:
        async with Upstream(listed) as upstream:
            changes = settings({**upstream.settings(), "agents.list": models})
            await asyncio.to_thread(file.write_text, json.dumps(changes))
            done = await asyncio.to_thread(finished, "doctor", "--json", cwd=tmp_path)
            assert done.returncode == 0  # nothing of it keeps the gateway from running
            assert levels(done.stdout) == {**WELL, "provider": "warning", "clock": "warning"}
            assert [call.path for call in upstream.calls] == ["/v1/models"]
            assert "gone" in done.stdout

    run(main())


def test_the_troubles_of_the_running_gateway_are_told(tmp_path: Path) -> None:
    async def greet() -> tuple[str, Any, Any]:
        return "ws://h", {"server": {"version": "1"}}, {"troubles": ["a session could not be stored"]}

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            number = taken.getsockname()[1]
            config = gateway.load_config(None, {"HOME": str(tmp_path)}, [("gateway.port", str(number))])

            async def probe_all(*args: Any) -> dict[str, Probed]:
                return {"echo": Probed(True, "there"), "gone": Probed(False, "not configured")}

            # neither is its store opened, nor anyone asked
            found = await doctor.examine(config, "", 2000, greet, None, probe_all, probe_all)
        assert [it for it in found if it.about == "provider"] == [("ok", "provider", "echo: there", "")]
        assert ("error", "state", "a session could not be stored", "see the log of the running gateway") in found

    run(main())
