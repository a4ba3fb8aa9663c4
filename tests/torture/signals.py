"""What SIGTERM and SIGHUP do while everybody talks."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from pathlib import Path

from run import Row
from talk import GONE, KINDS, SEED, Child, Ledger, configured, home, program, stored_in, talk, texts_of

from live import BOUND, Client


async def _going_down(
    ledger: Ledger, file: Path, name: str, dice: random.Random, pause: float, *, patient: bool, again: bool
) -> float:
    """Let all talk, end it by SIGTERM at a random moment, and hold what they heard against what was begun; seconds."""
    begun = file.parent / "begun"
    begun.write_text("")
    keys = {f"agent:main:{kind}{i}-{name}": kind for kind in KINDS for i in range(4)}
    async with program(file) as child, asyncio.TaskGroup() as tasks:
        for key, kind in keys.items():
            texts = texts_of(f"{name}.{key[11:]}", dice, pause)
            tasks.create_task(talk(kind, child.port, key, texts, ledger))
        while begun.read_text().count("\n") < len(keys):
            await asyncio.sleep(0.01)
        await asyncio.sleep(dice.uniform(0, 0.3))
        child.process.terminate()
        start = time.monotonic()
        await child.said("going down")
        if again:
            child.process.terminate()
        else:
            await _refused_meanwhile(child, ledger)
        status = await child.ended()
        took = time.monotonic() - start
    if status != 0 or "Traceback" in "".join(child.log):
        ledger.wrong.append(f"exit {status}: {''.join(child.log)[-300:]}")
    for text in begun.read_text().splitlines():
        if not ledger.outcome[text]:
            key = next(key for key, texts in ledger.asked.items() if text in texts)
            ledger.wrong.append(f"{keys[key]}: {text!r} was begun, and cut in silence")
        elif patient and ledger.outcome[text] == "told":
            ledger.wrong.append(f"{text!r} was begun, and not let finish")
    stored = stored_in(file.parent / "store" / "db", f"%-{name}")
    for key in keys:
        ledger.compare(key, stored.get(key, []))
    return took


async def _refused_meanwhile(child: Child, ledger: Ledger) -> None:
    """New connections are told 503 and closed, until nobody listens any more."""
    refusals = 0
    while True:
        try:
            async with await Client.open(child.port) as client:
                client.say("0 never")
                answer = await client.answer()
        except ConnectionRefusedError:
            break
        except GONE:  # it was in the queue of the listener as that was closed
            continue
        refusals += 1
        if (answer.status, answer.fields.get("connection")) != (503, "close"):
            ledger.wrong.append(f"meanwhile: {answer.status} {answer.fields}")
        await asyncio.sleep(0.01)
    if not refusals:
        ledger.wrong.append("meanwhile nobody was answered 503")


def _terminated(n: int, drain: float, pause: float, bound: float, *, again: bool = False) -> tuple[Ledger, str]:
    """n rounds; what was heard, and in words."""
    dice, ledger, longest = random.Random(SEED), Ledger(), 0.0  # noqa: S311
    with home() as folder:
        file = configured(folder, gateway__drainSeconds=drain)
        for round in range(n):
            patient = drain > 1 and not again
            took = asyncio.run(_going_down(ledger, file, str(round), dice, pause, patient=patient, again=again))
            longest = max(longest, took)
            if took > bound:
                ledger.wrong.append(f"it took {took:.1f} s to exit")
    answered, told = ledger.count("answered"), ledger.count("told")
    return ledger, f"{answered:,} answered and stored, {told:,} told; exit 0 after at most {longest:.1f} s; seed {SEED}"


def sigterm(n: int) -> Row:
    """SIGTERM while plain, streamed and WebSocket turns are on, with time enough for them (drainSeconds 10)"""
    ledger, seen = _terminated(n, 10, 0.1, 10)
    return ledger.row(n, "all begun are answered or told, new ones get 503 and close, exit 0 in 10 s", seen)


def sigterm_late(n: int) -> Row:
    """SIGTERM while turns are on that need longer than drainSeconds (0.3)"""
    ledger, seen = _terminated(n, 0.3, 20, 5)
    return ledger.row(n, "all begun are told, new ones get 503 and close, exit 0 in 5 s", seen)


def sigterm_twice(n: int) -> Row:
    """A second SIGTERM behind the first while long turns are on"""
    ledger, seen = _terminated(n, 30, 20, 5, again=True)
    return ledger.row(n, "all begun are told, exit 0 in 5 s", seen)


BROKEN = (b"{", b"", b"\xff\xfe", b"[]", b'{"gateway": {"port": "x"}}', b'{"gateway": {"auth": {"mode": "token"}}}',
          b'{"models": {"providers": {"p": {"api": "python", "entry": "nobody:reply"}}}, "agents": {"list": '
          b'[{"id": "main", "model": "p/-"}]}}', b"{" * 100_000, b'{"gateway": {"prot": 1}}')  # fmt: skip


async def _reloads(n: int, folder: Path) -> Row:
    dice, ledger = random.Random(SEED), Ledger()  # noqa: S311
    file = configured(folder)
    good = json.loads(file.read_text())
    async with program(file) as child:

        async def agents() -> list[str]:
            async with await Client.open(child.port) as client:
                return [model["id"] for model in (await client.ask("GET", "/v1/models")).json["data"]]

        async def reload(data: bytes | None, said: str) -> None:
            file.unlink() if data is None else file.write_bytes(data)
            since = len(child.log)
            child.process.send_signal(signal.SIGHUP)
            line = await child.said(said, since)
            if data is None or data in BROKEN:
                assert len(line.partition(said)[2].strip()) > 10, f"it does not say why: {line}"
            file.touch()

        texts = [texts_of(kind, dice, 0.02) for kind in KINDS]
        busy = [asyncio.create_task(talk(kind, child.port, f"agent:main:{kind}", text, ledger))
                for kind, text in zip(KINDS, texts, strict=True)]  # fmt: skip
        for round in range(n):
            names = ["main", f"new{round}"]
            good["agents"]["list"] = [{"id": "main"}, {"id": names[1], "model": "echo/echo"}]
            await reload(json.dumps(good).encode(), "was read again")
            assert await agents() == [f"copepod:{name}" for name in names], round
            await reload((*BROKEN, None)[round % (len(BROKEN) + 1)], "the old configuration stays: ")
            assert await agents() == [f"copepod:{name}" for name in names], round
            answered = ledger.count("answered")
            async with asyncio.timeout(BOUND):
                while ledger.count("answered") == answered:
                    assert not [task for task in busy if task.done()], "who talked is cut"
                    await asyncio.sleep(0.01)
        child.process.terminate()
        assert await child.ended() == 0
        await asyncio.gather(*busy)
    for text, outcome in ledger.outcome.items():
        if outcome == "" and text in (folder / "begun").read_text():
            ledger.wrong.append(f"{text!r} was cut in silence")
    seen = f"{n} times each; {ledger.count('answered'):,} turns answered meanwhile"
    return ledger.row(2 * n, "good: in force; broken: the old one stays, the log says why; no turn is cut", seen)


def sighup(n: int) -> Row:
    """SIGHUP with a good file and with a broken one (half, empty, gone, wrong, not UTF-8, nested too deep)"""
    with home() as folder:
        return asyncio.run(_reloads(n, folder))


SCENARIOS = ((sigterm, 20, 2), (sigterm_late, 20, 1), (sigterm_twice, 20, 1), (sighup, 50, 10))
