"""One set of files, and every way to carry it: a checkout, an install, one file, a vendored folder."""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from email.parser import BytesParser
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import make_pyz

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = f"copepod {PROJECT['project']['version']}\n"
MODULES = {path.name for path in ROOT.glob("*.py")}
PAGE = make_pyz.PAGE
SMALL = 128_000  # bytes of the one file
WHEEL = 182_000  # of the wheel, which has every comment: they are a quarter of it
BOUND = 300  # seconds; a package index may be slow
# Taken before the tests change the environment: pip's settings count, what was said to this Python does not.
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}


def run(*argv: object, cwd: Path, **variables: str) -> str:
    """What the program prints; it must succeed."""
    words, environ = [str(word) for word in argv], {**ENVIRON, **variables}
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_to(target: Path) -> Path:
    """Copy the files of the checkout, and nothing that was made from them."""
    target.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, target)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_to(tmp_path / "checkout")


def serves(*argv: object, cwd: Path) -> None:
    """Start the program, have one request answered and the chat page given, stop it."""
    endpoints = [f"gateway.http.endpoints.{name}.enabled=true" for name in ("chatCompletions", "webchat")]
    options = [word for setting in ("gateway.port=0", *endpoints) for word in ("--set", setting)]
    words, environ = [str(word) for word in (*argv, *options)], {**ENVIRON, "HOME": str(cwd)}
    child = subprocess.Popen(words, cwd=cwd, env=environ, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        found = re.fullmatch(rb"copepod listening on http://(127\.0\.0\.1:\d+)\n", child.stdout.readline())
        assert found
        connection = http.client.HTTPConnection(found[1].decode(), timeout=BOUND)
        body = json.dumps({"model": "copepod", "messages": [{"role": "user", "content": "from afar"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.load(answer)["choices"][0]["message"]["content"] == "from afar"
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, (ROOT / PAGE).read_bytes())
        connection.close()
        child.send_signal(signal.SIGTERM)
        assert child.wait(BOUND) == 0
    finally:
        child.kill()
        child.wait(BOUND)
        child.stdout.close()


# A bare checkout


def test_a_checkout_runs(checkout: Path) -> None:
    assert run(sys.executable, "-S", "gateway.py", "--version", cwd=checkout) == VERSION
    serves(sys.executable, "-S", "gateway.py", cwd=checkout)


def test_a_checkout_has_its_tests_collected(checkout: Path) -> None:
    assert "tests collected" in run(sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=checkout)


def test_a_checkout_is_typed(checkout: Path) -> None:
    if find_spec("mypy") is None:
        pytest.skip("mypy is not here")
    run(sys.executable, "-m", "mypy", "--strict", *sorted(MODULES), "tests/pyz_main.py", cwd=checkout)


# Installed


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an install needs, fetched once."""
    folder = tmp_path_factory.mktemp("wheels")
    needed = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    if find_spec("pip") is None:
        pytest.skip("pip is not here")
    try:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *needed, cwd=folder)
    except AssertionError as e:
        if "CI" in os.environ:
            raise
        pytest.skip(f"no package index answers: {str(e).splitlines()[-1]}")
    return folder


class Environment:
    """A fresh virtual environment; the pip that installs into it is ours, and knows `wheels` alone."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder, self.variables = folder, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        venv.create(folder, symlinks=True)
        self.site = next(folder.glob("lib/python*/site-packages"))

    def run(self, program: str, *argv: object) -> str:
        return run(self.folder / "bin" / program, *argv, cwd=self.folder)

    def install(self, *argv: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python")
        run(*pip, "install", "--quiet", *argv, cwd=self.folder, **self.variables)

    def installed(self) -> set[str]:
        """What lies in site-packages."""
        return set(os.listdir(self.site))

    def works(self) -> None:
        """Every door of an installed copepod opens, and none of its leaves lies beside it."""
        assert self.run("copepod", "--version") == VERSION
        assert self.run("python", "-m", "copepod.gateway", "--version") == VERSION
        stems = sorted(name.removesuffix(".py") for name in MODULES)
        code = f"import copepod.gateway, json5, importlib.util as i; print(*filter(i.find_spec, {stems}))"
        assert self.run("python", "-I", "-c", code) == "\n"
        serves(self.folder / "bin" / "copepod", cwd=self.folder)


@pytest.mark.network
def test_installed(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    environment = Environment(tmp_path / "venv", wheels)
    environment.install(checkout)
    environment.works()
    assert {name for name in environment.installed() if "json5" not in name} == {
        "copepod",
        f"{VERSION.strip().replace(' ', '-')}.dist-info",
    }


@pytest.mark.network
def test_installed_to_be_edited(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    environment = Environment(tmp_path / "venv", wheels)
    environment.install("--editable", checkout)
    environment.works()
    (checkout / "gateway.py").write_text("def main(): print('edited')\n", encoding="utf-8")
    assert environment.run("copepod") == "edited\n"


@pytest.mark.network
def test_the_wheel_holds_the_package_and_nothing_else(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    argv = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, checkout)
    run(sys.executable, *argv, cwd=tmp_path, **variables)
    (file,) = tmp_path.glob("*.whl")
    assert file.stat().st_size < WHEEL
    with ZipFile(file) as wheel:
        names = wheel.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        (licence,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        about = BytesParser().parsebytes(wheel.read(metadata))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"copepod/{name}" for name in (*MODULES, "py.typed", PAGE)
    }
    assert (about["License-Expression"], about["Requires-Python"]) == ("MIT", ">=3.11")
    required = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == PROJECT["project"]["dependencies"]
    assert set(about.get_all("Provides-Extra", [])) == {"fast", "test", "dev", "fuzz"}


def test_the_version_is_one(checkout: Path) -> None:
    code = "import gateway; print('copepod', gateway.VERSION)"
    assert run(sys.executable, "-c", code, cwd=checkout) == VERSION


# One file


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pyz") / "copepod.pyz"
    make_pyz.build(file)
    return file


@pytest.fixture(scope="session")
def packed(pyz: Path) -> dict[str, bytes]:
    """The modules in the one file, and the page, by their path."""
    with ZipFile(pyz) as archive:
        first, *parts = archive.read("modules").split(b"\f")
    assert not first
    return {name.decode(): source for name, _, source in (part.partition(b"\n") for part in parts)}


def alone(pyz: Path, *argv: str) -> Sequence[object]:
    """The one file by a Python that sees nothing but the standard library."""
    return (sys.executable, "-I", "-S", pyz, *argv)


def test_one_file_serves(pyz: Path, tmp_path: Path) -> None:
    assert run(*alone(pyz, "--version"), cwd=tmp_path) == VERSION
    serves(*alone(pyz), cwd=tmp_path)


def test_one_file_starts_by_itself(pyz: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENVIRON['PATH']}"
    assert run(pyz, "--version", cwd=tmp_path, PATH=path) == VERSION


def test_one_file_reads_json5(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json5").write_text("{ /* ours */ gateway: { port: 4321, }, }", encoding="utf-8")
    shown = run(*alone(pyz, "config", "show", "--config", "mine.json5"), cwd=tmp_path, HOME=str(tmp_path))
    assert json.loads(shown)["gateway"]["port"] == 4321


def test_one_file_runs_a_function(pyz: Path, tmp_path: Path) -> None:
    config = {
        "agents": {"list": [{"id": "main", "model": "mine/x"}]},
        "models": {"providers": {"mine": {"api": "python", "entry": "shouts:shout"}}},
    }
    (tmp_path / "shouts.py").write_text("def shout(message):\n    return message.upper()\n", encoding="utf-8")
    (tmp_path / "mine.json5").write_text(json.dumps(config), encoding="utf-8")
    argv = alone(pyz, "agent", "--local", "--message", "hello", "--config", "mine.json5")
    assert run(*argv, cwd=tmp_path, HOME=str(tmp_path)) == "HELLO\n"


def test_one_file_is_the_same_each_time(pyz: Path, tmp_path: Path) -> None:
    make_pyz.build(tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_one_file_uses_its_own_modules(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "copepod").mkdir()
    for name in ("json5.py", "copepod/gateway.py"):
        (tmp_path / name).write_text("raise AssertionError", encoding="utf-8")
    (tmp_path / "mine.json5").write_text("{ /* ours */ }", encoding="utf-8")
    argv = (sys.executable, "-S", pyz, "config", "show", "--config", "mine.json5")
    assert json.loads(run(*argv, cwd=tmp_path, HOME=str(tmp_path), PYTHONPATH=str(tmp_path)))


def test_one_file_shows_its_lines_in_tracebacks(pyz: Path, tmp_path: Path) -> None:
    config = {
        "agents": {"list": [{"id": "main", "model": "mine/x"}]},
        "models": {"providers": {"mine": {"api": "python", "entry": "stack:stack"}}},
    }
    code = "import traceback\n\nasync def stack(message):\n    return ''.join(traceback.format_stack())\n"
    (tmp_path / "stack.py").write_text(code, encoding="utf-8")
    (tmp_path / "mine.json5").write_text(json.dumps(config), encoding="utf-8")
    argv = alone(pyz, "agent", "--local", "--message", "hello", "--config", "mine.json5")
    shown = run(*argv, cwd=tmp_path, HOME=str(tmp_path))
    frames = re.findall(rf'File "{re.escape(str(pyz))}/copepod/(\w+\.py)", line (\d+), in .*\n +(.+)', shown)
    assert {"gateway.py", "cli.py", "python_agents.py"} <= {name for name, _, _ in frames}
    for name, row, line in frames:
        assert line in (ROOT / name).read_text(encoding="utf-8").splitlines()[int(row) - 1]


def test_one_file_holds_the_modules_and_the_licences(pyz: Path, packed: dict[str, bytes]) -> None:
    with ZipFile(pyz) as archive:
        assert set(archive.namelist()) == {"__main__.py", "modules", "copepod/LICENSE", "json5/LICENSE"}
        assert archive.read("__main__.py") == (ROOT / "tests" / "pyz_main.py").read_bytes()
        assert archive.read("copepod/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"Apache License" in archive.read("json5/LICENSE")
    assert list(packed) == sorted([*make_pyz.sources(), f"copepod/{PAGE}"])
    ours = {name.removeprefix("copepod/") for name in packed if not name.startswith("json5/")}
    assert ours == {*MODULES, PAGE}
    assert packed[f"copepod/{PAGE}"] == (ROOT / PAGE).read_bytes()


def test_one_file_is_small(pyz: Path) -> None:
    assert pyz.stat().st_size < SMALL


@pytest.mark.parametrize("name", sorted(make_pyz.sources()))
def test_one_file_does_the_same(name: str, packed: dict[str, bytes]) -> None:
    assert statements(packed[name]) == statements(make_pyz.sources()[name])


def statements(source: bytes) -> list[tuple[int, str]]:
    """Each statement of a module with its line, and without the docstrings in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return [(node.lineno, ast.dump(node)) for node in ast.walk(tree) if isinstance(node, ast.stmt)]


# Vendored


def test_vendored_beside_a_foreign_module_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "app" / "_vendor" / "copepod"
    folder.mkdir(parents=True)
    for name in (*MODULES, PAGE):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "auth.py").write_text("foreign = True\n", encoding="utf-8")
    code = (
        "import auth, app._vendor.copepod.gateway as gateway\n"
        "assert auth.foreign and gateway.auth is not auth and gateway.auth.Gate\n"
        "raise SystemExit(gateway.main(['--version']))"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path) == VERSION
    serves(sys.executable, "-m", "app._vendor.copepod.gateway", cwd=tmp_path)
