"""The mistakes that are made first: each gives one line that says what to do."""

from __future__ import annotations

import ast
import asyncio
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gateway
import make_pyz
import settings as settings_
from live import CHAT, Client, chat, run, serving
from test_program import PROGRAM, finished

ROOT = Path(__file__).resolve().parent.parent
TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": "the-right-one"}
LINE = re.compile(r"copepod: error: [^\n]+\n")
OLD = ("3.8", "3.9", "3.10")
KEYED = ["--port", "0", "--set", "models.providers.up.baseUrl=http://h/v1"]


def nobody_listens() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# On the command line. "{taken}" is a port that is taken, "{file}" a file where a folder should be.
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(
            ["gateway", "--port", "{taken}"],
            r"127\.0\.0\.1:\d+ is in use, perhaps by a gateway that is running already: "
            r"stop what listens there, or type --port \d+",
            id="port taken",
        ),
        pytest.param(
            [*KEYED, "--set", "models.providers.up.apiKey=${{NO_SUCH_KEY}}"],
            r"models\.providers\.up\.apiKey: \$\{NO_SUCH_KEY\} is not set: set it in the environment, or .*",
            id="key missing",
        ),
        pytest.param(
            ["gateway", "--port", "0", "--set", "gateway.http.endpoints.chatCompletion.enabled=true"],
            r'gateway\.http\.endpoints\.chatCompletion: unknown key\. Did you mean "chatCompletions"\?',
            id="config typo",
        ),
        pytest.param(
            ["gateway", "--port", "0", "--set", "session.store={file}/sessions.sqlite3"],
            r"the session store cannot be opened at .*: set session\.store to a place that this user may write",
            id="no permission (state)",
        ),
        pytest.param(
            ["gateway", "--config", "{file}/copepod.json5"],
            r".*/file/copepod\.json5: cannot be read: Not a directory",
            id="no configuration there",
        ),
        pytest.param(
            ["gateway", "--port", "0", "--bind", "lan"],
            r'gateway\.bind: "lan" lets other machines in, so it needs auth: type --token TOKEN, or set .*',
            id="beyond loopback without a token",
        ),
        pytest.param(
            ["agent", "--message", "hi", "--set", "gateway.port={free}"],
            r"no gateway answers at ws://127\.0\.0\.1:\d+: start one with `\S+ \S+/gateway\.py gateway`, or give --url",
            id="no gateway",
        ),
    ],
)
def test_on_the_command_line(argv: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"taken": taken.getsockname()[1], "file": tmp_path / "file", "free": nobody_listens()}
        done = finished(*(word.format(**names) for word in argv), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert LINE.fullmatch(done.stderr), done.stderr
    assert re.fullmatch(f"copepod: error: {said}\n", done.stderr), done.stderr


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*args: object, **more: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])

    monkeypatch.setattr(settings_, "open", refuse, raising=False)  # root may read any file
    assert gateway.main(["gateway", "--config", "/c.json5"]) == 1
    said = "/c.json5: cannot be read: Permission denied: let this user read it (chown, chmod), or name another"
    assert capsys.readouterr().err == f"copepod: error: {said} with --config\n"
    monkeypatch.undo()
    monkeypatch.setattr(os, "makedirs", refuse)
    assert gateway.main(["gateway", "--port", "0", "--set", f"session.store={tmp_path}/a/s.sqlite3"]) == 1
    said = f"[Errno 13] Permission denied: '{tmp_path}/a': set session.store to a place that this user may write"
    said = f"the session store cannot be opened at {tmp_path}/a/s.sqlite3: {said}"
    assert capsys.readouterr().err == f"copepod: error: {said}\n"


