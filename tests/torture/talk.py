"""The program as a process, clients of all kinds that talk to it, and a ledger of what they heard."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from run import Row

import rfc6455
from live import BOUND, Client, data_of, settings, text_of, within
from peer import Peer, connected

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = int(os.environ.get("TORTURE_SEED", random.SystemRandom().randrange(10**6)))
KINDS = ("plain", "streamed", "spoken")
GONE = (OSError, EOFError)  # what a client sees of a gateway that is no more

# The first word of a message is the pause before each of the others, in seconds. `begun` tells which runs there were.
AGENT = """
import asyncio

async def reply(message):
    with open("begun", "a") as file:
        file.write(message + "\\n")
    pause, *words = message.split(" ")
    for word in words:
        await asyncio.sleep(float(pause))
        yield word.upper() + " "
"""


def answer_to(text: str) -> str:
    """What the agent says to `text`."""
    return "".join(f"{word.upper()} " for word in text.split(" ")[1:])


# The program


@contextmanager
def home() -> Iterator[Path]:
    """A folder with the agent in it, for the configuration, the store and all else of one scenario."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        (folder / "paced.py").write_text(AGENT)
        (folder / "store").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder)


def configured(folder: Path, **changes: Any) -> Path:
    """Write the configuration of a gateway in this folder, with these dotted paths ("__" for a dot) in it."""
    paths = {
        "agents.defaults.model": "paced/-",
        "models.providers.paced": {"api": "python", "entry": "paced:reply"},
        "session": {"store": str(folder / "store" / "db"), "maxMessages": 100_000},
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    file = folder / "copepod.json5"
    file.write_text(json.dumps(settings(paths)))
    return file


def _like_anyone() -> None:
    """Let file modes bind the superuser too: the child drops CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH as it starts."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; nothing happens without the right to


class Child:
    """The program in a process: its port, and its log as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.port = process, 0
        self.log: list[str] = []
        self._came = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode())
            self._came.set()

    async def ready(self) -> None:
        """Wait for the line that tells the port."""
        assert self.process.stdout is not None
        line = (await within(self.process.stdout.readline(), 3 * BOUND)).decode()
        if not line:
            await self.ended()
        assert line.startswith("copepod listening on "), line + "".join(self.log)
        self.port = int(line.rpartition(":")[2])

    async def said(self, text: str, since: int = 0) -> str:
        """Wait for a line of the log with this text, among those after the first `since`."""
        async with asyncio.timeout(BOUND):
            while not (found := [line for line in self.log[since:] if text in line]):
                self._came.clear()
                await self._came.wait()
        return found[0]

    def kill(self) -> None:
        """kill -9. Not asyncio's own: that would reap a process that has just ended, under its watcher's nose."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the end of the process, and of its log; the exit status."""
        status: int = await within(self.process.wait(), 3 * BOUND)
        await within(self._reading)
        return status


@asynccontextmanager
async def child_of(file: Path, *, modes: bool = False) -> AsyncIterator[Child]:
    """The program with this configuration, as soon as it is started. `modes`: file modes bind it."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "gateway.py"), "--config", str(file), stdout=pipe, stderr=pipe, cwd=file.parent,
        env={"HOME": str(file.parent), "PATH": os.environ["PATH"]}, preexec_fn=_like_anyone if modes else None,
    )  # fmt: skip
    child = Child(process)
    try:
        yield child
    finally:
        if process.returncode is None:
            child.kill()
        await child.ended()
        process._transport.close()  # type: ignore[attr-defined]  # now, and not in the loop's next turn
        await asyncio.sleep(0)


@asynccontextmanager
async def program(file: Path, *, modes: bool = False) -> AsyncIterator[Child]:
    """The same, once it listens."""
    async with child_of(file, modes=modes) as child:
        await child.ready()
        yield child


# Those who talk to it


class Ledger:
    """What was asked in each session, and what came of it."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}
        self.outcome: dict[str, str] = {}  # of each text: "answered", "told", or "" as long as nothing was heard
        self.wrong: list[str] = []  # what must not be

    def ask(self, key: str, text: str) -> None:
        self.asked.setdefault(key, []).append(text)
        self.outcome[text] = ""

    def heard(self, text: str, said: str | None) -> str:
        """Note an answer, or None for an error that was told; the outcome."""
        if said is not None and said != answer_to(text):
            self.wrong.append(f"{text[:40]!r} was answered {said[:40]!r}")
        self.outcome[text] = "told" if said is None else "answered"
        return self.outcome[text]

    def count(self, outcome: str) -> int:
        return sum(value == outcome for value in self.outcome.values())

    def compare(self, key: str, stored: list[tuple[str, str]]) -> None:
        """Hold a transcript against what was heard."""
        asked, answers = [text for role, text in stored if role == "user"], iter(stored)
        for (role, text), (next_role, reply) in zip(answers, answers, strict=False):
            if (role, next_role) != ("user", "assistant") or reply != answer_to(text):
                self.wrong.append(f"{key}: a turn is there half: {role} {text!r}, {next_role} {reply!r}")
        if len(stored) % 2:
            self.wrong.append(f"{key}: the last turn is there half: {stored[-1]}")
        if len(set(asked)) < len(asked):
            self.wrong.append(f"{key}: a turn is there twice: {Counter(asked).most_common(1)}")
        there = set(asked)
        missing = [text for text in self.asked.get(key, ()) if self.outcome[text] == "answered" and text not in there]
        self.wrong += [f"{key}: {text!r} was answered and is not stored" for text in missing]
        self.wrong += [f"{key}: {text!r} was never asked" for text in there - set(self.asked.get(key, ()))]

    def row(self, tried: int, asked: str, seen: str) -> Row:
        wrong = list(dict.fromkeys(self.wrong))
        facts = "; ".join(fact[:200] for fact in wrong[:3])
        return Row("", tried, len(wrong), asked, f"{facts} ({seen})" if facts else seen)


