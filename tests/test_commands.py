from __future__ import annotations

import asyncio
import json
import logging
import os
import pathlib
import signal
import sys
import time

import pytest

import commands

BOUND = 20  # seconds


def options(script=None, *args, **more):
    return {
        "command": sys.executable, "args": ["-c", script, *args], "input": "stdin", "output": "text", "modelArg": None,
        "sessionArg": None, "systemPromptArg": None, "env": {}, "cwd": None, "timeoutSeconds": None,
    } | more  # fmt: skip


def turn(message="hello", **more):
    return {"run_id": "run_1", "session_id": "sid", "message": message, "system": "", "model": "m"} | more


async def take(provider, a_turn):
    items = []
    try:
        async for item in provider(a_turn):
            items.append(item)  # noqa: PERF401 (the items before an error count)
    except commands.CommandError as error:
        items.append((error.kind, str(error), error.taken))
    return items


def run(some_options, a_turn=None, hidden=()):
    """What a run gives: its texts joined, its dicts, its error as (kind, message, taken)."""
    before = set(os.listdir("/proc/self/fd"))
    items = asyncio.run(asyncio.wait_for(take(commands.command(some_options, hidden), a_turn or turn()), BOUND))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(ChildProcessError):  # no child of ours is left, not even a zombie
        os.waitpid(-1, os.WNOHANG)
    texts = "".join(item for item in items if isinstance(item, str))
    return [*([texts] if texts else []), *(item for item in items if not isinstance(item, str))]


def upstream(message, taken=True):
    return ("upstream", message, taken)


def ended(pid):
    """Whether a process runs no more: gone, or a zombie that waits for the init of this machine."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def until(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < BOUND
        await asyncio.sleep(0.001)


NO_JSON = upstream("the agent's command printed something that is no JSON object")
SILENT = upstream("the agent's command printed nothing")
TOO_MUCH = upstream("the agent's command printed more than 8 MiB")
LONG_LINE = upstream("the agent's command printed a line over 1 MiB")
CLAUDE = {"type": "assistant", "message": {"content": [{"text": "in "}, {"type": "image"}, {"text": "parts"}]}}
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("print(input()[::-1])", ["olleh\n"]),
        ("import os\nfor b in 'h\u00e9\U0001f600'.encode(): os.write(1, bytes([b]))", ["h\u00e9\U0001f600"]),
        ("import os; os.write(1, b'a\\xff\\xe4b\\xf0\\x9f')", ["a\ufffd\ufffdb\ufffd"]),
        ("print('words', end='', flush=True); raise SystemExit(3)",
         ["words", upstream("the agent's command exited with code 3")]),
        ("import os; os.kill(os.getpid(), 9)", [upstream("the agent's command was ended by signal SIGKILL")]),
        ("import os; os.kill(os.getpid(), 40)", [upstream("the agent's command was ended by signal 40")]),
        ("", [SILENT]),
        ("import os; os.close(1); input()", [SILENT]),
        ("import os\nfor i in range(160): os.write(2, b'noise ' * 10923)\nprint('done')", ["done\n"]),
        ("print('x' * 300_000)", ["x" * 300_000 + "\n"]),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", None),
    ],
)  # fmt: skip
def test_text(script, expected):
    found = run(options(script))
    if expected is None:
        assert found[1:] == [TOO_MUCH]
        assert 7 * 2**20 < len(found[0]) <= commands.MAX_OUTPUT
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("output", "printed", "expected"),
    [
        ("json", {"result": "a", "text": "b"}, ["a"]),
        ("json", {"result": None, "text": "", "response": "b"}, ["b"]),
        ("json", {"message": {"content": "c"}, "content": "d"}, ["c"]),
        ("json", {"content": [{"text": "e"}, {"text": 5}, "x", {"text": "f"}]}, ["ef"]),
        ("json", CLAUDE | USAGE, ["in parts", USAGE]),
        ("json", {"text": "a", "usage": {"input_tokens": 3, "output_tokens": 4}}, ["a", USAGE]),
        ("json", {"text": "a", "usage": {"input_tokens": "3"}}, ["a"]),
        ("json", {"text": "a\ud800"}, ["a\ufffd"]),
        ("json", {"usage": USAGE["usage"]}, [USAGE, SILENT]),
        ("json", {"result": 5}, [SILENT]),
        ("json", "\n", [SILENT]),
        ("json", '{"text":\n "over lines"}\n', ["over lines"]),
        ("json", '{"text": "a"} more', [NO_JSON]),
        ("json", "[1]", [NO_JSON]),
        ("json", "[" * 200_000, [NO_JSON]),
        ("jsonl", '{"text": "a "}\n\n{"other": 1}\r\n{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n'
                  '{"text": "b", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}', ["a b", USAGE]),
        ("jsonl", '{"text": "a"}\nno json\n{"text": "b"}\n', ["a", NO_JSON]),
        ("jsonl", '{"text": "a"}\n{"text": ', ["a", NO_JSON]),
        ("jsonl", '{"text": "%s"}\n' % ("x" * 2**20), [LONG_LINE]),
        ("jsonl", '{"text": "a"}\n' + "x" * (2**20 + 1), ["a", LONG_LINE]),
        ("jsonl", '{"text": "%s"}\n' % ("x" * 500_000), ["x" * 500_000]),
    ],
)  # fmt: skip
def test_json(tmp_path, output, printed, expected):
    file = tmp_path / "printed"
    file.write_text(printed if isinstance(printed, str) else json.dumps(printed))
    found = run(options("import sys; print(end=open(sys.argv[1]).read())", str(file), output=output))
    assert found == expected


def test_lines_are_told_as_they_come(tmp_path):
    go = tmp_path / "go"
    os.mkfifo(go)
    script = """import sys
