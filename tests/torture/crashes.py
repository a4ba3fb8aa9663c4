"""What is stored: through kill -9, a full disk, a store that cannot be written, and files that are no store."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from run import Row
from talk import (
    KINDS,
    SEED,
    Ledger,
    answer_to,
    child_of,
    client_of,
    configured,
    home,
    program,
    stored_in,
    talk,
    texts_of,
    turn,
)

import gateway
from live import Client, ask, settings
from peer import connected

DO = ("Move it away", "session.store", "upgrade")  # a line that tells what to do has one of these


# kill -9


def kills(n: int) -> Row:
    """kill -9 at random moments, also while it starts, under plain, streamed and WebSocket load, on one database"""
    with home() as folder:
        return asyncio.run(_kills(n, folder))


async def _kills(n: int, folder: Path) -> Row:
    print(f"kills: TORTURE_SEED={SEED}", flush=True)
    dice, ledger = random.Random(SEED), Ledger()  # noqa: S311
    file, store = configured(folder, logging__level="error"), folder / "store" / "db"
    for round in range(n):
        keys = {f"agent:main:{kind}{i}-{round // 10}": kind for kind in KINDS for i in range(3)}
        if round % 5 == 4:
            async with child_of(file) as child:
                await asyncio.sleep(dice.uniform(0, 0.3))
                child.kill()
        async with program(file) as child:
            async with connected(child) as peer:  # what the gateway itself makes of what the last kill left
                for key in keys:
                    told = await peer.ask("chat.history", sessionKey=key, limit=1000)
                    ledger.compare(key, [(m["role"], m["content"][0]["text"]) for m in told["messages"]])
            texts = {key: texts_of(f"{round}.{key[11:]}", dice, 0.01) for key in keys}
            async with asyncio.TaskGroup() as tasks:
                for key, kind in keys.items():
                    tasks.create_task(talk(kind, child.port, key, texts[key], ledger))
                await asyncio.sleep(dice.uniform(0, 0.3))
                child.kill()
            await child.ended()
        stored = stored_in(store, f"%-{round // 10}")
        for key in keys:
            ledger.compare(key, stored.get(key, []))
    stored = stored_in(store)
    for key in ledger.asked:
        ledger.compare(key, stored.get(key, []))
    answered, cut = ledger.count("answered"), ledger.count("")
    assert answered > n, "the load was no load"
    seen = f"{answered:,} turns heard to their end, {cut:,} cut; seed {SEED}"
    return ledger.row(n, "all that was heard is stored, nothing is there half, integrity_check ok", seen)


# A store that cannot be used


async def _one(hub: Any, kind: str, text: str, ledger: Ledger) -> str:
    """One turn in the session "agent:main:disk"; where it is plain, the header that tells of the store's state."""
    key = "agent:main:disk"
    if kind == "plain":
        ledger.ask(key, text)
        answer = await ask(hub, text, {"x-copepod-session-key": key})
        ledger.heard(text, answer.text)
        return answer.fields.get("x-copepod-store", "")
    async with client_of(kind, hub.port) as client:
        assert await turn(client, kind, key, text, ledger) == "answered", text[:40]
    return ""