async def turn(client: Client | Peer, kind: str, key: str, text: str, ledger: Ledger) -> str:
    """Ask once; the outcome. OSError, EOFError: the gateway is gone."""
    ledger.ask(key, text)
    if isinstance(client, Peer):
        return await _spoken(client, key, text, ledger)
    client.say(text, {"x-copepod-session-key": key}, stream=kind == "streamed")
    status, fields = await client.head()
    if "transfer-encoding" in fields:
        events = [event async for event in client.events()]
        if events[-1:] != ["data: [DONE]"]:
            ledger.wrong.append(f"{text!r}: the stream ends with {events[-1:]}")
        failed = any("error" in event for event in data_of(events))
        return ledger.heard(text, None if failed else text_of(events))
    body = json.loads(await within(client.reader.readexactly(int(fields["content-length"]))))
    if status not in (200, 503):
        ledger.wrong.append(f"{text!r}: {status} {body}")
    return ledger.heard(text, body["choices"][0]["message"]["content"] if status == 200 else None)


async def _spoken(peer: Peer, key: str, text: str, ledger: Ledger) -> str:
    id = await peer.post("agent", {"message": text, "sessionKey": key, "idempotencyKey": text[:64]})
    while (frame := await peer.read()) is not None:
        if frame.get("id") != id or frame.get("payload", {}).get("status") == "accepted":
            continue
        if not frame["ok"] or frame["payload"]["result"]["meta"]["aborted"]:
            return ledger.heard(text, None)
        return ledger.heard(text, "".join(payload["text"] for payload in frame["payload"]["result"]["payloads"]))
    if peer.websocket.close_code == 1012 and peer.events("shutdown"):
        return ledger.heard(text, None)
    raise EOFError


@asynccontextmanager
async def client_of(kind: str, port: int) -> AsyncIterator[Client | Peer]:
    """A connection of this kind; one that speaks has said hello."""
    if kind != "spoken":
        async with await Client.open(port) as client:
            yield client
        return
    hub = Child.__new__(Child)
    hub.port = port
    async with connected(hub) as peer:
        yield peer


async def talk(kind: str, port: int, key: str, texts: Iterator[str], ledger: Ledger) -> None:
    """Ask one thing after the other on one connection, for as long as the gateway answers."""
    try:
        async with client_of(kind, port) as client:
            for text in texts:
                if await turn(client, kind, key, text, ledger) == "told":
                    break
            if isinstance(client, Peer):
                code, _ = await client.ended()
                if code == 1012 and not client.events("shutdown"):
                    ledger.wrong.append(f"{key}: closed {code} without the event `shutdown`")
    except GONE:
        pass
    except rfc6455.HandshakeError as error:
        if error.status not in (0, 503):  # cut, or refused
            ledger.wrong.append(f"{key}: {error!r}")
    except AssertionError as error:
        if not str(error).startswith("closed"):  # while it said hello
            ledger.wrong.append(f"{key}: {error!r}")


def texts_of(name: str, dice: random.Random, pause: float) -> Iterator[str]:
    """Yield messages, each different."""
    number = 0
    while True:
        number += 1
        words = " ".join(dice.choice(("red", "green", "blue")) for _ in range(dice.randrange(1, 6)))
        yield f"{pause * dice.random():.4f} {name}.{number} {words}"


def stored_in(path: Path, like: str = "%") -> dict[str, list[tuple[str, str]]]:
    """The transcripts of the sessions with such a key, by key, from a copy of the store, which is checked whole."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, folder)
        found: dict[str, list[tuple[str, str]]] = {}
        with closing(sqlite3.connect(Path(folder, path.name))) as db:
            checked = db.execute("PRAGMA integrity_check").fetchall()
            assert checked == [("ok",)], checked
            rows = "SELECT key, json FROM messages JOIN sessions ON id = session WHERE key LIKE ? ORDER BY id, seq"
            for key, text in db.execute(rows, (like,)):
                message = json.loads(text)
                found.setdefault(key, []).append((message["role"], message["content"]))
        return found