# At a gateway that is running, whose model server is not: what an HTTP client is told, and what the command line says.
@pytest.mark.parametrize(
    ("changes", "token", "model", "status", "message", "flags", "line"),
    [
        pytest.param(
            {},
            "a-wrong-one",
            "copepod",
            401,
            "Wrong credentials; send `Authorization: Bearer <token>`.",
            [],
            r"the gateway at .* refuses the token or password \(.*\): give the right one with --token, or in "
            "COPEPOD_GATEWAY_TOKEN",
            id="wrong token",
        ),
        pytest.param(
            {},
            "",
            "copepod",
            401,
            "No credentials; send `Authorization: Bearer <token>`.",
            [],
            r"the gateway at .* asks for a token or password: give it with --token, or in COPEPOD_GATEWAY_TOKEN",
            id="no token",
        ),
        pytest.param(
            {"gateway.http.endpoints.chatCompletions.enabled": False},
            "the-right-one",
            "copepod",
            404,
            f"There is nothing at {CHAT}: set gateway.http.endpoints.chatCompletions.enabled to true.",
            [],
            None,  # it needs no HTTP
            id="endpoint off",
        ),
        pytest.param(
            {},
            "the-right-one",
            "copepod:codr",
            404,
            "There is no agent `codr`; the agents are `main`, `coder`.",
            ["--agent", "codr"],
            'invalid agent params: unknown agent id "codr"; the agents are main, coder',
            id="agent unknown",
        ),
        pytest.param(
            {},
            "the-right-one",
            "copepod",
            502,
            "the model server could not be reached: where the gateway runs, `copepod doctor` says more",
            [],
            r".*the model server could not be reached: where the gateway runs, `\S+ \S+/gateway\.py doctor` says more",
            id="upstream down",
        ),
    ],
)
def test_at_a_running_gateway(
    changes: dict[str, Any],
    token: str,
    model: str,
    status: int,
    message: str,
    flags: list[str],
    line: str | None,
    tmp_path: Path,
) -> None:
    down = {"api": "openai-completions", "baseUrl": f"http://127.0.0.1:{nobody_listens()}/v1", "retry": {"tries": 1}}
    agents = [{"id": "main"}, {"id": "coder"}]
    server = {"models.providers.down": down, "agents.defaults.model": "down/x", "agents.list": agents}

    async def main() -> None:
        async with serving({**TOKEN, **server, **changes}) as hub:
            async with await Client.open(hub.port) as client:
                body = json.dumps({**json.loads(chat()), "model": model}).encode()
                answer = await client.ask("POST", CHAT, body, {"Authorization": f"Bearer {token}"} if token else None)
            assert (answer.status, answer.error["message"]) == (status, message)
            if line is not None:
                secret = ["--token", token] if token else []
                argv = ["agent", "--message", "hi", "--url", hub.url, *secret, *flags]
                done = await asyncio.to_thread(finished, *argv, cwd=tmp_path)
                assert (done.returncode, done.stdout) == (1, "")
                assert re.fullmatch(f"copepod: error: {line}\n", done.stderr), done.stderr

    run(main())


# An old Python


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pyz") / "copepod.pyz"
    make_pyz.build(file)
    return file


@pytest.mark.parametrize("minor", [8, 9, 10])
@pytest.mark.parametrize("name", ["gateway.py", "tests/pyz_main.py"])
def test_an_old_python_can_read_what_it_starts(name: str, minor: int) -> None:
    """It must come as far as the line that refuses it."""
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, minor))


def test_the_line_comes_before_the_leaves() -> None:
    code = "import runpy, sys; sys.version_info, sys.version = (3, 10), '3.10.14 (old)'; runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, PROGRAM[1]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "copepod: error: this is Python 3.10.14: start it with Python 3.11 or newer\n"


def interpreter(version: str) -> str | None:
    """A Python of this version, if there is one."""
    kept = Path(os.environ.get("PYENV_ROOT", "/nowhere"), "versions").glob(f"{version}.*/bin/python")
    for python in (shutil.which(f"python{version}"), *map(str, kept)):
        argv = [python or "", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if python and subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() == version:
            return python
    return None


@pytest.mark.parametrize("version", OLD)
def test_a_real_old_python(version: str, pyz: Path, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"install Python {version}, as python{version} or with pyenv, to see what it says")
    for program in (PROGRAM[1], str(pyz)):
        argv = [python, "-B", program, "gateway"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert LINE.fullmatch(done.stderr), done.stderr
        assert f"this is Python {version}." in done.stderr