print('{"text": "first"}', flush=True)
open(sys.argv[1]).read()
print('{"text": "2"}')"""

    async def main():
        items = commands.command(options(script, str(go), output="jsonl"), ())(turn())
        assert await asyncio.wait_for(anext(items), BOUND) == "first"
        go.write_text("")
        assert await asyncio.wait_for(anext(items), BOUND) == "2"
        with pytest.raises(StopAsyncIteration):
            await anext(items)

    asyncio.run(main())


SHOW = "import sys, json; print(json.dumps([sys.argv[1:], sys.stdin.read()]))"


@pytest.mark.parametrize(
    ("more", "a_turn", "argv", "stdin"),
    [
        ({}, {}, [], "hello"),
        ({}, {"message": "h\u00e9\0-"}, [], "h\u00e9\0-"),
        ({"input": "arg"}, {}, ["hello"], ""),
        ({"input": "arg"}, {"message": "--version"}, [" --version"], ""),
        ({"args": ["-c", SHOW, "{message}", "a{message}", "z"]}, {"message": "$(x) 'y'"},
         ["$(x) 'y'", "a{message}", "z"], ""),
        ({"input": "arg", "args": ["-c", SHOW, "{message}", "z"]}, {"message": "-m"}, [" -m", "z"], ""),
        ({"input": "arg", "sessionArg": "--session", "modelArg": "--model", "systemPromptArg": "--system"},
         {"system": "- be kind"}, ["--session", "sid", "--model", "m", "--system", " - be kind", "hello"], ""),
        ({"sessionArg": "-s", "modelArg": "-m", "systemPromptArg": "-p"}, {"model": ""}, ["-s", "sid"], "hello"),
        ({"input": "arg"}, {"message": "x" * 128_000}, ["x" * 128_000], ""),
        ({}, {"message": "x" * 128_001, "system": "\0"}, [], "x" * 128_001),
    ],
)  # fmt: skip
def test_the_message_and_the_arguments(more, a_turn, argv, stdin):
    (text,) = run(options(SHOW, **more), turn(**a_turn))
    assert json.loads(text) == [argv, stdin]


NUL = ("rejected", "the text holds a NUL character, which this agent cannot take", False)
OVER = ("rejected", "the text is over the 128000 bytes this agent can take", False)


@pytest.mark.parametrize(
    ("more", "a_turn", "expected"),
    [
        ({"input": "arg"}, {"message": "a\0b"}, NUL),
        ({"input": "arg"}, {"message": "\u00e9" * 64_001}, OVER),
        ({"args": ["{message}"]}, {"message": "x" * 128_001}, OVER),
        ({"systemPromptArg": "-p"}, {"system": "a\0b"}, NUL),
    ],
)
def test_what_cannot_be_an_argument(more, a_turn, expected):
    assert commands.CommandError.retry_after is None
    assert run(options("", **more), turn(**a_turn)) == [expected]


@pytest.mark.parametrize(
    ("name", "mode", "content", "message"),
    [
        ("missing", None, "", "the agent's command was not found"),
        ("plain", 0o644, "", "the agent's command is not executable"),
        ("nonsense", 0o755, "\x01\x02", "the agent's command could not be started"),
    ],
)
def test_a_program_that_cannot_be_started(request, tmp_path, caplog, name, mode, content, message):
    if name == "nonsense" and request.config.getoption("--uvloop"):
        pytest.skip("uvloop starts what is no program with a shell")
    program = tmp_path / name
    if mode is not None:
        program.write_text(content)
        program.chmod(mode)
    assert run(options(command=str(program), args=[])) == [upstream(message, taken=False)]
    assert str(program) in caplog.text


def test_the_environment_and_the_folder(tmp_path, monkeypatch):
    for name in ("SECRET_A", "SECRET_B", "OPEN_C"):
        monkeypatch.setenv(name, "gateway's")
    script = "import os; print([os.environ.get(n) for n in ('SECRET_A', 'SECRET_B', 'OPEN_C', 'D')], os.getcwd())"
    some = options(script, env={"SECRET_B": "given", "D": "new"}, cwd=str(tmp_path))
    assert run(some, hidden={"SECRET_A", "SECRET_B"}) == [f"[None, 'given', \"gateway's\", 'new'] {tmp_path}\n"]


def test_a_big_stdin_is_read_and_one_that_is_not_read_does_not_matter():
    message = "x" * 2_000_000
    assert run(options("import sys; print(len(sys.stdin.read()))"), turn(message)) == ["2000000\n"]
    assert run(options("print('unread')"), turn(message)) == ["unread\n"]
    assert run(options("import os; os.close(0); print('shut')"), turn(message)) == ["shut\n"]


def test_a_slow_reader_holds_the_program_up_and_loses_nothing():
    script = "import sys\nfor i in range(40): sys.stdout.write('%04d' % i * 25_000)"

    async def main():
        items = commands.command(options(script), ())(turn())
        parts = [await asyncio.wait_for(anext(items), BOUND)]
        for _ in range(20):
            await asyncio.sleep(0.01)
        async for item in items:
            assert len(item) <= commands.HIGH_WATER + 256 * 1024  # a read of asyncio's at most
            parts.append(item)
        return "".join(parts)

    assert asyncio.run(main()) == "".join(f"{i:04}" * 25_000 for i in range(40))


def test_output_left_in_the_pipe_at_the_exit_is_not_lost():
    async def main():
        items = commands.command(options("import sys; sys.stdout.write('x' * 120_000)"), ())(turn())
        total = 0
        async for item in items:
            total += len(item)
            await asyncio.sleep(0.3)  # far longer than LINGER, while the program ends
        return total

    assert asyncio.run(main()) == 120_000


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"one\n\n  two  \nthr\xe9e\x1b[2J\tx\xe2\x80\xae", ["one", "two", r"thr\xe9e\x1b[2J\tx\u202e"]),
        ("\u4f60\u597d\n".encode(), ["\u4f60\u597d"]),
        (b"x" * 100_000, ["x" * 65_536, "the rest is left out"]),
        (b"y\n" * 2000, ["y"] * 1024 + ["the rest is left out"]),
        (b"a\n" + b"x" * 70_000 + b"\nz\n", ["a", "x" * (65_536 - 64), "the rest is left out"]),
    ],
)
def test_stderr_goes_to_the_log(tmp_path, caplog, written, lines):
    caplog.set_level(logging.INFO, "copepod")
    (tmp_path / "written").write_bytes(written)
    script = "import sys, time; sys.stderr.buffer.write(open(sys.argv[1], 'rb').read()); print('ok')"
    assert run(options(script, str(tmp_path / "written"))) == ["ok\n"]
    assert [record.getMessage() for record in caplog.records] == [f"run run_1 stderr: {line}" for line in lines]


# Its end

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
TELL = "import os, time; print(os.getpid(), flush=True)\n"
SLEEP = "time.sleep(60)\n"
FORK = "if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(60)\n"


async def started(items, count):
    """The numbers of the first `count` processes that the program told."""
    text = ""
    while text.count("\n") < count:
        text += await asyncio.wait_for(anext(items), BOUND)
    return [int(line) for line in text.split()]


@pytest.mark.parametrize("way", ["aclose", "cancel", "cancel twice"])
@pytest.mark.parametrize(
    ("script", "count", "least"),
    [
        (TELL + SLEEP, 1, 0),
        (STUBBORN + TELL + SLEEP, 1, commands.GRACE),
        (TELL + FORK + SLEEP, 2, 0),
        (STUBBORN + TELL + FORK + SLEEP, 2, commands.GRACE),
        # the leader ends at SIGTERM, its child does not
        (TELL + "if os.fork() == 0:\n import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
         " print(os.getpid(), flush=True)\n time.sleep(60)\n" + SLEEP, 2, commands.GRACE),
        (STUBBORN + TELL + "while True: os.write(2, b'x' * 65536)", 1, commands.GRACE),
    ],
)  # fmt: skip
def test_a_cancel_ends_the_whole_group_within_100_ms(script, count, least, way):
    async def main():
        items = commands.command(options(script), ())(turn("x" * 1_000_000))
        pids = await started(items, count)
        assert not any(map(ended, pids))
        child = items.ag_frame.f_locals["child"]
        start = time.monotonic()
        if way == "aclose":
            await items.aclose()
        else:
            task = asyncio.ensure_future(anext(items))
            await asyncio.sleep(0)
            task.cancel()
            if way == "cancel twice":
                await asyncio.sleep(0)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), BOUND)
        returned = time.monotonic() - start
        await until(lambda: all(map(ended, pids)))
        took = time.monotonic() - start
        assert least <= took + 0.002
        await asyncio.wait_for(child.closed.wait(), BOUND)  # when cancelled twice, nobody has waited for that
        return took < 0.1 and (way != "cancel twice" or not least or returned < 0.04)

    # A neighbour's noise on a busy machine is not ours: one of some tries in time is enough.
    assert any(asyncio.run(main()) for _ in range(6))


def test_a_cancel_while_it_starts(monkeypatch):
    async def main(turns, again):
        children = []
        made = commands.Child.connection_made

        def connection_made(child, transport):
            children.append(child)
            made(child, transport)

        monkeypatch.setattr(commands.Child, "connection_made", connection_made)
        task = asyncio.ensure_future(take(commands.command(options(TELL + SLEEP), ()), turn()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        if again:
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), BOUND)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        for child in children:
            if again:
                await asyncio.wait_for(child.closed.wait(), BOUND)
            assert child.closed.is_set()
            assert ended(child.pid)
        monkeypatch.undo()
        return len(children)

    counts = [asyncio.run(main(turns, again)) for turns in range(8) for again in (False, True)]
    assert max(counts) == 1
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_cancel_while_a_missing_program_starts():
    async def main():
        task = asyncio.ensure_future(take(commands.command(options(command="/no/such/program"), ()), turn()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, BOUND)

    asyncio.run(main())


def test_a_child_left_behind_by_a_normal_exit_is_ended():
    async def main():
        items = commands.command(options(TELL + FORK + "else: time.sleep(0.2)"), ())(turn())
        pids = await started(items, 2)
        assert [item async for item in items] == []
        await until(lambda: all(map(ended, pids)))

    asyncio.run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_process_that_left_the_group_holds_nobody_up(cancelled):
    script = TELL + (
        "if os.fork() == 0: os.setsid(); print(os.getpid(), flush=True); time.sleep(60)\n"
        "else: time.sleep(60 if input() == 'wait' else 0.2)"
    )

    async def main():
        message = ("wait\n" if cancelled else "\n") + "x" * 1_000_000
        items = commands.command(options(script), ())(turn(message))
        pids = await started(items, 2)
        start = time.monotonic()
        if cancelled:
            await items.aclose()
        else:
            assert [item async for item in items] == []
        assert time.monotonic() - start < 5
        os.kill(pids[1], signal.SIGKILL)
        await until(lambda: all(map(ended, pids)))

    asyncio.run(main())


@pytest.mark.parametrize("script", [TELL + SLEEP, STUBBORN + TELL + FORK + SLEEP])
def test_the_time_a_command_may_take(script):
    start = time.monotonic()
    found = run(options(script, timeoutSeconds=0.5))
    assert found[-1] == ("timeout", "the agent's command took too long", True)
    assert 0.5 <= time.monotonic() - start < 5


def test_time_that_is_enough():
    assert run(options("print(input())", timeoutSeconds=BOUND)) == ["hello\n"]


def test_a_group_that_may_not_be_signalled(monkeypatch):
    def killpg(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "killpg", killpg)
    assert run(options("print(input())")) == ["hello\n"]


def test_many_at_once():
    async def main():
        provider = commands.command(options("print(input())"), ())
        return await asyncio.gather(*(take(provider, turn(str(n))) for n in range(40)))

    assert [["".join(items)] for items in asyncio.run(main())] == [[f"{n}\n"] for n in range(40)]
