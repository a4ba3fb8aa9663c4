"""The claim "it does not break" as a table of figures: `python tests/torture/run.py [--quick] [NAME...]`."""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MODULES = ("crashes", "signals", "leaks", "clients", "faults", "secrets")
SHOWN = 600  # characters of what was seen
BOUND = 400.0  # seconds for one scenario; all of them take less than 15 minutes


class Row(NamedTuple):
    """What a scenario has found. `what` may be "": then it is the first line of the scenario's docstring."""

    what: str
    tried: int
    lost: int
    asked: str
    seen: str


class Overdue(KeyboardInterrupt):
    """A scenario has not ended within its bound. Of KeyboardInterrupt's kind: asyncio lets that one through."""


Scenario = Callable[[int], Row]
Entry = tuple[Scenario, int, int]


def name_of(scenario: Scenario) -> str:
    """Return how the scenario is called on the command line."""
    return f"{Path(scenario.__code__.co_filename).stem}.{scenario.__name__}"


def what_of(scenario: Scenario) -> str:
    """Return what the scenario tries: its docstring's first line."""
    return (scenario.__doc__ or scenario.__name__).strip().splitlines()[0].rstrip(".")


def find_scenarios() -> Iterator[Entry]:
    """Yield (scenario, full, quick) of all modules that are there."""
    paths = [path for path in sys.path if Path(path).resolve() != HERE]
    # This folder comes last: a module of it may be called like one of the standard library.
    sys.path[:] = [str(HERE.parent.parent), str(HERE.parent), *paths, str(HERE)]
    for name in MODULES:
        path = HERE / f"{name}.py"
        if path.exists():
            yield from _module(name, path).SCENARIOS  # type: ignore[attr-defined]


def _module(name: str, path: Path) -> object:
    name = f"{name}_scenarios" if name in sys.stdlib_module_names else name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Overdue inside when the time is up, in the main thread alone, and say where it hangs."""

    def overdue(*_: object) -> None:
        faulthandler.dump_traceback(all_threads=True)
        raise Overdue(f"it took more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_one(scenario: Scenario, n: int) -> Row:
    """Return the scenario's row; what it raises becomes one with a loss."""
    what = what_of(scenario)
    try:
        with bounded(BOUND):
            row = scenario(n)
        _no_child_is_left()
    except (Exception, Overdue) as error:
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        facts = str(error) or f"{where.name}: {where.line}"
        return Row(what, n, 1, "", f"{type(error).__name__}: {facts}")
    return row if row.what else row._replace(what=what)


def _no_child_is_left() -> None:
    try:
        left = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise AssertionError(f"a child process is left: {left}")


def cell(text: object, width: int) -> str:
    """Return the text for a cell of a Markdown table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return line if len(line) <= width else line[: width - 3] + "..."


def table(rows: Iterable[Row]) -> str:
    """Return the rows as one Markdown table."""
    lines = ["| what was tried | how often | lost | asked for | seen |", "|---|---:|---:|---|---|"]
    for row in rows:
        cells = (cell(row.what, 200), f"{row.tried:,}", f"{row.lost:,}", cell(row.asked, 200), cell(row.seen, SHOWN))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the scenarios that are asked for, print a line for each and the table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a part of each, under a minute together")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a scenario or its module; all if none is named")
    options = parser.parse_args(argv)
    entries = []
    known: set[str] = set()
    for scenario, full, quick in find_scenarios():
        names = {name_of(scenario), scenario.__name__, name_of(scenario).partition(".")[0]}
        known |= names
        if not options.names or names & set(options.names):
            entries.append((scenario, quick if options.quick else full))
    if unknown := set(options.names) - known:
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(sorted(known))}")
    rows, start = [], time.monotonic()
    for scenario, n in entries:
        began = time.monotonic()
        row = try_one(scenario, n)
        rows.append(row)
        verdict, took = "LOST" if row.lost else "ok", time.monotonic() - began
        print(f"{verdict:4} {took:6.1f} s  {name_of(scenario)}: {cell(row.seen or row.asked, SHOWN)}", flush=True)
    took = time.monotonic() - start
    print(f"\n{table(rows)}\n\n{took:.0f} s, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.modules["run"] = sys.modules["__main__"]  # scenarios import Row from it
    sys.exit(main(sys.argv[1:]))