async def _losing(
    hub: Any, n: int, size: int, store: Path, log: Callable[[], str], spoil: Callable[[], Any], mend: Callable[[], Any],
    *, before: bool = True,
) -> Row:
    """Turns before, while and after the store cannot be written; all are answered, and a loss is said everywhere."""
    ledger, kinds = Ledger(), [KINDS[i % 3] for i in range(n)]
    if before:
        assert await _one(hub, "plain", "0 before", ledger) == ""
    await spoil()
    lost = [f"0 lost{i} {'x' * size}" for i in range(n)]
    headers = [await _one(hub, kind, text, ledger) for kind, text in zip(kinds, lost, strict=True)]
    async with await Client.open(hub.port) as client:
        ready = await client.ask("GET", "/readyz")
    said = log().count("a session could not be ")
    ledger.outcome |= dict.fromkeys(lost, "lost")
    await mend()
    header = await _one(hub, "plain", "0 after", ledger)
    async with await Client.open(hub.port) as client:
        ready_again = await client.ask("GET", "/readyz")
    ledger.compare("agent:main:disk", stored_in(store).get("agent:main:disk", []))
    assert said >= n, f"{n} turns were lost and the log told of {said}"
    assert "Traceback" not in log()
    told = [header == "failed" for header, kind in zip(headers, kinds, strict=True) if kind == "plain"]
    for holds, what in (
        (b'"degraded"' in ready.body, f"/readyz tells nothing: {ready.status} {ready.body.decode()}"),
        (all(told), f"x-copepod-store: failed is on {sum(told)} of {len(told)} plain answers whose turn was lost"),
        (not header, f"stored again, and x-copepod-store: {header}"),
        (ready_again.status == 200 and b'"degraded"' not in ready_again.body, f"/readyz stays {ready_again.status}"),
    ):
        if not holds:
            ledger.wrong.append(what)
    seen = f"{n} answered, {said} losses in the log"
    return ledger.row(n, "answered; told by log, /readyz and x-copepod-store; the next is stored", seen)


def full_disk(n: int) -> Row:
    """Turns while no file may grow (RLIMIT_FSIZE in the child)"""

    async def main(folder: Path) -> Row:
        async with program(configured(folder)) as child:
            store, pid = folder / "store" / "db", child.process.pid

            async def spoil() -> None:
                size = (folder / "store" / "db-wal").stat().st_size
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            async def mend() -> None:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

            (folder / "begun").symlink_to("/dev/null")
            row = await _losing(child, n, 10, store, lambda: "".join(child.log), spoil, mend)
            child.process.terminate()
            assert await child.ended() == 0
            return row

    with home() as folder:
        return asyncio.run(main(folder))


def full_database(n: int) -> Row:
    """Turns while SQLite may take no further page (max_page_count)"""

    async def main(folder: Path) -> Row:
        log: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("copepod").addHandler(handler)
        logging.getLogger("copepod").propagate = False
        store = folder / "store" / "db"

        async def words(message: str) -> AsyncIterator[str]:
            yield answer_to(message)

        config = settings({"session.store": str(store)})
        try:
            async with gateway.Gateway(config, agents={"main": words}) as hub:
                pages = "PRAGMA max_page_count = {}"
                return await _losing(
                    hub, n, 20_000, store, lambda: "\n".join(log),
                    lambda: hub.store._run(lambda db: db.execute(pages.format(1)).fetchone()),
                    lambda: hub.store._run(lambda db: db.execute(pages.format(1 << 30)).fetchone()),
                )  # fmt: skip
        finally:
            logging.getLogger("copepod").removeHandler(handler)
            logging.getLogger("copepod").propagate = True

    with home() as folder:
        return asyncio.run(main(folder))


def unwritable(n: int) -> Row:
    """Turns while the store's file may only be read (mode 0444, which binds the child even if it is the superuser)"""

    async def main(folder: Path) -> Row:
        file, store = configured(folder), folder / "store" / "db"
        async with program(file) as child:
            child.process.terminate()
            assert await child.ended() == 0

        async def mode(mode: int) -> None:
            store.chmod(mode)

        await mode(0o444)
        async with program(file, modes=True) as child:
            log = lambda: "".join(child.log)  # noqa: E731
            return await _losing(child, n, 10, store, log, lambda: mode(0o444), lambda: mode(0o644), before=False)

    with home() as folder:
        return asyncio.run(main(folder))


def held(n: int) -> Row:
    """Turns while another process holds the store's lock for longer than the gateway waits"""

    async def main(folder: Path) -> Row:
        store = folder / "store" / "db"
        async with program(configured(folder)) as child:
            with closing(sqlite3.connect(store, isolation_level=None)) as other:

                async def hold() -> None:
                    other.execute("BEGIN EXCLUSIVE")

                async def let_go() -> None:
                    other.execute("ROLLBACK")

                return await _losing(child, n, 10, store, lambda: "".join(child.log), hold, let_go)

    with home() as folder:
        return asyncio.run(main(folder))


