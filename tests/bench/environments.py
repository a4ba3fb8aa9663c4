"""What the peers are installed in: `python environments.py` makes it, once, below `.venv-bench/`.

Each has a virtual environment of its own with nothing in it that it does not ask for, not even pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENVS = ROOT / ".venv-bench"
LOAD = VENVS / "load"
OWN = ("copepod", "copepod[fast]")  # installed from this checkout, with its extras
BESIDE = ("pyproject.toml", "py.typed", "README.md", "LICENSE")
LIMITS = ("streams", "protocol")  # run on copepod's Python
PEERS = ("fastapi", "starlette", "aiohttp", "sanic", "microdot", "hypercorn", "granian", "litellm")
PORTKEY = VENVS / "portkey"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
TOO_LONG = 900  # seconds for one installation


def python_of(name: str) -> Path:
    """Return the path of the Python that `name` is installed for."""
    return VENVS / (name if name in OWN + PEERS else "copepod") / "bin" / "python"


def node() -> str | None:
    """Return the path of this machine's node."""
    return shutil.which("node")


def missing(name: str) -> str:
    """Return why `name` cannot be measured here, "" when it can."""
    if name == "node":
        return "" if node() else "there is no node here"
    if name == "portkey":
        return "" if node() and (PORTKEY / "node_modules").exists() else "it is not installed: make bench-setup"
    if name == "copepod[fast]" and not next((VENVS / name / "lib").glob("python*/site-packages/uvloop"), None):
        return "uvloop is not installed"
    return "" if python_of(name).exists() else "it is not installed: make bench-setup"


def packages(name: str) -> Path | None:
    """Return the folder of what is installed for `name`, None when it needs nothing beyond its interpreter."""
    if name == "portkey":
        return PORTKEY / "node_modules"
    found = (VENVS / name / "lib").glob("python*/site-packages") if name in OWN + PEERS else iter(())
    return next(found, None)


def size(name: str) -> tuple[float, int]:
    """Return the MiB on disk of what is installed for `name` beside its interpreter, and of how many packages."""
    folder = packages(name)
    if folder is None:
        return 0.0, 0
    total = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    lock = folder / ".package-lock.json"
    count = len(json.loads(lock.read_text())["packages"]) if lock.exists() else len([*folder.glob("*.dist-info")])
    return total / 2**20, count


def version(name: str) -> str:
    """Return the version of `name` that is installed, "" for what has none."""
    if name == "node":
        return subprocess.run([node() or "node", "--version"], capture_output=True, text=True).stdout.strip()
    folder = packages(name)
    if folder is None:
        return ""
    if name == "portkey":
        return str(json.loads((folder / "@portkey-ai" / "gateway" / "package.json").read_text())["version"])
    found = [path.name for path in folder.glob("*.dist-info")]
    wanted = f"{name.partition('[')[0]}-"
    return next((one.removesuffix(".dist-info").split("-")[1] for one in found if one.lower().startswith(wanted)), "")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: list[str]) -> str:
    """Return the last line of what `command` says of its failure, "" when it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOO_LONG)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
    return lines[-1] if done.returncode else ""


def install(name: str, arguments: list[str]) -> str:
    """Make the virtual environment of `name` anew, with what pip's `arguments` name; return why it failed, or ""."""
    folder = VENVS / name
    failure = run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
    failure = failure or run([*PIP, "--python", str(folder / "bin" / "python"), "install", *arguments])
    if failure:
        shutil.rmtree(folder, ignore_errors=True)
    return failure


def install_own() -> None:
    """Install this checkout, from a copy: setuptools leaves what it builds beside the source."""
    with tempfile.TemporaryDirectory() as copy:
        for path in [*ROOT.glob("*.py"), *(ROOT / name for name in BESIDE)]:
            shutil.copy(path, copy)
        for name in OWN:
            failure = install(name, [copy + name.removeprefix("copepod")])
            if failure:
                raise SystemExit(f"{name}: {failure}")


def is_current() -> bool:
    """Return whether what is installed is this checkout."""
    ours = {path.name: path.read_bytes() for path in ROOT.glob("*.py")}
    for name in OWN:
        folder = packages(name)
        if folder is None or {path.name: path.read_bytes() for path in folder.glob("copepod/*.py")} != ours:
            return False
    return True


def install_portkey() -> str:
    """Install Portkey's gateway; return why it failed, or ""."""
    if not node() or not shutil.which("npm"):
        return "there is no node or no npm here"
    shutil.rmtree(PORTKEY, ignore_errors=True)
    PORTKEY.mkdir(parents=True)
    shutil.copy(HERE / "requirements" / "portkey.json", PORTKEY / "package.json")
    options = ["--prefix", str(PORTKEY), "--ignore-scripts", "--no-audit", "--no-fund", "--omit=dev", "--silent"]
    failure = run(["npm", "install", *options])
    if failure:
        shutil.rmtree(PORTKEY)
    return failure


def main() -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not hasattr(os, "sched_setaffinity"):
        raise SystemExit("the bench needs Linux and a C compiler for its load")
    VENVS.mkdir(exist_ok=True)
    failure = run([compiler, "-O2", "-o", str(LOAD), str(HERE / "load.c")])
    if failure:
        raise SystemExit(f"load.c: {failure}")
    install_own()
    for name in (*PEERS, "portkey"):
        start = time.monotonic()
        requirements = ["--requirement", str(HERE / "requirements" / f"{name}.txt")]
        failure = install_portkey() if name == "portkey" else install(name, requirements)
        say(f"{name}: {f'left out: {failure}' if failure else f'{time.monotonic() - start:.0f} s'}")
    if not node():
        say("node: left out: there is none here")


if __name__ == "__main__":
    main()
