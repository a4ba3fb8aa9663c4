"""The program as a child process: what it prints, which signals it obeys, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from live import CHAT, KEY, Client, ask, chat, run, settings, text_of, within
from upstream import Upstream, says

PROGRAM = [sys.executable, str(Path(__file__).parent.parent / "gateway.py")]


class Program:
    """A gateway that runs as a process: its port, its lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.stdout, self.stderr = process, process.stdout, process.stderr
        self.port = 0

    async def line(self) -> str:
        return str((await within(self.stdout.readline())).decode().rstrip("\n"))

    async def logged(self, text: str) -> str:
        """Wait for a line of the log with this text."""
        while text not in (line := (await within(self.stderr.readline())).decode()):
            assert line, f"the program ended without saying {text!r}"
        return line

    async def ended(self) -> int:
        return int(await within(self.process.wait()))


@asynccontextmanager
async def program(
    config: dict[str, Any], tmp_path: Path, *flags: str, limit: int | None = None, **environment: str
) -> AsyncIterator[Program]:
    """The program with this configuration in a file, once it listens."""
    file = tmp_path / "copepod.json5"
    file.write_text(json.dumps(config))
    argv = [*PROGRAM, "gateway", "--config", str(file), *flags]
    if limit is not None:
        argv = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *argv]
    pipe = asyncio.subprocess.PIPE
    environ = {**os.environ, "HOME": str(tmp_path), **environment}
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe, env=environ, cwd=tmp_path)
    started = Program(process)
    try:
        ready = await started.line()
        match = re.fullmatch(r"copepod listening on http://127\.0\.0\.1:([0-9]+)", ready)
        assert match, ready or (await within(started.stderr.read())).decode()
        started.port = int(match[1])
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await within(process.communicate())
        # asyncio closes a process's transport in the loop's next turn
        await asyncio.sleep(0)