def closed_folder(n: int) -> Row:
    """Starts with a store that cannot be opened: in a folder that is read-only, is a file, or cannot be made"""

    async def main(folder: Path) -> Row:
        shut = folder / "shut"
        shut.mkdir(mode=0o555)
        (folder / "plain").touch()
        wrong = []
        names = ("shut/db", "shut/deeper/db", "plain/db", "store", "/proc/none/db")
        for store in [folder / name for name in names[:n]]:
            async with child_of(configured(folder, session={"store": str(store)}), modes=True) as child:
                status, log = await child.ended(), "".join(child.log)
            if status != 1 or log.count("\n") != 1 or "Traceback" in log or str(store) not in log:
                wrong.append(f"{store}: exit {status}, {log!r}")
        return Row("", n, len(wrong), "exit 1 and one line that names the file", "; ".join(wrong) or "refused, all")

    with home() as folder:
        return asyncio.run(main(folder))


# A store that is no store


def _others_database(path: Path, version: int, sql: str) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{sql}; PRAGMA user_version = {version};")


def _spoil(path: Path, number: int, dice: random.Random) -> str:
    """Spoil a good store in the manner of this number; what was done."""
    data = bytearray(path.read_bytes())
    pages = len(data) // 4096
    manner = number % 4
    if manner == 0:
        hit = dice.sample(range(pages), dice.randrange(1, pages))
        for page in hit:
            data[page * 4096 : page * 4096 + 4096] = dice.randbytes(4096)
        path.write_bytes(data)
        return f"random bytes over the pages {sorted(hit)} of {pages}"
    if manner == 1:
        size = dice.randrange(1, len(data))
        path.write_bytes(data[:size])
        return f"cut to {size} of {len(data)} bytes"
    if manner == 2:
        text = dice.choice(("hello\n", "SQLite format 3\0 not", '{"sessions": []}\n' * 5_000, "\0" * 8192))
        path.write_bytes(text.encode())
        return f"{len(text)} bytes of text, {text[:16]!r}"
    version = number // 4 % 3
    tables = dice.choice(("CREATE TABLE notes (id, text)", "CREATE TABLE sessions (a); CREATE TABLE messages (b)"))
    _others_database(path, version, tables)
    return f"another program's database, user_version {version}, {tables}"


def corrupted(n: int) -> Row:
    """Starts on a store that is damaged, cut, a text, or another program's database"""

    async def main(folder: Path) -> Row:
        print(f"corrupted: TORTURE_SEED={SEED}", flush=True)
        dice, wrong = random.Random(SEED), []  # noqa: S311
        file, store, good = configured(folder), folder / "store" / "db", folder / "good"
        async with program(file) as child:
            for i in range(40):
                key = {"x-copepod-session-key": f"agent:main:{i % 7}"}
                assert (await ask(child, f"0 {i} {'word ' * 100}", key)).status == 200
            child.process.terminate()
            assert await child.ended() == 0
        store.rename(good)
        for number in range(n):
            shutil.copy(good, store)
            done, before = _spoil(store, number, dice), store.read_bytes()
            async with child_of(file) as child:
                with suppress(AssertionError):
                    await child.ready()
                    child.kill()
                status, log = await child.ended(), "".join(child.log)
            said = log.startswith("copepod: error: ") and log.count("\n") == 1 and any(word in log for word in DO)
            if status != 1 or not said or store.read_bytes() != before:
                changed = "" if store.read_bytes() == before else ", the file was changed"
                did = "it serves" if child.port else f"exit {status}"
                wrong.append(f"{done}: {did}, said {log.replace(str(folder), '')!r}{changed}")
        seen = "; ".join(wrong[:3]) or f"refused, all; seed {SEED}"
        return Row("", n, len(wrong), "exit 1, one line that says what to do, the file unchanged", seen)

    with home() as folder:
        return asyncio.run(main(folder))


SCENARIOS = (
    (kills, 200, 5),
    (full_disk, 99, 9),
    (full_database, 99, 9),
    (unwritable, 99, 9),
    (held, 3, 1),
    (closed_folder, 5, 5),
    (corrupted, 60, 12),
)
