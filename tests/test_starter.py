"""The first configuration: what is found to answer, and that the file it is written to works."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import auth
import gateway
import starter
from live import BOUND, run, within
from test_program import PROGRAM, finished
from upstream import Call, Upstream, says

OLLAMA, LMSTUDIO, LLAMACPP = (base for _, base in starter.LOCAL)
Fields = list[tuple[str, str]]


class Answer:
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body, self.closed = status, body, False

    async def read(self, limit: int) -> bytes:
        if len(self.body) > limit:
            raise ConnectionError("the answer is too long")
        return self.body

    def close(self) -> None:
        self.closed = True


def models(*ids: str) -> Answer:
    return Answer(200, json.dumps({"object": "list", "data": [{"id": id_} for id_ in ids]}).encode())


class Machine:
    """Servers by their base URL; `request` asks them. Where there is none, the connection is refused."""

    def __init__(self, servers: dict[str, Answer]) -> None:
        self.servers, self.asked = servers, dict[str, Fields]()

    async def request(self, method: str, url: str, fields: Fields, body: bytes) -> Answer:
        assert (method, body) == ("GET", b"")
        base = url.removesuffix("?limit=1000").removesuffix("/models")
        self.asked[base] = fields
        if base not in self.servers:
            raise ConnectionRefusedError
        return self.servers[base]


def found(servers: dict[str, Answer], **environ: str) -> list[str]:
    machine = Machine(servers)
    offers = run(starter.offers(gateway.DIALECTS, environ, machine.request))
    assert set(machine.asked) >= {OLLAMA, LMSTUDIO, LLAMACPP}
    assert all(answer.closed for base, answer in servers.items() if base in machine.asked)
    assert offers[-1] == starter.ECHO
    return [f"{it.provider}/{it.model} {it.variable}".strip() for it in offers[:-1]]


EMPTY: dict[str, Answer] = {}


@pytest.mark.parametrize(
    ("servers", "environ", "expected"),
    [
        (EMPTY, {}, []),
        ({OLLAMA: models("llama3.2:latest")}, {}, ["ollama/llama3.2:latest"]),
        ({LLAMACPP: models("b"), OLLAMA: models("a")}, {}, ["ollama/a", "llamacpp/b"]),
        ({LMSTUDIO: models(*"abcdefgh")}, {}, [f"lmstudio/{name}" for name in "abcdef"]),
        ({OLLAMA: models("nomic-embed-text:latest", "x"), LLAMACPP: models()}, {}, ["ollama/x"]),
        # names that would end a string, fill a variable, or command a terminal
        ({OLLAMA: models('a"', "${HOME}", "\x1b[2J", "", "n" * 101, "a b", "org/m-1.5")}, {}, ["ollama/org/m-1.5"]),
        # what listens there may be anything
        ({OLLAMA: Answer(404, b"no"), LMSTUDIO: Answer(200, b"<html>"), LLAMACPP: Answer(200, b"[]")}, {}, []),
        ({OLLAMA: Answer(200, b'{"data": null}'), LMSTUDIO: Answer(200, b'{"data": [1]}')}, {}, []),
        ({OLLAMA: Answer(200, b"[" * 100_000), LMSTUDIO: Answer(200, b" " * (starter.MAX_LIST + 1))}, {}, []),
        # keys: the usual model where no list comes, before others where one does, nothing where the key is refused
        (EMPTY, {"OPENAI_API_KEY": "k"}, ["openai/gpt-4o-mini OPENAI_API_KEY"]),
        (EMPTY, {"ANTHROPIC_API_KEY": "k"}, ["anthropic/claude-haiku-4-5 ANTHROPIC_API_KEY"]),
        (
            {starter.OPENAI: models("gpt-9", "whisper-1", "gpt-4o-mini"), OLLAMA: models("a")},
            {"OPENAI_API_KEY": "k"},
            ["ollama/a", "openai/gpt-4o-mini OPENAI_API_KEY", "openai/gpt-9 OPENAI_API_KEY"],
        ),
        ({starter.OPENAI: Answer(401, b"{}")}, {"OPENAI_API_KEY": "k"}, []),
        # a server of one's own
        ({"http://h:1/v1": models("m")}, {"OPENAI_BASE_URL": "http://h:1/v1/"}, ["openai/m"]),
        (EMPTY, {"OPENAI_BASE_URL": "http://h:1/v1", "OPENAI_API_KEY": "k"}, []),
        ({OLLAMA: models("m")}, {"OPENAI_BASE_URL": OLLAMA}, ["ollama/m"]),
        (EMPTY, {"OPENAI_BASE_URL": 'http://h/"'}, []),
        (EMPTY, {"OPENAI_BASE_URL": "nonsense", "OPENAI_API_KEY": "k"}, []),
    ],
)
def test_what_is_offered(servers: dict[str, Answer], environ: dict[str, str], expected: list[str]) -> None:
    assert found(servers, **environ) == expected


def test_a_key_goes_to_its_own_server_alone() -> None:
    machine = Machine({})
    run(starter.offers(gateway.DIALECTS, {"OPENAI_API_KEY": "sk-o", "ANTHROPIC_API_KEY": "sk-a"}, machine.request))
    keys = {base: [value for _, value in fields if "sk-" in value] for base, fields in machine.asked.items()}
    assert {base: sent for base, sent in keys.items() if sent} == {
        starter.OPENAI: ["Bearer sk-o"],
        starter.ANTHROPIC: ["sk-a"],
    }


def test_servers_that_hang_are_asked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "LOCAL_SECONDS", 0.01)
    waiting: list[str] = []

    async def request(method: str, url: str, fields: Fields, body: bytes) -> Answer:
        waiting.append(url)
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        assert await within(starter.offers(gateway.DIALECTS, {}, request)) == [starter.ECHO]

    run(main())
    assert waiting == [f"{base}/models" for _, base in starter.LOCAL]


# --- the file

OFFERS = [
    starter.ECHO,
    starter.Offer("ollama", "llama3.2:latest", "openai-completions", OLLAMA),
    starter.Offer("openai", "gpt-4o-mini", "openai-completions", starter.OPENAI, "OPENAI_API_KEY"),
    starter.Offer("anthropic", "claude-haiku-4-5", "anthropic-messages", starter.ANTHROPIC, "ANTHROPIC_API_KEY"),
]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: offer.provider)
def test_the_file_is_good_and_fits_a_screen(offer: starter.Offer, tmp_path: Path) -> None:
    token, path = auth.new_token(), tmp_path / "new" / "copepod.json5"
    text = starter.text(offer, token, 18790)
    starter.write(str(path), text)
    assert path.read_text() == text
    assert [stat.S_IMODE(it.stat().st_mode) for it in (path, path.parent)] == [0o600, 0o700]
    environ = {"HOME": str(tmp_path), **({offer.variable: "sk-of-mine"} if offer.variable else {})}
    config = gateway.load_config(str(path), environ)
    gateway.House(config, {}, None)
    assert config.warnings == ()
    assert (config.port, config.bind, config.auth.mode, config.auth.secret) == (18790, "127.0.0.1", "token", token)
    assert config.chat_completions
    assert config.agents["main"].models == (f"{offer.provider}/{offer.model}",)
    if offer.api != "echo":
        options = config.providers[offer.provider].options
        assert (options["baseUrl"], options["apiKey"]) == (offer.base, "sk-of-mine" if offer.variable else "")
    lines = text.splitlines()
    assert len(lines) <= 23  # and the prompt behind them
    assert max(map(len, lines)) <= 100
    assert text.count("//") - text.count("://") >= 7  # it says what its keys do


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for place in (path, path / "below"):
        with pytest.raises(OSError, match=r"cannot be made .*: name another place with --config") as caught:
            starter.write(str(place), "other")
        assert str(place) in str(caught.value)
    assert path.read_text() == "mine"


def test_a_full_disk_leaves_no_part_of_it(tmp_path: Path) -> None:
    """It would be in the way of the next try. A limit on the size of files stands for the disk."""
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # Python ignores the signal, and gets EFBIG
    try:
        with pytest.raises(OSError, match="cannot be made"):
            starter.write(str(path), "more than that")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
    starter.write(str(path), "all of it")
    assert path.read_text() == "all of it"


# --- the program


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing can answer but echo; its home, which is also the current folder."""
    monkeypatch.setattr(starter, "LOCAL", ())
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [PROGRAM[1]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_it_says_to_type(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway.main(["init", "--yes"]) == 0
    wrote, what, *typed = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {bare}/.copepod/copepod.json5, with a fresh token in it, for which the chat page will ask"
    assert what.startswith("its agent is echo, which repeats")
    words = [shlex.split(line)[1:] for line in typed]
    assert words == [[PROGRAM[1], "gateway"], [PROGRAM[1], "agent", "--message", "Hello"]]


def test_a_model_server_that_is_found_answers(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(call: Call) -> None:
        if call.path == "/v1/models":
            call.answer(200, models("llama3.2:latest").body)
        else:
            await says("indeed")(call)

    async def main() -> None:
        async with Upstream(script) as upstream:
            monkeypatch.setattr(starter, "LOCAL", (("ollama", f"http://127.0.0.1:{upstream.port}/v1"),))
            assert await asyncio.to_thread(gateway.main, ["init", "--yes"]) == 0
            argv = ["agent", "--local", "--message", "Is it?"]
            done = await asyncio.to_thread(finished, *argv, cwd=bare)
            assert (done.returncode, done.stdout, done.stderr) == (0, "indeed\n", "")
            assert upstream.calls[-1].json["model"] == "llama3.2:latest"

    run(main())


def test_the_page_of_the_first_minutes(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands, from nothing to an answer, by a Python that has no package at all."""
    page = (Path(PROGRAM[1]).parent / "docs" / "start.md").read_text(encoding="utf-8")
    init, serve, agent, export, curl, doctor = re.findall(r"^ {4}(.+)$", page, re.MULTILINE)
    assert init == "python3 gateway.py init"
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(starter, "PORTS", [free.getsockname()[1]])
    assert gateway.main(["init", "--yes"]) == 0
    capsys.readouterr()
    config = gateway.load_config(None, os.environ)
    said = {"18789": str(config.port), "python3 gateway.py": shlex.join([sys.executable, "-S", PROGRAM[1]])}

    def typed(command: str) -> subprocess.CompletedProcess[str]:
        for word, real in said.items():
            command = command.replace(word, real)
        argv, environ = ["sh", "-c", command], {**os.environ, "no_proxy": "*"}
        return subprocess.run(argv, capture_output=True, text=True, timeout=BOUND, env=environ, check=False)

    with subprocess.Popen(
        [sys.executable, "-S", PROGRAM[1], *serve.split()[2:]], stdout=subprocess.PIPE, text=True
    ) as serving:
        try:
            assert serving.stdout is not None
            assert serving.stdout.readline() == f"copepod listening on http://127.0.0.1:{config.port}\n"
            assert typed(agent).stdout == "Hello\n"
            if shutil.which("curl"):
                answered = typed(f"{export.replace('...', config.auth.secret)}\n{curl}").stdout
                assert json.loads(answered)["choices"][0]["message"]["content"] == "Hello"
            examined = typed(doctor)
            assert examined.returncode == 0
            assert f"on {config.port} this gateway is running" in examined.stdout
        finally:
            serving.terminate()
    looked_at = {line[9:24].strip() for line in examined.stdout.splitlines()}
    assert looked_at <= set(re.findall(r"`([a-z ]+)`", page))


@pytest.mark.parametrize(
    ("program", "typed"),
    [
        ("{0}/bin/copepod", "copepod"),  # which the shell finds
        ("{0}/copepod", "{0}/copepod"),
        ("copepod.pyz", f"{Path(sys.executable).name} copepod.pyz"),
        ("gateway.py", f"{Path(sys.executable).name} gateway.py"),
    ],
)
def test_the_program_is_named_as_it_was_called(
    program: str, typed: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / "bin").mkdir()
    (bare / "bin" / "copepod").touch(0o755)
    monkeypatch.setenv("PATH", str(bare / "bin"))
    monkeypatch.setattr(sys, "argv", [program.format(bare)])
    assert gateway.main(["init", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == f"  {typed.format(bare)} gateway"
    assert gateway.main(["gateway", "--config", "none.json5"]) == 1  # in what goes wrong, too
    assert f"type `{typed.format(bare)} init`, which" in capsys.readouterr().err


def test_a_port_that_is_taken_is_not_chosen(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [taken.getsockname()[1], other.getsockname()[1]]
        other.close()
        monkeypatch.setattr(starter, "PORTS", ports)
        assert gateway.main(["init", "--yes"]) == 0
        assert gateway.load_config(None, os.environ).port == ports[1]


def test_where_it_is_written(tmp_path: Path) -> None:
    """Where the gateway will look for it; where one is found already, nothing is."""
    named = finished("init", "--yes", "--config", "a b.json5", cwd=tmp_path)
    assert named.stdout.startswith(f"wrote {tmp_path}/a b.json5, ")
    assert named.stdout.count("--config 'a b.json5'") == 2
    by_environment = finished("init", "--yes", cwd=tmp_path, EDWIN_CONFIG_PATH=str(tmp_path / "edwin.json5"))
    assert by_environment.stdout.startswith(f"wrote {tmp_path}/edwin.json5, ")
    (tmp_path / "copepod.json5").write_text("{}")
    for flags in ([], ["--config", "a b.json5"]):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        refused = finished("init", "--yes", *flags, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert re.fullmatch("copepod: error: .* is there, and left as it is: change it, .* --config\n", refused.stderr)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_terminal_it_asks_nobody(tmp_path: Path) -> None:
    refused = finished("init", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "type --yes" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("closed", "argv", "status", "said"),
    [
        ("<&-", ["init"], 2, "type --yes"),
        ("<&-", ["agent", "--message", "-"], 2, "the message is empty"),
        (">&-", ["config", "check"], 0, ""),
        (">&-", ["agent", "--local", "--message", "hi"], 0, ""),
        (">&-", ["doctor", "--set", "gateway.port=0"], 0, ""),
        ("2>&-", ["agent", "--local", "--message", "hi"], 0, "hi\n"),
        ("2>&-", ["nonsense"], 2, ""),
        (">&- 2>&-", ["doctor", "--set", "gateway.port=-1"], 1, ""),
    ],
)
def test_what_a_program_may_have_closed(closed: str, argv: list[str], status: int, said: str, tmp_path: Path) -> None:
    """Some schedulers start theirs so, and Python has None there."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *PROGRAM, *argv]
    environ = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environ, cwd=tmp_path, check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr if said else done.stdout + done.stderr == ""


@pytest.mark.parametrize("base", ["localhost:8000/v1", "http://user:hunter2@h/v1", "ftp://h", 'http://h/"'])
def test_an_address_that_is_none_is_told(
    base: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not passed over, for another would be taken then."""
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    assert gateway.main(["init", "--yes"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("copepod: error: OPENAI_BASE_URL: must be an address such as http://")
    assert base not in said
    assert list(bare.iterdir()) == []


@pytest.mark.parametrize(("typed", "status"), [(b"\n", 0), (b"0\nx\n99\n1\n", 0), (b"\x04", 2), (b"\xe9\n", 2)])
def test_on_a_terminal_it_asks(typed: bytes, status: int, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    try:
        argv = [*PROGRAM, "init", "--config", "new.json5"]
        environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # no keys of the user's
        environ["PYTHONIOENCODING"] = "utf-8:strict"  # as where a language is set
        os.write(ours, typed)
        done = subprocess.run(argv, stdin=its, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=BOUND)
    finally:
        os.close(ours)
        os.close(its)
    assert done.returncode == status, done.stderr
    question, first, *_ = done.stdout.splitlines()
    assert question == "What shall answer?"
    assert re.match(r"  1  \S+", first)
    assert re.search(r"^  \d+  echo, which repeats", done.stdout, re.MULTILINE)
    assert (tmp_path / "new.json5").exists() == (status == 0)
    assert done.stderr == ("" if status == 0 else "copepod: error: nothing was chosen, and nothing is written\n")
