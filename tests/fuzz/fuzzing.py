"""Runs a target with atheris, guided by coverage; where that is not installed, with random changes of its corpus."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 18
MAX_BYTES = 1024
sys.path[:0] = [str(ROOT), str(ROOT / "tests/properties")]

try:
    import atheris
except ImportError:  # it has no wheel for this Python or this system
    atheris = None


def instrumented() -> contextlib.AbstractContextManager[None]:
    """Return a context in which what is imported of ours tells of its branches."""
    if atheris is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = atheris.instrument_imports(include=["http1", "rfc6455"])
    return context


def fuzz(name: str, target: Callable[[bytes], None]) -> None:
    """Call the target with many bytes until one makes it raise, or the time is up. Arguments are libFuzzer's.

    What is found is kept in build/fuzz/<name>; `-merge=1 tests/fuzz/corpus/<name> build/fuzz/<name>` makes it corpus.
    """
    corpus, found = ROOT / "tests/fuzz/corpus" / name, ROOT / "build/fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    if atheris is None:
        _by_chance(target, [path.read_bytes() for path in sorted(corpus.iterdir())], found / "crash")
        return
    program = f"{sys.executable} {sys.argv[0]}"  # a merge runs it again, by a shell
    bounds = [f"-max_total_time={SECONDS}", f"-max_len={MAX_BYTES}", "-timeout=5", "-print_final_stats=1"]
    given = sys.argv[1:]
    if all(word.startswith("-") for word in given):
        given += [str(found), str(corpus)]
    atheris.Setup([program, *bounds, f"-artifact_prefix={found}/", *given], target)
    atheris.Fuzz()


def _by_chance(target: Callable[[bytes], None], corpus: list[bytes], crash: Path) -> None:
    seed = time.time_ns()
    chance = random.Random(seed)  # noqa: S311
    end, n = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        data = changed(chance, chance.choice(corpus), chance.choice(corpus))
        try:
            target(data)
        except BaseException:
            crash.write_bytes(data)
            print(f"seed {seed}, execution {n}: {crash}: {data!r}", file=sys.stderr)
            raise
        n += 1
    print(f"{Path(sys.argv[0]).name}: {n} executions by chance, as atheris is not installed")


def changed(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Return the data with a few pieces left out, said twice, taken from the other, or made up."""
    for _ in range(chance.randint(0, 6)):
        at, start = chance.randint(0, len(data)), chance.randint(0, len(other))
        end, stop = at + chance.randint(0, 8), start + chance.randint(0, 16)
        new = chance.choice([b"", data[at:end] * 2, other[start:stop], chance.randbytes(1), b"\r\n", b"\0", b"\xff"])
        data = data[:at] + new + data[end if chance.random() < 0.5 else at :]
    return data[:MAX_BYTES]
