"""The page on embedding: its example, installed and vendored, run as it stands there and read by a type checker."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOUND = 120  # seconds
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}

# Uses that a checker refuses, and its word for each. If it knew nothing of the package, it would let all of them pass.
WRONG = {
    'gateway.port + ""': "operator",
    "gateway.url.nothing": "attr-defined",
    "gateway.nothing": "attr-defined",
    "Gateway(agents=reply)": "arg-type",
    "Gateway({}, {}, {})": "call-arg",
    "with gateway: pass": "attr-defined",
}


class Blocks(NamedTuple):
    """What the page says to paste."""

    example: str
    copy: str
    mypy_ini: str


@pytest.fixture(scope="module")
def page() -> Blocks:
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    found = re.findall(r"^    .+(?:\n+    .+)*$", text, re.MULTILINE)
    return Blocks(*(textwrap.dedent(block) + "\n" for block in found))


@pytest.fixture
def installed(tmp_path: Path, page: Blocks) -> Path:
    """A folder with the example, and a Python of its own that has the package."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "copepod").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "py.typed"]:
        shutil.copy(path, site / "copepod")
    (tmp_path / "example.py").write_text(page.example, encoding="utf-8")
    return tmp_path


@pytest.fixture
def vendored(tmp_path: Path, page: Blocks) -> Path:
    """A folder with the example and, by the page's own commands, the files; a module `auth` is somebody else's."""
    subprocess.run(["/bin/sh", "-e", "-c", page.copy], cwd=tmp_path, env={**ENVIRON, "COPEPOD": str(ROOT)}, check=True)
    example = page.example.replace("from copepod.", "from app._vendor.copepod.")
    (tmp_path / "auth.py").write_text("foreign: int = 1\n", encoding="utf-8")
    (tmp_path / "example.py").write_text(f"import auth\n{example}assert auth.foreign\n", encoding="utf-8")
    return tmp_path


def answers(python: Path | str, folder: Path) -> None:
    """Run the example, ask it, and end it; it has printed its one line and nothing else."""
    child = subprocess.Popen(
        [str(python), "example.py"],
        cwd=folder,
        env={**ENVIRON, "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        found = re.fullmatch(r"listening on http://(127\.0\.0\.1:\d+)\n", child.stdout.readline())
        assert found
        connection = http.client.HTTPConnection(found[1], timeout=BOUND)
        body = json.dumps({"messages": [{"role": "user", "content": "Warm"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        connection.close()
        assert answer["choices"][0]["message"]["content"] == "Warm? It is 20 degrees. "
        assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
        child.terminate()  # nothing catches it: the signals are the application's
        assert (*child.communicate(timeout=BOUND), child.returncode) == ("", "", -signal.SIGTERM)
    finally:
        child.kill()
        child.communicate(timeout=BOUND)


def mypy(folder: Path, *argv: str) -> str:
    """What `mypy --strict` says of the folder's files."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not here")
    words = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", os.devnull, *argv]
    done = subprocess.run(words, cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_example_is_about_twenty_lines(page: Blocks) -> None:
    assert len([line for line in page.example.splitlines() if line]) <= 20


def test_the_example_installed(installed: Path) -> None:
    answers(installed / "venv" / "bin" / "python", installed)


def test_the_example_vendored(vendored: Path) -> None:
    answers(sys.executable, vendored)


def test_the_types_installed(installed: Path, page: Blocks) -> None:
    """The example is right for a strict checker, and each wrong use is seen."""
    first = 1 + page.example.count("\n")
    wrong = "async def wrong(gateway: Gateway) -> None:\n" + "".join(f"    {line}\n" for line in WRONG)
    (installed / "wrong.py").write_text(page.example + wrong, encoding="utf-8")
    said = mypy(installed, "--python-executable", "venv/bin/python", "example.py", "wrong.py")
    seen = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([a-z-]+)\]$", said, re.MULTILINE)
    assert list(dict.fromkeys(seen)) == [
        ("wrong", str(first + number), code) for number, code in enumerate(WRONG.values(), 1)
    ], said


def test_the_types_vendored(vendored: Path, page: Blocks) -> None:
    (vendored / "mypy.ini").write_text(page.mypy_ini, encoding="utf-8")
    assert mypy(vendored, "example.py") == ""
