"""The store: what is acknowledged is there, what is refused is left as it was."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

import sessions
from sessions import Store, StoreError

Result = TypeVar("Result")
Message = dict[str, Any]

KEY = "agent:main:main"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
ROOT = Path(sessions.__file__).parent


def using(store: Store, work: Callable[[Store], Awaitable[Result]]) -> Result:
    """Run `work` and close the store, whatever happens."""

    async def main() -> Result:
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def store_at(folder: Path, max_messages: int = 200) -> Store:
    return Store(str(folder / "state" / "sessions.sqlite3"), max_messages)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def turn(number: int) -> list[Message]:
    return [user(f"question {number}"), assistant(f"answer {number}")]


async def add(
    store: Store, messages: list[Message], key: str = KEY, session_id: str = "s", model: str = "echo"
) -> None:
    await store.append("main", key, session_id, messages, model=model, usage=USAGE)


def test_what_was_stored_comes_back_in_order_and_in_shape(tmp_path: Path) -> None:
    messages: list[Message] = [
        user("grüße 你好 \x00 \ud800 'quote'"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        assistant(""),
    ]

    async def write(store: Store) -> str:
        session_id, found = await store.load("main", KEY)
        assert found == []
        assert (await store.load("main", KEY))[0] != session_id  # nothing is stored yet
        await add(store, messages, session_id=session_id)
        await add(store, [user("more")], session_id=session_id)
        return session_id

    async def read(store: Store) -> tuple[str, list[Message]]:
        return await store.load("main", KEY)

    session_id = using(store_at(tmp_path), write)
    assert using(store_at(tmp_path), read) == (session_id, [*messages, user("more")])


def test_an_agent_and_a_key_together_are_a_session() -> None:
    async def work(store: Store) -> None:
        await store.append("a", "k", "1", turn(1), model="", usage={})
        await store.append("b", "k", "2", turn(2), model="", usage={})
        await store.append("a", "K", "3", turn(3), model="", usage={})
        assert await store.load("a", "k") == ("1", turn(1))
        assert await store.load("b", "k") == ("2", turn(2))
        assert await store.load("a", "K") == ("3", turn(3))

    using(Store(":memory:", 200), work)


def test_the_session_keeps_its_own_id() -> None:
    async def work(store: Store) -> None:
        await add(store, turn(1), session_id="first")
        await add(store, turn(2), session_id="second")
        assert await store.load("main", KEY) == ("first", turn(1) + turn(2))

    using(Store(":memory:", 200), work)


CALL: Message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
TOOL: Message = {"role": "tool", "tool_call_id": "c", "content": "r"}


@pytest.mark.parametrize(
    ("limit", "turns", "left"),
    [
        (4, [turn(1), turn(2)], turn(1) + turn(2)),
        (4, [turn(1), turn(2), turn(3)], turn(2) + turn(3)),
        (5, [turn(1), turn(2), turn(3)], turn(2) + turn(3)),  # whole turns, where it can be
        (3, [turn(1) + turn(2) + turn(3)], turn(3)),
        (1, [turn(1), turn(2)], [assistant("answer 2")]),
        (2, [[user("q"), CALL, TOOL, assistant("a")]], [assistant("a")]),  # no result without its call
        (3, [[user("q"), CALL, TOOL, assistant("a")]], [CALL, TOOL, assistant("a")]),
        (2, [[user("q"), CALL, TOOL, TOOL]], []),
        (4, [[user("q"), CALL, TOOL, TOOL, assistant("a")], turn(2)], turn(2)),
        (2, [turn(1), []], turn(1)),
        (0, [turn(1)], []),
    ],
)
def test_trimming(limit: int, turns: list[list[Message]], left: list[Message]) -> None:
    async def work(store: Store) -> None:
        for messages in turns:
            await add(store, messages)
        assert (await store.load("main", KEY))[1] == left

    using(Store(":memory:", limit), work)


def test_what_is_trimmed_is_gone_from_the_file(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        for number in range(20):
            await add(store, turn(number))

    using(store_at(tmp_path, 6), work)
    with closing(sqlite3.connect(tmp_path / "state" / "sessions.sqlite3")) as db:
        assert db.execute("SELECT count(*), max(seq) FROM messages").fetchone() == (6, 40)


def test_a_smaller_limit_holds_for_what_is_there(tmp_path: Path) -> None:
    async def write(store: Store) -> None:
        await add(store, [user("q"), CALL, TOOL, assistant("a")])

    async def read(store: Store) -> list[Message]:
        return (await store.load("main", KEY))[1]

    using(store_at(tmp_path), write)
    assert using(store_at(tmp_path, 2), read) == [assistant("a")]


def test_list_is_newest_first_with_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(sessions, "_now", lambda: next(clock))

    async def work(store: Store) -> None:
        assert await store.list() == []
        for agent, key in (("a", "1"), ("b", "2"), ("a", "3"), ("a", "1")):
            await store.append(agent, key, "s" + key, turn(1), model="m", usage=USAGE)
        await store.append("a", "3", "", turn(1), model="", usage={"prompt_tokens": 2**70, "completion_tokens": -1})
        await store.patch("b", "2", {"label": "L", "key": "not this"})
        listed = await store.list()
        assert [entry["key"] for entry in listed] == ["2", "3", "1"]
        assert [entry["updatedAt"] for entry in listed] == sorted((e["updatedAt"] for e in listed), reverse=True)
        assert {name: value for name, value in listed[2].items() if name != "updatedAt"} == {
            "key": "1", "agentId": "a", "kind": "direct", "sessionId": "s1",
            "inputTokens": 14, "outputTokens": 6, "totalTokens": 20, "model": "m",
        }  # fmt: skip
        assert (listed[0]["label"], listed[0]["agentId"]) == ("L", "b")
        assert (listed[1]["model"], listed[1]["outputTokens"]) == ("m", 3)  # a run without a model keeps the last
        assert listed[1]["inputTokens"] == sessions.MAX_TOKENS + 7
        assert [entry["key"] for entry in await store.list(1)] == ["2"]
        assert await store.list(0) == []
        assert [entry["key"] for entry in await store.list(None, {"a"})] == ["3", "1"]
        assert [entry["key"] for entry in await store.list(1, ["a"])] == ["3"]
        assert await store.list(5, ()) == []
        assert [entry["key"] for entry in await store.list(2, ["b", "a"])] == ["2", "3"]
        assert [entry["key"] for entry in await store.list(None, {"a", "b"}, listed[1]["updatedAt"])] == ["2", "3"]
        assert [entry["key"] for entry in await store.list(1, None, 0, lambda entry: entry["key"] != "2")] == ["3"]
        await store.reset("b", "2")  # after a list that was not read to its end

    using(Store(":memory:", 200), work)


def steps(messages: int, rows: int, max_messages: int, job: Callable[[Store], Awaitable[object]]) -> int:
    """How many of its instructions SQLite takes for `job`, beside a session of `messages`, and `rows` sessions."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    async def work(store: Store) -> None:
        for n in range(rows):
            await store.append("ab"[n % 2], str(n), f"s{n}", turn(n), model="", usage={})
        await add(store, turn(0) * (messages // 2))
        await store._run(lambda db: db.set_progress_handler(step, 1))
        await job(store)

    using(Store(":memory:", max_messages), work)
    return count


JOBS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "load": lambda store: store.load("main", KEY),
    "append": lambda store: add(store, turn(1)),
    "find": lambda store: store.find("s1"),
    "recent": lambda store: store.list(5),
    "recent of two agents": lambda store: store.list(5, ["a", "b"]),
    "since": lambda store: store.list(None, ["a", "b"], 2**53),
    "searched": lambda store: store.list(2, ["a"], 0, lambda entry: int(entry["key"]) % 4 == 0),
    "history": lambda store: store.history("main", KEY, 10),
    "patch": lambda store: store.patch("main", KEY, {"label": "L"}),
    "reset": lambda store: store.reset("a", "0"),
    "delete": lambda store: store.delete("a", "0"),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_takes_as_many_steps_whatever_the_store_holds(name: str) -> None:
    few, many = (steps(20, rows, 20, JOBS[name]) for rows in (12, 1200))
    assert many <= few + 4  # where a row lies decides whether it is looked for or simply the next


@pytest.mark.parametrize("name", ["append", "history", "patch"])
def test_a_job_takes_as_many_steps_whatever_its_session_holds(name: str) -> None:
    few, many = (steps(messages, 1, 10_000, JOBS[name]) for messages in (20, 5000))
    assert many <= few + 4


def test_of_a_turn_that_is_longer_than_the_limit_only_its_end_is_written() -> None:
    assert steps(2, 1, 10, lambda store: add(store, turn(1) * 50)) == steps(
        2, 1, 10, lambda store: add(store, turn(1) * 5000)
    )


def test_history() -> None:
    async def work(store: Store) -> None:
        assert await store.history("main", KEY) == (None, [])
        await add(store, [user("q"), CALL, TOOL])
        session_id, messages = await store.history("main", KEY, 2)
        assert session_id == "s"
        assert [(m["role"], m["content"]) for m in messages] == [("assistant", None), ("tool", "r")]
        listed = await store.list()
        assert all(1_700_000_000_000 < m["timestamp"] <= listed[0]["updatedAt"] for m in messages)
        assert len((await store.history("main", KEY, None))[1]) == 3
        assert await store.history("main", KEY, 0) == ("s", [])

    using(Store(":memory:", 200), work)


def test_delete_reset_and_patch() -> None:
    async def work(store: Store) -> None:
        await add(store, turn(1))
        entry = await store.patch("main", KEY, {"label": "L1", "thinkingLevel": "low"})
        assert entry == {"label": "L1", "thinkingLevel": "low", "sessionId": "s", "updatedAt": entry["updatedAt"]}
        fresh = await store.reset("main", KEY)
        assert fresh != "s"
        assert await store.load("main", KEY) == (fresh, [])
        (listed,) = await store.list()
        assert (listed["totalTokens"], listed["sessionId"], listed["label"]) == (0, fresh, "L1")
        entry = await store.patch("main", KEY, {"label": None, "verbose": True})
        assert entry == {
            "thinkingLevel": "low", "verbose": True, "sessionId": fresh, "updatedAt": entry["updatedAt"],
        }  # fmt: skip
        await add(store, turn(2))
        assert await store.load("main", KEY) == (fresh, turn(2))
        assert await store.delete("main", KEY) is True
        assert await store.delete("main", KEY) is False
        assert await store.history("main", KEY) == (None, [])
        assert await store.list() == []

    using(Store(":memory:", 200), work)


def test_reset_and_patch_make_the_session() -> None:
    async def work(store: Store) -> None:
        fresh = await store.reset("main", "a")
        entry = await store.patch("main", "b", {"label": "L"})
        assert await store.load("main", "a") == (fresh, [])
        assert await store.load("main", "b") == (entry["sessionId"], [])

    using(Store(":memory:", 200), work)


def test_parallel_appends_are_all_there_and_none_is_torn(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await asyncio.gather(*(add(store, turn(n), key=str(n % 5)) for n in range(100)))
        for key in range(5):
            _, messages = await store.load("main", str(key))
            assert messages == [message for n in range(key, 100, 5) for message in turn(n)]

    using(store_at(tmp_path), work)


def test_the_loop_goes_on_while_the_file_is_held(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.open()
        with closing(sqlite3.connect(tmp_path / "state" / "sessions.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.ensure_future(add(store, turn(1)))
            for _ in range(20):
                await asyncio.sleep(0.005)
            assert not waiting.done()
            other.execute("ROLLBACK")
            await asyncio.wait_for(waiting, 5)
        assert (await store.load("main", KEY))[1] == turn(1)

    using(store_at(tmp_path), work)


def test_modes_and_close(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.open()
        await store.open()
        await add(store, turn(1))
        folder = tmp_path / "state"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {f"sessions.sqlite3{end}": 0o600 for end in ("", "-wal", "-shm", ".lock")}
        await store.close()
        await store.close()
        assert {path.name for path in folder.iterdir()} == {"sessions.sqlite3", "sessions.sqlite3.lock"}
        with pytest.raises(StoreError, match="closed"):
            await store.load("main", KEY)

    before = threading.active_count()
    using(store_at(tmp_path), work)
    assert threading.active_count() == before
    gc.collect()  # a connection left open would warn here, and warnings are errors


def test_close_finishes_what_was_asked_for(tmp_path: Path) -> None:
    async def write(store: Store) -> None:
        asked = [asyncio.ensure_future(add(store, turn(n))) for n in range(20)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*asked)

    async def read(store: Store) -> int:
        return len((await store.load("main", KEY))[1])

    using(store_at(tmp_path), write)
    assert using(store_at(tmp_path), read) == 40


def test_a_store_never_used_makes_nothing(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        pass

    using(store_at(tmp_path), work)
    assert list(tmp_path.iterdir()) == []


def test_importing_it_does_not_import_sqlite() -> None:
    code = "import sessions, sys; sessions.Store('x', 1); print({'_sqlite3', 'uuid'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_home_and_links_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.sqlite3").symlink_to(tmp_path / "real.sqlite3")

    async def work(store: Store) -> None:
        await store.open()
        other = Store(str(tmp_path / "real.sqlite3"), 10)  # another name of the same file
        with pytest.raises(StoreError, match="in use"):
            await other.open()
        await other.close()

    using(Store("~/link.sqlite3", 10), work)


# --- what is refused


async def fails_to_open(store: Store) -> str:
    with pytest.raises(StoreError) as caught:
        await store.open()
    return str(caught.value)


def test_a_second_store_on_the_file_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await add(store, turn(1))
        second = store_at(tmp_path)
        assert "in use by another gateway" in await fails_to_open(second)
        await add(store, turn(2))
        await store.close()
        assert len((await second.load("main", KEY))[1]) == 4
        await second.close()

    using(store_at(tmp_path), work)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import asyncio, sessions, sys\n"
        "async def main():\n"
        "    store = sessions.Store(sys.argv[1], 10)\n"
        "    try: await store.open()\n"
        "    except sessions.StoreError as error: print(error)\n"
        "    finally: await store.close()\n"
        "asyncio.run(main())\n"
    )
    path = str(tmp_path / "s.sqlite3")

    async def work(store: Store) -> None:
        await store.open()
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", code, path, cwd=ROOT, stdout=subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(child.communicate(), 30)
        assert out.decode().startswith(f"{path} is in use by another gateway")
        assert child.returncode == 0

    using(Store(path, 10), work)


def filled(path: Path) -> None:
    async def work(store: Store) -> None:
        await asyncio.gather(*(add(store, turn(n), key=str(n)) for n in range(200)))

    using(Store(str(path), 10), work)


def garbage(path: Path) -> None:
    path.write_bytes(b"these are somebody's notes, and no database\n" * 200)


def header(path: Path) -> None:
    filled(path)
    path.write_bytes(b"\0" * 16 + path.read_bytes()[16:])


def page(path: Path) -> None:
    filled(path)
    content = bytearray(path.read_bytes())
    content[8192:16384] = b"\xa5" * 8192
    path.write_bytes(content)


def cut(path: Path) -> None:
    filled(path)
    path.write_bytes(path.read_bytes()[:-9000])


def cut_short(path: Path) -> None:
    filled(path)
    path.write_bytes(path.read_bytes()[:-5])  # which the check of SQLite itself takes


def newer(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {sessions.SCHEMA_VERSION + 1}")


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")


def foreign_versioned(path: Path) -> None:
    foreign(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {sessions.SCHEMA_VERSION}")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (garbage, "is damaged or no SQLite database"),
        (header, "Move it away to start afresh"),
        (page, "is damaged"),
        (cut, "is damaged"),
        (cut_short, "is damaged"),
        (newer, "was written by a newer version (schema 2, this one knows 1)"),
        (foreign, "another program's database"),
        (foreign_versioned, "another program's database"),
    ],
)
def test_a_file_that_is_refused_is_left_as_it_was(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "a 100% odd?name#.sqlite3"
    make(path)
    before = path.read_bytes()
    store = Store(str(path), 10)
    message = using(store, fails_to_open)
    assert says in message
    assert str(path) in message
    assert path.read_bytes() == before


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CHECKED_BYTES", 0)
    filled(tmp_path / "s.sqlite3")
    before = (tmp_path / "s.sqlite3").read_bytes()
    half = len(before) // 2
    before = before[:half] + b"\xa5" * (len(before) - half)
    (tmp_path / "s.sqlite3").write_bytes(before)

    async def work(store: Store) -> None:
        await store.open()
        loads = (store.load("main", str(n)) for n in range(200))
        failed = [
            found for found in await asyncio.gather(*loads, return_exceptions=True) if not isinstance(found, tuple)
        ]
        assert {str(error) for error in failed} == {
            "the session store cannot be used: database disk image is malformed"
        }

    using(Store(str(tmp_path / "s.sqlite3"), 10), work)
    assert (tmp_path / "s.sqlite3").read_bytes() == before


def test_a_file_that_was_growing_when_the_disk_was_full_is_whole_with_its_log(tmp_path: Path) -> None:
    """SQLite moves pages out of the log, and keeps it until all of them have come to the disk."""
    path, killed, turns = tmp_path / "s.sqlite3", tmp_path / "killed.sqlite3", 20

    def kill() -> None:
        log = Path(f"{path}-wal").read_bytes()
        assert len(log) > path.stat().st_size
        killed.write_bytes(path.read_bytes() + b"x" * 100)
        Path(f"{killed}-wal").write_bytes(log)

    async def work(store: Store) -> None:
        for number in range(turns):
            await add(store, [user("x" * 4096), assistant(str(number))])
        kill()

    async def look(store: Store) -> int:
        return len((await store.history("main", KEY))[1])

    using(Store(str(path), 100), work)
    assert using(Store(str(killed), 100), look) == 2 * turns


def test_a_damaged_file_with_a_log_of_a_killed_gateway_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    page(path)
    damaged = path.read_bytes()
    fine = tmp_path / "other.sqlite3"
    filled(fine)
    with closing(sqlite3.connect(fine, isolation_level=None)) as db:
        db.execute("UPDATE sessions SET model = 'x'")
        log = Path(f"{fine}-wal").read_bytes()
    Path(f"{path}-wal").write_bytes(log)
    assert "is damaged" in using(Store(str(path), 10), fails_to_open)
    assert path.read_bytes() == damaged
    assert Path(f"{path}-wal").read_bytes() == log


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = using(Store(str(tmp_path / "file" / "sub" / "s.sqlite3"), 10), fails_to_open)
    assert "cannot be opened at" in message


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_path_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A pipe is empty, as /dev/null is, and would be replaced by a store: for the whole machine, where root asks."""
    path = tmp_path / "s.sqlite3"
    make(path)
    kind = stat.S_IFMT(path.stat().st_mode)
    assert "is no file: name one as session.store" in using(Store(str(path), 10), fails_to_open)
    assert (os.listdir(tmp_path), stat.S_IFMT(path.stat().st_mode)) == (["s.sqlite3"], kind)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in using(store_at(tmp_path), fails_to_open)


def test_a_lock_that_the_file_system_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "Operation not supported" in using(store_at(tmp_path), fails_to_open)


def test_opening_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    garbage(path)

    async def work(store: Store) -> None:
        await fails_to_open(store)
        path.unlink()
        await add(store, turn(1))
        assert (await store.load("main", KEY))[1] == turn(1)

    using(Store(str(path), 10), work)


def test_an_empty_file_and_leftovers_of_another_are_started_afresh(tmp_path: Path) -> None:
    filled(tmp_path / "old.sqlite3")
    with closing(sqlite3.connect(tmp_path / "old.sqlite3", isolation_level=None)) as db:
        db.execute("UPDATE sessions SET model = 'x'")
        log = (tmp_path / "old.sqlite3-wal").read_bytes()
    (tmp_path / "s.sqlite3").write_bytes(b"")
    (tmp_path / "s.sqlite3-wal").write_bytes(log)  # its database is gone
    (tmp_path / "s.sqlite3.new").write_bytes(b"half")  # a process was killed while it made the file

    async def work(store: Store) -> None:
        assert await store.list() == []
        await add(store, turn(1))

    using(Store(str(tmp_path / "s.sqlite3"), 10), work)


# --- failures while it works


def test_a_turn_that_cannot_be_written_leaves_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await add(store, turn(1))
        pages = await store._run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await store._run(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 1}").fetchone())
        with pytest.raises(StoreError) as caught:
            await add(store, [user("small"), user("x" * 100_000)])
        assert str(caught.value) == "the session store cannot be used: database or disk is full"
        assert (await store.load("main", KEY))[1] == turn(1)
        assert (await store.list())[0]["inputTokens"] == 7
        await store._run(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
        await add(store, turn(2))
        assert (await store.load("main", KEY))[1] == turn(1) + turn(2)

    using(store_at(tmp_path), work)


def test_a_failing_commit_is_undone(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await add(store, turn(1))
        # a constraint that is judged at COMMIT: the transaction is still open when COMMIT fails
        await store._run(lambda db: db.executescript("PRAGMA foreign_keys = ON; PRAGMA defer_foreign_keys = ON"))

        def orphan(db: sqlite3.Connection) -> None:
            db.execute("PRAGMA defer_foreign_keys = ON")
            db.execute("INSERT INTO messages VALUES (99, 1, 'user', 0, '{}')")

        with pytest.raises(StoreError, match="FOREIGN KEY"):
            await store._change(orphan)
        await add(store, turn(2))
        assert (await store.load("main", KEY))[1] == turn(1) + turn(2)

    using(store_at(tmp_path), work)


def test_a_message_that_is_no_json_is_the_callers_mistake(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(TypeError):
            await add(store, [user("fine"), {"role": "user", "content": b"bytes"}])
        assert await store.list() == []
        await add(store, turn(1))

    using(store_at(tmp_path), work)


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(StoreError, match="cannot be used: 'utf-8' codec can't encode"):
            await store.load("main", "\ud800")
        await add(store, turn(1))

    using(store_at(tmp_path), work)


WRITER = """
import asyncio, sessions, sys

async def lane(store, name):
    session_id, messages = await store.load("main", name)
    number = len(messages) // 3
    while True:
        turn = [{"role": "user", "content": f"{number} " + "x" * 3000},
                {"role": "tool", "content": str(number)}, {"role": "assistant", "content": str(number)}]
        await store.append("main", name, session_id, turn, model="m", usage={"prompt_tokens": 1})
        print(name, number, flush=True)
        number += 1

async def main():
    store = sessions.Store(sys.argv[1], 10**6)
    await asyncio.gather(*(lane(store, str(name)) for name in range(4)))

asyncio.run(main())
"""


def test_an_acknowledged_turn_is_there_after_kill_9_and_none_half(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sqlite3")
    acknowledged: dict[str, int] = {}
    for last_line in (1, 60, 150):  # killed at once, and further on; each goes on from what it finds
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for count, line in enumerate(child.stdout, 1):
                name, number = line.split()
                acknowledged[name] = int(number)
                if count == last_line:
                    os.kill(child.pid, signal.SIGKILL)  # and what it still printed is read as well
            assert child.wait(30) == -signal.SIGKILL

    async def check(store: Store) -> None:
        for name, number in acknowledged.items():
            _, messages = await store.load("main", name)
            assert len(messages) % 3 == 0
            assert len(messages) // 3 > number
            assert [message["content"] for message in messages[2::3]] == [str(n) for n in range(len(messages) // 3)]
        for entry in await store.list():
            _, messages = await store.load("main", entry["key"])
            assert entry["inputTokens"] == len(messages) // 3

    using(Store(path, 10**6), check)


def test_a_load_reads_its_own_session_by_the_index(tmp_path: Path) -> None:
    plans = {
        "SELECT timestamp, json FROM messages WHERE session = 1 ORDER BY seq DESC LIMIT 5": "SEARCH messages",
        "SELECT id, session_id FROM sessions WHERE agent = 'a' AND key = 'b'": "SEARCH sessions",
        "SELECT key, extra FROM sessions ORDER BY updated_at DESC, id DESC": "sessions_newest",
    }

    async def work(store: Store) -> None:
        for query, uses in plans.items():
            plan = await store._run(lambda db, q=query: db.execute("EXPLAIN QUERY PLAN " + q).fetchall())  # type: ignore[misc]
            assert uses in json.dumps(plan)
            assert "TEMP B-TREE" not in json.dumps(plan)

    using(Store(":memory:", 10), work)


def test_a_lock_that_is_held_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one that has waited in vain the others fail at once; after one that succeeds they wait again."""
    monkeypatch.setattr(sessions, "BUSY_SECONDS", 0.05)
    path = tmp_path / "store"

    async def test() -> None:
        store = Store(str(path), 10)
        await store.open()
        patience: list[float] = []
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with pytest.raises(StoreError, match="locked"):
                    await store.delete("a", "k")
                patience.append(store._patience)
            other.execute("ROLLBACK")
        await store.delete("a", "k")
        await store.delete("a", "k")
        assert [*patience, store._patience] == [0.0, 0.0, 0.05]
        await store.close()

    asyncio.run(test())


def test_a_store_that_may_be_written_again_is(tmp_path: Path) -> None:
    path = tmp_path / "store"

    async def test() -> None:
        store = Store(str(path), 10)
        await store.open()
        await store._run(lambda db: db.execute("PRAGMA query_only = ON").fetchall())  # as when its file is read-only
        with pytest.raises(StoreError, match="readonly"):
            await store.delete("a", "k")
        await store.delete("a", "k")
        await store.close()

    asyncio.run(test())


# The sessions of one namespace


def test_a_shelf_holds_its_own_alone() -> None:
    """Under keys without the prefix, and of its agents; neighbours of the prefix stay outside."""

    async def work(store: Store) -> None:
        ids = {}
        keys = ("token:bob:k", "token:bo:k", "token:bob2:k", "token:bob", "token:bob;", "k", "z")
        for number, key in enumerate(keys):
            for agent in ("a", "b"):
                await store.append(agent, key, f"{agent} {key}", turn(number), model="m", usage={})
                ids[agent, key] = f"{agent} {key}"
        whole = sessions.Shelf(store, "token:bob:", None)
        shelf = sessions.Shelf(store, "token:bob:", frozenset({"a"}))
        for which, agents in ((whole, ["b", "a"]), (shelf, ["a"])):
            assert [(entry["agentId"], entry["key"]) for entry in await which.list()] == [(a, "k") for a in agents]
            assert await which.counts() == dict.fromkeys(agents, 1)
            assert [entry["agentId"] for entry in await which.list(None, ["a", "b"])] == agents
            assert [entry["agentId"] for entry in await which.list(1, ["b"])] == (["b"] if "b" in agents else [])
            found = {place: await which.find(id) for place, id in ids.items()}
            assert {place: it for place, it in found.items() if it} == {(a, "token:bob:k"): (a, "k") for a in agents}
        assert await shelf.find("nobody's") is None
        assert await shelf.history("a", "k") == await store.history("a", "token:bob:k")
        assert await shelf.history("a", "token:bob:k") == (None, [])
        await shelf.patch("a", "k", {"label": "mine"})
        assert [entry["label"] for entry in await store.list() if "label" in entry] == ["mine"]
        await shelf.reset("a", "k")
        assert (await store.history("a", "token:bob:k"))[1] == []
        assert await shelf.delete("a", "k")
        assert not await shelf.delete("a", "k")
        assert len(await store.list()) == 13
        assert await store.counts() == {"a": 6, "b": 7}
        assert await store.counts(["b"], "token:") == {"b": 5}

    using(Store(sessions.MEMORY, 200), work)