def finished(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program, run to its end."""
    environ = {**os.environ, "HOME": str(cwd), **environment}
    return subprocess.run(
        [*PROGRAM, *argv], capture_output=True, text=True, timeout=20, env=environ, cwd=cwd, check=False
    )


def test_ready_line_and_the_line_to_paste(tmp_path: Path) -> None:
    async def main() -> None:
        for auth, environment in (
            ({}, {}),
            ({"gateway.auth.mode": "token", "gateway.auth.token": "secret"}, {"COPEPOD_GATEWAY_TOKEN": "secret"}),
            ({"gateway.auth.mode": "password"}, {"COPEPOD_GATEWAY_PASSWORD": "secret"}),
        ):
            async with program(settings(auth), tmp_path, no_proxy="*", **environment) as gateway:
                paste = await gateway.line()
                assert paste.startswith(f"curl -sS http://127.0.0.1:{gateway.port}{CHAT}")
                assert "secret" not in paste
                if shutil.which("curl"):
                    pasted = await asyncio.create_subprocess_exec(
                        "sh",
                        "-c",
                        paste,
                        stdout=asyncio.subprocess.PIPE,
                        env={**os.environ, **environment, "no_proxy": "*"},
                    )
                    output, _ = await within(pasted.communicate())
                    assert json.loads(output)["choices"][0]["message"]["content"] == "hi"
                gateway.process.send_signal(signal.SIGINT)
                assert await gateway.ended() == 0

    run(main())


def test_flags_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    async def main() -> None:
        flags = ["--port", "0", "--token", "flag", "--set", "gateway.http.endpoints.chatCompletions.enabled=false"]
        config = settings({"gateway.port": 1, "gateway.auth.token": "file"})
        async with program(config, tmp_path, *flags, **{"EDWIN_GATEWAY_TOKEN": "environment"}) as gateway:
            async with await Client.open(gateway.port) as client:
                answer = await client.ask("POST", CHAT, chat(), {"Authorization": "Bearer flag"})
                assert answer.status == 404
            gateway.process.terminate()
            assert await gateway.ended() == 0
            assert await gateway.line() == ""  # nothing to paste where the endpoint is off

    run(main())


def test_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    """It ends whole; meanwhile new requests are 503 and close; then exit 0."""

    async def main() -> None:
        async with (
            Upstream() as upstream,
            program(settings(upstream.settings()), tmp_path) as gateway,
            await Client.open(gateway.port) as busy,
            await Client.open(gateway.port) as idle,
        ):
            assert await idle.usable()
            busy.say("hi", stream=True)
            call = await upstream.call()
            call.begin()
            call.word("first ")
            assert (await busy.head())[0] == 200
            gateway.process.terminate()
            assert await idle.ended()
            for method, path in (("GET", "/readyz"), ("POST", CHAT)):
                async with await Client.open(gateway.port) as client:
                    answer = await client.ask(method, path, chat() if method == "POST" else None)
                    assert answer.status == 503
                    assert answer.error["type"] == "overloaded_error"
                    assert answer.fields["connection"] == "close"
                    assert await client.ended()
            call.word("last")
            call.finish()
            call.end()
            call.done.set()
            events = [event async for event in busy.events()]
            assert text_of(events) == "first last"
            assert events[-1] == "data: [DONE]"
            assert await busy.ended()
            assert await gateway.ended() == 0

    run(main())


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Upstream() as upstream,
            program(settings(upstream.settings()), tmp_path) as gateway,
            await Client.open(gateway.port) as busy,
            await Client.open(gateway.port) as idle,
        ):
            assert await idle.usable()
            busy.say("hi", stream=True)
            call = await upstream.call()
            gateway.process.terminate()
            assert await idle.ended()  # it has taken the first one
            start = asyncio.get_running_loop().time()
            gateway.process.terminate()
            await within(call.left.wait())
            await gateway.ended()
            assert asyncio.get_running_loop().time() - start < 5  # and not the 30 seconds of the drain
            assert (await busy.answer()).status == 503
            assert await busy.ended()

    run(main())


async def drained(gateway: Program, upstream: Upstream, busy: Client) -> None:
    """A turn that does not end is ended when the drain is over, and the program with it."""
    busy.say()
    call = await upstream.call()
    gateway.process.terminate()
    await within(call.left.wait())
    assert await gateway.ended() == 0


def test_the_drain_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Upstream() as upstream,
            program(settings({**upstream.settings(), "gateway.drainSeconds": 0.2}), tmp_path) as gateway,
            await Client.open(gateway.port) as busy,
        ):
            await drained(gateway, upstream, busy)

    run(main())


def test_an_agent_that_swallows_its_cancellation_does_not_outlive_the_drain(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(
        "import asyncio\n\nasync def agent(message):\n    yield 'word'\n    while True:\n        try:\n"
        "            await asyncio.sleep(60)\n        except asyncio.CancelledError:\n            pass\n"
    )
    provider = {"api": "python", "entry": "deaf:agent"}
    config = {"models.providers.deaf": provider, "agents.defaults.model": "deaf/x", "gateway.drainSeconds": 0.2}

    async def main() -> None:
        async with program(settings(config), tmp_path) as gateway, await Client.open(gateway.port) as busy:
            busy.say(stream=True)
            await within(busy.head())
            gateway.process.terminate()
            await gateway.logged("1 runs outlive every cancellation")
            assert await gateway.ended() == 0

    run(main())


def test_sighup_reads_the_configuration_again(tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "copepod.json5"
        old = {"gateway.auth.mode": "token", "gateway.auth.token": "old"}
        async with program(settings(old), tmp_path) as gateway:

            async def status(token: str) -> int:
                async with await Client.open(gateway.port) as client:
                    return (await client.ask("POST", CHAT, chat(), {"Authorization": f"Bearer {token}"})).status

            assert [await status("old"), await status("new")] == [200, 401]
            file.write_text(json.dumps(settings({**old, "gateway.auth.token": "new"})))
            gateway.process.send_signal(signal.SIGHUP)
            await gateway.logged("read again")
            assert [await status("old"), await status("new")] == [401, 200]
            for broken in ('{"gateway": {"port": "x"}}', "{", '{"gateway": {"auth": {"mode": "token"}}}'):
                file.write_text(broken)
                gateway.process.send_signal(signal.SIGHUP)
                await gateway.logged("the old configuration stays")
                assert await status("new") == 200
            gateway.process.terminate()
            assert await gateway.ended() == 0

    run(main())


def test_sighup_holds_for_the_log_and_the_drain_too(tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "copepod.json5"
        async with (
            Upstream() as upstream,
            program(settings({**upstream.settings(), "logging.format": "text"}), tmp_path) as gateway,
            await Client.open(gateway.port) as busy,
        ):
            changes = {"gateway.drainSeconds": 0.2, "logging.format": "json", "browser.enabled": True}
            file.write_text(json.dumps(settings({**upstream.settings(), **changes})))
            gateway.process.send_signal(signal.SIGHUP)
            warning = json.loads(await gateway.logged("browser"))
            assert warning["level"] == "warning"
            async with await Client.open(gateway.port) as client:
                id = (await client.ask("GET", "/healthz")).fields["x-request-id"]
            assert json.loads(await gateway.logged(id))["status"] == 200
            file.write_text(json.dumps(settings({**upstream.settings(), **changes, "logging.level": "error"})))
            gateway.process.send_signal(signal.SIGHUP)
            await drained(gateway, upstream, busy)

    run(main())


@pytest.mark.parametrize("form", ["text", "json"])
def test_log(form: str, tmp_path: Path) -> None:
    """A line for each answer, with its request's id; no secret, nothing of what was said."""

    async def main() -> None:
        secrets = ("the-token", "the words", KEY)
        async with Upstream(says("the words")) as upstream:
            config = {"gateway.auth.mode": "token", "gateway.auth.token": "the-token", "logging.format": form}
            async with program(settings({**upstream.settings(), **config}), tmp_path) as gateway:
                for token, status in (("the-token", 200), ("the-token-not", 401)):
                    answer = await ask(gateway, "the words", {"Authorization": f"Bearer {token}"})
                    assert answer.status == status
                    line = await gateway.logged(answer.fields["x-request-id"])
                    assert str(status) in line
                    assert CHAT in line
                    assert not [secret for secret in secrets if secret in line]
                    assert form == "text" or json.loads(line)
                gateway.process.terminate()
                assert await gateway.ended() == 0

    run(main())


def test_few_files(tmp_path: Path) -> None:
    """With 256 open files it serves what it can, refuses the rest in words, and goes on."""

    async def main() -> None:
        async with (
            Upstream(says("hi")) as upstream,
            program(settings(upstream.settings()), tmp_path, limit=256) as gateway,
        ):
            clients = [await Client.open(gateway.port) for _ in range(120)]
            answers = await asyncio.gather(*(client.ask("POST", CHAT, chat()) for client in clients))
            assert {answer.status for answer in answers} == {200, 503}
            served = sum(answer.status == 200 for answer in answers)
            assert served == (256 - 64) // 2
            for client in clients:
                await client.close()
            status = 503  # until it has seen them go
            while status == 503:
                async with await Client.open(gateway.port) as client:
                    status = (await client.ask("POST", CHAT, chat())).status
            assert status == 200
            gateway.process.terminate()
            assert await gateway.ended() == 0

    run(main())


def test_port_that_is_taken(tmp_path: Path) -> None:
    async def main() -> str:
        async with program(settings(), tmp_path) as gateway:
            taken = await asyncio.to_thread(finished, "--set", f"gateway.port={gateway.port}", cwd=tmp_path / "other")
            assert (taken.returncode, taken.stdout) == (1, "")
            return taken.stderr.replace(str(gateway.port), "PORT")

    (tmp_path / "other").mkdir()
    said = run(main())
    assert said.count("\n") == 1, said
    assert said.startswith("copepod: error: ")
    assert "PORT" in said
    assert "in use" in said


def test_config_check_says_every_mistake(tmp_path: Path) -> None:
    file = tmp_path / "mine.json5"
    file.write_text('{gateway: {prot: 1, auth: {mode: "tokn"}}, session: {maxMessages: "many"}}')
    checked = finished("config", "check", "--config", str(file), cwd=tmp_path)
    assert checked.returncode == 1
    assert checked.stdout == ""
    lines = checked.stderr.splitlines()
    assert len(lines) == 3, checked.stderr
    assert all(line.startswith(f"copepod: error: {file}: ") for line in lines)
    mixed = finished("config", "check", "--config", str(file), "--set", "session.maxMessages=few", cwd=tmp_path)
    assert str(file) not in mixed.stderr  # a flag may be what is wrong
    for path, hint in (("gateway.prot", '"port"'), ("gateway.auth.mode", '"token"'), ("session.maxMessages", "number")):
        assert any(path in line and hint in line for line in lines), checked.stderr
    for command in (["gateway"], [], ["config", "show"], ["agent", "--local", "--message", "hi"]):
        refused = finished(*command, "--config", str(file), cwd=tmp_path)
        assert (refused.returncode, refused.stderr, refused.stdout) == (1, checked.stderr, "")
    good = finished("config", "check", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    file.write_text('{browser: {}, gateway: {mode: "local"}}  // of the family')
    family = finished("config", "check", "--config", str(file), cwd=tmp_path)
    assert family.returncode == 0
    assert family.stdout.count("\n") == 2
    assert "warning: ignored, not known here: browser, gateway.mode" in family.stdout


def test_config_show_hides_secrets(tmp_path: Path) -> None:
    file = tmp_path / "mine.json5"
    provider = {
        "api": "openai-completions",
        "baseUrl": "http://x/v1",
        "apiKey": "s3cret-1",
        "headers": {"a": "s3cret-2"},
    }
    tool = {"api": "command", "command": "true", "env": {"A": "s3cret-3"}, "args": ["${MINE}"]}
    config = {"models.providers.up": provider, "models.providers.tool": tool}
    auth = {"gateway.auth.mode": "token", "gateway.auth.token": "s3cret-4"}
    file.write_text(json.dumps(settings({**config, **auth})))
    shown = finished("config", "show", "--config", str(file), "--set", "gateway.port=7", cwd=tmp_path, MINE="s3cret-5")
    assert shown.returncode == 0, shown.stderr
    assert "s3cret" not in shown.stdout + shown.stderr
    tree = json.loads(shown.stdout)
    assert tree["gateway"]["port"] == 7
    assert tree["gateway"]["auth"]["token"] == 3 * "*"


def test_agent(tmp_path: Path) -> None:
    """One turn in this process; the session is on the disk for the next."""
    file = tmp_path / "copepod.json5"
    script = "import sys; print(len(sys.argv), sys.stdin.read())"
    broken = {"api": "command", "command": sys.executable, "args": ["-c", "import sys; sys.exit(3)"]}
    tool = {"api": "command", "command": sys.executable, "args": ["-c", script]}
    agents = [{"id": "main"}, {"id": "tool", "model": "tool/x"}, {"id": "broken", "model": "broken/x"}]
    changes = {"models.providers": {"tool": tool, "broken": broken}, "agents.list": agents}
    file.write_text(json.dumps(settings(changes)))
    for argv, status, stdout, stderr in (
        (["--message", "hi"], 0, "hi\n", ""),
        (["--message", "hi", "--agent", "tool"], 0, "1 hi\n", ""),
        (["--message", "hi", "--agent", "broken"], 1, "", "exited with code 3"),
        (["--message", "hi", "--agent", "nobody"], 1, "", "`main`, `tool`, `broken`"),
        (["--message", "hi", "--session-key", "agent:tool:x"], 0, "1 hi\n", ""),
        (["--message", "hi", "--session-key", "заметки"], 0, "hi\n", ""),
        (["--message", " "], 2, "", "empty"),
        ([], 2, "", "--message"),
    ):
        done = finished("agent", "--local", *argv, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (status, stdout), (argv, done)
        assert stderr in done.stderr if stderr else done.stderr == ""
        assert "Traceback" not in done.stderr
    as_json = finished("agent", "--local", "--message", "hi", "--json", cwd=tmp_path)
    payload = json.loads(as_json.stdout)
    assert (payload["status"], payload["result"]["payloads"][0]["text"]) == ("ok", "hi")
    assert payload["result"]["meta"]["agentMeta"]["sessionId"]
    again = json.loads(finished("agent", "--local", "--message", "hi", "--json", cwd=tmp_path).stdout)
    assert again["result"]["meta"]["agentMeta"]["sessionId"] == payload["result"]["meta"]["agentMeta"]["sessionId"]


def test_an_agent_in_this_process_has_its_time_too(tmp_path: Path) -> None:
    code = "import asyncio\nasync def reply(message):\n    yield 'begun'\n    await asyncio.Event().wait()\n"
    (tmp_path / "hangs.py").write_text(code)
    hangs = {"models.providers.h": {"api": "python", "entry": "hangs:reply"}, "agents.defaults.model": "h/x"}
    (tmp_path / "copepod.json5").write_text(json.dumps(settings(hangs)))
    done = finished("agent", "--local", "--message", "x", "--timeout", "0.1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr == "copepod: error: The agent took too long.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_turn_and_its_program(number: signal.Signals, tmp_path: Path) -> None:
    """A terminal that is closed, too: the program is of a group of its own, and would stay."""
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    tool = {"api": "command", "command": sys.executable, "args": ["-c", script]}
    config = settings({"models.providers": {"tool": tool}, "agents.list": [{"id": "main", "model": "tool/x"}]})
    (tmp_path / "copepod.json5").write_text(json.dumps(config))
    with subprocess.Popen(
        [*PROGRAM, "agent", "--local", "--message", "hi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOME": str(tmp_path)},
        cwd=tmp_path,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert (process.communicate(timeout=20), process.returncode) == ((b"", b""), 130)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_kill_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with Upstream(says("yes")) as upstream:
            config = settings(upstream.settings())
            async with program(config, tmp_path) as gateway:
                assert (await ask(gateway, "first", user="ann")).text == "yes"
                gateway.process.kill()
                await gateway.ended()
            async with program(config, tmp_path) as gateway:
                assert (await ask(gateway, "second", user="ann")).text == "yes"
                second = await asyncio.to_thread(finished, "--port", "0", cwd=tmp_path)  # on the same store
                assert second.returncode == 1
                assert "in use by another gateway" in second.stderr
                assert second.stdout == ""
            said = [message["content"] for message in upstream.calls[1].json["messages"]]
            assert said == ["first", "yes", "second"]

    run(main())


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--version"], 0, "copepod "),
        (["--help"], 0, "example:"),
        (["gateway", "--help"], 0, "--bind"),
        (["config", "--help"], 0, "check"),
        (["config", "check", "--help"], 0, "--set"),
        (["nonsense"], 2, "nonsense"),
        (["gateway", "--prot", "1"], 2, "--prot"),
        (["config", "check", "--config", "/no/such/file"], 1, "/no/such/file"),
        (["--bind", "lan"], 1, "auth"),
        (["--set", "gateway.auth.mode=token"], 1, "COPEPOD_GATEWAY_TOKEN"),
    ],
)
def test_exit_status(argv: list[str], status: int, said: str, tmp_path: Path) -> None:
    done = finished(*argv, cwd=tmp_path)
    assert done.returncode == status
    assert said in (done.stderr if status else done.stdout)
    assert "Traceback" not in done.stderr
    if status:
        assert done.stderr.count("\n") == 1
